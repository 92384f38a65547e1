package vmtest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// A RootTree is the root file system of a [System] as a folder, so that a program of
// its own can run in it: to make an initramfs, above all.
type RootTree struct {
	Dir string
	tmp string
}

// NewTree makes a root file system in a folder, with the kernel, what every
// machine gets and the files given. Remove it in the end.
func (s *System) NewTree(ctx context.Context, files *Image) (_ *RootTree, err error) {
	tmp, err := os.MkdirTemp(s.lab.Dir, "tree-")
	if err != nil {
		return nil, fmt.Errorf("vmtest: %w", err)
	}
	t := &RootTree{Dir: filepath.Join(tmp, "root"), tmp: tmp}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Remove(ctx))
		}
	}()
	if err := os.Mkdir(t.Dir, 0o755); err != nil {
		return nil, err
	}
	if err := fillRoot(ctx, t.Dir, filepath.Join(filepath.Dir(s.root), "root.tar"), s.lab.Kernel); err != nil {
		return nil, err
	}
	over := NewFiles()
	for _, im := range []*Image{s.base, files} {
		over.addBelow("/", im)
	}
	cpio := filepath.Join(tmp, "over.cpio")
	if err := over.WriteFile(cpio); err != nil {
		return nil, err
	}
	_, err = asRoot(ctx, "sh", "-c", `cd "$1" && cpio --quiet -idmu <"$2"`, "sh", t.Dir, cpio)
	return t, err
}

// Run runs a shell command in the tree, as root, and returns what it printed.
func (t *RootTree) Run(ctx context.Context, command string) ([]byte, error) {
	// The host's /dev and /proc, in a mount namespace that ends with the command.
	return asRoot(ctx, "unshare", "--mount", "--propagation", "private", "sh", "-c",
		`for d in dev proc; do mount --rbind "/$d" "$1/$d" || exit; done
		PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C exec chroot "$1" sh -c "$2" 2>&1`, "sh", t.Dir, command)
}

// CopyOut copies a file of the tree to the host.
func (t *RootTree) CopyOut(ctx context.Context, name, to string) error {
	b, err := asRoot(ctx, "cat", filepath.Join(t.Dir, name))
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o644)
}

// Image writes the tree as an ext4 file system of so many bytes.
func (t *RootTree) Image(ctx context.Context, name string, size int64) error {
	if err := Sparse(name, size); err != nil {
		return err
	}
	return mkfsRoot(ctx, name, t.Dir)
}

// Remove removes the tree.
func (t *RootTree) Remove(ctx context.Context) error {
	_, err := asRoot(context.WithoutCancel(ctx), "rm", "-rf", t.tmp)
	return err
}
