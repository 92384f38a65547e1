package sector

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/sector/luks2"
)

// A Device is a backing device of the system: a block device or an image
// file. It implements [Backing].
//
// A block device is opened with O_EXCL, so that neither a mount nor
// device-mapper can take it, and with O_DIRECT, so that what has been answered
// is with the disk. An image file is locked against other users by a lock that
// QEMU knows too, and goes through the page cache unless it is opened with
// [DeviceOptions].Direct. A file and the loop devices over it are one disk: it's in
// use if one of them is.
type Device struct {
	f        *os.File
	size     atomic.Int64 // never less than it was
	align    int
	physical int
	block    bool
	direct   bool

	before *os.File   // nil, or what Reopen was given
	asking sync.Mutex // held while before is flushed
	asked  bool       // before was flushed, and that has succeeded
}

// DeviceOptions say how a device is opened.
type DeviceOptions struct {
	ReadOnly bool
	// Shared opens the device beside those who use it: to look at a header or
	// to change it. The data must not be touched.
	Shared bool
	// Direct opens an image file with O_DIRECT, too. Its sectors must be
	// multiples of what its file system wants.
	Direct bool
}

// OpenDevice opens a block device or an image file. Its errors are
// [ErrDevice], [ErrBusy], or those of the system.
func OpenDevice(name string, o DeviceOptions) (*Device, error) {
	d, err := openDevice(name, o)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return d, nil
}

func openDevice(name string, o DeviceOptions) (_ *Device, err error) {
	fi, err := os.Stat(name)
	if err != nil {
		return nil, reason(err)
	}
	d := &Device{align: 1}
	switch mode := fi.Mode(); {
	case mode.IsRegular():
	case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
		d.block = true
	case mode.IsDir():
		return nil, fmt.Errorf("%w: it is a directory", ErrDevice)
	default:
		return nil, fmt.Errorf("%w: neither a block device nor a file (%v)", ErrDevice, mode.Type())
	}

	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	d.direct = d.block || o.Direct
	if d.direct {
		flags |= unix.O_DIRECT
	}
	if d.block && !o.Shared {
		flags |= unix.O_EXCL
	}
	d.f, err = os.OpenFile(name, flags, 0)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%w: it is mounted, part of another device, or opened by another program%s", ErrBusy, whoseServer)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: it can't be opened for %s: %w", ErrDevice, map[bool]string{true: "reading", false: "writing"}[o.ReadOnly], reason(err))
	case err != nil:
		return nil, reason(err)
	}
	defer func() {
		if err != nil {
			d.Close()
		}
	}()
	if d.block {
		err = d.probeBlock(o)
	} else {
		err = d.probeFile(o)
	}
	if err == nil && !o.Shared {
		err = d.checkTwins(o.ReadOnly)
	}
	if err != nil {
		return nil, err
	}
	_, err = d.Measure()
	return d, err
}

// whoseServer ends an error about a device that is in use.
const whoseServer = "; 'hostcryptd status' shows what hostcryptd serves"

// reason takes the path out of an error, which the caller puts in front.
func reason(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

func (d *Device) probeBlock(o DeviceOptions) error {
	fd := int(d.f.Fd())
	// A device that was set read-only can be opened for writing all the same.
	if ro, err := unix.IoctlGetInt(fd, unix.BLKROGET); err == nil && ro != 0 && !o.ReadOnly {
		return fmt.Errorf("%w: it is read-only", ErrDevice)
	}
	logical, err := unix.IoctlGetInt(fd, unix.BLKSSZGET)
	if err != nil {
		return fmt.Errorf("logical block size: %w", err)
	}
	d.align = logical
	physical, err := unix.IoctlGetUint32(fd, unix.BLKPBSZGET)
	if err != nil {
		return fmt.Errorf("physical block size: %w", err)
	}
	d.physical = int(physical)
	return nil
}

// probeFile locks an image file. The lock belongs to the open file description
// and covers all of it, so it also conflicts with the byte locks that QEMU
// takes on images (block/file-posix.c): a second server and a QEMU that opens
// the image itself are both kept out, but not cryptsetup's flock on the header.
func (d *Device) probeFile(o DeviceOptions) error {
	if d.direct {
		// Where the file system doesn't say, before Linux 6.1, a page is enough
		// for all that there are.
		d.align = 4096
		var st unix.Statx_t
		if err := unix.Statx(int(d.f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &st); err == nil &&
			st.Mask&unix.STATX_DIOALIGN != 0 && st.Dio_offset_align > 0 {
			d.align = int(max(st.Dio_offset_align, st.Dio_mem_align))
		}
	}
	if o.Shared {
		return nil
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Len: fenceAt}
	if o.ReadOnly {
		lock.Type = unix.F_RDLCK
	}
	err := unix.FcntlFlock(d.f.Fd(), unix.F_OFD_SETLK, &lock)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: another program has locked it%s", ErrBusy, whoseServer)
	}
	if err != nil {
		return fmt.Errorf("locking: %w", err)
	}
	return nil
}

// fenceAt is the byte that Fence locks, beyond the end of every device and of
// what probeFile locks.
const fenceAt = 1 << 62

// Reopen opens a device again that is open as f, whose name is name, for I/O of
// this process alone: the lock of Fence is on what it opens. f keeps others
// out, and the Device has a copy of it until it is closed: they stay out also if
// whoever held f dies.
//
// The first Sync flushes f too. Linux tells each open file description of a failed
// write-back once, and of none that has been told to somebody before it was opened.
// A server that is killed during an fdatasync is told and tells nobody; another
// program that flushes the same file is told before the server is. f is as old as the
// first server, and no other than such a first Sync flushes it, so it still has to be
// told. (What is lost is an error that was told to such a Sync whose process was
// killed meanwhile.)
//
// That is the page cache's matter, so an image file's. Of a block device's flush, or a
// write with O_DIRECT, nobody is told but who asked, see [Handover].
func Reopen(f *os.File, name string, o DeviceOptions) (*Device, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, reason(err))
	}
	o.Shared = true
	d := &Device{align: 1, block: !fi.Mode().IsRegular()}
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	if d.direct = d.block || o.Direct; d.direct {
		flags |= unix.O_DIRECT
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: opening it again: %w", name, err)
	}
	d.f = os.NewFile(uintptr(fd), name)
	if d.block {
		err = d.probeBlock(o)
	} else {
		err = d.probeFile(o)
	}
	if err == nil {
		_, err = d.Measure()
	}
	if err == nil {
		fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	if err != nil {
		d.Close()
		return nil, fmt.Errorf("%s: %w", name, reason(err))
	}
	d.before = os.NewFile(uintptr(fd), name)
	return d, nil
}

// Fence returns when no I/O of another process that has fenced the device is
// under way any more, and keeps others waiting until the last I/O of this one
// has ended, however this one ends. Only then may requests be served again that
// the other had taken: its writes would land over newer ones.
//
// It is a lock that belongs to the open file description. Each request in
// flight holds a reference to that, also one whose process was killed and whose
// io_uring the kernel ends later, and the kernel drops the lock with the last
// reference (locks_remove_file in __fput). It is an OFD lock and not flock(2),
// which udev takes on disks. waiting is called when it takes long; waited tells
// whether there was anything to wait for.
func (d *Device) Fence(ctx context.Context, waiting func()) (waited bool, err error) {
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: fenceAt, Len: 1}
	if flags, err := unix.FcntlInt(d.f.Fd(), unix.F_GETFL, 0); err == nil && flags&unix.O_ACCMODE == unix.O_RDONLY {
		return false, nil // it writes nothing
	}
	said := time.AfterFunc(time.Second, waiting)
	defer said.Stop()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		err := unix.FcntlFlock(d.f.Fd(), unix.F_OFD_SETLK, &lock)
		switch {
		case err == nil:
			return waited, nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES):
			return waited, fmt.Errorf("%s: fencing: %w", d.Name(), err)
		}
		waited = true
		select {
		case <-ctx.Done():
			return true, fmt.Errorf("%s: I/O of another server has not ended: %w", d.Name(), context.Cause(ctx))
		case <-time.After(wait):
		}
	}
}

// File is the open file of the device.
func (d *Device) File() *os.File { return d.f }

// Close closes the device; on a device that was open for writing, everything
// that must last was synced before.
func (d *Device) Close() error {
	if d.before != nil {
		d.before.Close()
	}
	return d.f.Close()
}

// Name is the path that the device was opened with.
func (d *Device) Name() string { return d.f.Name() }

// Size is in bytes: the most that the device had whenever it was measured. What
// is beyond the end of one that was cut off since then can't be read or written.
func (d *Device) Size() int64 { return d.size.Load() }

// Measure asks the system how many bytes the device has now. A bigger one has a
// bigger Size afterwards.
func (d *Device) Measure() (int64, error) {
	size, err := d.f.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	for {
		before := d.size.Load()
		if size <= before || d.size.CompareAndSwap(before, size) {
			return size, nil
		}
	}
}

// Alignment is the logical block size of a block device, what O_DIRECT wants of
// a file, 1 for a file with the page cache.
func (d *Device) Alignment() int { return d.align }

// AtomicSize is what the device writes whole or not at all, its physical block
// size, or 0 where that isn't known.
func (d *Device) AtomicSize() int { return d.physical }

// LockHeader takes the lock that cryptsetup takes for the header.
func (d *Device) LockHeader(ctx context.Context, exclusive bool) (unlock func(), err error) {
	return luks2.Lock(ctx, d.f, exclusive)
}

// Direct tells whether the device is opened with O_DIRECT, as block devices are.
func (d *Device) Direct() bool { return d.direct }

// Descriptor is the file descriptor of the device.
func (d *Device) Descriptor() int { return int(d.f.Fd()) }

func (d *Device) ReadAt(p []byte, off int64) (int, error)  { return d.f.ReadAt(p, off) }
func (d *Device) WriteAt(p []byte, off int64) (int, error) { return d.f.WriteAt(p, off) }

// WriteAtSync writes with RWF_DSYNC, which the disk is told as a FUA write
// where it can do that.
func (d *Device) WriteAtSync(p []byte, off int64) (done int, err error) {
	for done < len(p) {
		n, err := unix.Pwritev2(int(d.f.Fd()), [][]byte{p[done:]}, off+int64(done), unix.RWF_DSYNC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return done, &os.PathError{Op: "write", Path: d.f.Name(), Err: err}
		}
		if n == 0 {
			return done, &os.PathError{Op: "write", Path: d.f.Name(), Err: io.ErrShortWrite}
		}
		done += n
	}
	return done, nil
}

// Sync is fdatasync(2): the data, and of the metadata what is needed to find
// it. It fails for what could not be written before a Reopen, too.
func (d *Device) Sync() error {
	if err := d.syncBefore(); err != nil {
		return err
	}
	return fdatasync(d.f)
}

func (d *Device) syncBefore() error {
	d.asking.Lock()
	defer d.asking.Unlock()
	if d.before == nil || d.asked {
		return nil
	}
	err := fdatasync(d.before)
	d.asked = err == nil
	return err
}

// FlushFailed tells whether err is, or wraps, that of [Device.Sync].
func FlushFailed(err error) bool {
	p, ok := errors.AsType[*os.PathError](err)
	return ok && p.Op == opFlush
}

const opFlush = "fdatasync"

func fdatasync(f *os.File) error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if !errors.Is(err, unix.EINTR) {
			if err != nil {
				err = &os.PathError{Op: opFlush, Path: f.Name(), Err: err}
			}
			return err
		}
	}
}

// Discard discards a range of a block device, or punches a hole in a file.
func (d *Device) Discard(off, length int64) error {
	var err error
	if d.block {
		arg := [2]uint64{uint64(off), uint64(length)}
		err = ioctlPtr(d.f.Fd(), unix.BLKDISCARD, &arg)
	} else {
		err = unix.Fallocate(int(d.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length)
	}
	if errors.Is(err, syscall.EOPNOTSUPP) {
		return errors.ErrUnsupported
	}
	return err
}
