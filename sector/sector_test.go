package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"hostcryptd/sector/luks2"
	"hostcryptd/sector/sectortest"
)

// testSeal puts the volume key into the token as it is, and testUnseal gets it
// out. Real ones are in package keyunseal.
func testSeal(_ context.Context, volume string, key *[32]byte) (json.RawMessage, error) {
	return json.Marshal(map[string]any{"type": "hostcryptd-test", "keyslots": []string{}, "key": key[:]})
}

func testUnseal(_ context.Context, volume string, token json.RawMessage, key *[32]byte) error {
	var t struct {
		Key []byte `json:"key"`
	}
	if err := json.Unmarshal(token, &t); err != nil {
		return err
	}
	if len(t.Key) != 32 {
		return errors.New("no key in this token")
	}
	copy(key[:], t.Key)
	return nil
}

const testVolumeSize = 1 << 20

// format makes a volume with room bytes behind its header on a disk in memory.
func format(t testing.TB, sectorSize int, room int64) *sectortest.Disk {
	t.Helper()
	d := sectortest.New(dataOffset + room)
	d.Align = sectorSize
	if _, err := Format(t.Context(), d, FormatOptions{SectorSize: sectorSize, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	return d
}

// imageFile opens a file of size bytes, all of them a hole.
func imageFile(t testing.TB, name string, size int64, o DeviceOptions) *Device {
	t.Helper()
	if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, size)); err != nil {
		t.Fatal(err)
	}
	d, err := OpenDevice(name, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// formatted is d, with a volume of sectors of 4096 bytes on it.
func formatted(t testing.TB, d *Device) *Device {
	t.Helper()
	if _, err := Format(t.Context(), d, FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	return d
}

func open1(t testing.TB, b Backing, o OpenOptions) testVolume {
	t.Helper()
	v, err := Open(t.Context(), b, testUnseal, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := v.Close(); err != nil {
			t.Errorf("Close() = %v", err)
		}
	})
	if v.fd < 0 {
		v.fd = 1 << 30 // testVolume does what is between the halves
	}
	return testVolume{v}
}

// forSectorSizes runs a test for both sector sizes.
func forSectorSizes(t *testing.T, f func(t *testing.T, sectorSize int)) {
	for _, n := range []int{512, 4096} {
		t.Run(fmt.Sprintf("sector=%d", n), func(t *testing.T) { f(t, n) })
	}
}

// TestModel runs random requests of every kind and alignment against a volume
// and a slice, and compares every byte that is read.
func TestModel(t *testing.T) {
	forSectorSizes(t, func(t *testing.T, sectorSize int) {
		r := rand.New(rand.NewPCG(1, uint64(sectorSize)))
		d := format(t, sectorSize, testVolumeSize)
		v := open1(t, d, OpenOptions{})
		model := make([]byte, testVolumeSize)
		if err := v.WriteZeroes(0, testVolumeSize, false); err != nil {
			t.Fatal(err)
		}
		for i := range 3000 {
			off := r.Int64N(testVolumeSize)
			length := r.Int64N(min(testVolumeSize-off, 1+int64(r.IntN(3))*300_000+int64(sectorSize)*2)) + 1
			if r.IntN(3) == 0 { // often whole sectors
				off = off / int64(sectorSize) * int64(sectorSize)
				length = (length + int64(sectorSize) - 1) / int64(sectorSize) * int64(sectorSize)
				length = min(length, testVolumeSize-off)
			}
			p := make([]byte, length)
			var err error
			op := r.IntN(6)
			switch op {
			case 0, 1:
				for i := range p {
					p[i] = byte(r.Uint32())
				}
				copy(model[off:], p)
				before := bytes.Clone(p)
				if op == 0 {
					_, err = v.WriteAt(p, off)
				} else {
					_, err = v.WriteAtFUA(p, off)
				}
				if !bytes.Equal(before, p) {
					t.Fatal("a write changed its argument")
				}
			case 2:
				clear(model[off : off+length])
				err = v.WriteZeroes(off, length, r.IntN(2) == 0)
			case 3:
				err = v.Trim(off, length, r.IntN(2) == 0) // not passed on
			case 4:
				if i%50 == 0 {
					err = v.Sync()
				}
			}
			if err != nil {
				t.Fatalf("request %d (kind %d, %d bytes at %d): %v", i, op, length, off, err)
			}
			if n, err := v.ReadAt(p, off); err != nil || int64(n) != length {
				t.Fatalf("ReadAt = %d, %v", n, err)
			}
			if !bytes.Equal(p, model[off:off+length]) {
				t.Fatalf("request %d (kind %d): %d bytes at %d read back differ", i, op, length, off)
			}
		}
		// What is on the disk is not what was written, and another Open reads it.
		canary := []byte("a canary that is long enough not to come about by chance")
		copy(model[1000:], canary)
		if _, err := v.WriteAt(canary, 1000); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(d.Bytes(), canary) {
			t.Error("plaintext is on the disk")
		}
		got := make([]byte, testVolumeSize)
		if _, err := open1(t, d, OpenOptions{ReadOnly: true}).ReadAt(got, 0); err != nil || !bytes.Equal(got, model) {
			t.Errorf("after a second Open the content differs (%v)", err)
		}
		if s := v.Stats(); s.Errors != 0 || s.Merges == 0 || s.Writes == 0 {
			t.Errorf("Stats() = %+v", s)
		}
	})
}

// TestParts has goroutines that each own some bytes of the same sectors, so
// that every write merges with the others'.
func TestParts(t *testing.T) {
	forSectorSizes(t, func(t *testing.T, sectorSize int) {
		d := format(t, sectorSize, testVolumeSize)
		v := open1(t, d, OpenOptions{})
		const parts, rounds = 8, 200
		part := sectorSize / parts
		var wg sync.WaitGroup
		for g := range parts {
			wg.Go(func() {
				p := make([]byte, part)
				for round := range rounds {
					for i := range p {
						p[i] = byte(g*31 + round)
					}
					for s := range 3 {
						off := int64(s*sectorSize + g*part)
						if _, err := v.WriteAt(p, off); err != nil {
							t.Error(err)
						}
						got := make([]byte, part)
						if _, err := v.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
							t.Errorf("part %d of sector %d was lost in round %d (%v)", g, s, round, err)
							return
						}
					}
				}
			})
		}
		wg.Wait()
	})
}

// TestPartAgainstWhole holds a write of a part of a sector between its read
// and its write, and checks that a write of the whole sector waits for it.
func TestPartAgainstWhole(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{})
	merging, release := make(chan bool), make(chan bool)
	var once sync.Once
	d.Fail(func(op sectortest.Op, _ int, off int64, _ int) error { return nil })
	slow := &slowReads{Disk: d, hook: func() { once.Do(func() { merging <- true; <-release }) }}
	v.b = slow

	var wg sync.WaitGroup
	wg.Go(func() { v.WriteAt([]byte("part"), 100) })
	<-merging
	whole := bytes.Repeat([]byte("W"), 4096)
	done := make(chan bool)
	wg.Go(func() { v.WriteAt(whole, 0); close(done) })
	select {
	case <-done:
		t.Error("a write of the whole sector overtook a merge that had read it")
	case <-time.After(50 * time.Millisecond):
	}
	close(release)
	wg.Wait()
	got := make([]byte, 4096)
	if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, whole) {
		t.Errorf("the later write was lost (%v): %q…", err, got[:110])
	}
}

type slowReads struct {
	*sectortest.Disk
	hook func()
}

func (s *slowReads) ReadAt(p []byte, off int64) (int, error) {
	n, err := s.Disk.ReadAt(p, off)
	s.hook()
	return n, err
}

func TestBounds(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	for _, tt := range []struct{ off, length int64 }{
		{testVolumeSize, 1}, {testVolumeSize - 1, 2}, {-1, 1}, {1 << 62, 1}, {1<<63 - 1, 1 << 20},
	} {
		if _, err := v.WriteAt(make([]byte, tt.length), tt.off); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("WriteAt(%d bytes at %d) error %v, want EINVAL", tt.length, tt.off, err)
		}
		if err := v.WriteZeroes(tt.off, tt.length, false); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("WriteZeroes(%d at %d) error %v, want EINVAL", tt.length, tt.off, err)
		}
		if err := v.Trim(tt.off, tt.length, false); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("Trim(%d at %d) error %v, want EINVAL", tt.length, tt.off, err)
		}
	}
	if err := v.WriteZeroes(0, -1, false); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("WriteZeroes of -1 bytes: %v", err)
	}
	// A reader gets what there is, as io.ReaderAt has it.
	if n, err := v.ReadAt(make([]byte, 10), testVolumeSize-4); n != 4 || !errors.Is(err, io.EOF) {
		t.Errorf("ReadAt over the end = %d, %v, want 4, EOF", n, err)
	}
	if n, err := v.WriteAt(nil, 0); n != 0 || err != nil {
		t.Errorf("WriteAt of nothing = %d, %v", n, err)
	}
}

func TestReadOnly(t *testing.T) {
	d := format(t, 512, testVolumeSize)
	before := d.Bytes()
	v := open1(t, d, OpenOptions{ReadOnly: true, Discard: true})
	_, err := v.WriteAt(make([]byte, 512), 0)
	for i, err := range []error{err, v.WriteZeroes(0, 512, false), v.Trim(0, 512, false)} {
		if !errors.Is(err, syscall.EPERM) {
			t.Errorf("request %d on a read-only volume: %v, want EPERM", i, err)
		}
	}
	if err := v.Sync(); err != nil {
		t.Errorf("Sync() = %v", err)
	}
	if !bytes.Equal(before, d.Bytes()) {
		t.Error("a read-only volume was changed")
	}
}

func TestTrim(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{Discard: true})
	data := bytes.Repeat([]byte("x"), 5*4096)
	if _, err := v.WriteAt(data, 0); err != nil {
		t.Fatal(err)
	}
	// Only the sectors that lie whole in the range may go.
	if err := v.Trim(100, 3*4096, true); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(data))
	if _, err := v.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got[:4096], data[:4096]) || !bytes.Equal(got[3*4096:], data[3*4096:]) {
		t.Error("Trim touched sectors that are only partly in its range")
	}
	if bytes.Equal(got[4096:3*4096], data[4096:3*4096]) {
		t.Error("Trim did not reach the device")
	}
	d.Fail(func(op sectortest.Op, _ int, _ int64, _ int) error {
		if op == sectortest.Discard {
			return errors.ErrUnsupported
		}
		return nil
	})
	if err := v.Trim(0, 8192, false); err != nil {
		t.Errorf("Trim where the device can't: %v", err)
	}
}

// TestDurability cuts the power at random moments, and checks that nothing is
// lost that a Sync or an FUA write covered.
func TestDurability(t *testing.T) {
	forSectorSizes(t, func(t *testing.T, sectorSize int) {
		const blocks = 32
		for seed := range uint64(10) {
			r := rand.New(rand.NewPCG(seed, 7))
			d := format(t, sectorSize, int64(blocks*sectorSize))
			v := open1(t, d, OpenOptions{})
			if err := errors.Join(v.WriteZeroes(0, int64(blocks*sectorSize), false), v.Sync()); err != nil {
				t.Fatal(err)
			}
			safe := make([]byte, blocks)    // content that must survive
			current := make([]byte, blocks) // content that was written
			for range r.IntN(200) {
				b := r.IntN(blocks)
				value := byte(1 + r.IntN(255))
				p := bytes.Repeat([]byte{value}, sectorSize)
				switch r.IntN(4) {
				case 0, 1:
					if current[b] != safe[b] {
						continue // one unflushed write for a block, so that its content is one of two
					}
					current[b] = value
					if _, err := v.WriteAt(p, int64(b*sectorSize)); err != nil {
						t.Fatal(err)
					}
				case 2:
					if current[b] != safe[b] {
						continue
					}
					current[b], safe[b] = value, value
					if _, err := v.WriteAtFUA(p, int64(b*sectorSize)); err != nil {
						t.Fatal(err)
					}
				case 3:
					if err := v.Sync(); err != nil {
						t.Fatal(err)
					}
					copy(safe, current)
				}
			}
			after := open1(t, d.Crash(r, sectorSize), OpenOptions{})
			got := make([]byte, sectorSize)
			for b := range blocks {
				if _, err := after.ReadAt(got, int64(b*sectorSize)); err != nil {
					t.Fatal(err)
				}
				if x := got[0]; !bytes.Equal(got, bytes.Repeat([]byte{x}, sectorSize)) || x != safe[b] && x != current[b] {
					t.Fatalf("seed %d: block %d holds %d after a power cut; %d was durable, %d written last", seed, b, x, safe[b], current[b])
				}
			}
		}
	})
}

// TestTornSector shows why a sector may be larger than what the disk writes at
// once: XTS encrypts each 16 bytes for themselves, so a torn sector reads as
// its old and its new parts, exactly as on a plain disk.
func TestTornSector(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	d.Align = 0
	v := open1(t, d, OpenOptions{})
	old, new := bytes.Repeat([]byte("o"), 4096), bytes.Repeat([]byte("n"), 4096)
	if _, err := v.WriteAtFUA(old, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt(new, 0); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(3, 3))
	after := open1(t, d.Crash(r, 512), OpenOptions{})
	got := make([]byte, 4096)
	if _, err := after.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for i := 0; i < 4096; i += 512 {
		part := string(got[i : i+512])
		if part != string(old[:512]) && part != string(new[:512]) {
			t.Fatalf("bytes %d to %d are neither old nor new", i, i+512)
		}
		kinds[part] = true
	}
	if len(kinds) != 2 {
		t.Error("nothing was torn; the test shows nothing")
	}
}

// TestSyncFailure checks that a volume whose flush failed never reports
// success again, from the first failure on and for FUA writes too.
func TestSyncFailure(t *testing.T) {
	for _, kind := range []string{"flush", "fua", "fua cached"} {
		fua := kind != "flush"
		t.Run(kind, func(t *testing.T) {
			d := format(t, 4096, testVolumeSize)
			d.Cached = kind == "fua cached"
			v := open1(t, d, OpenOptions{})
			p := make([]byte, 4096)
			if _, err := v.WriteAt(p, 0); err != nil {
				t.Fatal(err)
			}
			bad := sectortest.Sync
			if kind == "fua" {
				bad = sectortest.Write
			}
			d.Fail(func(op sectortest.Op, n int, _ int64, _ int) error {
				if op == bad && n == 1 {
					return syscall.EIO
				}
				return nil
			})
			var err error
			if fua {
				_, err = v.WriteAtFUA(p, 0)
			} else {
				err = v.Sync()
			}
			if !errors.Is(err, syscall.EIO) {
				t.Fatalf("first failure: %v", err)
			}
			for range 3 {
				if err := v.Sync(); !errors.Is(err, ErrFailed) || !errors.Is(err, syscall.EIO) {
					t.Errorf("later Sync() = %v, want ErrFailed", err)
				}
			}
			if _, err := v.WriteAt(p, 0); !errors.Is(err, ErrFailed) {
				t.Errorf("later WriteAt() error %v, want ErrFailed", err)
			}
			if err := v.WriteZeroes(0, 4096, true); !errors.Is(err, ErrFailed) {
				t.Errorf("later WriteZeroes() = %v, want ErrFailed", err)
			}
			if _, err := v.ReadAt(p, 0); err != nil {
				t.Errorf("ReadAt on a failed volume: %v", err)
			}
			if !v.Failed() {
				t.Error("Failed() = false")
			}
		})
	}
}

// TestConcurrentFlushes has many flushes at once on a device that reports an
// error once, to any of them: none of those that began before the error was
// known may succeed.
func TestConcurrentFlushes(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{})
	slow := &slowSync{Disk: d, entered: make(chan bool, 100), release: make(chan error, 100)}
	v.b = slow
	errs := make(chan error)
	go func() { errs <- v.Sync() }()
	<-slow.entered // one runs
	const waiting = 20
	for range waiting {
		go func() { errs <- v.Sync() }()
	}
	for { // until they wait for the next
		if v.Stats().Flushes == waiting+1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond)
	slow.release <- syscall.EIO
	for range 10 {
		slow.release <- nil // what the kernel would tell the others
	}
	for range waiting + 1 {
		if err := <-errs; !errors.Is(err, syscall.EIO) {
			t.Errorf("a flush at the time of the failed one: %v", err)
		}
	}
}

// TestFlushesAreShared checks that flushes which wait share one of the device,
// and that none is satisfied by one that began before it.
func TestFlushesAreShared(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{})
	slow := &slowSync{Disk: d, entered: make(chan bool, 100), release: make(chan error, 100)}
	v.b = slow
	errs := make(chan error)
	go func() { errs <- v.Sync() }()
	<-slow.entered
	const waiting = 20
	for range waiting {
		go func() { errs <- v.Sync() }()
	}
	for v.Stats().Flushes < waiting+1 {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(10 * time.Millisecond)
	slow.release <- nil
	if err := <-errs; err != nil {
		t.Error(err)
	}
	<-slow.entered // the second, for all of the others
	select {
	case err := <-errs:
		t.Errorf("a flush ended (%v) before one that began after it", err)
	case <-time.After(20 * time.Millisecond):
	}
	slow.release <- nil
	for range waiting {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	if n := len(slow.entered); n != 0 {
		t.Errorf("%d flushes of the device more than two", n)
	}
}

type slowSync struct {
	*sectortest.Disk
	entered chan bool
	release chan error
}

func (s *slowSync) Sync() error {
	s.entered <- true
	return <-s.release
}

// TestNoRoom: a write with FUA for which there was no room is an error of that
// write. When the write can be done after all, there is room by now, or it was the
// flush after it that failed: another flush tells, and what that says counts.
func TestNoRoom(t *testing.T) {
	for _, cause := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		for _, tt := range []struct {
			name   string
			write  func(n int) error // what the nth write ends with
			flush  error
			want   error // of the request
			failed bool
		}{
			{name: "no room", write: func(int) error { return cause }, want: cause},
			{name: "room meanwhile", write: func(n int) error { return map[bool]error{true: cause}[n == 1] }},
			{name: "the flush", write: func(n int) error { return map[bool]error{true: cause}[n == 1] }, flush: cause, want: cause, failed: true},
			{name: "another error", write: func(n int) error { return map[bool]error{true: cause, false: syscall.EIO}[n == 1] }, want: cause, failed: true},
		} {
			t.Run(fmt.Sprintf("%v/%s", cause, tt.name), func(t *testing.T) {
				d := format(t, 4096, testVolumeSize)
				v := open1(t, d, OpenOptions{})
				p := bytes.Repeat([]byte("room"), 2048)
				d.Fail(func(op sectortest.Op, n int, _ int64, _ int) error {
					switch op {
					case sectortest.Write:
						return tt.write(n)
					case sectortest.Sync:
						return tt.flush
					}
					return nil
				})
				n, err := v.WriteAtFUA(p, 0)
				if !errors.Is(err, tt.want) || (err == nil) != (tt.want == nil) || err == nil && n != len(p) {
					t.Errorf("write with FUA: %d, %v, want %v", n, err, tt.want)
				}
				d.Fail(nil)
				if err == nil {
					got := make([]byte, len(p))
					after := open1(t, d.Crash(rand.New(rand.NewPCG(1, 2)), 512), OpenOptions{})
					if _, err := after.ReadAt(got, 0); err != nil || !bytes.Equal(got, p) {
						t.Errorf("what was answered is gone after a power cut (%v)", err)
					}
				}
				_, err = v.WriteAtFUA(p, 0)
				if v.Failed() != tt.failed || errors.Is(err, ErrFailed) != tt.failed || !tt.failed && err != nil {
					t.Errorf("failed: %v; a later write with FUA: %v", v.Failed(), err)
				}
				if err := v.Sync(); errors.Is(err, ErrFailed) != tt.failed {
					t.Errorf("a later flush: %v", err)
				}
			})
		}
	}
}

// TestFullFileSystem is TestNoRoom with a real one, and a file with holes on it
// that is opened with O_DIRECT.
func TestFullFileSystem(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=20m"); err != nil {
		t.Fatalf("mounting a tmpfs, which takes root: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	filler := filepath.Join(dir, "filler")
	if err := os.WriteFile(filler, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	d := formatted(t, imageFile(t, filepath.Join(dir, "disk"), 64<<20, DeviceOptions{Direct: true}))
	v := open1(t, d, OpenOptions{})
	p := bytes.Repeat([]byte("data"), 4096)
	off := int64(0)
	var err error
	for ; err == nil && off < 8<<20; off += int64(len(p)) {
		_, err = v.WriteAtFUA(p, off)
	}
	if !errors.Is(err, syscall.ENOSPC) || off < 1<<20 {
		t.Fatalf("a write at %d of a file system of 20 MiB: %v, want %v", off, err, syscall.ENOSPC)
	}
	off -= int64(len(p))
	if err := errors.Join(v.Sync(), os.Remove(filler)); err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAtFUA(p, off); err != nil {
		t.Errorf("when there was room again: %v", err)
	}
	got := make([]byte, len(p))
	for at := int64(0); at <= off; at += int64(len(p)) {
		if _, err := v.ReadAt(got, at); err != nil || !bytes.Equal(got, p) {
			t.Fatalf("at %d: %v, equal: %v", at, err, bytes.Equal(got, p))
		}
	}
}

// TestDeviceErrors fails each operation below a write and a read, and lets
// each do only half.
func TestDeviceErrors(t *testing.T) {
	for _, cause := range []error{syscall.EIO, syscall.ENOSPC, io.ErrUnexpectedEOF} {
		for op, request := range map[sectortest.Op]func(testVolume) error{
			sectortest.Read:  func(v testVolume) error { _, err := v.ReadAt(make([]byte, 100), 50); return err },
			sectortest.Write: func(v testVolume) error { _, err := v.WriteAt(make([]byte, 8192), 0); return err },
		} {
			t.Run(fmt.Sprintf("%s/%v", op, cause), func(t *testing.T) {
				d := format(t, 4096, testVolumeSize)
				v := open1(t, d, OpenOptions{})
				d.Fail(func(o sectortest.Op, n int, _ int64, _ int) error {
					if o == op {
						return cause
					}
					return nil
				})
				want := cause
				if cause == io.ErrUnexpectedEOF {
					want = syscall.EIO
				}
				if err := request(v); !errors.Is(err, want) {
					t.Errorf("error %v, want %v", err, want)
				}
				d.Fail(nil)
				if err := request(v); err != nil {
					t.Errorf("a later request on the same volume: %v", err)
				}
				if got := v.Stats().Errors; got != 1 {
					t.Errorf("Stats().Errors = %d", got)
				}
			})
		}
	}
}

// A closedDisk takes a while for everything, and notes what had not ended when it was
// closed.
type closedDisk struct {
	*sectortest.Disk
	closed atomic.Bool
	late   atomic.Int64
}

func (d *closedDisk) op(n int, err error) (int, error) {
	time.Sleep(20 * time.Millisecond)
	if d.closed.Load() {
		d.late.Add(1)
	}
	return n, err
}

func (d *closedDisk) ReadAt(p []byte, off int64) (int, error)  { return d.op(d.Disk.ReadAt(p, off)) }
func (d *closedDisk) WriteAt(p []byte, off int64) (int, error) { return d.op(d.Disk.WriteAt(p, off)) }
func (d *closedDisk) WriteAtSync(p []byte, off int64) (int, error) {
	return d.op(d.Disk.WriteAtSync(p, off))
}

func (d *closedDisk) Sync() error {
	_, err := d.op(0, d.Disk.Sync())
	return err
}

func (d *closedDisk) Discard(off, length int64) error {
	_, err := d.op(0, d.Disk.Discard(off, length))
	return err
}

// TestClose closes a volume under load, of each kind of request by itself, as one that
// is waited for would hide another: every request either succeeds or says that the volume
// is closed, none touches freed memory, and none does anything with the device afterwards.
func TestClose(t *testing.T) {
	of := func(_ int, err error) error { return err }
	for name, request := range map[string]func(v testVolume, p []byte, off int64) error{
		"read":            func(v testVolume, p []byte, off int64) error { return of(v.ReadAt(p, off)) },
		"read of a part":  func(v testVolume, p []byte, off int64) error { return of(v.ReadAt(p[1:], off)) },
		"write":           func(v testVolume, p []byte, off int64) error { return of(v.WriteAt(p, off)) },
		"write of a part": func(v testVolume, p []byte, off int64) error { return of(v.WriteAt(p[1:], off)) },
		"FUA":             func(v testVolume, p []byte, off int64) error { return of(v.WriteAtFUA(p, off)) },
		"FUA of a part":   func(v testVolume, p []byte, off int64) error { return of(v.WriteAtFUA(p[1:], off)) },
		"zeroes":          func(v testVolume, p []byte, off int64) error { return v.WriteZeroes(off, int64(len(p)), false) },
		"zeroes, FUA":     func(v testVolume, p []byte, off int64) error { return v.WriteZeroes(off, int64(len(p)), true) },
		"trim":            func(v testVolume, p []byte, off int64) error { return v.Trim(off, int64(len(p)), false) },
		"trim, FUA":       func(v testVolume, p []byte, off int64) error { return v.Trim(off, int64(len(p)), true) },
		"flush":           func(v testVolume, _ []byte, _ int64) error { return v.Sync() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			disk := format(t, 4096, testVolumeSize)
			for _, cached := range []bool{false, true} {
				d := &closedDisk{Disk: disk}
				d.Cached = cached
				testClose(t, d, request)
			}
		})
	}
}

func testClose(t *testing.T, d *closedDisk, request func(v testVolume, p []byte, off int64) error) {
	const workers = 4
	v := open1(t, d, OpenOptions{Discard: true})
	var wg, begun sync.WaitGroup
	begun.Add(workers)
	for g := range int64(workers) {
		wg.Go(func() {
			first := sync.OnceFunc(begun.Done)
			defer first()
			p := alignedBytes(12288)
			for i := g; ; i += workers {
				err := request(v, p, i%80*12288)
				if errors.Is(err, ErrClosed) && errors.Is(err, syscall.ESHUTDOWN) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				first()
			}
		})
	}
	begun.Wait()
	time.Sleep(3 * time.Millisecond)
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	d.closed.Store(true)
	wg.Wait()
	if n := d.late.Load(); n > 0 {
		t.Errorf("cached: %v: %d operations of the device had not ended when Close returned", d.Cached, n)
	}
	if err := v.Close(); err != nil {
		t.Errorf("second Close() = %v", err)
	}
}

// TestCloseWaitsForFUA: where a write with FUA is a write and a flush of all, as with a
// page cache, it is one request, and Close waits for both.
func TestCloseWaitsForFUA(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	d.Cached = true
	v := open1(t, d, OpenOptions{})
	slow := &slowSync{Disk: d, entered: make(chan bool), release: make(chan error)}
	v.b = slow
	written, closed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := v.WriteAtFUA(make([]byte, 4096), 0)
		written <- err
	}()
	<-slow.entered
	go func() { closed <- v.Close() }()
	select {
	case err := <-closed:
		t.Errorf("Close() = %v while the flush of a write with FUA was under way", err)
		closed <- nil
	case <-time.After(50 * time.Millisecond):
	}
	slow.release <- nil
	if err := errors.Join(<-written, <-closed); err != nil {
		t.Error(err)
	}
}

// TestTamper changes each thing that the header's MAC and the wrapped DEK
// cover, and moves parts between volumes. All of it must be refused.
func TestTamper(t *testing.T) {
	other := format(t, 4096, testVolumeSize)
	otherHeader, _, err := luks2.Read(other)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(h *luks2.Header)
		want   error
	}{
		{"nothing", func(h *luks2.Header) {}, nil},
		{"label", func(h *luks2.Header) { h.Label = "free" }, nil},
		{"foreign token", func(h *luks2.Header) {
			h.Tokens[9], _ = luks2.NewToken([]byte(`{"type":"clevis","keyslots":[]}`))
		}, nil},
		{"flag", func(h *luks2.Header) { h.Config.Flags = []string{"allow-discards"} }, nil},
		{"UUID", func(h *luks2.Header) { h.UUID = "00000000-0000-4000-8000-000000000000" }, ErrAuth},
		{"offset", func(h *luks2.Header) { h.Segments[0].Offset += 4096 }, ErrAuth},
		{"size", func(h *luks2.Header) { h.Segments[0].Dynamic, h.Segments[0].Size = false, 4096 }, ErrAuth},
		{"iv_tweak", func(h *luks2.Header) { h.Segments[0].IVTweak = 8 }, ErrAuth},
		{"sector size", func(h *luks2.Header) { h.Segments[0].SectorSize = 512 }, ErrAuth},
		{"null cipher", func(h *luks2.Header) { h.Segments[0].Encryption = "cipher_null-ecb" }, ErrUnsupported},
		{"other cipher", func(h *luks2.Header) { h.Segments[0].Encryption = "aes-cbc-essiv:sha256" }, ErrUnsupported},
		{"linear", func(h *luks2.Header) { h.Segments[0].Type = "linear" }, ErrUnsupported},
		{"requirement", func(h *luks2.Header) { h.Config.Requirements = []string{"hostcryptd-multikey-v1"} }, ErrUnsupported},
		{"second segment", func(h *luks2.Header) {
			h.Segments[0].Dynamic, h.Segments[0].Size = false, 8192
			h.Segments[1] = &luks2.Segment{Type: "linear", Offset: dataOffset + 8192, Dynamic: true}
		}, ErrUnsupported},
		{"digest", func(h *luks2.Header) { h.Digests[0].Digest[0] ^= 1 }, ErrAuth},
		{"digest iterations", func(h *luks2.Header) { h.Digests[0].Iterations = 1 << 31 }, ErrAuth},
		{"digest number", func(h *luks2.Header) { h.Digests[1] = h.Digests[0]; delete(h.Digests, 0) }, ErrAuth},
		{"no volume token", func(h *luks2.Header) { delete(h.Tokens, 1) }, ErrNotVolume},
		{"two volume tokens", func(h *luks2.Header) { h.Tokens[2] = h.Tokens[1] }, ErrAuth},
		{"volume token of another volume", func(h *luks2.Header) { h.Tokens[1] = otherHeader.Tokens[1] }, ErrAuth},
		{"key token of another volume", func(h *luks2.Header) { h.Tokens[0] = otherHeader.Tokens[0] }, ErrAuth},
		{"all but UUID of another volume", func(h *luks2.Header) {
			h.Tokens, h.Digests, h.Segments = otherHeader.Tokens, otherHeader.Digests, otherHeader.Segments
		}, ErrAuth},
		{"no key token", func(h *luks2.Header) { delete(h.Tokens, 0) }, ErrNotVolume},
		{"broken key token before a good one", func(h *luks2.Header) {
			h.Tokens[2] = h.Tokens[0]
			h.Tokens[0], _ = luks2.NewToken([]byte(`{"type":"hostcryptd-broken","keyslots":[]}`))
		}, ErrAuth},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := format(t, 4096, testVolumeSize)
			h, _, err := luks2.Read(d)
			if err != nil {
				t.Fatal(err)
			}
			uuid := h.UUID
			tt.change(h)
			if h.UUID != uuid {
				err = luks2.Format(d, h) // Write refuses to change a UUID
			} else {
				err = luks2.Write(d, h)
			}
			if err != nil {
				t.Fatal(err)
			}
			v, err := Open(t.Context(), d, testUnseal, OpenOptions{})
			if !errors.Is(err, tt.want) {
				t.Errorf("Open() error %v, want %v", err, tt.want)
			}
			if err == nil {
				v.Close()
			}
		})
	}
	t.Run("wrapped DEK of another volume", func(t *testing.T) {
		testTamperDEK(t, func(v *volumeToken, w wrappedKey) { v.DEKs["0"] = w })
	})
}

// testTamperDEK shows that a wrapped DEK is bound to its volume even if the
// MAC is right: the attacker here has the volume key.
func testTamperDEK(t *testing.T, change func(*volumeToken, wrappedKey)) {
	d := format(t, 4096, testVolumeSize)
	h, _, err := luks2.Read(d)
	if err != nil {
		t.Fatal(err)
	}
	k, err := newKeys(64)
	if err != nil {
		t.Fatal(err)
	}
	defer k.free()
	if _, err := unlock(t.Context(), h, k, testUnseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	_, v, err := findVolumeToken(h)
	if err != nil {
		t.Fatal(err)
	}
	change(v, wrapDEK(k.volumeKey, k.dek, "another UUID", "0", 4096, make([]byte, 12)))
	if err := errors.Join(setVolumeToken(h, k.volumeKey, v), luks2.Write(d, h)); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), d, testUnseal, OpenOptions{}); !errors.Is(err, ErrAuth) || !strings.Contains(err.Error(), "wrapped DEK") {
		t.Errorf("Open() error %v, want ErrAuth about the wrapped DEK", err)
	}
}

// TestUnsealErrors checks that the reason of every token reaches the caller.
func TestUnsealErrors(t *testing.T) {
	d := format(t, 4096, testVolumeSize)
	cause := errors.New("the vault is closed on Sundays")
	_, err := Open(t.Context(), d, func(context.Context, string, json.RawMessage, *[32]byte) error { return cause }, OpenOptions{})
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "token 0 (hostcryptd-test)") {
		t.Errorf("Open() error %v, want the cause and its token", err)
	}
}

// TestDamagedCopy checks that a volume opens with one good header copy, says
// so, and repairs the other, but not where it must not.
func TestDamagedCopy(t *testing.T) {
	tests := []struct {
		name     string
		wreck    []byte
		readOnly bool
		repaired bool
	}{
		{"wiped", make([]byte, 8192), false, true},
		{"read-only", make([]byte, 8192), true, false},
		{"foreign", bytes.Repeat([]byte("other"), 8192/5), false, false},
	}
	for _, tt := range tests {
		for _, off := range []int64{0, copySize} {
			t.Run(fmt.Sprintf("%s at %d", tt.name, off), func(t *testing.T) {
				d := format(t, 4096, testVolumeSize)
				d.Align = 0
				if _, err := d.WriteAt(tt.wreck, off); err != nil {
					t.Fatal(err)
				}
				v := open1(t, d, OpenOptions{ReadOnly: tt.readOnly})
				if len(v.Warnings()) != 1 || strings.Contains(v.Warnings()[0], "it was repaired") != tt.repaired {
					t.Errorf("Warnings() = %q", v.Warnings())
				}
				if _, c, err := luks2.Read(d); err != nil || c.Damaged() == tt.repaired {
					t.Errorf("afterwards: %q, %v", c.Describe(), err)
				}
			})
		}
	}
	d := format(t, 4096, testVolumeSize)
	d.Align = 0
	for _, off := range []int64{5000, copySize + 5000} {
		if _, err := d.WriteAt([]byte("damage"), off); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Open(t.Context(), d, testUnseal, OpenOptions{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("both copies damaged: Open() error %v, want ErrDamaged", err)
	}
}

// TestFormatRefuses lists what can't become a volume, and checks that nothing
// was written to it.
func TestFormatRefuses(t *testing.T) {
	ok := FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}
	failing := func(context.Context, string, *[32]byte) (json.RawMessage, error) { return nil, errors.New("no key") }
	tests := []struct {
		name   string
		size   int64
		align  int
		change func(*FormatOptions)
		want   string
	}{
		{"too small", dataOffset + 4095, 1, nil, "16 MiB"},
		{"empty", 0, 1, nil, "16 MiB"},
		{"sector size", 32 << 20, 1, func(o *FormatOptions) { o.SectorSize = 1024 }, "512 or 4096"},
		{"sector smaller than block", 32 << 20, 4096, func(o *FormatOptions) { o.SectorSize = 512 }, "logical blocks are 4096"},
		{"UUID", 32 << 20, 1, func(o *FormatOptions) { o.UUID = "x" }, "not a UUID"},
		{"label", 32 << 20, 1, func(o *FormatOptions) { o.Label = strings.Repeat("l", 48) }, "47 bytes"},
		{"label of bytes", 32 << 20, 1, func(o *FormatOptions) { o.Label = "a\xff" }, "printable"},
		{"label with escapes", 32 << 20, 1, func(o *FormatOptions) { o.Label = "a\x1b]0;b" }, "printable"},
		{"no key", 32 << 20, 1, func(o *FormatOptions) { o.Seal = nil }, "at least one key"},
		{"sealing fails", 32 << 20, 1, func(o *FormatOptions) { o.Seal = []Sealer{testSeal, failing} }, "no key"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := sectortest.New(tt.size)
			d.Align = tt.align
			o := ok
			o.BeforeWrite = func() error { t.Error("BeforeWrite was called"); return nil }
			if tt.change != nil {
				tt.change(&o)
			}
			if _, err := Format(t.Context(), d, o); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Format() error %v, want one with %q", err, tt.want)
			}
			if d.Calls(sectortest.Write) != 0 {
				t.Error("the refused Format wrote")
			}
		})
	}
}

// TestOddSize uses a device that ends inside of a sector.
func TestOddSize(t *testing.T) {
	d := sectortest.New(dataOffset + 3*4096 + 512)
	if _, err := Format(t.Context(), d, FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	v := open1(t, d, OpenOptions{})
	if n, _ := v.Size(); n != 3*4096 {
		t.Errorf("Size() = %d, want %d", n, 3*4096)
	}
	if err := v.WriteZeroes(0, 3*4096, true); err != nil {
		t.Error(err)
	}
	// Cut off, it is refused.
	short := sectortest.New(dataOffset + 2*4096)
	if _, err := short.WriteAt(d.Bytes()[:short.Size()], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), short, testUnseal, OpenOptions{}); !errors.Is(err, ErrDevice) {
		t.Errorf("Open of a truncated device: %v, want ErrDevice", err)
	}
}

func TestRecoveryKeyForm(t *testing.T) {
	seen := map[string]bool{}
	for range 100 {
		key := string(NewRecoveryKey())
		if seen[key] {
			t.Fatal("a key came twice")
		}
		seen[key] = true
		groups := strings.Split(key, "-")
		if len(groups) != 8 {
			t.Fatalf("%q has %d groups", key, len(groups))
		}
		for _, g := range groups {
			var n int
			if _, err := fmt.Sscanf(g, "%d", &n); err != nil || len(g) != 6 || n%11 != 0 || n/11 > 65535 {
				t.Fatalf("group %q of %q", g, key)
			}
		}
	}
}

// TestSteadyStateAllocations checks that serving does not allocate.
func TestSteadyStateAllocations(t *testing.T) {
	v := open1(t, &nullBacking{*sectortest.New(0), format(t, 4096, testVolumeSize).Bytes()}, OpenOptions{})
	p := alignedBytes(8192)
	of := func(_ int, err error) error { return err }
	for name, f := range map[string]func() error{
		"read":             func() error { return of(v.ReadAt(p, 0)) },
		"read of a part":   func() error { return of(v.ReadAt(p[1:2000], 3)) },
		"write":            func() error { return of(v.WriteAt(p, 4096)) },
		"write of a part":  func() error { return of(v.WriteAt(p[1:2000], 3)) },
		"flush":            func() error { return v.Sync() },
		"write of zeroes":  func() error { return v.WriteZeroes(0, 100_000, false) },
		"trim":             func() error { return v.Trim(0, 100_000, false) },
		"write, flushed":   func() error { return of(v.WriteAtFUA(p, 0)) },
		"read all at once": func() error { return of(v.ReadAt(p[:4096], 0)) },
	} {
		var failed error
		n := testing.AllocsPerRun(100, func() {
			if err := f(); err != nil {
				failed = err
			}
		})
		if n != 0 || failed != nil {
			t.Errorf("%s: %v allocations, error %v", name, n, failed)
		}
	}
}

// nullBacking reads from a slice and forgets what is written, without
// allocating.
type nullBacking struct {
	sectortest.Disk
	b []byte
}

func (n *nullBacking) ReadAt(p []byte, off int64) (int, error)      { return copy(p, n.b[off:]), nil }
func (n *nullBacking) WriteAt(p []byte, off int64) (int, error)     { return len(p), nil }
func (n *nullBacking) WriteAtSync(p []byte, off int64) (int, error) { return len(p), nil }
func (n *nullBacking) Sync() error                                  { return nil }
func (n *nullBacking) Size() int64                                  { return int64(len(n.b)) }

func TestExtent(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 5))
	for range 2000 {
		size := int64(512)
		if r.IntN(2) == 0 {
			size = 4096
		}
		off, length := r.Int64N(1<<20), r.Int64N(1<<20)
		e := extentOf(off, length, size)
		max := size * (1 + r.Int64N(64))
		var pieces int64
		next := off
		for rest := e; rest.len() > 0; {
			var part extent
			part, rest = rest.head(max)
			if part.off != next || part.to-part.from > max || part.from%size != 0 || part.to%size != 0 || part.off < part.from || part.end > part.to {
				t.Fatalf("extentOf(%d, %d, %d).head(%d) = %+v", off, length, size, max, part)
			}
			next = part.end
			pieces += part.len()
		}
		if pieces != length {
			t.Fatalf("pieces of %d bytes at %d are %d bytes", length, off, pieces)
		}
		from, to := e.within(size)
		first, last := (off+size-1)/size, (off+length)/size // the sectors inside
		if first < last && (from != first*size || to != last*size) || first >= last && from != to {
			t.Fatalf("within of %d bytes at %d = %d to %d, want sectors %d to %d", length, off, from, to, first, last)
		}
	}
}

// TestRangeLockOrder checks that a waiting range is not overtaken by later ones
// that conflict with it, and that others pass.
func TestRangeLockOrder(t *testing.T) {
	var l rangeLock
	first := l.lock(0, 10)
	var second atomic.Bool
	got := make(chan uint64)
	go func() {
		ticket := l.lock(5, 15)
		second.Store(true)
		got <- ticket
	}()
	for { // until it waits
		l.mu.Lock()
		n := len(l.held)
		l.mu.Unlock()
		if n == 2 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	l.unlock(l.lock(20, 30)) // does not conflict
	later := make(chan bool)
	go func() {
		ticket := l.lock(11, 12)
		later <- second.Load()
		l.unlock(ticket)
	}()
	select {
	case <-later:
		t.Fatal("a later range overtook a waiting one")
	case <-time.After(20 * time.Millisecond):
	}
	l.unlock(first)
	l.unlock(<-got)
	if !<-later {
		t.Error("the later range came before the one that waited")
	}
}

// A slowDisk lets a write begin when told to.
type slowDisk struct {
	*sectortest.Disk
	writes chan bool // each, before it begins
	begin  chan bool
}

func (d *slowDisk) WriteAt(p []byte, off int64) (int, error) {
	d.writes <- true
	<-d.begin
	return d.Disk.WriteAt(p, off)
}

// TestWritesOverlap: of two writes of the same sectors, each longer than a
// buffer, the later one begins when the whole of the first one has ended. One of
// other sectors waits for neither.
func TestWritesOverlap(t *testing.T) {
	d := &slowDisk{format(t, 4096, 16<<20), make(chan bool), make(chan bool)}
	v := open1(t, d, OpenOptions{})
	var running sync.WaitGroup
	finish := sync.OnceFunc(func() {
		close(d.begin)
		go func() {
			for range d.writes {
			}
		}()
		running.Wait()
	})
	t.Cleanup(finish)
	const parts = 3
	old, new := alignedBytes(parts*largeBuffer), alignedBytes(parts*largeBuffer)
	for i := range new {
		new[i] = 1
	}
	write := func(p []byte, off int64) {
		running.Go(func() {
			if _, err := v.WriteAt(p, off); err != nil {
				t.Error(err)
			}
		})
	}
	write(old, 0)
	<-d.writes
	write(new, 0)
	for range parts - 1 {
		select {
		case <-d.writes:
			t.Fatal("a write began while another of the same sectors was under way")
		case <-time.After(30 * time.Millisecond):
		}
		d.begin <- true
		<-d.writes
	}
	write(old[:4096], 8<<20)
	<-d.writes // though the others have not ended
	finish()
	got := alignedBytes(len(new))
	if _, err := v.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, new) {
		t.Error("what is there is not what was written last")
	}
}

// image formats an image file with a recovery key and returns its name, the
// name of a file with the recovery key, and the open device.
func image(t *testing.T, sectorSize int, size int64) (name, keyFile string, d *Device) {
	t.Helper()
	dir := t.TempDir()
	name, keyFile = filepath.Join(dir, "disk.img"), filepath.Join(dir, "recovery.key")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
	d, err = OpenDevice(name, DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	key := NewRecoveryKey()
	if err := os.WriteFile(keyFile, key, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Format(t.Context(), d, FormatOptions{SectorSize: sectorSize, Label: "test", RecoveryKey: key, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	return name, keyFile, d
}

func cryptsetup(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("cryptsetup", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatal("cryptsetup is not installed (Debian package cryptsetup-bin); run make deps")
	}
	if err != nil {
		t.Fatalf("cryptsetup %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestCryptsetupDecrypts lets cryptsetup, with the recovery key, decrypt what
// a volume wrote: format, key slot and sector layout are LUKS2's own.
func TestCryptsetupDecrypts(t *testing.T) {
	forSectorSizes(t, func(t *testing.T, sectorSize int) {
		name, keyFile, d := image(t, sectorSize, dataOffset+4<<20)
		v := open1(t, d, OpenOptions{})
		want := make([]byte, 4<<20)
		for i := range want {
			want[i] = byte(i>>12) ^ byte(i)
		}
		for off := 0; off < len(want); off += 300_001 {
			if _, err := v.WriteAt(want[off:min(len(want), off+300_001)], int64(off)); err != nil {
				t.Fatal(err)
			}
		}
		if err := v.Sync(); err != nil {
			t.Fatal(err)
		}
		cryptsetup(t, "open", "--test-passphrase", "--key-file", keyFile, name)
		exported := filepath.Join(t.TempDir(), "header")
		cryptsetup(t, "reencrypt", "-q", "--decrypt", "--force-offline-reencrypt", "--header", exported, "--key-file", keyFile, name)
		got, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) < len(want) || !bytes.Equal(got[:len(want)], want) {
			t.Error("cryptsetup decrypts something else than was written")
		}
	})
}

// TestAfterCryptsetup lets cryptsetup change what it may change, and checks
// that the volume still opens.
func TestAfterCryptsetup(t *testing.T) {
	name, keyFile, d := image(t, 4096, dataOffset+1<<20)
	want := []byte("still there")
	v := open1(t, d, OpenOptions{})
	if _, err := v.WriteAtFUA(want, 5000); err != nil {
		t.Fatal(err)
	}
	second := filepath.Join(t.TempDir(), "second")
	if err := os.WriteFile(second, []byte("break glass"), 0o600); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "config", name, "--label", "renamed")
	cryptsetup(t, "luksAddKey", "-q", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1", "--key-file", keyFile, name, second)
	if id, err := AddRecoveryKey(t.Context(), d, testUnseal, []byte("third"), OpenOptions{}); err != nil || id != 2 {
		t.Fatalf("AddRecoveryKey() = %d, %v", id, err)
	}
	third := filepath.Join(t.TempDir(), "third")
	if err := os.WriteFile(third, []byte("third"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{keyFile, second, third} {
		cryptsetup(t, "open", "--test-passphrase", "--key-file", f, name)
	}
	cryptsetup(t, "luksKillSlot", "-q", "--key-file", third, name, "0")
	again := open1(t, d, OpenOptions{})
	got := make([]byte, len(want))
	if _, err := again.ReadAt(got, 5000); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %q, %v", got, err)
	}
	if again.Label() != "renamed" {
		t.Errorf("Label() = %q", again.Label())
	}
}

// TestForeignKeyslots opens keyslots that cryptsetup wrote, with each KDF.
func TestForeignKeyslots(t *testing.T) {
	dir := t.TempDir()
	pw := filepath.Join(dir, "pw")
	if err := os.WriteFile(pw, []byte("correct horse"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kdf := range [][]string{
		{"--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1"},
		{"--pbkdf", "argon2i", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "2"},
		{"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--hash", "sha512"},
	} {
		t.Run(kdf[1], func(t *testing.T) {
			name := filepath.Join(dir, kdf[1])
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(name, 20<<20); err != nil {
				t.Fatal(err)
			}
			cryptsetup(t, slices.Concat([]string{"luksFormat", "-q", "--type", "luks2", "--cipher", Cipher, "--key-size", "512"}, kdf, []string{name, pw})...)
			d, err := OpenDevice(name, DeviceOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			h, _, err := luks2.Read(d)
			if err != nil {
				t.Fatal(err)
			}
			var dek, want [dekSize]byte
			if err := openKeyslot(d, h, 0, []byte("correct horse"), &dek); err != nil {
				t.Fatal(err)
			}
			if err := openKeyslot(d, h, 0, []byte("wrong horse"), &want); !errors.Is(err, ErrWrongKey) || want != [dekSize]byte{} {
				t.Errorf("wrong passphrase: %v", err)
			}
			out := filepath.Join(t.TempDir(), "vk")
			cryptsetup(t, "luksDump", "-q", "--dump-volume-key", "--key-file", pw, "--volume-key-file", out, name)
			got, err := os.ReadFile(out)
			if err != nil || !bytes.Equal(got, dek[:]) {
				t.Errorf("cryptsetup's volume key differs (%v)", err)
			}
			// A LUKS2 disk that is not ours is not taken for a volume.
			if _, err := Open(t.Context(), d, testUnseal, OpenOptions{}); !errors.Is(err, ErrNotVolume) {
				t.Errorf("Open() error %v, want ErrNotVolume", err)
			}
		})
	}
}

func TestSecret(t *testing.T) {
	s, err := newSecret(100)
	if err != nil {
		t.Fatal(err)
	}
	want := "locked memory"
	if fd, err := unix.MemfdSecret(0); err == nil {
		unix.Close(fd)
		want = "memfd_secret"
	}
	if s.kind != want {
		t.Errorf("keys are in %s, want %s", s.kind, want)
	}
	copy(s.b, "key")
	if want == "memfd_secret" {
		// Not even we can read it behind the processor's back.
		mem, err := os.Open("/proc/self/mem")
		if err != nil {
			t.Fatal(err)
		}
		defer mem.Close()
		b := make([]byte, 3)
		if _, err := mem.ReadAt(b, int64(uintptr(unsafe.Pointer(&s.b[0])))); err == nil {
			t.Errorf("/proc/self/mem shows the secret memory: %q", b)
		}
	}
	if err := errors.Join(s.free(), s.free()); err != nil {
		t.Error(err)
	}
}

// TestReadHeaderLocked: a lock that somebody keeps doesn't keep a volume from being
// served, unless the header may just be being written.
func TestReadHeaderLocked(t *testing.T) {
	defer func(d time.Duration) { lockPatience = d }(lockPatience)
	lockPatience = 10 * time.Millisecond
	name, _, d := image(t, 4096, dataOffset+1<<20)
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	h, _, err := ReadHeader(t.Context(), d)
	if err != nil {
		t.Fatalf("both copies are good: %v", err)
	}
	if _, err := d.WriteAt(alignedBytes(4096), int64(h.Size)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, _, err := ReadHeader(ctx, d); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one copy is good: %v, want the end of the wait", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_UN); err != nil {
		t.Fatal(err)
	}
	if _, copies, err := ReadHeader(t.Context(), d); err != nil || !copies.Damaged() {
		t.Errorf("without the lock: %v", err)
	}
}
