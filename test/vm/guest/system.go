package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

// With hostcryptd.root=SERIAL on the kernel command line the machine is one
// with systemd: this program, as PID 1 of the initramfs, puts the files of the
// boot over that disk's root file system and becomes its systemd, which runs
// this program again, as a unit.

// switchRoot doesn't return if all went well.
func switchRoot(serial string) error {
	const root = "/newroot"
	dev := diskBySerial(serial)
	if dev == "" {
		return fmt.Errorf("no disk with the serial %s", serial)
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, root, "ext4", 0, ""); err != nil {
		return fmt.Errorf("mounting the root on %s: %w", dev, err)
	}
	if err := copyTree(root, vmtest.Overlay); err != nil {
		return err
	}
	// An initramfs is memory, which a test may have counted on.
	for _, name := range []string{vmtest.Overlay, "/modules", "/init"} {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
	}
	if err := unix.Unmount("/tmp", 0); err != nil {
		return err
	}
	for _, dir := range []string{"/dev", "/proc", "/run", "/sys"} {
		if err := unix.Mount(dir, root+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving %s: %w", dir, err)
		}
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.Mount(root, "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("moving the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	err := unix.Exec(vmtest.SystemInit, []string{vmtest.SystemInit}, []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"})
	return fmt.Errorf("executing %s: %w", vmtest.SystemInit, err)
}

// copyTree copies files and links, over what is there.
func copyTree(to, from string) error {
	return filepath.WalkDir(from, func(name string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, name)
		if err != nil {
			return err
		}
		dst := filepath.Join(to, rel)
		info, err := e.Info()
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.MkdirAll(dst, 0o755)
		}
		if err := os.Remove(dst); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if e.Type() == fs.ModeSymlink {
			target, err := os.Readlink(name)
			if err != nil {
				return err
			}
			return os.Symlink(target, dst)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		return errors.Join(os.WriteFile(dst, b, info.Mode()), os.Chmod(dst, info.Mode()))
	})
}

// runAgent is what the unit runs: a scenario of a machine with systemd.
func runAgent() error {
	events, err := openEventPort()
	if err != nil {
		return err
	}
	w := report.NewWriter(events, uptime)
	if err := runFromCommandLine(w); err != nil {
		// What the units have said is the reason, most often.
		log, _ := exec.Command("journalctl", "-b", "--no-pager", "-n", "400", "-o", "short-monotonic").Output()
		if console, cerr := os.OpenFile("/dev/console", os.O_WRONLY, 0); cerr == nil {
			fmt.Fprintf(console, "--- the journal:\n%s--- the scenario's error: %v\n", log, err)
		}
		w.Emit(report.Event{Kind: report.Done, Text: err.Error()})
		return exec.Command("systemctl", "poweroff", "--force", "--force").Run()
	}
	w.Emit(report.Event{Kind: report.Done})
	return exec.Command("systemctl", "poweroff", "--no-block").Run()
}

// A unitState is what systemctl shows of a unit: its properties by name.
type unitState map[string]string

// unit asks for properties of a unit.
func (m *machine) unit(name string, properties ...string) (unitState, error) {
	out, err := exec.Command("systemctl", "show", name, "--property="+strings.Join(properties, ",")).Output()
	if err != nil {
		return nil, fmt.Errorf("systemctl show %s: %w", name, err)
	}
	u := unitState{}
	for line := range strings.Lines(string(out)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		u[key] = value
	}
	return u, nil
}

// checkSystem fails if a unit has failed, or if systemd had to break a cycle in
// the order of units.
func (m *machine) checkSystem() error {
	out, err := m.run("systemctl", "list-units", "--failed", "--output=json", "--no-pager")
	if err != nil {
		return err
	}
	var failed []struct{ Unit string }
	if err := json.Unmarshal([]byte(out), &failed); err != nil {
		return err
	}
	var bad []error
	for _, u := range failed {
		bad = append(bad, fmt.Errorf("the unit %s has failed", u.Unit))
	}
	log, err := exec.Command("journalctl", "-b", "--no-pager", "-o", "cat", "_PID=1").Output()
	if err != nil {
		return fmt.Errorf("journalctl: %w", err)
	}
	lines := strings.Split(string(log), "\n")
	if !slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "Reached target") }) {
		return errors.New("the journal has nothing of systemd's, so it proves nothing")
	}
	for _, l := range lines {
		if strings.Contains(l, "ordering cycle") || strings.Contains(l, "deleted to break") {
			bad = append(bad, fmt.Errorf("systemd: %s", l))
		}
	}
	return errors.Join(bad...)
}

// systemBoot shows that the machine with systemd works.
func systemBoot(m *machine) error {
	if err := m.checkSystem(); err != nil {
		return err
	}
	out, err := m.run("systemd-analyze", "time")
	if err != nil {
		return err
	}
	if !strings.Contains(out, "userspace") {
		return errors.New("systemd doesn't say that the boot is finished")
	}
	if _, err := m.run("modprobe", "nbd"); err != nil {
		return err
	}
	_, err = m.run("hostcryptd", "version")
	return err
}
