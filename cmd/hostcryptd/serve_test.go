package main

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// A writeLog notes the lengths of writes.
type writeLog struct {
	nbd.Device
	mu      sync.Mutex
	lengths []int
}

func (l *writeLog) WriteAt(b []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lengths = append(l.lengths, len(b))
	return len(b), nil
}

// TestMaxRequest: what the kernel is limited to is given to the volume, and so locked
// there, as a whole; anything longer is not.
func TestMaxRequest(t *testing.T) {
	d, _ := leavingServer(t)
	log := &writeLog{Device: d.volume}
	d.opts.attach = "auto"
	config := d.serverConfig()
	if !config.Kernel {
		t.Error("nothing is kept for the kernel's requests")
	}
	server, err := nbd.New(config, nbd.Export{Device: log, BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	kernel, socket := unixPair(t, unix.SOCK_STREAM)
	served := make(chan error, 1)
	go func() { served <- server.ServeTransmission(t.Context(), socket, "") }()
	for _, length := range []uint32{maxRequest, maxRequest + 4096} {
		// NBD_CMD_WRITE, and its reply without an error.
		request := binary.BigEndian.AppendUint32(nil, 0x25609513)
		request = binary.BigEndian.AppendUint32(request, 1)
		request = append(request, make([]byte, 16)...)
		request = binary.BigEndian.AppendUint32(request, length)
		if _, err := kernel.Write(append(request, make([]byte, length)...)); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, 16)
		if _, err := io.ReadFull(kernel, reply); err != nil || binary.BigEndian.Uint32(reply[4:]) != 0 {
			t.Fatalf("reply %x, %v", reply, err)
		}
	}
	kernel.Close()
	<-served
	slices.Sort(log.lengths) // the pieces are given away at the same time
	if want := []int{4096, maxRequest, maxRequest}; !slices.Equal(log.lengths, want) {
		t.Errorf("writes of %d, want %d", log.lengths, want)
	}
	_ = d.volume.Close()
}

// A slowWrite is a volume whose writes begin when they are let.
type slowWrite struct {
	nbd.Device
	entered, begin chan bool
}

func (v *slowWrite) WriteAt(p []byte, off int64) (int, error) {
	v.entered <- true
	<-v.begin
	return v.Device.WriteAt(p, off)
}

// TestFrozenWhileStopping: a server that stops waits for what clients have asked for. If
// the key is revoked by then, with the policy that requests wait for it, nobody asks for
// it any more: they are refused, and the server ends.
func TestFrozenWhileStopping(t *testing.T) {
	d, _ := leavingServer(t)
	d.opts.attach, d.opts.listen = "", filepath.Join(t.TempDir(), "socket")
	v := &slowWrite{d.volume, make(chan bool), make(chan bool)}
	var err error
	if d.server, err = nbd.New(d.serverConfig(), nbd.Export{Name: d.exportName(), Device: v, BlockSize: 4096}); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- d.serve(ctx) }()
	connected := func() net.Conn {
		c, _ := net.Dial("unix", d.opts.listen)
		return c
	}
	until := func(what string, is func() bool) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); !is(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal(what)
			}
		}
	}
	var conn net.Conn
	until("nobody listens", func() bool { conn = connected(); return conn != nil })
	defer conn.Close()
	client, err := nbdtest.Dial(conn, "")
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan bool, 1)
	go func() {
		errno, err := client.Write(make([]byte, 4096), 0, 0)
		written <- errno == 0 && err == nil
	}()
	<-v.entered
	stop()
	until("it doesn't stop", func() bool {
		c := connected()
		if c == nil {
			return true
		}
		c.Close()
		return false
	})
	d.lifeHost.Halt(lifecycle.Freeze)
	close(v.begin)
	select {
	case err := <-served:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("the server doesn't end")
		_ = d.volume.Close() // lets the request go
	}
	if <-written {
		t.Error("the write succeeded without a key")
	}
	d.stopLife()
	_ = d.volume.Close()
}
