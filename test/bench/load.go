package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Wire constants of the NBD protocol, doc/proto.md of NetworkBlockDevice/nbd.
const (
	magicRequest     = 0x25609513
	magicSimpleReply = 0x67446698
	magicOption      = 0x49484156454F5054 // "IHAVEOPT"
	magicOptReply    = 0x3e889045565a9
	optGo            = 7
	repAck           = 1
	repInfo          = 3
	cmdRead          = 0
	cmdWrite         = 1
	cmdDisconnect    = 2
	requestSize      = 28
	replySize        = 16
)

const (
	stampBlock = 4096 // unit of the pattern
	stampSize  = 16   // block number and generation at the start of a unit

	// receiveBuffer holds what one read from the socket may return. Larger
	// ones fall out of the cache of the core.
	receiveBuffer = 512 << 10

	// answerMax is how long a server may answer nothing: it must not hang the run.
	answerMax = 10 * time.Second
)

// A load is what a client asks of a server.
type load struct {
	Name        string `json:"name"`
	Write       bool   `json:"write"`
	Random      bool   `json:"random"`
	Block       int    `json:"block_bytes"` // multiple of 4096
	Depth       int    `json:"depth"`       // requests in flight on each connection
	Connections int    `json:"connections"`
}

// A sample is the outcome of one slice of a load.
type sample struct {
	IOPS       float64 `json:"iops"`
	MBps       float64 `json:"mb_per_s"` // 10^6 bytes
	P50us      float64 `json:"p50_us"`
	P99us      float64 `json:"p99_us"`
	ServerCPUu float64 `json:"server_cpu_us_per_request"`
}

// A volumeModel knows what each 4 KiB of an export must read as: the
// generation it was last written in. It is used by one load at a time; the
// connections of a load keep to disjoint ranges.
type volumeModel struct {
	generation []uint32 // 0 is never written, not checked
	next       uint32
	unchecked  bool // the server keeps nothing
}

func newVolumeModel(size int64) *volumeModel {
	return &volumeModel{generation: make([]uint32, size/stampBlock)}
}

// fillPattern makes p the body of a unit written in generation gen: bytes that
// don't repeat within the unit and differ between generations.
func fillPattern(p []byte, gen uint32) {
	x := uint64(gen)*0x9e3779b97f4a7c15 + 1
	for i := 0; i+8 <= len(p); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		binary.LittleEndian.PutUint64(p[i:], x)
	}
}

func stamp(p []byte, block uint64, gen uint32) {
	binary.LittleEndian.PutUint64(p, block)
	binary.LittleEndian.PutUint64(p[8:], uint64(gen))
}

func stampOK(p []byte, block uint64, gen uint32) bool {
	return binary.LittleEndian.Uint64(p) == block && binary.LittleEndian.Uint64(p[8:]) == uint64(gen)
}

// dial opens a connection to the first export of the server on socket and
// returns a descriptor in the transmission phase and the size of the export.
func dial(socket string) (fd int, size int64, err error) {
	c, err := net.DialTimeout("unix", socket, 5*time.Second)
	if err != nil {
		return -1, 0, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return -1, 0, err
	}
	if size, err = negotiate(c); err != nil {
		return -1, 0, fmt.Errorf("handshake on %s: %w", socket, err)
	}
	f, err := c.(*net.UnixConn).File()
	if err != nil {
		return -1, 0, err
	}
	defer f.Close()
	if fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		return -1, 0, err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_SNDBUF, 4<<20); err != nil {
		unix.Close(fd)
		return -1, 0, err
	}
	return fd, size, nil
}

func negotiate(c io.ReadWriter) (size int64, err error) {
	var hello [18]byte
	if _, err := io.ReadFull(c, hello[:]); err != nil {
		return 0, err
	}
	if binary.BigEndian.Uint64(hello[8:]) != magicOption {
		return 0, errors.New("not a newstyle NBD server")
	}
	opt := binary.BigEndian.AppendUint32(nil, 3) // fixed newstyle, no zeroes
	opt = binary.BigEndian.AppendUint64(opt, magicOption)
	opt = binary.BigEndian.AppendUint32(opt, optGo)
	opt = binary.BigEndian.AppendUint32(opt, 6)
	opt = append(opt, 0, 0, 0, 0, 0, 0) // empty name, no information requests
	if _, err := c.Write(opt); err != nil {
		return 0, err
	}
	for {
		var h [20]byte
		if _, err := io.ReadFull(c, h[:]); err != nil {
			return 0, err
		}
		kind, n := binary.BigEndian.Uint32(h[12:]), binary.BigEndian.Uint32(h[16:])
		if binary.BigEndian.Uint64(h[:]) != magicOptReply || n > 64<<10 {
			return 0, errors.New("malformed option reply")
		}
		data := make([]byte, n)
		if _, err := io.ReadFull(c, data); err != nil {
			return 0, err
		}
		switch {
		case kind == repAck:
			return size, nil
		case kind&(1<<31) != 0:
			return 0, fmt.Errorf("server refused the export: option error %#x %q", kind, data)
		case kind == repInfo && n >= 12 && binary.BigEndian.Uint16(data) == 0:
			size = int64(binary.BigEndian.Uint64(data[2:]))
		}
	}
}

// runLoad drives the server on socket for the duration and checks the stamp of
// everything that it reads. Requests stay within the size of m.
func runLoad(ctx context.Context, socket string, l load, m *volumeModel, d time.Duration) (sample, error) {
	m.next++
	return drive(ctx, socket, l, m, d, false)
}

// fill writes the whole export once, and verify reads it once and compares
// every byte.
func fill(ctx context.Context, socket string, m *volumeModel) error {
	m.next++
	_, err := drive(ctx, socket, load{Name: "fill", Write: true, Block: 128 << 10, Depth: 8, Connections: 1}, m, 0, true)
	return err
}

func verify(ctx context.Context, socket string, m *volumeModel) error {
	_, err := drive(ctx, socket, load{Name: "verify", Block: 128 << 10, Depth: 8, Connections: 1}, m, 0, true)
	return err
}

func drive(ctx context.Context, socket string, l load, m *volumeModel, d time.Duration, whole bool) (sample, error) {
	conns := make([]*client, l.Connections)
	share := uint64(len(m.generation)*stampBlock/l.Block) / uint64(l.Connections)
	for i := range conns {
		fd, size, err := dial(socket)
		if err != nil {
			return sample{}, err
		}
		defer unix.Close(fd)
		if size < int64(len(m.generation)*stampBlock) {
			return sample{}, fmt.Errorf("export on %s has %d bytes, want at least %d", socket, size, len(m.generation)*stampBlock)
		}
		conns[i] = newClient(fd, l, m, uint64(i)*share, share, whole)
	}
	// The collector stops the world, which a thread that waits for a server would
	// hold up. Without it, each has a processor of its own, and one is left.
	runtime.GC()
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	if n := len(conns) + 2; runtime.GOMAXPROCS(0) < n {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n))
	}
	var wg sync.WaitGroup
	start := time.Now()
	errs := make([]error, len(conns))
	for i, c := range conns {
		wg.Go(func() {
			// A thread of its own, which blocks in the socket.
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if errs[i] = c.run(ctx, start, d); errs[i] != nil {
				errs[i] = fmt.Errorf("%s on %s: %w", l.Name, socket, errs[i])
			}
		})
	}
	wg.Wait()
	elapsed := time.Since(start).Seconds()
	var h histogram
	for _, c := range conns {
		h.merge(&c.latency)
	}
	s := sample{
		IOPS:  float64(h.count) / elapsed,
		MBps:  float64(h.count) * float64(l.Block) / elapsed / 1e6,
		P50us: float64(h.quantile(.5)) / 1e3,
		P99us: float64(h.quantile(.99)) / 1e3,
	}
	return s, errors.Join(errs...)
}

// A client is one connection with a fixed number of requests in flight.
type client struct {
	fd      int
	l       load
	m       *volumeModel
	gen     uint32
	base    uint64 // first block of the range, in units of l.Block
	blocks  uint64
	rng     uint64
	seq     uint64
	whole   bool // each block once, and compare every byte
	body    map[uint32][]byte
	latency histogram

	free []int // cookies not in flight
	born []time.Duration
	at   []uint64 // block of a cookie

	requests []byte       // headers, and payload for writes: one slot for each cookie
	vectors  []unix.Iovec // of requests
	pending  []unix.Iovec // of vectors, not yet sent

	in     []byte
	have   int // bytes in it
	cookie int // whose payload is being received
	left   int // bytes of that payload to come
}

func newClient(fd int, l load, m *volumeModel, base, blocks uint64, whole bool) *client {
	slot := requestSize
	if l.Write {
		slot += l.Block
	}
	c := &client{
		fd: fd, l: l, m: m, gen: m.next, base: base, blocks: blocks, whole: whole,
		rng:      88172645463325252 + base*7919 + uint64(m.next)<<32,
		born:     make([]time.Duration, l.Depth),
		at:       make([]uint64, l.Depth),
		requests: make([]byte, l.Depth*slot),
		vectors:  make([]unix.Iovec, 0, l.Depth),
		in:       make([]byte, receiveBuffer),
		body:     map[uint32][]byte{},
	}
	for i := range l.Depth {
		c.free = append(c.free, i)
		if l.Write {
			p := c.requests[i*slot+requestSize : (i+1)*slot]
			for ; len(p) > 0; p = p[stampBlock:] {
				fillPattern(p[:stampBlock], m.next)
			}
		}
	}
	return c
}

// block chooses what the next request is about. ok is false when the range
// was passed once and that was all to do.
func (c *client) block() (n uint64, ok bool) {
	if c.l.Random {
		c.rng ^= c.rng << 13
		c.rng ^= c.rng >> 7
		c.rng ^= c.rng << 17
		return c.base + c.rng%c.blocks, true
	}
	if c.whole && c.seq == c.blocks {
		return 0, false
	}
	n = c.base + c.seq%c.blocks
	c.seq++
	return n, true
}

// prepare makes requests of all free cookies, which are pending then.
func (c *client) prepare(now time.Duration) {
	c.vectors = c.vectors[:0]
	used := 0 // of c.requests, for reads: headers side by side make one vector
	for len(c.free) > 0 {
		n, ok := c.block()
		if !ok {
			break
		}
		cookie := c.free[len(c.free)-1]
		c.free = c.free[:len(c.free)-1]
		c.born[cookie], c.at[cookie] = now, n
		h := c.requests[used : used+requestSize]
		command := uint32(cmdRead)
		if c.l.Write {
			slot := requestSize + c.l.Block
			h = c.requests[cookie*slot : (cookie+1)*slot]
			command = cmdWrite
			per := uint64(c.l.Block / stampBlock)
			for i := range per {
				stamp(h[requestSize+i*stampBlock:], n*per+i, c.gen)
				c.m.generation[n*per+i] = c.gen
			}
			c.vectors = append(c.vectors, vector(h))
		} else {
			used += requestSize
		}
		binary.BigEndian.PutUint32(h, magicRequest)
		binary.BigEndian.PutUint32(h[4:], command) // no flags
		binary.BigEndian.PutUint64(h[8:], uint64(cookie))
		binary.BigEndian.PutUint64(h[16:], n*uint64(c.l.Block))
		binary.BigEndian.PutUint32(h[24:], uint32(c.l.Block))
	}
	if used > 0 {
		c.vectors = append(c.vectors, vector(c.requests[:used]))
	}
	c.pending = c.vectors
}

func vector(p []byte) unix.Iovec {
	return unix.Iovec{Base: &p[0], Len: uint64(len(p))}
}

// run keeps the queue full until d has passed, or the range if whole, and then
// waits for what is in flight.
func (c *client) run(ctx context.Context, start time.Time, d time.Duration) error {
	for stop := false; ; {
		if !stop && len(c.pending) == 0 && len(c.free) > 0 {
			now := time.Since(start)
			if stop = ctx.Err() != nil || !c.whole && now >= d; !stop {
				c.prepare(now)
			}
		}
		if len(c.pending) == 0 && len(c.free) == c.l.Depth {
			break
		}
		progress, err := c.send()
		if err != nil {
			return err
		}
		n, errno := receive(c.fd, c.in[c.have:])
		switch {
		case errno == unix.EAGAIN && progress && len(c.pending) > 0:
		case errno == unix.EAGAIN:
			if err := wait(c.fd, len(c.pending) > 0); err != nil {
				return err
			}
		case errno != 0:
			return fmt.Errorf("receive: %w", errno)
		case n == 0:
			return errors.New("server closed the connection")
		default:
			rest, err := c.replies(c.in[:c.have+n], time.Since(start))
			if err != nil {
				return err
			}
			c.have = copy(c.in, rest)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	var bye [requestSize]byte
	binary.BigEndian.PutUint32(bye[:], magicRequest)
	binary.BigEndian.PutUint32(bye[4:], cmdDisconnect)
	_, err := unix.Write(c.fd, bye[:])
	return err
}

// replies takes the replies in p, of which the last may not have come whole, and
// returns the rest.
func (c *client) replies(p []byte, now time.Duration) (rest []byte, err error) {
	for {
		if c.left > 0 {
			n, err := c.payload(p, c.cookie, c.l.Block-c.left)
			if err != nil {
				return nil, err
			}
			p, c.left = p[n:], c.left-n
			if c.left > 0 {
				return p, nil
			}
			c.end(c.cookie, now)
		}
		if len(p) < replySize {
			return p, nil
		}
		id := binary.BigEndian.Uint64(p[8:])
		if binary.BigEndian.Uint32(p) != magicSimpleReply || id >= uint64(c.l.Depth) {
			return nil, fmt.Errorf("malformed reply % x", p[:replySize])
		}
		c.cookie = int(id)
		if code := binary.BigEndian.Uint32(p[4:]); code != 0 {
			return nil, fmt.Errorf("request at %d: error %w", c.at[c.cookie]*uint64(c.l.Block), unix.Errno(code))
		}
		p = p[replySize:]
		if c.l.Write {
			c.end(c.cookie, now)
		} else {
			c.left = c.l.Block
		}
	}
}

// end takes the time of a request that was answered.
func (c *client) end(cookie int, now time.Duration) {
	c.latency.add(now - c.born[cookie])
	c.free = append(c.free, cookie)
}

// payload takes what p has of the payload of cookie from offset done, checks
// it and returns how much that was. It takes whole units when it has to
// compare them, and never splits a stamp.
func (c *client) payload(p []byte, cookie, done int) (taken int, err error) {
	total := c.l.Block - done
	per := uint64(c.l.Block / stampBlock)
	for taken < total {
		rest := p[taken:]
		within := (done + taken) % stampBlock
		n := min(len(rest), stampBlock-within)
		if within == 0 {
			if n < stampSize || c.whole && n < stampBlock {
				return taken, nil
			}
			block := c.at[cookie]*per + uint64((done+taken)/stampBlock)
			gen := c.m.generation[block]
			if c.m.unchecked {
				gen = 0
			}
			if gen != 0 && !stampOK(rest, block, gen) {
				return taken, fmt.Errorf("wrong data at byte %d: % x, want generation %d", block*stampBlock, rest[:stampSize], gen)
			}
			if gen != 0 && c.whole && !bytes.Equal(rest[stampSize:stampBlock], c.pattern(gen)[stampSize:]) {
				return taken, fmt.Errorf("wrong data within the 4 KiB at byte %d of generation %d", block*stampBlock, gen)
			}
		}
		if n == 0 {
			return taken, nil
		}
		taken += n
	}
	return taken, nil
}

func (c *client) pattern(gen uint32) []byte {
	p := c.body[gen]
	if p == nil {
		p = make([]byte, stampBlock)
		fillPattern(p, gen)
		c.body[gen] = p
	}
	return p
}

// send gives the socket what it takes now of what is pending.
func (c *client) send() (progress bool, err error) {
	v := c.pending
	for len(v) > 0 {
		h := unix.Msghdr{Iov: &v[0], Iovlen: uint64(len(v))}
		// Neither call blocks, so the scheduler needn't be told (RawSyscall).
		n, _, errno := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(c.fd), uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if errno == unix.EAGAIN {
			break
		}
		if errno != 0 {
			return progress, fmt.Errorf("send: %w", errno)
		}
		progress = true
		for n > 0 {
			k := min(uint64(n), v[0].Len)
			n -= uintptr(k)
			if k == v[0].Len {
				v = v[1:]
			} else {
				v[0].Base = (*byte)(unsafe.Add(unsafe.Pointer(v[0].Base), k))
				v[0].Len -= k
			}
		}
	}
	c.pending = v
	return progress, nil
}

// receive takes what has come, which may be nothing (EAGAIN).
func receive(fd int, p []byte) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVFROM, uintptr(fd), uintptr(unsafe.Pointer(&p[0])), uintptr(len(p)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// wait waits for the server: for an answer, or also for room in the socket. Who
// waits in recv(2) is woken for nothing whenever the server has taken requests, at
// the cost of the server: 5 to 9 µs for each batch, where the two are on different
// cores. libnbd waits in poll(2) too.
func wait(fd int, room bool) error {
	p := unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
	if room {
		p.Events |= unix.POLLOUT
	}
	// It blocks, but the scheduler isn't told: it would give the processor to
	// somebody else and have the thread wait for one when it comes back, which cost
	// half of the requests with two connections.
	most := unix.NsecToTimespec(int64(answerMax))
	n, _, errno := unix.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(&p)), 1, uintptr(unsafe.Pointer(&most)), 0, 0, 0)
	if n == 0 && errno == 0 {
		return fmt.Errorf("no answer for %v", answerMax)
	}
	if errno != 0 && errno != unix.EINTR {
		return fmt.Errorf("poll: %w", errno)
	}
	return nil
}
