package main

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
	"hostcryptd/systemd"
)

// The life of the volume's key in the daemon: package lifecycle decides what is
// to be done and when, a keyHost does it.

// lifeFlags are the flags of serve that say how a volume reacts to what becomes
// of its KEK.
type lifeFlags struct {
	heartbeat  time.Duration
	grace      time.Duration
	maxOffline time.Duration
	policy     string
	expired    string
	confirm    time.Duration
	rotation   time.Duration
}

// autoHeartbeat stands for a heartbeat that depends on the key.
const autoHeartbeat = -1

func (l *lifeFlags) add(c *cobra.Command) {
	f := c.Flags()
	f.DurationVar(&l.heartbeat, "heartbeat", autoHeartbeat, "`TIME` between two looks whether the vault's key may still be used; 0 for never (default: 10m to 30m, by the key's size, but at most two thirds of --max-offline)")
	f.DurationVar(&l.grace, "grace", lifecycle.DefaultGrace, "`TIME` for which the volume goes on after access to its key was lost, 0 to 24h")
	f.StringVar(&l.policy, "on-revocation", lifecycle.Stop.String(), "what the volume does then, a `POLICY`: stop, read-only, freeze (I/O waits) or warn")
	f.DurationVar(&l.maxOffline, "max-offline", 0, "stop too after this `TIME` without any answer of the vault (default: an outage never stops a volume)")
	f.StringVar(&l.expired, "expired-key", "warn", "`ACTION` when the key has expired, which still unwraps: warn, or deny, which takes that for lost access")
	f.DurationVar(&l.confirm, "confirm", lifecycle.DefaultConfirmSpan, "believe the vault's denials when there were three in this `TIME`; new grants take minutes to arrive")
	f.DurationVar(&l.rotation, "rotate-check", lifecycle.DefaultRotation, "`TIME` between two looks for a newer version of the vault's key, to rewrap with; 0 for never")
	c.Flags().Lookup("heartbeat").DefValue = "0s" // so that --help says nothing
}

// config makes a machine's configuration of the flags, of the volume's phase (see
// phaseOf) and of what keySize says.
func (l *lifeFlags) config(phase float64, bits int, remote bool) (lifecycle.Config, error) {
	c := lifecycle.Config{
		Heartbeat: l.heartbeat, Grace: l.grace, MaxOffline: l.maxOffline,
		ConfirmSpan: l.confirm, Phase: phase,
	}
	var err error
	if c.Policy, err = lifecycle.ParsePolicy(l.policy); err != nil {
		return c, usagef("--on-revocation: %w", err)
	}
	if err := checkExpired(l.expired); err != nil {
		return c, err
	}
	switch {
	case !remote:
		// A key of this host can't be taken away by anybody else.
		c.Heartbeat, c.MaxOffline = 0, 0
	case l.heartbeat < 0:
		c.Heartbeat = lifecycle.HeartbeatFor(bits)
		if l.maxOffline > 0 {
			// A key of another size, which a rewrap brings, must not make a conflict of
			// what was none. A look comes up to a fifth later: that leaves a fifth of the
			// limit for tries after one that gets no answer.
			c.Heartbeat = min(c.Heartbeat, max(time.Second, l.maxOffline/3*2))
		}
	}
	c.Rotation = l.rotation // which removes retired tokens of any kind
	if remote {
		c.Splay = lifecycle.DefaultSplay
	}
	if l.confirm < time.Second {
		return c, usagef("--confirm is at least 1s, not %v", l.confirm)
	}
	if err := c.Check(); err != nil {
		return c, withCode(codeUsage, err)
	}
	return c, nil
}

// keySize is the largest RSA key among the tokens, and whether any is in a vault.
func keySize(tokens []sector.KeyToken) (bits int, remote bool) {
	for _, t := range tokens {
		if d, err := keyunseal.Describe(t.Text); err == nil && d.Type == keyunseal.TypeKeyVault {
			bits, remote = max(bits, d.Bits), true
		}
	}
	return bits, remote
}

// phaseOf spreads hosts, and the volumes of one host, over an interval. It reads a file
// that may be on the volume.
func phaseOf(volume string) float64 {
	machine, _ := os.ReadFile(machineIDFile)
	sum := sha256.Sum256(append(machine, volume...))
	return float64(binary.BigEndian.Uint32(sum[:])) / (1 << 32)
}

var machineIDFile = "/etc/machine-id"

// A keyHost carries out what a lifecycle.Runner wants, on the daemon's volume.
type keyHost struct {
	d *daemon

	// opened is closed when the volume serves for the first time.
	opened chan struct{}

	mu      sync.Mutex
	lastErr error // of the last try to unseal
	lost    error // what was lost when the volume was stopped

	// header is what is wrong with the header on the disk, see tokens; nil if it is
	// the one that is known.
	header *headerFault
	look   *headerLook // that is under way, or nil

	// distrusted is set while the header that the volume was opened by is not the one
	// that this host remembers, see checkPin.
	distrusted bool

	apart bool // a change of the header is under way, see changeApart

	// failing is since when tokens have failed in each look, by their text. It's of Probe,
	// which runs once at a time.
	failing map[string]time.Time

	// expires is when the vault keys of the tokens expire, by a token's text, as
	// the last looks have shown.
	expires map[string]time.Time
}

// firstExpiry is the earliest time at which a vault key expires, or zero.
func (h *keyHost) firstExpiry() (first time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, t := range h.expires {
		if !t.IsZero() && (first.IsZero() || t.Before(first)) {
			first = t
		}
	}
	return first
}

// deniedExpired is that of the volume's policy.
func (h *keyHost) deniedExpired(ctx context.Context, volume string, token json.RawMessage) error {
	return h.d.opts.keys.deniedExpired(ctx, h.d.opts.life.expired, volume, token, h.d.log)
}

// unsealer is the daemon's unsealer, which tells when it has a volume key.
func (h *keyHost) unsealer(obtained func()) sector.Unsealer {
	unseal := h.d.opts.keys.unsealerUnless(h.d.opts.life.expired, h.d.log)
	return func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
		err := unseal(ctx, volume, token, key)
		if err == nil {
			obtained()
		}
		return err
	}
}

// openOptions are those for any look at the header.
func (h *keyHost) openOptions() sector.OpenOptions {
	d := h.d
	d.mu.Lock()
	trusted := d.opts.keys.trusted
	d.mu.Unlock()
	return sector.OpenOptions{Derive: deriveElsewhere, UUID: d.uuid, Pins: d.opts.keys.pinStore(d.log), Trusted: trusted, RequirePin: d.opts.requirePin}
}

func (h *keyHost) Unseal(ctx context.Context, obtained func()) lifecycle.Outcome {
	d := h.d
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	o := h.openOptions()
	o.ReadOnly, o.Discard, o.Handover = d.opts.readOnly, d.opts.discard, d.handover
	// Probes look at the tokens that aren't retired. When those were denied, an
	// older version of the key that is still enabled must not undo the stop.
	o.SkipRetired = d.life.Snapshot().Denials > 0
	o.Retired = retiredMayOpen
	begun := time.Now()
	var err error
	if v == nil {
		if v, err = sector.Open(ctx, d.device, h.unsealer(obtained), o); err == nil {
			d.mu.Lock()
			d.volume = v
			d.mu.Unlock()
			defer close(h.opened)
		}
	} else {
		err = v.Resume(ctx, h.unsealer(obtained), o)
	}
	h.mu.Lock()
	if !errors.Is(ctx.Err(), context.Canceled) || h.lastErr == nil {
		h.lastErr = err // else it was interrupted, and the one before says more
	}
	if err == nil {
		h.lost = nil
	}
	h.mu.Unlock()
	outcome := outcomeOf(err)
	r := audit.Record{Event: audit.Unsealed, Outcome: audit.OK, Duration: time.Since(begun).Milliseconds()}
	switch {
	case err == nil:
		token := v.Token()
		r.Token = &token
	case outcome.Kind == lifecycle.Transient:
		return outcome // each use of the KEK was recorded already
	default:
		r.Event, r.Outcome, r.Class, r.Code, r.Detail = audit.Refused, audit.Failed, outcome.Class, outcome.Code, outcome.Text
	}
	d.record(r)
	return outcome
}

// retiredMayOpen tells whether a retired token may open a volume, given how those that
// aren't retired have failed. The version of the key that it needs is kept enabled for a
// while, for a vault that was restored and has no newer one (404), and for tokens that
// are damaged. Where a newer one was refused or disabled, it must not undo that: a host
// that was stopped would come back by a reboot. So a version of a vault's key must not
// where that couldn't be heard either, for a vault that is throttled or down, or a network
// that comes up later, as after any power cut: the next try of the newer one helps as
// much. A TPM's or a host key's doesn't wait for that, but for its own successor.
func retiredMayOpen(t sector.KeyToken, others []sector.TokenReport) bool {
	return !slices.ContainsFunc(others, func(other sector.TokenReport) bool {
		switch retiredWaits(other.Err) {
		case lifecycle.Denied:
			return true
		case lifecycle.Transient:
			return other.Type == t.Type
		}
		return false
	})
}

// retiredWaits is whether the failure of a token is a denial, or may hide one. Nobody
// says no by a TPM, so one that doesn't work hides nothing.
func retiredWaits(err error) lifecycle.Kind {
	if e, ok := errors.AsType[*keyunseal.Error](err); ok {
		switch e.Class {
		case keyunseal.ClassNoTPM, keyunseal.ClassTPMBusy, keyunseal.ClassTPMLockout:
			return lifecycle.Misconfigured
		case keyunseal.ClassKeyUnusable:
			if e.Status == http.StatusNotFound {
				return lifecycle.Misconfigured
			}
		}
	}
	return outcomeOf(err).Kind
}

// Probe looks at every KEK that could open the volume: access is lost when all
// of them deny it, see lookOutcome.
func (h *keyHost) Probe(ctx context.Context) lifecycle.Outcome {
	var failed []sector.TokenReport
	since := map[string]time.Time{}
	defer func() { h.failing = since }()
	tokens := slices.DeleteFunc(slices.Clone(h.tokens(ctx)), func(t sector.KeyToken) bool { return !t.Retired.IsZero() })
	for _, t := range tokens {
		err := h.d.opts.keys.probe(ctx, h.d.uuid, t.Text, h.d.log)
		if err == nil {
			err = h.deniedExpired(ctx, h.d.uuid, t.Text)
		}
		if err == nil {
			h.mu.Lock()
			defer h.mu.Unlock()
			expires := h.expires[string(t.Text)]
			return lifecycle.Outcome{Kind: lifecycle.Success, Expired: !expires.IsZero() && time.Now().After(expires)}
		}
		failed = append(failed, sector.TokenReport{KeyToken: t, Err: fmt.Errorf("token %d: %w", t.ID, err)})
		if before, ok := h.failing[string(t.Text)]; ok {
			since[string(t.Text)] = before
		} else {
			since[string(t.Text)] = time.Now()
		}
		if ctx.Err() != nil {
			break
		}
	}
	if len(failed) == 0 {
		if h.d.volume.Suspended() { // so the header was not looked at
			return outcomeOf(context.Canceled)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.header != nil { // and none was known: another version has left no state of it
			return outcomeOf(h.header.err)
		}
		return lifecycle.Outcome{Kind: lifecycle.Integrity, Text: "the header has no token left"}
	}
	return lookOutcome(failed, len(failed) == len(tokens), func(t sector.KeyToken) time.Duration { return time.Since(since[string(t.Text)]) })
}

// lookOutcome is what it means that keys of a served volume have failed: all that there
// are, or the others could not be looked at in time. The most hopeful of them counts, as
// in outcomeOf: where a vault denies one, that changes nothing as long as another may be
// one that opens the volume, such as of a vault that doesn't answer. But a key of a host
// can be one that will never work again, because the disk was moved or the TPM has died.
// So what can't be anybody's decision, and no outage of a service either, hides a denial
// for no longer than hides says. lasting is for how long a key has failed in each look.
func lookOutcome(failed []sector.TokenReport, all bool, lasting func(sector.KeyToken) time.Duration) lifecycle.Outcome {
	errs, count := []error{}, []error{}
	denied := false
	for _, t := range failed {
		kind := outcomeOf(t.Err).Kind
		denied = denied || kind == lifecycle.Denied
		errs = append(errs, t.Err)
		if kind != lifecycle.Transient || lasting(t.KeyToken) < hides(t) {
			count = append(count, t.Err)
		}
	}
	o := outcomeOf(errors.Join(errs...))
	if denied && all {
		text := o.Text
		o = outcomeOf(errors.Join(count...))
		o.Text = text
	}
	return o
}

// localHides is how long a key of this host that fails in a way that may pass hides that
// a vault has denied another. A TPM is busy for seconds, and locked out for some minutes
// or for hours; what fails for longer may do so for ever.
const localHides = 10 * time.Minute

// hides is how long a failure that may pass hides a denial. A TPM that isn't there, and
// a file of this host's that is missing, hide none: who needs that for more than the time
// in which denials are confirmed has lost it. What a vault would have said stays unknown
// however long it doesn't answer.
func hides(t sector.TokenReport) time.Duration {
	e, ok := errors.AsType[*keyunseal.Error](t.Err)
	switch {
	case ok && (e.Class == keyunseal.ClassNoTPM || e.Local):
		return 0
	case t.Type == keyunseal.TypeKeyVault:
		return math.MaxInt64
	}
	return localHides
}

// Rotate looks for a newer version of the vault's key, and for its expiry, and
// rewraps, and removes the retired tokens whose time is over. Both in a process
// of its own: this one never has the volume key's copies.
func (h *keyHost) Rotate(ctx context.Context) lifecycle.Outcome {
	d := h.d
	outcome := lifecycle.Outcome{Kind: lifecycle.Success}
	over, expires := false, map[string]time.Time{}
	h.mu.Lock()
	before := h.expires
	h.mu.Unlock()
	for _, t := range h.tokens(ctx) {
		if !t.Retired.IsZero() {
			over = over || time.Now().After(t.KeepUntil)
			continue
		}
		if t.Type != keyunseal.TypeKeyVault {
			continue
		}
		status, err := d.opts.keys.inspect(ctx, d.uuid, t.Text, d.log)
		expires[string(t.Text)] = before[string(t.Text)]
		if err != nil {
			// The permission is optional, and an outage is the heartbeat's matter.
			d.log.Info("no look at the vault key's versions", zap.Int("token", t.ID), zap.Error(err))
			if o := outcomeOf(err); o.Kind == lifecycle.Transient {
				outcome = o
			}
			continue
		}
		expires[string(t.Text)] = status.Expires
		if left := time.Until(status.Expires); !status.Expires.IsZero() && left < 30*24*time.Hour {
			d.log.Warn("the vault key expires; it still unseals then, but it can't be sealed with", zap.Int("token", t.ID), zap.Time("expires", status.Expires))
		}
		if status.Stale() && !d.opts.readOnly {
			o := h.rewrap(ctx, fmt.Sprintf("--token=%d", t.ID), "rewrap the volume key with the newer version of its key; until that is done the old one must stay enabled",
				zap.Int("token", t.ID), zap.String("old_version", status.Version), zap.String("new_version", status.Newest))
			if o.Kind != lifecycle.Success {
				outcome = o
			}
		}
	}
	h.mu.Lock()
	h.expires = expires
	h.mu.Unlock()
	if over && !d.opts.readOnly {
		if o := h.rewrap(ctx, "--drop-only", "remove retired tokens whose time is over"); o.Kind != lifecycle.Success {
			outcome = o
		}
	}
	return outcome
}

// rewrap runs the command in a process of its own. task and fields are for the
// log.
func (h *keyHost) rewrap(ctx context.Context, flag, task string, fields ...zap.Field) lifecycle.Outcome {
	k := &h.d.opts.keys
	args := []string{"rewrap", h.d.opts.device, flag, "--host-key=" + k.hostKey, "--tpm=" + k.tpmPath(), "--identity=" + k.identity, "--cloud=" + k.cloud, "--pins=" + string(k.pinDir()), "--signer=" + k.signer, "--audit-log=" + k.auditFile()}
	args = slices.DeleteFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "--") && strings.HasSuffix(arg, "=") }) // a flag of a command is never empty
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Args[0] = os.Args[0]
	const firstExtra = "3"
	cmd.Env = append(os.Environ(), controlEnv+"="+h.d.opts.control, deviceEnv+"="+firstExtra)
	cmd.WaitDelay = time.Second // it may leave a process that has its output
	return h.changeApart(ctx, func() lifecycle.Outcome {
		// Not the descriptor of the server, whose locks are held as long as a process has
		// it: the next server would wait for this one.
		device, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", h.d.device.Descriptor()))
		if err != nil {
			h.d.log.Error("rewrap failed; the device can't be opened again", append(fields, zap.String("task", task), zap.Error(err))...)
			return outcomeOf(err)
		}
		defer device.Close()
		cmd.ExtraFiles = []*os.File{device}
		begun := time.Now()
		before := h.d.volume.Known()
		out, err := cmd.CombinedOutput()
		if errors.Is(err, exec.ErrWaitDelay) {
			err = nil // it has succeeded, and somebody has its output still
		}
		fields := append(fields, zap.String("task", task), zap.Duration("took", time.Since(begun)), zap.String("output", strings.TrimSpace(string(out))))
		if err != nil && ctx.Err() != nil {
			h.d.log.Warn("rewrap was interrupted; "+h.leftHeader(before), fields...)
			return lifecycle.Outcome{Kind: lifecycle.Transient, Text: "rewrap was interrupted"}
		}
		if err != nil {
			h.d.log.Error("rewrap failed; "+h.leftHeader(before), append(fields, zap.Error(err))...)
			return rewrapOutcome(cmd.ProcessState.ExitCode())
		}
		h.d.log.Info("rewrap is done", fields...)
		return lifecycle.Outcome{Kind: lifecycle.Success}
	})
}

// changeApart is change, which ends soon after ctx unless it is in the hands of a disk
// that doesn't answer: no signal ends a process there. That must keep nobody from
// looking at the KEK, nor from stopping the volume, so it is waited for no longer than
// a second after ctx. There is one change at a time, also if it hangs.
func (h *keyHost) changeApart(ctx context.Context, change func() lifecycle.Outcome) lifecycle.Outcome {
	h.mu.Lock()
	hangs := h.apart
	h.apart = true
	h.mu.Unlock()
	if hangs {
		h.d.log.Warn("the change of the header before still waits for the disk, so no other is begun")
		return lifecycle.Outcome{Kind: lifecycle.Transient, Text: "the change of the header before hasn't ended"}
	}
	done := make(chan lifecycle.Outcome, 1)
	go func() {
		o := change()
		h.mu.Lock()
		h.apart = false
		h.mu.Unlock()
		done <- o
	}()
	select {
	case o := <-done:
		return o
	case <-ctx.Done():
	}
	select {
	case o := <-done:
		return o
	case <-time.After(time.Second):
	}
	h.d.log.Warn("a change of the header has to end, and doesn't: it waits for the disk; the volume goes on without it", zap.String("device", h.d.opts.device))
	return lifecycle.Outcome{Kind: lifecycle.Transient, Text: "the disk doesn't answer"}
}

// leftHeader says what is known of the header after a process that was to change it
// has ended, and had known before. Whatever was written then, one copy of the
// header is whole, and it's the one of before or the new one.
func (h *keyHost) leftHeader(before *sector.Known) string {
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	header, _, err := sector.ReadHeader(ctx, h.d.device)
	var now uint64
	if err == nil {
		now, err = sector.Generation(header)
	}
	switch {
	case err != nil:
		return fmt.Sprintf("what it has left of the header can't be read: %v", err)
	case before == nil:
		return fmt.Sprintf("the header is of generation %d now", now)
	case now > before.Generation:
		return fmt.Sprintf("a new header was written before that, of generation %d after %d, and is whole; the next look at the key uses it", now, before.Generation)
	}
	return fmt.Sprintf("the header is as it was, of generation %d", now)
}

func (h *keyHost) Halt(policy lifecycle.Policy) {
	d := h.d
	d.mu.Lock()
	v := d.volume
	d.mu.Unlock()
	if v == nil {
		return
	}
	var err error
	switch policy {
	case lifecycle.Stop:
		err = v.Suspend(sector.SuspendRefuse)
	case lifecycle.Freeze:
		release := d.holdSize()
		err = v.Suspend(sector.SuspendWait)
		release()
		if d.ending.Load() {
			err = errors.Join(err, v.Suspend(sector.SuspendRefuse))
		}
	case lifecycle.ReadOnly:
		v.Restrict(true)
		err = v.Sync()
	}
	if v.Suspended() {
		h.endLook()
	}
	if err != nil {
		h.mu.Lock()
		h.lost = err
		h.mu.Unlock()
		d.log.Error("volume was stopped, and what was written before may not be on the disk", zap.Error(err))
	}
}

func (h *keyHost) Lift() { h.d.volume.Restrict(false) }

// Changed writes what happened to the log, the audit and the service manager.
func (h *keyHost) Changed(from lifecycle.State, s lifecycle.Snapshot) {
	d := h.d
	d.mu.Lock()
	d.left.Life = s
	d.mu.Unlock()
	d.pushState()
	if from == s.State && s.Failures == 0 && s.LastGood.After(s.Stopped) {
		return // the KEK was used with success, which is nothing new
	}
	fields := []zap.Field{zap.Stringer("from", from), zap.Stringer("state", s.State), zap.Int("attempts", s.Attempts)}
	if s.Failures > 0 {
		fields = append(fields, zap.Stringer("kind", s.Kind), zap.String("class", s.Class), zap.String("code", s.Code), zap.String("request_id", s.RequestID), zap.String("reason", s.Reason))
	}
	if !s.NextTry.IsZero() {
		fields = append(fields, zap.Duration("next_try_in", max(0, time.Until(s.NextTry)).Round(time.Millisecond)))
	}
	for name, t := range map[string]time.Time{"access_lost": s.AccessLost, "stops_at": s.StopsAt, "stopped": s.Stopped} {
		if !t.IsZero() {
			fields = append(fields, zap.Time(name, t))
		}
	}
	h.mu.Lock()
	lost := h.lost
	h.mu.Unlock()

	switch s.State {
	case lifecycle.Unlocked:
		if from == lifecycle.Unlocked {
			return
		}
		d.log.Info("key state changed", fields...)
		if from == lifecycle.Revoked {
			d.record(audit.Record{Event: audit.Resumed, Outcome: audit.OK})
		}
	case lifecycle.Verifying:
	case lifecycle.Grace:
		msg, what := "access to the volume's key was lost; the volume goes on, as --on-revocation is warn", "goes on"
		if !s.StopsAt.IsZero() {
			msg, what = "access to the volume's key was lost; the volume will stop", "stops at "+s.StopsAt.UTC().Format(time.RFC3339)
		}
		d.log.Error(msg, fields...)
		if from != lifecycle.Grace {
			d.record(audit.Record{Event: audit.AccessLost, Outcome: audit.Failed, Class: s.Class, Code: s.Code, RequestID: s.RequestID,
				Detail: fmt.Sprintf("lost at %s, policy %v, %s", s.AccessLost.UTC().Format(time.RFC3339), s.Policy, what)})
		}
	case lifecycle.Revoked, lifecycle.Erased:
		d.log.Error("volume has stopped", append(fields, zap.Bool("keys_wiped", s.Wiped))...)
		if from != s.State {
			d.recordStop(s, lost)
		}
	case lifecycle.Locked:
		d.log.Warn("volume is locked", append(fields, zap.Bool("keys_wiped", s.Wiped))...)
		if from.Serving() || from == lifecycle.Revoked {
			d.recordStop(s, lost)
		}
	default:
		msg := "key state changed"
		if s.State == lifecycle.Acquiring && s.Failures > 0 {
			msg = "volume can't be unsealed yet"
		}
		d.log.Warn(msg, fields...)
	}
	status := fmt.Sprintf("key %v", s.State)
	if s.Reason != "" {
		status += ": " + s.Reason
	}
	d.notify(systemd.Status("%s", status))
}

// recordStop records that the volume has stopped, when access was lost and when
// the keys were wiped, if they were.
func (d *daemon) recordStop(s lifecycle.Snapshot, lost error) {
	r := audit.Record{Event: audit.Wiped, Outcome: audit.OK, Class: s.Class, Code: s.Code, RequestID: s.RequestID}
	what := "keys wiped"
	if !s.Wiped {
		r.Event, what = audit.Stopped, "writes refused"
	}
	r.Detail = fmt.Sprintf("%s at %s", what, s.Stopped.UTC().Format(time.RFC3339Nano))
	if !s.AccessLost.IsZero() {
		r.Detail += ", access lost at " + s.AccessLost.UTC().Format(time.RFC3339Nano)
	}
	if s.Locked {
		r.Detail += ", by an operator"
	}
	if lost != nil {
		r.Outcome = audit.Failed
		r.Detail += "; the last flush failed: " + lost.Error()
	}
	d.record(r)
}

// isReadError tells whether a header could not be read for an error of the disk. That
// may pass, as when the path to a disk in the network fails for a moment, which is when
// a vault can't be reached either; that a disk is too small doesn't.
func isReadError(err error) bool {
	_, errno := errors.AsType[syscall.Errno](err)
	return errno && errors.Is(err, sector.ErrDevice)
}

// startLife begins the life of the key, and returns when the volume serves. stop
// ends it; the volume then stays as it is.
func (d *daemon) startLife(ctx context.Context, c lifecycle.Config, before *serverState) (stop func(), err error) {
	h := &keyHost{d: d, opened: make(chan struct{})}
	if d.opts.randomKey {
		c.Rotation = 0 // there is no header to look at
	}
	runner := lifecycle.NewRunner(c, h)
	switch {
	case before != nil:
		runner = lifecycle.RestoreRunner(c, before.Life, d.volume.Suspended(), h)
		close(h.opened)
	case d.opts.randomKey:
		runner = lifecycle.RestoreRunner(c, lifecycle.Snapshot{State: lifecycle.Unlocked, Since: time.Now()}, false, h)
		close(h.opened)
	}
	d.mu.Lock()
	d.life, d.lifeHost = runner, h
	d.mu.Unlock()
	runCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- runner.Run(runCtx) }()
	var watching sync.WaitGroup
	if !d.opts.randomKey {
		watching.Go(func() {
			select {
			case <-h.opened:
				d.watchHeader(runCtx, runner)
			case <-runCtx.Done():
			}
		})
	}
	if d.moved != nil {
		// Not waited for: it reads the volume that is served here.
		go func() {
			for _, c := range []<-chan struct{}{h.opened, d.moved} {
				select {
				case <-c:
				case <-runCtx.Done():
					return
				}
			}
			h.checkPin()
		}()
	}
	stop = func() { cancel(); <-ended; watching.Wait() }

	var timeout <-chan time.Time
	if t := d.opts.unsealTimeout; t > 0 {
		timer := time.NewTimer(t)
		defer timer.Stop()
		timeout = timer.C
	}
	reason := func() error {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.lastErr == nil {
			return errors.New("no try has ended yet")
		}
		return h.lastErr
	}
	select {
	case <-h.opened:
		return stop, nil
	case <-ctx.Done():
		stop()
		return nil, errors.Join(ctx.Err(), reason())
	case <-timeout:
		stop()
		return nil, fmt.Errorf("%s: not unsealed in %v: %w", d.opts.device, d.opts.unsealTimeout, reason())
	case <-ended:
		cancel()
		watching.Wait()
		return nil, fmt.Errorf("%s: %w", d.opts.device, reason())
	}
}

// lookForVault takes over what the vault keys of the header ask for. That the last
// one is gone ends nothing: the looks cost little then.
func (d *daemon) lookForVault(ctx context.Context, runner *lifecycle.Runner) error {
	bits, remote := keySize(d.lifeHost.tokens(ctx))
	d.mu.Lock()
	same := bits == d.left.Bits && d.left.Remote
	d.mu.Unlock()
	if !remote || same || ctx.Err() != nil {
		return nil
	}
	c, err := d.opts.life.config(d.left.Phase, bits, true)
	if err != nil {
		return err
	}
	d.mu.Lock()
	d.left.Bits, d.left.Remote = bits, true
	d.mu.Unlock()
	d.log.Info("the volume's vault keys have changed, and are looked at from now on", zap.Duration("heartbeat", c.Heartbeat))
	runner.Watch(c)
	return nil
}

// eraseLock is how long an erase waits for the lock on the header. Anybody who may read
// an image can hold that.
var eraseLock = 10 * time.Second

// erase stops the volume for good and destroys every way into it. That is what the
// state erased is for: only who asks for it gets there. A header that is merely gone
// does not lead there, see tokens.
func (d *daemon) erase(ctx context.Context, uuid string) (*eraseAnswer, error) {
	d.mu.Lock()
	life, v := d.life, d.volume
	d.mu.Unlock()
	refuse := func(why string) (*eraseAnswer, error) {
		return nil, withCode(codeBusy, fmt.Errorf("%s; nothing was changed", why))
	}
	switch {
	case uuid != d.uuid:
		return refuse(fmt.Sprintf("this is volume %s, not %q", d.uuid, uuid))
	case d.opts.randomKey:
		return refuse("the volume's key is random and stored nowhere: 'hostcryptd lock --force' destroys it")
	case d.opts.readOnly:
		return refuse("the volume is served read-only")
	case life == nil || v == nil:
		return refuse("the volume is not unsealed yet: stop its server, and erase it then")
	}
	if err := life.Erase(ctx); errors.Is(err, lifecycle.ErrEnded) {
		return refuse("the server leaves the volume, to another or for good; ask again")
	} else if err != nil {
		return nil, err
	}
	v.ForgetHeader()
	ctx, cancel := context.WithTimeout(ctx, eraseLock)
	defer cancel()
	done, err := sector.EraseServed(ctx, d.device, d.uuid)
	d.opts.keys.recordChange(audit.Erase, d.uuid, d.opts.device+", in use", err)
	if err != nil {
		err = fmt.Errorf("the volume has stopped and its keys are wiped, but %s: %w", d.opts.device, err)
		if ctx.Err() != nil {
			err = fmt.Errorf("%w; 'lslocks' shows which one, and after it has ended erase can be repeated", err)
		}
		return nil, err
	}
	a := &eraseAnswer{Device: d.opts.device, UUID: d.uuid, Bytes: done.Bytes, Discarded: done.Discarded, OutOfReach: eraseOutOfReach}
	// After the erase, which waits for no other device.
	elsewhere, there := volumeElsewhere(ctx, eraseTab(), byUUID, d.device, d.uuid, true)
	pins := d.opts.keys.pinStore(d.log)
	if elsewhere != "" {
		if known, err := pins.Load(d.uuid); known != nil || err != nil {
			a.Kept, a.Elsewhere, a.There = d.uuid, elsewhere, there
		}
		return a, nil
	}
	if a.Pin, a.Chip, err = pins.Remove(d.uuid); err != nil {
		return nil, fmt.Errorf("%s is erased, but not what this host remembers of it: %w; 'hostcryptd header forget' removes that", d.opts.device, err)
	}
	return a, nil
}

// record writes to the log of key use.
func (d *daemon) record(r audit.Record) {
	r.Volume = d.uuid
	d.opts.keys.record(r)
}
