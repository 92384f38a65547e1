package vmtest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A Tree is a set of real files, packed as a tar archive for a guest.
type Tree struct {
	Path  string            // of the archive; its size is a multiple of 512, so it can be a disk
	Files map[string]string // name in the archive to SHA-256 in hex
	Bytes int64             // sum of the sizes of the files
}

// Disk gives the archive to a guest.
func (t *Tree) Disk() Disk { return Disk{Serial: "payload", Path: t.Path, ReadOnly: true} }

// Sums is the name of the last file of a [Payload]: the SHA-256 of every
// other file, in the form of sha256sum.
const Sums = "SHA256SUMS"

// Source is a line that occurs in almost every source file of a [Payload]: a
// plaintext to look for.
const Source = "The Go Authors. All rights reserved."

// Payload packs at least size bytes of the Go toolchain, which every host
// that runs these tests has, into an archive at name: a third of its source,
// many small files of text, and the rest of its programs, some large files.
func Payload(ctx context.Context, name string, size int64) (*Tree, error) {
	out, err := Run(ctx, "", "go", "env", "GOROOT", "GOTOOLDIR")
	if err != nil {
		return nil, err
	}
	dirs := strings.Fields(string(out))
	if len(dirs) != 2 {
		return nil, fmt.Errorf("vmtest: go env GOROOT GOTOOLDIR printed %q, want two folders without spaces", out)
	}
	f, err := os.Create(name)
	if err != nil {
		return nil, fmt.Errorf("vmtest: packing files: %w", err)
	}
	defer f.Close()
	t := &Tree{Path: name, Files: map[string]string{}}
	w := tar.NewWriter(f)
	err = errors.Join(
		t.addTree(w, filepath.Join(dirs[0], "src"), "src", size/3),
		t.addTree(w, dirs[1], "tool", size),
		t.addSums(w),
		w.Close(),
	)
	if err != nil {
		return nil, fmt.Errorf("vmtest: packing %s: %w", dirs[0], err)
	}
	if t.Bytes < size {
		return nil, fmt.Errorf("vmtest: %s has only %d bytes of files, want %d", dirs[0], t.Bytes, size)
	}
	return t, nil
}

// addTree adds the files below root, in the order of their names, until the
// tree has size bytes.
func (t *Tree) addTree(w *tar.Writer, root, as string, size int64) error {
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if t.Bytes >= size {
			return fs.SkipAll
		}
		if !d.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		return t.add(w, path, filepath.Join(as, rel))
	})
}

func (t *Tree) add(w *tar.Writer, path, name string) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(data)
	t.Files[name] = hex.EncodeToString(sum[:])
	t.Bytes += int64(len(data))
	return addEntry(w, name, data)
}

func (t *Tree) addSums(w *tar.Writer) error {
	var b bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(t.Files)) {
		fmt.Fprintf(&b, "%s  %s\n", t.Files[name], name)
	}
	return addEntry(w, Sums, b.Bytes())
}

func addEntry(w *tar.Writer, name string, data []byte) error {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o644}
	if err := w.WriteHeader(h); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}
