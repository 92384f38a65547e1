package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

// TestVerify checks that the check of the files fails when it must: every
// scenario depends on it.
func TestVerify(t *testing.T) {
	tests := []struct {
		name    string
		spoil   func(dir string) error
		wantErr string
	}{
		{name: "unchanged", spoil: func(string) error { return nil }},
		{name: "changed", wantErr: "b has changed", spoil: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "files", "b"), []byte("two!"), 0o644)
		}},
		{name: "missing", wantErr: "2 of 3 files are there", spoil: func(dir string) error {
			return os.Remove(filepath.Join(dir, "files", "a"))
		}},
		{name: "one too many", wantErr: "files/c was never written", spoil: func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "files", "c"), nil, 0o644)
		}},
		{name: "empty", wantErr: "0 of 3 files are there", spoil: func(dir string) error {
			return os.RemoveAll(filepath.Join(dir))
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			m := &machine{
				Writer: report.NewWriter(io.Discard, func() time.Duration { return 0 }),
				state:  t.TempDir(),
				mnt:    filepath.Join(t.TempDir(), "mnt"),
			}
			man := manifest{}
			for name, text := range map[string]string{"files/a": "one", "files/b": "two", "canary.txt": "x"} {
				if _, err := write(m.mnt, name, strings.NewReader(text)); err != nil {
					t.Fatal(err)
				}
				man[name] = fmt.Sprintf("%x", sha256.Sum256([]byte(text)))
			}
			if err := os.WriteFile(m.manifestPath(), man.format(), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := tt.spoil(m.mnt); err != nil {
				t.Fatal(err)
			}
			if tt.name == "empty" {
				if err := os.Mkdir(m.mnt, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			err := m.verify()
			if tt.wantErr == "" && err != nil {
				t.Fatal(err)
			}
			if tt.wantErr != "" && (err == nil || !strings.Contains(err.Error(), tt.wantErr)) {
				t.Errorf("verify: %v, want %q in it", err, tt.wantErr)
			}
		})
	}
}

// TestUnpack unpacks what vmtest packed.
func TestUnpack(t *testing.T) {
	dir := t.TempDir()
	tree, err := vmtest.Payload(t.Context(), filepath.Join(dir, "p.tar"), 6<<20)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{
		Writer:  report.NewWriter(io.Discard, func() time.Duration { return 0 }),
		payload: tree.Path,
		mnt:     dir,
	}
	n, sums, err := m.unpack()
	if err != nil {
		t.Fatal(err)
	}
	if n != tree.Bytes || len(sums) != len(tree.Files) {
		t.Errorf("unpacked %d bytes in %d files, want %d in %d", n, len(sums), tree.Bytes, len(tree.Files))
	}
	for name, sum := range tree.Files {
		if _, err := sums.check(dir, filepath.Join("files", name)); err != nil {
			t.Error(err)
		}
		if sums[filepath.Join("files", name)] != sum {
			t.Errorf("sum of %s is %s, want %s", name, sums[name], sum)
		}
	}
}

func TestParseManifest(t *testing.T) {
	man := manifest{"a b": fmt.Sprintf("%x", sha256.Sum256(nil)), "c": fmt.Sprintf("%x", sha256.Sum256([]byte("c")))}
	got, err := parseManifest(bytes.NewReader(man.format()), "")
	if err != nil || len(got) != 2 || got["a b"] != man["a b"] || got["c"] != man["c"] {
		t.Errorf("parseManifest = %v, %v, want %v", got, err, man)
	}
	for _, bad := range []string{"1234  short\n", "no sum\n", "\n"} {
		if got, err := parseManifest(strings.NewReader(bad), ""); err == nil {
			t.Errorf("parseManifest(%q) = %v, want an error", bad, got)
		}
	}
}
