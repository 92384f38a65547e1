package main

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hostcryptd/keyunseal/lifecycle"
)

// TestComplete asks as a shell does. The last line is a number, of which 4 is that no
// file can stand there, and 16 that only a directory can.
func TestComplete(t *testing.T) {
	for _, tt := range []struct {
		args string // and what is to be completed
		want string
	}{
		{"serve ", ":0"}, // and names in the table: files
		{"check ", ":0"},
		{"format ", ":0"},
		{"header restore disk.img ", ":0"},
		{"audit verify a b ", ":0"},
		{"format disk.img ", ":4"},
		{"status a ", ":4"},
		{"speed ", ":4"},
		{"initramfs ", "lines devices modules network files :4"},
		{"initramfs lines ", "x-initrd.attach x-kdump.attach :4"},
		{"recovery ro", "rotate :4"},
		{"completion ", "bash fish zsh :4"},
		{"format --key ", "platform tpm host-key :4"},
		{"serve disk.img --on-revocation ", "stop freeze read-only warn :4"},
		{"check --expired-key ", "warn deny :4"},
		{"format --sector-size ", "4096 512 :4"},
		{"serve --grace ", ":4"},
		{"format --recovery-key ", ":0"},
		{"serve --listen ", ":0"},
		{"serve --pins ", ":16"},
		{"serve --tls-certificates ", ":16"},
	} {
		var out, stderr bytes.Buffer
		args := append([]string{"__completeNoDesc"}, strings.Split(tt.args, " ")...)
		if code := run(context.Background(), args, os.Stdin, &out, &stderr); code != 0 {
			t.Errorf("%q: exit code %d: %s", tt.args, code, &stderr)
		}
		if got := strings.Join(strings.Fields(out.String()), " "); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.args, got, tt.want)
		}
	}
}

// TestCompletedWords: what is offered as the value of a flag is one.
func TestCompletedWords(t *testing.T) {
	for _, w := range flagWords["on-revocation"] {
		if _, err := lifecycle.ParsePolicy(w); err != nil {
			t.Error(err)
		}
	}
	for _, w := range flagWords["expired-key"] {
		if err := checkExpired(w); err != nil {
			t.Error(err)
		}
	}
	for name := range flagWords {
		if (&app{}).serveCommand().Flags().Lookup(name) == nil && (&app{}).formatCommand().Flags().Lookup(name) == nil {
			t.Errorf("there is no flag --%s", name)
		}
	}
}

func TestCompletedNames(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tab")
	if err := os.WriteFile(file, []byte("# volumes\nvar UUID=01234567-89ab-4def-8123-456789abcdef\nswap /dev/sdb2 /dev/urandom swap\nbad\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{"var\t/dev/disk/by-uuid/01234567-89ab-4def-8123-456789abcdef", "swap\t/dev/sdb2", "bad\t"}
	if got := tabNames(file); !slices.Equal(got, want) {
		t.Errorf("tabNames() = %q, want %q", got, want)
	}
	if got := tabNames(filepath.Join(t.TempDir(), "none")); got != nil {
		t.Errorf("tabNames() of no file = %q", got)
	}
}
