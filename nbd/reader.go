package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The reader: how requests come from the socket into memory. The worker that has set
// conn.reading calls receive, which reads as much as there is, by readv to where a
// payload that is expected stays, and takes every request that this completed. What
// it takes needs a slot and, for its data, memory of the arena; while there is
// neither, nothing more is read.

const (
	// receiveBuffer is the size of the buffer through which requests are read.
	receiveBuffer = 128 << 10

	// bufferedWrite is the longest payload that is taken by way of the receive
	// buffer. A longer one is read to where it stays.
	bufferedWrite = 32 << 10

	// afterPayload is how much is read into the receive buffer along with a
	// payload that has its own place: room for the next requests, but not for
	// another payload, which would have to be copied.
	afterPayload = 4 << 10

	// chunkSize is the longest piece in which a write is taken and given to
	// the device, see arena.
	chunkSize = 512 << 10
)

// receive is the work of the reader: it reads until there is something to do.
// It returns why nothing more can be read, besides what it has found.
func (c *conn) receive() error {
	rd := &c.reader
	for {
		err := c.parse()
		if err != nil || rd.taken.n > 0 || rd.answered.n > 0 {
			return err
		}
		if err := c.read(); err != nil {
			return err
		}
	}
}

// leaving reports whether the connection is to be left between two requests.
func (c *conn) leaving() bool { return c.ses.kernel && context.Cause(c.parent) == ErrLeave }

// rest returns how many bytes are still to come of what was read in part, or 0
// between two requests. What it returns may not be all.
func (c *conn) rest() int {
	rd := &c.reader
	switch {
	case rd.refused != nil:
		return rd.skip
	case rd.piece != nil:
		return len(rd.piece.buf) - rd.pieceLen
	case rd.long != nil:
		return int(min(chunkSize, rd.long.length-rd.longDone))
	}
	b, head := rd.in.buffered(), c.ses.mode.requestSize()
	if len(b) == 0 {
		return 0
	}
	if len(b) < head {
		return head - len(b)
	}
	h, err := parseHeader(b, c.ses.mode)
	if err != nil {
		return 1 // parse has seen that
	}
	return max(1, head+int(h.payload(c.ses.mode))-len(b))
}

// readRest is read for a connection that is to be left and is no socket: it reads
// no further than to the end of a request.
func (c *conn) readRest() error {
	rd := &c.reader
	n := c.rest()
	if n == 0 {
		return ErrLeave
	}
	if rd.leaveBy.IsZero() {
		rd.leaveBy = time.Now().Add(c.s.cfg.Grace)
	}
	_ = c.nc.SetReadDeadline(rd.leaveBy)
	var err error
	if rd.piece != nil {
		err = c.readPayload()
	} else {
		err = rd.in.fill(n)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) && time.Now().Before(rd.leaveBy) {
		return nil // that was the interruption of an earlier read
	}
	if err != nil {
		return fmt.Errorf("nbd: reading the rest of a request: %w", err)
	}
	return nil
}

// read reads once.
func (c *conn) read() error {
	rd := &c.reader
	if c.socket != nil {
		leaving := c.leaving()
		if leaving && c.rest() == 0 {
			return ErrLeave
		}
		// A peer that never stops sending never lets await look.
		if !leaving && c.ctx.Err() != nil {
			if c.leaving() {
				return nil // just now; come again, for the rest
			}
			return context.Cause(c.ctx)
		}
		c.vectors(leaving)
		for !c.readv() {
			if err := c.await(); err != nil || c.leaving() != leaving {
				return err // or come again, for the rest
			}
		}
		return c.received()
	}
	if c.leaving() {
		return c.readRest()
	}
	var err error
	if rd.piece != nil {
		c.payloadSince.Store(c.s.now())
		err = c.readPayload()
		c.payloadSince.Store(0)
		// Where one long write came from, another may follow.
		rd.window = afterPayload
	} else {
		before := len(rd.in.buffered())
		err = rd.in.fill(rd.window)
		if len(rd.in.buffered())-before == rd.window {
			rd.window = receiveBuffer
		}
	}
	if err != nil {
		return c.readError(err)
	}
	return nil
}

func (c *conn) readError(err error) error {
	rd := &c.reader
	switch {
	case c.leaving() && errors.Is(err, os.ErrDeadlineExceeded):
		return nil // come again, for the rest
	case errors.Is(err, os.ErrDeadlineExceeded) && c.parent.Err() != nil:
		return context.Cause(c.parent) // which ctx may not know yet
	case c.ctx.Err() != nil:
		return context.Cause(c.ctx)
	case err == io.EOF && (rd.piece != nil || rd.long != nil || rd.refused != nil || len(rd.in.buffered()) > 0):
		err = io.ErrUnexpectedEOF
	}
	rd.lost = true
	return fmt.Errorf("nbd: reading request: %w", err)
}

// readPayload reads once into piece, without a socket.
func (c *conn) readPayload() error {
	rd := &c.reader
	n, err := rd.in.nc.Read(rd.piece.buf[rd.pieceLen:])
	rd.pieceLen += n
	if n > 0 {
		return nil // an error comes again
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}

// vectors chooses where the next readv reads to, and returns how much that may
// be: to piece, and what follows it to the receive buffer, which is empty then. Of
// a connection that is to be left it is no more than to the end of a request,
// which has to be somewhere ahead.
func (c *conn) vectors(leaving bool) (room int) {
	rd := &c.reader
	more, window := afterPayload, rd.window
	if leaving {
		more, window = 0, c.rest()
	}
	var dst []byte
	if rd.piece != nil {
		dst = rd.piece.buf[rd.pieceLen:]
		rd.in.r, rd.in.w = 0, 0 // parsePayload has taken everything
		rd.iovs[1].Base = unsafe.SliceData(rd.in.buf)
		rd.iovs[1].SetLen(more)
		rd.window = afterPayload // where one long write came from, another may follow
	} else {
		if rd.in.r > 0 {
			rd.in.w = copy(rd.in.buf, rd.in.buf[rd.in.r:rd.in.w])
			rd.in.r = 0
		}
		dst = rd.in.buf[rd.in.w:min(len(rd.in.buf), rd.in.w+window)]
		rd.iovs[1].SetLen(0)
	}
	rd.iovs[0].Base = unsafe.SliceData(dst)
	rd.iovs[0].SetLen(len(dst))
	return len(dst) + int(rd.iovs[1].Len)
}

// readv reads what there is, and reports whether there was something, or an
// error.
func (c *conn) readv() bool {
	rd := &c.reader
	for {
		// The socket doesn't block, so the scheduler needn't be told.
		n, _, errno := syscall.RawSyscall(unix.SYS_READV, uintptr(c.sock), uintptr(unsafe.Pointer(&rd.iovs[0])), uintptr(len(rd.iovs)))
		switch errno {
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			return false
		}
		rd.n, rd.err = int(n), errno
		return true
	}
}

// received takes over what readv has read.
func (c *conn) received() error {
	rd := &c.reader
	c.payloadSince.Store(0)
	switch {
	case rd.err != 0:
		return c.readError(os.NewSyscallError("readv", rd.err))
	case rd.n == 0:
		return c.readError(io.EOF)
	}
	n := rd.n
	if rd.piece != nil {
		k := min(n, len(rd.piece.buf)-rd.pieceLen)
		rd.pieceLen += k
		n -= k
	} else if n == rd.window {
		rd.window = receiveBuffer
	}
	rd.in.w += n
	return nil
}

// await returns when the socket may have something, or with the cause when
// nothing more is to be read.
//
// It waits in poll(2), and not in Go's network poller: that parked the goroutine
// and searched for another in vain for each batch of requests, which was 13 % of
// the server's time with one connection. To look for more in a loop first, with
// or without sched_yield(2), took a processor that the client had a use for: of
// two cores it gave 0.8 to 1 times the requests with 32 in flight, and 0.6 times
// with one, where client and server otherwise take turns on one core. To wait first
// and read then, which saves the readv(2) that finds nothing, gave 0.9 to 1 times.
// That they share a core, where the kernel puts both, is for the best: pinned to one
// each, they had 0.7 times the requests with 32 in flight and 0.3 times with one.
func (c *conn) await() error {
	rd := &c.reader
	if c.leaving() {
		if rd.leaveBy.IsZero() {
			rd.leaveBy = time.Now().Add(c.s.cfg.Grace)
		}
		left := time.Until(rd.leaveBy)
		if left <= 0 {
			return fmt.Errorf("nbd: reading the rest of a request: %w", os.ErrDeadlineExceeded)
		}
		_, _ = unix.Poll(rd.polls[:1], int(left.Milliseconds())+1)
		return nil
	}
	if rd.piece != nil {
		c.payloadSince.Store(c.s.now())
	}
	if n, err := unix.Poll(rd.polls[:], -1); n <= 0 || err != nil || rd.polls[1].Revents == 0 {
		return nil // after a signal, it looks again
	}
	if c.leaving() {
		return nil
	}
	<-c.ctx.Done()
	return context.Cause(c.ctx)
}

// parse takes every request that has come completely. It returns early if there
// is no room for the next one but something else to do. Only if there is
// nothing else does it wait for room.
func (c *conn) parse() error {
	rd := &c.reader
	head := c.ses.mode.requestSize()
	rd.short = false
	for {
		if rd.refused != nil {
			n := min(rd.skip, len(rd.in.buffered()))
			rd.in.r += n
			if rd.skip -= n; rd.skip > 0 {
				return nil
			}
			rd.answered.push(rd.refused)
			rd.refused = nil
		}
		if rd.piece != nil || rd.long != nil {
			if more, err := c.parsePayload(); !more || err != nil {
				return err
			}
			continue
		}

		b := rd.in.buffered()
		if len(b) < head {
			return nil
		}
		h, err := parseHeader(b, c.ses.mode)
		if err != nil {
			return err
		}
		if h.cmd == cmdDisc {
			rd.in.r += head
			return errDisconnect
		}
		errno := h.check(c.size, &c.ses)
		if errno != 0 && c.grown() {
			errno = h.check(c.size, &c.ses)
		}
		if errno != 0 && h.payload(c.ses.mode) > maxDiscard {
			return fmt.Errorf("nbd: request %#x with a payload of %d bytes: %w", h.cookie, h.length, ErrProtocol)
		}
		payload := int(h.payload(c.ses.mode))
		short := payload <= bufferedWrite
		if errno == 0 && short && len(b) < head+payload {
			return nil // it fits into the buffer: let it come
		}

		r := c.slot()
		if r == nil {
			return nil
		}
		var buf []byte
		if errno == 0 && h.length > 0 && (h.cmd == cmdRead || payload > 0 && payload <= chunkSize) {
			var wait bool
			if buf, wait = c.memory(int(h.length)); wait {
				rd.slots.push(r)
				return nil
			}
			if buf == nil && !c.refusesLate() {
				rd.slots.push(r)
				return context.Cause(c.ctx)
			}
			if buf == nil {
				errno = errShutdown
			}
		}
		*r = request{index: r.index, header: h, errno: errno, buf: buf}
		rd.in.r += head
		rd.accepted++
		switch {
		case errno != 0 && payload > 0:
			rd.refused, rd.skip = r, payload
		case errno != 0, h.cmd == cmdCache, h.cmd == cmdBlockStatus:
			// Nothing is cached, and all of the device is data.
			rd.answered.push(r)
		case payload > chunkSize:
			r.pending = 1
			rd.long, rd.longDone = r, 0
		case !short:
			rd.piece, rd.pieceLen = r, 0
		default:
			rd.in.r += copy(buf, b[head:][:payload])
			rd.taken.push(r)
		}
	}
}

// grown tells whether the device has more than this connection knows of, and
// takes note of it. A client that did a handshake was told what there is, and the
// protocol has no word for more.
func (c *conn) grown() bool {
	if !c.ses.kernel {
		return false
	}
	size, err := c.ses.export.size()
	if err != nil || size <= c.size {
		return false
	}
	c.size = size
	return true
}

// parsePayload takes what has come of the payload of a write. It reports
// whether the write, or a piece of it, is complete.
//
// A write longer than chunkSize is given to the device in pieces, as they come.
// If it ends in the middle, some of it has been written, as on a disk that
// loses power. With FUA, the pieces are made stable by one Sync at the end.
func (c *conn) parsePayload() (bool, error) {
	rd := &c.reader
	if rd.piece == nil {
		size := min(chunkSize, rd.long.length-rd.longDone)
		r := c.slot()
		if r == nil {
			return false, nil
		}
		buf, wait := c.memory(int(size))
		if buf == nil {
			rd.slots.push(r)
			if wait {
				return false, nil
			}
			return false, context.Cause(c.ctx)
		}
		*r = request{
			index:  r.index,
			header: header{cmd: cmdWrite, off: rd.long.off + rd.longDone, length: size},
			buf:    buf,
			parent: rd.long,
		}
		rd.piece, rd.pieceLen = r, 0
	}
	n := copy(rd.piece.buf[rd.pieceLen:], rd.in.buffered())
	rd.in.r += n
	rd.pieceLen += n
	if rd.pieceLen < len(rd.piece.buf) {
		return false, nil
	}
	if rd.long != nil {
		rd.longDone += rd.piece.length
		if rd.longDone < rd.long.length {
			c.mu.Lock()
			rd.long.pending++
			c.mu.Unlock()
		} else {
			rd.long = nil // what was counted for the rest counts for this piece
		}
	}
	rd.taken.push(rd.piece)
	rd.piece = nil
	return true, nil
}

// nothingElse reports whether the reader may wait for room: it has found
// nothing in this round that has to be done first. The loop of io_uring never
// waits for room alone.
func (c *conn) nothingElse() bool {
	return c.ring == nil && c.reader.taken.n == 0 && c.reader.answered.n == 0
}

// slot returns a request to use, or nil if something else has to be done first.
func (c *conn) slot() *request {
	rd := &c.reader
	for rd.slots.n == 0 {
		c.mu.Lock()
		rd.slots.append(&c.free)
		c.starving = rd.slots.n == 0 && c.nothingElse()
		starving := c.starving
		c.mu.Unlock()
		rd.short = rd.slots.n == 0
		if starving {
			<-c.freed
			c.look()
		} else if rd.slots.n == 0 {
			return nil
		}
	}
	return rd.slots.pop()
}

// memory returns size bytes of the arena by the rule that arena gives. It
// returns nil and true if something else has to be done first, nil and false if
// no more requests are to be taken.
func (c *conn) memory(size int) (buf []byte, wait bool) {
	if c.ring != nil {
		return c.ring.memory(size)
	}
	need := int64(size+pageSize-1) &^ (pageSize - 1)
	for c.held.Load()+need > c.s.share {
		if !c.nothingElse() {
			return nil, true
		}
		c.mu.Lock()
		c.starving = c.held.Load()+need > c.s.share
		starving := c.starving
		c.mu.Unlock()
		if starving {
			<-c.freed
			c.look()
		}
	}
	if buf = c.s.arena.try(&c.reader.waiter, size); buf == nil {
		if !c.nothingElse() {
			return nil, true
		}
		if buf = c.waitForArena(size); buf == nil {
			return nil, false
		}
	}
	c.held.Add(need)
	return buf, false
}

// waitForArena queues for memory. It returns nil when ctx is done first.
func (c *conn) waitForArena(size int) []byte {
	rd := &c.reader
	if buf := c.s.arena.enqueue(&rd.waiter, size); buf != nil {
		return buf
	}
	rd.starved.Reset(c.s.cfg.StallTimeout)
	defer rd.starved.Stop()
	done := c.ctx.Done()
	for {
		select {
		case <-rd.waiter.granted:
			c.look()
			return rd.waiter.buf
		case <-done:
			if c.leaving() {
				done = nil // what was read in part is taken; memory comes back
				continue
			}
			if buf := c.s.arena.cancel(&rd.waiter); buf != nil {
				c.s.arena.release(&rd.waiter, buf)
			}
			return nil
		case <-rd.starved.C:
			c.s.endStalled()
			rd.starved.Reset(c.s.cfg.StallTimeout)
		}
	}
}
