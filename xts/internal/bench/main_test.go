//go:build amd64

package main

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestCommand runs the smallest measurement, and one of nothing, which is an error.
func TestCommand(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Fatal("go is not in PATH; Debian package: golang-go")
	}
	bench := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.Command("go", "build", "-o", bench, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, tt := range []struct {
		args, want string
		ok         bool
	}{
		{"-size 512/512", "decrypt", true},
		{"-size 512", `no such implementation among ["`, false},
		{"-impl nonsense", `no such implementation among ["`, false},
	} {
		args := append(strings.Fields(tt.args), "-openssl=false", "-pairs", "1", "-slice", "100us")
		out, err := exec.Command(bench, args...).CombinedOutput()
		if (err == nil) != tt.ok || !strings.Contains(string(out), tt.want) {
			t.Errorf("bench %s: error %v, want %t that it runs and %q in\n%s", tt.args, err, tt.ok, tt.want, out)
		}
	}
}
