package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd/nbdnl"
	"hostcryptd/systemd"
)

// The service manager replaces a service that doesn't tell it often enough that it
// works (WatchdogSec=). This tells it as long as the I/O of the kernel device makes
// progress, as the kernel counts it, so that no part of this process is believed about
// itself. The kernel counts requests that were answered, though, and one of zeros is up
// to 4 GiB (from Linux 6.12), a minute's work for a disk of 70 MB/s: with several side
// by side, none is answered for long. Of these the parts count that were written, as
// long as the kernel is among those who asked for some, and a discard is the disk's
// matter. So is a flush, which a disk that reads may try for minutes: a server that is
// killed meanwhile never learns that it has failed, the next one has to wait for it all
// the same, and is told by another flush that all is well.
//
// A disk that hangs is no reason to be replaced: the next server would have to
// wait for the same disk. So before I/O that stands still is held against this
// process, a read of its own has to come back from the disk.
//
// A server that hangs ends itself when it has a keeper, which starts the next: no
// request fails, and no key store is needed for it. If it can't even do that, the
// service manager ends both.

// hungAfter is how long the kernel's requests may wait without one of them being
// answered, while the disk answers.
const hungAfter = time.Minute

// A watchdog judges progress. One goroutine uses it.
type watchdog struct {
	progress func() (inFlight int, done uint64, err error) // of the kernel's requests
	long     func() (parts uint64, waits bool)             // see sector.Volume.Long
	zeroing  func() bool                                   // zeros or a discard of the kernel are under way
	excused  func() bool                                   // requests wait because they are meant to
	disk     func() error

	done  uint64
	parts uint64     // of long, when it was last looked at
	other uint64     // of these, that were not for the kernel
	moved time.Time  // when done last changed, or nothing was to be done
	probe chan error // a read of the disk is under way; nil if none is
	alive bool       // the disk has answered since moved
}

// works looks once.
func (w *watchdog) works(now time.Time) bool {
	inFlight, done, err := w.progress()
	parts, waits := w.long()
	if !w.zeroing() {
		w.other += parts - w.parts
	}
	w.parts = parts
	done += parts - w.other
	if err != nil || inFlight == 0 || done != w.done || waits || w.excused() {
		w.done, w.moved, w.alive = done, now, false
		select {
		case <-w.probe: // of before, when the disk may have answered all
			w.probe = nil
		default:
		}
		return true
	}
	if w.probe == nil && !w.alive {
		c := make(chan error, 1)
		w.probe = c
		go func() { c <- w.disk() }()
	}
	select {
	case <-w.probe: // an error is an answer too
		w.probe, w.alive = nil, true
		// What waited for the disk gets its time from now on.
		w.moved = now
	default:
	}
	return !w.alive || now.Sub(w.moved) < hungAfter
}

// watch runs until ctx ends.
func (d *daemon) watch(ctx context.Context) {
	usec, _ := strconv.ParseInt(os.Getenv("WATCHDOG_USEC"), 10, 64)
	every := hungAfter / 6
	if usec > 0 {
		every = min(every, time.Duration(usec)*time.Microsecond/4)
	}
	w := &watchdog{progress: d.progress, long: d.long, zeroing: d.zeroing, excused: d.excused, disk: d.readDisk, moved: time.Now()}
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			switch {
			case w.works(now):
				if usec > 0 {
					d.notify(systemd.Watchdog)
				}
			case d.link != nil:
				stacks := make([]byte, 64<<10)
				stacks = stacks[:runtime.Stack(stacks, true)]
				d.log.Error("no request is answered though the disk answers; another server goes on", zap.Duration("since", now.Sub(w.moved)))
				fmt.Fprintf(os.Stderr, "%s\n", stacks)
				_ = unix.Kill(os.Getpid(), unix.SIGKILL)
			}
		}
	}
}

// progress is what the kernel counts at its device.
func (d *daemon) progress() (int, uint64, error) {
	d.mu.Lock()
	index, attached := d.index, d.attached != ""
	d.mu.Unlock()
	if !attached {
		return 0, 0, nil
	}
	return nbdnl.Progress(index)
}

func (d *daemon) long() (parts uint64, waits bool) {
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	if v == nil {
		return 0, false
	}
	return v.Long()
}

func (d *daemon) zeroing() bool {
	d.mu.Lock()
	s := d.server
	d.mu.Unlock()
	return s != nil && s.KernelZeroes()
}

// excused tells whether requests may wait for long: until the volume's key is
// back, or for a disk below the page cache, which a read would not ask. To ask by
// fdatasync would be to take an error that belongs to a flush.
func (d *daemon) excused() bool {
	d.mu.Lock()
	v, device := d.volume, d.device
	d.mu.Unlock()
	return v == nil || v.Suspended() || !device.Direct()
}

// readDisk reads a block of the backing device. If a write with FUA is under way it has a
// flush done, too: on a disk that can't write through its cache, that write ends with one.
func (d *daemon) readDisk() error {
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		return nil
	}
	defer unix.Munmap(p)
	d.mu.Lock()
	device, v := d.device, d.volume
	d.mu.Unlock()
	if _, err = device.File().ReadAt(p, 0); err == nil && v != nil && v.Flushing() {
		err = v.Sync()
	}
	return err
}
