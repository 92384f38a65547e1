package vmtest

import (
	"fmt"
	"io"
	"math"
	"path"
	"strings"
)

// An archive writes a cpio archive of the form "newc", which the kernel
// unpacks as its first root file system (Documentation/driver-api/
// early-userspace/buffer-format.rst). The same calls give the same bytes:
// owner, times and device numbers are zero and inodes are counted.
//
// Folders that a name is in are added before it. It is not safe for
// concurrent use.
type archive struct {
	w    io.Writer
	off  int64
	ino  uint32
	dirs map[string]bool
	err  error // the first one; nothing is written after it
}

// File types, in the mode of a cpio entry.
const (
	modeDir     = 0o040000
	modeFile    = 0o100000
	modeSymlink = 0o120000
)

func newArchive(w io.Writer) *archive {
	return &archive{w: w, dirs: map[string]bool{"": true}}
}

// dir adds a folder and those it is in, unless they are there.
func (a *archive) dir(name string) {
	name = clean(name)
	if a.dirs[name] {
		return
	}
	a.parents(name)
	a.dirs[name] = true
	a.entry(name, modeDir|0o755, 2, 0)
}

// file adds a file of exactly size bytes.
func (a *archive) file(name string, perm uint32, r io.Reader, size int64) {
	name = clean(name)
	if size < 0 || size > math.MaxUint32 {
		a.fail(fmt.Errorf("vmtest: %s has %d bytes: a cpio archive holds files below 4 GiB", name, size))
		return
	}
	a.parents(name)
	a.entry(name, modeFile|perm&0o7777, 1, uint32(size))
	if a.err != nil {
		return
	}
	n, err := io.CopyN(a.w, r, size)
	a.off += n
	if err != nil {
		a.fail(fmt.Errorf("vmtest: copying %s into the archive: %w", name, err))
	}
	a.pad()
}

// symlink adds a symbolic link.
func (a *archive) symlink(name, target string) {
	name = clean(name)
	a.parents(name)
	a.entry(name, modeSymlink|0o777, 1, uint32(len(target)))
	a.write([]byte(target))
	a.pad()
}

// close ends the archive and returns the first error of any call.
func (a *archive) close() error {
	a.ino = 0
	a.header("TRAILER!!!", 0, 1, 0)
	return a.err
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (a *archive) parents(name string) {
	if dir, _ := path.Split(name); dir != "" {
		a.dir(dir)
	}
}

func (a *archive) entry(name string, mode, links, size uint32) {
	a.ino++
	a.header(name, mode, links, size)
}

// header writes the 110 bytes of an entry, its name, and zeros up to a
// multiple of 4, where the data begins.
func (a *archive) header(name string, mode, links, size uint32) {
	h := []byte("070701")
	for _, v := range []uint32{
		a.ino, mode, 0, 0, links, 0, // inode, mode, user, group, links, time
		size, 0, 0, 0, 0, // device of the file system: major, minor; of the entry: major, minor
		uint32(len(name) + 1), 0, // the name with its zero; checksum: none in this form
	} {
		h = fmt.Appendf(h, "%08x", v)
	}
	a.write(append(append(h, name...), 0))
	a.pad()
}

func (a *archive) pad() { a.write(make([]byte, -a.off&3)) }

func (a *archive) write(p []byte) {
	if a.err != nil {
		return
	}
	n, err := a.w.Write(p)
	a.off += int64(n)
	if err != nil {
		a.fail(fmt.Errorf("vmtest: writing the archive: %w", err))
	}
}

func (a *archive) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}
