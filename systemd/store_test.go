package systemd

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary be a process that inherits descriptors.
func TestMain(m *testing.M) {
	if os.Getenv("LISTEN_FDS") == "" {
		os.Exit(m.Run())
	}
	os.Setenv("LISTEN_PID", os.Getenv("TEST_LISTEN_PID"))
	if os.Getenv("LISTEN_PID") == "" {
		os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
	}
	list, stored, err := Inherited("mine-")
	for name, f := range stored {
		b, _ := io.ReadAll(io.NewSectionReader(f, 0, 100))
		os.Stdout.WriteString(name + "=" + string(b) + " ")
	}
	for _, l := range list {
		os.Stdout.WriteString(l.Addr().String() + " ")
	}
	if err != nil {
		os.Stdout.WriteString(err.Error())
	}
}

// TestStore gives descriptors away, and takes them back as another process.
func TestStore(t *testing.T) {
	dir := t.TempDir()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", manager.LocalAddr().String())
	receive := func() (string, *os.File) {
		t.Helper()
		b, oob := make([]byte, 200), make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := manager.ReadMsgUnix(b, oob)
		if err != nil {
			t.Fatal(err)
		}
		list, err := unix.ParseSocketControlMessage(oob[:oobn])
		if err != nil || len(list) != 1 {
			t.Fatalf("%q with %d control messages: %v", b[:n], len(list), err)
		}
		fds, err := unix.ParseUnixRights(&list[0])
		if err != nil || len(fds) != 1 {
			t.Fatalf("%q with descriptors %v: %v", b[:n], fds, err)
		}
		return string(b[:n]), os.NewFile(uintptr(fds[0]), "received")
	}
	kept := filepath.Join(dir, "kept")
	if err := os.WriteFile(kept, []byte("text"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(kept)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Store("mine-thing", f); err != nil {
		t.Fatal(err)
	}
	state, got := receive()
	defer got.Close()
	if want := "FDSTORE=1\nFDPOLL=0\nFDNAME=mine-thing"; state != want {
		t.Errorf("received %q, want %q", state, want)
	}
	if err := Store("a:b", f); err == nil {
		t.Error("a name that would be two was accepted")
	}

	go func() {
		state, pipe := receive()
		if state != "BARRIER=1" {
			t.Errorf("received %q, want a barrier", state)
		}
		pipe.Close()
	}()
	if err := Barrier(10 * time.Second); err != nil {
		t.Error(err)
	}
	if err := Barrier(20 * time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Barrier that nobody answers: %v", err)
	}

	sock, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	l, err := sock.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for _, tt := range []struct {
		names, pid, want string
		files            []*os.File
	}{
		{"mine-thing:hostcryptd.socket", "", "mine-thing=text " + filepath.Join(dir, "sock") + " ", []*os.File{got, l}},
		{"hostcryptd.socket:mine-thing", "", "mine-thing=text " + filepath.Join(dir, "sock") + " ", []*os.File{l, got}},
		{"mine-thing", "1", "", []*os.File{got}},
		{"other", "", "systemd: descriptor 3 of $LISTEN_FDS is no listening stream socket", []*os.File{got}},
	} {
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), "LISTEN_FDS="+strconv.Itoa(len(tt.files)), "LISTEN_FDNAMES="+tt.names, "TEST_LISTEN_PID="+tt.pid)
		cmd.ExtraFiles = tt.files
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.HasPrefix(string(out), tt.want) || tt.want == "" && len(out) > 0 {
			t.Errorf("%s: %q, %v; want %q", tt.names, out, err, tt.want)
		}
	}
}
