package main

import (
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/systemd"
)

const (
	// prepareTimeout is how long a server may take to stand by.
	prepareTimeout = time.Minute

	// defaultLeaveTimeout is how long one may take to leave. A server of an image file
	// may have to wait for its last requests; then it was too slow for Grace.
	defaultLeaveTimeout = 30 * time.Second
)

// leaveTimeout is defaultLeaveTimeout but in tests.
var leaveTimeout = defaultLeaveTimeout

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
	k.next, k.storing, k.failed = next, store, ""
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
