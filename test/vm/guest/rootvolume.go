package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/vmtest"
)

// runConnect connects standard input and output to an address.
func runConnect(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: guest connect ADDRESS:PORT")
	}
	c, err := net.Dial("tcp", args[0])
	if err != nil {
		return err
	}
	go func() {
		io.Copy(c, os.Stdin)
		c.(*net.TCPConn).CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, c)
	return err
}

// rootPrepare lets the vault's key open the volume too.
func rootPrepare(m *machine) error {
	ip := net.ParseIP(vmtest.GuestAddress).To4()
	if err := configureInterface("eth0", ip, 24); err != nil {
		return err
	}
	_, err := m.run("hostcryptd", "key", "add", m.disk, "--key", keyURL, "--host-key", "/run-host.key")
	return err
}

// checkRootServer checks that the root is on a volume, whose server came from
// the initramfs, and that it has left that behind.
func (m *machine) checkRootServer() (s volumeStatus, err error) {
	mounts, err := os.ReadFile("/proc/mounts")
	if err != nil {
		return s, err
	}
	if !bytes.Contains(mounts, []byte("\n/dev/nbd0 / ext4 rw")) && !bytes.HasPrefix(mounts, []byte("/dev/nbd0 / ext4 rw")) {
		return s, fmt.Errorf("the root is not on /dev/nbd0: %s", mounts)
	}
	m.disk = diskBySerial("volume")
	// All of it is on the volume, and read for the first time: where the emulator is slow,
	// a server has taken longer than the 3 s that status waits for.
	s, err = m.status()
	for begun := time.Now(); err != nil && time.Since(begun) < time.Minute; time.Sleep(time.Second) {
		s, err = m.status()
	}
	if err != nil {
		return s, err
	}
	for _, pid := range []int{s.PID, s.Keeper} {
		dir := filepath.Join("/proc", fmt.Sprint(pid))
		cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			return s, err
		}
		if !bytes.HasPrefix(cmdline, []byte("@")) {
			return s, fmt.Errorf("process %d has no mark that keeps systemd from killing it: %q", pid, cmdline)
		}
		var theirs, ours unix.Stat_t
		if err := errors.Join(unix.Stat(filepath.Join(dir, "root"), &theirs), unix.Stat("/", &ours)); err != nil {
			return s, err
		}
		if theirs.Dev != ours.Dev || theirs.Ino != ours.Ino {
			return s, fmt.Errorf("the root of process %d is still the initramfs", pid)
		}
	}
	return s, nil
}

const rootFile = "/var/lib/root-on-volume"

// rootFirst looks at a system whose root is a volume, writes to it, kills the
// server below it, and leaves it to power off.
func rootFirst(m *machine) error {
	before, err := m.checkRootServer()
	if err != nil {
		return err
	}
	if err := m.checkSystem(); err != nil {
		return err
	}
	// The service of the table's line must leave it alone.
	if _, err := m.run("systemctl", "start", "hostcryptd@root"); err != nil {
		return err
	}
	u, err := m.unit("hostcryptd@root", "ActiveState", "ConditionResult")
	if err != nil {
		return err
	}
	if u["ActiveState"] != "inactive" || u["ConditionResult"] != "no" {
		return fmt.Errorf("hostcryptd@root was started a second time: %v", u)
	}
	if err := m.writeRootFile(); err != nil {
		return err
	}
	m.reconnects = true
	// What the next server would read of the root now has to come from its disk, which
	// is the one that it is to serve.
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return err
	}
	begun := time.Now()
	if err := unix.Kill(before.PID, syscall.SIGKILL); err != nil {
		return err
	}
	if err := m.writeRootFile(); err != nil {
		return fmt.Errorf("after the server of the root was killed: %w", err)
	}
	m.figure("writes go on after a kill", float64(time.Since(begun).Milliseconds()), "ms")
	after, err := m.checkRootServer()
	if err != nil {
		return err
	}
	if after.PID == before.PID || after.Keeper != before.Keeper {
		return fmt.Errorf("the server was process %d and its keeper %d, now they are %d and %d", before.PID, before.Keeper, after.PID, after.Keeper)
	}
	return nil
}

func (m *machine) rootContent() []byte {
	return bytes.Repeat([]byte(m.canary+" on the root file system\n"), 200_000)
}

// writeRootFile writes some megabytes, durably.
func (m *machine) writeRootFile() error {
	f, err := os.Create(rootFile)
	if err != nil {
		return err
	}
	_, err = f.Write(m.rootContent())
	return errors.Join(err, f.Sync(), f.Close(), syncPath(filepath.Dir(rootFile)))
}

// rootSecond finds what the boot before has written, on a file system that was
// left in order: the server lived until the last write at power-off.
// Then another server takes over below it, with which it is left in order as well.
func rootSecond(m *machine) error {
	before, err := m.checkRootServer()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(rootFile)
	if err != nil {
		return err
	}
	if sha256.Sum256(b) != sha256.Sum256(m.rootContent()) {
		return fmt.Errorf("%s has changed", rootFile)
	}
	log, err := m.run("dmesg")
	if err != nil {
		return err
	}
	for _, bad := range []string{"recovery complete", "recovering journal", "orphan cleanup"} {
		if strings.Contains(log, bad) {
			return fmt.Errorf("the root was not left in order at power-off: the kernel says %q", bad)
		}
	}
	if !strings.Contains(log, "moved to the real root") {
		return errors.New("the server has not logged to the kernel that it moved to the real root")
	}
	if err := m.checkSystem(); err != nil {
		return err
	}
	if _, err := m.run("hostcryptd", "reload", "root"); err != nil {
		return err
	}
	if err := m.writeRootFile(); err != nil {
		return fmt.Errorf("after the server of the root was replaced: %w", err)
	}
	after, err := m.checkRootServer()
	if err == nil && after.PID == before.PID {
		err = fmt.Errorf("the root still has the server %d", before.PID)
	}
	return err
}
