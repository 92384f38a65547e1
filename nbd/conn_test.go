package nbd

import "testing"

// TestSlowOrLate: what makes a device slow is that requests take long again and
// again, not that one does, which may have waited for a processor.
func TestSlowOrLate(t *testing.T) {
	const fast, late = 2_000, 5_000_000 // nanoseconds, besides what memory takes
	for _, test := range []struct {
		name string
		took func(i int) int64
		slow bool // at the end, or ever if that is not expected
	}{
		{"fast", func(i int) int64 { return fast }, false},
		{"one of 100 late", func(i int) int64 {
			if i%100 == 99 {
				return late
			}
			return fast
		}, false},
		{"one of 10 takes long, as with a cache", func(i int) int64 {
			if i%10 == 9 {
				return late
			}
			return fast
		}, true},
		{"turns slow", func(i int) int64 {
			if i < 998 {
				return fast
			}
			return late
		}, true},
		{"turns fast", func(i int) int64 {
			if i < 900 {
				return late
			}
			return fast
		}, false},
		{"just slow", func(i int) int64 { return slowOp * 11 / 10 }, true},
	} {
		for _, length := range []uint64{4096, 128 << 10} {
			c := &conn{}
			ever := false
			for i := range 1000 {
				c.observe(test.took(i)+int64(length)/bytesPerNano, length)
				ever = ever || c.mean >= slowOp
			}
			if now := c.mean >= slowOp; now != test.slow || ever && !test.slow && test.name != "turns fast" {
				t.Errorf("%s, %d bytes: slow %v at the end, %v ever; want %v", test.name, length, now, ever, test.slow)
			}
		}
	}
}

// TestBacklog: the longest zeros that there can be are much work, many times over.
func TestBacklog(t *testing.T) {
	c := &conn{}
	for range 128 {
		c.ready.push(&request{header: header{cmd: cmdWriteZeroes, length: 1<<63 - 1}})
	}
	if n := c.backlog(); n < shareWork {
		t.Errorf("backlog() = %d, want at least %d", n, int64(shareWork))
	}
}
