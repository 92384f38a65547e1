package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/sector"
)

// terminal makes one.
func terminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

// waitHidden waits until a terminal hides what is typed.
func waitHidden(slave *os.File) {
	for {
		tio, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
		if err != nil || tio.Lflag&unix.ECHO == 0 {
			return
		}
		unix.Poll(nil, 1)
	}
}

// TestPromptInterrupted: who presses ctrl-C instead gets a terminal back that shows
// what is typed.
func TestPromptInterrupted(t *testing.T) {
	master, slave := terminal(t)
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "recovery", "test", image)
	cmd.Args[0] = "hostcryptd"
	cmd.Stdin = slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill(); slave.Close() })
	defer end.Stop()
	waitHidden(slave)
	if _, err := master.Write([]byte{3}); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGINT {
		t.Errorf("it ended with %v", err)
	}
	if tio, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || tio.Lflag&unix.ECHO == 0 {
		t.Errorf("the terminal still hides what is typed: %v", err)
	}
}

// TestRecoveryKeyTyped asks a person at a terminal for a recovery key, and doesn't
// show it.
func TestRecoveryKeyTyped(t *testing.T) {
	for _, file := range []string{"", "-"} {
		master, slave := terminal(t)
		want := sector.NewRecoveryKey()
		var asked strings.Builder
		go func() {
			waitHidden(slave)
			master.Write(append(bytes.Clone(want), '\n'))
		}()
		a := &app{stdin: slave, stderr: &asked}
		got, err := a.readRecoveryKey(file)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("readRecoveryKey(%q): %v, or another key", file, err)
		}
		if !strings.HasPrefix(asked.String(), "Recovery key: ") {
			t.Errorf("readRecoveryKey(%q) says %q", file, asked.String())
		}
		if tio, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS); err != nil || tio.Lflag&unix.ECHO == 0 {
			t.Errorf("the terminal still hides what is typed: %v", err)
		}
		slave.Close()
		shown := make([]byte, 1024)
		n, _ := master.Read(shown)
		if bytes.Contains(shown[:n], want[:6]) {
			t.Errorf("the terminal has shown %q", shown[:n])
		}
	}
}
