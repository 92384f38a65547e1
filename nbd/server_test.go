package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// TestServeLeavesNothing runs in a bubble, which fails the test if any
// goroutine that Serve started is still there when it returns.
func TestServeLeavesNothing(t *testing.T) {
	reason := errors.New("the reason")
	for _, tt := range []struct {
		name string
		end  func(cancel context.CancelCauseFunc, client net.Conn)
		want error
	}{
		{"disconnect", func(_ context.CancelCauseFunc, c net.Conn) { c.Write(nbdtest.Request{Cmd: nbdtest.Disc}.Append(nil)) }, nil},
		{"closed", func(_ context.CancelCauseFunc, c net.Conn) { c.Close() }, io.EOF},
		{"canceled", func(cancel context.CancelCauseFunc, _ net.Conn) { cancel(reason) }, reason},
		{"garbage", func(_ context.CancelCauseFunc, c net.Conn) { c.Write(make([]byte, 28)) }, nbd.ErrProtocol},
		{"canceled in the middle of a payload", func(cancel context.CancelCauseFunc, c net.Conn) {
			c.Write(append(nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}.Append(nil), make([]byte, 700<<10)...))
			synctest.Wait()
			cancel(reason)
		}, reason},
		{"canceled while replies are not taken", func(cancel context.CancelCauseFunc, c net.Conn) {
			c.Write(nbdtest.Request{Len: 4096}.Append(nbdtest.Request{Len: 4096}.Append(nil)))
			synctest.Wait()
			cancel(reason)
		}, reason},
		{"closed while replies are not taken", func(_ context.CancelCauseFunc, c net.Conn) {
			c.Write(nbdtest.Request{Len: 4096}.Append(nil))
			synctest.Wait()
			c.Close()
		}, io.ErrClosedPipe},
	} {
		for _, transmissionOnly := range []bool{false, true} {
			name := tt.name
			if transmissionOnly {
				name += ", no handshake"
			}
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s, err := nbd.New(nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(1<<20, false)})
					if err != nil {
						t.Fatal(err)
					}
					ctx, cancel := context.WithCancelCause(t.Context())
					defer cancel(nil)
					client, server := net.Pipe()
					result := make(chan error)
					go func() {
						if transmissionOnly {
							result <- s.ServeTransmission(ctx, server, "")
						} else {
							result <- s.Serve(ctx, server)
						}
					}()
					if !transmissionOnly {
						if _, err := nbdtest.Dial(client, ""); err != nil {
							t.Fatal(err)
						}
					}
					synctest.Wait()
					tt.end(cancel, client)
					if err := <-result; !errors.Is(err, tt.want) || tt.want == nil && err != nil {
						t.Errorf("Serve() = %v, want %v", err, tt.want)
					}
					if st := s.Stats(); st.Connections != 0 || st.InFlight != 0 || st.Arena.Used != 0 {
						t.Errorf("Stats() = %+v, want nothing in use", st)
					}
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					if err := s.Serve(ctx, server); !errors.Is(err, nbd.ErrClosed) {
						t.Errorf("Serve() after Close() = %v, want %v", err, nbd.ErrClosed)
					}
				})
			})
		}
	}
}

// blockingDevice returns a device whose reads at offset 0 wait for release.
// started counts them.
func blockingDevice(size int64) (d *nbdtest.Device, started *atomic.Int64, release func()) {
	d = nbdtest.NewDevice(size, false)
	gate := make(chan struct{})
	started = new(atomic.Int64)
	d.Before = func(op nbdtest.Op) error {
		if op.Method == "ReadAt" && op.Off == 0 {
			started.Add(1)
			<-gate
		}
		return nil
	}
	return d, started, sync.OnceFunc(func() { close(gate) })
}

// TestCanceledAnswersAccepted: what was read from the socket is answered, what
// was not isn't run.
func TestCanceledAnswersAccepted(t *testing.T) {
	dev, started, release := blockingDevice(1 << 20)
	defer release()
	h := newHarness(t, nbd.Config{Grace: 30 * time.Second}, nbd.Export{Device: dev})
	c, result := h.dial("")
	const n = 20
	for i := range n {
		if err := c.Send(nbdtest.Request{Cookie: uint64(i), Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "all reads run on the device", func() bool { return started.Load() == n })
	reason := errors.New("the reason")
	h.cancel(reason)
	select {
	case err := <-result:
		t.Fatalf("Serve() = %v while requests were running", err)
	case <-time.After(50 * time.Millisecond):
	}
	// The reader has stopped: these are refused when the others are done.
	if err := c.Send(nbdtest.Request{Cmd: nbdtest.Write, Cookie: n, Off: 512, Len: 1000}, pattern(1000, 1)); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(nbdtest.Request{Cookie: n + 1, Off: 512, Len: 512}, nil); err != nil {
		t.Fatal(err)
	}
	calls := dev.Calls()
	release()
	seen := make(map[uint64]bool)
	for range n {
		errno, cookie, err := c.ReadReply()
		if err != nil || errno != 0 || cookie >= n || seen[cookie] {
			t.Fatalf("reply: error %d, cookie %d, %v", errno, cookie, err)
		}
		seen[cookie] = true
		if _, err := io.CopyN(io.Discard, c.Conn, 512); err != nil {
			t.Fatal(err)
		}
	}
	if err := wait(t, "Serve", result); !errors.Is(err, reason) {
		t.Errorf("Serve() = %v, want %v", err, reason)
	}
	for want := range uint64(2) {
		if errno, cookie, err := c.ReadReply(); errno != eSHUTDWN || cookie != n+want || err != nil {
			t.Errorf("late request: error %d, cookie %d, %v; want %d, %d", errno, cookie, err, eSHUTDWN, n+want)
		}
	}
	if _, _, err := c.ReadReply(); err != io.EOF {
		t.Errorf("after the last reply: %v, want %v", err, io.EOF)
	}
	if dev.Calls() != calls {
		t.Error("a request sent after the cancellation came to the device")
	}
}

// TestCanceledFlood: a client that never stops sending doesn't keep its connection
// from ending.
func TestCanceledFlood(t *testing.T) {
	dev := nbdtest.NewDevice(1<<20, false)
	dev.Before = func(nbdtest.Op) error { time.Sleep(time.Millisecond); return nil }
	h := newHarness(t, nbd.Config{Grace: 200 * time.Millisecond}, nbd.Export{Device: dev})
	c, result := h.dial("")
	go io.Copy(io.Discard, c.Conn)
	sent := make(chan int, 1)
	go func() {
		for i := 0; ; i++ {
			if c.Send(nbdtest.Request{Cookie: uint64(i), Len: 512}, nil) != nil {
				sent <- i
				return
			}
		}
	}()
	eventually(t, "many reads have run", func() bool { return dev.Calls() > 200 })
	h.cancel(errTestEnds)
	begun := time.Now()
	wait(t, "Serve", result)
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("Serve returned after %v", took)
	}
	c.Conn.Close()
	if n := <-sent; n < 200 {
		t.Errorf("only %d requests were sent", n)
	}
}

// TestCanceledLeavesKernelAlone: a request of the kernel that came after the
// cancellation has no reply, so that the kernel sends it again.
func TestCanceledLeavesKernelAlone(t *testing.T) {
	dev, started, release := blockingDevice(1 << 20)
	defer release()
	h := newHarness(t, nbd.Config{Grace: 30 * time.Second}, nbd.Export{Device: dev})
	client, server := socketpair(t)
	defer client.Close()
	result := make(chan error, 1)
	h.serves.Go(func() {
		err := h.s.ServeTransmission(h.ctx, server, "")
		server.Close()
		result <- err
	})
	c := &nbdtest.Client{Conn: client}
	if err := c.Send(nbdtest.Request{Cookie: 1, Len: 512}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the read runs", func() bool { return started.Load() == 1 })
	h.cancel(errTestEnds)
	time.Sleep(20 * time.Millisecond)
	if err := c.Send(nbdtest.Request{Cookie: 2, Off: 512, Len: 512}, nil); err != nil {
		t.Fatal(err)
	}
	release()
	if err := wait(t, "ServeTransmission", result); err != errTestEnds {
		t.Errorf("ServeTransmission() = %v", err)
	}
	// With something unread, a Unix socket reports a reset after what was sent.
	b := make([]byte, 16+512+1)
	if n, err := io.ReadFull(client, b); n != 16+512 || err == nil {
		t.Errorf("got %d bytes, %v; want the reply to the first request only", n, err)
	}
}

// TestCanceledWithoutMemory: nor has one of the kernel that waits for memory then.
func TestCanceledWithoutMemory(t *testing.T) {
	h := newHarness(t, nbd.Config{Arena: nbd.MaxPayload}, nbd.Export{Device: nbdtest.NewDevice(nbd.MaxPayload, false)})
	slow, _ := h.dial("")
	if err := slow.Send(nbdtest.Request{Len: nbd.MaxPayload}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a client holds all memory", func() bool { return h.s.Stats().Arena.Used == nbd.MaxPayload })
	kernel, server := socketpair(t)
	defer kernel.Close()
	ctx, cancel := context.WithCancelCause(h.ctx)
	result := make(chan error, 1)
	h.serves.Go(func() {
		err := h.s.ServeTransmission(ctx, server, "")
		server.Close()
		result <- err
	})
	if _, err := kernel.Write(nbdtest.Request{Cookie: 1, Len: 4096}.Append(nil)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the kernel's request waits", func() bool { return h.s.Stats().Arena.Waits > 0 })
	cancel(errTestEnds)
	if err := wait(t, "ServeTransmission", result); err != errTestEnds {
		t.Errorf("ServeTransmission() = %v", err)
	}
	if b, _ := io.ReadAll(kernel); len(b) != 0 {
		t.Errorf("the kernel got %x, which it takes for an error of the disk", b)
	}
}

// TestCanceledWithDeadPeer: a peer that takes nothing can't hold Serve longer
// than the grace period, however much there is for it.
func TestCanceledWithDeadPeer(t *testing.T) {
	h := newHarness(t, nbd.Config{Grace: 50 * time.Millisecond}, nbd.Export{Device: nbdtest.NewDevice(32<<20, false)})
	c, result := h.dial("")
	for range 4 {
		if err := c.Send(nbdtest.Request{Len: 16 << 20}, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "memory is in use", func() bool { return h.s.Stats().Arena.Used > 0 })
	reason := errors.New("the reason")
	h.cancel(reason)
	if err := wait(t, "Serve", result); !errors.Is(err, reason) {
		t.Errorf("Serve() = %v, want %v", err, reason)
	}
}

// TestDisconnectWaits: DISC is acted on after everything before it.
func TestDisconnectWaits(t *testing.T) {
	dev, started, release := blockingDevice(4 << 20)
	defer release()
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	c, result := h.dial("")
	data := pattern(3<<20, 1)
	b := nbdtest.Request{Cmd: nbdtest.Read, Cookie: 1, Len: 512}.Append(nil)
	b = append(nbdtest.Request{Cmd: nbdtest.Write, Cookie: 2, Off: 512, Len: 3 << 20}.Append(b), data...)
	b = nbdtest.Request{Cmd: nbdtest.Disc, Cookie: 3}.Append(b)
	if _, err := c.Conn.Write(b); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the read runs", func() bool { return started.Load() == 1 })
	if errno, cookie, err := c.ReadReply(); errno != 0 || cookie != 2 || err != nil {
		t.Fatalf("reply: error %d, cookie %d, %v; want that to the write", errno, cookie, err)
	}
	select {
	case err := <-result:
		t.Fatalf("Serve() = %v while a request was running", err)
	case <-time.After(50 * time.Millisecond):
	}
	release()
	if errno, cookie, err := c.ReadReply(); errno != 0 || cookie != 1 || err != nil {
		t.Fatalf("reply: error %d, cookie %d, %v; want that to the read", errno, cookie, err)
	}
	rest, err := io.ReadAll(c.Conn)
	if err != nil || len(rest) != 512 {
		t.Errorf("after the last reply: %d bytes, %v; want 512 of payload and no reply to DISC", len(rest), err)
	}
	if err := wait(t, "Serve", result); err != nil {
		t.Errorf("Serve() = %v", err)
	}
	if !bytes.Equal(dev.Bytes(512, int64(len(data))), data) {
		t.Error("the write before DISC is not on the device")
	}
}

// TestClientGone: when the client goes away, Serve returns only after its
// requests have left the device. What becomes of those that have not begun is in
// TestStaleWrites.
func TestClientGone(t *testing.T) {
	dev, started, release := blockingDevice(1 << 20)
	defer release()
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	c, result := h.dial("")
	if err := c.Send(nbdtest.Request{Len: 512}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the read runs", func() bool { return started.Load() == 1 })
	c.Conn.Close()
	select {
	case err := <-result:
		t.Fatalf("Serve() = %v while a request was running", err)
	case <-time.After(50 * time.Millisecond):
	}
	release()
	if err := wait(t, "Serve", result); err == nil {
		t.Error("Serve() = nil after the client went away")
	}
}

// TestStuckRequestHoldsUpNoOther has requests that hang in the device although
// all before them were fast, so that the server had no reason to expect it.
// Requests before, with and after them must be answered.
func TestStuckRequestHoldsUpNoOther(t *testing.T) {
	dev, started, release := blockingDevice(1 << 20)
	defer release()
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	c, _ := h.dial("")
	buf := make([]byte, 512)
	for range 200 { // fast, so far
		if errno, err := c.Read(buf, 4096); errno != 0 || err != nil {
			t.Fatal(errno, err)
		}
	}
	// In one write, so that the server takes them together.
	var b []byte
	stuck := func(i uint64) bool { return i == 5 || i == 6 || i == 8 }
	for i := range uint64(10) {
		off := uint64(4096)
		if stuck(i) {
			off = 0
		}
		b = nbdtest.Request{Cookie: i, Off: off, Len: 512}.Append(b)
	}
	if _, err := c.Conn.Write(b); err != nil {
		t.Fatal(err)
	}
	expect := func(n int) {
		t.Helper()
		for range n {
			errno, cookie, err := c.ReadReply()
			if errno != 0 || err != nil || stuck(cookie) {
				t.Fatalf("reply: error %d, cookie %d, %v", errno, cookie, err)
			}
			if _, err := io.CopyN(io.Discard, c.Conn, 512); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect(7)
	eventually(t, "three requests hang", func() bool { return started.Load() == 3 })
	for i := range 20 {
		if err := c.Send(nbdtest.Request{Cookie: 100 + uint64(i), Off: 4096, Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
		expect(1)
	}
	release()
	for range 3 {
		if errno, cookie, err := c.ReadReply(); errno != 0 || !stuck(cookie) || err != nil {
			t.Fatalf("reply: error %d, cookie %d, %v; want that to a stuck request", errno, cookie, err)
		}
		if _, err := io.CopyN(io.Discard, c.Conn, 512); err != nil {
			t.Fatal(err)
		}
	}
}

// TestInFlight: as many requests of a connection run at the same time as
// configured, and no more.
func TestInFlight(t *testing.T) {
	const limit = 7
	dev, started, release := blockingDevice(1 << 20)
	defer release()
	h := newHarness(t, nbd.Config{InFlight: limit}, nbd.Export{Device: dev})
	c, _ := h.dial("")
	for i := range 3 * limit {
		if err := c.Send(nbdtest.Request{Cookie: uint64(i), Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "requests run", func() bool { return started.Load() == limit })
	time.Sleep(20 * time.Millisecond)
	if n := started.Load(); n != limit {
		t.Errorf("%d requests run at the same time, limit %d", n, limit)
	}
	release()
	for range 3 * limit {
		if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
			t.Fatal(errno, err)
		}
		if _, err := io.CopyN(io.Discard, c.Conn, 512); err != nil {
			t.Fatal(err)
		}
	}
}

// busy runs n requests of each kind on a new connection and fails the test if
// they take long.
func busy(t *testing.T, h *harness, n int) {
	t.Helper()
	c, _ := h.dial("")
	done := make(chan error, 1)
	go func() {
		small, large := make([]byte, 4096), make([]byte, 1<<20)
		for range n {
			for _, p := range [][]byte{small, large} {
				if errno, err := c.Read(p, 0); errno != 0 || err != nil {
					done <- errors.Join(errors.New("read"), err)
					return
				}
				if errno, err := c.Write(p, 0, 0); errno != 0 || err != nil {
					done <- errors.Join(errors.New("write"), err)
					return
				}
			}
		}
		done <- nil
	}()
	if err := wait(t, "another connection's requests", done); err != nil {
		t.Fatal(err)
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
}

// TestSlowReader: a client that asks for much and takes nothing holds up
// itself, and holds at most its share of the memory.
func TestSlowReader(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(32<<20, false)})
	c, _ := h.dial("")
	go func() { // more than fits into sockets, requests and memory together
		for i := range 1000 {
			if c.Send(nbdtest.Request{Cookie: uint64(i), Len: 1 << 20}, nil) != nil {
				return
			}
		}
	}()
	eventually(t, "the slow reader has all that it may have", func() bool {
		st := h.s.Stats()
		return st.Arena.Used >= st.Arena.Size/2-1<<20
	})
	busy(t, h, 20)
	if st := h.s.Stats(); st.Arena.Used > max(st.Arena.Size/2, nbd.MaxPayload) {
		t.Errorf("one connection holds %d bytes of an arena of %d", st.Arena.Used, st.Arena.Size)
	}
	// It gets everything when it asks for it.
	for range 100 {
		if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
			t.Fatal(errno, err)
		}
		if _, err := io.CopyN(io.Discard, c.Conn, 1<<20); err != nil {
			t.Fatal(err)
		}
	}
}

// TestShareOfWrites: when what a connection holds is all that it may have, it is
// not read; it is read again when some of its writes are done, even if nobody
// takes replies.
func TestShareOfWrites(t *testing.T) {
	const size = 32 << 20
	for _, tt := range []struct {
		name     string
		n, bytes int
	}{
		{"one long write", 1, size},
		{"many short writes", 128, 256 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			gate := make(chan struct{})
			dev := nbdtest.NewDevice(size, false)
			dev.Before = func(op nbdtest.Op) error {
				if op.Method == "WriteAt" {
					<-gate
				}
				return nil
			}
			h := newHarness(t, nbd.Config{InFlight: 150}, nbd.Export{Device: dev})
			c, _ := h.dial("")
			data := pattern(size, 1)
			sent := make(chan error, 1)
			go func() {
				// Replies that hold memory for as long as they aren't taken.
				err := c.Send(nbdtest.Request{Len: 10 << 20}, nil)
				for i := 0; i < tt.n && err == nil; i++ {
					off := i * tt.bytes
					err = c.Send(nbdtest.Request{Cmd: nbdtest.Write, Cookie: uint64(i), Off: uint64(off), Len: uint32(tt.bytes)}, data[off:off+tt.bytes])
				}
				sent <- err
			}()
			eventually(t, "the connection has its share", func() bool { return h.s.Stats().Arena.Used >= size-chunk })
			close(gate)
			if err := wait(t, "sending", sent); err != nil {
				t.Fatal(err)
			}
			eventually(t, "everything is written", func() bool { return bytes.Equal(dev.Bytes(0, size), data) })
		})
	}
}

// chunk is the longest piece of a write that the device sees.
const chunk = 512 << 10

// TestSilentWriters: clients that announce large payloads and don't send them
// hold a piece each at most.
func TestSilentWriters(t *testing.T) {
	h := newHarness(t, nbd.Config{InFlight: 4}, nbd.Export{Device: nbdtest.NewDevice(32<<20, false)})
	const writers = 40
	for range writers {
		c, _ := h.dial("")
		if err := c.Send(nbdtest.Request{Cmd: nbdtest.Write, Len: 32 << 20}, make([]byte, 600_000)); err != nil {
			t.Fatal(err)
		}
	}
	busy(t, h, 20)
	if st := h.s.Stats(); st.Arena.Used > writers*chunk {
		t.Errorf("%d silent writers hold %d bytes", writers, st.Arena.Used)
	}
}

// TestSlowReaders: clients that take no reply, of large requests and of many small
// ones, hold up nobody else, and a large request that waits for them isn't passed
// by for ever. Nothing here waits for a connection to be ended.
func TestSlowReaders(t *testing.T) {
	const dead = time.Minute
	dev := nbdtest.NewDevice(nbd.MaxPayload, false)
	h := newHarness(t, nbd.Config{StallTimeout: time.Hour}, nbd.Export{Device: dev})
	slow, _ := h.dial("")
	second, _ := h.dial("")
	many, _ := h.dial("")
	if err := slow.Send(nbdtest.Request{Len: nbd.MaxPayload}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a slow client holds memory", func() bool { return h.s.Stats().Arena.Used == nbd.MaxPayload })
	if err := second.Send(nbdtest.Request{Len: nbd.MaxPayload}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "another waits for it", func() bool { return h.s.Stats().Arena.Waits > 0 })
	for i := range 60 {
		if err := many.Send(nbdtest.Request{Cookie: uint64(i), Len: 128 << 10}, nil); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, "a client with many small ones waits too", func() bool { return h.s.Stats().Arena.Waits > 1 })

	quick, _ := h.dial("")
	if err := quick.Conn.SetDeadline(time.Now().Add(dead)); err != nil {
		t.Fatal(err)
	}
	var longest time.Duration
	for range 25 {
		for _, size := range []int{4096, 128 << 10, 1 << 20} {
			start := time.Now()
			if errno, err := quick.Read(make([]byte, size), 0); errno != 0 || err != nil {
				t.Fatalf("read of %d bytes beside slow clients: error %d, %v", size, errno, err)
			}
			if errno, err := quick.Write(make([]byte, size), 0, 0); errno != 0 || err != nil {
				t.Fatalf("write of %d bytes beside slow clients: error %d, %v", size, errno, err)
			}
			longest = max(longest, time.Since(start))
		}
	}
	t.Logf("longest of 75 reads and writes of up to 1 MiB beside three slow clients: %v", longest)

	// The first takes its reply. Then it is the turn of the second, whatever the
	// quick one goes on to do.
	done := make(chan error, 1)
	go func() {
		errno, _, err := slow.ReadReply()
		if err == nil && errno == 0 {
			_, err = io.CopyN(io.Discard, slow.Conn, nbd.MaxPayload)
		}
		if err == nil {
			errno, _, err = second.ReadReply()
		}
		if err == nil && errno != 0 {
			err = fmt.Errorf("error %d", errno)
		}
		done <- err
	}()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Error(err)
			}
			return
		default:
		}
		if errno, err := quick.Read(make([]byte, 128<<10), 0); errno != 0 || err != nil {
			t.Fatalf("beside a large request that waits: error %d, %v", errno, err)
		}
	}
}

// TestStalled: when clients that move nothing hold all of the memory, they are
// ended, and only they, and the others go on.
func TestStalled(t *testing.T) {
	const timeout = 100 * time.Millisecond
	dev := nbdtest.NewDevice(32<<20, false)
	t.Run("replies not taken", func(t *testing.T) {
		h := newHarness(t, nbd.Config{StallTimeout: timeout, Arena: 2*nbd.MaxPayload + 8<<20}, nbd.Export{Device: dev})
		idle, _ := h.dial("")
		// This one takes nothing either, but holds no memory.
		useless, uselessEnds := h.dial("")
		go func() {
			b := bytes.Repeat(nbdtest.Request{Cmd: nbdtest.Flush}.Append(nil), 1000)
			for {
				if _, err := useless.Conn.Write(b); err != nil {
					return
				}
			}
		}()
		eventually(t, "its replies fill the socket", func() bool {
			n := h.s.Stats().Flushes
			time.Sleep(20 * time.Millisecond)
			return n > 0 && h.s.Stats().Flushes == n
		})
		var stalled []<-chan error
		for range 2 {
			c, result := h.dial("")
			stalled = append(stalled, result)
			if err := c.Send(nbdtest.Request{Len: 32 << 20}, nil); err != nil {
				t.Fatal(err)
			}
		}
		eventually(t, "all but the reserve is in use", func() bool { return h.s.Stats().Arena.Used == 2*nbd.MaxPayload })
		time.Sleep(2 * timeout)
		busy(t, h, 5)
		if st := h.s.Stats(); st.Stalled != 0 {
			t.Fatal("connections were ended although nobody needed the memory")
		}
		large, _ := h.dial("")
		if errno, err := large.Read(make([]byte, nbd.MaxPayload), 0); errno != 0 || err != nil {
			t.Errorf("the one that needed the memory: error %d, %v", errno, err)
		}
		eventually(t, "connections ended", func() bool { return h.s.Stats().Stalled > 0 })
		for _, result := range stalled {
			if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrStalled) {
				t.Errorf("Serve() = %v, want %v", err, nbd.ErrStalled)
			}
		}
		if errno, err := idle.Read(make([]byte, 512), 0); errno != 0 || err != nil {
			t.Errorf("the idle connection: error %d, %v", errno, err)
		}
		if st := h.s.Stats(); st.Stalled != 2 {
			t.Errorf("Stats().Stalled = %d, want 2", st.Stalled)
		}
		select {
		case err := <-uselessEnds:
			t.Errorf("the connection that held no memory was ended: %v", err)
		default:
		}
	})
	t.Run("payload not sent", func(t *testing.T) {
		h := newHarness(t, nbd.Config{StallTimeout: timeout, Arena: nbd.MaxPayload}, nbd.Export{Device: dev})
		silent, silentEnds := h.dial("")
		if err := silent.Send(nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}, make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "it holds memory", func() bool { return h.s.Stats().Arena.Used > 0 })
		// All of the arena is needed for this one.
		c, _ := h.dial("")
		if errno, err := c.Read(make([]byte, nbd.MaxPayload), 0); errno != 0 || err != nil {
			t.Errorf("error %d, %v", errno, err)
		}
		if err := wait(t, "Serve", silentEnds); !errors.Is(err, nbd.ErrStalled) {
			t.Errorf("Serve() = %v, want %v", err, nbd.ErrStalled)
		}
	})
	t.Run("a slow device is not the peer's fault", func(t *testing.T) {
		slow, started, release := blockingDevice(32 << 20)
		defer release()
		h := newHarness(t, nbd.Config{StallTimeout: timeout, Arena: nbd.MaxPayload}, nbd.Export{Device: slow})
		a, _ := h.dial("")
		b, _ := h.dial("")
		if err := a.Send(nbdtest.Request{Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the read runs", func() bool { return started.Load() == 1 })
		done := make(chan error, 1)
		go func() {
			_, err := b.Read(make([]byte, nbd.MaxPayload-512), 512)
			done <- err
		}()
		time.Sleep(3 * timeout)
		if st := h.s.Stats(); st.Stalled != 0 || st.Arena.Waits == 0 {
			t.Errorf("Stats() = %+v, want one that waits, and nobody ended", st)
		}
		release()
		if errno, _, err := a.ReadReply(); errno != 0 || err != nil {
			t.Error(errno, err)
		}
		if _, err := io.CopyN(io.Discard, a.Conn, 512); err != nil {
			t.Error(err)
		}
		if err := wait(t, "the one that waited", done); err != nil {
			t.Error(err)
		}
	})
}

// TestRepliesWhole: replies of many workers to a client with a tiny receive
// window never mix.
func TestRepliesWhole(t *testing.T) {
	dev := nbdtest.NewDevice(8<<20, false)
	data := pattern(8<<20, 3)
	if _, err := dev.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	client, server := socketpair(t)
	defer client.Close()
	h.serve(server)
	c, err := nbdtest.Dial(client, "")
	if err != nil {
		t.Fatal(err)
	}
	// When it has answered this, the server has enlarged the socket, and won't again.
	if errno, err := c.Read(make([]byte, 1), 0); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	if err := server.SetWriteBuffer(1); err != nil {
		t.Fatal(err)
	}
	const n = 200
	size := func(i uint64) uint32 { return uint32(i%7*30_000 + i) }
	go func() {
		for i := range uint64(n) {
			c.Send(nbdtest.Request{Cookie: i, Off: i * 4096, Len: size(i)}, nil)
		}
	}()
	got := make([]byte, 1<<20)
	for range n {
		errno, i, err := c.ReadReply()
		if errno != 0 || err != nil || i >= n {
			t.Fatalf("reply: error %d, cookie %d, %v", errno, i, err)
		}
		if _, err := io.ReadFull(c.Conn, got[:size(i)]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:size(i)], data[i*4096:][:size(i)]) {
			t.Fatalf("payload of reply %d is not what it should be", i)
		}
	}
}

func TestServeListener(t *testing.T) {
	h := newHarness(t, nbd.Config{MaxConnections: 3}, nbd.Export{Device: nbdtest.NewDevice(1<<20, false)})
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	result := make(chan error, 1)
	h.serves.Go(func() { result <- h.s.ServeListener(h.ctx, ln) })
	var clients []*nbdtest.Client
	for range 3 {
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c, err := nbdtest.Dial(conn, "")
		if err != nil {
			t.Fatal(err)
		}
		clients = append(clients, c)
	}
	fourth, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer fourth.Close()
	if b, err := io.ReadAll(fourth); err != nil || len(b) != 0 {
		t.Errorf("fourth connection: %q, %v; want it closed", b, err)
	}
	for _, c := range clients {
		if errno, err := c.Write(pattern(4096, 1), 0, 0); errno != 0 || err != nil {
			t.Errorf("error %d, %v", errno, err)
		}
	}
	reason := errors.New("the reason")
	h.cancel(reason)
	if err := wait(t, "ServeListener", result); !errors.Is(err, reason) {
		t.Errorf("ServeListener() = %v, want %v", err, reason)
	}
	for _, c := range clients {
		if _, err := io.ReadAll(c.Conn); err != nil {
			t.Errorf("after the end: %v", err)
		}
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		t.Error("the listener still accepts")
	}
}

func TestServeListenerFails(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(512, false)})
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	result := make(chan error, 1)
	go func() { result <- h.s.ServeListener(context.Background(), ln) }()
	if _, err := nbdtest.Dial(conn, ""); err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := wait(t, "ServeListener", result); !errors.Is(err, net.ErrClosed) {
		t.Errorf("ServeListener() = %v, want %v", err, net.ErrClosed)
	}
}

// A failingListener has accept fail once with each of its errors.
type failingListener struct {
	net.Listener
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.errs) == 0 {
		return l.Listener.Accept()
	}
	err := l.errs[0]
	l.errs = l.errs[1:]
	return nil, &net.OpError{Op: "accept", Net: "unix", Err: os.NewSyscallError("accept4", err)}
}

// TestListenerRecovers: what accept(2) says of one connection, of the network or of a
// policy does not end a listener.
func TestListenerRecovers(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(512, false)})
	ln, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	failing := &failingListener{ln, []error{syscall.ECONNABORTED, syscall.EPERM, syscall.EPROTO, syscall.ENETDOWN,
		syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.ETIMEDOUT}}
	h.serves.Go(func() { _ = h.s.ServeListener(h.ctx, failing) })
	conn, err := net.Dial("unix", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := nbdtest.Dial(conn, ""); err != nil {
		t.Fatal(err)
	}
}

func TestStats(t *testing.T) {
	dev, started, release := blockingDevice(64 << 20)
	defer release()
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev, Trim: true})
	c, _ := h.dial("")
	do := func(r nbdtest.Request, data []byte) {
		t.Helper()
		if _, err := c.Do(r, data); err != nil {
			t.Fatal(err)
		}
	}
	do(nbdtest.Request{Cmd: nbdtest.Read, Off: 512, Len: 1000}, make([]byte, 1000))
	do(nbdtest.Request{Cmd: nbdtest.Write, Len: 2 << 20}, make([]byte, 2<<20))
	do(nbdtest.Request{Cmd: nbdtest.Write, Len: 3}, make([]byte, 3))
	do(nbdtest.Request{Cmd: nbdtest.Flush}, nil)
	do(nbdtest.Request{Cmd: nbdtest.Trim, Len: 40 << 20}, nil)
	do(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 50 << 20}, nil)
	do(nbdtest.Request{Cmd: nbdtest.Cache, Len: 7}, nil)
	do(nbdtest.Request{Cmd: nbdtest.Resize, Len: 7}, nil)
	do(nbdtest.Request{Cmd: nbdtest.Read, Off: 1 << 60, Len: 7}, nil)
	if err := c.Send(nbdtest.Request{Len: 5000}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the read runs", func() bool { return started.Load() == 1 })
	// A reply is sent before it is counted as such.
	eventually(t, "it is the only one", func() bool { return h.s.Stats().InFlight == 1 })
	st := h.s.Stats()
	want := nbd.Counts{
		Reads: 2, Writes: 2, Flushes: 1, Trims: 1, WriteZeroes: 1, Caches: 1, Invalid: 1,
		ReadBytes: 1000, WriteBytes: 2<<20 + 3, TrimBytes: 40 << 20, ZeroBytes: 50 << 20, Errors: 2,
	}
	if st.Counts != want {
		t.Errorf("counts are %+v, want %+v", st.Counts, want)
	}
	if st.Connections != 1 || st.Accepted != 1 || st.InFlight != 1 || st.Arena.Used != 8192 || st.Arena.Size != 40<<20 {
		t.Errorf("Stats() = %+v", st)
	}
	release()
	if _, _, err := c.ReadReply(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, c.Conn, 5000); err != nil {
		t.Fatal(err)
	}
	if err := c.Disconnect(); err != nil {
		t.Fatal(err)
	}
	want.Reads++
	want.ReadBytes += 5000
	eventually(t, "the connection ended", func() bool { return h.s.Stats().Connections == 0 })
	if st := h.s.Stats(); st.Counts != want {
		t.Errorf("counts after the connection ended are %+v, want %+v", st.Counts, want)
	}
}
