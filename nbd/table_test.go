package nbd_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestProtocolTable: the tests that PROTOCOL.md names exist, and so do the
// cases, and no test of the protocol is left out of it.
func TestProtocolTable(t *testing.T) {
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	source := map[string]string{} // of the test
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?ms)^func ((?:Test|Fuzz)\w+)\(.*?^}`).FindAllStringSubmatch(string(b), -1) {
			source[m[1]] = m[0]
		}
	}
	doc, err := os.ReadFile("PROTOCOL.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{}
	cell := regexp.MustCompile(`(?:Test|Fuzz)\w+(?: "[^"]+")*`)
	for line := range strings.Lines(string(doc)) {
		columns := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), " | ")
		if !strings.HasPrefix(line, "|") || len(columns) != 2 || strings.HasPrefix(columns[1], "tests") {
			continue
		}
		rest := columns[1]
		for _, entry := range cell.FindAllString(columns[1], -1) {
			rest = strings.Replace(rest, entry, "", 1)
			name, cases, _ := strings.Cut(entry, " ")
			listed[name] = true
			if source[name] == "" {
				t.Errorf("%s: there is no test %s", columns[0], name)
			}
			for _, c := range regexp.MustCompile(`"[^"]+"`).FindAllString(cases, -1) {
				if !strings.Contains(source[name], c) {
					t.Errorf("%s: %s has no case %s", columns[0], name, c)
				}
			}
		}
		if rest = strings.Trim(rest, " ,"); rest != "" || !cell.MatchString(columns[1]) {
			t.Errorf("%s: not understood: %q", columns[0], columns[1])
		}
	}
	if len(listed) < 40 {
		t.Errorf("only %d tests are listed", len(listed))
	}
	other := map[string]bool{"TestMain": true, "TestFaultsLogged": true, "TestProtocolTable": true, "TestEngine": true, "TestEngineChoice": true, "TestStats": true,
		"TestSocket": true, "TestSocketDeadline": true, "TestSocketShutdown": true, "TestPollerIsLeftAlone": true, "TestSlowOrLate": true, "TestBacklog": true, "TestKernelZeroes": true}
	for name := range source {
		if !listed[name] && !other[name] {
			t.Errorf("%s is not in PROTOCOL.md", name)
		}
	}
}
