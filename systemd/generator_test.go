package systemd

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the golden file")

// TestGenerate compares what is generated with a golden file.
func TestGenerate(t *testing.T) {
	minute, forever := time.Minute, time.Duration(0)
	dir := t.TempDir()
	err := Generate(dir, "/etc/hostcrypttab", []Volume{
		{Name: "var", Device: "/dev/disk/by-uuid/1-2", KeyFile: "/media/a-stick 50%/host.key", Attach: "auto", Vault: true},
		{Name: "swap", Device: "/dev/disk/by-partlabel/a\\x20b", Attach: "/dev/nbd7", MakeFS: "swap", Swap: true, DeviceTimeout: &minute},
		{Name: "my-data", Device: "/srv/a 50%.img", Attach: "auto", NoFail: true},
		{Name: "far", Device: "/dev/sdb", Attach: "auto", NetDev: true, DeviceTimeout: &forever},
		{Name: "manual", Device: "/dev/sdc", Attach: "auto", NoAuto: true, Pins: "/etc/hostcryptd/other/pins"},
		{Name: "qemu", Device: "/dev/sdd", Network: true},
		{Name: "swapfile", Device: "/dev/sde", Attach: "auto", Swap: true, Vault: true, NoAuto: true},
	})
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	err = filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		rel, _ := filepath.Rel(dir, name)
		if e.Type() == fs.ModeSymlink {
			to, err := os.Readlink(name)
			fmt.Fprintf(&got, "-- %s -> %s --\n", rel, to)
			return err
		}
		b, err := os.ReadFile(name)
		fmt.Fprintf(&got, "-- %s --\n%s", rel, b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/generator.golden"
	if *update {
		if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if got.String() != string(want) {
		t.Errorf("generated (-update takes it as right):\n%s", got.String())
	}
}

func TestGenerateNothing(t *testing.T) {
	dir := t.TempDir()
	if err := Generate(dir, "t", []Volume{{Name: "a", Device: "/dev/x", NoAuto: true, Attach: "auto"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "sysinit.target.wants")); err == nil {
		t.Error("the boot waits for a target without volumes")
	}
}

// TestEscapePath compares with systemd's own.
func TestEscapePath(t *testing.T) {
	for _, path := range []string{
		"/", "/dev/sda", "/dev/hostcryptd/my-data", `/dev/disk/by-label/a\x20b`, "/dev/disk/by-label/ü#+:=@_", "//var/./lib//x/", "/.hidden/.x", "/a b%",
	} {
		out, err := exec.Command("systemd-escape", "--path", path).Output()
		if err != nil {
			t.Fatalf("systemd-escape (Debian package systemd; make deps): %v", err)
		}
		if got, want := EscapePath(path), strings.TrimSpace(string(out)); got != want {
			t.Errorf("EscapePath(%q) = %q, systemd says %q", path, got, want)
		}
	}
}
