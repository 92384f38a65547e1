package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// layers lists every package, and the packages of this module that it may
// import. It is the diagram in README.md in a form that can fail. Test doubles
// may be imported by tests only.
var layers = map[string][]string{
	"cmd/hostcryptd": {"keyunseal", "keyunseal/audit", "keyunseal/lifecycle", "nbd", "nbd/nbdnl", "sector", "sector/luks2", "systemd", "xts"},

	"keyunseal":    {},
	"nbd":          {"nbd/uring"},
	"nbd/uring":    {},
	"nbd/nbdnl":    {},
	"sector":       {"sector/luks2", "xts"},
	"sector/luks2": {},
	"systemd":      {},
	"xts":          {},

	"keyunseal/internal/fleet": {"keyunseal/lifecycle"},
	"keyunseal/vaulttest":      {},
	"keyunseal/audit":          {},
	"keyunseal/lifecycle":      {},
	"nbd/nbdtest":              {"nbd"},
	"sector/sectortest":        {},

	"xts/internal/ceiling": {},
	"xts/internal/bench":   {"xts", "xts/internal/ceiling"},

	"test/bench":             {},
	"test/bench/gonbd":       {},
	"test/bench/passthrough": {"nbd"},

	"test/vm/demo":     {"test/vm/report", "test/vm/vmtest"},
	"test/vm/evidence": {},
	"test/vm/guest":    {"keyunseal/vaulttest", "test/vm/evidence", "test/vm/report", "test/vm/vmtest"},
	"test/vm/report":   {},
	"test/vm/vmtest":   {"test/vm/report"},
	"test/vm":          {"test/vm/evidence", "test/vm/report", "test/vm/vmtest"},
}

// goList runs go list with a template over all packages of the module.
func goList(t *testing.T, template string, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", slices.Concat([]string{"list", "-tags", "vm", "-f", template}, args, []string{"hostcryptd/..."})...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v", cmd, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestLayers(t *testing.T) {
	for _, line := range goList(t, `{{.ImportPath}} {{join .Imports " "}}`) {
		pkgs := strings.Fields(line)
		name := strings.TrimPrefix(pkgs[0], "hostcryptd/")
		allowed, ok := layers[name]
		if !ok {
			t.Errorf("package %s has no place in layers", name)
			continue
		}
		for _, p := range pkgs[1:] {
			if p, ours := strings.CutPrefix(p, "hostcryptd/"); ours && !slices.Contains(allowed, p) {
				t.Errorf("%s must not import %s", name, p)
			}
		}
	}
}

// TestPackageDocs checks that each package says what it is.
func TestPackageDocs(t *testing.T) {
	for _, line := range goList(t, `{{.ImportPath}}:{{.Doc}}`) {
		if name, doc, _ := strings.Cut(line, ":"); doc == "" {
			t.Errorf("package %s has no documentation", name)
		}
	}
}

// TestProductImports keeps what only tests need out of the binary.
func TestProductImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "hostcryptd/cmd/hostcryptd").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		if p := strings.TrimSpace(line); p == "testing" || strings.HasPrefix(p, "hostcryptd/") && strings.HasSuffix(p, "test") {
			t.Errorf("the binary contains package %s", p)
		}
	}
}
