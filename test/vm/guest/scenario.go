package main

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// scenarios by the name that the kernel command line gives.
var scenarios = map[string]func(*machine) error{
	"smoke":         smoke,
	"complain":      complain,
	"boot":          boot,
	"reboot":        reboot,
	"inuse":         inUse,
	"stolen":        stolen,
	"leave":         leave,
	"revoke":        revoke,
	"outage":        outage,
	"kill":          kill,
	"restart":       restart,
	"swap":          swap,
	"swap-control":  swapControl,
	"export-write":  exportWrite,
	"export-verify": exportVerify,
	"demo-1":        demoFirstBoot,
	"demo-2":        demoSecondBoot,
	"demo-on-host":  demoOnHost,

	"powercut-prepare": powerCutPrepare,
	"powercut-write":   powerCutWrite,
	"powercut-check":   powerCutCheck,
	"headercut":        headerCut,
	"logwrites":        logWrites,
	"stress":           stress,
	"kdump-crash":      kdumpCrash,
	"kdump-read":       kdumpRead,
	"root-prepare":     rootPrepare,
	"root-first":       rootFirst,
	"root-second":      rootSecond,
	"disk-errors":      diskErrors,

	"system-prepare": systemPrepare,
	"system-volumes": systemVolumes,
	"system-after":   systemAfter,
	"system-logs":    systemLogs,

	"system-watchdog": systemWatchdog,
}

func (m *machine) runScenario(name string) error {
	f, ok := scenarios[name]
	if !ok {
		return fmt.Errorf("no scenario %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(scenarios)), ", "))
	}
	defer m.stopVault()
	return f(m)
}

// smoke shows that the machine itself works, without hostcryptd.
func smoke(m *machine) error {
	dev, err := freeDevice()
	if err != nil {
		return err
	}
	m.say("first free kernel device: %s", dev)
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return err
	}
	if year := time.Unix(ts.Unix()).Year(); year < 2026 {
		return fmt.Errorf("the clock says %d: no certificate would be valid", year)
	}
	for _, v := range [][]string{{"mkfs.ext4", "-V"}, {"e2fsck", "-V"}, {"cryptsetup", "--version"}, {"dmsetup", "--version"}, {"blkid", "--version"}} {
		if _, err := m.run(v[0], v[1:]...); err != nil {
			return err
		}
	}
	if err := m.startVault(); err != nil {
		return err
	}
	return m.checkVault()
}

// complain passes all its own checks while the kernel logs an error: the
// boot must fail.
func complain(*machine) error {
	return os.WriteFile("/dev/kmsg", []byte("<3>test: I/O error, dev none, sector 0"), 0)
}

// checkVault asks the double the way any client would: by the real names,
// with the machine's own certificates.
func (m *machine) checkVault() error {
	for _, ask := range []struct {
		url  string
		want int
	}{
		{keyURL + "?api-version=7.4", http.StatusUnauthorized}, // there is no token
		{"http://" + metadataAddress + "/metadata/identity/oauth2/token?api-version=2018-02-01&resource=https://vault.azure.net", http.StatusOK},
	} {
		req, err := http.NewRequest("GET", ask.url, nil)
		if err != nil {
			return err
		}
		req.Header.Set("Metadata", "true")
		m.typed("curl", "-H", "Metadata:true", ask.url)
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		m.output(resp.Status)
		if resp.StatusCode != ask.want {
			return fmt.Errorf("%s answered %s, want %d", ask.url, resp.Status, ask.want)
		}
	}
	return nil
}

// boot makes a volume, attaches it and fills a file system on it.
func boot(m *machine) error {
	if err := m.format(); err != nil {
		return err
	}
	s, err := m.attach()
	if err != nil {
		return err
	}
	if _, err := m.run("mkfs.ext4", "-q", "-L", "plaintext-label", s.dev); err != nil {
		return err
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	if err := m.fill(); err != nil {
		return err
	}
	// The control for the host's search of the raw disk: through the volume
	// the canary is there.
	found, err := m.find(s.dev)
	if err != nil {
		return err
	}
	if !found {
		return fmt.Errorf("the canary is not on %s, so looking for it elsewhere proves nothing", s.dev)
	}
	if err := m.peakMemory(); err != nil {
		return err
	}
	return s.detach()
}

// peakMemory reports the most memory that the server has taken.
func (m *machine) peakMemory() error {
	s, err := m.status()
	m.figure("serve peak memory", s.Memory.Peak/(1<<20), "MiB")
	return err
}

// inUse tries to stop the server while its kernel device is mounted, by
// request and by signal: it must not take the device from under the file
// system, and must stop by itself when the file system is gone.
func inUse(m *machine) error {
	m.reconnects = true
	s, err := m.attach()
	if err != nil {
		return err
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	code, out, err := m.try("hostcryptd", "detach", m.disk)
	if err != nil {
		return err
	}
	if code != exitBusy || !strings.Contains(out, "mounted on "+m.mnt) {
		return fmt.Errorf("hostcryptd detach of a mounted device: exit code %d, want %d and where it is mounted", code, exitBusy)
	}

	// As in a container whose /dev was filled before there was the device.
	node := unix.Stat_t{}
	if err := errors.Join(unix.Stat(s.dev, &node), os.Remove(s.dev)); err != nil {
		return err
	}
	code, out, err = m.try("hostcryptd", "detach", m.disk)
	if err != nil {
		return err
	}
	if code != exitBusy || !strings.Contains(out, "mknod "+s.dev) {
		return fmt.Errorf("hostcryptd detach of a device without a node: exit code %d, want %d and how to make the node", code, exitBusy)
	}

	m.typed("kill", "-TERM", strconv.Itoa(s.cmd.Process.Pid))
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	time.Sleep(time.Second)
	if err := unix.Mknod(s.dev, node.Mode, int(node.Rdev)); err != nil {
		return err
	}
	time.Sleep(time.Second)
	if !s.running() {
		return errors.New("hostcryptd serve ended while its device was mounted")
	}
	if out, err := m.run("hostcryptd", "status", m.disk); err != nil || !strings.Contains(out, "in use: mounted on") {
		return errors.Join(errors.New("hostcryptd status doesn't say what it waits for"), err)
	}
	// The file system still works, also on another connection than it had, and what it
	// writes now must not be lost.
	if err := m.loseKernelSocket(); err != nil {
		return err
	}
	begun := time.Now()
	late := filepath.Join(m.mnt, "late")
	if err := os.WriteFile(late, []byte("written after SIGTERM"), 0o600); err != nil {
		return err
	}
	unix.Sync()
	m.figure("written on another connection", time.Since(begun).Seconds(), "s")
	begun = time.Now()
	if err := m.unmount(); err != nil {
		return err
	}
	if err := s.waitEnd("the unmount"); err != nil {
		return err
	}
	m.figure("stopped after unmount", time.Since(begun).Seconds(), "s")

	// Read-only, with two sockets to the kernel.
	if s, err = m.serve("--unseal-timeout", "60s", "--read-only", "--connections", "2"); err != nil {
		return err
	}
	if ro, err := os.ReadFile("/sys/block/" + filepath.Base(s.dev) + "/ro"); err != nil || strings.TrimSpace(string(ro)) != "1" {
		return errors.Join(fmt.Errorf("%s is not read-only", s.dev), err)
	}
	m.typed("mount", "-o", "ro", s.dev, m.mnt)
	if err := unix.Mount(s.dev, m.mnt, "ext4", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mounting %s read-only: %w", s.dev, err)
	}
	got, err := os.ReadFile(late)
	if err != nil || string(got) != "written after SIGTERM" {
		return errors.Join(fmt.Errorf("the file written after SIGTERM holds %q", got), err)
	}
	if err := m.unmount(); err != nil {
		return err
	}
	return s.detach()
}

// reboot opens the volume of boot again.
func reboot(m *machine) error {
	s, err := m.attach()
	if err != nil {
		return err
	}
	if err := m.checkFiles(s.dev); err != nil {
		return err
	}
	return s.detach()
}

// Exit codes of hostcryptd that this program expects.
const (
	exitDevice              = 4
	exitBusy                = 5
	exitVaultUnreachable    = 10
	exitIdentityUnavailable = 14
)

// stolen tries to open the volume where neither the vault nor an identity
// exists: on somebody else's machine.
func stolen(m *machine) error {
	begun := time.Now()
	s, err := m.serveRefused("--unseal-timeout", "5s")
	if err != nil {
		return fmt.Errorf("without the vault: %w", err)
	}
	if s.code != exitVaultUnreachable && s.code != exitIdentityUnavailable {
		return fmt.Errorf("hostcryptd serve ended with exit code %d without the vault, want %d or %d",
			s.code, exitVaultUnreachable, exitIdentityUnavailable)
	}
	m.figure("refused after", time.Since(begun).Seconds(), "s")
	m.figure("exit code", float64(s.code), "")
	// No kernel device may be left with a size.
	if dev, err := freeDevice(); err != nil || dev != "/dev/nbd0" {
		return errors.Join(fmt.Errorf("first free kernel device is %q, want /dev/nbd0", dev), err)
	}
	return nil
}

// leave opens the volume of boot with cryptsetup, dm-crypt and the recovery
// key: without hostcryptd, the vault or the network.
func leave(m *machine) (err error) {
	const name = "hostcryptd-left"
	if _, err := m.run("cryptsetup", "open", "--type", "luks2", "--key-file", m.recoveryKey(), m.disk, name); err != nil {
		return err
	}
	defer func() {
		_, err2 := m.run("cryptsetup", "close", name)
		err = errors.Join(err, err2)
	}()
	table, err := m.run("dmsetup", "table", name)
	if err != nil {
		return err
	}
	if !strings.Contains(table, " crypt aes-xts-plain64 ") {
		return fmt.Errorf("the device mapper table is %q, want a crypt target with aes-xts-plain64", strings.TrimSpace(table))
	}
	return m.checkFiles("/dev/mapper/" + name)
}

// exportWrite fills a file system on the disk "volume", which QEMU reads and
// writes through an NBD export.
func exportWrite(m *machine) error {
	if _, err := m.run("mkfs.ext4", "-q", m.disk); err != nil {
		return err
	}
	if err := m.mount(m.disk); err != nil {
		return err
	}
	return m.fill()
}

// exportVerify finds those files again.
func exportVerify(m *machine) error { return m.checkFiles(m.disk) }

// format writes a new header, with the vault's key and a recovery key.
func (m *machine) format() error {
	if err := m.startVault(); err != nil {
		return err
	}
	os.Remove(m.recoveryKey())
	_, err := m.run("hostcryptd", "format", m.disk, "--key", keyURL, "--recovery-key", m.recoveryKey(), "--yes")
	return err
}

// hostKey is the file with the host key of a volume that is for one boot only.
const hostKey = "/run/host.key"

// formatHostKey writes a new header, with that host key, which is made if it isn't
// there.
func (m *machine) formatHostKey() error {
	_, err := m.run("hostcryptd", "format", m.disk, "--key", "host-key", "--host-key", hostKey, "--yes")
	return err
}

// attach serves the volume through the vault.
func (m *machine) attach() (*server, error) {
	if err := m.startVault(); err != nil {
		return nil, err
	}
	return m.serve("--unseal-timeout", "60s")
}

// checkFiles checks the file system on a device and its files.
func (m *machine) checkFiles(dev string) error {
	if _, err := m.run("e2fsck", "-fn", dev); err != nil {
		return err
	}
	if err := m.mount(dev); err != nil {
		return err
	}
	if err := m.verify(); err != nil {
		return errors.Join(err, m.unmount())
	}
	return m.unmount()
}
