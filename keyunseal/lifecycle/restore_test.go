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
