package xts

import "testing"

// FuzzSectors compares every tier with the reference and with x/crypto/xts: sectors of 16
// bytes to 1 MiB, 1 to 100 of them, 1 MiB at most. All arguments are brought into range,
// so that no input is wasted.
func FuzzSectors(f *testing.F) {
	f.Add(uint64(1), uint64(0), uint16(31), uint16(8), uint8(0), uint8(0))
	f.Add(uint64(2), uint64(1<<32-1), uint16(255), uint16(3), uint8(1), uint8(63))
	f.Add(uint64(3), uint64(1<<64-1), uint16(0), uint16(40), uint8(8), uint8(16))
	f.Add(uint64(4), uint64(1<<63-1), uint16(32), uint16(37), uint8(32), uint8(7))
	f.Add(uint64(5), uint64(1<<32-50), uint16(31), uint16(99), uint8(0), uint8(0))
	f.Add(uint64(6), uint64(1<<63-400), uint16(255), uint16(99+7*100), uint8(16), uint8(0)) // 400 KiB
	f.Add(uint64(7), uint64(1<<63-1), uint16(1<<16-1), uint16(7*100), uint8(5), uint8(0))   // a sector of 1 MiB
	f.Fuzz(func(t *testing.T, seed, first uint64, blocks, count uint16, srcOff, dstOff uint8) {
		sectorSize := (1 + int(blocks)) * blockSize
		most := 1 << 17 // bounds the time of an input
		if count/100%8 == 7 {
			most = 1 << 20
		}
		sectorSize = min(sectorSize, most)
		n := min(1+int(count)%100, most/sectorSize)
		key := testKey(seed)
		sc := newSectorsCase(t, key, testData(seed+1, n*sectorSize), first, sectorSize)
		forEachTier(t, func(t *testing.T, tr *tier) {
			sc.run(t, newTestCipher(t, tr, key), int(srcOff)%64, int(dstOff)%64)
		})
	})
}
