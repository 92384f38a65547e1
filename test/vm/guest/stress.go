package main

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A fileModel does random operations on a file and knows what the file must hold
// then, as fsx of the xfstests does. It belongs to one goroutine.
type fileModel struct {
	name   string
	rand   *rand.Rand
	cached *os.File
	direct *os.File
	want   []byte
	ops    int
}

const (
	modelSize  = 2 << 20
	modelFiles = 4 // at the same time
	modelAlign = 4096
)

func newFileModel(name string, seed uint64) (*fileModel, error) {
	f := &fileModel{name: name, rand: rand.New(rand.NewPCG(seed, 3))}
	return f, f.open()
}

func (f *fileModel) open() (err error) {
	if f.cached, err = os.OpenFile(f.name, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	f.direct, err = os.OpenFile(f.name, os.O_RDWR|unix.O_DIRECT, 0)
	return err
}

func (f *fileModel) close() error { return errors.Join(f.cached.Close(), f.direct.Close()) }

// span is a random part of a file of so many bytes.
func (f *fileModel) span(size, align int) (off, n int) {
	off = f.rand.IntN(size) / align * align
	n = 1 + f.rand.IntN(min(size-off, 1<<(8+f.rand.IntN(11))))
	return off, (n + align - 1) / align * align
}

// grow makes what the file must hold at least n bytes.
func (f *fileModel) grow(n int) {
	if n > len(f.want) {
		f.want = append(f.want, make([]byte, n-len(f.want))...)
	}
}

func (f *fileModel) random(n int) []byte {
	// Aligned as O_DIRECT wants it, whoever uses it.
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
	if err != nil {
		panic(err)
	}
	var seed [32]byte
	seed[0], seed[1], seed[2] = byte(f.ops), byte(f.ops>>8), byte(f.rand.Uint32())
	rand.NewChaCha8(seed).Read(b) // never fails
	return b
}

// step does one operation.
func (f *fileModel) step() (err error) {
	f.ops++
	op := f.rand.IntN(12)
	switch op {
	case 0, 1, 2: // write through the page cache
		off, n := f.span(modelSize, 1)
		b := f.random(n)
		defer unix.Munmap(b)
		if _, err = f.cached.WriteAt(b, int64(off)); err == nil {
			f.grow(off + n)
			copy(f.want[off:], b)
		}
	case 3, 4: // write past it
		off, n := f.span(modelSize, modelAlign)
		b := f.random(n)
		defer unix.Munmap(b)
		if _, err = f.direct.WriteAt(b, int64(off)); err == nil {
			f.grow(off + n)
			copy(f.want[off:], b)
		}
	case 5: // write through a mapping
		if len(f.want) == 0 {
			return nil
		}
		off, n := f.span(len(f.want), 1)
		n = min(n, len(f.want)-off)
		from := off / modelAlign * modelAlign
		m, err := unix.Mmap(int(f.cached.Fd()), int64(from), off+n-from, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		if err != nil {
			return fmt.Errorf("mmap: %w", err)
		}
		b := f.random(n)
		copy(m[off-from:], b)
		copy(f.want[off:], b)
		return errors.Join(unix.Munmap(b), unix.Munmap(m))
	case 6: // another size
		n := f.rand.IntN(modelSize)
		if err = f.cached.Truncate(int64(n)); err == nil {
			f.want = f.want[:min(n, len(f.want))]
			// What append leaves behind the end isn't zero.
			f.want = append(f.want, make([]byte, n-len(f.want))...)
		}
	case 7, 8: // a hole, or zeros
		if len(f.want) == 0 {
			return nil
		}
		off, n := f.span(len(f.want), 1)
		n = min(n, len(f.want)-off)
		mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
		if op == 8 {
			mode = unix.FALLOC_FL_ZERO_RANGE
		}
		if err = unix.Fallocate(int(f.cached.Fd()), mode, int64(off), int64(n)); err == nil {
			clear(f.want[off : off+n])
		}
	case 9:
		err = f.cached.Sync()
	case 10: // read it as it is on the disk
		if err = f.cached.Sync(); err == nil {
			err = unix.Fadvise(int(f.cached.Fd()), 0, 0, unix.FADV_DONTNEED)
		}
		if err == nil {
			err = f.verify()
		}
	case 11: // read a part past the page cache
		if len(f.want) < modelAlign {
			return nil
		}
		off, n := f.span(len(f.want), modelAlign)
		b := f.random(n)
		defer unix.Munmap(b)
		var got int
		if got, err = f.direct.ReadAt(b, int64(off)); err != nil && got != len(f.want)-off {
			break
		}
		err = nil
		if want := f.want[off:min(off+n, len(f.want))]; !bytes.Equal(b[:got], want) {
			err = fmt.Errorf("%d bytes at %d, read past the page cache, are not those that were written", len(want), off)
		}
	}
	if err != nil {
		err = fmt.Errorf("%s: operation %d (kind %d): %w", filepath.Base(f.name), f.ops, op, err)
	}
	return err
}

func (f *fileModel) verify() error {
	got, err := os.ReadFile(f.name)
	if err != nil {
		return err
	}
	if bytes.Equal(got, f.want) {
		return nil
	}
	for i := range min(len(got), len(f.want)) {
		if got[i] != f.want[i] {
			return fmt.Errorf("byte %d is %#x, want %#x, of %d bytes", i, got[i], f.want[i], len(f.want))
		}
	}
	return fmt.Errorf("%d bytes, want %d", len(got), len(f.want))
}

// churn makes, links, renames and removes small files and folders until it is
// told to end, as fsstress does, and returns how often. What is wrong then, the
// file system's own checker finds.
func churn(dir string, seed uint64, end <-chan struct{}) (n int, err error) {
	r := rand.New(rand.NewPCG(seed, 4))
	name := func() string { return filepath.Join(dir, strconv.Itoa(r.IntN(8)), strconv.Itoa(r.IntN(64))) }
	// Names are random, and there is another worker: with these, nothing is wrong.
	fine := []error{unix.ENOENT, unix.EEXIST, unix.ENOTEMPTY, unix.EISDIR, unix.ENOTDIR, unix.EPERM, unix.ELOOP, unix.EINVAL}
	for i := range 8 {
		if err := os.MkdirAll(filepath.Join(dir, strconv.Itoa(i)), 0o755); err != nil {
			return 0, err
		}
	}
	for ; ; n++ {
		select {
		case <-end:
			return n, nil
		default:
		}
		switch r.IntN(8) {
		case 0, 1, 2:
			err = os.WriteFile(name(), make([]byte, r.IntN(20000)), 0o600)
		case 3:
			err = os.Rename(name(), name())
		case 4:
			err = os.Link(name(), name())
		case 5:
			err = os.Symlink(name(), name())
		case 6:
			err = os.Mkdir(name(), 0o755)
		case 7:
			err = os.RemoveAll(name())
		}
		for _, f := range fine {
			if errors.Is(err, f) {
				err = nil
			}
		}
		if err != nil {
			return n, err
		}
	}
}

// stress does random operations on files and folders of ext4 and xfs on a volume
// with discards, for a time, and compares with what they must hold.
func stress(m *machine) error {
	limit, err := time.ParseDuration(m.params["time"])
	if err != nil {
		return fmt.Errorf("parameter time: %w", err)
	}
	for _, fstype := range []string{"ext4", "xfs"} {
		c, err := m.cutVolume(fstype)
		if err != nil {
			return err
		}
		if err := c.open("--discard"); err != nil {
			return err
		}
		if _, err := m.run("mkfs."+fstype, "-q", c.server.dev); err != nil {
			return err
		}
		if err := c.mount(); err != nil {
			return err
		}
		files, err := m.stressFiles(c, limit)
		if err != nil {
			return fmt.Errorf("%s: %w", fstype, err)
		}
		if err := m.unmount(); err != nil {
			return err
		}
		if err := c.fsck(); err != nil {
			return err
		}
		// Another server, another mount: what is there comes from the disk.
		if err := c.server.detach(); err != nil {
			return err
		}
		if err := errors.Join(c.open(), c.mount()); err != nil {
			return err
		}
		for _, f := range files {
			if err := f.verify(); err != nil {
				return fmt.Errorf("%s: %s after a new mount: %w", fstype, f.name, err)
			}
		}
		if err := errors.Join(m.unmount(), c.server.detach()); err != nil {
			return err
		}
	}
	return nil
}

// stressFiles is the load on one file system.
func (m *machine) stressFiles(c *cutVolume, limit time.Duration) ([]*fileModel, error) {
	var (
		files = make([]*fileModel, modelFiles)
		errs  = make([]error, modelFiles+2)
		work  sync.WaitGroup
		end   = make(chan struct{})
		begun = time.Now()
		tree  [2]int
	)
	for i := range files {
		f, err := newFileModel(filepath.Join(m.mnt, fmt.Sprintf("model%d", i)), c.seed+uint64(i))
		if err != nil {
			return nil, err
		}
		files[i] = f
		work.Go(func() {
			for errs[i] == nil && time.Since(begun) < limit {
				errs[i] = f.step()
			}
		})
	}
	for i := range tree {
		work.Go(func() { tree[i], errs[modelFiles+i] = churn(filepath.Join(m.mnt, "tree"), c.seed+uint64(i), end) })
	}
	trims := 0
	for time.Since(begun) < limit {
		time.Sleep(limit / 5)
		if err := fstrim(m.mnt); err != nil {
			errs = append(errs, fmt.Errorf("fstrim: %w", err))
			break
		}
		trims++
	}
	close(end)
	work.Wait()
	ops := 0
	for _, f := range files {
		ops += f.ops
		errs = append(errs, f.verify(), f.close())
	}
	m.figure(c.fstype+" file operations", float64(ops), "")
	m.figure(c.fstype+" tree operations", float64(tree[0]+tree[1]), "")
	m.figure(c.fstype+" trims", float64(trims), "")
	return files, errors.Join(errs...)
}
