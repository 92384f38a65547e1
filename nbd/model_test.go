package nbd_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// ranges are the byte ranges that requests in flight cover, on all
// connections. A request that writes shares no byte with another, so what each
// must do is known although they run in any order.
type ranges struct {
	mu    sync.Mutex
	spans map[int]span
	next  int
	model []byte
}

type span struct {
	off, end int64
	writes   bool
}

// claim returns an id to release, or false if the span would conflict. change
// runs on the model within the lock.
func (r *ranges) claim(s span, change func(model []byte)) (int, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range r.spans {
		if s.off < o.end && o.off < s.end && (s.writes || o.writes) {
			return 0, false
		}
	}
	r.next++
	r.spans[r.next] = s
	change(r.model[s.off:s.end])
	return r.next, true
}

func (r *ranges) release(id int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.spans, id)
}

// TestModel runs random requests, many in flight on several connections, and
// compares every byte that is read, and in the end the whole device, with a
// model.
func TestModel(t *testing.T) {
	pipe := func(t testing.TB) (net.Conn, net.Conn) { return net.Pipe() }
	unix := func(t testing.TB) (net.Conn, net.Conn) { a, b := socketpair(t); return a, b }
	for _, tt := range []struct {
		name     string
		connect  func(testing.TB) (net.Conn, net.Conn)
		conns    int
		depth    int
		requests int // of each connection
		cfg      nbd.Config
		delay    func(*rand.Rand) time.Duration
	}{
		{"fast device", unix, 4, 48, 3000, nbd.Config{}, nil},
		{"slow device", unix, 4, 48, 600, nbd.Config{}, func(r *rand.Rand) time.Duration { return time.Duration(r.IntN(300)) * time.Microsecond }},
		{"device that stalls at times", unix, 3, 32, 1500, nbd.Config{}, func(r *rand.Rand) time.Duration {
			if r.IntN(100) == 0 {
				return 10 * time.Millisecond
			}
			return 0
		}},
		{"one worker", unix, 3, 16, 600, nbd.Config{InFlight: 1}, nil},
		{"two workers on a slow device", unix, 3, 16, 600, nbd.Config{InFlight: 2}, func(r *rand.Rand) time.Duration { return time.Duration(r.IntN(300)) * time.Microsecond }},
		{"no sockets", pipe, 2, 16, 600, nbd.Config{}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const size = 24 << 20
			dev := nbdtest.NewDevice(size, false)
			if tt.delay != nil {
				var mu sync.Mutex
				rng := rand.New(rand.NewPCG(1, 2))
				dev.Before = func(nbdtest.Op) error {
					mu.Lock()
					d := tt.delay(rng)
					mu.Unlock()
					if d > 0 {
						time.Sleep(d)
					}
					return nil
				}
			}
			h := newHarness(t, tt.cfg, nbd.Export{Device: dev, Trim: true})
			r := &ranges{spans: make(map[int]span), model: make([]byte, size)}
			var clients sync.WaitGroup
			for i := range tt.conns {
				client, server := tt.connect(t)
				client.SetDeadline(time.Now().Add(120 * time.Second))
				t.Cleanup(func() { client.Close() })
				result := h.serve(server)
				clients.Go(func() {
					if err := modelClient(client, r, uint64(i), tt.depth, tt.requests); err != nil {
						t.Errorf("connection %d: %v", i, err)
						client.Close()
					}
					if err := <-result; err != nil {
						t.Errorf("connection %d: Serve() = %v", i, err)
					}
				})
			}
			clients.Wait()
			if got := dev.Bytes(0, size); !bytes.Equal(got, r.model) {
				at := 0
				for got[at] == r.model[at] {
					at++
				}
				t.Errorf("device differs from the model from byte %d on", at)
			}
			st := h.s.Stats()
			if n := st.Reads + st.Writes + st.Flushes + st.Trims + st.WriteZeroes; n != uint64(tt.conns*tt.requests) {
				t.Errorf("server counted %d requests, clients sent %d", n, tt.conns*tt.requests)
			}
			if st.Errors != 0 || st.Arena.Peak > st.Arena.Size {
				t.Errorf("Stats() = %+v", st)
			}
		})
	}
}

// modelClient runs requests on one connection, at most depth at a time, and
// disconnects.
func modelClient(conn net.Conn, r *ranges, seed uint64, depth, requests int) error {
	c, err := nbdtest.Dial(conn, "")
	if err != nil {
		return err
	}
	type pending struct {
		req  nbdtest.Request
		want []byte
		id   int
	}
	var (
		mu       sync.Mutex
		inFlight = make(map[uint64]pending)
		room     = make(chan struct{}, depth)
		received = make(chan error, 1)
	)
	go func() { // receives
		buf := make([]byte, 3<<20)
		for range requests {
			errno, cookie, err := c.ReadReply()
			if err != nil {
				received <- err
				return
			}
			mu.Lock()
			p, ok := inFlight[cookie]
			delete(inFlight, cookie)
			mu.Unlock()
			if !ok || errno != 0 {
				received <- fmt.Errorf("reply with cookie %#x: error %d, in flight: %v", cookie, errno, ok)
				return
			}
			if p.req.Cmd == nbdtest.Read {
				got := buf[:p.req.Len]
				if _, err := io.ReadFull(c.Conn, got); err != nil {
					received <- err
					return
				}
				if !bytes.Equal(got, p.want) {
					received <- fmt.Errorf("read of %d bytes at %d returned other bytes", p.req.Len, p.req.Off)
					return
				}
			}
			r.release(p.id)
			<-room
		}
		received <- nil
	}()

	rng := rand.New(rand.NewPCG(seed, 99))
	var out []byte
	flush := func() error {
		// In one piece mostly, else cut anywhere.
		for len(out) > 0 {
			n := len(out)
			if rng.IntN(4) == 0 {
				n = 1 + rng.IntN(n)
			}
			if _, err := c.Conn.Write(out[:n]); err != nil {
				return err
			}
			out = out[n:]
		}
		out = out[:0]
		return nil
	}
	for i := range requests {
		select {
		case room <- struct{}{}:
		default:
			// Replies come only if everything has been sent.
			if err := flush(); err != nil {
				return err
			}
			select {
			case room <- struct{}{}:
			case err := <-received:
				return err
			}
		}
		p := pending{req: nbdtest.Request{Cookie: seed<<56 | uint64(i)<<8 | 0x5a}}
		var payload []byte
		for {
			var n int
			switch rng.IntN(20) {
			case 0:
				n = 0
			case 1, 2:
				n = rng.IntN(200 << 10)
			case 3:
				if rng.IntN(8) == 0 {
					n = rng.IntN(3 << 20)
				}
			case 4, 5, 6, 7:
				n = 4096
			default:
				n = 1 + rng.IntN(8<<10)
			}
			off := rng.Int64N(int64(len(r.model)) - int64(n))
			if rng.IntN(2) == 0 {
				off &^= 4095
			}
			p.req.Off, p.req.Len, p.req.Flags = uint64(off), uint32(n), 0
			if rng.IntN(8) == 0 {
				p.req.Flags = nbdtest.FUA
			}
			s := span{off: off, end: off + int64(n), writes: true}
			var change func([]byte)
			switch rng.IntN(16) {
			default:
				p.req.Cmd = nbdtest.Read
				s.writes = false
				change = func(model []byte) { p.want = bytes.Clone(model) }
			case 0, 1, 2, 3, 4, 5:
				p.req.Cmd = nbdtest.Write
				payload = pattern(n, p.req.Cookie)
				change = func(model []byte) { copy(model, payload) }
			case 6:
				p.req.Cmd = nbdtest.WriteZeroes
				change = func(model []byte) { clear(model) }
			case 7:
				p.req.Cmd = nbdtest.Trim
				change = func(model []byte) {
					for i := range model {
						model[i] = 0xdb // what the device does
					}
				}
			case 8:
				p.req.Cmd, p.req.Off, p.req.Len = nbdtest.Flush, 0, 0
				s.writes, s.end = false, s.off
				change = func([]byte) {}
			}
			var ok bool
			if p.id, ok = r.claim(s, change); ok {
				break
			}
			payload = nil
		}
		mu.Lock()
		inFlight[p.req.Cookie] = p
		mu.Unlock()
		out = append(p.req.Append(out), payload...)
		if len(out) > 64<<10 || rng.IntN(3) == 0 {
			if err := flush(); err != nil {
				return err
			}
		}
	}
	if err := flush(); err != nil {
		return err
	}
	if err := <-received; err != nil {
		return err
	}
	return c.Disconnect()
}

// TestArenaShort reads far more at the same time than the arena holds, in sizes
// from one page to the largest payload. Everybody must get through.
func TestArenaShort(t *testing.T) {
	const size = 40 << 20
	dev := nbdtest.NewDevice(size, false)
	data := pattern(size, 1)
	if _, err := dev.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	h := newHarness(t, nbd.Config{Arena: nbd.MaxPayload}, nbd.Export{Device: dev})
	var clients sync.WaitGroup
	for i := range 6 {
		c, _ := h.dial("")
		sizes := []uint32{nbd.MaxPayload, 4096, 20 << 20, 100_000, 1 << 20, 1, 3 << 20, nbd.MaxPayload}
		clients.Go(func() {
			sent := make(chan error, 1)
			go func() {
				for j, n := range sizes {
					if err := c.Send(nbdtest.Request{Cookie: uint64(j), Off: uint64(i)<<20 + uint64(j), Len: n}, nil); err != nil {
						sent <- err
						return
					}
				}
				sent <- nil
			}()
			buf := make([]byte, nbd.MaxPayload)
			for range sizes {
				errno, j, err := c.ReadReply()
				if err != nil || errno != 0 || j >= uint64(len(sizes)) {
					t.Errorf("connection %d: error %d, cookie %d, %v", i, errno, j, err)
					return
				}
				off := uint64(i)<<20 + j
				got := buf[:sizes[j]]
				if _, err := io.ReadFull(c.Conn, got); err != nil {
					t.Error(err)
					return
				}
				if !bytes.Equal(got, data[off:off+uint64(len(got))]) {
					t.Errorf("read of %d bytes at %d returned other bytes", len(got), off)
				}
			}
			if err := <-sent; err != nil {
				t.Error(err)
			}
		})
	}
	clients.Wait()
	if st := h.s.Stats(); st.Arena.Waits == 0 || st.Arena.Peak > st.Arena.Size {
		t.Errorf("arena %+v, want requests that waited", st.Arena)
	}
}
