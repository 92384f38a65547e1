package nbd

import "fmt"

// Replies: what has been run, or refused, is answered, by one worker at a time.

const (
	// sendMax and sendReplies limit one call that sends replies. A client that
	// takes nothing during one such call is what ErrStalled means.
	sendMax     = 1 << 20
	sendReplies = 64

	// gatherBuffer is the size of the buffer in which replies are gathered for
	// TLS, which would make a record, and a call, of each slice.
	gatherBuffer = 64 << 10
)

// finish is called when a request has been run, or refused.
func (c *conn) finish(r *request, errno uint32) {
	if p := r.parent; p != nil {
		if p.errno == 0 {
			p.errno = errno
		}
		c.free.push(r)
		c.wakeReader()
		c.pieceDone(p)
		return
	}
	if r.unanswered {
		c.drop(r)
		c.wakeReader()
		return
	}
	r.errno = errno
	c.counts.add(r)
	c.out.push(r)
	c.wakeReader() // a write has given memory back
}

// pieceDone is called when a piece of a long write is done, or when no more of
// them will come.
func (c *conn) pieceDone(p *request) {
	if p.pending--; p.pending > 0 {
		return
	}
	switch {
	case p.dropped:
		c.drop(p)
	case p.errno == 0 && p.flags&cmdFlagFUA != 0:
		p.sync = true
		c.ready.push(p)
	default:
		c.finish(p, p.errno)
	}
}

// wakeReader tells a reader that waits for requests or memory of this
// connection to look again.
func (c *conn) wakeReader() {
	if c.starving {
		c.starving = false
		c.freed <- struct{}{}
	}
}

// drop forgets a request that won't be answered.
func (c *conn) drop(r *request) {
	if r.parent == nil {
		c.inFlight--
	}
	c.free.push(r)
}

func (c *conn) releaseBuf(r *request) {
	if r.buf != nil {
		c.held.Add(-int64(cap(r.buf)))
		c.s.arena.release(&c.reader.waiter, r.buf)
		r.buf = nil
	}
}

// flush sends the replies that are due, unless another worker is at it, which
// then sends these too. Callers hold mu, which it gives up meanwhile.
func (c *conn) flush() {
	if c.sending {
		return
	}
	c.sending = true
	batch := &c.sender.batch
	for c.out.n > 0 {
		for size := 0; c.out.n > 0 && batch.n < sendReplies && size < sendMax; {
			r := c.out.pop()
			size += len(r.buf)
			batch.push(r)
		}
		failed := c.failed != nil
		c.mu.Unlock()
		var err error
		if !failed {
			err = c.send()
		}
		c.sent(err)
		c.wakeReader()
	}
	c.sending = false
}

// sent gives back what the batch held, once it was sent or err has kept it from that. It
// returns with mu locked.
func (c *conn) sent(err error) {
	batch := &c.sender.batch
	for r := batch.head; r != nil; r = r.next {
		c.releaseBuf(r)
	}
	c.mu.Lock()
	if err != nil {
		c.breakOff(fmt.Errorf("nbd: sending reply: %w", err))
	}
	c.inFlight -= batch.n
	c.free.append(batch)
}

// send sends the replies of the batch, in as few calls as sendMax allows.
func (c *conn) send() error {
	iov := c.sender.iov[:0]
	size := 0
	for r := c.sender.batch.head; r != nil; r = r.next {
		iov = append(iov, r.reply[:putReply(&r.reply, c.ses.mode, &r.header, r.errno)])
		payload := r.buf
		if r.errno != 0 {
			payload = nil
		}
		for len(payload) > 0 {
			n := min(len(payload), sendMax-size)
			iov = append(iov, payload[:n])
			payload = payload[n:]
			if size += n; size == sendMax {
				if err := c.write(iov); err != nil {
					return err
				}
				iov, size = iov[:0], 0
			}
		}
		// Two for a reply, and one more when a payload is cut: there is room,
		// since the batch has at most sendReplies and each cut empties iov.
	}
	return c.write(iov)
}

// write sends the slices in one call, if the connection is a socket.
func (c *conn) write(iov [][]byte) error {
	if len(iov) == 0 {
		return nil
	}
	c.sendSince.Store(c.s.now())
	defer c.sendSince.Store(0)
	if c.sender.gather != nil {
		return c.gatherWrite(iov)
	}
	if c.socket != nil {
		_, err := c.socket.send(iov)
		return err
	}
	c.sender.bufs = iov
	_, err := c.sender.bufs.WriteTo(c.nc)
	return err
}

// gatherWrite sends the slices in as few calls as the buffer allows.
func (c *conn) gatherWrite(iov [][]byte) error {
	buf := c.sender.gather[:0]
	for _, p := range iov {
		for len(p) > 0 {
			n := copy(buf[len(buf):cap(buf)], p)
			buf = buf[:len(buf)+n]
			if p = p[n:]; len(buf) < cap(buf) {
				break
			}
			if _, err := c.nc.Write(buf); err != nil {
				return err
			}
			buf = buf[:0]
		}
	}
	if len(buf) == 0 {
		return nil
	}
	_, err := c.nc.Write(buf)
	return err
}
