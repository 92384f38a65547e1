package lifecycle

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Config is how a machine is to behave. [Config.Check] fills in defaults.
type Config struct {
	// Heartbeat is the time between two looks at the KEK while all is well;
	// every one is drawn from ±20 % of it. Zero means that there is nothing to
	// look at: no probes are made.
	Heartbeat time.Duration

	// Rotation is the time between two looks for a newer version of the KEK,
	// likewise. Zero means never.
	Rotation time.Duration

	// Grace is how long after the last success a volume goes on whose access
	// was lost: 0 to 24 h.
	Grace time.Duration

	// Confirmations is how many denials, over at least ConfirmSpan, it takes to
	// believe them. Zero means 3 and 3 min. After a denial the next look is
	// made after about ConfirmSpan/Confirmations. A denial that comes too long
	// after the one before, see [Config.gap], is the first of a new row.
	Confirmations int
	ConfirmSpan   time.Duration

	// MaxOffline, if not zero, is how long after the last success a volume goes
	// on that gets no answer at all.
	MaxOffline time.Duration

	Policy Policy

	// Splay is the longest delay of the first try. Hosts that boot together,
	// after a power cut, don't ask together then.
	Splay time.Duration

	// Phase, in [0, 1), is where in the first heartbeat and rotation interval
	// this host begins: hosts that were unlocked together must not look
	// together.
	Phase float64

	// Random returns numbers in [0, 1); nil means math/rand/v2.
	Random func() float64
}

// gap is how far apart two denials may be to confirm each other. Between denials
// that follow at their pace is a third of ConfirmSpan, and 90 s for a look that
// gets no answer; of these a few may come between.
func (c *Config) gap() time.Duration { return max(2*c.ConfirmSpan, 10*time.Minute) }

// Limits and defaults of a Config.
const (
	DefaultHeartbeat = 10 * time.Minute
	DefaultRotation  = time.Hour
	DefaultGrace     = time.Hour
	MaxGrace         = 24 * time.Hour
	DefaultSplay     = 2 * time.Second

	DefaultConfirmSpan = 3 * time.Minute

	defaultConfirmations = 3
)

// Check fills in defaults and returns an error if the configuration can't be
// meant.
func (c *Config) Check() error {
	if c.Confirmations == 0 {
		c.Confirmations = defaultConfirmations
	}
	if c.ConfirmSpan == 0 {
		c.ConfirmSpan = DefaultConfirmSpan
	}
	if c.Random == nil {
		c.Random = rand.Float64
	}
	switch {
	case c.Grace < 0 || c.Grace > MaxGrace:
		return fmt.Errorf("a grace period of %v; it's 0 to %v", c.Grace, MaxGrace)
	case c.Heartbeat < 0 || c.Rotation < 0 || c.MaxOffline < 0 || c.Splay < 0 || c.ConfirmSpan < 0 || c.Confirmations < 0:
		return errors.New("a time that is negative")
	case c.Heartbeat > 0 && c.Heartbeat < time.Second || c.Rotation > 0 && c.Rotation < time.Second:
		return errors.New("an interval of less than a second would be a load test")
	case c.MaxOffline > 0 && c.Heartbeat == 0:
		return errors.New("a limit for the time offline needs a heartbeat")
	case c.MaxOffline > 0 && c.MaxOffline < c.Heartbeat*6/5:
		return fmt.Errorf("a limit of %v for the time offline; the heartbeat of %v can't keep that", c.MaxOffline, c.Heartbeat)
	case c.Phase < 0 || c.Phase >= 1:
		return fmt.Errorf("a phase of %v; it's 0 to 1", c.Phase)
	case c.Policy < Stop || c.Policy > Warn:
		return fmt.Errorf("%v is no policy", c.Policy)
	}
	return nil
}

// A Snapshot is what a machine knows, to be shown.
type Snapshot struct {
	State  State     `json:"state"`
	Since  time.Time `json:"since"`
	Policy Policy    `json:"policy"`

	// LastGood is when the KEK was last used with success.
	LastGood time.Time `json:"last_good,omitzero"`
	// NextTry is when it will be used next, zero if that isn't planned.
	NextTry time.Time `json:"next_try,omitzero"`
	// Attempts counts all uses, Failures those since the last success, Denials
	// the authoritative ones among these.
	Attempts int `json:"attempts"`
	Failures int `json:"failures"`
	Denials  int `json:"denials"`

	// AccessLost is when the first of the denials came; StopsAt when the volume
	// is going to stop; Stopped when it had stopped and, if the policy says so,
	// its keys were wiped.
	AccessLost time.Time `json:"access_lost,omitzero"`
	StopsAt    time.Time `json:"stops_at,omitzero"`
	Stopped    time.Time `json:"stopped,omitzero"`
	Wiped      bool      `json:"wiped"` // there are no keys

	Locked  bool `json:"locked"`  // by an operator
	Expired bool `json:"expired"` // the KEK has
	Alarm   bool `json:"alarm"`   // an operator should look

	// Of the last attempt that failed, since the last success.
	Kind      Kind   `json:"kind"`
	Class     string `json:"class,omitempty"`
	Code      string `json:"code,omitempty"`
	RequestID string `json:"request_id,omitempty"`
	Reason    string `json:"reason,omitempty"`
}

// A Machine is the state of one volume's key. It isn't used by several
// goroutines at once.
type Machine struct {
	c Config

	state State
	since time.Time
	halt  Policy // of a Halt that is due or done

	lastGood                       time.Time
	attempts, failures, denials    int
	refused                        int // transient failures with an answer, in a row
	firstDenial, lastDenial        time.Time
	stopsAt, stopped               time.Time
	offline                        bool // MaxOffline is the reason to stop
	wiped, locked, erased, givenUp bool
	halting                        bool // a Halt is due
	lifting                        bool // a Lift is due
	expired, alarm                 bool
	last                           Outcome
	nextTry, nextRotate            time.Time // zero for never
	begun                          bool      // has been unlocked before
}

// New returns a machine that wants to unseal. The configuration has been
// checked.
func New(c Config, now time.Time) *Machine {
	m := &Machine{c: c, state: Acquiring, since: now, wiped: true}
	m.nextTry = now.Add(m.upTo(c.Splay))
	return m
}

// Restore returns a machine that goes on where another has ended, of which the
// Snapshot is left. wiped tells whether the volume has keys now. If they are
// gone and the Snapshot doesn't say why, somebody was about to stop the volume:
// it is locked then, which an operator can undo, rather than unsealed again. The
// wall clock may have been set back since, which makes no wait longer than it can be.
func Restore(c Config, s Snapshot, wiped bool, now time.Time) *Machine {
	m := &Machine{
		c: c, state: s.State, since: s.Since, begun: true, wiped: wiped,
		lastGood: s.LastGood, attempts: s.Attempts, failures: s.Failures, denials: s.Denials,
		firstDenial: s.AccessLost, lastDenial: now, stopsAt: s.StopsAt, stopped: s.Stopped, locked: s.Locked,
		expired: s.Expired, alarm: s.Alarm, nextTry: s.NextTry,
		last: Outcome{Kind: s.Kind, Class: s.Class, Code: s.Code, RequestID: s.RequestID, Text: s.Reason},
	}
	m.erased = s.State == Erased
	switch {
	case wiped && !s.Wiped:
		m.locked, m.nextTry = true, time.Time{}
		m.to(Locked, now)
	case s.Locked && !wiped:
		// A lock that was not carried out.
		m.halting, m.halt = true, Stop
	case !wiped && m.nextTry.IsZero() && c.Heartbeat > 0:
		m.nextTry = now.Add(m.phase(c.Heartbeat))
	}
	if !wiped {
		m.planRotate(now)
	}
	// Before Grace, only MaxOffline sets when it stops; a denial that isn't confirmed
	// changes nothing of that.
	m.offline = s.State != Grace && !m.stopsAt.IsZero()
	atMost := func(t *time.Time, limit time.Time) {
		if t.After(limit) {
			*t = limit
		}
	}
	for _, past := range []*time.Time{&m.since, &m.lastGood, &m.firstDenial, &m.stopped} {
		atMost(past, now)
	}
	atMost(&m.nextTry, now.Add(max(c.Heartbeat, integrityPace)+max(c.Heartbeat/5, integrityPace/3)))
	switch {
	case !m.offline:
		atMost(&m.stopsAt, now.Add(c.Grace))
	case c.MaxOffline > 0:
		atMost(&m.stopsAt, now.Add(c.MaxOffline))
	}
	return m
}

// Shift is called when the wall clock was set by d: what was to happen in a minute
// still happens in a minute, and what was an hour ago stays that.
func (m *Machine) Shift(d time.Duration) {
	for _, t := range []*time.Time{&m.since, &m.lastGood, &m.firstDenial, &m.lastDenial, &m.stopsAt, &m.stopped, &m.nextTry, &m.nextRotate} {
		if !t.IsZero() {
			*t = t.Add(d)
		}
	}
}

// upTo draws from 0 to d.
func (m *Machine) upTo(d time.Duration) time.Duration {
	return time.Duration(m.c.Random() * float64(d))
}

// about draws from ±20 % of d.
func (m *Machine) about(d time.Duration) time.Duration {
	return d*4/5 + m.upTo(d*2/5)
}

// How often to try when it isn't a matter of load.
const (
	deniedPace    = time.Minute      // to 5 min, to unseal where access was denied
	integrityPace = 15 * time.Minute // to 20 min, after an integrity error
	leastPace     = 5 * time.Second  // before a stop because of MaxOffline
)

// Next returns what to do and from when on. Nothing has no time.
func (m *Machine) Next() (Action, time.Time) {
	switch {
	case m.halting:
		return Halt, m.since
	case m.lifting:
		return Lift, m.since
	case m.givenUp:
		return GiveUp, m.since
	case m.erased:
		return Nothing, time.Time{}
	}
	action, at := Nothing, time.Time{}
	earliest := func(a Action, t time.Time) {
		if !t.IsZero() && (at.IsZero() || t.Before(at)) {
			action, at = a, t
		}
	}
	// The order decides between equal times: rather a look at the key than a
	// stop, so that it stops for a fresh reason.
	if m.wiped {
		earliest(Unseal, m.nextTry)
	} else {
		earliest(Probe, m.nextTry)
		earliest(Rotate, m.nextRotate)
		earliest(Halt, m.stopsAt)
	}
	return action, at
}

// Snapshot returns what the machine knows.
func (m *Machine) Snapshot() Snapshot {
	return Snapshot{
		State: m.state, Since: m.since, Policy: m.c.Policy,
		LastGood: m.lastGood, NextTry: m.nextTry,
		Attempts: m.attempts, Failures: m.failures, Denials: m.denials,
		AccessLost: m.firstDenial, StopsAt: m.stopsAt, Stopped: m.stopped, Wiped: m.wiped,
		Locked: m.locked, Expired: m.expired, Alarm: m.alarm,
		Kind: m.last.Kind, Class: m.last.Class, Code: m.last.Code, RequestID: m.last.RequestID, Reason: m.last.Text,
	}
}

func (m *Machine) to(s State, now time.Time) {
	if m.state != s {
		m.state, m.since = s, now
	}
}

// KeyObtained is called during an Unseal when the volume key is there and the
// header is about to be checked.
func (m *Machine) KeyObtained(now time.Time) {
	if m.state == Acquiring {
		m.to(Verifying, now)
	}
}

// judge counts an attempt.
func (m *Machine) judge(o Outcome) {
	m.attempts++
	if o.Kind == Success {
		m.expired = o.Expired
	} else {
		m.failures++
		m.last = o
	}
}

// good is what every success does.
func (m *Machine) good(now time.Time) {
	m.lastGood = now
	m.failures, m.denials, m.refused = 0, 0, 0
	m.firstDenial, m.stopsAt, m.stopped = time.Time{}, time.Time{}, time.Time{}
	m.offline = false
	m.last = Outcome{Kind: Success}
	m.alarm = m.expired
	m.nextTry = time.Time{}
	if m.c.Heartbeat > 0 {
		m.nextTry = now.Add(m.about(m.c.Heartbeat))
	}
}

// Unsealed is called at the end of an Unseal: with Success the volume serves.
func (m *Machine) Unsealed(now time.Time, o Outcome) {
	if m.locked || m.erased {
		// A command came while the attempt was under way; what it unlocked
		// has to be stopped again.
		if o.Kind == Success {
			m.wiped = false
			m.halting, m.halt = true, Stop
		}
		return
	}
	m.judge(o)
	idle := Acquiring // what the volume is called between two tries
	if !m.stopped.IsZero() {
		idle = Revoked
	}
	switch o.Kind {
	case Success:
		m.good(now)
		m.wiped = false
		m.to(Unlocked, now)
		if !m.begun {
			m.begun = true
			if m.c.Heartbeat > 0 {
				m.nextTry = now.Add(m.phase(m.c.Heartbeat))
			}
		}
		m.planRotate(now)
		m.watchOffline()
		return
	case Transient:
		// After an outage the crowd of those who waited begins anew.
		n := m.failures - 1
		if o.Answered {
			n = m.refused
			m.refused++
		} else {
			m.refused = 0
		}
		m.nextTry = now.Add(Backoff(o, n, m.c.Random()))
	case Denied:
		// At boot as well as after a revocation: a grant takes minutes to
		// arrive, and a person may be about to give it.
		m.nextTry = now.Add(max(o.RetryAfter, deniedPace) + m.upTo(4*deniedPace))
	case Misconfigured:
		if m.stopped.IsZero() && !m.begun {
			m.givenUp = true
			m.nextTry = time.Time{}
			m.to(Locked, now)
			return
		}
		m.alarm = true
		m.nextTry = now.Add(integrityPace + m.upTo(integrityPace/3))
	case Integrity:
		m.alarm = true
		m.nextTry = now.Add(integrityPace + m.upTo(integrityPace/3))
		if idle == Acquiring {
			idle = Locked
		}
	}
	m.to(idle, now)
}

// phase is when the first of a row of looks is due: 5 s to d.
func (m *Machine) phase(d time.Duration) time.Duration {
	return max(min(5*time.Second, d), time.Duration(m.c.Phase*float64(d)))
}

// planRotate plans the first of a row of looks for a newer version of the KEK.
func (m *Machine) planRotate(now time.Time) {
	if m.c.Rotation > 0 {
		m.nextRotate = now.Add(m.phase(m.c.Rotation))
	}
}

// watchOffline plans the end of a volume that gets no answer.
func (m *Machine) watchOffline() {
	if m.c.MaxOffline > 0 && m.c.Policy != Warn {
		m.stopsAt, m.offline = m.lastGood.Add(m.c.MaxOffline), true
	}
}

// Probed is called at the end of a Probe.
func (m *Machine) Probed(now time.Time, o Outcome) {
	if m.wiped || m.halting || m.erased {
		return // what it says was overtaken
	}
	m.judge(o)
	if o.Kind == Success {
		m.good(now)
		m.watchOffline()
		if m.state == Revoked {
			m.lifting = true
			return
		}
		m.to(Unlocked, now)
		return
	}
	restricted := m.state == Revoked
	switch o.Kind {
	case Denied:
		if m.state != Grace && !restricted && now.Sub(m.lastDenial) > m.c.gap() {
			m.denials = 0 // what was said before a long outage may not be so any more
		}
		if m.denials++; m.denials == 1 {
			m.firstDenial = now
		}
		m.lastDenial = now
		if m.denials >= m.c.Confirmations && now.Sub(m.firstDenial) >= m.c.ConfirmSpan && !restricted {
			m.to(Grace, now)
			m.alarm = true
			at := m.lastGood.Add(m.c.Grace)
			if at.Before(now) {
				at = now
			}
			if m.c.Policy != Warn && (m.stopsAt.IsZero() || m.offline && at.Before(m.stopsAt)) {
				m.stopsAt, m.offline = at, false
			}
		}
	case Integrity, Misconfigured:
		m.alarm = true
	}
	if !restricted && m.state != Grace {
		m.to(Degraded, now)
	}
	switch {
	case m.denials > 0:
		// To confirm them soon, or to see soon that the key has returned.
		m.nextTry = now.Add(max(o.RetryAfter, m.about(m.c.ConfirmSpan/time.Duration(m.c.Confirmations))))
	case o.Kind == Transient:
		// There is no hurry: the volume serves. So the hosts of a vault that
		// is in trouble leave it alone.
		limit := max(m.c.Heartbeat/2, time.Second)
		wait := min(5*time.Second<<min(m.failures-1, 10), limit)
		m.nextTry = now.Add(o.RetryAfter + m.about(wait))
	default:
		m.nextTry = now.Add(max(integrityPace, m.c.Heartbeat) + m.upTo(integrityPace/3))
	}
	if half := m.stopsAt.Sub(now) / 2; m.offline && half > leastPace {
		// One failure that is over by then must not be the last word: after half of what
		// is left, and half of that, which are ten looks of two hours.
		if at := now.Add(max(o.RetryAfter, half)); at.Before(m.nextTry) {
			m.nextTry = at
		}
	}
}

// Rotated is called at the end of a Rotate. A failure changes nothing else: the
// token that is there goes on being good. One that passes, such as a vault that
// has to serve all of its hosts at once, is tried again after a quarter of the
// interval, not after all of it. 10,000 hosts at a vault of 250 requests in 10 s
// have all rewrapped after 114 minutes then, of which 108 are the least possible
// (fleet.md); with all of it after 180, with a sixth after 110 and half as many
// requests again that were refused.
func (m *Machine) Rotated(now time.Time, o Outcome) {
	wait := m.about(m.c.Rotation)
	if o.Kind == Transient {
		wait = max(o.RetryAfter, m.about(m.c.Rotation/4))
	}
	m.nextRotate = now.Add(wait)
}

// HaltPolicy is the policy by which a Halt is to be done.
func (m *Machine) HaltPolicy() Policy {
	if m.halting {
		return m.halt
	}
	return m.c.Policy
}

// Halted is called at the end of a Halt: the volume has stopped and, if the
// policy wipes them, its keys are gone.
func (m *Machine) Halted(now time.Time) {
	policy := m.HaltPolicy()
	m.halting = false
	m.stopsAt, m.nextRotate = time.Time{}, time.Time{}
	m.wiped = m.wiped || policy.Wipes()
	if m.stopped.IsZero() {
		m.stopped = now
	}
	switch {
	case m.erased:
		m.nextTry = time.Time{}
		m.to(Erased, now)
	case m.locked:
		m.nextTry = time.Time{}
		m.to(Locked, now)
	default:
		m.alarm = true
		m.failures = 0
		m.nextTry = now.Add(deniedPace + m.upTo(4*deniedPace))
		if m.offline {
			m.nextTry = now.Add(m.upTo(deniedPace))
		}
		m.to(Revoked, now)
	}
}

// Lifted is called at the end of a Lift: the volume serves again.
func (m *Machine) Lifted(now time.Time) {
	m.lifting = false
	m.stopped = time.Time{}
	m.planRotate(now)
	m.to(Unlocked, now)
}

// Lock is an operator's command: stop now, without grace, and stay so until
// Unlock. It stops by the policy Stop, whatever the volume's is.
func (m *Machine) Lock(now time.Time) {
	if m.erased {
		return
	}
	m.locked, m.lifting, m.givenUp = true, false, false
	m.nextTry = time.Time{}
	m.haltNow(Locked, now)
}

// haltNow plans a Halt that leads to a state, which is reached at once by a volume
// that has never served. One that has stopped is halted again: as Freeze has left it,
// requests wait for a key that may not come any more.
func (m *Machine) haltNow(s State, now time.Time) {
	if m.wiped && !m.begun {
		m.to(s, now)
		return
	}
	m.halting, m.halt = true, Stop
}

// Unlock takes a Lock back, and tries now where the machine is waiting for
// another try.
func (m *Machine) Unlock(now time.Time) {
	if m.erased {
		return
	}
	m.locked = false
	if !m.wiped && m.state != Unlocked && !m.nextTry.IsZero() {
		m.nextTry = now // the operator knows that the key is back
	}
	if m.wiped && !m.halting {
		m.failures = 0
		m.nextTry = now
		if m.stopped.IsZero() || m.state == Locked {
			m.stopped = time.Time{}
			m.to(Acquiring, now)
		}
	}
}

// Watch takes over Heartbeat, Rotation and MaxOffline of c, since other KEKs are to
// be looked at from now on. Where there was none that could be taken away, what
// counts from the last success counts from now, since nobody has looked before.
// Otherwise nothing else changes before the next look.
func (m *Machine) Watch(c Config, now time.Time) {
	looks := m.c.Heartbeat > 0
	m.c.Heartbeat, m.c.Rotation, m.c.MaxOffline = c.Heartbeat, c.Rotation, c.MaxOffline
	if m.wiped || m.halting || looks {
		return // unsealing it, or the look that is due, plans the rest
	}
	m.lastGood = now
	if m.c.Heartbeat > 0 {
		m.nextTry = now.Add(m.phase(m.c.Heartbeat))
	}
	m.planRotate(now)
	m.watchOffline()
}

// Erase is a command: stop now, for good.
func (m *Machine) Erase(now time.Time) {
	m.erased, m.lifting, m.givenUp = true, false, false
	m.nextTry = time.Time{}
	m.haltNow(Erased, now)
}

// Backoff returns how long to wait after failure number n (from 0) of a row of
// failures to unseal, given a random r in [0, 1). It's exponential with full
// jitter, so that hosts that failed together don't come back together: uniform
// between 0 and 1 s * 2ⁿ, at most 15 s after no answer. After an answer, of a
// service that has too much to do, it's at most 16 s, and from the twelfth failure
// on more, up to 60 s. What the service asked for is added.
//
// The steps are from fleet.md: with a limit of 60 s from the start, the last of
// 10,000 hosts at a vault that serves 4000 in 10 s came after 3.9 times the
// physical minimum, because it had been sent away for longer than the crowd
// lasted.
func Backoff(o Outcome, n int, r float64) time.Duration {
	limit := 15 * time.Second
	if o.Answered {
		switch {
		case n < 11:
			limit = 16 * time.Second
		case n < 15:
			limit = 32 * time.Second
		default:
			limit = 60 * time.Second
		}
	}
	ceiling := min(limit, time.Second<<max(0, min(n, 10)))
	return o.RetryAfter + time.Duration(r*float64(ceiling))
}

// HeartbeatFor is the heartbeat for an RSA key of a size, or another key for 0
// bits: longer for those of which a vault unwraps fewer in a second. 10,000 hosts
// then take a quarter of what an HSM vault serves with RSA-4096 keys, 250
// unwraps in 10 s, and less of others (service limits of Key Vault).
func HeartbeatFor(bits int) time.Duration {
	switch {
	case bits > 3072:
		return 3 * DefaultHeartbeat
	case bits > 2048:
		return 3 * DefaultHeartbeat / 2
	}
	return DefaultHeartbeat
}
