package main

import (
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// kernelRecords takes what Linux 6.1 takes.
type kernelRecords struct{ lines []string }

func (k *kernelRecords) Write(b []byte) (int, error) {
	if len(b) > 976 {
		return 0, unix.EINVAL
	}
	k.lines = append(k.lines, string(b))
	return len(b), nil
}

// TestKernelLog: no line is too long for the kernel's log, and nothing of it is missing.
func TestKernelLog(t *testing.T) {
	for _, text := range []string{
		"", "short", strings.Repeat("x", kernelLine-1), strings.Repeat("x", kernelLine), strings.Repeat("0123456789", 500), strings.Repeat("ä€", 1000),
	} {
		var k kernelRecords
		if n, err := (kernelLog{&k}).Write([]byte(text + "\nnext\n")); err != nil || n != len(text)+6 {
			t.Errorf("%d bytes: %d, %v", len(text), n, err)
			continue
		}
		var got string
		last := len(k.lines) - 1
		for i, line := range k.lines[:last] {
			if !strings.HasSuffix(line, "\n") || !utf8.ValidString(line) {
				t.Errorf("%d bytes: line %d is %q", len(text), i, line)
			}
			line, continued := strings.CutPrefix(strings.TrimSuffix(line, "\n"), kernelContinued)
			if continued != (i > 0) {
				t.Errorf("%d bytes: line %d is %q", len(text), i, line)
			}
			got += line
		}
		if got != text || k.lines[last] != "next\n" {
			t.Errorf("%d bytes: %q", len(text), k.lines)
		}
	}
	if logTo(os.Stdin) != os.Stdin {
		t.Error("standard input was taken for /dev/kmsg")
	}
}
