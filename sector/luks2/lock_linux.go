package luks2

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lockDir is where cryptsetup keeps the lock files of block devices.
const lockDir = "/run/cryptsetup"

// Lock takes the lock that cryptsetup takes on the header of f, shared for
// reading or exclusive for writing, and waits for it. For a block device it is
// flock on /run/cryptsetup/L_MAJOR:MINOR, for a file flock on the file itself
// (cryptsetup's docs/LUKS2-locking.txt). unlock gives it back. Anybody who may
// read an image file can hold its lock, so the wait ends with ctx.
//
// Where /run can't be written, as in a rescue system, there is no lock to take
// and Lock succeeds without one, as cryptsetup does with --disable-locks.
func Lock(ctx context.Context, f *os.File, exclusive bool) (unlock func(), err error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("luks2: locking the header: %w", err)
	}
	if fi.Mode()&os.ModeDevice == 0 {
		// A description of its own, so that two locks of one process exclude
		// each other too.
		own, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return nil, fmt.Errorf("luks2: locking the header: %w", err)
		}
		return flock(ctx, own, exclusive, false)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, fmt.Errorf("luks2: locking the header: %w", err)
	}
	name := filepath.Join(lockDir, fmt.Sprintf("L_%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev)))
	for {
		if err := os.MkdirAll(lockDir, 0o700); err != nil {
			if errors.Is(err, unix.EROFS) || errors.Is(err, os.ErrNotExist) {
				return func() {}, nil
			}
			return nil, fmt.Errorf("luks2: locking the header: %w", err)
		}
		lf, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if errors.Is(err, os.ErrNotExist) {
			continue // the directory went away in between
		}
		if err != nil {
			return nil, fmt.Errorf("luks2: locking the header: %w", err)
		}
		unlock, err := flock(ctx, lf, exclusive, true)
		if err != nil {
			return nil, err
		}
		// The last user removes the file. If that happened while we waited,
		// our lock is on a file that nobody else will find.
		var got, now unix.Stat_t
		if unix.Fstat(int(lf.Fd()), &got) == nil && unix.Stat(name, &now) == nil && got.Ino == now.Ino && got.Dev == now.Dev {
			return unlock, nil
		}
		unlock()
	}
}

func flock(ctx context.Context, f *os.File, exclusive, remove bool) (func(), error) {
	how := unix.LOCK_SH | unix.LOCK_NB
	if exclusive {
		how = unix.LOCK_EX | unix.LOCK_NB
	}
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), how)
		if err == nil {
			break
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			select {
			case <-time.After(wait):
				continue
			case <-ctx.Done():
				err = fmt.Errorf("another program holds the lock: %w", context.Cause(ctx))
			}
		}
		f.Close()
		return nil, fmt.Errorf("luks2: locking the header: %w", err)
	}
	return func() {
		// Remove the lock file only if nobody else holds or waits for it, the
		// same test that cryptsetup makes (lib/utils_device_locking.c).
		if remove && unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
			var got, now unix.Stat_t
			if unix.Fstat(int(f.Fd()), &got) == nil && unix.Stat(f.Name(), &now) == nil && got.Ino == now.Ino {
				os.Remove(f.Name())
			}
		}
		f.Close()
	}, nil
}
