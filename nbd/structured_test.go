package nbd_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// be appends numbers in network order. Untyped constants have to be converted:
// their type is their size.
func be(b []byte, numbers ...any) []byte {
	for _, n := range numbers {
		switch n := n.(type) {
		case uint16:
			b = binary.BigEndian.AppendUint16(b, n)
		case uint32:
			b = binary.BigEndian.AppendUint32(b, n)
		case uint64:
			b = binary.BigEndian.AppendUint64(b, n)
		case []byte:
			b = append(b, n...)
		case string:
			b = append(b, n...)
		default:
			panic(fmt.Sprintf("%T", n))
		}
	}
	return b
}

// option sends an option that must succeed.
func option(t testing.TB, c *nbdtest.Client, opt uint32, data []byte) []nbdtest.OptionReply {
	t.Helper()
	replies, err := c.Option(opt, data)
	if err != nil || replies[len(replies)-1].Type != nbdtest.RepAck {
		t.Fatalf("option %d: %+v, %v", opt, replies, err)
	}
	return replies
}

// negotiate returns a client with structured replies or extended headers, and
// base:allocation.
func (h *harness) negotiate(name string, extended bool) (*nbdtest.Client, <-chan error) {
	h.t.Helper()
	c, result := h.greeted(3)
	opt := uint32(nbdtest.OptStructuredReply)
	if extended {
		opt = nbdtest.OptExtendedHeaders
		c.Extended = true
	}
	option(h.t, c, opt, nil)
	option(h.t, c, nbdtest.OptSetMeta, nbdtest.MetaData(name, "base:allocation"))
	if err := c.Go(name); err != nil {
		h.t.Fatal(err)
	}
	return c, result
}

// TestNegotiation sends options one after the other and checks the type of the
// last reply to each, and what can be done afterwards.
func TestNegotiation(t *testing.T) {
	h := handshakeHarness(t, nbd.Config{})
	type step struct {
		opt  uint32
		data []byte
		want uint32
	}
	const (
		sr     = uint32(nbdtest.OptStructuredReply)
		ext    = uint32(nbdtest.OptExtendedHeaders)
		list   = uint32(nbdtest.OptListMeta)
		set    = uint32(nbdtest.OptSetMeta)
		ack    = uint32(nbdtest.RepAck)
		inval  = uint32(nbdtest.RepErrInvalid)
		unkn   = uint32(nbdtest.RepErrUnknown)
		tooBig = uint32(nbdtest.RepErrTooBig)
		allocQ = "base:allocation"
	)
	meta := nbdtest.MetaData
	structured := step{sr, nil, ack}
	extended := step{ext, nil, ack}
	good := step{set, meta("first", allocQ), ack}
	tests := []struct {
		rule   string
		steps  []step
		name   string // for GO
		mode   int    // 0 simple, 1 structured, 2 extended
		status bool   // BLOCK_STATUS works
	}{
		{"nothing", nil, "first", 0, false},
		{"structured replies only", []step{structured}, "first", 1, false},
		{"extended headers only", []step{extended}, "first", 2, false},
		{"structured replies twice", []step{structured, {sr, nil, inval}}, "first", 1, false},
		{"structured replies with data, then without", []step{{sr, []byte("x"), inval}, structured}, "first", 1, false},
		{"extended headers twice", []step{extended, {ext, nil, inval}}, "first", 2, false},
		{"extended headers take precedence", []step{structured, extended}, "first", 2, false},
		{"structured replies after extended headers", []step{extended, {sr, nil, nbdtest.RepErrExtHeader}}, "first", 2, false},

		{"a context, structured", []step{structured, good}, "first", 1, true},
		{"a context, extended", []step{extended, good}, "first", 2, true},
		{"a context among unknown ones", []step{structured, {set, meta("first", "qemu:dirty-bitmap:x", "base:", "", "x", allocQ, allocQ), ack}}, "first", 1, true},
		{"a context before extended headers", []step{structured, good, extended}, "first", 2, true},
		{"a context for another export is void", []step{structured, good}, "read only", 1, false},
		{"a context for the default export by another name is void", []step{structured, {set, meta("", allocQ), ack}}, "first", 1, false},
		{"a context for the default export", []step{structured, {set, meta("", allocQ), ack}}, "", 1, true},
		{"no queries select nothing", []step{structured, good, {set, meta("first"), ack}}, "first", 1, false},
		{"base: selects nothing", []step{structured, {set, meta("first", "base:"), ack}}, "first", 1, false},
		{"a longer name selects nothing", []step{structured, {set, meta("first", allocQ+"x"), ack}}, "first", 1, false},
		{"a failing set removes the one before: unknown export", []step{structured, good, {set, meta("who", allocQ), unkn}}, "first", 1, false},
		{"a failing set removes the one before: malformed", []step{structured, good, {set, []byte{1}, inval}}, "first", 1, false},
		{"a failing set removes the one before: too big", []step{structured, good, {set, make([]byte, 60_000), tooBig}}, "first", 1, false},
		{"a failing set removes the one before: error after a match", []step{structured, {set, meta("first", allocQ, strings.Repeat("q", 4097)), inval}}, "first", 1, false},
		{"a list doesn't", []step{structured, good, {list, meta("first", "x"), ack}, {list, meta("who"), unkn}}, "first", 1, true},
		{"a failing GO doesn't", []step{structured, good, {nbdtest.OptGo, nbdtest.GoData("who"), unkn}}, "first", 1, true},
		{"a query of 4096 bytes is fine", []step{structured, {set, meta("first", strings.Repeat("q", 4096), allocQ), ack}}, "first", 1, true},
		{"a query of 4097 bytes is not", []step{structured, {list, meta("first", strings.Repeat("q", 4097)), inval}}, "first", 1, false},
		{"a name of 4097 bytes is not", []step{structured, {list, meta(strings.Repeat("n", 4097)), inval}}, "first", 1, false},
		{"no data", []step{structured, {list, nil, inval}, {set, nil, inval}}, "first", 1, false},
		{"name longer than the data", []step{structured, {list, be(nil, uint32(1<<32-1), "first", uint32(0)), inval}}, "first", 1, false},
		{"name as long as the data", []step{structured, {list, be(nil, uint32(9), "first", uint32(0)), inval}}, "first", 1, false},
		{"fewer queries than announced", []step{structured, {list, be(nil, uint32(5), "first", uint32(2), uint32(1), "x"), inval}}, "first", 1, false},
		{"2^32-1 queries announced", []step{structured, {list, be(nil, uint32(5), "first", uint32(1<<32-1)), inval}}, "first", 1, false},
		{"more data than queries", []step{structured, {list, append(meta("first", "x"), 0), inval}}, "first", 1, false},
		{"query longer than the data", []step{structured, {list, be(nil, uint32(5), "first", uint32(1), uint32(1<<31), "x"), inval}}, "first", 1, false},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			h.t = t
			c, result := h.greeted(3)
			for i, s := range tt.steps {
				replies, err := c.Option(s.opt, s.data)
				if err != nil {
					t.Fatal(err)
				}
				if got := replies[len(replies)-1]; got.Type != s.want {
					t.Fatalf("step %d: reply %#x %q, want %#x", i, got.Type, got.Data, s.want)
				}
			}
			if err := c.Go(tt.name); err != nil {
				t.Fatal(err)
			}
			if got := c.Flags&nbd.FlagSendDF != 0; got != (tt.mode > 0) {
				t.Errorf("SEND_DF is %v", got)
			}
			c.Extended = tt.mode == 2
			if err := c.Send(nbdtest.Request{Cmd: nbdtest.BlockStatus, Cookie: 7, Len: 512}, nil); err != nil {
				t.Fatal(err)
			}
			k, err := c.ReadChunk()
			if err != nil || k.Cookie != 7 || !k.Done() {
				t.Fatalf("BLOCK_STATUS: %+v, %v", k, err)
			}
			if magic := []uint32{0x67446698, 0x668e33ef, 0x6e8a278c}[tt.mode]; k.Magic != magic {
				t.Errorf("BLOCK_STATUS: magic %#x, want %#x", k.Magic, magic)
			}
			if want := map[bool]uint32{false: eINVAL}[tt.status]; k.Errno != want {
				t.Errorf("BLOCK_STATUS: error %d, want %d", k.Errno, want)
			}
			if err := c.Send(nbdtest.Request{Cmd: nbdtest.Disc}, nil); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, "Serve", result); err != nil {
				t.Errorf("Serve() = %v", err)
			}
		})
	}

	t.Run("replies to LIST_META_CONTEXT and SET_META_CONTEXT", func(t *testing.T) {
		h.t = t
		c, _ := h.greeted(3)
		option(t, c, sr, nil)
		for _, tt := range []struct {
			opt     uint32
			queries []string
			want    []byte // of the one reply before the ACK
		}{
			{list, nil, be(nil, uint32(0), allocQ)},
			{list, []string{"base:"}, be(nil, uint32(0), allocQ)},
			{list, []string{allocQ, "base:", allocQ}, be(nil, uint32(0), allocQ)},
			{list, []string{"base"}, nil},
			{list, []string{"qemu:"}, nil},
			{set, nil, nil},
			{set, []string{"base:"}, nil},
			{set, []string{allocQ}, be(nil, uint32(1), allocQ)},
		} {
			replies := option(t, c, tt.opt, meta("first", tt.queries...))
			want := []nbdtest.OptionReply{{Opt: tt.opt, Type: nbdtest.RepAck, Data: []byte{}}}
			if tt.want != nil {
				want = append([]nbdtest.OptionReply{{Opt: tt.opt, Type: nbdtest.RepMeta, Data: tt.want}}, want...)
			}
			if diff := cmp.Diff(want, replies); diff != "" {
				t.Errorf("option %d, %q (-want +got):\n%s", tt.opt, tt.queries, diff)
			}
		}
	})
	t.Run("EXPORT_NAME after structured replies and a context", func(t *testing.T) {
		h.t = t
		c, _ := h.greeted(3)
		option(t, c, sr, nil)
		option(t, c, set, meta("first", allocQ))
		in := nbdtest.AppendOption(nil, nbdtest.OptExportName, []byte("first"))
		in = nbdtest.Request{Cmd: nbdtest.BlockStatus, Cookie: 3, Len: 100}.Append(in)
		in = nbdtest.Request{Cmd: nbdtest.Disc}.Append(in)
		if _, err := c.Conn.Write(in); err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c.Conn)
		want := be(nil, uint64(1<<20+1), rwFlags|nbd.FlagSendTrim|nbd.FlagSendDF,
			uint32(0x668e33ef), uint16(1), uint16(5), uint64(3), uint32(12), uint32(1), uint32(100), uint32(0))
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("server sent %x, %v; want %x", got, err, want)
		}
	})
	t.Run("EXPORT_NAME after extended headers ends the connection", func(t *testing.T) {
		h.t = t
		c, result := h.greeted(3)
		option(t, c, ext, nil)
		if _, err := c.Conn.Write(nbdtest.AppendOption(nil, nbdtest.OptExportName, []byte("first"))); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c.Conn); err != nil || len(got) != 0 {
			t.Errorf("server sent %x, %v", got, err)
		}
		if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrProtocol) {
			t.Errorf("Serve() = %v, want %v", err, nbd.ErrProtocol)
		}
	})
}

// TestStructuredBytes checks the replies to requests of every kind bit for bit,
// with structured replies and with extended headers.
func TestStructuredBytes(t *testing.T) {
	const size = 5 << 30 // more than 32 bits
	var fail atomic.Bool
	dev := &sparseDevice{Device: nbdtest.NewDevice(1<<20, false), size: size}
	dev.Before = func(nbdtest.Op) error {
		if fail.Load() {
			return syscall.ENOSPC
		}
		return nil
	}
	data := pattern(4096, 1)
	if _, err := dev.Device.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	h := newHarness(t, nbd.Config{}, nbd.Export{Name: "x", Device: dev, Trim: true})

	const cookie = uint64(0xfedcba9876543210)
	sErr := func(e uint32) []byte {
		return be(nil, uint32(0x668e33ef), uint16(1), uint16(0x8001), cookie, uint32(6), e, uint16(0))
	}
	simple := func(e uint32) []byte { return be(nil, uint32(0x67446698), e, cookie) }
	xErr := func(off uint64, e uint32) []byte {
		return be(nil, uint32(0x6e8a278c), uint16(1), uint16(0x8001), cookie, off, uint64(6), e, uint16(0))
	}
	xNone := func(off uint64) []byte {
		return be(nil, uint32(0x6e8a278c), uint16(1), uint16(0), cookie, off, uint64(0))
	}
	type req = nbdtest.Request
	for _, tt := range []struct {
		rule    string
		ext     bool
		req     req
		payload int
		fails   bool // the device does
		want    []byte
		calls   int64
	}{
		{rule: "READ", req: req{Off: 7, Len: 1000}, calls: 1,
			want: be(nil, uint32(0x668e33ef), uint16(1), uint16(1), cookie, uint32(1008), uint64(7), data[7:1007])},
		{rule: "READ with DF", req: req{Len: 4096, Flags: nbdtest.DF}, calls: 1,
			want: be(nil, uint32(0x668e33ef), uint16(1), uint16(1), cookie, uint32(4104), uint64(0), data)},
		{rule: "READ with FUA", req: req{Len: 1, Flags: nbdtest.FUA}, calls: 1,
			want: be(nil, uint32(0x668e33ef), uint16(1), uint16(1), cookie, uint32(9), uint64(0), data[:1])},
		{rule: "READ of nothing", req: req{Off: 7}, want: be(nil, uint32(0x668e33ef), uint16(1), uint16(0), cookie, uint32(0))},
		{rule: "READ past the end", req: req{Off: size, Len: 1}, want: sErr(eINVAL)},
		{rule: "READ with a flag of another command", req: req{Len: 1, Flags: nbdtest.ReqOne}, want: sErr(eINVAL)},
		{rule: "READ of more than is served", req: req{Len: 32<<20 + 1}, want: sErr(eINVAL)},
		{rule: "READ that fails", req: req{Len: 4096}, fails: true, want: sErr(eNOSPC), calls: 1},
		{rule: "WRITE", req: req{Cmd: nbdtest.Write, Len: 4096}, payload: -1, want: simple(0), calls: 1},
		{rule: "WRITE that fails", req: req{Cmd: nbdtest.Write, Len: 4096}, payload: -1, fails: true, want: simple(eNOSPC), calls: 1},
		{rule: "WRITE with PAYLOAD_LEN", req: req{Cmd: nbdtest.Write, Flags: nbdtest.PayloadLen, Len: 4096}, payload: -1, want: simple(eINVAL)},
		{rule: "WRITE with DF", req: req{Cmd: nbdtest.Write, Flags: nbdtest.DF, Len: 4096}, payload: -1, want: simple(eINVAL)},
		{rule: "FLUSH", req: req{Cmd: nbdtest.Flush}, want: simple(0), calls: 1},
		{rule: "TRIM", req: req{Cmd: nbdtest.Trim, Off: 8192, Len: 1000}, want: simple(0), calls: 1},
		{rule: "CACHE", req: req{Cmd: nbdtest.Cache, Len: 1 << 31}, want: simple(0)},
		{rule: "CACHE with PAYLOAD_LEN: no payload", req: req{Cmd: nbdtest.Cache, Flags: nbdtest.PayloadLen, Len: 100}, want: simple(eINVAL)},
		{rule: "WRITE_ZEROES", req: req{Cmd: nbdtest.WriteZeroes, Off: 8192, Len: 1000}, want: simple(0), calls: 1},
		{rule: "WRITE_ZEROES with FAST_ZERO", req: req{Cmd: nbdtest.WriteZeroes, Flags: nbdtest.FastZero, Len: 1000}, want: simple(eNOTSUP)},
		{rule: "unknown command", req: req{Cmd: 77, Len: 1000}, want: simple(eINVAL)},
		{rule: "BLOCK_STATUS", req: req{Cmd: nbdtest.BlockStatus, Off: 5, Len: 1<<32 - 1},
			want: be(nil, uint32(0x668e33ef), uint16(1), uint16(5), cookie, uint32(12), uint32(1), uint32(1<<32-1), uint32(0))},
		{rule: "BLOCK_STATUS with REQ_ONE", req: req{Cmd: nbdtest.BlockStatus, Off: size - 1, Len: 1, Flags: nbdtest.ReqOne},
			want: be(nil, uint32(0x668e33ef), uint16(1), uint16(5), cookie, uint32(12), uint32(1), uint32(1), uint32(0))},
		{rule: "BLOCK_STATUS of nothing", req: req{Cmd: nbdtest.BlockStatus}, want: sErr(eINVAL)},
		{rule: "BLOCK_STATUS past the end", req: req{Cmd: nbdtest.BlockStatus, Off: size - 1, Len: 2}, want: sErr(eINVAL)},
		{rule: "BLOCK_STATUS, offset plus length overflows", req: req{Cmd: nbdtest.BlockStatus, Off: 1<<64 - 1, Len: 2}, want: sErr(eINVAL)},
		{rule: "BLOCK_STATUS with a flag of another command", req: req{Cmd: nbdtest.BlockStatus, Flags: nbdtest.DF, Len: 2}, want: sErr(eINVAL)},

		{rule: "READ", ext: true, req: req{Off: 7, Len: 1000, Flags: nbdtest.DF}, calls: 1,
			want: be(nil, uint32(0x6e8a278c), uint16(1), uint16(1), cookie, uint64(7), uint64(1008), uint64(7), data[7:1007])},
		{rule: "READ of nothing", ext: true, req: req{Off: 7}, want: xNone(7)},
		{rule: "READ of more than is served", ext: true, req: req{Off: 1, Len64: 1<<32 + 512}, want: xErr(1, eINVAL)},
		{rule: "READ of 2^64-1", ext: true, req: req{Len64: 1<<64 - 1}, want: xErr(0, eINVAL)},
		{rule: "READ that fails", ext: true, req: req{Off: 512, Len: 512}, fails: true, want: xErr(512, eNOSPC), calls: 1},
		{rule: "READ with PAYLOAD_LEN: the payload is consumed", ext: true, req: req{Len: 100, Flags: nbdtest.PayloadLen}, payload: -1, want: xErr(0, eINVAL)},
		{rule: "WRITE with PAYLOAD_LEN", ext: true, req: req{Cmd: nbdtest.Write, Off: 3, Len: 100, Flags: nbdtest.PayloadLen | nbdtest.FUA}, payload: -1, want: xNone(3), calls: 1},
		{rule: "WRITE without PAYLOAD_LEN is served", ext: true, req: req{Cmd: nbdtest.Write, Off: 3, Len: 100}, payload: -1, want: xNone(3), calls: 1},
		{rule: "WRITE past the end", ext: true, req: req{Cmd: nbdtest.Write, Off: size, Len: 100_000, Flags: nbdtest.PayloadLen}, payload: -1, want: xErr(size, eNOSPC)},
		{rule: "WRITE in pieces", ext: true, req: req{Cmd: nbdtest.Write, Len: 600 << 10, Flags: nbdtest.PayloadLen}, payload: -1, want: xNone(0), calls: 2},
		{rule: "WRITE of nothing", ext: true, req: req{Cmd: nbdtest.Write, Flags: nbdtest.PayloadLen}, want: xNone(0)},
		{rule: "WRITE longer than the maximum: consumed", ext: true, req: req{Cmd: nbdtest.Write, Len: 33 << 20, Flags: nbdtest.PayloadLen}, payload: -1, want: xErr(0, eINVAL)},
		{rule: "FLUSH", ext: true, req: req{Cmd: nbdtest.Flush}, want: xNone(0), calls: 1},
		{rule: "FLUSH with a length", ext: true, req: req{Cmd: nbdtest.Flush, Len64: 1 << 40}, want: xErr(0, eINVAL)},
		{rule: "TRIM of more than 4 GiB", ext: true, req: req{Cmd: nbdtest.Trim, Off: 1 << 20, Len64: size - 1<<20}, want: xNone(1 << 20), calls: 1},
		{rule: "TRIM past the end", ext: true, req: req{Cmd: nbdtest.Trim, Off: 1, Len64: size}, want: xErr(1, eINVAL)},
		{rule: "TRIM with PAYLOAD_LEN: the payload is consumed", ext: true, req: req{Cmd: nbdtest.Trim, Len: 70_000, Flags: nbdtest.PayloadLen}, payload: -1, want: xErr(0, eINVAL)},
		{rule: "WRITE_ZEROES of more than 4 GiB", ext: true, req: req{Cmd: nbdtest.WriteZeroes, Off: 1 << 20, Len64: size - 1<<20, Flags: nbdtest.NoHole}, want: xNone(1 << 20), calls: size / (16 << 20)},
		{rule: "WRITE_ZEROES, offset plus length overflows", ext: true, req: req{Cmd: nbdtest.WriteZeroes, Off: 1 << 20, Len64: 1<<64 - 1<<20}, want: xErr(1<<20, eNOSPC)},
		{rule: "WRITE_ZEROES with FAST_ZERO", ext: true, req: req{Cmd: nbdtest.WriteZeroes, Len64: size, Flags: nbdtest.FastZero}, want: xErr(0, eNOTSUP)},
		{rule: "CACHE of more than 4 GiB", ext: true, req: req{Cmd: nbdtest.Cache, Len64: size}, want: xNone(0)},
		{rule: "unknown command: its length is not payload", ext: true, req: req{Cmd: 77, Off: 9, Len64: 1<<64 - 1}, want: xErr(9, eINVAL)},
		{rule: "unknown command with PAYLOAD_LEN: the payload is consumed", ext: true, req: req{Cmd: 77, Len: 300, Flags: nbdtest.PayloadLen}, payload: -1, want: xErr(0, eINVAL)},
		{rule: "BLOCK_STATUS", ext: true, req: req{Cmd: nbdtest.BlockStatus, Off: 1, Len64: size - 1},
			want: be(nil, uint32(0x6e8a278c), uint16(1), uint16(6), cookie, uint64(1), uint64(24), uint32(1), uint32(1), uint64(size-1), uint64(0))},
		{rule: "BLOCK_STATUS with REQ_ONE", ext: true, req: req{Cmd: nbdtest.BlockStatus, Flags: nbdtest.ReqOne, Len: 1},
			want: be(nil, uint32(0x6e8a278c), uint16(1), uint16(6), cookie, uint64(0), uint64(24), uint32(1), uint32(1), uint64(1), uint64(0))},
		{rule: "BLOCK_STATUS with a payload, which isn't offered: consumed", ext: true, req: req{Cmd: nbdtest.BlockStatus, Flags: nbdtest.PayloadLen, Len: 12}, payload: -1, want: xErr(0, eINVAL)},
	} {
		t.Run(fmt.Sprintf("extended=%v/%s", tt.ext, tt.rule), func(t *testing.T) {
			h.t = t
			c, result := h.negotiate("x", tt.ext)
			fail.Store(tt.fails)
			defer fail.Store(false)
			before := dev.Calls()
			tt.req.Cookie = cookie
			if tt.payload < 0 {
				tt.payload = int(tt.req.Len)
			}
			payload := make([]byte, tt.payload)
			if tt.req.Cmd == nbdtest.Write && tt.req.Off < 4096 {
				copy(payload, data[tt.req.Off:]) // changes nothing
			}
			sent := make(chan error, 1)
			go func() { sent <- c.Send(tt.req, payload) }()
			got := make([]byte, len(tt.want))
			if _, err := io.ReadFull(c.Conn, got); err != nil {
				t.Fatalf("%v after %x", err, got)
			}
			if !bytes.Equal(got, tt.want) {
				t.Fatalf("reply\n%x, want\n%x", got[:min(64, len(got))], tt.want[:min(64, len(tt.want))])
			}
			if err := <-sent; err != nil {
				t.Fatal(err)
			}
			if n := dev.Calls() - before; n != tt.calls {
				t.Errorf("the device was called %d times, want %d", n, tt.calls)
			}
			fail.Store(false)
			// In step?
			if err := c.Send(nbdtest.Request{Off: 16, Len: 16, Cookie: 1}, nil); err != nil {
				t.Fatal(err)
			}
			if k, err := c.ReadChunk(); err != nil || k.Cookie != 1 || !bytes.Equal(k.Data, be(nil, uint64(16), data[16:32])) {
				t.Fatalf("next read: %+v, %v", k, err)
			}
			if err := c.Disconnect(); err != nil {
				t.Error(err)
			}
			if err := wait(t, "Serve", result); err != nil {
				t.Errorf("Serve() = %v", err)
			}
		})
	}

	for _, tt := range []struct {
		rule string
		in   []byte
	}{
		{"compact request with extended headers", be(nbdtest.Request{Len: 512}.Append(nil), uint32(0))},
		{"WRITE of more than 64 MiB", nbdtest.Request{Cmd: nbdtest.Write, Flags: nbdtest.PayloadLen, Len: 64<<20 + 1}.AppendExtended(nil)},
		{"WRITE of 2^63", nbdtest.Request{Cmd: nbdtest.Write, Len64: 1 << 63}.AppendExtended(nil)},
		{"READ with a payload of 2^64-1", nbdtest.Request{Flags: nbdtest.PayloadLen, Len64: 1<<64 - 1}.AppendExtended(nil)},
	} {
		t.Run("ends the connection: "+tt.rule, func(t *testing.T) {
			h.t = t
			c, result := h.negotiate("x", true)
			if _, err := c.Conn.Write(tt.in); err != nil {
				t.Fatal(err)
			}
			if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrProtocol) {
				t.Errorf("Serve() = %v, want %v", err, nbd.ErrProtocol)
			}
		})
	}
}

// sparseDevice says that it is larger than its memory. Only ranges within that
// may be read or written; trimming and zeroing beyond it does nothing.
type sparseDevice struct {
	*nbdtest.Device
	size int64
	more atomic.Int64
}

func (d *sparseDevice) Size() (int64, error) { return d.size, nil }
func (d *sparseDevice) Calls() int64         { return d.Device.Calls() + d.more.Load() }

func (d *sparseDevice) Trim(off, length int64, fua bool) error {
	if off >= 1<<20 {
		d.more.Add(1)
		return nil
	}
	return d.Device.Trim(off, length, fua)
}

func (d *sparseDevice) WriteZeroes(off, length int64, fua bool) error {
	if off >= 1<<20 {
		d.more.Add(1)
		return nil
	}
	return d.Device.WriteZeroes(off, length, fua)
}
