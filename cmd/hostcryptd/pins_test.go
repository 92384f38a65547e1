package main

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// TestPinLock holds the lock on the pins as another process does that is about to
// raise one: what the TPM (swtpm) holds is read by nobody else before that has been
// written, so the older of two generations is never the last.
func TestPinLock(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "tpm.sock")
	swtpm := exec.CommandContext(t.Context(), tool("swtpm"), "socket", "--tpm2", "--tpmstate", "dir="+dir,
		"--server", "type=unixio,path="+socket, "--flags", "not-need-init,startup-clear")
	swtpm.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := swtpm.Start(); err != nil {
		t.Fatalf("%v (Debian package swtpm); run make deps", err)
	}
	defer swtpm.Wait()
	defer swtpm.Process.Kill()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", socket); err == nil {
			c.Close()
			break
		} else if time.Since(begun) > 20*time.Second {
			t.Fatal(err)
		}
	}
	const volume = "01234567-89ab-4def-8123-456789abcdef"
	pins := &hostPins{PinDir: sector.PinDir(filepath.Join(dir, "pins")), tpm: keyunseal.Options{TPM: socket}, log: zap.NewNop()}
	pin := func(generation uint64) sector.Pin {
		return sector.Pin{Fingerprint: strings.Repeat("ab", 32), Generation: generation}
	}
	if err := pins.Raise(volume, pin(1)); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		run  func() error
		// What the other process makes it, and what is the last.
		other, last uint64
	}{
		{"raise", func() error { return pins.Raise(volume, pin(5)) }, 6, 6},
		{"set", func() error { return pins.Set(volume, pin(3)) }, 7, 3},
	} {
		f, err := os.Open(string(pins.PinDir))
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		before, err := pins.loadTPM(volume)
		if err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- tt.run() }()
		// What doesn't wait has more than the time that it needs.
		select {
		case err := <-done:
			t.Errorf("%s: %v, while another process had the lock", tt.name, err)
		case <-time.After(500 * time.Millisecond):
		}
		if now, err := pins.loadTPM(volume); err != nil || *now != *before {
			t.Errorf("%s: the TPM holds %+v, %v while another process has the lock, and held %+v", tt.name, now, err, before)
		}
		if _, err := pins.storeTPM(volume, pin(tt.other)); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if now, err := pins.loadTPM(volume); err != nil || *now != pin(tt.last) {
			t.Errorf("%s: the TPM holds %+v, %v, want generation %d", tt.name, now, err, tt.last)
		}
	}
}
