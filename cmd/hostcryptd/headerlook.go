package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
	"hostcryptd/systemd"
)

// While a volume is served its header lies on a disk that others can write to. What the
// server goes by of that, when it looks, and when it raises the alarm is here.

// A headerFault is why the header on the disk of a volume that is served is not
// the one to go by.
type headerFault struct {
	what string // for a status, and to tell one fault from another
	err  error
	lost string // why it opens the volume no more, one of the lost constants, or ""
}

const headerGone = "is gone: the volume goes on, and won't open again before "

// wayBack says how a volume opens again whose header isn't on the disk.
func (d *daemon) wayBack(v *sector.Volume) string {
	if d.opts.readOnly || v == nil || v.KeptHeader() == nil {
		return "a backup of the header is restored; without one, copy the data while it's served"
	}
	return fmt.Sprintf("'hostcryptd header repair %s' has this server write the header back", d.uuid)
}

// headerTimeout is what looking at a header that was changed may take. It's less
// than a look at the KEK has, so that no header can be made that keeps the KEK
// from being looked at.
const headerTimeout = 30 * time.Second

// tokens returns the tokens of the volume's header as it was authentic last. Other
// processes of this host change it, which is found here; but so may be who
// can write to the disk otherwise, and puts back a token of an older version of the
// key that is still enabled, so that looks at the KEK succeed and a revocation is
// not seen. So only tokens of an authentic header are ever looked at.
//
// A header that isn't authentic raises the alarm, and stops nothing. The key in
// memory came from an authentic one, and the next server that wants to unseal will
// refuse this one (exit code 16). To stop would protect nothing, and destroy much:
// that memory may hold the last key to the data, if what has overwritten the header
// was an accident. And it would let who can write one sector stop the volume, and
// keep it stopped.
func (h *keyHost) tokens(ctx context.Context) []sector.KeyToken {
	d := h.d
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	before := v.Known()
	if v.Suspended() && before != nil {
		return before.Tokens // unsealing it looks at the header too
	}
	ctx, cancel := context.WithTimeout(ctx, headerTimeout)
	defer cancel()
	kept := v.KeptHeader()
	list, err := h.lookAtHeader(ctx, v)
	if now := v.Known(); now != before {
		d.log.Info("the header was changed, and is authentic", zap.Uint64("generation", now.Generation), zap.Int("tokens", len(now.Tokens)))
		d.pushState()
	} else if kept != v.KeptHeader() { // by cryptsetup, which changes nothing that is authenticated
		d.pushState()
	}
	if !errors.Is(ctx.Err(), context.Canceled) && !errors.Is(err, context.Canceled) && !errors.Is(err, sector.ErrSuspended) {
		h.judgeHeader(err)
	}
	return list
}

// A headerLook is a call of [sector.Volume.Tokens].
type headerLook struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when list and err are there
	list   []sector.KeyToken
	err    error
}

// errLookHangs is that of a look that has not ended by its time, nor when it was told to.
var errLookHangs = errors.New("the header could not be read")

// lookAtHeader is v.Tokens, and returns the tokens that are known when ctx ends: a
// disk that doesn't answer must not keep the KEK from being looked at. There is one
// look at a time, also if it hangs.
func (h *keyHost) lookAtHeader(ctx context.Context, v *sector.Volume) ([]sector.KeyToken, error) {
	h.mu.Lock()
	l := h.look
	if l == nil {
		l = &headerLook{done: make(chan struct{})}
		h.look = l
		var lookCtx context.Context
		lookCtx, l.cancel = context.WithCancel(ctx)
		go func() {
			l.list, l.err = v.Tokens(lookCtx, h.d.opts.keys.unsealer(h.d.log), h.openOptions())
			h.mu.Lock()
			distrusted := h.distrusted
			h.mu.Unlock()
			if l.err == nil && distrusted {
				if _, l.err = v.CheckPin(h.openOptions()); l.err == nil {
					h.mu.Lock()
					h.distrusted = false
					h.mu.Unlock()
				}
			}
			if l.err != nil && errors.Is(lookCtx.Err(), context.Canceled) {
				l.err = context.Canceled // which says nothing of the header
			}
			l.cancel()
			h.mu.Lock()
			h.look = nil
			h.mu.Unlock()
			close(l.done)
		}()
	}
	h.mu.Unlock()
	select {
	case <-l.done:
		return l.list, l.err
	case <-ctx.Done():
	}
	// One that isn't in the disk's hands wipes the keys that it may have.
	l.cancel()
	select {
	case <-l.done:
		return l.list, l.err
	case <-time.After(time.Second):
	}
	err := fmt.Errorf("%w: %w in %v", sector.ErrDevice, errLookHangs, headerTimeout)
	if k := v.Known(); k != nil {
		return k.Tokens, err
	}
	return nil, err
}

// endLook ends a look that is under way: once the volume is suspended, as it may have
// the volume key, or for a repair, which waits for none. What is still there after
// lookEnds hangs in the disk: that has no key, and fetches none any more, and endLook
// returns false.
func (h *keyHost) endLook() bool {
	h.mu.Lock()
	l := h.look
	h.mu.Unlock()
	if l == nil {
		return true
	}
	l.cancel()
	select {
	case <-l.done:
		return true
	case <-time.After(lookEnds):
		return false
	}
}

// lookEnds is more than an unsealer gets that doesn't heed its context.
const lookEnds = 4 * time.Second

// judgeHeader tells of a header that isn't authentic, once for each kind of
// fault, and of one that is again.
func (h *keyHost) judgeHeader(err error) {
	d := h.d
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	var now *headerFault
	switch o := outcomeOf(err); {
	case err == nil:
	case errors.Is(err, sector.ErrDevice):
		now = &headerFault{"can't be read", err, ""}
	case errors.Is(err, sector.ErrNotVolume), errors.Is(err, sector.ErrDamaged):
		now = &headerFault{headerGone + d.wayBack(v), err, lostGone}
	case !errors.Is(err, sector.ErrAuth) && (o.Kind == lifecycle.Transient || o.Kind == lifecycle.Denied):
		now = &headerFault{"is not the one that is known, and can't be authenticated now", err, lostUnknown}
	case h.isDistrusted():
		now = &headerFault{"is not the one that this host remembers: the initramfs has opened the volume by what it remembered when it was made; make it anew once the header is the right one", err, ""}
	default:
		now = &headerFault{"is not authentic: the volume goes on, and won't open again before " + d.wayBack(v), err, lostForged}
		if errors.Is(err, sector.ErrOlder) {
			now.lost = "" // or accepted
		}
	}
	h.mu.Lock()
	before := h.header
	if h.distrusted && now == nil {
		now = before // the next look compares it anew
	}
	h.header = now
	h.mu.Unlock()
	switch {
	case now == nil && before != nil:
		d.log.Info("the header on the disk is authentic again")
		d.record(audit.Record{Event: audit.Header, Outcome: audit.OK, Detail: "the header on the disk is authentic again"})
	case now != nil && (before == nil || before.what != now.what):
		d.log.Error("the header on the disk "+now.what, zap.String("device", d.opts.device), zap.Error(now.err))
		d.record(audit.Record{Event: audit.Header, Outcome: audit.Failed, Class: outcomeOf(err).Class, Detail: "the header on the disk " + now.what + ": " + err.Error()})
		d.notify(systemd.Status("the header on the disk %s", now.what))
	}
}

// checkPin compares the header that a volume was opened by in an initramfs with what
// the host remembers, once that can be read. The initramfs holds what was remembered
// when it was made; since then a way in may have been removed, which an older header
// has still. That raises the alarm and stops nothing, as of tokens.
func (h *keyHost) checkPin() {
	warning, err := h.d.volume.CheckPin(h.openOptions())
	if errors.Is(err, sector.ErrNoPins) {
		h.d.log.Warn("the header is not compared with what this host remembers", zap.Error(err))
		return
	}
	if warning != "" { // the root is not writable yet; the next change of the header notes it
		h.d.log.Warn(warning)
	}
	if err == nil {
		return
	}
	h.mu.Lock()
	h.distrusted = true
	h.mu.Unlock()
	h.judgeHeader(err)
}

func (h *keyHost) isDistrusted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.distrusted
}

// headerProblem is what status says of the header, or "".
func (h *keyHost) headerProblem() string {
	f := h.fault()
	if f == nil {
		return ""
	}
	return f.what + ": " + f.err.Error()
}

// fault is what the last look at the header has found.
func (h *keyHost) fault() *headerFault {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.header
}

// watchHeader looks for changes of the volume's keys: of a vault key that was added
// to a volume that had none, which is looked at from then on, and of one that
// wants another pace.
func (d *daemon) watchHeader(ctx context.Context, runner *lifecycle.Runner) {
	every := d.opts.life.heartbeat
	if every <= 0 {
		every = lifecycle.DefaultHeartbeat
	}
	for {
		if err := d.lookForVault(ctx, runner); err != nil && ctx.Err() == nil {
			d.log.Error("the volume's keys have changed, and can't be watched as this server was started", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return
		case <-d.headerChanged:
		case <-time.After(every):
		}
	}
}

// takeHeader takes over what another process of this host says that it has just
// made the header, and authenticated. Without that, the header is unlocked at the
// next look at the KEK, which takes a use of one. accepted is for
// [sector.Volume.Learn].
func (d *daemon) takeHeader(ctx context.Context, k *sector.Known, accepted bool) error {
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	if v == nil {
		return nil // to unseal it reads the header
	}
	if err := v.Learn(ctx, k, accepted); err != nil {
		return err
	}
	if accepted {
		d.log.Warn("the header on the disk was accepted by an operator", zap.Uint64("generation", k.Generation))
	}
	d.lifeHost.judgeHeader(nil)
	d.pushState()
	select {
	case d.headerChanged <- struct{}{}:
	default:
	}
	return nil
}
