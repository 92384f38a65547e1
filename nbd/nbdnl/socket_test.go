package nbdnl

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestSocketpair(t *testing.T) {
	kernel, server, err := Socketpair()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()

	rc, err := kernel.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var options struct{ domain, typ, flags, sndbuf int }
	if err := rc.Control(func(fd uintptr) {
		options.domain, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
		options.typ, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_TYPE)
		options.flags, _ = unix.FcntlInt(fd, unix.F_GETFD, 0)
		options.sndbuf, _ = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF)
	}); err != nil {
		t.Fatal(err)
	}
	if options.domain != unix.AF_UNIX || options.typ != unix.SOCK_STREAM || options.flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("kernel end: %+v, want a Unix stream socket that is closed on exec", options)
	}

	// A good part of the buffer must go in at one go, with nobody reading. Half
	// of it is the kernel's bookkeeping.
	n := options.sndbuf / 4
	if err := rc.Control(func(fd uintptr) {
		if got, err := unix.SendmsgN(int(fd), make([]byte, n), nil, nil, unix.MSG_DONTWAIT); got != n || err != nil {
			t.Errorf("sending %d bytes with a buffer of %d: %d, %v", n, options.sndbuf, got, err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.CopyN(io.Discard, server, int64(n)); err != nil {
		t.Fatal(err)
	}

	// Both directions, deadlines, and the end.
	if _, err := server.Write([]byte("to the kernel")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 13)
	if _, err := io.ReadFull(kernel, b); err != nil || !bytes.Equal(b, []byte("to the kernel")) {
		t.Errorf("kernel end read %q, %v", b, err)
	}
	if err := server.SetReadDeadline(time.Now()); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("server end past its deadline: %v", err)
	}
	if err := server.SetReadDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	if err := kernel.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Read(b); err != io.EOF {
		t.Errorf("server end after the kernel's was closed: %v, want %v", err, io.EOF)
	}
}

// TestRoom: a request of the size that there is said to be room for goes in at one go,
// its header and page after page, as the kernel sends it.
func TestRoom(t *testing.T) {
	for _, size := range []int{0, 2 << 20, 1 << 20, 212992, 64 << 10, 16 << 10, 1} { // 212992: net.core.wmem_max if nobody has changed it
		kernel, server, err := Socketpair()
		if err != nil {
			t.Fatal(err)
		}
		rc, err := kernel.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		if err := rc.Control(func(fd uintptr) {
			if size > 0 {
				if err := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, size); err != nil {
					t.Error(err)
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		room, err := Room(kernel)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[int]int{212992: 256 << 10, 64 << 10: 64 << 10, 16 << 10: 16 << 10}[size]; room < 1024 || want != 0 && room != want {
			t.Errorf("with a buffer of twice %d bytes there is room for %d, want %d", size, room, want)
		}
		if err := rc.Control(func(fd uintptr) {
			left := room + 28
			for n := 28; left > 0; n = min(left, 4096) {
				if got, err := unix.SendmsgN(int(fd), make([]byte, n), nil, nil, unix.MSG_DONTWAIT); got != n || err != nil {
					t.Errorf("with a buffer of twice %d bytes, of a request of %d bytes %d didn't go in: %d, %v", size, room, left, got, err)
					break
				}
				left -= n
			}
		}); err != nil {
			t.Fatal(err)
		}
		kernel.Close()
		server.Close()
	}
}

func TestParsePath(t *testing.T) {
	for _, path := range []string{"/dev/nbd0", "nbd0", "/dev/nbd15", "nbd2147483647"} {
		index, err := ParsePath(path)
		if err != nil || Path(index) != "/dev/"+strings.TrimPrefix(path, "/dev/") {
			t.Errorf("ParsePath(%q) = %d, %v", path, index, err)
		}
	}
	for _, path := range []string{"", "nbd", "/dev/nbd", "/dev/sda", "0", "/dev/nbd-1", "/dev/nbd+1", "/dev/nbd01", "/dev/nbd0p1", "/dev/nbd2147483648", "nbd 1", "/tmp/nbd1", "nbd0x1"} {
		if index, err := ParsePath(path); err == nil {
			t.Errorf("ParsePath(%q) = %d, want an error", path, index)
		}
	}
}

// fakeSysfs shows a device of the given attributes instead of /sys/block.
func fakeSysfs(t *testing.T, attributes map[string]string) (set func(name, value string)) {
	t.Helper()
	dir := t.TempDir()
	old := sysBlock
	sysBlock = dir
	t.Cleanup(func() { sysBlock = old })
	set = func(name, value string) {
		path := filepath.Join(dir, "nbd3", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(value), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range attributes {
		set(name, value)
	}
	return set
}

func TestWaitReady(t *testing.T) {
	set := fakeSysfs(t, nil)
	short := func() context.Context {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		t.Cleanup(cancel)
		return ctx
	}
	if err := WaitReady(short(), 3, 1<<20); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no device: %v", err)
	}
	set("size", "0\n")
	set("pid", "17\n")
	if err := WaitReady(short(), 3, 1<<20); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "/dev/nbd3") {
		t.Errorf("device of size 0: %v", err)
	}
	set("size", "2048\n")
	if err := WaitReady(short(), 3, 1<<20); err != nil {
		t.Errorf("device that is ready: %v", err)
	}
	if err := WaitReady(short(), 3, 1<<20+4096); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1048576") {
		t.Errorf("device of another size: %v", err)
	}
	done := make(chan error)
	go func() { done <- WaitReady(t.Context(), 3, 4096) }()
	time.Sleep(5 * time.Millisecond)
	set("size", "8\n")
	if err := <-done; err != nil {
		t.Errorf("device that becomes ready: %v", err)
	}
}

func TestSetMaxRequest(t *testing.T) {
	fakeSysfs(t, map[string]string{"queue/max_hw_sectors_kb": "32768\n", "queue/max_sectors_kb": "1280\n"})
	for _, tt := range []struct{ size, want uint64 }{{1 << 20, 1 << 20}, {64 << 20, 32 << 20}, {1024, 1024}, {4097, 4096}} {
		if got, err := SetMaxRequest(3, tt.size); got != tt.want || err != nil {
			t.Errorf("SetMaxRequest(%d) = %d, %v; want %d", tt.size, got, err, tt.want)
		}
		if b, err := os.ReadFile(filepath.Join(sysBlock, "nbd3/queue/max_sectors_kb")); err != nil || len(b) == 0 {
			t.Errorf("max_sectors_kb is %q, %v", b, err)
		}
	}
	if _, err := SetMaxRequest(3, 1023); err == nil {
		t.Error("SetMaxRequest(1023) succeeded")
	}
	if _, err := SetMaxRequest(4, 1<<20); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/dev/nbd4") {
		t.Errorf("SetMaxRequest of a device that isn't there: %v", err)
	}
}

func TestProgress(t *testing.T) {
	set := fakeSysfs(t, map[string]string{"stat": "  10   1  80  5  20  2  160  9  3  40  50  4  0  8  1  5  7\n"})
	if n, done, err := Progress(3); n != 3 || done != 10+20+4+5 || err != nil {
		t.Errorf("Progress = %d, %d, %v; want 3 in flight and 39 done", n, done, err)
	}
	set("stat", "10 x")
	if _, _, err := Progress(3); err == nil {
		t.Error("Progress of what is no number succeeded")
	}
	if _, _, err := Progress(4); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Progress of a device that isn't there: %v", err)
	}
}

func TestAnnounce(t *testing.T) {
	set := fakeSysfs(t, nil)
	if err := Announce(3); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Announce of a device that isn't there: %v", err)
	}
	set("uevent", "")
	if err := Announce(3); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(filepath.Join(sysBlock, "nbd3/uevent")); err != nil || string(b) != "change" {
		t.Errorf("the kernel was told %q, %v", b, err)
	}
}

func TestDetached(t *testing.T) {
	for _, tt := range []struct {
		name string
		has  map[string]string
		want bool
	}{
		{"attached", map[string]string{"size": "8", "pid": "1", "backend": "ours\n"}, false},
		{"detached", map[string]string{"size": "0"}, true},
		{"another's", map[string]string{"size": "8", "pid": "1", "backend": "other\n"}, true},
		{"somebody's", map[string]string{"size": "8", "pid": "1"}, false},
		{"no sysfs", nil, false},
	} {
		fakeSysfs(t, tt.has)
		if got := Detached(3, "ours"); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}
