//go:build (amd64 || arm64) && !purego

package xts

import (
	"testing"
	"unsafe"
)

// TestCallSize checks that no call of a kernel takes more than 1 MiB, and that together
// they take everything, with the right tweaks.
func TestCallSize(t *testing.T) {
	c, err := NewCipher(testKey(40))
	if err != nil {
		t.Fatal(err)
	}
	const body, first = 512, 1<<64 - 1000
	src := make([]byte, 5<<20)
	for _, tt := range []struct{ n, sectorSize, calls int }{
		{512, 512, 1}, {1 << 20, 512, 1}, {1<<20 + 512, 512, 2}, {5 << 20, 4096, 5},
		{3 * 1536, 1536, 1}, {2000 * 1536, 1536, 3}, {1 << 20, 1 << 20, 1}, {5 << 20, 1 << 20, 5},
		{2 << 20, 2 << 20, 0}, {528, 528, 0}, // block by block, with the same limit
	} {
		calls, done := 0, 0
		k := func(dst, from *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64) {
			calls++
			if dst != &src[done] || from != &src[done] || sectorSize != tt.sectorSize {
				t.Errorf("%d bytes in sectors of %d: call %d isn't where the one before ended", tt.n, tt.sectorSize, calls)
			}
			if want := uint64(first) + uint64(done/512); lo != want || hi != 7 || step != uint64(sectorSize/512) {
				t.Errorf("%d bytes in sectors of %d: tweak of call %d is %d, %d, step %d, want %d", tt.n, tt.sectorSize, calls, lo, hi, step, want)
			}
			if s := c.schedules(); data != &s.decrypt || tweak != &s.tweak {
				t.Error("wrong key schedule")
			}
			if sectors < 1 || sectors*sectorSize > maxCall {
				t.Errorf("%d bytes in sectors of %d: a call of %d sectors", tt.n, tt.sectorSize, sectors)
			}
			done += sectors * sectorSize
		}
		newCrypt(body, k, true)(c, unsafe.SliceData(src), src[:tt.n], tt.sectorSize, first, 7)
		if calls != tt.calls || calls > 0 && done != tt.n {
			t.Errorf("%d bytes in sectors of %d: %d calls for %d bytes, want %d calls", tt.n, tt.sectorSize, calls, done, tt.calls)
		}
	}
	if maxCall != 1<<20 {
		t.Errorf("the limit is %d bytes", maxCall)
	}
}
