package lifecycle

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func config(t testing.TB, change func(*Config)) Config {
	t.Helper()
	c := Config{Heartbeat: DefaultHeartbeat, Rotation: DefaultRotation, Grace: DefaultGrace, Random: func() float64 { return 0.5 }}
	if change != nil {
		change(&c)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	return c
}

// A step is something that happens at a time, and what is to be seen then.
type step struct {
	at    time.Duration // since the epoch
	event string        // see play
	want  string        // state, next action and its time
}

// play gives an event to a machine.
func play(t testing.TB, m *Machine, event string, now time.Time) {
	t.Helper()
	what, with, _ := strings.Cut(event, " ")
	o := Outcome{Text: with}
	switch with {
	case "success", "expired":
		o = Outcome{Kind: Success, Expired: with == "expired"}
	case "denied":
		o.Kind = Denied
	case "integrity":
		o.Kind = Integrity
	case "misconfigured":
		o.Kind = Misconfigured
	case "throttled":
		o.Answered = true
	case "later": // the service names a time
		o.Answered, o.RetryAfter = true, 100*time.Second
	}
	switch what {
	case "":
	case "key":
		m.KeyObtained(now)
	case "unseal":
		m.Unsealed(now, o)
	case "probe":
		m.Probed(now, o)
	case "rotate":
		m.Rotated(now, o)
	case "halted":
		m.Halted(now)
	case "lifted":
		m.Lifted(now)
	case "lock":
		m.Lock(now)
	case "unlock":
		m.Unlock(now)
	case "erase":
		m.Erase(now)
	default:
		t.Fatalf("unknown event %q", event)
	}
}

func describe(m *Machine) string {
	action, at := m.Next()
	if action == Nothing {
		return fmt.Sprintf("%v: nothing", m.state)
	}
	if action == Halt || action == Lift || action == GiveUp {
		if at.Sub(m.since) <= 0 {
			return fmt.Sprintf("%v: %v", m.state, action)
		}
	}
	return fmt.Sprintf("%v: %v at %v", m.state, action, at.Sub(epoch))
}

const (
	s      = time.Second
	minute = time.Minute
	h      = time.Hour
)

// TestTransitions goes through the life of a key, each row a life. All random
// draws give the middle.
func TestTransitions(t *testing.T) {
	for _, tt := range []struct {
		name   string
		config func(*Config)
		steps  []step
	}{
		{"boot", func(c *Config) { c.Splay, c.Phase = 2*s, 0.25 }, []step{
			{0, "", "acquiring: unseal at 1s"},
			{1 * s, "key", "verifying: unseal at 1s"},
			{1 * s, "unseal success", "unlocked: probe at 2m31s"},
			{151 * s, "probe success", "unlocked: probe at 12m31s"},
			{751 * s, "probe success", "unlocked: rotate at 15m1s"},
			{901 * s, "rotate success", "unlocked: probe at 22m31s"},
			{1351 * s, "probe success", "unlocked: probe at 32m31s"},
			{1951 * s, "probe success", "unlocked: probe at 42m31s"},
			{2551 * s, "probe success", "unlocked: probe at 52m31s"},
			{3151 * s, "probe success", "unlocked: probe at 1h2m31s"},
			{3751 * s, "probe success", "unlocked: probe at 1h12m31s"},
			{4351 * s, "probe success", "unlocked: rotate at 1h15m1s"},
			{4501 * s, "rotate throttled", "unlocked: probe at 1h22m31s"},
			{4951 * s, "probe success", "unlocked: rotate at 1h30m1s"},
			{5401 * s, "rotate later", "unlocked: probe at 1h32m31s"},
		}},
		{"outage at boot: exponential, capped", nil, []step{
			{0, "", "acquiring: unseal at 0s"},
			{0, "unseal unreachable", "acquiring: unseal at 500ms"},
			{1 * s, "unseal unreachable", "acquiring: unseal at 2s"},
			{2 * s, "unseal unreachable", "acquiring: unseal at 4s"},
			{4 * s, "unseal unreachable", "acquiring: unseal at 8s"},
			{8 * s, "unseal unreachable", "acquiring: unseal at 15.5s"},
			{h, "unseal unreachable", "acquiring: unseal at 1h0m7.5s"},
			{2 * h, "unseal throttled", "acquiring: unseal at 2h0m0.5s"},
			{3 * h, "unseal later", "acquiring: unseal at 3h1m41s"},
			{4 * h, "unseal success", "unlocked: probe at 4h0m5s"},
		}},
		{"denied at boot: slow, for ever", nil, []step{
			{0, "unseal denied", "acquiring: unseal at 3m0s"},
			{3 * minute, "unseal denied", "acquiring: unseal at 6m0s"},
			{6 * minute, "unseal later", "acquiring: unseal at 7m40.5s"},
			{9 * minute, "unseal success", "unlocked: probe at 9m5s"},
		}},
		{"integrity at boot: stays locked, alarms, tries seldom", nil, []step{
			{0, "key", "verifying: unseal at 0s"},
			{0, "unseal integrity", "locked: unseal at 17m30s"},
			{18 * minute, "unseal integrity", "locked: unseal at 35m30s"},
			{36 * minute, "unseal success", "unlocked: probe at 36m5s"},
		}},
		{"misconfigured at boot: ends", nil, []step{
			{0, "unseal misconfigured", "locked: give up"},
		}},
		{"outage while unlocked takes nothing away", nil, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{5 * s, "probe unreachable", "degraded: rotate at 5s"},
			{5 * s, "rotate success", "degraded: probe at 10s"},
			{10 * s, "probe unreachable", "degraded: probe at 20s"},
			{20 * s, "probe throttled", "degraded: probe at 40s"},
			{30 * h, "probe unreachable", "degraded: rotate at 1h0m5s"},
			{30 * h, "rotate success", "degraded: probe at 30h0m40s"},
			{60 * h, "probe unreachable", "degraded: rotate at 31h0m0s"},
			{60 * h, "probe success", "unlocked: rotate at 31h0m0s"},
		}},
		{"offline limit", func(c *Config) { c.MaxOffline, c.Rotation = 20*minute, 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{5 * s, "probe success", "unlocked: probe at 10m5s"},
			{605 * s, "probe unreachable", "degraded: probe at 10m10s"},
			{19 * minute, "probe unreachable", "degraded: probe at 19m10s"},
			{20 * minute, "probe unreachable", "degraded: halt at 20m5s"},
			{1205 * s, "halted", "revoked: unseal at 20m35s"},
			{1235 * s, "unseal success", "unlocked: probe at 30m35s"},
		}},
		{"revoked after confirmation and grace", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{5 * s, "probe success", "unlocked: probe at 10m5s"},
			{605 * s, "probe denied", "degraded: probe at 11m5s"},
			{665 * s, "probe denied", "degraded: probe at 12m5s"},
			{725 * s, "probe denied", "degraded: probe at 13m5s"}, // three, but over 2 min
			{785 * s, "probe denied", "grace: probe at 14m5s"},
			{845 * s, "probe unreachable", "grace: probe at 15m5s"},
			{3600 * s, "probe denied", "grace: halt at 1h0m5s"}, // an hour after the last success
			{3605 * s, "halted", "revoked: unseal at 1h3m5s"},
			{3785 * s, "unseal denied", "revoked: unseal at 1h6m5s"},
			{4000 * s, "unseal unreachable", "revoked: unseal at 1h6m41s"},
			{4001 * s, "key", "revoked: unseal at 1h6m41s"},
			{4002 * s, "unseal success", "unlocked: probe at 1h16m42s"},
		}},
		{"a transient failure neither confirms nor clears", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe unreachable", "degraded: probe at 3m0s"},
			{3 * minute, "probe denied", "degraded: probe at 4m0s"},
			{5 * minute, "probe denied", "grace: probe at 6m0s"},
		}},
		{"denials hours apart don't confirm each other", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe unreachable", "degraded: probe at 3m0s"},
			{2 * h, "probe denied", "degraded: probe at 2h1m0s"},
			{2*h + minute, "probe denied", "degraded: probe at 2h2m0s"},
			{2*h + 2*minute, "probe denied", "degraded: probe at 2h3m0s"},
			{2*h + 3*minute, "probe denied", "grace: halt"},
		}},
		{"a success clears", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{3 * minute, "probe success", "unlocked: probe at 13m0s"},
			{13 * minute, "probe denied", "degraded: probe at 14m0s"},
			{14 * minute, "probe denied", "degraded: probe at 15m0s"},
			{17 * minute, "probe denied", "grace: probe at 18m0s"},
			{18 * minute, "probe success", "unlocked: probe at 28m0s"},
		}},
		{"no grace", func(c *Config) { c.Grace, c.Rotation = 0, 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{4 * minute, "probe denied", "grace: halt"},
			{4 * minute, "halted", "revoked: unseal at 7m0s"},
		}},
		{"policy read-only keeps the keys", func(c *Config) { c.Grace, c.Rotation, c.Policy = 0, 0, ReadOnly }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{4 * minute, "probe denied", "grace: halt"},
			{4 * minute, "halted", "revoked: probe at 7m0s"},
			{7 * minute, "probe denied", "revoked: probe at 8m0s"},
			{8 * minute, "probe success", "revoked: lift"},
			{8 * minute, "lifted", "unlocked: probe at 18m0s"},
		}},
		{"policy freeze wipes the keys", func(c *Config) { c.Grace, c.Rotation, c.Policy = 0, 0, Freeze }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{4 * minute, "probe denied", "grace: halt"},
			{4 * minute, "halted", "revoked: unseal at 7m0s"},
		}},
		{"policy warn goes on", func(c *Config) { c.Grace, c.Rotation, c.Policy = 0, 0, Warn }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{4 * minute, "probe denied", "grace: probe at 5m0s"},
			{9 * h, "probe denied", "grace: probe at 9h1m0s"},
			{9 * h, "probe success", "unlocked: probe at 9h10m0s"},
		}},
		{"expired: a warning", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal expired", "unlocked: probe at 5s"},
			{1 * minute, "probe expired", "unlocked: probe at 11m0s"},
		}},
		{"integrity while unlocked alarms and goes on", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe integrity", "degraded: probe at 18m30s"},
			{19 * minute, "probe success", "unlocked: probe at 29m0s"},
		}},
		{"an operator locks and unlocks", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "lock", "unlocked: halt"},
			{1 * minute, "halted", "locked: nothing"},
			{2 * minute, "probe success", "locked: nothing"}, // was under way
			{2 * minute, "unlock", "acquiring: unseal at 2m0s"},
			{2 * minute, "unseal success", "unlocked: probe at 12m0s"},
		}},
		{"locked while it is being unsealed", nil, []step{
			{0, "lock", "locked: nothing"},
			{1 * s, "unseal success", "locked: halt"},
			{1 * s, "halted", "locked: nothing"},
			{2 * s, "unseal denied", "locked: nothing"},
		}},
		{"locked while revoked", func(c *Config) { c.Grace, c.Rotation, c.Policy = 0, 0, ReadOnly }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{2 * minute, "probe denied", "degraded: probe at 3m0s"},
			{4 * minute, "probe denied", "grace: halt"},
			{4 * minute, "halted", "revoked: probe at 7m0s"},
			{5 * minute, "lock", "revoked: halt"}, // which wipes the keys that read-only keeps
			{5 * minute, "halted", "locked: nothing"},
			{6 * minute, "unlock", "acquiring: unseal at 6m0s"},
		}},
		{"locked while frozen", func(c *Config) { c.Grace, c.Rotation, c.Policy = 0, 0, Freeze }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{5 * s, "probe denied", "degraded: probe at 1m5s"},
			{65 * s, "probe denied", "degraded: probe at 2m5s"},
			{185 * s, "probe denied", "grace: halt"},
			{185 * s, "halted", "revoked: unseal at 6m5s"},
			{5 * minute, "lock", "revoked: halt"}, // which ends the wait of what is frozen
			{5 * minute, "halted", "locked: nothing"},
			{6 * minute, "unlock", "acquiring: unseal at 6m0s"},
			{6 * minute, "unseal denied", "acquiring: unseal at 9m0s"},
			{7 * minute, "erase", "acquiring: halt"},
			{7 * minute, "halted", "erased: nothing"},
		}},
		{"unlock hurries a try", nil, []step{
			{0, "unseal denied", "acquiring: unseal at 3m0s"},
			{1 * minute, "unlock", "acquiring: unseal at 1m0s"},
		}},
		{"unlock hurries a look", func(c *Config) { c.Rotation = 0 }, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "unlock", "unlocked: probe at 5s"},
			{1 * minute, "probe denied", "degraded: probe at 2m0s"},
			{65 * s, "unlock", "degraded: probe at 1m5s"},
		}},
		{"erased", nil, []step{
			{0, "unseal success", "unlocked: probe at 5s"},
			{1 * minute, "erase", "unlocked: halt"},
			{1 * minute, "halted", "erased: nothing"},
			{2 * minute, "unlock", "erased: nothing"},
			{2 * minute, "lock", "erased: nothing"},
			{2 * minute, "unseal denied", "erased: nothing"},
		}},
		{"erased while locked", nil, []step{
			{0, "erase", "erased: nothing"},
			{1 * minute, "unseal success", "erased: halt"},
			{1 * minute, "halted", "erased: nothing"},
		}},
		{"a KEK that nobody can take away", func(c *Config) { c.Heartbeat, c.Rotation = 0, 0 }, []step{
			{0, "unseal success", "unlocked: nothing"},
			{h, "lock", "unlocked: halt"},
			{h, "halted", "locked: nothing"},
			{h, "unlock", "acquiring: unseal at 1h0m0s"},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := New(config(t, tt.config), epoch)
			for i, st := range tt.steps {
				play(t, m, st.event, epoch.Add(st.at))
				if got := describe(m); got != st.want {
					t.Fatalf("step %d, %q at %v: %q, want %q", i, st.event, st.at, got, st.want)
				}
			}
		})
	}
}

// TestSnapshot follows what status shows through a revocation.
func TestSnapshot(t *testing.T) {
	m := New(config(t, func(c *Config) { c.Grace, c.Rotation = 10*minute, 0 }), epoch)
	m.Unsealed(epoch, Outcome{Kind: Success})
	for i := range 4 {
		m.Probed(epoch.Add(time.Duration(i+1)*minute), Outcome{Kind: Denied, Class: "key unusable", Code: "KeyDisabled", RequestID: "r1", Text: "it's disabled"})
	}
	got := m.Snapshot()
	want := Snapshot{
		State: Grace, Since: epoch.Add(4 * minute), LastGood: epoch, NextTry: epoch.Add(5 * minute), Attempts: 5, Failures: 4, Denials: 4,
		AccessLost: epoch.Add(1 * minute), StopsAt: epoch.Add(10 * minute), Alarm: true,
		Kind: Denied, Class: "key unusable", Code: "KeyDisabled", RequestID: "r1", Reason: "it's disabled",
	}
	if got != want {
		t.Errorf("in grace:\n%+v, want\n%+v", got, want)
	}
	m.Halted(epoch.Add(10 * minute))
	if got := m.Snapshot(); got.State != Revoked || !got.Wiped || got.Stopped != epoch.Add(10*minute) || got.AccessLost != epoch.Add(1*minute) || !got.StopsAt.IsZero() {
		t.Errorf("revoked: %+v", got)
	}
	m.Unsealed(epoch.Add(20*minute), Outcome{Kind: Success})
	if got := m.Snapshot(); got.State != Unlocked || got.Wiped || !got.Stopped.IsZero() || !got.AccessLost.IsZero() || got.Alarm || got.Failures != 0 || got.Class != "" || got.Kind != Success {
		t.Errorf("resumed: %+v", got)
	}
}

// TestInvariants gives machines random lives, a million events of them, and
// checks after each event what must never be otherwise.
func TestInvariants(t *testing.T) {
	events := []string{"success", "expired", "denied", "denied", "denied", "unreachable", "throttled", "later", "integrity"}
	reached := make(map[State]int)
	for seed := range uint64(2000) {
		r := rand.New(rand.NewPCG(seed, 42))
		c := config(t, func(c *Config) {
			c.Random = r.Float64
			c.Grace = []time.Duration{0, 10 * minute, h, 24 * h}[r.IntN(4)]
			c.MaxOffline = []time.Duration{0, 0, 30 * minute}[r.IntN(3)]
			c.Policy = Policy(r.IntN(4))
			c.Phase = r.Float64()
		})
		m := New(c, epoch)
		now := epoch
		var history []string
		var lastGood, firstDenial time.Time
		denials, commanded, everGood := 0, false, false
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("seed %d, %v, policy %v, grace %v: %s\n%s", seed, describe(m), c.Policy, c.Grace, fmt.Sprintf(format, args...), strings.Join(history, "\n"))
		}
		// Which outcomes are likely changes from time to time.
		mood := events
		for range 500 {
			if r.IntN(20) == 0 {
				mood = [][]string{events, {"success"}, {"denied"}, {"unreachable", "throttled"}, {"denied", "unreachable"}}[r.IntN(5)]
			}
			action, at := m.Next()
			before := m.state
			switch {
			case action == Nothing && !m.locked && !m.erased && c.Heartbeat > 0:
				fail("nothing will ever happen")
			case action != Nothing && at.After(now):
				if wait := at.Sub(now); wait > 24*h+h {
					fail("waits %v", wait)
				}
				now = at
			}
			if r.IntN(100) == 0 {
				event := []string{"lock", "unlock", "unlock"}[r.IntN(3)]
				history = append(history, now.Sub(epoch).String()+" "+event)
				commanded = commanded || event == "lock"
				play(t, m, event, now)
				continue
			}
			with := mood[r.IntN(len(mood))]
			var event string
			switch action {
			case Nothing:
				play(t, m, "unlock", now)
				continue
			case Unseal, Probe:
				event = map[Action]string{Unseal: "unseal ", Probe: "probe "}[action] + with
				switch with {
				case "success", "expired":
					lastGood, denials, everGood, commanded = now, 0, true, false
				case "denied":
					if action == Probe {
						if denials++; denials == 1 {
							firstDenial = now
						}
					}
				}
			case Rotate:
				event = "rotate " + []string{"success", "unreachable", "throttled", "later", "denied"}[r.IntN(5)]
			case Lift:
				event = "lifted"
			case Halt:
				event = "halted"
				offline := c.MaxOffline > 0 && now.Sub(lastGood) >= c.MaxOffline
				confirmed := denials >= 3 && now.Sub(firstDenial) >= 3*minute && !now.Before(lastGood.Add(c.Grace))
				if !commanded && !offline && !confirmed {
					fail("it stops for no reason: %d denials since %v, last success at %v", denials, now.Sub(firstDenial), lastGood.Sub(epoch))
				}
				if c.Policy == Warn && !commanded {
					fail("a volume that is only to warn stops")
				}
			default:
				fail("action %v", action)
			}
			took := time.Duration(r.IntN(2000)) * time.Millisecond
			now = now.Add(took)
			if action != Rotate && !lastGood.IsZero() && denials == 0 && strings.HasSuffix(event, with) && (with == "success" || with == "expired") {
				lastGood = now
			}
			if denials == 1 && with == "denied" && action == Probe {
				firstDenial = now
			}
			history = append(history, now.Sub(epoch).String()+" "+event)
			play(t, m, event, now)

			sn := m.Snapshot()
			reached[m.state]++
			switch {
			case m.state.Serving() && m.wiped:
				fail("it serves without keys")
			case m.state.Serving() && !everGood:
				fail("it serves and never had a key")
			case m.state == Revoked && c.Policy.Wipes() && !m.wiped && !m.lifting:
				fail("revoked is reported before the keys are wiped")
			case before.Serving() && !m.state.Serving() && action != Halt:
				fail("it stopped serving by %q", event)
			case sn.LastGood != lastGood:
				fail("last success at %v, want %v", sn.LastGood, lastGood)
			case m.locked && !m.wiped && !m.halting:
				fail("locked with keys")
			}
			if next, at := m.Next(); next == Unseal || next == Probe {
				if wait := at.Sub(now); wait < -time.Hour {
					fail("the next look was %v ago", -wait)
				}
			}
		}
	}
	for _, want := range []State{Locked, Acquiring, Unlocked, Degraded, Grace, Revoked} {
		if reached[want] == 0 {
			t.Errorf("no life reached the state %v: %v", want, reached)
		}
	}
}

// TestBackoff checks the bounds, and that waits of hosts that failed together
// are spread over them.
func TestBackoff(t *testing.T) {
	for n, limit := range map[int]time.Duration{-1: s, 0: s, 1: 2 * s, 3: 8 * s, 4: 15 * s, 1000: 15 * s} {
		if got := Backoff(Outcome{}, n, 0.999999); got > limit || got < limit*99/100 {
			t.Errorf("failure %d: at most %v, want %v", n, got, limit)
		}
		if got := Backoff(Outcome{}, n, 0); got != 0 {
			t.Errorf("failure %d: at least %v, want 0", n, got)
		}
	}
	for n, want := range map[int]time.Duration{0: s, 4: 16 * s, 10: 16 * s, 11: 32 * s, 14: 32 * s, 15: 60 * s, 100: 60 * s} {
		if got := Backoff(Outcome{Answered: true}, n, 0.5); got != want/2 {
			t.Errorf("answered, failure %d: %v, want %v", n, got, want/2)
		}
	}
	if got := Backoff(Outcome{Answered: true, RetryAfter: 90 * s}, 0, 0.5); got != 90*s+s/2 {
		t.Errorf("Retry-After of 90 s: %v", got)
	}
	var waits []time.Duration
	for range 1000 {
		waits = append(waits, Backoff(Outcome{Answered: true}, 20, rand.Float64()))
	}
	slices.Sort(waits)
	if waits[100] > 12*s || waits[500] < 20*s || waits[500] > 40*s || waits[900] < 48*s {
		t.Errorf("not spread: deciles %v %v %v", waits[100], waits[500], waits[900])
	}
}

func TestConfigCheck(t *testing.T) {
	for name, c := range map[string]Config{
		"grace of 25 h":        {Grace: 25 * h},
		"negative grace":       {Grace: -1},
		"phase of 1":           {Phase: 1},
		"heartbeat of 1 ms":    {Heartbeat: time.Millisecond},
		"offline, no looks":    {MaxOffline: h},
		"offline below a look": {MaxOffline: minute, Heartbeat: minute},
		"policy 9":             {Policy: 9},
	} {
		if err := c.Check(); err == nil {
			t.Errorf("%s was accepted", name)
		}
	}
	for _, p := range []Policy{Stop, ReadOnly, Freeze, Warn} {
		if got, err := ParsePolicy(p.String()); err != nil || got != p {
			t.Errorf("ParsePolicy(%q) = %v, %v", p, got, err)
		}
	}
	if _, err := ParsePolicy("panic"); err == nil {
		t.Error("a policy called panic")
	}
}

// TestSnapshotJSON: what status sends is what its reader gets.
func TestSnapshotJSON(t *testing.T) {
	want := Snapshot{State: Grace, Policy: Freeze, Kind: Denied, Since: epoch, StopsAt: epoch, Wiped: true, Reason: "x"}
	b, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got Snapshot
	if err := json.Unmarshal(b, &got); err != nil || got != want {
		t.Errorf("%s became %+v, %v", b, got, err)
	}
	if json.Unmarshal([]byte(`{"state":"happy"}`), &got) == nil {
		t.Error("an unknown state was accepted")
	}
}

// TestOfflineLooksAgain: a limit for the time offline stops no volume for one look that
// has failed, of whatever kind that was, and stops one in time whose looks all do.
func TestOfflineLooksAgain(t *testing.T) {
	for _, kind := range []Kind{Transient, Denied, Integrity, Misconfigured} {
		for _, failures := range []int{1, 1000} {
			c := Config{Heartbeat: 10 * time.Minute, MaxOffline: 15 * time.Minute, Grace: time.Hour, ConfirmSpan: time.Hour}
			if err := c.Check(); err != nil {
				t.Fatal(err)
			}
			begun := time.Unix(1e9, 0)
			now, m, looks := begun, New(c, begun), 0
			m.Unsealed(now, Outcome{Kind: Success})
			lastGood := now
			for now.Sub(begun) < 2*time.Hour {
				action, at := m.Next()
				if at.After(now) {
					now = at
				}
				if action != Probe {
					break
				}
				if looks++; looks <= failures {
					m.Probed(now, Outcome{Kind: kind, Class: "x"})
				} else {
					m.Probed(now, Outcome{Kind: Success})
					lastGood = now
				}
			}
			switch stopped := now.Sub(begun) < 2*time.Hour; {
			case failures == 1 && stopped:
				t.Errorf("%v once, and the volume stopped after %v", kind, now.Sub(begun))
			case failures == 1:
			case !stopped || now.Sub(lastGood) != c.MaxOffline:
				t.Errorf("%v always, and the volume stopped %v after it was unsealed, after %d looks", kind, now.Sub(lastGood), looks)
			case looks < 5 || looks > 60:
				t.Errorf("%v always: %d looks before the volume stopped", kind, looks)
			}
		}
	}
}
