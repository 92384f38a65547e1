package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const lockedVariable = "HOSTCRYPTD_TEST_LOCKED"

// TestLockMemory looks at a process that has locked its memory: the program is
// there as a whole, and of Go's mappings only what is used.
func TestLockMemory(t *testing.T) {
	if os.Getenv(lockedVariable) != "" {
		if err := lockMemory(); err != nil {
			fmt.Println("refused:", err)
			os.Exit(0)
		}
		smaps, err := os.ReadFile("/proc/self/smaps")
		fmt.Printf("%s%v\n", smaps, err)
		os.Exit(0)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestLockMemory$")
	cmd.Env = append(os.Environ(), lockedVariable+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if why, ok := strings.CutPrefix(string(out), "refused: "); ok {
		if os.Geteuid() == 0 {
			t.Fatal(why)
		}
		return // an ordinary user may lock some megabytes only, and hears of it
	}
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	var size, rss, whole, resident int
	ours := false
	for line := range strings.Lines(string(out)) {
		var n int
		switch {
		case strings.Contains(line, "-") && !strings.Contains(line, ":  "):
			ours = strings.HasSuffix(strings.TrimSpace(line), " "+program)
		case scan(line, "Size: %d kB", &n):
			size = n
		case scan(line, "Rss: %d kB", &n):
			rss += n
			if ours {
				whole, resident = whole+size, resident+n
			}
		}
	}
	t.Logf("%d kB resident, of them %d of the program's %d", rss, resident, whole)
	if whole == 0 || resident != whole {
		t.Errorf("%d kB of the program's %d are in memory", resident, whole)
	}
	if rss-resident > 32<<10 {
		t.Errorf("%d kB besides the program are in memory, want 32 MiB at most", rss-resident)
	}
}

// TestDeriveLocksMemory: the child that computes with the volume key has locked its
// memory before it reads it.
func TestDeriveLocksMemory(t *testing.T) {
	if os.Geteuid() != 0 {
		return // an ordinary user may lock some megabytes only, and the child doesn't try
	}
	keyIn, keyOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer keyIn.Close()
	defer keyOut.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", deriveArg)
	cmd.ExtraFiles = []*os.File{keyIn, keyOut} // it waits for a key that never comes
	wantLocked(t, cmd)
}

// TestCommandLocksMemory: so has a command that is given a recovery key.
func TestCommandLocksMemory(t *testing.T) {
	if os.Geteuid() != 0 {
		return
	}
	in, key, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer key.Close()
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "recovery", "test", image, "--recovery-key", "-")
	cmd.Args[0] = "hostcryptd"
	cmd.Stdin = in // it waits for a key here too
	wantLocked(t, cmd)
}

// wantLocked starts a process that waits for a key, and ends it when it has locked its
// memory.
func wantLocked(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	var said strings.Builder
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var err error
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		var status []byte
		status, err = os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
		if _, rest, ok := strings.Cut(string(status), "\nVmLck:"); ok && !strings.HasPrefix(strings.TrimSpace(rest), "0 kB") {
			break
		}
		if time.Since(begun) > 20*time.Second {
			err = fmt.Errorf("it has locked nothing: %s", status)
		}
		if err != nil {
			break
		}
	}
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil {
		t.Errorf("%v; it said %q", err, said.String())
	}
}

func scan(line, format string, n *int) bool {
	_, err := fmt.Sscanf(line, format, n)
	return err == nil
}
