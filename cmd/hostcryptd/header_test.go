package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
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

// TestWriteWholeNames: a file system whose directories can't be flushed takes a backup;
// that flushing one fails is told, and the file stays.
func TestWriteWholeNames(t *testing.T) {
	defer func(was func(*os.File) error) { fsyncDir = was }(fsyncDir)
	for _, errno := range []unix.Errno{unix.EINVAL, unix.EOPNOTSUPP, unix.ENOSYS, unix.EIO} {
		fsyncDir = func(d *os.File) error { return &os.PathError{Op: "sync", Path: d.Name(), Err: errno} }
		name := filepath.Join(t.TempDir(), "backup")
		err := writeWhole(name, func(f *os.File) error {
			_, err := f.WriteString("whole")
			return err
		})
		if b, rerr := os.ReadFile(name); string(b) != "whole" {
			t.Errorf("%v: the file has %q, %v", errno, b, rerr)
		}
		if errno != unix.EIO && err != nil || errno == unix.EIO && (!errors.Is(err, unix.EIO) || errors.Is(err, os.ErrNotExist)) {
			t.Errorf("%v: writeWhole() = %v", errno, err)
		}
	}
}

// TestWriteWholeAnywhere: also on file systems that can't rename to a new name, or have
// no links, no file that exists is replaced and no half of a new one is left.
func TestWriteWholeAnywhere(t *testing.T) {
	all := newNames
	defer func() { newNames = all }()
	without := func(errno unix.Errno) func(from, to string) error {
		return func(from, to string) error { return &os.LinkError{Op: "link", Old: from, New: to, Err: errno} }
	}
	for what, ways := range map[string][]func(from, to string) error{
		"all":                  all,
		"links":                {without(unix.EINVAL), linkNew, replaceOwn},
		"neither":              {without(unix.EINVAL), without(unix.EPERM), replaceOwn},
		"neither, of FUSE":     {without(unix.ENOSYS), without(unix.EOPNOTSUPP), replaceOwn},
		"neither, and no room": {without(unix.EINVAL), without(unix.EPERM), without(unix.ENOSPC)},
	} {
		newNames = ways
		dir := t.TempDir()
		name := filepath.Join(dir, "backup")
		files := func() (list string) {
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				b, err := os.ReadFile(filepath.Join(dir, e.Name()))
				if err != nil {
					t.Fatal(err)
				}
				list += e.Name() + "=" + string(b) + " "
			}
			return list
		}
		write := func(text string, during func()) error {
			return writeWhole(name, func(f *os.File) error {
				_, err := f.WriteString(text)
				during()
				return err
			})
		}
		err := write("new", func() {
			if list := files(); strings.Contains(list, "backup= ") || strings.Contains(list, " backup=") {
				t.Errorf("%s: while it's written there is %q", what, list)
			}
		})
		if strings.Contains(what, "no room") {
			if list := files(); !errors.Is(err, unix.ENOSPC) || list != "" {
				t.Errorf("%s: %v, files %q", what, err, list)
			}
			continue
		}
		if list := files(); err != nil || list != "backup=new " {
			t.Errorf("%s: %v, files %q", what, err, list)
		}
		if err := write("newer", func() {}); !errors.Is(err, os.ErrExist) || files() != "backup=new " {
			t.Errorf("%s, a file that exists: %v, files %q", what, err, files())
		}
		// One that somebody makes meanwhile.
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
		err = write("new", func() {
			if err := os.WriteFile(name, []byte("other"), 0o600); err != nil {
				t.Error(err)
			}
		})
		if !errors.Is(err, os.ErrExist) || files() != "backup=other " {
			t.Errorf("%s, a file that is made meanwhile: %v, files %q", what, err, files())
		}
	}
	// The last step of the last way fails.
	name := filepath.Join(t.TempDir(), "backup")
	if err := replaceOwn(name+".none", name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("replaceOwn() = %v", err)
	}
	if _, err := os.Stat(name); err == nil {
		t.Error("an empty file is left")
	}
}
