package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/systemd"
)

// A volume that holds the root file system is served from an initramfs, and
// until the power is off: by processes that no service manager has started,
// that systemd spares when it kills the others (both at the change to the real
// root and at the end), and that move to the real root when PID 1 has.
// 'hostcryptd serve --initrd' starts them, waits until the volume is ready, and
// returns.

// initrdEnv tells a process that --initrd started it.
const initrdEnv = "HOSTCRYPTD_INITRD"

// lockEnv tells a process of launch, and those that it starts, to lock its memory. That
// of a unit's has MemorySwapMax=0; these belong to none, and a swap file on the root file
// system would take what they need in order to bring it back.
const lockEnv = "HOSTCRYPTD_LOCK_MEMORY"

// initrdDir has a file for each volume that an initramfs serves, with its
// device, so that the service of that name isn't started (hostcryptd@.service).
const initrdDir = runDir + "/initrd"

// deviceState is the notification that has the kernel device.
const deviceState = "X_HOSTCRYPTD_DEVICE="

// launch starts this command again, for the rest of the machine's life, and
// waits until it is ready or has ended. inTab says that the name is one of the
// table.
func (a *app) launch(name string, inTab bool) error {
	notify, err := listenNotify(fmt.Sprintf("@hostcryptd-initrd-%d", os.Getpid()))
	if err != nil {
		return err
	}
	defer notify.Close()
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	// systemd kills nothing with this mark: its file src/shared/killall.c, and
	// https://systemd.io/ROOT_STORAGE_DAEMONS
	cmd.Args[0] = "@" + filepath.Base(os.Args[0])
	// TZ: else a server that takes over reads /etc/localtime, which may be on the
	// very volume, for its first line in the log.
	cmd.Env = append(os.Environ(), initrdEnv+"=1", lockEnv+"=1", "NOTIFY_SOCKET="+notify.LocalAddr().String(), "TZ=")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	where := "it has printed why"
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if inMemory("/") {
		// The console is somebody else's soon. The kernel's log is there for good.
		if kmsg, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
			defer kmsg.Close()
			cmd.Stdout, cmd.Stderr = kmsg, kmsg
			where = "the kernel's log says why (dmesg)"
		}
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the server: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	ready := make(chan string, 1)
	go func() {
		device, buf := "", make([]byte, 4096)
		for {
			text, err := receiveNotify(notify, buf, cmd.Process.Pid)
			if err != nil {
				return
			}
			for line := range strings.Lines(text) {
				line = strings.TrimSpace(line)
				if d, ok := strings.CutPrefix(line, deviceState); ok {
					device = d
				}
				if text, ok := strings.CutPrefix(line, "STATUS="); ok {
					fmt.Fprintf(a.stderr, "hostcryptd: %s: %s\n", name, printable(text))
				}
			}
			if strings.Contains(text, systemd.Ready) {
				ready <- device
				return
			}
		}
	}()
	select {
	case err := <-ended:
		if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
			fmt.Fprintf(a.stderr, "hostcryptd: %s: the server ended with exit code %d; %s\n", name, exit.ExitCode(), where)
			return &silentError{exit.ExitCode()}
		}
		return errors.Join(fmt.Errorf("%s: the server ended before the volume was ready", name), err)
	case device := <-ready:
		if inTab {
			if err := os.MkdirAll(initrdDir, 0o700); err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(initrdDir, name), []byte(device+"\n"), 0o600); err != nil {
				return err
			}
		}
		if device != "" {
			fmt.Fprintln(a.stdout, device)
		}
		return nil
	}
}

// listenNotify makes a socket for notifications, which has the kernel say who sent
// each.
func listenNotify(name string) (*net.UnixConn, error) {
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	raw, err := c.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PASSCRED, 1) })
		err = errors.Join(err, cerr)
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// receiveNotify returns the next notification of one process. Any user of the host
// can send to the socket: its name is in no folder, as / may be read-only. What others
// have sent is dropped.
func receiveNotify(c *net.UnixConn, buf []byte, pid int) (string, error) {
	oob := make([]byte, unix.CmsgSpace(unix.SizeofUcred)+unix.CmsgSpace(4*16))
	for {
		n, oobn, _, _, err := c.ReadMsgUnix(buf, oob)
		if err != nil {
			return "", err
		}
		from := 0
		list, _ := unix.ParseSocketControlMessage(oob[:oobn])
		for _, m := range list {
			if cred, err := unix.ParseUnixCredentials(&m); err == nil {
				from = int(cred.Pid)
			}
			if fds, err := unix.ParseUnixRights(&m); err == nil {
				for _, fd := range fds {
					unix.Close(fd)
				}
			}
		}
		if from == pid {
			return string(buf[:n]), nil
		}
	}
}

// inMemory tells whether a folder is on a file system without a disk, as the
// root of an initramfs is.
func inMemory(dir string) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC)
}

// notifyManager is systemd.Notify, for a manager that may be one of launch,
// which listens no longer than until the volume is ready.
func notifyManager(states ...string) error {
	err := systemd.Notify(states...)
	if os.Getenv(initrdEnv) != "" && slices.Contains(states, systemd.Ready) {
		os.Unsetenv("NOTIFY_SOCKET")
	}
	return err
}

// liveOn makes a process that --initrd started outlive the initramfs. As long as
// it is there, $HOSTCRYPTD_INITRD is set; moved is closed when it has gone to the real
// root. Other processes are left as they are, and moved is nil.
func liveOn(log *zap.Logger) (moved <-chan struct{}, err error) {
	if os.Getenv(lockEnv) != "" {
		if err := lockMemory(); err != nil {
			log.Warn("this process can be swapped out; a swap file on the volume that it serves is not safe", zap.Error(err))
		}
	}
	if os.Getenv(initrdEnv) == "" {
		return nil, nil
	}
	// The mount of /proc is moved away from under us, to where PID 1 goes.
	proc, err := os.OpenFile("/proc", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		log.Warn("the kernel may kill this process when memory is short", zap.Error(err))
	}
	go func() {
		defer proc.Close()
		for ; ; time.Sleep(200 * time.Millisecond) {
			moved, err := followRoot(int(proc.Fd()))
			if err != nil {
				log.Error("can't move to the real root", zap.Error(err))
				return
			}
			if moved {
				log.Info("moved to the real root")
				os.Unsetenv(initrdEnv) // a server that a keeper starts later begins there
				close(done)
				return
			}
		}
	}()
	return done, nil
}

// tabEnv has the line of hostcrypttab that a process has found which starts
// others. The table may be on the volume whose server was killed: the next one
// must not read it.
const tabEnv = "HOSTCRYPTD_TAB_LINE"

// lookupOnce is lookup, for this process and those that it starts.
func lookupOnce(file, name string) (*tabEntry, error) {
	line, ok := os.LookupEnv(tabEnv)
	if !ok {
		e, err := lookup(file, name)
		if err != nil {
			return e, err
		}
		if line, err = tabLine(file, name); err != nil {
			return nil, err
		}
		return e, os.Setenv(tabEnv, line)
	}
	entries, bad := parseTab(line)
	if len(entries) != 1 || entries[0].unit.Name != name {
		return nil, fmt.Errorf("$%s is not the line of %s: %w", tabEnv, name, errors.Join(bad...))
	}
	return entries[0], entries[0].err
}

// tabLine is the text of a line.
func tabLine(file, name string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == name {
			return strings.TrimSpace(line), nil
		}
	}
	return "", fmt.Errorf("%s has changed", file)
}

// followRoot makes the root of PID 1 the root of this process too, once it is
// another: /dev, /run and the files of this host are there then, and of the
// initramfs nothing is left.
func followRoot(proc int) (moved bool, err error) {
	var theirs, ours unix.Stat_t
	if err := errors.Join(unix.Fstatat(proc, "1/root", &theirs, 0), unix.Stat("/", &ours)); err != nil {
		return false, err
	}
	if theirs.Dev == ours.Dev && theirs.Ino == ours.Ino {
		return false, nil
	}
	fd, err := unix.Openat(proc, "1/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	// All threads of a Go program share their root.
	for _, step := range []func() error{
		func() error { return unix.Fchdir(fd) },
		func() error { return unix.Chroot(".") },
		func() error { return unix.Chdir("/") },
	} {
		if err := step(); err != nil {
			return false, err
		}
	}
	return true, nil
}
