package vmtest

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// A FlushAction is what a [VolatileDisk] does with a flush.
type FlushAction int

const (
	FlushDo   FlushAction = iota // as it should
	FlushLie                     // answer it and don't do it
	FlushHold                    // don't answer: the disk hears nothing more until it is cut
)

// A flushProxy is between an NBD client and its server and asks what to do with
// each flush. What the server says is passed on as it is. A flush that is not
// to be done becomes a request with the same answer and no effect on what is
// durable: NBD_CMD_CACHE. So the proxy has to understand the client only. A write
// with FUA is passed on: a virtio disk has none.
type flushProxy struct {
	l       net.Listener
	inner   string // the server's socket
	onFlush func(n int) FlushAction

	mu      sync.Mutex
	flushes int
	conns   []net.Conn
	closed  bool  // or about to be
	err     error // the first one that isn't the end of a connection
}

// Of the protocol, doc/proto.md of NetworkBlockDevice/nbd.
const (
	nbdOption      = 0x49484156 // the first half of "IHAVEOPT"
	nbdRequest     = 0x25609513
	nbdCmdWrite    = 1
	nbdCmdFlush    = 3
	nbdCmdCache    = 5
	nbdRequestSize = 28
)

func (p *flushProxy) serve() {
	for {
		c, err := p.l.Accept()
		if err != nil {
			return
		}
		s, err := net.Dial("unix", p.inner)
		if err != nil {
			p.fail(err)
			c.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, c, s)
		closed := p.closed
		p.mu.Unlock()
		if closed {
			c.Close()
			s.Close()
			return
		}
		go func() {
			io.Copy(c, s)
			c.Close()
		}()
		go func() {
			if err := p.forward(s, c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				p.fail(err)
			}
			s.Close()
		}()
	}
}

func (p *flushProxy) fail(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil && !p.closed {
		p.err = err
	}
}

// expectEnd makes what fails from now on no error.
func (p *flushProxy) expectEnd() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
}

func (p *flushProxy) close() error {
	p.l.Close() // which removes its socket
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	if p.err != nil {
		return fmt.Errorf("vmtest: between QEMU and nbdkit: %w", p.err)
	}
	return nil
}

// forward passes on what the client says, until its end.
func (p *flushProxy) forward(server io.Writer, client io.Reader) error {
	in, out := bufio.NewReaderSize(client, 1<<20), bufio.NewWriterSize(server, 1<<20)
	if _, err := io.CopyN(out, in, 4); err != nil { // the client's flags
		return err
	}
	for {
		if in.Buffered() == 0 {
			if err := out.Flush(); err != nil {
				return err
			}
		}
		magic, err := in.Peek(4)
		if err != nil {
			return err
		}
		rest := int64(0)
		switch binary.BigEndian.Uint32(magic) {
		case nbdOption:
			head, err := in.Peek(16)
			if err != nil {
				return err
			}
			rest = 16 + int64(binary.BigEndian.Uint32(head[12:]))
		case nbdRequest:
			var head [nbdRequestSize]byte
			if _, err := io.ReadFull(in, head[:]); err != nil {
				return err
			}
			switch kind := binary.BigEndian.Uint16(head[6:]); kind {
			case nbdCmdWrite:
				rest = int64(binary.BigEndian.Uint32(head[24:]))
			case nbdCmdFlush:
				// What came before must be on its way when the answer is given.
				if err := out.Flush(); err != nil {
					return err
				}
				p.mu.Lock()
				p.flushes++
				n := p.flushes
				p.mu.Unlock()
				switch p.onFlush(n) {
				case FlushHold:
					_, err := io.Copy(io.Discard, in)
					return err
				case FlushLie:
					binary.BigEndian.PutUint16(head[6:], nbdCmdCache)
					binary.BigEndian.PutUint32(head[24:], 4096) // of offset 0
				}
			}
			if _, err := out.Write(head[:]); err != nil {
				return err
			}
		default:
			return fmt.Errorf("the client says %x, which is neither an option nor a request", magic)
		}
		if _, err := io.CopyN(out, in, rest); err != nil {
			return err
		}
	}
}
