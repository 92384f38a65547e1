package audit

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const insideVariable = "HOSTCRYPTD_TEST_JOURNAL"

// TestJournal appends to a log beside a journald of its own, in a mount namespace
// of its own, and lets journalctl find the records.
func TestJournal(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestJournalInside$", "-test.v")
	cmd.Env = append(os.Environ(), insideVariable+"="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestJournalInside") {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
}

// TestJournalInside is the part of TestJournal that runs in the namespace; by
// itself it has nothing to do.
func TestJournalInside(t *testing.T) {
	dir := os.Getenv(insideVariable)
	if dir == "" {
		return
	}
	file := filepath.Join(dir, "audit.log")
	// Without a journal nothing is different.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	if _, err := Append(file, Record{Event: Wrap, Outcome: OK, Volume: "v1"}); err != nil {
		t.Fatal(err)
	}
	id, err := os.ReadFile("/etc/machine-id")
	if err != nil {
		t.Fatal(err)
	}
	journal := "/run/log/journal/" + strings.TrimSpace(string(id))
	for _, d := range []string{filepath.Dir(journalSocket), journal} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	journald := exec.Command("/lib/systemd/systemd-journald")
	journald.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := journald.Start(); err != nil {
		t.Fatalf("%v; the Debian package systemd has it", err)
	}
	defer journald.Wait()
	defer journald.Process.Kill()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(journalSocket); err == nil {
			break
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatal("journald has no socket after 10 s")
		}
	}
	head, err := Append(file, Record{Event: Unwrap, Outcome: Failed, Volume: "v1", Class: "throttled", Detail: "two\nlines=and \x1b[31m"})
	if err != nil {
		t.Fatal(err)
	}
	q := NewQueue(file, nil, nil)
	q.Append(Record{Event: Wiped, Outcome: OK, Volume: "v2"})
	q.Close()

	log, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.Split(bytes.TrimSpace(log), []byte("\n"))
	if len(lines) != 3 {
		t.Fatalf("the log has %d lines", len(lines))
	}
	find := func(match string) (found []map[string]string) {
		for begun := time.Now(); time.Since(begun) < 10*time.Second; time.Sleep(50 * time.Millisecond) {
			out, err := exec.Command("journalctl", "--directory", journal, "--output=json", "--all", match).Output()
			if err != nil {
				t.Fatal(err)
			}
			found = nil
			for line := range bytes.Lines(out) {
				var entry map[string]any
				if err := json.Unmarshal(line, &entry); err != nil {
					t.Fatalf("journalctl: %v: %s", err, line)
				}
				texts := map[string]string{}
				for k, v := range entry {
					texts[k], _ = v.(string)
				}
				found = append(found, texts)
			}
			if len(found) > 0 {
				break
			}
		}
		return found
	}
	for match, line := range map[string][]byte{"HOSTCRYPTD_VOLUME=v1": lines[1], "HOSTCRYPTD_EVENT=wiped": lines[2]} {
		got := find(match)
		if len(got) != 1 || got[0]["MESSAGE"] != string(line) {
			t.Errorf("%s: %v, want the line %s", match, got, line)
		}
	}
	if got := find("HOSTCRYPTD_HEAD=" + head.String()); len(got) != 1 || got[0]["PRIORITY"] != priorityNotice || got[0]["SYSLOG_IDENTIFIER"] != "hostcryptd-audit" {
		t.Errorf("by its head: %v", got)
	}
}
