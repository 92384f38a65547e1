// Package nbd serves block devices over the Network Block Device protocol.
//
// A [Server] offers one or more exports. Most callers want [New] and then
// either [Server.ServeListener], for libnbd clients such as QEMU on a Unix
// socket, or [Server.ServeTransmission], for the other end of a socket pair
// that package nbdnl gave to the kernel. What an export's bytes are is the
// business of its [Device].
//
// The server speaks the fixed newstyle handshake of
// https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md, with
// structured replies, the metadata context base:allocation, in which all of an
// export is data, and the extended headers of that repository's branch
// extension-ext-header, each for clients that ask for it. The kernel gets simple
// replies.
//
// # Access
//
// Who can connect reads plaintext. On a Unix socket the server asks the kernel
// who that is ([Config.AllowPeer]). TLS is offered with [Config.TLS], and
// [Config.RequireTLS] insists on it. Without that, ServeListener refuses TCP
// addresses other than loopback.
//
// # Concurrency
//
// A Server may serve any number of connections at the same time, from any
// goroutine. The requests of one connection run concurrently, up to
// [Config.InFlight], and are answered in the order in which they end. Requests
// that overlap are not ordered by this package: a client that wants an order
// waits for a reply, as the protocol says. A write of more than 512 KiB is given to
// the device in pieces of that size, as they come: of two that overlap and are under
// way at the same time, one can have won in some pieces and the other in the rest.
// Shorter ones are one call of the device each. So are the kernel's zeros and trims,
// and those of clients to their next multiple of 16 MiB and 64 GiB; longer ones are
// given to the device in parts that end there, and are called off between two parts if
// the peer is gone or the server stops.
//
// # Clients that go
//
// A client that has lost its connection may connect again and send again what it had
// no reply to. What the old connection had given to the device by then has its place
// there, and a [Device] that keeps writes in that order, as a volume of package sector
// does, has the second wait for the first. What it had not is not begun any more:
//
//   - When the server learns that the peer is gone, nothing is begun of what it has
//     sent. It learns that when it reads or sends, and when somebody connects.
//   - By TCP, with or without TLS, a peer that has ended its side without DISC may be
//     gone. Reads that wait are answered; what would change the device and has not begun
//     is refused with ESHUTDOWN. On a Unix socket the kernel tells the two apart, and
//     who has closed only the sending half is served to the end.
//   - A new connection begins when those whose peers have hung up have ended. It waits
//     a second at most, for a device that doesn't answer must not keep others out.
//   - After a DISC that the server has read, everything before it is done, but for long
//     zeros and trims if the server stops, whoever is there to hear of it: who has sent
//     that sends nothing again. Who wants it done, or done before something else, waits
//     for the server to close the connection.
//
// What is not promised: a peer that has vanished without a word, as when its network
// is cut, is there until TCP gives it up, and what it had sent is done. Nor is there
// any order between a connection by TCP that is closed and another that was open
// before. A client should then have waited for the replies.
//
// # Durability
//
// This package holds no data back: a write is answered after [Device.WriteAt]
// returned. FLUSH is [Device.Sync] and so covers every write that was answered
// on any connection before the flush was sent. A write with FUA is
// [Device.WriteAtFUA], or, if it is long, WriteAt and Sync. Hence every export
// advertises CAN_MULTI_CONN.
//
// # Engines
//
// A device that is an [AsyncDevice] is served by io_uring where the kernel has
// it: one thread per connection has many requests on the device at once. All
// else, and TLS, has the portable engine, which needs a thread for each. The
// environment variable HOSTCRYPTD_ENGINE=portable forces that one, for
// diagnosis; "io_uring" makes it an error if there is none.
//
// # Memory
//
// Payloads live in one arena outside the Go heap, whose size is fixed when the
// server is made. When it is full, the server stops reading from sockets. A
// request allocates nothing.
package nbd

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"
	"unicode/utf8"

	"github.com/pojntfx/go-nbd/pkg/backend"
)

// A Device is what an export serves. Offsets and lengths are bytes.
//
// The server keeps every request within the Size, and calls the methods from many
// goroutines at once, also for ranges that overlap. Size may grow while the device
// is served, and must not become less. A client that did a handshake has the Size
// that there was when its transmission phase began, as the protocol can't tell it
// of another; a connection of [Server.ServeTransmission] has what there is.
//
// An error becomes an NBD error by the [syscall.Errno] in its chain: EPERM,
// EACCES and EROFS are sent as EPERM, ENOSPC, EDQUOT and EFBIG as ENOSPC;
// ENOMEM, EINVAL and ESHUTDOWN as themselves; everything else as EIO. The
// connection lives on.
type Device interface {
	// ReadAt must not keep p. WriteAt must neither change nor keep it. Of two writes that
	// overlap, the one that was called first should end first, see Clients that go. p starts
	// on a page boundary. A write longer than 512 KiB comes as several calls,
	// from several goroutines. After Sync, all data whose WriteAt, Trim or
	// WriteZeroes returned before Sync was called is on stable storage.
	backend.Backend

	// WriteAtFUA is WriteAt that returns when the data is on stable storage. A
	// write with FUA longer than 512 KiB comes as WriteAt and one Sync instead.
	WriteAtFUA(p []byte, off int64) (int, error)

	// Trim tells the device that the range is no longer needed. What it reads
	// as afterwards is not defined. It may do nothing. It is called only for
	// an export with [Export.Trim]. With fua, what it changed is on stable
	// storage when it returns. length may exceed [MaxPayload].
	Trim(off, length int64, fua bool) error

	// WriteZeroes makes the range read as zeros. With fua, the zeros are on
	// stable storage when it returns. length may exceed [MaxPayload].
	WriteZeroes(off, length int64, fua bool) error
}

// An Export is a device under a name that clients ask for.
type Export struct {
	// Name and Description are UTF-8 without NUL, at most [MaxString] bytes. The
	// first export of a server is also served under the empty name.
	Name, Description string

	Device Device

	// ReadOnly refuses every command that changes data.
	ReadOnly bool

	// Trim offers the TRIM command.
	Trim bool

	// BlockSize is the size in bytes of the device's sector, a power of two of
	// at most 64 KiB, or 0 for 512. It is a hint: clients are told to prefer
	// it, or 4096 if that is more, but requests of any alignment are served.
	BlockSize uint32
}

// validate returns an error that names the export.
func (e *Export) validate() error {
	for what, s := range map[string]string{"name": e.Name, "description": e.Description} {
		if len(s) > MaxString || !utf8.ValidString(s) || strings.ContainsRune(s, 0) {
			return fmt.Errorf("nbd: export %.80q: %s is not UTF-8 without NUL of at most %d bytes", e.Name, what, MaxString)
		}
	}
	if e.Device == nil {
		return fmt.Errorf("nbd: export %.80q: no device", e.Name)
	}
	if e.BlockSize&(e.BlockSize-1) != 0 || e.BlockSize > 64<<10 {
		return fmt.Errorf("nbd: export %.80q: block size %d is not a power of two of at most 65536", e.Name, e.BlockSize)
	}
	_, err := e.size()
	return err
}

func (e *Export) size() (uint64, error) {
	size, err := e.Device.Size()
	if err == nil && size < 0 {
		err = fmt.Errorf("size is %d", size)
	}
	if err != nil {
		return 0, fmt.Errorf("nbd: size of export %.80q: %w", e.Name, err)
	}
	return uint64(size), nil
}

// preferredBlockSize is what INFO_BLOCK_SIZE advertises.
func (e *Export) preferredBlockSize() uint32 { return max(e.BlockSize, 4096) }

// transmissionFlags returns the flags of the export in the spec's encoding, as
// far as the kernel knows them.
//
// CAN_MULTI_CONN is true by construction: the server has no cache, so a write
// answered on one connection is in the device, and a flush on any other
// connection covers it.
func (e *Export) transmissionFlags() uint16 {
	flags := FlagHasFlags | FlagSendFlush | FlagSendFUA | FlagCanMultiConn
	if e.ReadOnly {
		return flags | FlagReadOnly
	}
	flags |= FlagSendWriteZeroes
	if e.Trim {
		flags |= FlagSendTrim
	}
	return flags
}

// handshakeFlags returns the flags for a client that does a handshake. They
// have what the kernel has no use for.
//
// FAST_ZERO is offered although it never succeeds. It tells a client that to
// zero everything before it copies doesn't pay here.
func (e *Export) handshakeFlags(mode replyMode) uint16 {
	flags := e.transmissionFlags() | FlagSendCache
	if flags&FlagSendWriteZeroes != 0 {
		flags |= FlagSendFastZero
	}
	if mode != simpleReplies {
		flags |= FlagSendDF
	}
	return flags
}

var (
	// ErrProtocol means that the peer broke a rule of the protocol that leaves
	// no way to go on.
	ErrProtocol = errors.New("protocol error")

	// ErrUnknownExport means that no export has the name asked for.
	ErrUnknownExport = errors.New("unknown export")

	// ErrPeer means that [Config.AllowPeer] refused who connected.
	ErrPeer = errors.New("peer is not allowed")

	// ErrTooManyConnections means that the server already serves
	// [Config.MaxConnections] connections, or [Config.MaxPerPeer] of this peer.
	ErrTooManyConnections = errors.New("too many connections")

	// ErrHandshakeTimeout means that the peer did not end its handshake within
	// [Config.HandshakeTimeout].
	ErrHandshakeTimeout = errors.New("handshake took too long")

	// ErrStalled means that the peer neither sent the payload that it had
	// announced nor took its replies for [Config.StallTimeout], while another
	// connection waited for the memory that this held.
	ErrStalled = errors.New("peer stalled while others waited for memory")

	// ErrClosed means that the server was closed.
	ErrClosed = errors.New("server closed")
)

// errorNumber returns the NBD error for an error of a device: one of those
// that the spec allows in reply to any command. EOVERFLOW and ENOTSUP are
// reserved to what no device is asked for.
func errorNumber(err error) uint32 {
	if err == nil {
		return 0
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return errIO
	}
	switch errno {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return errPerm
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return errNoSpace
	case syscall.ENOMEM:
		return errNoMemory
	case syscall.EINVAL:
		return errInvalid
	case syscall.ESHUTDOWN:
		return errShutdown
	}
	return errIO
}

// full returns the error of a device call that has to move want bytes. A device
// that moves fewer must say why; one that doesn't is treated as failed, so that
// a short read never sends what the buffer held before. One that moved all may
// add io.EOF, as [io.ReaderAt] allows.
func full(n, want int, err error) error {
	switch {
	case n != want && err == nil:
		return io.ErrUnexpectedEOF
	case n == want && err == io.EOF:
		return nil
	}
	return err
}
