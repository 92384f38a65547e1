package vmtest

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// An entry is what readArchive finds.
type entry struct {
	name             string
	ino, mode, links uint32
	data             string
}

// readArchive is an independent reader of the newc format.
func readArchive(t *testing.T, b []byte) []entry {
	t.Helper()
	var list []entry
	for off := 0; ; {
		if off%4 != 0 || len(b) < off+110 || string(b[off:off+6]) != "070701" {
			t.Fatalf("no header at %d", off)
		}
		field := func(i int) uint32 {
			n, err := strconv.ParseUint(string(b[off+6+8*i:off+14+8*i]), 16, 32)
			if err != nil {
				t.Fatalf("header at %d: %v", off, err)
			}
			return uint32(n)
		}
		for _, zero := range []int{2, 3, 5, 7, 8, 9, 10, 12} { // owner, time, devices, checksum
			if field(zero) != 0 {
				t.Errorf("field %d of the header at %d is %d, want 0", zero, off, field(zero))
			}
		}
		e := entry{ino: field(0), mode: field(1), links: field(4)}
		size, nameSize := int(field(6)), int(field(11))
		name := b[off+110 : off+110+nameSize]
		if name[nameSize-1] != 0 {
			t.Fatalf("the name at %d has no zero at its end", off)
		}
		e.name = string(name[:nameSize-1])
		off = (off + 110 + nameSize + 3) &^ 3
		if e.name == "TRAILER!!!" {
			if off != len(b) {
				t.Errorf("%d bytes after the trailer", len(b)-off)
			}
			return list
		}
		e.data = string(b[off : off+size])
		off = (off + size + 3) &^ 3
		list = append(list, e)
	}
}

func TestArchive(t *testing.T) {
	var b bytes.Buffer
	a := newArchive(&b)
	a.file("/usr/bin/x", 0o755, strings.NewReader("12345"), 5)
	a.file("usr/bin/../empty", 0o600, strings.NewReader(""), 0)
	a.symlink("bin", "usr/bin")
	a.dir("usr")
	a.dir("dev/pts/")
	if err := a.close(); err != nil {
		t.Fatal(err)
	}
	got := readArchive(t, b.Bytes())
	want := []entry{
		{"usr", 1, 0o040755, 2, ""},
		{"usr/bin", 2, 0o040755, 2, ""},
		{"usr/bin/x", 3, 0o100755, 1, "12345"},
		{"usr/empty", 4, 0o100600, 1, ""},
		{"bin", 5, 0o120777, 1, "usr/bin"},
		{"dev", 6, 0o040755, 2, ""},
		{"dev/pts", 7, 0o040755, 2, ""},
	}
	if !slices.Equal(got, want) {
		t.Errorf("archive = %+v\nwant %+v", got, want)
	}
}

// TestArchiveReadByCpio lets another program than the one above read it.
func TestArchiveReadByCpio(t *testing.T) {
	dir := t.TempDir()
	im := newImage()
	im.AddBytes("/init", []byte("#!"), 0o755)
	im.AddBytes("lib/modules/order", bytes.Repeat([]byte("x"), 4097), 0o644)
	im.AddSymlink("sbin", "bin")
	name := filepath.Join(dir, "i.cpio")
	if err := im.WriteFile(name); err != nil {
		t.Fatal(err)
	}
	out, err := Run(t.Context(), dir, "cpio", "-itv", "--quiet", "-F", name)
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range [][]string{
		{"-rwxr-xr-x", "1", "root", "root", "2", "init"},
		{"-rw-r--r--", "1", "root", "root", "4097", "lib/modules/order"},
		{"drwxr-xr-x", "2", "root", "root", "0", "lib/modules"},
		{"lrwxrwxrwx", "1", "root", "root", "3", "sbin", "->", "bin"},
	} {
		found := false
		for l := range strings.Lines(string(out)) {
			f := strings.Fields(l)
			if len(f) >= 9 {
				f = append(f[:5], f[8:]...) // without the date
			}
			found = found || slices.Equal(f, line)
		}
		if !found {
			t.Errorf("cpio -itv has no line %q:\n%s", line, out)
		}
	}
}

func TestImageIsDeterministic(t *testing.T) {
	host := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(host, []byte("from the host"), 0o600); err != nil {
		t.Fatal(err)
	}
	var first []byte
	for i := range 5 {
		im := newImage()
		for _, n := range []string{"c", "a/b", "a/a", "z", "m/n/o"} {
			im.AddBytes(n, []byte(n), 0o644)
		}
		im.AddFile("host", host, 0o644)
		im.AddSymlink("l", "c")
		im.AddSymlink("k", "c")
		name := filepath.Join(t.TempDir(), "i.cpio")
		if err := im.WriteFile(name); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = b
		} else if !bytes.Equal(b, first) {
			t.Fatal("the same content gave different archives")
		}
	}
	for _, e := range readArchive(t, first) {
		if e.name == "host" && e.data == "from the host" {
			return
		}
	}
	t.Error("the file of the host is missing")
}

type brokenWriter struct{ after int }

func (w *brokenWriter) Write(p []byte) (int, error) {
	if w.after -= len(p); w.after < 0 {
		return 0, io.ErrClosedPipe
	}
	return len(p), nil
}

func TestArchiveErrors(t *testing.T) {
	a := newArchive(io.Discard)
	a.file("short", 0o644, strings.NewReader("123"), 5)
	if err := a.close(); !errors.Is(err, io.EOF) {
		t.Errorf("a file that shrank: %v, want %v", err, io.EOF)
	}
	a = newArchive(io.Discard)
	a.file("large", 0o644, nil, 1<<32)
	if err := a.close(); err == nil {
		t.Error("a file of 4 GiB gave no error")
	}
	for after := range 400 {
		a = newArchive(&brokenWriter{after})
		a.file("a/b", 0o644, strings.NewReader("12345"), 5)
		if err := a.close(); after < 350 && !errors.Is(err, io.ErrClosedPipe) {
			t.Fatalf("writer broken after %d bytes: %v, want %v", after, err, io.ErrClosedPipe)
		}
	}
	im := newImage()
	im.AddFile("dir", t.TempDir(), 0o644)
	if err := im.WriteFile(filepath.Join(t.TempDir(), "x")); err == nil {
		t.Error("a folder as a file gave no error")
	}
}

func TestParseLDD(t *testing.T) {
	const out = `	linux-vdso.so.1 (0x00007ffd3d9f2000)
	libcryptsetup.so.12 => /lib/x86_64-linux-gnu/libcryptsetup.so.12 (0x00007f2b3c1a2000)
	libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f2b3bdb4000)
	/lib64/ld-linux-x86-64.so.2 (0x00007f2b3c263000)
`
	got, err := parseLDD("p", out)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"/lib/x86_64-linux-gnu/libcryptsetup.so.12", "/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"}
	if !slices.Equal(got, want) {
		t.Errorf("parseLDD = %q, want %q", got, want)
	}
	if got, err := parseLDD("p", "\tstatically linked\n"); err != nil || len(got) > 0 {
		t.Errorf("static: %q, %v", got, err)
	}
	for _, bad := range []string{"\tlibx.so => not found\n", "\tlibx.so => weird\n", "\t/lib/x.so\n"} {
		if got, err := parseLDD("p", bad); err == nil {
			t.Errorf("parseLDD(%q) = %q, want an error", bad, got)
		}
	}
}

func TestAddProgram(t *testing.T) {
	im := newImage()
	if err := im.addTools(t.Context(), "cryptsetup"); err != nil {
		t.Fatal(err)
	}
	var names []string
	for n := range im.files {
		names = append(names, filepath.Base(n))
	}
	for _, want := range []string{"cryptsetup", "libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2"} {
		if !slices.Contains(names, want) {
			t.Errorf("%s is not in the image: %q", want, names)
		}
	}
}

// writeModules makes an index the way depmod does.
func writeModules(t *testing.T) *moduleTree {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"modules.dep": `kernel/drivers/md/dm-crypt.ko.xz: kernel/drivers/md/dm-mod.ko.xz kernel/lib/keys.ko.xz kernel/lib/base.ko.xz
kernel/drivers/md/dm-mod.ko.xz: kernel/lib/keys.ko.xz kernel/lib/base.ko.xz
kernel/lib/keys.ko.xz: kernel/lib/base.ko.xz
kernel/lib/base.ko.xz:
kernel/crypto/xts.ko:
kernel/crypto/ecb.ko:
kernel/crypto/chicken.ko:
kernel/crypto/egg.ko:
kernel/crypto/late.ko:
`,
		"modules.builtin": "kernel/fs/ext4/ext4.ko\nkernel/drivers/virtio/virtio-pci.ko\n",
		"modules.softdep": "# Soft dependencies\nsoftdep xts pre: ecb some-alias post: late\nsoftdep chicken pre: egg\nsoftdep egg pre: chicken\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m, err := openModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestModuleOrder(t *testing.T) {
	m := writeModules(t)
	tests := []struct {
		name string
		ask  []string
		want []string
	}{
		{name: "dependencies first", ask: []string{"dm-crypt"}, want: []string{"base", "keys", "dm_mod", "dm_crypt"}},
		{name: "each once", ask: []string{"keys", "dm_crypt", "dm-mod"}, want: []string{"base", "keys", "dm_mod", "dm_crypt"}},
		{name: "built in", ask: []string{"ext4", "virtio_pci", "base"}, want: []string{"base"}},
		{name: "soft dependency", ask: []string{"xts"}, want: []string{"ecb", "xts"}},
		{name: "circle", ask: []string{"chicken", "egg"}, want: []string{"egg", "chicken"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			paths, err := m.order(tt.ask...)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, p := range paths {
				got = append(got, moduleName(p))
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("order(%q) = %q, want %q", tt.ask, got, tt.want)
			}
		})
	}
	if got, err := m.order("base", "no-such"); err == nil || !strings.Contains(err.Error(), "no_such") {
		t.Errorf("order of a missing module = %q, %v", got, err)
	}
}

func TestPayload(t *testing.T) {
	name := filepath.Join(t.TempDir(), "p.tar")
	tree, err := Payload(t.Context(), name, 6<<20)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(name)
	if err != nil {
		t.Fatal(err)
	}
	if info.Size()%512 != 0 || info.Size() < tree.Bytes || tree.Bytes < 6<<20 || len(tree.Files) < 10 {
		t.Errorf("archive of %d bytes with %d bytes in %d files", info.Size(), tree.Bytes, len(tree.Files))
	}
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte(Source)); n < len(tree.Files)/4 {
		t.Errorf("%q is %d times in %d files", Source, n, len(tree.Files))
	}
}

func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	if err := Sparse(src, 10<<20+5); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(src, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{0, 3<<20 + 1, 10<<20 + 1} {
		if _, err := f.WriteAt([]byte("data"), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := CopySparse(dst, src); err != nil {
		t.Fatal(err)
	}
	a, err := os.ReadFile(src)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(dst)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(a, b) {
		t.Error("the copy differs")
	}
}
