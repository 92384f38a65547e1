package nbd_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"syscall"
	"testing"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

const (
	ok       = uint32(0)
	ePERM    = uint32(syscall.EPERM)
	eIO      = uint32(syscall.EIO)
	eNOMEM   = uint32(syscall.ENOMEM)
	eINVAL   = uint32(syscall.EINVAL)
	eNOSPC   = uint32(syscall.ENOSPC)
	eNOTSUP  = uint32(syscall.ENOTSUP)
	eSHUTDWN = uint32(syscall.ESHUTDOWN)
)

// A growing device has the size that it is told to have.
type growing struct {
	*nbdtest.Async
	size atomic.Int64
}

func (g *growing) Size() (int64, error) { return g.size.Load(), nil }

// TestDeviceGrows: what is beyond the end of a device is within it when it has
// grown, for the kernel. A client that did a handshake keeps the size that it was
// told, until it connects again.
func TestDeviceGrows(t *testing.T) {
	const before, after = 1 << 20, 2<<20 + 4096
	a, err := nbdtest.NewAsync(nbdtest.NewDevice(after, false))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() }) // after the harness's
	g := &growing{Async: a}
	g.size.Store(before)
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: g})
	ours, theirs := socketpair(t)
	defer ours.Close()
	h.serves.Go(func() { h.s.ServeTransmission(h.ctx, theirs, ""); theirs.Close() })
	kernel := &nbdtest.Client{Conn: ours}
	client, _ := h.dial("")

	p := pattern(8192, 1)
	for _, tt := range []struct {
		off    uint64
		before uint32
	}{{before - 8192, ok}, {before - 4096, eNOSPC}, {before, eNOSPC}, {after - 8192, eNOSPC}} {
		for name, c := range map[string]*nbdtest.Client{"kernel": kernel, "client": client} {
			if errno, err := c.Write(p, tt.off, 0); err != nil || errno != tt.before {
				t.Errorf("%s: write at %d before: error %d, %v; want %d", name, tt.off, errno, err, tt.before)
			}
		}
	}
	g.size.Store(after)
	for _, off := range []uint64{before - 4096, before, after - 8192} {
		if errno, err := kernel.Write(p, off, nbdtest.FUA); err != nil || errno != ok {
			t.Errorf("kernel: write at %d after: error %d, %v", off, errno, err)
		}
		got := make([]byte, len(p))
		if errno, err := kernel.Read(got, off); err != nil || errno != ok || !bytes.Equal(got, p) {
			t.Errorf("kernel: read at %d after: error %d, %v, equal %v", off, errno, err, bytes.Equal(got, p))
		}
		if errno, err := client.Write(p, off, 0); err != nil || errno != eNOSPC {
			t.Errorf("client: write at %d after: error %d, %v; want %d", off, errno, err, eNOSPC)
		}
	}
	if errno, err := kernel.Write(p, after-4096, 0); err != nil || errno != eNOSPC {
		t.Errorf("kernel: write over the new end: error %d, %v; want %d", errno, err, eNOSPC)
	}
	again, _ := h.dial("")
	if errno, err := again.Write(p, after-8192, 0); err != nil || errno != ok {
		t.Errorf("client that connects again: write at the new end: error %d, %v", errno, err)
	}
}

// TestTransmissionRules sends one request each and checks its reply, and then,
// by a read whose result is known, that the connection is still in step.
func TestTransmissionRules(t *testing.T) {
	const size = 1<<20 + 5 // no multiple of anything
	const huge = nbd.MaxPayload

	type row struct {
		rule   string
		export string // "rw" if empty
		req    nbdtest.Request
		data   int // bytes of payload sent; -1: req.Len
		want   uint32
		calls  int64 // what the device sees
	}
	const (
		read  = nbdtest.Read
		write = nbdtest.Write
		flush = nbdtest.Flush
		trim  = nbdtest.Trim
		zero  = nbdtest.WriteZeroes
	)
	tests := []row{
		{rule: "READ: any alignment is served", req: nbdtest.Request{Cmd: read, Off: 1, Len: 4097}, want: ok, calls: 1},
		{rule: "READ: up to the last byte", req: nbdtest.Request{Cmd: read, Off: size - 1, Len: 1}, want: ok, calls: 1},
		{rule: "READ: the whole device", req: nbdtest.Request{Cmd: read, Len: size}, want: ok, calls: 1},
		{rule: "READ: FUA is tolerated", req: nbdtest.Request{Cmd: read, Flags: nbdtest.FUA, Len: 512}, want: ok, calls: 1},
		{rule: "READ: DF without structured replies is invalid", req: nbdtest.Request{Cmd: read, Flags: nbdtest.DF, Len: 512}, want: eINVAL},
		{rule: "READ: NO_HOLE is invalid", req: nbdtest.Request{Cmd: read, Flags: nbdtest.NoHole, Len: 512}, want: eINVAL},
		{rule: "READ: one byte past the end is invalid", req: nbdtest.Request{Cmd: read, Off: size - 511, Len: 512}, want: eINVAL},
		{rule: "READ: at the end is invalid", req: nbdtest.Request{Cmd: read, Off: size, Len: 1}, want: eINVAL},
		{rule: "READ: offset plus length overflows 64 bits", req: nbdtest.Request{Cmd: read, Off: 1<<64 - 512, Len: 1024}, want: eINVAL},
		{rule: "READ: offset is negative as int64", req: nbdtest.Request{Cmd: read, Off: 1 << 63, Len: 512}, want: eINVAL},
		{rule: "READ: zero length is answered", req: nbdtest.Request{Cmd: read, Off: 7}, want: ok},
		{rule: "READ: zero length at the end is answered", req: nbdtest.Request{Cmd: read, Off: size}, want: ok},
		{rule: "READ: zero length past the end is invalid", req: nbdtest.Request{Cmd: read, Off: size + 1}, want: eINVAL},
		{rule: "READ: longer than the maximum payload is invalid", req: nbdtest.Request{Cmd: read, Len: huge + 1}, want: eINVAL},
		{rule: "READ: the longest length is invalid", req: nbdtest.Request{Cmd: read, Len: 1<<32 - 1}, want: eINVAL},
		{rule: "READ: works on a read-only export", export: "ro", req: nbdtest.Request{Cmd: read, Len: 512}, want: ok, calls: 1},

		{rule: "WRITE: any alignment is served", req: nbdtest.Request{Cmd: write, Off: 1, Len: 4097}, data: -1, want: ok, calls: 1},
		{rule: "WRITE: up to the last byte", req: nbdtest.Request{Cmd: write, Off: size - 1, Len: 1}, data: -1, want: ok, calls: 1},
		{rule: "WRITE: FUA", req: nbdtest.Request{Cmd: write, Flags: nbdtest.FUA, Len: 512}, data: -1, want: ok, calls: 1},
		{rule: "WRITE: one byte past the end: no space, payload consumed", req: nbdtest.Request{Cmd: write, Off: size - 511, Len: 512}, data: -1, want: eNOSPC},
		{rule: "WRITE: offset plus length overflows: no space, payload consumed", req: nbdtest.Request{Cmd: write, Off: 1<<64 - 512, Len: 1024}, data: -1, want: eNOSPC},
		{rule: "WRITE: negative offset: no space, payload consumed", req: nbdtest.Request{Cmd: write, Off: 1 << 63, Len: 100_000}, data: -1, want: eNOSPC},
		{rule: "WRITE: unknown flag: invalid, payload consumed", req: nbdtest.Request{Cmd: write, Flags: 1 << 15, Len: 512}, data: -1, want: eINVAL},
		{rule: "WRITE: NO_HOLE: invalid, payload consumed", req: nbdtest.Request{Cmd: write, Flags: nbdtest.NoHole, Len: 512}, data: -1, want: eINVAL},
		{rule: "WRITE: PAYLOAD_LEN: invalid, payload consumed", req: nbdtest.Request{Cmd: write, Flags: nbdtest.PayloadLen, Len: 512}, data: -1, want: eINVAL},
		{rule: "WRITE: zero length is answered", req: nbdtest.Request{Cmd: write, Off: 7}, want: ok},
		{rule: "WRITE: zero length past the end: no space", req: nbdtest.Request{Cmd: write, Off: size + 1}, want: eNOSPC},
		{rule: "WRITE: longer than the maximum payload: invalid, payload consumed", req: nbdtest.Request{Cmd: write, Len: huge + 1}, data: -1, want: eINVAL},
		{rule: "WRITE: 64 MiB: invalid, payload consumed", req: nbdtest.Request{Cmd: write, Len: 64 << 20}, data: -1, want: eINVAL},
		{rule: "WRITE: read-only: not permitted, payload consumed", export: "ro", req: nbdtest.Request{Cmd: write, Len: 512}, data: -1, want: ePERM},
		{rule: "WRITE: read-only and long: not permitted, payload consumed", export: "ro", req: nbdtest.Request{Cmd: write, Len: 1 << 20}, data: -1, want: ePERM},
		{rule: "WRITE: read-only and empty: not permitted", export: "ro", req: nbdtest.Request{Cmd: write}, want: ePERM},

		{rule: "FLUSH", req: nbdtest.Request{Cmd: flush}, want: ok, calls: 1},
		{rule: "FLUSH: FUA is tolerated", req: nbdtest.Request{Cmd: flush, Flags: nbdtest.FUA}, want: ok, calls: 1},
		{rule: "FLUSH: an offset is invalid", req: nbdtest.Request{Cmd: flush, Off: 1}, want: eINVAL},
		{rule: "FLUSH: a length is invalid, and no payload", req: nbdtest.Request{Cmd: flush, Len: 512}, want: eINVAL},
		{rule: "FLUSH: unknown flag is invalid", req: nbdtest.Request{Cmd: flush, Flags: nbdtest.ReqOne}, want: eINVAL},
		{rule: "FLUSH: works on a read-only export", export: "ro", req: nbdtest.Request{Cmd: flush}, want: ok, calls: 1},

		{rule: "TRIM", req: nbdtest.Request{Cmd: trim, Len: 512}, want: ok, calls: 1},
		{rule: "TRIM: FUA", req: nbdtest.Request{Cmd: trim, Flags: nbdtest.FUA, Len: 512}, want: ok, calls: 1},
		{rule: "TRIM: NO_HOLE is invalid", req: nbdtest.Request{Cmd: trim, Flags: nbdtest.NoHole, Len: 512}, want: eINVAL},
		{rule: "TRIM: past the end is invalid", req: nbdtest.Request{Cmd: trim, Off: size - 511, Len: 512}, want: eINVAL},
		{rule: "TRIM: the longest length past the end is invalid, and no payload", req: nbdtest.Request{Cmd: trim, Len: 1<<32 - 1}, want: eINVAL},
		{rule: "TRIM: zero length is answered", req: nbdtest.Request{Cmd: trim}, want: ok},
		{rule: "TRIM: not advertised: invalid, and no payload", export: "notrim", req: nbdtest.Request{Cmd: trim, Len: 512}, want: eINVAL},
		{rule: "TRIM: read-only: not permitted", export: "ro", req: nbdtest.Request{Cmd: trim, Len: 512}, want: ePERM},
		{rule: "TRIM: may exceed the maximum payload", export: "large", req: nbdtest.Request{Cmd: trim, Len: huge + 512}, want: ok, calls: 1},

		{rule: "WRITE_ZEROES", req: nbdtest.Request{Cmd: zero, Len: 512}, want: ok, calls: 1},
		{rule: "WRITE_ZEROES: FUA and NO_HOLE", req: nbdtest.Request{Cmd: zero, Flags: nbdtest.FUA | nbdtest.NoHole, Len: 512}, want: ok, calls: 1},
		{rule: "WRITE_ZEROES: FAST_ZERO is never fast, and nothing changes", req: nbdtest.Request{Cmd: zero, Flags: nbdtest.FastZero, Len: 512}, want: eNOTSUP},
		{rule: "WRITE_ZEROES: FAST_ZERO with FUA and NO_HOLE", req: nbdtest.Request{Cmd: zero, Flags: nbdtest.FastZero | nbdtest.FUA | nbdtest.NoHole, Len: 512}, want: eNOTSUP},
		{rule: "WRITE_ZEROES: FAST_ZERO past the end: no space", req: nbdtest.Request{Cmd: zero, Flags: nbdtest.FastZero, Off: size, Len: 512}, want: eNOSPC},
		{rule: "WRITE_ZEROES: FAST_ZERO on a read-only export, where it isn't advertised, is invalid", export: "ro", req: nbdtest.Request{Cmd: zero, Flags: nbdtest.FastZero, Len: 512}, want: eINVAL},
		{rule: "WRITE_ZEROES: past the end: no space", req: nbdtest.Request{Cmd: zero, Off: size - 511, Len: 512}, want: eNOSPC},
		{rule: "WRITE_ZEROES: the longest length past the end: no space, and no payload", req: nbdtest.Request{Cmd: zero, Len: 1<<32 - 1}, want: eNOSPC},
		{rule: "WRITE_ZEROES: zero length is answered", req: nbdtest.Request{Cmd: zero}, want: ok},
		{rule: "WRITE_ZEROES: read-only: not permitted", export: "ro", req: nbdtest.Request{Cmd: zero, Len: 512}, want: ePERM},
		{rule: "WRITE_ZEROES: may exceed the maximum payload", export: "large", req: nbdtest.Request{Cmd: zero, Len: huge + 512}, want: ok, calls: 3},

		{rule: "CACHE", req: nbdtest.Request{Cmd: nbdtest.Cache, Len: 512}, want: ok},
		{rule: "CACHE: FUA is tolerated", req: nbdtest.Request{Cmd: nbdtest.Cache, Flags: nbdtest.FUA, Len: 512}, want: ok},
		{rule: "CACHE: past the end is invalid", req: nbdtest.Request{Cmd: nbdtest.Cache, Off: size - 511, Len: 512}, want: eINVAL},
		{rule: "CACHE: zero length is answered", req: nbdtest.Request{Cmd: nbdtest.Cache}, want: ok},
		{rule: "CACHE: works on a read-only export", export: "ro", req: nbdtest.Request{Cmd: nbdtest.Cache, Len: 512}, want: ok},
		{rule: "CACHE: may exceed the maximum payload", export: "large", req: nbdtest.Request{Cmd: nbdtest.Cache, Len: huge + 512}, want: ok},
		{rule: "BLOCK_STATUS without a context: invalid, connection stays", req: nbdtest.Request{Cmd: nbdtest.BlockStatus, Flags: nbdtest.ReqOne, Len: 512}, want: eINVAL},
		{rule: "RESIZE: invalid, connection stays", req: nbdtest.Request{Cmd: nbdtest.Resize, Off: 1 << 20}, want: eINVAL},
		{rule: "unknown command: invalid, its length is not payload", req: nbdtest.Request{Cmd: 0xffff, Len: 1 << 20}, want: eINVAL},
	}
	// Every flag that isn't offered, on every command, must not do anything.
	for _, cmd := range []uint16{read, write, flush, trim, zero, nbdtest.Cache} {
		for bit := range 16 {
			flag := uint16(1) << bit
			if flag == nbdtest.FUA || cmd == zero && (flag == nbdtest.NoHole || flag == nbdtest.FastZero) {
				continue
			}
			r := row{rule: fmt.Sprintf("command %d: flag %#x is invalid", cmd, flag), req: nbdtest.Request{Cmd: cmd, Flags: flag}, want: eINVAL}
			if cmd != flush {
				r.req.Len = 512
			}
			if cmd == write {
				r.data = -1
			}
			tests = append(tests, r)
		}
	}

	devices := map[string]*nbdtest.Device{
		"rw":     nbdtest.NewDevice(size, false),
		"ro":     nbdtest.NewDevice(size, false),
		"notrim": nbdtest.NewDevice(size, false),
		"large":  nbdtest.NewDevice(huge+4096, false),
	}
	h := newHarness(t, nbd.Config{},
		nbd.Export{Name: "rw", Device: devices["rw"], Trim: true},
		nbd.Export{Name: "ro", Device: devices["ro"], ReadOnly: true, Trim: true},
		nbd.Export{Name: "notrim", Device: devices["notrim"]},
		nbd.Export{Name: "large", Device: devices["large"], Trim: true},
	)
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			if tt.export == "" {
				tt.export = "rw"
			}
			h.t = t
			c, result := h.dial(tt.export)
			d := devices[tt.export]
			if tt.data < 0 {
				tt.data = int(tt.req.Len)
			}
			tt.req.Cookie = 0x0123456789abcdef
			before := d.Calls()

			sent := make(chan error, 1)
			go func() { sent <- c.Send(tt.req, make([]byte, tt.data)) }()
			errno, cookie, err := c.ReadReply()
			if err != nil || errno != tt.want || cookie != tt.req.Cookie {
				t.Fatalf("reply to %+v: error %d, cookie %#x, %v; want %d, %#x", tt.req, errno, cookie, err, tt.want, tt.req.Cookie)
			}
			if err := <-sent; err != nil {
				t.Fatalf("sending: %v", err)
			}
			if tt.req.Cmd == read && errno == 0 {
				got := make([]byte, tt.req.Len)
				if _, err := io.ReadFull(c.Conn, got); err != nil {
					t.Fatal(err)
				}
				if want := d.Bytes(int64(tt.req.Off), int64(tt.req.Len)); !bytes.Equal(got, want) {
					t.Error("read returned other bytes than the device has")
				}
			}
			if n := d.Calls() - before; n != tt.calls {
				t.Errorf("%+v called the device %d times, want %d", tt.req, n, tt.calls)
			}

			// In step? A read has no other way to be right.
			got := make([]byte, 4096)
			if errno, err := c.Read(got, 4096); errno != 0 || err != nil || !bytes.Equal(got, d.Bytes(4096, 4096)) {
				t.Fatalf("next read: error %d, %v", errno, err)
			}
			if err := c.Disconnect(); err != nil {
				t.Error(err)
			}
			if err := wait(t, "Serve", result); err != nil {
				t.Errorf("Serve() = %v after a disconnect", err)
			}
		})
	}
}

// TestTransmissionEnds has the requests after which the connection must end.
func TestTransmissionEnds(t *testing.T) {
	dev := nbdtest.NewDevice(1<<20, false)
	tests := []struct {
		rule string
		in   []byte // then the client closes its sending half
		want error
	}{
		{"wrong request magic", nbdtest.Request{Magic: 0x67446698, Len: 1}.Append(nil), nbd.ErrProtocol},
		{"extended request magic", nbdtest.Request{Magic: 0x21e41c71, Len: 1}.Append(nil), nbd.ErrProtocol},
		{"WRITE of more than 64 MiB", nbdtest.Request{Cmd: nbdtest.Write, Len: 64<<20 + 1}.Append(nil), nbd.ErrProtocol},
		{"WRITE of 4 GiB", nbdtest.Request{Cmd: nbdtest.Write, Len: 1<<32 - 1}.Append(nil), nbd.ErrProtocol},
		{"DISC", nbdtest.Request{Cmd: nbdtest.Disc}.Append(nil), nil},
		{"DISC with everything set", nbdtest.Request{Cmd: nbdtest.Disc, Flags: 0xffff, Off: 1 << 63, Len: 1<<32 - 1}.Append(nil), nil},
		{"DISC, and requests after it are not looked at", append(nbdtest.Request{Cmd: nbdtest.Disc}.Append(nil), make([]byte, 100)...), nil},
		{"end of stream between requests", nil, io.EOF},
		{"end of stream in a header", nbdtest.Request{}.Append(nil)[:27], io.ErrUnexpectedEOF},
		{"end of stream in a short payload", append(nbdtest.Request{Cmd: nbdtest.Write, Len: 512}.Append(nil), make([]byte, 511)...), io.ErrUnexpectedEOF},
		{"end of stream in a payload with its own buffer", append(nbdtest.Request{Cmd: nbdtest.Write, Len: 100_000}.Append(nil), make([]byte, 99_999)...), io.ErrUnexpectedEOF},
		{"end of stream before the second piece of a payload", append(nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}.Append(nil), make([]byte, 512<<10)...), io.ErrUnexpectedEOF},
		{"end of stream in the second piece of a payload", append(nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}.Append(nil), make([]byte, 600<<10)...), io.ErrUnexpectedEOF},
		{"end of stream in a refused payload", append(nbdtest.Request{Cmd: nbdtest.Write, Off: 1 << 40, Len: 1 << 20}.Append(nil), make([]byte, 600<<10)...), io.ErrUnexpectedEOF},
	}
	for _, tt := range tests {
		t.Run(tt.rule, func(t *testing.T) {
			h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
			c, result := h.dial("")
			// A request before it has to be answered all the same.
			in := append(nbdtest.Request{Cmd: nbdtest.Flush, Cookie: 42}.Append(nil), tt.in...)
			go func() {
				c.Conn.Write(in)
				c.Conn.(interface{ CloseWrite() error }).CloseWrite()
			}()
			if errno, cookie, err := c.ReadReply(); errno != 0 || cookie != 42 || err != nil {
				t.Fatalf("reply to the request before: error %d, cookie %d, %v", errno, cookie, err)
			}
			if _, _, err := c.ReadReply(); err == nil {
				t.Error("got a second reply")
			}
			if err := wait(t, "Serve", result); !errors.Is(err, tt.want) || tt.want == nil && err != nil {
				t.Errorf("Serve() = %v, want %v", err, tt.want)
			}
		})
	}
}

// TestDeviceErrors checks how the errors of a device are sent, and that the
// connection lives on.
func TestDeviceErrors(t *testing.T) {
	var fault atomic.Pointer[func(nbdtest.Op) error]
	fails := func(f func(nbdtest.Op) error) { fault.Store(&f) }
	always := func(err error) { fails(func(nbdtest.Op) error { return err }) }
	always(nil)
	var short atomic.Int64
	short.Store(-1)
	dev := nbdtest.NewDevice(4<<20, false)
	dev.Before = func(op nbdtest.Op) error { return (*fault.Load())(op) }
	dev.Short = func(op nbdtest.Op) int64 {
		if n := short.Load(); n >= 0 {
			return n
		}
		return op.Len
	}
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev, Trim: true})
	c, _ := h.dial("")

	errnos := []struct {
		err  error
		want uint32
	}{
		{syscall.EPERM, ePERM}, {syscall.EACCES, ePERM}, {syscall.EROFS, ePERM},
		{syscall.ENOSPC, eNOSPC}, {syscall.EDQUOT, eNOSPC}, {syscall.EFBIG, eNOSPC},
		{syscall.ENOMEM, eNOMEM}, {syscall.EINVAL, eINVAL}, {syscall.ESHUTDOWN, eSHUTDWN},
		{syscall.EIO, eIO}, {syscall.ENXIO, eIO}, {syscall.EOVERFLOW, eIO},
		{errors.New("something else"), eIO}, {io.ErrUnexpectedEOF, eIO},
		{fmt.Errorf("sector: writing sector 7: %w", syscall.ENOSPC), eNOSPC},
		{errors.Join(errors.New("both"), syscall.EROFS), ePERM},
	}
	requests := []nbdtest.Request{
		{Cmd: nbdtest.Read, Len: 4096},
		{Cmd: nbdtest.Write, Len: 4096},
		{Cmd: nbdtest.Write, Len: 4096, Flags: nbdtest.FUA},
		{Cmd: nbdtest.Write, Len: 2 << 20},
		{Cmd: nbdtest.Write, Len: 2 << 20, Flags: nbdtest.FUA},
		{Cmd: nbdtest.Flush},
		{Cmd: nbdtest.Trim, Len: 4096},
		{Cmd: nbdtest.WriteZeroes, Len: 4096},
	}
	buf := make([]byte, 2<<20)
	for _, req := range requests {
		for _, e := range errnos {
			always(e.err)
			if errno, err := c.Do(req, buf[:req.Len]); errno != e.want || err != nil {
				t.Errorf("%+v when the device says %v: error %d, %v; want %d", req, e.err, errno, err, e.want)
			}
		}
		always(nil)
		if errno, err := c.Do(req, buf[:req.Len]); errno != 0 || err != nil {
			t.Errorf("%+v after errors: error %d, %v", req, errno, err)
		}
	}

	t.Run("an unsupported trim is a hint not followed", func(t *testing.T) {
		always(fmt.Errorf("wrapped: %w", syscall.EOPNOTSUPP))
		defer always(nil)
		if errno, err := c.Do(nbdtest.Request{Cmd: nbdtest.Trim, Len: 512}, nil); errno != 0 || err != nil {
			t.Errorf("error %d, %v", errno, err)
		}
		if errno, err := c.Do(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 512}, nil); errno != eIO || err != nil {
			t.Errorf("WRITE_ZEROES: error %d, %v; want %d", errno, err, eIO)
		}
	})
	t.Run("a short read or write without an error is one", func(t *testing.T) {
		defer short.Store(-1)
		for _, n := range []int64{0, 1, 511, 4095} {
			short.Store(n)
			for _, req := range requests[:3] {
				if errno, err := c.Do(req, buf[:req.Len]); errno != eIO || err != nil {
					t.Errorf("%+v cut to %d bytes: error %d, %v; want %d", req, n, errno, err, eIO)
				}
			}
		}
	})
	t.Run("one failed piece fails a long write, and the payload is consumed", func(t *testing.T) {
		fails(func(op nbdtest.Op) error {
			if op.Off == 512<<10 {
				return syscall.ENOSPC
			}
			return nil
		})
		if errno, err := c.Write(make([]byte, 4<<20), 0, nbdtest.FUA); errno != eNOSPC || err != nil {
			t.Errorf("error %d, %v; want %d", errno, err, eNOSPC)
		}
		if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
			t.Errorf("next read: error %d, %v", errno, err)
		}
	})
	if st := h.s.Stats(); st.Errors == 0 {
		t.Error("Stats().Errors = 0")
	}
}

// eofDevice returns io.EOF along with the last bytes, as io.ReaderAt allows.
type eofDevice struct{ *nbdtest.Device }

func (d eofDevice) ReadAt(p []byte, off int64) (int, error) {
	n, err := d.Device.ReadAt(p, off)
	if err == nil {
		err = io.EOF
	}
	return n, err
}

func TestReadWithEOF(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: eofDevice{nbdtest.NewDevice(4096, false)}})
	c, _ := h.dial("")
	if errno, err := c.Read(make([]byte, 4096), 0); errno != 0 || err != nil {
		t.Errorf("error %d, %v", errno, err)
	}
}

// TestDurability checks the promise of the package doc against a device with a
// volatile cache.
func TestDurability(t *testing.T) {
	const size = 8 << 20
	for _, n := range []int{512, 4096, 100_000, 1 << 20, 3<<20 + 1} {
		t.Run(fmt.Sprintf("bytes=%d", n), func(t *testing.T) {
			dev := nbdtest.NewDevice(size, true)
			h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev, Trim: true})
			a, _ := h.dial("")
			b, _ := h.dial("")
			data := pattern(n, 1)
			zeros := make([]byte, n)

			// The device is what it says it is.
			if errno, err := a.Write(data, 0, 0); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			dev.PowerCut()
			if !bytes.Equal(dev.Bytes(0, int64(n)), zeros) {
				t.Fatal("a write without FUA or FLUSH survived: this test can't fail")
			}

			// A flush on one connection covers what was answered on another.
			if errno, err := a.Write(data, 0, 0); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			if errno, err := b.Do(nbdtest.Request{Cmd: nbdtest.Flush}, nil); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			dev.PowerCut()
			if !bytes.Equal(dev.Bytes(0, int64(n)), data) {
				t.Error("a write answered before a flush on another connection was lost")
			}

			// FUA needs no flush.
			if errno, err := a.Write(data, 4<<20, nbdtest.FUA); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			dev.PowerCut()
			if !bytes.Equal(dev.Bytes(4<<20, int64(n)), data) {
				t.Error("a write with FUA was lost")
			}
			if errno, err := a.Do(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Flags: nbdtest.FUA, Off: 4 << 20, Len: uint32(n)}, nil); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			dev.PowerCut()
			if !bytes.Equal(dev.Bytes(4<<20, int64(n)), zeros) {
				t.Error("zeros with FUA were lost")
			}
		})
	}
}
