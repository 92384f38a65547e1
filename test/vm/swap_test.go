//go:build vm

package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"hostcryptd/test/vm/report"
)

const (
	swapMemory   = 384 // MB, of the machine
	swapDiskSize = 1 << 30

	// The load, if $HOSTCRYPTD_VM_SWAP_PERCENT and $HOSTCRYPTD_VM_SWAP_SECONDS don't
	// say: how much memory is used, of all that there is, and for how long.
	swapPercent = 100
	swapSeconds = 45

	// swapSilence is how long a machine whose swap works never takes for the part of
	// the load that it then reports; the longest megabyte of ten minutes took 5.3 s.
	swapSilence = time.Minute
)

func swapNumber(t *testing.T, name string, n int) int {
	t.Helper()
	if s := os.Getenv(name); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil || n < 1 {
			t.Fatalf("%s is %q, want a number", name, s)
		}
	}
	return n
}

// testSwap has a machine use more memory than it has, with its swap on a volume
// that it serves itself, on each kernel. The control, without --swap, must fail:
// the machine hangs, or the kernel ends processes for want of memory.
func testSwap(t *testing.T, l *lab, control bool) {
	percent := swapNumber(t, "HOSTCRYPTD_VM_SWAP_PERCENT", swapPercent)
	seconds := swapNumber(t, "HOSTCRYPTD_VM_SWAP_SECONDS", swapSeconds)
	params := map[string]string{"percent": strconv.Itoa(percent), "seconds": strconv.Itoa(seconds)}
	scenario, name := "swap", "Swap"
	if control {
		scenario, name = "swap-control", "SwapControl"
	}
	begun := time.Now()
	c := l.Config(scenario, params, l.sparse(t, "volume", swapDiskSize))
	c.MemoryMB, c.Timeout = swapMemory, time.Duration(seconds)*time.Second+6*time.Minute
	c.OnEvent = func(e report.Event) { t.Log(e) }
	ctx, hangs := context.WithCancelCause(t.Context())
	defer hangs(nil)
	if control {
		// A machine that hangs may not even say so.
		silence := time.AfterFunc(swapSilence, func() { hangs(fmt.Errorf("not a word in %v", swapSilence)) })
		defer silence.Stop()
		c.OnEvent = func(e report.Event) {
			t.Log(e)
			silence.Reset(swapSilence)
		}
	}
	r, err := c.Run(ctx)
	if control {
		if err == nil {
			t.Errorf("swap on a volume is as good without --swap: this test shows nothing")
		} else {
			first, _, _ := strings.Cut(err.Error(), "\n")
			t.Logf("the control failed, as it has to: %s", first)
			l.add(name + "\t" + strconv.FormatFloat(time.Since(begun).Seconds(), 'f', 1, 64) + " s\t" + first + "\n")
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, figure := range []string{"pages out", "pages in"} {
		if r.Figures[figure].Value == 0 {
			err = errors.Join(err, errors.New("no "+figure))
		}
	}
	if err != nil {
		t.Error(err)
	}
	l.row(name+" "+l.Kernel.Release, time.Since(begun), r)
}
