package main

import "fmt"

// # Narrow vectors
//
// With ymm and xmm there are two rounds a cycle, and other vector instructions get in
// their way: on Zen 4 the XORs and stores of head and tail alone cost 5 %, and a carry-less
// multiplication takes the place of a round, and of two where there are many. So the masks
// are made with general registers, whose units are idle otherwise, block by block, with hi
// and lo the halves of a mask:
//
//	T · x = (hi, lo) << 1 ^ (0x87 if the highest bit of hi is set)
//
// There is no branch on that bit. It takes 7 instructions a block (8 with xmm, where SARX
// may be missing), and 2.5 cycles from block to block, of the 3.5 that ymm has: the bit is
// taken out of hi beside ADD and ADC. Out of the carry behind them, it would be 5 cycles.
//
// The masks go through memory, a ring of 4 bodies. A vector can't be loaded soon after
// its halves were stored apart: the load would wait until the stores have left the store
// buffer. So masks are made two bodies ahead, and whether these belong to the same
// sector or to the next one makes no difference to the rounds: there is one kind of body,
// and "final", after which nothing is next. The masks of two bodies behind the last one
// are made for nothing, of whatever is in scratch.
//
// What limits ymm is the number of instructions: for 512 bytes 231 rounds and about 320
// others, in the 112 cycles that the rounds take at least, of a core that issues 6 per
// cycle, or 3 beside another hyperthread. That gets 0.86 to 0.92 of the ceiling, measured
// with a core to itself, where without masks at all it is 0.92 to 0.94.
//
//	DI      where the current body of output is, minus SI
//	R9      the slot of the ring whose masks are made next
//	R15     the slot of the current body
//	R13     the slot of the next body, or temporary
//	R14     63, or temporary
//	AX, DX  lo and hi of the mask that is made next
//	BX      bodies left in the sector whose masks are made
//	CX      bodies left, without the current one; at the start minus those that have
//	        no masks yet
//	k0      the first round key
//
// Slots are offsets in the ring. In memory:
//
//	bodies-8(SP)   bodies in a sector
//	all-16(SP)     bodies in all sectors
//	left-24(SP)    sectors of the batch whose masks weren't begun
const (
	slots  = 4 // in the ring, a power of two
	lead   = 2 // bodies that masks are ahead
	locals = 24
)

func (w *width) k0() string { return w.reg(14) }

// inRing is the operand i blocks into a slot.
func inRing(i int, slot string) string { return fmt.Sprintf("%d(R10)(%s*1)", 16*i, slot) }

// advance emits to = slot behind from.
func (w *width) advance(t *text, from, to string) {
	t.op("LEAQ", mem(w.body(), from), to)
	t.op("ANDQ", imm(slots*w.body()-1), to)
}

// masks emits the masks of a body.
func (w *width) masks(t *text) {
	if bare {
		return
	}
	for i := range vectors * w.n {
		t.op("MOVQ", "AX", inRing(i, "R9"))
		t.op("MOVQ", "DX", fmt.Sprintf("%d(R10)(R9*1)", 16*i+8))
		if w.n == 1 {
			t.op("MOVQ", "DX", "R13")
			t.op("SARQ", "$63", "R13")
		} else {
			t.op("SARXQ", "R14", "DX", "R13")
		}
		t.op("ANDL", imm(0x87), "R13")
		t.op("ADDQ", "AX", "AX")
		t.op("ADCQ", "DX", "DX")
		t.op("XORQ", "R13", "AX")
	}
	w.advance(t, "R9", "R9")
}

// into emits D[j] of the body in a slot.
func (w *width) into(t *text, j int, slot string) {
	t.op(w.xor, inRing(j*w.n, slot), w.k0(), w.d(j))
	t.op(w.xor, mem(j*w.bytes(), "SI"), w.d(j), w.d(j))
}

// out emits the last round and the output of vector j.
func (w *width) out(t *text, aes string, j int) {
	t.op(aes+"LAST", w.last(), w.d(j), w.d(j))
	t.op(w.xor, inRing(j*w.n, "R15"), w.d(j), w.d(j))
	t.op(w.mov, w.d(j), mem(j*w.bytes(), "DI")+"(SI*1)")
}

// narrow emits the functions for ymm or xmm, of which aes are the rounds.
func (w *width) narrow(t *text, name, aes string) {
	w.begin(t, name, slots*w.body(), locals, "CX")
	t.op("MOVQ", "CX", "bodies-8(SP)")
	t.op("IMULQ", "R12", "CX")
	t.op("MOVQ", "CX", "all-16(SP)")
	t.op("MOVQ", "$0", "left-24(SP)")
	t.op("MOVQ", "dst+0(FP)", "DI")
	t.op("SUBQ", "SI", "DI")
	t.op("SUBQ", imm(w.body()), "DI")
	t.note("when a body is stored, SI is a body further")
	t.op("MOVQ", "data+32(FP)", "R8")
	t.op(w.mov, "(R8)", w.k0())
	t.op(w.mov, mem(rounds*keyStride, "R8"), w.last())
	t.op("XORL", "R9", "R9")
	t.op("XORL", "R15", "R15")
	t.op("MOVQ", fmt.Sprintf("$-%d", lead), "CX")

	t.comment("Masks of the next sector.")
	t.label("sector")
	t.op("CMPQ", "left-24(SP)", "$0")
	t.op("JNE", "more")
	t.op("TESTQ", "R12", "R12")
	t.op("JZ", "more")
	t.note("behind the last sector")
	w.tweaks(t, "tweaks", "DX", "R13")
	t.op("MOVQ", "DX", "left-24(SP)")
	t.op("MOVL", "$63", "R14")
	for r := range w.kept {
		w.load(t, 1+r)
	}
	t.label("more")
	t.op("DECQ", "left-24(SP)")
	t.op("MOVQ", "(R11)", "AX")
	t.op("MOVQ", "8(R11)", "DX")
	t.op("ADDQ", "$16", "R11")
	t.op("MOVQ", "bodies-8(SP)", "BX")
	t.op("TESTQ", "CX", "CX")
	t.op("JGT", "next")

	t.comment("The first bodies.")
	t.label("start")
	w.masks(t)
	t.op("INCQ", "CX")
	t.op("JZ", "started")
	t.op("DECQ", "BX")
	t.op("JNZ", "start")
	t.op("JMP", "sector")
	t.label("started")
	for j := range vectors {
		w.into(t, j, "R15")
	}
	t.op("ADDQ", imm(w.body()), "SI")
	t.op("MOVQ", "all-16(SP)", "CX")
	t.op("JMP", "made")

	t.raw("\n\tPCALIGN $64")
	t.label("body")
	t.weave(lines(func(t *text) { w.middle(t, aes) }), lines(w.masks))
	w.advance(t, "R15", "R13")
	for j := range vectors {
		w.out(t, aes, j)
		w.into(t, j, "R13")
	}
	t.op("MOVQ", "R13", "R15")
	t.op("ADDQ", imm(w.body()), "SI")
	t.label("made")
	t.op("DECQ", "BX")
	t.op("JZ", "sector")
	t.label("next")
	t.op("DECQ", "CX")
	t.op("JNZ", "body")

	t.comment("No body is next. Leave nothing that depends on the key, neither in scratch nor\nin registers.")
	w.middle(t, aes)
	for j := range vectors {
		w.out(t, aes, j)
	}
	for _, r := range []string{"AX", "DX", "R13"} {
		t.op("XORL", r, r)
	}
	t.op(w.xor, w.d(0), w.d(0), w.d(0))
	for i := -16 * batch; i < slots*w.body(); i += w.bytes() {
		t.op(w.mov, w.d(0), mem(i, "R10"))
	}
	t.op("VZEROALL")
	t.op("RET")
}
