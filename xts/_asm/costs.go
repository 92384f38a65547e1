package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Costs is the measurement that wide.go and narrow.go rest on: what an instruction takes
// from AES rounds beside it, on the processor where it runs. A loop has 28 independent
// rounds, which alone take as long as they can, with 4, 8 and 16 of the instruction
// evenly between them, independent too. Printed is how many rounds fewer fit in the same
// time, per instruction: 0.00 is for free, 1.00 takes the place of a round.
//
// With ymm and xmm, AMD deals vector instructions out to two schedulers in turn, each
// with one of the two units for rounds. Where one instruction follows an odd number of
// rounds again and again, all rounds of one sort get the same unit and half a round is
// lost whatever the instruction is: that is the column for 4.
var counts = []int{4, 8, 16}

// instructions has $W for the name of a register without its number, S for a register
// that is only read, D for one that is only written, C for a constant, M for 64 aligned
// bytes and U for those 16 bytes further. The first word is "zmm" if there is no other.
var instructions = []string{
	"VPADDQ C, S, D", "VPXORQ C, S, D", "VPXORQ M, S, D", "zmm VPTERNLOGQ $0x96, C, S, D", "VMOVDQA64 S, D",
	"VPSLLQ $7, S, D", "VPSRLVQ C, S, D", "VPSRAD $31, S, D", "zmm VPROLQ $7, S, D", "zmm VPSHLDQ $7, C, S, D",
	"VPSHUFD $0x93, S, D", "VPUNPCKLQDQ C, S, D", "VPSLLDQ $4, S, D", "VPSHUFB C, S, D", "zmm VPERMB C, S, D",
	"zmm VPMULTISHIFTQB C, S, D", "zmm VPCMPGTQ C, S, K2", "VPMULUDQ C, S, D", "zmm VGF2P8AFFINEQB $0, C, S, D",
	"VPCLMULQDQ $0, C, S, D",
	"VMOVDQU64 M, D", "VMOVDQU64 U, D", "zmm VBROADCASTI32X4 M, D", "VMOVDQU64 S, M", "VMOVDQU64 S, U", "PREFETCHT0 M",
	"LEAQ 1(AX), DX", "SARXQ R14, DX, R13", "MOVQ AX, M",
}

// costs measures and prints that, with a program which it writes, builds and runs, as it
// has some 15,000 lines that nobody needs otherwise.
func costs() error {
	dir, err := os.MkdirTemp("", "xts-costs-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var s text
	var declarations, table strings.Builder
	s.raw("#include \"textflag.h\"")
	loops := 0
	loop := func(prefix, op string, n int) string {
		// Rounds go round all registers but those below, whose key and constant are the last.
		chains, key, c, src := 14, 30, 31, 20
		if prefix != "Z" {
			chains, key, c, src = 10, 15, 14, 13
		}
		const rounds = 5 * 7 * 8
		name := fmt.Sprint("loop", loops)
		loops++
		s.raw("\nTEXT ·%s(SB), NOSPLIT, $0-24", name)
		s.raw("\tMOVQ src+0(FP), SI\n\tMOVQ dst+8(FP), DI\n\tMOVQ n+16(FP), CX\n\tPCALIGN $64\nloop:")
		done := 0
		for i := range rounds {
			s.raw("\tVAESENC %s%d, %[1]s%[3]d, %[1]s%[3]d", prefix, key, i%chains)
			for ; done < (i+1)*n/28; done++ {
				base := map[bool]string{true: "DI", false: "SI"}[strings.HasSuffix(op, ", M") || strings.HasSuffix(op, ", U")]
				line := op
				if prefix != "Z" { // without AVX-512
					line = strings.NewReplacer("VPXORQ", "VPXOR", "VMOVDQA64", "VMOVDQA", "VMOVDQU64", "VMOVDQU").Replace(line)
				}
				words := strings.Fields(line)
				for k, word := range words[1:] {
					comma := strings.HasSuffix(word, ",")
					switch strings.TrimSuffix(word, ",") {
					case "S":
						word = fmt.Sprint(prefix, src)
					case "D":
						word = fmt.Sprint(prefix, chains+done%3)
					case "C":
						word = fmt.Sprint(prefix, c)
					case "M":
						word = mem(done%16*64, base)
					case "U":
						word = mem(done%16*64+16, base)
					default:
						comma = false
					}
					if comma {
						word += ","
					}
					words[1+k] = word
				}
				s.raw("\t%s", strings.Join(words, " "))
			}
		}
		s.raw("\tDECQ CX\n\tJNZ loop\n\tVZEROUPPER\n\tRET")
		fmt.Fprintf(&declarations, "func %s(src, dst *byte, n int)\n", name)
		return name
	}
	for _, prefix := range []string{"Z", "Y", "X"} {
		fmt.Fprintf(&table, "{%q, %s, []op{\n", strings.ToLower(prefix)+"mm", loop(prefix, "", 0))
		for _, op := range instructions {
			if short, ok := strings.CutPrefix(op, "zmm "); ok {
				op = short
				if prefix != "Z" {
					continue
				}
			}
			fmt.Fprintf(&table, "{%q, []func(src, dst *byte, n int){", op)
			for _, n := range counts {
				fmt.Fprintf(&table, "%s, ", loop(prefix, op, n))
			}
			fmt.Fprint(&table, "}},\n")
		}
		fmt.Fprint(&table, "}},\n")
	}
	s.raw("")
	for name, content := range map[string]string{
		"go.mod":        "module costs\n\ngo 1.26\n",
		"loops_amd64.s": strings.Join(s.lines, "\n"),
		"main.go":       fmt.Sprintf(costsMain, counts, declarations.String(), table.String()),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	run := exec.Command("go", "run", ".")
	run.Dir, run.Stdout, run.Stderr = dir, os.Stdout, os.Stderr
	return run.Run()
}

// costsMain is the program, but for the counts, the declarations and the table.
const costsMain = `package main

import (
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

var counts = %#v

type op struct {
	name  string
	loops []func(src, dst *byte, n int)
}

%s
var widths = []struct {
	name string
	base func(src, dst *byte, n int)
	ops  []op
}{
%s}

func main() {
	runtime.LockOSThread()
	info, _ := os.ReadFile("/proc/cpuinfo")
	b := make([]byte, 3*4096)
	b = b[-uintptr(unsafe.Pointer(&b[0]))%%4096:]
	src, dst := &b[0], &b[4096]
	for _, w := range widths {
		if w.name == "zmm" && !strings.Contains(string(info), "avx512_vbmi2") || w.name == "ymm" && !strings.Contains(string(info), " vaes ") {
			fmt.Printf("%%s: not on this processor\n\n", w.name)
			continue
		}
		fmt.Printf("rounds of %%s lost per instruction, %%v instructions beside 28 rounds\n", w.name, counts)
		for _, o := range w.ops {
			fmt.Printf("%%-32s", o.name)
			for i, f := range o.loops {
				var ratios []float64
				for range 15 {
					before, t, after := run(w.base, src, dst), run(f, src, dst), run(w.base, src, dst)
					ratios = append(ratios, 2*t/(before+after))
				}
				slices.Sort(ratios)
				fmt.Printf(" %%6.2f", max(0, (ratios[len(ratios)/2]-1)*28/float64(counts[i])))
			}
			fmt.Println()
		}
		fmt.Println()
	}
}

// run returns the seconds of processor time for 2000 iterations.
func run(f func(src, dst *byte, n int), src, dst *byte) float64 {
	start := now()
	f(src, dst, 2000)
	return (now() - start).Seconds()
}

func now() time.Duration {
	const thread = 3 // CLOCK_THREAD_CPUTIME_ID
	var t syscall.Timespec
	syscall.Syscall(syscall.SYS_CLOCK_GETTIME, thread, uintptr(unsafe.Pointer(&t)), 0)
	return time.Duration(t.Nano())
}
`
