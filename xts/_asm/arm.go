package main

import "fmt"

// # The algorithm on arm64
//
// It is that of x86.go with n = 1: bodies of 8 blocks, batches of 32 sectors whose
// tweaks are encrypted first. What differs:
//
// AESE adds the round key first, so k0 needs no addition of its own, and the last
// round is AESE with k13 and an addition of k14:
//
//	D = P ^ T                               "head"
//	D = shift(sub(D ^ k[r])), mix(D)        "rounds", r = 0..12, and 13 without mix
//	C = D ^ (T ^ k14)                       "tail"
//
// All 15 round keys stay in registers. The masks come from the integer units, which
// have nothing else to do: with T = hi·2^64 + lo,
//
//	T·x = (hi<<1 | lo>>63)·2^64 + (lo<<1 ^ (0x87 if hi>>63))
//
// So the next mask is always the next in a sector until another e is loaded, and
// there is one kind of body. Masks are ready early: they depend on no vector.
//
// # Registers
//
//	R0, R1    where the next body of output and of input is
//	R2        sectors that have no tweak encrypted yet
//	R3        bodies per sector
//	R4, R5    data and tweak key schedule
//	R6, R7    tweak of the next sector to encrypt a tweak for
//	R8        step from tweak to tweak
//	R9, R10   lo and hi of the next mask
//	R11       0x87
//	R12, R17  temporary
//	R13, R14  scratch (e of the batch), where the e of the next sector is
//	R15       bodies left in this sector, without the current one
//	R16       sectors left in this batch, without the current one
//
//	V0-V7     D, data
//	V8-V15    U = T ^ k14 of the current body
//	V16-V30   k0 to k14
//	V31       the temporary T
func arm64(t *text) {
	t.raw("\n// The algorithm, the registers and the equations are explained in _asm/arm.go.")
	expandARM(t)
	invertARM(t)
	for _, c := range []cipherARM{{"encrypt", "AESE", "AESMC"}, {"decrypt", "AESD", "AESIMC"}} {
		c.blocks(t)
		c.sectors(t)
	}
}

func v(i int) string  { return fmt.Sprintf("V%d.B16", i) }
func k(r int) string  { return v(16 + r) }
func vd(i int) string { return fmt.Sprintf("V%d", i) }

// loadKeys emits the load of a key schedule into V16 to V30.
func loadKeys(t *text, base string) {
	for r := range rounds + 1 {
		t.op("FMOVQ", mem(r*keyStride, base), fmt.Sprintf("F%d", 16+r))
	}
}

// store and load move a vector from and to memory.
func storeV(t *text, i int, to string)  { t.op("FMOVQ", fmt.Sprintf("F%d", i), to) }
func loadV(t *text, from string, i int) { t.op("FMOVQ", from, fmt.Sprintf("F%d", i)) }

// insert emits vector i = hi·2^64 + lo.
func insert(t *text, lo, hi string, i int) {
	t.op("VMOV", lo, vd(i)+".D[0]")
	t.op("VMOV", hi, vd(i)+".D[1]")
}

// double emits (R10, R9) = (R10, R9)·x.
func double(t *text) {
	t.op("AND", "R10->63", "R11", "R12")
	t.note("0x87 or 0")
	t.op("EXTR", "$63", "R9", "R10", "R10")
	t.op("EOR", "R9<<1", "R12", "R9")
}

type cipherARM struct {
	name, round, mix string
}

// rounds emits all of AES but the addition of the last key, on the first n vectors.
// A round and its mix are next to each other, as processors fuse the two.
func (c *cipherARM) rounds(t *text, n int) {
	for r := range rounds {
		for j := range n {
			t.op(c.round, k(r), v(j))
			if r != rounds-1 {
				t.op(c.mix, v(j), v(j))
			}
		}
	}
}

// head emits D[j] = input ^ T and U[j] = T ^ k14.
func (c *cipherARM) head(t *text, j int) {
	insert(t, "R9", "R10", 31)
	loadV(t, mem(16*j, "R1"), j)
	t.op("VEOR", v(31), v(j), v(j))
	t.op("VEOR", v(31), k(rounds), v(vectors+j))
	double(t)
}

// tail emits the output of block j.
func (c *cipherARM) tail(t *text, j int) {
	t.op("VEOR", v(vectors+j), v(j), v(j))
	storeV(t, j, mem(16*j, "R0"))
}

// wipe emits the clearing of all registers that depend on the key.
func wipe(t *text) {
	for i := range 32 {
		t.op("VEOR", v(i), v(i), v(i))
	}
	for _, r := range []string{"R9", "R10", "R12"} {
		t.op("MOVD", "ZR", r)
	}
}

// sectors emits encryptNEON or decryptNEON.
func (c *cipherARM) sectors(t *text) {
	t.raw("\n// func %sNEON(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)", c.name)
	t.raw("TEXT ·%sNEON(SB), 0, $%d-72", c.name, 16*batch)
	for i, a := range []string{"dst", "src", "sectors", "sectorSize", "data", "tweak", "lo", "hi", "step"} {
		t.op("MOVD", fmt.Sprintf("%s+%d(FP)", a, 8*i), fmt.Sprintf("R%d", i))
	}
	t.op("MOVD", fmt.Sprintf("$scratch-%d(SP)", 16*batch), "R13")
	t.op("MOVD", "$0x87", "R11")
	t.op("LSR", "$7", "R3", "R3")
	t.note("a body is 128 bytes")

	t.label("batch")
	t.op("MOVD", fmt.Sprintf("$%d", batch), "R16")
	t.op("CMP", "R16", "R2")
	t.op("CSEL", "LT", "R2", "R16", "R16")
	t.op("SUB", "R16", "R2", "R2")
	loadKeys(t, "R5")
	t.op("MOVD", "R13", "R14")
	t.op("MOVD", "R16", "R17")
	t.comment("Encrypt 8 tweaks at a time.")
	t.label("tweaks")
	for j := range vectors {
		insert(t, "R6", "R7", j)
		t.op("ADD", "R8", "R6", "R6")
	}
	(&cipherARM{"", "AESE", "AESMC"}).rounds(t, vectors)
	for j := range vectors {
		t.op("VEOR", k(rounds), v(j), v(j))
		storeV(t, j, mem(16*j, "R14"))
	}
	t.op("ADD", imm(16*vectors), "R14")
	t.op("SUBS", imm(vectors), "R17")
	t.op("BGT", "tweaks")
	t.comment("R17 is how many tweaks there were too many, negative.")
	t.op("MUL", "R8", "R17", "R17")
	t.op("ADD", "R17", "R6", "R6")
	loadKeys(t, "R4")
	t.op("MOVD", "R13", "R14")
	t.op("B", "new")

	t.label("loop")
	c.rounds(t, vectors)
	for j := range vectors {
		c.tail(t, j)
	}
	t.op("ADD", imm(16*vectors), "R0")
	t.op("CBNZ", "R15", "next")
	t.op("CBZ", "R16", "done")

	t.comment("The next body starts a sector.")
	t.label("new")
	t.op("LDP.P", "16(R14)", "(R9, R10)")
	t.op("SUB", "$1", "R16")
	t.op("MOVD", "R3", "R15")

	t.label("next")
	for j := range vectors {
		c.head(t, j)
	}
	t.op("ADD", imm(16*vectors), "R1")
	t.op("SUB", "$1", "R15")
	t.op("B", "loop")

	t.label("done")
	t.op("CBNZ", "R2", "batch")

	t.comment("Leave nothing that depends on the key, neither in scratch nor in registers.")
	wipe(t)
	for i := range batch {
		t.op("STP", "(ZR, ZR)", mem(16*i, "R13"))
	}
	t.op("RET")
}

// blocks emits encryptBlocks or decryptBlocks: a block per iteration.
func (c *cipherARM) blocks(t *text) {
	t.raw("\n// func %sBlocks(dst, src *byte, blocks int, data *schedule, mask *[16]byte)", c.name)
	t.raw("TEXT ·%sBlocks(SB), NOSPLIT, $0-40", c.name)
	for i, a := range []string{"dst", "src", "blocks"} {
		t.op("MOVD", fmt.Sprintf("%s+%d(FP)", a, 8*i), fmt.Sprintf("R%d", i))
	}
	t.op("MOVD", "data+24(FP)", "R4")
	t.op("MOVD", "mask+32(FP)", "R14")
	t.op("MOVD", "$0x87", "R11")
	loadKeys(t, "R4")
	t.op("LDP", "(R14)", "(R9, R10)")
	t.label("loop")
	c.head(t, 0)
	c.rounds(t, 1)
	c.tail(t, 0)
	t.op("ADD", "$16", "R0")
	t.op("ADD", "$16", "R1")
	t.op("SUBS", "$1", "R2")
	t.op("BNE", "loop")
	t.op("STP", "(R9, R10)", "(R14)")
	wipe(t)
	t.op("RET")
}

// subWord emits R12 = SubWord(word). AESE with a key of zero is SubBytes and then
// ShiftRows, which changes nothing if the four words of a block are the same.
func subWord(t *text, word string) {
	t.op("VDUP", word, "V0.S4")
	t.op("AESE", v(31), v(0))
	t.op("VMOV", "V0.S[0]", "R12")
}

// expandARM is the key expansion of FIPS 197 section 5.2 for 8 words, which R2 to R9
// hold, with
//
//	w[i] = w[i-8] ^ f(w[i-1])
//
// where f is RotWord, SubWord and the addition of a round constant if i%8 = 0,
// SubWord if i%8 = 4, and nothing otherwise.
func expandARM(t *text) {
	w := func(i int) string { return fmt.Sprintf("R%d", 2+i%8) }
	t.raw("\n// func expand(key *[32]byte, s *schedule)")
	t.raw("TEXT ·expand(SB), NOSPLIT, $0-16")
	t.op("MOVD", "key+0(FP)", "R0")
	t.op("MOVD", "s+8(FP)", "R1")
	t.op("VEOR", v(31), v(31), v(31))
	for i := range 4 * (rounds + 1) {
		switch {
		case i < 8:
			t.op("MOVWU", mem(4*i, "R0"), w(i))
		case i%8 == 0:
			subWord(t, w(i-1))
			t.op("RORW", "$8", "R12", "R12")
			t.note("RotWord and SubWord may change places")
			t.op("EORW", imm(1<<(i/8-1)), "R12", "R12")
			t.op("EORW", "R12", w(i), w(i))
		case i%8 == 4:
			subWord(t, w(i-1))
			t.op("EORW", "R12", w(i), w(i))
		default:
			t.op("EORW", w(i-1), w(i), w(i))
		}
		t.op("MOVW", w(i), mem(i/4*keyStride+i%4*4, "R1"))
	}
	t.op("VEOR", v(0), v(0), v(0))
	for i := range 8 {
		t.op("MOVD", "ZR", w(i))
	}
	t.op("MOVD", "ZR", "R12")
	t.op("RET")
}

// invertARM makes the schedule of the equivalent inverse cipher, FIPS 197 section
// 5.3.5, in the order of use.
func invertARM(t *text) {
	t.raw("\n// func invert(enc, dec *schedule)")
	t.raw("TEXT ·invert(SB), NOSPLIT, $0-16")
	t.op("MOVD", "enc+0(FP)", "R0")
	t.op("MOVD", "dec+8(FP)", "R1")
	for r := range rounds + 1 {
		loadV(t, mem((rounds-r)*keyStride, "R0"), 0)
		if r != 0 && r != rounds {
			t.op("AESIMC", v(0), v(0))
		}
		storeV(t, 0, mem(r*keyStride, "R1"))
	}
	t.op("VEOR", v(0), v(0), v(0))
	t.op("RET")
}
