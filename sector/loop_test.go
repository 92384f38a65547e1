package sector

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestTwins: an image file and the loop devices over it are one disk.
func TestTwins(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes loop devices, which takes root")
	}
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		t.Fatal("this test needs losetup, of the Debian package mount")
	}
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 8<<20)); err != nil {
		t.Fatal(err)
	}
	loop := func(args ...string) string {
		t.Helper()
		out, err := exec.Command(losetup, append([]string{"--show", "-f"}, append(args, image)...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("losetup: %v: %s", err, out)
		}
		name := strings.TrimSpace(string(out))
		t.Cleanup(func() { exec.Command(losetup, "-d", name).Run() })
		return name
	}
	a, b := loop(), loop("--offset", "4096")
	open := func(name string, o DeviceOptions) (*Device, error) {
		t.Helper()
		d, err := OpenDevice(name, o)
		if err == nil {
			t.Cleanup(func() { d.Close() })
		}
		return d, err
	}
	names := []string{image, a, b}
	for _, used := range names {
		d, err := open(used, DeviceOptions{})
		if err != nil {
			t.Fatalf("%s, of which no name is in use: %v", used, err)
		}
		for _, name := range names {
			if _, err := open(name, DeviceOptions{}); !errors.Is(err, ErrBusy) {
				t.Errorf("%s while %s is in use: %v, want %v", name, used, err, ErrBusy)
			}
			if _, err := open(name, DeviceOptions{Shared: true}); err != nil {
				t.Errorf("%s, shared, while %s is in use: %v", name, used, err)
			}
		}
		d.Close()
	}

	// Two that have nothing of the file in common are two disks.
	first, second := loop("--sizelimit", "4194304"), loop("--offset", "4194304")
	for _, two := range [][2]string{{first, second}, {second, first}} {
		used, err := open(two[0], DeviceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if d, err := open(two[1], DeviceOptions{}); err != nil {
			t.Errorf("%s while %s is in use, over another part of the file: %v", two[1], two[0], err)
		} else {
			d.Close()
		}
		for _, name := range []string{image, a} {
			if _, err := open(name, DeviceOptions{}); !errors.Is(err, ErrBusy) {
				t.Errorf("%s while %s is in use, over a part of it: %v, want %v", name, two[0], err, ErrBusy)
			}
		}
		used.Close()
	}

	// The path in sysfs is that of another file now.
	moved := filepath.Join(dir, "moved")
	if err := errors.Join(os.Rename(image, moved), os.WriteFile(image, make([]byte, 8<<20), 0o600)); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(a, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := open(moved, DeviceOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("the file behind a loop device that is in use, renamed: %v, want %v", err, ErrBusy)
	}
	if d, err := open(image, DeviceOptions{}); err != nil {
		t.Errorf("a file in the place of the one behind a loop device: %v", err)
	} else {
		d.Close()
	}
	unix.Close(fd)

	// Who only reads keeps no other reader away.
	d, err := open(moved, DeviceOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if d, err := open(moved, DeviceOptions{ReadOnly: true}); err != nil {
		t.Errorf("two readers: %v", err)
	} else {
		d.Close()
	}
}
