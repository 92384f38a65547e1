package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// firstFD is SD_LISTEN_FDS_START of sd_listen_fds(3).
const firstFD = 3

// Inherited returns the stream sockets that the service manager, or a client
// such as libnbd's nbd_connect_systemd_socket_activation, has opened for this
// process, nil if there are none; and by their names, the descriptors that an
// earlier process has given to [Store] with a name that starts with prefix. It
// takes $LISTEN_FDS and its companions out of the environment, so that a second
// call returns nothing and no child believes the sockets to be its own. It is
// called before anything else opens files.
func Inherited(prefix string) (list []net.Listener, stored map[string]*os.File, err error) {
	n, names, err := passed()
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	if err != nil || n < 0 {
		return nil, nil, err
	}
	stored = map[string]*os.File{}
	defer func() {
		if err != nil {
			for _, l := range list {
				l.Close()
			}
			for _, f := range stored {
				f.Close()
			}
			list, stored = nil, nil
		}
	}()
	for i := range n {
		fd := firstFD + i
		syscall.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
		if i < len(names) && strings.HasPrefix(names[i], prefix) {
			if stored[names[i]] != nil {
				f.Close() // of a hand-over that failed; a socket must not be open twice
				continue
			}
			stored[names[i]] = f
			continue
		}
		l, err := net.FileListener(f) // duplicates it
		f.Close()
		if err != nil {
			return list, stored, fmt.Errorf("systemd: descriptor %d of $LISTEN_FDS is no listening stream socket: %w", fd, errors.Unwrap(err))
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it belongs to who made it
		}
		list = append(list, l)
	}
	return list, stored, nil
}

// Stored returns a copy of the descriptor that an earlier process has given to [Store]
// under a name, or nil. All is left as it is: a call of Inherited, or a program that this
// process executes, finds it too.
func Stored(name string) *os.File {
	n, names, err := passed()
	if err != nil {
		return nil
	}
	for i, other := range names[:min(len(names), max(n, 0))] {
		if other != name {
			continue
		}
		fd, err := unix.FcntlInt(uintptr(firstFD+i), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil
		}
		return os.NewFile(uintptr(fd), name)
	}
	return nil
}

// passed tells how many descriptors were passed to this process, and their names. It is
// -1 if there is no such thing as passed descriptors.
func passed() (n int, names []string, err error) {
	fds := os.Getenv("LISTEN_FDS")
	if fds == "" || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return -1, nil, nil
	}
	n, err = strconv.Atoi(fds)
	if err != nil || n < 0 || n > 128 {
		return 0, nil, fmt.Errorf("systemd: $LISTEN_FDS is %.20q, want a small number", fds)
	}
	return n, strings.Split(os.Getenv("LISTEN_FDNAMES"), ":"), nil
}
