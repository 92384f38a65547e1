// Package nbdnl attaches NBD sockets to kernel devices /dev/nbdN over generic
// netlink, and detaches them.
//
// Most callers make one [Socketpair] per connection, start a server on the
// server end of each, call [Conn.Connect] with the kernel ends, close these,
// and call [WaitReady]. The kernel does no NBD handshake: the size, the block
// size and the transmission flags travel in the Connect call, and the first
// bytes on a socket are requests. It speaks compact requests and simple
// replies only.
//
// The numbers and formats are those of the kernel's uapi header
// linux/nbd-netlink.h, the behaviour that the comments give is that of
// drivers/block/nbd.c. Devices that were set up by ioctl are not touched, and
// a device that is attached here must not be changed by ioctl.
//
// # Concurrency
//
// A [Conn] is safe for concurrent use. The kernel runs one call at a time.
//
// Keep the Conn of a Connect open until after its Disconnect: a kernel may take
// the end of the netlink socket for the end of the server.
//
// # Order of teardown
//
// Unmount or swapoff first, then [Conn.Disconnect], then end the server: the
// kernel fails what is in flight when it disconnects. It sends each server a
// disconnect request before that.
package nbdnl

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime"
	"slices"
	"time"

	"github.com/mdlayher/genetlink"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

var (
	// ErrNotSupported means that the kernel has no nbd netlink family: the
	// module isn't loaded, or isn't there.
	ErrNotSupported = errors.New("kernel has no nbd netlink family (modprobe nbd)")

	// ErrBusy means that the device is attached already.
	ErrBusy = errors.New("device is in use")
)

// FirstFree is the [Config.Index] that lets the kernel choose. It creates a
// device if none is free.
const FirstFree = -1

// A Config describes a device to attach.
type Config struct {
	// Index is N of /dev/nbdN, or [FirstFree].
	Index int

	// Except are devices that FirstFree leaves to others.
	Except []int

	// Size is the size of the device in bytes, a multiple of BlockSize and not
	// zero.
	Size uint64

	// BlockSize is the device's logical and physical block size in bytes: a
	// power of two from 512 to the page size. It is always sent, since the
	// kernel's own default is 1024.
	BlockSize uint64

	// ServerFlags are the transmission flags of the export, as
	// nbd.Server.TransmissionFlags returns them. With more than one socket
	// they must include CAN_MULTI_CONN.
	ServerFlags uint16

	// Timeout is how long a request may go unanswered. Zero leaves the
	// kernel's rule: with one socket requests wait for ever, with several a
	// socket that is silent for 30 s is dropped and its requests are sent
	// again on another. Rounded up to whole seconds.
	Timeout time.Duration

	// DeadConnTimeout is how long requests wait for [Conn.Reconfigure] after
	// the last socket died. Zero fails them at once, for good. Rounded up to
	// whole seconds.
	DeadConnTimeout time.Duration

	// Backend, if not empty, names what the device serves. Reconfigure must
	// then give the same string, so that a device isn't continued with other
	// data. It is in /sys/block/nbdN/backend.
	Backend string
}

func (cfg *Config) validate(socks int) error {
	switch {
	case cfg.Index < FirstFree || cfg.Index > math.MaxInt32:
		return fmt.Errorf("index %d is out of range", cfg.Index)
	case cfg.BlockSize < 512 || cfg.BlockSize > math.MaxInt32 || cfg.BlockSize&(cfg.BlockSize-1) != 0:
		return fmt.Errorf("block size %d is not a power of two from 512 to the page size", cfg.BlockSize)
	case cfg.Size == 0 || cfg.Size > math.MaxInt64 || cfg.Size%cfg.BlockSize != 0:
		return fmt.Errorf("size %d is not a positive multiple of the block size %d", cfg.Size, cfg.BlockSize)
	case cfg.Timeout < 0 || cfg.DeadConnTimeout < 0:
		return errors.New("negative timeout")
	case socks == 0:
		return errors.New("no sockets")
	case socks > 1 && cfg.ServerFlags&flagCanMultiConn == 0:
		return fmt.Errorf("%d sockets, but the server's flags %#x lack CAN_MULTI_CONN", socks, cfg.ServerFlags)
	}
	return nil
}

// A Conn is a connection to the kernel's nbd driver.
type Conn struct {
	c      *genetlink.Conn
	family uint16
}

// Dial connects to the driver. The kernel loads the module by itself if it can.
// The error matches [ErrNotSupported] if there is no driver.
func Dial() (*Conn, error) {
	c, err := genetlink.Dial(nil)
	if err != nil {
		return nil, fmt.Errorf("nbdnl: opening generic netlink: %w", err)
	}
	// Makes the kernel say more than a number. Old kernels can't; the number
	// is enough to go on.
	_ = c.SetOption(netlink.ExtendedAcknowledge, true)
	return newConn(c)
}

// newConn takes c over, also when it fails.
func newConn(c *genetlink.Conn) (*Conn, error) {
	family, err := c.GetFamily(familyName)
	if err != nil {
		c.Close()
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("nbdnl: looking up the driver: %w", ErrNotSupported)
		}
		return nil, fmt.Errorf("nbdnl: looking up the driver: %w", err)
	}
	return &Conn{c: c, family: family.ID}, nil
}

// Close closes the connection. Devices stay attached.
func (c *Conn) Close() error {
	if err := c.c.Close(); err != nil {
		return fmt.Errorf("nbdnl: closing: %w", err)
	}
	return nil
}

// Connect attaches a device to the kernel ends of one or more socket pairs and
// returns its index. The servers must be running: the kernel reads the
// partition table when somebody first opens the device.
//
// The kernel takes its own reference to each socket; close them afterwards, or
// the end of the server goes unnoticed. They must be TCP or Unix stream
// sockets.
//
// The error matches [ErrBusy] if the device is attached already and
// [fs.ErrPermission] if the caller lacks CAP_SYS_ADMIN.
func (c *Conn) Connect(cfg Config, socks ...*os.File) (int, error) {
	doing := "attaching a free device"
	if cfg.Index != FirstFree {
		doing = "attaching " + Path(cfg.Index)
	}
	if err := cfg.validate(len(socks)); err != nil {
		return 0, fmt.Errorf("nbdnl: %s: %w", doing, err)
	}
	if cfg.Index == FirstFree && len(cfg.Except) > 0 {
		return c.connectExcept(cfg, socks)
	}
	fds, err := descriptors(socks)
	if err != nil {
		return 0, fmt.Errorf("nbdnl: %s: %w", doing, err)
	}
	attrs, err := connectAttrs(&cfg, fds)
	if err != nil {
		return 0, fmt.Errorf("nbdnl: %s: %w", doing, err)
	}
	// The answer to a success is the index, to a failure the error. Asking for
	// an acknowledgement besides would leave one to be read by the next call.
	msgs, err := c.c.Execute(message(cmdConnect, attrs), c.family, netlink.Request)
	runtime.KeepAlive(socks) // the kernel looked the descriptors up just now
	if err != nil {
		return 0, fmt.Errorf("nbdnl: %s: %w", doing, classify(err))
	}
	index, err := parseIndex(msgs)
	if err != nil {
		return 0, fmt.Errorf("nbdnl: %s: %w", doing, err)
	}
	return index, nil
}

// connectExcept is Connect where the kernel, which knows no exceptions, can't choose.
func (c *Conn) connectExcept(cfg Config, socks []*os.File) (int, error) {
	for cfg.Index = 0; ; cfg.Index++ {
		// The kernel logs an error for each device that is in use.
		if _, err := os.Stat(attribute(cfg.Index, "pid")); err == nil || slices.Contains(cfg.Except, cfg.Index) {
			continue
		}
		if index, err := c.Connect(cfg, socks...); !errors.Is(err, ErrBusy) {
			return index, err
		}
	}
}

// Reconfigure gives new sockets to an attached device in place of dead ones.
// backend must be that of the Connect. It changes nothing else: a size in this
// message freezes the queue, which deadlocks while a socket is dead.
//
// The kernel replaces only sockets that it found dead, and reports success for
// sockets that it had no use for. To tell, close socks after the call and see
// whether their other ends hang up.
func (c *Conn) Reconfigure(index int, backend string, socks ...*os.File) error {
	doing := "reconfiguring " + Path(index)
	if len(socks) == 0 {
		return fmt.Errorf("nbdnl: %s: no sockets", doing)
	}
	fds, err := descriptors(socks)
	if err != nil {
		return fmt.Errorf("nbdnl: %s: %w", doing, err)
	}
	err = c.acknowledged(cmdReconfigure, index, func(ae *netlink.AttributeEncoder) {
		if backend != "" {
			ae.String(attrBackendIdentifier, backend)
		}
		encodeSockets(ae, fds)
	})
	runtime.KeepAlive(socks)
	if err != nil {
		return fmt.Errorf("nbdnl: %s: %w", doing, classify(err))
	}
	return nil
}

// Resize gives an attached device another size in bytes, a multiple of its block
// size, while it is in use. backend must be that of the Connect. Its server must
// serve that size already, as the kernel may use it before Resize returns.
//
// Since Linux 6.9 the driver first waits until the requests under way have been
// answered (blk_mq_freeze_queue in nbd_set_size), with new ones and every other
// user of generic netlink waiting behind it. So a server has to be answering, and
// one that dies in the middle of that can't be replaced: its successor's sockets
// would come by generic netlink.
func (c *Conn) Resize(index int, backend string, size uint64) error {
	doing := "resizing " + Path(index)
	if size == 0 || size > math.MaxInt64 {
		return fmt.Errorf("nbdnl: %s: size %d is out of range", doing, size)
	}
	err := c.acknowledged(cmdReconfigure, index, func(ae *netlink.AttributeEncoder) {
		ae.Uint64(attrSizeBytes, size)
		if backend != "" {
			ae.String(attrBackendIdentifier, backend)
		}
	})
	if err != nil {
		return fmt.Errorf("nbdnl: %s: %w", doing, classify(err))
	}
	return nil
}

// Disconnect detaches a device. The kernel sends a disconnect request on each
// socket, shuts the sockets down and fails the requests in flight; nobody
// should be using the device. Detaching a device that isn't attached is no
// error.
func (c *Conn) Disconnect(index int) error {
	if err := c.acknowledged(cmdDisconnect, index, nil); err != nil {
		return fmt.Errorf("nbdnl: detaching %s: %w", Path(index), classify(err))
	}
	return nil
}

// DetachOnClose has the kernel detach a device, as Disconnect does, when the last
// that have it open close it: a mount, swap, a device on top, a process. With on
// false it no longer does. backend must be that of the Connect.
func (c *Conn) DetachOnClose(index int, backend string, on bool) error {
	err := c.acknowledged(cmdReconfigure, index, func(ae *netlink.AttributeEncoder) {
		ae.String(attrBackendIdentifier, backend)
		flags := uint64(0)
		if on {
			flags = clientFlagDisconnectOnClose
		}
		ae.Uint64(attrClientFlags, flags)
	})
	if err != nil {
		return fmt.Errorf("nbdnl: what becomes of %s when it is closed: %w", Path(index), classify(err))
	}
	return nil
}

// acknowledged executes a command that has no answer but an acknowledgement.
func (c *Conn) acknowledged(cmd uint8, index int, more func(*netlink.AttributeEncoder)) error {
	attrs, err := indexAttrs(index, more)
	if err != nil {
		return err
	}
	_, err = c.c.Execute(message(cmd, attrs), c.family, netlink.Request|netlink.Acknowledge)
	return err
}

// Status is what the driver says about a device.
type Status struct {
	Index int

	// Connected is true while the device has a configuration. Its sockets may
	// be dead all the same.
	Connected bool
}

// Status returns the status of a device. The error matches [fs.ErrNotExist] if
// there is no such device. It needs no privilege.
func (c *Conn) Status(index int) (Status, error) {
	attrs, err := indexAttrs(index, nil)
	if err != nil {
		return Status{}, fmt.Errorf("nbdnl: status of %s: %w", Path(index), err)
	}
	msgs, err := c.c.Execute(message(cmdStatus, attrs), c.family, netlink.Request)
	if err != nil {
		return Status{}, fmt.Errorf("nbdnl: status of %s: %w", Path(index), classify(err))
	}
	devices, err := parseStatus(msgs)
	if err != nil {
		return Status{}, fmt.Errorf("nbdnl: status of %s: %w", Path(index), err)
	}
	for _, d := range devices {
		if d.Index == index {
			return d, nil
		}
	}
	return Status{}, fmt.Errorf("nbdnl: status of %s: %w", Path(index), fs.ErrNotExist)
}

// classify adds what a caller would do about it to an error of the kernel.
func classify(err error) error {
	switch {
	case errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST): // EEXIST: lost a race to create it
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w (CAP_SYS_ADMIN is needed)", err)
	}
	return err
}

// descriptors returns the numbers by which the kernel finds the sockets. It
// doesn't use [os.File.Fd], which would change the sockets' mode. The caller
// keeps socks alive until the kernel has looked.
func descriptors(socks []*os.File) ([]uint32, error) {
	fds := make([]uint32, len(socks))
	for i, s := range socks {
		rc, err := s.SyscallConn()
		if err != nil {
			return nil, fmt.Errorf("socket %d: %w", i, err)
		}
		if err := rc.Control(func(fd uintptr) { fds[i] = uint32(fd) }); err != nil {
			return nil, fmt.Errorf("socket %d: %w", i, err)
		}
	}
	return fds, nil
}
