package nbd_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// sockets returns both ends of a connection as Sockets.
func sockets(t testing.TB) (a, b *nbd.Socket) {
	t.Helper()
	c, d := socketpair(t)
	var err error
	if a, err = nbd.NewSocket(c); err != nil {
		t.Fatal(err)
	}
	if b, err = nbd.NewSocket(d); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	return a, b
}

// TestSocketShutdown: it ends a read that waits, and the other side's.
func TestSocketShutdown(t *testing.T) {
	a, b := sockets(t)
	var ends [2]chan error
	for i, s := range []*nbd.Socket{a, b} {
		ends[i] = make(chan error, 1)
		go func() {
			_, err := s.Read(make([]byte, 1))
			ends[i] <- err
		}()
	}
	if err := a.Shutdown(); err != nil {
		t.Fatal(err)
	}
	for i := range ends {
		if err := wait(t, "Read", ends[i]); !errors.Is(err, io.EOF) {
			t.Errorf("Read() = %v, want %v", err, io.EOF)
		}
	}
}

// TestSocket: what is written is read, however much more it is than the socket
// holds, and the end is the end.
func TestSocket(t *testing.T) {
	a, b := sockets(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<17)
	sent := make(chan error, 1)
	go func() {
		n, err := a.Write(want)
		if err == nil && n != len(want) {
			err = io.ErrShortWrite
		}
		sent <- errors.Join(err, a.Close())
	}()
	got, err := io.ReadAll(b)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("got %d bytes, %v; want %d", len(got), err, len(want))
	}
	if err := wait(t, "Write", sent); err != nil {
		t.Error(err)
	}
	if err := a.Close(); err != nil {
		t.Errorf("closing again: %v", err)
	}
	if _, err := b.Write(want[:1]); !errors.Is(err, unix.EPIPE) {
		t.Errorf("Write() to a closed connection = %v, want %v", err, unix.EPIPE)
	}
}

// TestSocketDeadline: deadlines end what waits, also those that are set later.
func TestSocketDeadline(t *testing.T) {
	a, b := sockets(t)
	result := make(chan error, 1)
	go func() { _, err := a.Read(make([]byte, 1)); result <- err }()
	time.Sleep(10 * time.Millisecond)
	a.SetReadDeadline(time.Now())
	if err := wait(t, "Read", result); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read() = %v, want %v", err, os.ErrDeadlineExceeded)
	}
	written := 0
	go func() { n, err := a.Write(make([]byte, 16<<20)); written = n; result <- err }()
	if _, err := b.Read(make([]byte, 1)); err != nil { // so it has begun
		t.Fatal(err)
	}
	a.SetWriteDeadline(time.Unix(1, 0))
	if err := wait(t, "Write", result); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write() = %v, want %v", err, os.ErrDeadlineExceeded)
	}
	if written == 0 || written == 16<<20 {
		t.Errorf("Write() = %d, want a part", written)
	}
	if n, err := a.Write([]byte{1}); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Write() after the deadline = %d, %v", n, err)
	}
}

// polled returns the inodes of what Go's network poller watches.
func polled(t *testing.T) map[string]bool {
	t.Helper()
	fds, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	inodes, found := map[string]bool{}, false
	for _, fd := range fds {
		if l, _ := os.Readlink(fd); l != "anon_inode:[eventpoll]" {
			continue
		}
		found = true
		info, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(fd))
		if err != nil {
			t.Fatal(err)
		}
		for f := range strings.FieldsSeq(string(info)) {
			if ino, ok := strings.CutPrefix(f, "ino:"); ok {
				inodes[ino] = true
			}
		}
	}
	if !found {
		t.Fatal("no epoll descriptor in /proc/self/fd")
	}
	return inodes
}

// TestPollerIsLeftAlone: the connections of a listener are not watched by Go's
// network poller, of which each request would wake a thread, see [nbd.Socket].
func TestPollerIsLeftAlone(t *testing.T) {
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(1<<20, false)})
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h.serves.Go(func() { h.s.ServeListener(h.ctx, ln) })
	before := polled(t)
	dialed, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := nbd.NewSocket(dialed)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c, err := nbdtest.Dial(conn, "")
	if err != nil {
		t.Fatal(err)
	}
	if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	for ino := range polled(t) {
		if !before[ino] {
			t.Errorf("the poller watches inode %s", ino)
		}
	}
}
