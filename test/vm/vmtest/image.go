package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// An Image is the content of an initramfs. The same content gives the same
// bytes. It is not safe for concurrent use.
type Image struct {
	files map[string]imageFile
	links map[string]string
	dirs  []string
}

// An imageFile is either a file of the host or its bytes.
type imageFile struct {
	host string
	data []byte
	perm uint32
}

// ModuleList is where the guest finds the paths of its modules, one a line,
// in the order to load them.
const ModuleList = "/modules/order"

// newImage returns an Image with the folders that a root file system needs.
func newImage() *Image {
	return &Image{
		files: map[string]imageFile{},
		links: map[string]string{},
		dirs:  []string{"dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var"},
	}
}

// NewFiles returns an Image without folders of its own, to put over a root.
func NewFiles() *Image {
	return &Image{files: map[string]imageFile{}, links: map[string]string{}}
}

// AddFile puts a copy of a file of the host into the image.
func (im *Image) AddFile(name, hostPath string, perm uint32) {
	im.files[clean(name)] = imageFile{host: hostPath, perm: perm}
}

// AddBytes puts a file with this content into the image.
func (im *Image) AddBytes(name string, data []byte, perm uint32) {
	im.files[clean(name)] = imageFile{data: data, perm: perm}
}

// AddSymlink puts a symbolic link into the image.
func (im *Image) AddSymlink(name, target string) { im.links[clean(name)] = target }

// addTree puts the files below a folder of the host into the image.
func (im *Image) addTree(name, dir string) error {
	return filepath.WalkDir(dir, func(p string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		switch e.Type() {
		case 0:
			im.AddFile(path.Join(name, rel), p, uint32(info.Mode().Perm()))
		case fs.ModeSymlink:
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			im.AddSymlink(path.Join(name, rel), target)
		}
		return nil
	})
}

// AddFrom puts files of another image into the image. It panics if they are not
// there.
func (im *Image) AddFrom(from *Image, names ...string) {
	for _, name := range names {
		f, ok := from.files[clean(name)]
		if !ok {
			panic("vmtest: AddFrom: no file " + name)
		}
		im.files[clean(name)] = f
	}
}

// addProgram puts a program of the host and the shared libraries it is
// linked with into the image, the program at name.
func (im *Image) addProgram(ctx context.Context, name, hostPath string) error {
	libs, err := libraries(ctx, hostPath)
	if err != nil {
		return err
	}
	im.AddFile(name, hostPath, 0o755)
	for _, lib := range libs {
		im.AddFile(lib, lib, 0o755)
		if !strings.HasPrefix(filepath.Base(lib), "libc.so.") {
			continue
		}
		// glibc opens this one by name when a thread is canceled or exits,
		// which the argon2 threads of cryptsetup do, and aborts without it.
		gcc := filepath.Join(filepath.Dir(lib), "libgcc_s.so.1")
		if _, err := os.Stat(gcc); err != nil {
			return fmt.Errorf("vmtest: library for threads (install the Debian package libgcc-s1): %w", err)
		}
		im.AddFile(gcc, gcc, 0o755)
	}
	return nil
}

// addTools puts tools of the host, see [Tool], into /bin.
func (im *Image) addTools(ctx context.Context, names ...string) error {
	for _, name := range names {
		hostPath, err := Tool(name)
		if err != nil {
			return err
		}
		if err := im.addProgram(ctx, path.Join("/bin", name), hostPath); err != nil {
			return err
		}
	}
	return nil
}

// addModules puts modules of a kernel and what they depend on into the
// image, uncompressed, with [ModuleList].
func (im *Image) addModules(ctx context.Context, k *Kernel, names ...string) error {
	order, err := k.modules.order(names...)
	if err != nil {
		return err
	}
	var list bytes.Buffer
	for _, p := range order {
		data, err := k.modules.read(ctx, p)
		if err != nil {
			return err
		}
		name := path.Join(path.Dir(ModuleList), moduleName(p)+".ko")
		im.AddBytes(name, data, 0o644)
		fmt.Fprintln(&list, name)
	}
	im.AddBytes(ModuleList, list.Bytes(), 0o644)
	return nil
}

func (im *Image) clone() *Image {
	return &Image{files: maps.Clone(im.files), links: maps.Clone(im.links), dirs: im.dirs}
}

// addBelow adds the content of another image. Of two entries with one name
// the later one counts.
func (im *Image) addBelow(dir string, files *Image) {
	for name, f := range files.files {
		name = clean(path.Join(dir, name))
		im.files[name] = f
		delete(im.links, name)
	}
	for name, target := range files.links {
		name = clean(path.Join(dir, name))
		im.links[name] = target
		delete(im.files, name)
	}
}

// WriteFile writes the initramfs.
func (im *Image) WriteFile(name string) (err error) {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("vmtest: creating the initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := bufio.NewWriterSize(f, 1<<20)
	a := newArchive(w)
	for _, d := range im.dirs {
		a.dir(d)
	}
	for _, name := range slices.Sorted(maps.Keys(im.files)) {
		if err := addTo(a, name, im.files[name]); err != nil {
			return err
		}
	}
	for _, name := range slices.Sorted(maps.Keys(im.links)) {
		a.symlink(name, im.links[name])
	}
	if err := a.close(); err != nil {
		return err
	}
	return w.Flush()
}

func addTo(a *archive, name string, file imageFile) error {
	if file.host == "" {
		a.file(name, file.perm, bytes.NewReader(file.data), int64(len(file.data)))
		return nil
	}
	f, err := os.Open(file.host)
	if err != nil {
		return fmt.Errorf("vmtest: reading %s for the initramfs: %w", name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("vmtest: reading %s for the initramfs: %w", name, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("vmtest: %s for the initramfs: %w: not a regular file", file.host, fs.ErrInvalid)
	}
	a.file(name, file.perm, f, info.Size())
	return nil
}

// libraries asks ldd which shared libraries a program loads, its loader
// included. It is empty for a static program.
func libraries(ctx context.Context, program string) ([]string, error) {
	out, err := Run(ctx, "", "ldd", program)
	if err != nil && (strings.Contains(err.Error(), "not a dynamic executable") || strings.Contains(string(out), "not a dynamic executable")) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return parseLDD(program, string(out))
}

// parseLDD reads lines of three forms:
//
//	linux-vdso.so.1 (0x00007ffc...)
//	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f...)
//	/lib64/ld-linux-x86-64.so.2 (0x00007f...)
func parseLDD(program, out string) ([]string, error) {
	var libs []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if strings.HasSuffix(line, "=> not found") {
			return nil, fmt.Errorf("vmtest: libraries of %s: %s", program, line)
		}
		if name, target, ok := strings.Cut(line, " => "); ok {
			line = target
			if !strings.HasPrefix(line, "/") {
				return nil, fmt.Errorf("vmtest: libraries of %s: no path for %s in %q", program, name, line)
			}
		}
		if !strings.HasPrefix(line, "/") {
			continue // the vdso, or "statically linked"
		}
		lib, _, ok := strings.Cut(line, " (0x")
		if !ok {
			return nil, fmt.Errorf("vmtest: libraries of %s: no address in %q", program, line)
		}
		libs = append(libs, lib)
	}
	return libs, nil
}
