package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strings"
	"time"

	"go.uber.org/zap"

	"hostcryptd/sector"
)

// What uses a kernel device must see neither the death of its server nor an upgrade. So
// with --attach there are two processes. The keeper, which the service manager started,
// does no I/O and opens nothing: it holds what a server needs to go on where another
// ended, and starts the next. Its child, the server, does everything else. What is held
// are descriptors by name (heldDevice and so on), and a serverState.
//
//	keeper.go         this: what is held, and the loop in which all of it happens
//	keeperturn.go     whose turn it is: a server is started, stands by, serves, dies
//	keeperreload.go   a running server is replaced by one of another version
//	keeperstop.go     signals, and the end
//	keeperexec.go     the keeper, too, becomes the other version
//	keeperprogram.go  the copy in memory that servers are started from
//	keeperpacket.go   what the two say: keeperOrder goes down and keeperMessage up
//	keeperlink.go     the server's end of that
//	goon.go           what a server does when it goes on, and when it leaves
//	restart.go        'systemctl restart', over which the service manager holds all of it
//
// A server as its keeper sees it, with what the two say in brackets:
//
//	start                standsBy      proceed, release           serves
//	[Prepare] ─► standby ─► [Standby] ─► [Hold, Go] ─► active ─► [Ready] ─► ready
//	                                         ▲                                │
//	                                         ├── ended: it has died ◄─────────┤
//	                                         └── hasLeft: [Left] ◄─ [Leave] ◄─┘ standsBy
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
//
// What always holds:
//
//   - One server is active at most: release is only for when there is none, as the one
//     before has ended or has left. Even then the next waits at the fence.
//   - The kernel's sockets are a server's alone, or, between two, the keeper's alone. The
//     kernel sees by their end that a server died, so no other process may have them.
//   - One goroutine uses the keeper. What reads a file, which may be on the very volume,
//     is run beside it.
//   - What a server of another version says of the state counts when that is ready. Until
//     then the version before can go on.
//   - The keeper ends with a server that wants to end (over), or that dies before there
//     is a state to go on with, or when the service manager has taken all that is held.

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
	heldHeader    = "header"    // what the server keeps of the volume's header, see sector.Volume.KeptHeader
	heldControl   = "control"   // the control socket
	heldListener  = "listen"    // the socket of --listen
	heldTCP       = "tcp"       // that of --tcp
	heldInherited = "inherited" // and a number: from the service manager
	heldKernel    = "kernel"    // and a number: sockets of the kernel device, while no server has them
)

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

// beside has f run by a goroutine of its own, and then what it returns by the keeper's.
// All that reads a file is run so: when no server runs, and that may be at any time, the
// file may wait for the server that the keeper is to start.
func (k *keeper) beside(f func() (then func())) {
	go func() { k.events <- keeperEvent{then: f()} }()
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
