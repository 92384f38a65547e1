package nbd

import (
	"math/rand/v2"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func newTestArena(t testing.TB, pages int) *arena {
	t.Helper()
	m, err := NewMemory(int64(pages)*pageSize, 0)
	if err != nil {
		t.Fatal(err)
	}
	a := newArena(m)
	t.Cleanup(func() {
		if err := a.close(); err != nil {
			t.Error(err)
		}
	})
	return a
}

// TestArenaRandom takes and returns runs of random length and checks that no
// two share a page, that accounts are right, and that nothing is refused that
// would fit.
func TestArenaRandom(t *testing.T) {
	const pages = 1000 // no multiple of 64
	a := newTestArena(t, pages)
	rng := rand.New(rand.NewPCG(1, 2))
	owner := make([]int, pages)
	type run struct {
		id  int
		buf []byte
	}
	var out []run
	used := 0
	first := func(buf []byte) int {
		return int(uintptr(unsafe.Pointer(&buf[0]))-uintptr(unsafe.Pointer(&a.mem[0]))) / pageSize
	}
	longest := func() int {
		best, n := 0, 0
		for _, o := range owner {
			if n++; o != 0 {
				n = 0
			}
			best = max(best, n)
		}
		return best
	}
	for id := 1; id < 20_000; id++ {
		if len(out) > 0 && rng.IntN(100) < 48 {
			i := rng.IntN(len(out))
			r := out[i]
			for p := first(r.buf); p < first(r.buf)+cap(r.buf)/pageSize; p++ {
				if owner[p] != r.id {
					t.Fatalf("page %d of run %d belongs to %d", p, r.id, owner[p])
				}
				owner[p] = 0
			}
			used -= cap(r.buf)
			a.release(r.buf)
			out[i] = out[len(out)-1]
			out = out[:len(out)-1]
		} else {
			size := 1 + rng.IntN(3*pageSize)
			if rng.IntN(10) == 0 {
				size = 1 + rng.IntN(200*pageSize)
			}
			need := (size + pageSize - 1) / pageSize
			buf := a.try(size)
			if buf == nil {
				if n := longest(); n >= need {
					t.Fatalf("try(%d) = nil, but %d pages in a row are free", size, n)
				}
				continue
			}
			if len(buf) != size || cap(buf) != need*pageSize {
				t.Fatalf("try(%d): length %d, capacity %d", size, len(buf), cap(buf))
			}
			for p := first(buf); p < first(buf)+need; p++ {
				if owner[p] != 0 {
					t.Fatalf("page %d given to %d belongs to %d", p, id, owner[p])
				}
				owner[p] = id
			}
			used += cap(buf)
			out = append(out, run{id, buf})
		}
		if st := a.stats(); st.Used != int64(used) || st.Used > st.Peak || st.Peak > st.Size || st.Resident < st.Used {
			t.Fatalf("stats() = %+v, in use %d", st, used)
		}
	}
	for _, r := range out {
		a.release(r.buf)
	}
	if buf := a.try(pages * pageSize); buf == nil {
		t.Error("the whole arena can't be had when everything was returned")
	} else {
		a.release(buf)
	}
}

func granted(w *waiter) bool {
	select {
	case <-w.granted:
		return true
	default:
		return false
	}
}

// TestArenaOrder: memory is granted in the order of asking, so that a large
// request isn't starved by small ones.
func TestArenaOrder(t *testing.T) {
	a := newTestArena(t, 10)
	held := a.try(6 * pageSize)
	large := &waiter{granted: make(chan struct{}, 1)}
	small := &waiter{granted: make(chan struct{}, 1)}
	small2 := &waiter{granted: make(chan struct{}, 1)}
	if a.enqueue(large, 8*pageSize) != nil {
		t.Fatal("8 pages of 4")
	}
	if a.try(pageSize) != nil {
		t.Error("a small request overtook the large one")
	}
	if a.enqueue(small, pageSize) != nil || a.enqueue(small2, 2*pageSize) != nil {
		t.Error("a small request overtook the large one")
	}
	a.release(held)
	if !granted(large) || !granted(small) {
		t.Fatal("large and first small request not granted")
	}
	if granted(small2) {
		t.Error("11 pages of 10 granted")
	}
	// A request that is given up makes room for those behind it.
	again := &waiter{granted: make(chan struct{}, 1)}
	if a.enqueue(again, pageSize) != nil {
		t.Error("a small request overtook the one before it")
	}
	if a.cancel(small2) != nil {
		t.Error("memory came from a request that had none")
	}
	if !granted(again) {
		t.Error("not granted after the one before it was given up")
	}
	a.release(again.buf)
	a.release(large.buf)
	// Granted and given up at the same time.
	full := a.try(8 * pageSize)
	if a.enqueue(small2, 2*pageSize) != nil {
		t.Fatal("2 pages of 1")
	}
	a.release(full)
	if buf := a.cancel(small2); buf == nil {
		t.Error("granted memory was lost when it was given up")
	} else {
		a.release(buf)
	}
	a.release(small.buf)
	if st := a.stats(); st.Used != 0 || st.Waits != 5 {
		t.Errorf("stats() = %+v, want 0 used, 5 waits", st)
	}
}

// TestArenaCancelOrder gives up the first, middle and last of a queue.
func TestArenaCancelOrder(t *testing.T) {
	for give := range 3 {
		a := newTestArena(t, 4)
		full := a.try(4 * pageSize)
		var ws [3]waiter
		for i := range ws {
			ws[i].granted = make(chan struct{}, 1)
			a.enqueue(&ws[i], pageSize)
		}
		a.cancel(&ws[give])
		a.release(full)
		for i := range ws {
			if got, want := granted(&ws[i]), i != give; got != want {
				t.Errorf("given up %d: request %d granted: %v", give, i, got)
			} else if got {
				a.release(ws[i].buf)
			}
		}
		if buf := a.try(4 * pageSize); buf == nil {
			t.Errorf("given up %d: the arena is not whole again", give)
		} else {
			a.release(buf)
		}
	}
}

// resident returns how many pages of the arena are in memory, by the kernel's
// account.
func resident(t *testing.T, a *arena) int {
	t.Helper()
	n := 0
	for p := range a.pages {
		var vec [1]byte
		page := a.mem[p*pageSize : (p+1)*pageSize]
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&page[0])), pageSize, uintptr(unsafe.Pointer(&vec[0])))
		if errno != 0 {
			t.Fatal(errno)
		}
		n += int(vec[0] & 1)
	}
	return n
}

// TestArenaTrim: what a burst has used is given back, but not what is in use,
// and what is in use keeps its contents.
func TestArenaTrim(t *testing.T) {
	const pages = 8192
	a := newTestArena(t, pages)
	// The arena counts pages of 4096; a huge page would be counted as more.
	if err := unix.Madvise(a.mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	if n := resident(t, a); n != 0 {
		t.Errorf("%d pages resident before any was used", n)
	}
	keep := a.try(3 * pageSize)
	all := a.try((pages - 3) * pageSize)
	for i := range all {
		all[i] = 1
	}
	for i := range keep {
		keep[i] = 2
	}
	a.release(all)
	keep2 := a.try(100 * pageSize) // from the top
	for i := range keep2 {
		keep2[i] = 3
	}
	a.release(a.try(pages / 2 * pageSize)) // another burst before the timer runs
	a.trim()
	if n := resident(t, a); n != pages {
		t.Errorf("%d pages resident between bursts, want all %d", n, pages)
	}
	a.trim()
	got, st := resident(t, a), a.stats()
	if want := keepPages + 103; got > want {
		t.Errorf("%d pages resident after the burst, want at most %d", got, want)
	}
	if st.Resident != int64(got)*pageSize {
		t.Errorf("stats().Resident = %d, kernel says %d", st.Resident, got*pageSize)
	}
	for i := range keep {
		if keep[i] != 2 {
			t.Fatal("memory in use was given back")
		}
	}
	for i := range keep2 {
		if keep2[i] != 3 {
			t.Fatal("memory in use was given back")
		}
	}
	a.release(keep)
	a.release(keep2)
}

func BenchmarkArena(b *testing.B) {
	a := newTestArena(b, 16384)
	for range 32 {
		defer a.release(a.try(pageSize))
	}
	for b.Loop() {
		buf := a.try(pageSize)
		a.release(buf)
	}
}
