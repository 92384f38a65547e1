package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

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

// standbyEnded is called when one has ended that was not its turn yet.
func (k *keeper) standbyEnded(p *os.ProcessState) {
	how := describeDeath(p)
	switch {
	case k.next != nil && k.active != nil && (!k.active.told || k.storing):
		k.refuse("the new program did not come up: " + how)
	case k.active == nil && k.state == nil:
		k.ended(&child{over: true}, p) // the first one: its own message says why
	case k.active == nil || k.next != nil:
		if k.next != nil {
			k.failed = "the new program died before it served: " + how
			k.next.close()
			k.next = nil
		}
		k.log.Error("a server died before it served", zap.String("how", how))
		if k.active != nil {
			return // it leaves, as it was told to; then it is the turn of this program again
		}
		if p.Exited() {
			k.backToTabLine()
		}
		k.after(time.Second, k.proceed)
	case k.swap:
		k.log.Error("the server that stood by has died; another one is started", zap.String("how", how))
		k.after(time.Second, k.keepStandby)
	}
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

func describeDeath(p *os.ProcessState) string {
	s := p.Sys().(syscall.WaitStatus)
	if s.Signaled() {
		return fmt.Sprintf("signal %d (%v)", int(s.Signal()), s.Signal())
	}
	return fmt.Sprintf("exit code %d", s.ExitStatus())
}

// A silentError is an exit code whose reason another process has printed.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

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
