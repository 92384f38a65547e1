package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/pojntfx/go-nbd/pkg/protocol"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

const (
	rwFlags = nbd.FlagHasFlags | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagSendWriteZeroes | nbd.FlagCanMultiConn |
		nbd.FlagSendCache | nbd.FlagSendFastZero
	roFlags = nbd.FlagHasFlags | nbd.FlagReadOnly | nbd.FlagSendFlush | nbd.FlagSendFUA | nbd.FlagCanMultiConn | nbd.FlagSendCache
)

var longName = strings.Repeat("n", nbd.MaxString)

func handshakeHarness(t testing.TB, cfg nbd.Config) *harness {
	return newHarness(t, cfg,
		nbd.Export{Name: "first", Description: "the first", Device: nbdtest.NewDevice(1<<20+1, false), Trim: true, BlockSize: 512},
		nbd.Export{Name: "read only", Device: nbdtest.NewDevice(512, false), ReadOnly: true, Trim: true},
		nbd.Export{Name: "größe", Device: nbdtest.NewDevice(0, false), BlockSize: 64 << 10},
		nbd.Export{Name: longName, Device: nbdtest.NewDevice(4096, false)},
	)
}

// greeted returns a client that has sent its flags.
func (h *harness) greeted(flags uint32) (*nbdtest.Client, <-chan error) {
	h.t.Helper()
	conn, result := h.raw()
	c := &nbdtest.Client{Conn: conn}
	got, err := c.Greet(flags)
	if err != nil {
		h.t.Fatal(err)
	}
	if got != 3 {
		h.t.Errorf("handshake flags %#x, want FIXED_NEWSTYLE and NO_ZEROES", got)
	}
	return c, result
}

func infoExport(size uint64, flags uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, 0)
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, flags)
}

func infoBlockSize(minimum, preferred, maximum uint32) []byte {
	b := binary.BigEndian.AppendUint16(nil, 3)
	b = binary.BigEndian.AppendUint32(b, minimum)
	b = binary.BigEndian.AppendUint32(b, preferred)
	return binary.BigEndian.AppendUint32(b, maximum)
}

// TestHandshakeOptions sends one option each, checks all replies to it, and
// then that the handshake is still in step.
func TestHandshakeOptions(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	info := func(data []byte) nbdtest.OptionReply { return nbdtest.OptionReply{Type: nbdtest.RepInfo, Data: data} }
	ack := nbdtest.OptionReply{Type: nbdtest.RepAck, Data: []byte{}}
	fails := func(typ uint32) []nbdtest.OptionReply { return []nbdtest.OptionReply{{Type: typ}} }
	server := func(name, description string) nbdtest.OptionReply {
		b := binary.BigEndian.AppendUint32(nil, uint32(len(name)))
		return nbdtest.OptionReply{Type: nbdtest.RepServer, Data: append(append(b, name...), description...)}
	}
	// goData with a name length that isn't that of the name.
	lie := func(claim uint32, name string) []byte {
		b := nbdtest.GoData(name)
		binary.BigEndian.PutUint32(b, claim)
		return b
	}
	firstFlags := rwFlags | nbd.FlagSendTrim

	tests := []struct {
		rule string
		opt  uint32
		data []byte
		want []nbdtest.OptionReply // errors without text: any will do
	}{
		{"INFO: the empty name is the first export", nbdtest.OptInfo, nbdtest.GoData(""),
			[]nbdtest.OptionReply{info(infoExport(1<<20+1, firstFlags)), ack}},
		{"INFO: by name", nbdtest.OptInfo, nbdtest.GoData("first"),
			[]nbdtest.OptionReply{info(infoExport(1<<20+1, firstFlags)), ack}},
		{"INFO: read-only offers neither trim nor write zeroes", nbdtest.OptInfo, nbdtest.GoData("read only"),
			[]nbdtest.OptionReply{info(infoExport(512, roFlags)), ack}},
		{"INFO: size 0, name in UTF-8", nbdtest.OptInfo, nbdtest.GoData("größe"),
			[]nbdtest.OptionReply{info(infoExport(0, rwFlags)), ack}},
		{"INFO: name of 4096 bytes", nbdtest.OptInfo, nbdtest.GoData(longName),
			[]nbdtest.OptionReply{info(infoExport(4096, rwFlags)), ack}},
		{"INFO: all kinds of information, in the order asked, EXPORT first", nbdtest.OptInfo, nbdtest.GoData("", 3, 2, 1, 0),
			[]nbdtest.OptionReply{
				info(infoExport(1<<20+1, firstFlags)),
				info(infoBlockSize(1, 4096, 32<<20)),
				info([]byte("\x00\x02the first")),
				info([]byte("\x00\x01first")),
				ack,
			}},
		{"INFO: no description is not sent", nbdtest.OptInfo, nbdtest.GoData("read only", 2, 1),
			[]nbdtest.OptionReply{info(infoExport(512, roFlags)), info([]byte("\x00\x01read only")), ack}},
		{"INFO: a large sector is the preferred block size", nbdtest.OptInfo, nbdtest.GoData("größe", 3),
			[]nbdtest.OptionReply{info(infoExport(0, rwFlags)), info(infoBlockSize(1, 64<<10, 32<<20)), ack}},
		{"INFO: unknown kinds are ignored, repeated ones sent once", nbdtest.OptInfo, nbdtest.GoData("", 1, 4, 1, 77, 0xffff, 0, 1),
			[]nbdtest.OptionReply{info(infoExport(1<<20+1, firstFlags)), info([]byte("\x00\x01first")), ack}},
		{"INFO: unknown export", nbdtest.OptInfo, nbdtest.GoData("no such"), fails(nbdtest.RepErrUnknown)},
		{"GO: unknown export: the handshake goes on", nbdtest.OptGo, nbdtest.GoData("no such"), fails(nbdtest.RepErrUnknown)},
		{"GO: unknown export of 4096 bytes", nbdtest.OptGo, nbdtest.GoData(strings.Repeat("x", 4096)), fails(nbdtest.RepErrUnknown)},
		{"GO: unknown export that isn't text", nbdtest.OptGo, nbdtest.GoData("\x00\xff\n\x1b[31m"), fails(nbdtest.RepErrUnknown)},
		{"GO: name of 4097 bytes", nbdtest.OptGo, nbdtest.GoData(strings.Repeat("x", 4097)), fails(nbdtest.RepErrInvalid)},
		{"GO: no data", nbdtest.OptGo, nil, fails(nbdtest.RepErrInvalid)},
		{"GO: five bytes of data", nbdtest.OptGo, make([]byte, 5), fails(nbdtest.RepErrInvalid)},
		{"GO: name length is that of the option", nbdtest.OptGo, lie(11, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: name length is that of the option less 5", nbdtest.OptGo, lie(6, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: name length is one less than the name", nbdtest.OptGo, lie(4, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: name length 2^31", nbdtest.OptGo, lie(1<<31, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: name length 2^32-1", nbdtest.OptGo, lie(1<<32-1, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: name length 2^32-2", nbdtest.OptGo, lie(1<<32-2, "first"), fails(nbdtest.RepErrInvalid)},
		{"GO: fewer information requests than announced", nbdtest.OptGo, append(nbdtest.GoData("first", 1, 2)[:4+5+2+2], 0), fails(nbdtest.RepErrInvalid)},
		{"GO: more data than information requests", nbdtest.OptGo, append(nbdtest.GoData("first", 1), 0, 0), fails(nbdtest.RepErrInvalid)},
		{"GO: data that the server doesn't take", nbdtest.OptGo, nbdtest.GoData("first", make([]uint16, 30_000)...), fails(nbdtest.RepErrTooBig)},
		{"GO: the longest data that is consumed", nbdtest.OptGo, make([]byte, 64<<10), fails(nbdtest.RepErrTooBig)},

		{"LIST: one reply for each export", nbdtest.OptList, nil,
			[]nbdtest.OptionReply{server("first", "the first"), server("read only", ""), server("größe", ""), server(longName, ""), ack}},
		{"LIST: data is invalid", nbdtest.OptList, []byte{0}, fails(nbdtest.RepErrInvalid)},

		{"PEEK_EXPORT is not supported", nbdtest.OptPeek, []byte("first"), fails(nbdtest.RepErrUnsup)},
		{"STARTTLS is not supported", nbdtest.OptStartTLS, nil, fails(nbdtest.RepErrUnsup)},
		{"STRUCTURED_REPLY: data is invalid", nbdtest.OptStructuredReply, []byte{0}, fails(nbdtest.RepErrInvalid)},
		{"EXTENDED_HEADERS: data is invalid", nbdtest.OptExtendedHeaders, []byte{0}, fails(nbdtest.RepErrInvalid)},
		{"LIST_META_CONTEXT: invalid without structured replies", nbdtest.OptListMeta, nbdtest.MetaData("first"), fails(nbdtest.RepErrInvalid)},
		{"SET_META_CONTEXT: invalid without structured replies", nbdtest.OptSetMeta, nbdtest.MetaData("first"), fails(nbdtest.RepErrInvalid)},
		{"option 0 is not supported", 0, nil, fails(nbdtest.RepErrUnsup)},
		{"unknown option: its data is consumed", 1<<32 - 1, make([]byte, 8<<10), fails(nbdtest.RepErrUnsup)},
		{"unknown option: more data than the buffer is consumed", 12345, make([]byte, 8<<10+1), fails(nbdtest.RepErrUnsup)},
		{"unknown option: 64 KiB of data are consumed", 12345, make([]byte, 64<<10), fails(nbdtest.RepErrUnsup)},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			c, result := h.greeted(3)
			replies, err := c.Option(tt.opt, tt.data)
			if err != nil {
				t.Fatal(err)
			}
			for i := range replies {
				r := &replies[i]
				r.Opt = 0
				if r.Type&(1<<31) == 0 {
					continue
				}
				if n := len(r.Data); n == 0 || n > 400 || !utf8.Valid(r.Data) || bytes.ContainsAny(r.Data, "\x00\x1b\n") {
					t.Errorf("error text %q is not a short line of text", r.Data)
				}
				t.Logf("error %#x: %s", r.Type, r.Data)
				r.Data = nil
			}
			if diff := cmp.Diff(tt.want, replies); diff != "" {
				t.Errorf("replies (-want +got):\n%s", diff)
			}
			if err := c.Go("read only"); err != nil || c.Size != 512 || c.Flags != roFlags {
				t.Fatalf("GO afterwards: size %d, flags %#x, %v", c.Size, c.Flags, err)
			}
			if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
				t.Fatalf("read: error %d, %v", errno, err)
			}
			if err := c.Disconnect(); err != nil {
				t.Error(err)
			}
			if err := wait(t, "Serve", result); err != nil {
				t.Errorf("Serve() = %v", err)
			}
		})
	}
}

// TestHandshakeExportName covers the option that has no reply format.
func TestHandshakeExportName(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	for _, tt := range []struct {
		rule  string
		flags uint32
		name  string
		size  uint64
		trans uint16
		zeros int
	}{
		{"default export, NO_ZEROES", 3, "", 1<<20 + 1, rwFlags | nbd.FlagSendTrim, 0},
		{"by name, zeros", 1, "read only", 512, roFlags, 124},
		{"client that doesn't know fixed newstyle", 0, "first", 1<<20 + 1, rwFlags | nbd.FlagSendTrim, 124},
		{"name of 4096 bytes", 3, longName, 4096, rwFlags, 0},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			c, result := h.greeted(tt.flags)
			// The first request may come along with the option.
			in := nbdtest.AppendOption(nil, nbdtest.OptExportName, []byte(tt.name))
			in = nbdtest.Request{Cmd: nbdtest.Read, Cookie: 1, Len: 512}.Append(in)
			in = nbdtest.Request{Cmd: nbdtest.Disc}.Append(in)
			if _, err := c.Conn.Write(in); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c.Conn)
			if err != nil {
				t.Fatal(err)
			}
			want := binary.BigEndian.AppendUint64(nil, tt.size)
			want = binary.BigEndian.AppendUint16(want, tt.trans)
			want = append(want, make([]byte, tt.zeros)...)
			want = append(want, "\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"...)
			want = append(want, make([]byte, 512)...)
			if !bytes.Equal(got, want) {
				t.Errorf("server sent %x, want %x", got, want)
			}
			if err := wait(t, "Serve", result); err != nil {
				t.Errorf("Serve() = %v", err)
			}
		})
	}
}

// TestHandshakeEnds has what a client can send that must end the connection.
func TestHandshakeEnds(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	option := func(opt, length uint32) []byte { // without the data it announces
		b := nbdtest.AppendOption(nil, opt, nil)
		binary.BigEndian.PutUint32(b[12:], length)
		return b
	}
	many := func(n int) []byte {
		var b []byte
		for range n {
			b = nbdtest.AppendOption(b, nbdtest.OptList, nil)
		}
		return b
	}
	for _, tt := range []struct {
		rule string
		in   []byte // after the greeting: client flags and more
		want error
	}{
		{"unknown client flag", []byte{0, 0, 0, 7}, nbd.ErrProtocol},
		{"unknown high client flag", []byte{0x80, 0, 0, 3}, nbd.ErrProtocol},
		{"nothing", nil, io.EOF},
		{"half of the client flags", []byte{0, 0}, io.ErrUnexpectedEOF},
		{"no option", []byte{0, 0, 0, 3}, io.EOF},
		{"half of an option", append([]byte{0, 0, 0, 3}, option(3, 0)[:9]...), io.ErrUnexpectedEOF},
		{"half of the data", append([]byte{0, 0, 0, 3}, append(option(7, 100), make([]byte, 50)...)...), io.ErrUnexpectedEOF},
		{"wrong option magic", append([]byte{0, 0, 0, 3}, make([]byte, 16)...), nbd.ErrProtocol},
		{"ABORT", append([]byte{0, 0, 0, 3}, option(2, 0)...), nil},
		{"ABORT with data", append([]byte{0, 0, 0, 3}, append(option(2, 5), "bye.."...)...), nil},
		{"EXPORT_NAME of an unknown export", append([]byte{0, 0, 0, 3}, append(option(1, 3), "who"...)...), nbd.ErrUnknownExport},
		{"EXPORT_NAME of 4097 bytes", append([]byte{0, 0, 0, 3}, append(option(1, 4097), make([]byte, 4097)...)...), nbd.ErrProtocol},
		{"EXPORT_NAME of 2^32-1 bytes", append([]byte{0, 0, 0, 3}, option(1, 1<<32-1)...), nbd.ErrProtocol},
		{"GO with 64 KiB + 1 of data", append([]byte{0, 0, 0, 3}, append(option(7, 64<<10+1), make([]byte, 64<<10+1)...)...), nbd.ErrProtocol},
		{"GO with 2^31 of data", append([]byte{0, 0, 0, 3}, option(7, 1<<31)...), nbd.ErrProtocol},
		{"GO with 2^32-1 of data", append([]byte{0, 0, 0, 3}, option(7, 1<<32-1)...), nbd.ErrProtocol},
		{"unknown option with 2^32-1 of data", append([]byte{0, 0, 0, 3}, option(99, 1<<32-1)...), nbd.ErrProtocol},
		{"33 options", append([]byte{0, 0, 0, 3}, many(33)...), nbd.ErrProtocol},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			conn, result := h.raw()
			go func() {
				conn.Write(tt.in)
				conn.(interface{ CloseWrite() error }).CloseWrite()
			}()
			go io.Copy(io.Discard, conn)
			if err := wait(t, "Serve", result); !errors.Is(err, tt.want) || tt.want == nil && err != nil {
				t.Errorf("Serve() = %v, want %v", err, tt.want)
			}
		})
	}

	t.Run("ABORT is acknowledged", func(t *testing.T) {
		h.t = t
		c, result := h.greeted(3)
		replies, err := c.Option(nbdtest.OptAbort, nil)
		if err != nil || len(replies) != 1 || replies[0].Type != nbdtest.RepAck {
			t.Errorf("replies %+v, %v", replies, err)
		}
		if err := wait(t, "Serve", result); err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	t.Run("32 options are served", func(t *testing.T) {
		h.t = t
		c, _ := h.greeted(3)
		for range 31 {
			if _, err := c.Option(nbdtest.OptList, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.Go(""); err != nil {
			t.Error(err)
		}
	})
	t.Run("INFO and then GO say the same", func(t *testing.T) {
		h.t = t
		c, _ := h.greeted(3)
		a, err1 := c.Option(nbdtest.OptInfo, nbdtest.GoData("first", 1, 2, 3))
		b, err2 := c.Option(nbdtest.OptGo, nbdtest.GoData("first", 1, 2, 3))
		for i := range a {
			a[i].Opt = nbdtest.OptGo
		}
		if diff := cmp.Diff(a, b); diff != "" || err1 != nil || err2 != nil {
			t.Errorf("%v, %v: INFO differs from GO:\n%s", err1, err2, diff)
		}
	})
}

// TestHandshakeByteByByte sends a handshake one byte at a time, and aborts one
// after every byte.
func TestHandshakeByteByByte(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	in := []byte{0, 0, 0, 3}
	in = nbdtest.AppendOption(in, nbdtest.OptList, nil)
	in = nbdtest.AppendOption(in, 99, []byte("data"))
	in = nbdtest.AppendOption(in, nbdtest.OptGo, nbdtest.GoData("no such", 1))
	in = nbdtest.AppendOption(in, nbdtest.OptGo, nbdtest.GoData("first", 3, 1))
	in = nbdtest.Request{Cmd: nbdtest.Write, Cookie: 8, Len: 3}.Append(in)
	in = append(in, "abc"...)
	in = nbdtest.Request{Cmd: nbdtest.Disc}.Append(in)

	answers := make([][]byte, 0, 2)
	for _, step := range []int{len(in), 1} {
		conn, result := h.raw()
		go func() {
			for b := in; len(b) > 0; b = b[min(step, len(b)):] {
				conn.Write(b[:min(step, len(b))])
			}
		}()
		got, err := io.ReadAll(conn)
		if err != nil {
			t.Fatal(err)
		}
		if err := wait(t, "Serve", result); err != nil {
			t.Errorf("Serve() = %v", err)
		}
		answers = append(answers, got)
	}
	if !bytes.Equal(answers[0], answers[1]) {
		t.Errorf("the answers differ: %d bytes in one piece, %d byte by byte", len(answers[0]), len(answers[1]))
	}
	for n := range in {
		conn, result := h.raw()
		go io.Copy(io.Discard, conn)
		if _, err := conn.Write(in[:n]); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if err := wait(t, "Serve", result); err == nil {
			t.Errorf("client went away after %d bytes: Serve() = nil", n)
		}
	}
}

func TestHandshakeTimeout(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{HandshakeTimeout: 50 * time.Millisecond})
	for _, tt := range []struct {
		rule string
		do   func(c io.Writer)
	}{
		{"silent client", func(io.Writer) {}},
		{"client that stops after its flags", func(c io.Writer) { c.Write([]byte{0, 0, 0, 3}) }},
		{"slow client: the limit is on the whole, not on each read", func(c io.Writer) {
			in := append([]byte{0, 0, 0, 3}, bytes.Repeat(nbdtest.AppendOption(nil, nbdtest.OptList, nil), 30)...)
			for i := range in {
				if _, err := c.Write(in[i : i+1]); err != nil {
					return
				}
				time.Sleep(5 * time.Millisecond)
			}
		}},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			conn, result := h.raw()
			go io.Copy(io.Discard, conn)
			go tt.do(conn)
			if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrHandshakeTimeout) {
				t.Errorf("Serve() = %v, want %v", err, nbd.ErrHandshakeTimeout)
			}
		})
	}
	t.Run("transmission has no such limit", func(t *testing.T) {
		h.t = t
		c, _ := h.dial("")
		time.Sleep(100 * time.Millisecond)
		if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
			t.Errorf("error %d, %v", errno, err)
		}
	})
}

func TestHandshakeCanceled(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	_, result := h.greeted(3)
	reason := errors.New("the reason")
	h.cancel(reason)
	if err := wait(t, "Serve", result); !errors.Is(err, reason) {
		t.Errorf("Serve() = %v, want %v", err, reason)
	}
}

// TestHandshakeShutdown: an option that comes while the server is stopping is
// refused.
func TestHandshakeShutdown(t *testing.T) {
	for _, tt := range []struct {
		opt  uint32
		data []byte
		want uint32 // 0: none
	}{
		{nbdtest.OptGo, nbdtest.GoData("first"), nbdtest.RepErrShutdown},
		{99, nil, nbdtest.RepErrShutdown},
		{nbdtest.OptAbort, nil, nbdtest.RepAck},
		{nbdtest.OptExportName, []byte("first"), 0},
	} {
		h := handshakeHarness(t, nbd.Config{})
		ctx, cancel := context.WithCancelCause(context.Background())
		client, server := socketpair(t)
		result := make(chan error, 1)
		// The option is there, and the cancellation, before the server looks.
		held := &heldConn{Conn: server, reading: make(chan struct{}), hold: make(chan struct{})}
		h.serves.Go(func() {
			result <- h.s.Serve(ctx, held)
			server.Close()
		})
		c := &nbdtest.Client{Conn: client}
		if _, err := c.Greet(3); err != nil {
			t.Fatal(err)
		}
		wait(t, "the server reads", held.reading)
		cancel(errTestEnds)
		if _, err := client.Write(nbdtest.AppendOption(nil, tt.opt, tt.data)); err != nil {
			t.Fatal(err)
		}
		close(held.hold)
		r, err := c.ReadOptionReply()
		if tt.want == 0 && err == nil || tt.want != 0 && (err != nil || r.Type != tt.want) {
			t.Errorf("option %d: reply %#x %q, %v; want %#x", tt.opt, r.Type, r.Data, err, tt.want)
		}
		if err := wait(t, "Serve", result); err != errTestEnds {
			t.Errorf("Serve() = %v", err)
		}
		client.Close()
	}
}

// LocalAddr keeps the server from taking it for a socket whose peer it has to ask for.
func (*heldConn) LocalAddr() net.Addr { return nil }

// A heldConn holds up the second read, as long as it is told to, and then fails
// it as a deadline would.
type heldConn struct {
	net.Conn
	reads         int
	reading, hold chan struct{}
}

func (c *heldConn) Read(p []byte) (int, error) {
	c.reads++
	if c.reads == 2 {
		close(c.reading)
		<-c.hold
		return 0, os.ErrDeadlineExceeded
	}
	return c.Conn.Read(p)
}

// rss returns the resident set of this process, in bytes.
func rss(t testing.TB) int64 {
	t.Helper()
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.ParseInt(strings.Fields(string(b))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return pages * int64(os.Getpagesize())
}

// sendQueue returns how many bytes the peer has not read, of what was sent, and what
// the kernel needs to keep them.
func sendQueue(t *testing.T, conn net.Conn) (n int) {
	t.Helper()
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err == nil {
		if e := raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) }); e != nil {
			err = e
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestClaimedLengths has 50 clients that claim the most that a length can say,
// wherever there is one, and send nothing. Nothing may be allocated for that.
func TestClaimedLengths(t *testing.T) {
	// Each client costs an 8 KiB buffer and a goroutine or three, or, in
	// transmission, a 128 KiB buffer and the workers.
	const clients = 50
	h := handshakeHarness(t, nbd.Config{InFlight: 4})
	claim := func(opt, length uint32, more ...byte) []byte {
		b := nbdtest.AppendOption([]byte{0, 0, 0, 3}, opt, nil)
		binary.BigEndian.PutUint32(b[4+12:], length)
		return append(b, more...)
	}
	goFirst := nbdtest.AppendOption([]byte{0, 0, 0, 3}, nbdtest.OptGo, nbdtest.GoData("first"))
	for _, tt := range []struct {
		rule  string
		in    []byte
		limit int64 // bytes for all clients
	}{
		{"option data of 64 KiB", claim(nbdtest.OptGo, 64<<10), clients * 32 << 10},
		{"name of 2^32-1 bytes in an option of 64 KiB", claim(nbdtest.OptGo, 64<<10, 0xff, 0xff, 0xff, 0xff), clients * 32 << 10},
		{"EXPORT_NAME of 4096 bytes", claim(nbdtest.OptExportName, 4096), clients * 32 << 10},
		{"option data of 2^32-1 bytes", claim(nbdtest.OptGo, 1<<32-1), clients * 32 << 10},
		{"WRITE of 32 MiB, refused", nbdtest.Request{Cmd: nbdtest.Write, Off: 1 << 62, Len: 32 << 20}.Append(bytes.Clone(goFirst)), clients * 256 << 10},
		{"WRITE of 1 MiB", nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}.Append(bytes.Clone(goFirst)), clients * 256 << 10},
	} {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			conns := make([]net.Conn, clients)
			for i := range conns {
				conns[i], _ = h.raw()
			}
			runtime.GC()
			before := rss(t)
			var m0, m1 runtime.MemStats
			runtime.ReadMemStats(&m0)
			for _, c := range conns {
				if _, err := c.Write(tt.in); err != nil {
					t.Fatal(err)
				}
			}
			for _, c := range conns {
				eventually(t, "the server has read it all", func() bool { return sendQueue(t, c) == 0 })
			}
			time.Sleep(50 * time.Millisecond) // for what it does then
			runtime.ReadMemStats(&m1)
			if n := int64(m1.TotalAlloc - m0.TotalAlloc); n > tt.limit {
				t.Errorf("%d clients made the server allocate %d bytes, limit %d", clients, n, tt.limit)
			}
			if n := rss(t) - before; n > tt.limit+4<<20 {
				t.Errorf("%d clients made the resident set grow by %d bytes", clients, n)
			}
			for _, c := range conns {
				c.Close()
			}
			eventually(t, "connections ended", func() bool { return h.s.Stats().Connections == 0 })
		})
	}
}

// TestGoNBDClient speaks as go-nbd's client does: no flags, structs of
// go-nbd's protocol package, LIST. (Its GO sends an option length of 0 in front
// of the data, which no server that follows the spec can understand.)
func TestGoNBDClient(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Name: "only", Device: nbdtest.NewDevice(4096, false)})
	conn, result := h.raw()
	var greeting protocol.NegotiationNewstyleHeader
	if err := binary.Read(conn, binary.BigEndian, &greeting); err != nil {
		t.Fatal(err)
	}
	if greeting.OldstyleMagic != protocol.NEGOTIATION_MAGIC_OLDSTYLE || greeting.OptionMagic != protocol.NEGOTIATION_MAGIC_OPTION {
		t.Fatalf("greeting %+v", greeting)
	}
	send := func(v any) {
		t.Helper()
		if err := binary.Write(conn, binary.BigEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	send(uint32(0))
	send(protocol.NegotiationOptionHeader{OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: protocol.NEGOTIATION_ID_OPTION_LIST})
	var reply protocol.NegotiationReplyHeader
	if err := binary.Read(conn, binary.BigEndian, &reply); err != nil {
		t.Fatal(err)
	}
	data := make([]byte, reply.Length)
	if _, err := io.ReadFull(conn, data); err != nil {
		t.Fatal(err)
	}
	if reply.ReplyMagic != protocol.NEGOTIATION_MAGIC_REPLY || reply.Type != protocol.NEGOTIATION_TYPE_REPLY_SERVER || string(data[4:]) != "only" {
		t.Errorf("reply %+v, %q", reply, data)
	}
	if err := binary.Read(conn, binary.BigEndian, &reply); err != nil || reply.Type != protocol.NEGOTIATION_TYPE_REPLY_ACK {
		t.Errorf("reply %+v, %v", reply, err)
	}
	send(protocol.NegotiationOptionHeader{OptionMagic: protocol.NEGOTIATION_MAGIC_OPTION, ID: protocol.NEGOTIATION_ID_OPTION_ABORT})
	if err := wait(t, "Serve", result); err != nil {
		t.Errorf("Serve() = %v", err)
	}
}

func TestNewRefuses(t *testing.T) {
	dev := nbdtest.NewDevice(512, false)
	good := nbd.Export{Name: "a", Device: dev}
	for _, tt := range []struct {
		what    string
		cfg     nbd.Config
		exports []nbd.Export
	}{
		{"no exports", nbd.Config{}, nil},
		{"no device", nbd.Config{}, []nbd.Export{{}}},
		{"two exports of one name", nbd.Config{}, []nbd.Export{good, good}},
		{"name with NUL", nbd.Config{}, []nbd.Export{{Name: "a\x00", Device: dev}}},
		{"name that isn't UTF-8", nbd.Config{}, []nbd.Export{{Name: "\xff", Device: dev}}},
		{"name too long", nbd.Config{}, []nbd.Export{{Name: longName + "n", Device: dev}}},
		{"description too long", nbd.Config{}, []nbd.Export{{Description: longName + "n", Device: dev}}},
		{"block size no power of two", nbd.Config{}, []nbd.Export{{Device: dev, BlockSize: 513}}},
		{"block size too large", nbd.Config{}, []nbd.Export{{Device: dev, BlockSize: 128 << 10}}},
		{"device without a size", nbd.Config{}, []nbd.Export{{Device: sizeDevice{dev, 0, errors.New("gone")}}}},
		{"device of negative size", nbd.Config{}, []nbd.Export{{Device: sizeDevice{dev, -1, nil}}}},
		{"arena too small", nbd.Config{Arena: 1 << 20}, []nbd.Export{good}},
		{"negative limit", nbd.Config{InFlight: -1}, []nbd.Export{good}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			if s, err := nbd.New(tt.cfg, tt.exports...); err == nil {
				s.Close()
				t.Error("New() succeeded")
			}
		})
	}
}

type sizeDevice struct {
	*nbdtest.Device
	size int64
	err  error
}

func (d sizeDevice) Size() (int64, error) { return d.size, d.err }

func TestTransmissionFlags(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	for name, want := range map[string]uint16{"": rwFlags | nbd.FlagSendTrim, "read only": roFlags, "größe": rwFlags} {
		want &^= nbd.FlagSendCache | nbd.FlagSendFastZero // of no use to the kernel
		if got, err := h.s.TransmissionFlags(name); got != want || err != nil {
			t.Errorf("TransmissionFlags(%q) = %#x, %v; want %#x", name, got, err, want)
		}
	}
	if _, err := h.s.TransmissionFlags("no such"); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("TransmissionFlags of an unknown export: %v", err)
	}
	client, server := socketpair(t)
	defer client.Close()
	defer server.Close()
	if err := h.s.ServeTransmission(context.Background(), server, "no such"); !errors.Is(err, nbd.ErrUnknownExport) {
		t.Errorf("ServeTransmission of an unknown export: %v", err)
	}
}

func TestMaxConnections(t *testing.T) {
	h := newHarness(t, nbd.Config{MaxConnections: 2}, nbd.Export{Device: nbdtest.NewDevice(512, false)})
	a, aEnds := h.dial("")
	b, _ := h.greeted(3)
	_, result := h.raw()
	if err := wait(t, "Serve of a third connection", result); !errors.Is(err, nbd.ErrTooManyConnections) {
		t.Errorf("Serve() = %v, want %v", err, nbd.ErrTooManyConnections)
	}
	if err := a.Disconnect(); err != nil {
		t.Error(err)
	}
	wait(t, "Serve", aEnds)
	h.dial("") // there is room again
	if err := b.Go(""); err != nil {
		t.Error(err)
	}
	if st := h.s.Stats(); st.Rejected != 1 || st.Accepted != 3 || st.Connections != 2 {
		t.Errorf("Stats() = %+v, want 3 accepted, 1 rejected, 2 open", st)
	}
	if err := h.s.Close(); err == nil {
		t.Error("Close() with open connections succeeded")
	} else if !strings.Contains(err.Error(), fmt.Sprint(2)) {
		t.Errorf("Close() = %v, want the number of connections", err)
	}
}
