package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
)

func TestOutcomeOf(t *testing.T) {
	e := func(class keyunseal.Class, op string, status int) *keyunseal.Error {
		return &keyunseal.Error{Op: op, Class: class, Status: status, Code: "c", RequestID: "r"}
	}
	down := e(keyunseal.ClassUnreachable, "unwrap", 0)
	disabled := e(keyunseal.ClassKeyUnusable, "unwrap", 403)
	wrongAnswer := e(keyunseal.ClassIntegrity, "unwrap", 0)
	badToken := e(keyunseal.ClassIntegrity, "token", 0)
	noFile := &keyunseal.Error{Op: "read host key", Class: keyunseal.ClassKeyUnusable}
	for _, tt := range []struct {
		name string
		err  error
		want lifecycle.Kind
	}{
		{"none", nil, lifecycle.Success},
		{"vault down", fmt.Errorf("token 0: %w", down), lifecycle.Transient},
		{"throttled", e(keyunseal.ClassThrottled, "unwrap", 429), lifecycle.Transient},
		{"malformed answer", e(keyunseal.ClassMalformed, "unwrap", 0), lifecycle.Transient},
		{"panic of the SDK", e(keyunseal.ClassInternal, "unwrap", 0), lifecycle.Transient},
		{"disabled", disabled, lifecycle.Denied},
		{"no permission", e(keyunseal.ClassDenied, "unwrap", 403), lifecycle.Denied},
		{"identity not assigned", e(keyunseal.ClassIdentity, "unwrap", 400), lifecycle.Denied},
		{"identity endpoint busy", e(keyunseal.ClassIdentity, "unwrap", 429), lifecycle.Transient},
		{"wrong answer", wrongAnswer, lifecycle.Integrity},
		{"bad token", badToken, lifecycle.Misconfigured},
		{"no host key file", noFile, lifecycle.Misconfigured},
		{"forged header", fmt.Errorf("x: %w", sector.ErrAuth), lifecycle.Misconfigured},
		{"header gone", sector.ErrNotVolume, lifecycle.Misconfigured},
		{"timeout", context.DeadlineExceeded, lifecycle.Transient},
		{"one down, one disabled", errors.Join(disabled, down), lifecycle.Transient},
		{"one disabled, one without file", errors.Join(noFile, disabled), lifecycle.Denied},
		{"one wrong, one without file", errors.Join(noFile, wrongAnswer), lifecycle.Integrity},
	} {
		if got := outcomeOf(tt.err); got.Kind != tt.want || tt.err != nil && got.Text == "" {
			t.Errorf("%s: %+v, want %v", tt.name, got, tt.want)
		}
	}
	if o := outcomeOf(errors.Join(noFile, disabled)); o.Code != "c" || o.RequestID != "r" || !o.Answered || o.Class != "key unusable" {
		t.Errorf("%+v", o)
	}
}

func TestLifeConfig(t *testing.T) {
	token := func(typ string, wrapped int) sector.KeyToken {
		text, _ := json.Marshal(map[string]any{
			"type": typ, "keyslots": []string{}, "version": 1, "alg": "RSA-OAEP-256", "identity": "managed",
			"kid":     "https://example.vault.azure.net/keys/kek/" + strings.Repeat("0", 32),
			"wrapped": make([]byte, wrapped), "canary": make([]byte, wrapped), "canary_sha256": make([]byte, 32),
			"host_key_id": strings.Repeat("0", 16), "salt": make([]byte, 32), "sealed": make([]byte, 60),
		})
		return sector.KeyToken{Type: typ, Text: text}
	}
	local, small, large := token(keyunseal.TypeHostKey, 256), token(keyunseal.TypeKeyVault, 256), token(keyunseal.TypeKeyVault, 512)
	defaults := lifeFlags{heartbeat: autoHeartbeat, grace: time.Hour, policy: "stop", expired: "warn", confirm: time.Minute, rotation: time.Hour}
	for _, tt := range []struct {
		name      string
		tokens    []sector.KeyToken
		change    func(*lifeFlags)
		heartbeat time.Duration
		rotation  time.Duration
		bad       bool
	}{
		{"host key", []sector.KeyToken{local}, nil, 0, 0, false},
		{"RSA-2048", []sector.KeyToken{small}, nil, 10 * time.Minute, time.Hour, false},
		{"RSA-4096", []sector.KeyToken{small, large}, nil, 30 * time.Minute, time.Hour, false},
		{"both", []sector.KeyToken{local, small}, nil, 10 * time.Minute, time.Hour, false},
		{"by hand", []sector.KeyToken{large}, func(l *lifeFlags) { l.heartbeat, l.rotation = time.Minute, 0 }, time.Minute, 0, false},
		{"never", []sector.KeyToken{large}, func(l *lifeFlags) { l.heartbeat = 0 }, 0, time.Hour, false},
		{"policy", []sector.KeyToken{large}, func(l *lifeFlags) { l.policy = "panic" }, 0, 0, true},
		{"expired", []sector.KeyToken{large}, func(l *lifeFlags) { l.expired = "ignore" }, 0, 0, true},
		{"grace", []sector.KeyToken{large}, func(l *lifeFlags) { l.grace = 25 * time.Hour }, 0, 0, true},
		{"offline", []sector.KeyToken{large}, func(l *lifeFlags) { l.maxOffline = time.Minute }, 0, 0, true},
	} {
		l := defaults
		if tt.change != nil {
			tt.change(&l)
		}
		bits, remote := keySize(tt.tokens)
		c, err := l.config("0f8fad5b-d9cb-469f-a165-70867728950e", bits, remote)
		if tt.bad {
			if exitCode(err) != codeUsage || err == nil {
				t.Errorf("%s: %v, want a usage error", tt.name, err)
			}
			continue
		}
		if err != nil || c.Heartbeat != tt.heartbeat || c.Rotation != tt.rotation {
			t.Errorf("%s: heartbeat %v, rotation %v, %v", tt.name, c.Heartbeat, c.Rotation, err)
		}
	}
}

func TestRewrapOutcome(t *testing.T) {
	for code, want := range map[int]lifecycle.Kind{
		codeThrottled: lifecycle.Transient, codeUnreachable: lifecycle.Transient, codeIdentity: lifecycle.Transient, codeBusy: lifecycle.Transient, -1: lifecycle.Transient,
		codeUsage: lifecycle.Misconfigured, codeDenied: lifecycle.Misconfigured, codeKeyUnusable: lifecycle.Misconfigured, codeAuth: lifecycle.Misconfigured,
	} {
		if got := rewrapOutcome(code); got.Kind != want {
			t.Errorf("exit code %d: %v, want %v", code, got.Kind, want)
		}
	}
}
