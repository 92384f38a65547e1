package main

import "fmt"

// # Wide vectors
//
// With zmm one round a cycle is all there is, so there is room for other instructions,
// but not for every one. On AMD (Zen 4) a carry-less multiplication, a rotation, a
// multiplication of integers and a comparison into a mask register each take the place
// of a round; shifts, shuffles, additions and XOR take none. On Intel shifts take the
// place of a round, and carry-less multiplications and shuffles share a port with half of
// the rest. So this uses as few multiplications as it can, and shifts only once a sector.
//
// There are registers for the masks of the current and of the next body. Of the next
// body, T[0] and T[1] are made first, 8 blocks. In a new sector ("first") the blocks are
// shifted by different counts, i < 4 bits: each half of e is shifted to the left, which
// brings out c of the low and d of the high half, and
//
//	e · x^i = shifted ^ (d·0x87, c)
//
// where d·0x87 is looked up, as d has 4 bits at most: T[0] = e·(x^0, ..., x^3) and
// T[1] = T[0]·x^4.
//
// All else goes by whole bytes. With b15, b14, b13 the highest bytes of a block,
//
//	T[2+j] = T[j] · x^8  = (T[j] <<  8) ^ (b15)·0x87
//	T[4+j] = T[j] · x^16 = (T[j] << 16) ^ (b15 b14)·0x87
//	T[6+j] = T[j] · x^24 = (T[j] << 24) ^ (b15 b14 b13)·0x87
//
// are the other six vectors ("derive"), and in the same sector ("step") the next body has
//
//	T[j] of the next body = T[6+j] · x^8
//
// The three products have 2, 3 and 4 bytes. So their factors are put into one half of a
// block so far apart that one multiplication does all three ("pack"), and the products are
// taken apart again ("part"). So are those of T[6] and T[7] in "step" ("pack0"). That
// makes 3 multiplications a body instead of 8.
//
// The tail merges with the last round, whose last operation is the addition of a key,
// and the head has three terms, which one VPTERNLOGQ adds. With V[j] = T[j] ^ k14 and
// sum = k0 ^ k14,
//
//	C = last(D, V)
//	D = P ^ V ^ sum
//
// Of T[2] to T[7] only V is ever made, by a third term in "derive". As multiplication is
// linear, "step" can use that, with fix = k14·x^8:
//
//	T[6+j] · x^8 = V[6+j] · x^8 ^ fix
//
// T[0] and T[1] are made as they are, for "derive", and V of them by the head.
//
// There are several kinds of body, by what is next: "step", a body of the same sector;
// "new", the first body of a sector; and "final", nothing.
//
// Masks as in narrow.go were tried: on Zen 4, they get 0.95 of the ceiling instead of 0.93
// with 128 KiB of 4 KiB sectors, but 0.71 instead of 0.85 with 4 KiB, as general registers
// need 200 cycles for the masks to begin with; and they take twice as many instructions,
// for which Intel has no room beside another hyperthread.
//
//	DI      where the current body of output is
//	R13     bodies in a sector after the first
//	BX      bodies left in this sector, without the current one
//	CX      sectors left in this batch, without the current one
//	V[0..7] of the next body T[0], T[1], V[2], ..., V[7]
//	U[0..7] V of the current body
//	sum     k0 ^ k14
//	fix     k14·x^8
//	poly    x^7 + x^2 + x + 1 = 0x87 in the low half of each 16 bytes
const (
	sum  = "Z24"
	poly = "Z26"
	fix  = "Z27"

	ahead = 4 * 512 // bytes to prefetch ahead
)

func (w *width) v(j int) string { return w.reg(vectors + j) }
func (w *width) u(j int) string { return w.reg(2*vectors + j) }

// step emits T[0] and T[1] of the next body in the same sector.
func (w *width) step(t *text) {
	part, product := w.temp(1), w.temp(2)
	t.op("VPUNPCKHQDQ", w.v(7), w.v(6), product)
	t.op("VPSHUFB", "pack0<>(SB)", product, product)
	t.op("VPCLMULQDQ", imm(0x00), poly, product, product)
	for j := range 2 {
		t.op("VPSHUFD.Z", imm(j), product, "K1", part)
		t.op("VPSLLDQ", "$1", w.v(6+j), w.v(j))
		t.op("VPTERNLOGQ", imm(0x96), fix, part, w.v(j))
		t.note("T[%d] = V[%d]·x^8 ^ fix", j, 6+j)
	}
}

// first emits T[j] of the first body of the sector whose e is in tmp[0].
func (w *width) first(t *text, j int) {
	out := w.temp(1)
	if j == 0 {
		t.comment("T[0] = e·(x^0, ..., x^3)")
		t.op("VPSRLVQ", "right<>(SB)", w.temp(0), out)
		t.op("VPSLLVQ", "left<>(SB)", w.temp(0), w.v(j))
	} else {
		t.comment("T[1] = T[0]·x^4")
		t.op("VPSRLQ", "$60", w.v(0), out)
		t.op("VPSLLQ", "$4", w.v(0), w.v(j))
	}
	t.op("VPSHUFB", "swap<>(SB)", out, out)
	t.op("VPORQ", "row<>(SB)", out, out)
	t.op("VPERMB", "table<>(SB)", out, out)
	t.op("VPXORQ", out, w.v(j), w.v(j))
}

// derive emits V[2+j], V[4+j] and V[6+j] from T[j].
func (w *width) derive(t *text, j int) {
	part, product := w.temp(1), w.temp(2)
	t.op("VPSHUFB", "pack<>(SB)", w.v(j), product)
	t.op("VPCLMULQDQ", imm(0x00), poly, product, product)
	for k := 1; k < vectors/2; k++ {
		v := w.v(2*k + j)
		t.op("VPSHUFB", fmt.Sprintf("part%d<>(SB)", k), product, part)
		t.op("VPSLLDQ", fmt.Sprintf("$%d", k), w.v(j), v)
		t.op("VPTERNLOGQ", imm(0x96), w.last(), part, v)
		t.note("V[%d] = T[%d]·x^%d ^ k14", 2*k+j, j, 8*k)
	}
}

// sameSector and newSector emit the masks of the next body.
func (w *width) sameSector(t *text) {
	w.step(t)
	for j := range 2 {
		w.derive(t, j)
	}
}

func (w *width) newSector(t *text) {
	t.op("VBROADCASTI32X4", "(R11)", w.temp(0))
	t.op("ADDQ", "$16", "R11")
	for j := range 2 {
		w.first(t, j)
		w.derive(t, j)
	}
}

// head emits D[j] of the next body, and U[j] = V[j].
func (w *width) head(t *text, j int) {
	t.op("VMOVDQU64", mem(j*w.bytes(), "SI"), w.d(j))
	if j < 2 {
		t.op("VPTERNLOGQ", imm(0x96), "(R8)", w.v(j), w.d(j))
		t.op("VPXORQ", w.last(), w.v(j), w.u(j))
		t.note("U[%d] = T[%d] ^ k14", j, j)
	} else {
		t.op("VPTERNLOGQ", imm(0x96), sum, w.v(j), w.d(j))
		t.op("VMOVDQA64", w.v(j), w.u(j)) // which renaming does
	}
}

// tails emits the output of a body, with something after each vector of it.
func (w *width) tails(t *text, aes string, after func(t *text, j int)) {
	for j := range vectors {
		t.op(aes+"LAST", w.u(j), w.d(j), w.d(j))
		t.op("VMOVDQU64", w.d(j), mem(j*w.bytes(), "DI"))
		after(t, j)
	}
}

// prefetch emits a request for input and output of 4 bodies later. It gains 5 % where
// a request isn't in the second-level cache any more. Beyond the end it does nothing,
// as prefetching never faults.
func (w *width) prefetch(t *text) {
	for i := 0; i < w.body(); i += 64 {
		t.op("PREFETCHT0", mem(ahead+i, "SI"))
		t.op("PREFETCHT0", mem(ahead+i, "DI"))
	}
}

// doBody emits the rounds of a body with the masks of the next one between them, the
// tail, and the head of the next one.
func (w *width) doBody(t *text, aes string, masks func(t *text)) {
	if bare {
		masks = func(*text) {}
	}
	t.weave(lines(func(t *text) { w.middle(t, aes) }), append(lines(masks), lines(w.prefetch)...))
	w.tails(t, aes, w.head)
	t.op("ADDQ", imm(w.body()), "DI")
	t.op("ADDQ", imm(w.body()), "SI")
}

// wide emits encryptZMM or decryptZMM, of which aes are the rounds.
func (w *width) wide(t *text, name, aes string) {
	w.begin(t, name, 0, 0, "R13")
	w.tweaks(t, "tweaks", "CX", "BX")
	t.op("MOVQ", "dst+0(FP)", "DI")
	t.op("MOVQ", "data+32(FP)", "R8")
	t.op("DECQ", "R13")
	t.op("MOVL", imm(0x1111), "BX")
	t.op("KMOVW", "BX", "K1")
	t.note("double word 0 of each block")
	t.op("VMOVDQU64", "poly<>(SB)", poly)
	t.op("VMOVDQU64", mem(rounds*keyStride, "R8"), w.last())
	t.op("VPXORQ", "(R8)", w.last(), sum)
	t.op("VPSRLDQ", "$15", w.last(), w.temp(1))
	t.op("VPCLMULQDQ", imm(0x00), poly, w.temp(1), w.temp(1))
	t.op("VPSLLDQ", "$1", w.last(), fix)
	t.op("VPXORQ", w.temp(1), fix, fix)
	w.newSector(t)
	for j := range vectors {
		w.head(t, j)
	}
	t.op("ADDQ", imm(w.body()), "SI")
	t.op("MOVQ", "R13", "BX")
	t.op("DECQ", "CX")
	t.op("TESTQ", "BX", "BX")
	t.op("JZ", "last")

	t.raw("\n\tPCALIGN $64")
	t.comment("The next body is in the same sector.")
	t.label("step")
	w.doBody(t, aes, w.sameSector)
	t.op("DECQ", "BX")
	t.op("JNZ", "step")

	t.comment("The current body is the last of its sector.")
	t.label("last")
	t.op("TESTQ", "CX", "CX")
	t.op("JNZ", "new")
	t.op("TESTQ", "R12", "R12")
	t.op("JZ", "final")
	w.tweaks(t, "batch", "CX", "BX")

	t.raw("\n\tPCALIGN $64")
	t.comment("The next body starts a sector.")
	t.label("new")
	w.doBody(t, aes, w.newSector)
	t.op("DECQ", "CX")
	t.op("MOVQ", "R13", "BX")
	t.op("TESTQ", "BX", "BX")
	t.op("JNZ", "step")
	t.op("JMP", "last")

	t.comment("No body is next. Leave nothing that depends on the key, neither in scratch nor\nin registers. What can be cleared already is cleared between the rounds.")
	t.label("final")
	zero := func(t *text, r string) { t.op("VPXORQ", r, r, r) }
	t.weave(lines(func(t *text) { w.middle(t, aes) }), lines(func(t *text) {
		for _, r := range []string{w.v(0), sum, w.last(), poly, fix, w.temp(0), w.temp(1), w.temp(2)} {
			zero(t, r)
		}
		for i := -16 * batch; i < 0; i += w.bytes() {
			t.op("VMOVDQU64", w.v(0), mem(i, "R10"))
		}
	}))
	w.tails(t, aes, func(*text, int) {})
	for j := range vectors {
		zero(t, w.u(j))
	}
	for _, k := range w.keys {
		zero(t, w.reg(k))
	}
	t.op("VZEROALL")
	t.op("RET")
}

// constants emits the constants of wide.
func (w *width) constants(t *text) {
	t.raw("\n// poly is x^7 + x^2 + x + 1, which is x^128 in the field.")
	w.data(t, "poly", low(func(int) int { return 0x87 }))

	t.raw("\n// left and right are the counts of bits that go to the left, and out on the left.")
	w.data(t, "left", func(i int) uint64 { return uint64(i / 2) })
	w.data(t, "right", func(i int) uint64 { return uint64(64 - i/2) })

	t.raw("\n// swap takes d, out of the high half, to bytes 0 and 1, and c to byte 8. Then row\n// chooses a row of the table for each byte.")
	w.bytesOf(t, "swap", func(i int) int {
		return map[int]int{0: 8, 1: 8, 8: 0}[i] | map[bool]int{false: 0x80}[i == 0 || i == 1 || i == 8]
	})
	w.bytesOf(t, "row", func(i int) int { return map[int]int{0: 0x00, 1: 0x10}[i] | map[bool]int{true: 0x20}[i > 1] })
	t.raw("\n// The rows of table are d·0x87, low byte, d·0x87, high byte, and c.")
	for i := range 64 {
		c := i % 16
		product := c ^ c<<1 ^ c<<2 ^ c<<7
		t.raw("DATA table<>+%d(SB)/1, $%#x", i, []int{product & 0xff, product >> 8, c, 0}[i/16])
	}
	t.raw("GLOBL table<>(SB), RODATA|NOPTR, $64")

	const none = 0x80
	t.raw("\n// pack takes b15; b14, b15; and b13, b14, b15 of a block to where their products\n// don't touch. part1 to part3 take the products from there.")
	for _, c := range []struct {
		name string
		from []int
	}{
		{"pack0", []int{7, none, none, none, 15}},
		{"pack", []int{15, none, 14, 15, none, 13, 14, 15}},
		{"part1", []int{0, 1}},
		{"part2", []int{2, 3, 4}},
		{"part3", []int{5, 6, 7, 8}},
	} {
		w.bytesOf(t, c.name, func(i int) int {
			if i < len(c.from) {
				return c.from[i]
			}
			return none
		})
	}
}

// bytesOf emits a constant of which all blocks have the same bytes.
func (w *width) bytesOf(t *text, name string, value func(i int) int) {
	w.data(t, name, func(i int) uint64 {
		v := uint64(0)
		for k := range 8 {
			v |= uint64(value(8*(i%2)+k)) << (8 * k)
		}
		return v
	})
}
