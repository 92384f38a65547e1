package sector

import (
	"errors"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
)

var _ backend.Backend = (*Volume)(nil)

// TestUnderGoNBD serves a volume with go-nbd's own server: a Volume is a
// backend like any other.
func TestUnderGoNBD(t *testing.T) {
	v := open1(t, format(t, 4096, testVolumeSize), OpenOptions{})
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		served <- server.Handle(c, []*server.Export{{Name: "v", Backend: v}}, &server.Options{MinimumBlockSize: 1, PreferredBlockSize: 4096, MaximumBlockSize: 32 << 20, SupportsMultiConn: true})
	}()
	out, err := exec.Command("qemu-io", "-f", "raw", "nbd+unix:///v?socket="+socket,
		"-c", "write -P 0x5a 1000 100000", "-c", "read -P 0x5a 1000 100000").CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatal("qemu-io is not installed (Debian package qemu-utils); run make deps")
	}
	if err != nil || strings.Contains(string(out), "failed") {
		t.Errorf("qemu-io: %v\n%s", err, out)
	}
	if err := <-served; err != nil {
		t.Errorf("go-nbd: %v", err)
	}
	got := make([]byte, 100000)
	if _, err := v.ReadAt(got, 1000); err != nil || strings.Trim(string(got), "\x5a") != "" {
		t.Errorf("the volume holds something else than was written (%v)", err)
	}
}
