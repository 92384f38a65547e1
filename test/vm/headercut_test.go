//go:build vm

package vm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"hostcryptd/test/vm/vmtest"
)

// testHeaderPowerCut cuts the power while the header of a volume is changed: keys
// are added, removed and rewrapped, recovery keys rotated. Nothing else writes to
// the disk, so a cut in place of a flush is one between two writes of a header.
func testHeaderPowerCut(t *testing.T, l *lab) {
	begun := time.Now()
	cycles, seed := cutParameters(t)
	cycles = (3*cycles + 4) / 5 // a change takes a second, and each cut hits one
	r := rand.New(rand.NewPCG(seed, 2))
	volume, state := l.sparse(t, "volume", volumeSize).Path, l.sparse(t, "state", stateSize)
	// cut cuts the power in place of a flush, the at-th after the guest's first
	// acknowledgement, and returns the changes acknowledged.
	cut := func(t *testing.T, name, image string, at int, before vmtest.FlushAction, state vmtest.Disk) int {
		var (
			mu    sync.Mutex
			begin func()
			seen  int
		)
		res := l.cutBoot(t, name, "headercut", nil, "volume", image, func(int) vmtest.FlushAction {
			mu.Lock()
			defer mu.Unlock()
			if begin == nil {
				return vmtest.FlushDo
			}
			if seen++; seen < at {
				return before
			}
			go begin()
			return vmtest.FlushHold
		}, func(cut func()) {
			mu.Lock()
			defer mu.Unlock()
			begin = cut
		}, state)
		return int(res.Figures["acked"].Value)
	}
	acked := 0
	for i := range cycles {
		at := 1 + r.IntN(12)
		acked = cut(t, fmt.Sprintf("headercut-%d", i+1), volume, at, vmtest.FlushDo, state)
		t.Logf("power cut %d of %d: in place of flush %d; %d changes acknowledged", i+1, cycles, at, acked)
	}
	check := func(name, volume string, state vmtest.Disk) error {
		_, err := l.bootAs(t.Context(), name, "headercut", map[string]string{"check": "only"}, nil, vmtest.Disk{Serial: "volume", Path: volume}, state)
		return err
	}
	if err := check("headercut-check", volume, state); err != nil {
		t.Fatal(err)
	}

	// The control: a disk that ignores flushes loses what was acknowledged.
	liar, liarState := filepath.Join(l.Dir, "headercut-control.img"), filepath.Join(l.Dir, "headercut-control-state.img")
	if err := errors.Join(vmtest.CopySparse(liar, volume), vmtest.CopySparse(liarState, state.Path)); err != nil {
		t.Fatal(err)
	}
	liarDisk := vmtest.Disk{Serial: "state", Path: liarState}
	lied := cut(t, "headercut-control", liar, 12, vmtest.FlushLie, liarDisk)
	if lied <= acked {
		t.Fatalf("control: %d changes acknowledged before the cut and %d after", acked, lied)
	}
	err := check("headercut-control-check", liar, liarDisk)
	if err == nil || !strings.Contains(err.Error(), "isn't what was acknowledged") {
		t.Errorf("control: a disk that ignores flushes: %v, want changes that are lost", err)
	} else {
		why, _, _ := strings.Cut(err.Error(), "\n")
		t.Logf("control: %s", why)
	}
	l.add(fmt.Sprintf("HeaderPowerCut\t%.1f s\t%d cuts; %d changes of the header acknowledged, 0 lost; control without flushes: %d, refused\n",
		time.Since(begun).Seconds(), cycles, acked, lied-acked))
}

// testLogWrites replays the writes of a volume up to each flush.
func testLogWrites(t *testing.T, l *lab) {
	begun := time.Now()
	volume, log := l.sparse(t, "ext4", volumeSize), l.sparse(t, "log", 2<<30)
	volume.NVMe = true
	defer os.Remove(log.Path)
	cycles, seed := cutParameters(t)
	t.Logf("seed %d", seed)
	c := l.Config("logwrites", map[string]string{"fs": "ext4", "seed": fmt.Sprint(seed), "checks": fmt.Sprint(cycles), "hostkey": fmt.Sprintf("%064x", seed)}, volume, log)
	c.Timeout += time.Duration(cycles) * 20 * time.Second
	r := run(t, c)
	l.row("LogWrites", time.Since(begun), r)
}
