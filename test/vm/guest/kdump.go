package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// dumpCanary is in the kernel's log and nowhere else. The parameter itself is on
// the kernel's command line, which kdump-tools keeps in a file.
func (m *machine) dumpCanary() string {
	return fmt.Sprintf("%x", sha256.Sum256([]byte(m.canary)))
}

const dumpKey = "/etc/hostcryptd/dump.key"

// serveDump attaches the volume that dumps go to.
func (m *machine) serveDump() (*server, error) {
	if m.disk = diskBySerial("volume"); m.disk == "" {
		return nil, errors.New("there is no disk volume")
	}
	if _, err := m.run("modprobe", "nbd"); err != nil {
		return nil, err
	}
	return m.serve("--host-key", dumpKey)
}

// kdumpCrash makes a file system on the volume, checks that a kernel is loaded
// for the case of a panic, and panics.
func kdumpCrash(m *machine) error {
	for end := time.Now().Add(commandLimit); ; time.Sleep(200 * time.Millisecond) {
		b, err := os.ReadFile("/sys/kernel/kexec_crash_loaded")
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(b)) == "1" {
			break
		}
		if time.Now().After(end) {
			return errors.New("kdump-tools has loaded no kernel")
		}
	}
	s, err := m.serveDump()
	if err != nil {
		return err
	}
	params, err := kernelParameters()
	if err != nil {
		return err
	}
	if _, err := m.run("wipefs", "-qa", s.dev); err != nil {
		return err
	}
	if _, err := m.run("mkfs."+params["fs"], "-q", s.dev); err != nil {
		return err
	}
	// udev looks at what mkfs has written.
	if _, err := m.run("udevadm", "settle"); err != nil {
		return err
	}
	if err := s.detach(); err != nil {
		return err
	}
	if err := os.WriteFile("/dev/kmsg", []byte("guest: "+m.dumpCanary()+"\n"), 0); err != nil {
		return err
	}
	unix.Sync()
	if err := os.WriteFile("/proc/sys/kernel/sysrq", []byte("1"), 0); err != nil {
		return err
	}
	m.say("panic")
	err = os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0)
	return fmt.Errorf("the kernel didn't panic: %w", err)
}

// kdumpRead reads the dump that the kernel after the crash has written.
func kdumpRead(m *machine) error {
	s, err := m.serveDump()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(m.mnt, 0o755); err != nil {
		return err
	}
	params, err := kernelParameters()
	if err != nil {
		return err
	}
	if err := m.mountAs(params["fs"], s.dev); err != nil {
		return err
	}
	dumps, err := filepath.Glob(filepath.Join(m.mnt, "*/dump.*"))
	if err != nil || len(dumps) != 1 {
		return errors.Join(fmt.Errorf("%d dumps on the volume, want 1", len(dumps)), err)
	}
	info, err := os.Stat(dumps[0])
	if err != nil {
		return err
	}
	m.figure("dump", float64(info.Size())/(1<<20), "MiB")
	// /run is memory: plaintext of the dump must not reach a disk.
	if out, err := command("sh", "-c", "makedumpfile -R /run/dump <"+dumps[0]).CombinedOutput(); err != nil {
		return fmt.Errorf("makedumpfile -R: %w: %s", err, out)
	}
	if out, err := m.run("file", "/run/dump"); err != nil || !strings.Contains(out, "Kdump compressed dump") {
		return errors.Join(errors.New("file doesn't take it for a dump"), err)
	}
	if _, err := m.run("makedumpfile", "--dump-dmesg", "/run/dump", "/run/dmesg"); err != nil {
		return err
	}
	log, err := os.ReadFile("/run/dmesg")
	if err != nil {
		return err
	}
	m.figure("canaries in the dump", float64(bytes.Count(log, []byte(m.dumpCanary()))), "")
	if !bytes.Contains(log, []byte("sysrq: Trigger a crash")) {
		return errors.New("the log in the dump doesn't end with the crash")
	}
	if left, err := filepath.Glob("/var/crash/*/dump*"); err != nil || len(left) > 0 {
		return errors.Join(fmt.Errorf("there is a dump outside of the volume: %v", left), err)
	}
	for _, name := range []string{"/run/dump", "/run/dmesg"} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return errors.Join(m.unmount(), s.detach())
}
