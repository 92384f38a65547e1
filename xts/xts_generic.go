package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"unsafe"
)

// generic is the portable tier. It runs on crypto/aes, which uses the AES
// instructions where Go knows them (amd64, arm64, ppc64, s390x) and tables, with
// timing that depends on key and data, where it doesn't.
//
// A bitsliced AES of our own would keep its schedules in Cipher.mem and be free of
// tables, but would be an order of magnitude slower on the machines that have
// AES instructions. Machines that matter get a tier in assembly, which has both.
var generic = tier{
	name:      "generic (crypto/aes)",
	supported: true,
	portable:  true,
	expand:    expandGeneric,
	encrypt:   encryptGeneric,
	decrypt:   decryptGeneric,
}

// genericKeys are the key schedules of the generic tier, on the Go heap.
type genericKeys struct {
	data, tweak cipher.Block
}

func expandGeneric(c *Cipher, key *[64]byte) (err error) {
	if c.generic.data, err = aes.NewCipher(key[:32]); err != nil {
		return err
	}
	c.generic.tweak, err = aes.NewCipher(key[32:])
	return err
}

// chunk is how many bytes the generic tier masks, encrypts and masks again at a
// time. Taking many blocks per step lets the masking use vector instructions, and
// lets its stores land before AES loads them at another width. 512 bytes of masks
// fit on the stack of any goroutine.
const chunk = 32 * blockSize

func encryptGeneric(c *Cipher, to *byte, src []byte, sectorSize int, lo, hi uint64) {
	var masks [chunk]byte
	data := c.generic.data
	dst := unsafe.Slice(to, len(src))
	for ; len(src) > 0; lo += step(sectorSize) {
		m0, m1 := c.generic.firstMask(dst[:sectorSize], lo, hi)
		for left := sectorSize; left > 0; {
			n := min(left, chunk)
			m0, m1 = fillMasks(masks[:n], m0, m1)
			subtle.XORBytes(dst[:n], src[:n], masks[:n])
			for b := dst[:n]; len(b) >= blockSize; b = b[blockSize:] {
				data.Encrypt(b, b)
			}
			subtle.XORBytes(dst[:n], dst[:n], masks[:n])
			dst, src, left = dst[n:], src[n:], left-n
		}
	}
}

// decryptGeneric is encryptGeneric with one word changed. The two loops are apart
// because a branch or a call through a variable for every block is measurable.
func decryptGeneric(c *Cipher, to *byte, src []byte, sectorSize int, lo, hi uint64) {
	var masks [chunk]byte
	data := c.generic.data
	dst := unsafe.Slice(to, len(src))
	for ; len(src) > 0; lo += step(sectorSize) {
		m0, m1 := c.generic.firstMask(dst[:sectorSize], lo, hi)
		for left := sectorSize; left > 0; {
			n := min(left, chunk)
			m0, m1 = fillMasks(masks[:n], m0, m1)
			subtle.XORBytes(dst[:n], src[:n], masks[:n])
			for b := dst[:n]; len(b) >= blockSize; b = b[blockSize:] {
				data.Decrypt(b, b)
			}
			subtle.XORBytes(dst[:n], dst[:n], masks[:n])
			dst, src, left = dst[n:], src[n:], left-n
		}
	}
}

// firstMask encrypts a tweak: the mask of the first block of a sector, as two
// little-endian halves.
//
// An argument of a call through cipher.Block escapes, so a buffer for it on the
// stack would be an allocation. The last block of dst, which is about to be
// overwritten anyway, serves instead; what it held is put back, because dst may
// be src.
func (k *genericKeys) firstMask(dst []byte, lo, hi uint64) (m0, m1 uint64) {
	le := binary.LittleEndian
	b := dst[len(dst)-blockSize:]
	was0, was1 := le.Uint64(b), le.Uint64(b[8:])
	le.PutUint64(b, lo)
	le.PutUint64(b[8:], hi)
	k.tweak.Encrypt(b, b)
	m0, m1 = le.Uint64(b), le.Uint64(b[8:])
	le.PutUint64(b, was0)
	le.PutUint64(b[8:], was1)
	return m0, m1
}

// fillMasks writes the mask m, m·x, m·x^2 and so on to masks, a whole number of
// blocks, and returns the one after the last. The field is GF(2^128) modulo
// x^128 + x^7 + x^2 + x + 1, bit 0 of byte 0 being the constant term.
func fillMasks(masks []byte, m0, m1 uint64) (uint64, uint64) {
	le := binary.LittleEndian
	for ; len(masks) >= blockSize; masks = masks[blockSize:] {
		le.PutUint64(masks, m0)
		le.PutUint64(masks[8:], m1)
		// x^128 = x^7 + x^2 + x + 1 = 0x87, if the shift pushes out a one. The
		// masks are secret, so there is no branch on them.
		carry := uint64(int64(m1)>>63) & 0x87
		m0, m1 = m0<<1^carry, m1<<1|m0>>63
	}
	return m0, m1
}
