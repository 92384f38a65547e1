package nbd_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// A transport is a way to connect. It returns both ends; the client's handshake is
// done.
type transport func(t *testing.T, h *harness, p *pki) (c *nbdtest.Client, server net.Conn, result <-chan error)

func byUnix(t *testing.T, h *harness, _ *pki) (*nbdtest.Client, net.Conn, <-chan error) {
	t.Helper()
	client, server := socketpair(t)
	return begin(t, h, client, server, nil)
}

func byTCP(t *testing.T, h *harness, p *pki) (*nbdtest.Client, net.Conn, <-chan error) {
	t.Helper()
	client, server := tcpPair(t)
	return begin(t, h, client, server, nil)
}

func byTLS(t *testing.T, h *harness, p *pki) (*nbdtest.Client, net.Conn, <-chan error) {
	t.Helper()
	client, server := tcpPair(t)
	cfg := p.client.Clone()
	cfg.DynamicRecordSizingDisabled = true // what is one write is one read
	return begin(t, h, client, server, cfg)
}

func begin(t *testing.T, h *harness, client, server net.Conn, secure *tls.Config) (*nbdtest.Client, net.Conn, <-chan error) {
	t.Helper()
	t.Cleanup(func() { client.Close() })
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	result := h.serve(server)
	c := &nbdtest.Client{Conn: client}
	if _, err := c.Greet(3); err != nil {
		t.Fatal(err)
	}
	if secure != nil {
		c = startTLS(t, c, secure)
	}
	if err := c.Go(""); err != nil {
		t.Fatal(err)
	}
	return c, server, result
}

// tcpPair returns both ends of a connection by TCP.
func tcpPair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if client, err = net.Dial("tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	return client, server
}

// sawEnd waits until the server's kernel knows that the client has hung up.
func sawEnd(t *testing.T, server net.Conn) {
	t.Helper()
	raw, err := server.(interface {
		SyscallConn() (syscall.RawConn, error)
	}).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the client's end arrives", func() bool {
		p := []unix.PollFd{{Events: unix.POLLRDHUP}}
		err := raw.Control(func(fd uintptr) {
			p[0].Fd = int32(fd)
			_, _ = unix.Poll(p, 0)
		})
		return err != nil || p[0].Revents != 0
	})
}

// hanging are n reads that a blockingDevice doesn't answer.
func hanging(n int) (b []byte) {
	for i := range n {
		b = nbdtest.Request{Cookie: uint64(i), Len: 100_000}.Append(b)
	}
	return b
}

// TestStaleWrites: what a client had not answered when it went is not begun any more
// when it has come back, sent that again and written something else. Two requests hang
// in the device, which is all that run at the same time, or one that has the only thread,
// so the others have to wait.
func TestStaleWrites(t *testing.T) {
	const at = 1 << 20
	stale, again, newer := pattern(2<<20, 1), pattern(2<<20, 1), pattern(2<<20, 2)
	write := func(off uint64, p []byte) []byte {
		return append(nbdtest.Request{Cmd: nbdtest.Write, Cookie: off, Off: off, Len: uint32(len(p))}.Append(nil), p...)
	}
	queued := write(at, stale[:4096])
	// There is room for two more requests besides those that run.
	unread := append(append(write(8<<20, stale[:4096]), write(9<<20, stale[:4096])...), write(at, stale[:4096])...)
	hangUp := func(c net.Conn) { c.Close() }
	reset := func(c net.Conn) {
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	for _, tt := range []struct {
		name    string
		connect transport
		send    []byte
		taken   int // requests that the server takes, besides those that hang
		leave   func(net.Conn)
		open    bool // the other connection was there all along
		alone   bool // there is no thread for a second request
	}{
		{"one that waits for its turn", byUnix, queued, 1, hangUp, false, false},
		{"one that was not read yet", byUnix, unread, 2, hangUp, false, false},
		{"pieces of a long one", byUnix, write(at, stale), 1, hangUp, false, false},
		{"a part of a long one", byUnix, write(at, stale)[:1<<20], 1, hangUp, false, false},
		{"zeros", byUnix, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: at, Len: 4096}.Append(nil), 1, hangUp, false, false},
		{"TCP", byTCP, queued, 1, hangUp, false, false},
		{"TCP, not read yet", byTCP, unread, 2, hangUp, false, false},
		{"TCP, reset", byTCP, queued, 1, reset, false, false},
		{"TCP, reset, not read yet", byTCP, unread, 2, reset, false, false},
		{"TLS", byTLS, queued, 1, hangUp, false, false},
		{"two connections", byUnix, queued, 1, hangUp, true, false},
		{"two connections, not read yet", byUnix, unread, 2, hangUp, true, false},
		{"two connections, reset", byTCP, queued, 1, reset, true, false},
		{"two connections, reset, not read yet", byTCP, unread, 2, reset, true, false},
		{"one that waits for a thread", byUnix, queued, 1, hangUp, false, true},
		{"zeros that wait for a thread", byUnix, nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: at, Len: 4096}.Append(nil), 1, hangUp, false, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev, started, release := blockingDevice(16 << 20)
			defer release()
			p := newPKI(t)
			cfg, hang, first := nbd.Config{InFlight: 2}, int64(2), hanging(2)
			if strings.HasPrefix(tt.name, "TLS") {
				cfg.TLS = p.server
			}
			if tt.alone {
				// io_uring needs one for zeros.
				cfg.InFlight, hang = 16, 1
				first = nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 4096}.Append(nil)
				hangs := dev.Before
				dev.Before = func(op nbdtest.Op) error {
					if op.Method == "WriteZeroes" {
						op.Method = "ReadAt"
					}
					return hangs(op)
				}
			}
			h := newHarness(t, cfg, nbd.Export{Device: dev})
			if tt.alone {
				h.s.SetSpareWorkers(0)
				h.spare = 0
			}
			h.s.SetSettleTime(time.Millisecond)
			a, server, result := tt.connect(t, h, p)
			var b *nbdtest.Client
			if tt.open {
				b, _, _ = tt.connect(t, h, p)
			}
			// In one call, so that the server takes them together, if they are short.
			sent := make(chan struct{})
			go func() { a.Conn.Write(append(first, tt.send...)); close(sent) }()
			eventually(t, "the first hang", func() bool { return started.Load() == hang })
			if len(tt.send) <= 16<<10 {
				<-sent
				eventually(t, "the others wait", func() bool { return h.s.Stats().InFlight == int(hang)+tt.taken })
			}
			tt.leave(a.Conn)
			<-sent
			sawEnd(t, server)

			if !tt.open {
				b, _, _ = tt.connect(t, h, p)
			}
			for _, data := range [][]byte{again, newer} {
				if errno, err := b.Write(data, at, 0); errno != 0 || err != nil {
					t.Fatal(errno, err)
				}
			}
			time.Sleep(20 * time.Millisecond) // the reads have taken long
			release()
			if err := wait(t, "Serve", result); err == nil {
				t.Error("Serve() = nil after the client went away")
			}
			if !bytes.Equal(dev.Bytes(at, int64(len(newer))), newer) {
				t.Error("a write of a client that is gone came after one that was sent later")
			}
			if errno, err := b.Read(make([]byte, 512), at); errno != 0 || err != nil {
				t.Errorf("the new connection: error %d, %v", errno, err)
			}
		})
	}
}

// TestStaleWriteWaitsForMemory: nor is what waits for memory begun, although another
// connection was there all along.
func TestStaleWriteWaitsForMemory(t *testing.T) {
	const at = 1 << 20
	dev := nbdtest.NewDevice(nbd.MaxPayload, false)
	h := newHarness(t, nbd.Config{Arena: nbd.MaxPayload, StallTimeout: time.Hour}, nbd.Export{Device: dev})
	slow, _ := h.dial("")
	b, _ := h.dial("")
	a, result := h.dial("")
	if err := slow.Send(nbdtest.Request{Len: nbd.MaxPayload}, nil); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all memory is in use", func() bool { return h.s.Stats().Arena.Used == nbd.MaxPayload })
	if err := a.Send(nbdtest.Request{Cmd: nbdtest.Write, Off: at, Len: 4096}, pattern(4096, 1)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the write waits", func() bool { return h.s.Stats().Arena.Waits > 0 })
	a.Conn.Close()
	if errno, err := b.Do(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Off: at, Len: 4096}, nil); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	if _, err := io.CopyN(io.Discard, slow.Conn, 16+nbd.MaxPayload); err != nil {
		t.Fatal(err)
	}
	if err := wait(t, "Serve", result); err == nil {
		t.Error("Serve() = nil after the client went away")
	}
	if !bytes.Equal(dev.Bytes(at, 4096), make([]byte, 4096)) {
		t.Error("a write of a client that is gone came after one that was sent later")
	}
}

// TestSettle: a new connection begins when those that were hung up have ended, so
// that what is only on its way to the device comes first.
func TestSettle(t *testing.T) {
	for _, tt := range []struct {
		name    string
		connect transport
		disc    bool
	}{{"Unix", byUnix, false}, {"TCP", byTCP, false}, {"TLS", byTLS, false}, {"TCP, after DISC", byTCP, true}} {
		t.Run(tt.name, func(t *testing.T) {
			dev := nbdtest.NewDevice(1<<20, false)
			arrives, goes := make(chan struct{}), make(chan struct{})
			dev.Before = func(op nbdtest.Op) error {
				if op.Method == "WriteAt" && op.Off == 0 {
					close(arrives)
					<-goes
				}
				return nil
			}
			p := newPKI(t)
			cfg := nbd.Config{}
			if tt.name == "TLS" {
				cfg.TLS = p.server
			}
			h := newHarness(t, cfg, nbd.Export{Device: dev})
			h.s.SetSettleTime(time.Hour)
			a, server, result := tt.connect(t, h, p)
			if err := a.Send(nbdtest.Request{Cmd: nbdtest.Write, Len: 4096}, pattern(4096, 1)); err != nil {
				t.Fatal(err)
			}
			<-arrives
			if tt.disc {
				if err := a.Send(nbdtest.Request{Cmd: nbdtest.Disc}, nil); err != nil {
					t.Fatal(err)
				}
			}
			a.Conn.Close()
			sawEnd(t, server)
			b, _, _ := tt.connect(t, h, p)
			done := make(chan error, 1)
			go func() {
				_, err := b.Write(pattern(4096, 2), 4096, 0)
				done <- err
			}()
			select {
			case <-done:
				t.Error("a new connection did not wait for one that is ending")
				done <- nil
			case <-time.After(20 * time.Millisecond):
			}
			close(goes)
			if err := wait(t, "the new connection's write", done); err != nil {
				t.Error(err)
			}
			wait(t, "Serve", result)
			if got := dev.Bytes(0, 4096); !bytes.Equal(got, pattern(4096, 1)) {
				t.Error("what had been begun was not done")
			}
		})
	}
}

// TestHalfClose: a client that has closed only its sending half gets its replies,
// however late they come, and whoever connects meanwhile. By TCP it is not known that
// it is there still: after DISC all is done, and without it what has not begun to
// change the device is refused.
func TestHalfClose(t *testing.T) {
	for _, tt := range []struct {
		name    string
		connect transport
		disc    bool
		write   uint32 // error of a write that has not begun
	}{
		{"Unix", byUnix, false, 0},
		{"Unix, DISC", byUnix, true, 0},
		{"TCP", byTCP, false, eSHUTDWN},
		{"TCP, DISC", byTCP, true, 0},
		{"TLS", byTLS, false, eSHUTDWN},
		{"TLS, DISC", byTLS, true, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			const at = 1 << 20
			dev, started, release := blockingDevice(4 << 20)
			defer release()
			p := newPKI(t)
			cfg := nbd.Config{InFlight: 2}
			if tt.name[:3] == "TLS" {
				cfg.TLS = p.server
			}
			h := newHarness(t, cfg, nbd.Export{Device: dev})
			h.s.SetSettleTime(time.Millisecond)
			c, server, result := tt.connect(t, h, p)
			// Two that hang in the device, and two that wait.
			b := nbdtest.Request{Cookie: 2, Off: 1, Len: 100_000}.Append(hanging(2))
			data := pattern(4096, 1)
			b = append(nbdtest.Request{Cmd: nbdtest.Write, Cookie: 3, Off: at, Len: 4096}.Append(b), data...)
			if tt.disc {
				b = nbdtest.Request{Cmd: nbdtest.Disc}.Append(b)
			}
			if _, err := c.Conn.Write(b); err != nil {
				t.Fatal(err)
			}
			if err := c.Conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if tc, ok := c.Conn.(*tls.Conn); ok { // which ends the stream and not the connection
				if err := tc.NetConn().(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, "reads run", func() bool { return started.Load() == 2 })
			// Or one of them, if the end has been seen already.
			eventually(t, "others wait", func() bool { return h.s.Stats().InFlight >= 3 })
			sawEnd(t, server)

			other, _, _ := tt.connect(t, h, p)
			if errno, err := other.Read(make([]byte, 512), 4096); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			release()
			for range 4 {
				errno, cookie, err := c.ReadReply()
				want := uint32(0)
				if cookie == 3 {
					want = tt.write
				}
				if err != nil || errno != want {
					t.Fatalf("reply to %d: error %d, %v; want %d", cookie, errno, err, want)
				}
				if cookie != 3 {
					if _, err := io.CopyN(io.Discard, c.Conn, 100_000); err != nil {
						t.Fatal(err)
					}
				}
			}
			if b, err := io.ReadAll(c.Conn); err != nil || len(b) != 0 {
				t.Errorf("after the last reply: %d bytes, %v", len(b), err)
			}
			if err := wait(t, "Serve", result); tt.disc && err != nil || !tt.disc && !errors.Is(err, io.EOF) {
				t.Errorf("Serve() = %v", err)
			}
			if tt.write != 0 {
				data = make([]byte, len(data))
			}
			if !bytes.Equal(dev.Bytes(at, int64(len(data))), data) {
				t.Error("the device holds what it should not")
			}
		})
	}
}

// TestDisconnectAndGo: what came before DISC is done, also when the client doesn't
// wait for it.
func TestDisconnectAndGo(t *testing.T) {
	dev, started, release := blockingDevice(4 << 20)
	defer release()
	h := newHarness(t, nbd.Config{InFlight: 2}, nbd.Export{Device: dev})
	h.s.SetSettleTime(time.Millisecond)
	c, _, result := byUnix(t, h, nil)
	data := pattern(4096, 1)
	b := append(nbdtest.Request{Cmd: nbdtest.Write, Off: 4096, Len: 4096}.Append(hanging(2)), data...)
	b = append(nbdtest.Request{Cmd: nbdtest.Write, Off: 8192, Len: 4096}.Append(b), data...)
	if _, err := c.Conn.Write(nbdtest.Request{Cmd: nbdtest.Disc}.Append(b)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "two reads hang", func() bool { return started.Load() == 2 })
	eventually(t, "two writes wait", func() bool { return h.s.Stats().InFlight == 4 })
	c.Conn.Close()
	other, _, _ := byUnix(t, h, nil)
	if errno, err := other.Read(make([]byte, 512), 1<<20); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	release()
	if err := wait(t, "Serve", result); err != nil {
		t.Errorf("Serve() = %v: the client had disconnected", err)
	}
	if got := dev.Bytes(4096, 8192); !bytes.Equal(got, append(data, data...)) {
		t.Error("a write before DISC was not done")
	}
}
