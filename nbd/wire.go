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
	FlagSendDF          = uint16(1 << 7)
	FlagCanMultiConn    = protocol.NEGOTIATION_REPLY_FLAGS_CAN_MULTI_CONN
	FlagSendCache       = uint16(1 << 10)
	FlagSendFastZero    = uint16(1 << 11)
)

const (
	// MaxPayload is the largest READ or WRITE served, in bytes. The spec says
	// that a client which knows no better may send this much.
	MaxPayload = 32 << 20

	// MaxString is the largest name, description or message, in bytes.
	MaxString = 4096

	// maxDiscard is the largest payload of a request that is read and thrown
	// away in order to answer it with an error. Beyond it the connection ends.
	maxDiscard = 64 << 20
)

// Handshake.
const (
	handshakeNoZeroes = uint16(1 << 1)

	clientFixedNewstyle = uint32(1 << 0)
	clientNoZeroes      = uint32(1 << 1)

	optExportName      = uint32(1)
	optStartTLS        = uint32(5)
	optStructuredReply = uint32(8)
	optListMeta        = uint32(9)
	optSetMeta         = uint32(10)
	optExtendedHeaders = uint32(11)

	repMetaContext  = uint32(4)
	repErrInvalid   = uint32(1<<31 | 3)
	repErrTLS       = uint32(1<<31 | 5)
	repErrShutdown  = uint32(1<<31 | 7)
	repErrTooBig    = uint32(1<<31 | 9)
	repErrExtHeader = uint32(1<<31 | 10)
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
	cmdCache       = uint16(5)
	cmdWriteZeroes = uint16(6)
	cmdBlockStatus = uint16(7)

	cmdFlagFUA        = uint16(1 << 0)
	cmdFlagNoHole     = uint16(1 << 1)
	cmdFlagDF         = uint16(1 << 2)
	cmdFlagReqOne     = uint16(1 << 3)
	cmdFlagFastZero   = uint16(1 << 4)
	cmdFlagPayloadLen = uint16(1 << 5)

	requestSize         = 4 + 2 + 2 + 8 + 8 + 4
	extendedRequestSize = 4 + 2 + 2 + 8 + 8 + 8

	magicExtendedRequest = uint32(0x21e41c71)
)

// Replies.
const (
	magicStructuredReply = uint32(0x668e33ef)
	magicExtendedReply   = uint32(0x6e8a278c)

	replyFlagDone = uint16(1 << 0)

	chunkNone           = uint16(0)
	chunkOffsetData     = uint16(1)
	chunkBlockStatus    = uint16(5)
	chunkBlockStatusExt = uint16(6)
	chunkError          = uint16(1<<15 | 1)

	// maxReplySize is the longest that a reply is besides the data of a read:
	// an extended header and one extent.
	maxReplySize = 32 + 4 + 4 + 8 + 8
)

// The metadata context that the server has, and its number on the wire.
const (
	contextAllocation   = "base:allocation"
	contextAllocationID = uint32(1)
)

// A replyMode is how the requests and replies of a connection are encoded.
type replyMode uint8

const (
	// simpleReplies is what everybody speaks: a reply is a header, and the data
	// of a read if that succeeded.
	simpleReplies replyMode = iota

	// structuredReplies has typed chunks, of which this server sends one, in
	// reply to READ and BLOCK_STATUS, and simple replies to the rest.
	structuredReplies

	// extendedHeaders has 64-bit lengths, and chunks in reply to everything.
	extendedHeaders
)

// requestSize returns the size of the fixed part of a request.
func (m replyMode) requestSize() int {
	if m == extendedHeaders {
		return extendedRequestSize
	}
	return requestSize
}

// Errors of replies.
const (
	errPerm     = protocol.TRANSMISSION_ERROR_EPERM
	errIO       = uint32(5)
	errNoMemory = uint32(12)
	errInvalid  = protocol.TRANSMISSION_ERROR_EINVAL
	errNoSpace  = uint32(28)
	errNotSup   = uint32(95)
	errShutdown = uint32(108)
)

// A header is the fixed part of a request. Its cookie is opaque: it only goes
// back in the reply.
type header struct {
	flags, cmd uint16
	cookie     uint64
	off        uint64
	length     uint64
}

// parseHeader decodes the first bytes of b, as many as mode says. The stream of
// a peer that gets the magic wrong can't be trusted to be in step.
func parseHeader(b []byte, mode replyMode) (header, error) {
	want := protocol.TRANSMISSION_MAGIC_REQUEST
	if mode == extendedHeaders {
		want = magicExtendedRequest
	}
	b = b[:mode.requestSize()]
	if magic := binary.BigEndian.Uint32(b); magic != want {
		return header{}, fmt.Errorf("nbd: reading request: magic %#x: %w", magic, ErrProtocol)
	}
	h := header{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
	}
	if mode == extendedHeaders {
		h.length = binary.BigEndian.Uint64(b[24:])
	} else {
		h.length = uint64(binary.BigEndian.Uint32(b[24:]))
	}
	return h, nil
}

// payload returns how many bytes follow the header. With extended headers, a
// flag says so. A write without it is read as one with it: that is what other
// servers do, and the flag was not always in the specification.
func (h *header) payload(mode replyMode) uint64 {
	if h.cmd == cmdWrite || mode == extendedHeaders && h.flags&cmdFlagPayloadLen != 0 {
		return h.length
	}
	return 0
}

// putReply encodes all of the reply to h but the data of a read, and returns
// its length.
func putReply(b *[maxReplySize]byte, mode replyMode, h *header, errno uint32) int {
	if mode == simpleReplies || mode == structuredReplies && h.cmd != cmdRead && h.cmd != cmdBlockStatus {
		binary.BigEndian.PutUint32(b[0:], protocol.TRANSMISSION_MAGIC_REPLY)
		binary.BigEndian.PutUint32(b[4:], errno)
		binary.BigEndian.PutUint64(b[8:], h.cookie)
		return 4 + 4 + 8
	}

	head := 4 + 2 + 2 + 8 + 4
	if mode == extendedHeaders {
		head = 4 + 2 + 2 + 8 + 8 + 8
	}
	typ, fixed, data := chunkNone, 0, uint64(0) // what follows the header: here, and after it
	body := b[head:]
	switch {
	case errno != 0:
		typ, fixed = chunkError, 4+2
		binary.BigEndian.PutUint32(body[0:], errno)
		binary.BigEndian.PutUint16(body[4:], 0) // no message
	case h.cmd == cmdRead && h.length > 0: // a chunk has at least one byte
		typ, fixed, data = chunkOffsetData, 8, h.length
		binary.BigEndian.PutUint64(body[0:], h.off)
	case h.cmd == cmdBlockStatus && mode == extendedHeaders:
		typ, fixed = chunkBlockStatusExt, 4+4+8+8
		binary.BigEndian.PutUint32(body[0:], contextAllocationID)
		binary.BigEndian.PutUint32(body[4:], 1)
		binary.BigEndian.PutUint64(body[8:], h.length)
		binary.BigEndian.PutUint64(body[16:], 0) // neither a hole nor known to be zeros
	case h.cmd == cmdBlockStatus:
		typ, fixed = chunkBlockStatus, 4+4+4
		binary.BigEndian.PutUint32(body[0:], contextAllocationID)
		binary.BigEndian.PutUint32(body[4:], uint32(h.length))
		binary.BigEndian.PutUint32(body[8:], 0)
	}
	binary.BigEndian.PutUint16(b[4:], replyFlagDone)
	binary.BigEndian.PutUint16(b[6:], typ)
	binary.BigEndian.PutUint64(b[8:], h.cookie)
	if mode == extendedHeaders {
		binary.BigEndian.PutUint32(b[0:], magicExtendedReply)
		binary.BigEndian.PutUint64(b[16:], h.off)
		binary.BigEndian.PutUint64(b[24:], uint64(fixed)+data)
	} else {
		binary.BigEndian.PutUint32(b[0:], magicStructuredReply)
		binary.BigEndian.PutUint32(b[16:], uint32(uint64(fixed)+data))
	}
	return head + fixed
}

// check returns the NBD error with which a request has to be answered, or 0 if
// the device may be asked. Lengths are compared without adding, so that no
// offset can overflow.
func (h *header) check(size uint64, ses *session) uint32 {
	flags := ses.flags
	allowed := cmdFlagFUA // on every command: "clients exist that set it"
	pastEnd := errInvalid // what a request past the end gets
	writes := true

	switch h.cmd {
	case cmdRead:
		writes = false
		if flags&FlagSendDF != 0 {
			allowed |= cmdFlagDF // there is one chunk, always
		}
	case cmdWrite:
		pastEnd = errNoSpace
		if ses.mode == extendedHeaders {
			allowed |= cmdFlagPayloadLen
		}
	case cmdFlush:
		if h.flags&^allowed != 0 || h.off != 0 || h.length != 0 {
			return errInvalid
		}
		return 0
	case cmdTrim:
		if flags&(FlagSendTrim|FlagReadOnly) == 0 {
			return errInvalid
		}
	case cmdCache:
		writes = false
		if flags&FlagSendCache == 0 {
			return errInvalid
		}
	case cmdWriteZeroes:
		pastEnd = errNoSpace
		allowed |= cmdFlagNoHole
		if flags&FlagSendFastZero != 0 {
			allowed |= cmdFlagFastZero
		}
	case cmdBlockStatus:
		writes = false
		allowed |= cmdFlagReqOne
		if !ses.allocation || h.length == 0 {
			return errInvalid
		}
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
	case h.off > size || h.length > size-h.off:
		return pastEnd
	case h.flags&cmdFlagFastZero != 0:
		// Zeros have to be encrypted and written like other data: never fast.
		return errNotSup
	}
	return 0
}
