//go:build (amd64 || arm64) && !purego

package xts

import (
	"crypto/subtle"
	"encoding/binary"
	"testing"
	"unsafe"
)

// deadBytes is how much of the stack below a call TestScratch looks at.
const deadBytes = 8 << 10

// deadStack runs f and returns what it has left on the stack below its caller.
//
//go:noinline
//go:norace
//go:nocheckptr
func deadStack(f func()) []byte {
	left := make([]byte, deadBytes)
	growStack() // so that f needn't, which would move it away from what it leaves
	var here [8]byte
	f()
	// No call from here on: it would overwrite what it looks for.
	for i := range left {
		left[i] = *(*byte)(unsafe.Add(unsafe.Pointer(&here), i-deadBytes))
	}
	return left
}

//go:noinline
func growStack() byte {
	var b [2 * deadBytes]byte
	return b[len(stackUser(b[:]))-1]
}

//go:noinline
func stackUser(b []byte) []byte { return b }

// TestScratch looks for masks and round keys on the stack after a call.
func TestScratch(t *testing.T) {
	// Would they be found?
	planted := [blockSize]byte{}
	copy(planted[:], testData(30, blockSize))
	left := deadStack(func() {
		var b [256]byte
		copy(b[100:], planted[:])
		stackUser(b[:])
	})
	if findSecret(left, map[[blockSize]byte]string{planted: "it"}) == "" {
		t.Fatal("what a function left on the stack was not found")
	}

	// A key of its own for each case, as what the test computes with stays on stacks
	// that later cases get.
	seed := uint64(31)
	forEachTier(t, func(t *testing.T, tr *tier) {
		if tr == &generic {
			return // documented not to clean up
		}
		for _, sectorSize := range []int{16, 512, 528, 4096} {
			const sectors, first = 40, 1000
			c := newTestCipher(t, tr, testKey(seed))
			seed++
			buf := make([]byte, sectors*sectorSize)
			left := make(chan []byte, 2)
			go func() { // a stack that has had nothing but this
				left <- deadStack(func() { c.EncryptSectors(buf, buf, first, sectorSize) })
				left <- deadStack(func() { c.DecryptSectors(buf, buf, first, sectorSize) })
			}()
			after := append(<-left, <-left...)
			if name := findSecret(after, secretsOf(c, first, sectors, sectorSize)); name != "" {
				t.Errorf("sectors of %d bytes: a %s is on the stack", sectorSize, name)
			}
		}
	})
}

// secretsOf returns the values that a run computes with and that depend on the key.
func secretsOf(c *Cipher, first uint64, sectors, sectorSize int) map[[blockSize]byte]string {
	s, le := c.schedules(), binary.LittleEndian
	secrets := map[[blockSize]byte]string{}
	for name, schedule := range map[string]*schedule{"encrypt": &s.encrypt, "decrypt": &s.decrypt, "tweak": &s.tweak} {
		for _, k := range schedule {
			secrets[[blockSize]byte(k[:])] = "round key to " + name
		}
	}
	for i := range sectors {
		var mask [blockSize]byte
		s.firstMask(&mask, first+uint64(i)*step(sectorSize), 0)
		var masks [64 * blockSize]byte
		fillMasks(masks[:], le.Uint64(mask[:]), le.Uint64(mask[8:]))
		for b := masks[:]; len(b) > 0; b = b[blockSize:] {
			secrets[[blockSize]byte(b)] = "mask"
			for name, k14 := range map[string]*[alignment]byte{"encrypt": &s.encrypt[14], "decrypt": &s.decrypt[14]} {
				var u [blockSize]byte
				subtle.XORBytes(u[:], b[:blockSize], k14[:blockSize])
				secrets[u] = "mask and key to " + name
			}
		}
	}
	return secrets
}

// findSecret returns the name of a secret that is in b, or "".
func findSecret(b []byte, secrets map[[blockSize]byte]string) string {
	for i := range len(b) - blockSize + 1 {
		if name, ok := secrets[[blockSize]byte(b[i:])]; ok {
			return name
		}
	}
	return ""
}
