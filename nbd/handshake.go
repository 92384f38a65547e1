package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

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

	// After a cancellation, what has come is refused until nothing more comes
	// for lastCall, or for lastCalls in all.
	lastCall  = 5 * time.Millisecond
	lastCalls = 100 * time.Millisecond
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

// A session is what a handshake has agreed on.
type session struct {
	export     *Export
	flags      uint16 // transmission flags
	mode       replyMode
	allocation bool // BLOCK_STATUS may ask for base:allocation

	// refuseLate refuses requests that come after a cancellation, rather than
	// leave them unread. The kernel would take the error for one of the disk;
	// when there is no reply, it sends them again on the next socket.
	refuseLate bool

	// kernel is a session without a handshake. A cancellation with the cause
	// [ErrLeave] ends it between two requests, and its peer learns elsewhere that
	// the device has grown.
	kernel bool
}

// A handshake is the state of one.
type handshake struct {
	s        *Server
	in       *input
	noZeroes bool
	secure   bool   // STARTTLS was successful
	between  bool   // no part of an option has been used yet
	out      []byte // replies to the current option

	// What options have agreed on so far. STARTTLS takes it back.
	agreed struct {
		mode       replyMode
		allocation bool   // SET_META_CONTEXT has selected base:allocation,
		name       string // for the export of this name
	}
}

// session returns what the client gets that chooses e by name.
func (h *handshake) session(e *Export, name string) session {
	return session{
		export:     e,
		flags:      e.handshakeFlags(h.agreed.mode),
		mode:       h.agreed.mode,
		allocation: h.agreed.allocation && h.agreed.name == name,
		refuseLate: true,
	}
}

// run returns what was agreed on, or errAborted.
func (h *handshake) run() (*session, error) {
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
		h.between = true
		b, err := h.in.next(optionSize)
		if err != nil {
			return nil, fmt.Errorf("nbd: reading option: %w", err)
		}
		h.between = false
		magic := binary.BigEndian.Uint64(b)
		opt := binary.BigEndian.Uint32(b[8:])
		length := binary.BigEndian.Uint32(b[12:])
		if magic != protocol.NEGOTIATION_MAGIC_OPTION {
			return nil, fmt.Errorf("nbd: reading option: magic %#x: %w", magic, ErrProtocol)
		}
		if length > maxOption {
			return nil, fmt.Errorf("nbd: option %d: length %d: %w", opt, length, ErrProtocol)
		}
		ses, err := h.option(opt, int(length))
		if ses != nil || err != nil {
			return ses, err
		}
	}
	return nil, fmt.Errorf("nbd: more than %d options: %w", maxOptions, ErrProtocol)
}

// option handles one option whose data has yet to be read. It returns the
// session if transmission starts, and neither that nor an error if the next
// option follows.
func (h *handshake) option(opt uint32, length int) (*session, error) {
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
	var chosen *session
	if !h.secure && h.s.requiresTLS(h.in.nc) && opt != optStartTLS && opt != protocol.NEGOTIATION_ID_OPTION_ABORT {
		if opt == optExportName {
			return nil, fmt.Errorf("nbd: export asked for without TLS: %w", ErrProtocol)
		}
		h.refuse(opt, repErrTLS, "this server requires TLS: send STARTTLS first")
		return nil, h.answer(opt)
	}
	switch opt {
	case optExportName:
		if h.agreed.mode == extendedHeaders {
			return nil, fmt.Errorf("nbd: EXPORT_NAME after EXTENDED_HEADERS: %w", ErrProtocol)
		}
		e := h.s.export(string(data))
		if e == nil {
			return nil, fmt.Errorf("nbd: export %.80q: %w", data, ErrUnknownExport)
		}
		size, err := e.size()
		if err != nil {
			return nil, err
		}
		ses := h.session(e, string(data))
		chosen = &ses
		h.out = binary.BigEndian.AppendUint64(h.out, size)
		h.out = binary.BigEndian.AppendUint16(h.out, ses.flags)
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
		ses := h.info(opt, data)
		if opt == protocol.NEGOTIATION_ID_OPTION_GO {
			chosen = ses
		}

	case optStartTLS:
		switch {
		case h.s.cfg.TLS == nil:
			h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, "this server has no TLS")
		case length != 0:
			h.refuse(opt, repErrInvalid, "a request for TLS has no data")
		case h.secure:
			h.refuse(opt, repErrInvalid, "TLS runs already")
		default:
			return nil, h.startTLS()
		}

	case optStructuredReply:
		switch {
		case length != 0:
			h.refuse(opt, repErrInvalid, "a request for structured replies has no data")
		case h.agreed.mode == extendedHeaders:
			h.refuse(opt, repErrExtHeader, "extended headers were agreed on, which include structured replies")
		case h.agreed.mode == structuredReplies:
			h.refuse(opt, repErrInvalid, "structured replies were agreed on already")
		default:
			h.agreed.mode = structuredReplies
			h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
		}

	case optExtendedHeaders:
		switch {
		case length != 0:
			h.refuse(opt, repErrInvalid, "a request for extended headers has no data")
		case h.agreed.mode == extendedHeaders:
			h.refuse(opt, repErrInvalid, "extended headers were agreed on already")
		default:
			h.agreed.mode = extendedHeaders
			h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
		}

	case optListMeta, optSetMeta:
		if opt == optSetMeta {
			h.agreed.allocation = false // also if this fails
		}
		if length > len(h.in.buf) {
			h.refuse(opt, repErrTooBig, fmt.Sprintf("%d bytes of option data are more than this server takes", length))
			break
		}
		h.metaContext(opt, data)

	default:
		h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNSUPPORTED, fmt.Sprintf("option %d is not supported", opt))
	}

	return chosen, h.answer(opt)
}

// answer sends the replies to an option.
func (h *handshake) answer(opt uint32) error {
	if _, err := h.in.nc.Write(h.out); err != nil {
		return fmt.Errorf("nbd: answering option %d: %w", opt, err)
	}
	return nil
}

// startTLS acknowledges STARTTLS and does the TLS handshake. What was agreed on
// before is void, and what was read before is thrown away: anybody on the way
// may have sent it.
func (h *handshake) startTLS() error {
	h.reply(optStartTLS, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
	if err := h.answer(optStartTLS); err != nil {
		return err
	}
	conn := tls.Server(h.in.nc, h.s.cfg.TLS)
	*h.in = input{nc: conn, buf: h.in.buf}
	h.agreed.mode, h.agreed.allocation, h.agreed.name = simpleReplies, false, ""
	h.secure = true
	if err := conn.Handshake(); err != nil {
		return fmt.Errorf("nbd: TLS handshake: %w", err)
	}
	return nil
}

// shutdown refuses the options that have come, or are on the way, after the
// server was told to end.
func (h *handshake) shutdown() {
	if !h.between {
		return // not in step
	}
	end := time.Now().Add(lastCalls)
	for range maxOptions {
		if time.Now().After(end) || h.in.nc.SetDeadline(time.Now().Add(lastCall)) != nil {
			return
		}
		b, err := h.in.next(optionSize)
		if err != nil || binary.BigEndian.Uint64(b) != protocol.NEGOTIATION_MAGIC_OPTION {
			return
		}
		opt := binary.BigEndian.Uint32(b[8:])
		length := binary.BigEndian.Uint32(b[12:])
		if opt == optExportName || length > maxOption || h.in.skip(int(length)) != nil {
			return // EXPORT_NAME has no error reply
		}
		h.out = h.out[:0]
		if opt == protocol.NEGOTIATION_ID_OPTION_ABORT {
			h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
		} else {
			h.refuse(opt, repErrShutdown, "this server is stopping")
		}
		if h.answer(opt) != nil || opt == protocol.NEGOTIATION_ID_OPTION_ABORT {
			return
		}
	}
}

// metaContext answers LIST_META_CONTEXT or SET_META_CONTEXT.
func (h *handshake) metaContext(opt uint32, data []byte) {
	if h.agreed.mode == simpleReplies {
		h.refuse(opt, repErrInvalid, "metadata contexts need structured replies")
		return
	}
	name, data, problem := cutString(data, 4)
	if problem != "" {
		h.refuse(opt, repErrInvalid, "export name: "+problem)
		return
	}
	if h.s.export(name) == nil {
		h.refuse(opt, protocol.NEGOTIATION_TYPE_REPLY_ERR_UNKNOWN, fmt.Sprintf("no export %s", quote(name)))
		return
	}
	queries := binary.BigEndian.Uint32(data)
	data = data[4:]
	found := opt == optListMeta && queries == 0
	for ; queries > 0; queries-- {
		var query string
		if query, data, problem = cutString(data, 0); problem != "" {
			h.refuse(opt, repErrInvalid, "query: "+problem)
			return
		}
		// Other names, and other namespaces, are not ours to complain about.
		found = found || query == contextAllocation || query == "base:" && opt == optListMeta
	}
	if len(data) != 0 {
		h.refuse(opt, repErrInvalid, fmt.Sprintf("%d bytes after the last query", len(data)))
		return
	}
	if found {
		id := uint32(0) // a list has no numbers
		if opt == optSetMeta {
			h.agreed.allocation, h.agreed.name = true, name
			id = contextAllocationID
		}
		h.reply(opt, repMetaContext, append(binary.BigEndian.AppendUint32(nil, id), contextAllocation...))
	}
	h.reply(opt, protocol.NEGOTIATION_TYPE_REPLY_ACK, nil)
}

// cutString returns the string at the start of data, which has its length
// before it and at least more bytes after it, and what follows. problem says
// what is wrong, if anything is.
func cutString(data []byte, more int) (s string, rest []byte, problem string) {
	if len(data) < 4+more {
		return "", nil, "option data is too short"
	}
	n := binary.BigEndian.Uint32(data)
	data = data[4:]
	switch {
	case n > uint32(len(data)-more):
		return "", nil, fmt.Sprintf("%d bytes are longer than the option", n)
	case n > MaxString:
		return "", nil, fmt.Sprintf("%d bytes, at most %d are allowed", n, MaxString)
	}
	return string(data[:n]), data[n:], ""
}

// info answers INFO or GO and returns the session that GO starts, or nil if it
// replied with an error.
func (h *handshake) info(opt uint32, data []byte) *session {
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
	ses := h.session(e, name)
	b = binary.BigEndian.AppendUint16(b, ses.flags)
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
	return &ses
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
