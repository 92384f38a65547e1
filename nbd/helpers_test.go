package nbd_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

var _ nbd.Device = (*nbdtest.Device)(nil)

// A harness is a server whose connections a test makes one by one. When the
// test ends, it cancels what is still served and checks that nothing is left
// of it.
type harness struct {
	t      testing.TB
	s      *nbd.Server
	cancel context.CancelCauseFunc
	ctx    context.Context
	serves sync.WaitGroup
	spare  int64 // workers that clients share
}

var errTestEnds = errors.New("test ends")

func newHarness(t testing.TB, cfg nbd.Config, exports ...nbd.Export) *harness {
	t.Helper()
	if cfg.Grace == 0 {
		cfg.Grace = 100 * time.Millisecond
	}
	async(t, exports)
	s, err := nbd.New(cfg, exports...)
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{t: t, s: s, spare: s.SpareWorkers()}
	h.ctx, h.cancel = context.WithCancelCause(context.Background())
	t.Cleanup(func() {
		h.cancel(errTestEnds)
		h.serves.Wait()
		st := s.Stats()
		if st.Connections != 0 || st.InFlight != 0 || st.Arena.Used != 0 {
			t.Errorf("after the last connection: %+v, want nothing in use", st)
		}
		if n := s.SpareWorkers(); n != h.spare {
			t.Errorf("after the last connection: there are %d workers for all, want %d", n, h.spare)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return h
}

// socketpair returns two ends of a Unix stream connection.
func socketpair(t testing.TB) (a, b *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	return conns[0], conns[1]
}

// serve runs Serve on conn, closes conn afterwards, as a listener would, and
// returns where the result of Serve comes.
func (h *harness) serve(conn net.Conn) <-chan error {
	result := make(chan error, 1)
	h.serves.Go(func() {
		err := h.s.Serve(h.ctx, conn)
		conn.Close()
		result <- err
	})
	return result
}

// raw returns the client end of a connection whose handshake has not begun.
func (h *harness) raw() (net.Conn, <-chan error) {
	h.t.Helper()
	client, server := socketpair(h.t)
	h.t.Cleanup(func() { client.Close() })
	// A test that waits for what doesn't come should fail and say where.
	if err := client.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		h.t.Fatal(err)
	}
	return client, h.serve(server)
}

// dial returns a client that has chosen an export.
func (h *harness) dial(name string) (*nbdtest.Client, <-chan error) {
	h.t.Helper()
	conn, result := h.raw()
	c, err := nbdtest.Dial(conn, name)
	if err != nil {
		h.t.Fatal(err)
	}
	return c, result
}

// wait returns what comes, or fails the test.
func wait[T any](t testing.TB, what string, ch <-chan T) T {
	t.Helper()
	select {
	case v := <-ch:
		return v
	case <-time.After(30 * time.Second):
		t.Fatalf("%s: nothing after 30 s", what)
		panic("unreachable")
	}
}

// eventually waits until cond is true, or fails the test.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not after 30 s", what)
		}
	}
}

// pattern returns n bytes that differ by position and seed.
func pattern(n int, seed uint64) []byte {
	b := make([]byte, n+7)
	x := seed*0x9e3779b97f4a7c15 + 1
	for i := 0; i < n; i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(b[i:], x)
	}
	return b[:n]
}
