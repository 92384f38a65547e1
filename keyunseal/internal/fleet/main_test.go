package main

import (
	"testing"
	"time"
)

// TestFleet: of hosts that boot at once, also after an outage, the last is
// unlocked within twice the time that the vault needs at least, and none starves.
func TestFleet(t *testing.T) {
	const n = 1000
	for _, l := range limits {
		l.perWindow /= 10 // as many times smaller as the fleet
		for _, down := range []time.Duration{0, 30 * time.Minute} {
			for seed := range uint64(3) {
				r, err := boot(l, n, 1, down, seed)
				if err != nil {
					t.Fatal(err)
				}
				if len(r.unlocked) != n || r.factor() > 2 {
					t.Errorf("%s, down for %v, seed %d: %d of %d hosts unlocked, the last after %.2f of the minimum of %v", l.name, down, seed, len(r.unlocked), n, r.factor(), r.minimum)
				}
				if least := time.Duration(float64(r.minimum) - float64(window)); r.last() < least {
					t.Errorf("%s: faster than possible: %v of %v", l.name, r.last(), r.minimum)
				}
			}
		}
		r, err := rotate(l, n, 1)
		if err != nil {
			t.Fatal(err)
		}
		if last := r.rewrap[n-1]; last > 3*r.minimum/2 {
			t.Errorf("%s: the last is rewrapped after %v, at best it's %v", l.name, last, r.minimum)
		}
	}
}

// TestTenThousand is that of a whole fleet. What an outage adds is the same for
// all limits, and takes long to simulate: only the one with the worst factor has it.
func TestTenThousand(t *testing.T) {
	const n = 10_000
	for i, l := range limits {
		outages := []time.Duration{0}
		if i == 0 {
			outages = append(outages, 30*time.Minute)
		}
		for _, down := range outages {
			r, err := boot(l, n, 1, down, 1)
			if err != nil {
				t.Fatal(err)
			}
			if len(r.unlocked) != n || r.factor() > 2 {
				t.Errorf("%s, down for %v: %d of %d hosts unlocked, the last after %.2f of the minimum of %v", l.name, down, len(r.unlocked), n, r.factor(), r.minimum)
			}
			// None starves: who has bad luck has it for a fraction of the crowd's time.
			if late := r.last() - percentile(r.unlocked, 0.99); late > r.minimum/2 {
				t.Errorf("%s, down for %v: the last comes %v after 99 of 100 others", l.name, down, late)
			}
		}
		r, err := rotate(l, n, 1)
		if err != nil {
			t.Fatal(err)
		}
		if last := r.rewrap[n-1]; last > 5*r.minimum/4 {
			t.Errorf("%s: the last is rewrapped after %v, at best it's %v", l.name, last, r.minimum)
		}
	}
}

// TestFleetNotices: the measure is one: hosts that don't spread their tries miss
// the factor.
func TestFleetNotices(t *testing.T) {
	l := limit{"small", 10, 2048}
	r, err := boot(l, 1000, 1, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	if r.factor() < 0.9 || r.vault.refused == 0 {
		t.Errorf("1000 hosts at a vault that serves one a second: factor %.2f, %d refused", r.factor(), r.vault.refused)
	}
}
