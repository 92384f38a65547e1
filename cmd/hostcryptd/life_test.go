package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
	"hostcryptd/sector/sectortest"
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
		{"token not accepted", e(keyunseal.ClassDenied, "unwrap", 401), lifecycle.Transient},
		{"identity not assigned", &keyunseal.Error{Op: "unwrap", Class: keyunseal.ClassIdentity, Status: 400, Code: "c", Refused: true}, lifecycle.Denied},
		{"identity endpoint, an answer of no known meaning", e(keyunseal.ClassIdentity, "unwrap", 400), lifecycle.Transient},
		{"identity endpoint busy", e(keyunseal.ClassIdentity, "unwrap", 429), lifecycle.Transient},
		{"wrong answer", wrongAnswer, lifecycle.Integrity},
		{"bad token", badToken, lifecycle.Misconfigured},
		{"no host key file", noFile, lifecycle.Misconfigured},
		{"forged header", fmt.Errorf("x: %w", sector.ErrAuth), lifecycle.Misconfigured},
		{"header gone", sector.ErrNotVolume, lifecycle.Misconfigured},
		{"disk that is too small", fmt.Errorf("x: %w: it has 7 bytes", sector.ErrDevice), lifecycle.Misconfigured},
		{"disk that can't be read", fmt.Errorf("x: %w: the header: %w", sector.ErrDevice, &os.PathError{Op: "read", Path: "d", Err: syscall.EIO}), lifecycle.Transient},
		{"timeout", context.DeadlineExceeded, lifecycle.Transient},
		{"no process", fmt.Errorf("token 0 (t): deriving the data key in a child process: %w", syscall.EAGAIN), lifecycle.Transient},
		{"no descriptor", fmt.Errorf("token 0 (t): %w", &os.SyscallError{Syscall: "pipe2", Err: syscall.EMFILE}), lifecycle.Transient},
		{"child killed at its limit", fmt.Errorf("token 0 (t): deriving the data key in a child process: %w", &exec.ExitError{ProcessState: &os.ProcessState{}}), lifecycle.Transient},
		{"one down, one disabled", errors.Join(disabled, down), lifecycle.Transient},
		{"one disabled, one without file", errors.Join(noFile, disabled), lifecycle.Denied},
		{"one wrong, one without file", errors.Join(noFile, wrongAnswer), lifecycle.Integrity},
	} {
		if got := outcomeOf(tt.err); got.Kind != tt.want || tt.err != nil && got.Text == "" {
			t.Errorf("%s: %+v, want %v", tt.name, got, tt.want)
		}
	}

	// Of two tokens the more hopeful counts, in whichever order they were tried.
	type failure struct {
		name, class string
		err         error
		kind        lifecycle.Kind
	}
	singles := []failure{ // the most hopeful first
		{"vault down", "vault unreachable", down, lifecycle.Transient},
		{"timeout", "no answer", context.DeadlineExceeded, lifecycle.Transient},
		{"no descriptor", "", &os.SyscallError{Syscall: "pipe2", Err: syscall.EMFILE}, lifecycle.Transient},
		{"disk that can't be read", "", fmt.Errorf("x: %w: %w", sector.ErrDevice, syscall.EIO), lifecycle.Transient},
		{"disabled", "key unusable", disabled, lifecycle.Denied},
		{"wrong answer", "integrity failure", wrongAnswer, lifecycle.Integrity},
		{"bad token", "integrity failure", badToken, lifecycle.Misconfigured},
		{"forged header", "", sector.ErrAuth, lifecycle.Misconfigured},
		{"disk that is too small", "", fmt.Errorf("x: %w", sector.ErrDevice), lifecycle.Misconfigured},
	}
	for i, a := range singles {
		for _, b := range singles[i:] {
			x, y := fmt.Errorf("token 0: %w", a.err), fmt.Errorf("token 1: %w", b.err)
			for _, err := range []error{errors.Join(x, y), errors.Join(y, x), fmt.Errorf("the volume: %w", errors.Join(y, x)), errors.Join(errors.Join(y), x)} {
				if got := outcomeOf(err); got.Kind != a.kind || got.Class != a.class || got.Text != err.Error() {
					t.Errorf("%s, and %s: %+v, want %v, %q", a.name, b.name, got, a.kind, a.class)
				}
			}
		}
	}
	if o := outcomeOf(errors.Join(&os.SyscallError{Syscall: "pipe2", Err: syscall.EMFILE}, disabled)); o.Code != "" || o.RequestID != "" || o.Answered {
		t.Errorf("a denial beside another failure is told of: %+v", o)
	}
	if o := outcomeOf(errors.Join(noFile, disabled)); o.Code != "c" || o.RequestID != "r" || !o.Answered || o.Class != "key unusable" {
		t.Errorf("%+v", o)
	}
}

// TestLookOutcome: beside a key that a vault denies, each other that there may be. What
// may be an outage of a vault, or a TPM that is busy, doesn't let a volume stop; what
// can't work on this host doesn't keep it from that.
func TestLookOutcome(t *testing.T) {
	vault := func(class keyunseal.Class, status int) *keyunseal.Error {
		return &keyunseal.Error{Op: "probe", Class: class, Status: status, Code: map[bool]string{true: "c"}[status != 0]}
	}
	tpm := func(class keyunseal.Class) *keyunseal.Error { return &keyunseal.Error{Op: "probe", Class: class} }
	noProcess := &os.SyscallError{Syscall: "fork/exec", Err: syscall.EAGAIN}
	const T, D, I, M = lifecycle.Transient, lifecycle.Denied, lifecycle.Integrity, lifecycle.Misconfigured
	failures := []struct {
		name      string
		typ       string
		err       error
		alone     lifecycle.Kind
		now, long lifecycle.Kind // beside a denial, at first and when it has lasted for longer than localHides
	}{
		{"key disabled", keyunseal.TypeKeyVault, vault(keyunseal.ClassKeyUnusable, 403), D, D, D},
		{"no permission", keyunseal.TypeKeyVault, vault(keyunseal.ClassDenied, 403), D, D, D},
		{"key unknown", keyunseal.TypeKeyVault, vault(keyunseal.ClassKeyUnusable, 404), D, D, D},
		{"identity not assigned", keyunseal.TypeKeyVault, &keyunseal.Error{Op: "probe", Class: keyunseal.ClassIdentity, Status: 400, Refused: true}, D, D, D},

		{"unreachable", keyunseal.TypeKeyVault, vault(keyunseal.ClassUnreachable, 0), T, T, T},
		{"a fault", keyunseal.TypeKeyVault, vault(keyunseal.ClassUnreachable, 503), T, T, T},
		{"throttled", keyunseal.TypeKeyVault, vault(keyunseal.ClassThrottled, 429), T, T, T},
		{"token not accepted", keyunseal.TypeKeyVault, vault(keyunseal.ClassDenied, 401), T, T, T},
		{"a proxy's page", keyunseal.TypeKeyVault, vault(keyunseal.ClassMalformed, 200), T, T, T},
		{"login host down", keyunseal.TypeKeyVault, vault(keyunseal.ClassIdentity, 0), T, T, T},
		{"identity endpoint busy", keyunseal.TypeKeyVault, vault(keyunseal.ClassIdentity, 429), T, T, T},
		{"panic of the SDK", keyunseal.TypeKeyVault, vault(keyunseal.ClassInternal, 0), T, T, T},
		{"no answer in time", keyunseal.TypeKeyVault, context.DeadlineExceeded, T, T, T},
		{"no process for the vault's", keyunseal.TypeKeyVault, noProcess, T, T, T},

		{"TPM busy", keyunseal.TypeTPM, tpm(keyunseal.ClassTPMBusy), T, T, D},
		{"TPM locked out", keyunseal.TypeTPM, tpm(keyunseal.ClassTPMLockout), T, T, D},
		{"TPM doesn't answer in time", keyunseal.TypeTPM, context.DeadlineExceeded, T, T, D},
		{"no process for the TPM's", keyunseal.TypeTPM, noProcess, T, T, D},
		{"its process died", keyunseal.TypeTPM, tpm(keyunseal.ClassInternal), T, T, D},
		{"no process for the host key's", keyunseal.TypeHostKey, noProcess, T, T, D},

		{"no TPM", keyunseal.TypeTPM, tpm(keyunseal.ClassNoTPM), T, D, D},
		{"no certificate file", keyunseal.TypeKeyVault, &keyunseal.Error{Op: "probe", Class: keyunseal.ClassIdentity, Local: true}, T, D, D},

		{"wrong answer", keyunseal.TypeKeyVault, vault(keyunseal.ClassIntegrity, 0), I, D, D},
		{"not the TPM's", keyunseal.TypeTPM, tpm(keyunseal.ClassTPMState), M, D, D},
		{"another TPM", keyunseal.TypeTPM, tpm(keyunseal.ClassWrongKey), M, D, D},
		{"no host key file", keyunseal.TypeHostKey, &keyunseal.Error{Op: "read host key", Class: keyunseal.ClassKeyUnusable}, M, D, D},
		{"another host key", keyunseal.TypeHostKey, tpm(keyunseal.ClassWrongKey), M, D, D},
		{"a token that is damaged", keyunseal.TypeKeyVault, &keyunseal.Error{Op: "token", Class: keyunseal.ClassIntegrity}, M, D, D},
	}
	look := func(all bool, lasting time.Duration, errs ...int) lifecycle.Outcome {
		var list []sector.TokenReport
		for id, i := range errs {
			f := failures[i]
			list = append(list, sector.TokenReport{KeyToken: sector.KeyToken{ID: id, Type: f.typ}, Err: fmt.Errorf("token %d: %w", id, f.err)})
		}
		return lookOutcome(list, all, func(sector.KeyToken) time.Duration { return lasting })
	}
	hope := []lifecycle.Kind{M, I, D, T}
	for i, a := range failures {
		if got := look(true, 0, i); got.Kind != a.alone {
			t.Errorf("%s: %v, want %v", a.name, got.Kind, a.alone)
		}
		for j, b := range failures {
			want := [2]lifecycle.Kind{}
			switch {
			case a.alone == D:
				want = [2]lifecycle.Kind{b.now, b.long}
			case b.alone == D:
				want = [2]lifecycle.Kind{a.now, a.long}
			default:
				most := hope[max(slices.Index(hope, a.alone), slices.Index(hope, b.alone))]
				want = [2]lifecycle.Kind{most, most}
			}
			for n, lasting := range []time.Duration{9 * time.Minute, 11 * time.Minute} {
				got := look(true, lasting, i, j)
				if got.Kind != want[n] {
					t.Errorf("%s and %s, for %v: %v, want %v", a.name, b.name, lasting, got.Kind, want[n])
				}
				if text := fmt.Sprintf("token 0: %v\ntoken 1: %v", a.err, b.err); got.Text != text {
					t.Errorf("%s and %s: it says %q", a.name, b.name, got.Text)
				}
				if got.Kind == D && got.Class == "" {
					t.Errorf("%s and %s: a denial of no class", a.name, b.name)
				}
			}
			// As long as one hasn't been looked at, nothing is denied that wasn't before.
			if got := look(false, time.Hour, i, j); got.Kind != hope[max(slices.Index(hope, a.alone), slices.Index(hope, b.alone))] {
				t.Errorf("%s and %s, and one that wasn't looked at: %v", a.name, b.name, got.Kind)
			}
		}
	}
}

// TestRetiredMayOpen: an older version of a key opens a volume only when each newer one
// is gone for good, and not when somebody may have said no to one.
func TestRetiredMayOpen(t *testing.T) {
	failed := func(typ string, err error) sector.TokenReport {
		return sector.TokenReport{KeyToken: sector.KeyToken{Type: typ}, Err: fmt.Errorf("token 1 (%s): %w", typ, err)}
	}
	vault := func(class keyunseal.Class, status int) sector.TokenReport {
		return failed(keyunseal.TypeKeyVault, &keyunseal.Error{Op: "unwrap", Class: class, Status: status, Code: "c"})
	}
	tpm := func(class keyunseal.Class) sector.TokenReport {
		return failed(keyunseal.TypeTPM, &keyunseal.Error{Op: "unseal", Class: class, Code: "c"})
	}
	noDescriptor := &os.SyscallError{Syscall: "pipe2", Err: syscall.EMFILE}
	notHere := vault(keyunseal.ClassKeyUnusable, 404)
	for name, tt := range map[string]struct {
		others     []sector.TokenReport
		vault, tpm bool // may the vault's retired token open the volume, may the TPM's
	}{
		"none":        {nil, true, true},
		"disabled":    {[]sector.TokenReport{vault(keyunseal.ClassKeyUnusable, 403)}, false, false},
		"not allowed": {[]sector.TokenReport{vault(keyunseal.ClassDenied, 403)}, false, false},
		"not allowed, and another is unreachable": {[]sector.TokenReport{vault(keyunseal.ClassUnreachable, 0), vault(keyunseal.ClassDenied, 403)}, false, false},
		"expired, which is denied here":           {[]sector.TokenReport{vault(keyunseal.ClassKeyUnusable, 0)}, false, false},
		"identity not assigned":                   {[]sector.TokenReport{failed(keyunseal.TypeKeyVault, &keyunseal.Error{Class: keyunseal.ClassIdentity, Status: 400, Code: "c", Refused: true})}, false, false},
		"not in this vault":                       {[]sector.TokenReport{notHere}, true, true},
		"a token that is damaged":                 {[]sector.TokenReport{failed(keyunseal.TypeKeyVault, &keyunseal.Error{Op: "token", Class: keyunseal.ClassIntegrity})}, true, true},
		"another volume's key":                    {[]sector.TokenReport{failed(keyunseal.TypeKeyVault, sector.ErrAuth)}, true, true},
		"no host key file":                        {[]sector.TokenReport{failed(keyunseal.TypeHostKey, &keyunseal.Error{Op: "read host key", Class: keyunseal.ClassKeyUnusable})}, true, true},
		"not the TPM's":                           {[]sector.TokenReport{tpm(keyunseal.ClassTPMState)}, true, true},
		"the TPM is broken":                       {[]sector.TokenReport{tpm(keyunseal.ClassNoTPM)}, true, true},

		// A denial that isn't heard is a denial. A TPM's token has heard none.
		"token not accepted":        {[]sector.TokenReport{vault(keyunseal.ClassDenied, 401)}, false, true},
		"unreachable":               {[]sector.TokenReport{vault(keyunseal.ClassUnreachable, 0)}, false, true},
		"a fault":                   {[]sector.TokenReport{vault(keyunseal.ClassUnreachable, 503)}, false, true},
		"throttled":                 {[]sector.TokenReport{vault(keyunseal.ClassThrottled, 429)}, false, true},
		"malformed":                 {[]sector.TokenReport{vault(keyunseal.ClassMalformed, 200)}, false, true},
		"child died":                {[]sector.TokenReport{vault(keyunseal.ClassInternal, 0)}, false, true},
		"no identity yet":           {[]sector.TokenReport{vault(keyunseal.ClassIdentity, 429)}, false, true},
		"no answer in time":         {[]sector.TokenReport{failed(keyunseal.TypeKeyVault, context.DeadlineExceeded)}, false, true},
		"no descriptor":             {[]sector.TokenReport{failed(keyunseal.TypeKeyVault, noDescriptor)}, false, true},
		"gone, another unreachable": {[]sector.TokenReport{notHere, vault(keyunseal.ClassUnreachable, 0)}, false, true},
		"gone, another not asked":   {[]sector.TokenReport{notHere, failed(keyunseal.TypeKeyVault, noDescriptor)}, false, true},
		"TPM broken, throttled":     {[]sector.TokenReport{tpm(keyunseal.ClassNoTPM), vault(keyunseal.ClassThrottled, 429)}, false, true},
		"TPM changed, unreachable":  {[]sector.TokenReport{tpm(keyunseal.ClassTPMState), vault(keyunseal.ClassUnreachable, 0)}, false, true},
		"TPM changed, disabled":     {[]sector.TokenReport{tpm(keyunseal.ClassTPMState), vault(keyunseal.ClassKeyUnusable, 403)}, false, false},
		"TPM not asked":             {[]sector.TokenReport{failed(keyunseal.TypeTPM, noDescriptor)}, true, false},
		"gone, and gone":            {[]sector.TokenReport{notHere, notHere}, true, true},
	} {
		for typ, want := range map[string]bool{keyunseal.TypeKeyVault: tt.vault, keyunseal.TypeTPM: tt.tpm} {
			if got := retiredMayOpen(sector.KeyToken{Type: typ}, tt.others); got != want {
				t.Errorf("%s: a token %s may: %v", name, typ, got)
			}
		}
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
		{"host key", []sector.KeyToken{local}, nil, 0, time.Hour, false},
		{"RSA-2048", []sector.KeyToken{small}, nil, 10 * time.Minute, time.Hour, false},
		{"RSA-4096", []sector.KeyToken{small, large}, nil, 30 * time.Minute, time.Hour, false},
		{"both", []sector.KeyToken{local, small}, nil, 10 * time.Minute, time.Hour, false},
		{"by hand", []sector.KeyToken{large}, func(l *lifeFlags) { l.heartbeat, l.rotation = time.Minute, 0 }, time.Minute, 0, false},
		{"never", []sector.KeyToken{large}, func(l *lifeFlags) { l.heartbeat = 0 }, 0, time.Hour, false},
		{"policy", []sector.KeyToken{large}, func(l *lifeFlags) { l.policy = "panic" }, 0, 0, true},
		{"expired", []sector.KeyToken{large}, func(l *lifeFlags) { l.expired = "ignore" }, 0, 0, true},
		{"grace", []sector.KeyToken{large}, func(l *lifeFlags) { l.grace = 25 * time.Hour }, 0, 0, true},
		{"offline", []sector.KeyToken{small}, func(l *lifeFlags) { l.maxOffline = 15 * time.Minute }, 10 * time.Minute, time.Hour, false},
		{"offline, and the key's new version is larger", []sector.KeyToken{large}, func(l *lifeFlags) { l.maxOffline = 15 * time.Minute }, 10 * time.Minute, time.Hour, false},
		{"long offline", []sector.KeyToken{large}, func(l *lifeFlags) { l.maxOffline = time.Hour }, 30 * time.Minute, time.Hour, false},
		{"short offline", []sector.KeyToken{large}, func(l *lifeFlags) { l.maxOffline = time.Second }, 0, 0, true},
		{"negative offline", []sector.KeyToken{large}, func(l *lifeFlags) { l.maxOffline = -time.Hour }, 0, 0, true},
		{"offline by hand", []sector.KeyToken{large}, func(l *lifeFlags) { l.heartbeat, l.maxOffline = 13*time.Minute, 15*time.Minute }, 0, 0, true},
	} {
		l := defaults
		if tt.change != nil {
			tt.change(&l)
		}
		bits, remote := keySize(tt.tokens)
		c, err := l.config(0, bits, remote)
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

// seal and unseal of a key that is known to all.
func openSeal(_ context.Context, _ string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
	return json.Marshal(map[string]any{"type": "hostcryptd-test", "keyslots": []string{}, "key": key[:]})
}

func openUnseal(_ context.Context, _ string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
	var text struct{ Key []byte }
	err := json.Unmarshal(token, &text)
	copy(key[:], text.Key)
	return err
}

// openVolume opens a new volume on a disk in memory.
func openVolume(t *testing.T) (*sectortest.Disk, *sector.Volume) {
	t.Helper()
	disk := sectortest.New(24 << 20)
	if _, err := sector.Format(t.Context(), disk, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{openSeal}}); err != nil {
		t.Fatal(err)
	}
	v, err := sector.Open(t.Context(), disk, openUnseal, sector.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return disk, v
}

// TestReadErrorAtBoot: a disk that can't be read for a moment ends no boot, neither before
// the volume is unsealed nor while its key is waited for.
func TestReadErrorAtBoot(t *testing.T) {
	disk := sectortest.New(24 << 20)
	if _, err := sector.Format(t.Context(), disk, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{openSeal}}); err != nil {
		t.Fatal(err)
	}
	fail := func(disk *sectortest.Disk, times int) {
		var failed atomic.Int32
		disk.Fail(func(sectortest.Op, int, int64, int) error {
			if failed.Add(1) > int32(times) {
				return nil
			}
			return &os.PathError{Op: "read", Path: "/dev/sdx", Err: syscall.EIO}
		})
	}
	fail(disk, 6) // the first copy, and each place where the second can be up to its own
	_, err := sector.Open(t.Context(), disk, openUnseal, sector.OpenOptions{})
	if !errors.Is(err, sector.ErrDevice) || !errors.Is(err, syscall.EIO) {
		t.Fatalf("a disk that gives errors opens: %v", err)
	}
	boot := func(err error) lifecycle.Action {
		c := lifecycle.Config{}
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		m := lifecycle.New(c, time.Now())
		m.Unsealed(time.Now(), outcomeOf(err))
		action, _ := m.Next()
		return action
	}
	if got := boot(err); got != lifecycle.Unseal {
		t.Errorf("after a read error: %v, want another try", got)
	}
	disk.Fail(nil)
	v, err := sector.Open(t.Context(), disk, openUnseal, sector.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if got := boot(fmt.Errorf("%w: it is too small", sector.ErrDevice)); got != lifecycle.GiveUp {
		t.Errorf("a device that can't be a volume: %v", got)
	}

	d := &daemon{log: zap.NewNop()}
	read := func(d *sectortest.Disk) func() error {
		return func() error { _, _, err := sector.ReadHeader(t.Context(), d); return err }
	}
	fail(disk, 6)
	if err := d.untilRead(t.Context(), 0, read(disk)); !errors.Is(err, syscall.EIO) {
		t.Errorf("by hand: %v", err)
	}
	fail(disk, 6)
	if err := d.untilRead(t.Context(), time.Minute, read(disk)); err != nil {
		t.Errorf("of a boot: %v", err)
	}
	if err := d.untilRead(t.Context(), time.Minute, read(sectortest.New(24<<20))); !errors.Is(err, sector.ErrNotVolume) {
		t.Errorf("no volume: %v", err)
	}
	fail(disk, 1<<30)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := d.untilRead(ctx, time.Minute, read(disk)); !errors.Is(err, syscall.EIO) {
		t.Errorf("stopped meanwhile: %v", err)
	}
}

// TestHangingHeader: a disk that doesn't give out the header keeps nobody from
// looking at the keys that are known.
func TestHangingHeader(t *testing.T) {
	disk, v := openVolume(t)
	h := &keyHost{d: &daemon{volume: v, log: zap.NewNop(), opts: serveOptions{keys: keyFlags{auditLog: "none"}}}}
	reads, answers := make(chan bool, 100), make(chan bool)
	disk.Fail(func(op sectortest.Op, n int, off int64, length int) error {
		reads <- true
		<-answers
		return nil
	})
	// The first has time to get to the disk, the second finds it still there.
	for _, limit := range []time.Duration{2 * time.Second, 50 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		if list := h.tokens(ctx); len(list) != 1 {
			t.Errorf("%d tokens", len(list))
		}
		cancel()
		if s := h.headerProblem(); !strings.HasPrefix(s, "can't be read") {
			t.Errorf("the status says %q", s)
		}
	}
	if len(reads) != 1 {
		t.Errorf("%d reads of a disk that doesn't answer", len(reads))
	}
	close(answers)
	for begun := time.Now(); h.headerProblem() != ""; time.Sleep(10 * time.Millisecond) {
		if h.tokens(t.Context()); time.Since(begun) > 20*time.Second {
			t.Fatalf("the status goes on saying %q", h.headerProblem())
		}
	}
}

// TestPinOfRealRoot opens a volume as an initramfs does that remembers less of it than
// the host: once the host's pins can be read, an older header raises the alarm until it
// is accepted, and a header that is right is noted.
func TestPinOfRealRoot(t *testing.T) {
	_, v := openVolume(t)
	dir := sector.PinDir(filepath.Join(t.TempDir(), "pins"))
	moved := make(chan struct{})
	d := &daemon{volume: v, uuid: v.UUID(), moved: moved, log: zap.NewNop(), headerChanged: make(chan struct{}, 1),
		opts: serveOptions{keys: keyFlags{auditLog: "none", pins: string(dir), tpm: keyunseal.NoTPM}}}
	c := lifecycle.Config{}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	right := sector.Pin{Fingerprint: v.Known().Fingerprint, Generation: v.Known().Generation}
	newer := right
	newer.Generation += 4
	if err := dir.Set(v.UUID(), newer); err != nil {
		t.Fatal(err)
	}
	stop, err := d.startLife(t.Context(), c, &serverState{Life: lifecycle.Snapshot{State: lifecycle.Unlocked}})
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	h := d.lifeHost
	if h.tokens(t.Context()); h.headerProblem() != "" {
		t.Errorf("in the initramfs: %s", h.headerProblem())
	}
	close(moved)
	const alarm = "is not the one that this host remembers"
	for begun := time.Now(); !strings.HasPrefix(h.headerProblem(), alarm); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("on the real root the status says %q", h.headerProblem())
		}
	}
	if h.tokens(t.Context()); !strings.HasPrefix(h.headerProblem(), alarm) {
		t.Errorf("after another look the status says %q", h.headerProblem())
	}
	if v.Suspended() {
		t.Error("the volume was stopped")
	}
	if err := dir.Set(v.UUID(), right); err != nil {
		t.Fatal(err)
	}
	if h.tokens(t.Context()); h.headerProblem() != "" {
		t.Errorf("accepted, and the status says %q", h.headerProblem())
	}

	if _, err := dir.Remove(v.UUID()); err != nil {
		t.Fatal(err)
	}
	h.checkPin()
	if p, err := dir.Load(v.UUID()); err != nil || p == nil || *p != right || h.headerProblem() != "" {
		t.Errorf("the host has noted %+v, %v; the status says %q", p, err, h.headerProblem())
	}
}

// A hangingRewrap is a keyHost whose rewraps are in the hands of a disk.
type hangingRewrap struct {
	*keyHost
	disk interface{ Sync() error }
}

func (h hangingRewrap) Rotate(ctx context.Context) lifecycle.Outcome {
	return h.changeApart(ctx, func() lifecycle.Outcome { return outcomeOf(h.disk.Sync()) })
}

// TestHangingRewrap: a disk that hangs while the header is changed on it keeps nobody
// from stopping the volume, and isn't given another change.
func TestHangingRewrap(t *testing.T) {
	_, v := openVolume(t)
	disk := sectortest.New(1 << 20)
	syncs, answers := make(chan bool, 100), make(chan bool)
	disk.Fail(func(sectortest.Op, int, int64, int) error {
		syncs <- true
		<-answers
		return nil
	})
	h := hangingRewrap{&keyHost{d: &daemon{volume: v, log: zap.NewNop(), opts: serveOptions{keys: keyFlags{auditLog: "none"}}}}, disk}
	c := lifecycle.Config{Rotation: time.Second}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	runner := lifecycle.RestoreRunner(c, lifecycle.Snapshot{State: lifecycle.Unlocked}, false, h)
	go runner.Run(t.Context())
	<-syncs
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := runner.Lock(ctx); err != nil {
		t.Fatalf("a lock while the disk hangs: %v", err)
	}
	if s := runner.Snapshot(); !s.Wiped || !v.Suspended() {
		t.Errorf("%+v, keys wiped: %v", s, v.Suspended())
	}
	if o := h.Rotate(t.Context()); o.Kind != lifecycle.Transient || len(syncs) != 0 {
		t.Errorf("another change while one hangs: %+v", o)
	}
	close(answers)
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if o := h.Rotate(t.Context()); o.Kind == lifecycle.Success {
			break
		} else if time.Since(begun) > 20*time.Second {
			t.Fatalf("a change when the disk is back: %+v", o)
		}
	}
}

// TestStopFrozen: a lock and an erase end the wait of requests for a key that nobody
// asks for any more.
func TestStopFrozen(t *testing.T) {
	for name, stop := range map[string]func(*lifecycle.Runner, context.Context) error{"lock": (*lifecycle.Runner).Lock, "erase": (*lifecycle.Runner).Erase} {
		_, v := openVolume(t)
		if err := v.Suspend(sector.SuspendWait); err != nil {
			t.Fatal(err)
		}
		ended := readOf(v)
		h := &keyHost{d: &daemon{volume: v, log: zap.NewNop(), opts: serveOptions{keys: keyFlags{auditLog: "none"}}}}
		c := lifecycle.Config{Policy: lifecycle.Freeze}
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		now := time.Now()
		runner := lifecycle.RestoreRunner(c, lifecycle.Snapshot{State: lifecycle.Revoked, Policy: lifecycle.Freeze, Wiped: true, Stopped: now, NextTry: now.Add(time.Hour)}, true, h)
		go runner.Run(t.Context())
		if err := stop(runner, t.Context()); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, name, ended)
	}
}

// readOf reads from a volume, and sends how that ended.
func readOf(v *sector.Volume) <-chan error {
	ended := make(chan error, 1)
	go func() {
		_, err := v.ReadAt(make([]byte, 4096), 0)
		ended <- err
	}()
	return ended
}

func wantRefused(t *testing.T, what string, ended <-chan error) {
	t.Helper()
	select {
	case err := <-ended:
		if !errors.Is(err, sector.ErrSuspended) {
			t.Errorf("%s: a read gave %v", what, err)
		}
	case <-time.After(time.Minute):
		t.Errorf("%s: a read waits", what)
	}
}

// TestGoOnErased: a volume that was erased waits for no key, whatever its policy.
func TestGoOnErased(t *testing.T) {
	d, _ := leavingServer(t)
	d.stopLife()
	if err := d.volume.Suspend(sector.SuspendWait); err != nil {
		t.Fatal(err)
	}
	s := &serverState{Volume: d.volume.State(), Life: lifecycle.Snapshot{State: lifecycle.Erased, Policy: lifecycle.Freeze, Wiped: true}}
	for _, d.keyLost = range []bool{false, true} {
		if err := d.goOn(s); err != nil {
			t.Fatal(err)
		}
		wantRefused(t, fmt.Sprintf("key lost: %v", d.keyLost), readOf(d.volume))
		_ = d.volume.Close()
	}
}

// TestGoOnRequests: what becomes of requests to a volume without a key is what became of
// them with the server before. After a lock and an unlock that found no key they are
// refused, also where they would wait after a revocation.
func TestGoOnRequests(t *testing.T) {
	d, keeper := leavingServer(t)
	before := func() *serverState {
		t.Helper()
		d.mu.Lock()
		d.left.Life = d.life.Snapshot()
		d.left.Life.Policy = lifecycle.Freeze
		d.mu.Unlock()
		d.pushState()
		if err := d.link.send(keeperMessage{Reload: true}, nil); err != nil { // the last
			t.Fatal(err)
		}
		var last *serverState
		for {
			m := nextMessage(t, keeper)
			if m.Reload {
				return last
			}
			if m.State == nil {
				continue
			}
			var err error
			if last, err = parseState(m.State); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := errors.Join(d.life.Lock(t.Context()), d.life.Unlock(t.Context())); err != nil {
		t.Fatal(err)
	}
	d.stopLife()
	refused := before()
	if refused.Life.Locked || refused.Life.State == lifecycle.Locked {
		t.Fatalf("after lock and unlock: %+v", refused.Life)
	}
	wantRefused(t, "before", readOf(d.volume))
	first := d.volume
	if err := d.goOn(refused); err != nil {
		t.Fatal(err)
	}
	wantRefused(t, "after a lock and an unlock", readOf(d.volume))

	_ = d.volume.Close()
	d.volume = first
	if err := d.volume.Suspend(sector.SuspendWait); err != nil {
		t.Fatal(err)
	}
	waits := before()
	silent := *waits
	silent.Requests = ""
	for what, s := range map[string]*serverState{"of a revoked volume": waits, "of a version that didn't say": &silent} {
		if err := d.goOn(s); err != nil {
			t.Fatal(err)
		}
		if ended := readOf(d.volume); !d.volume.Waiting() {
			t.Errorf("a read %s: %v", what, <-ended)
		}
		_ = d.volume.Close()
	}
	_ = first.Close()
}

// TestLeftHeader: what is said of a rewrap that was killed is what it has done.
func TestLeftHeader(t *testing.T) {
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	dev, err := sector.OpenDevice(image, sector.DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if _, err := sector.Format(t.Context(), dev, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{openSeal}}); err != nil {
		t.Fatal(err)
	}
	v, err := sector.Open(t.Context(), dev, openUnseal, sector.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	h, before := &keyHost{d: &daemon{device: dev, volume: v}}, v.Known()
	if s := h.leftHeader(before); !strings.Contains(s, "as it was, of generation 1") {
		t.Error(s)
	}
	if _, err := sector.AddToken(t.Context(), dev, openUnseal, openSeal, sector.OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := h.leftHeader(before); !strings.Contains(s, "of generation 2 after 1") {
		t.Error(s)
	}
	if _, err := dev.WriteAt(make([]byte, 1<<20), 0); err != nil {
		t.Fatal(err)
	}
	if s := h.leftHeader(before); !strings.Contains(s, "can't be read") {
		t.Error(s)
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

// TestHaltEndsLook: when a volume was stopped, no look at its header has the key.
func TestHaltEndsLook(t *testing.T) {
	for _, policy := range []lifecycle.Policy{lifecycle.Stop, lifecycle.Freeze} {
		_, v := openVolume(t)
		ctx, cancel := context.WithCancel(t.Context())
		look := &headerLook{cancel: cancel, done: make(chan struct{})}
		h := &keyHost{d: &daemon{volume: v, log: zap.NewNop()}, look: look}
		var ended atomic.Bool
		go func() {
			<-ctx.Done()
			time.Sleep(100 * time.Millisecond) // in which it wipes what it has
			ended.Store(true)
			close(look.done)
		}()
		h.Halt(policy)
		if !v.Suspended() || !ended.Load() {
			t.Errorf("%v: suspended is %v, the look has ended is %v", policy, v.Suspended(), ended.Load())
		}
		cancel()
	}
}
