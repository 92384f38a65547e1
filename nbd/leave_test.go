package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// TestLeave has one server after the other serve the same socket, each for a
// moment, while requests of all sizes come in pieces. None may be lost, answered
// twice or refused.
func TestLeave(t *testing.T) {
	const (
		users    = 12
		room     = 2 << 20
		handover = 60
	)
	h := newHarness(t, nbd.Config{Grace: 20 * time.Second, InFlight: 4}, nbd.Export{Device: nbdtest.NewDevice(users*room, false)})
	kernel, conn := socketpair(t)
	server, err := nbd.NewSocket(conn)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()

	type reply struct {
		errno uint32
		data  []byte
	}
	var (
		sending sync.Mutex
		mu      sync.Mutex // guards wanted
		wanted  = make([]int, users)
		replies [users]chan reply
		work    sync.WaitGroup
		stop    = make(chan struct{})
	)
	for i := range replies {
		replies[i] = make(chan reply, 1)
	}
	r := rand.New(rand.NewPCG(1, 2))
	send := func(user int, q nbdtest.Request, payload []byte) error {
		mu.Lock()
		wanted[user] = 0
		if q.Cmd == nbdtest.Read {
			wanted[user] = int(q.Len)
		}
		mu.Unlock()
		sending.Lock()
		defer sending.Unlock()
		b := append(q.Append(nil), payload...)
		for len(b) > 0 {
			n := min(len(b), 1+r.IntN(1<<r.IntN(21)))
			if _, err := kernel.Write(b[:n]); err != nil {
				return err
			}
			if b = b[n:]; r.IntN(4) == 0 {
				time.Sleep(time.Duration(r.IntN(300)) * time.Microsecond)
			}
		}
		return nil
	}
	received := make(chan error, 1)
	go func() {
		for {
			errno, cookie, err := (&nbdtest.Client{Conn: kernel}).ReadReply()
			if err != nil {
				received <- err
				return
			}
			mu.Lock()
			n := wanted[cookie]
			wanted[cookie] = -1
			mu.Unlock()
			if n < 0 {
				received <- errors.New("a request was answered twice")
				return
			}
			p := make([]byte, n)
			if errno != 0 {
				p = nil
			}
			if _, err := io.ReadFull(kernel, p); err != nil {
				received <- err
				return
			}
			replies[cookie] <- reply{errno, p}
		}
	}()
	for user := range users {
		work.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(user), 3))
			for n := uint64(1); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				size := 512 << rnd.IntN(13)
				off := uint64(user*room + rnd.IntN(room-size+1)&^511)
				data := pattern(size, n)
				for _, q := range []nbdtest.Request{
					{Cmd: nbdtest.Write, Flags: uint16(rnd.IntN(2)) * nbdtest.FUA, Cookie: uint64(user), Off: off, Len: uint32(size)},
					{Cmd: nbdtest.Flush, Cookie: uint64(user)},
					{Cmd: nbdtest.Read, Cookie: uint64(user), Off: off, Len: uint32(size)},
				} {
					var payload []byte
					if q.Cmd == nbdtest.Write {
						payload = data
					}
					if err := send(user, q, payload); err != nil {
						t.Errorf("sending: %v", err)
						return
					}
					select {
					case got := <-replies[user]:
						if got.errno != 0 || q.Cmd == nbdtest.Read && !bytes.Equal(got.data, data) {
							t.Errorf("command %d of %d bytes: error %d, %d bytes", q.Cmd, size, got.errno, len(got.data))
							return
						}
					case <-time.After(30 * time.Second):
						t.Errorf("command %d of %d bytes was not answered", q.Cmd, size)
						return
					}
				}
			}
		})
	}

	serve := func(conn net.Conn, cause error, after time.Duration) error {
		ctx, cancel := context.WithCancelCause(h.ctx)
		defer time.AfterFunc(after, func() { cancel(cause) }).Stop()
		return h.s.ServeTransmission(ctx, conn, "")
	}
	for range handover {
		if err := serve(server, nbd.ErrLeave, time.Duration(rand.IntN(4000))*time.Microsecond); err != nbd.ErrLeave {
			t.Fatalf("ServeTransmission() = %v, want %v", err, nbd.ErrLeave)
		}
		// As another process gets it.
		f, err := server.File()
		if err != nil {
			t.Fatal(err)
		}
		next, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		server.Close()
		if server, err = nbd.NewSocket(next); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	done := make(chan struct{})
	go func() { work.Wait(); close(done) }()
	ended := make(chan error, 1)
	go func() { ended <- serve(server, errTestEnds, time.Minute) }()
	<-done
	kernel.CloseWrite()
	if err := <-ended; !errors.Is(err, io.EOF) {
		t.Errorf("ServeTransmission at the end: %v, want %v", err, io.EOF)
	}
	server.Close()
	if err := <-received; !errors.Is(err, io.EOF) {
		t.Errorf("receiving: %v", err)
	}
}

// TestLeaveInTheMiddle: a peer that doesn't send the rest of a request can't hold
// the server longer than the grace period, and then the socket is not fit for
// use any more.
func TestLeaveInTheMiddle(t *testing.T) {
	for name, part := range map[string][]byte{
		"header":  nbdtest.Request{Cmd: nbdtest.Write, Len: 4096}.Append(nil)[:10],
		"payload": append(nbdtest.Request{Cmd: nbdtest.Write, Len: 4096}.Append(nil), 1, 2, 3),
		"long":    append(nbdtest.Request{Cmd: nbdtest.Write, Len: 1 << 20}.Append(nil), make([]byte, 100<<10)...),
	} {
		t.Run(name, func(t *testing.T) {
			h := newHarness(t, nbd.Config{}, nbd.Export{Device: nbdtest.NewDevice(1<<20, false)})
			kernel, server := socketpair(t)
			defer kernel.Close()
			defer server.Close()
			result := make(chan error, 1)
			ctx, cancel := context.WithCancelCause(h.ctx)
			go func() { result <- h.s.ServeTransmission(ctx, server, "") }()
			if _, err := kernel.Write(part); err != nil {
				t.Fatal(err)
			}
			raw, err := server.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			eventually(t, "it has been read", func() bool {
				left := 1
				_ = raw.Control(func(fd uintptr) { left, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
				return left == 0
			})
			cancel(nbd.ErrLeave)
			if err := wait(t, "ServeTransmission", result); err == nil || err == nbd.ErrLeave || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("ServeTransmission() = %v, want %v", err, os.ErrDeadlineExceeded)
			}
		})
	}
}
