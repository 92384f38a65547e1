package sector

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

// SuspendMode says what a suspended volume does with requests.
type SuspendMode int

const (
	// SuspendRefuse fails requests with [ErrSuspended].
	SuspendRefuse SuspendMode = iota
	// SuspendWait holds requests until the volume is resumed or closed, as
	// cryptsetup's luksSuspend does.
	SuspendWait
)

// A gate decides what becomes of a request before it touches keys or device.
type gate struct {
	restricted atomic.Bool // no writes, see Volume.Restrict

	state atomic.Uint32 // one of gateOpen and so on

	mu     sync.Mutex
	opened chan struct{} // closed when state leaves gateWait; nil if nobody waits
}

const (
	gateOpen uint32 = iota
	gateRefuse
	gateWait
	gateClosed // for good
)

func (g *gate) isOpen() bool { return g.state.Load() == gateOpen }

// refuses returns the error that new requests are refused with, or nil.
func (g *gate) refuses() error {
	switch g.state.Load() {
	case gateRefuse:
		return ErrSuspended
	case gateClosed:
		return ErrClosed
	}
	return nil
}

// pass returns nil when the gate is open, or an error when it's not going to
// be.
func (g *gate) pass() error {
	for {
		switch g.state.Load() {
		case gateOpen:
			return nil
		case gateRefuse:
			return ErrSuspended
		case gateClosed:
			return ErrClosed
		}
		g.mu.Lock()
		if g.state.Load() != gateWait {
			g.mu.Unlock()
			continue
		}
		if g.opened == nil {
			g.opened = make(chan struct{})
		}
		opened := g.opened
		g.mu.Unlock()
		<-opened
	}
}

// set changes the state, unless the gate is closed for good; it tells whether
// it wasn't. Requests that wait see the new state.
func (g *gate) set(state uint32) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.state.Load() == gateClosed {
		return false
	}
	g.state.Store(state)
	if g.opened != nil && state != gateWait {
		close(g.opened)
		g.opened = nil
	}
	return true
}

// Suspend stops the volume and wipes its keys: new requests are refused or
// wait, as mode says; those under way are completed; what was written is
// flushed; then the keys are wiped, and the buffers, which held plaintext.
// The header is not touched, and [Volume.Resume] undoes it.
//
// The keys are gone when Suspend returns, also with an error, which is that of
// the flush. A backing device that has stalled holds Suspend up until it
// answers: a request can't be finished without its key, nor its buffer be
// reused. Suspending a suspended volume only changes the mode.
func (v *Volume) Suspend(mode SuspendMode) error {
	state := gateRefuse
	if mode == SuspendWait {
		state = gateWait
	}
	if !v.gate.set(state) {
		return ErrClosed
	}
	v.open.Lock()
	defer v.open.Unlock()
	v.gate.set(state) // a Resume that held open until now has opened it
	if v.keys == nil {
		return nil
	}
	var err error
	if !v.readOnly {
		err = v.sync()
	}
	clear(v.bufs.mem)
	if err = errors.Join(err, v.wipe()); err != nil {
		return fmt.Errorf("sector: suspending: %w", err)
	}
	return nil
}

// Suspended tells whether the volume is suspended: it has no keys.
func (v *Volume) Suspended() bool {
	s := v.gate.state.Load()
	return s == gateRefuse || s == gateWait
}

// Waiting tells whether the volume is suspended with [SuspendWait].
func (v *Volume) Waiting() bool { return v.gate.state.Load() == gateWait }

// Restrict refuses writes with EPERM, or permits them again. Reads go on, so
// the keys stay in memory.
func (v *Volume) Restrict(on bool) { v.gate.restricted.Store(on) }

// wipe wipes the keys and frees their memory. Callers hold open.
func (v *Volume) wipe() error {
	if v.keys == nil {
		return nil
	}
	v.handover.wipe()
	v.cipher.Wipe()
	err := v.keys.free()
	v.cipher, v.keys = nil, nil
	return err
}

// Resume unlocks a suspended volume as [Open] does, and lets requests pass again,
// writes too: the key that Restrict waited for is back. The header must still describe
// the volume that was suspended: same UUID, place, size and sectors. A volume that
// isn't suspended is left alone.
func (v *Volume) Resume(ctx context.Context, unseal Unsealer, o OpenOptions) error {
	if !v.Suspended() {
		if !v.gate.isOpen() {
			return ErrClosed
		}
		return nil
	}
	o.ReadOnly, o.Discard = v.readOnly, v.discard
	var before *Known
	again, err := openAfter(ctx, v.b, unseal, o, func() *Known { before = v.known.Load(); return before })
	if err != nil {
		return err
	}
	defer again.Close() // only what is left of it
	// The device may have grown since, which is nothing to do with the volume
	// before Grow.
	size, now := v.size.Load(), again.size.Load()
	if again.uuid != v.uuid || again.offset != v.offset || now != size && !(again.dynamic && now > size) ||
		again.sector != v.sector || again.tweak != v.tweak {
		return fmt.Errorf("%w: the header describes another volume than the one that was suspended", ErrAuth)
	}
	v.open.Lock()
	defer v.open.Unlock()
	if v.keys != nil {
		again.handover = nil // else Close wipes what the next server goes on with
		return nil           // somebody else was faster
	}
	v.keys, v.cipher = again.keys, again.cipher
	v.token.Store(again.token.Load())
	if v.known.CompareAndSwap(before, again.known.Load()) { // or Learn was told of another since
		if k, old := again.kept.Swap(nil), v.kept.Load(); k != nil && (old == nil || old.sum != k.sum) {
			v.setKept(k)
		}
	}
	v.Restrict(false)
	again.keys, again.cipher = nil, nil
	if !v.gate.set(gateOpen) {
		return errors.Join(ErrClosed, v.wipe())
	}
	return nil
}
