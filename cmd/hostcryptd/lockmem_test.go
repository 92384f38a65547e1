package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
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

func scan(line, format string, n *int) bool {
	_, err := fmt.Sscanf(line, format, n)
	return err == nil
}
