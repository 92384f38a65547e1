package sector

import (
	"sync"
	"sync/atomic"
)

// A flusher flushes the backing device for all who ask, one fdatasync at a
// time: whoever asks while one runs shares the next. It is sticky: after a
// failure every flush fails.
//
// One at a time is not for speed alone. Linux reports a failed write-back once
// for each open file, and then takes the pages for clean (fsync(2), NOTES). Of
// two fdatasyncs on one descriptor that run at once, one gets the error of the
// data that the other was to make durable, and the other returns success. What a
// server is told that is killed then, see [Reopen] and [Continue].
type flusher struct {
	mu      sync.Mutex
	ended   sync.Cond
	started uint64 // flushes of the device that have begun
	done    uint64 // the number of the last that succeeded
	running bool
	failed  bool

	underWay atomic.Int64 // flushes of the device, and writes with FUA
	handover *Handover    // has the same, for who comes after this process; or nil
}

// begin is called before the device is told to flush, by a write with FUA too, and end
// when how that ended is known and, if need be, fail was called. Whoever comes after a
// process that was killed sees a failure, or that there may have been one.
func (f *flusher) begin() {
	f.handover.flushes(1)
	f.underWay.Add(1)
}

func (f *flusher) end() {
	f.underWay.Add(-1)
	f.handover.flushes(-1)
}

// flush returns when a flush that began after the call has ended.
func (f *flusher) flush(sync func() error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.ended.L == nil {
		f.ended.L = &f.mu
	}
	for wanted := f.started + 1; ; {
		switch {
		case f.failed:
			return ErrFailed
		case f.done >= wanted:
			return nil
		case f.running:
			f.ended.Wait()
			continue
		}
		f.running = true
		f.started++
		number := f.started
		f.begin()
		f.mu.Unlock()
		err := sync()
		f.mu.Lock()
		f.running = false
		f.ended.Broadcast()
		if err != nil {
			f.setFailed()
			f.end()
			return err
		}
		f.done = number
		f.end()
	}
}

// fail makes every flush from now on fail.
func (f *flusher) fail() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.setFailed()
}

func (f *flusher) setFailed() {
	f.failed = true
	f.handover.fail()
}

func (f *flusher) hasFailed() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failed
}
