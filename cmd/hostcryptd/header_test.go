package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestWriteWhole: a backup has its name when all of it is there, and not before.
func TestWriteWhole(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "backup")
	write := func(result error) func(*os.File) error {
		return func(f *os.File) error {
			if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("while it's written: %v", err)
			}
			_, err := f.WriteString("content")
			return errors.Join(err, result)
		}
	}
	if err := writeWhole(name, write(os.ErrDeadlineExceeded)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("writeWhole, interrupted: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("an error has left %v, %v", left, err)
	}
	if err := writeWhole(name, write(nil)); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(name); err != nil || string(b) != "content" {
		t.Errorf("%q, %v", b, err)
	}
	if fi, err := os.Stat(name); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	never := func(*os.File) error { t.Error("begun, though the file exists"); return nil }
	if err := writeWhole(name, never); !errors.Is(err, os.ErrExist) {
		t.Errorf("writeWhole of a file that exists: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
}
