package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestLogReaderGone has who reads the log of a server end before it does, as the
// journal does at shutdown: the server must still stop in order.
func TestLogReaderGone(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := os.Symlink(self, in("hostcryptd")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(in("disk.img"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(in("disk.img"), 24<<20); err != nil {
		t.Fatal(err)
	}
	common := []string{"--host-key", in("host.key"), "--pins", in("pins"), "--audit-log", "none"}
	if out, err := exec.Command(in("hostcryptd"), append([]string{"format", in("disk.img"), "--recovery-key", in("recovery.key"), "--yes"}, common...)...).CombinedOutput(); err != nil {
		t.Fatalf("format: %v: %s", err, out)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	serve := exec.Command(in("hostcryptd"), append([]string{"serve", in("disk.img"), "--listen", in("s.sock"), "--control", in("c.sock")}, common...)...)
	serve.Stderr = w
	err = serve.Start()
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer serve.Process.Kill()
	for begun := time.Now(); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(in("s.sock")); err == nil {
			break
		}
		if time.Since(begun) > time.Minute {
			t.Fatal("not ready after a minute")
		}
	}
	r.Close()
	if err := serve.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := serve.Wait(); err != nil {
		t.Errorf("a server whose log nobody reads: %v, want it to stop in order", err)
	}
}
