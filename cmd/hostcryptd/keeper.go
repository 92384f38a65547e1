package main

import (
	"context"
	"debug/elf"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/sector"
	"hostcryptd/systemd"
)

// With --attach there are two processes. The keeper, which the service manager
// started, does no I/O and opens nothing: it holds what a server needs to go on
// where another ended, and starts the next. Its child, the server, does everything
// else. What is held are descriptors by name (held below), and a serverState. They
// talk over a socket pair, in packets, each with at most one descriptor:
// keeperOrder goes down and keeperMessage up.
//
// A server that was started stands by: it prepares what it can, says so, and
// waits for its turn (keeperLink.standBy).
//
// How a killed server is replaced:
//
//  1. Its sockets are closed with it. The kernel finds that its device's
//     connection is dead, and lets requests wait (Config.DeadConnTimeout).
//  2. It is the turn of the next server: with --swap one stands by all the time,
//     else it is started, from a copy of the program that is locked in memory, as
//     the file may be on the device that is to be recovered.
//  3. That opens the backing device anew and waits for the fence: until the last
//     I/O of the dead one has ended. See sector.Device.Fence.
//  4. It takes the key from the secret memory, and neither asks a vault nor reads
//     the header.
//  5. It gives the kernel new sockets, and the kernel sends again what had not
//     been answered.
//
// How a running server is replaced by one of another version (reload):
//
//  1. A server of the program that is now on disk is started. It is shown the
//     state that it will have to go on with, and says that it can; else nothing
//     was changed.
//  2. The server that runs is told to leave. It goes on to the end of a request,
//     answers what it has, and gives the kernel's sockets to the keeper. The kernel
//     sees nothing of it.
//  3. The new one gets them, passes the fence, takes the key and serves. If it dies
//     before it does, the one before is started again.
//  4. The keeper executes the new program itself, which keeps its process and what
//     it holds.

// Environment of processes that are part of this.
const (
	serverEnv = "HOSTCRYPTD_SERVER" // of a server: it has a keeper, at keeperFD
	keeperEnv = "HOSTCRYPTD_KEEPER" // of a keeper: the descriptor of a keeperState
	keeperFD  = 3
)

// Names of what is held.
const (
	heldDevice    = "device"    // the backing device, opened exclusively; no I/O is done on it
	heldKey       = "key"       // a sector.Handover
	heldControl   = "control"   // the control socket
	heldListener  = "listen"    // the socket of --listen
	heldTCP       = "tcp"       // that of --tcp
	heldInherited = "inherited" // and a number: from the service manager
	heldKernel    = "kernel"    // and a number: sockets of the kernel device, while no server has them
)

// A keeperMessage goes from a server to its keeper.
type keeperMessage struct {
	Standby bool            `json:"standby,omitempty"` // it is prepared
	Version string          `json:"version,omitempty"` // with Standby
	Hold    string          `json:"hold,omitempty"`    // keep the descriptor under this name
	State   json.RawMessage `json:"state,omitempty"`   // a serverState
	Notify  []string        `json:"notify,omitempty"`  // tell the service manager
	Ready   bool            `json:"ready,omitempty"`   // it serves
	Reload  bool            `json:"reload,omitempty"`  // it wants to be replaced
	Left    bool            `json:"left,omitempty"`    // it has left: nothing of it is under way
	Over    bool            `json:"over,omitempty"`    // it ends because it wants to
	Pin     string          `json:"pin,omitempty"`     // why it must not be replaced, until Unpin
	Unpin   bool            `json:"unpin,omitempty"`
}

// A keeperOrder goes from the keeper to a server.
type keeperOrder struct {
	Prepare bool            `json:"prepare,omitempty"` // with the State of now, if there is one
	Reload  bool            `json:"reload,omitempty"`  // with Prepare: another one serves as long as that isn't done
	Hold    string          `json:"hold,omitempty"`    // here is what is held under this name
	Go      bool            `json:"go,omitempty"`      // serve, with State if there is one
	State   json.RawMessage `json:"state,omitempty"`
	Leave   bool            `json:"leave,omitempty"`   // leave everything to the next server
	Refused string          `json:"refused,omitempty"` // why a reload came to nothing
}

// maxKeeperMessage bounds a packet.
const maxKeeperMessage = 64 << 10

const (
	// prepareTimeout is how long a server may take to stand by.
	prepareTimeout = time.Minute

	// defaultLeaveTimeout is how long one may take to leave. A server of an image file
	// may have to wait for its last requests; then it was too slow for Grace.
	defaultLeaveTimeout = 30 * time.Second
)

// leaveTimeout is defaultLeaveTimeout but in tests.
var leaveTimeout = defaultLeaveTimeout

// A keeper holds what servers leave to each other. One goroutine uses it.
type keeper struct {
	log     *zap.Logger
	swap    bool
	program *program // what servers are started from
	path    string   // of the installed program
	args    []string
	held    map[string]*os.File
	kernel  []*os.File      // sockets that a server has left
	stored  []string        // names of what the service manager keeps
	state   json.RawMessage // nil before there is something to go on with

	active  *child    // serves, or is about to; nil between two
	standby *child    // or nil
	next    *program  // of a reload or restart under way, else nil
	storing bool      // it is a restart: what is held goes to the service manager
	since   time.Time // of the reload

	events  chan keeperEvent
	copying bool        // the program that is installed now is read
	asking  int         // questions whether a signal to stop begins a restart
	alarm   *time.Timer // then wake is due
	wake    func()
	deaths  []time.Time

	flushing func() bool // the server waits for a flush of the device; nil if no key is held

	failed string // why a reload came to nothing that had begun, until the next server serves

	stop   os.Signal    // that it was told to stop by, or nil; each server is told
	wanted wish         // as soon as one serves, and no other is to
	exit   func() error // what ends the keeper; nil as long as nothing does
}

// A wish is what a keeper was asked for and can't do yet.
type wish int

const (
	wantReload wish = iota + 1
	wantRestart
)

// A child is a server process.
type child struct {
	process  *os.Process
	link     *net.UnixConn
	done     chan struct{} // closed when nothing more comes from link
	program  *program
	version  string
	prepared bool
	ready    bool
	told     bool // to leave
	stopping bool // told to stop
	over     bool
	pinned   string          // why it can't be replaced now, or ""
	state    json.RawMessage // as it said last
}

// A keeperEvent is a message from a child, or the end of one. Without a child it is what
// then is called for: the end of something that has to wait for a file.
type keeperEvent struct {
	from *child
	m    keeperMessage
	f    *os.File // or nil
	end  bool
	then func()
}

// beside has f run by a goroutine of its own, and then what it returns by the keeper's.
// All that reads a file is run so: when no server runs, and that may be at any time, the
// file may wait for the server that the keeper is to start.
func (k *keeper) beside(f func() (then func())) {
	go func() { k.events <- keeperEvent{then: f()} }()
}

// A program is a copy of an executable file in memory that nobody can change,
// locked there.
type program struct {
	f    *os.File
	size int
	mem  []byte // the mapping that locks it
}

// keep is the whole life of the keeper. It returns the exit code of the last
// server.
func (a *app) keep(swap bool, inherited []net.Listener, stored map[string]*os.File) (err error) {
	k := &keeper{log: a.daemonLog(true), swap: swap, path: installedAs(), args: os.Args, held: map[string]*os.File{}, events: make(chan keeperEvent)}
	defer k.log.Sync()
	for i, l := range inherited {
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			return err
		}
		k.held[fmt.Sprintf("%s%d", heldInherited, i)] = f
	}
	for name, f := range stored {
		k.stored = append(k.stored, name)
		switch {
		case name == storedState:
			if k.state, err = readMemoryFile(f); err != nil {
				return err
			}
			f.Close()
		case strings.HasPrefix(name, heldKernel):
			k.kernel = append(k.kernel, f)
		default:
			k.hold(name, f)
		}
	}
	if k.program, err = copyProgram("/proc/self/exe"); err != nil {
		return fmt.Errorf("copying the program to memory: %w", err)
	}
	if interp := k.program.interpreter(); interp != "" {
		k.log.Warn("this program is linked dynamically: what starts it must not be on a volume, or no server can be started in place of one that has died; 'make build' makes one that needs nothing", zap.String("interpreter", interp))
	}
	return k.run()
}

// run keeps until the last server has ended.
func (k *keeper) run() error {
	signals := listenToSignals()
	defer signal.Stop(signals)
	// What is needed when the device below is dead must not have to come from
	// it. What the heap still grows by is locked when it is used.
	if err := lockMemory(); err != nil {
		k.log.Warn("the keeper's memory can't be locked (LimitMEMLOCK=); a volume that is used for swap may not survive the death of its server", zap.Error(err))
	}
	k.alarm = time.NewTimer(time.Hour)
	k.alarm.Stop()
	if k.active != nil {
		k.tellStop()
		k.settled()
	} else if err := k.startNext(); err != nil {
		return err
	}
	for k.exit == nil {
		select {
		case s := <-signals:
			k.signal(s)
		case e := <-k.events:
			k.handle(e)
		case <-k.alarm.C:
			if wake := k.wake; wake != nil {
				k.wake = nil
				wake()
			}
		}
	}
	k.dismiss(k.standby)
	return k.exit()
}

// listenToSignals returns where a keeper's signals come from then on. main calls it
// before anything else in a process that is executed by become, see exec.
func listenToSignals() chan os.Signal {
	if keeperSignals == nil {
		keeperSignals = make(chan os.Signal, 8)
	}
	signal.Notify(keeperSignals, unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	return keeperSignals
}

var keeperSignals chan os.Signal

// exec executes a program, and returns if that fails. A service manager says only
// once that a process is to stop, and then waits for its end. Here it would wait for
// ever, or there would be no keeper any more: a signal that was taken before the
// execve(2) may not have come as far as the channel, and between that and
// listenToSignals nobody takes one. Blocking them doesn't help, as Go's runtime
// unblocks in all threads what ends a process, before it has its handlers. So they are
// ignored meanwhile, and then the service manager is asked: what it sent before, it
// knows of, and what it sends later is heard.
//
// This is why the unit has KillSignal=SIGINT. As to SIGINT and SIGHUP, the runtime
// leaves it at that when they are ignored at the start. SIGTERM ends the process from
// the runtime's start to listenToSignals, which are some milliseconds.
func (k *keeper) exec(path string, env []string) error {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	err := unix.Exec(path, k.args, env)
	listenToSignals()
	k.askForStop()
	return err
}

// askForStop has the keeper told by a signal if the service manager waits for its end.
func (k *keeper) askForStop() {
	go func() {
		if stopJob(k.log) {
			keeperSignals <- unix.SIGINT
		}
	}()
}

// after has f called in a while, instead of what was to be called before.
func (k *keeper) after(d time.Duration, f func()) {
	k.wake = f
	k.alarm.Reset(d)
}

func (k *keeper) cancelWake() {
	k.wake = nil
	k.alarm.Stop()
}

func (k *keeper) signal(s os.Signal) {
	switch {
	case s == unix.SIGHUP:
		k.reload(false)
	case k.stop == nil && k.state != nil:
		k.asking++
		size := k.storeSize()
		k.beside(func() func() {
			restart := restartJob(k.log, size)
			return func() {
				k.asking--
				if restart && k.stop == nil {
					k.restart()
				} else {
					k.stops(s)
				}
			}
		})
	default:
		k.stops(s)
	}
}

// stops begins the end. A server that dies before it has stopped leaves that to the next
// one, which has to take the device back before it can let it go.
func (k *keeper) stops(s os.Signal) {
	k.stop = s
	if k.next != nil && k.active != nil && !k.active.told {
		k.refuse("it is stopping")
	}
	k.tellStop()
}

// tellStop tells the server that it is to stop, if that is so. One that has to take
// the device back first is told when it has: on its way there it would fail by it, as
// would the next. One that was told to leave has to do that. It is told once: at its
// end it doesn't listen any more.
func (k *keeper) tellStop() {
	if c := k.active; k.stop != nil && c != nil && !c.told && !c.stopping && (c.ready || k.state == nil) {
		c.stopping = true
		c.process.Signal(k.stop)
	}
}

func (k *keeper) handle(e keeperEvent) {
	if e.then != nil {
		e.then()
		return
	}
	c := e.from
	if e.end {
		c.link.Close()
		status, err := c.process.Wait()
		if err != nil {
			k.log.Error("waiting for a server", zap.Error(err))
		}
		switch c {
		case k.active:
			k.active = nil
			k.ended(c, status)
		case k.standby:
			k.standby = nil
			k.standbyEnded(status)
		}
		return
	}
	if e.f != nil && e.m.Hold != "" && c == k.active {
		k.hold(e.m.Hold, e.f)
	} else if e.f != nil {
		e.f.Close()
	}
	if e.m.Standby && !c.prepared {
		c.prepared, c.version = true, e.m.Version
		k.standsBy()
	}
	if c != k.active {
		return
	}
	c.over = c.over || e.m.Over
	if e.m.State != nil {
		c.state = e.m.State
		if k.next == nil || c.program != k.next {
			k.state = c.state
		}
	}
	if e.m.Notify != nil {
		if err := notifyManager(e.m.Notify...); err != nil {
			k.log.Warn("service manager was not notified", zap.Error(err))
		}
	}
	if e.m.Pin != "" {
		c.pinned = e.m.Pin
		k.log.Info("the server can't be replaced now", zap.String("why", c.pinned))
	}
	switch {
	case e.m.Unpin:
		c.pinned = ""
		k.unpinned()
	case e.m.Ready && !c.ready:
		c.ready = true
		k.state = c.state
		k.serves(c)
	case e.m.Left:
		k.active = nil
		k.hasLeft()
	case e.m.Reload:
		k.reload(false)
	}
}

// hold keeps a descriptor.
func (k *keeper) hold(name string, f *os.File) {
	if strings.HasPrefix(name, heldKernel) {
		k.kernel = append(k.kernel, f)
		return
	}
	if old := k.held[name]; old != nil {
		old.Close()
	}
	k.held[name] = f
	if name == heldKey {
		var err error
		if k.flushing, err = sector.LockHandover(f); err != nil {
			k.log.Warn("while no server runs, the volume's key could be swapped out", zap.Error(err))
		}
	}
}

// startNext starts a server whose turn it is as soon as it stands by.
func (k *keeper) startNext() error {
	if k.standby != nil {
		return nil
	}
	c, err := k.start(k.program)
	if err != nil {
		return err
	}
	k.standby = c
	return nil
}

// proceed makes it the turn of the server that stands by, or starts one.
func (k *keeper) proceed() {
	if k.active != nil {
		return
	}
	k.cancelWake() // keepStandby's too, which would keep standsBy from coming here
	if c := k.standby; c != nil && c.prepared {
		k.standby = nil
		k.release(c)
		return
	}
	if err := k.startNext(); err != nil {
		k.log.Error("the next server can't be started; I/O waits", zap.Error(err))
		k.after(time.Second, k.proceed)
	}
}

// standsBy is called when a server is prepared.
func (k *keeper) standsBy() {
	switch {
	case k.active == nil && k.wake == nil:
		k.proceed()
	case k.next != nil && k.standby != nil && k.standby.program == k.next && k.active != nil && k.active.pinned == "":
		k.log.Info("the server leaves the volume to another", zap.String("version", k.standby.version), zap.Bool("restart", k.storing))
		k.since = time.Now()
		k.active.told = true
		k.order(k.active, keeperOrder{Leave: true}, nil)
		k.waitLeft()
	}
}

// waitLeft bounds how long the active server takes to leave.
func (k *keeper) waitLeft() {
	k.after(leaveTimeout, func() {
		if why := k.active.pinned; why != "" {
			k.log.Warn("the server can't leave yet", zap.String("why", why))
			k.waitLeft()
			return
		}
		if k.flushing != nil && k.flushing() {
			// It would have to be waited for anyway, see sector.Device.Fence. A server
			// that hangs itself is found by its own watchdog.
			k.log.Warn("the server can't leave yet", zap.String("why", "it waits for a flush of the disk; if it were killed, nobody would be told how that ended"))
			k.waitLeft()
			return
		}
		// The kernel sends its last requests again, when they are over.
		k.log.Error("the server does not leave, as its last requests take too long; it is killed")
		k.active.process.Kill()
	})
}

// unpinned is called when the active server can be replaced again.
func (k *keeper) unpinned() {
	switch {
	case k.active.told: // it was pinned when it had been told to leave, and didn't know yet
		k.waitLeft()
	case k.next != nil && k.standby != nil && k.standby.prepared:
		k.standsBy()
	default:
		k.settled()
	}
}

// standbyEnded is called when one has ended that was not its turn yet.
func (k *keeper) standbyEnded(p *os.ProcessState) {
	how := describeDeath(p)
	switch {
	case k.next != nil && k.active != nil:
		k.refuse("the new program did not come up: " + how)
	case k.active == nil && k.state == nil:
		k.ended(&child{over: true}, p) // the first one: its own message says why
	case k.active == nil:
		if k.next != nil {
			k.failed = "the new program died before it served: " + how
			k.next = nil
		}
		k.log.Error("a server died before it served", zap.String("how", how))
		if p.Exited() {
			k.backToTabLine()
		}
		k.after(time.Second, k.proceed)
	case k.swap:
		k.log.Error("the server that stood by has died; another one is started", zap.String("how", how))
		k.after(time.Second, k.keepStandby)
	}
}

// ended is called when the active server has ended without leaving.
func (k *keeper) ended(c *child, p *os.ProcessState) {
	status := p.Sys().(syscall.WaitStatus)
	if c.over || k.state == nil {
		k.exit = func() error {
			if status.Signaled() {
				return fmt.Errorf("the server was killed by signal %d (%v) before it served", int(status.Signal()), status.Signal())
			}
			if code := status.ExitStatus(); code != 0 {
				return &silentError{code}
			}
			return nil
		}
		return
	}
	if k.next != nil && c.told {
		k.log.Error("the server has died while it was to leave", zap.String("how", describeDeath(p)))
		k.hasLeft()
		return
	}
	if k.next != nil {
		k.refuse("the server died: " + describeDeath(p))
	} else if !c.ready && p.Exited() {
		k.backToTabLine()
	}
	if k.wanted == wantRestart && k.active == nil {
		// Put off until a server would be ready that never was: what comes after
		// the restart may do better.
		k.wanted = 0
		if k.handOver() {
			return
		}
	}
	now := time.Now()
	k.deaths = append(slices.DeleteFunc(k.deaths, func(t time.Time) bool { return now.Sub(t) > time.Minute }), now)
	wait := time.Duration(0)
	if n := len(k.deaths); n > 3 {
		wait = min(100*time.Millisecond<<min(n-4, 10), 5*time.Second)
	}
	if wait == 0 {
		k.proceed()
	} else {
		k.after(wait, k.proceed)
	}
	k.log.Error("the server has died; another one goes on, and I/O waits for it",
		zap.String("how", describeDeath(p)), zap.Int("deaths_in_a_minute", len(k.deaths)), zap.Duration("wait", wait))
}

// serves is called when a server has begun to.
func (k *keeper) serves(c *child) {
	k.failed = ""
	if k.next != nil && c.program == k.next {
		k.log.Info("another server has taken over", zap.String("version", c.version), zap.Duration("took", time.Since(k.since)))
		k.cancelWake()
		k.program.close()
		k.program, k.next = k.next, nil
		if err := k.become(); err != nil {
			k.log.Error("the keeper itself goes on with the old version", zap.Error(err))
			k.reloadIsOver()
		}
	}
	k.tellStop()
	k.settled()
}

// settled is called when a server serves and no other is to.
func (k *keeper) settled() {
	if k.active == nil || !k.active.ready || k.active.pinned != "" || k.next != nil || k.copying {
		return
	}
	w := k.wanted
	k.wanted = 0
	switch w {
	case wantReload:
		k.reload(false)
	case wantRestart:
		k.reload(true)
	default:
		k.keepStandby()
	}
}

// keepStandby has a server stand by if there should always be one.
func (k *keeper) keepStandby() {
	if !k.swap || k.standby != nil || k.active == nil {
		return
	}
	if err := k.startNext(); err != nil {
		k.log.Error("no server can be had that stands by; another try follows", zap.Error(err))
		k.after(5*time.Second, k.keepStandby)
	}
}

// reload has the program that is on disk now take over, from this process too.
// With store, it is the service manager that will start it.
func (k *keeper) reload(store bool) {
	if k.next != nil || k.copying {
		return // it is under way
	}
	if k.stop != nil {
		k.refuse("it is stopping")
		return
	}
	if k.active != nil && k.putOff(store) {
		return
	}
	usec := int64(0)
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) == nil {
		usec = now.Nano() / 1000
	}
	if k.active != nil && !store {
		if err := systemd.Notify(systemd.Reloading, fmt.Sprintf("MONOTONIC_USEC=%d", usec)); err != nil {
			k.log.Warn("service manager was not notified", zap.Error(err))
		}
	}
	k.copying = true
	k.beside(func() func() {
		next, err := copyProgram(k.path)
		return func() {
			k.copying = false
			k.reloadWith(next, err, store)
		}
	})
}

// putOff tells whether a reload has to wait, which it then does.
func (k *keeper) putOff(store bool) bool {
	if k.active.ready && k.active.pinned == "" {
		return false
	}
	if k.active.ready {
		k.log.Warn("the reload waits", zap.String("why", k.active.pinned))
	}
	w := wantReload
	if store {
		w = wantRestart
	}
	k.wanted = max(k.wanted, w) // as soon as it can be
	return true
}

// reloadWith goes on with a reload when the program that is on disk now was copied, or
// could not be. The server may have ended meanwhile.
func (k *keeper) reloadWith(next *program, err error, store bool) {
	if err != nil {
		k.storing = store && k.active != nil
		k.refuse(err.Error())
		if store && k.active == nil {
			k.handOver()
		}
		return
	}
	switch {
	case k.stop != nil:
		next.close()
		k.refuse("it is stopping")
		return
	case k.active == nil && store:
		next.close()
		k.handOver()
		return
	case k.active == nil:
		// What is installed now may be able to serve where this program isn't.
		k.program.close()
		k.program = next
		k.dropStandby()
		k.after(0, k.proceed)
		return
	case k.putOff(store):
		next.close()
		return
	}
	k.dropStandby()
	k.next, k.storing = next, store
	c, err := k.start(next)
	if err != nil {
		k.refuse(err.Error())
		return
	}
	k.standby = c
	k.after(prepareTimeout, func() {
		why := "the new program was not ready in " + prepareTimeout.String()
		if k.active.pinned != "" && c.prepared {
			why = k.active.pinned
		}
		k.refuse(why)
	})
}

// restart leaves the volume to the process that the service manager starts next.
func (k *keeper) restart() {
	switch {
	case k.active == nil:
		// This version can't go on with the state; the next one may.
		k.handOver()
	case k.next != nil || k.copying || !k.active.ready || k.active.pinned != "":
		k.wanted = wantRestart
	default:
		k.reload(true)
	}
}

// refuse ends a reload: everything stays as it was.
func (k *keeper) refuse(why string) {
	k.log.Error("the volume stays with the server that it has", zap.String("why", why))
	if k.next != nil {
		k.cancelWake()
		if k.standby != nil && k.standby.program == k.next {
			k.dropStandby()
		}
		k.next.close()
		k.next = nil
	}
	stop := k.storing
	k.storing = false
	if k.active == nil {
		k.failed = why // who asked for it asks the next server
		return
	}
	if !stop && k.stop == nil {
		k.reloadIsOver()
	}
	k.order(k.active, keeperOrder{Refused: why}, nil)
	if stop {
		// The service manager waits for the end of this process all the same.
		k.stop = unix.SIGTERM
		k.tellStop()
	} else if k.stop != nil {
		return
	}
	k.settled()
}

// reloadIsOver tells the service manager. It has to hear of that before who has asked
// for a reload hears that it failed, and ends with that: else it waits for this
// message then, and takes the reload for done when it comes.
func (k *keeper) reloadIsOver() {
	if err := systemd.Notify(systemd.Ready); err != nil {
		k.log.Warn("service manager was not notified", zap.Error(err))
	}
}

// hasLeft is called when the active server has left.
func (k *keeper) hasLeft() {
	k.cancelWake()
	if !k.storing {
		k.proceed()
		return
	}
	k.dropStandby()
	k.next.close()
	k.next, k.storing = nil, false
	if !k.handOver() {
		k.proceed()
	}
}

// handOver gives what is held to the service manager, and ends. If that can't be, it
// is a stop, for the service manager waits for the end of this process.
func (k *keeper) handOver() bool {
	if err := k.store(); err != nil {
		k.log.Error("the service manager can't keep what the next server needs; this process goes on, and the volume stops as soon as nobody uses it", zap.Error(err))
		k.stop = unix.SIGTERM
		return false
	}
	k.log.Info("the service manager keeps what the next server needs")
	k.exit = func() error { return nil }
	return true
}

// release makes it the turn of a server.
func (k *keeper) release(c *child) {
	k.active = c
	k.cancelWake()
	k.forgetStored()
	ok := true
	for name, f := range k.held {
		ok = k.order(c, keeperOrder{Hold: name}, f) && ok
	}
	for i, f := range k.kernel {
		ok = k.order(c, keeperOrder{Hold: fmt.Sprintf("%s%d", heldKernel, i)}, f) && ok
		// Only the server may have it: the kernel sees by its end that it died.
		f.Close()
	}
	k.kernel = nil
	if k.failed != "" {
		k.reloadIsOver()
		ok = k.order(c, keeperOrder{Refused: k.failed}, nil) && ok
	}
	c.state = k.state
	if !ok {
		c.process.Kill() // it must not go on without what it didn't get
		return
	}
	k.order(c, keeperOrder{Go: true, State: k.state}, nil)
	k.tellStop()
}

// order tells a server something, and whether it could. One that has died is found
// out elsewhere.
func (k *keeper) order(c *child, o keeperOrder, f *os.File) bool {
	err := sendPacket(c.link, o, f)
	if err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		k.log.Error("a server was not told", zap.Error(err))
	}
	return err == nil
}

// dropStandby ends the server that stands by.
func (k *keeper) dropStandby() {
	c := k.standby
	k.standby = nil
	k.dismiss(c)
}

// dismiss ends a server whose turn it never was.
func (k *keeper) dismiss(c *child) {
	if c != nil {
		c.process.Kill() // it is waited for when its link has ended
	}
}

// A silentError is an exit code whose reason another process has printed.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func describeDeath(p *os.ProcessState) string {
	s := p.Sys().(syscall.WaitStatus)
	if s.Signaled() {
		return fmt.Sprintf("signal %d (%v)", int(s.Signal()), s.Signal())
	}
	return fmt.Sprintf("exit code %d", s.ExitStatus())
}

// start starts a server.
func (k *keeper) start(p *program) (*child, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	theirs, ours := os.NewFile(uintptr(pair[1]), "keeper"), os.NewFile(uintptr(pair[0]), "server")
	defer theirs.Close()
	link, err := packetConn(ours)
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		link.Close()
		return nil, err
	}
	defer null.Close()
	process, err := os.StartProcess(fmt.Sprintf("/proc/self/fd/%d", p.f.Fd()), k.args, &os.ProcAttr{
		Env:   append(os.Environ(), serverEnv+"=1"),
		Files: []*os.File{null, os.Stdout, os.Stderr, theirs},
	})
	if err != nil {
		link.Close()
		return nil, fmt.Errorf("starting the server: %w", err)
	}
	c := &child{process: process, link: link, program: p, done: make(chan struct{})}
	k.order(c, keeperOrder{Prepare: true, Reload: p == k.next, State: k.state}, nil)
	go k.listen(c)
	return c, nil
}

// listen passes on what a child says. The link ends with the child: nobody else
// has its end.
func (k *keeper) listen(c *child) {
	defer close(c.done)
	for died := false; ; {
		var m keeperMessage
		f, err := receivePacket(c.link, &m)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return // stopped
		}
		if errors.Is(err, unix.ECONNRESET) && !died {
			// It died and has not read all. The kernel says so before it gives out what
			// the child had said, which may be that there is a kernel device.
			died = true
			continue
		}
		k.events <- keeperEvent{from: c, m: m, f: f, end: err != nil}
		if err != nil {
			return
		}
	}
}

// A keeperState is what a keeper leaves to itself when it executes another
// program. Descriptors are numbers.
type keeperState struct {
	Version int             `json:"version"`
	Swap    bool            `json:"swap"`
	Path    string          `json:"path"`
	Program int             `json:"program"`
	Held    map[string]int  `json:"held"`
	State   json.RawMessage `json:"state"`
	PID     int             `json:"pid"`     // of the server
	Link    int             `json:"link"`    // to it
	Stop    unix.Signal     `json:"stop"`    // that the keeper was told to stop by, or 0
	Stopped bool            `json:"stopped"` // the server was told
	Pinned  string          `json:"pinned"`  // as of the server
	Wanted  wish            `json:"wanted"`
}

const keeperStateVersion = 1

// become executes the program from which servers are started now. It returns if
// that fails.
func (k *keeper) become() error {
	c := k.active
	// What has been read from the link must have been heard.
	if err := c.link.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	for stopped := false; !stopped; {
		select {
		case <-c.done:
			stopped = true
		case e := <-k.events:
			k.handle(e)
			if k.active != c || c.over || k.next != nil {
				return errors.New("something else came first")
			}
		}
	}
	defer func() { // it has failed
		_ = c.link.SetReadDeadline(time.Time{})
		c.done = make(chan struct{})
		go k.listen(c)
	}()
	s := keeperState{Version: keeperStateVersion, Swap: k.swap, Path: k.path, Held: map[string]int{}, PID: c.process.Pid}
	var pass []*os.File // open across the exec
	keep := func(f *os.File) (int, error) {
		n, err := descriptor(f)
		if err != nil {
			return 0, err
		}
		fd, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD, 3)
		if err == nil {
			pass = append(pass, os.NewFile(uintptr(fd), "passed"))
		}
		return fd, err
	}
	defer func() {
		for _, f := range pass {
			f.Close()
		}
	}()
	link, err := c.link.File()
	if err != nil {
		return err
	}
	defer link.Close()
	if s.Link, err = keep(link); err != nil {
		return err
	}
	if s.Program, err = keep(k.program.f); err != nil {
		return err
	}
	for name, f := range k.held {
		if s.Held[name], err = keep(f); err != nil {
			return err
		}
	}
	k.log.Sync()
	for len(keeperSignals) > 0 || k.asking > 0 {
		select {
		case s := <-keeperSignals:
			k.signal(s)
		case e := <-k.events:
			k.handle(e)
		}
	}
	if k.active != c || c.over || k.next != nil || k.copying || k.exit != nil {
		return errors.New("a signal came first")
	}
	s.State, s.Wanted, s.Pinned = k.state, k.wanted, c.pinned
	if k.stop != nil {
		s.Stop, s.Stopped = k.stop.(unix.Signal), c.stopping
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := memoryFile("hostcryptd-keeper", b)
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := keep(f)
	if err != nil {
		return err
	}
	return k.exec(fmt.Sprintf("/proc/self/fd/%d", s.Program), append(os.Environ(), fmt.Sprintf("%s=%d", keeperEnv, fd)))
}

// resume goes on with what another version of this process has left; ok is false
// if there is nothing.
func (a *app) resume() (ok bool, err error) {
	text, ok := os.LookupEnv(keeperEnv)
	if !ok {
		return false, nil
	}
	os.Unsetenv(keeperEnv)
	fd, err := strconv.Atoi(text)
	if err != nil {
		return true, fmt.Errorf("$%s is %.20q", keeperEnv, text)
	}
	open := func(fd int, name string) *os.File {
		unix.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), name)
	}
	f := open(fd, "keeper")
	defer f.Close()
	b, err := readMemoryFile(f)
	if err != nil {
		return true, err
	}
	var s keeperState
	if err := json.Unmarshal(b, &s); err != nil {
		return true, fmt.Errorf("what the keeper has left: %w", err)
	}
	k := &keeper{log: a.daemonLog(true), swap: s.Swap, path: s.Path, args: os.Args, held: map[string]*os.File{}, state: s.State, wanted: s.Wanted, events: make(chan keeperEvent)}
	defer k.log.Sync()
	if s.Stop != 0 {
		k.stop = s.Stop
	}
	k.program = &program{f: open(s.Program, "program")}
	if fi, err := k.program.f.Stat(); err == nil {
		k.program.size = int(fi.Size())
	}
	k.program.lock()
	for name, fd := range s.Held {
		k.hold(name, open(fd, name))
	}
	c := &child{program: k.program, version: version(), prepared: true, ready: true, stopping: s.Stopped, pinned: s.Pinned, state: s.State, done: make(chan struct{})}
	if c.link, err = packetConn(open(s.Link, "server")); err != nil {
		return true, err
	}
	if c.process, err = os.FindProcess(s.PID); err != nil {
		return true, err
	}
	k.active = c
	go k.listen(c)
	k.askForStop()
	k.log.Info("the keeper goes on with this version", zap.String("version", version()))
	if err := systemd.Notify(systemd.Ready); err != nil {
		k.log.Warn("service manager was not notified", zap.Error(err))
	}
	return true, k.run()
}

// installedAs is the path that a process was started from, which may hold another
// program by now. argv[0] may be no path: systemd-shutdown wants an @ there.
func installedAs() string {
	path, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return ""
	}
	return strings.TrimSuffix(path, " (deleted)")
}

// copyProgram copies a program to memory that nobody can change, and locks it
// there.
func copyProgram(name string) (_ *program, err error) {
	src, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("hostcryptd", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("hostcryptd", flags)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "hostcryptd")
	defer f.Close()
	n, err := io.Copy(f, src)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	// A descriptor that is open for writing can't be executed.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	p := &program{f: ro, size: int(n)}
	p.lock()
	return p, nil
}

// interpreter is the program that the kernel has to load in order to start this one,
// and "" if there is none. The copy in memory doesn't hold it, nor what it loads.
func (p *program) interpreter() string {
	f, err := elf.NewFile(p.f)
	if err != nil {
		return ""
	}
	for _, part := range f.Progs {
		if part.Type != elf.PT_INTERP || part.Filesz > unix.PathMax {
			continue
		}
		name, _ := io.ReadAll(part.Open())
		return strings.TrimRight(string(name), "\x00")
	}
	return ""
}

// lock keeps a program in memory, as long as this process doesn't execute
// another. That it may not is said by Mlockall.
func (p *program) lock() {
	if b, err := unix.Mmap(int(p.f.Fd()), 0, p.size, unix.PROT_READ, unix.MAP_SHARED); err == nil {
		_ = unix.Mlock(b)
		p.mem = b
	}
}

func (p *program) close() {
	if p.mem != nil {
		_ = unix.Munmap(p.mem)
	}
	p.f.Close()
}

// memoryFile returns a file in memory that holds b.
func memoryFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// readMemoryFile returns what memoryFile was given.
func readMemoryFile(f *os.File) ([]byte, error) {
	return io.ReadAll(io.NewSectionReader(f, 0, 16*maxKeeperMessage))
}

// packetConn makes a connection of a socket, which it takes over.
func packetConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// sendPacket sends a message, with a descriptor or nil.
func sendPacket(c *net.UnixConn, m any, f *os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxKeeperMessage {
		return fmt.Errorf("a message of %d bytes between server and keeper", len(b))
	}
	if f == nil {
		_, _, err = c.WriteMsgUnix(b, nil, nil)
		return err
	}
	fd, err := descriptor(f)
	if err == nil {
		_, _, err = c.WriteMsgUnix(b, unix.UnixRights(fd), nil)
	}
	runtime.KeepAlive(f)
	return err
}

// descriptor is f.Fd(), which would make a socket block, for all who share it. The
// caller keeps f alive.
func descriptor(f *os.File) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}

// receivePacket receives a message, and its descriptor or nil.
func receivePacket(c *net.UnixConn, m any) (f *os.File, err error) {
	b, oob := make([]byte, maxKeeperMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, err
	}
	if list, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(list) == 1 {
		if fds, err := unix.ParseUnixRights(&list[0]); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			f = os.NewFile(uintptr(fds[0]), "held")
		}
	}
	return f, json.Unmarshal(b[:n], m)
}

// A keeperLink is the server's end. A nil one stands for no keeper.
type keeperLink struct {
	conn *net.UnixConn
	held map[string]*os.File

	pid  int         // of the keeper
	dead atomic.Bool // it is
	left atomic.Bool // this server has left, and the keeper has no more use for it

	leave    chan struct{} // closed when the server is to leave
	rollback string        // why the server that came by a reload is not this one

	asking  sync.Mutex // guards what follows
	refusal *refusal   // that is waited for, or nil

	mu sync.Mutex // one message at a time
}

// openKeeperLink returns the link to the keeper of this process, or nil.
func openKeeperLink() (*keeperLink, error) {
	if _, ok := os.LookupEnv(serverEnv); !ok {
		return nil, nil
	}
	os.Unsetenv(serverEnv)
	unix.CloseOnExec(keeperFD)
	conn, err := packetConn(os.NewFile(keeperFD, "keeper"))
	if err != nil {
		return nil, fmt.Errorf("$%s is set, but there is no keeper: %w", serverEnv, err)
	}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData("hostcryptd\x00"))), 0, 0, 0) // not the number of a descriptor
	return &keeperLink{conn: conn, pid: os.Getppid(), held: map[string]*os.File{}, leave: make(chan struct{})}, nil
}

// A refusal is why a reload came to nothing.
type refusal struct {
	came chan struct{} // closed when it has come
	why  string
}

// nextRefusal returns the one that comes next, to all who ask.
func (k *keeperLink) nextRefusal() *refusal {
	k.asking.Lock()
	defer k.asking.Unlock()
	if k.refusal == nil {
		k.refusal = &refusal{came: make(chan struct{})}
	}
	return k.refusal
}

func (k *keeperLink) refuse(why string) {
	k.asking.Lock()
	defer k.asking.Unlock()
	if r := k.refusal; r != nil {
		r.why, k.refusal = why, nil
		close(r.came)
	}
}

// errNoTurn means that the keeper has ended, or has no use for this server.
var errNoTurn = errors.New("it never was this server's turn")

// standBy has prepare do what can be done early, which at a reload may be to find that
// this server is of no use. It returns when it is this server's turn, with the state to
// go on with or nil.
func (k *keeperLink) standBy(ctx context.Context, prepare func(reload bool) error) (*serverState, error) {
	defer context.AfterFunc(ctx, func() { k.conn.SetReadDeadline(time.Unix(1, 0)) })()
	for {
		var o keeperOrder
		f, err := receivePacket(k.conn, &o)
		if err != nil {
			return nil, errNoTurn
		}
		if f != nil {
			k.held[o.Hold] = f
		}
		switch {
		case o.Prepare:
			if _, err := parseState(o.State); err != nil {
				return nil, err
			}
			if err := prepare(o.Reload); err != nil {
				return nil, err
			}
			if err := k.send(keeperMessage{Standby: true, Version: version()}, nil); err != nil {
				return nil, err
			}
		case o.Refused != "":
			k.rollback = o.Refused
		case o.Go:
			return parseState(o.State)
		}
	}
}

// listen listens to the keeper, for as long as this server runs.
func (k *keeperLink) listen(log *zap.Logger) {
	if k == nil {
		return
	}
	_ = k.conn.SetReadDeadline(time.Time{})
	left := false
	for {
		var o keeperOrder
		f, err := receivePacket(k.conn, &o)
		if err != nil {
			k.dead.Store(true)
			if k.left.Load() {
				return // it was the keeper that ended this
			}
			log.Error("the keeper has died; this server goes on, but nothing replaces it if it dies", zap.Error(err))
			return
		}
		if f != nil {
			f.Close()
		}
		if o.Leave && !left {
			left = true
			close(k.leave)
		}
		if o.Refused != "" {
			k.refuse(o.Refused)
		}
	}
}

// keeper is the process of the keeper, or 0 if there is none, or none any more. The
// parent of this process is another one then.
func (k *keeperLink) keeper() int {
	if k == nil || k.dead.Load() {
		return 0
	}
	return k.pid
}

// leaving is closed when this server is to leave.
func (k *keeperLink) leaving() <-chan struct{} {
	if k == nil {
		return nil
	}
	return k.leave
}

// take returns what is held under a name, or nil, and forgets it.
func (k *keeperLink) take(name string) *os.File {
	if k == nil {
		return nil
	}
	f := k.held[name]
	delete(k.held, name)
	return f
}

// takeKernel returns the sockets of the kernel device that the server before has
// left.
func (k *keeperLink) takeKernel() (list []*net.UnixConn, err error) {
	if k == nil {
		return nil, nil
	}
	for name, f := range k.held {
		if !strings.HasPrefix(name, heldKernel) {
			continue
		}
		delete(k.held, name)
		c, err := packetConn(f)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// send sends a message, with a descriptor or nil.
func (k *keeperLink) send(m keeperMessage, f *os.File) error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if m.Left {
		k.left.Store(true) // its answer may be faster than this
	}
	return sendPacket(k.conn, m, f)
}
