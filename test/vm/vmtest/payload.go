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

// Sparse creates a file of size bytes that are all hole.
func Sparse(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("vmtest: creating a disk image: %w", err)
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// CopySparse copies a file and leaves holes where the source has zeros.
func CopySparse(dst, src string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("vmtest: copying an image: %w", err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return fmt.Errorf("vmtest: copying an image: %w", err)
	}
	out, err := os.Create(dst)
	if err != nil {
		return fmt.Errorf("vmtest: copying an image: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	var zero [64 << 10]byte
	buf := make([]byte, len(zero))
	for off := int64(0); off < info.Size(); {
		n, err := in.ReadAt(buf, off)
		if n == 0 && err != nil {
			return fmt.Errorf("vmtest: copying %s at %d: %w", src, off, err)
		}
		if string(buf[:n]) != string(zero[:n]) {
			if _, err := out.WriteAt(buf[:n], off); err != nil {
				return fmt.Errorf("vmtest: copying to %s at %d: %w", dst, off, err)
			}
		}
		off += int64(n)
	}
	if err := out.Truncate(info.Size()); err != nil {
		return fmt.Errorf("vmtest: copying to %s: %w", dst, err)
	}
	return nil
}

// Programs builds hostcryptd and the guest program into dir, static, and
// returns their paths. $HOSTCRYPTD_BIN names a hostcryptd to take instead.
// The working directory must be inside of the module.
func Programs(ctx context.Context, dir string) (hostcryptd, guest string, err error) {
	guest = filepath.Join(dir, "guest")
	if err := build(ctx, guest, "hostcryptd/test/vm/guest"); err != nil {
		return "", "", err
	}
	if bin := os.Getenv("HOSTCRYPTD_BIN"); bin != "" {
		bin, err = filepath.Abs(bin)
		return bin, guest, err
	}
	hostcryptd = filepath.Join(dir, "hostcryptd")
	return hostcryptd, guest, build(ctx, hostcryptd, "hostcryptd/cmd/hostcryptd")
}

func build(ctx context.Context, out, pkg string) error {
	_, err := run(ctx, "", []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-o", out, pkg)
	return err
}
