package systemd

import (
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"syscall"
)

// firstFD is SD_LISTEN_FDS_START of sd_listen_fds(3).
const firstFD = 3

// Listeners returns the stream sockets that the service manager, or a client
// such as libnbd's nbd_connect_systemd_socket_activation, has opened for this
// process; nil if there are none. It takes $LISTEN_FDS and its companions out
// of the environment, so that a second call returns nil and no child believes
// the sockets to be its own. It is called before anything else opens files.
func Listeners() ([]net.Listener, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	if fds == "" || pid != strconv.Itoa(os.Getpid()) {
		return nil, nil
	}
	n, err := strconv.Atoi(fds)
	if err != nil || n < 0 || n > 64 {
		return nil, fmt.Errorf("systemd: $LISTEN_FDS is %.20q, want a small number", fds)
	}
	var list []net.Listener
	for fd := firstFD; fd < firstFD+n; fd++ {
		syscall.CloseOnExec(fd)
		f := os.NewFile(uintptr(fd), "LISTEN_FD_"+strconv.Itoa(fd))
		l, err := net.FileListener(f) // duplicates it
		f.Close()
		if err != nil {
			for _, l := range list {
				l.Close()
			}
			return nil, fmt.Errorf("systemd: descriptor %d of $LISTEN_FDS is no listening stream socket: %w", fd, errors.Unwrap(err))
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false) // it belongs to who made it
		}
		list = append(list, l)
	}
	return list, nil
}
