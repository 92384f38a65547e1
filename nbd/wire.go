package nbd

import (
	"encoding/binary"
	"fmt"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// What go-nbd's protocol package has is taken from there; the rest of the
// numbers are those of proto.md, in its words.

// Transmission flags, as INFO_EXPORT and the kernel's SERVER_FLAGS carry them.
const (
	FlagHasFlags        = protocol.NEGOTIATION_REPLY_FLAGS_HAS_FLAGS
	FlagReadOnly        = uint16(1 << 1)
	FlagSendFlush       = uint16(1 << 2)
	FlagSendFUA         = uint16(1 << 3)
	FlagRotational      = uint16(1 << 4)
	FlagSendTrim        = uint16(1 << 5)
	FlagSendWriteZeroes = uint16(1 << 6)
	FlagCanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
)

const (
	// MaxPayload is the largest READ or WRITE served, in bytes. The spec says
	// that a client which knows no better may send this much.
	MaxPayload = 32 << 20

	// MaxString is the largest name, description or message, in bytes.
	MaxString = 4096

	// maxDiscard is the largest payload of a WRITE that is read and thrown
	// away in order to answer it with an error. Beyond it the connection ends.
	maxDiscard = 64 << 20
)

// Handshake.
const (
	handshakeNoZeroes = uint16(1 << 1)

	clientFixedNewstyle = uint32(1 << 0)
	clientNoZeroes      = uint32(1 << 1)

	optExportName = uint32(1)

	repErrInvalid   = uint32(1<<31 | 3)
	repErrShutdown  = uint32(1<<31 | 7)
	repErrTooBig    = uint32(1<<31 | 9)
	greetingSize    = 8 + 8 + 2
	clientFlagsSize = 4
	optionSize      = 8 + 4 + 4
)

// Commands and their flags.
const (
	cmdRead        = protocol.TRANSMISSION_TYPE_REQUEST_READ
	cmdWrite       = protocol.TRANSMISSION_TYPE_REQUEST_WRITE
	cmdDisc        = protocol.TRANSMISSION_TYPE_REQUEST_DISC
	cmdFlush       = uint16(3)
	cmdTrim        = uint16(4)
	cmdWriteZeroes = uint16(6)

	cmdFlagFUA    = uint16(1 << 0)
	cmdFlagNoHole = uint16(1 << 1)

	requestSize = 4 + 2 + 2 + 8 + 8 + 4
	replySize   = 4 + 4 + 8
)

// Errors of replies.
const (
	errPerm     = protocol.TRANSMISSION_ERROR_EPERM
	errIO       = uint32(5)
	errNoMemory = uint32(12)
	errInvalid  = protocol.TRANSMISSION_ERROR_EINVAL
	errNoSpace  = uint32(28)
	errShutdown = uint32(108)
)

// A header is the fixed part of a request. Its cookie is opaque: it only goes
// back in the reply.
type header struct {
	flags, cmd uint16
	cookie     uint64
	off        uint64
	length     uint32
}

// parseHeader decodes the first requestSize bytes of b. The stream of a
// peer that gets the magic wrong can't be trusted to be in step.
func parseHeader(b []byte) (header, error) {
	b = b[:requestSize]
	if magic := binary.BigEndian.Uint32(b); magic != protocol.TRANSMISSION_MAGIC_REQUEST {
		return header{}, fmt.Errorf("nbd: reading request: magic %#x: %w", magic, ErrProtocol)
	}
	return header{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		length: binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// putReply encodes the header of a simple reply.
func putReply(b *[replySize]byte, errno uint32, cookie uint64) {
	binary.BigEndian.PutUint32(b[0:], protocol.TRANSMISSION_MAGIC_REPLY)
	binary.BigEndian.PutUint32(b[4:], errno)
	binary.BigEndian.PutUint64(b[8:], cookie)
}

// check returns the NBD error with which a request has to be answered, or 0 if
// the device may be asked. Lengths are compared without adding, so that no
// offset can overflow.
func (h *header) check(size uint64, flags uint16) uint32 {
	allowed := cmdFlagFUA // on every command: "clients exist that set it"
	pastEnd := errInvalid // what a request past the end gets
	writes := true

	switch h.cmd {
	case cmdRead:
		writes = false
	case cmdWrite:
		pastEnd = errNoSpace
	case cmdFlush:
		if h.flags&^allowed != 0 || h.off != 0 || h.length != 0 {
			return errInvalid
		}
		return 0
	case cmdTrim:
		if flags&(FlagSendTrim|FlagReadOnly) == 0 {
			return errInvalid
		}
	case cmdWriteZeroes:
		pastEnd = errNoSpace
		allowed |= cmdFlagNoHole
	default:
		return errInvalid
	}

	switch {
	case h.flags&^allowed != 0:
		return errInvalid
	case writes && flags&FlagReadOnly != 0:
		return errPerm
	case h.length > MaxPayload && (h.cmd == cmdRead || h.cmd == cmdWrite):
		return errInvalid
	case h.off > size || uint64(h.length) > size-h.off:
		return pastEnd
	}
	return 0
}
