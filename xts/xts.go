// Package xts encrypts and decrypts runs of disk sectors with AES-256-XTS.
//
// A [Cipher] made by [NewCipher] or [NewCipherIn] holds one DEK.
// [Cipher.EncryptSectors] and [Cipher.DecryptSectors] take a whole I/O request
// at once, however many sectors it has: that is the call most people want, and
// the longer the run the faster it goes. The result is bit for bit what
// dm-crypt makes with aes-xts-plain64 and a 64-byte key.
//
// # Tweaks
//
// Each sector is one data unit of IEEE Std 1619 (NIST SP 800-38E adopts it).
// Its tweak is the 512-byte sector number of its first byte, little-endian, in
// the low 64 bits of the 16-byte tweak block; the high 64 bits are zero. The
// number goes up by sectorSize/512 from one sector to the next, and by one for
// sectors smaller than 512 bytes. After 2^64-1 it goes on at 0, as in dm-crypt.
// Sectors are multiples of 16 bytes, so there is no ciphertext stealing.
//
// # Implementations
//
// There is one in assembly for AVX-512 with VAES ("zmm"), AVX2 with VAES ("ymm"), AVX
// with AES-NI ("xmm") and the AES instructions of arm64 ("neon"), and one in Go
// ("generic"), the only one in a build with the tag purego. The fastest that the
// machine supports, and with which it gets a known answer right, is chosen when the
// process starts, and [Implementation] names it.
//
// For diagnosis the environment variable HOSTCRYPTD_XTS chooses another by one of the
// words above. A word that is unknown, or that this machine doesn't support, counts
// for nothing: all implementations give the same result, so a typing mistake in a
// unit file must not keep a disk from being served. Implementation shows it.
//
// # What XTS does not do
//
// XTS keeps content secret and nothing else. Whoever writes the disk can put
// back an older sector, or turn any 16-byte block into garbage, unnoticed;
// whoever reads it twice sees which blocks have changed. The standard bounds a
// sector to 2^20 blocks (16 MiB), which is enforced here, and asks that the data
// under one key be bounded, which is the caller's part: 16 TiB (2^40 blocks) is
// a careful limit.
//
// The package implements XTS-AES-256 as specified in IEEE 1619 and SP 800-38E
// and is tested with the vectors of NIST's CAVP. It is not a FIPS 140 validated
// module, and no GODEBUG=fips140 setting makes it one.
//
// # Concurrency
//
// The methods of a Cipher may run concurrently, also on neighbouring parts of
// one buffer, except that Wipe must run alone. Encrypting and decrypting allocate
// nothing.
package xts

//go:generate go -C _asm run .

import (
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"unsafe"
)

const (
	// Size is how many bytes [NewCipherIn] needs: room for three AES-256 key
	// schedules (data key both ways, tweak key one way) of 15 round keys, each
	// repeated to fill a 64-byte vector.
	Size = 3 * 15 * alignment

	// alignment is that of the memory given to NewCipherIn: a cache line, and
	// the widest vector load.
	alignment = 64

	// blockSize is the AES block size; every sector is a multiple of it.
	blockSize = 16

	// maxSectorSize is the limit of IEEE 1619 section 5.1, which SP 800-38E
	// makes mandatory: 2^20 blocks in a data unit.
	maxSectorSize = 1 << 20 * blockSize

	// tweakUnit is the unit in which sector numbers count, whatever the sector
	// size: plain64 of dm-crypt without its iv_large_sectors option.
	tweakUnit = 512
)

// ErrEqualKeys means that the two halves of a key are equal. XTS is not secure
// with such a key, and FIPS 140-3 IG C.I asks that it be refused before use.
var ErrEqualKeys = errors.New("xts: the two halves of the key are equal")

// A tier is one implementation: the portable one or one for an instruction set.
// The functions are called with arguments that Cipher has checked.
type tier struct {
	name      string // what Implementation returns
	supported bool   // whether this machine claims to run it
	portable  bool   // in Go only: works everywhere
	test      selfTested

	// expand makes the key schedules in c: all of them in c.mem if the tier can.
	expand func(c *Cipher, key *[64]byte) error

	encrypt, decrypt cryptFunc
}

// A cryptFunc encrypts or decrypts src, at least one whole sector, into the as many
// bytes at dst. The tweak of the first sector is hi·2^64 + lo, and step(sectorSize)
// is added to lo, without carry, from sector to sector. These parameters are as many
// as go in registers.
type cryptFunc func(c *Cipher, dst *byte, src []byte, sectorSize int, lo, hi uint64)

// A Cipher encrypts and decrypts sectors with one key. Its methods may be called
// concurrently, except Wipe. It must not be copied.
type Cipher struct {
	tier *tier // nil once wiped

	// mem holds the key schedules. It is a pointer because fmt follows slices
	// wherever they are, but not pointers deep in what it prints.
	mem *[Size]byte

	generic genericKeys // only of the generic tier
}

// NewCipher returns a Cipher for key, whose first half is the data key and second
// half the tweak key, as in dm-crypt. The key schedules are in ordinary Go memory;
// see [NewCipherIn]. The key is not kept, and stays the caller's to erase.
//
// The only error to expect is [ErrEqualKeys].
func NewCipher(key *[64]byte) (*Cipher, error) {
	return newCipher(chosen, allocate(), key)
}

// NewCipherIn is [NewCipher] with the key schedules in mem, so that the caller can
// have them outside the Go heap, in memory that is locked and left out of dumps.
// From now until [Cipher.Wipe] mem belongs to the Cipher; it must stay mapped, and
// nothing else may touch it. NewCipherIn panics if mem is shorter than [Size] or
// not aligned to 64 bytes, and uses only the first Size bytes.
//
// With an implementation in assembly nothing that depends on the key exists
// outside mem, but for passing values in registers and on the stack of a running
// call, which clears both before it returns. What the kernel saves of them when a
// signal arrives during the call, as the Go scheduler sends, stays on the signal stack
// of the thread until the next signal overwrites it. The generic implementation can't promise that: it stands on crypto/aes,
// which makes its key schedules on the Go heap and can't erase them. Then mem
// stays zero, and Wipe leaves the schedules to the garbage collector.
// [Implementation] tells the two apart: "generic" is the first word of its name.
func NewCipherIn(mem []byte, key *[64]byte) (*Cipher, error) {
	return newCipher(chosen, mem, key)
}

// Implementations names the implementations that this machine can run, the fastest
// first, for [NewCipherWith].
func Implementations() []string {
	var names []string
	for _, t := range tiers {
		if t.works() {
			names = append(names, t.name)
		}
	}
	return names
}

// NewCipherWith is [NewCipher] with an implementation by name, to compare it with
// others. It panics if the name is not among [Implementations].
func NewCipherWith(implementation string, key *[64]byte) (*Cipher, error) {
	for _, t := range tiers {
		if t.name == implementation && t.works() {
			return newCipher(t, allocate(), key)
		}
	}
	panic(fmt.Sprintf("xts: no implementation %q on this machine", implementation))
}

func newCipher(t *tier, mem []byte, key *[64]byte) (*Cipher, error) {
	if len(mem) < Size {
		panic(fmt.Sprintf("xts: %d bytes of memory for a cipher, need %d", len(mem), Size))
	}
	if uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%alignment != 0 {
		panic(fmt.Sprintf("xts: memory for a cipher is not aligned to %d bytes", alignment))
	}
	if subtle.ConstantTimeCompare(key[:32], key[32:]) == 1 {
		return nil, ErrEqualKeys
	}
	c := &Cipher{tier: t, mem: (*[Size]byte)(mem)}
	clear(c.mem[:])
	if err := t.expand(c, key); err != nil {
		c.Wipe()
		return nil, fmt.Errorf("xts: expanding the key: %w", err)
	}
	return c, nil
}

// allocate returns aligned memory for a cipher on the Go heap, where objects
// don't move.
func allocate() []byte {
	b := make([]byte, Size+alignment-1)
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(b))) % alignment
	return b[skip:][:Size:Size]
}

// chosen is the tier of ciphers for which nobody asks for another.
var chosen = fromEnvironment()

func fromEnvironment() *tier { return choose(tiers, os.Getenv("HOSTCRYPTD_XTS")) }

// choose returns the first tier that works on this machine, or, if there is one that
// does and whose name has word as its first word, that one.
func choose(tiers []*tier, word string) *tier {
	for _, t := range tiers {
		if first, _, _ := strings.Cut(t.name, " "); first == word && t.works() {
			return t
		}
	}
	for _, t := range tiers {
		if t.works() {
			return t
		}
	}
	return &generic
}

// Implementation names the implementation that [NewCipher] and [NewCipherIn] use
// in this process, for people to read. It is the first of [Implementations] unless
// the environment variable HOSTCRYPTD_XTS says otherwise; see the package
// documentation.
func Implementation() string { return chosen.name }

// EncryptSectors encrypts src, a run of sectors of sectorSize bytes each, into
// dst. The number of the first sector is first, counted in units of 512 bytes
// whatever sectorSize is; the package documentation says how it goes on.
//
// sectorSize is a positive multiple of 16, at most 16 MiB. The length of src is a
// multiple of sectorSize; if it is zero, nothing is done. dst is at least as long
// as src, and bytes beyond that length are left alone. dst and src may be the
// same memory, but may not overlap in any other way. Nothing needs to be aligned.
// EncryptSectors panics if any of this does not hold, or after [Cipher.Wipe].
//
// While the call runs dst holds intermediate values: nobody else may see it.
func (c *Cipher) EncryptSectors(dst, src []byte, first uint64, sectorSize int) {
	if c.tier == nil || !simple(dst, src, sectorSize) {
		c.check(dst, src, sectorSize)
	}
	if len(src) != 0 {
		c.tier.encrypt(c, unsafe.SliceData(dst), src, sectorSize, first, 0)
	}
}

// DecryptSectors is the inverse of [Cipher.EncryptSectors], with the same rules.
func (c *Cipher) DecryptSectors(dst, src []byte, first uint64, sectorSize int) {
	if c.tier == nil || !simple(dst, src, sectorSize) {
		c.check(dst, src, sectorSize)
	}
	if len(src) != 0 {
		c.tier.decrypt(c, unsafe.SliceData(dst), src, sectorSize, first, 0)
	}
}

// step returns by how much the tweak of a sector exceeds that of the one before.
func step(sectorSize int) uint64 {
	return uint64(max(1, sectorSize/tweakUnit))
}

// simple reports whether the arguments of EncryptSectors are as documented, and the
// sector size is a power of two as that of any disk is. It saves the call of check: with
// 4 KiB, ten instructions are half a percent, as the last rounds of one call leave no
// room for them beside the first of the next.
func simple(dst, src []byte, sectorSize int) bool {
	d, s, n := address(dst), address(src), uintptr(len(src))
	return uint(sectorSize-blockSize) <= maxSectorSize-blockSize && // for anything negative it is huge
		(len(src)|sectorSize)&(sectorSize-1) == 0 &&
		len(dst) >= len(src) &&
		(d == s || d-s+n-1 >= 2*n-1) // that is, not -n < d-s < n
}

func address(b []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(b))) }

// check panics if the arguments of EncryptSectors are not as documented. With simple it
// is the only check there is: the tiers, assembly above all, rely on it.
func (c *Cipher) check(dst, src []byte, sectorSize int) {
	if c.tier == nil {
		panic("xts: use of a wiped cipher")
	}
	if sectorSize <= 0 || sectorSize > maxSectorSize || sectorSize%blockSize != 0 {
		panic(fmt.Sprintf("xts: sector size %d is not a multiple of %d from %[2]d to %d", sectorSize, blockSize, maxSectorSize))
	}
	if len(src)%sectorSize != 0 {
		panic(fmt.Sprintf("xts: %d bytes are not a whole number of sectors of %d bytes", len(src), sectorSize))
	}
	if len(dst) < len(src) {
		panic(fmt.Sprintf("xts: %d bytes of output for %d bytes of input", len(dst), len(src)))
	}
	if partialOverlap(dst, src) {
		panic("xts: output and input overlap partially")
	}
}

// partialOverlap reports whether the first len(src) bytes of dst share memory
// with src other than by being the same. dst is not shorter than src.
func partialOverlap(dst, src []byte) bool {
	d, s, n := address(dst), address(src), uintptr(len(src))
	// Unsigned: of two different starts one difference is the distance and the
	// other is huge, unless n is 0 and then neither is less.
	return d != s && (d-s < n || s-d < n)
}

// Format implements [fmt.Formatter] for all verbs, so that a Cipher that gets into
// a log message by mistake doesn't take its key schedules there.
func (Cipher) Format(f fmt.State, verb rune) {
	io.WriteString(f, "xts.Cipher")
}

// Wipe erases the key schedules and makes any later use panic; wiping again does
// nothing. The caller makes sure that no other method is running. After it
// returns, memory given to [NewCipherIn] is zero and the caller's again.
//
// See [NewCipherIn] for what the generic implementation can't erase.
func (c *Cipher) Wipe() {
	if c.mem != nil {
		clear(c.mem[:])
	}
	*c = Cipher{}
}
