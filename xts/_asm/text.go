package main

import (
	"fmt"
	"strings"
)

// A text collects lines of Go assembly.
type text struct {
	lines []string
}

// op adds an instruction. The operands are in the order of Go's assembler, the
// destination last.
func (t *text) op(name string, operands ...any) {
	s := make([]string, len(operands))
	for i, o := range operands {
		s[i] = fmt.Sprint(o)
	}
	t.lines = append(t.lines, strings.TrimRight("\t"+name+" "+strings.Join(s, ", "), " "))
}

// note adds a comment to the last instruction.
func (t *text) note(format string, a ...any) {
	t.lines[len(t.lines)-1] += " // " + fmt.Sprintf(format, a...)
}

// comment adds a comment on lines of its own.
func (t *text) comment(format string, a ...any) {
	for line := range strings.Lines(fmt.Sprintf(format, a...)) {
		t.lines = append(t.lines, strings.TrimRight("\t// "+line, " \n"))
	}
}

// raw adds lines as they are.
func (t *text) raw(format string, a ...any) {
	t.lines = append(t.lines, strings.Split(fmt.Sprintf(format, a...), "\n")...)
}

// label adds a label after an empty line.
func (t *text) label(name string) { t.raw("\n%s:", name) }

// weave adds the lines of filler, evenly spread, between those of main. Neither
// may depend on the other.
func (t *text) weave(main, filler []string) {
	done := 0
	for i, line := range main {
		t.lines = append(t.lines, line)
		for ; done < (i+1)*len(filler)/len(main); done++ {
			t.lines = append(t.lines, filler[done])
		}
	}
}

// lines returns what f adds to a text.
func lines(f func(t *text)) []string {
	var t text
	f(&t)
	return t.lines
}

// An imm is an immediate operand.
type imm int

func (i imm) String() string { return fmt.Sprintf("$%#x", int(i)) }

// mem is the operand at base + offset.
func mem(offset int, base string) string { return fmt.Sprintf("%d(%s)", offset, base) }
