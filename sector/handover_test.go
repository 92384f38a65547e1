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
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
	if err := LockHandover(secret.File()); err != nil {
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
	if err := LockHandover(f); err != nil {
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

// TestFlushErrorOfServerBefore: a flush fails for what could not be written, also if
// only a process was told that is dead. The device's page cache is written to memory
// that is sealed, which is an I/O error.
func TestFlushErrorOfServerBefore(t *testing.T) {
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
