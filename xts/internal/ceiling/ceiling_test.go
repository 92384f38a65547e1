package ceiling_test

import (
	"testing"
	"time"

	"hostcryptd/xts"
	"hostcryptd/xts/internal/ceiling"
)

// TestRun checks that there is a loop for every implementation in assembly, that it
// does the work it says, and that it isn't slower than the implementation.
func TestRun(t *testing.T) {
	names := xts.Implementations()
	for _, name := range names[:len(names)-1] { // the last is the generic one
		const n = 1 << 20
		done := ceiling.Run(name, n)
		if done < n*9/10 || done > n {
			t.Errorf("Run(%q, %d) = %d", name, n, done)
			continue
		}
		c, err := xts.NewCipherWith(name, &[64]byte{1})
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, n)
		fastest := func(f func()) time.Duration {
			least := time.Hour
			for range 20 {
				start := time.Now()
				f()
				least = min(least, time.Since(start))
			}
			return least
		}
		top := fastest(func() { ceiling.Run(name, n) })
		ours := fastest(func() { c.EncryptSectors(buf, buf, 0, 4096) })
		if top > 2*ours {
			t.Errorf("%s: the ceiling takes %v, XTS %v", name, top, ours)
		}
	}
	if got := ceiling.Run("generic (crypto/aes)", 1); got != 0 {
		t.Errorf("Run of the generic implementation = %d, want 0", got)
	}
}
