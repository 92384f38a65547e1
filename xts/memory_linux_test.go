package xts

import (
	"bytes"
	"os"
	"syscall"
	"testing"
)

// fencedPages returns n pages outside the Go heap with an inaccessible page on
// either side, so that reading or writing beyond them by one byte is fatal.
func fencedPages(t *testing.T, n int) []byte {
	t.Helper()
	page := os.Getpagesize()
	all, err := syscall.Mmap(-1, 0, (n+2)*page, syscall.PROT_NONE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := syscall.Munmap(all); err != nil {
			t.Error(err)
		}
	})
	b := all[page : (n+1)*page : (n+1)*page]
	if err := syscall.Mprotect(b, syscall.PROT_READ|syscall.PROT_WRITE); err != nil {
		t.Fatal(err)
	}
	return b
}

// TestFencedMemory runs with input, output and key schedules at the edges of
// mapped memory: assembly may not even read a byte too many.
func TestFencedMemory(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		key := testKey(24)
		keys := fencedPages(t, 1)
		from, to := fencedPages(t, 16), fencedPages(t, 16)
		for _, mem := range [][]byte{keys[:Size], keys[len(keys)-Size:]} {
			c, err := newCipher(tr, mem, key)
			if err != nil {
				t.Fatal(err)
			}
			for _, sectorSize := range []int{16, 32, 48, 80, 112, 144, 496, 512, 528, 1024, 4096} {
				for count := 1; count <= 20 && count*sectorSize <= len(from); count++ {
					n := count * sectorSize
					plaintext := testData(uint64(n), n)
					want := peer(t, key, plaintext, 77, sectorSize, false)
					for _, atEnd := range []bool{false, true} {
						src, dst := from[:n], to[:n]
						if atEnd {
							src, dst = from[len(from)-n:], to[len(to)-n:]
						}
						copy(src, plaintext)
						c.EncryptSectors(dst, src, 77, sectorSize)
						if !bytes.Equal(dst, want) {
							t.Fatalf("EncryptSectors of %d sectors of %d bytes (at end: %t) is wrong", count, sectorSize, atEnd)
						}
						c.DecryptSectors(src, dst, 77, sectorSize)
						if !bytes.Equal(src, plaintext) {
							t.Fatalf("DecryptSectors of %d sectors of %d bytes (at end: %t) is wrong", count, sectorSize, atEnd)
						}
					}
				}
			}
			c.Wipe()
		}
	})
}
