package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// firstFD is SD_LISTEN_FDS_START of sd_listen_fds(3).
const firstFD = 3

// Listeners is Inherited without stored descriptors.
func Listeners() ([]net.Listener, error) {
	list, stored, err := Inherited("\x00")
	for _, f := range stored {
		f.Close()
	}
	return list, err
}

// Inherited returns the stream sockets that the service manager, or a client
// such as libnbd's nbd_connect_systemd_socket_activation, has opened for this
// process, nil if there are none; and by their names, the descriptors that an
// earlier process has given to [Store] with a name that starts with prefix. It
// takes $LISTEN_FDS and its companions out of the environment, so that a second
// call returns nothing and no child believes the sockets to be its own. It is
// called before anything else opens files.
func Inherited(prefix string) (list []net.Listener, stored map[string]*os.File, err error) {
	pid, fds, names := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS"), strings.Split(os.Getenv("LISTEN_FDNAMES"), ":")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	if fds == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil, nil
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 0 || n > 128 {
		return nil, nil, fmt.Errorf("systemd: $LISTEN_FDS is %.20q, want a small number", fds)
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
