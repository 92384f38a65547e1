package sector

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain runs everything twice: with reads and writes in one call, as the
// portable engine of a server makes them, and in two halves with the I/O
// between them, as its io_uring engine does.
func TestMain(m *testing.M) {
	flag.Parse()
	for _, name := range []string{"test.fuzz", "test.bench", "test.list"} {
		if flag.Lookup(name).Value.String() != "" {
			os.Exit(m.Run())
		}
	}
	for _, inHalves = range []bool{false, true} {
		if code := m.Run(); code != 0 {
			fmt.Println("with requests in halves:", inHalves)
			os.Exit(code)
		}
	}
}

var inHalves bool

// A testVolume is a Volume whose requests come in halves if inHalves is set,
// and those that can't as they always do.
type testVolume struct{ *Volume }

// memory returns what the server's memory is: aligned.
func (v testVolume) memory(p []byte) []byte {
	if inHalves && len(p) > 0 && !aligned(p, int(v.align)) {
		return alignedBytes(len(p))
	}
	return p
}

func (v testVolume) ReadAt(p []byte, off int64) (int, error) {
	if !inHalves {
		return v.Volume.ReadAt(p, off)
	}
	b := v.memory(p)
	_, at, ok := v.BeginRead(b, off)
	if !ok {
		return v.Volume.ReadAt(p, off)
	}
	n, err := v.b.ReadAt(b, at)
	n, err = v.EndRead(b, off, n, err)
	copy(p, b)
	return n, err
}

func (v testVolume) WriteAt(p []byte, off int64) (int, error) {
	return v.writeAt(p, off, false, v.b.WriteAt, v.Volume.WriteAt)
}

func (v testVolume) WriteAtFUA(p []byte, off int64) (int, error) {
	if !v.b.Direct() {
		return v.Volume.WriteAtFUA(p, off) // it isn't Async then
	}
	return v.writeAt(p, off, true, v.b.WriteAtSync, v.Volume.WriteAtFUA)
}

// scratch has buffers for writes, whose payload is lost.
var scratch sync.Pool

func (v testVolume) writeAt(p []byte, off int64, fua bool, middle, whole func([]byte, int64) (int, error)) (int, error) {
	if !inHalves {
		return whole(p, off)
	}
	room, _ := scratch.Get().(*[]byte)
	if room == nil || len(*room) < len(p) {
		room = new([]byte)
		*room = alignedBytes(len(p))
	}
	defer scratch.Put(room)
	b := (*room)[:len(p)]
	copy(b, p)
	_, at, ticket, ok := v.BeginWrite(b, off, fua)
	if !ok {
		if string(b) != string(p) {
			return 0, errors.New("BeginWrite changed a payload and then refused it")
		}
		return whole(p, off)
	}
	n, err := middle(b, at)
	return v.EndWrite(b, off, fua, ticket, n, err)
}

// TestAsyncWaits: what can't begin at once is left to the calls that wait.
func TestAsyncWaits(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	p := alignedBytes(8192)
	begin := func(p []byte, off int64) bool {
		_, _, ticket, ok := v.BeginWrite(p, off, false)
		if ok {
			v.EndWrite(p, off, false, ticket, len(p), nil)
		}
		return ok
	}
	if !begin(p, 4096) {
		t.Fatal("a write of whole sectors is refused")
	}
	for _, c := range []struct {
		what string
		p    []byte
		off  int64
	}{
		{"half a sector", p[:2048], 0},
		{"between sectors", p[:4096], 2048},
		{"memory that is not aligned", p[1:4097], 0},
		{"nothing", p[:0], 0},
		{"over the end", p, testVolumeSize - 4096},
		{"before the start", p, -4096},
	} {
		if begin(c.p, c.off) {
			t.Errorf("%s: a write began", c.what)
		}
		if _, _, ok := v.BeginRead(c.p, c.off); ok {
			t.Errorf("%s: a read began", c.what)
		}
	}

	// A write of a part of a sector, and one that waits for it.
	part := v.ranges.lock(4096, 8192)
	if begin(p, 0) {
		t.Error("a write began of a sector that is being merged")
	}
	if !begin(p, 8192) {
		t.Error("a write of other sectors is refused")
	}
	v.ranges.unlock(part)
	_, _, ticket, ok := v.BeginWrite(p, 4096, false)
	if !ok {
		t.Fatal("a write of whole sectors is refused")
	}
	merged := make(chan uint64)
	go func() { merged <- v.ranges.lock(4096, 8192) }()
	select {
	case <-merged:
		t.Error("a sector is merged while a write of it is under way")
	case <-time.After(20 * time.Millisecond):
	}
	// Who came first is served first.
	if begin(p, 0) {
		t.Error("a write began before one that waits for the same sector")
	}
	v.EndWrite(p, 4096, false, ticket, len(p), nil)
	v.ranges.unlock(<-merged)

	// The kernel may send a write again that is still under way.
	if _, _, ticket, ok = v.BeginWrite(p, 0, false); !ok {
		t.Fatal("a write of whole sectors is refused")
	}
	if begin(alignedBytes(4096), 4096) {
		t.Error("a write began of a sector that another is writing")
	}
	v.EndWrite(p, 0, false, ticket, len(p), nil)

	v.Restrict(true)
	if begin(p, 0) {
		t.Error("a write began on a volume that is read-only for now")
	}
	v.Restrict(false)
}

// TestAsyncSuspend: Suspend waits for what is with the kernel, and meanwhile
// nothing new begins, nor does the attempt wait.
func TestAsyncSuspend(t *testing.T) {
	for _, mode := range []SuspendMode{SuspendRefuse, SuspendWait} {
		v := open1(t, format(t, 512, testVolumeSize), OpenOptions{})
		p, q := alignedBytes(4096), alignedBytes(4096)
		_, at, ok := v.BeginRead(p, 0)
		if !ok {
			t.Fatal("a read is refused")
		}
		done := make(chan error)
		go func() { done <- v.Suspend(mode) }()
		for !v.Suspended() {
			time.Sleep(time.Millisecond)
		}
		select {
		case err := <-done:
			t.Fatalf("Suspend() = %v while a read was with the kernel", err)
		case <-time.After(20 * time.Millisecond):
		}
		if _, _, ok := v.BeginRead(q, 0); ok {
			t.Error("a read began on a suspended volume")
		}
		n, err := v.b.ReadAt(p, at)
		if _, err := v.EndRead(p, 0, n, err); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := v.Resume(context.Background(), testUnseal, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, _, ok := v.BeginRead(q, 0); !ok {
			t.Error("a read is refused by a volume that was resumed")
		}
		v.EndRead(q, 0, len(q), nil)
	}
}

// TestAsyncErrors: the error of the middle is that of the request, and one of a
// write with FUA fails the volume.
func TestAsyncErrors(t *testing.T) {
	v := open1(t, format(t, 512, testVolumeSize), OpenOptions{})
	p := alignedBytes(4096)
	for i := range p {
		p[i] = 1
	}
	v.BeginRead(p, 0)
	if n, err := v.EndRead(p, 0, 512, nil); n != 0 || !errors.Is(err, unix.EIO) {
		t.Errorf("a short read gave %d, %v", n, err)
	}
	for _, b := range p {
		if b != 0 {
			t.Fatal("after a failed read there is something in its buffer")
		}
	}
	_, _, ticket, _ := v.BeginWrite(p, 0, false)
	if n, err := v.EndWrite(p, 0, false, ticket, 512, nil); n != 0 || !errors.Is(err, unix.EIO) || v.Failed() {
		t.Errorf("a short write gave %d, %v; failed: %v", n, err, v.Failed())
	}
	_, _, ticket, _ = v.BeginWrite(p, 0, true)
	if _, err := v.EndWrite(p, 0, true, ticket, 0, unix.EIO); !errors.Is(err, unix.EIO) || !v.Failed() {
		t.Errorf("a failed FUA gave %v; failed: %v", err, v.Failed())
	}
	if _, _, _, ok := v.BeginWrite(p, 0, false); ok {
		t.Error("a write began on a volume that has failed")
	}
	if s := v.Stats(); s.Errors != 3 || s.Reads != 1 || s.Writes != 2 {
		t.Errorf("Stats() = %+v", s)
	}
}

// TestDirectFile: an image file can be had without the page cache, where its
// file system does that.
func TestDirectFile(t *testing.T) {
	name := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(name, make([]byte, 20<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, direct := range []bool{false, true} {
		d, err := OpenDevice(name, DeviceOptions{Direct: direct})
		if err != nil {
			t.Fatal(err)
		}
		flags, err := unix.FcntlInt(uintptr(d.Descriptor()), unix.F_GETFL, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := flags&unix.O_DIRECT != 0; got != direct || d.Direct() != direct {
			t.Errorf("Direct: %v: O_DIRECT is %v, Direct() %v", direct, got, d.Direct())
		}
		if d.Alignment() > 4096 || direct == (d.Alignment() == 1) {
			t.Errorf("Direct: %v: Alignment() = %d", direct, d.Alignment())
		}
		if _, err := Format(t.Context(), d, FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}); err != nil {
			t.Fatal(err)
		}
		v, err := Open(t.Context(), d, testUnseal, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if v.Async() != direct {
			t.Errorf("Direct: %v: Async() = %v", direct, v.Async())
		}
		v.Close()
		d.Close()
	}
	v, err := Open(t.Context(), format(t, 512, testVolumeSize), testUnseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	p := alignedBytes(512)
	if _, _, ok := v.BeginRead(p, 0); ok || v.Async() {
		t.Error("a volume is Async whose backing device is no descriptor")
	}
	if _, _, _, ok := v.BeginWrite(p, 0, false); ok {
		t.Error("a write has begun on a backing device that is no descriptor")
	}
}
