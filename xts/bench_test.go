package xts

import (
	"crypto/aes"
	"fmt"
	"strings"
	"testing"

	xcrypto "golang.org/x/crypto/xts"
)

// BenchmarkSectors measures every tier that this machine supports, and
// golang.org/x/crypto/xts beside them, at buffer sizes of an I/O request.
// Source and destination differ, as they do on the way from a request buffer.
func BenchmarkSectors(b *testing.B) {
	type cryptFunc func(dst, src []byte, first uint64, sectorSize int)
	type implementation struct {
		name             string
		encrypt, decrypt cryptFunc
	}

	key := testKey(1)
	var all []implementation
	for _, t := range tiers {
		if !t.supported {
			continue
		}
		c, err := newCipher(t, allocate(), key)
		if err != nil {
			b.Fatal(err)
		}
		// The first word: benchmark names can't have blanks.
		name, _, _ := strings.Cut(t.name, " ")
		all = append(all, implementation{name, c.EncryptSectors, c.DecryptSectors})
	}
	peer, err := xcrypto.NewCipher(aes.NewCipher, key[:])
	if err != nil {
		b.Fatal(err)
	}
	all = append(all, implementation{"xcrypto", perSector(peer.Encrypt), perSector(peer.Decrypt)})

	for _, size := range []struct{ buffer, sector int }{
		{512, 512}, {4096, 512}, {4096, 4096}, {16384, 4096},
		{131072, 512}, {131072, 4096}, {131072, 131072}, {1048576, 4096},
	} {
		for _, op := range []string{"enc", "dec"} {
			for _, im := range all {
				crypt := im.encrypt
				if op == "dec" {
					crypt = im.decrypt
				}
				name := fmt.Sprintf("impl=%s/size=%d/sector=%d/op=%s", im.name, size.buffer, size.sector, op)
				b.Run(name, func(b *testing.B) {
					src, dst := make([]byte, size.buffer), make([]byte, size.buffer)
					b.SetBytes(int64(size.buffer))
					b.ReportAllocs()
					for b.Loop() {
						crypt(dst, src, 1<<20, size.sector)
					}
				})
			}
		}
	}
}

// BenchmarkNewCipher measures the key set-up, which happens once per volume.
func BenchmarkNewCipher(b *testing.B) {
	key := testKey(1)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := NewCipher(key); err != nil {
			b.Fatal(err)
		}
	}
}
