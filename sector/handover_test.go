package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"hostcryptd/sector/sectortest"
)

// TestHandover lets one volume take the place of another that was not closed.
func TestHandover(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	dev := imageFile(t, name, 32<<20, DeviceOptions{})
	h, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	// The next process has the descriptor, not the mapping.
	next := func() *Handover {
		fd, err := unix.FcntlInt(h.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		h, err := OpenHandover(os.NewFile(uintptr(fd), "handover"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { h.Close() })
		return h
	}
	v := handoverVolume(t, dev, h)
	want := bytes.Repeat([]byte("handed over "), 1000)[:8192]
	if _, err := v.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(v.State())
	if err != nil {
		t.Fatal(err)
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(b, h.mem.dek[:]) || !h.HasKey() {
		t.Errorf("state %s, key in the handover: %v", b, h.HasKey())
	}
	again, err := Continue(dev, s, next(), SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := again.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("after the handover: %v, equal %v", err, bytes.Equal(got, want))
	}
	if !reflect.DeepEqual(again.State(), s) || s.Known == nil || len(s.Known.Tokens) != 1 {
		t.Errorf("state %+v, want %+v", again.State(), s)
	}

	// A flush that failed stays failed.
	again.flush.fail()
	failed, err := Continue(dev, s, next(), SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	if err := failed.Sync(); !errors.Is(err, ErrFailed) {
		t.Errorf("Sync after a failed flush of the one before: %v, want %v", err, ErrFailed)
	}

	// A device that has shrunk is not served.
	small := s
	small.Size = 1 << 40
	if _, err := Continue(dev, small, next(), SuspendRefuse); !errors.Is(err, ErrDevice) {
		t.Errorf("Continue on a device that is too small: %v, want %v", err, ErrDevice)
	}

	// Keys that were wiped stay so.
	_ = again.Suspend(SuspendRefuse)
	if h.HasKey() || h.mem.dek != [dekSize]byte{} {
		t.Error("the DEK is in the handover after Suspend")
	}
	locked, err := Continue(dev, s, next(), SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	defer locked.Close()
	if _, err := locked.ReadAt(got, 0); !errors.Is(err, ErrSuspended) || !locked.Suspended() {
		t.Errorf("ReadAt without a key: %v, want %v", err, ErrSuspended)
	}
}

// TestLockHandover asks the kernel whether a memfd, where the kernel has no
// memfd_secret, is locked by who only keeps it.
func TestLockHandover(t *testing.T) {
	secret, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	if _, err := LockHandover(secret.File()); err != nil {
		t.Errorf("of a Handover: %v", err)
	}
	const name = "hostcryptd-locked"
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	if err := f.Truncate(int64(os.Getpagesize())); err != nil {
		t.Fatal(err)
	}
	if _, err := LockHandover(f); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, maps, _ := strings.Cut(string(b), name)
	_, flags, _ := strings.Cut(maps, "VmFlags:")
	if flags, _, _ = strings.Cut(flags, "\n"); !slices.Contains(strings.Fields(flags), "lo") {
		t.Errorf("the memory is not locked; its flags are %q", flags)
	}
}

// TestFence opens a device twice, as a server and the next one do.
func TestFence(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	held := imageFile(t, name, 1<<20, DeviceOptions{})
	open := func() *Device {
		d, err := Reopen(held.File(), name, DeviceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first, second := open(), open()
	defer second.Close()
	if waited, err := first.Fence(t.Context(), func() {}); err != nil || waited {
		t.Fatalf("the first Fence: %v, waited %v", err, waited)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := second.Fence(ctx, func() {}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("second Fence while the first is held: %v, want %v", err, context.DeadlineExceeded)
	}
	// A descriptor that is left over holds it, as a request in flight does.
	fd, err := unix.FcntlInt(first.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	time.AfterFunc(50*time.Millisecond, func() { unix.Close(fd) })
	begun := time.Now()
	if waited, err := second.Fence(t.Context(), func() {}); err != nil || !waited || time.Since(begun) < 50*time.Millisecond {
		t.Errorf("second Fence: %v after %v, want success after 50ms", err, time.Since(begun))
	}
	if _, err := OpenDevice(name, DeviceOptions{}); !errors.Is(err, ErrBusy) {
		t.Errorf("opening the image beside the keeper: %v, want %v", err, ErrBusy)
	}
	if n, err := io.Copy(io.Discard, io.NewSectionReader(second, 0, 1<<20)); n != 1<<20 || err != nil {
		t.Errorf("read %d bytes: %v", n, err)
	}
}

// TestServerWithoutKeeper: when the process that held the device dies, nobody else gets
// it as long as the one that serves it lives.
func TestServerWithoutKeeper(t *testing.T) {
	name := filepath.Join(t.TempDir(), "disk")
	held := imageFile(t, name, 1<<20, DeviceOptions{})
	d, err := Reopen(held.File(), name, DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if other, err := OpenDevice(name, DeviceOptions{}); !errors.Is(err, ErrBusy) {
			t.Fatalf("opening the device of a server that lives: %v, %v, want %v", other, err, ErrBusy)
		}
		if err := d.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	other, err := OpenDevice(name, DeviceOptions{})
	if err != nil {
		t.Fatalf("opening the device when it is closed: %v", err)
	}
	other.Close()
}

// TestWritebackErrorOfServerBefore: behind a page cache, as an image file is, a flush
// fails for what could not be written, also if only a process was told that is dead. The
// page cache is a device's here, and is written to memory that is sealed, which is an
// I/O error. Without a page cache, as block devices are, nobody is told: see
// TestKilledInFlush.
func TestWritebackErrorOfServerBefore(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes a loop device, which takes root")
	}
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		t.Fatal("this test needs losetup, of the Debian package mount")
	}
	disk, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(disk)
	if err := unix.Ftruncate(disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--show", "-f", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), disk)).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	name := strings.TrimSpace(string(out))
	defer exec.Command(losetup, "-d", name).Run()

	open := func() *os.File { // with the page cache, as an image file is
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	held := open()
	defer held.Close()
	next := func() *Device {
		d, err := Reopen(held, name, DeviceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	dead := open()
	d := next()
	if err := errors.Join(d.Sync(), d.Sync(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(disk), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
		t.Fatal(err)
	}
	if _, err := dead.WriteAt(make([]byte, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	if err := fdatasync(dead); !errors.Is(err, unix.EIO) {
		t.Fatalf("the flush of the server that dies: %v, want %v", err, unix.EIO)
	}
	dead.Close()
	if d = next(); d.Size() != 1<<20 {
		t.Errorf("%d bytes", d.Size())
	}
	if err := d.Sync(); !errors.Is(err, unix.EIO) {
		t.Errorf("the first flush of the server that goes on: %v, want %v", err, unix.EIO)
	}
	d.Close()
}

// TestKilledInFlush lets a volume take the place of one whose server was killed, as the
// kernel kills one: in the middle of a flush, which then ends with an error that nobody
// is told. That can't be found out any more, but it is said, also by who comes later.
func TestKilledInFlush(t *testing.T) {
	blocks := func(d *sectortest.Disk, v *Volume, request func()) (end func(error)) {
		slow := &slowSync{Disk: d, entered: make(chan bool), release: make(chan error)}
		v.b = slow
		ended := make(chan bool)
		go func() { request(); close(ended) }()
		<-slow.entered
		return func(err error) { slow.release <- err; <-ended }
	}
	flush := func(d *sectortest.Disk, v *Volume) (end func(error)) {
		return blocks(d, v, func() { v.Sync() })
	}
	for _, tt := range []struct {
		name    string
		begin   func(*sectortest.Disk, *Volume) (end func(error))
		cached  bool
		unknown bool
	}{
		{name: "idle", begin: func(*sectortest.Disk, *Volume) func(error) { return nil }},
		{name: "after a flush and FUA", begin: func(_ *sectortest.Disk, v *Volume) func(error) {
			_, err := testVolume{v}.WriteAtFUA(alignedBytes(4096), 0)
			if err := errors.Join(err, v.Sync()); err != nil {
				t.Error(err)
			}
			return nil
		}},
		{name: "write", begin: func(_ *sectortest.Disk, v *Volume) func(error) {
			p := alignedBytes(4096)
			_, _, ticket, _ := v.BeginWrite(p, 0, false)
			return func(err error) { v.EndWrite(p, 0, false, ticket, 0, err) }
		}},
		{name: "flush", begin: flush, unknown: true},
		{name: "flush of a page cache", begin: flush, cached: true},
		{name: "FUA", begin: func(d *sectortest.Disk, v *Volume) func(error) {
			entered, release, ended := make(chan bool), make(chan error), make(chan bool)
			d.Fail(func(op sectortest.Op, _ int, _ int64, _ int) error { close(entered); return <-release })
			go func() { v.WriteAtFUA(alignedBytes(4096), 0); close(ended) }()
			<-entered
			return func(err error) { release <- err; <-ended; d.Fail(nil) }
		}, unknown: true},
		{name: "FUA in halves", begin: func(_ *sectortest.Disk, v *Volume) func(error) {
			p := alignedBytes(4096)
			_, _, ticket, ok := v.BeginWrite(p, 0, true)
			if !ok {
				t.Fatal("the write is refused")
			}
			return func(err error) { v.EndWrite(p, 0, true, ticket, 0, err) }
		}, unknown: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			h, err := NewHandover()
			if err != nil {
				t.Fatal(err)
			}
			flushing, err := LockHandover(h.File())
			if err != nil {
				t.Fatal(err)
			}
			d := format(t, 4096, testVolumeSize)
			d.Cached = tt.cached
			killed := open1(t, d, OpenOptions{Handover: h})
			end := tt.begin(d, killed.Volume)
			state := killed.State()
			// What the keeper holds is what there is when the process is gone.
			left := h.mem.flushing.Load()
			if waits := tt.unknown || tt.cached; flushing() != waits || killed.Flushing() != waits {
				t.Errorf("the keeper sees a flush: %v, the server: %v", flushing(), killed.Flushing())
			}
			if end != nil {
				end(syscall.EIO)
			}
			if failed := end != nil && tt.name != "write"; flushing() || killed.Flushing() || killed.Failed() != failed {
				t.Errorf("afterwards a flush is under way: %v, %v; failed: %v", flushing(), killed.Flushing(), killed.Failed())
			}
			h.mem.flushing.Store(left)
			h.mem.failed.Store(0)
			for n := range 3 { // the next server, and those after it
				v, err := Continue(d, state, h, SuspendRefuse)
				if err != nil {
					t.Fatal(err)
				}
				if told := strings.Contains(strings.Join(v.Warnings(), ""), "killed while it waited for the disk to flush its cache (1 since"); told != tt.unknown || len(v.Warnings()) > 1 {
					t.Errorf("server %d says %q", n, v.Warnings())
				}
				if err := v.Sync(); err != nil || v.Failed() || flushing() {
					t.Errorf("its flush: %v, failed %v", err, v.Failed())
				}
				if err := v.Leave(); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// TestHandoverLayout: versions that follow each other have to find what they know.
func TestHandoverLayout(t *testing.T) {
	var p handoverPage
	if got, want := [...]uintptr{unsafe.Offsetof(p.magic), unsafe.Offsetof(p.hasKey), unsafe.Offsetof(p.failed), unsafe.Offsetof(p.flushing), unsafe.Offsetof(p.unknown), unsafe.Offsetof(p.dek)},
		[...]uintptr{0, 8, 12, 16, 20, 64}; got != want {
		t.Errorf("offsets %d, want %d", got, want)
	}
}

// TestFlushMarkLasts: the mark that a flush is under way goes when its failure is in the
// handover, and not before: a server may be killed at any moment.
func TestFlushMarkLasts(t *testing.T) {
	h, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	d := format(t, 4096, testVolumeSize)
	v := open1(t, d, OpenOptions{Handover: h})
	slow := &slowSync{Disk: d, entered: make(chan bool), release: make(chan error)}
	v.b = slow
	ended := make(chan error)
	go func() { ended <- v.Sync() }()
	<-slow.entered
	v.flush.mu.Lock() // what the flush has ended with can't be noted
	slow.release <- syscall.EIO
	time.Sleep(20 * time.Millisecond)
	if h.mem.flushing.Load() != 1 || h.mem.failed.Load() != 0 {
		t.Errorf("before it is noted: %d flushes under way, failed: %d", h.mem.flushing.Load(), h.mem.failed.Load())
	}
	v.flush.mu.Unlock()
	if err := <-ended; !errors.Is(err, syscall.EIO) || h.mem.flushing.Load() != 0 || h.mem.failed.Load() != 1 {
		t.Errorf("afterwards: %v, %d flushes under way, failed: %d", err, h.mem.flushing.Load(), h.mem.failed.Load())
	}
}

// handoverVolume makes a volume whose key goes to h.
func handoverVolume(t *testing.T, dev *Device, h *Handover) *Volume {
	t.Helper()
	if _, err := Format(t.Context(), dev, FormatOptions{SectorSize: 4096, Seal: []Sealer{testSeal}}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(t.Context(), dev, testUnseal, OpenOptions{Handover: h})
	if err != nil {
		t.Fatal(err)
	}
	return v
}
