package nbdnl

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// sysBlock is where the kernel shows block devices. Tests show their own.
var sysBlock = "/sys/block"

// Path returns the path of a device: "/dev/nbd0" for 0.
func Path(index int) string { return "/dev/nbd" + strconv.Itoa(index) }

// ParsePath returns the index of a path that [Path] returned, or of the bare
// name, such as "nbd0".
func ParsePath(path string) (int, error) {
	digits, ok := strings.CutPrefix(strings.TrimPrefix(path, "/dev/"), "nbd")
	index, err := strconv.ParseUint(digits, 10, 31)
	if !ok || err != nil || strconv.FormatUint(index, 10) != digits {
		return 0, fmt.Errorf("nbdnl: %q is not /dev/nbdN", path)
	}
	return int(index), nil
}

func attribute(index int, name ...string) string {
	return filepath.Join(append([]string{sysBlock, "nbd" + strconv.Itoa(index)}, name...)...)
}

func readUint(path string) (uint64, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// WaitReady waits until the device has its size in bytes and its pid
// attribute, by which udev and systemd tell an attached device. It returns an
// error when ctx is done first.
//
// Connect has done all this when it returns. Waiting is for devices that
// another process attaches, and to be sure.
func WaitReady(ctx context.Context, index int, size uint64) error {
	wait := time.Millisecond
	for {
		err := ready(index, size)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("nbdnl: waiting for %s: %w: %w", Path(index), err, context.Cause(ctx))
		case <-time.After(wait):
		}
		wait = min(2*wait, 100*time.Millisecond)
	}
}

// Size is the size in bytes that the device has for its users.
func Size(index int) (uint64, error) {
	sectors, err := readUint(attribute(index, "size")) // always in units of 512
	if err != nil {
		return 0, fmt.Errorf("nbdnl: size of %s: %w", Path(index), err)
	}
	return sectors * 512, nil
}

// ready returns what the device lacks.
func ready(index int, size uint64) error {
	got, err := Size(index)
	if err != nil {
		return err
	}
	if got != size {
		return fmt.Errorf("size is %d bytes, want %d", got, size)
	}
	_, err = readUint(attribute(index, "pid"))
	return err
}

// SetMaxRequest sets the size in bytes of the largest request that the kernel
// sends for the device, as far as the driver allows (32 MiB). Kernels differ in
// their default, from 64 KiB to 4 MiB. It returns what is in force afterwards.
func SetMaxRequest(index int, size uint64) (uint64, error) {
	limit, err := readUint(attribute(index, "queue", "max_hw_sectors_kb"))
	if err != nil {
		return 0, fmt.Errorf("nbdnl: request size of %s: %w", Path(index), err)
	}
	kb := min(size/1024, limit)
	if kb == 0 {
		return 0, fmt.Errorf("nbdnl: request size of %s: %w", Path(index), errors.New("less than 1024 bytes"))
	}
	if err := setQueue(index, "max_sectors_kb", kb); err != nil {
		return 0, fmt.Errorf("nbdnl: request size of %s: %w", Path(index), err)
	}
	if kb, err = readUint(attribute(index, "queue", "max_sectors_kb")); err != nil {
		return 0, fmt.Errorf("nbdnl: request size of %s: %w", Path(index), err)
	}
	return kb * 1024, nil
}

// setQueue sets an attribute of the device's queue.
func setQueue(index int, name string, value uint64) error {
	// No O_CREATE: a file that the kernel doesn't show must not be made.
	f, err := os.OpenFile(attribute(index, "queue", name), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatUint(value, 10))
	return errors.Join(err, f.Close())
}

// SetQueueDepth limits how many requests of the device may be under way at the
// same time, for each socket. The kernel waits for those that are.
func SetQueueDepth(index, n int) error {
	if err := setQueue(index, "nr_requests", uint64(n)); err != nil {
		return fmt.Errorf("nbdnl: queue depth of %s: %w", Path(index), err)
	}
	return nil
}

// SetRequestTimer sets after which time the kernel looks at a request that has
// not been answered. With one socket and no Config.Timeout that has no other
// effect than that a request which was sent to a socket that has been replaced
// since is sent again, which otherwise happens after 30 s.
func SetRequestTimer(index int, d time.Duration) error {
	if err := setQueue(index, "io_timeout", uint64(d.Milliseconds())); err != nil {
		return fmt.Errorf("nbdnl: request timer of %s: %w", Path(index), err)
	}
	return nil
}

// Progress tells how many requests the kernel has sent to the device's server and
// not got an answer to, and how many were ever answered.
func Progress(index int) (inFlight int, done uint64, err error) {
	b, err := os.ReadFile(attribute(index, "stat"))
	if err != nil {
		return 0, 0, fmt.Errorf("nbdnl: progress of %s: %w", Path(index), err)
	}
	// Documentation/block/stat.rst: number of I/Os, merges, sectors, ticks for
	// reads; the same for writes; in flight, two times; the four for discards;
	// number and ticks of flushes.
	f := strings.Fields(string(b))
	for i, s := range f {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("nbdnl: progress of %s: %w", Path(index), err)
		}
		switch i {
		case 8:
			inFlight = int(n)
		case 0, 4, 11, 15:
			done += n
		}
	}
	return inFlight, done, nil
}

// Announce has the kernel tell udev that the device has changed. It does so by
// itself when the size changes, which is before all attributes are there.
func Announce(index int) error {
	f, err := os.OpenFile(attribute(index, "uevent"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString("change")
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		return fmt.Errorf("nbdnl: announcing %s: %w", Path(index), err)
	}
	return nil
}

// Detached tells whether a device that was attached with a backend string is not
// any more. It is false where that can't be known: without sysfs, and of a device
// that somebody else has attached without such a string.
func Detached(index int, backend string) bool {
	if _, err := os.Stat(attribute(index, "size")); err != nil {
		return false
	}
	// Both go with the last user of a device that has no sockets any more
	// (nbd_config_put of Linux).
	b, err := os.ReadFile(attribute(index, "backend"))
	if err == nil {
		return strings.TrimSpace(string(b)) != backend
	}
	_, perr := os.Stat(attribute(index, "pid"))
	return errors.Is(err, os.ErrNotExist) && errors.Is(perr, os.ErrNotExist)
}

// Backend returns the backend string that a device was attached with, or "".
func Backend(index int) string {
	b, err := os.ReadFile(attribute(index, "backend"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// Find returns the index of the device that was attached with a backend string,
// or FirstFree.
func Find(backend string) int {
	names, _ := filepath.Glob(filepath.Join(sysBlock, "nbd*", "backend"))
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil || strings.TrimSpace(string(b)) != backend {
			continue
		}
		if index, err := ParsePath(filepath.Base(filepath.Dir(name))); err == nil {
			return index
		}
	}
	return FirstFree
}
