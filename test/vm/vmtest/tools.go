package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// ToolsDisk makes an ext4 image with tools of this host, see [Tool], in /bin and
// all the libraries they are linked with in /lib. It's for tools that are too
// large for the initramfs, which is in memory twice: fio with what Debian links
// it with has 80 MB, of which a run reads a few. The guest runs one as
// /lib/ld-*.so --library-path /lib /bin/NAME.
func ToolsDisk(ctx context.Context, image string, names ...string) (err error) {
	dir, err := os.MkdirTemp(filepath.Dir(image), "tools-")
	if err != nil {
		return fmt.Errorf("vmtest: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	size := int64(0)
	link := func(sub, path string) error {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		to := filepath.Join(dir, sub, filepath.Base(path))
		if _, err := os.Stat(to); err == nil {
			return nil
		}
		b, err := os.ReadFile(target)
		if err != nil {
			return err
		}
		size += int64(len(b)+4095) &^ 4095
		return os.WriteFile(to, b, 0o755)
	}
	for _, sub := range []string{"bin", "lib"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return fmt.Errorf("vmtest: %w", err)
		}
	}
	for _, name := range names {
		program, err := Tool(name)
		if err != nil {
			return err
		}
		libs, err := libraries(ctx, program)
		if err != nil {
			return err
		}
		if err := link("bin", program); err != nil {
			return fmt.Errorf("vmtest: %w", err)
		}
		for _, lib := range libs {
			if err := link("lib", lib); err != nil {
				return fmt.Errorf("vmtest: %w", err)
			}
		}
	}
	if err := Sparse(image, 0); err != nil {
		return err
	}
	_, err = Run(ctx, "", "mkfs.ext4", "-q", "-O", "^has_journal", "-d", dir, image, strconv.FormatInt(size*5/4>>10+4096, 10)+"k")
	return err
}
