package xts

import "testing"

// FuzzSectors compares every tier with the reference and with x/crypto/xts. All
// arguments are brought into range, so that no input is wasted.
func FuzzSectors(f *testing.F) {
	f.Add(uint64(1), uint64(0), uint16(32), uint8(8), uint8(0), uint8(0))
	f.Add(uint64(2), uint64(1<<32-1), uint16(256), uint8(3), uint8(1), uint8(63))
	f.Add(uint64(3), uint64(1<<64-1), uint16(1), uint8(40), uint8(8), uint8(16))
	f.Add(uint64(4), uint64(1<<63-1), uint16(33), uint8(37), uint8(32), uint8(7))
	f.Fuzz(func(t *testing.T, seed, first uint64, blocks uint16, count, srcOff, dstOff uint8) {
		sectorSize := (1 + int(blocks)%4096) * blockSize // 16 bytes to 64 KiB
		n := 1 + int(count)%40
		n = max(1, min(n, 1<<17/sectorSize)) // a bound on the time of one input
		key := testKey(seed)
		sc := newSectorsCase(t, key, testData(seed+1, n*sectorSize), first, sectorSize)
		forEachTier(t, func(t *testing.T, tr *tier) {
			sc.run(t, newTestCipher(t, tr, key), int(srcOff)%64, int(dstOff)%64)
		})
	})
}
