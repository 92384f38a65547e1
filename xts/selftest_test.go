package xts

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"testing"
	"unsafe"
)

// TestSelfTestSum computes the constant with golang.org/x/crypto/xts.
func TestSelfTestSum(t *testing.T) {
	var key [64]byte
	for i := range key {
		key[i] = byte(i*i + 3*i + 1)
	}
	sum := sha256.New()
	for _, r := range selfTestRuns {
		plain := make([]byte, r.sectors*r.sectorSize)
		for i := range plain {
			plain[i] = byte(i>>8 ^ 5*i)
		}
		sum.Write(peer(t, &key, plain, r.first, r.sectorSize, false))
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != selfTestSum {
		t.Errorf("selfTestSum is %q, x/crypto/xts makes %q", selfTestSum, got)
	}
}

// TestSelfTest checks that a tier which gets a single bit of a single lane wrong, in
// one direction, is found.
func TestSelfTest(t *testing.T) {
	forEachTier(t, func(t *testing.T, tr *tier) {
		if !tr.selfTest() {
			t.Fatal("it fails its self-test")
		}
		damage := func(f cryptFunc) cryptFunc {
			return func(c *Cipher, dst *byte, src []byte, sectorSize int, lo, hi uint64) {
				f(c, dst, src, sectorSize, lo, hi)
				unsafe.Slice(dst, len(src))[len(src)-20] ^= 4
			}
		}
		for _, bad := range []*tier{
			{name: "encrypt", supported: true, expand: tr.expand, encrypt: damage(tr.encrypt), decrypt: tr.decrypt},
			{name: "decrypt", supported: true, expand: tr.expand, encrypt: tr.encrypt, decrypt: damage(tr.decrypt)},
			{name: "both", supported: true, expand: tr.expand, encrypt: damage(tr.encrypt), decrypt: func(c *Cipher, dst *byte, src []byte, sectorSize int, lo, hi uint64) {
				b := bytes.Clone(src)
				b[len(b)-20] ^= 4
				tr.decrypt(c, dst, b, sectorSize, lo, hi)
			}},
		} {
			if bad.works() {
				t.Errorf("an error in %s is not found", bad.name)
			}
		}
	})
	if got := Faulty(); len(got) != 0 {
		t.Errorf("Faulty() = %q", got)
	}
}

func BenchmarkSelfTest(b *testing.B) {
	for _, tr := range tiers {
		if tr.supported {
			b.Run(tr.name, func(b *testing.B) {
				for b.Loop() {
					tr.selfTest()
				}
			})
		}
	}
}

// wrongEncrypt is as wrong as an encryption can be.
func wrongEncrypt(_ *Cipher, dst *byte, src []byte, _ int, _, _ uint64) {
	copy(unsafe.Slice(dst, len(src)), src)
}
