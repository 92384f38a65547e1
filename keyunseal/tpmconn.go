package keyunseal

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxTPMResponse = 4096

	// tpmTimeout bounds one command. Chips take a second or two to derive a key.
	tpmTimeout = 20 * time.Second
)

// errTPMBusy is what a device that serves one program at a time says to a second.
var errTPMBusy = errors.New("something else holds the TPM")

// A tpmConn carries commands to a TPM: a character device, /dev/tpmrm0, or the
// stream socket of a software TPM.
type tpmConn struct {
	ctx context.Context // of the one operation that the connection is for
	fd  int
}

func openTPM(ctx context.Context, path string) (*tpmConn, error) {
	if path == NoTPM {
		return nil, &Error{Class: ClassConfig, Err: errors.New("this host has no TPM to use, --tpm none says")}
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var fd int
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFCHR:
		// Without O_NONBLOCK a write returns when the TPM has the answer, and no
		// context would end that.
		fd, err = unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	case unix.S_IFSOCK:
		if fd, err = unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0); err == nil {
			if err = unix.Connect(fd, &unix.SockaddrUnix{Name: path}); err != nil {
				unix.Close(fd)
			}
		}
	default:
		return nil, fmt.Errorf("%s is neither a character device nor a socket", path)
	}
	if err == unix.EBUSY {
		return nil, fmt.Errorf("%s: %w", path, errTPMBusy)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &tpmConn{ctx, fd}, nil
}

func (c *tpmConn) Close() { unix.Close(c.fd) }

// Send implements the transport of go-tpm. A TPM that says to try again is asked
// again.
func (c *tpmConn) Send(command []byte) ([]byte, error) {
	const rcRetry, rcYielded, rcTesting = 0x922, 0x908, 0x90a
	limit := time.Now().Add(tpmTimeout)
	if d, ok := c.ctx.Deadline(); ok && d.Before(limit) {
		limit = d
	}
	var busy []byte
	for wait := 5 * time.Millisecond; ; wait *= 2 {
		response, err := c.exchange(command, limit)
		if busy != nil && errors.Is(err, context.DeadlineExceeded) {
			return busy, nil // which says more
		}
		if err != nil {
			return nil, err
		}
		switch binary.BigEndian.Uint32(response[6:]) {
		case rcRetry, rcYielded, rcTesting:
			if time.Until(limit) > wait && c.ctx.Err() == nil {
				busy = response
				time.Sleep(wait)
				continue
			}
		}
		return response, nil
	}
}

// exchange writes one command and reads its answer, of at least a header.
func (c *tpmConn) exchange(command []byte, limit time.Time) ([]byte, error) {
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	n, err := ignoreEINTR(func() (int, error) { return unix.Write(c.fd, command) })
	if err != nil {
		return nil, os.NewSyscallError("write to the TPM", err)
	}
	if n != len(command) {
		return nil, fmt.Errorf("the TPM took %d bytes of %d", n, len(command))
	}
	response := make([]byte, 0, maxTPMResponse)
	for {
		if err := c.wait(limit); err != nil {
			return nil, err
		}
		n, err := ignoreEINTR(func() (int, error) { return unix.Read(c.fd, response[len(response):cap(response)]) })
		if err != nil {
			return nil, os.NewSyscallError("read from the TPM", err)
		}
		response = response[:len(response)+n]
		// A device gives all of it at once, a socket may not.
		const header = 10 // tag, size, response code
		if len(response) >= header {
			size := int(binary.BigEndian.Uint32(response[2:]))
			if size == len(response) {
				return response, nil
			}
			if size < header || size > maxTPMResponse || size < len(response) {
				return nil, fmt.Errorf("the TPM answers with a size of %d", size)
			}
		}
		if n == 0 {
			return nil, errors.New("the TPM's answer is cut off")
		}
	}
}

// wait returns when there is something to read.
func (c *tpmConn) wait(limit time.Time) error {
	for {
		if err := c.ctx.Err(); err != nil {
			return fmt.Errorf("no answer: %w", err)
		}
		left := time.Until(limit)
		if left <= 0 {
			return fmt.Errorf("no answer: %w", context.DeadlineExceeded)
		}
		// In steps, because nothing else looks at a context that is cancelled.
		fds := []unix.PollFd{{Fd: int32(c.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int(min(left, 100*time.Millisecond)/time.Millisecond)+1)
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll the TPM", err)
		}
		if n > 0 {
			return nil
		}
	}
}

func ignoreEINTR(f func() (int, error)) (int, error) {
	for {
		n, err := f()
		if err != unix.EINTR {
			return n, err
		}
	}
}
