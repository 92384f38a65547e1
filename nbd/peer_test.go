package nbd_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

func TestAllowPeer(t *testing.T) {
	var seen atomic.Pointer[nbd.Peer]
	var allow atomic.Bool
	h := newHarness(t, nbd.Config{AllowPeer: func(p nbd.Peer) bool { seen.Store(&p); return allow.Load() }},
		nbd.Export{Device: nbdtest.NewDevice(512, false)})
	conn, result := h.raw()
	if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrPeer) {
		t.Errorf("Serve() = %v, want %v", err, nbd.ErrPeer)
	}
	if b, err := io.ReadAll(conn); err != nil || len(b) != 0 {
		t.Errorf("a refused peer got %q, %v", b, err)
	}
	want := nbd.Peer{UID: uint32(os.Getuid()), GID: uint32(os.Getgid()), PID: int32(os.Getpid())}
	if got := *seen.Load(); got != want {
		t.Errorf("peer is %+v, want %+v", got, want)
	}
	allow.Store(true)
	h.dial("")
	if st := h.s.Stats(); st.Rejected != 1 || st.Accepted != 1 {
		t.Errorf("Stats() = %+v", st)
	}
}

// TestPeerOfSocket: what a Socket is connected to is checked as that of a connection of
// package net, and what can't be asked is refused.
func TestPeerOfSocket(t *testing.T) {
	export := nbd.Export{Device: nbdtest.NewDevice(512, false)}
	take := func(conn net.Conn) net.Conn {
		t.Helper()
		s, err := nbd.NewSocket(conn)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	t.Run("AllowPeer", func(t *testing.T) {
		h := newHarness(t, nbd.Config{AllowPeer: func(p nbd.Peer) bool { return int(p.UID) != os.Getuid() }}, export)
		client, server := socketpair(t)
		defer client.Close()
		if err := wait(t, "Serve", h.serve(take(server))); !errors.Is(err, nbd.ErrPeer) {
			t.Errorf("Serve() of a Socket = %v, want %v", err, nbd.ErrPeer)
		}
		if st := h.s.Stats(); st.Rejected != 1 || st.Accepted != 0 {
			t.Errorf("Stats() = %+v", st)
		}
	})
	t.Run("wrapped", func(t *testing.T) {
		h := newHarness(t, nbd.Config{}, export)
		client, server := socketpair(t)
		defer client.Close()
		if err := wait(t, "Serve", h.serve(struct{ net.Conn }{server})); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("Serve() of a connection that can't be asked = %v", err)
		}
	})
	t.Run("MaxPerPeer", func(t *testing.T) {
		for _, pair := range []func(*testing.T) (net.Conn, net.Conn){
			func(t *testing.T) (net.Conn, net.Conn) { a, b := socketpair(t); return a, b }, tcpPair,
		} {
			h := newHarness(t, nbd.Config{MaxPerPeer: 1}, export)
			client, server := pair(t)
			defer client.Close()
			h.serve(take(server))
			if _, err := nbdtest.Dial(client, ""); err != nil {
				t.Fatal(err)
			}
			client, server = pair(t)
			defer client.Close()
			if err := wait(t, "Serve", h.serve(take(server))); !errors.Is(err, nbd.ErrTooManyConnections) {
				t.Errorf("Serve() of a second Socket of the same peer = %v, want %v", err, nbd.ErrTooManyConnections)
			}
		}
	})
	t.Run("TLS", func(t *testing.T) {
		h := newHarness(t, nbd.Config{TLS: newPKI(t).server}, export)
		client, server := tcpPair(t)
		defer client.Close()
		h.serve(take(server))
		c := &nbdtest.Client{Conn: client}
		if _, err := c.Greet(3); err != nil {
			t.Fatal(err)
		}
		replies, err := c.Option(nbdtest.OptGo, nbdtest.GoData(""))
		if err != nil || replies[len(replies)-1].Type != nbdtest.RepErrTLS {
			t.Errorf("GO by TCP before STARTTLS: %+v, %v; want error %#x", replies, err, uint32(nbdtest.RepErrTLS))
		}
	})
}

// TestAllowPeerByDefault: other users get nothing, whatever the mode of the
// socket. It needs root to be somebody else; other users check themselves only.
func TestAllowPeerByDefault(t *testing.T) {
	h, uri := listen(t, nbd.Export{Name: "x", Device: nbdtest.NewDevice(512, false)})
	tool(t, libnbd, "nbdinfo", "--size", uri("x"))
	if os.Geteuid() != 0 {
		return
	}
	dir, err := os.MkdirTemp("/tmp", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	h.serves.Go(func() { h.s.ServeListener(h.ctx, ln) })
	for _, f := range []string{dir, path} {
		if err := os.Chmod(f, 0o777); err != nil {
			t.Fatal(err)
		}
	}
	rejected := h.s.Stats().Rejected
	cmd := exec.CommandContext(t.Context(), "nbdinfo", "--size", "nbd+unix:///x?socket="+path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Errorf("another user got %s", out)
	}
	if n := h.s.Stats().Rejected - rejected; n != 1 {
		t.Errorf("%d connections were refused, want 1", n)
	}
}

func TestMaxPerPeer(t *testing.T) {
	h := newHarness(t, nbd.Config{MaxPerPeer: 2}, nbd.Export{Device: nbdtest.NewDevice(512, false)})
	over := func(client, server net.Conn) {
		t.Helper()
		defer client.Close()
		if err := wait(t, "Serve", h.serve(server)); !errors.Is(err, nbd.ErrTooManyConnections) {
			t.Errorf("Serve() = %v, want %v", err, nbd.ErrTooManyConnections)
		}
	}
	a, aEnds := h.dial("")
	h.dial("")
	client, server := socketpair(t)
	over(client, server)

	// A host is another peer than a user.
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	connect := func() (net.Conn, net.Conn) {
		t.Helper()
		client, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		server, err := ln.Accept()
		if err != nil {
			t.Fatal(err)
		}
		return client, server
	}
	for range 2 {
		client, server := connect()
		defer client.Close()
		h.serve(server)
		if _, err := nbdtest.Dial(client, ""); err != nil {
			t.Fatal(err)
		}
	}
	tcpClient, tcpServer := connect()
	over(tcpClient, tcpServer)

	// The kernel's connections are not a peer's.
	kernel, other := socketpair(t)
	defer kernel.Close()
	h.serves.Go(func() { h.s.ServeTransmission(h.ctx, other, ""); other.Close() })
	c := &nbdtest.Client{Conn: kernel}
	if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
		t.Error(errno, err)
	}

	if err := a.Disconnect(); err != nil {
		t.Error(err)
	}
	wait(t, "Serve", aEnds)
	h.dial("") // there is room again
}

// TestPeersShutOut: clients by TCP that never end their handshakes shut out neither
// other hosts, nor those of this machine, and the kernel has its connection whoever
// has all others.
func TestPeersShutOut(t *testing.T) {
	h := newHarness(t, nbd.Config{MaxConnections: 8}, nbd.Export{Device: nbdtest.NewDevice(512, false)})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.serves.Go(func() { h.s.ServeListener(h.ctx, ln) })
	silent := func(host byte) {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, host)}}
		c, err := d.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
	for hosts, want := range []nbd.Stats{{}, {Connections: 2, Rejected: 2}, {Connections: 4, Rejected: 4}, {Connections: 6, Rejected: 6}, {Connections: 6, Rejected: 10}} {
		for range min(hosts, 1) * 4 {
			silent(byte(hosts))
		}
		eventually(t, fmt.Sprintf("%d hosts have %d connections", hosts, want.Connections), func() bool {
			st := h.s.Stats()
			return st.Connections == want.Connections && st.Rejected == want.Rejected
		})
	}
	h.dial("")
	h.dial("")
	_, ends := h.raw()
	if err := wait(t, "Serve", ends); !errors.Is(err, nbd.ErrTooManyConnections) {
		t.Errorf("Serve() = %v, want %v", err, nbd.ErrTooManyConnections)
	}
	kernel, other := socketpair(t)
	defer kernel.Close()
	h.serves.Go(func() { h.s.ServeTransmission(h.ctx, other, ""); other.Close() })
	c := &nbdtest.Client{Conn: kernel}
	if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
		t.Errorf("the kernel: error %d, %v", errno, err)
	}
}
