package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

// initMachine is PID 1. Whatever happens, it ends in a power-off; the host
// learns from the last event how it went.
func initMachine() {
	defer powerOff()
	if err := setUp(); err != nil {
		fmt.Printf("guest: %v\n", err) // to the console: there is nothing else yet
		return
	}
	events, err := openEventPort()
	if err != nil {
		fmt.Printf("guest: %v\n", err)
		return
	}
	w := report.NewWriter(events, uptime)
	reportDone(w, runFromCommandLine(w))
}

func powerOff() {
	unix.Sync()
	err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	fmt.Printf("guest: power off: %v\n", err)
	select {} // the end of PID 1 would be a kernel panic
}

// setUp mounts what every program expects and loads the modules. It doesn't
// return if the command line says to become systemd.
func setUp() error {
	for _, m := range []struct{ source, target, fstype string }{
		{"proc", "/proc", "proc"},
		{"sysfs", "/sys", "sysfs"},
		{"devtmpfs", "/dev", "devtmpfs"},
		{"tmpfs", "/run", "tmpfs"},
		{"tmpfs", "/tmp", "tmpfs"},
	} {
		if err := unix.Mount(m.source, m.target, m.fstype, 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mounting %s: %w", m.target, err)
		}
	}
	for key, value := range map[string]string{
		"PATH": "/bin:/sbin:/usr/bin:/usr/sbin",
		"HOME": "/root",
		// There is no udev here to make the nodes of the device mapper.
		"DM_DISABLE_UDEV": "1",
	} {
		if err := os.Setenv(key, value); err != nil {
			return err
		}
	}
	if err := loadModules(); err != nil {
		return err
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	params, err := kernelParameters()
	if err != nil {
		return err
	}
	if params["root"] != "" {
		return switchRoot(params["root"])
	}
	return nil
}

func loadModules() error {
	list, err := os.ReadFile(vmtest.ModuleList)
	if err != nil {
		return fmt.Errorf("reading the list of modules: %w", err)
	}
	for _, name := range strings.Fields(string(list)) {
		if err := loadModule(name); err != nil {
			return fmt.Errorf("loading %s: %w", name, err)
		}
	}
	return nil
}

func loadModule(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// openEventPort waits for the port, which a kernel worker adds.
func openEventPort() (*os.File, error) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			name, err := os.ReadFile(n)
			if err != nil || string(bytes.TrimSpace(name)) != vmtest.EventPort {
				continue
			}
			f, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(n))), os.O_WRONLY, 0)
			if err == nil {
				return f, nil
			}
		}
	}
	return nil, errors.New("no virtio-serial port called " + vmtest.EventPort)
}

func runFromCommandLine(w *report.Writer) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v\n%s", r, debug.Stack())
		}
	}()
	if err := reportReady(w); err != nil {
		return err
	}
	params, err := kernelParameters()
	if err != nil {
		return err
	}
	m := &machine{
		Writer:  w,
		params:  params,
		canary:  params["canary"],
		disk:    diskBySerial("volume"),
		payload: diskBySerial("payload"),
		mnt:     "/mnt",
		tools:   diskBySerial("tools"),
	}
	if state := diskBySerial("state"); state != "" {
		if err := mountState(state, "/state"); err != nil {
			return err
		}
		m.state = "/state"
	}
	err = m.runScenario(params["scenario"])
	if m.state != "" {
		err = errors.Join(err, unix.Unmount(m.state, 0))
	}
	if m.brokenDisk {
		return err
	}
	return errors.Join(err, kernelComplaints(m.reconnects))
}

// kernelParameters returns the words of the kernel command line that are for
// this program, without their prefix.
func kernelParameters() (map[string]string, error) {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return nil, err
	}
	params := map[string]string{}
	for _, word := range strings.Fields(string(line)) {
		if word, ok := strings.CutPrefix(word, "hostcryptd."); ok {
			key, value, _ := strings.Cut(word, "=")
			params[key] = value
		}
	}
	return params, nil
}

// diskBySerial returns the device node of a virtio or NVMe disk, or "".
func diskBySerial(serial string) string {
	for _, pattern := range []string{"/sys/block/vd*/serial", "/sys/block/nvme*/device/serial"} {
		names, _ := filepath.Glob(pattern) // of a good pattern
		for _, n := range names {
			if s, err := os.ReadFile(n); err == nil && strings.TrimSpace(string(s)) == serial {
				disk, _, _ := strings.Cut(strings.TrimPrefix(n, "/sys/block/"), "/")
				return filepath.Join("/dev", disk)
			}
		}
	}
	return ""
}

// mountState mounts the state disk, which the first boot formats.
func mountState(dev, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	err := unix.Mount(dev, dir, "ext4", 0, "")
	if errors.Is(err, unix.EINVAL) {
		if out, err := command("mkfs.ext4", "-q", dev).CombinedOutput(); err != nil {
			return fmt.Errorf("formatting the state disk: %w: %s", err, out)
		}
		err = unix.Mount(dev, dir, "ext4", 0, "")
	}
	if err != nil {
		return fmt.Errorf("mounting the state disk: %w", err)
	}
	return nil
}

// complaints are what the kernel says when a block device, a file system or
// a task is in trouble. A scenario during which it says so has failed, even
// if all its own checks passed.
var complaints = []string{
	"I/O error", "EXT4-fs error", "EXT4-fs warning", "Remounting filesystem read-only",
	"blocked for more than", stuckRequest, "Dead connection", "Double reply",
	"Unexpected reply", "Wrong magic", "BUG:", "WARNING:", "Oops",
}

// stuckRequest is what the kernel says, and does nothing else, of a request that takes
// longer than the 5 s that hostcryptd sets. An emulated disk on a machine that others
// use, too, may take that for a flush; what takes stuckAfter is stuck.
const (
	stuckRequest = "Possible stuck request"
	stuckAfter   = 30 * time.Second
)

// stuckFor takes the time out of "… Runtime 5 seconds".
func stuckFor(text string) time.Duration {
	_, text, _ = strings.Cut(text, "Runtime ")
	text, _, _ = strings.Cut(text, " ")
	n, err := strconv.Atoi(text)
	if err != nil {
		return stuckAfter // a kernel that says it otherwise
	}
	return time.Duration(n) * time.Second
}

// kernelComplaints reads the kernel's log from its start. With reconnects, the
// loss of a connection is no complaint.
func kernelComplaints(reconnects bool) error {
	// A record without a line end can't be read before the next one begins.
	if err := os.WriteFile("/dev/kmsg", []byte("guest: the scenario is over\n"), 0); err != nil {
		return fmt.Errorf("writing to the kernel log: %w", err)
	}
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening the kernel log: %w", err)
	}
	defer unix.Close(fd)
	var (
		found   []error
		records int
		buf     = make([]byte, 8192)
	)
	for {
		n, err := unix.Read(fd, buf) // one record: "6,339,5140900,-;text\n KEY=value\n"
		if errors.Is(err, unix.EPIPE) {
			continue // records were overwritten; reading goes on with the oldest one left
		}
		if errors.Is(err, unix.EAGAIN) {
			break // the end
		}
		if err != nil {
			return fmt.Errorf("reading the kernel log: %w", err)
		}
		records++
		_, text, _ := strings.Cut(string(buf[:n]), ";")
		text, _, _ = strings.Cut(text, "\n")
		for _, c := range complaints {
			if reconnects && (c == "Dead connection" || c == stuckRequest) {
				continue
			}
			if strings.Contains(text, c) && !(c == stuckRequest && stuckFor(text) < stuckAfter) {
				found = append(found, fmt.Errorf("the kernel log has: %s", text))
				break
			}
		}
	}
	if records == 0 {
		return errors.New("the kernel log is empty")
	}
	return errors.Join(found...)
}
