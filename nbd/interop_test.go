package nbd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// These tests let other people's clients speak to the server over a Unix
// socket.

// tool runs a program and returns what it printed. It fails the test if the
// program fails, or isn't there.
func tool(t *testing.T, deb, name string, args ...string) string {
	t.Helper()
	out, err := run(t, deb, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

func run(t *testing.T, deb, name string, args ...string) (string, error) {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is not installed: it is in the Debian package %s (make deps)", name, deb)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	return string(out), err
}

const (
	libnbd = "libnbd-bin"
	qemu   = "qemu-utils"
)

// listen serves exports on a socket and returns a function that makes the URI
// of an export.
func listen(t *testing.T, exports ...nbd.Export) (*harness, func(name string) string) {
	t.Helper()
	h := newHarness(t, nbd.Config{}, exports...)
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h.serves.Go(func() {
		if err := h.s.ServeListener(h.ctx, ln); err != errTestEnds {
			t.Errorf("ServeListener() = %v", err)
		}
	})
	return h, func(name string) string { return "nbd+unix:///" + name + "?socket=" + path }
}

func TestNbdinfo(t *testing.T) {
	_, uri := listen(t,
		nbd.Export{Name: "first", Description: "the first", Device: nbdtest.NewDevice(1<<20+512, false), Trim: true, BlockSize: 512},
		nbd.Export{Name: "second", Device: nbdtest.NewDevice(4096, false), ReadOnly: true, BlockSize: 4096})

	t.Run("json", func(t *testing.T) {
		var info struct {
			Protocol   string
			Structured bool
			Exports    []map[string]any
		}
		// --content would read the export.
		out := tool(t, libnbd, "nbdinfo", "--json", uri("first"))
		if err := json.Unmarshal([]byte(out), &info); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
			t.Fatalf("nbdinfo --json says\n%s", out)
		}
		for key, want := range map[string]any{
			"export-name": "first", "description": "the first", "export-size": float64(1<<20 + 512),
			"is_read_only": false, "is_rotational": false, "can_flush": true, "can_fua": true, "can_multi_conn": true,
			"can_trim": true, "can_zero": true, "can_df": true, "can_cache": true, "can_fast_zero": true,
			"block_size_minimum": float64(1), "block_size_preferred": float64(4096), "block_size_maximum": float64(32 << 20),
		} {
			if got := info.Exports[0][key]; got != want {
				t.Errorf("%s is %v, want %v", key, got, want)
			}
		}
	})
	t.Run("contexts", func(t *testing.T) {
		out := tool(t, libnbd, "nbdinfo", "--json", uri("second"))
		var info struct {
			Exports []struct{ Contexts []string }
		}
		if err := json.Unmarshal([]byte(out), &info); err != nil || len(info.Exports) != 1 || len(info.Exports[0].Contexts) != 1 ||
			info.Exports[0].Contexts[0] != "base:allocation" {
			t.Errorf("nbdinfo --json: %v\n%s", err, out)
		}
	})
	t.Run("map", func(t *testing.T) {
		out := strings.Fields(tool(t, libnbd, "nbdinfo", "--map", uri("first")))
		if want := []string{"0", "1049088", "0", "data"}; !slices.Equal(out, want) {
			t.Errorf("nbdinfo --map says %q, want %q", out, want)
		}
		out = strings.Fields(tool(t, libnbd, "nbdinfo", "--map", "--totals", uri("second")))
		if want := []string{"4096", "100.0%", "0", "data"}; !slices.Equal(out, want) {
			t.Errorf("nbdinfo --map --totals says %q, want %q", out, want)
		}
	})
	t.Run("list", func(t *testing.T) {
		out := tool(t, libnbd, "nbdinfo", "--list", uri(""))
		for _, want := range []string{`export="first"`, `export="second"`, "the first", "export-size: 1049088", "export-size: 4096"} {
			if !strings.Contains(out, want) {
				t.Errorf("nbdinfo --list doesn't say %s:\n%s", want, out)
			}
		}
	})
	t.Run("can", func(t *testing.T) {
		// The exit status is the answer: 0 is yes, 2 is no.
		for _, tt := range []struct {
			export, flag, arg string
			want              int
		}{
			{"first", "--can", "connect", 0},
			{"first", "--can", "read", 0},
			{"first", "--can", "write", 0},
			{"first", "--can", "flush", 0},
			{"first", "--can", "fua", 0},
			{"first", "--can", "trim", 0},
			{"first", "--can", "zero", 0},
			{"first", "--can", "multi-conn", 0},
			{"first", "--can", "cache", 0},
			{"first", "--can", "df", 0},
			{"first", "--can", "fast-zero", 0},
			{"first", "--is", "read-only", 2},
			{"first", "--is", "rotational", 2},
			{"first", "--is", "tls", 2},
			{"second", "--is", "read-only", 0},
			{"second", "--can", "write", 2},
			{"second", "--can", "trim", 2},
			{"second", "--can", "fast-zero", 2},
			{"second", "--can", "cache", 0},
			{"second", "--can", "flush", 0},
		} {
			out, err := run(t, libnbd, "nbdinfo", tt.flag, tt.arg, uri(tt.export))
			got := 0
			if exit, ok := err.(*exec.ExitError); ok {
				got = exit.ExitCode()
			} else if err != nil {
				t.Fatal(err)
			}
			if got != tt.want {
				t.Errorf("nbdinfo %s %s of %s: exit status %d, want %d\n%s", tt.flag, tt.arg, tt.export, got, tt.want, out)
			}
		}
	})
	t.Run("unknown export", func(t *testing.T) {
		out, err := run(t, libnbd, "nbdinfo", uri("third"))
		if err == nil || !strings.Contains(out, "third") {
			t.Errorf("nbdinfo of an unknown export: %v\n%s", err, out)
		}
	})
}

func TestNbdcopy(t *testing.T) {
	const size = 48<<20 + 4096
	dev := nbdtest.NewDevice(size, false)
	other := nbdtest.NewDevice(size, false)
	h, uri := listen(t, nbd.Export{Name: "a", Device: dev, Trim: true}, nbd.Export{Name: "b", Device: other, Trim: true})
	dir := t.TempDir()
	in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
	data := pattern(size, 1)
	clear(data[8<<20 : 20<<20]) // nbdcopy sends zeros as WRITE_ZEROES or TRIM
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}

	tool(t, libnbd, "nbdcopy", "--connections=4", "--threads=4", "--requests=64", "--flush", in, uri("a"))
	if !bytes.Equal(dev.Bytes(0, size), data) {
		t.Error("nbdcopy to the server: the device has other bytes")
	}
	st := h.s.Stats()
	if st.Accepted < 4 || st.Flushes == 0 || st.WriteZeroes == 0 {
		t.Errorf("Stats() = %+v, want 4 connections, a flush and zeroes", st)
	}
	tool(t, libnbd, "nbdcopy", "--connections=4", "--threads=4", "--requests=64", "--request-size=1048576", uri("a"), out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("nbdcopy from the server: other bytes, %v", err)
	}
	tool(t, libnbd, "nbdcopy", "--connections=4", "--threads=4", uri("a"), uri("b"))
	if !bytes.Equal(other.Bytes(0, size), data) {
		t.Error("nbdcopy from the server to itself: other bytes")
	}
	tool(t, libnbd, "nbdcopy", "--synchronous", "--request-size=33554432", "--sparse=0", uri("a"), out)
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("nbdcopy in the largest requests: other bytes, %v", err)
	}
}

// qemuIO runs commands of qemu-io on an export and returns what it printed.
func qemuIO(t *testing.T, uri string, cmds ...string) string {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	out := tool(t, qemu, "qemu-io", append(args, uri)...)
	if strings.Contains(out, "failed") || strings.Contains(out, "error") {
		t.Fatalf("qemu-io %q:\n%s", cmds, out)
	}
	return out
}

func TestQemuIO(t *testing.T) {
	const size = 64 << 20
	dev := nbdtest.NewDevice(size, true)
	h, uri := listen(t,
		nbd.Export{Name: "rw", Device: dev, Trim: true, BlockSize: 4096},
		nbd.Export{Name: "ro", Device: dev, ReadOnly: true})

	fill := func(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }
	expect := func(what string, off, n int, b byte) {
		t.Helper()
		if !bytes.Equal(dev.Bytes(int64(off), int64(n)), fill(n, b)) {
			t.Errorf("%s: the device has other bytes", what)
		}
	}

	qemuIO(t, uri("rw"), "write -P 0xaa 0 1M", "read -P 0xaa 0 1M", "read -P 0 1M 1M")
	expect("write", 0, 1<<20, 0xaa)

	qemuIO(t, uri("rw"), "write -P 0x11 4097 513", "read -P 0x11 4097 513", "read -P 0xaa 0 4097", "read -P 0xaa 4610 1000")
	expect("unaligned write", 4097, 513, 0x11)

	qemuIO(t, uri("rw"), "write -P 0x22 32M 32M", "read -P 0x22 32M 32M")
	expect("largest write", 32<<20, 32<<20, 0x22)

	qemuIO(t, uri("rw"), "write -f -P 0x33 8k 8k")
	dev.PowerCut()
	expect("write with FUA after a power cut", 8<<10, 8<<10, 0x33)

	qemuIO(t, uri("rw"), "write -P 0x44 2M 64k", "flush")
	dev.PowerCut()
	expect("write with flush after a power cut", 2<<20, 64<<10, 0x44)

	qemuIO(t, uri("rw"), "write -z 2M 32k", "read -P 0 2M 32k", "read -P 0x44 2129920 32k")
	expect("write zeroes", 2<<20, 32<<10, 0)
	qemuIO(t, uri("rw"), "write -z -u 2129920 4k", "read -P 0 2129920 4k")
	expect("write zeroes that may unmap", 2129920, 4<<10, 0)

	trims := h.s.Stats().Trims
	qemuIO(t, uri("rw"), "discard 2M 1M")
	if n := h.s.Stats().Trims; n == trims {
		t.Error("discard: no TRIM came")
	}

	var aio []string
	for i := range 32 {
		aio = append(aio, "aio_write -P "+string("123456789"[i%9])+" "+string(rune('0'+i/10))+string(rune('0'+i%10))+"M 1M")
	}
	qemuIO(t, uri("rw"), append(aio, "aio_flush", "read -P 1 0M 1M", "read -P 5 31M 1M")...)
	for i := range 32 {
		expect("asynchronous write", i<<20, 1<<20, byte(i%9+1))
	}

	out := tool(t, qemu, "qemu-io", "-r", "-f", "raw", "-c", "read -P 1 0 1M", uri("ro"))
	if !strings.Contains(out, "1048576/1048576") {
		t.Errorf("read of a read-only export:\n%s", out)
	}
	if out, err := run(t, qemu, "qemu-io", "-f", "raw", "-c", "write 0 512", uri("ro")); err == nil {
		t.Errorf("write to a read-only export succeeded:\n%s", out)
	}
	if st := h.s.Stats(); st.Errors != 0 {
		t.Errorf("%d requests were answered with an error", st.Errors)
	}
}

func TestQemuImg(t *testing.T) {
	const size = 16 << 20
	dev := nbdtest.NewDevice(size, false)
	back := nbdtest.NewDevice(size, false)
	if _, err := dev.WriteAt(pattern(5<<20, 9), 3<<20); err != nil {
		t.Fatal(err)
	}
	_, uri := listen(t, nbd.Export{Name: "a", Device: dev, Trim: true}, nbd.Export{Name: "b", Device: nbdtest.NewDevice(size, false)},
		nbd.Export{Name: "c", Device: back, Trim: true})

	var info struct {
		VirtualSize int64 `json:"virtual-size"`
		Format      string
	}
	out := tool(t, qemu, "qemu-img", "info", "--output=json", "-f", "raw", uri("a"))
	if err := json.Unmarshal([]byte(out), &info); err != nil || info.VirtualSize != size || info.Format != "raw" {
		t.Errorf("qemu-img info: %v\n%s", err, out)
	}
	tool(t, qemu, "qemu-img", "convert", "-n", "-W", "-m", "16", "-f", "raw", "-O", "raw", uri("a"), uri("b"))
	tool(t, qemu, "qemu-img", "compare", "-f", "raw", "-F", "raw", uri("a"), uri("b"))

	// Both ways through a file, by block status and with zeros that are found.
	file := filepath.Join(t.TempDir(), "image.qcow2")
	tool(t, qemu, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri("a"), file)
	tool(t, qemu, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri("a"), file)
	if _, err := back.WriteAt(pattern(size, 3), 0); err != nil {
		t.Fatal(err)
	}
	tool(t, qemu, "qemu-img", "convert", "-n", "-f", "qcow2", "-O", "raw", file, uri("c"))
	if !bytes.Equal(back.Bytes(0, size), dev.Bytes(0, size)) {
		t.Error("qemu-img convert through a file and back: the device has other bytes")
	}
	var extents []struct {
		Start, Length int64
		Data, Zero    bool
	}
	out = tool(t, qemu, "qemu-img", "map", "--output=json", "-f", "raw", uri("a"))
	if err := json.Unmarshal([]byte(out), &extents); err != nil || len(extents) != 1 ||
		extents[0].Length != size || !extents[0].Data || extents[0].Zero {
		t.Errorf("qemu-img map: %v\n%s", err, out)
	}
	tool(t, qemu, "qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "64", "-s", "4096", uri("a"))
	tool(t, qemu, "qemu-img", "bench", "-w", "--flush-interval=16", "-f", "raw", "-c", "500", "-d", "16", "-s", "65536", uri("b"))
}

// TestNbdfuse writes, reads, and zeroes at random through a file that nbdfuse
// makes of an export, and compares it with memory. TRIM is not offered: what it
// leaves is not defined, and differs between the device and the cache of the
// file.
func TestNbdfuse(t *testing.T) {
	const size = 8 << 20
	dev := nbdtest.NewDevice(size, false)
	h, uri := listen(t, nbd.Export{Name: "x", Device: dev})
	path, err := exec.LookPath("nbdfuse")
	if err != nil {
		t.Fatal("nbdfuse is not installed: it is in the Debian package nbdfuse (make deps)")
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "disk")
	cmd := exec.Command(path, file, uri("x"))
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	stop := sync.OnceFunc(func() { // unmounts
		_ = cmd.Process.Signal(os.Interrupt)
		wait(t, "nbdfuse", ended)
	})
	defer stop()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			break
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("nbdfuse: %v (it needs /dev/fuse, and the Debian package fuse3 unless run by root)\n%s", err, &out)
		default:
		}
		if time.Now().After(end) {
			t.Fatal("nbdfuse: no file after 30 s")
		}
	}

	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	model := make([]byte, size)
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range 1500 {
		n := 1 + rng.IntN(64<<10)
		off := rng.IntN(size - n)
		switch rng.IntN(8) {
		case 0, 1, 2:
			data := pattern(n, uint64(i))
			copy(model[off:], data)
			_, err = f.WriteAt(data, int64(off))
		case 3:
			err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n))
			clear(model[off:][:n])
			if err == unix.EOPNOTSUPP { // older kernels and clients
				_, err = f.WriteAt(model[off:][:n], int64(off))
			}
		case 4:
			err = f.Sync()
		default:
			got := make([]byte, n)
			if _, err = f.ReadAt(got, int64(off)); err == nil && !bytes.Equal(got, model[off:][:n]) {
				t.Fatalf("operation %d: read of %d bytes at %d returned other bytes", i, n, off)
			}
		}
		if err != nil {
			t.Fatalf("operation %d, %d bytes at %d: %v", i, n, off, err)
		}
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	stop()
	if !bytes.Equal(dev.Bytes(0, size), model) {
		t.Error("the device differs from the model")
	}
	if st := h.s.Stats(); st.Errors != 0 || st.Reads == 0 || st.Writes == 0 || st.Flushes == 0 {
		t.Errorf("Stats() = %+v", st)
	}
}

// TestFio lets fio write at random on two connections and verify what it reads.
func TestFio(t *testing.T) {
	h, uri := listen(t, nbd.Export{Name: "x", Device: nbdtest.NewDevice(16<<20, false), Trim: true})
	out := tool(t, "fio", "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri("x"), "--rw=randrw", "--bsrange=512-64k", "--blockalign=512",
		"--size=8M", "--offset_increment=8M", "--numjobs=2", "--thread", "--iodepth=32", "--fsync=50",
		"--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randseed=7")
	if n := strings.Count(out, "err= 0"); n != 2 {
		t.Errorf("%d jobs of 2 ended without error:\n%s", n, out)
	}
	if st := h.s.Stats(); st.Errors != 0 || st.Accepted < 2 || st.Reads == 0 || st.Writes == 0 || st.Flushes == 0 {
		t.Errorf("Stats() = %+v", st)
	}
}
