package main

import (
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

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

// askForStop has the keeper told by a signal if the service manager waits for its end.
func (k *keeper) askForStop() {
	go func() {
		if stopJob(k.log) {
			keeperSignals <- unix.SIGINT
		}
	}()
}
