package nbd_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// A script is a connection whose peer sends given bytes, some at a time, and
// takes everything.
type script struct {
	in   []byte
	step int // 0: all at once

	mu  sync.Mutex
	out bytes.Buffer
}

func (s *script) Read(p []byte) (int, error) {
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := len(s.in)
	if s.step > 0 {
		n = min(n, s.step)
	}
	n = copy(p, s.in[:n])
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.out.Write(p)
}

func (*script) Close() error                     { return nil }
func (*script) LocalAddr() net.Addr              { return nil }
func (*script) RemoteAddr() net.Addr             { return nil }
func (*script) SetDeadline(time.Time) error      { return nil }
func (*script) SetReadDeadline(time.Time) error  { return nil }
func (*script) SetWriteDeadline(time.Time) error { return nil }

func fuzzServer(f *testing.F) (*nbd.Server, *nbdtest.Device) {
	dev := nbdtest.NewDevice(1<<20+7, false)
	s, err := nbd.New(nbd.Config{InFlight: 2},
		nbd.Export{Name: "a", Description: "d", Device: dev, Trim: true},
		nbd.Export{Name: "b", Device: dev, ReadOnly: true})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.Error(err)
		}
	})
	return s, dev
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
	s, _ := fuzzServer(f)
	f.Fuzz(func(t *testing.T, in []byte, step byte) {
		conn := &script{in: in, step: int(step)}
		err := s.Serve(context.Background(), conn)
		atRest(t, s)
		c := &nbdtest.Client{Conn: &script{in: conn.out.Bytes()}}
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
	s, dev := fuzzServer(f)
	size, err := dev.Size()
	if err != nil {
		f.Fatal(err)
	}
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
			inside := off <= uint64(size) && uint64(n) <= uint64(size)-off
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

		conn := &script{in: in, step: int(step)}
		s.ServeTransmission(context.Background(), conn, "a")
		atRest(t, s)
		c := &nbdtest.Client{Conn: &script{in: conn.out.Bytes()}}
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
		if rest := len(c.Conn.(*script).in); rest != 0 {
			t.Fatalf("%d bytes after the last reply", rest)
		}
	})
}
