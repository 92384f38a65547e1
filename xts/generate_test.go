//go:build amd64

package xts

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestGenerated runs the generator and compares its output with the files here.
func TestGenerated(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Fatal("go is not in PATH; Debian package: golang-go")
	}
	dir := t.TempDir()
	if out, err := exec.Command("go", "-C", "_asm", "run", ".", "-dir", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	want, got := assemblyIn(t, "."), assemblyIn(t, dir)
	if len(want) == 0 {
		t.Fatal("no assembly here")
	}
	for name := range want {
		if !bytes.Equal(want[name], got[name]) {
			t.Errorf("%s is not what the generator writes: go generate ./xts", name)
		}
	}
	for name := range got {
		if want[name] == nil {
			t.Errorf("%s is missing: go generate ./xts", name)
		}
	}
}

// TestCosts runs the measurement that the generator's comments refer to.
func TestCosts(t *testing.T) {
	out, err := exec.Command("go", "-C", "_asm", "run", ".", "-costs").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"zmm", "ymm", "xmm", "VPCLMULQDQ", "SARXQ"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
}

// assemblyIn returns the content of all assembly below dir.
func assemblyIn(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	err := fs.WalkDir(os.DirFS(dir), ".", func(name string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, ".s") {
			return err
		}
		files[name], err = os.ReadFile(filepath.Join(dir, name))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}
