package nbdtest

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
)

// The numbers are written out here once more, from proto.md, so that a mistake
// in the server's constants doesn't agree with itself.
const (
	magicGreeting = 0x4e42444d41474943 // NBDMAGIC
	magicOption   = 0x49484156454F5054 // IHAVEOPT
	magicReplyOpt = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicReply    = 0x67446698

	magicStructured    = 0x668e33ef
	magicExtended      = 0x21e41c71
	magicExtendedReply = 0x6e8a278c
)

// Commands.
const (
	Read        = 0
	Write       = 1
	Disc        = 2
	Flush       = 3
	Trim        = 4
	Cache       = 5
	WriteZeroes = 6
	BlockStatus = 7
	Resize      = 8
)

// Command flags.
const (
	FUA        = 1 << 0
	NoHole     = 1 << 1
	DF         = 1 << 2
	ReqOne     = 1 << 3
	FastZero   = 1 << 4
	PayloadLen = 1 << 5
)

// Options.
const (
	OptExportName      = 1
	OptAbort           = 2
	OptList            = 3
	OptPeek            = 4
	OptStartTLS        = 5
	OptInfo            = 6
	OptGo              = 7
	OptStructuredReply = 8
	OptListMeta        = 9
	OptSetMeta         = 10
	OptExtendedHeaders = 11
)

// Replies to options. Errors have bit 31 set.
const (
	RepAck        = 1
	RepServer     = 2
	RepInfo       = 3
	RepMeta       = 4
	RepErrUnsup   = 1<<31 | 1
	RepErrInvalid = 1<<31 | 3
	RepErrUnknown = 1<<31 | 6
	RepErrTooBig  = 1<<31 | 9

	RepErrTLS       = 1<<31 | 5
	RepErrShutdown  = 1<<31 | 7
	RepErrExtHeader = 1<<31 | 10
)

// Request is the header of a request, field by field.
type Request struct {
	Magic  uint32 // 0 means the right one
	Flags  uint16
	Cmd    uint16
	Cookie uint64
	Off    uint64
	Len    uint32
	Len64  uint64 // with extended headers only
}

// Append appends the request to b.
func (r Request) Append(b []byte) []byte {
	if r.Magic == 0 {
		r.Magic = magicRequest
	}
	b = binary.BigEndian.AppendUint32(b, r.Magic)
	b = binary.BigEndian.AppendUint16(b, r.Flags)
	b = binary.BigEndian.AppendUint16(b, r.Cmd)
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Off)
	return binary.BigEndian.AppendUint32(b, r.Len)
}

// AppendOption appends an option with its data to b.
func AppendOption(b []byte, opt uint32, data []byte) []byte {
	b = binary.BigEndian.AppendUint64(b, magicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// GoData returns the data of an INFO or GO option.
func GoData(name string, infos ...uint16) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(infos)))
	for _, i := range infos {
		b = binary.BigEndian.AppendUint16(b, i)
	}
	return b
}

// An OptionReply is one reply to an option.
type OptionReply struct {
	Opt, Type uint32
	Data      []byte
}

// A Client is one end of a connection. Its methods do one thing each and
// return an error rather than hide one. Sending and receiving may be done by
// two goroutines.
type Client struct {
	Conn  net.Conn
	Size  uint64 // from Go or ExportName
	Flags uint16

	Extended bool // Send uses extended headers

	hdr [16]byte
}

// Greet reads the greeting and sends the client flags. It returns the
// handshake flags.
func (c *Client) Greet(flags uint32) (uint16, error) {
	var b [18]byte
	if _, err := io.ReadFull(c.Conn, b[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(b[:]) != magicGreeting || binary.BigEndian.Uint64(b[8:]) != magicOption {
		return 0, fmt.Errorf("nbdtest: greeting %x", b)
	}
	_, err := c.Conn.Write(binary.BigEndian.AppendUint32(nil, flags))
	return binary.BigEndian.Uint16(b[16:]), err
}

// ReadOptionReply reads one reply to an option.
func (c *Client) ReadOptionReply() (OptionReply, error) {
	var b [20]byte
	if _, err := io.ReadFull(c.Conn, b[:]); err != nil {
		return OptionReply{}, err
	}
	if m := binary.BigEndian.Uint64(b[:]); m != magicReplyOpt {
		return OptionReply{}, fmt.Errorf("nbdtest: option reply magic %#x", m)
	}
	r := OptionReply{Opt: binary.BigEndian.Uint32(b[8:]), Type: binary.BigEndian.Uint32(b[12:])}
	n := binary.BigEndian.Uint32(b[16:])
	if n > 64<<10 {
		return OptionReply{}, fmt.Errorf("nbdtest: option reply of %d bytes", n)
	}
	r.Data = make([]byte, n)
	_, err := io.ReadFull(c.Conn, r.Data)
	return r, err
}

// Option sends an option and reads the replies up to an ACK or an error.
func (c *Client) Option(opt uint32, data []byte) ([]OptionReply, error) {
	if _, err := c.Conn.Write(AppendOption(nil, opt, data)); err != nil {
		return nil, err
	}
	var replies []OptionReply
	for {
		r, err := c.ReadOptionReply()
		if err != nil {
			return replies, err
		}
		replies = append(replies, r)
		if r.Opt != opt {
			return replies, fmt.Errorf("nbdtest: reply to option %d, sent %d", r.Opt, opt)
		}
		if r.Type == RepAck || r.Type&(1<<31) != 0 {
			return replies, nil
		}
	}
}

// Go chooses an export and notes its size and flags.
func (c *Client) Go(name string) error {
	replies, err := c.Option(OptGo, GoData(name))
	if err != nil {
		return err
	}
	for _, r := range replies {
		switch {
		case r.Type == RepInfo && len(r.Data) == 12 && binary.BigEndian.Uint16(r.Data) == 0:
			c.Size = binary.BigEndian.Uint64(r.Data[2:])
			c.Flags = binary.BigEndian.Uint16(r.Data[10:])
		case r.Type&(1<<31) != 0:
			return fmt.Errorf("nbdtest: export %q: error %#x: %s", name, r.Type, r.Data)
		}
	}
	return nil
}

// Dial makes a client of conn that is ready to send requests to the export.
func Dial(conn net.Conn, name string) (*Client, error) {
	c := &Client{Conn: conn}
	if _, err := c.Greet(3); err != nil {
		return nil, err
	}
	return c, c.Go(name)
}

// Send sends a request and a payload in one call.
func (c *Client) Send(r Request, payload []byte) error {
	bufs := net.Buffers{r.Append(nil)}
	if c.Extended {
		bufs[0] = r.AppendExtended(nil)
	}
	if len(payload) > 0 {
		bufs = append(bufs, payload)
	}
	_, err := bufs.WriteTo(c.Conn)
	return err
}

// ReadReply reads the header of a reply. The payload of a read follows if errno
// is 0.
func (c *Client) ReadReply() (errno uint32, cookie uint64, err error) {
	if _, err := io.ReadFull(c.Conn, c.hdr[:]); err != nil {
		return 0, 0, err
	}
	if m := binary.BigEndian.Uint32(c.hdr[:]); m != magicReply {
		return 0, 0, fmt.Errorf("nbdtest: reply magic %#x", m)
	}
	return binary.BigEndian.Uint32(c.hdr[4:]), binary.BigEndian.Uint64(c.hdr[8:]), nil
}

// Do sends a request and reads its reply, with nothing else in flight. data is
// the payload of a write, or where that of a read goes.
func (c *Client) Do(r Request, data []byte) (errno uint32, err error) {
	var payload []byte
	if r.Cmd == Write {
		payload = data
	}
	sent := make(chan error, 1)
	go func() { sent <- c.Send(r, payload) }() // the reply may come before the payload is taken
	errno, cookie, err := c.ReadReply()
	if err != nil {
		return 0, err
	}
	if cookie != r.Cookie {
		return 0, fmt.Errorf("nbdtest: reply to %#x, sent %#x", cookie, r.Cookie)
	}
	if r.Cmd == Read && errno == 0 {
		if _, err := io.ReadFull(c.Conn, data[:r.Len]); err != nil {
			return 0, err
		}
	}
	return errno, <-sent
}

// Read reads len(p) bytes at off.
func (c *Client) Read(p []byte, off uint64) (errno uint32, err error) {
	return c.Do(Request{Cmd: Read, Off: off, Len: uint32(len(p))}, p)
}

// Write writes p at off.
func (c *Client) Write(p []byte, off uint64, flags uint16) (errno uint32, err error) {
	return c.Do(Request{Cmd: Write, Flags: flags, Off: off, Len: uint32(len(p))}, p)
}

// Disconnect sends DISC and waits for the server to close its end.
func (c *Client) Disconnect() error {
	if err := c.Send(Request{Cmd: Disc}, nil); err != nil {
		return err
	}
	var b [1]byte
	if _, err := io.ReadFull(c.Conn, b[:]); err != io.EOF {
		return fmt.Errorf("nbdtest: after DISC: %x, %v", b, err)
	}
	return nil
}

// MetaData returns the data of a LIST_META_CONTEXT or SET_META_CONTEXT option.
func MetaData(name string, queries ...string) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
	b = append(b, name...)
	b = binary.BigEndian.AppendUint32(b, uint32(len(queries)))
	for _, q := range queries {
		b = binary.BigEndian.AppendUint32(b, uint32(len(q)))
		b = append(b, q...)
	}
	return b
}

// Types of chunks.
const (
	ChunkNone           = 0
	ChunkOffsetData     = 1
	ChunkOffsetHole     = 2
	ChunkBlockStatus    = 5
	ChunkBlockStatusExt = 6
	ChunkError          = 1<<15 | 1
	ChunkErrorOffset    = 1<<15 | 2
)

// AppendExtended appends the request with extended headers to b. Len64 counts
// if it isn't 0.
func (r Request) AppendExtended(b []byte) []byte {
	if r.Magic == 0 {
		r.Magic = magicExtended
	}
	if r.Len64 == 0 {
		r.Len64 = uint64(r.Len)
	}
	b = binary.BigEndian.AppendUint32(b, r.Magic)
	b = binary.BigEndian.AppendUint16(b, r.Flags)
	b = binary.BigEndian.AppendUint16(b, r.Cmd)
	b = binary.BigEndian.AppendUint64(b, r.Cookie)
	b = binary.BigEndian.AppendUint64(b, r.Off)
	return binary.BigEndian.AppendUint64(b, r.Len64)
}

// A Chunk is one chunk of a reply of any kind. A simple reply is a chunk that
// has neither type nor payload.
type Chunk struct {
	Magic  uint32
	Flags  uint16
	Type   uint16
	Errno  uint32 // of a simple reply, or an error chunk
	Cookie uint64
	Off    uint64 // of an extended header
	Data   []byte
}

// Done reports whether this is the last chunk of its reply.
func (c *Chunk) Done() bool { return c.Magic == magicReply || c.Flags&1 != 0 }

// ReadChunk reads a simple reply without payload, or a chunk of a structured or
// extended reply.
func (c *Client) ReadChunk() (Chunk, error) {
	var b [32]byte
	if _, err := io.ReadFull(c.Conn, b[:16]); err != nil {
		return Chunk{}, err
	}
	k := Chunk{Magic: binary.BigEndian.Uint32(b[:]), Cookie: binary.BigEndian.Uint64(b[8:])}
	var n uint64
	switch k.Magic {
	case magicReply:
		k.Errno = binary.BigEndian.Uint32(b[4:])
		return k, nil
	case magicStructured:
		if _, err := io.ReadFull(c.Conn, b[16:20]); err != nil {
			return Chunk{}, err
		}
		n = uint64(binary.BigEndian.Uint32(b[16:]))
	case magicExtendedReply:
		if _, err := io.ReadFull(c.Conn, b[16:32]); err != nil {
			return Chunk{}, err
		}
		k.Off = binary.BigEndian.Uint64(b[16:])
		n = binary.BigEndian.Uint64(b[24:])
	default:
		return Chunk{}, fmt.Errorf("nbdtest: chunk magic %#x", k.Magic)
	}
	k.Flags = binary.BigEndian.Uint16(b[4:])
	k.Type = binary.BigEndian.Uint16(b[6:])
	if n > 33<<20 {
		return Chunk{}, fmt.Errorf("nbdtest: chunk of %d bytes", n)
	}
	k.Data = make([]byte, n)
	if _, err := io.ReadFull(c.Conn, k.Data); err != nil {
		return Chunk{}, err
	}
	if k.Type&(1<<15) != 0 {
		if n < 6 || uint64(binary.BigEndian.Uint16(k.Data[4:])) > n-6 {
			return Chunk{}, fmt.Errorf("nbdtest: error chunk %x", k.Data)
		}
		if k.Errno = binary.BigEndian.Uint32(k.Data); k.Errno == 0 {
			return Chunk{}, fmt.Errorf("nbdtest: error chunk without an error: %x", k.Data)
		}
	}
	return k, nil
}
