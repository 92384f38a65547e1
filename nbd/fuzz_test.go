package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"syscall"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// received is a connection as far as a client reads from it what has come.
type received struct {
	net.Conn
	b []byte
}

func (r *received) Read(p []byte) (int, error) {
	if len(r.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.b)
	r.b = r.b[n:]
	return n, nil
}

func (*received) Write(p []byte) (int, error) { return len(p), nil }

// feed runs serve with a peer that sends in, step bytes at a time, or all at once if
// that is 0, then closes its sending half, and takes everything. It returns that.
func feed(t *testing.T, serve func(net.Conn) error, in []byte, step int) (out []byte, err error) {
	t.Helper()
	client, server := socketpair(t)
	defer client.Close()
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	var peer sync.WaitGroup
	peer.Go(func() {
		if step == 0 {
			step = len(in)
		}
		step = max(step, len(in)/1000+1)
		for len(in) > 0 {
			n, err := client.Write(in[:min(step, len(in))])
			if err != nil {
				return // the server has ended before
			}
			in = in[n:]
		}
		client.CloseWrite()
	})
	peer.Go(func() {
		var err error
		if out, err = io.ReadAll(client); err != nil && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("reading: %v", err)
		}
	})
	err = serve(server)
	server.Close()
	peer.Wait()
	return out, err
}

// fuzzServers returns a server with each engine.
func fuzzServers(f *testing.F) (servers []*nbd.Server, size uint64) {
	size = 1<<20 + 7
	for _, e := range []nbd.Engine{nbd.EnginePortable, nbd.EngineURing} {
		exports := []nbd.Export{{Name: "a", Description: "d", Trim: true}, {Name: "b", ReadOnly: true}}
		dev, err := nbdtest.NewAsync(nbdtest.NewDevice(int64(size), false))
		if err != nil {
			f.Fatal(err)
		}
		for i := range exports {
			exports[i].Device = dev
		}
		s, err := nbd.New(nbd.Config{InFlight: 2, Engine: e}, exports...)
		if err != nil {
			f.Fatal(err)
		}
		f.Cleanup(func() {
			if err := errors.Join(s.Close(), dev.Close()); err != nil {
				f.Error(err)
			}
		})
		if s.Engine() != e {
			f.Fatalf("Engine() = %q, want %q", s.Engine(), e)
		}
		servers = append(servers, s)
	}
	return servers, size
}

func atRest(t *testing.T, s *nbd.Server) {
	t.Helper()
	if st := s.Stats(); st.Connections != 0 || st.InFlight != 0 || st.Arena.Used != 0 {
		t.Fatalf("Stats() = %+v, want nothing in use", st)
	}
}

// FuzzHandshake sends anything after the greeting. Whatever the server answers
// must be a greeting and well-formed replies to options that were sent, and, if
// one of them was a GO with success, replies to requests.
func FuzzHandshake(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	opt := func(o uint32, data []byte) []byte { return nbdtest.AppendOption(bytes.Clone(flags), o, data) }
	f.Add([]byte{}, byte(0))
	f.Add(opt(nbdtest.OptList, nil), byte(0))
	f.Add(opt(nbdtest.OptAbort, nil), byte(3))
	f.Add(opt(nbdtest.OptInfo, nbdtest.GoData("a", 0, 1, 2, 3, 4)), byte(1))
	f.Add(opt(nbdtest.OptGo, nbdtest.GoData("nobody")), byte(0))
	f.Add(nbdtest.Request{Len: 512}.Append(opt(nbdtest.OptGo, nbdtest.GoData("b"))), byte(0))
	f.Add(nbdtest.AppendOption([]byte{0, 0, 0, 1}, nbdtest.OptExportName, []byte("a")), byte(0))
	f.Add(opt(nbdtest.OptStructuredReply, []byte("data")), byte(7))
	more := func(b []byte, o uint32, data []byte) []byte { return nbdtest.AppendOption(bytes.Clone(b), o, data) }
	structured := opt(nbdtest.OptStructuredReply, nil)
	f.Add(more(structured, nbdtest.OptListMeta, nbdtest.MetaData("a")), byte(0))
	f.Add(more(structured, nbdtest.OptListMeta, nbdtest.MetaData("b", "base:", "qemu:")), byte(1))
	f.Add(more(structured, nbdtest.OptSetMeta, nbdtest.MetaData("a", "base:allocation", "")), byte(0))
	f.Add(more(structured, nbdtest.OptSetMeta, []byte{0, 0, 0, 1, 'a', 0xff, 0xff, 0xff, 0xff}), byte(0))
	f.Add(more(structured, nbdtest.OptExtendedHeaders, nil), byte(0))
	f.Add(more(opt(nbdtest.OptExtendedHeaders, nil), nbdtest.OptStructuredReply, nil), byte(0))
	f.Add(more(opt(nbdtest.OptExtendedHeaders, nil), nbdtest.OptExportName, []byte("a")), byte(0))
	f.Add(more(opt(nbdtest.OptStartTLS, nil), nbdtest.OptList, nil), byte(2))
	servers, _ := fuzzServers(f)
	check := func(t *testing.T, s *nbd.Server, in []byte, step byte) {
		out, err := feed(t, func(c net.Conn) error { return s.Serve(context.Background(), c) }, in, int(step))
		atRest(t, s)
		c := &nbdtest.Client{Conn: &received{b: out}}
		if _, err := c.Greet(0); err != nil {
			t.Fatalf("greeting: %v", err)
		}
		for {
			r, err2 := c.ReadOptionReply()
			switch {
			case err2 == io.EOF && err != nil && !errors.Is(err, nbd.ErrProtocol) && !errors.Is(err, io.EOF) &&
				!errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, nbd.ErrUnknownExport):
				t.Fatalf("Serve() = %v", err)
			case err2 == io.EOF:
				return
			case err2 != nil:
				// EXPORT_NAME has a reply without a header, after which there
				// are no more options.
				name := nbdtest.AppendOption(nil, nbdtest.OptExportName, nil)[:12]
				if !bytes.Contains(in, name) {
					t.Fatalf("reply: %v", err2)
				}
				return
			}
			if !bytes.Contains(in, binary.BigEndian.AppendUint32(nil, r.Opt)) {
				t.Fatalf("reply to option %d, which was not sent", r.Opt)
			}
			if r.Opt == nbdtest.OptGo && r.Type == nbdtest.RepAck {
				return // FuzzTransmission goes on from here
			}
		}
	}
	f.Fuzz(func(t *testing.T, in []byte, step byte) {
		for _, s := range servers {
			check(t, s, in, step)
		}
	})
}

// FuzzTransmission sends anything as requests. The replies must be those to the
// requests that a plain reading of the input finds, each once, and no more.
func FuzzTransmission(f *testing.F) {
	req := func(r nbdtest.Request, n int) []byte { return append(r.Append(nil), make([]byte, n)...) }
	f.Add(req(nbdtest.Request{Len: 4096, Cookie: 1}, 0), byte(0))
	f.Add(append(req(nbdtest.Request{Cmd: nbdtest.Write, Len: 20, Cookie: 2, Flags: nbdtest.FUA}, 20), req(nbdtest.Request{Cmd: nbdtest.Disc}, 0)...), byte(5))
	f.Add(append(req(nbdtest.Request{Cmd: nbdtest.Write, Len: 40_000, Off: 3}, 40_000), req(nbdtest.Request{Len: 40_000}, 0)...), byte(200))
	f.Add(append(req(nbdtest.Request{Cmd: nbdtest.Write, Len: 600_000}, 600_000), req(nbdtest.Request{Cmd: nbdtest.Flush}, 0)...), byte(0))
	f.Add(append(req(nbdtest.Request{Cmd: nbdtest.Write, Len: 100, Off: 1 << 63}, 100), req(nbdtest.Request{Cmd: nbdtest.Trim, Len: 1 << 20}, 0)...), byte(0))
	f.Add(req(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 1 << 20, Off: 7, Flags: nbdtest.NoHole}, 0), byte(0))
	f.Add(req(nbdtest.Request{Cmd: 99, Len: 1<<32 - 1, Off: 1<<64 - 1, Flags: 0xffff}, 0), byte(0))
	f.Add(req(nbdtest.Request{Magic: 1}, 0), byte(0))
	servers, size := fuzzServers(f)
	f.Fuzz(func(t *testing.T, in []byte, step byte) {
		type reply struct {
			errno uint32
			n     uint32 // payload
		}
		var want []reply // by cookie
		in = bytes.Clone(in)
		for b := in; len(b) >= 28 && binary.BigEndian.Uint32(b) == 0x25609513; {
			flags, cmd := binary.BigEndian.Uint16(b[4:]), binary.BigEndian.Uint16(b[6:])
			off, n := binary.BigEndian.Uint64(b[16:]), binary.BigEndian.Uint32(b[24:])
			binary.BigEndian.PutUint64(b[8:], uint64(len(want))) // any cookie does
			r := reply{}
			b = b[28:]
			inside := off <= size && uint64(n) <= size-off
			if cmd == nbdtest.Disc {
				break
			}
			if cmd == nbdtest.Write {
				if uint64(n) > uint64(len(b)) {
					break
				}
				b = b[n:]
			}
			switch {
			case cmd > nbdtest.WriteZeroes || cmd == nbdtest.Cache,
				flags&^(nbdtest.FUA|nbdtest.NoHole) != 0,
				flags&nbdtest.NoHole != 0 && cmd != nbdtest.WriteZeroes,
				cmd == nbdtest.Flush && (off != 0 || n != 0),
				cmd == nbdtest.Read && (!inside || n > 32<<20),
				cmd == nbdtest.Trim && !inside:
				r.errno = eINVAL
			case !inside:
				r.errno = eNOSPC
			case cmd == nbdtest.Read:
				r.n = n
			}
			want = append(want, r)
		}

		for _, s := range servers {
			out, _ := feed(t, func(c net.Conn) error { return s.ServeTransmission(context.Background(), c, "a") }, in, int(step))
			atRest(t, s)
			rest := &received{b: out}
			c := &nbdtest.Client{Conn: rest}
			seen := make([]bool, len(want))
			for range want {
				errno, cookie, err := c.ReadReply()
				if err != nil {
					t.Fatal(err)
				}
				if cookie >= uint64(len(want)) || seen[cookie] || errno != want[cookie].errno {
					t.Fatalf("reply with cookie %d, error %d, to none of %+v", cookie, errno, want)
				}
				seen[cookie] = true
				if _, err := io.CopyN(io.Discard, c.Conn, int64(want[cookie].n)); err != nil {
					t.Fatal(err)
				}
			}
			if len(rest.b) != 0 {
				t.Fatalf("%d bytes after the last reply", len(rest.b))
			}
		}
	})
}

// FuzzChunks is FuzzTransmission with structured replies or extended headers,
// after a handshake that selects base:allocation.
func FuzzChunks(f *testing.F) {
	type req = nbdtest.Request
	for _, extended := range []bool{false, true} {
		add := func(step byte, r req, n int) {
			b := r.Append(nil)
			if extended {
				b = r.AppendExtended(nil)
			}
			f.Add(append(b, make([]byte, n)...), step, extended)
		}
		add(0, req{Len: 4096, Flags: nbdtest.DF}, 0)
		add(5, req{Cmd: nbdtest.BlockStatus, Len: 1000, Flags: nbdtest.ReqOne}, 0)
		add(0, req{Cmd: nbdtest.BlockStatus}, 0)
		add(0, req{Cmd: nbdtest.Cache, Len: 1 << 20}, 0)
		add(0, req{Cmd: nbdtest.WriteZeroes, Flags: nbdtest.FastZero, Len: 7}, 0)
		add(200, req{Cmd: nbdtest.Write, Flags: nbdtest.PayloadLen, Len: 1000}, 1000)
		add(200, req{Cmd: nbdtest.Write, Flags: nbdtest.PayloadLen, Len: 600_000, Off: 9}, 600_000)
		add(0, req{Flags: nbdtest.PayloadLen, Len: 100}, 100)
		add(0, req{Cmd: nbdtest.Trim, Len64: 1 << 40, Len: 1}, 0)
		add(0, req{Cmd: 99, Flags: 0xffff, Len: 10}, 10)
		add(0, req{Cmd: nbdtest.Write, Len64: 1<<64 - 1}, 0)
	}
	servers, size := fuzzServers(f)
	f.Fuzz(func(t *testing.T, in []byte, step byte, extended bool) {
		type reply struct {
			cmd    uint16
			errno  uint32
			off, n uint64
		}
		head, magic := 28, uint32(0x25609513)
		if extended {
			head, magic = 32, 0x21e41c71
		}
		var want []reply // by cookie
		in = bytes.Clone(in)
		for b := in; len(b) >= head && binary.BigEndian.Uint32(b) == magic; {
			r := reply{cmd: binary.BigEndian.Uint16(b[6:]), off: binary.BigEndian.Uint64(b[16:])}
			flags := binary.BigEndian.Uint16(b[4:])
			if extended {
				r.n = binary.BigEndian.Uint64(b[24:])
			} else {
				r.n = uint64(binary.BigEndian.Uint32(b[24:]))
			}
			binary.BigEndian.PutUint64(b[8:], uint64(len(want))) // any cookie does
			b = b[head:]
			if r.cmd == nbdtest.Disc {
				break
			}
			if r.cmd == nbdtest.Write || extended && flags&nbdtest.PayloadLen != 0 {
				if r.n > uint64(len(b)) {
					break
				}
				b = b[r.n:]
			}
			valid := map[uint16]uint16{
				nbdtest.Read: nbdtest.DF, nbdtest.Write: 0, nbdtest.Flush: 0, nbdtest.Trim: 0, nbdtest.Cache: 0,
				nbdtest.WriteZeroes: nbdtest.NoHole | nbdtest.FastZero, nbdtest.BlockStatus: nbdtest.ReqOne,
			}
			if extended {
				valid[nbdtest.Write] = nbdtest.PayloadLen
			}
			allowed, known := valid[r.cmd]
			inside := r.off <= size && r.n <= size-r.off
			switch {
			case !known,
				flags&^(allowed|nbdtest.FUA) != 0,
				r.cmd == nbdtest.Flush && (r.off != 0 || r.n != 0),
				r.cmd == nbdtest.BlockStatus && r.n == 0,
				!inside && r.cmd != nbdtest.Write && r.cmd != nbdtest.WriteZeroes:
				r.errno = eINVAL
			case !inside:
				r.errno = eNOSPC
			case flags&nbdtest.FastZero != 0:
				r.errno = eNOTSUP
			}
			want = append(want, r)
		}

		opt := uint32(nbdtest.OptStructuredReply)
		if extended {
			opt = nbdtest.OptExtendedHeaders
		}
		all := nbdtest.AppendOption([]byte{0, 0, 0, 3}, opt, nil)
		all = nbdtest.AppendOption(all, nbdtest.OptSetMeta, nbdtest.MetaData("a", "base:allocation"))
		all = nbdtest.AppendOption(all, nbdtest.OptGo, nbdtest.GoData("a"))
		for _, s := range servers {
			out, _ := feed(t, func(c net.Conn) error { return s.Serve(context.Background(), c) }, append(bytes.Clone(all), in...), int(step))
			atRest(t, s)

			rest := &received{b: out}
			c := &nbdtest.Client{Conn: rest}
			if _, err := c.Greet(0); err != nil {
				t.Fatal(err)
			}
			for range 5 { // an ACK, a context and its ACK, an information and its ACK
				if _, err := c.ReadOptionReply(); err != nil {
					t.Fatal(err)
				}
			}
			seen := make([]bool, len(want))
			for range want {
				k, err := c.ReadChunk()
				if err != nil {
					t.Fatal(err)
				}
				if k.Cookie >= uint64(len(want)) || seen[k.Cookie] || !k.Done() {
					t.Fatalf("chunk %+v, to none of %+v", k, want)
				}
				seen[k.Cookie] = true
				r := want[k.Cookie]
				if k.Errno != r.errno {
					t.Fatalf("error %d in reply to %+v", k.Errno, r)
				}
				// The form of the reply, by the request.
				magic, typ, n := uint32(0x67446698), uint16(0), uint64(0)
				if extended {
					magic = 0x6e8a278c
				} else if r.cmd == nbdtest.Read || r.cmd == nbdtest.BlockStatus {
					magic = 0x668e33ef
				}
				switch {
				case magic == 0x67446698:
				case r.errno != 0:
					typ, n = nbdtest.ChunkError, 6
				case r.cmd == nbdtest.Read && r.n > 0:
					typ, n = nbdtest.ChunkOffsetData, 8+r.n
				case r.cmd == nbdtest.BlockStatus && extended:
					typ, n = nbdtest.ChunkBlockStatusExt, 24
				case r.cmd == nbdtest.BlockStatus:
					typ, n = nbdtest.ChunkBlockStatus, 12
				}
				if k.Magic != magic || k.Type != typ || uint64(len(k.Data)) != n || extended && k.Off != r.off {
					t.Fatalf("chunk with magic %#x, type %d, %d bytes in reply to %+v", k.Magic, k.Type, len(k.Data), r)
				}
			}
			if len(rest.b) != 0 {
				t.Fatalf("%d bytes after the last reply", len(rest.b))
			}
		}
	})
}
