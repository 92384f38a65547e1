package nbd

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd/nbdtest"
)

// A fileDevice is a file, one request at a time.
type fileDevice struct {
	*os.File
	begun atomic.Int64
	ended atomic.Int64

	p    []byte // of the last request
	at   int64
	read bool
}

func (d *fileDevice) Size() (int64, error) { return 1 << 20, nil }
func (d *fileDevice) Async() bool          { return true }
func (d *fileDevice) WriteAtFUA(p []byte, off int64) (int, error) {
	return d.WriteAt(p, off)
}
func (d *fileDevice) Trim(_, _ int64, _ bool) error        { return nil }
func (d *fileDevice) WriteZeroes(_, _ int64, _ bool) error { return nil }

func (d *fileDevice) BeginRead(p []byte, off int64) (int, int64, bool) {
	d.begun.Add(1)
	d.p, d.at, d.read = p, off, true
	return int(d.Fd()), off, true
}

func (d *fileDevice) EndRead(_ []byte, _ int64, n int, err error) (int, error) {
	d.ended.Add(1)
	return n, err
}

func (d *fileDevice) BeginWrite(p []byte, off int64, _ bool) (int, int64, uint64, bool) {
	d.begun.Add(1)
	d.p, d.at, d.read = p, off, false
	return int(d.Fd()), off, 7, true
}

func (d *fileDevice) EndWrite(_ []byte, _ int64, _ bool, ticket uint64, n int, err error) (int, error) {
	d.ended.Add(1)
	if ticket != 7 {
		panic("the ticket is lost")
	}
	return n, err
}

// undo makes what the last request has moved unmoved.
func (d *fileDevice) undo() error {
	if d.read {
		clear(d.p)
		return nil
	}
	return unix.Fallocate(int(d.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, d.at, int64(len(d.p)))
}

// TestRingGivesUp: what io_uring gives up on is done without it, whole and
// once; what it says of the device is believed.
func TestRingGivesUp(t *testing.T) {
	fd, err := unix.MemfdCreate("volume", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	dev := &fileDevice{File: os.NewFile(uintptr(fd), "volume")}
	defer dev.Close()
	if err := dev.Truncate(1 << 20); err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Engine: EngineURing}, Export{Device: dev})
	if err != nil {
		t.Fatal(err)
	}
	var says atomic.Int64 // the errno that io_uring gives
	var times atomic.Int64
	s.fault = func(result int) int {
		if says.Load() == 0 {
			return result
		}
		times.Add(1)
		if err := dev.undo(); err != nil {
			t.Error(err)
		}
		return -int(says.Load())
	}
	listener, err := net.Listen("unix", t.TempDir()+"/s")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.ServeListener(ctx, listener) }()
	conn, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	c, err := nbdtest.Dial(conn, "")
	if err != nil {
		t.Fatal(err)
	}
	for i, errno := range []syscall.Errno{0, syscall.ECANCELED, syscall.ENOMEM, syscall.EOPNOTSUPP, syscall.EAGAIN} {
		want := bytes.Repeat([]byte{byte(i + 1)}, 8192)
		for _, flags := range []uint16{0, nbdtest.FUA} {
			says.Store(int64(errno))
			if number, err := c.Write(want, uint64(i)*8192, flags); number != 0 || err != nil {
				t.Fatalf("WRITE with flags %d when io_uring says %v: error %d, %v", flags, errno, number, err)
			}
			says.Store(0)
			got := make([]byte, len(want))
			if _, err := dev.ReadAt(got, int64(i)*8192); err != nil || !bytes.Equal(got, want) {
				t.Errorf("WRITE with flags %d when io_uring says %v: the file has something else, %v", flags, errno, err)
			}
		}
		says.Store(int64(errno))
		got := make([]byte, len(want))
		if number, err := c.Read(got, uint64(i)*8192); number != 0 || err != nil || !bytes.Equal(got, want) {
			t.Errorf("READ when io_uring says %v: error %d, %v, right data: %v", errno, number, err, bytes.Equal(got, want))
		}
		if got := times.Swap(0); errno != 0 && got == 0 {
			t.Errorf("io_uring never said %v", errno)
		}
	}
	for errno, want := range map[syscall.Errno]uint32{syscall.EIO: errIO, syscall.ENOSPC: errNoSpace, syscall.EROFS: errPerm} {
		says.Store(int64(errno))
		for _, r := range []nbdtest.Request{{Len: 4096}, {Cmd: nbdtest.Write, Len: 4096}, {Cmd: nbdtest.Write, Len: 4096, Flags: nbdtest.FUA}} {
			if number, err := c.Do(r, make([]byte, 4096)); number != want || err != nil {
				t.Errorf("command %d with flags %d when io_uring says %v: error %d, %v, want %d", r.Cmd, r.Flags, errno, number, err, want)
			}
		}
	}
	if dev.begun.Load() != dev.ended.Load() {
		t.Errorf("%d requests were begun, %d ended", dev.begun.Load(), dev.ended.Load())
	}
	cancel()
	<-served
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// TestRingFUA: what io_uring writes with FUA is flushed by the kernel, and so is what it
// has given up on. A loop device counts its flushes.
func TestRingFUA(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes a loop device, which takes root")
	}
	losetup, err := exec.LookPath("losetup")
	if err != nil {
		t.Fatal("this test needs losetup, of the Debian package mount")
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(losetup, "--show", "-f", image).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	loop := strings.TrimSpace(string(out))
	defer exec.Command(losetup, "-d", loop).Run()
	f, err := os.OpenFile(loop, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	flushes := func() int {
		t.Helper()
		b, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/stat")
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(b)) // Documentation/block/stat.rst
		if len(fields) < 16 {
			t.Fatalf("this kernel counts no flushes: %q; Linux 5.5 does", b)
		}
		n, err := strconv.Atoi(fields[15])
		if err != nil {
			t.Fatal(err)
		}
		return n
	}

	s, err := New(Config{Engine: EngineURing}, Export{Device: &fileDevice{File: f}})
	if err != nil {
		t.Fatal(err)
	}
	var givesUp atomic.Bool
	s.fault = func(result int) int {
		if givesUp.Load() {
			return -int(syscall.ECANCELED)
		}
		return result
	}
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	server, client := newSocket(fds[0]), newSocket(fds[1])
	served := make(chan error, 1)
	go func() { served <- s.ServeTransmission(t.Context(), server, "") }()
	if err := client.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	c := &nbdtest.Client{Conn: client}
	write := func(flags uint16) int {
		t.Helper()
		before := flushes()
		if errno, err := c.Write(make([]byte, 8192), 4096, flags); errno != 0 || err != nil {
			t.Fatalf("WRITE with flags %d: error %d, %v", flags, errno, err)
		}
		return flushes() - before
	}
	if n := write(0); n != 0 {
		t.Fatalf("a write without FUA: %d flushes, so this test can't fail", n)
	}
	one := write(nbdtest.FUA)
	if one == 0 {
		t.Error("a write with FUA was not flushed")
	}
	// Here io_uring has written it, and the server doesn't know and writes it again.
	givesUp.Store(true)
	if n := write(nbdtest.FUA); n < 2*one {
		t.Errorf("a write with FUA, and once more without io_uring: %d flushes, want %d", n, 2*one)
	}
	client.Close()
	<-served
	server.Close()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
