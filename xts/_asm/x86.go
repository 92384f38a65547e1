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
// and going to the next body is a multiplication by x^(8n): a shift by n bytes, which
// is the reason for 8 vectors, next to keeping 8 chains of AES rounds in flight.
//
// AES-256 has the round keys k0 to k14. With P the plaintext and T the mask of a
// vector, XTS is C = T ^ AES(P ^ T), whose first and last operations merge:
//
//	D = P ^ T ^ k0          "head"
//	D = round(D, k1..k13)   "rounds"
//	C = last(D, T ^ k14)    "tail": AESENCLAST ends with the addition of its key
//
// Decryption is the same with the inverse rounds and their key schedule, which is
// stored in the order of use.
//
// The masks of the next body are computed between the rounds of the current one,
// and the head of the next body follows the tail of the current one vector by
// vector. So there are several kinds of body, by what is next: "step", a body of the
// same sector; "new", the first body of a sector; and "final", nothing.
//
// # Wide and narrow vectors
//
// With zmm there are registers for the masks of the current and of the next body. Of
// the two ports for such vectors AES keeps one busy on Intel, and an addition may
// go to either, so additions are to be saved. Hence the registers don't hold T but
//
//	U = T ^ k14
//
// which is the key of AESENCLAST. As multiplication is linear, with fix = k14·x^(8n) ^ k14
// and sum = k0 ^ k14,
//
//	U · x^(8n) ^ fix = T · x^(8n) ^ k14   the next U; three terms are one VPTERNLOGQ
//	P ^ U ^ sum      = P ^ T ^ k0         D; the same
//
// With narrow vectors AES keeps two of three ports busy, and there are 16 registers.
// So the masks are in scratch: a ring of those of 64 blocks, of which a body has a
// slot. A fourth kind of body, "stride", goes 64 blocks at once,
//
//	T · x^64 = (lo << 64) + hi·0x87
//
// which is an instruction less than a shift by n bytes, and takes T from memory
// without a load of its own. It needs masks from 64 blocks before, so the first 64
// blocks of a sector are made by "step".
//
// What limits narrow vectors is the number of instructions: of 512 bytes with ymm, 224
// are rounds and about as many are not. A thread alone on its core issues 6 per cycle,
// and then the three ports are the limit. Beside another thread it issues 3, in which
// the 2 rounds per cycle of the ceiling still fit, but not what XTS adds to them.
//
// A batch is up to 32 sectors. Its tweaks are encrypted first, n per vector, all
// independent of each other: with zmm and 512 bytes per sector that is 3 % more rounds,
// instead of the latency of 14 rounds for every sector.
//
// # Registers
//
//	SI      where the next body of input is
//	DI      where the next body of output is; if narrow, that of the current one minus SI
//	R8      data key schedule, 64 bytes per round key
//	R9      tweak key schedule, and later the end of the ring
//	R10     scratch, aligned to 64 bytes: e of the batch, and the ring if narrow
//	R11     where the e of the next sector is
//	R12     sectors that have no tweak encrypted yet
//	R13     what BX is at the start of a sector
//	BX      bodies left in this sector, without the current one and those in DX
//	DX      if narrow, bodies left that "step" makes
//	CX      sectors left in this batch, without the current one
//	AX      if narrow, the slot of the current body
//	R15     if narrow, the slot of the next body
//
//	D[0..7]   data
//	T[0..7]   if narrow, masks of the body whose head is next, at R15; T of the current
//	          body is at AX
//	k0, k1    if narrow, the first two round keys
//	k14       if narrow, the last round key
//	V[0..7]   if wide, U of the body whose head is next
//	U[0..7]   if wide, U of the current body
//	sum, fix  if wide, k0 ^ k14 and k14·x^(8n) ^ k14
//	key[0..1] the other round keys: two, loaded a round ahead, or if narrow one
//	poly      x^7 + x^2 + x + 1 = 0x87 in the low half of each 16 bytes
//	tmp[0..2] temporary
type width struct {
	name   string // part of the symbol
	prefix string // of register names
	n      int    // blocks in a vector

	mov, xor string // instructions

	// Register numbers.
	k0, k1, k14 int // if narrow
	sum, fix    int // if not
	poly        int
	key         []int
	tmp         [3]int

	// narrow says that T is in scratch.
	narrow bool
}

var (
	zmm = width{
		name: "ZMM", prefix: "Z", n: 4, mov: "VMOVDQU64", xor: "VPXORQ",
		sum: 24, fix: 25, poly: 26, key: []int{27, 28}, tmp: [3]int{29, 30, 31},
		// D: Z0-Z7, V: Z8-Z15, U: Z16-Z23
	}
	ymm = width{
		name: "YMM", prefix: "Y", n: 2, mov: "VMOVDQU", xor: "VPXOR",
		k0: 14, k1: 12, k14: 15, poly: 13, key: []int{8}, tmp: [3]int{9, 10, 11},
		narrow: true,
	}
	xmm = width{
		name: "XMM", prefix: "X", n: 1, mov: "VMOVDQU", xor: "VPXOR",
		k0: 14, k1: 12, k14: 15, poly: 13, key: []int{8}, tmp: [3]int{9, 10, 11},
		narrow: true,
	}
)

const (
	vectors   = 8  // in a body
	batch     = 32 // sectors whose tweaks are encrypted at once
	rounds    = 14 // of AES-256
	keyStride = 64 // bytes from round key to round key, each repeated to fill them
	keepAlign = 64
	ahead     = 4 * 512 // bytes to prefetch ahead
	ring      = 64 * 16 // bytes of masks if narrow
)

func (w *width) bytes() int        { return 16 * w.n }
func (w *width) reg(i int) string  { return fmt.Sprint(w.prefix, i) }
func (w *width) d(j int) string    { return w.reg(j) }
func (w *width) pol() string       { return w.reg(w.poly) }
func (w *width) temp(i int) string { return w.reg(w.tmp[i]) }
func (w *width) roundKey(r int) string {
	if w.narrow && r == 1 {
		return w.reg(w.k1)
	}
	return w.reg(w.key[r%len(w.key)])
}

// t is T[j] of the next body, or V[j], and now is T[j] of the current one if narrow.
func (w *width) t(j int) string {
	if w.narrow {
		return mem(j*w.bytes(), "R15")
	}
	return w.reg(vectors + j)
}

func (w *width) now(j int) string { return mem(j*w.bytes(), "AX") }

// u is U[j].
func (w *width) u(j int) string { return w.reg(2*vectors + j) }

// scratch is how much of the stack is in use.
func (w *width) scratch() int {
	if w.narrow {
		return 16*batch + ring
	}
	return 16 * batch
}

// powers is the constant x^(n·j) · (x^0, ..., x^(n-1)).
func (w *width) powers(j int) string { return fmt.Sprintf("powers<>+%d(SB)", j*w.bytes()) }

// timesBytes emits dst = src · x^(8b):
//
//	src · x^(8b) = (src << 8b) + (src >> (128-8b))·0x87
func (w *width) timesBytes(t *text, b int, src, dst string) {
	w.shiftBytes(t, b, src, dst)
	t.op(w.xor, w.temp(1), dst, dst)
}

// shiftBytes emits the two terms of that, of which the second goes to tmp[1].
func (w *width) shiftBytes(t *text, b int, src, dst string) {
	carry := w.temp(1)
	if !w.narrow && b == 4 {
		// A shift by a double word is a shuffle, which costs less on AMD.
		t.op("VPSHUFD.Z", imm(0x03), src, "K1", carry)
		t.op("VPCLMULQDQ", imm(0x00), w.pol(), carry, carry)
		t.op("VPSHUFD.Z", imm(0x90), src, "K2", dst)
		return
	}
	t.op("VPSRLDQ", imm(16-b), src, carry)
	t.op("VPCLMULQDQ", imm(0x00), w.pol(), carry, carry)
	t.op("VPSLLDQ", imm(b), src, dst)
}

// timesPoly emits dst = src · c, where c has a degree below 64 and may differ from
// block to block. With src = hi·x^64 + lo, and h = hi·c = h1·x^64 + h0:
//
//	src·c = lo·c + h0·x^64 + h1·x^128 = lo·c + (h0 << 64) + h1·0x87
//
// For c below x^57 the last term has at most 64 bits, so that the two behind are the
// halves of one vector. dst may be tmp[2], and neither is tmp[1].
func (w *width) timesPoly(t *text, c, src, dst string) {
	h, h1 := w.temp(1), w.temp(2)
	t.op("VPCLMULQDQ", imm(0x01), c, src, h)
	t.op("VPCLMULQDQ", imm(0x01), w.pol(), h, h1)
	if w.narrow {
		t.op("VPUNPCKLQDQ", h, h1, h)
		t.op("VPCLMULQDQ", imm(0x00), c, src, dst)
		t.op(w.xor, h, dst, dst)
	} else { // as many instructions, but a shorter chain
		t.op("VPSLLDQ", imm(8), h, h)
		t.op("VPCLMULQDQ", imm(0x00), c, src, dst)
		t.op("VPTERNLOGQ", imm(0x96), h1, h, dst)
	}
}

// step emits the masks of the next body in the same sector.
func (w *width) step(t *text) {
	for j := range vectors {
		if w.narrow {
			tmp := w.temp(0)
			t.op(w.mov, w.now(j), tmp)
			w.timesBytes(t, w.n, tmp, tmp)
			t.op(w.mov, tmp, w.t(j))
			t.note("T[%d] = T[%d]·x^%d", j, j, 8*w.n)
		} else {
			w.shiftBytes(t, w.n, w.t(j), w.t(j))
			t.op("VPTERNLOGQ", imm(0x96), w.reg(w.fix), w.temp(1), w.t(j))
			t.note("V[%d] = V[%d]·x^%d ^ fix", j, j, 8*w.n)
		}
	}
}

// stride emits the same out of the masks of 64 blocks before, which are in the slot.
func (w *width) stride(t *text) {
	for j := range vectors {
		lo, carry := w.temp(0), w.temp(1)
		t.op("VPCLMULQDQ", imm(0x10), w.t(j), w.pol(), carry)
		t.op("VPUNPCKLQDQ", w.t(j), w.temp(2), lo)
		t.op(w.xor, carry, lo, lo)
		t.op(w.mov, lo, w.t(j))
		t.note("T[%d] = T[%d]·x^64", j, j)
	}
}

// first emits T for the first body of the sector whose e is at R11: the masks of the
// first 8 blocks are e·x^i, and the others are multiples by whole bytes of those.
func (w *width) first(t *text) {
	e := w.temp(0)
	switch w.n {
	case 1:
		t.op("VMOVDQU", "(R11)", e)
	case 2:
		t.op("VBROADCASTI128", "(R11)", e)
	case 4:
		t.op("VBROADCASTI32X4", "(R11)", e)
	}
	t.op("ADDQ", "$16", "R11")
	per := 8 / w.n // vectors of 8 blocks
	for j := range per {
		power, product := w.t(j), w.t
		if w.narrow { // at most one product follows, which may take the place
			power, product = w.temp(2), func(int) string { return w.temp(2) }
		}
		if w.n == 1 && j == 0 {
			power = e
		} else {
			w.timesPoly(t, w.powers(j), e, power)
		}
		if w.narrow {
			t.op(w.mov, power, w.t(j))
		}
		t.note("T[%d] = e·x^(%d...%d)", j, w.n*j, w.n*(j+1)-1)
		for i := j + per; i < vectors; i += per {
			w.timesBytes(t, i/per, power, product(i))
			if w.narrow {
				t.op(w.mov, product(i), w.t(i))
			}
			t.note("T[%d] = T[%d]·x^%d", i, j, w.n*(i-j))
		}
	}
	if !w.narrow {
		for j := range vectors {
			t.op(w.xor, mem(rounds*keyStride, "R8"), w.t(j), w.t(j))
			t.note("V[%d] = T[%d] ^ k14", j, j)
		}
	}
}

// head emits D[j] = input ^ T[j] ^ k0, and U[j] = V[j] if wide, which renaming does.
func (w *width) head(t *text, j int) {
	in := mem(j*w.bytes(), "SI")
	if w.narrow {
		t.op(w.xor, w.t(j), w.reg(w.k0), w.d(j))
		t.op(w.xor, in, w.d(j), w.d(j))
		return
	}
	t.op(w.mov, in, w.d(j))
	t.op("VPTERNLOGQ", imm(0x96), w.reg(w.sum), w.t(j), w.d(j))
	t.op("VMOVDQA64", w.t(j), w.u(j))
}

// middle emits the rounds 1 to 13 of all vectors of a body.
func (w *width) middle(t *text, aes string) {
	next := 1 // the round whose key is to be loaded next
	if w.narrow {
		next = 2
	}
	for r := 1; r < rounds; r++ {
		for ; next < rounds && next < r+len(w.key); next++ {
			t.op(w.mov, mem(next*keyStride, "R8"), w.roundKey(next))
		}
		for j := range vectors {
			t.op(aes, w.roundKey(r), w.d(j), w.d(j))
		}
	}
}

// tail emits the last round and the output of vector j.
func (w *width) tail(t *text, aes string, j int) {
	if w.narrow {
		t.op(aes+"LAST", w.reg(w.k14), w.d(j), w.d(j))
		t.op(w.xor, w.now(j), w.d(j), w.d(j))
	} else {
		t.op(aes+"LAST", w.u(j), w.d(j), w.d(j))
	}
	// If narrow, the output needs no pointer of its own.
	index := map[bool]string{true: "(SI*1)"}[w.narrow]
	t.op(w.mov, w.d(j), mem(j*w.bytes(), "DI")+index)
}

// prefetch emits a request for input and output of 4 bodies later. It gains 5 % where
// a request isn't in the second-level cache any more. Beyond the end it does nothing,
// as prefetching never faults. Narrow vectors have no slot free for it: there it costs
// about as much as it gains.
func (w *width) prefetch(t *text) {
	if w.narrow {
		return
	}
	for i := 0; i < vectors*w.bytes(); i += 64 {
		t.op("PREFETCHT0", mem(ahead+i, "SI"))
		t.op("PREFETCHT0", mem(ahead+i, "DI"))
	}
}

// tails emits the output of a body, with something after each vector of it.
func (w *width) tails(t *text, aes string, after func(t *text, j int)) {
	for j := range vectors {
		w.tail(t, aes, j)
		after(t, j)
	}
	if !w.narrow {
		t.op("ADDQ", imm(vectors*w.bytes()), "DI")
	}
}

// advance emits the change of slot and of input for the next body.
func (w *width) advance(t *text) {
	t.op("ADDQ", imm(vectors*w.bytes()), "SI")
	if w.narrow {
		t.op("MOVQ", "R15", "AX")
		t.op("ADDQ", imm(vectors*w.bytes()), "R15")
		t.op("CMPQ", "R15", "R9")
		t.op("CMOVQEQ", "R10", "R15")
	}
}

// begin emits the counters for a sector whose first body is the current one.
func (w *width) begin(t *text) {
	t.op("MOVQ", "R13", "BX")
	t.op("DECQ", "CX")
	if w.narrow {
		t.op("MOVQ", "sectorSize+24(FP)", "DX")
		t.note("see the start")
	}
}

// body emits the rounds with the masks of the next body between them, the tail and
// the head of the next body.
func (w *width) body(t *text, aes string, masks func(t *text)) {
	t.weave(lines(func(t *text) { w.middle(t, aes) }), append(lines(masks), lines(w.prefetch)...))
	w.tails(t, aes, w.head)
	w.advance(t)
}

// tweaks emits the encryption of the tweaks of a batch into scratch. CX is the number
// of sectors in it. D[0] has n tweaks, D[1] what to add for the next n.
func (w *width) tweaks(t *text) {
	v, add, c := w.d(0), w.d(1), w.d(2)
	t.op("MOVQ", "tweak+40(FP)", "R9")
	t.op("VMOVQ", "lo+48(FP)", "X0")
	t.op("VPINSRQ", "$1", "hi+56(FP)", "X0", "X0")
	t.op("VMOVQ", "step+64(FP)", "X1")
	switch w.n {
	case 2:
		t.op("VINSERTI128", "$1", "X0", v, v)
		t.op("VPBROADCASTQ", "X1", add)
	case 4:
		t.op("VSHUFI64X2", "$0", v, v, v)
		t.op("VPBROADCASTQ", "X1", add)
	}
	if w.n > 1 {
		t.comment("Tweak i of the n is the first + i·step, in the low half without carry.")
		t.op("VPMULUDQ", "index<>(SB)", add, c)
		t.op("VPADDQ", c, v, v)
		t.op("VPMULUDQ", "count<>(SB)", add, add)
	}
	t.op("LEAQ", mem(-16*batch, "R10"), "R11")
	t.op("MOVQ", "CX", "BX")
	t.label("tweaks")
	t.op(w.xor, "(R9)", v, c)
	for r := 1; r < rounds; r++ {
		t.op("VAESENC", mem(r*keyStride, "R9"), c, c)
	}
	t.op("VAESENCLAST", mem(rounds*keyStride, "R9"), c, c)
	t.op(w.mov, c, "(R11)")
	t.op("VPADDQ", add, v, v)
	t.op("ADDQ", imm(w.bytes()), "R11")
	t.op("SUBQ", fmt.Sprintf("$%d", w.n), "BX")
	t.op("JGT", "tweaks")
	t.op("LEAQ", mem(-16*batch, "R10"), "R11")
	t.comment("The tweak of the next batch.")
	t.op("MOVQ", "CX", "BX")
	t.op("IMULQ", "step+64(FP)", "BX")
	t.op("ADDQ", "BX", "lo+48(FP)")
}

// function emits encryptW or decryptW, of which aes are the rounds.
func (w *width) function(t *text, name, aes string) {
	t.raw("\n// func %s%s(dst, src *byte, sectors, sectorSize int, data, tweak *schedule, lo, hi, step uint64)", name, w.name)
	// The frame holds scratch wherever alignment puts it.
	t.raw("TEXT ·%s%s(SB), 0, $%d-72", name, w.name, w.scratch()+keepAlign)
	for _, a := range []struct{ arg, reg string }{
		{"dst+0", "DI"}, {"src+8", "SI"}, {"sectors+16", "R12"}, {"sectorSize+24", "R13"}, {"data+32", "R8"},
	} {
		t.op("MOVQ", a.arg+"(FP)", a.reg)
	}
	// R10 is the ring, and e is before it.
	t.op("LEAQ", mem(keepAlign-1+16*batch, "SP"), "R10")
	t.op("ANDQ", fmt.Sprintf("$~%d", keepAlign-1), "R10")
	shift := 0
	for 1<<shift < vectors*w.bytes() {
		shift++
	}
	t.op("SHRQ", fmt.Sprintf("$%d", shift), "R13")
	t.op("DECQ", "R13")
	if w.narrow {
		t.comment("Of the bodies after the first, as many as fill the ring are made by step.")
		t.op("MOVL", fmt.Sprintf("$%d", ring/(vectors*w.bytes())-1), "DX")
		t.op("CMPQ", "R13", "DX")
		t.op("CMOVQLT", "R13", "DX")
		t.op("SUBQ", "DX", "R13")
		t.op("MOVQ", "DX", "sectorSize+24(FP)")
		t.comment("When a body is stored, SI is a body further.")
		t.op("SUBQ", "SI", "DI")
		t.op("SUBQ", imm(vectors*w.bytes()), "DI")
	} else {
		t.op("MOVL", imm(0x1111), "BX")
		t.op("KMOVW", "BX", "K1")
		t.note("double word 0 of each block")
		t.op("MOVL", imm(0xeeee), "BX")
		t.op("KMOVW", "BX", "K2")
		t.note("double words 1 to 3")
	}
	t.op(w.mov, "poly<>(SB)", w.pol())
	k0, k14 := "(R8)", mem(rounds*keyStride, "R8")
	if w.narrow {
		t.op(w.mov, k0, w.reg(w.k0))
		t.op(w.mov, mem(keyStride, "R8"), w.reg(w.k1))
		t.op(w.mov, k14, w.reg(w.k14))
	} else {
		t.op(w.mov, k14, w.temp(0))
		t.op(w.xor, k0, w.temp(0), w.reg(w.sum))
		w.timesBytes(t, w.n, w.temp(0), w.reg(w.fix))
		t.op(w.xor, w.temp(0), w.reg(w.fix), w.reg(w.fix))
	}

	t.label("batch")
	t.op("MOVL", fmt.Sprintf("$%d", batch), "CX")
	t.op("CMPQ", "R12", "CX")
	t.op("CMOVQLT", "R12", "CX")
	t.op("SUBQ", "CX", "R12")
	w.tweaks(t)
	if w.narrow {
		t.op("MOVQ", "R10", "R15")
		t.op("LEAQ", mem(ring, "R10"), "R9")
	}
	w.first(t)
	for j := range vectors {
		w.head(t, j)
	}
	w.advance(t)
	w.begin(t)
	t.op("JMP", "next")

	t.raw("\n\tPCALIGN $64")
	t.comment("The next body is in the same sector.")
	t.label("step")
	w.body(t, aes, w.step)
	if w.narrow {
		t.op("DECQ", "DX")
		t.op("JNZ", "step")
		t.op("TESTQ", "BX", "BX")
		t.op("JZ", "last")
		t.op("VPXOR", w.temp(2), w.temp(2), w.temp(2))

		t.raw("\n\tPCALIGN $64")
		t.comment("The next body is in the same sector, which has had 64 blocks. tmp[2] is 0.")
		t.label("stride")
		w.body(t, aes, w.stride)
	}
	t.op("DECQ", "BX")
	t.op("JNZ", map[bool]string{true: "stride", false: "step"}[w.narrow])
	t.label("last")
	t.op("TESTQ", "CX", "CX")
	t.op("JZ", "final")

	t.raw("\n\tPCALIGN $64")
	t.comment("The next body starts a sector.")
	t.label("new")
	w.body(t, aes, w.first)
	w.begin(t)

	t.label("next")
	if w.narrow {
		t.op("TESTQ", "DX", "DX")
	} else {
		t.op("TESTQ", "BX", "BX")
	}
	t.op("JNZ", "step")
	t.op("TESTQ", "CX", "CX")
	t.op("JNZ", "new")

	t.comment("The batch ends with this body.")
	t.label("final")
	w.middle(t, aes)
	w.tails(t, aes, func(*text, int) {})
	t.op("TESTQ", "R12", "R12")
	t.op("JNZ", "batch")

	t.comment("Leave nothing that depends on the key, neither in scratch nor in registers.")
	t.op("VPXOR", "X0", "X0", "X0")
	for i := -16 * batch; i < w.scratch()-16*batch; i += w.bytes() {
		t.op(w.mov, w.d(0), mem(i, "R10"))
	}
	if !w.narrow {
		for i := 16; i < 32; i++ {
			t.op("VPXORQ", w.reg(i), w.reg(i), w.reg(i))
		}
	}
	t.op("VZEROALL")
	t.op("RET")
}

// data emits a constant of 16-byte elements that have only a low half.
func (w *width) data(t *text, name string, low func(i int) uint64) {
	for i := range w.n {
		t.raw("DATA %s<>+%d(SB)/8, $%#x", name, 16*i, low(i))
		t.raw("DATA %s<>+%d(SB)/8, $0", name, 16*i+8)
	}
	t.raw("GLOBL %s<>(SB), RODATA|NOPTR, $%d", name, w.bytes())
}

func (w *width) file(t *text) {
	t.raw("\n// The algorithm, the registers and the equations are explained in _asm/x86.go.")
	t.raw("\n// poly is x^7 + x^2 + x + 1, which is x^128 in the field.")
	w.data(t, "poly", func(int) uint64 { return 0x87 })
	if w.n > 1 {
		t.raw("\n// index is i for block i of a vector, count the number of blocks.")
		w.data(t, "index", func(i int) uint64 { return uint64(i) })
		w.data(t, "count", func(i int) uint64 { return uint64(w.n) })
	}
	t.raw("\n// powers is x^i, for 8 blocks.")
	for i := range 8 {
		t.raw("DATA powers<>+%d(SB)/8, $%#x", 16*i, 1<<i)
		t.raw("DATA powers<>+%d(SB)/8, $0", 16*i+8)
	}
	t.raw("GLOBL powers<>(SB), RODATA|NOPTR, $%d", 16*8)
	w.function(t, "encrypt", "VAESENC")
	w.function(t, "decrypt", "VAESDEC")
}
