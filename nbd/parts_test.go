package nbd_test

import (
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// partsOf has a device say what zeros and trims it is given, and Syncs. The call of the
// given number, from 1 on, waits for release.
func partsOf(dev *nbdtest.Device, waits int) (ops func() []nbdtest.Op, release func()) {
	var mu sync.Mutex
	var list []nbdtest.Op
	gate := make(chan struct{})
	dev.Before = func(op nbdtest.Op) error {
		if op.Method == "ReadAt" || op.Method == "WriteAt" {
			return nil
		}
		mu.Lock()
		list = append(list, op)
		n := len(list)
		mu.Unlock()
		if n == waits {
			<-gate
		}
		return nil
	}
	ops = func() []nbdtest.Op {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(list)
	}
	return ops, sync.OnceFunc(func() { close(gate) })
}

// TestParts: long zeros are given to the device in parts, which FUA makes stable at the
// end; short ones as they are.
func TestParts(t *testing.T) {
	const size, part = 64 << 20, 16 << 20
	zeroes := func(off, length int64, fua bool) nbdtest.Op {
		return nbdtest.Op{Method: "WriteZeroes", Off: off, Len: length, FUA: fua}
	}
	for _, tt := range []struct {
		name        string
		off, length int64
		flags       uint16
		want        []nbdtest.Op
	}{
		{"short", 4096, part - 4096, 0, []nbdtest.Op{zeroes(4096, part-4096, false)}},
		{"short, FUA", part, part, nbdtest.FUA, []nbdtest.Op{zeroes(part, part, true)}},
		{"across", part - 4096, 8192, 0, []nbdtest.Op{zeroes(part-4096, 4096, false), zeroes(part, 4096, false)}},
		{"long, FUA", 4096, size - 8192, nbdtest.FUA, []nbdtest.Op{
			zeroes(4096, part-4096, false), zeroes(part, part, false), zeroes(2*part, part, false), zeroes(3*part, part-4096, false), {Method: "Sync"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := nbdtest.NewDevice(size, false)
			ops, _ := partsOf(dev, 0)
			h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
			c, _ := h.dial("")
			if err := c.Send(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Flags: tt.flags, Off: uint64(tt.off), Len: uint32(tt.length)}, nil); err != nil {
				t.Fatal(err)
			}
			if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			if got := ops(); !slices.Equal(got, tt.want) {
				t.Errorf("the device was given %v, want %v", got, tt.want)
			}
		})
	}
}

// A hugeDevice takes trims and has no data.
type hugeDevice struct {
	*nbdtest.Device
	mu    sync.Mutex
	trims []nbdtest.Op
}

func (d *hugeDevice) Size() (int64, error) { return 1 << 40, nil }

func (d *hugeDevice) Trim(off, length int64, fua bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.trims = append(d.trims, nbdtest.Op{Method: "Trim", Off: off, Len: length, FUA: fua})
	return nil
}

// TestPartsOfTrim: so are long trims.
func TestPartsOfTrim(t *testing.T) {
	dev := &hugeDevice{Device: nbdtest.NewDevice(0, false)}
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev, Trim: true})
	c, _ := h.dial("")
	if err := c.Send(nbdtest.Request{Cmd: nbdtest.Trim, Off: 64<<30 - 4096, Len: math.MaxUint32 - 4095}, nil); err != nil {
		t.Fatal(err)
	}
	if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	var want []nbdtest.Op
	for off, end := int64(64<<30-4096), int64(68<<30-8192); off < end; {
		next := min(end, (off>>36+1)<<36)
		want = append(want, nbdtest.Op{Method: "Trim", Off: off, Len: next - off})
		off = next
	}
	dev.mu.Lock()
	defer dev.mu.Unlock()
	if !slices.Equal(dev.trims, want) {
		t.Errorf("the device was given %v, want %v", dev.trims, want)
	}
}

// TestCalledOff: no further part of long zeros is begun when the client has gone or the
// server stops. Who is to go on with another server has no answer.
func TestCalledOff(t *testing.T) {
	stop := errors.New("stop")
	for _, tt := range []struct {
		name    string
		connect transport
		cause   error // of a cancellation; nil has the client go
		errno   uint32
		last    error // of what comes after the replies
	}{
		{"gone, Unix", byUnix, nil, 0, nil},
		{"gone, TCP", byTCP, nil, 0, nil},
		{"stop", byUnix, stop, eSHUTDWN, io.EOF},
		{"left", byUnix, nbd.ErrLeave, 0, io.EOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dev := nbdtest.NewDevice(64<<20, false)
			ops, release := partsOf(dev, 2)
			defer release()
			h := newHarness(t, nbd.Config{Grace: 30 * time.Second}, nbd.Export{Device: dev})
			h.s.SetSettleTime(10 * time.Millisecond)
			c, server, result := tt.connect(t, h, nil)
			if err := c.Send(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Cookie: 7, Len: 64 << 20}, nil); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the second part", func() bool { return len(ops()) == 2 })
			if tt.cause != nil {
				h.cancel(tt.cause)
			} else {
				c.Conn.Close()
				sawEnd(t, server)
				// Who connects has the server look.
				other, _, _ := byUnix(t, h, nil)
				done := make(chan error, 1)
				go func() {
					_, err := other.Read(make([]byte, 512), 0)
					done <- err
				}()
				if err := wait(t, "another's read", done); err != nil {
					t.Fatal(err)
				}
			}
			release()
			err := wait(t, "Serve", result)
			if tt.cause != nil && err != tt.cause {
				t.Errorf("Serve() = %v, want %v", err, tt.cause)
			}
			if got := ops(); len(got) != 2 {
				t.Errorf("the device was given %v, want two parts", got)
			}
			if tt.errno != 0 {
				if errno, cookie, err := c.ReadReply(); errno != tt.errno || cookie != 7 || err != nil {
					t.Errorf("reply: error %d, cookie %d, %v; want %d", errno, cookie, err, tt.errno)
				}
			}
			if tt.last != nil {
				if _, _, err := c.ReadReply(); err != tt.last {
					t.Errorf("after the last reply: %v, want %v", err, tt.last)
				}
			}
		})
	}
}

// TestZeroesAndGo: long zeros before DISC are done to their end, as is all else, also when
// the client doesn't wait for it.
func TestZeroesAndGo(t *testing.T) {
	dev := nbdtest.NewDevice(64<<20, false)
	ops, release := partsOf(dev, 2)
	defer release()
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	c, server, result := byUnix(t, h, nil)
	b := nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 64 << 20}.Append(nil)
	if _, err := c.Conn.Write(nbdtest.Request{Cmd: nbdtest.Disc}.Append(b)); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the second part", func() bool { return len(ops()) == 2 })
	c.Conn.Close()
	sawEnd(t, server)
	release()
	if err := wait(t, "Serve", result); err != nil {
		t.Errorf("Serve() = %v: the client had disconnected", err)
	}
	if got := ops(); len(got) != 4 {
		t.Errorf("the device was given %v, want all four parts", got)
	}
}

// TestNextServer: a client that connects again has no error when another server goes
// on: QEMU writes meanwhile, and reads it all.
func TestNextServer(t *testing.T) {
	dev := nbdtest.NewDevice(64<<20, false)
	const n = 400
	canceled := make(chan struct{})
	dev.Before = func(nbdtest.Op) error {
		if dev.Calls() > n/2 {
			<-canceled
		}
		return nil
	}
	path := t.TempDir() + "/s"
	first, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	first.SetUnlinkOnClose(false)
	f, err := first.File()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	next, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}

	args := []string{"--image-opts", "driver=nbd,server.type=unix,server.path=" + path + ",reconnect-delay=30"}
	for i := range n {
		args = append(args, "-c", fmt.Sprintf("aio_write -q -P %d %d 16k", i%250+1, i*65536))
	}
	args = append(args, "-c", "aio_flush")
	for i := range n {
		args = append(args, "-c", fmt.Sprintf("read -q -P %d %d 16k", i%250+1, i*65536))
	}
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := run(t, qemu, "qemu-io", args...)
		done <- result{out, err}
	}()

	h1 := newHarness(t, nbd.Config{Grace: 30 * time.Second}, nbd.Export{Device: dev})
	left := make(chan error, 1)
	h1.serves.Go(func() { left <- h1.s.ServeListener(h1.ctx, first) })
	eventually(t, "writes", func() bool { return dev.Calls() > n/4 })
	h1.cancel(nbd.ErrLeave)
	close(canceled)
	if err := wait(t, "ServeListener", left); err != nbd.ErrLeave {
		t.Errorf("ServeListener() = %v, want %v", err, nbd.ErrLeave)
	}
	calls := dev.Calls()
	h2 := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	h2.serves.Go(func() { _ = h2.s.ServeListener(h2.ctx, next) })
	r := wait(t, "qemu-io", done)
	if r.err != nil || strings.TrimSpace(r.out) != "" {
		t.Errorf("qemu-io: %v\n%.1000s", r.err, r.out)
	}
	if calls >= n || dev.Calls() <= calls {
		t.Errorf("the first server did %d of %d calls: it was left too late", calls, dev.Calls())
	}
}

// TestKernelZeroes: who watches over the kernel's requests isn't told that zeros of a
// client are the kernel's.
func TestKernelZeroes(t *testing.T) {
	for _, kernel := range []bool{false, true} {
		dev := nbdtest.NewDevice(1<<20, false)
		ops, release := partsOf(dev, 1)
		defer release()
		h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
		var c *nbdtest.Client
		if kernel {
			client, server := socketpair(t)
			defer client.Close()
			h.serves.Go(func() { h.s.ServeTransmission(h.ctx, server, ""); server.Close() })
			c = &nbdtest.Client{Conn: client}
		} else {
			c, _ = h.dial("")
		}
		if err := c.Send(nbdtest.Request{Cmd: nbdtest.WriteZeroes, Len: 1 << 20}, nil); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the zeros", func() bool { return len(ops()) == 1 })
		if got := h.s.KernelZeroes(); got != kernel {
			t.Errorf("KernelZeroes() = %v while those of the kernel are under way: %v", got, kernel)
		}
		release()
		if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
			t.Fatal(errno, err)
		}
		if h.s.KernelZeroes() {
			t.Error("KernelZeroes() after the reply")
		}
	}
}
