package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestCheckBacking: the kernel device of a volume is not given to a copy of its disk.
func TestCheckBacking(t *testing.T) {
	dir := t.TempDir()
	open := func(name string) *os.File {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	original, twin := backingOf(open("original")), backingOf(open("twin"))
	if original == "" || original == twin {
		t.Fatalf("the backing devices are %q and %q", original, twin)
	}
	file := filepath.Join(dir, "a.udev")
	if err := checkBacking(file, twin); err != nil {
		t.Errorf("without a file: %v", err)
	}
	for _, tt := range []struct {
		text, is string
		refused  bool
	}{
		{"HOSTCRYPTD_UUID=1\n", twin, false}, // of a version that didn't say
		{"HOSTCRYPTD_UUID=1\n" + backingLine + original + "\n", original, false},
		{"HOSTCRYPTD_UUID=1\n" + backingLine + original + "\n", twin, true},
	} {
		if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		err := checkBacking(file, tt.is)
		if (err != nil) != tt.refused || tt.refused && exitCode(err) != codeBusy {
			t.Errorf("%q for %q: %v", tt.text, tt.is, err)
		}
	}
}
