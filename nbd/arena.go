package nbd

import (
	"fmt"
	"math/bits"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	pageSize  = 4096
	pageShift = 12

	// Runs of at least this many pages are taken from the top of the arena,
	// shorter ones from the bottom, so that the many small ones don't leave the
	// few large ones without a place.
	largeRun = 64

	// How many pages at the bottom are the reserve, of an arena that has as many
	// besides the largest payload.
	reservePages = 2048

	// The arena keeps this many pages in memory when it is idle.
	keepPages = 512

	// How often the arena looks whether it has memory to give back.
	trimInterval = 10 * time.Second

	// The most pages given back under one hold of the lock: some 50 µs.
	trimStep = 256
)

// An arena is a fixed amount of memory outside the Go heap, handed out in runs
// of pages. Pages cost nothing before their first use, and those that a burst
// has used are given back to the kernel when the burst is over.
//
// The rule for sharing it, when it is short:
//
//   - A part of it is the reserve. A client gets memory of the reserve while it then
//     holds no more than a quarter of what is left of that, without regard to who
//     waits. So one that takes all it can get takes a fifth, the next a fifth of
//     the rest: of 8 MiB, ten that take no reply at all leave the next room for
//     requests of 170 KiB. In the order of coming alone, a client that took 32 MiB
//     at 3 MB/s had a request of 4 KiB of another wait 10 s.
//   - With [Config.Kernel], no client gets anything of the first half of the reserve:
//     20 of them with replies of 4 KiB left 104 KiB of all of it, so that the kernel
//     had no request of 128 KiB answered, which may be the host's swap. The kernel
//     takes its replies, so it gets all of the reserve, which is what --swap keeps in
//     memory.
//   - The rest is granted in the order in which the requests came that the reserve
//     has nothing for, whatever their size. One that doesn't fit holds up those
//     behind it, so a large one is never starved: what is out comes back without
//     any further memory, and what passes by way of the reserve takes none here.
//   - A connection may hold at most half of the arena, or one largest payload
//     if that is more. Beyond that it waits for itself, outside the queue.
//   - The payload of a write is taken in pieces of at most [chunkSize], each
//     when the one before it has arrived. A client that announces a large write
//     and never sends it holds one piece, however much it announced.
//   - What remains are clients that don't take their replies. When a request
//     has waited for [Config.StallTimeout], connections that hold memory and
//     have moved no byte for that time are ended ([ErrStalled]).
type arena struct {
	mem     []byte
	pages   int
	reserve int // the first pages
	kernel  int // of these, the first that no client gets

	mu       sync.Mutex // guards what follows; nothing that waits is called with it held
	taken    []uint64   // one bit for each page
	resident []uint64   // the pages used since they were last given back
	low      int        // no page below is free
	used     int        // pages
	lent     int        // pages in use of what clients may get of the reserve
	peak     int        // most of used, ever
	recent   int        // most of used since the last look of trim
	resCount int        // bits in resident
	waits    uint64     // requests that had to queue
	closed   bool

	head, tail *waiter // who waits, first to last

	timer *time.Timer // runs trim
	armed bool
}

// A waiter is a connection as the arena knows it, and its place in the queue for
// memory. There is one, since only the goroutine that reads from the socket takes
// memory.
type waiter struct {
	lent    int  // what the connection has of arena.lent; guarded by arena.mu
	kernel  bool // the peer is the kernel
	size    int
	buf     []byte        // set before granted is sent
	granted chan struct{} // capacity 1
	notify  func()        // if not nil, is called after that, with the lock held
	next    *waiter
}

// Memory is what an arena is made of, mapped before there is a server.
type Memory struct{ mem []byte }

// NewMemory maps size bytes, of which the first locked are put into memory now
// and stay there. Short requests use these first. The rest may be had when it is
// used, and given back when it isn't.
func NewMemory(size, locked int64) (*Memory, error) {
	size = (size + pageSize - 1) &^ (pageSize - 1)
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE,
		unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("nbd: mapping an arena of %d bytes: %w", size, os.NewSyscallError("mmap", err))
	}
	// It holds plaintext. Old kernels may refuse; then the process's own
	// setting has to do.
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)
	if locked > 0 {
		if err := unix.Mlock(mem[:min(locked, size)]); err != nil {
			_ = unix.Munmap(mem)
			return nil, fmt.Errorf("nbd: locking %d bytes of an arena: %w", locked, os.NewSyscallError("mlock", err))
		}
	}
	return &Memory{mem}, nil
}

// newArena makes an arena, with kernel of a server that serves the kernel.
func newArena(m *Memory, kernel bool) *arena {
	mem := m.mem
	pages := len(mem) / pageSize
	words := (pages + 63) / 64
	a := &arena{
		mem:      mem,
		pages:    pages,
		reserve:  max(0, min(reservePages, pages-MaxPayload>>pageShift)),
		taken:    make([]uint64, words),
		resident: make([]uint64, words),
	}
	if kernel {
		a.kernel = a.reserve / 2
	}
	if tail := pages % 64; tail != 0 {
		a.taken[words-1] = ^uint64(0) << tail // pages that aren't there
	}
	a.timer = time.AfterFunc(time.Hour, a.trim)
	a.timer.Stop()
	return a
}

// close unmaps the memory. Nothing may be out.
func (a *arena) close() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.used != 0 || a.head != nil {
		panic("nbd: arena closed while in use")
	}
	a.closed = true
	a.timer.Stop()
	mem := a.mem
	a.mem = nil
	return os.NewSyscallError("munmap", unix.Munmap(mem))
}

// try returns size bytes, size > 0, if w can have them at once, or nil. The
// capacity of the slice is the whole run. What is in it is not defined.
func (a *arena) try(w *waiter, size int) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.take(w, size, a.head == nil)
}

// enqueue returns size bytes or queues w for them.
func (a *arena) enqueue(w *waiter, size int) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	if buf := a.take(w, size, a.head == nil); buf != nil {
		return buf
	}
	if a.head == nil {
		a.head = w
	} else {
		a.tail.next = w
	}
	a.tail = w
	a.waits++
	w.size, w.buf, w.next = size, nil, nil
	return nil
}

// cancel takes w out of the queue. It returns the memory if that was granted
// meanwhile.
func (a *arena) cancel(w *waiter) []byte {
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-w.granted:
		return w.buf
	default:
	}
	var prev *waiter
	for p := a.head; p != w; p = p.next {
		prev = p
	}
	a.unlink(prev, w)
	a.grant() // those behind w may fit
	return nil
}

// unlink takes w, which comes after prev, out of the queue.
func (a *arena) unlink(prev, w *waiter) {
	if prev == nil {
		a.head = w.next
	} else {
		prev.next = w.next
	}
	if a.tail == w {
		a.tail = prev
	}
}

// release takes back what w got by try, enqueue or from the queue.
func (a *arena) release(w *waiter, buf []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	first := int(uintptr(unsafe.Pointer(unsafe.SliceData(buf)))-uintptr(unsafe.Pointer(unsafe.SliceData(a.mem)))) >> pageShift
	n := cap(buf) >> pageShift
	setRange(a.taken, first, n, false)
	a.low = min(a.low, first)
	a.used -= n
	a.lend(w, first, n, -1)
	if a.head != nil {
		a.grant()
	}
	if !a.armed && a.resCount > keepPages && a.used <= a.resCount/2 {
		a.armed = true
		a.recent = a.used
		a.timer.Reset(trimInterval)
	}
}

// grant serves the queue as far as the memory goes: the first from everywhere,
// the others from the reserve.
func (a *arena) grant() {
	var prev *waiter
	for w := a.head; w != nil; w = w.next {
		if w.buf = a.take(w, w.size, prev == nil); w.buf == nil {
			prev = w
			continue
		}
		a.unlink(prev, w)
		w.granted <- struct{}{}
		if w.notify != nil {
			w.notify()
		}
	}
}

// take returns size bytes of the reserve, or, with all, of the rest, if w may
// have them.
func (a *arena) take(w *waiter, size int, all bool) []byte {
	n := (size + pageSize - 1) >> pageShift
	from, lend := max(a.low, a.kernel), 4*(w.lent+n) <= a.reserve-a.kernel-a.lent-n
	if w.kernel {
		from, lend = a.low, true
	}
	first := -1
	switch {
	case n < largeRun:
		if lend {
			first = a.lowest(n, from, a.reserve)
		}
		if first < 0 && all {
			first = a.lowest(n, max(a.low, a.reserve), a.pages)
		}
	default:
		if all {
			first = a.highest(n, max(a.low, a.reserve), a.pages)
		}
		if first < 0 && lend {
			first = a.highest(n, from, a.reserve)
		}
	}
	if first < 0 {
		return nil
	}
	a.lend(w, first, n, 1)
	setRange(a.taken, first, n, true)
	a.resCount += setRange(a.resident, first, n, true)
	if first == a.low {
		a.low += n
	}
	a.used += n
	a.peak = max(a.peak, a.used)
	a.recent = max(a.recent, a.used)
	off := first << pageShift
	return a.mem[off : off+size : off+n<<pageShift]
}

// lend counts, with sign, what n pages from first have of the part of the reserve
// that clients may get.
func (a *arena) lend(w *waiter, first, n, sign int) {
	if k := min(first+n, a.reserve) - max(first, a.kernel); k > 0 {
		a.lent += sign * k
		w.lent += sign * k
	}
}

// lowest returns the first page of the lowest run of n free pages in [from, end),
// or -1.
func (a *arena) lowest(n, from, end int) int {
	for {
		from = nextBit(a.taken, from, end, false)
		if from+n > end {
			return -1
		}
		to := nextBit(a.taken, from, from+n, true)
		if to == from+n {
			return from
		}
		from = to
	}
}

// highest returns the first page of the highest run of n free pages in
// [from, end), or -1.
func (a *arena) highest(n, from, end int) int {
	for {
		end = prevBit(a.taken, end, from, false)
		if end-n < from {
			return -1
		}
		start := prevBit(a.taken, end, end-n, true)
		if start == end-n {
			return start
		}
		end = start
	}
}

// trim gives memory back if less than half of what is resident was in use
// since the last look. It runs from the timer.
func (a *arena) trim() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.armed = false
	if !a.closed && a.recent <= a.resCount/2 {
		// From the top: what is used next comes from the bottom.
		for end := a.pages; end > 0 && a.resCount > keepPages; {
			end = prevBit(a.resident, end, 0, true)
			start := prevBit(a.resident, end, max(0, end-trimStep), false)
			if busy := prevBit(a.taken, end, start, true); busy == end {
				end = prevBit(a.taken, end, start, false) // skip what is in use
				continue
			} else if busy > start {
				start = busy
			}
			if start < end {
				// Locked memory stays, as it should.
				if unix.Madvise(a.mem[start<<pageShift:end<<pageShift], unix.MADV_DONTNEED) != nil {
					return
				}
				a.resCount += setRange(a.resident, start, end-start, false)
			}
			end = start
			a.mu.Unlock() // let others in
			a.mu.Lock()
			if a.closed {
				return
			}
		}
	}
	a.recent = a.used
	if !a.closed && a.resCount > keepPages {
		a.armed = true
		a.timer.Reset(trimInterval)
	}
}

// setRange sets or clears n bits and returns by how much the number of set
// bits changed.
func setRange(b []uint64, first, n int, set bool) int {
	change := 0
	for n > 0 {
		word, bit := first/64, first%64
		k := min(n, 64-bit)
		mask := (^uint64(0) >> (64 - k)) << bit
		if set {
			change += bits.OnesCount64(mask &^ b[word])
			b[word] |= mask
		} else {
			change -= bits.OnesCount64(mask & b[word])
			b[word] &^= mask
		}
		first += k
		n -= k
	}
	return change
}

// nextBit returns the first bit in [from, end) that is set, or not set, as
// asked, or end.
func nextBit(b []uint64, from, end int, set bool) int {
	for from < end {
		word := b[from/64]
		if !set {
			word = ^word
		}
		if word >>= from % 64; word != 0 {
			return min(end, from+bits.TrailingZeros64(word))
		}
		from = (from/64 + 1) * 64
	}
	return end
}

// prevBit returns one more than the last bit in [start, end) that is set, or
// not set, as asked, or start.
func prevBit(b []uint64, end, start int, set bool) int {
	for end > start {
		word := b[(end-1)/64]
		if !set {
			word = ^word
		}
		if word <<= 63 - (end-1)%64; word != 0 {
			return max(start, end-bits.LeadingZeros64(word))
		}
		end = (end - 1) / 64 * 64
	}
	return start
}

// ArenaStats is the state of the memory that holds payloads, in bytes.
type ArenaStats struct {
	Size     int64  // as configured
	Used     int64  // held by requests now
	Peak     int64  // most ever held
	Resident int64  // used since it was last given back to the kernel
	Waits    uint64 // how often a request had to wait for memory
}

func (a *arena) stats() ArenaStats {
	a.mu.Lock()
	defer a.mu.Unlock()
	return ArenaStats{
		Size:     int64(a.pages) << pageShift,
		Used:     int64(a.used) << pageShift,
		Peak:     int64(a.peak) << pageShift,
		Resident: int64(a.resCount) << pageShift,
		Waits:    a.waits,
	}
}
