package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
)

// Where clients connect: a Unix socket, a TCP address, or sockets that the
// service manager has opened. The kernel device is in kernel.go.

// tlsHelp is where --tls-certificates looks, the names that nbdkit, QEMU and
// libnbd use.
const tlsHelp = "`DIR` with ca-cert.pem, server-cert.pem and server-key.pem: offer TLS to clients whose certificate that CA has signed"

// loadTLS reads the certificates of a directory. Every client has to show one:
// who may connect may read the disk.
func loadTLS(dir string) (*tls.Config, error) {
	pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, err
	}
	ca := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("%w; without it no client could be told from another", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s holds no certificate", ca)
	}
	return &tls.Config{
		MinVersion:       tls.VersionTLS12,
		Certificates:     []tls.Certificate{pair},
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: func(cs tls.ConnectionState) error { return verifyClient(roots, cs.PeerCertificates) },
	}, nil
}

// verifyClient checks the certificates of a client, of a resumed session too, as
// tls.RequireAndVerifyClientCert does. That would also send the names of the CAs with
// TLS 1.3, and GnuTLS 3.7.9 (libnbd, QEMU) then has no certificate to show where its
// key is RSA, which is certtool's default.
func verifyClient(roots *x509.CertPool, certs []*x509.Certificate) error {
	if len(certs) == 0 {
		return errors.New("the client showed no certificate")
	}
	between := x509.NewCertPool()
	for _, c := range certs[1:] {
		between.AddCert(c)
	}
	_, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return &tls.CertificateVerificationError{UnverifiedCertificates: certs, Err: err}
	}
	return nil
}

// certificateFiles are the files of --tls-certificates, which are read by a goroutine: a
// server that takes over can't wait for them, as they may be on the volume that it is to
// serve.
type certificateFiles struct {
	read   chan struct{} // closed when config or err is there
	config *tls.Config
	err    error
}

// certificatesLimit is how long is waited for them where it can't be for good.
const certificatesLimit = 2 * time.Second

func readCertificates(dir string) *certificateFiles {
	c := &certificateFiles{read: make(chan struct{})}
	go func() {
		defer close(c.read)
		if c.config, c.err = loadTLS(dir); c.err != nil {
			c.err = fmt.Errorf("--tls-certificates: %w", c.err)
		}
	}()
	return c
}

// wait returns what is wrong with them.
func (c *certificateFiles) wait() error {
	<-c.read
	return c.err
}

// check is wait, and nil after a time.
func (c *certificateFiles) check(limit time.Duration) error {
	select {
	case <-c.read:
		return c.err
	case <-time.After(limit):
		return nil
	}
}

// server is the configuration for clients that may come before they are read.
func (c *certificateFiles) server() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		ClientAuth: tls.RequireAndVerifyClientCert,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			select {
			case <-c.read:
				return c.config, c.err
			case <-time.After(certificatesLimit):
				return nil, errors.New("the server's certificates have not been read yet")
			}
		},
	}
}

// checkTCP finds early what ServeListener would find late: an address that is
// none, or one that other hosts can reach in plaintext.
func checkTCP(address string, secure bool) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "" {
		return usagef("--tcp is HOST:PORT, not %q", address)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return usagef("--tcp has the port %q, which is none", port)
	}
	ip, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	if host != "" && err != nil {
		return usagef("--tcp takes an IP address, not a name: %q", host)
	}
	if !secure && (host == "" || !ip.Unmap().IsLoopback()) {
		return usagef("--tcp %s can be reached from other hosts: it needs --tls-certificates", address)
	}
	return nil
}

// listen opens the listeners that the flags ask for, and adds those of the
// service manager.
func (d *daemon) listen(ctx context.Context) (_ []net.Listener, err error) {
	var list []net.Listener
	defer func() {
		if err != nil {
			for _, l := range list {
				l.Close()
			}
		}
	}()
	l, err := d.link.heldListener(heldListener)
	if l != nil {
		d.keeps("--listen", &d.opts.listen, l)
	} else if err == nil && d.opts.listen != "" {
		if l, err = listenUnix(d.opts.listen); err == nil {
			err = d.link.holdListener(heldListener, l)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("--listen: %w", err)
	}
	if l != nil {
		list = append(list, l)
	}
	if d.opts.tcp != "" {
		l, err := d.link.heldListener(heldTCP)
		if l == nil && err == nil {
			if l, err = (&net.ListenConfig{}).Listen(ctx, "tcp", d.opts.tcp); err == nil {
				err = d.link.holdListener(heldTCP, l)
			}
		}
		if op, ok := errors.AsType[*net.OpError](err); ok {
			err = op.Err
		}
		if err != nil {
			return nil, fmt.Errorf("--tcp %s: %w", d.opts.tcp, err)
		}
		d.mu.Lock()
		d.tcp = l.Addr().String() // with the port, if any was asked for
		d.mu.Unlock()
		list = append(list, l)
	}
	return append(list, d.inherited...), nil
}

// keeps has a flag say where a socket is that the server before has opened, and that
// those who hold it wait at, whatever it says now. The next server might come back to
// the flags of before, and would have to find the socket as it was.
func (d *daemon) keeps(flag string, value *string, l net.Listener) {
	is := l.Addr().String()
	d.mu.Lock()
	before := *value
	*value = is
	d.mu.Unlock()
	if before != is && before != "" {
		d.log.Warn("the volume keeps its socket until it is stopped and served anew", zap.String("flag", flag), zap.String("is", is), zap.String("wanted", before))
	}
}

// serverConfig is the configuration of the NBD server.
func (d *daemon) serverConfig() nbd.Config {
	c := nbd.Config{Log: d.log, AllowPeer: d.allowPeer, Kernel: d.opts.attach != ""}
	if d.opts.tls != nil {
		c.TLS = d.opts.tls.server()
	}
	if d.opts.swap {
		// Threads that are there, and no io_uring, which allocates for each request.
		c.Memory, c.InFlight, c.Engine = d.memory, swapInFlight, nbd.EnginePortable
	}
	return c
}

// checkSocketPath finds early what listenUnix would find late.
func checkSocketPath(name string) error {
	// sun_path of unix(7), with its NUL.
	if len(name) > 107 {
		return usagef("%s is longer than the 107 bytes that a socket's path can have", name)
	}
	if fi, err := os.Stat(filepath.Dir(name)); err != nil {
		return err
	} else if !fi.IsDir() {
		return fmt.Errorf("%s is not a directory", filepath.Dir(name))
	}
	return clearSocket(name)
}

// clearSocket removes a socket that nobody listens on any more. Anything else
// in its place is an error.
func clearSocket(name string) error {
	fi, err := os.Lstat(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSocket == 0 {
		return withCode(codeBusy, fmt.Errorf("%s exists and is no socket", name))
	}
	c, err := net.Dial("unix", name)
	if err == nil {
		c.Close()
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return withCode(codeBusy, fmt.Errorf("%s is in use by another server", name))
	}
	return os.Remove(name)
}

// listenUnix listens on a Unix socket that only its owner can use. A socket
// that nobody listens on any more is replaced; anything else in the way is an
// error.
func listenUnix(name string) (*net.UnixListener, error) {
	if err := clearSocket(name); err != nil {
		return nil, err
	}
	// The mode must be right from the first moment, and bind(2) takes it from
	// the process's mask. Nothing else creates files at this time.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
	unix.Umask(old)
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w; is the path longer than 107 bytes?", err)
	}
	return l, err
}
