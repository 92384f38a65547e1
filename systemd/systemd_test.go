package systemd

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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

// TestUnit lets systemd itself judge the units.
func TestUnit(t *testing.T) {
	for _, tt := range []struct{ file, name, open string }{
		{"hostcryptd@.service", "hostcryptd@test.service", ""},
		{"hostcryptd@.service", "hostcryptd@pins.service", openPins("/etc/hostcryptd/a-b_c/d.e")},
		{"hostcryptd-dial.service", "hostcryptd-dial.service", ""},
	} {
		file, name := tt.file, tt.name
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if listens := strings.Contains(string(b), "\nExecStart=/usr/sbin/hostcryptd dial "+DialerSocket+"\n"); listens != (file == "hostcryptd-dial.service") {
			t.Errorf("%s listens on %s: %v", file, DialerSocket, listens)
		}
		// The program need not be installed to check the unit.
		unit := filepath.Join(t.TempDir(), name)
		text := strings.ReplaceAll(string(b), "/usr/sbin/hostcryptd", "/bin/true") + tt.open
		if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit).CombinedOutput()
		if errors.Is(err, exec.ErrNotFound) {
			t.Fatal("systemd-analyze is not installed (Debian package systemd); run make deps")
		}
		if err != nil || strings.Contains(string(out), "hostcryptd") {
			t.Errorf("systemd-analyze verify: %v\n%s", err, out)
		}
	}
}

// TestTasksMax: the unit's limit of threads lies above what the server may need, so that
// it isn't what ends it.
func TestTasksMax(t *testing.T) {
	b, err := os.ReadFile("hostcryptd@.service")
	if err != nil {
		t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(b), "\nTasksMax=")
	text, _, _ = strings.Cut(text, "\n")
	const inFlight, clients, kernelSockets = 64, 128, 64 // of nbd.Config and --connections
	if n, err := strconv.Atoi(text); err != nil || n < inFlight*(clients+kernelSockets)+1000 {
		t.Errorf("TasksMax=%s", text)
	}
}

// TestSecurity has systemd judge how much the services could do if they were taken
// over: at most 2.0 of 10, and a bit more where clients come by TCP or a key is kept that
// the machine swaps by, see the unit.
func TestSecurity(t *testing.T) {
	for _, tt := range []struct {
		name, file, open string
		limit            string // of ten times 10
	}{
		{"closed", "hostcryptd@.service", "", "19"},
		{"vault", "hostcryptd@.service", askDialer, "19"},
		{"swap", "hostcryptd@.service", openSwap + closeFiles, "20"},
		{"swapfile", "hostcryptd@.service", askDialer + openSwap, "22"},
		{"tcp", "hostcryptd@.service", askDialer + openNetwork, "24"},
		{"dial", "hostcryptd-dial.service", "", "18"},
	} {
		unit := filepath.Join(t.TempDir(), "hostcryptd@"+tt.name+".service")
		b, err := os.ReadFile(tt.file)
		if err != nil {
			t.Fatal(err)
		}
		text := strings.ReplaceAll(string(b), "%i", tt.name) + tt.open
		if err := os.WriteFile(unit, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("systemd-analyze", "security", "--offline=yes", "--no-pager", "--threshold="+tt.limit, unit).CombinedOutput()
		_, score, _ := strings.Cut(string(out), "Overall exposure level")
		t.Logf("%s: %s", tt.name, strings.TrimSpace(score))
		if err != nil || score == "" {
			t.Errorf("%s: above %s of 100: %v\n%s", tt.name, tt.limit, err, out)
		}
	}
}

// TestInstall installs and looks whether all of it, and nothing else, is there.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	bin := filepath.Join(t.TempDir(), "hostcryptd")
	if out, err := exec.Command("go", "build", "-o", bin, "hostcryptd/cmd/hostcryptd").CombinedOutput(); err != nil {
		t.Fatalf("building: %v\n%s", err, out)
	}
	// A page of an earlier version, which had one for each command.
	old := filepath.Join(dir, "usr/share/man/man8/hostcryptd-key-add.8")
	if err := errors.Join(os.MkdirAll(filepath.Dir(old), 0o755), os.WriteFile(old, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("make", "-s", "-C", "..", "-o", "build", "install", "BIN="+bin, "DESTDIR="+dir).CombinedOutput()
	if err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	want := map[string]string{ // name to mode, or to what a link leads to
		"etc/hostcryptd":                                         "drwx------",
		"etc/hostcryptd/pins":                                    "drwx------",
		"usr/sbin/hostcryptd":                                    "-rwxr-xr-x",
		"usr/share/man/man8/hostcryptd.8":                        "-rw-r--r--",
		"usr/share/man/man5/hostcrypttab.5":                      "-rw-r--r--",
		"usr/share/bash-completion/completions/hostcryptd":       "-rw-r--r--",
		"usr/share/zsh/site-functions/_hostcryptd":               "-rw-r--r--",
		"usr/share/fish/vendor_completions.d/hostcryptd.fish":    "-rw-r--r--",
		"usr/lib/systemd/system/hostcryptd@.service":             "-rw-r--r--",
		"usr/lib/systemd/system/hostcryptd-dial.service":         "-rw-r--r--",
		"usr/lib/systemd/system/system-hostcryptd.slice":         "-rw-r--r--",
		"usr/lib/systemd/system/hostcryptd.target":               "-rw-r--r--",
		"usr/lib/systemd/system-generators/hostcryptd-generator": "../../../sbin/hostcryptd",
		"usr/lib/systemd/system-shutdown/hostcryptd":             "-rwxr-xr-x",
		"usr/lib/udev/rules.d/90-hostcryptd.rules":               "-rw-r--r--",
		"usr/lib/tmpfiles.d/hostcryptd.conf":                     "-rw-r--r--",

		"usr/lib/hostcryptd/initrd.sh":                                 "-rw-r--r--",
		"usr/share/initramfs-tools/hooks/hostcryptd":                   "-rwxr-xr-x",
		"usr/share/initramfs-tools/conf-hooks.d/zz-hostcryptd":         "-rw-r--r--",
		"usr/share/initramfs-tools/scripts/local-top/hostcryptd":       "-rwxr-xr-x",
		"usr/lib/dracut/modules.d/95hostcryptd/module-setup.sh":        "-rwxr-xr-x",
		"usr/lib/dracut/modules.d/95hostcryptd/hostcryptd.sh":          "-rwxr-xr-x",
		"usr/lib/dracut/modules.d/95hostcryptd/hostcryptd-online.sh":   "-rwxr-xr-x",
		"usr/lib/dracut/modules.d/95hostcryptd/hostcryptd-cmdline.sh":  "-rwxr-xr-x",
		"usr/lib/dracut/modules.d/95hostcryptd/hostcryptd-finished.sh": "-rwxr-xr-x",
	}
	seen := map[string]bool{}
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		got, ok := want[rel]
		info, err := e.Info()
		if err != nil {
			return err
		}
		seen[rel] = true
		switch {
		case e.IsDir() && !ok:
		case !ok:
			t.Errorf("%s is installed", rel)
		case e.Type() == fs.ModeSymlink:
			if to, _ := os.Readlink(name); to != got {
				t.Errorf("%s leads to %s, want %s", rel, to, got)
			}
		case info.Mode().String() != got:
			t.Errorf("%s has mode %v, want %s", rel, info.Mode(), got)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range want {
		if !seen[name] {
			t.Errorf("%s is not installed", name)
		}
	}
	// The generator's link must lead to the program, wherever it is installed.
	if a, err := os.Stat(filepath.Join(dir, "usr/lib/systemd/system-generators/hostcryptd-generator")); err != nil || a.Size() == 0 {
		t.Errorf("the generator: %v", err)
	}

	// Another prefix would install units that lead nowhere.
	other := t.TempDir()
	out, err = exec.Command("make", "-s", "-C", "..", "-o", "build", "install", "BIN="+bin, "DESTDIR="+other, "PREFIX=/usr/local").CombinedOutput()
	if left, _ := os.ReadDir(other); err == nil || !strings.Contains(string(out), "nothing was installed") || len(left) > 0 {
		t.Errorf("make install PREFIX=/usr/local: %v, %d entries installed\n%s", err, len(left), out)
	}

	// What the administrator has written stays, and so does what is another's.
	keep := []string{"etc/hostcryptd/host.key", "etc/hostcrypttab", "usr/sbin/another", "usr/lib/systemd/system/another.service"}
	for _, name := range keep {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out, err := exec.Command("make", "-s", "-C", "..", "-o", "build", "uninstall", "BIN="+bin, "DESTDIR="+dir).CombinedOutput(); err != nil {
		t.Fatalf("make uninstall: %v\n%s", err, out)
	}
	var left []string
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		rel, _ := filepath.Rel(dir, name)
		if err == nil && (!e.IsDir() || strings.HasSuffix(rel, "hostcryptd")) {
			left = append(left, rel)
		}
		return err
	})
	slices.Sort(left)
	if want := append(keep, "etc/hostcryptd"); err != nil || !slices.Equal(left, slices.Sorted(slices.Values(want))) {
		t.Errorf("after make uninstall there is %q, %v; want %q", left, err, want)
	}
}
