package main

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"hostcryptd/sector"
)

// TestRecoveryKeyTyped asks a person at a terminal for a recovery key, and doesn't
// show it.
func TestRecoveryKeyTyped(t *testing.T) {
	for _, file := range []string{"", "-"} {
		master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer master.Close()
		if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
			t.Fatal(err)
		}
		n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
		if err != nil {
			t.Fatal(err)
		}
		slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer slave.Close()
		want := sector.NewRecoveryKey()
		var asked strings.Builder
		go func() {
			for { // until the terminal hides what is typed
				tio, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
				if err != nil || tio.Lflag&unix.ECHO == 0 {
					break
				}
				unix.Poll(nil, 1)
			}
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
		n, _ = master.Read(shown)
		if bytes.Contains(shown[:n], want[:6]) {
			t.Errorf("the terminal has shown %q", shown[:n])
		}
	}
}
