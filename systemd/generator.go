package systemd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A Volume is what the service manager has to know of a line of
// /etc/hostcrypttab. The words are those of crypttab(5).
type Volume struct {
	Name          string         // also the instance of hostcryptd@.service; letters, digits, and _ . -
	Device        string         // path of the backing device or image
	KeyFile       string         // path of the host key; "" if there is none
	Attach        string         // "auto", "/dev/nbdN", or "" for no kernel device
	Pins          string         // absolute path of the pins, if it's in /etc and not the usual one; letters, digits, and _ . - /
	MakeFS        string         // "swap" or a type of file system to make on an empty device; "" for none
	DeviceTimeout *time.Duration // how long the backing device may take to appear; 0 is for ever, nil the default

	Swap    bool // is paged to: the server must go on when there is no memory
	Vault   bool // the key may be in a vault
	Network bool // clients come by TCP

	NoAuto bool // not started at boot
	NoFail bool // the boot neither waits for it nor fails with it
	NetDev bool // needs the network: belongs to remote-fs.target
}

// VolumeDir holds a link to the kernel device of each volume that has a name.
const VolumeDir = "/dev/hostcryptd"

// DialerSocket is that of hostcryptd-dial.service.
const DialerSocket = "/run/hostcryptd/dial"

// Generate writes what orders the service of each volume among the other
// units into dir, the first argument of systemd.generator(7). source is the
// table, for who asks where a unit comes from.
//
// It follows systemd-cryptsetup-generator: what uses the device is ordered
// after the service by blockdev@.target, and pulls it in by its device unit,
// which waits as long as the service does. A volume that the boot doesn't need
// has neither.
//
// Nothing here is ordered after the network, as what brings the network up may
// need the volume: who unseals at a vault waits by himself. He has no network of his
// own, see hostcryptd-dial.service. That a volume has a key in a vault is known to its
// header only, which can't be read yet.
func Generate(dir, source string, volumes []Volume) error {
	local := false
	for _, v := range volumes {
		if err := v.generate(dir, source); err != nil {
			return fmt.Errorf("systemd: units of volume %s: %w", v.Name, err)
		}
		local = local || !v.NoAuto && !v.NetDev
	}
	if !local {
		return nil
	}
	return link(dir, "sysinit.target.wants", localTarget)
}

const (
	localTarget  = "hostcryptd.target"
	remoteTarget = "remote-fs.target"
	generated    = "# Made of %s by hostcryptd-generator.\n"
)

// What the template of the service closes and some volumes need, or the other way round.
const (
	// An image is on a file system, whose unmount at shutdown waits for this
	// service. If the volume can't be unmounted in time either, that must end; the
	// server then goes on until it can.
	openImage = `TimeoutStopSec=90
SendSIGKILL=no
`
	askDialer   = "Environment=HOSTCRYPTD_DIALER=" + DialerSocket + "\n"
	openNetwork = `RestrictAddressFamilies=AF_INET AF_INET6
IPAddressDeny=
`
	// A key of this boot needs no TPM and no identity, and a disk is root's.
	closeFiles = "CapabilityBoundingSet=~CAP_DAC_OVERRIDE\n"
	// SCHED_RR and its system calls; PR_SET_IO_FLUSHER needs SYS_RESOURCE;
	// vm.min_free_kbytes is looked at and raised; /proc/swaps says who waits.
	openSwap = `CapabilityBoundingSet=CAP_SYS_NICE CAP_SYS_RESOURCE CAP_IPC_LOCK
RestrictRealtime=no
LimitRTPRIO=1
SystemCallFilter=sched_setscheduler sched_setattr setpriority
ProcSubset=all
ReadWritePaths=/proc/sys/vm
`
)

// openPins lets a service write to a directory in /etc, which systemd makes: that above
// stays closed.
func openPins(dir string) string {
	if dir == "" {
		return ""
	}
	return "ConfigurationDirectory=" + strings.TrimPrefix(dir, "/etc/") + "\nReadWritePaths=" + dir + "\n"
}

func (v *Volume) generate(dir, source string) error {
	unit := "hostcryptd@" + v.Name + ".service"
	target := localTarget
	if v.NetDev {
		target = remoteTarget
	}

	var b bytes.Buffer
	fmt.Fprintf(&b, generated, source)
	fmt.Fprintf(&b, "[Unit]\nSourcePath=%s\n", source)
	if !v.NoFail && !v.NoAuto {
		fmt.Fprintf(&b, "Before=%s\n", target)
	}
	devices := v.devices()
	for _, d := range devices {
		// The mount or swap unit of d has After=blockdev@d.target.
		t := "blockdev@" + EscapePath(d) + ".target"
		fmt.Fprintf(&b, "Wants=%s\nBefore=%s\n", t, t)
	}
	if strings.HasPrefix(v.Device, "/dev/") {
		d := EscapePath(v.Device) + ".device"
		fmt.Fprintf(&b, "BindsTo=%s\nAfter=%s\n", d, d)
	} else {
		// At shutdown the mount below the image stops, and this service with it; see
		// openImage.
		fmt.Fprintf(&b, "RequiresMountsFor=%s\n", quoted(v.Device))
	}
	if v.KeyFile != "" && !strings.HasPrefix(v.KeyFile, "/dev/") {
		// Needed to start, and no longer. RequiresMountsFor= would also stop the service
		// when a stick with the key is unplugged, and at shutdown, which then waits for
		// what is on the volume: up to half an hour (JobTimeoutSec= of poweroff.target).
		// What is no mount unit is ignored. Since systemd 256 this is WantsMountsFor=.
		for _, m := range mountsFor(v.KeyFile) {
			fmt.Fprintf(&b, "Wants=%s\nAfter=%s\n", m, m)
		}
	}
	if v.Vault {
		b.WriteString("Wants=hostcryptd-dial.service\nAfter=hostcryptd-dial.service\n")
	}
	b.WriteString("\n[Service]\n")
	if v.MakeFS != "" {
		// It makes nothing where there is something. Outside of the sandbox: it
		// runs mkfs. udev is told, as hostcryptd.rules has the device ready only then.
		device := filepath.Join(VolumeDir, v.Name)
		fmt.Fprintf(&b, "ExecStartPost=+/usr/lib/systemd/systemd-makefs %s %s\nExecStartPost=+/usr/bin/udevadm trigger %s\n", v.MakeFS, device, device)
	}
	if !strings.HasPrefix(v.Device, "/dev/") {
		b.WriteString(openImage)
	}
	if v.Vault {
		b.WriteString(askDialer)
	}
	if v.Network {
		b.WriteString(openNetwork)
	}
	b.WriteString(openPins(v.Pins))
	if v.Swap {
		b.WriteString(openSwap)
		if !v.Vault && strings.HasPrefix(v.Device, "/dev/") {
			b.WriteString(closeFiles)
		}
	}
	err := write(dir, unit+".d", "50-hostcrypttab.conf", b.Bytes())

	if v.DeviceTimeout != nil && strings.HasPrefix(v.Device, "/dev/") {
		err = errors.Join(err, write(dir, EscapePath(v.Device)+".device.d", "50-hostcrypttab-timeout.conf",
			fmt.Appendf(nil, generated+"[Unit]\nJobRunningTimeoutSec=%s\n", source, timeSpan(*v.DeviceTimeout))))
	}
	if v.NoAuto {
		return err
	}
	need := "requires"
	if v.NoFail {
		need = "wants"
	}
	err = errors.Join(err, link(dir, target+"."+need, unit))
	for _, d := range devices {
		device := EscapePath(d) + ".device"
		err = errors.Join(err, link(dir, device+".requires", unit))
		if !v.NoFail {
			// Otherwise a boot at which the vault can't be reached for a minute and
			// a half ends in emergency mode. x-systemd.device-timeout= of fstab has a
			// later name, and counts.
			err = errors.Join(err, write(dir, device+".d", "40-hostcrypttab-timeout.conf",
				fmt.Appendf(nil, generated+"[Unit]\nJobTimeoutSec=infinity\nJobRunningTimeoutSec=infinity\n", source)))
		}
	}
	return err
}

// devices are the names under which others use the kernel device.
func (v *Volume) devices() []string {
	switch v.Attach {
	case "":
		return nil
	case "auto":
		return []string{filepath.Join(VolumeDir, v.Name)}
	}
	return []string{filepath.Join(VolumeDir, v.Name), v.Attach}
}

// mountsFor are the mount units that may be above a file, the root excepted.
func mountsFor(path string) (units []string) {
	for dir := filepath.Dir(filepath.Clean(path)); dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		units = append(units, EscapePath(dir)+".mount")
	}
	slices.Reverse(units)
	return units
}

func write(dir, sub, name string, content []byte) error {
	if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, sub, name), content, 0o644)
}

// link makes dir/sub/unit, which adds a dependency. The target of the link is
// of no importance, but it must exist: an instance is linked to its template.
func link(dir, sub, unit string) error {
	if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
		return err
	}
	file := unit
	if i := strings.IndexByte(unit, '@'); i >= 0 {
		file = unit[:i+1] + filepath.Ext(unit)
	}
	err := os.Symlink(filepath.Join("/usr/lib/systemd/system", file), filepath.Join(dir, sub, unit))
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// quoted protects a path in a unit file, where % begins a specifier and a
// setting is a list of words.
func quoted(path string) string {
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "%", "%%").Replace(path) + `"`
}

// timeSpan is a duration as systemd.time(7) has them.
func timeSpan(d time.Duration) string {
	if d == 0 {
		return "infinity"
	}
	return strconv.FormatInt(d.Milliseconds(), 10) + "ms"
}

// EscapePath is the name of the unit of a path, without its suffix: what
// 'systemd-escape --path' prints.
func EscapePath(path string) string {
	path = strings.Trim(filepath.Clean("/"+path), "/")
	if path == "" {
		return "-"
	}
	var b strings.Builder
	for i := range len(path) {
		c := path[i]
		switch {
		case c == '/':
			b.WriteByte('-')
		case c == '.' && i == 0, !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.", rune(c)):
			fmt.Fprintf(&b, `\x%02x`, c)
		default:
			b.WriteByte(c)
		}
	}
	return b.String()
}
