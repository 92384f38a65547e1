package main

import "fmt"

// # The algorithm
//
// A vector holds n blocks (1, 2 or 4), a body is 8 vectors, and a sector is a whole
// number of bodies. In the field GF(2^128) of XTS, block i of a sector has the mask
// e·x^i, where e is the encrypted tweak. So vector j of body b has the masks
//
//	T[j] = e · x^(8n·b + n·j) · (x^0, ..., x^(n-1))
//
// and going to the next body is a multiplication by x^(8n).
//
// AES-256 has the round keys k0 to k14. With P the plaintext and T the masks of a
// vector, XTS is C = T ^ AES(P ^ T), in three parts:
//
//	D = P ^ T ^ k0          "head"
//	D = round(D, k1..k13)   "rounds"
//	C = last(D, k14) ^ T    "tail"
//
// Decryption is the same with the inverse rounds and their key schedule, which is
// stored in the order of use.
//
// 8 vectors are as many chains of AES rounds as keep the units busy, whose latency is
// 4 cycles (AMD) or 3 (Intel), with 1 (zmm) or 2 (ymm, xmm) rounds a cycle. The masks of
// bodies to come are computed between the rounds of the current one, and the head of the
// next body follows the tail of the current one vector by vector, so that the units have
// always something to do. What is left is to make masks without using those units or
// more instructions than fit beside them, and that differs: see wide.go and narrow.go.
// How much an instruction takes from the rounds beside it is measured by
//
//	go -C xts/_asm run . -costs
//
// A batch is up to 32 sectors. Its tweaks are encrypted at once, n per vector, all
// independent of each other: with zmm and 512 bytes per sector that is 3 % more rounds,
// instead of the latency of 14 rounds for every sector. The batch after it is encrypted
// before the rounds of a body, not after the last one, so that the units don't run dry.
//
// # Registers
//
// These are common to all widths; wide.go and narrow.go name the others.
//
//	SI      where the next body of input is
//	R8      data key schedule, 64 bytes per round key
//	R10     scratch, aligned to 64 bytes: e of the batch is before it
//	R11     where the e of the next sector is
//	R12     sectors that have no tweak encrypted yet
//	D[0..7] data
type width struct {
	name   string // part of the symbol
	prefix string // of register names
	n      int    // blocks in a vector

	mov, xor string // instructions

	// The register of k14, those of k1 and so on, as many as there are, and those of the
	// other round keys, which are loaded as they are needed.
	k14        int
	kept, keys []int

	tmp [3]int // temporary registers, the last of kept if there are few
}

var (
	zmm = width{
		name: "ZMM", prefix: "Z", n: 4, mov: "VMOVDQU64", xor: "VPXORQ",
		k14: 25, keys: []int{28}, tmp: [3]int{29, 30, 31},
	}
	ymm = width{
		name: "YMM", prefix: "Y", n: 2, mov: "VMOVDQU", xor: "VPXOR",
		k14: 15, kept: []int{9, 10, 11, 12, 13}, keys: []int{8}, tmp: [3]int{11, 12, 13},
	}
	xmm = width{
		name: "XMM", prefix: "X", n: 1, mov: "VMOVDQU", xor: "VPXOR",
		k14: 15, kept: []int{9, 10, 11, 12, 13}, keys: []int{8}, tmp: [3]int{11, 12, 13},
	}
)

const (
	vectors   = 8  // in a body
	batch     = 32 // sectors whose tweaks are encrypted at once
	rounds    = 14 // of AES-256
	keyStride = 64 // bytes from round key to round key, each repeated to fill them
	keepAlign = 64
)

func (w *width) bytes() int        { return 16 * w.n }
func (w *width) body() int         { return vectors * w.bytes() }
func (w *width) reg(i int) string  { return fmt.Sprint(w.prefix, i) }
func (w *width) d(j int) string    { return w.reg(j) }
func (w *width) temp(i int) string { return w.reg(w.tmp[i]) }
func (w *width) last() string      { return w.reg(w.k14) }

// key is the register of k1 to k13.
func (w *width) key(round int) string {
	if round <= len(w.kept) {
		return w.reg(w.kept[round-1])
	}
	return w.reg(w.keys[round%len(w.keys)])
}

// load emits the load of a round key.
func (w *width) load(t *text, round int) {
	t.op(w.mov, mem(round*keyStride, "R8"), w.key(round))
}

// middle emits the rounds 1 to 13 of all vectors of a body.
func (w *width) middle(t *text, aes string) {
	for r, next := 1, len(w.kept)+1; r < rounds; r++ {
		for ; next < rounds && next < r+len(w.keys); next++ {
			w.load(t, next)
		}
		for j := range vectors {
			t.op(aes, w.key(r), w.d(j), w.d(j))
		}
	}
}

// tweaks emits the encryption of the tweaks of the next batch into scratch. The register
// sectors becomes the number of sectors in it; i is another general register, and so
// are AX and R14, in which the tweak key schedule is. Of the vectors only temporary ones
// are written: tmp[0] has n tweaks, tmp[1] what to add for the next n.
func (w *width) tweaks(t *text, label, sectors, i string) {
	v, add, c := w.temp(0), w.temp(1), w.temp(2)
	low := func(r string) string { return "X" + r[1:] }
	t.op("MOVQ", "tweak+40(FP)", "R14")
	t.op("MOVQ", "lo+48(FP)", "AX")
	t.op("VMOVQ", "AX", low(v))
	t.op("VPINSRQ", "$1", "hi+56(FP)", low(v), low(v))
	t.op("VMOVQ", "step+64(FP)", low(add))
	switch w.n {
	case 2:
		t.op("VINSERTI128", "$1", low(v), v, v)
		t.op("VPBROADCASTQ", low(add), add)
	case 4:
		t.op("VSHUFI64X2", "$0", v, v, v)
		t.op("VPBROADCASTQ", low(add), add)
	}
	if w.n > 1 {
		t.comment("Tweak i of the n is the first + i·step, in the low half without carry.")
		t.op("VPMULUDQ", "index<>(SB)", add, c)
		t.op("VPADDQ", c, v, v)
		t.op("VPMULUDQ", "count<>(SB)", add, add)
	}
	t.op("MOVL", fmt.Sprintf("$%d", batch), sectors)
	t.op("CMPQ", "R12", sectors)
	t.op("CMOVQLT", "R12", sectors)
	t.op("SUBQ", sectors, "R12")
	t.op("LEAQ", mem(-16*batch, "R10"), "R11")
	t.op("MOVQ", sectors, i)
	t.label(label)
	t.op(w.xor, "(R14)", v, c)
	for r := 1; r < rounds; r++ {
		t.op("VAESENC", mem(r*keyStride, "R14"), c, c)
	}
	t.op("VAESENCLAST", mem(rounds*keyStride, "R14"), c, c)
	t.op(w.mov, c, "(R11)")
	t.op("VPADDQ", add, v, v)
	t.op("ADDQ", imm(w.bytes()), "R11")
	t.op("SUBQ", fmt.Sprintf("$%d", w.n), i)
	t.op("JGT", label)
	t.op("LEAQ", mem(-16*batch, "R10"), "R11")
	t.comment("The tweak of the batch after it.")
	t.op("MOVQ", sectors, i)
	t.op("IMULQ", "step+64(FP)", i)
	t.op("ADDQ", i, "AX")
	t.op("MOVQ", "AX", "lo+48(FP)")
}

// begin emits the start of encryptW or decryptW, up to the first batch: R10, R12 and SI,
// and the number of bodies in a sector. The frame has the scratch, aligned wherever that
// puts it, of which ring is the part behind R10, and locals.
func (w *width) begin(t *text, name string, ring, locals int, bodies string) {
	t.raw("\n// func %s%s(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)", name, w.name)
	t.raw("TEXT ·%s%s(SB), 0, $%d-72", name, w.name, 16*batch+ring+keepAlign+locals)
	t.op("LEAQ", mem(keepAlign-1+16*batch, "SP"), "R10")
	t.op("ANDQ", fmt.Sprintf("$~%d", keepAlign-1), "R10")
	t.op("MOVQ", "src+8(FP)", "SI")
	t.op("MOVQ", "sectors+16(FP)", "R12")
	t.op("MOVQ", "sectorSize+24(FP)", bodies)
	shift := 0
	for 1<<shift < w.body() {
		shift++
	}
	t.op("SHRQ", fmt.Sprintf("$%d", shift), bodies)
}

// data emits a constant of a vector, 8 bytes for each of its halves of blocks.
func (w *width) data(t *text, name string, value func(i int) uint64) {
	for i := range 2 * w.n {
		t.raw("DATA %s<>+%d(SB)/8, $%#x", name, 8*i, value(i))
	}
	t.raw("GLOBL %s<>(SB), RODATA|NOPTR, $%d", name, w.bytes())
}

// low is a value for data that has v of the block in the low half, and 0 in the high one.
func low(v func(block int) int) func(i int) uint64 {
	return func(i int) uint64 { return uint64(v(i/2)) * uint64(1-i%2) }
}

func (w *width) file(t *text) {
	t.raw("\n// The algorithm, the registers and the equations are explained in _asm.")
	if w.n > 1 {
		t.raw("\n// index is i for block i of a vector, count the number of blocks.")
		w.data(t, "index", low(func(i int) int { return i }))
		w.data(t, "count", low(func(int) int { return w.n }))
	}
	if w.n == 4 {
		w.constants(t)
	}
	for _, f := range []struct{ name, aes string }{{"encrypt", "VAESENC"}, {"decrypt", "VAESDEC"}} {
		if w.n == 4 {
			w.wide(t, f.name, f.aes)
		} else {
			w.narrow(t, f.name, f.aes)
		}
	}
}
