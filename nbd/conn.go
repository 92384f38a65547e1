package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The transmission phase of one connection. The way of a request:
//
//  1. A worker becomes the reader. It reads once, as much as there is, and
//     takes every request that this completed: receive, parse.
//  2. It stops being the reader, and runs the requests one after the other on
//     the device: work, execute.
//  3. When none is left, it sends the replies in one call (flush), and becomes
//     the reader again.
//
// So on a device that answers in a few microseconds one goroutine does
// everything, with one read and one write for a whole batch of requests. On a
// slow device that would be wrong: the next requests would wait for the
// device. Hence a worker, before it runs a request that may take long, wakes
// another, which takes the next request or becomes the reader. A mean of how
// long requests took tells slow from fast; if a fast device turns slow within
// a request, a timer wakes the other worker (rescue).
//
// Replies are sent by one worker at a time. The others leave theirs to it, so
// that a client which doesn't take its replies blocks one worker and no other
// connection. Once its requests or its memory are used up, the connection is
// no longer read.
//
// Here are the connection, its workers, and what they do on the device. Step 1 is
// in reader.go, step 3 in reply.go, and what becomes of the requests of a peer that
// has gone in gone.go. On a device that takes requests by io_uring one goroutine does
// all of it, with the same reader and the same replies: ring.go.

const (
	// slowOp is the mean time of a request, in nanoseconds and besides what
	// memory would take for its bytes, from which on another worker is woken
	// before a request is run. Waking one costs a few microseconds.
	slowOp = 25_000

	// bytesPerNano is what memory is taken to move, with encryption. It moved 3
	// to 5 where it was measured, and a page cache must not be taken for slow.
	bytesPerNano = 2

	// shareWork is how much work, in nanoseconds, has to be waiting for
	// another worker to be woken to share it on a fast device.
	shareWork = 50_000

	// rescueAfter is how long the requests of a fast device may hold up the
	// reading of others.
	rescueAfter = 2 * time.Millisecond

	// rescueAgain is how long a connection waits that would have had another worker
	// go on, while all that the clients share are at work.
	rescueAgain = 10 * time.Millisecond

	// zeroesPart and trimPart are the boundaries at which a client's WRITE_ZEROES and
	// TRIM can be called off, see inParts. Zeros are written encrypted, at the rate of
	// other writes: 16 MiB are 0.2 s on a disk of 80 MB/s. Trims are fast, and a
	// boundary costs the block of a thin pool that it lies in.
	zeroesPart = 16 << 20
	trimPart   = 64 << 30

	// socketBuffer is the size that the send buffer of a Unix socket is raised
	// to. The default holds one reply of 128 KiB.
	socketBuffer = 1 << 20
)

// errDisconnect means that the peer sent DISC.
var errDisconnect = errors.New("disconnect")

// ErrLeave is the cause of a cancellation after which another server goes on: with the
// connection itself, see [Server.ServeTransmission], or with the clients, see
// [Server.Serve].
var ErrLeave = errors.New("nbd: connection is left to another server")

// A request is one command, or one piece of a long write. Requests belong to a
// connection and are reused.
type request struct {
	header
	index uint32 // in conn.slots
	errno uint32
	buf   []byte // payload of a write, or room for that of a read; from the arena
	reply [maxReplySize]byte
	next  *request // in the list that it is in

	// Long writes, see parsePayload.
	parent  *request // the write that this is a piece of
	pending int      // of a parent: pieces not yet done, and those not received count as one
	dropped bool     // of a parent: the rest won't come
	sync    bool     // of a parent with FUA: all pieces are written, but may be volatile

	unanswered bool // is not to be answered, but sent again by the peer, see inParts

	// With io_uring, see ringLoop.
	io     ringIO
	ticket uint64 // of AsyncDevice.BeginWrite
}

// slow reports whether the command alone says that it may take long.
func (r *request) slow() bool {
	return r.cmd != cmdRead && r.cmd != cmdWrite || r.flags&cmdFlagFUA != 0 || r.length > chunkSize || r.sync
}

// A list is a queue of requests.
type list struct {
	head, tail *request
	n          int
}

func (l *list) push(r *request) {
	r.next = nil
	if l.tail == nil {
		l.head = r
	} else {
		l.tail.next = r
	}
	l.tail = r
	l.n++
}

func (l *list) pop() *request {
	r := l.head
	if r == nil {
		return nil
	}
	if l.head = r.next; l.head == nil {
		l.tail = nil
	}
	l.n--
	r.next = nil
	return r
}

// append moves all of m to the end of l.
func (l *list) append(m *list) {
	if m.head == nil {
		return
	}
	if l.tail == nil {
		l.head = m.head
	} else {
		l.tail.next = m.head
	}
	l.tail = m.tail
	l.n += m.n
	*m = list{}
}

// A worker runs requests, or reads or writes the socket.
type worker struct {
	wake chan struct{} // capacity 1
}

// A conn is a connection in the transmission phase.
type conn struct {
	s   *Server
	nc  net.Conn
	dev Device
	// async is dev if it has the methods for it.
	async AsyncDevice
	size  uint64
	ses   session

	slots []request // all that there are
	ring  *ringLoop // nil with the portable engine

	parent context.Context // of run; done before ctx is
	ctx    context.Context // done when no more requests should be taken
	abort  context.CancelCauseFunc

	// Used by the reader only: the worker that has set reading.
	reader struct {
		in       input
		window   int         // how much to read at once
		slots    list        // requests to use
		short    bool        // of io_uring: there was no room for the next request
		queued   bool        // of io_uring: waiter is in the queue of the arena
		skip     int         // bytes still to come of the payload of refused
		refused  *request    // is answered when its payload has passed
		long     *request    // a write in pieces whose payload is coming
		longDone uint64      // bytes of it that have come
		piece    *request    // a write, or a piece of long, whose payload is coming
		pieceLen int         // bytes of it that have come
		taken    list        // what this round has found to run
		answered list        // what this round has found to answer
		accepted int         // how many requests this round has found
		waiter   waiter      // for the arena
		starved  *time.Timer // runs while waiting for the arena
		leaveBy  time.Time   // of a connection that is to be left: when the rest must have come
		lost     bool        // the peer has ended the connection without DISC, or it has failed

		// readv; only for sockets.
		iovs  [2]unix.Iovec
		n     int
		err   syscall.Errno
		polls [2]unix.PollFd
	}

	// socket is the connection if it is a socket that isn't encrypted. Its reader,
	// or its ringLoop, reads from sock, which is the descriptor of socket and our
	// own: the connection may be closed by others meanwhile, and its number be
	// given to something else. event is an eventfd that interrupts. With TLS, sock is
	// that of the socket below, to be asked whether the peer has hung up. It is -1 of
	// what is no socket.
	socket      *Socket
	sock, event int
	local       bool // sock is a Unix socket

	ended chan struct{} // closed when run has returned

	// Used by the sender only: the worker that has set sending.
	sender struct {
		batch  list
		iov    [][]byte
		bufs   net.Buffers
		gather []byte // for TLS only
	}

	// How another connection sees whether this one stalls: the bytes of the
	// arena that it holds, and since when it has been waiting for the peer to
	// send a payload, and to take replies, in Server.now, or 0.
	held         atomic.Int64
	payloadSince atomic.Int64
	sendSince    atomic.Int64

	mu       sync.Mutex // guards what follows; held for moments only
	ready    list       // requests to run
	out      list       // requests to answer
	free     list       // requests for the reader to use
	idle     []*worker  // last in, first out: few stacks stay warm
	busy     int        // workers that aren't idle and have not returned, see admit
	reading  bool
	sending  bool
	stopped  bool // nothing more is read
	stopErr  error
	failed   error         // why replies can't be sent
	hungUp   bool          // the peer sends nothing more and may be gone, see begins
	settled  bool          // others have waited for the end of this one, see Server.settle
	starving bool          // the reader waits for freed
	freed    chan struct{} // capacity 1
	mean     int64         // nanoseconds that a request takes
	inFlight int           // requests taken and not answered
	counts   Counts
	rescue   *time.Timer
	rescues  int       // runs of the timer that are due or under way
	rescued  sync.Cond // rescues has become 0
}

// newConn makes a connection that goes on with what in has read already.
func newConn(ctx context.Context, s *Server, ses session, in *input) (*conn, error) {
	size, err := ses.export.size()
	if err != nil {
		return nil, err
	}
	c := &conn{
		s:     s,
		nc:    in.nc,
		dev:   ses.export.Device,
		size:  size,
		ses:   ses,
		idle:  make([]*worker, 0, s.cfg.InFlight),
		freed: make(chan struct{}, 1),
		ended: make(chan struct{}),
	}
	c.parent = ctx
	c.async, _ = c.dev.(AsyncDevice)
	c.ctx, c.abort = context.WithCancelCause(ctx)
	c.rescued.L = &c.mu
	c.rescue = time.AfterFunc(time.Hour, c.onRescue)
	c.rescue.Stop()
	c.sender.iov = make([][]byte, 0, 2*sendReplies)

	rd := &c.reader
	rd.in = input{nc: in.nc, buf: make([]byte, receiveBuffer)}
	rd.in.w = copy(rd.in.buf, in.buffered())
	rd.window = receiveBuffer
	rd.waiter.granted = make(chan struct{}, 1)
	rd.waiter.kernel = ses.kernel
	rd.starved = time.NewTimer(time.Hour)
	rd.starved.Stop()
	// As many again as there are workers, so that they can go on while replies
	// wait to be sent.
	c.slots = make([]request, 2*s.cfg.InFlight)
	for i := range c.slots {
		c.slots[i].index = uint32(i)
		rd.slots.push(&c.slots[i])
	}
	if _, ok := in.nc.(*tls.Conn); ok {
		c.sender.gather = make([]byte, 0, gatherBuffer)
	}
	if err := c.openSocket(); err != nil {
		c.abort(nil)
		return nil, fmt.Errorf("nbd: preparing the connection: %w", err)
	}
	if c.async != nil && c.socket != nil && s.engine == EngineURing && c.async.Async() {
		c.ring = newRingLoop(c, c.async)
	}
	return c, nil
}

// openSocket fills in sock, and, if the connection is a socket that isn't
// encrypted, socket and event, and has nc mean that from now on.
func (c *conn) openSocket() (err error) {
	below, encrypted := c.nc, false
	if tc, ok := c.nc.(*tls.Conn); ok {
		below, encrypted = tc.NetConn(), true
	}
	c.sock, err = duplicate(below)
	if errors.Is(err, errors.ErrUnsupported) {
		c.sock = -1
		return nil
	}
	if err != nil {
		return err
	}
	domain, err := unix.GetsockoptInt(c.sock, unix.SOL_SOCKET, unix.SO_DOMAIN)
	c.local = err == nil && domain == unix.AF_UNIX
	if encrypted {
		return nil
	}
	if c.local {
		enlarge(c.sock)
	}
	if c.event, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		unix.Close(c.sock)
		return os.NewSyscallError("eventfd", err)
	}
	c.socket = newSocket(c.sock)
	c.nc, c.reader.in.nc = c.socket, c.socket
	c.reader.polls = [2]unix.PollFd{{Fd: int32(c.sock), Events: unix.POLLIN}, {Fd: int32(c.event), Events: unix.POLLIN}}
	return nil
}

// closeSocket undoes openSocket. Whoever interrupts afterwards reaches nothing.
func (c *conn) closeSocket() {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.socket != nil:
		_ = c.socket.Close()
		unix.Close(c.event)
	case c.sock >= 0:
		unix.Close(c.sock)
	}
	c.sock, c.event = -1, -1
}

// enlarge raises the send buffer of a socket as far as it may. A smaller one
// costs speed only.
func enlarge(fd int) {
	if n, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF); err != nil || n >= 2*socketBuffer {
		return // the kernel doubles what it is given
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, socketBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, socketBuffer)
	}
}

// run serves until the peer disconnects, the connection fails, or ctx is done.
// When it returns, nothing of this connection runs on the device any more, and
// every request taken has been answered unless the connection failed.
func (c *conn) run(ctx context.Context) error {
	defer c.abort(nil)
	defer c.closeSocket()
	if c.ring != nil {
		if err, ok := c.runRing(ctx); ok {
			return err
		}
	}

	// The workers exist from the start: none has to be made when the kernel
	// waits for a request in order to get memory.
	var workers sync.WaitGroup
	c.mu.Lock()
	c.hire(&workers, c.work)
	c.wakeOne() // to be the reader
	c.mu.Unlock()

	// Cancellation interrupts the reading at once. The replies to what was
	// taken have until the grace period ends.
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.failed == nil { // else the deadlines are set, and must stay
			c.interrupt()
			_ = c.nc.SetWriteDeadline(time.Now().Add(c.s.cfg.Grace))
		}
	})
	workers.Wait()
	if !stop() {
		<-interrupted
	}

	c.mu.Lock()
	defer c.mu.Unlock()
	c.endRescue()
	return c.result(ctx)
}

// result is what run returns, after it has refused what came too late. Callers
// hold mu; nothing else of the connection runs.
func (c *conn) result(ctx context.Context) error {
	if c.stopped && c.stopErr == nil {
		return nil // DISC: who has sent that need not be there for the last replies
	}
	if c.failed != nil {
		return c.failed
	}
	if ctx.Err() != nil && c.stopErr == context.Cause(c.ctx) && c.refusesLate() {
		c.mu.Unlock() // the peer may take its time
		c.shutdown()
		c.mu.Lock()
	}
	return c.stopErr
}

// refusesLate reports whether what comes after the cancellation is answered with
// ESHUTDOWN. If another server goes on, it isn't: a reply is final for the peer, which
// makes an I/O error of this one, while a request that had none is sent again on the
// next connection (QEMU's reconnect-delay, nbd-client -persist).
func (c *conn) refusesLate() bool {
	return c.ses.refuseLate && context.Cause(c.parent) != ErrLeave
}

// shutdown refuses the requests that have come, or are on the way, after the
// reader has stopped. Nothing else of the connection runs any more.
func (c *conn) shutdown() {
	rd := &c.reader
	if rd.piece != nil || rd.long != nil || rd.refused != nil {
		return // in the middle of a payload
	}
	head := c.ses.mode.requestSize()
	var r request
	var out []byte
	skip := uint64(0) // payload of r
	for end := time.Now().Add(lastCalls); ; {
		out = out[:0]
		for b := rd.in.buffered(); ; b = rd.in.buffered() {
			if skip > 0 {
				n := min(skip, uint64(len(b)))
				rd.in.r += int(n)
				if skip -= n; skip > 0 {
					break
				}
			} else {
				if len(b) < head {
					break
				}
				h, err := parseHeader(b, c.ses.mode)
				if err != nil || h.cmd == cmdDisc || h.payload(c.ses.mode) > maxDiscard {
					_, _ = c.nc.Write(out)
					return
				}
				rd.in.r += head
				r = request{header: h, errno: errShutdown}
				if skip = h.payload(c.ses.mode); skip > 0 {
					continue
				}
			}
			out = append(out, r.reply[:putReply(&r.reply, c.ses.mode, &r.header, r.errno)]...)
			c.mu.Lock()
			c.counts.add(&r)
			c.mu.Unlock()
		}
		if len(out) > 0 {
			if _, err := c.nc.Write(out); err != nil {
				return
			}
		}
		now := time.Now()
		if now.After(end) || c.nc.SetReadDeadline(now.Add(lastCall)) != nil || rd.in.fill(receiveBuffer) != nil {
			return
		}
	}
}

// interrupt ends the wait of the reader for the socket, for good. c.ctx is done,
// or about to be. Callers hold mu.
func (c *conn) interrupt() {
	if c.socket != nil {
		_, _ = unix.Write(c.event, one)
	} else {
		_ = c.nc.SetReadDeadline(longAgo)
	}
}

// one is what is added to an eventfd.
var one = []byte{1, 0, 0, 0, 0, 0, 0, 0}

// longAgo is a deadline that interrupts.
var longAgo = time.Unix(1, 0)

// work is the life of a worker.
func (c *conn) work(w *worker) {
	c.mu.Lock()
	defer c.mu.Unlock()
	last := int64(0) // when the request before ended, if this follows it at once
	for {
		switch {
		case c.ready.n > 0:
			r := c.ready.pop()
			c.share(r)
			c.mu.Unlock()
			start := last
			if start == 0 {
				start = c.s.now()
			}
			errno := c.execute(r)
			last = c.s.now()
			if r.cmd == cmdWrite {
				c.releaseBuf(r) // rather than when the peer has taken the reply
			}
			if last-start >= lookAfter {
				c.look()
			}
			c.mu.Lock()
			c.observe(last-start, r.length)
			c.finish(r, errno)
			// On a slow device a reply doesn't wait for the next request. On a
			// fast one it does, and that is better: replies of 128 KiB that were
			// sent one by one came at 0.7 to 0.9 of the rate, and those of 4 KiB
			// that were sent by 8, 12 or 16 of 32 at 0.9 to 1.1. By 2, 3 or 4 of 8
			// those of 128 KiB came at 0.96 to 1.0.
			if c.mean >= slowOp || c.out.n >= sendReplies {
				c.flush()
				last = 0
			}

		case c.out.n > 0 && !c.sending:
			c.flush()
			last = 0

		case c.stopped:
			c.dismiss()
			c.wakeOne() // to return, too
			return

		case !c.reading:
			c.reading = true
			c.mu.Unlock()
			err := c.receive()
			last = 0
			c.mu.Lock()
			c.reading = false
			c.accept(err)

		default:
			c.idle = append(c.idle, w)
			c.dismiss()
			c.mu.Unlock()
			<-w.wake
			last = 0
			c.mu.Lock()
		}
	}
}

// hire makes the workers, which are idle. Callers hold mu.
func (c *conn) hire(workers *sync.WaitGroup, work func(*worker)) {
	for range c.s.cfg.InFlight {
		w := &worker{wake: make(chan struct{}, 1)}
		c.idle = append(c.idle, w)
		workers.Go(func() { <-w.wake; work(w) })
	}
}

// admit reports whether one more worker may be at work. Each that is may need a thread,
// and a program that gets no more of these ends. So a client has one for itself, and
// shares the others with all clients of the server. The kernel has its own.
func (c *conn) admit() bool {
	if c.busy > 0 && !c.ses.kernel && c.s.spare.Add(-1) < 0 {
		c.s.spare.Add(1)
		return false
	}
	c.busy++
	return true
}

// dismiss undoes admit.
func (c *conn) dismiss() {
	if c.busy--; c.busy > 0 && !c.ses.kernel {
		c.s.spare.Add(1)
	}
}

// wakeOne wakes a worker if one is idle and may work.
func (c *conn) wakeOne() bool {
	n := len(c.idle)
	if n == 0 || !c.admit() {
		return false
	}
	c.idle[n-1].wake <- struct{}{}
	c.idle = c.idle[:n-1]
	return true
}

// share wakes a worker before r is run, if r may take long or if there is
// enough to do for two and a core to do it on, besides one for the client.
//
// Without leaving one, on two cores, there were 0.8 to 1.0 times the requests of 4
// KiB; of the reads of 128 KiB 1.1 times as many when nothing else ran and 0.8 to
// 0.9 times otherwise. To wake a thread on a halted core took 5 µs there, and 15
// more passed until it ran. A second worker that instead stayed awake for up to 100
// µs gave 0.7 to 1.1 times the requests of 4 KiB.
func (c *conn) share(r *request) {
	if c.ready.n == 0 && c.reading {
		return // nothing is left that another could do
	}
	if c.mean >= slowOp || r.slow() || c.backlog() >= shareWork && c.busy < c.s.procs-1 {
		c.wakeOne()
	}
}

// backlog is an estimate of how long the requests that are ready will take, in
// nanoseconds.
func (c *conn) backlog() int64 {
	if c.ready.n == 0 {
		return 0
	}
	length := min(c.ready.head.length, 1<<40) // of zeros it may be 2^63, and more is as good as that
	return int64(c.ready.n) * (c.mean + int64(length)/bytesPerNano)
}

// observe notes how long a request took. The device is slow if two of some 26
// requests in turn took long, and until 26 in turn did not. One alone may have
// waited for a processor: on two cores with a load of 15, where one was enough, 2
// to 13 % of the requests on tmpfs were run as on a slow device, each waking a
// worker for nothing. Runs of both in turn gave there 1.06 to 1.1 times the reads of
// 4 KiB with four connections, mostly as much with two, and no difference with one.
func (c *conn) observe(took int64, length uint64) {
	took = min(max(took-int64(length)/bytesPerNano, 0), slowOp*3/2)
	if took > c.mean {
		c.mean += (took - c.mean) / 2
	} else {
		c.mean -= (c.mean - took) / 64
	}
}

// onRescue runs when requests were taken rescueAfter ago and none since. If
// that's because one of them takes long, another worker goes on. If none may, see
// admit, it tries again.
func (c *conn) onRescue() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rescues--
	if c.rescues == 0 {
		c.rescued.Broadcast()
	}
	waits := c.ready.n > 0 || !c.reading && !c.stopped
	if c.ring != nil {
		waits = c.ring.slow.n > 0
	}
	switch {
	case !waits:
	case c.wakeOne():
		c.mean = max(c.mean, slowOp) // let each that is woken wake the next
		c.guard(rescueAfter)
	case len(c.idle) > 0:
		c.guard(rescueAgain)
	}
}

// guard arms the rescue timer.
func (c *conn) guard(after time.Duration) {
	if !c.rescue.Reset(after) {
		c.rescues++
	}
}

// endRescue waits until the rescue timer doesn't run any more.
func (c *conn) endRescue() {
	if c.rescue.Stop() {
		c.rescues--
	}
	for c.rescues > 0 {
		c.rescued.Wait()
	}
}

// accept takes over what a round of the reader has found.
func (c *conn) accept(err error) {
	rd := &c.reader
	c.inFlight += rd.accepted
	rd.accepted = 0
	c.ready.append(&rd.taken)
	for r := rd.answered.pop(); r != nil; r = rd.answered.pop() {
		c.finish(r, r.errno)
	}
	if err == errDisconnect {
		c.stopped = true
	}
	if c.failed != nil || c.hungUp {
		c.callOff()
	}
	if c.ready.n > 0 && c.ring == nil {
		c.guard(rescueAfter)
	}
	if err == nil {
		return
	}

	// The end: what was taken is run and answered, unless the peer is gone; what has
	// come in part is dropped; and the workers return when nothing is left to do.
	c.stopped = true
	if err != errDisconnect {
		c.stopErr = err
	}
	if rd.piece != nil {
		c.releaseBuf(rd.piece)
		c.drop(rd.piece)
	}
	if rd.long != nil {
		rd.long.dropped = true
		c.pieceDone(rd.long)
	}
	if rd.refused != nil {
		c.drop(rd.refused)
	}
	if rd.lost {
		c.hangUp(err)
	}
	for c.ring == nil && c.wakeOne() {
	}
}

// breakOff ends the connection without waiting for the peer: replies can't be
// sent any more. Callers hold mu.
func (c *conn) breakOff(err error) {
	if c.failed == nil {
		c.failed = err
		c.callOff()
		c.abort(err)
		_ = c.nc.SetDeadline(longAgo)
		if c.ring != nil {
			c.ring.kick()
		} else {
			c.interrupt()
		}
	}
}

// execute runs a request on the device and returns the NBD error.
func (c *conn) execute(r *request) uint32 {
	off := int64(r.off)
	fua := r.flags&cmdFlagFUA != 0
	n, want := 0, 0
	var err error
	switch {
	case r.cmd == cmdFlush || r.sync:
		err = c.dev.Sync()
	case r.length == 0:
		// Nothing to do. The spec leaves the answer open.
	case r.cmd == cmdRead:
		want = len(r.buf)
		n, err = c.dev.ReadAt(r.buf, off)
	case r.cmd == cmdWrite && fua:
		want = len(r.buf)
		n, err = c.dev.WriteAtFUA(r.buf, off)
	case r.cmd == cmdWrite:
		want = len(r.buf)
		n, err = c.writeAt(r.buf, off)
	case r.cmd == cmdTrim:
		err = c.inParts(r, trimPart, c.dev.Trim)
		if errors.Is(err, syscall.EOPNOTSUPP) {
			err = nil // a hint that can't be followed
		}
	case r.cmd == cmdWriteZeroes:
		err = c.inParts(r, zeroesPart, c.dev.WriteZeroes)
	}
	return c.s.outcome(r, full(n, want, err))
}

// inParts runs a WRITE_ZEROES or TRIM, which may be of the whole device and take
// hours, so that it can be called off. It is given to the device in parts that end at
// multiples of size, and no further part is begun once the peer is known to be gone,
// see begins, or the server stops, which a client is told with ESHUTDOWN, or not at all
// if another server goes on and it is to send the request again. With FUA, the parts
// are made stable by one Sync at the end.
//
// What the kernel has sent is done to its end: its socket is handed over to the next
// server between two requests, so nothing would send it again.
func (c *conn) inParts(r *request, size uint64, do func(off, length int64, fua bool) error) error {
	if c.ses.kernel {
		c.s.kernelZeroes.Add(1)
		defer c.s.kernelZeroes.Add(-1)
	}
	fua := r.flags&cmdFlagFUA != 0
	off, end := r.off, r.off+r.length
	if c.ses.kernel || end <= (off/size+1)*size {
		return do(int64(off), int64(r.length), fua)
	}
	for off < end {
		c.look()
		c.mu.Lock()
		begins := c.begins(r)
		c.mu.Unlock()
		if !begins || c.parent.Err() != nil {
			r.unanswered = context.Cause(c.parent) == ErrLeave
			return syscall.ESHUTDOWN
		}
		next := min(end, (off/size+1)*size)
		if err := do(int64(off), int64(next-off), false); err != nil {
			return err
		}
		off = next
	}
	if fua {
		return c.dev.Sync()
	}
	return nil
}

// writeAt is WriteAt of the device, which may encrypt p in place.
func (c *conn) writeAt(p []byte, off int64) (int, error) {
	if c.async == nil {
		return c.dev.WriteAt(p, off)
	}
	fd, at, ticket, ok := c.async.BeginWrite(p, off, false)
	if !ok {
		return c.dev.WriteAt(p, off)
	}
	done, err := transfer(cmdWrite, false, fd, p, at)
	return c.async.EndWrite(p, off, false, ticket, done, err)
}

// transfer reads or writes all of p, with fua durably, by system calls that
// wait. At the end of the file it moves less, without an error.
func transfer(cmd uint16, fua bool, fd int, p []byte, at int64) (done int, err error) {
	for done < len(p) {
		var n int
		switch rest, at := p[done:], at+int64(done); {
		case cmd == cmdRead:
			n, err = unix.Pread(fd, rest, at)
		case fua:
			n, err = unix.Pwritev2(fd, [][]byte{rest}, at, unix.RWF_DSYNC)
		default:
			n, err = unix.Pwrite(fd, rest, at)
		}
		switch {
		case err == unix.EINTR:
		case err != nil:
			return done, err
		case n == 0:
			return done, nil
		default:
			done += n
		}
	}
	return done, nil
}
