package xts

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestRegistersCleared reads the assembly of all architectures: whatever register a
// function has written that may depend on the key is cleared before it returns. No
// test can look at the registers themselves, as there is Go code between it and them.
func TestRegistersCleared(t *testing.T) {
	wide := regexp.MustCompile(`^Z(1[6-9]|2\d|3[01])$`) // those that VZEROALL leaves alone
	vector := regexp.MustCompile(`^[VF](\d+)(\.|$)`)
	// Arithmetic on masks and round keys in general registers.
	secret := map[string][]string{
		"amd64": {"ADCQ", "ANDL", "SARQ", "SARXQ", "XORQ"},
		"arm64": {"EOR", "EORW", "EXTR", "AND", "VMOV"},
	}
	functions := 0
	for _, arch := range []string{"amd64", "arm64"} {
		files, err := filepath.Glob("*_" + arch + ".s")
		if err != nil || len(files) == 0 {
			t.Fatalf("assembly for %s: %v, %v", arch, files, err)
		}
		for _, file := range files {
			source, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, text := range strings.Split(string(source), "\nTEXT ·")[1:] {
				name, body, _ := strings.Cut(text, "(SB)")
				if name == "cpuid" {
					continue
				}
				functions++
				var (
					dirty []string // how the clearing of each register that was written looks
					end   []string // the instructions since the last label or branch
				)
				for line := range strings.Lines(body) {
					line, _, _ = strings.Cut(line, "//")
					line = strings.TrimSpace(line)
					op, operands, _ := strings.Cut(line, " ")
					all := strings.Split(operands, ", ")
					to := all[len(all)-1]
					clearing := ""
					switch {
					case strings.HasSuffix(line, ":") || strings.HasPrefix(op, "J") || strings.HasPrefix(op, "B") || strings.HasPrefix(op, "CB"):
						end = nil
					case arch == "amd64" && wide.MatchString(to):
						clearing = fmt.Sprintf("VPXORQ %s, %[1]s, %[1]s", to)
					case arch == "arm64" && vector.MatchString(to):
						clearing = fmt.Sprintf("VEOR V%s.B16, V%[1]s.B16, V%[1]s.B16", vector.FindStringSubmatch(to)[1])
					case arch == "arm64" && strings.HasPrefix(to, "R") && slices.Contains(secret[arch], op):
						clearing = "MOVD ZR, " + to
					case arch == "amd64" && slices.Contains(secret[arch], op):
						clearing = fmt.Sprintf("XORL %s, %[1]s", to)
					}
					if clearing != "" && clearing != line {
						if !slices.Contains(dirty, clearing) {
							dirty = append(dirty, clearing)
						}
						// An earlier clearing doesn't count any more.
						end = slices.DeleteFunc(end, func(l string) bool { return l == clearing })
					}
					if op != "RET" {
						end = append(end, line)
						continue
					}
					if arch == "amd64" {
						dirty = append(dirty, "VZEROALL")
					}
					if len(dirty) == 0 {
						t.Errorf("%s: %s writes no register", file, name)
					}
					for _, clearing := range dirty {
						if !slices.Contains(end, clearing) {
							t.Errorf("%s: %s returns without %s", file, name, clearing)
						}
					}
				}
			}
		}
	}
	// In each architecture expand, invert and two for single blocks, and two per tier.
	if want := 4 + 3*2 + 4 + 2; functions != want {
		t.Errorf("%d functions were found, want %d", functions, want)
	}
}
