package sector

import (
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A file and the loop devices over it are one disk under several names, and the
// kernel keeps who has opened one of them exclusively from none of the others. So
// after a device was opened under one name, checkTwins looks whether one of its others
// is in use. As each opens first and looks then, of two that open at once one at least
// sees the other.
//
// A loop device says in sysfs by which path its file was opened. That may have been
// renamed, replaced or deleted since, so what counts is its device and inode number. It
// may be over a part of the file: two that have nothing in common are two disks.

// A fileID tells whether two files are one.
type fileID struct{ dev, ino uint64 }

// A part is the bytes from first to before end of a file.
type part struct{ first, end uint64 }

func (p part) meets(o part) bool { return p.first < o.end && o.first < p.end }

// checkTwins returns [ErrBusy] if what d is on is in use under another name.
func (d *Device) checkTwins(readOnly bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(d.f.Fd()), &st); err != nil {
		return err
	}
	self, file, mine := "", fileID{uint64(st.Dev), st.Ino}, part{0, math.MaxUint64}
	if d.block {
		dir, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
		if err != nil {
			return nil // no sysfs, or a device of another namespace
		}
		if _, err := os.Stat(filepath.Join(dir, "partition")); err == nil {
			dir = filepath.Dir(dir)
		}
		if _, err := os.Stat(filepath.Join(dir, "loop")); err != nil {
			return nil
		}
		self = filepath.Base(dir)
		path, id, over, err := loopFile(self, int(d.f.Fd()))
		if err != nil {
			return fmt.Errorf("which file is behind loop device %s: %w", self, err)
		}
		if err := checkUnlocked(path, id, readOnly); err != nil {
			return err
		}
		file, mine = id, over
	}
	loops, _ := filepath.Glob("/sys/block/loop*/loop")
	for _, l := range loops {
		name := filepath.Base(filepath.Dir(l))
		if name == self {
			continue
		}
		path, id, over, err := loopFile(name, -1)
		if err != nil && path != "" {
			// Who may not open it is told by the path, if that isn't too old.
			var st unix.Stat_t
			if unix.Stat(path, &st) != nil || file != (fileID{uint64(st.Dev), st.Ino}) {
				continue
			}
			return fmt.Errorf("%w: loop device /dev/%s is over it, and whether that is in use can't be told: %w", ErrBusy, name, err)
		}
		if err != nil || id != file || !over.meets(mine) {
			continue // after an error, somebody has just taken it down
		}
		fd, err := unix.Open("/dev/"+name, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("%w: /dev/%s, which is the same disk, is mounted, part of another device, or opened by another program%s", ErrBusy, name, whoseServer)
		}
		if err == nil {
			unix.Close(fd)
		}
	}
	return nil
}

// loopFile returns the file of a loop device, which is open as fd or, with -1, isn't:
// the path, which file it is, and what of it the device is over. The path is "" if there
// is none. After an error only the path may be known.
func loopFile(name string, fd int) (path string, id fileID, over part, err error) {
	b, err := os.ReadFile(filepath.Join("/sys/block", name, "loop/backing_file"))
	if err != nil {
		return "", id, over, err
	}
	path = strings.TrimSuffix(string(b), "\n")
	if fd < 0 {
		if fd, err = unix.Open("/dev/"+name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0); err != nil {
			return path, id, over, err
		}
		defer unix.Close(fd)
	}
	info, err := unix.IoctlLoopGetStatus64(fd)
	if errors.Is(err, unix.ENXIO) {
		return "", id, over, err // it has none any more
	}
	if err != nil {
		return path, id, over, err
	}
	over = part{info.Offset, math.MaxUint64}
	if info.Sizelimit > 0 {
		over.end = info.Offset + info.Sizelimit
	}
	return path, fileID{info.Device, info.Inode}, over, nil
}

// checkUnlocked returns [ErrBusy] if another has locked a file as [OpenDevice] does, or
// QEMU. A file that isn't at its path any more can't be asked.
func checkUnlocked(path string, id fileID, readOnly bool) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || id != (fileID{uint64(st.Dev), st.Ino}) {
		return nil
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Len: fenceAt}
	if readOnly {
		lock.Type = unix.F_RDLCK
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock); err == nil && lock.Type != unix.F_UNLCK {
		return fmt.Errorf("%w: another program has locked %s, which is the same disk%s", ErrBusy, path, whoseServer)
	}
	return nil
}
