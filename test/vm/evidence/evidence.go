// Package evidence looks at a raw disk from outside: is there plaintext on
// it, and do its written blocks look random?
//
// [Search] counts strings, [Find] finds one, [Measure] tests blocks. All read the disk once,
// in order, and skip the holes of a sparse file, which hold nothing but
// zeros. They are not safe for concurrent use of one file, whose offset
// [Extents] moves.
package evidence

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// BlockSize is the unit of [Measure]: the block of the file systems on top,
// so that a block was either written as a whole or not at all.
const BlockSize = 4096

// An Extent is a run of bytes.
type Extent struct{ Off, Len int64 }

// Extents returns the parts of f from offset from on that may hold data. For
// a block device, or a file system that cannot say, that is one extent to
// the end.
func Extents(f *os.File, from int64) ([]Extent, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, fmt.Errorf("evidence: size of %s: %w", f.Name(), err)
	}
	if info, err := f.Stat(); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	} else if !info.Mode().IsRegular() {
		return []Extent{{from, max(0, size-from)}}, nil
	}
	var list []Extent
	for off := from; off < size; {
		start, err := f.Seek(off, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break // only a hole is left
		}
		if err != nil {
			return nil, fmt.Errorf("evidence: data in %s after %d: %w", f.Name(), off, err)
		}
		end, err := f.Seek(start, unix.SEEK_HOLE)
		if err != nil {
			return nil, fmt.Errorf("evidence: hole in %s after %d: %w", f.Name(), start, err)
		}
		list = append(list, Extent{start, end - start})
		off = end
	}
	return list, nil
}

// Search counts how often each needle occurs in the extents of r. A needle
// that begins in one extent and ends in the next one is not found, so an
// extent must end only at a hole. Occurrences of one needle that overlap
// count once.
//
// It panics if a needle is empty.
func Search(r io.ReaderAt, extents []Extent, needles ...[]byte) (counts []int, err error) {
	counts = make([]int, len(needles))
	longest := 1
	for _, n := range needles {
		windowOf(n, 0) // panics now, even if there is nothing to search
		longest = max(longest, len(n))
	}
	err = scan(r, extents, longest-1, func(data []byte, kept int, _ int64) bool {
		for i, needle := range needles {
			counts[i] += bytes.Count(data[windowOf(needle, kept):], needle)
		}
		return true
	})
	return counts, err
}

// Find returns the offset of the first occurrence of needle that [Search]
// would count, or -1. It reads no further than that.
func Find(r io.ReaderAt, extents []Extent, needle []byte) (off int64, err error) {
	off = -1
	err = scan(r, extents, len(needle)-1, func(data []byte, kept int, at int64) bool {
		from := windowOf(needle, kept)
		if i := bytes.Index(data[from:], needle); i >= 0 {
			off = at + int64(from+i)
		}
		return off < 0
	})
	return off, err
}

// windowOf says from where on a needle is to be looked for in data whose
// first kept bytes were seen before: one byte less than its own length of
// them. Then a match always ends in new bytes and none is found twice.
func windowOf(needle []byte, kept int) int {
	if len(needle) == 0 {
		panic("evidence: empty needle")
	}
	return max(0, kept-(len(needle)-1))
}

// scan reads the extents in order, in chunks. It calls do with each chunk,
// in front of which are up to keep bytes of the one before: how many, and
// the offset of the first of them. It ends when do returns false.
func scan(r io.ReaderAt, extents []Extent, keep int, do func(data []byte, kept int, off int64) bool) error {
	const chunk = 1 << 20
	buf := make([]byte, max(0, keep)+chunk)
	for _, e := range extents {
		kept := 0
		for off := e.Off; off < e.Off+e.Len; {
			n := int(min(chunk, e.Off+e.Len-off))
			if _, err := readFull(r, buf[kept:kept+n], off); err != nil {
				return fmt.Errorf("evidence: reading %d bytes at %d: %w", n, off, err)
			}
			data := buf[:kept+n]
			if !do(data, kept, off-int64(kept)) {
				return nil
			}
			off += int64(n)
			kept = copy(buf, data[max(0, len(data)-keep):])
		}
	}
	return nil
}

// The chi-square of the 256 byte values in random bytes has 255 degrees of
// freedom: mean 255, standard deviation 22.6. Outside of these bounds, which
// are 8 standard deviations from the mean after the Wilson-Hilferty
// transformation, a random block falls once in 10^15 times. A block of text
// in ASCII measures above 10 000.
const (
	ChiSquareLow  = 113
	ChiSquareHigh = 480
)

// Blocks is what [Measure] saw. The counts are of blocks.
type Blocks struct {
	Zero      int // nothing but zeros: never written
	Partial   int // a part was never written, see [Measure]; also counted below
	Random    int // passed every test
	Patterned int // chi-square out of bounds, or a 16-byte unit occurs twice
	Repeated  int // equal to an earlier block; also counted in one of the others

	Worst float64 // the chi-square farthest from 255 of all blocks that aren't zero
	Sum   float64 // chi-square of all bytes of all blocks that aren't zero
}

// Written is the number of blocks that were not all zero.
func (b Blocks) Written() int { return b.Random + b.Patterned }

// LooksEncrypted is nil when everything that was written looks random: each
// block has a chi-square between [ChiSquareLow] and [ChiSquareHigh], so have
// all of them together, no block holds the same 16 bytes twice at a multiple
// of 16 (the block of AES: equal plaintext would show), and no two blocks
// are equal.
func (b Blocks) LooksEncrypted() error {
	switch {
	case b.Written() == 0:
		return errors.New("evidence: no block was written, so nothing was measured")
	case b.Patterned > 0:
		return fmt.Errorf("evidence: %d of %d written blocks don't look random (worst chi-square %.0f)", b.Patterned, b.Written(), b.Worst)
	case b.Repeated > 0:
		return fmt.Errorf("evidence: %d of %d written blocks repeat another", b.Repeated, b.Written())
	case b.Sum < ChiSquareLow || b.Sum > ChiSquareHigh:
		return fmt.Errorf("evidence: chi-square of all %d written blocks is %.0f", b.Written(), b.Sum)
	}
	return nil
}

// sectorSize is the smallest unit that a disk writes.
const sectorSize = 512

// Measure tests every whole block of the extents of r.
//
// Sectors of 512 bytes that are all zero don't take part: nobody wrote them.
// XTS encrypts 16 bytes at a time, so a write of a part of a block changes
// the ciphertext of that part only, and the rest of a new disk stays zero.
func Measure(r io.ReaderAt, extents []Extent) (Blocks, error) {
	var (
		out   Blocks
		total [256]int
		bytes int // in total
		seed  = maphash.MakeSeed()
		seen  = map[uint64]bool{}
		buf   = make([]byte, 256*BlockSize)
	)
	for _, e := range extents {
		for off := e.Off; off+BlockSize <= e.Off+e.Len; {
			n := int(min(int64(len(buf)), (e.Off+e.Len-off)/BlockSize*BlockSize))
			if _, err := readFull(r, buf[:n], off); err != nil {
				return Blocks{}, fmt.Errorf("evidence: reading %d bytes at %d: %w", n, off, err)
			}
			for data := buf[:n]; len(data) > 0; data = data[BlockSize:] {
				block := written(data[:BlockSize])
				if len(block) == 0 {
					out.Zero++
					continue
				}
				if len(block) < BlockSize {
					out.Partial++
				}
				hist := histogram(block)
				for v, c := range hist {
					total[v] += c
				}
				bytes += len(block)
				x := chiSquare(&hist, len(block))
				if abs(x-255) > abs(out.Worst-255) || out.Written() == 0 {
					out.Worst = x
				}
				if x < ChiSquareLow || x > ChiSquareHigh || repeatsUnit(block) {
					out.Patterned++
				} else {
					out.Random++
				}
				// Two different blocks share 64 bits of hash once in 10^10
				// runs over a gigabyte.
				h := maphash.Bytes(seed, block)
				if seen[h] {
					out.Repeated++
				}
				seen[h] = true
			}
			off += int64(n)
		}
	}
	if bytes > 0 {
		out.Sum = chiSquare(&total, bytes)
	}
	return out, nil
}

// written returns the sectors of a block that aren't all zero, which it
// moves together.
func written(block []byte) []byte {
	n := 0
	for i := 0; i < len(block); i += sectorSize {
		if s := block[i : i+sectorSize]; string(s) != zeroSector {
			n += copy(block[n:], s)
		}
	}
	return block[:n]
}

var zeroSector = string(make([]byte, sectorSize))

func histogram(b []byte) (hist [256]int) {
	for _, v := range b {
		hist[v]++
	}
	return hist
}

// chiSquare is the sum of (observed - expected)^2 / expected over the byte
// values, of which every one is expected n/256 times.
func chiSquare(hist *[256]int, n int) float64 {
	expected := float64(n) / 256
	var sum float64
	for _, c := range hist {
		d := float64(c) - expected
		sum += d * d
	}
	return sum / expected
}

// repeatsUnit says whether the same 16 bytes are in the block twice at a
// multiple of 16. In random bytes that never happens: there are 32640 pairs
// among 2^128 values.
func repeatsUnit(block []byte) bool {
	seen := make(map[[16]byte]bool, BlockSize/16)
	for ; len(block) > 0; block = block[16:] {
		u := [16]byte(block)
		if seen[u] {
			return true
		}
		seen[u] = true
	}
	return false
}

func abs(x float64) float64 { return max(x, -x) }

// readFull is ReadAt without the io.EOF that a read up to the last byte may
// return beside its data.
func readFull(r io.ReaderAt, p []byte, off int64) (int, error) {
	n, err := r.ReadAt(p, off)
	if n == len(p) {
		return n, nil
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
