package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestCertificatesLate: who takes over doesn't wait for files that can't be read, and
// clients are told what came of them when they could.
func TestCertificatesLate(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "server-cert.pem")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	c := readCertificates(filepath.Dir(pipe))
	if err := c.check(time.Millisecond); err != nil {
		t.Fatalf("check() = %v before anything was read", err)
	}
	f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("not PEM"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err == nil {
		t.Errorf("wait() = %v, want what is wrong with the files", err)
	}
	if err := c.check(time.Hour); err == nil {
		t.Error("check() = nil, though the files are of no use")
	}
	if cfg, err := c.server().GetConfigForClient(nil); cfg != nil || err == nil {
		t.Errorf("a client gets %v, %v", cfg, err)
	}
}
