package main

import "fmt"

// blocks writes what the three tiers of amd64 share: CPUID, key expansion, and
// sectors of sizes that don't fill bodies, a block at a time.
func blocks(t *text) {
	t.raw("\n// The instructions and equations are explained in _asm/blocks.go.")
	t.raw("\nDATA poly<>+0(SB)/8, $0x87")
	t.raw("DATA poly<>+8(SB)/8, $0")
	t.raw("GLOBL poly<>(SB), RODATA|NOPTR, $16")
	cpuid(t)
	expand(t)
	invert(t)
	block(t, "encrypt", "VAESENC")
	block(t, "decrypt", "VAESDEC")
}

func cpuid(t *text) {
	t.raw("\n// func cpuid(leaf, subleaf uint32) (a, b, c, d uint32)")
	t.raw("TEXT ·cpuid(SB), NOSPLIT, $0-24")
	t.op("MOVL", "leaf+0(FP)", "AX")
	t.op("MOVL", "subleaf+4(FP)", "CX")
	t.op("CPUID")
	t.op("MOVL", "AX", "a+8(FP)")
	t.op("MOVL", "BX", "b+12(FP)")
	t.op("MOVL", "CX", "c+16(FP)")
	t.op("MOVL", "DX", "d+20(FP)")
	t.op("RET")
}

// repeat emits the output of a round key, four times.
func repeat(t *text, x string, round int, base string) {
	for i := 0; i < keyStride; i += 16 {
		t.op("VMOVDQU", x, mem(round*keyStride+i, base))
	}
}

// expand is the key expansion of FIPS 197 section 5.2 for 8 words. A round key is
// four words, w[4r] to w[4r+3], and
//
//	w[i] = w[i-8] ^ f(w[i-1])
//
// where f is RotWord, SubWord and the addition of a round constant if i%8 = 0,
// SubWord if i%8 = 4, and nothing otherwise. So a round key is the one before the
// last with its words summed up from the left (a, a^b, a^b^c, a^b^c^d), and f of the
// last word of the last round key added to each. AESKEYGENASSIST gives f of word 3,
// with RotWord and constant in word 3 and without in word 2.
func expand(t *text) {
	t.raw("\n// func expand(key *[32]byte, s *schedule)")
	t.raw("TEXT ·expand(SB), NOSPLIT, $0-16")
	t.op("MOVQ", "key+0(FP)", "SI")
	t.op("MOVQ", "s+8(FP)", "DI")
	t.op("VMOVDQU", "(SI)", "X0")
	t.op("VMOVDQU", "16(SI)", "X1")
	repeat(t, "X0", 0, "DI")
	repeat(t, "X1", 1, "DI")
	for r := 2; r <= rounds; r++ {
		k, last := fmt.Sprint("X", r%2), fmt.Sprint("X", 1-r%2)
		constant, word := imm(1<<(r/2-1)), imm(0xff)
		if r%2 == 1 {
			constant, word = imm(0), imm(0xaa)
		}
		t.comment("k%d = sums of k%d + f(last word of k%d)", r, r-2, r-1)
		t.op("VAESKEYGENASSIST", constant, last, "X2")
		t.op("VPSHUFD", word, "X2", "X2")
		t.op("VPSLLDQ", "$4", k, "X3")
		t.op("VPXOR", "X3", k, k)
		t.note("a, a^b, b^c, c^d")
		t.op("VPSLLDQ", "$8", k, "X3")
		t.op("VPXOR", "X3", k, k)
		t.note("a, a^b, a^b^c, a^b^c^d")
		t.op("VPXOR", "X2", k, k)
		repeat(t, k, r, "DI")
	}
	t.op("VZEROALL")
	t.op("RET")
}

// invert makes the schedule of the equivalent inverse cipher, FIPS 197 section 5.3.5,
// in the order of use: the round keys from last to first, all but the outer ones
// through InvMixColumns.
func invert(t *text) {
	t.raw("\n// func invert(enc, dec *schedule)")
	t.raw("TEXT ·invert(SB), NOSPLIT, $0-16")
	t.op("MOVQ", "enc+0(FP)", "SI")
	t.op("MOVQ", "dec+8(FP)", "DI")
	for r := range rounds + 1 {
		t.op("VMOVDQU", mem((rounds-r)*keyStride, "SI"), "X0")
		if r != 0 && r != rounds {
			t.op("VAESIMC", "X0", "X0")
		}
		repeat(t, "X0", r, "DI")
	}
	t.op("VZEROALL")
	t.op("RET")
}

// block is XTS of blocks that follow each other in one sector, a block per iteration.
// X1 is its mask, e·x^i. The processor runs iterations in parallel, as only the mask
// goes from one to the next.
func block(t *text, name, aes string) {
	t.raw("\n// func %sBlocks(dst, src *byte, blocks int, data *schedule, mask *[16]byte)", name)
	t.raw("TEXT ·%sBlocks(SB), NOSPLIT, $0-40", name)
	t.op("MOVQ", "dst+0(FP)", "DI")
	t.op("MOVQ", "src+8(FP)", "SI")
	t.op("MOVQ", "blocks+16(FP)", "CX")
	t.op("MOVQ", "data+24(FP)", "R8")
	t.op("MOVQ", "mask+32(FP)", "R9")
	t.op("VMOVDQU", "(R9)", "X1")
	t.op("VMOVDQU", "poly<>(SB)", "X2")
	t.label("loop")
	t.op("VPXOR", "(R8)", "X1", "X0")
	t.op("VPXOR", "(SI)", "X0", "X0")
	t.note("D = input ^ T ^ k0")
	for r := 1; r < rounds; r++ {
		t.op(aes, mem(r*keyStride, "R8"), "X0", "X0")
	}
	t.op("VPXOR", mem(rounds*keyStride, "R8"), "X1", "X3")
	t.op(aes+"LAST", "X3", "X0", "X0")
	t.note("last(D, T ^ k14)")
	t.op("VMOVDQU", "X0", "(DI)")
	t.comment("T·x: each half doubled, the bit out of the low one into the high one,\nand 0x87 for the bit out of the high one.")
	t.op("VPSHUFD", imm(0x4e), "X1", "X3")
	t.note("swapped halves")
	t.op("VPSRLQ", "$63", "X3", "X3")
	t.note("bit out of the high half, bit out of the low half")
	t.op("VPCLMULQDQ", imm(0x00), "X2", "X3", "X4")
	t.note("0x87 or 0, 0")
	t.op("VPSRLDQ", "$8", "X3", "X3")
	t.op("VPSLLDQ", "$8", "X3", "X3")
	t.note("0, bit out of the low half")
	t.op("VPADDQ", "X1", "X1", "X1")
	t.op("VPXOR", "X3", "X1", "X1")
	t.op("VPXOR", "X4", "X1", "X1")
	t.op("ADDQ", "$16", "SI")
	t.op("ADDQ", "$16", "DI")
	t.op("DECQ", "CX")
	t.op("JNZ", "loop")
	t.op("VMOVDQU", "X1", "(R9)")
	t.op("VZEROALL")
	t.op("RET")
}
