package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A Host is what a Runner acts on: the volume, and the KEK that opens it. The
// Runner calls one method at a time, each with a context that ends after
// [Runner.Limit]. A panic in Unseal, Probe or Rotate is a transient failure.
type Host interface {
	// Unseal gets the volume key, checks the header with it, and serves: for
	// the first time, or again after a Halt that has wiped the keys. It calls
	// obtained when it has the volume key.
	Unseal(ctx context.Context, obtained func()) Outcome
	// Probe looks whether the KEK still unwraps.
	Probe(ctx context.Context) Outcome
	// Rotate looks for a newer version of the KEK, and rewraps the volume key. Not
	// to be permitted to look is a success.
	Rotate(ctx context.Context) Outcome
	// Halt stops the volume as policy says: what was answered is flushed; for
	// Stop and Freeze the keys are gone when it returns. Stop may follow on Freeze:
	// what waits fails then. It has no time limit.
	Halt(policy Policy)
	// Lift undoes a Halt with the policy ReadOnly.
	Lift()
	// Changed is told of every change of state, of every failure, and of every
	// success, from which the grace period counts, also while another method runs.
	// It must not call the Runner.
	Changed(from State, now Snapshot)
}

// longestWait bounds a wait: time may pass while the machine sleeps, which timers
// don't notice, and the wall clock may be set.
const longestWait = 30 * time.Second

// A clock tells the wall clock's time, and by how much that was set. What a machine
// waits for takes as long as it says, whatever becomes of the wall clock: one that is
// 9 h ahead at boot, and corrected then, would suspend all looks at the KEK for 9 h,
// and make a grace period as much longer. The time that passes while the machine is
// suspended counts, which is why it's not Go's monotonic clock.
type clock struct {
	wall   func() time.Time
	passed func() time.Duration // since any moment, also while suspended

	offset time.Time // of the wall clock when passed was 0
}

// leastStep is less than any error of a clock that matters, and more than what two
// clocks that are read one after the other differ by. A clock that is slewed is no
// matter: the kernel slews both.
const leastStep = time.Second

func newClock() *clock {
	c := &clock{wall: time.Now, passed: sinceBoot}
	c.offset = c.wall().Round(0).Add(-c.passed())
	return c
}

// sinceBoot is CLOCK_BOOTTIME.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // Linux has it since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// read returns the time, and by how much the wall clock was set since it was read
// last.
func (c *clock) read() (now time.Time, step time.Duration) {
	for {
		before := c.passed()
		now = c.wall().Round(0)
		after := c.passed()
		if after-before < leastStep/2 { // else this process was stopped between them
			step = now.Sub(c.offset.Add(after))
			break
		}
	}
	if step.Abs() < leastStep {
		return now, 0
	}
	c.offset = c.offset.Add(step)
	return now, step
}

// ErrGivenUp is in the chain of what Run returns when only a person can help.
var ErrGivenUp = errors.New("it can't work as it is configured")

// ErrEnded is the error of a command that comes when Run has returned, or was about
// to. Nothing was done.
var ErrEnded = errors.New("the life of the key is over in this process")

// A Runner drives a Machine: one goroutine owns all timing. Its methods other
// than Run may be called from any goroutine.
type Runner struct {
	host Host

	// Limit bounds each call that asks the KEK for something. Zero means 90 s:
	// the identity service of a machine that has just booted may take 70.
	Limit time.Duration

	commands chan command
	wake     chan struct{} // capacity 1: the machine has other plans
	ended    chan struct{} // closed when Run returns

	mu      sync.Mutex // guards machine and clock
	machine *Machine
	clock   *clock
}

// A command is an operator's.
type command struct {
	change func(now time.Time) // of the machine
	done   chan struct{}
}

// NewRunner returns a Runner that hasn't begun. c has been checked.
func NewRunner(c Config, host Host) *Runner { return newRunner(New(c, time.Now().Round(0)), host) }

// RestoreRunner is NewRunner with a machine of [Restore].
func RestoreRunner(c Config, s Snapshot, wiped bool, host Host) *Runner {
	return newRunner(Restore(c, s, wiped, time.Now().Round(0)), host)
}

func newRunner(m *Machine, host Host) *Runner {
	return &Runner{host: host, machine: m, clock: newClock(), commands: make(chan command), wake: make(chan struct{}, 1), ended: make(chan struct{})}
}

// Snapshot returns what is known now.
func (r *Runner) Snapshot() Snapshot {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.machine.Snapshot()
}

// Lock stops the volume now and wipes its keys; it stays so until Unlock. It
// returns when that is done, or the error of ctx, or [ErrEnded].
func (r *Runner) Lock(ctx context.Context) error { return r.command(ctx, r.machine.Lock) }

// Unlock takes a Lock back, and tries to unseal now.
func (r *Runner) Unlock(ctx context.Context) error { return r.command(ctx, r.machine.Unlock) }

// Erase stops the volume for good.
func (r *Runner) Erase(ctx context.Context) error { return r.command(ctx, r.machine.Erase) }

// Watch takes over what a change of the KEKs asks for, see [Machine.Watch]. c has
// been checked. It waits for nothing, and ends no attempt that is under way: a
// rewrap may be what has changed the KEK.
func (r *Runner) Watch(c Config) {
	r.update(func(now time.Time) { r.machine.Watch(c, now) })
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *Runner) command(ctx context.Context, change func(now time.Time)) error {
	c := command{change, make(chan struct{})}
	select {
	case r.commands <- c:
	case <-r.ended:
		return ErrEnded
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case <-c.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run does what the machine says until ctx ends, and returns nil then, or an
// error with [ErrGivenUp] when there is nothing left to do. It is called once.
func (r *Runner) Run(ctx context.Context) error {
	defer close(r.ended)
	for {
		var now time.Time
		r.update(func(t time.Time) { now = t })
		r.mu.Lock()
		action, at := r.machine.Next()
		r.mu.Unlock()

		if action == GiveUp {
			s := r.Snapshot()
			return fmt.Errorf("%w: %s", ErrGivenUp, s.Reason)
		}
		if left := at.Sub(now); action == Nothing || left > 0 {
			if !r.wait(ctx, action, left) {
				return nil
			}
			continue
		}
		if ctx.Err() != nil {
			return nil
		}
		r.do(ctx, action)
	}
}

// wait waits for a time, a command, or the end of ctx; it tells whether it
// wasn't the last.
func (r *Runner) wait(ctx context.Context, action Action, d time.Duration) bool {
	var timer <-chan time.Time
	if action != Nothing {
		t := time.NewTimer(min(d, longestWait))
		defer t.Stop()
		timer = t.C
	}
	select {
	case <-ctx.Done():
		return false
	case <-timer:
	case <-r.wake:
	case c := <-r.commands:
		r.obey(c)
	}
	return true
}

// obey carries out a command, and what follows from it at once.
func (r *Runner) obey(c command) {
	defer close(c.done)
	r.update(c.change)
	r.mu.Lock()
	action, _ := r.machine.Next()
	r.mu.Unlock()
	if action == Halt {
		r.do(context.Background(), Halt)
	}
}

// do carries out one action. A command that comes while the KEK is being asked
// ends that attempt: a lock must not wait for a vault that doesn't answer.
func (r *Runner) do(ctx context.Context, action Action) {
	attempt, report := r.host.Probe, r.machine.Probed
	switch action {
	case Unseal:
		attempt, report = func(ctx context.Context) Outcome {
			return r.host.Unseal(ctx, func() { r.update(r.machine.KeyObtained) })
		}, r.machine.Unsealed
	case Rotate:
		attempt, report = r.host.Rotate, r.machine.Rotated
	case Halt:
		r.mu.Lock()
		policy := r.machine.HaltPolicy()
		r.mu.Unlock()
		r.host.Halt(policy)
		r.update(r.machine.Halted)
		return
	case Lift:
		r.host.Lift()
		r.update(r.machine.Lifted)
		return
	}

	ctx, cancel := context.WithTimeout(ctx, cmp.Or(r.Limit, 90*time.Second))
	defer cancel()
	result := make(chan Outcome, 1)
	go func() { result <- guarded(ctx, attempt) }()
	var pending *command
	var o Outcome
	select {
	case o = <-result:
	case c := <-r.commands:
		cancel()
		o, pending = <-result, &c
	}
	// What has failed because it was interrupted says nothing of the KEK.
	if pending == nil || o.Kind == Success || action == Rotate {
		r.update(func(now time.Time) { report(now, o) })
	}
	if pending != nil {
		r.obey(*pending)
	}
}

// guarded makes a panic a transient failure: what is below here is a vendor's
// SDK and a process that may die.
func guarded(ctx context.Context, attempt func(context.Context) Outcome) (o Outcome) {
	defer func() {
		if p := recover(); p != nil {
			o = Outcome{Kind: Transient, Class: "internal", Text: fmt.Sprintf("panic: %v", p)}
		}
	}()
	return attempt(ctx)
}

// update changes the machine and tells the host.
func (r *Runner) update(change func(now time.Time)) {
	r.mu.Lock()
	before := r.machine.Snapshot()
	now, step := r.clock.read()
	if step != 0 {
		r.machine.Shift(step)
	}
	change(now)
	after := r.machine.Snapshot()
	r.mu.Unlock()
	if before.State != after.State || after.Failures > before.Failures || before.Wiped != after.Wiped || before.LastGood != after.LastGood {
		r.host.Changed(before.State, after)
	}
}
