package xts

import (
	"crypto/aes"
	"encoding/binary"
	"math/rand/v2"
	"testing"

	xcrypto "golang.org/x/crypto/xts"
)

// reference is XTS as the standard writes it, a byte at a time: the oracle of
// the tests, to be believed by reading. The first sector has the given tweak.
// With inverse it decrypts.
func reference(t testing.TB, key *[64]byte, src []byte, tweak [16]byte, sectorSize int, inverse bool) []byte {
	data, err1 := aes.NewCipher(key[:32])
	masks, err2 := aes.NewCipher(key[32:])
	if err1 != nil || err2 != nil {
		t.Fatal(err1, err2)
	}
	crypt := data.Encrypt
	if inverse {
		crypt = data.Decrypt
	}
	dst := make([]byte, len(src))
	var mask, block [16]byte
	for i := range src {
		if i%sectorSize == 0 { // a new sector
			number := binary.LittleEndian.Uint64(tweak[:8])
			masks.Encrypt(mask[:], tweak[:])
			binary.LittleEndian.PutUint64(tweak[:8], number+uint64(max(1, sectorSize/512)))
		}
		block[i%16] = src[i] ^ mask[i%16]
		if i%16 == 15 { // a block is complete
			crypt(block[:], block[:])
			for j := range block {
				dst[i-15+j] = block[j] ^ mask[j]
			}
			carry := byte(0) // mask = mask · x
			for j := range mask {
				mask[j], carry = mask[j]<<1|carry, mask[j]>>7
			}
			mask[0] ^= carry * 0x87
		}
	}
	return dst
}

// peer is the second opinion: golang.org/x/crypto/xts, a sector at a time.
func peer(t testing.TB, key *[64]byte, src []byte, first uint64, sectorSize int, inverse bool) []byte {
	c, err := xcrypto.NewCipher(aes.NewCipher, key[:])
	if err != nil {
		t.Fatal(err)
	}
	dst := make([]byte, len(src))
	if inverse {
		perSector(c.Decrypt)(dst, src, first, sectorSize)
	} else {
		perSector(c.Encrypt)(dst, src, first, sectorSize)
	}
	return dst
}

// perSector gives a function of x/crypto/xts the form of EncryptSectors.
func perSector(crypt func(dst, src []byte, sector uint64)) func(dst, src []byte, first uint64, sectorSize int) {
	return func(dst, src []byte, first uint64, sectorSize int) {
		for i := 0; i < len(src); i += sectorSize {
			crypt(dst[i:i+sectorSize], src[i:i+sectorSize], first)
			first += uint64(max(1, sectorSize/512))
		}
	}
}

// testKey returns a key, and testData n bytes, that depend on nothing but seed.
func testKey(seed uint64) *[64]byte { return (*[64]byte)(testData(seed, 64)) }

func testData(seed uint64, n int) []byte {
	var s [32]byte
	binary.LittleEndian.PutUint64(s[:], seed)
	b := make([]byte, n)
	rand.NewChaCha8(s).Read(b)
	return b
}
