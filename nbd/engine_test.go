package nbd_test

import (
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// TestMain runs everything twice, once with each engine. Where the kernel has
// no io_uring, the second run fails: what is not tested isn't known to work.
func TestMain(m *testing.M) {
	flag.Parse()
	for _, name := range []string{"test.fuzz", "test.bench", "test.list"} {
		if flag.Lookup(name).Value.String() != "" {
			os.Exit(m.Run())
		}
	}
	for _, e := range []nbd.Engine{nbd.EnginePortable, nbd.EngineURing} {
		os.Setenv("HOSTCRYPTD_ENGINE", string(e))
		if code := m.Run(); code != 0 {
			fmt.Printf("with HOSTCRYPTD_ENGINE=%s\n", e)
			os.Exit(code)
		}
	}
}

// engine is the engine of this run.
func engine() nbd.Engine {
	if e := nbd.Engine(os.Getenv("HOSTCRYPTD_ENGINE")); e != "" {
		return e
	}
	return nbd.EngineURing
}

// async makes the devices of exports fit for io_uring, as far as they are
// nothing but a [nbdtest.Device].
func async(t testing.TB, exports []nbd.Export) {
	for i := range exports {
		if d, ok := exports[i].Device.(*nbdtest.Device); ok {
			a, err := nbdtest.NewAsync(d)
			if err != nil {
				t.Fatal(err)
			}
			exports[i].Device = a
			t.Cleanup(func() {
				if err := a.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

func TestEngine(t *testing.T) {
	a, err := nbdtest.NewAsync(nbdtest.NewDevice(1<<20, false))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() }) // after the harness's
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: a})
	if got := h.s.Engine(); got != engine() {
		t.Errorf("Engine() = %q, want %q", got, engine())
	}
	c, _ := h.dial("")
	want := pattern(300<<10, 1)
	if errno, err := c.Write(want, 4096, 0); errno != 0 || err != nil {
		t.Fatal(errno, err)
	}
	got := make([]byte, len(want))
	if errno, err := c.Read(got, 4096); errno != 0 || err != nil || string(got) != string(want) {
		t.Errorf("read: error %d, %v; same data: %v", errno, err, string(got) == string(want))
	}
	split := int64(1) // the write
	if engine() == nbd.EngineURing {
		split = 2
	}
	if n := a.Split.Load(); n != split {
		t.Errorf("%d requests came in halves, want %d", n, split)
	}

	// What isn't an AsyncDevice has the portable engine, whatever was chosen.
	h = newHarness(t, nbd.Config{}, nbd.Export{Device: struct{ nbd.Device }{a}})
	if got := h.s.Engine(); got != nbd.EnginePortable {
		t.Errorf("Engine() of a plain device = %q", got)
	}
}

func TestEngineChoice(t *testing.T) {
	export := nbd.Export{Device: nbdtest.NewDevice(1<<20, false)}
	t.Setenv("HOSTCRYPTD_ENGINE", "steam")
	if _, err := nbd.New(nbd.Config{}, export); err == nil || !strings.Contains(err.Error(), "steam") {
		t.Errorf("New with an unknown engine in the environment: %v", err)
	}
	if s, err := nbd.New(nbd.Config{Engine: nbd.EnginePortable}, export); err != nil {
		t.Errorf("Config.Engine does not come before the environment: %v", err)
	} else {
		s.Close()
	}
}

// TestSlowDevice: on a device that takes 10 ms for each request, 32 requests in
// flight give at least 0.9 of 32 requests in 10 ms.
func TestSlowDevice(t *testing.T) {
	const delay, depth, rounds = slowDelay, 32, 10
	d := nbdtest.NewDevice(1<<20, false)
	d.Before = func(nbdtest.Op) error {
		// Not time.Sleep, which rounds up to milliseconds: like a disk, this
		// keeps a thread in the kernel.
		sleep(delay)
		return nil
	}
	var dev nbd.Device = d
	if engine() == nbd.EngineURing {
		a, err := nbdtest.NewAsync(d)
		if err != nil {
			t.Fatal(err)
		}
		s := &slowReads{Async: a, delay: delay, reads: make(chan slowRead, depth)}
		ended := make(chan struct{})
		go s.run(ended)
		t.Cleanup(func() {
			close(s.reads)
			<-ended
			a.Close()
		})
		dev = s
	}
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: dev})
	for _, cmd := range []uint16{nbdtest.Read, nbdtest.Write} {
		best := 0.0
		for range 8 { // other programs may use the processor
			c, _ := h.dial("")
			payload := []byte(nil)
			size := 4096
			if cmd == nbdtest.Write {
				payload = make([]byte, size)
			}
			send := func(i int) error {
				return c.Send(nbdtest.Request{Cmd: cmd, Cookie: uint64(i), Off: uint64(i%depth) * 4096, Len: uint32(size)}, payload)
			}
			// Spread over the delay, so that not all requests wait for the client
			// and for the server at the same time, and neither is measured.
			for i := range depth {
				if err := send(i); err != nil {
					t.Fatal(err)
				}
				sleep(delay / depth * 3 / 4)
			}
			var start time.Time // when all first requests were answered
			data := make([]byte, size)
			for i := range depth * rounds {
				errno, _, err := c.ReadReply()
				if err != nil || errno != 0 {
					t.Fatalf("reply: error %d, %v", errno, err)
				}
				if cmd == nbdtest.Read {
					if _, err := io.ReadFull(c.Conn, data); err != nil {
						t.Fatal(err)
					}
				}
				if i == depth-1 {
					start = time.Now()
				}
				if i < depth*(rounds-1) {
					if err := send(depth + i); err != nil {
						t.Fatal(err)
					}
				}
			}
			best = max(best, depth*(rounds-1)/time.Since(start).Seconds())
			if best >= 0.9*depth/delay.Seconds() {
				break
			}
		}
		if want := 0.9 * depth / delay.Seconds(); best < want {
			t.Errorf("command %d: %.0f requests/s, want at least %.0f", cmd, best, want)
		}
	}
}

// sleep sleeps in the kernel, whatever signals the runtime sends.
func sleep(d time.Duration) {
	ts := unix.NsecToTimespec(int64(d))
	for unix.Nanosleep(&ts, &ts) == unix.EINTR {
	}
}

// slowReads has reads with io_uring that take delay each, all at the same time
// and without a thread for each: pipes that one thread fills when it is time.
type slowReads struct {
	*nbdtest.Async
	delay time.Duration
	reads chan slowRead
	pipes sync.Map // from the first byte of memory to the end that is read
}

type slowRead struct {
	due time.Time
	fd  int
	n   int
}

func (s *slowReads) run(ended chan<- struct{}) {
	defer close(ended)
	for r := range s.reads {
		if d := time.Until(r.due); d > 0 {
			sleep(d)
		}
		_, _ = unix.Write(r.fd, make([]byte, r.n))
		unix.Close(r.fd)
	}
}

func (s *slowReads) BeginRead(p []byte, _ int64) (fd int, at int64, ok bool) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		panic(err)
	}
	s.pipes.Store(&p[0], fds[0])
	s.reads <- slowRead{time.Now().Add(s.delay), fds[1], len(p)}
	return fds[0], 0, true
}

func (s *slowReads) EndRead(p []byte, _ int64, n int, err error) (int, error) {
	fd, _ := s.pipes.LoadAndDelete(&p[0])
	unix.Close(fd.(int))
	return n, err
}

// stallTime is how long TestStalledDevice lets the device stall: HOSTCRYPTD_STALL,
// which 'make soak' sets to a minute, or as long as its requests take.
func stallTime(t *testing.T) time.Duration {
	text := os.Getenv("HOSTCRYPTD_STALL")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// TestStalledDevice: requests that the device doesn't answer hold up neither
// others of their connection nor other connections, and are answered at last.
func TestStalledDevice(t *testing.T) {
	var once sync.Once
	gate := make(chan struct{})
	release := func() { once.Do(func() { close(gate) }) }
	defer release()
	d := nbdtest.NewDevice(1<<20, false)
	d.Before = func(op nbdtest.Op) error {
		if op.Off < 64<<10 && op.Method != "Sync" {
			<-gate
		}
		return nil
	}
	h := newHarness(t, nbd.Config{}, nbd.Export{Device: d})
	c, _ := h.dial("")
	const stuck = 32
	for i := range stuck {
		if err := c.Send(nbdtest.Request{Cookie: uint64(i), Off: uint64(i) * 512, Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
	}
	other, _ := h.dial("")
	start, stall := time.Now(), stallTime(t)
	for _, c := range []*nbdtest.Client{c, other} {
		if err := c.Conn.SetDeadline(start.Add(stall + time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	for i := 0; i < 100 || time.Since(start) < stall; i++ {
		if i >= 100 {
			time.Sleep(10 * time.Millisecond)
		}
		for _, c := range []*nbdtest.Client{c, other} {
			p := pattern(4096, 3)
			if errno, err := c.Write(p, 128<<10, 0); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			if errno, err := c.Do(nbdtest.Request{Cmd: nbdtest.Flush}, nil); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			if errno, err := c.Read(p, 128<<10); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
		}
	}
	release()
	for range stuck {
		if errno, _, err := c.ReadReply(); errno != 0 || err != nil {
			t.Fatalf("a request that was stuck: error %d, %v", errno, err)
		}
		if _, err := io.ReadFull(c.Conn, make([]byte, 512)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestThreads: requests that need a thread each, on a disk that stalls, are limited for
// all clients together and not for the kernel; and who has had to wait goes on when
// others are done.
func TestThreads(t *testing.T) {
	const clients, spare, inFlight = 5, 6, 64
	for _, secure := range []bool{false, true} {
		t.Run(fmt.Sprintf("TLS=%v", secure), func(t *testing.T) {
			var running [clients + 1]atomic.Int64 // by who: each has a MiB of its own
			var gates [clients + 1]chan struct{}
			var open [clients + 1]func()
			for i := range gates {
				gates[i] = make(chan struct{})
				open[i] = sync.OnceFunc(func() { close(gates[i]) })
				defer open[i]()
			}
			dev := nbdtest.NewDevice((clients+1)<<20, false)
			dev.Before = func(op nbdtest.Op) error {
				if i := op.Off >> 20; op.Off&(1<<20-1) < 512<<10 {
					running[i].Add(1)
					<-gates[i]
				}
				return nil
			}
			all := func(of []atomic.Int64) (n int64) {
				for i := range of {
					n += of[i].Load()
				}
				return n
			}
			p := newPKI(t)
			cfg, connect := nbd.Config{}, transport(byUnix)
			if secure {
				cfg.TLS, connect = p.server, byTLS
			}
			h := newHarness(t, cfg, nbd.Export{Device: dev})
			h.spare = spare
			h.s.SetSpareWorkers(spare)
			var conns [clients + 1]*nbdtest.Client
			send := func(i int) {
				t.Helper()
				var b []byte
				for n := range inFlight {
					b = nbdtest.Request{Cmd: nbdtest.WriteZeroes, Cookie: uint64(n), Off: uint64(i<<20 + n*4096), Len: 4096}.Append(b)
				}
				if _, err := conns[i].Conn.Write(b); err != nil {
					t.Fatal(err)
				}
			}
			answered := func(i, n int) {
				t.Helper()
				for range n {
					if errno, _, err := conns[i].ReadReply(); errno != 0 || err != nil {
						t.Fatal(errno, err)
					}
				}
			}
			for i := range clients {
				conns[i], _, _ = connect(t, h, p)
				send(i)
			}
			eventually(t, "as many run as may", func() bool { return all(running[:clients]) == clients+spare })
			time.Sleep(50 * time.Millisecond)
			if n := all(running[:clients]); n != clients+spare {
				t.Errorf("%d requests of %d clients run, want %d", n, clients, clients+spare)
			}

			client, server := socketpair(t)
			defer client.Close()
			h.serves.Go(func() { h.s.ServeTransmission(h.ctx, server, ""); server.Close() })
			conns[clients] = &nbdtest.Client{Conn: client}
			send(clients)
			eventually(t, "all of the kernel's run", func() bool { return running[clients].Load() == inFlight })

			// What the first client had goes to the others, of which each has one stuck.
			open[0]()
			answered(0, inFlight)
			eventually(t, "others go on", func() bool { return all(running[1:clients]) == clients-1+spare })
			for i := range gates {
				open[i]()
			}
			for i := 1; i < len(conns); i++ {
				answered(i, inFlight)
			}
		})
	}
}

// nullFiles are what a nullDevice reads and writes with io_uring.
var nullFiles = sync.OnceValue(func() (fds [2]int) {
	for i, name := range []string{"/dev/zero", "/dev/null"} {
		fd, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			panic(err)
		}
		fds[i] = fd
	}
	return fds
})

func (nullDevice) Async() bool { return true }

func (nullDevice) BeginRead([]byte, int64) (fd int, at int64, ok bool) {
	return nullFiles()[0], 0, true
}

func (nullDevice) EndRead(_ []byte, _ int64, n int, err error) (int, error) { return n, err }

func (nullDevice) BeginWrite([]byte, int64, bool) (fd int, at int64, ticket uint64, ok bool) {
	return nullFiles()[1], 0, 0, true
}

func (nullDevice) EndWrite(_ []byte, _ int64, _ bool, _ uint64, n int, err error) (int, error) {
	return n, err
}
