package systemd

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Store gives a descriptor to the service manager, which passes it to the next
// process of the service after a restart, under a name (FileDescriptorStoreMax=
// of systemd.service(5)). A stop drops it. The service manager doesn't watch it:
// a hang-up is for the next process to see.
func Store(name string, f *os.File) error {
	if name == "" || strings.ContainsAny(name, ":\n") {
		return fmt.Errorf("systemd: %q can't be the name of a stored descriptor", name)
	}
	return notifyWith("FDSTORE=1\nFDPOLL=0\nFDNAME="+name, f)
}

// Remove has the service manager close what it keeps under a name. It keeps what
// it has passed on until then, so that no peer sees a stored socket end.
func Remove(name string) error { return Notify("FDSTOREREMOVE=1", "FDNAME="+name) }

// Barrier returns when the service manager has taken everything that this
// process has notified.
func Barrier(timeout time.Duration) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("systemd: barrier: %w", err)
	}
	defer r.Close()
	err = notifyWith("BARRIER=1", w)
	w.Close()
	if err != nil {
		return err
	}
	// It closes its copy of w.
	if err := r.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return fmt.Errorf("systemd: barrier: %w", err)
	}
	var b [1]byte
	if _, err := r.Read(b[:]); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		return fmt.Errorf("systemd: the service manager doesn't answer: %w", os.ErrDeadlineExceeded)
	}
	return nil
}

// notifyWith is Notify with a descriptor, and fails where there is nobody to
// notify.
func notifyWith(state string, f *os.File) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return errors.New("systemd: there is no service manager ($NOTIFY_SOCKET)")
	}
	c, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("systemd: notifying: %w", err)
	}
	defer unix.Close(c)
	// Not by Fd, which would make a socket block, for all who share it.
	raw, err := f.SyscallConn()
	if err == nil {
		cerr := raw.Control(func(fd uintptr) {
			err = unix.Sendmsg(c, []byte(state), unix.UnixRights(int(fd)), &unix.SockaddrUnix{Name: name}, 0)
		})
		err = errors.Join(err, cerr)
	}
	if err != nil {
		return fmt.Errorf("systemd: notifying: %w", err)
	}
	return nil
}
