package vmtest

import (
	"errors"
	"fmt"
	"os"
)

// A Disk is a disk of a guest: a raw image file, or an NBD export.
type Disk struct {
	Serial   string // what the guest finds it by, in /sys/block; at most 20 bytes
	NVMe     bool   // instead of a virtio disk: it has writes with FUA
	Path     string // of a raw image
	Socket   string // instead of Path: Unix socket of an NBD server
	ReadOnly bool
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
