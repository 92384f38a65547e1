//go:build !purego

package xts

import "golang.org/x/sys/cpu"

// tiers are the implementations in this build, the fastest first.
var tiers = []*tier{
	newAssembly("zmm (AVX-512, VAES)", hasZMM(), 512, encryptZMM, decryptZMM),
	newAssembly("ymm (AVX2, VAES)", hasYMM(), 256, encryptYMM, decryptYMM),
	newAssembly("xmm (AVX, AES-NI)", hasXMM(), 128, encryptXMM, decryptXMM),
	&generic,
}

// hasZMM reports whether there is all that the zmm tier needs. The package cpu looks
// for support by the system, too. All processors with VAES for zmm have VBMI (VPERMB).
func hasZMM() bool {
	x := &cpu.X86
	return x.HasAVX512F && x.HasAVX512BW && x.HasAVX512VL && x.HasAVX512DQ && x.HasAVX512VBMI &&
		x.HasAVX512VAES && x.HasAVX512VPCLMULQDQ && hasYMM()
}

// hasYMM looks for VAES itself, as the package cpu does so only on machines with AVX-512.
// BMI2, for SARX, is wherever AVX2 is, but a hypervisor may hide it.
func hasYMM() bool {
	const vaes = 1 << 9 // CPUID leaf 7, ECX
	if !cpu.X86.HasAVX2 || !cpu.X86.HasBMI2 || !hasXMM() {
		return false // also if the system doesn't save the registers
	}
	if last, _, _, _ := cpuid(0, 0); last < 7 {
		return false
	}
	_, _, c, _ := cpuid(7, 0)
	return c&vaes != 0
}

// hasXMM asks for AVX because of its instructions with three operands. The few
// processors with AES-NI and without AVX (Westmere, some Atoms) get the generic tier.
func hasXMM() bool {
	return cpu.X86.HasAVX && cpu.X86.HasAES && cpu.X86.HasPCLMULQDQ
}

func cpuid(leaf, subleaf uint32) (a, b, c, d uint32)

//go:noescape
func encryptZMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func decryptZMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func encryptYMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func decryptYMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func encryptXMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)

//go:noescape
func decryptXMM(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)
