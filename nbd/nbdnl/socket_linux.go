package nbdnl

import (
	"errors"
	"fmt"
	"math/bits"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// socketBuffer is the size asked for the buffers of a socket pair, in bytes. A
// sender whose buffer is full waits in the middle of a message; kernels before
// 6.14 can't take a signal there without sending the request twice ("nbd: fix
// partial sending"). So the kernel's requests should be no longer than fits at one go,
// see Room.
const socketBuffer = 4 << 20

// Socketpair makes a connection between the kernel and a server in this
// process: kernel is for [Conn.Connect] or [Conn.Reconfigure], server for
// nbd.NewSocket and nbd.Server.ServeTransmission. The caller closes both.
//
// A Unix socket is used because its send path takes no lock that memory
// reclaim could need, which a TCP socket on the same machine does.
func Socketpair() (kernel *os.File, server *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("nbdnl: socket pair: %w", os.NewSyscallError("socketpair", err))
	}
	for _, fd := range fds {
		enlarge(fd)
	}
	kernel = os.NewFile(uintptr(fds[0]), "nbd-kernel")

	// FileConn makes a duplicate that the runtime polls.
	f := os.NewFile(uintptr(fds[1]), "nbd-server")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		kernel.Close()
		return nil, nil, fmt.Errorf("nbdnl: socket pair: %w", err)
	}
	return kernel, c.(*net.UnixConn), nil
}

// enlarge gives a socket the largest buffers it may have up to socketBuffer:
// beyond net.core.wmem_max if CAP_NET_ADMIN allows. Errors don't matter: Room tells
// what it has got.
func enlarge(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, socketBuffer)
	}
}

// Room is the size in bytes of the largest request, a power of two, that goes into the
// kernel's end of a socket pair at one go if nothing else is in there.
//
// The size of a socket's buffer counts what the kernel needs to keep track of it, too:
// with pages sent one by one, 425984 bytes, which is what net.core.wmem_max allows by
// default, took 360476 (Linux 6.18).
func Room(kernel *os.File) (int, error) {
	rc, err := kernel.SyscallConn()
	if err != nil {
		return 0, fmt.Errorf("nbdnl: %w", err)
	}
	var size int
	cerr := rc.Control(func(fd uintptr) { size, err = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) })
	if err = errors.Join(cerr, err); err != nil {
		return 0, fmt.Errorf("nbdnl: size of a socket's buffer: %w", err)
	}
	return 1 << (bits.Len(uint(size/4*3)) - 1), nil
}

// HungUp tells whether the other end of a socket is closed, also when there is
// still something to read.
func HungUp(c *net.UnixConn) (bool, error) {
	rc, err := c.SyscallConn()
	if err != nil {
		return false, fmt.Errorf("nbdnl: %w", err)
	}
	var p [1]unix.PollFd
	cerr := rc.Control(func(fd uintptr) {
		p[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLRDHUP}
		for {
			if _, err = unix.Poll(p[:], 0); err != unix.EINTR {
				return
			}
		}
	})
	if err = errors.Join(cerr, err); err != nil {
		return false, fmt.Errorf("nbdnl: %w", os.NewSyscallError("poll", err))
	}
	return p[0].Revents&(unix.POLLHUP|unix.POLLRDHUP|unix.POLLERR) != 0, nil
}
