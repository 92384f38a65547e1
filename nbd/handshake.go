package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	"github.com/pojntfx/go-nbd/pkg/protocol"
)

// The handshake, in the order in which it runs: greeting, client flags, then
// options until one of them starts the transmission phase or ends the
// connection.
//
// A client is not trusted before it has chosen an export: nothing is allocated
// from a length that it claims, the number of options is limited, and so is the
// time (see Serve).

const (
	// handshakeBuffer is the size of the buffer through which the handshake is
	// read. The data of an option that matters has to fit: the longest name
	// and a thousand information requests do.
	handshakeBuffer = 8 << 10

	// maxOption is the longest data of an option, in bytes, that is skipped to
	// answer the option with an error. Beyond it the connection ends.
	maxOption = 64 << 10

	// maxOptions is how many options a client may send.
	maxOptions = 32

	// maxQuoted is how much of what a client sent goes back in a message.
	maxQuoted = 80
)

// errAborted means that the client ended the handshake in order.
var errAborted = errors.New("handshake aborted by the client")

// An input reads from a connection through a buffer.
type input struct {
	nc   net.Conn
	buf  []byte
	r, w int // buf[r:w] has been read but not used
}

func (in *input) buffered() []byte { return in.buf[in.r:in.w] }

// fill reads once, at most limit bytes, and at least one. There must be room
// after the buffered bytes are moved to the front.
func (in *input) fill(limit int) error {
	if in.r > 0 {
		in.w = copy(in.buf, in.buf[in.r:in.w])
		in.r = 0
	}
	n, err := in.nc.Read(in.buf[in.w:min(len(in.buf), in.w+limit)])
	in.w += n
	if n > 0 {
		return nil // an error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// next returns the next n bytes, n <= len(in.buf). They are valid until the
// next call.
func (in *input) next(n int) ([]byte, error) {
	for len(in.buffered()) < n {
		if err := in.fill(len(in.buf)); err != nil {
			if err == io.EOF && len(in.buffered()) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	b := in.buf[in.r : in.r+n]
	in.r += n
	return b, nil
}

// skip throws n bytes away.
func (in *input) skip(n int) error {
	for n > 0 {
		k := min(n, len(in.buf))
		if _, err := in.next(k); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// A handshake is the state of one.
type handshake struct {
	s        *Server
	in       *input
	noZeroes bool
	out      []byte // replies to the current option
}

// run returns the export that the client chose, or errAborted.
func (h *handshake) run() (*Export, error) {
	greeting := make([]byte, 0, greetingSize)
	greeting = binary.BigEndian.AppendUint64(greeting, protocol.NEGOTIATION_MAGIC_OLDSTYLE)
	greeting = binary.BigEndian.AppendUint64(greeting, protocol.NEGOTIATION_MAGIC_OPTION)
	greeting = binary.BigEndian.AppendUint16(greeting, protocol.NEGOTIATION_HANDSHAKE_FLAG_FIXED_NEWSTYLE|handshakeNoZeroes)
	if _, err := h.in.nc.Write(greeting); err != nil {
		return nil, fmt.Errorf("nbd: sending greeting: %w", err)
	}

	b, err := h.in.next(clientFlagsSize)
	if err != nil {
		return nil, fmt.Errorf("nbd: reading client flags: %w", err)
	}
	flags := binary.BigEndian.Uint32(b)
	if flags&^(clientFixedNewstyle|clientNoZeroes) != 0 {
		return nil, fmt.Errorf("nbd: client flags %#x: %w", flags, ErrProtocol)
	}
	// A client that doesn't set FIXED_NEWSTYLE is served all the same, as the
	// spec allows: go-nbd's is one.
	h.noZeroes = flags&clientNoZeroes != 0

	for range maxOptions {
		b, err := h.in.next(optionSize)
		if err != nil {
			return nil, fmt.Errorf("nbd: reading option: %w", err)
		}
		magic := binary.BigEndian.Uint64(b)
		opt := binary.BigEndian.Uint32(b[8:])
		length := binary.BigEndian.Uint32(b[12:])
		if magic != protocol.NEGOTIATION_MAGIC_OPTION {
			return nil, fmt.Errorf("nbd: reading option: magic %#x: %w", magic, ErrProtocol)
		}
		if length > maxOption {
			return nil, fmt.Errorf("nbd: option %d: length %d: %w", opt, length, ErrProtocol)
		}
		e, err := h.option(opt, int(length))
		if e != nil || err != nil {
			return e, err
		}
	}
	return nil, fmt.Errorf("nbd: more than %d options: %w", maxOptions, ErrProtocol)
}

// option handles one option whose data has yet to be read. It returns the
// export if transmission starts, and neither that nor an error if the next
// option follows.
func (h *handshake) option(opt uint32, length int) (*Export, error) {
	if opt == optExportName && length > MaxString {
		// This option has no error reply.
		return nil, fmt.Errorf("nbd: export name of %d bytes: %w", length, ErrProtocol)
	}
	var data []byte
	var err error
	if length <= len(h.in.buf) {
		data, err = h.in.next(length)
	} else {
		err = h.in.skip(length)
	}
	if err != nil {
		return nil, fmt.Errorf("nbd: reading option %d: %w", opt, err)
	}

	h.out = h.out[:0]
	var chosen *Export
	switch opt {
	case optExportName:
		e := h.s.export(string(data))
		if e == nil {
			return nil, fmt.Errorf("nbd: export %.80q: %w", data, ErrUnknownExport)
		}
		size, err := e.size()
		if err != nil {
			return nil, err
		}
		chosen = e
		h.out = binary.BigEndian.AppendUint64(h.out, size)
		h.out = binary.BigEndian.AppendUint16(h.out, e.transmissionFlags())
		if !h.noZeroes {
			h.out = append(h.out, make([]byte, 124)...)
		}

	case protocol.NEGOTIATION_ID_OPTION_ABORT:
		h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
		_, _ = h.in.nc.Write(h.out) // the client needn't wait for it
		return nil, errAborted

	case protocol.NEGOTIATION_ID_OPTION_LIST:
		if length != 0 {
			h.refuse(opt, repErrInvalid, "a list request has no data")
			break
		}
		for i := range h.s.exports {
			e := &h.s.exports[i]
			b := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
			b = append(b, e.Name...)
			b = append(b, e.Description...)
			h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_SERVER, b)
		}
		h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)

	case protocol.NEGOTIATION_ID_OPTION_INFO, protocol.NEGOTIATION_ID_OPTION_GO:
		if length > len(h.in.buf) {
			h.refuse(opt, repErrTooBig, fmt.Sprintf("%d bytes of option data are more than this server takes", length))
			break
		}
		e := h.info(opt, data)
		if opt == protocol.NEGOTIATION_ID_OPTION_GO {
			chosen = e
		}

	default:
		h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, fmt.Sprintf("option %d is not supported", opt))
	}

	if _, err := h.in.nc.Write(h.out); err != nil {
		return nil, fmt.Errorf("nbd: answering option %d: %w", opt, err)
	}
	return chosen, nil
}

// info answers INFO or GO and returns the export, or nil if it replied with an
// error.
func (h *handshake) info(opt uint32, data []byte) *Export {
	if len(data) < 4+2 {
		h.refuse(opt, repErrInvalid, "option data is too short")
		return nil
	}
	nameLen := binary.BigEndian.Uint32(data)
	data = data[4:]
	if nameLen > uint32(len(data)-2) {
		h.refuse(opt, repErrInvalid, fmt.Sprintf("export name of %d bytes is longer than the option", nameLen))
		return nil
	}
	name := string(data[:nameLen])
	data = data[nameLen:]
	requests := binary.BigEndian.Uint16(data)
	data = data[2:]
	if len(data) != 2*int(requests) {
		h.refuse(opt, repErrInvalid, fmt.Sprintf("option data does not hold %d information requests", requests))
		return nil
	}
	if nameLen > MaxString {
		h.refuse(opt, repErrInvalid, fmt.Sprintf("export name of %d bytes, at most %d are allowed", nameLen, MaxString))
		return nil
	}
	e := h.s.export(name)
	if e == nil {
		h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, fmt.Sprintf("no export %s", quote(name)))
		return nil
	}
	size, err := e.size()
	if err != nil {
		// The reason is the operator's business, not the client's.
		h.refuse(opt, repErrShutdown, fmt.Sprintf("export %s is not available", quote(name)))
		return nil
	}

	b := binary.BigEndian.AppendUint16(nil, protocol.NEGOTIATION_TYPE_INFO_EXPORT)
	b = binary.BigEndian.AppendUint64(b, size)
	b = binary.BigEndian.AppendUint16(b, e.transmissionFlags())
	h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_INFO, b)

	var sent uint32 // by bit: each kind once, however often it was asked for
	for ; len(data) > 0; data = data[2:] {
		kind := binary.BigEndian.Uint16(data)
		if kind >= 32 || sent&(1<<kind) != 0 {
			continue
		}
		sent |= 1 << kind
		b := binary.BigEndian.AppendUint16(nil, kind)
		switch kind {
		case protocol.NEGOTIATION_TYPE_INFO_NAME:
			b = append(b, e.Name...)
		case protocol.NEGOTIATION_TYPE_INFO_DESCRIPTION:
			if e.Description == "" {
				continue
			}
			b = append(b, e.Description...)
		case protocol.NEGOTIATION_TYPE_INFO_BLOCKSIZE:
			b = binary.BigEndian.AppendUint32(b, 1)
			b = binary.BigEndian.AppendUint32(b, e.preferredBlockSize())
			b = binary.BigEndian.AppendUint32(b, MaxPayload)
		default:
			continue // a kind we don't know, or INFO_EXPORT, which was sent
		}
		h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_INFO, b)
	}
	h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
	return e
}

func (h *handshake) reply(opt, typ uint32, data []byte) {
	h.out = binary.BigEndian.AppendUint64(h.out, protocol.NEGOTIATION_MAGIC_REPLY)
	h.out = binary.BigEndian.AppendUint32(h.out, opt)
	h.out = binary.BigEndian.AppendUint32(h.out, typ)
	h.out = binary.BigEndian.AppendUint32(h.out, uint32(len(data)))
	h.out = append(h.out, data...)
}

// refuse replies with an error and a message for people.
func (h *handshake) refuse(opt, typ uint32, message string) {
	h.reply(opt, typ, []byte(message))
}

// quote makes a name that a client sent fit for a message: short, printable.
func quote(name string) string {
	if len(name) > maxQuoted {
		return fmt.Sprintf("%q...", name[:maxQuoted])
	}
	return fmt.Sprintf("%q", name)
}
