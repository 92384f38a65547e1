package nbd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"

	"hostcryptd/nbd/uring"
)

// Config holds the limits of a server. The zero value is fit for use.
type Config struct {
	// Log is told about connections of ServeListener, and about errors of
	// devices: of the first, and then at most every 10 s. Nil is silence.
	Log *zap.Logger

	// Arena is the size in bytes of the memory for payloads, at least
	// [MaxPayload]. Zero is 40 MiB, with which a process that has four busy
	// connections stays below 64 MiB. It costs nothing until it is used.
	Arena int64

	// Memory, if not nil, is the arena. The server takes it over.
	Memory *Memory

	// Kernel says that ServeTransmission is going to be called. A part of the arena
	// is then kept for that, of which no other connection gets anything: a tenth,
	// with the size by default.
	Kernel bool

	// MaxConnections is how many clients may be connected at the same time, those in
	// the handshake too: three quarters of them by TCP, since anybody may begin one
	// of those. Zero is 128. It doesn't concern ServeTransmission: the kernel has to get
	// its connection back whoever has come first. Each connection costs 250 KiB when
	// idle and up to 1 MiB when it has been busy, besides the arena. On a slow device,
	// they have up to 256 threads besides, in all, of some 40 KiB each.
	MaxConnections int

	// AllowPeer reports whether a process may connect to a Unix socket. Nil
	// allows those of root and of the server's effective user. It doesn't
	// concern ServeTransmission. It may be called by many goroutines at once.
	AllowPeer func(Peer) bool

	// MaxPerPeer is how many connections one user may have on Unix sockets, and
	// one host by TCP. An IPv6 host is its /64 network. Zero is MaxConnections for a
	// user, and a quarter of that for a host.
	MaxPerPeer int

	// Engine chooses how requests are run. Empty is [EngineURing] where the
	// kernel has it, unless the environment variable HOSTCRYPTD_ENGINE is
	// "portable" or "io_uring".
	Engine Engine

	// InFlight is how many requests of one connection run on the device at the
	// same time. As many again may wait for their replies to be taken. Zero is
	// 64. Of the requests that need a thread, which are all with the portable engine,
	// clients have 256 at the same time besides one for each connection. The kernel's
	// don't count.
	InFlight int

	// HandshakeTimeout is how long a handshake may take. Zero is 10 s.
	HandshakeTimeout time.Duration

	// StallTimeout is how long a connection may hold memory that others wait
	// for while its peer neither sends nor takes anything. With the portable engine, and
	// with TLS, a peer that takes less than 1 MiB in that time takes nothing. Zero is 30 s.
	StallTimeout time.Duration

	// TLS, if not nil, is offered to clients by STARTTLS. It says by ClientAuth
	// whether they have to show certificates. Where ClientCAs is set, clients that
	// use GnuTLS show none with an RSA key; VerifyConnection can check them instead.
	TLS *tls.Config

	// RequireTLS refuses everything to clients before STARTTLS. With TLS set,
	// that is so for TCP in any case. It doesn't concern ServeTransmission,
	// whose peer is the kernel.
	RequireTLS bool

	// Grace is how long peers may take to receive the last replies after a
	// cancellation. Zero is 5 s.
	Grace time.Duration
}

// An Engine is a way to run requests. They give the same results.
type Engine string

const (
	// EnginePortable has a thread for each request that is on the device. It
	// is what connections with TLS and devices that aren't an [AsyncDevice]
	// get in any case.
	EnginePortable Engine = "portable"

	// EngineURing has the kernel do many reads and writes at once, by
	// io_uring(7), for devices that are an AsyncDevice.
	EngineURing Engine = "io_uring"
)

// chooseEngine returns what Config.Engine asks for. Who asks for io_uring by
// name gets it or an error.
func chooseEngine(e Engine) (Engine, error) {
	if e == "" {
		e = Engine(os.Getenv("HOSTCRYPTD_ENGINE"))
	}
	switch e {
	case EnginePortable:
		return e, nil
	case "", EngineURing:
	default:
		return "", fmt.Errorf("nbd: there is no engine %.20q; there are %q and %q", e, EngineURing, EnginePortable)
	}
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // as package uring wants it
		defer runtime.UnlockOSThread()
		r, err := uring.New(8)
		if err == nil {
			err = r.Close()
		}
		result <- err
	}()
	err := <-result
	switch {
	case err == nil:
		return EngineURing, nil
	case e == EngineURing:
		return "", fmt.Errorf("nbd: this kernel doesn't give io_uring to this process: %w", err)
	}
	return EnginePortable, nil
}

// spareWorkers is how many requests of clients may be at work at the same time that need
// a thread each, besides one of every connection. Without a limit, 128 connections with
// 64 requests each had 8192 threads on a disk that stalls; with 1 GiB of memory, a
// machine may have fewer, and a Go program that gets no more ends.
const spareWorkers = 256

// settleTime is how long a new connection waits for those that are ending. What is
// only on its way to the device, on a thread that doesn't run just now, is there long
// before. A device that has stalled may take any time, and must not keep others out.
const settleTime = time.Second

// A Server serves exports. It is safe for concurrent use.
type Server struct {
	cfg     Config
	exports []Export
	arena   *arena
	share   int64 // the most that a connection may hold of the arena, in bytes
	procs   int
	engine  Engine
	epoch   time.Time

	faults faults
	fault  func(result int) int // if set by a test, changes what io_uring says of the device

	settleTime time.Duration

	kernelZeroes atomic.Int64 // WRITE_ZEROES and TRIM of the kernel that are with a device

	spare atomic.Int64 // workers that clients may have at work besides one each

	mu       sync.Mutex     // guards what follows
	open     [peerKinds]int // connections, including those in the handshake
	peers    map[peerKey]int
	conns    map[*conn]struct{}
	counts   Counts // of connections that have ended
	accepted uint64
	rejected uint64
	stalled  uint64
	closed   bool
}

// New returns a server of the exports. Close it when it isn't used any more.
func New(cfg Config, exports ...Export) (*Server, error) {
	if cfg.Log == nil {
		cfg.Log = zap.NewNop()
	}
	if cfg.AllowPeer == nil {
		cfg.AllowPeer = ownOrRoot
	}
	if cfg.Memory != nil {
		cfg.Arena = int64(len(cfg.Memory.mem))
	}
	orDefault(&cfg.Arena, 40<<20)
	orDefault(&cfg.MaxConnections, 128)
	orDefault(&cfg.InFlight, 64)
	orDefault(&cfg.HandshakeTimeout, 10*time.Second)
	orDefault(&cfg.StallTimeout, 30*time.Second)
	orDefault(&cfg.Grace, 5*time.Second)
	switch {
	case cfg.Arena < MaxPayload:
		return nil, fmt.Errorf("nbd: arena of %d bytes can't hold a payload of %d", cfg.Arena, MaxPayload)
	case cfg.MaxConnections < 0 || cfg.MaxPerPeer < 0 || cfg.InFlight < 0 || cfg.HandshakeTimeout < 0 || cfg.StallTimeout < 0 || cfg.Grace < 0:
		return nil, errors.New("nbd: negative limit")
	case cfg.RequireTLS && cfg.TLS == nil:
		return nil, errors.New("nbd: TLS is required but not configured")
	case len(exports) == 0:
		return nil, errors.New("nbd: no exports")
	}
	names := make(map[string]bool)
	for i := range exports {
		e := &exports[i]
		if err := e.validate(); err != nil {
			return nil, err
		}
		if names[e.Name] {
			return nil, fmt.Errorf("nbd: two exports with the name %.80q", e.Name)
		}
		names[e.Name] = true
	}
	engine, err := chooseEngine(cfg.Engine)
	if err != nil {
		return nil, err
	}
	if cfg.Memory == nil {
		if cfg.Memory, err = NewMemory(cfg.Arena, 0); err != nil {
			return nil, err
		}
	}
	a := newArena(cfg.Memory, cfg.Kernel)
	s := &Server{
		cfg:     cfg,
		exports: append([]Export(nil), exports...),
		arena:   a,
		share:   max(cfg.Arena/2, MaxPayload),
		engine:  engine,
		procs:   runtime.GOMAXPROCS(0),
		epoch:   time.Now(),

		settleTime: settleTime,

		peers: make(map[peerKey]int),
		conns: make(map[*conn]struct{}),
	}
	s.spare.Store(spareWorkers)
	return s, nil
}

func orDefault[T int | int64 | time.Duration](v *T, d T) {
	if *v == 0 {
		*v = d
	}
}

// Close releases the server's memory. It is an error to call it while
// connections are served.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	if n := s.connections(); n > 0 {
		return fmt.Errorf("nbd: closing the server: %d connections are open", n)
	}
	s.closed = true
	return s.arena.close()
}

// export returns the export with the name, or nil. The empty name is the first.
func (s *Server) export(name string) *Export {
	for i := range s.exports {
		if s.exports[i].Name == name {
			return &s.exports[i]
		}
	}
	if name == "" {
		return &s.exports[0]
	}
	return nil
}

// Engine returns the engine that serves the first export, on connections
// without TLS.
func (s *Server) Engine() Engine {
	if dev, ok := s.exports[0].Device.(AsyncDevice); ok && dev.Async() {
		return s.engine
	}
	return EnginePortable
}

// TransmissionFlags returns the flags of an export as the kernel wants them,
// which does no handshake. The error matches [ErrUnknownExport].
func (s *Server) TransmissionFlags(exportName string) (uint16, error) {
	e := s.export(exportName)
	if e == nil {
		return 0, fmt.Errorf("nbd: export %.80q: %w", exportName, ErrUnknownExport)
	}
	return e.transmissionFlags(), nil
}

// Serve serves conn, handshake first, until the client disconnects, the
// connection fails, or ctx is done. In the last case it takes no more requests,
// answers those that it has taken, refuses with ESHUTDOWN those that came
// meanwhile, and returns; a client that doesn't receive these replies within
// [Config.Grace] loses them. With [ErrLeave] as the cause of ctx, it refuses nothing:
// what came meanwhile has no reply, and clients that connect again, to the next server,
// send it again.
//
// Serve owns every goroutine that it starts: none is left when it returns, and
// no request of this connection is running on the device. It follows that
// Serve hangs for as long as a device does.
//
// A client that goes without DISC has what it sent and was not begun dropped, or
// refused, see Clients that go. It may take a second before the first request is served,
// while connections whose clients have gone come to their ends.
//
// Who is at the other end of a socket is asked of conn: of a [net.UnixConn],
// [net.TCPConn] or [Socket]. A Unix socket that is wrapped in something else is refused.
//
// It returns nil after a disconnect, whether or not the client took the last replies,
// or an aborted handshake, an error that
// matches [io.EOF] when the client just went away, and [context.Cause] of ctx
// after a cancellation. It doesn't close conn, but may leave deadlines set.
func (s *Server) Serve(ctx context.Context, conn net.Conn) error {
	return s.serve(ctx, conn, false)
}

// serve is Serve. With own, conn is the server's, which may close it.
func (s *Server) serve(ctx context.Context, conn net.Conn, own bool) error {
	peer, err := s.checkPeer(conn)
	if err != nil {
		s.mu.Lock()
		s.rejected++
		s.mu.Unlock()
		return err
	}
	if err := s.enter(peer); err != nil {
		return err
	}
	defer s.leave(peer)

	in := &input{nc: conn, buf: make([]byte, handshakeBuffer)}
	defer func() { closeTLS(in.nc) }()
	ses, err := s.handshake(ctx, in)
	switch {
	case err == errAborted:
		return nil
	case err != nil:
		return err
	}
	if own {
		// Else, with TLS say, it goes on as it is.
		if sock, err := NewSocket(in.nc); err == nil {
			defer sock.Close()
			in.nc = sock
		}
	}
	return s.transmission(ctx, *ses, in)
}

// ServeTransmission is Serve without a handshake. It is for the other end of a
// socket that the kernel got from package nbdnl, which is best made a [Socket].
// What came after ctx was done is left unread: the kernel sends it again on the
// next socket.
//
// With [ErrLeave] as the cause of ctx, the socket stays fit for use: the request
// of which a part was read is read to its end, everything that was read is
// answered, and ErrLeave is returned. What is read from conn next is the first
// byte of a request, so another process can serve it. Any other error means that
// conn has to be closed. It takes no longer than Config.Grace.
func (s *Server) ServeTransmission(ctx context.Context, conn net.Conn, exportName string) error {
	e := s.export(exportName)
	if e == nil {
		return fmt.Errorf("nbd: export %.80q: %w", exportName, ErrUnknownExport)
	}
	kernel := peerKey{kind: peerKernel}
	if err := s.enter(kernel); err != nil {
		return err
	}
	defer s.leave(kernel)
	return s.transmission(ctx, session{export: e, flags: e.transmissionFlags(), kernel: true}, &input{nc: conn})
}

// ServeListener serves the connections that ln accepts until ctx is done or ln
// fails. It then closes ln, ends the connections as Serve does, and returns
// when the last has ended: [context.Cause] of ctx, or the error of ln.
// Connections in excess of [Config.MaxConnections] are closed at once.
//
// A TCP listener must be on a loopback address, or [Config.TLS] must be set.
func (s *Server) ServeListener(ctx context.Context, ln net.Listener) error {
	if err := s.checkListener(ln); err != nil {
		_ = ln.Close()
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var conns sync.WaitGroup
	defer conns.Wait()
	defer cancel(nil)
	closed := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(closed)
		_ = ln.Close()
	})
	defer func() {
		if stop() {
			_ = ln.Close()
		} else {
			<-closed
		}
	}()

	var wait time.Duration
	for {
		conn, err := ln.Accept()
		switch {
		case err == nil:
			wait = 0
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case temporary(err):
			wait = min(max(2*wait, 5*time.Millisecond), time.Second)
			s.cfg.Log.Warn("accepting a connection", zap.Error(err), zap.Duration("wait", wait))
			select {
			case <-time.After(wait):
			case <-ctx.Done():
			}
			continue
		default:
			err = fmt.Errorf("nbd: accepting a connection: %w", err)
			cancel(err)
			return err
		}
		conns.Go(func() {
			defer conn.Close()
			err := s.serve(ctx, conn, true)
			switch {
			case err == nil, errors.Is(err, io.EOF), ctx.Err() != nil:
				s.cfg.Log.Debug("connection ended", zap.Error(err))
			default:
				s.cfg.Log.Warn("connection ended", zap.Error(err))
			}
		})
	}
}

// temporary reports whether accept may succeed later: of the errors in accept(2), those
// of the connection that was to be accepted, those of its network, which the page says
// to treat like EAGAIN, what is short and comes back, and what a policy (LSM, BPF)
// refuses, which may be changed. The rest say that it is no listening socket.
func temporary(err error) bool {
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok {
		return false
	}
	switch errno {
	case syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EINTR,
		syscall.ECONNABORTED, syscall.ETIMEDOUT, syscall.EPROTO, syscall.ENOPROTOOPT,
		syscall.ENETDOWN, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.EHOSTUNREACH, syscall.ENONET,
		syscall.EPERM, syscall.EACCES:
		return true
	}
	return false
}

// enter counts a connection that leave discounts.
func (s *Server) enter(peer peerKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return ErrClosed
	}
	if err := s.limit(peer); err != nil {
		s.rejected++
		return err
	}
	s.peers[peer]++
	s.open[peer.kind]++
	s.accepted++
	return nil
}

// limit refuses a connection that is one too many. Callers hold mu.
func (s *Server) limit(peer peerKey) error {
	most := s.cfg.MaxConnections
	own := s.cfg.MaxPerPeer
	switch peer.kind {
	case peerKernel:
		return nil
	case peerHost:
		if n := s.open[peerHost]; n >= most-most/4 {
			return fmt.Errorf("nbd: %d connections by TCP are open: %w", n, ErrTooManyConnections)
		}
		orDefault(&own, (most+3)/4)
	case peerUser:
		orDefault(&own, most)
	default:
		own = most
	}
	if n := s.connections() - s.open[peerKernel]; n >= most {
		return fmt.Errorf("nbd: %d connections are open: %w", n, ErrTooManyConnections)
	}
	if n := s.peers[peer]; n >= own {
		return fmt.Errorf("nbd: %d connections of this peer are open: %w", n, ErrTooManyConnections)
	}
	return nil
}

func (s *Server) leave(peer peerKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[peer.kind]--
	if s.peers[peer]--; s.peers[peer] == 0 {
		delete(s.peers, peer)
	}
}

// connections returns how many are open. Callers hold mu.
func (s *Server) connections() (n int) {
	for _, k := range s.open {
		n += k
	}
	return n
}

// handshake runs a handshake under its deadline.
func (s *Server) handshake(parent context.Context, in *input) (*session, error) {
	ctx, cancel := context.WithTimeoutCause(parent, s.cfg.HandshakeTimeout, ErrHandshakeTimeout)
	defer cancel()
	interrupted := make(chan struct{})
	nc := in.nc // TLS takes its place
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		_ = nc.SetDeadline(longAgo)
	})
	h := handshake{s: s, in: in}
	ses, err := h.run()
	if !stop() {
		<-interrupted
		if parent.Err() != nil && context.Cause(parent) != ErrLeave {
			h.shutdown()
		}
		return nil, context.Cause(ctx)
	}
	return ses, err
}

func (s *Server) transmission(ctx context.Context, ses session, in *input) error {
	c, err := newConn(ctx, s, ses, in)
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.mu.Unlock()

	if !ses.kernel {
		s.settle(ctx, c)
	}
	err = c.run(ctx)

	s.mu.Lock()
	delete(s.conns, c)
	s.counts.merge(&c.counts)
	s.mu.Unlock()
	close(c.ended)
	if ctx.Err() != nil && !(ses.kernel && context.Cause(ctx) == ErrLeave) {
		return context.Cause(ctx)
	}
	return err
}

// settle has a new connection, which may be that of a client that sends again what it
// has no reply to, begin after the connections that have failed or whose peers have
// hung up. It waits until they have ended, for settleTime at most, and then has them
// begin nothing more. What they still have on the device by then has long had its
// place there.
func (s *Server) settle(ctx context.Context, c *conn) {
	var ending []*conn
	s.mu.Lock()
	for o := range s.conns {
		o.mu.Lock()
		if _, maybe := o.hangup(); o != c && !o.settled && (maybe || o.hungUp || o.failed != nil) {
			ending = append(ending, o)
		}
		o.mu.Unlock()
	}
	s.mu.Unlock()
	if len(ending) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, s.settleTime)
	defer cancel()
	for _, o := range ending {
		select {
		case <-o.ended:
			continue
		case <-ctx.Done():
		}
		o.mu.Lock()
		o.hangUp(errHungUp)
		o.settled = true
		o.mu.Unlock()
	}
}

// now is a clock that is cheap to read, in nanoseconds, and never 0.
func (s *Server) now() int64 { return int64(time.Since(s.epoch)) + 1 }

// endStalled ends the connections that hold memory and whose peers have moved
// nothing for StallTimeout. It is called when another has waited for memory for
// that long.
func (s *Server) endStalled() {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit := s.now() - int64(s.cfg.StallTimeout)
	for c := range s.conns {
		stuck := func(since int64) bool { return since != 0 && since <= limit }
		if c.held.Load() == 0 || !stuck(c.sendSince.Load()) && !stuck(c.payloadSince.Load()) {
			continue
		}
		c.mu.Lock()
		if c.failed == nil {
			s.stalled++
			c.breakOff(fmt.Errorf("nbd: %w", ErrStalled))
		}
		c.mu.Unlock()
	}
}

// Counts are what a connection, or a server, has done since it began.
type Counts struct {
	Reads, Writes, Flushes, Trims, WriteZeroes uint64 // commands answered, with or without success
	Caches, BlockStatuses                      uint64
	Invalid                                    uint64 // commands that aren't known

	ReadBytes, WriteBytes uint64 // payload of commands that succeeded
	ZeroBytes, TrimBytes  uint64 // length of commands that succeeded

	Errors uint64 // commands answered with an error
}

func (n *Counts) add(r *request) {
	var bytes uint64
	if r.errno == 0 {
		bytes = r.length
	} else {
		n.Errors++
	}
	switch r.cmd {
	case cmdRead:
		n.Reads++
		n.ReadBytes += bytes
	case cmdWrite:
		n.Writes++
		n.WriteBytes += bytes
	case cmdFlush:
		n.Flushes++
	case cmdTrim:
		n.Trims++
		n.TrimBytes += bytes
	case cmdWriteZeroes:
		n.WriteZeroes++
		n.ZeroBytes += bytes
	case cmdCache:
		n.Caches++
	case cmdBlockStatus:
		n.BlockStatuses++
	default:
		n.Invalid++
	}
}

func (n *Counts) merge(m *Counts) {
	n.Reads += m.Reads
	n.Writes += m.Writes
	n.Flushes += m.Flushes
	n.Trims += m.Trims
	n.WriteZeroes += m.WriteZeroes
	n.Caches += m.Caches
	n.BlockStatuses += m.BlockStatuses
	n.Invalid += m.Invalid
	n.ReadBytes += m.ReadBytes
	n.WriteBytes += m.WriteBytes
	n.ZeroBytes += m.ZeroBytes
	n.TrimBytes += m.TrimBytes
	n.Errors += m.Errors
}

// KernelZeroes tells whether a request of [Server.ServeTransmission] to write zeros, or
// to trim, is with its device. It takes no lock.
func (s *Server) KernelZeroes() bool { return s.kernelZeroes.Load() > 0 }

// Stats is a snapshot of a server.
type Stats struct {
	Connections int    // open now
	Accepted    uint64 // connections served, ever
	Rejected    uint64 // connections refused for MaxConnections, MaxPerPeer or AllowPeer
	Stalled     uint64 // connections ended by [ErrStalled]
	InFlight    int    // requests taken and not yet answered
	Counts             // of all connections, ever
	Arena       ArenaStats
}

// Stats returns a snapshot. The figures of different connections may be of
// different moments.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := Stats{
		Connections: s.connections(),
		Accepted:    s.accepted,
		Rejected:    s.rejected,
		Stalled:     s.stalled,
		Counts:      s.counts,
		Arena:       s.arena.stats(),
	}
	for c := range s.conns {
		c.mu.Lock()
		st.InFlight += c.inFlight
		st.Counts.merge(&c.counts)
		c.mu.Unlock()
	}
	return st
}
