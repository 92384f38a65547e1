package systemd

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestNotify(t *testing.T) {
	for _, name := range []string{filepath.Join(t.TempDir(), "notify"), "@hostcryptd-test-" + filepath.Base(t.TempDir())} {
		l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		t.Setenv("NOTIFY_SOCKET", name)
		if err := Notify(Ready, Status("serving %s\nREADY=0", "x")); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, err := l.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(b[:n]), "READY=1\nSTATUS=serving x READY=0"; got != want {
			t.Errorf("received %q, want %q", got, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(t.TempDir(), "nobody"))
	if err := Notify(Ready); err == nil {
		t.Error("Notify to nobody succeeded")
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := Notify(Ready); err != nil {
		t.Errorf("Notify without a manager: %v", err)
	}
}

// TestUnit lets systemd itself judge the unit.
func TestUnit(t *testing.T) {
	dir := t.TempDir()
	b, err := os.ReadFile("hostcryptd@.service")
	if err != nil {
		t.Fatal(err)
	}
	// The program need not be installed to check the unit.
	unit := filepath.Join(dir, "hostcryptd@test.service")
	text := strings.ReplaceAll(string(b), "/usr/sbin/hostcryptd", "/bin/true")
	if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatal("systemd-analyze is not installed (Debian package systemd); run make deps")
	}
	if err != nil || strings.Contains(string(out), "hostcryptd@") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// TestEnable enables the unit as README says.
func TestEnable(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "usr/lib/systemd/system")
	b, err := os.ReadFile("hostcryptd@.service")
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "hostcryptd@.service"), b, 0o644)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemctl", "--root="+root, "enable", "hostcryptd@data").CombinedOutput()
	if err != nil {
		t.Errorf("systemctl enable (Debian package systemd; make deps): %v\n%s", err, out)
	}
	if links, _ := filepath.Glob(filepath.Join(root, "etc/systemd/system/*.wants/hostcryptd@data.service")); len(links) != 1 {
		t.Errorf("enabling made links %v", links)
	}
}
