package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"hostcryptd/sector/sectortest"
)

// TestSuspend has requests of all kinds under way while the volume is suspended
// and resumed, over and over: refused or held as the mode says, every write that
// was answered is on stable storage when Suspend returns, and no request ever
// reads or writes with another key than the volume's.
func TestSuspend(t *testing.T) {
	for _, mode := range []SuspendMode{SuspendRefuse, SuspendWait} {
		t.Run(map[SuspendMode]string{SuspendRefuse: "refuse", SuspendWait: "wait"}[mode], func(t *testing.T) {
			testSuspend(t, mode)
		})
	}
}

func testSuspend(t *testing.T, mode SuspendMode) {
	const workers, block = 4, 4096
	disk := format(t, 4096, testVolumeSize)
	v := open1(t, disk, OpenOptions{})
	// With another key there is all that a header says of a volume, but for that.
	other := sectortest.New(disk.Size())
	if _, err := Format(t.Context(), other, FormatOptions{SectorSize: 4096, UUID: v.UUID(), Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	setHeader := func(of []byte) {
		t.Helper()
		if _, err := disk.WriteAt(of[:2*copySize], 0); err != nil {
			t.Fatal(err)
		}
	}
	ours, theirs := alignedBytes(2*copySize), alignedBytes(2*copySize)
	copy(ours, disk.Bytes())
	copy(theirs, other.Bytes())
	var written [workers][testVolumeSize / workers / block]atomic.Uint32 // what was answered, by block
	var refused atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(uint64(w), 1))
			p := make([]byte, block)
			for n := uint32(1); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				i := r.IntN(len(written[w]))
				off := int64(w*len(written[w])+i) * block
				if _, err := v.ReadAt(p, off); err == nil {
					if want := byte(written[w][i].Load()); !bytes.Equal(p, bytes.Repeat([]byte{want}, block)) && want != 0 {
						t.Errorf("block %d of worker %d reads as something else than was written", i, w)
						return
					}
				} else if mode == SuspendWait || !errors.Is(err, ErrSuspended) || !errors.Is(err, syscall.ESHUTDOWN) {
					t.Errorf("ReadAt: %v", err)
					return
				} else {
					refused.Add(1)
					time.Sleep(100 * time.Microsecond)
				}
				value := n%255 + 1
				for j := range p {
					p[j] = byte(value)
				}
				if _, err := v.WriteAt(p, off); err == nil {
					written[w][i].Store(value)
				} else if mode == SuspendWait || !errors.Is(err, ErrSuspended) {
					t.Errorf("WriteAt: %v", err)
					return
				}
			}
		})
	}
	for range 8 {
		time.Sleep(3 * time.Millisecond)
		if err := v.Suspend(mode); err != nil {
			t.Fatal(err)
		}
		if !v.Suspended() || v.keys != nil || v.cipher != nil {
			t.Fatal("Suspend returned and the keys are still there")
		}
		if !bytes.Equal(v.bufs.mem, make([]byte, len(v.bufs.mem))) {
			t.Fatal("Suspend left something in the buffers")
		}
		if mode == SuspendRefuse {
			if err := v.Sync(); !errors.Is(err, ErrSuspended) {
				t.Fatalf("Sync() = %v, want ErrSuspended", err)
			}
		}
		// All that was answered is on the disk, whatever it does to the rest.
		var answered [workers][]uint32
		for w := range written {
			for i := range written[w] {
				answered[w] = append(answered[w], written[w][i].Load())
			}
		}
		after := open1(t, disk.Crash(rand.New(rand.NewPCG(1, 2)), 4096), OpenOptions{})
		p := make([]byte, block)
		for w := range answered {
			for i, want := range answered[w] {
				if _, err := after.ReadAt(p, int64(w*len(answered[w])+i)*block); err != nil {
					t.Fatal(err)
				}
				// A write that is being answered just now may be there already.
				if now := written[w][i].Load(); want != 0 && p[0] != byte(want) && p[0] != byte(now) {
					t.Fatalf("block %d of worker %d was lost: %d, want %d", i, w, p[0], want)
				}
			}
		}
		setHeader(theirs)
		if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); !errors.Is(err, ErrAuth) || !v.Suspended() {
			t.Fatalf("Resume() with another key = %v, suspended: %v", err, v.Suspended())
		}
		setHeader(ours)
		if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if mode == SuspendRefuse && refused.Load() == 0 {
		t.Error("no request was refused, so nothing was tested")
	}
}

// TestSuspendFlushFailure: the keys are wiped though the flush failed, and the
// failure is told, then and after the volume was resumed.
func TestSuspendFlushFailure(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{})
	if _, err := v.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	d.Fail(func(op sectortest.Op, _ int, _ int64, _ int) error {
		if op == sectortest.Sync {
			return syscall.EIO
		}
		return nil
	})
	if err := v.Suspend(SuspendRefuse); !errors.Is(err, syscall.EIO) {
		t.Errorf("Suspend() = %v, want EIO", err)
	}
	if v.keys != nil {
		t.Error("the keys are still there")
	}
	d.Fail(nil)
	if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := v.Sync(); !errors.Is(err, ErrFailed) {
		t.Errorf("Sync() after a lost flush = %v, want ErrFailed", err)
	}
}

// TestSuspendStalledDisk: while a request hangs in the disk, new ones are
// refused at once, and the keys go when it has come back.
func TestSuspendStalledDisk(t *testing.T) {
	disk := format(t, 4096, testVolumeSize)
	v := open1(t, disk, OpenOptions{})
	release, entered := make(chan struct{}), make(chan struct{})
	disk.Fail(func(op sectortest.Op, n int, _ int64, _ int) error {
		if op == sectortest.Read && n == 1 {
			close(entered)
			<-release
		}
		return nil
	})
	read := make(chan error, 1)
	go func() {
		_, err := v.ReadAt(make([]byte, 4096), 0)
		read <- err
	}()
	<-entered
	suspended := make(chan error, 1)
	go func() { suspended <- v.Suspend(SuspendRefuse) }()
	for !v.Suspended() {
		time.Sleep(time.Millisecond)
	}
	if _, err := v.WriteAt(make([]byte, 4096), 8192); !errors.Is(err, ErrSuspended) {
		t.Errorf("WriteAt() = %v, want ErrSuspended", err)
	}
	select {
	case <-suspended:
		t.Error("Suspend returned while a request was using the keys")
	default:
	}
	close(release)
	if err := <-read; err != nil {
		t.Errorf("the request that was under way: %v", err)
	}
	if err := <-suspended; err != nil {
		t.Error(err)
	}
}

// TestSuspendZeroes: of zeros that go on for long, who stops the volume waits for one
// buffer. The rest is refused, or waits with the volume, and all are there then.
func TestSuspendZeroes(t *testing.T) {
	const size = 64 << 20
	suspend := func(mode SuspendMode) func(*Volume) error {
		return func(v *Volume) error { return v.Suspend(mode) }
	}
	restrict := func(v *Volume) error { v.Restrict(true); return nil }
	for _, tt := range []struct {
		name string
		stop func(*Volume) error
		want error
	}{{"refuse", suspend(SuspendRefuse), ErrSuspended}, {"wait", suspend(SuspendWait), nil}, {"restrict", restrict, syscall.EPERM}} {
		t.Run(tt.name, func(t *testing.T) {
			disk := format(t, 4096, size)
			v := open1(t, disk, OpenOptions{})
			whole, err := v.Size()
			if err != nil {
				t.Fatal(err)
			}
			var writes atomic.Int64
			third, release := make(chan struct{}), make(chan struct{})
			disk.Fail(func(op sectortest.Op, _ int, _ int64, _ int) error {
				if op == sectortest.Write && writes.Add(1) == 3 {
					close(third)
					<-release
				}
				return nil
			})
			zeroed, stopped := make(chan error, 1), make(chan error, 1)
			go func() { zeroed <- v.WriteZeroes(0, whole, true) }()
			<-third
			go func() { stopped <- tt.stop(v.Volume) }()
			for !v.Suspended() && !v.gate.restricted.Load() {
				time.Sleep(time.Millisecond)
			}
			close(release)
			if err := <-stopped; err != nil {
				t.Error(err)
			}
			if tt.want != nil {
				if err := <-zeroed; !errors.Is(err, tt.want) {
					t.Errorf("WriteZeroes() = %v, want %v", err, tt.want)
				}
			}
			if n := writes.Load(); n != 3 {
				t.Fatalf("%d buffers were written, want those of before and the one that was under way, 3", n)
			}
			if tt.want != nil {
				return
			}
			if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := <-zeroed; err != nil {
				t.Errorf("WriteZeroes() = %v after Resume", err)
			}
			v = open1(t, disk.Crash(rand.New(rand.NewPCG(1, 2)), 4096), OpenOptions{})
			got := make([]byte, whole)
			if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, whole)) {
				t.Errorf("what was zeroed reads as something else: %v", err)
			}
		})
	}
}

// TestSuspendKeepsOrder: a request that changes a sector and waits for the keys comes
// before those that ask for the sector later. Who sends a write again, on a new
// connection, must not have the first of them land on what it has written since.
func TestSuspendKeepsOrder(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	fill := func(b byte) []byte { return bytes.Repeat([]byte{b}, 8192) }
	write := func(p []byte) error { _, err := v.WriteAt(p, 4096); return err }
	waiting := func(n int) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
			v.ranges.mu.Lock()
			held := len(v.ranges.held)
			v.ranges.mu.Unlock()
			if held == n {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("%d requests have a place while the volume is suspended, want %d", held, n)
			}
		}
	}
	for what, first := range map[string]func() error{
		"write":          func() error { return write(fill(1)) },
		"write with FUA": func() error { _, err := v.WriteAtFUA(fill(1), 4096); return err },
		"zeros":          func() error { return v.WriteZeroes(0, 64<<10, false) },
		"trim":           func() error { return v.Trim(0, 64<<10, false) },
	} {
		for range 10 {
			if err := v.Suspend(SuspendWait); err != nil {
				t.Fatal(err)
			}
			ends := make(chan error, 3)
			for i, f := range []func() error{first, func() error { return write(fill(2)) }, func() error { return write(fill(3)) }} {
				go func() { ends <- f() }()
				waiting(i + 1)
			}
			if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(<-ends, <-ends, <-ends); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 8192)
			if _, err := v.ReadAt(got, 4096); err != nil || !bytes.Equal(got, fill(3)) {
				t.Fatalf("%s, and two writes after it, all while the volume was suspended: it holds %d, %v; want what came last", what, got[0], err)
			}
		}
	}
}

// A discarder is told of what is discarded.
type discarder struct {
	*Device
	discards func(off, length int64)
}

func (d discarder) Discard(off, length int64) error {
	d.discards(off, length)
	return d.Device.Discard(off, length)
}

// TestRestrictTrim: a large range is discarded in parts, between which the rest can be
// refused.
func TestRestrictTrim(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, 4<<30)); err != nil {
		t.Fatal(err)
	}
	dev, err := OpenDevice(name, DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	if _, err := Format(t.Context(), dev, FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	var parts []int64
	restricted := false
	var v testVolume
	v = open1(t, discarder{dev, func(off, length int64) {
		parts = append(parts, off, off+length)
		v.Restrict(restricted)
	}}, OpenOptions{Discard: true})
	size, err := v.Size()
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Trim(4096, size-4096, false); err != nil {
		t.Fatal(err)
	}
	const first = dataOffset + 4096
	if want := []int64{first, 1 << 30, 1 << 30, 2 << 30, 2 << 30, 3 << 30, 3 << 30, 4 << 30}; !slices.Equal(parts, want) {
		t.Errorf("discarded %d, want %d", parts, want)
	}
	parts, restricted = nil, true
	if err := v.Trim(4096, size-4096, false); !errors.Is(err, syscall.EPERM) || len(parts) != 2 {
		t.Errorf("Trim() = %v after %d parts, want EPERM after one", err, len(parts)/2)
	}
}

// TestSuspendAndResume lets two calls wait for a request that is under way, in the
// order in which they get their turns then.
func TestSuspendAndResume(t *testing.T) {
	start := func(t *testing.T) (v testVolume, h *Handover, blocks func(), end func()) {
		h, err := NewHandover()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		v = open1(t, format(t, 4096, testVolumeSize), OpenOptions{Handover: h})
		if err := v.Suspend(SuspendRefuse); err != nil {
			t.Fatal(err)
		}
		v.open.RLock() // a request
		return v, h, func() {
			for v.open.TryRLock() { // succeeds until somebody waits for all requests
				v.open.RUnlock()
				time.Sleep(time.Millisecond)
			}
		}, v.open.RUnlock
	}
	t.Run("suspended while it is resumed", func(t *testing.T) {
		v, h, blocks, end := start(t)
		resumed, suspended := make(chan error, 1), make(chan error, 1)
		go func() { resumed <- v.Resume(t.Context(), testUnseal, OpenOptions{Handover: h}) }()
		blocks()
		go func() { suspended <- v.Suspend(SuspendWait) }()
		for v.gate.state.Load() != gateWait {
			time.Sleep(time.Millisecond)
		}
		end()
		if err := errors.Join(<-resumed, <-suspended); err != nil {
			t.Fatal(err)
		}
		if v.keys != nil || h.HasKey() || !v.Suspended() {
			t.Errorf("keys %v, handed over %v, suspended %v; want a suspended volume", v.keys != nil, h.HasKey(), v.Suspended())
		}
	})
	t.Run("resumed twice", func(t *testing.T) {
		v, h, blocks, end := start(t)
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- v.Resume(t.Context(), testUnseal, OpenOptions{Handover: h}) }()
		blocks()
		unsealed := make(chan struct{})
		go func() {
			second <- v.Resume(t.Context(), func(ctx context.Context, volume string, token json.RawMessage, key *[VolumeKeySize]byte) error {
				close(unsealed)
				return testUnseal(ctx, volume, token, key)
			}, OpenOptions{Handover: h})
		}()
		<-unsealed
		end()
		if err := errors.Join(<-first, <-second); err != nil {
			t.Fatal(err)
		}
		if v.keys == nil || !h.HasKey() || v.Suspended() {
			t.Errorf("keys %v, handed over %v, suspended %v; want a volume that goes on", v.keys != nil, h.HasKey(), v.Suspended())
		}
	})
}

func TestSuspendedForGood(t *testing.T) {
	disk := format(t, 4096, testVolumeSize)
	v := open1(t, disk, OpenOptions{})
	if err := v.Suspend(SuspendWait); err != nil {
		t.Fatal(err)
	}
	waiting := make(chan error, 1)
	go func() { waiting <- v.Sync() }()
	select {
	case err := <-waiting:
		t.Fatalf("Sync() = %v, it should have waited", err)
	case <-time.After(20 * time.Millisecond):
	}
	// Another mode lets go of those who wait.
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if err := <-waiting; !errors.Is(err, ErrSuspended) {
		t.Errorf("Sync() = %v, want ErrSuspended", err)
	}

	// Another volume in the same place is not what was suspended.
	other := format(t, 4096, testVolumeSize)
	if _, err := disk.WriteAt(other.Bytes()[:dataOffset], 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); !errors.Is(err, ErrAuth) {
		t.Errorf("Resume() with the header of another volume = %v, want ErrAuth", err)
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if err := v.Suspend(SuspendWait); !errors.Is(err, ErrClosed) {
		t.Errorf("Suspend() of a closed volume = %v", err)
	}
	if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Resume() of a closed volume = %v", err)
	}
}

func TestRestrict(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	v.Restrict(true)
	if _, err := v.WriteAt(make([]byte, 512), 0); !errors.Is(err, syscall.EPERM) {
		t.Errorf("WriteAt() = %v, want EPERM", err)
	}
	if _, err := v.ReadAt(make([]byte, 512), 0); err != nil {
		t.Errorf("ReadAt() = %v", err)
	}
	if err := v.Sync(); err != nil {
		t.Errorf("Sync() = %v", err)
	}
	v.Restrict(false)
	if _, err := v.WriteAt(make([]byte, 512), 0); err != nil {
		t.Errorf("WriteAt() after = %v", err)
	}
}

// TestResumeLiftsRestriction: a volume that was read-only for want of its key,
// then locked, takes writes when the key is back.
func TestResumeLiftsRestriction(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	v.Restrict(true)
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(make([]byte, 512), 0); err != nil || v.gate.restricted.Load() {
		t.Errorf("WriteAt() = %v, restricted %v", err, v.gate.restricted.Load())
	}
}
