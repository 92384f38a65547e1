//go:build (amd64 || arm64) && !purego

package xts

import (
	"encoding/binary"
	"math/bits"
	"unsafe"
)

// A schedule is the key schedule of one AES-256 key in one direction: 15 round keys
// in the order of use, each repeated to fill the widest vector.
type schedule [15][alignment]byte

// schedules is what Cipher.mem holds with a tier in assembly.
type schedules struct {
	encrypt, decrypt, tweak schedule
}

var _ [Size]byte = [unsafe.Sizeof(schedules{})]byte{}

func (c *Cipher) schedules() *schedules {
	return (*schedules)(unsafe.Pointer(c.mem))
}

// A kernel encrypts or decrypts whole sectors whose size is a multiple of the body of
// its tier. The first tweak is hi·2^64 + lo, and step goes from one to the next.
type kernel func(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

// maxCall is how many bytes one call of assembly takes at most. The scheduler can't
// preempt assembly, and whoever wants to stop the world has to wait: 0.1 ms is
// like a page fault, 16 MiB would be felt.
const maxCall = 1 << 20

// newAssembly returns a tier in assembly. Its kernels take sectors whose size is a
// multiple of body, a power of two; others go block by block.
func newAssembly(name string, supported bool, body int, encrypt, decrypt kernel) *tier {
	return &tier{
		name:      name,
		supported: supported,
		expand:    expandAssembly,
		encrypt:   newCrypt(body, encrypt, false),
		decrypt:   newCrypt(body, decrypt, true),
	}
}

// newCrypt returns the way to a kernel, which is short: with 4 KiB every 3 ns are 1 %.
// Inlined into the initialization of tiers it would be compiled without any inlining
// of its own.
//
//go:noinline
func newCrypt(body int, k kernel, inverse bool) cryptFunc {
	mask := body - 1
	return func(c *Cipher, dst *byte, src []byte, sectorSize int, lo, hi uint64) {
		s := c.schedules()
		data := &s.encrypt
		if inverse {
			data = &s.decrypt
		}
		if len(src) > maxCall || sectorSize&(mask|(sectorSize-1)) != 0 {
			s.crypt(k, body, dst, src, sectorSize, lo, hi, data)
			return
		}
		sectors := len(src) >> (bits.TrailingZeros(uint(sectorSize)) & 63)
		k(dst, unsafe.SliceData(src), sectors, sectorSize, data, &s.tweak, lo, hi, step(sectorSize))
	}
}

// crypt is for runs that don't go in one call of the kernel, and for sectors whose size
// isn't a power of two or no multiple of its body.
func (s *schedules) crypt(k kernel, body int, dst *byte, src []byte, sectorSize int, lo, hi uint64, data *schedule) {
	if sectorSize&(body-1) != 0 || sectorSize > maxCall {
		s.blockwise(dst, src, sectorSize, lo, hi, data == &s.decrypt)
		return
	}
	// A slice, as a pointer must not go beyond the end of what it points into: the
	// collector, and the checks that come with the race detector, end the process.
	to := unsafe.Slice(dst, len(src))
	for len(src) > 0 {
		sectors := min(maxCall, len(src)) / sectorSize
		k(&to[0], &src[0], sectors, sectorSize, data, &s.tweak, lo, hi, step(sectorSize))
		n := sectors * sectorSize
		to, src = to[n:], src[n:]
		lo += uint64(sectors) * step(sectorSize)
	}
}

func expandAssembly(c *Cipher, key *[64]byte) error {
	s := c.schedules()
	expand((*[32]byte)(key[:32]), &s.encrypt)
	expand((*[32]byte)(key[32:]), &s.tweak)
	invert(&s.encrypt, &s.decrypt)
	return nil
}

// blockwise does sectors of any size. No disk has one that needs it: it is there to
// be right, and several times slower than a kernel.
func (s *schedules) blockwise(to *byte, src []byte, sectorSize int, lo, hi uint64, inverse bool) {
	var mask [blockSize]byte
	dst := unsafe.Slice(to, len(src))
	for ; len(src) > 0; lo += step(sectorSize) {
		s.firstMask(&mask, lo, hi)
		for left := sectorSize; left > 0; {
			n := min(left, maxCall)
			if inverse {
				decryptBlocks(&dst[0], &src[0], n/blockSize, &s.decrypt, &mask)
			} else {
				encryptBlocks(&dst[0], &src[0], n/blockSize, &s.encrypt, &mask)
			}
			dst, src, left = dst[n:], src[n:], left-n
		}
	}
	clear(mask[:]) // it depends on the key
}

// firstMask encrypts a tweak: the mask of the first block of a sector.
func (s *schedules) firstMask(mask *[blockSize]byte, lo, hi uint64) {
	binary.LittleEndian.PutUint64(mask[:], lo)
	binary.LittleEndian.PutUint64(mask[8:], hi)
	// XTS with a mask of zero is AES.
	var zero [blockSize]byte
	encryptBlocks(&mask[0], &mask[0], 1, &s.tweak, &zero)
}

// expand writes the key schedule for encryption with key to s.
//
//go:noescape
func expand(key *[32]byte, s *schedule)

// invert writes the key schedule for decryption to dec.
//
//go:noescape
func invert(enc, dec *schedule)

// encryptBlocks encrypts blocks, at least one, that follow each other in one sector.
// mask is that of the first, and then that of the one after the last.
//
//go:noescape
func encryptBlocks(dst, src *byte, blocks int, data *schedule, mask *[blockSize]byte)

// decryptBlocks is the inverse of encryptBlocks, with the schedule for decryption.
//
//go:noescape
func decryptBlocks(dst, src *byte, blocks int, data *schedule, mask *[blockSize]byte)
