package main

import "fmt"

// The ceilings are loops of nothing but AES rounds on registers, in as many
// independent chains as there are registers. The first argument is in units of
// the registers of a chain set: 14 rounds of all of them.

func ceilingX86(t *text) {
	for _, w := range []struct {
		name   string
		prefix string
		chains int
	}{{"zmm", "Z", 16}, {"ymm", "Y", 12}, {"xmm", "X", 12}} {
		t.raw("\n// func %s(n int)", w.name)
		t.raw("TEXT ·%s(SB), NOSPLIT, $0-8", w.name)
		t.op("MOVQ", "n+0(FP)", "CX")
		t.raw("\n\tPCALIGN $64")
		t.label("loop")
		for r := 1; r <= rounds; r++ {
			aes := "VAESENC"
			if r == rounds {
				aes = "VAESENCLAST"
			}
			for i := range w.chains {
				reg := fmt.Sprint(w.prefix, i)
				t.op(aes, fmt.Sprint(w.prefix, w.chains+r%2), reg, reg)
			}
		}
		t.op("DECQ", "CX")
		t.op("JNZ", "loop")
		t.op("VZEROUPPER")
		t.op("RET")
	}
}

func ceilingARM(t *text) {
	const chains = 16
	t.raw("\n// func neon(n int)")
	t.raw("TEXT ·neon(SB), NOSPLIT, $0-8")
	t.op("MOVD", "n+0(FP)", "R0")
	t.label("loop")
	for r := 1; r <= rounds; r++ {
		for i := range chains {
			v := fmt.Sprintf("V%d.B16", i)
			t.op("AESE", fmt.Sprintf("V%d.B16", 30+r%2), v)
			if r != rounds {
				t.op("AESMC", v, v)
			}
		}
	}
	t.op("SUB", "$1", "R0")
	t.op("CBNZ", "R0", "loop")
	t.op("RET")
}
