// Package uring is a small binding to io_uring(7): reads and writes of files,
// and waiting for descriptors, many of each with one system call.
//
// A [Ring] belongs to one goroutine, which must be locked to its thread
// ([runtime.LockOSThread]) from before [New] until after [Ring.Close]: the
// kernel is told that nobody else submits, and then delivers completions only
// when that thread asks for them, without interrupting it.
//
// The memory that an operation names is the caller's. It must lie outside of
// the Go heap or be kept reachable, and must not be reused before the
// operation's completion was seen: the kernel writes to it meanwhile.
package uring

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What the kernel defines in include/uapi/linux/io_uring.h and x/sys doesn't.
const (
	setupCQSize       = 1 << 3
	setupClamp        = 1 << 4
	setupCoopTaskrun  = 1 << 8  // Linux 5.19
	setupSingleIssuer = 1 << 12 // 6.0
	setupDeferTaskrun = 1 << 13 // 6.1

	featSingleMmap = 1 << 0 // 5.4
	featNoDrop     = 1 << 1 // 5.5: completions are kept when the queue is full

	enterGetEvents = 1 << 0

	offSQRing = 0
	offSQEs   = 0x10000000

	registerProbe    = 8
	opSupported      = 1 << 0
	sqeAsync         = 1 << 4 // IOSQE_ASYNC
	sqCQOverflow     = 1 << 1 // IORING_SQ_CQ_OVERFLOW
	sqTaskrun        = 1 << 2 // IORING_SQ_TASKRUN
	setupTaskrunFlag = 1 << 9 // 5.19
)

// Operations, in the kernel's numbering.
const (
	opPollAdd = 6
	opCancel  = 14 // 5.5
	opRead    = 22 // 5.6
	opWrite   = 23 // 5.6
)

// Flags of an operation.
const (
	// DSync makes a write durable before it completes, as RWF_DSYNC does.
	DSync = unix.RWF_DSYNC
)

type params struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	_                                                                      [3]uint32
	sq                                                                     sqOffsets
	cq                                                                     cqOffsets
}

type sqOffsets struct {
	head, tail, mask, entries, flags, dropped, array, _ uint32
	_                                                   uint64
}

type cqOffsets struct {
	head, tail, mask, entries, overflow, cqes, flags, _ uint32
	_                                                   uint64
}

type sqe struct {
	op       uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64
	addr     uint64
	length   uint32
	opFlags  uint32 // RWF_ of a read or write, events of a poll
	userData uint64
	_        [3]uint64
}

// A Completion is the end of an operation.
type Completion struct {
	// Data is what the operation was given.
	Data uint64
	// Result is what the system call would return: a count, or the negative
	// of an errno.
	Result int32
	_      uint32
}

// A Ring is a pair of queues that are shared with the kernel.
type Ring struct {
	fd       int
	rings    []byte
	sqes     []byte
	sqHead   *uint32
	sqTail   *uint32
	sqFlags  *uint32
	cqHead   *uint32
	cqTail   *uint32
	entries  []sqe
	cqes     []Completion
	sqMask   uint32
	cqMask   uint32
	tail     uint32 // of the submission queue, as far as it is filled
	deferred bool   // completions come only from Enter with wait or poll
	pending  uint32 // operations that the kernel has and that have not completed
	refused  int    // how often, in a row, the kernel had no memory to take any
}

// New makes a ring with room for at least n operations that are not yet
// submitted, and for their completions. It fails where the kernel has no
// io_uring, or forbids it to this process (kernel.io_uring_disabled, seccomp).
func New(n int) (*Ring, error) {
	// From the newest kernel to the oldest. An unknown flag is EINVAL.
	var last error
	for _, flags := range []uint32{
		setupSingleIssuer | setupDeferTaskrun,
		setupCoopTaskrun | setupTaskrunFlag,
		0,
	} {
		r, err := newRing(n, flags)
		if err == nil {
			return r, nil
		}
		if last = err; !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	return nil, last
}

func newRing(n int, flags uint32) (_ *Ring, err error) {
	p := params{flags: flags | setupClamp | setupCQSize, cqEntries: uint32(4 * n)}
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("io_uring_setup", errno)
	}
	r := &Ring{fd: int(fd), deferred: flags&setupDeferTaskrun != 0}
	defer func() {
		if err != nil {
			r.Close()
		}
	}()
	unix.CloseOnExec(r.fd)
	if p.features&featSingleMmap == 0 || p.features&featNoDrop == 0 {
		return nil, fmt.Errorf("io_uring_setup: features %#x are too few: %w", p.features, unix.ENOSYS)
	}
	if err := r.probe(opPollAdd, opCancel, opRead, opWrite); err != nil {
		return nil, err
	}
	size := max(p.sq.array+4*p.sqEntries, p.cq.cqes+16*p.cqEntries)
	const prot, shared = unix.PROT_READ | unix.PROT_WRITE, unix.MAP_SHARED | unix.MAP_POPULATE
	if r.rings, err = unix.Mmap(r.fd, offSQRing, int(size), prot, shared); err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	if r.sqes, err = unix.Mmap(r.fd, offSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{})), prot, shared); err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[off])) }
	r.sqHead, r.sqTail, r.sqFlags = word(p.sq.head), word(p.sq.tail), word(p.sq.flags)
	r.cqHead, r.cqTail = word(p.cq.head), word(p.cq.tail)
	r.sqMask, r.cqMask = *word(p.sq.mask), *word(p.cq.mask)
	r.entries = unsafe.Slice((*sqe)(unsafe.Pointer(&r.sqes[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*Completion)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	// Entry n of the queue is always element n of the array.
	array := unsafe.Slice(word(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	r.tail = *r.sqTail
	return r, nil
}

// probe returns an error if the kernel lacks one of the operations.
func (r *Ring) probe(ops ...int) error {
	var b struct {
		last, n uint8
		_       uint16
		_       [3]uint32
		ops     [64]struct {
			op, _ uint8
			flags uint16
			_     uint32
		}
	}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerProbe, uintptr(unsafe.Pointer(&b)), uintptr(len(b.ops)), 0, 0)
	if errno != 0 {
		return os.NewSyscallError("io_uring_register", errno)
	}
	for _, op := range ops {
		if b.ops[op].flags&opSupported == 0 {
			return fmt.Errorf("io_uring has no operation %d: %w", op, unix.ENOSYS)
		}
	}
	return nil
}

// Close frees the ring. No operation may be under way whose memory is used
// again: the kernel cancels what it can, and waits for none of it.
func (r *Ring) Close() error {
	err := os.NewSyscallError("close", unix.Close(r.fd))
	for _, m := range [][]byte{r.rings, r.sqes} {
		if m != nil {
			err = errors.Join(err, unix.Munmap(m))
		}
	}
	r.rings, r.sqes = nil, nil
	return err
}

// next returns a cleared entry, or nil if the queue is full.
func (r *Ring) next() *sqe {
	if r.tail-atomic.LoadUint32(r.sqHead) > r.sqMask {
		return nil
	}
	e := &r.entries[r.tail&r.sqMask]
	r.tail++
	*e = sqe{}
	return e
}

// Room returns how many operations can be added before the next Enter.
func (r *Ring) Room() int {
	return len(r.entries) - int(r.tail-atomic.LoadUint32(r.sqHead))
}

// Pending returns how many operations were submitted and have not completed.
func (r *Ring) Pending() int { return int(r.pending) }

// Read adds a read of len(p) bytes at off, len(p) > 0. async has the kernel
// use a thread of its own at once, rather than when the read would block. It
// reports whether there was room.
func (r *Ring) Read(fd int, p []byte, off int64, async bool, data uint64) bool {
	return r.rw(opRead, fd, p, off, 0, async, data)
}

// Write adds a write. flags is 0 or [DSync].
func (r *Ring) Write(fd int, p []byte, off int64, flags uint32, async bool, data uint64) bool {
	return r.rw(opWrite, fd, p, off, flags, async, data)
}

func (r *Ring) rw(op uint8, fd int, p []byte, off int64, flags uint32, async bool, data uint64) bool {
	e := r.next()
	if e == nil {
		return false
	}
	e.op, e.fd, e.off, e.opFlags, e.userData = op, int32(fd), uint64(off), flags, data
	e.addr, e.length = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), uint32(len(p))
	if async {
		e.flags = sqeAsync
	}
	return true
}

// Poll adds a wait for events of poll(2), once. Its result is what happened.
func (r *Ring) Poll(fd int, events uint32, data uint64) bool {
	e := r.next()
	if e == nil {
		return false
	}
	e.op, e.fd, e.opFlags, e.userData = opPollAdd, int32(fd), events, data
	return true
}

// Cancel adds a request to end the operation that was given target. Both
// complete, in any order.
func (r *Ring) Cancel(target, data uint64) bool {
	e := r.next()
	if e == nil {
		return false
	}
	e.op, e.fd, e.addr, e.userData = opCancel, -1, target, data
	return true
}

// Enter submits what was added. With wait, it returns when there is a
// completion. An interruption by a signal is no error; then there may be none. The
// same is so when the kernel has no memory for it: Enter has paused then.
func (r *Ring) Enter(wait bool) error {
	n := r.tail - *r.sqTail // only this thread writes it
	if n > 0 {
		atomic.StoreUint32(r.sqTail, r.tail)
	}
	// What the kernel did not take the last time counts again.
	n = r.tail - atomic.LoadUint32(r.sqHead)
	if wait && atomic.LoadUint32(r.cqTail) != *r.cqHead {
		wait = false
	}
	flags, least := uintptr(0), uintptr(0)
	switch {
	case wait:
		flags, least = enterGetEvents, 1
	case r.deferred || atomic.LoadUint32(r.sqFlags)&(sqCQOverflow|sqTaskrun) != 0:
		flags = enterGetEvents
	case n == 0:
		return nil
	}
	var done uintptr
	var errno unix.Errno
	if wait {
		done, _, errno = unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), least, flags, 0, 0)
	} else {
		// It doesn't block, so the scheduler needn't be told.
		done, _, errno = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(n), least, flags, 0, 0)
	}
	if flags != 0 && (errno == unix.EAGAIN || errno == unix.EBUSY || errno == 0 && uint32(done) < n) {
		// A kernel that has not taken all has not looked for completions. What they
		// free may be what it lacked.
		_, _, _ = unix.RawSyscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), 0, 0, enterGetEvents, 0, 0)
	}
	return r.entered(uint32(done), errno, wait)
}

// entered takes the result of io_uring_enter.
func (r *Ring) entered(done uint32, errno unix.Errno, wait bool) error {
	switch errno {
	case 0:
		r.pending += done
		r.refused = 0
	case unix.EINTR:
		// With something submitted the count is returned, not this.
	case unix.EAGAIN, unix.EBUSY:
		// Memory, or room for completions, is short: the caller takes
		// completions and comes again. Where there are none, that would be to take
		// the processor from who makes memory free.
		if wait && atomic.LoadUint32(r.cqTail) == *r.cqHead {
			time.Sleep(backoff(r.refused))
			r.refused++
		}
	default:
		return os.NewSyscallError("io_uring_enter", errno)
	}
	return nil
}

// backoff is the pause after the kernel has refused n times before.
func backoff(n int) time.Duration {
	return min(50*time.Microsecond<<min(n, 10), 10*time.Millisecond)
}

// Completed returns the next completion, if there is one.
func (r *Ring) Completed() (c Completion, ok bool) {
	head := *r.cqHead // only this thread writes it
	if head == atomic.LoadUint32(r.cqTail) {
		return Completion{}, false
	}
	c = r.cqes[head&r.cqMask]
	atomic.StoreUint32(r.cqHead, head+1)
	r.pending--
	return c, true
}
