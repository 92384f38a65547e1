//go:build !purego

package xts

import "golang.org/x/sys/cpu"

// tiers are the implementations in this build, the fastest first.
var tiers = []*tier{
	newAssembly("neon (arm64 AES)", cpu.ARM64.HasAES, 128, encryptNEON, decryptNEON),
	&generic,
}

//go:noescape
func encryptNEON(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func decryptNEON(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)
