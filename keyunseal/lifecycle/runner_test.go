package lifecycle

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A fakeHost answers as its functions say, and writes down what was asked of it
// and when. Tests run in a bubble of testing/synctest, where time passes only
// when everybody waits.
type fakeHost struct {
	begun  time.Time
	unseal func(ctx context.Context) Outcome
	probe  func(ctx context.Context) Outcome

	mu      sync.Mutex
	log     []string
	changes []Snapshot
	halted  []time.Duration
}

func (f *fakeHost) note(what string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.log = append(f.log, what)
}

func (f *fakeHost) count(what string) (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, l := range f.log {
		if l == what {
			n++
		}
	}
	return n
}

func (f *fakeHost) Unseal(ctx context.Context, obtained func()) Outcome {
	f.note("unseal")
	o := f.unseal(ctx)
	if o.Kind == Success {
		obtained()
	}
	return o
}

func (f *fakeHost) Probe(ctx context.Context) Outcome { f.note("probe"); return f.probe(ctx) }
func (f *fakeHost) Rotate(context.Context) Outcome    { f.note("rotate"); return Outcome{Kind: Success} }
func (f *fakeHost) Lift()                             { f.note("lift") }
func (f *fakeHost) Halt(p Policy) {
	f.note("halt " + p.String())
	f.mu.Lock()
	defer f.mu.Unlock()
	f.halted = append(f.halted, time.Since(f.begun))
}

func (f *fakeHost) Changed(_ State, now Snapshot) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.changes = append(f.changes, now)
}

// inBubble gives a Runner that doesn't run yet the time of its bubble; its wall clock
// is ahead of that.
func inBubble(r *Runner, ahead *atomic.Int64) *Runner {
	epoch := time.Now()
	c := &clock{passed: func() time.Duration { return time.Since(epoch) }}
	c.wall = func() time.Time {
		if ahead == nil {
			return time.Now()
		}
		return time.Now().Add(time.Duration(ahead.Load()))
	}
	c.offset = c.wall().Round(0)
	r.clock = c
	return r
}

// start runs a Runner in a bubble; the function that it returns ends it.
func start(t *testing.T, f *fakeHost, change func(*Config)) (*Runner, func() error) {
	t.Helper()
	c := Config{Heartbeat: DefaultHeartbeat, Rotation: DefaultRotation, Grace: DefaultGrace, Splay: DefaultSplay}
	if change != nil {
		change(&c)
	}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	f.begun = time.Now()
	r := inBubble(NewRunner(c, f), nil)
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- r.Run(ctx) }()
	return r, func() error { cancel(); return <-result }
}

func ok(context.Context) Outcome { return Outcome{Kind: Success} }

// hangs is a vault that swallows packets.
func hangs(ctx context.Context) Outcome {
	<-ctx.Done()
	return Outcome{Text: ctx.Err().Error()}
}

// TestVaultDownAtBoot: for five minutes nobody answers; then the volume is
// unlocked within one retry interval, and has never given up.
func TestVaultDownAtBoot(t *testing.T) {
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			const down = 5 * time.Minute
			f := &fakeHost{probe: ok}
			var unlocked time.Duration
			f.unseal = func(context.Context) Outcome {
				if since := time.Since(f.begun); since < down {
					return Outcome{Text: "connection refused"}
				} else if unlocked == 0 {
					unlocked = since
				}
				return Outcome{Kind: Success}
			}
			r, stop := start(t, f, nil)
			time.Sleep(down)
			synctest.Wait()
			if s := r.Snapshot(); s.State != Acquiring || s.NextTry.IsZero() || s.Reason != "connection refused" {
				t.Errorf("while it's down: %+v", s)
			}
			time.Sleep(time.Minute)
			synctest.Wait()
			if s := r.Snapshot(); s.State != Unlocked || unlocked > down+15*time.Second {
				t.Errorf("%v; unlocked after %v, the vault was back after %v", s.State, unlocked, down)
			}
			if err := stop(); err != nil {
				t.Errorf("Run() = %v", err)
			}
		})
	}
}

// TestSuccessIsTold: who goes on where this process ends has to know the last
// success, from which the grace period counts.
func TestSuccessIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeHost{unseal: ok, probe: ok}
		r, stop := start(t, f, nil)
		time.Sleep(24 * time.Hour)
		if err := stop(); err != nil {
			t.Fatal(err)
		}
		told := f.changes[len(f.changes)-1]
		if want := r.Snapshot().LastGood; told.LastGood != want || told.State != Unlocked {
			t.Errorf("the host was told last that the key was good at %v, which it was at %v", told.LastGood, want)
		}
	})
}

// TestWatch: a KEK that nobody could take away becomes one that somebody can.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeHost{unseal: ok, probe: func(context.Context) Outcome { return Outcome{Kind: Denied} }}
		r, stop := start(t, f, func(c *Config) { c.Heartbeat, c.Rotation = 0, 0 })
		time.Sleep(24 * time.Hour)
		if n := f.count("probe") + f.count("rotate"); n != 0 {
			t.Errorf("%d looks at what can't be taken away", n)
		}
		c := Config{Heartbeat: DefaultHeartbeat, Rotation: DefaultRotation}
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		r.Watch(c)
		time.Sleep(30 * time.Minute)
		if s := r.Snapshot(); s.State != Grace || f.count("halt stop") != 0 {
			t.Errorf("%v half an hour after it was watched first and denied", s.State)
		}
		time.Sleep(31 * time.Minute) // the grace period counts from Watch
		if s := r.Snapshot(); s.State != Revoked || f.count("rotate") == 0 {
			t.Errorf("%v after the grace period, %d looks for a newer version", s.State, f.count("rotate"))
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestWatchOther: other KEKs want another pace, which is no success, and waits for
// the next look.
func TestWatchOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeHost{unseal: ok, probe: ok}
		r, stop := start(t, f, nil)
		time.Sleep(3 * time.Hour)
		before, probes := r.Snapshot(), f.count("probe")
		c := Config{Heartbeat: HeartbeatFor(4096), Rotation: DefaultRotation}
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		r.Watch(c)
		synctest.Wait()
		if s := r.Snapshot(); s.LastGood != before.LastGood || s.NextTry != before.NextTry {
			t.Errorf("last good %v, next %v; before it was %v and %v", s.LastGood, s.NextTry, before.LastGood, before.NextTry)
		}
		time.Sleep(30 * time.Hour)
		if n := f.count("probe") - probes; n < 50 || n > 75 {
			t.Errorf("%d looks in 30 hours, want about 60", n)
		}
		if err := stop(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestRevocation: a key is disabled while all is well; the keys are wiped within
// heartbeat, confirmation and grace, and the volume goes on when it's enabled.
func TestRevocation(t *testing.T) {
	for _, grace := range []time.Duration{0, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var disabled atomic.Bool
			f := &fakeHost{}
			f.probe = func(context.Context) Outcome {
				if disabled.Load() {
					return Outcome{Kind: Denied, Code: "KeyDisabled"}
				}
				return Outcome{Kind: Success}
			}
			f.unseal = f.probe
			r, stop := start(t, f, func(c *Config) { c.Grace = grace })
			time.Sleep(3 * time.Hour)
			disabled.Store(true)
			begin := time.Now()
			time.Sleep(90 * time.Minute)
			s := r.Snapshot()
			took := s.Stopped.Sub(begin)
			if s.State != Revoked || !s.Wiped || f.count("halt stop") != 1 {
				t.Fatalf("after 90 min: %+v", s)
			}
			const heartbeat, confirmation = DefaultHeartbeat * 6 / 5, 5 * time.Minute
			if limit := heartbeat + confirmation + grace; took > limit || took < DefaultConfirmSpan {
				t.Errorf("grace %v: wiped after %v, want %v to %v", grace, took, DefaultConfirmSpan, limit)
			}
			if s.AccessLost.Before(begin) || s.AccessLost.After(begin.Add(heartbeat)) {
				t.Errorf("access lost at %v", s.AccessLost.Sub(begin))
			}
			t.Logf("grace %v: keys wiped %v after the key was disabled", grace, took.Round(time.Second))

			disabled.Store(false)
			time.Sleep(6 * time.Minute)
			if s := r.Snapshot(); s.State != Unlocked || s.Wiped || !s.AccessLost.IsZero() {
				t.Errorf("6 min after the key was enabled: %+v", s)
			}
			stop()
		})
	}
}

// TestOutageRevokesNothing: a week without an answer, in all ways.
func TestOutageRevokesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var down atomic.Bool
		f := &fakeHost{unseal: ok}
		n := 0
		f.probe = func(ctx context.Context) Outcome {
			if !down.Load() {
				return Outcome{Kind: Success}
			}
			switch n++; n % 4 {
			case 0:
				return hangs(ctx)
			case 1:
				panic("index out of range")
			case 2:
				return Outcome{Answered: true, RetryAfter: 10 * time.Second}
			}
			return Outcome{Text: "no such host"}
		}
		r, stop := start(t, f, nil)
		time.Sleep(time.Hour)
		down.Store(true)
		time.Sleep(7 * 24 * time.Hour)
		synctest.Wait()
		if s := r.Snapshot(); s.State != Degraded || s.Wiped || len(f.halted) != 0 {
			t.Errorf("after a week: %+v", s)
		}
		synctest.Wait()
		if n < 500 || n > 10000 {
			t.Errorf("%d looks in a week", n)
		}
		down.Store(false)
		time.Sleep(10 * time.Minute)
		if s := r.Snapshot(); s.State != Unlocked {
			t.Errorf("after the outage: %+v", s)
		}
		stop()
	})
}

// TestLock: a command is carried out at once, also while a vault doesn't answer.
func TestLock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeHost{unseal: ok, probe: hangs}
		r, stop := start(t, f, nil)
		time.Sleep(15 * time.Minute)
		for f.count("probe") == 0 {
			time.Sleep(time.Second)
		}
		begin := time.Now()
		if err := r.Lock(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := r.Snapshot(); s.State != Locked || !s.Wiped || !s.Locked || time.Since(begin) > time.Second {
			t.Errorf("after Lock, %v later: %+v", time.Since(begin), s)
		}
		before := f.count("unseal")
		time.Sleep(48 * time.Hour)
		if f.count("unseal") != before {
			t.Error("a volume that an operator has locked was unsealed")
		}
		if err := r.Unlock(t.Context()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if s := r.Snapshot(); s.State != Unlocked {
			t.Errorf("after Unlock: %+v", s)
		}
		if err := r.Erase(t.Context()); err != nil {
			t.Fatal(err)
		}
		if s := r.Snapshot(); s.State != Erased || !s.Wiped {
			t.Errorf("after Erase: %+v", s)
		}
		stop()
		if err := r.Lock(t.Context()); !errors.Is(err, ErrEnded) {
			t.Errorf("Lock() of a runner that has ended = %v, want %v", err, ErrEnded)
		}
	})
}

// TestLimit: one try that hangs doesn't hang the life.
func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := 0
		f := &fakeHost{probe: ok}
		f.unseal = func(ctx context.Context) Outcome {
			if n++; n < 3 {
				return hangs(ctx)
			}
			return Outcome{Kind: Success}
		}
		r, stop := start(t, f, nil)
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if s := r.Snapshot(); s.State != Unlocked || n != 3 {
			t.Errorf("after %d tries: %+v", n, s)
		}
		stop()
	})
}

func TestGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeHost{unseal: func(context.Context) Outcome { return Outcome{Kind: Misconfigured, Text: "no such file"} }}
		r := inBubble(NewRunner(config(t, nil), f), nil)
		if err := r.Run(t.Context()); !errors.Is(err, ErrGivenUp) {
			t.Errorf("Run() = %v, want ErrGivenUp", err)
		}
	})
}

// TestHeartbeatSpread: hosts that were unlocked in the same second, with phases
// of their own, don't look at the vault together, then or ever.
func TestHeartbeatSpread(t *testing.T) {
	const hosts = 1000
	perMinute := make(map[int]int)
	for i := range hosts {
		c := Config{Heartbeat: DefaultHeartbeat, Phase: float64(i) / hosts}
		if err := c.Check(); err != nil {
			t.Fatal(err)
		}
		m := New(c, epoch)
		m.Unsealed(epoch, Outcome{Kind: Success})
		for {
			_, at := m.Next()
			if at.Sub(epoch) > 2*time.Hour {
				break
			}
			perMinute[int(at.Sub(epoch)/time.Minute)]++
			m.Probed(at, Outcome{Kind: Success})
		}
	}
	for minute := range 120 {
		if n := perMinute[minute]; n < 50 || n > 160 {
			t.Errorf("minute %d: %d looks of %d hosts, want about %d", minute, n, hosts, hosts/10)
		}
	}
}

// TestClockSet: the wall clock is set while a volume serves, by a lot. Looks at the
// KEK go on at their pace, and a key that is denied stops the volume as soon as ever.
func TestClockSet(t *testing.T) {
	for _, step := range []time.Duration{-9 * time.Hour, 9 * time.Hour, -50 * 365 * 24 * time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			var ahead atomic.Int64
			var disabled, down atomic.Bool
			f := &fakeHost{begun: time.Now()}
			f.probe = func(context.Context) Outcome {
				switch {
				case disabled.Load():
					return Outcome{Kind: Denied, Code: "KeyDisabled"}
				case down.Load():
					return Outcome{Text: "no such host"}
				}
				return Outcome{Kind: Success}
			}
			f.unseal = f.probe
			c := config(t, func(c *Config) { c.Grace, c.MaxOffline = time.Hour, 2*time.Hour })
			r := inBubble(NewRunner(c, f), &ahead)
			ctx, cancel := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() { result <- r.Run(ctx) }()
			time.Sleep(time.Hour)
			down.Store(true)
			time.Sleep(time.Hour)
			good := r.Snapshot().LastGood

			ahead.Store(int64(step))
			probes := f.count("probe")
			time.Sleep(15 * time.Minute)
			s := r.Snapshot()
			if n := f.count("probe") - probes; n == 0 || n > 10 {
				t.Errorf("%v: %d looks at the KEK in the 15 min after the clock was set", step, n)
			}
			if s.State != Degraded || !s.LastGood.Equal(good.Add(step)) || s.StopsAt.Sub(s.LastGood) != 2*time.Hour {
				t.Errorf("%v: an outage, and then: %+v", step, s)
			}
			down.Store(false)
			time.Sleep(15 * time.Minute)
			if s := r.Snapshot(); s.State != Unlocked {
				t.Errorf("%v: the key is there again: %v", step, s.State)
			}

			disabled.Store(true)
			time.Sleep(15 * time.Minute)
			ahead.Add(int64(step)) // in the grace period
			time.Sleep(75 * time.Minute)
			synctest.Wait()
			s = r.Snapshot()
			if s.State != Revoked || !s.Wiped || len(f.halted) != 1 {
				t.Fatalf("%v: 90 min after the key was disabled: %+v", step, s)
			}
			if now := time.Now().Add(2 * step); s.Stopped.After(now) || now.Sub(s.Stopped) > 90*time.Minute || s.Stopped.Sub(s.AccessLost) < 45*time.Minute {
				t.Errorf("%v: at %v: %+v", step, now, s)
			}
			cancel()
			<-result
		})
	}
}

// TestClock reads the kernel's clocks.
func TestClock(t *testing.T) {
	c := newClock()
	for range 100 {
		if now, step := c.read(); step != 0 || time.Since(now).Abs() > time.Minute {
			t.Fatalf("%v, set by %v", now, step)
		}
	}
	wall := c.wall
	c.wall = func() time.Time { return wall().Add(-time.Hour) }
	if now, step := c.read(); (step+time.Hour).Abs() > time.Minute || (time.Since(now)-time.Hour).Abs() > time.Minute {
		t.Errorf("set back by an hour: %v, set by %v", now, step)
	}
	if _, step := c.read(); step != 0 {
		t.Errorf("set by %v again", step)
	}
}
