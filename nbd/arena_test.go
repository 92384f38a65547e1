package nbd

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd/nbdtest"
)

func newTestArena(t testing.TB, pages int) *arena {
	t.Helper()
	return newTestArenaFor(t, pages, false)
}

func newTestArenaFor(t testing.TB, pages int, kernel bool) *arena {
	t.Helper()
	m, err := NewMemory(int64(pages)*pageSize, 0)
	if err != nil {
		t.Fatal(err)
	}
	a := newArena(m, kernel)
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
	a, w := newTestArena(t, pages), new(waiter)
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
			a.release(w, r.buf)
			out[i] = out[len(out)-1]
			out = out[:len(out)-1]
		} else {
			size := 1 + rng.IntN(3*pageSize)
			if rng.IntN(10) == 0 {
				size = 1 + rng.IntN(200*pageSize)
			}
			need := (size + pageSize - 1) / pageSize
			buf := a.try(w, size)
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
		a.release(w, r.buf)
	}
	if buf := a.try(w, pages*pageSize); buf == nil {
		t.Error("the whole arena can't be had when everything was returned")
	} else {
		a.release(w, buf)
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
	a, w := newTestArena(t, 10), new(waiter)
	held := a.try(w, 6*pageSize)
	large := &waiter{granted: make(chan struct{}, 1)}
	small := &waiter{granted: make(chan struct{}, 1)}
	small2 := &waiter{granted: make(chan struct{}, 1)}
	if a.enqueue(large, 8*pageSize) != nil {
		t.Fatal("8 pages of 4")
	}
	if a.try(w, pageSize) != nil {
		t.Error("a small request overtook the large one")
	}
	if a.enqueue(small, pageSize) != nil || a.enqueue(small2, 2*pageSize) != nil {
		t.Error("a small request overtook the large one")
	}
	a.release(w, held)
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
	a.release(w, again.buf)
	a.release(w, large.buf)
	// Granted and given up at the same time.
	full := a.try(w, 8*pageSize)
	if a.enqueue(small2, 2*pageSize) != nil {
		t.Fatal("2 pages of 1")
	}
	a.release(w, full)
	if buf := a.cancel(small2); buf == nil {
		t.Error("granted memory was lost when it was given up")
	} else {
		a.release(w, buf)
	}
	a.release(w, small.buf)
	if st := a.stats(); st.Used != 0 || st.Waits != 5 {
		t.Errorf("stats() = %+v, want 0 used, 5 waits", st)
	}
}

// TestArenaCancelOrder gives up the first, middle and last of a queue.
func TestArenaCancelOrder(t *testing.T) {
	for give := range 3 {
		a, w := newTestArena(t, 4), new(waiter)
		full := a.try(w, 4*pageSize)
		var ws [3]waiter
		for i := range ws {
			ws[i].granted = make(chan struct{}, 1)
			a.enqueue(&ws[i], pageSize)
		}
		a.cancel(&ws[give])
		a.release(w, full)
		for i := range ws {
			if got, want := granted(&ws[i]), i != give; got != want {
				t.Errorf("given up %d: request %d granted: %v", give, i, got)
			} else if got {
				a.release(w, ws[i].buf)
			}
		}
		if buf := a.try(w, 4*pageSize); buf == nil {
			t.Errorf("given up %d: the arena is not whole again", give)
		} else {
			a.release(w, buf)
		}
	}
}

// TestArenaReserve: connections that keep all they can get, in pieces or at once,
// leave others room, and what passes by way of the reserve doesn't starve a large
// request that waits.
func TestArenaReserve(t *testing.T) {
	for _, kernel := range []bool{false, true} {
		t.Run(fmt.Sprintf("kernel=%v", kernel), func(t *testing.T) { arenaReserve(t, kernel) })
	}
}

func arenaReserve(t *testing.T, forKernel bool) {
	const largest = MaxPayload / pageSize
	a := newTestArenaFor(t, largest+reservePages, forKernel)
	type conn struct {
		waiter
		out [][]byte
	}
	newConn := func() *conn { return &conn{waiter: waiter{granted: make(chan struct{}, 1)}} }
	get := func(c *conn, pages int) bool {
		buf := a.try(&c.waiter, pages*pageSize)
		if buf != nil {
			c.out = append(c.out, buf)
		}
		return buf != nil
	}
	put := func(c *conn) {
		a.release(&c.waiter, c.out[0])
		c.out = c.out[1:]
	}

	// Everybody wants the largest payload.
	var slow []*conn
	for i := range 3 {
		c := newConn()
		if buf := a.enqueue(&c.waiter, MaxPayload); (buf != nil) != (i == 0) {
			t.Fatalf("largest payload %d: %v", i, buf != nil)
		} else if buf != nil {
			c.out = append(c.out, buf)
		}
		slow = append(slow, c)
	}
	// Then as much as there is, with requests of each size, while a large one waits.
	left := reservePages - a.kernel
	for i, pages := range []int{1, 32, 128, 7} {
		c := newConn()
		for get(c, pages) {
		}
		if c.lent > left/5 || c.lent <= left/5-pages {
			t.Errorf("connection %d got %d pages of the %d that were left of the reserve, want a fifth", i, c.lent, left)
		}
		left -= c.lent
		slow = append(slow, c)
	}
	// Who comes now finds some, and again and again.
	quick := newConn()
	for range 100 {
		if !get(quick, left/32) || !get(quick, left/8) {
			t.Fatal("nothing is left of the reserve")
		}
		put(quick)
		put(quick)
	}
	kernel := newConn()
	kernel.kernel = true
	if forKernel && !get(kernel, reservePages/2) {
		t.Error("the kernel didn't get its part of the reserve")
	}
	if !get(kernel, left) {
		t.Error("the kernel didn't get what was left of the reserve")
	} else if get(kernel, 1) {
		t.Error("there was more of the reserve than there can be")
	}
	// One that is too much for the reserve waits, but as none of its kind does
	// for memory that has been given to those that came after it.
	middle := newConn()
	if a.enqueue(&middle.waiter, reservePages*pageSize) != nil {
		t.Fatal("all of the reserve was given to one")
	}
	for i := range 3 {
		if i > 0 {
			if !granted(&slow[i].waiter) {
				t.Fatalf("large request %d was starved", i)
			}
			slow[i].out = append(slow[i].out, slow[i].buf)
		}
		if granted(&middle.waiter) {
			t.Fatal("the last in the queue was served before others")
		}
		put(slow[i])
	}
	if !granted(&middle.waiter) {
		t.Fatal("the last in the queue was starved")
	}
	a.release(&middle.waiter, middle.buf)
	for _, c := range append(slow, quick, middle, kernel) {
		for len(c.out) > 0 {
			put(c)
		}
		if c.lent != 0 {
			t.Errorf("%d pages of the reserve remain lent to one that has none", c.lent)
		}
	}
	if a.lent != 0 || a.used != 0 {
		t.Errorf("%d pages of the reserve, %d of all are in use at the end", a.lent, a.used)
	}
}

// TestArenaKernel: however many clients keep all that they can get, in pieces of all
// sizes, and whatever they have given back before, the kernel gets its requests in.
func TestArenaKernel(t *testing.T) {
	const request = 128 << 10
	s, err := New(Config{Kernel: true}, Export{Device: nbdtest.NewDevice(512, false)})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	a := s.arena
	rng := rand.New(rand.NewPCG(3, 4))
	type run struct {
		w   *waiter
		buf []byte
	}
	var kernel waiter
	kernel.kernel = true
	clients := make([]waiter, 100)
	var out []run
	for round := range 3 {
		for i := range clients {
			for size := pageSize << rng.IntN(8); size >= pageSize; {
				if buf := a.try(&clients[i], size); buf != nil {
					out = append(out, run{&clients[i], buf})
				} else {
					size /= 2
				}
			}
		}
		var own [][]byte
		for buf := a.try(&kernel, request); buf != nil; buf = a.try(&kernel, request) {
			own = append(own, buf)
		}
		if len(own) < reservePages*pageSize/2/request {
			t.Errorf("round %d: the kernel got %d requests in beside %d clients, want half of the reserve", round, len(own), len(clients))
		}
		for _, buf := range own {
			a.release(&kernel, buf)
		}
		for i := range out {
			if j := rng.IntN(len(out)); i%2 == 0 {
				out[i], out[j] = out[j], out[i]
			}
		}
		for i := range out {
			if round == 2 || i%2 == 0 {
				a.release(out[i].w, out[i].buf)
				out[i].buf = nil
			}
		}
		out = slices.DeleteFunc(out, func(r run) bool { return r.buf == nil })
	}
	if a.lent != 0 || a.used != 0 {
		t.Errorf("%d pages of the reserve, %d of all are in use at the end", a.lent, a.used)
	}
}

// TestArenaReserveQueue: who waits behind a large request gets memory of the
// reserve when that is given back.
func TestArenaReserveQueue(t *testing.T) {
	a := newTestArena(t, MaxPayload/pageSize+10)
	var all, large, first, second waiter
	slow := waiter{kernel: true}
	for _, w := range []*waiter{&large, &first, &second} {
		w.granted = make(chan struct{}, 1)
	}
	whole := a.try(&all, MaxPayload)
	held := [2][]byte{a.try(&slow, 9*pageSize), a.try(&slow, pageSize)}
	if a.enqueue(&large, MaxPayload) != nil || a.enqueue(&first, 2*pageSize) != nil || a.enqueue(&second, 2*pageSize) != nil {
		t.Fatal("there was memory")
	}
	a.release(&slow, held[0])
	if granted(&first) || granted(&second) {
		t.Error("of 9 pages, 2 were given to a client")
	}
	a.release(&slow, held[1])
	if !granted(&first) {
		t.Error("the reserve came back, and who waits for it in the middle of the queue got nothing")
	}
	if granted(&second) {
		t.Error("of 8 pages, 2 were given to a client")
	}
	a.release(&first, first.buf)
	if !granted(&second) {
		t.Error("the reserve came back, and the last in the queue got nothing")
	}
	a.release(&all, whole)
	if !granted(&large) {
		t.Error("the large request was starved")
	}
	a.release(&large, large.buf)
	a.release(&second, second.buf)
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
	a, w := newTestArena(t, pages), new(waiter)
	// The arena counts pages of 4096; a huge page would be counted as more.
	if err := unix.Madvise(a.mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	if n := resident(t, a); n != 0 {
		t.Errorf("%d pages resident before any was used", n)
	}
	keep := a.try(w, 3*pageSize)
	all := a.try(w, (pages-3)*pageSize)
	for i := range all {
		all[i] = 1
	}
	for i := range keep {
		keep[i] = 2
	}
	a.release(w, all)
	keep2 := a.try(w, 100*pageSize) // from the top
	for i := range keep2 {
		keep2[i] = 3
	}
	a.release(w, a.try(w, pages/2*pageSize)) // another burst before the timer runs
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
	a.release(w, keep)
	a.release(w, keep2)
}

func BenchmarkArena(b *testing.B) {
	a, w := newTestArena(b, 16384), new(waiter)
	for range 32 {
		defer a.release(w, a.try(w, pageSize))
	}
	for b.Loop() {
		buf := a.try(w, pageSize)
		a.release(w, buf)
	}
}
