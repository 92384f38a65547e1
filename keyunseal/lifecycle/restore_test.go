package lifecycle

import (
	"testing"
	"time"
)

// TestRestore continues machines of another process that was killed.
func TestRestore(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	c := Config{Heartbeat: 10 * time.Minute, Grace: time.Hour}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name  string
		left  Snapshot
		wiped bool
		state State
		next  Action
	}{
		{"unlocked", Snapshot{State: Unlocked, LastGood: now, NextTry: now.Add(time.Minute)}, false, Unlocked, Probe},
		{"no try was planned", Snapshot{State: Unlocked, LastGood: now}, false, Unlocked, Probe},
		{"grace", Snapshot{State: Grace, Denials: 3, AccessLost: now.Add(-time.Minute), StopsAt: now.Add(-time.Second)}, false, Grace, Halt},
		{"revoked and wiped", Snapshot{State: Revoked, Wiped: true, Stopped: now, NextTry: now.Add(time.Minute)}, true, Revoked, Unseal},
		{"revoked, read-only", Snapshot{State: Revoked, Stopped: now, NextTry: now.Add(time.Minute)}, false, Revoked, Probe},
		{"locked", Snapshot{State: Locked, Locked: true, Wiped: true}, true, Locked, Nothing},
		{"killed in the middle of a lock", Snapshot{State: Unlocked, LastGood: now, NextTry: now}, true, Locked, Nothing},
		{"a lock that was not carried out", Snapshot{State: Unlocked, Locked: true}, false, Unlocked, Halt},
		{"erased", Snapshot{State: Erased, Wiped: true}, true, Erased, Nothing},
	} {
		m := Restore(c, tt.left, tt.wiped, now)
		if action, _ := m.Next(); m.Snapshot().State != tt.state || action != tt.next || m.Snapshot().Wiped != tt.wiped {
			t.Errorf("%s: %v, then %v, wiped %v; want %v, then %v", tt.name, m.Snapshot().State, action, m.Snapshot().Wiped, tt.state, tt.next)
		}
	}
}

// TestRestoreClockSetBack: the wall clock was set back by 9 h when another process
// goes on.
func TestRestoreClockSetBack(t *testing.T) {
	now := time.Date(2026, 11, 24, 12, 0, 0, 0, time.UTC)
	ahead := now.Add(9 * time.Hour)
	c := Config{Heartbeat: 10 * time.Minute, Grace: time.Hour, MaxOffline: 3 * time.Hour}
	if err := c.Check(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name    string
		left    Snapshot
		wiped   bool
		try     time.Duration
		stopsIn time.Duration // 0 for never
	}{
		{"unlocked", Snapshot{State: Unlocked, LastGood: ahead, NextTry: ahead}, false, 20 * time.Minute, 0},
		{"offline", Snapshot{State: Degraded, LastGood: ahead, NextTry: ahead, StopsAt: ahead.Add(time.Hour)}, false, 20 * time.Minute, 3 * time.Hour},
		{"denied once", Snapshot{State: Degraded, Denials: 1, LastGood: now.Add(-time.Hour), NextTry: now, StopsAt: now.Add(2 * time.Hour)}, false, 0, 2 * time.Hour},
		{"grace", Snapshot{State: Grace, Denials: 3, LastGood: ahead, AccessLost: ahead, NextTry: ahead, StopsAt: ahead.Add(time.Hour)}, false, 20 * time.Minute, time.Hour},
		{"revoked", Snapshot{State: Revoked, Wiped: true, Stopped: ahead, NextTry: ahead}, true, 20 * time.Minute, 0},
	} {
		m := Restore(c, tt.left, tt.wiped, now)
		s := m.Snapshot()
		if s.NextTry.Sub(now) > tt.try || s.LastGood.After(now) || s.AccessLost.After(now) || s.Stopped.After(now) || s.Since.After(now) {
			t.Errorf("%s: at %v: %+v", tt.name, now, s)
		}
		if got := s.StopsAt; tt.stopsIn == 0 && !got.IsZero() || tt.stopsIn != 0 && got != now.Add(tt.stopsIn) {
			t.Errorf("%s: stops at %v, it's %v", tt.name, got, now)
		}
	}
}
