package nbd

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A Peer is the process at the other end of a Unix socket, as the kernel knew
// it when it connected.
type Peer struct {
	UID, GID uint32
	PID      int32
}

// ownOrRoot is what allows peers if nothing else is configured.
func ownOrRoot(p Peer) bool { return p.UID == 0 || int(p.UID) == os.Geteuid() }

// A peerKey stands for the peers that share a limit.
type peerKey struct {
	kind peerKind
	uid  uint32       // of a peerUser
	host netip.Prefix // of a peerHost
}

type peerKind int

const (
	peerOther  peerKind = iota // of a connection that is neither
	peerUser                   // on Unix sockets
	peerHost                   // by TCP
	peerKernel                 // of ServeTransmission
	peerKinds
)

// checkPeer returns whose limit counts, or ErrPeer.
func (s *Server) checkPeer(conn net.Conn) (peerKey, error) {
	_, local := conn.(*net.UnixConn)
	if addr := conn.LocalAddr(); local || addr != nil && strings.HasPrefix(addr.Network(), "unix") {
		p, err := unixPeer(conn)
		if err != nil {
			return peerKey{}, err
		}
		if !s.cfg.AllowPeer(p) {
			return peerKey{}, fmt.Errorf("nbd: process %d of user %d: %w", p.PID, p.UID, ErrPeer)
		}
		return peerKey{kind: peerUser, uid: p.UID}, nil
	}
	if addr, ok := conn.RemoteAddr().(*net.TCPAddr); ok {
		// Who has an IPv6 address mostly has all that differ in the last half.
		ip := addr.AddrPort().Addr().Unmap()
		host, err := ip.Prefix(min(ip.BitLen(), 64))
		if err == nil {
			return peerKey{kind: peerHost, host: host}, nil
		}
	}
	return peerKey{}, nil
}

// unixPeer asks the kernel who connected.
func unixPeer(conn net.Conn) (Peer, error) {
	var cred *unix.Ucred
	var errno error
	err := control(conn, func(fd uintptr) {
		cred, errno = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err == nil {
		err = os.NewSyscallError("getsockopt", errno)
	}
	if err != nil {
		return Peer{}, fmt.Errorf("nbd: asking who connected: %w", err)
	}
	return Peer{UID: cred.Uid, GID: cred.Gid, PID: cred.Pid}, nil
}

// checkListener refuses to serve plaintext to other hosts.
func (s *Server) checkListener(ln net.Listener) error {
	addr := ln.Addr()
	if !isTCP(addr) || s.cfg.TLS != nil {
		return nil
	}
	ap, err := netip.ParseAddrPort(addr.String())
	if err == nil && ap.Addr().Unmap().IsLoopback() {
		return nil
	}
	return fmt.Errorf("nbd: serving on %s: only a loopback address may be served without TLS", addr)
}

func isTCP(addr net.Addr) bool {
	return addr != nil && strings.HasPrefix(addr.Network(), "tcp")
}

// requiresTLS tells whether a client has to begin with STARTTLS.
func (s *Server) requiresTLS(conn net.Conn) bool {
	return s.cfg.RequireTLS || s.cfg.TLS != nil && isTCP(conn.LocalAddr())
}

// closeTLS tells a TLS peer that the stream ends here and was not cut, and takes what
// the peer still says, up to its end, for a moment: a TCP connection that is closed with
// something unread is reset, and the last replies are lost.
func closeTLS(conn net.Conn) {
	if tc, ok := conn.(*tls.Conn); ok && tc.SetDeadline(time.Now().Add(lastCalls)) == nil && tc.CloseWrite() == nil {
		_, _ = io.Copy(io.Discard, tc)
	}
}
