package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

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
func runAgent(scenario func(*report.Writer) error) error {
	events, err := openEventPort()
	if err != nil {
		return err
	}
	w := report.NewWriter(events, uptime)
	poweroff := []string{"poweroff", "--no-block"}
	failed := scenario(w)
	if failed != nil {
		// What the units have said is the reason, most often.
		log, _ := exec.Command("journalctl", "-b", "--no-pager", "-n", "400", "-o", "short-monotonic").Output()
		if console, cerr := os.OpenFile("/dev/console", os.O_WRONLY, 0); cerr == nil {
			fmt.Fprintf(console, "--- the journal:\n%s--- the scenario's error: %v\n", log, failed)
		}
		poweroff = []string{"poweroff", "--force", "--force"}
	}
	reportDone(w, failed)
	return exec.Command("systemctl", poweroff...).Run()
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

// The volumes of a machine with systemd, as the overlay's /etc/hostcrypttab has
// them, by the serials of their disks. The UUIDs of those with a header are
// fixed, so that a table can name them.
const (
	systemHostKey = "/etc/hostcryptd/host.key"
	vaultState    = "/opt/hostcryptd-test" // on the root, also where /var is a volume
)

// systemPrepare makes the volumes var, data and tpm, with file systems and, on var,
// what the root file system has in /var. var's key is in a file, data's in the
// vault, whose double stays behind as a unit that comes up late (runLateVault), and
// tpm's in the TPM.
func systemPrepare(m *machine) error {
	if err := m.checkSystem(); err != nil {
		return err
	}
	if _, err := m.run("modprobe", "nbd"); err != nil {
		return err
	}
	// Below /var, nothing is to be there but what a boot has written there.
	if err := os.Setenv("HOSTCRYPTD_AUDIT_LOG", "none"); err != nil {
		return err
	}
	m.state = vaultState
	defer func() { m.state = "" }()
	for _, v := range []struct{ serial, uuid string }{
		{"var", "11111111-1111-4111-8111-111111111111"}, {"data", "22222222-2222-4222-8222-222222222222"},
		{"tpm", "55555555-5555-4555-8555-555555555555"},
	} {
		m.disk = diskBySerial(v.serial)
		if m.disk == "" {
			return fmt.Errorf("no disk with the serial %s", v.serial)
		}
		key := []string{"--host-key", systemHostKey}
		if v.serial == "data" {
			if err := m.startVault(); err != nil {
				return err
			}
			key = append(key, "--key", keyURL)
		}
		if v.serial == "tpm" {
			key = append(key, "--key", "tpm")
		}
		args := append([]string{"format", m.disk, "--uuid", v.uuid, "--yes"}, key...)
		if _, err := m.run("hostcryptd", args...); err != nil {
			return err
		}
		s, err := m.serve("--host-key", systemHostKey)
		if err != nil {
			return err
		}
		if _, err := m.run("mkfs.ext4", "-q", s.dev); err != nil {
			return err
		}
		if err := m.mount(s.dev); err != nil {
			return err
		}
		if v.serial == "var" {
			if _, err := m.run("cp", "-a", "/var/.", m.mnt); err != nil {
				return err
			}
		}
		if err := m.unmount(); err != nil {
			return err
		}
		if err := s.detach(); err != nil {
			return err
		}
	}
	return nil
}

// runLateVault is the process of a unit: the network to the vault, and the vault,
// which come up some seconds after the volume that needs them was asked for.
func runLateVault() error {
	m := &machine{Writer: report.NewWriter(os.Stderr, uptime), state: vaultState}
	time.Sleep(5 * time.Second)
	if err := m.startVault(); err != nil {
		return err
	}
	return m.vault.Wait()
}

// systemVolumes looks at a machine that has booted with /var, swap and a data
// volume in its tables.
func systemVolumes(m *machine) error {
	if err := m.checkSystem(); err != nil {
		return err
	}
	// To root without CAP_DAC_OVERRIDE it is another user's, and everybody's whose volume
	// the TPM remembers.
	if out, err := m.run("stat", "-c", "%U:%G %a", "/dev/tpmrm0"); err != nil || strings.TrimSpace(out) != "tss:tss 660" {
		return errors.Join(fmt.Errorf("the TPM is %q, and not that of tpm-udev", out), err)
	}
	m.step(1, "Everything is where the tables say")
	if err := m.volumesReady(); err != nil {
		return err
	}
	m.step(2, "What is state is where it can be found again")
	if err := m.stateFound(); err != nil {
		return err
	}
	m.step(3, "The sandbox")
	if err := m.sandboxed(); err != nil {
		return err
	}
	if err := m.restartVolumes(); err != nil {
		return err
	}
	return m.leaveBusy()
}

// volumesReady checks that each volume was ready before what uses it.
func (m *machine) volumesReady() error {
	for _, name := range []string{"var", "swap", "data", "tpm"} {
		dev, err := filepath.EvalSymlinks("/dev/hostcryptd/" + name)
		if err != nil {
			return err
		}
		u, err := m.unit("hostcryptd@"+name+".service", "ActiveState", "ActiveEnterTimestampMonotonic", "StatusText", "NRestarts", "MainPID")
		if err != nil {
			return err
		}
		m.say("%s is %s: %v", name, dev, u)
		if u["ActiveState"] != "active" || u["NRestarts"] != "0" {
			return fmt.Errorf("hostcryptd@%s.service is %v", name, u)
		}
		d, err := m.unit(`dev-hostcryptd-`+name+`.device`, "JobTimeoutUSec", "JobRunningTimeoutUSec", "ActiveState")
		if err != nil {
			return err
		}
		endless := d["JobTimeoutUSec"] == "infinity" && d["JobRunningTimeoutUSec"] == "infinity"
		if endless == (name == "tpm") || d["ActiveState"] != "active" {
			return fmt.Errorf("the device unit of %s is %v, want no timeout unless the volume has nofail", name, d)
		}
		user := map[string]string{"var": "var.mount", "data": "data.mount", "tpm": "tpm.mount", "swap": `dev-hostcryptd-swap.swap`}[name]
		w, err := m.unit(user, "ActiveState", "InactiveExitTimestampMonotonic", "Job")
		if err != nil {
			return err
		}
		begun, _ := strconv.Atoi(w["InactiveExitTimestampMonotonic"])
		ready, _ := strconv.Atoi(u["ActiveEnterTimestampMonotonic"])
		if w["ActiveState"] != "active" || begun < ready || ready == 0 {
			return fmt.Errorf("%s is %v, and its volume was ready at %d us", user, w, ready)
		}
		m.figure(name+" ready", float64(ready)/1e6, "s")
		// No watch of udev's.
		stat, err := os.Stat(dev)
		if err != nil {
			return err
		}
		rdev := stat.Sys().(*syscall.Stat_t).Rdev
		if _, err := os.Lstat(fmt.Sprintf("/run/udev/watch/b%d:%d", unix.Major(rdev), unix.Minor(rdev))); err == nil {
			return fmt.Errorf("udev watches %s", dev)
		}
	}
	if _, err := os.Stat("/dev/disk/by-hostcryptd-uuid/22222222-2222-4222-8222-222222222222"); err != nil {
		return err
	}
	// The control for the watch: udev has one on a disk that isn't ours.
	if names, _ := filepath.Glob("/run/udev/watch/b*"); len(names) == 0 {
		return errors.New("control: udev watches nothing")
	}
	// Loaded with all they depend on; it complains about everything it finds.
	out, err := m.run("systemd-analyze", "verify", "--man=no", "hostcryptd@var.service", "hostcryptd@swap.service", "hostcryptd@data.service", "hostcryptd-dial.service", "hostcryptd.target")
	if err != nil || strings.Contains(out, "hostcryptd") || strings.Contains(out, "cycle") {
		return errors.Join(errors.New("systemd-analyze verify finds faults"), err)
	}
	if out, err := m.run("cat", "/proc/swaps"); err != nil || !strings.Contains(out, "/dev/nbd") {
		return errors.Join(errors.New("the volume isn't swapped on"), err)
	}
	return nil
}

// stateFound finds the audit log and the pins, and nothing below the mounted /var.
func (m *machine) stateFound() error {
	if _, err := m.run("hostcryptd", "audit", "verify"); err != nil {
		return err
	}
	log, err := os.ReadFile("/var/log/hostcryptd/audit.log")
	if err != nil {
		return err
	}
	if n := strings.Count(string(log), `"event":"unsealed"`); n < 2 {
		return fmt.Errorf("the audit log has %d records of a volume that was opened, want at least 2: %s", n, log)
	}
	if _, err := os.Stat("/etc/hostcryptd/pins/11111111-1111-4111-8111-111111111111.json"); err != nil {
		return err
	}
	// Below the mounted /var.
	if _, err := m.run("mount", "--bind", "/", m.mnt); err != nil {
		return err
	}
	hidden, _ := filepath.Glob(m.mnt + "/var/log/hostcryptd/*")
	if err := m.unmount(); err != nil {
		return err
	}
	if len(hidden) > 0 {
		return fmt.Errorf("below the mounted /var there is %v", hidden)
	}
	return nil
}

// sandboxed checks what the services have from their sandbox, and what they may do.
func (m *machine) sandboxed() error {
	for _, name := range []string{"var", "swap", "data", "tpm"} {
		status, err := statusOf(name)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		engine := map[string]string{"swap": "portable"}[name]
		if status.Volume.KeyMemory != "memfd_secret" || status.Server.Engine != cmp.Or(engine, "io_uring") {
			return fmt.Errorf("%s has its key in %q and an engine %q", name, status.Volume.KeyMemory, status.Server.Engine)
		}
		if name == "swap" && !status.Swap.Safe {
			return fmt.Errorf("swap is not safe: %+v", status.Swap)
		}
		// What fits into a socket whose owner can't have more than net.core.wmem_max.
		kb, err := os.ReadFile("/sys/block/" + filepath.Base(status.Attached) + "/queue/max_sectors_kb")
		if err != nil {
			return err
		}
		if want := cmp.Or(map[string]string{"swap": "128"}[name], "256"); strings.TrimSpace(string(kb)) != want {
			return fmt.Errorf("the kernel's requests to %s are up to %s KiB, want %s", name, kb, want)
		}
		warnings, err := exec.Command("journalctl", "-b", "--no-pager", "-o", "cat", "-u", "hostcryptd@"+name+".service", "-g", `"level":"(warn|error)"`).Output()
		if len(warnings) > 0 {
			m.say("%s warns: %s", name, warnings)
		} else if _, none := errors.AsType[*exec.ExitError](err); err != nil && !none {
			return err
		}
		// See the unit. The key of data came from the vault with no more than this.
		if err := m.exposure("hostcryptd@"+name+".service", map[string]float64{"swap": 2.0}[name]); err != nil {
			return err
		}
	}
	if err := m.exposure("hostcryptd-dial.service", 1.8); err != nil {
		return err
	}
	// Whom that connects to is decided in files that servers can't write; their pins they can.
	data, err := m.unit("hostcryptd@data.service", "MainPID")
	if err != nil {
		return err
	}
	for name, may := range map[string]bool{"cloud.json": false, "pins/test": true} {
		name = "/etc/hostcryptd/" + name
		code, out, err := m.try("nsenter", "--mount", "--target="+data["MainPID"], "sh", "-c", "echo > "+name+" && rm "+name)
		if err != nil || (code == 0) != may || !may && !strings.Contains(out, "Read-only") {
			return errors.Join(fmt.Errorf("the service of data writes %s: %d, %s", name, code, out), err)
		}
	}
	// That has not the host key, and is root as this test is.
	dialer, err := m.unit("hostcryptd-dial.service", "MainPID")
	if err != nil {
		return err
	}
	for name, may := range map[string]bool{systemHostKey: false, "/etc/hostcrypttab": true} {
		code, out, err := m.try("nsenter", "--mount", "--target="+dialer["MainPID"], "test", "-s", name)
		if err != nil || (code == 0) != may {
			return errors.Join(fmt.Errorf("the dialer sees %s: %d, %s", name, code, out), err)
		}
	}
	if out, err := m.run("hostcryptd", "check", "data"); err != nil || !strings.Contains(out, "opens the volume") || strings.Contains(out, "hostcryptd-dial") {
		return errors.Join(errors.New("check doesn't ask the vault of data through the dialer"), err)
	}
	return m.dialerRefuses("elsewhere.example:443")
}

// exposure fails if a service is open to more than a score of systemd-analyze, which is
// 1.9 if it is 0.
func (m *machine) exposure(service string, limit float64) error {
	out, err := exec.Command("systemd-analyze", "security", "--no-pager", service).Output()
	if err != nil {
		return fmt.Errorf("systemd-analyze security: %w", err)
	}
	_, score, _ := strings.Cut(string(out), "Overall exposure level for "+service+": ")
	score, _, _ = strings.Cut(score, " ")
	v, err := strconv.ParseFloat(score, 64)
	if err != nil {
		return fmt.Errorf("systemd-analyze security: %w: %s", err, out)
	}
	m.figure("exposure of "+service, v, "")
	if v > cmp.Or(limit, 1.9) {
		return fmt.Errorf("the exposure of %s is %v: %s", service, v, out)
	}
	return nil
}

// dialerRefuses asks the dialer for a connection that it must not make.
func (m *machine) dialerRefuses(address string) error {
	c, err := net.Dial("unixpacket", "/run/hostcryptd/dial")
	if err != nil {
		return err
	}
	defer c.Close()
	answer := make([]byte, 4096)
	_, err = c.Write([]byte(address))
	n, rerr := c.Read(answer)
	if err := errors.Join(err, rerr); err != nil {
		return err
	}
	var u unitState
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) { // the service manager has its own pace
		if u, err = m.unit("hostcryptd-dial.service", "StatusText"); err != nil {
			return err
		}
		if u["StatusText"] != "" || time.Now().After(end) {
			break
		}
	}
	m.say("the dialer answered %s, its unit is %v", answer[:n], u)
	if !strings.Contains(string(answer[:n]), `"refused":true`) || !strings.Contains(u["StatusText"], address) {
		return fmt.Errorf("asked for %s, the dialer answered %s, and its unit is %v", address, answer[:n], u)
	}
	return nil
}

// restartVolumes reloads and restarts the services of volumes that are in use.
func (m *machine) restartVolumes() error {
	m.step(4, "Reloaded and restarted in use")
	const file = "/data/restarted"
	text := []byte(strings.Repeat("written before the restart\n", 10000))
	if err := os.WriteFile(file, text, 0o600); err != nil {
		return err
	}
	if err := m.reloadFails("data"); err != nil {
		return err
	}
	for _, verb := range []string{"reload", "restart"} {
		for _, name := range []string{"swap", "var", "data"} {
			m.disk = name // as the control command takes it
			// The one before has just been started, and all share one processor: status
			// gives a server 3 s to answer.
			before, err := m.waitServed(0)
			if err != nil {
				return err
			}
			unit := "hostcryptd@" + name + ".service"
			if _, err := m.run("systemctl", verb, unit); err != nil {
				log, _ := exec.Command("journalctl", "-b", "--no-pager", "-n", "20", "-o", "cat", "-u", unit).Output()
				return fmt.Errorf("%w\n%s", err, log)
			}
			after, err := m.waitServed(before.PID)
			if err != nil {
				return err
			}
			if (verb == "reload") != (after.Keeper == before.Keeper) {
				return fmt.Errorf("%s of %s: the keeper was process %d, and is %d", verb, name, before.Keeper, after.Keeper)
			}
			u, err := m.unit(unit, "ActiveState", "MainPID", "NRestarts")
			if err != nil {
				return err
			}
			if u["ActiveState"] != "active" || u["MainPID"] != strconv.Itoa(after.Keeper) || u["NRestarts"] != "0" {
				return fmt.Errorf("after %s, %s is %v, and its keeper process %d", verb, name, u, after.Keeper)
			}
		}
	}
	for _, unit := range []string{"var.mount", "data.mount", "dev-hostcryptd-swap.swap"} {
		u, err := m.unit(unit, "ActiveState")
		if err != nil {
			return err
		}
		if u["ActiveState"] != "active" {
			return fmt.Errorf("%s is %v after the restarts", unit, u)
		}
	}
	// From the disk, through the last of the servers.
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return err
	}
	got, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(got, text) {
		return errors.Join(fmt.Errorf("%s has %d bytes, and not what was written before the restarts", file, len(got)), err)
	}
	return os.Remove(file)
}

// reloadFails reloads a volume while what is installed can be asked for that, and can't
// serve: the service manager has to say that it failed, and all stays as it was.
func (m *machine) reloadFails(name string) error {
	m.disk = name
	before, err := m.waitServed(0)
	if err != nil {
		return err
	}
	const program, good = "/usr/sbin/hostcryptd", "/usr/sbin/hostcryptd.good"
	if err := os.Rename(program, good); err != nil {
		return err
	}
	script := "#!/bin/sh\n[ \"$1\" = reload ] && exec " + good + " \"$@\"\nexit 1\n"
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		return err
	}
	unit := "hostcryptd@" + name + ".service"
	code, _, err := m.try("systemctl", "reload", unit)
	if err := errors.Join(err, os.Rename(good, program)); err != nil {
		return err
	}
	if code == 0 {
		return errors.New("systemctl reload succeeds with a program that can't serve")
	}
	after, err := m.waitServed(0)
	if err != nil {
		return err
	}
	u, err := m.unit(unit, "ActiveState", "MainPID", "NRestarts")
	if err != nil {
		return err
	}
	if after.PID != before.PID || u["ActiveState"] != "active" || u["MainPID"] != strconv.Itoa(before.Keeper) || u["NRestarts"] != "0" {
		return fmt.Errorf("after a reload that failed, %s is %v, its server process %d; want keeper %d, server %d as before", unit, u, after.PID, before.Keeper, before.PID)
	}
	return nil
}

// Of leaveBusy: the file that is open until the last moment, and how far it
// was when the power-off was asked for.
const (
	busyFile = "/var/busy"
	busyMark = "/var/busy-at-power-off"
)

// runBusy writes numbered lines to a file for as long as it lives, each of them
// on the disk before the next one.
func runBusy() error {
	f, err := os.OpenFile(busyFile, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	for n := 1; ; n++ {
		if _, err := fmt.Fprintln(f, n); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func lastLine(name string) (int, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return 0, err
	}
	lines := strings.Fields(string(b))
	for i, l := range lines {
		if l != strconv.Itoa(i+1) {
			return 0, fmt.Errorf("%s has %q in line %d", name, l, i+1)
		}
	}
	return len(lines), nil
}

// leaveBusy leaves a process behind that has a file of /var open, that no unit
// stops, and that ends only when systemd-shutdown kills what is left. So /var is
// unmounted after that.
func (m *machine) leaveBusy() error {
	m.step(5, "A power-off with /var in use")
	if _, err := m.run("systemd-run", "--quiet", "--unit=busy", "--property=DefaultDependencies=no", "--property=KillMode=none", vmtest.SystemDir+"/guest", "busy"); err != nil {
		return err
	}
	time.Sleep(2 * time.Second)
	n, err := lastLine(busyFile)
	if err != nil {
		return err
	}
	if err := os.WriteFile("/data/written", []byte(m.canary), 0o600); err != nil {
		return err
	}
	return os.WriteFile(busyMark, []byte(strconv.Itoa(n)), 0o600)
}

// systemAfter finds what leaveBusy has left: file systems that need no
// repair, with all that was written.
func systemAfter(m *machine) error {
	if err := m.checkSystem(); err != nil {
		return err
	}
	for name, device := range map[string]string{"var": `dev-hostcryptd-var`, "data": `dev-hostcryptd-data`, "tpm": "dev-nbd0"} {
		out, err := m.run("journalctl", "-b", "--no-pager", "-o", "cat", "-u", "systemd-fsck@"+device+".service")
		if err != nil {
			return err
		}
		if !strings.Contains(out, ": clean,") || strings.Contains(out, "recovering journal") {
			return fmt.Errorf("fsck found %s to be: %s", name, out)
		}
	}
	out, err := m.run("journalctl", "-b", "--no-pager", "-o", "cat", "-k", "-g", "EXT4-fs")
	if err != nil {
		return err
	}
	if strings.Contains(out, "recovery complete") || strings.Contains(out, "orphan") {
		return errors.New("a file system had to be recovered: it was not unmounted")
	}
	if got, err := os.ReadFile("/data/written"); err != nil || string(got) != m.canary {
		return errors.Join(fmt.Errorf("/data/written holds %q", got), err)
	}
	mark, err := os.ReadFile(busyMark)
	if err != nil {
		return err
	}
	before, err := strconv.Atoi(string(mark))
	if err != nil {
		return err
	}
	n, err := lastLine(busyFile)
	if err != nil {
		return err
	}
	m.figure("lines before the power-off was asked for", float64(before), "")
	m.figure("lines after", float64(n-before), "")
	if n <= before {
		return errors.New("nothing was written after the power-off was asked for, so nothing was shown")
	}
	return nil
}

// The canaries of systemLogs, by who writes it to /var.
func logCanaries(canary string) map[string]string {
	return map[string]string{"journal": canary + "-IN-THE-JOURNAL", "application": canary + "-OF-AN-APPLICATION", "core": canary + "-IN-A-CORE-DUMP"}
}

// systemLogs has the system's own services write the canary to /var: journald,
// an application with its log, and systemd-coredump.
func systemLogs(m *machine) error {
	if err := m.checkSystem(); err != nil {
		return err
	}
	c := logCanaries(m.canary)
	if _, err := m.run("systemd-cat", "echo", c["journal"]); err != nil {
		return err
	}
	if err := os.WriteFile("/var/log/application.log", []byte(strings.Repeat(c["application"]+"\n", 100)), 0o600); err != nil {
		return err
	}
	// It has the canary in its memory, as this process has.
	// How it ends is no success; the dump is what counts.
	if _, _, err := m.try("systemd-run", "--quiet", "--wait", "--property=LimitCORE=infinity", "sh", "-c", "secret="+c["core"]+"; kill -ABRT $$$$"); err != nil {
		return err
	}
	var dump string
	for begun := time.Now(); dump == ""; time.Sleep(100 * time.Millisecond) {
		if names, _ := filepath.Glob("/var/lib/systemd/coredump/core.sh.*"); len(names) > 0 {
			dump = names[0]
		} else if time.Since(begun) > 30*time.Second {
			return errors.New("systemd-coredump has written no dump")
		}
	}
	if _, err := m.run("journalctl", "--sync"); err != nil {
		return err
	}
	unix.Sync()
	// The control: through the file systems, all three are there.
	journals, err := filepath.Glob("/var/log/journal/*/*.journal")
	if err != nil || len(journals) == 0 {
		return errors.Join(errors.New("there is no journal in /var"), err)
	}
	for who, names := range map[string][]string{"journal": journals, "application": {"/var/log/application.log"}, "core": {dump}} {
		n := 0
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			n += strings.Count(string(b), c[who])
		}
		if n == 0 {
			return fmt.Errorf("control: %v don't have the canary of the %s", names, who)
		}
		m.figure("canary in "+who, float64(n), "")
	}
	return nil
}

// mountID tells this mount from a later one.
func (m *machine) mountID() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == m.mnt {
			return f[0], nil
		}
	}
	return "", fmt.Errorf("nothing is mounted on %s", m.mnt)
}

// whileWriting runs f while a file is written to, and for a second more. It returns
// how long the longest write took to be on the disk.
func (m *machine) whileWriting(f func() error) (longest time.Duration, err error) {
	stop, result := make(chan struct{}), make(chan error, 1)
	go func() {
		file, err := os.Create(filepath.Join(m.mnt, "writing"))
		if err != nil {
			result <- err
			return
		}
		defer file.Close()
		for err == nil {
			select {
			case <-stop:
				result <- nil
				return
			default:
			}
			begun := time.Now()
			if _, err = file.WriteAt([]byte(begun.String()), 0); err == nil {
				err = file.Sync()
			}
			longest = max(longest, time.Since(begun))
		}
		result <- err
	}()
	time.Sleep(time.Second)
	err = f()
	time.Sleep(time.Second)
	close(stop)
	return longest, errors.Join(err, <-result)
}

// systemWatchdog stops servers and disks, and looks whom the service manager
// replaces. Its table has data behind a device that can be suspended, and a
// watchdog that waits for seconds only.
func systemWatchdog(m *machine) (err error) {
	m.reconnects = true
	if err := m.checkSystem(); err != nil {
		return err
	}
	size, err := deviceSize(diskBySerial("data"))
	if err != nil {
		return err
	}
	if _, err := m.run("dmsetup", "create", "behind", "--table", fmt.Sprintf("0 %d linear %s 0", size/512, diskBySerial("data"))); err != nil {
		return err
	}
	if _, err := m.run("systemctl", "start", "hostcryptd@data.service"); err != nil {
		return err
	}
	if err := m.mount("/dev/hostcryptd/data"); err != nil {
		return err
	}
	m.step(1, "Until the last step, a flush of another volume hangs, which is reloaded")
	held, err := m.startHeldFlush()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			held.disk.letGo() // or the machine would not power off
		}
	}()
	m.step(2, "The disk hangs for longer than the watchdog waits")
	if err := m.hangingDisk(); err != nil {
		return err
	}
	m.step(3, "The server hangs")
	if err := m.hangingServer(); err != nil {
		return err
	}
	m.step(4, "Reloaded and restarted in use")
	if err := m.replacedInUse(); err != nil {
		return err
	}
	m.step(5, "Stopped while a process that the sandbox hides has the device open")
	if err := m.stopWhileOpen(); err != nil {
		return err
	}
	m.step(6, "The flush that hung, and the reload, which comes to nothing")
	return held.end()
}

// service returns what systemd says of a volume's service, and the process that serves.
func (m *machine) service(name string) (u unitState, server int, err error) {
	var s volumeStatus
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) { // all share one processor
		if s, err = statusOf(name); err == nil || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return nil, 0, err
	}
	u, err = m.unit("hostcryptd@"+name+".service", "MainPID", "NRestarts", "ActiveState")
	return u, s.PID, err
}

// hangingDisk suspends the disk below data.
func (m *machine) hangingDisk() error {
	before, server, err := m.service("data")
	if err != nil {
		return err
	}
	if _, err := m.run("dmsetup", "suspend", "--noflush", "behind"); err != nil {
		return err
	}
	written := m.writeSynced(filepath.Join(m.mnt, "hung-disk"), "while the disk hung")
	time.Sleep(20 * time.Second)
	select {
	case err := <-written:
		return fmt.Errorf("a write came back from a disk that hangs: %v", err)
	default:
	}
	after, same, err := m.service("data")
	if err != nil {
		return err
	}
	if after["MainPID"] != before["MainPID"] || same != server || after["NRestarts"] != "0" {
		return fmt.Errorf("while its disk hung, the service was replaced: %v, server %d, then %v, server %d", before, server, after, same)
	}
	if _, err := m.run("dmsetup", "resume", "behind"); err != nil {
		return err
	}
	if err := <-written; err != nil {
		return fmt.Errorf("the write that waited for the disk: %w", err)
	}
	return nil
}

// hangingServer stops the server of data by a signal.
func (m *machine) hangingServer() error {
	_, server, err := m.service("data")
	if err != nil {
		return err
	}
	begun := time.Now()
	m.typed("kill", "-STOP", strconv.Itoa(server))
	if err := unix.Kill(server, unix.SIGSTOP); err != nil {
		return err
	}
	select {
	case err := <-m.writeSynced(filepath.Join(m.mnt, "hung-server"), "while the server hung"):
		if err != nil {
			return fmt.Errorf("the write that waited for the server: %w", err)
		}
	case <-time.After(90 * time.Second):
		return errors.New("a write still waits 90 s after the server was stopped, whose watchdog waits 8 s")
	}
	m.figure("I/O goes on after the server hung", time.Since(begun).Seconds(), "s")
	// The write is done before the service says that it is ready.
	var after unitState
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if after, _, err = m.service("data"); err == nil && after["ActiveState"] == "active" || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return err
	}
	if after["ActiveState"] != "active" || after["NRestarts"] == "0" {
		return fmt.Errorf("the service is %v, want it to have been restarted", after)
	}
	return nil
}

// replacedInUse has the server of data replaced by the service manager while its file
// system is written to, kills it, and unmounts.
func (m *machine) replacedInUse() error {
	mounted, err := m.mountID()
	if err != nil {
		return err
	}
	for _, verb := range []string{"reload", "restart"} {
		before, server, err := m.service("data")
		if err != nil {
			return err
		}
		longest, err := m.whileWriting(func() error {
			_, err := m.run("systemctl", verb, "hostcryptd@data.service")
			return err
		})
		if err != nil {
			return fmt.Errorf("systemctl %s: %w", verb, err)
		}
		after, next, err := m.service("data")
		if err != nil {
			return err
		}
		if next == server || after["ActiveState"] != "active" {
			return fmt.Errorf("systemctl %s: %v, server %d, then %v, server %d", verb, before, server, after, next)
		}
		if id, err := m.mountID(); err != nil || id != mounted {
			return errors.Join(fmt.Errorf("systemctl %s: the file system was mounted anew", verb), err)
		}
		m.figure("longest write at "+verb, float64(longest.Milliseconds()), "ms")
	}
	// The service manager has no copy of the kernel's socket left, which would keep
	// the kernel from seeing that this server is dead.
	longest, err := m.whileWriting(func() error {
		_, dead, err := m.service("data")
		if err != nil {
			return err
		}
		m.typed("kill", "-9", strconv.Itoa(dead))
		if err := unix.Kill(dead, unix.SIGKILL); err != nil {
			return err
		}
		for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
			if _, next, err := m.service("data"); err == nil && next != 0 && next != dead {
				return nil
			}
		}
		return errors.New("no other server in 3 minutes")
	})
	if err != nil {
		return fmt.Errorf("after a restart, the server was killed: %w", err)
	}
	if id, err := m.mountID(); err != nil || id != mounted {
		return errors.Join(errors.New("after a restart and a kill, the file system was mounted anew"), err)
	}
	m.figure("longest write at a kill after the restart", float64(longest.Milliseconds()), "ms")
	if err := m.unmount(); err != nil {
		return err
	}
	_, err = m.run("e2fsck", "-fn", "/dev/hostcryptd/data")
	return err
}

// stopWhileOpen stops the service under a process that has the device open and
// data in the page cache: nothing of that may be lost.
func (m *machine) stopWhileOpen() error {
	const (
		unit = "hostcryptd@data.service"
		path = "/dev/hostcryptd/data"
	)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	page, got := alignedPage(), alignedPage()
	fillPage(page, 4, 4)
	if _, err := f.WriteAt(page, size-pageSize); err != nil {
		return err
	}
	stopped := make(chan error, 1)
	go func() {
		_, err := m.run("systemctl", "stop", unit)
		stopped <- err
	}()
	select {
	case err := <-stopped:
		return errors.Join(errors.New("the service stops while a process has its device open"), err)
	case <-time.After(6 * time.Second):
	}
	if _, err := f.WriteAt(page, size-2*pageSize); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	select {
	case err := <-stopped:
		if err != nil {
			return err
		}
	case <-time.After(time.Minute):
		return errors.New("the service hasn't stopped a minute after its device was closed")
	}
	if _, err := m.run("systemctl", "start", unit); err != nil {
		return err
	}
	if f, err = os.Open(path); err != nil {
		return err
	}
	defer f.Close()
	for _, back := range []int64{1, 2} {
		if _, err := f.ReadAt(got, size-back*pageSize); err != nil || string(got) != string(page) {
			return errors.Join(errors.New("what was written before the device was closed is lost"), err)
		}
	}
	f.Close()
	_, err = m.run("systemctl", "stop", unit)
	return err
}
