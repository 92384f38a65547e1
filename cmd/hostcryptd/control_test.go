package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
)

// TestFailedCommands: a lock or unlock that comes to nothing is recorded as that.
func TestFailedCommands(t *testing.T) {
	c := lifecycle.Config{Grace: lifecycle.DefaultGrace}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	stuck := lifecycle.NewRunner(c, nil) // it doesn't run, as behind a disk that hangs
	for _, tt := range []struct {
		name, command string
		life          *lifecycle.Runner
		random        bool
		detail        string
	}{
		{"early lock", "lock", nil, false, "the daemon is starting"},
		{"early unlock", "unlock", nil, false, "the daemon is starting"},
		{"random key", "unlock", stuck, true, "the volume's key was random"},
		{"stuck lock", "lock", stuck, false, "not waited for: context canceled"},
		{"stuck unlock", "unlock", stuck, false, "not waited for: context canceled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			log := filepath.Join(dir, "audit.log")
			d := &daemon{log: zap.NewNop(), uuid: "01234567-89ab-4def-8123-456789abcdef", life: tt.life,
				opts: serveOptions{control: filepath.Join(dir, "c.sock"), randomKey: tt.random, keys: keyFlags{auditLog: log}}}
			stop, err := d.serveControl()
			if err != nil {
				t.Fatal(err)
			}
			defer stop()
			ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
			defer cancel()
			if err := newControlClient(d.opts.control).do(ctx, "POST", "/v1/"+tt.command, nil); err == nil {
				t.Error("no error")
			}
			// The client may be gone before it is written.
			var b []byte
			for begun := time.Now(); len(b) == 0 && time.Since(begun) < 20*time.Second; time.Sleep(10 * time.Millisecond) {
				b, _ = os.ReadFile(log)
			}
			var r audit.Record
			if err := json.Unmarshal(b, &r); err != nil {
				t.Fatalf("%v: %q", err, b)
			}
			if r.Event != tt.command || r.Outcome != audit.Failed || r.Volume != d.uuid || !strings.HasPrefix(r.Detail, tt.detail) {
				t.Errorf("recorded %s", b)
			}
		})
	}
}
