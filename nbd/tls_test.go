package nbd_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// A pki is a certificate authority and what a server and a client need of it.
type pki struct {
	server, client *tls.Config
	dir            string // for GnuTLS clients: ca-cert.pem, client-cert.pem, client-key.pem
}

func newPKI(t testing.TB) *pki {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	newKey := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		return k
	}
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber:          big.NewInt(serial),
			Subject:               pkix.Name{CommonName: name},
			NotBefore:             time.Now().Add(-time.Hour),
			NotAfter:              time.Now().Add(24 * time.Hour),
			BasicConstraintsValid: true,
		}
	}
	caKey := newKey()
	ca := template(1, "nbd test authority")
	ca.IsCA = true
	ca.KeyUsage = x509.KeyUsageCertSign
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey)
	must(err)
	ca, err = x509.ParseCertificate(caDER)
	must(err)

	issue := func(serial int64, name string, usage x509.ExtKeyUsage) (tls.Certificate, *ecdsa.PrivateKey) {
		key := newKey()
		c := template(serial, name)
		c.KeyUsage = x509.KeyUsageDigitalSignature
		c.ExtKeyUsage = []x509.ExtKeyUsage{usage}
		c.DNSNames = []string{"localhost"}
		c.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		must(err)
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, key
	}
	serverCert, _ := issue(2, "nbd test server", x509.ExtKeyUsageServerAuth)
	clientCert, clientKey := issue(3, "nbd test client", x509.ExtKeyUsageClientAuth)

	p := &pki{dir: t.TempDir()}
	write := func(name, kind string, der []byte) {
		must(os.WriteFile(filepath.Join(p.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(clientKey)
	must(err)
	write("ca-cert.pem", "CERTIFICATE", caDER)
	write("client-cert.pem", "CERTIFICATE", clientCert.Certificate[0])
	write("client-key.pem", "PRIVATE KEY", keyDER)

	roots := x509.NewCertPool()
	roots.AddCert(ca)
	p.server = &tls.Config{Certificates: []tls.Certificate{serverCert}, ClientCAs: roots, ClientAuth: tls.RequireAndVerifyClientCert}
	p.client = &tls.Config{Certificates: []tls.Certificate{clientCert}, RootCAs: roots, ServerName: "localhost"}
	return p
}

// startTLS sends STARTTLS and returns a client that goes on in TLS.
func startTLS(t testing.TB, c *nbdtest.Client, cfg *tls.Config) *nbdtest.Client {
	t.Helper()
	option(t, c, nbdtest.OptStartTLS, nil)
	conn := tls.Client(c.Conn, cfg)
	if err := conn.Handshake(); err != nil {
		t.Fatal(err)
	}
	return &nbdtest.Client{Conn: conn}
}

func TestTLS(t *testing.T) {
	p := newPKI(t)
	dev := nbdtest.NewDevice(4<<20, false)
	exports := []nbd.Export{{Name: "x", Device: dev, Trim: true}}
	optional := newHarness(t, nbd.Config{TLS: p.server}, exports...)
	required := newHarness(t, nbd.Config{TLS: p.server, RequireTLS: true}, exports...)
	last := func(t *testing.T, c *nbdtest.Client, opt uint32, data []byte) uint32 {
		t.Helper()
		replies, err := c.Option(opt, data)
		if err != nil {
			t.Fatal(err)
		}
		return replies[len(replies)-1].Type
	}

	t.Run("required: every option but STARTTLS and ABORT is refused", func(t *testing.T) {
		required.t = t
		c, result := required.greeted(3)
		for _, opt := range []uint32{nbdtest.OptList, nbdtest.OptPeek, nbdtest.OptInfo, nbdtest.OptGo, nbdtest.OptStructuredReply,
			nbdtest.OptListMeta, nbdtest.OptSetMeta, nbdtest.OptExtendedHeaders, 99} {
			if got := last(t, c, opt, nbdtest.GoData("x")); got != nbdtest.RepErrTLS {
				t.Errorf("option %d: reply %#x, want TLS_REQD", opt, got)
			}
		}
		if got := last(t, c, nbdtest.OptAbort, nil); got != nbdtest.RepAck {
			t.Errorf("ABORT: reply %#x", got)
		}
		if err := wait(t, "Serve", result); err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	t.Run("required: EXPORT_NAME ends the connection", func(t *testing.T) {
		required.t = t
		c, result := required.greeted(3)
		if _, err := c.Conn.Write(nbdtest.AppendOption(nil, nbdtest.OptExportName, []byte("x"))); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c.Conn); err != nil || len(got) != 0 {
			t.Errorf("server sent %x, %v", got, err)
		}
		if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrProtocol) {
			t.Errorf("Serve() = %v, want %v", err, nbd.ErrProtocol)
		}
	})
	t.Run("required: works with TLS", func(t *testing.T) {
		required.t = t
		raw, result := required.greeted(3)
		counted := &countedConn{Conn: raw.Conn}
		raw.Conn = counted
		c := startTLS(t, raw, p.client)
		if err := c.Go("x"); err != nil {
			t.Fatal(err)
		}
		for _, n := range []int{1, 512, 100_000, 3 << 20} {
			data, got := pattern(n, uint64(n)), make([]byte, n)
			if errno, err := c.Write(data, 7, 0); errno != 0 || err != nil {
				t.Fatal(errno, err)
			}
			if errno, err := c.Read(got, 7); errno != 0 || err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read of %d bytes: error %d, %v", n, errno, err)
			}
		}
		// The end is announced, so that nobody can cut the stream unnoticed.
		// Package tls doesn't tell, but the record can be seen.
		before := counted.n
		if err := c.Disconnect(); err != nil {
			t.Error(err)
		}
		if counted.n == before {
			t.Error("the server sent no close_notify")
		}
		if err := wait(t, "Serve", result); err != nil {
			t.Errorf("Serve() = %v", err)
		}
	})
	t.Run("not required: works without TLS", func(t *testing.T) {
		optional.t = t
		c, _ := optional.dial("x")
		if errno, err := c.Read(make([]byte, 512), 0); errno != 0 || err != nil {
			t.Error(errno, err)
		}
	})
	t.Run("STARTTLS with data is invalid, and may be sent again", func(t *testing.T) {
		optional.t = t
		raw, _ := optional.greeted(3)
		if got := last(t, raw, nbdtest.OptStartTLS, []byte{0}); got != nbdtest.RepErrInvalid {
			t.Errorf("reply %#x", got)
		}
		c := startTLS(t, raw, p.client)
		if got := last(t, c, nbdtest.OptStartTLS, nil); got != nbdtest.RepErrInvalid {
			t.Errorf("second STARTTLS: reply %#x", got)
		}
		if err := c.Go("x"); err != nil {
			t.Error(err)
		}
	})
	t.Run("what was agreed on before is void", func(t *testing.T) {
		optional.t = t
		raw, _ := optional.greeted(3)
		option(t, raw, nbdtest.OptExtendedHeaders, nil)
		option(t, raw, nbdtest.OptSetMeta, nbdtest.MetaData("x", "base:allocation"))
		c := startTLS(t, raw, p.client)
		// Only possible again if extended headers are forgotten.
		option(t, c, nbdtest.OptStructuredReply, nil)
		if err := c.Go("x"); err != nil {
			t.Fatal(err)
		}
		if err := c.Send(nbdtest.Request{Cmd: nbdtest.BlockStatus, Len: 512}, nil); err != nil {
			t.Fatal(err)
		}
		if k, err := c.ReadChunk(); err != nil || k.Errno != eINVAL {
			t.Errorf("BLOCK_STATUS: %+v, %v; want it invalid", k, err)
		}
	})
	t.Run("plaintext sent along with STARTTLS is thrown away", func(t *testing.T) {
		optional.t = t
		raw, _ := optional.greeted(3)
		// As somebody on the way would put it in.
		in := nbdtest.AppendOption(nil, nbdtest.OptStartTLS, nil)
		in = nbdtest.AppendOption(in, nbdtest.OptStructuredReply, nil)
		in = nbdtest.AppendOption(in, nbdtest.OptGo, nbdtest.GoData("x"))
		if _, err := raw.Conn.Write(in); err != nil {
			t.Fatal(err)
		}
		if r, err := raw.ReadOptionReply(); err != nil || r.Opt != nbdtest.OptStartTLS || r.Type != nbdtest.RepAck {
			t.Fatalf("%+v, %v", r, err)
		}
		conn := tls.Client(raw.Conn, p.client)
		if err := conn.Handshake(); err != nil {
			t.Fatal(err)
		}
		c := &nbdtest.Client{Conn: conn}
		if replies, err := c.Option(nbdtest.OptList, nil); err != nil || len(replies) != 2 {
			t.Errorf("LIST: %+v, %v", replies, err)
		}
		if err := c.Go("x"); err != nil || c.Flags&nbd.FlagSendDF != 0 {
			t.Errorf("GO: flags %#x, %v", c.Flags, err)
		}
	})
	t.Run("no certificate, no service", func(t *testing.T) {
		required.t = t
		raw, result := required.greeted(3)
		option(t, raw, nbdtest.OptStartTLS, nil)
		conn := tls.Client(raw.Conn, &tls.Config{RootCAs: p.client.RootCAs, ServerName: "localhost"})
		_ = conn.Handshake() // with TLS 1.3, the client doesn't know yet
		if _, err := io.ReadAll(conn); err == nil {
			t.Error("the server sent no alert")
		}
		if err := wait(t, "Serve", result); err == nil {
			t.Error("Serve() = nil")
		}
	})
	t.Run("no TLS handshake after STARTTLS", func(t *testing.T) {
		h := newHarness(t, nbd.Config{TLS: p.server, HandshakeTimeout: 50 * time.Millisecond}, exports...)
		raw, result := h.greeted(3)
		option(t, raw, nbdtest.OptStartTLS, nil)
		if err := wait(t, "Serve", result); !errors.Is(err, nbd.ErrHandshakeTimeout) {
			t.Errorf("Serve() = %v, want %v", err, nbd.ErrHandshakeTimeout)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		h := newHarness(t, nbd.Config{TLS: p.server}, exports...)
		raw, result := h.greeted(3)
		c := startTLS(t, raw, p.client)
		if err := c.Go("x"); err != nil {
			t.Fatal(err)
		}
		h.cancel(errTestEnds)
		if err := wait(t, "Serve", result); err != errTestEnds {
			t.Errorf("Serve() = %v", err)
		}
		if b, err := io.ReadAll(c.Conn); err != nil || len(b) != 0 {
			t.Errorf("%x, %v; want an orderly end", b, err)
		}
	})

	t.Run("required but not configured", func(t *testing.T) {
		if s, err := nbd.New(nbd.Config{RequireTLS: true}, exports...); err == nil {
			s.Close()
			t.Error("New() succeeded")
		}
	})
	t.Run("TCP: optional is required", func(t *testing.T) {
		optional.t = t
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		result := make(chan error, 1)
		go func() { result <- optional.s.ServeListener(ctx, ln) }()
		conn, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		c := &nbdtest.Client{Conn: conn}
		if _, err := c.Greet(3); err != nil {
			t.Fatal(err)
		}
		if got := last(t, c, nbdtest.OptGo, nbdtest.GoData("x")); got != nbdtest.RepErrTLS {
			t.Errorf("GO without TLS: reply %#x, want TLS_REQD", got)
		}
		if err := startTLS(t, c, p.client).Go("x"); err != nil {
			t.Errorf("GO with TLS: %v", err)
		}
		cancel(errTestEnds)
		wait(t, "ServeListener", result)
	})
	t.Run("listeners", func(t *testing.T) {
		plain := newHarness(t, nbd.Config{}, exports...)
		for _, tt := range []struct {
			h    *harness
			addr string
			ok   bool
		}{
			{plain, "127.0.0.1:0", true},
			{plain, "0.0.0.0:0", false},
			{plain, ":0", false},
			{optional, "0.0.0.0:0", true},
			{required, "0.0.0.0:0", true},
		} {
			ln, err := net.Listen("tcp", tt.addr)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancelCause(context.Background())
			result := make(chan error, 1)
			go func() { result <- tt.h.s.ServeListener(ctx, ln) }()
			if tt.ok {
				time.Sleep(10 * time.Millisecond)
				cancel(errTestEnds)
			}
			err = wait(t, "ServeListener", result)
			if got := err == errTestEnds; got != tt.ok || !tt.ok && !strings.Contains(err.Error(), "TLS") {
				t.Errorf("ServeListener on %s = %v, want it to serve: %v", tt.addr, err, tt.ok)
			}
			cancel(nil)
			if _, err := ln.Accept(); !errors.Is(err, net.ErrClosed) {
				t.Errorf("the listener is open: %v", err)
			}
		}
	})
}

// A countedConn counts what is read.
type countedConn struct {
	net.Conn
	n int
}

func (c *countedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.n += n
	return n, err
}

// TestTLSInterop lets the TLS clients of libnbd and QEMU speak to the server.
func TestTLSInterop(t *testing.T) {
	p := newPKI(t)
	const size = 8 << 20
	dev := nbdtest.NewDevice(size, false)
	h := newHarness(t, nbd.Config{TLS: p.server, RequireTLS: true}, nbd.Export{Name: "x", Device: dev, Trim: true})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.serves.Go(func() {
		if err := h.s.ServeListener(h.ctx, ln); err != errTestEnds {
			t.Errorf("ServeListener() = %v", err)
		}
	})
	_, port, err := net.SplitHostPort(ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	uri := "nbds://localhost:" + port + "/x?tls-certificates=" + p.dir

	out := tool(t, libnbd, "nbdinfo", uri)
	if !strings.Contains(out, "with TLS, using structured packets") {
		t.Errorf("nbdinfo:\n%s", out)
	}
	in, back := filepath.Join(p.dir, "in"), filepath.Join(p.dir, "back")
	data := pattern(size, 4)
	if err := os.WriteFile(in, data, 0o600); err != nil {
		t.Fatal(err)
	}
	tool(t, libnbd, "nbdcopy", "--connections=2", in, uri)
	if !bytes.Equal(dev.Bytes(0, size), data) {
		t.Error("nbdcopy to the server: the device has other bytes")
	}
	tool(t, libnbd, "nbdcopy", "--connections=2", uri, back)
	if got, err := os.ReadFile(back); err != nil || !bytes.Equal(got, data) {
		t.Errorf("nbdcopy from the server: other bytes, %v", err)
	}
	if out, err := run(t, libnbd, "nbdinfo", "nbd://localhost:"+port+"/x"); err == nil {
		t.Errorf("nbdinfo without TLS succeeded:\n%s", out)
	}

	creds := []string{"--object", "tls-creds-x509,id=tls0,endpoint=client,dir=" + p.dir, "--image-opts"}
	image := "driver=nbd,server.type=inet,server.host=localhost,server.port=" + port + ",export=x,tls-creds=tls0"
	out = tool(t, qemu, "qemu-io", append(creds, "-c", "write -P 0x5a 1M 3M", "-c", "read -P 0x5a 1M 3M", "-c", "flush", image)...)
	if strings.Contains(out, "failed") || !bytes.Equal(dev.Bytes(1<<20, 3<<20), bytes.Repeat([]byte{0x5a}, 3<<20)) {
		t.Errorf("qemu-io:\n%s", out)
	}
	if out := tool(t, qemu, "qemu-img", append([]string{"info", "--output=json"}, append(creds, image)...)...); !strings.Contains(out, "8388608") {
		t.Errorf("qemu-img info:\n%s", out)
	}
}

// BenchmarkTLS measures a connection with TLS.
func BenchmarkTLS(b *testing.B) {
	p := newPKI(b)
	h := newHarness(b, nbd.Config{TLS: p.server}, nbd.Export{Device: nullDevice{nbdtest.NewDevice(64<<20, false)}})
	raw, _ := h.greeted(3)
	c := startTLS(b, raw, p.client)
	if err := c.Go(""); err != nil {
		b.Fatal(err)
	}
	p1 := make([]byte, 128<<10)
	b.SetBytes(int64(len(p1)))
	for b.Loop() {
		if errno, err := c.Read(p1, 0); errno != 0 || err != nil {
			b.Fatal(errno, err)
		}
	}
}
