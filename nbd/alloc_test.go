package nbd_test

import (
	"fmt"
	"io"
	"testing"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// BenchmarkServe measures the server's own cost: the device does nothing. The
// client is in the same process and as cheap as it can be, which still is about
// half of the time.
func BenchmarkServe(b *testing.B) {
	for _, bb := range []struct {
		op    string
		cmd   uint16
		size  int
		depth int
	}{
		{"read", nbdtest.Read, 4 << 10, 1},
		{"read", nbdtest.Read, 4 << 10, 32},
		{"read", nbdtest.Read, 128 << 10, 8},
		{"read", nbdtest.Read, 1 << 20, 4},
		{"write", nbdtest.Write, 4 << 10, 1},
		{"write", nbdtest.Write, 4 << 10, 32},
		{"write", nbdtest.Write, 128 << 10, 8},
		{"write", nbdtest.Write, 1 << 20, 4},
	} {
		b.Run(fmt.Sprintf("op=%s/size=%d/depth=%d", bb.op, bb.size, bb.depth), func(b *testing.B) {
			h := newHarness(b, nbd.Config{}, nbd.Export{Device: nullDevice{nbdtest.NewDevice(64<<20, false)}})
			round := newRound(b, h, bb.cmd, bb.size, bb.depth)
			b.SetBytes(int64(bb.size * bb.depth))
			b.ReportAllocs()
			for b.Loop() {
				round()
			}
		})
	}
}

// nullDevice moves no data.
type nullDevice struct{ *nbdtest.Device }

func (nullDevice) ReadAt(p []byte, _ int64) (int, error)     { return len(p), nil }
func (nullDevice) WriteAt(p []byte, _ int64) (int, error)    { return len(p), nil }
func (nullDevice) WriteAtFUA(p []byte, _ int64) (int, error) { return len(p), nil }

// newRound returns a function that sends depth requests in one write and waits
// for all replies, without allocating.
func newRound(tb testing.TB, h *harness, cmd uint16, size, depth int) func() {
	tb.Helper()
	c, _ := h.dial("")
	var out []byte
	for i := range depth {
		out = nbdtest.Request{Cmd: cmd, Cookie: uint64(i), Off: uint64(i * size), Len: uint32(size)}.Append(out)
		if cmd == nbdtest.Write {
			out = append(out, make([]byte, size)...)
		}
	}
	n := 16 * depth
	if cmd == nbdtest.Read {
		n += size * depth
	}
	in := make([]byte, n)
	if len(out) > 64<<10 {
		// More than a socket takes: send and receive at the same time.
		start := make(chan struct{})
		sent := make(chan error)
		tb.Cleanup(func() { close(start) })
		go func() {
			for range start {
				_, err := c.Conn.Write(out)
				sent <- err
			}
		}()
		return func() {
			start <- struct{}{}
			if _, err := io.ReadFull(c.Conn, in); err != nil {
				tb.Fatal(err)
			}
			if err := <-sent; err != nil {
				tb.Fatal(err)
			}
		}
	}
	return func() {
		if _, err := c.Conn.Write(out); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(c.Conn, in); err != nil {
			tb.Fatal(err)
		}
	}
}

// TestNothingAllocated: a request allocates nothing once the connection runs,
// whatever its kind and size.
func TestNothingAllocated(t *testing.T) {
	for _, tt := range []struct {
		what        string
		cmd         uint16
		size, depth int
	}{
		{"read", nbdtest.Read, 4096, 1},
		{"reads in a batch", nbdtest.Read, 4096, 60},
		{"long read", nbdtest.Read, 2 << 20, 2},
		{"empty read", nbdtest.Read, 0, 10},
		{"short write", nbdtest.Write, 512, 60},
		{"write with its own buffer", nbdtest.Write, 128 << 10, 4},
		{"write in pieces", nbdtest.Write, 2 << 20, 2},
		{"flush", nbdtest.Flush, 0, 10},
		{"write zeroes", nbdtest.WriteZeroes, 4096, 10},
		{"cache", nbdtest.Cache, 4096, 10},
		{"invalid", nbdtest.Resize, 4096, 10},
	} {
		t.Run(tt.what, func(t *testing.T) {
			h := newHarness(t, nbd.Config{}, nbd.Export{Device: nullDevice{nbdtest.NewDevice(64<<20, false)}})
			nothingAllocated(t, newRound(t, h, tt.cmd, tt.size, tt.depth))
		})
	}
}

func nothingAllocated(t *testing.T, round func()) {
	t.Helper()
	for range 20 {
		round()
	}
	// Less than one in ten rounds: the runtime itself allocates at times.
	if n := testing.AllocsPerRun(200, round); n >= 0.1 {
		t.Errorf("%v allocations in a round", n)
	}
}

// TestNothingAllocatedInChunks is TestNothingAllocated for structured replies
// and extended headers.
func TestNothingAllocatedInChunks(t *testing.T) {
	for _, extended := range []bool{false, true} {
		for _, cmd := range []uint16{nbdtest.Read, nbdtest.Flush, nbdtest.Cache, nbdtest.WriteZeroes, nbdtest.BlockStatus, nbdtest.Resize} {
			t.Run(fmt.Sprintf("extended=%v/command=%d", extended, cmd), func(t *testing.T) {
				h := newHarness(t, nbd.Config{}, nbd.Export{Name: "x", Device: nullDevice{nbdtest.NewDevice(64<<20, false)}})
				c, _ := h.negotiate("x", extended)
				const depth = 20
				var out []byte
				r := nbdtest.Request{Cmd: cmd, Len: 4096}
				if cmd == nbdtest.Flush {
					r.Len = 0
				}
				size := 16 // of the reply
				switch {
				case extended:
					size = 32 + map[uint16]int{nbdtest.Read: 8 + 4096, nbdtest.BlockStatus: 24, nbdtest.Resize: 6}[cmd]
				case cmd == nbdtest.Read:
					size = 20 + 8 + 4096
				case cmd == nbdtest.BlockStatus:
					size = 20 + 12
				}
				for range depth {
					if extended {
						out = r.AppendExtended(out)
					} else {
						out = r.Append(out)
					}
				}
				in := make([]byte, depth*size)
				nothingAllocated(t, func() {
					if _, err := c.Conn.Write(out); err != nil {
						t.Fatal(err)
					}
					if _, err := io.ReadFull(c.Conn, in); err != nil {
						t.Fatal(err)
					}
				})
			})
		}
	}
}
