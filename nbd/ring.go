package nbd

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd/uring"
)

// The io_uring engine. One goroutine, on a thread of its own, does everything
// for a connection: it waits in io_uring_enter for the socket and the backing
// device at once, takes all requests that have come with one read, submits
// their reads and writes with one system call, and sends the replies to all
// that have completed with one more. Other requests (a flush, a part of a
// sector, zeros) go to workers, as they may wait.
//
// The portable engine (work) needs a thread for each request that is on the
// device. On a disk that answers 90 000 requests of 4 KiB in a second, that
// took 25 to 30 µs of processor time for each and reached a quarter of it.

const (
	// asyncMax is the longest read or write that the loop takes itself. It
	// encrypts and decrypts too, and others wait meanwhile.
	asyncMax = chunkSize

	// submitEvery is after how many requests that were begun the kernel is told of
	// them, so that the device works while the next ones are encrypted and made
	// into I/O. Against telling it of all at once, of 32 reads of 4 KiB on a virtio
	// disk there were 1.07 times as many in a second, of writes 1.23 to 1.25; with 4
	// it was 1.03 to 1.05 and 1.15 to 1.17, with 1 it was 1.02 to 1.19 and 1.15 to
	// 1.19.
	submitEvery = 2

	// What completions carry that don't belong to a request.
	tagReadable = 1<<32 + iota
	tagWritable
	tagEvent
	tagCancel

	// maxAgain is how often an operation is submitted again that the kernel
	// has put off.
	maxAgain = 16
)

// An AsyncDevice is a Device whose reads and writes can be split in three: what
// comes before the I/O, the I/O itself, which the server has the kernel do on a
// file descriptor, many at once, and what comes after it. The methods don't
// wait for anything. They may be called by any goroutine, and the two halves
// of a request by different ones. Each Begin that returned true is followed by
// its End, whatever happens.
type AsyncDevice interface {
	Device

	// Async reports whether io_uring should do the I/O. The portable engine
	// doesn't ask: it has writes without FUA begun and ended by these methods in
	// any case, and does what is between them by pwrite(2), since they change the
	// payload where it is, and WriteAt needs memory of its own.
	Async() bool

	// BeginRead returns where len(p) bytes have to be read to p for EndRead to
	// make of them what ReadAt would. If ok is false, ReadAt is called instead:
	// this request has to wait for something, or is not in one piece.
	BeginRead(p []byte, off int64) (fd int, at int64, ok bool)

	// EndRead ends a read that BeginRead began. n is how many bytes the kernel
	// has read, err is an errno or nil. It returns what ReadAt would.
	EndRead(p []byte, off int64, n int, err error) (int, error)

	// BeginWrite changes p to what has to be written, and returns where. The
	// payload is lost thereby. With fua, it is written with RWF_DSYNC. If ok
	// is false, p has not been changed, and WriteAt or WriteAtFUA is called.
	BeginWrite(p []byte, off int64, fua bool) (fd int, at int64, ticket uint64, ok bool)

	// EndWrite ends a write that BeginWrite began. It returns what WriteAt
	// would. After an error it may look into that, and wait.
	EndWrite(p []byte, off int64, fua bool, ticket uint64, n int, err error) (int, error)
}

// ringIO is the part of a request that the kernel does.
type ringIO struct {
	fd    int
	at    int64
	done  int // bytes
	again int // how often it was put off
	plain bool
	err   error
}

// A ringLoop serves a connection by io_uring.
type ringLoop struct {
	c     *conn
	dev   AsyncDevice
	r     *uring.Ring
	count [8]byte

	kicked atomic.Bool // conn.event is signaled: somebody else has news for the loop

	starving atomic.Bool // the connection waits for the arena
	starved  *time.Timer // runs meanwhile

	// Used by the loop only.
	readable, polling   bool // the socket may have something; tagReadable is under way
	blocked, pollingOut bool // the socket takes nothing; tagWritable is under way
	listening           bool // tagEvent is under way
	onDevice            int  // requests begun and not ended
	begin, again, aside list // to begin; to submit again; for the workers
	done                list // ended
	iov                 []unix.Iovec
	sent                int // of iov
	msg                 unix.Msghdr

	// Guarded by conn.mu.
	slow  list // for workers
	ended list // by workers
	quit  bool
}

// newRingLoop prepares all but the ring, which the loop itself has to make.
func newRingLoop(c *conn, dev AsyncDevice) *ringLoop {
	l := &ringLoop{c: c, dev: dev, iov: make([]unix.Iovec, 0, 2*sendReplies)}
	c.reader.waiter.notify = l.kick
	l.starved = time.AfterFunc(time.Hour, func() {
		if l.starving.Load() {
			c.s.endStalled()
			l.starved.Reset(c.s.cfg.StallTimeout)
		}
	})
	l.starved.Stop()
	return l
}

// kick makes the loop look around. It may be called by anybody.
func (l *ringLoop) kick() {
	if l.kicked.CompareAndSwap(false, true) {
		_, _ = unix.Write(l.c.event, one)
	}
}

// runRing is run with io_uring. It returns false if that can't be had now.
func (c *conn) runRing(ctx context.Context) (err error, ok bool) {
	l := c.ring
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if l.r, err = uring.New(2 * len(c.slots)); err != nil {
		c.mu.Lock()
		c.ring = nil
		c.mu.Unlock()
		c.reader.waiter.notify = nil
		c.s.cfg.Log.Warn("a connection has to do without io_uring", zap.Error(err))
		return nil, false
	}

	// The workers exist from the start, as in run.
	var workers sync.WaitGroup
	c.mu.Lock()
	c.hire(&workers, l.work)
	c.mu.Unlock()

	var grace *time.Timer // guarded by mu
	canceled := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(canceled)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.failed == nil {
			_ = c.nc.SetWriteDeadline(time.Now().Add(c.s.cfg.Grace)) // for shutdown
			grace = time.AfterFunc(c.s.cfg.Grace, func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				if !l.quit {
					c.breakOff(fmt.Errorf("nbd: sending reply: %w", os.ErrDeadlineExceeded))
				}
			})
		}
		l.kick()
	})

	l.run(ctx)
	err = l.finish()
	if !stop() {
		<-canceled
	}

	c.mu.Lock()
	l.quit = true
	for c.wakeOne() {
	}
	if grace != nil {
		grace.Stop()
	}
	c.mu.Unlock()
	workers.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endRescue()
	if err != nil {
		return err, true
	}
	return c.result(ctx), true
}

// work is the life of a worker: it runs requests that may wait.
func (l *ringLoop) work(w *worker) {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch r := l.slow.pop(); {
		case r != nil:
			l.wakeWorker()
			begins := c.begins(r) // it may have waited for a thread
			c.mu.Unlock()
			errno := errShutdown
			switch {
			case r.io.plain:
				errno = l.plainly(r)
			case begins:
				errno = c.execute(r)
			}
			if r.cmd == cmdWrite {
				c.releaseBuf(r)
			}
			c.mu.Lock()
			r.errno = errno
			l.ended.push(r)
			l.kick()
		case l.quit:
			c.dismiss()
			c.wakeOne() // to return, too
			return
		default:
			c.idle = append(c.idle, w)
			c.dismiss()
			c.mu.Unlock()
			<-w.wake
			c.mu.Lock()
		}
	}
}

// wakeWorker wakes a worker if there is something for it, now or when it may work.
func (l *ringLoop) wakeWorker() {
	c := l.c
	if l.slow.n > 0 && !c.wakeOne() && len(c.idle) > 0 {
		c.guard(rescueAgain)
	}
}

// run is the loop.
func (l *ringLoop) run(ctx context.Context) {
	l.readable = true // what the handshake has read too much, if nothing else
	for {
		l.reap()
		l.news(ctx)
		l.receive()
		if l.start() {
			// The device gets on while replies are sent.
			l.enter(false)
		}
		again := l.reply()
		if l.over() {
			return
		}
		if again {
			continue
		}
		l.arm()
		l.enter(true)
	}
}

// over reports whether nothing is left to do.
func (l *ringLoop) over() bool {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stopped && c.inFlight == 0 && c.sender.batch.n == 0
}

// enter submits, and with wait returns when something has happened.
func (l *ringLoop) enter(wait bool) {
	if err := l.r.Enter(wait); err != nil {
		// No operation can be waited for, and their memory not be used again.
		panic(fmt.Sprintf("nbd: internal error: %v", err))
	}
}

// finish ends what the loop still waits for, and closes the ring.
func (l *ringLoop) finish() error {
	for tag, on := range map[uint64]bool{tagReadable: l.polling, tagWritable: l.pollingOut, tagEvent: l.listening} {
		if on {
			l.r.Cancel(tag, tagCancel)
		}
	}
	for l.enter(false); l.r.Pending() > 0; {
		for _, ok := l.r.Completed(); ok; _, ok = l.r.Completed() {
		}
		if l.r.Pending() > 0 {
			l.enter(true)
		}
	}
	if err := l.r.Close(); err != nil {
		return fmt.Errorf("nbd: %w", err)
	}
	return nil
}

// reap takes what has completed.
func (l *ringLoop) reap() {
	for {
		e, ok := l.r.Completed()
		if !ok {
			return
		}
		switch e.Data {
		case tagReadable:
			l.polling, l.readable = false, true
		case tagWritable:
			l.pollingOut, l.blocked = false, false
		case tagEvent:
			l.listening = false
			_, _ = unix.Read(l.c.event, l.count[:])
			l.kicked.Store(false) // what came before is seen by news
		case tagCancel:
		default:
			result := int(e.Result)
			if fault := l.c.s.fault; fault != nil {
				result = fault(result)
			}
			l.completed(&l.c.slots[e.Data], result)
		}
	}
}

// completed takes the result of an operation on the device.
func (l *ringLoop) completed(r *request, result int) {
	switch errno := syscall.Errno(-result); {
	case result > 0:
		r.io.done += result
		if r.io.done < len(r.buf) {
			l.again.push(r) // cut short, as a signal or a device may
			return
		}
	case result == 0:
		// The end of the device. What is missing makes it an error.
	case errno == syscall.EINVAL && r.io.done > 0:
		r.io.err = syscall.EIO // cut short where nothing can go on
	case errno == syscall.EINTR, errno == syscall.EAGAIN && r.io.again < maxAgain:
		r.io.again++
		l.again.push(r)
		return
	case errno == syscall.EAGAIN, errno == syscall.ECANCELED, errno == syscall.ENOMEM, errno == syscall.EOPNOTSUPP:
		// io_uring has given up on it, and the device may not have seen it: the
		// kernel was short of memory or of a thread, or the device can't be
		// asked without waiting. A worker asks the device.
		r.io.plain = true
		l.aside.push(r)
		return
	default:
		r.io.err = errno
	}
	l.end(r)
}

// plainly does the I/O of a request that io_uring has given up on, or the rest
// of it, and what comes after.
func (l *ringLoop) plainly(r *request) uint32 {
	var n int
	n, r.io.err = transfer(r.cmd, r.flags&cmdFlagFUA != 0, r.io.fd, r.buf[r.io.done:], r.io.at+int64(r.io.done))
	r.io.done += n
	return l.outcome(r)
}

// outcome does what comes after the I/O, and returns the NBD error.
func (l *ringLoop) outcome(r *request) uint32 {
	n, err := 0, error(nil)
	if r.cmd == cmdRead {
		n, err = l.dev.EndRead(r.buf, int64(r.off), r.io.done, r.io.err)
	} else {
		n, err = l.dev.EndWrite(r.buf, int64(r.off), r.flags&cmdFlagFUA != 0, r.ticket, r.io.done, r.io.err)
	}
	return l.c.s.outcome(r, full(n, len(r.buf), err))
}

// end ends a request whose I/O was done by io_uring.
func (l *ringLoop) end(r *request) {
	l.onDevice--
	r.errno = l.outcome(r)
	if r.cmd == cmdWrite {
		l.c.releaseBuf(r)
	}
	l.done.push(r)
}

// news takes what others have left, and answers for what has ended.
func (l *ringLoop) news(ctx context.Context) {
	c := l.c
	c.mu.Lock()
	defer c.mu.Unlock()
	for r := l.done.pop(); r != nil; r = l.done.pop() {
		c.finish(r, r.errno)
	}
	for r := l.ended.pop(); r != nil; r = l.ended.pop() {
		l.onDevice--
		c.finish(r, r.errno)
	}
	if !c.stopped {
		if c.failed != nil {
			c.accept(c.failed)
		} else if ctx.Err() != nil && !c.leaving() {
			c.accept(context.Cause(ctx))
		}
		if c.stopped {
			l.leaveArena()
		}
	}
}

// receive reads and parses as long as there are requests and room for them.
func (l *ringLoop) receive() {
	c := l.c
	rd := &c.reader
	if c.stopped { // only the loop sets it
		return
	}
	if rd.short {
		c.look()
	}
	var err error
	for {
		if err = c.parse(); err != nil || rd.short {
			break
		}
		if !l.readable {
			if c.leaving() && c.rest() == 0 {
				err = ErrLeave
			}
			break
		}
		if err = l.recv(); err != nil {
			break
		}
	}
	if err == nil && rd.taken.n == 0 && rd.answered.n == 0 && rd.accepted == 0 {
		return
	}
	c.mu.Lock()
	c.accept(err)
	c.mu.Unlock()
	if err != nil {
		l.leaveArena()
	}
}

// recv reads once from the socket, without waiting.
func (l *ringLoop) recv() error {
	c := l.c
	leaving := c.leaving()
	if leaving && c.rest() == 0 {
		return ErrLeave
	}
	room := c.vectors(leaving)
	if !c.readv() {
		l.readable = false
		return nil
	}
	// Less than there was room for: that was all.
	if c.reader.n < room {
		l.readable = false
	}
	return c.received()
}

// start begins what can be begun, and submits most of it. It reports whether there
// is something left to submit.
func (l *ringLoop) start() bool {
	c := l.c
	added := 0
	for r := l.again.pop(); r != nil; r = l.again.pop() {
		l.submit(r)
		added++
	}
	c.mu.Lock()
	for l.onDevice+l.begin.n < c.s.cfg.InFlight {
		r := c.ready.pop()
		if r == nil {
			break
		}
		l.begin.push(r)
	}
	c.mu.Unlock()
	for r := l.begin.pop(); r != nil; r = l.begin.pop() {
		l.onDevice++
		if l.prepare(r) {
			l.submit(r)
			if added++; added%submitEvery == 0 {
				l.enter(false)
			}
		} else {
			l.aside.push(r)
		}
	}
	if l.aside.n > 0 {
		c.mu.Lock()
		l.slow.append(&l.aside)
		l.wakeWorker()
		c.mu.Unlock()
	}
	return added%submitEvery != 0
}

// prepare does what comes before the I/O. It returns false if a worker has to
// run the request.
func (l *ringLoop) prepare(r *request) (ok bool) {
	r.io = ringIO{}
	if r.sync || r.length == 0 || r.length > asyncMax {
		return false
	}
	switch r.cmd {
	case cmdRead:
		r.io.fd, r.io.at, ok = l.dev.BeginRead(r.buf, int64(r.off))
	case cmdWrite:
		r.io.fd, r.io.at, r.ticket, ok = l.dev.BeginWrite(r.buf, int64(r.off), r.flags&cmdFlagFUA != 0)
	}
	return ok
}

// submit adds the I/O of a request, or what is left of it, to the ring. There
// is room: the ring has twice as many places as there are requests.
func (l *ringLoop) submit(r *request) {
	p, at, async := r.buf[r.io.done:], r.io.at+int64(r.io.done), r.io.again > 0
	var ok bool
	switch {
	case r.cmd == cmdRead:
		ok = l.r.Read(r.io.fd, p, at, async, uint64(r.index))
	case r.flags&cmdFlagFUA != 0:
		ok = l.r.Write(r.io.fd, p, at, uring.DSync, async, uint64(r.index))
	default:
		ok = l.r.Write(r.io.fd, p, at, 0, async, uint64(r.index))
	}
	if !ok {
		panic("nbd: internal error: the ring is full")
	}
}

// reply sends what is to be sent. It reports whether there is room again for
// requests that have come.
func (l *ringLoop) reply() (room bool) {
	c := l.c
	batch := &c.sender.batch
	for {
		c.mu.Lock()
		failed := c.failed != nil
		fresh := batch.n == 0
		for size := 0; fresh && c.out.n > 0 && batch.n < sendReplies && size < sendMax; {
			r := c.out.pop()
			size += len(r.buf)
			batch.push(r)
		}
		c.mu.Unlock()
		switch {
		case batch.n == 0:
			return room && c.reader.short
		case failed:
			l.iov, l.sent, l.blocked = l.iov[:0], 0, false
		case fresh:
			l.iov, l.sent = l.iov[:0], 0
			for r := batch.head; r != nil; r = r.next {
				n := putReply(&r.reply, c.ses.mode, &r.header, r.errno)
				l.iov = appendVector(l.iov, r.reply[:n])
				if r.errno == 0 && len(r.buf) > 0 {
					l.iov = appendVector(l.iov, r.buf)
				}
			}
		}
		if l.blocked {
			return room && c.reader.short
		}
		err := l.send()
		if l.blocked {
			continue
		}
		c.sent(err)
		c.mu.Unlock()
		room = true
	}
}

// send gives the socket as much of iov as it takes.
func (l *ringLoop) send() error {
	c := l.c
	for l.sent < len(l.iov) {
		l.msg = unix.Msghdr{Iov: &l.iov[l.sent]}
		l.msg.SetIovlen(len(l.iov) - l.sent)
		n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(c.sock), uintptr(unsafe.Pointer(&l.msg)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			l.blocked = true
			if c.sendSince.Load() == 0 {
				c.sendSince.Store(c.s.now())
			}
			return nil
		default:
			return os.NewSyscallError("sendmsg", errno)
		}
		c.sendSince.Store(0)
		l.sent += takeVectors(l.iov[l.sent:], uint64(n))
	}
	return nil
}

// arm has the ring tell what else may happen.
func (l *ringLoop) arm() {
	c := l.c
	if !l.listening {
		l.listening = l.r.Poll(c.event, unix.POLLIN, tagEvent)
	}
	if l.blocked && !l.pollingOut {
		l.pollingOut = l.r.Poll(c.sock, unix.POLLOUT, tagWritable)
	}
	if !l.readable && !c.stopped && !c.reader.short {
		if !l.polling {
			l.polling = l.r.Poll(c.sock, unix.POLLIN, tagReadable)
		}
		if c.reader.piece != nil && c.payloadSince.Load() == 0 {
			c.payloadSince.Store(c.s.now())
		}
	}
}

// memory is conn.memory for the loop: it never waits.
func (l *ringLoop) memory(size int) (buf []byte, wait bool) {
	c := l.c
	rd := &c.reader
	need := int64(size+pageSize-1) &^ (pageSize - 1)
	switch {
	case rd.queued:
		select {
		case <-rd.waiter.granted:
			rd.queued = false
			l.starving.Store(false)
			buf = rd.waiter.buf
		default:
		}
	case c.held.Load()+need > c.s.share:
	default:
		if buf = c.s.arena.enqueue(&rd.waiter, size); buf == nil {
			rd.queued = true
			l.starving.Store(true)
			l.starved.Reset(c.s.cfg.StallTimeout)
		}
	}
	if buf == nil {
		rd.short = true
		return nil, true
	}
	c.held.Add(need)
	return buf, false
}

// leaveArena gives up waiting for memory.
func (l *ringLoop) leaveArena() {
	rd := &l.c.reader
	if !rd.queued {
		return
	}
	rd.queued = false
	l.starving.Store(false)
	if buf := l.c.s.arena.cancel(&rd.waiter); buf != nil {
		l.c.s.arena.release(&rd.waiter, buf)
	}
}
