package nbd

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// Peers that have gone: how that is noticed, and what is done then with the requests
// that they have sent. The package's doc says what clients are promised.

// lookAfter is how long a request has to take, in nanoseconds, for the worker to
// look whether the peer is still there before it begins the next.
const lookAfter = 10_000_000

// begins reports whether a request that waits is still to be run.
//
// Who can't have the reply may have sent the request again, on a new connection. What
// was begun keeps its place on the device: a [Device] lets the second wait for it, as
// package sector does. What wasn't would be begun after the second was answered, and
// after what was written since. So it is not begun any more once the peer is known to
// be gone. By TCP it is known only that the peer sends nothing more: it may be gone,
// or take replies still, so what only reads goes on. Who has sent DISC is done, and
// sends nothing again.
func (c *conn) begins(r *request) bool {
	switch {
	case c.stopped && c.stopErr == nil:
		return true // DISC: what came before it is to be completed
	case c.failed != nil:
		return false
	case c.hungUp:
		return r.cmd == cmdRead || r.cmd == cmdFlush || r.sync
	}
	return true
}

// callOff refuses what waits and is not begun any more. Callers hold mu.
func (c *conn) callOff() {
	var stay list
	n := c.ready.n
	for r := c.ready.pop(); r != nil; r = c.ready.pop() {
		if c.begins(r) {
			stay.push(r)
			continue
		}
		if r.cmd == cmdWrite {
			c.releaseBuf(r)
		}
		c.finish(r, errShutdown)
	}
	c.ready = stay
	switch {
	case stay.n == n:
	case c.ring != nil:
		c.ring.kick()
	default:
		c.wakeOne() // for the replies
	}
}

// hangup asks the kernel about the peer: whether it is gone, so that nothing can be
// sent to it, and whether it sends nothing more and may be gone. Of a Unix socket the
// kernel tells the one from the other (POLLHUP and POLLRDHUP of poll(2)). By TCP, a
// peer that has closed is only known to be gone when it has refused a reply.
func (c *conn) hangup() (gone, maybe bool) {
	p := [1]unix.PollFd{{Fd: int32(c.sock), Events: unix.POLLRDHUP}}
	for {
		if _, err := unix.Poll(p[:], 0); err != unix.EINTR {
			break
		}
	}
	gone = p[0].Revents&(unix.POLLHUP|unix.POLLERR) != 0
	return gone, gone || p[0].Revents&unix.POLLRDHUP != 0 && !c.local
}

// hangUp takes note that the peer has ended the connection, or that it has failed.
// Callers hold mu.
func (c *conn) hangUp(err error) {
	gone, maybe := c.hangup()
	switch {
	case gone, !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		c.breakOff(err)
	case maybe, c.sock < 0:
		c.hungUp = true
		c.callOff()
	}
}

// look is for when nobody may have been reading for long, as there was no room for
// requests or payloads, or all workers had requests to run: the end of the connection
// may have come meanwhile.
func (c *conn) look() {
	if gone, _ := c.hangup(); gone {
		c.mu.Lock()
		c.breakOff(errHungUp)
		c.mu.Unlock()
	}
}

// errHungUp is why a connection ends whose end was not read.
var errHungUp = fmt.Errorf("nbd: the peer has hung up: %w", io.EOF)
