package xts

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
)

// sectorSizes has the sizes of real disks, the smallest and odd ones, sizes around
// what a vector implementation takes at once, and some that aren't powers of two.
var sectorSizes = []int{16, 32, 48, 64, 80, 112, 128, 144, 256, 496, 512, 528, 1024, 1040, 2048, 4096, 4112, 8192, 65536}

// firsts are sector numbers where a tweak that is too narrow shows.
var firsts = []uint64{
	0, 1, 255, 1<<16 - 1, 1<<31 - 3, 1<<32 - 40, 1<<32 - 5, 1 << 32, 1<<35 + 8, 1<<56 - 1,
	1<<63 - 20, 1<<63 - 1, 1 << 63, math.MaxUint64 - 33, math.MaxUint64 - 7, math.MaxUint64,
}

// A sectorsCase is a run and its ciphertext, which two other implementations agree
// on. It is made once for all tiers, because the other implementations are slow.
type sectorsCase struct {
	plaintext, ciphertext []byte
	first                 uint64
	sectorSize            int
}

func newSectorsCase(t *testing.T, key *[64]byte, plaintext []byte, first uint64, sectorSize int) sectorsCase {
	t.Helper()
	var tweak [16]byte
	binary.LittleEndian.PutUint64(tweak[:], first)
	ciphertext := reference(t, key, plaintext, tweak, sectorSize, false)
	if !bytes.Equal(ciphertext, peer(t, key, plaintext, first, sectorSize, false)) {
		t.Fatalf("reference and x/crypto/xts differ on %d bytes in sectors of %d from %d", len(plaintext), sectorSize, first)
	}
	return sectorsCase{plaintext, ciphertext, first, sectorSize}
}

// run checks EncryptSectors and DecryptSectors at odd addresses, into another
// buffer and in place, with guard bytes around the output. The input is at srcOff
// from 64-byte alignment, the output at dstOff.
func (sc *sectorsCase) run(t *testing.T, c *Cipher, srcOff, dstOff int) {
	t.Helper()
	first, sectorSize := sc.first, sc.sectorSize
	for _, op := range []struct {
		name     string
		in, want []byte
		crypt    func(dst, src []byte, first uint64, sectorSize int)
	}{
		{"EncryptSectors", sc.plaintext, sc.ciphertext, c.EncryptSectors},
		{"DecryptSectors", sc.ciphertext, sc.plaintext, c.DecryptSectors},
	} {
		what := fmt.Sprintf("%s of %d bytes in sectors of %d from %d, offsets %d and %d", op.name, len(op.in), sectorSize, first, srcOff, dstOff)

		src, checkSrc := guarded(len(op.in), srcOff)
		dst, checkDst := guarded(len(op.in), dstOff)
		copy(src, op.in)
		op.crypt(dst, src, first, sectorSize)
		if i := firstDifference(dst, op.want); i >= 0 {
			t.Fatalf("%s: wrong from byte %d (sector %d, block %d)", what, i, i/sectorSize, i%sectorSize/blockSize)
		}
		if !bytes.Equal(src, op.in) {
			t.Fatalf("%s: input changed", what)
		}

		op.crypt(src, src, first, sectorSize)
		if i := firstDifference(src, op.want); i >= 0 {
			t.Fatalf("%s, in place: wrong from byte %d (sector %d, block %d)", what, i, i/sectorSize, i%sectorSize/blockSize)
		}
		if !checkSrc() || !checkDst() {
			t.Fatalf("%s: wrote outside its output", what)
		}
	}
}

// guarded returns n bytes at offset off from 64-byte alignment, and a function that
// reports whether the bytes around them are untouched.
func guarded(n, off int) (b []byte, intact func() bool) {
	const guard = 192
	all := bytes.Repeat([]byte{0x5a}, guard+off+n+guard+alignment)
	start := guard + off + int(-address(all)%alignment)
	untouched := func(b []byte) bool { return bytes.Count(b, []byte{0x5a}) == len(b) }
	return all[start : start+n : start+n], func() bool { return untouched(all[:start]) && untouched(all[start+n:]) }
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return len(a)
}

// runCases runs all cases with every tier, at addresses that vary.
func runCases(t *testing.T, key *[64]byte, cases []sectorsCase) {
	t.Helper()
	forEachTier(t, func(t *testing.T, tr *tier) {
		rnd := rand.New(rand.NewPCG(1, 2))
		c := newTestCipher(t, tr, key)
		for i := range cases {
			cases[i].run(t, c, rnd.IntN(64), rnd.IntN(64))
		}
	})
}

// TestSectors has every sector size with every number of sectors up to 40 (as far
// as 512 KiB goes), and some with up to 100.
func TestSectors(t *testing.T) {
	key := testKey(2)
	var cases []sectorsCase
	for _, sectorSize := range sectorSizes {
		for count := 1; count <= 40 && count*sectorSize <= 1<<19; count++ {
			n := len(cases)
			plaintext := testData(uint64(n), count*sectorSize)
			cases = append(cases, newSectorsCase(t, key, plaintext, firsts[n%len(firsts)], sectorSize))
		}
	}
	for _, sectorSize := range []int{16, 512, 1024} { // more sectors than any batch inside
		for count := 41; count <= 100; count++ {
			n := len(cases)
			plaintext := testData(uint64(n), count*sectorSize)
			cases = append(cases, newSectorsCase(t, key, plaintext, firsts[n%len(firsts)], sectorSize))
		}
	}
	if want := 18*40 + 8 + 3*60; len(cases) != want {
		t.Fatalf("%d cases, want %d", len(cases), want)
	}
	runCases(t, key, cases)
}

// TestFirst has every interesting sector number with the sector sizes in use.
func TestFirst(t *testing.T) {
	key := testKey(3)
	var cases []sectorsCase
	for _, sectorSize := range []int{16, 512, 4096} {
		for _, first := range firsts {
			for _, count := range []int{1, 2, 7, 37} {
				cases = append(cases, newSectorsCase(t, key, testData(first, count*sectorSize), first, sectorSize))
			}
		}
	}
	runCases(t, key, cases)
}

// TestLong has runs longer than anything inside an implementation, up to the
// largest sector there may be.
func TestLong(t *testing.T) {
	key := testKey(4)
	var cases []sectorsCase
	for _, tt := range []struct{ sectorSize, count int }{
		{512, 5001}, {4096, 300}, {1 << 20, 3}, {1<<20 + 16, 2}, {maxSectorSize, 1},
	} {
		plaintext := testData(5, tt.sectorSize*tt.count)
		cases = append(cases, newSectorsCase(t, key, plaintext, 1<<32-9, tt.sectorSize))
	}
	runCases(t, key, cases)
}

// TestSplit checks that a run is the same in one call as in two, which is what
// keeps a disk readable whatever the size of requests.
func TestSplit(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		c := newTestCipher(t, tr, testKey(6))
		for _, sectorSize := range []int{512, 4096} {
			const count, first = 41, math.MaxUint64 - 100
			src := testData(7, count*sectorSize)
			want := make([]byte, len(src))
			c.EncryptSectors(want, src, first, sectorSize)
			for n := range count + 1 {
				got := make([]byte, len(src))
				at, next := n*sectorSize, uint64(first)+uint64(n*sectorSize/512)
				c.EncryptSectors(got[:at], src[:at], first, sectorSize)
				c.EncryptSectors(got[at:], src[at:], next, sectorSize)
				if !bytes.Equal(got, want) {
					t.Errorf("sectors of %d bytes, %d + %d differ from %d at once", sectorSize, n, count-n, count)
				}
			}
		}
	})
}

// TestWideTweak checks tweaks with a high half, which the vectors have for one
// sector only: the number goes up in the low half, without carry.
func TestWideTweak(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		key := testKey(8)
		c := newTestCipher(t, tr, key)
		for _, sectorSize := range []int{16, 512, 4096} {
			var tweak [16]byte
			lo, hi := uint64(math.MaxUint64-20), uint64(0xfedcba9876543210)
			binary.LittleEndian.PutUint64(tweak[:8], lo)
			binary.LittleEndian.PutUint64(tweak[8:], hi)
			plaintext := testData(9, 37*sectorSize)
			want := reference(t, key, plaintext, tweak, sectorSize, false)
			got := make([]byte, len(want))
			c.tier.encrypt(c, &got[0], plaintext, sectorSize, lo, hi)
			if !bytes.Equal(got, want) {
				t.Errorf("encrypt in sectors of %d differs from reference", sectorSize)
			}
			c.tier.decrypt(c, &got[0], got, sectorSize, lo, hi)
			if !bytes.Equal(got, plaintext) {
				t.Errorf("decrypt in sectors of %d differs from reference", sectorSize)
			}
		}
	})
}

// TestLongOutput checks that bytes of dst beyond the length of src are left alone.
func TestLongOutput(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		c := newTestCipher(t, tr, testKey(10))
		dst := bytes.Repeat([]byte{0x5a}, 4096)
		rest := bytes.Clone(dst[1024:])
		c.EncryptSectors(dst, make([]byte, 1024), 0, 512)
		c.DecryptSectors(dst, make([]byte, 1024), 0, 512)
		if !bytes.Equal(dst[1024:], rest) {
			t.Error("bytes beyond the length of the input were written")
		}
	})
}

// TestArguments has everything that is a caller's bug, and beside each the nearest
// thing that isn't.
func TestArguments(t *testing.T) {
	buf := make([]byte, 8192)
	tests := []struct {
		name       string
		dst, src   []byte
		sectorSize int
		panics     string // substring, or "" if the call is in order
	}{
		{"nothing", nil, nil, 512, ""},
		{"nothing into something", buf, nil, 512, ""},
		{"nothing inside something", buf, buf[1:1], 512, ""},
		{"nothing in no sectors", nil, nil, 0, "sector size"},
		{"negative sector size", buf, buf, -512, "sector size"},
		{"least negative sector size", buf, buf, math.MinInt, "sector size"},
		{"sector size 8", buf, buf, 8, "sector size"},
		{"sector size 520", buf[:520], buf[:520], 520, "sector size"},
		{"sector size 528", buf[:528], buf[:528], 528, ""},
		{"largest sector size", nil, nil, 16 << 20, ""},
		{"too large sector size", nil, nil, 16<<20 + 16, "sector size"},
		{"part of a sector", buf, buf[:511], 512, "whole number"},
		{"a sector and a block", buf, buf[:528], 512, "whole number"},
		{"short output", buf[:1024], buf[:1536], 512, "output"},
		{"no output", nil, buf[:512], 512, "output"},
		{"long output", buf, buf[:512], 512, ""},
		{"in place", buf, buf, 4096, ""},
		{"output one byte later", buf[1:], buf[:512], 512, "overlap"},
		{"output one byte earlier", buf, buf[1:513], 512, "overlap"},
		{"output one block later", buf[16:], buf[:512], 512, "overlap"},
		{"output one sector later", buf[512:], buf[:1024], 512, "overlap"},
		{"last byte is the first of output", buf[511:], buf[:512], 512, "overlap"},
		{"last byte of output is the first", buf[:512], buf[511:1023], 512, "overlap"},
		{"output just after", buf[512:], buf[:512], 512, ""},
		{"output just before", buf[:512], buf[512:1024], 512, ""},
		{"room behind output overlaps", buf, buf[512:1024], 512, ""},
	}
	forEachTier(t, func(t *testing.T, tr *tier) {
		c := newTestCipher(t, tr, testKey(11))
		for _, tt := range tests {
			for name, crypt := range map[string]func(dst, src []byte, first uint64, sectorSize int){
				"EncryptSectors": c.EncryptSectors, "DecryptSectors": c.DecryptSectors,
			} {
				before := bytes.Clone(buf)
				got := panicOf(func() { crypt(tt.dst, tt.src, 7, tt.sectorSize) })
				if tt.panics == "" && got != "" {
					t.Errorf("%s: %s panics with %q", tt.name, name, got)
				}
				if tt.panics != "" {
					if !strings.HasPrefix(got, "xts: ") || !strings.Contains(got, tt.panics) {
						t.Errorf("%s: %s panics with %q, want xts: and %q", tt.name, name, got, tt.panics)
					}
					if !bytes.Equal(buf, before) {
						t.Errorf("%s: %s wrote before it panicked", tt.name, name)
					}
				}
			}
		}
	})
}

// panicOf returns what f panics with, or "" if it doesn't.
func panicOf(f func()) (msg string) {
	defer func() {
		if r := recover(); r != nil {
			msg = fmt.Sprint(r)
		}
	}()
	f()
	return ""
}

func TestEqualKeys(t *testing.T) {
	var equal, zero, nearly [64]byte
	copy(equal[:32], testKey(12)[:32])
	copy(equal[32:], equal[:32])
	nearly = equal
	nearly[63] ^= 1
	for _, tt := range []struct {
		name string
		key  *[64]byte
		want error
	}{
		{"equal", &equal, ErrEqualKeys},
		{"zero", &zero, ErrEqualKeys},
		{"nearly equal", &nearly, nil},
	} {
		if c, err := NewCipher(tt.key); !errors.Is(err, tt.want) || (c == nil) != (err != nil) {
			t.Errorf("%s: NewCipher = %v, %v, want error %v", tt.name, c, err, tt.want)
		}
		mem := allocate()
		if c, err := NewCipherIn(mem, tt.key); !errors.Is(err, tt.want) || (c == nil) != (err != nil) {
			t.Errorf("%s: NewCipherIn = %v, %v, want error %v", tt.name, c, err, tt.want)
		} else if err != nil && !allZero(mem) {
			t.Errorf("%s: NewCipherIn left something in memory", tt.name)
		}
	}
}

// TestHalves checks which half of the key is which: the data key is the first.
func TestHalves(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		key := testKey(13)
		swapped := [64]byte(append(key[32:64:64], key[:32]...))
		src, dst := testData(14, 512), make([]byte, 512)
		newTestCipher(t, tr, key).EncryptSectors(dst, src, 5, 512)
		if !bytes.Equal(dst, peer(t, key, src, 5, 512, false)) {
			t.Error("differs from x/crypto/xts")
		}
		if bytes.Equal(dst, peer(t, &swapped, src, 5, 512, false)) {
			t.Error("the halves are interchangeable")
		}
	})
}

func TestNewCipherIn(t *testing.T) {
	if Size%alignment != 0 {
		t.Errorf("Size = %d is not a multiple of %d", Size, alignment)
	}
	b := allocate()
	b = append(b, make([]byte, 2*alignment)...)
	b = b[-address(b)%alignment:]
	for _, tt := range []struct {
		name   string
		mem    []byte
		panics string
	}{
		{"exact", b[:Size], ""},
		{"more", b, ""},
		{"none", nil, "need"},
		{"short", b[:Size-1], "need"},
		{"off by 1", b[1 : 1+Size], "aligned"},
		{"off by 32", b[32 : 32+Size], "aligned"},
	} {
		got := panicOf(func() {
			if _, err := NewCipherIn(tt.mem, testKey(15)); err != nil {
				t.Error(err)
			}
		})
		if (got == "") != (tt.panics == "") || !strings.Contains(got, tt.panics) {
			t.Errorf("%s: NewCipherIn panics with %q, want %q", tt.name, got, tt.panics)
		}
	}
	for range 100 { // wherever the heap puts it
		if b := allocate(); len(b) != Size || address(b)%alignment != 0 {
			t.Fatalf("allocate() = %d bytes at %#x", len(b), address(b))
		}
	}
}

// TestMemory checks that the key schedules are in the caller's memory, unless the
// tier is the one that is documented not to put them there; that old content of
// that memory has no influence; and that the key itself isn't needed any more.
func TestMemory(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		key, src := testKey(16), testData(17, 4096)
		want := peer(t, key, src, 3, 512, false)
		mem := allocate()
		copy(mem, testData(18, Size))
		c, err := newCipher(tr, mem, key)
		if err != nil {
			t.Fatal(err)
		}
		clear(key[:])
		got := make([]byte, len(src))
		c.EncryptSectors(got, src, 3, 512)
		if !bytes.Equal(got, want) {
			t.Error("result depends on the caller's copy of the key or on old memory")
		}

		if tr == &generic {
			if !allZero(mem) {
				t.Error("the generic tier put something in memory")
			}
			return
		}
		if c.generic != (genericKeys{}) {
			t.Error("there are key schedules on the Go heap")
		}
		clear(mem)
		c.EncryptSectors(got, src, 3, 512)
		if bytes.Equal(got, want) {
			t.Error("result doesn't depend on memory: there is another copy of the key schedules")
		}
	})
}

func TestWipe(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		mem := allocate()
		c, err := newCipher(tr, mem, testKey(19))
		if err != nil {
			t.Fatal(err)
		}
		copy(mem, testData(25, Size)) // in case the tier doesn't use all of it
		c.Wipe()
		if !allZero(mem) {
			t.Error("Wipe left something in memory")
		}
		if *c != (Cipher{}) {
			t.Error("Wipe left something in the cipher")
		}
		copy(mem, "the caller's again")
		c.Wipe()
		if !bytes.HasPrefix(mem, []byte("the caller's again")) {
			t.Error("the second Wipe changed memory that is the caller's again")
		}
		buf := make([]byte, 512)
		for _, n := range []int{0, 512} {
			for name, crypt := range map[string]func(dst, src []byte, first uint64, sectorSize int){
				"EncryptSectors": c.EncryptSectors, "DecryptSectors": c.DecryptSectors,
			} {
				if got := panicOf(func() { crypt(buf[:n], buf[:n], 0, 512) }); !strings.Contains(got, "wiped") {
					t.Errorf("%s of %d bytes after Wipe panics with %q", name, n, got)
				}
			}
		}
		if !allZero(buf) {
			t.Error("a wiped cipher wrote output")
		}
	})
}

// TestPrint checks that printing a Cipher by mistake shows nothing of the key.
func TestPrint(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		c := newTestCipher(t, tr, testKey(20))
		type exported struct {
			P *Cipher
			C Cipher
		}
		type hidden struct{ p *Cipher } // fmt can't call methods here
		for _, verb := range []string{"%v", "%+v", "%#v", "%x", "%s", "%d", "%q"} {
			for _, v := range []any{c, *c, exported{c, *c}, &exported{c, *c}, hidden{c}, &hidden{c}} {
				// A few pointers and the tier; 60 round keys don't fit.
				if s := fmt.Sprintf(verb, v); len(s) > 400 {
					t.Errorf("%s of %T prints %d bytes: %.100s", verb, v, len(s), s)
				}
			}
		}
	})
}

func TestAllocations(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		c := newTestCipher(t, tr, testKey(21))
		buf := make([]byte, 65536)
		for _, sectorSize := range []int{16, 512, 4096, 65536} {
			if n := testing.AllocsPerRun(10, func() {
				c.EncryptSectors(buf, buf, 1, sectorSize)
				c.DecryptSectors(buf, buf, 1, sectorSize)
			}); n != 0 {
				t.Errorf("%v allocations with sectors of %d bytes", n, sectorSize)
			}
		}
	})
}

// TestConcurrency uses one cipher from many goroutines, on neighbouring parts of
// one buffer. It means most with the race detector, which also sees what the
// generic tier does outside its part.
func TestConcurrency(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		const workers, part = 8, 3 * 512
		key := testKey(22)
		c := newTestCipher(t, tr, key)
		src := testData(23, workers*part)
		want := peer(t, key, src, 9, 512, false)
		dst := make([]byte, len(src))
		var wg sync.WaitGroup
		for w := range workers {
			wg.Go(func() {
				d, s := dst[w*part:][:part], src[w*part:][:part]
				for range 50 {
					c.EncryptSectors(d, s, uint64(9+w*part/512), 512)
					c.DecryptSectors(d, d, uint64(9+w*part/512), 512)
				}
				c.EncryptSectors(d, s, uint64(9+w*part/512), 512)
			})
		}
		wg.Wait()
		if !bytes.Equal(dst, want) {
			t.Error("wrong result")
		}
	})
}

func allZero(b []byte) bool { return bytes.Count(b, []byte{0}) == len(b) }
