package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hostcryptd/nbd/nbdnl"
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

// TestDropName: a name goes from a kernel device that nobody serves to the new one.
func TestDropName(t *testing.T) {
	dir := t.TempDir()
	name := func(uuid string) string { return filepath.Join(dir, backendPrefix+uuid+".udev") }
	for uuid, text := range map[string]string{
		"new": "HOSTCRYPTD_NAME=swap\n", "served": "HOSTCRYPTD_NAME=swap\n", "other": "HOSTCRYPTD_NAME=swap2\n",
		"dead": "HOSTCRYPTD_UUID=dead\nHOSTCRYPTD_NAME=swap\n" + backingLine + "x\n",
	} {
		if err := os.WriteFile(name(uuid), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	served := func(uuid string) bool { return uuid == "served" }
	if got := dropName(dir, "", "new", served); got != nil {
		t.Errorf("without a name: %q", got)
	}
	if got := dropName(dir, "swap", "new", served); !slices.Equal(got, []string{backendPrefix + "dead"}) {
		t.Errorf("dropName() = %q", got)
	}
	for uuid, want := range map[string]string{
		"new": "HOSTCRYPTD_NAME=swap\n", "served": "HOSTCRYPTD_NAME=swap\n", "other": "HOSTCRYPTD_NAME=swap2\n",
		"dead": "HOSTCRYPTD_UUID=dead\n" + backingLine + "x\n",
	} {
		if b, err := os.ReadFile(name(uuid)); string(b) != want {
			t.Errorf("%s: %q, %v, want %q", uuid, b, err, want)
		}
	}
}

// TestLeftBehind: of a kernel device that is in use because its server has died, the
// error says so, and what to do.
func TestLeftBehind(t *testing.T) {
	busy := fmt.Errorf("attaching /dev/nbd8: %w", nbdnl.ErrBusy)
	served := func(uuid string) bool { return uuid == "served" }
	for _, tt := range []struct {
		err     error
		backend string
		hint    bool
	}{
		{busy, backendPrefix + "dead", true},
		{busy, backendPrefix + "served", false},
		{busy, "", false},
		{busy, "somebody's", false},
		{errors.New("no memory"), backendPrefix + "dead", false},
	} {
		err := leftBehind(tt.err, 8, tt.backend, served)
		if got := strings.Contains(err.Error(), "volume dead") && strings.Contains(err.Error(), "nbd-client -d /dev/nbd8"); got != tt.hint || !errors.Is(err, tt.err) {
			t.Errorf("%v, backend %q: %v", tt.err, tt.backend, err)
		}
	}
}
