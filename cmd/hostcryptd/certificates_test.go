package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// TestCertificatesLate: who takes over doesn't wait for files that can't be read, and
// clients are told what came of them when they could.
func TestCertificatesLate(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "server-cert.pem")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	c := readCertificates(filepath.Dir(pipe))
	if err := c.check(time.Millisecond); err != nil {
		t.Fatalf("check() = %v before anything was read", err)
	}
	f, err := os.OpenFile(pipe, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("not PEM"); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := c.wait(); err == nil {
		t.Errorf("wait() = %v, want what is wrong with the files", err)
	}
	if err := c.check(time.Hour); err == nil {
		t.Error("check() = nil, though the files are of no use")
	}
	if cfg, err := c.server().GetConfigForClient(nil); cfg != nil || err == nil {
		t.Errorf("a client gets %v, %v", cfg, err)
	}
}

// An authority signs certificates.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
}

// issue signs a certificate that is good for a time from now.
func (a *authority) issue(template x509.Certificate, life time.Duration, key crypto.Signer) *authority {
	a.t.Helper()
	template.SerialNumber, template.Subject.CommonName = big.NewInt(1), "hostcryptd test"
	template.BasicConstraintsValid = true
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(life)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = &template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, &template, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return &authority{a.t, cert, key}
}

// shown is what a client or a server shows: its certificate and some between.
func (a *authority) shown(between ...*authority) tls.Certificate {
	c := tls.Certificate{Certificate: [][]byte{a.cert.Raw}, PrivateKey: a.key}
	for _, b := range between {
		c.Certificate = append(c.Certificate, b.cert.Raw)
	}
	return c
}

// TestCertificatesOfClients: who shows no certificate of the CA, for clients and
// now, is refused, at first and with a session that is resumed.
func TestCertificatesOfClients(t *testing.T) {
	dir := t.TempDir()
	ln, err := net.Listen("unix", filepath.Join(dir, "sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	// The bubble's clock is that of the certificates too.
	synctest.Test(t, func(t *testing.T) {
		newKey := func() crypto.Signer {
			k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
		const long = 1000 * time.Hour
		authorities := x509.Certificate{IsCA: true, KeyUsage: x509.KeyUsageCertSign}
		clients := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
		servers := x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, DNSNames: []string{"localhost"}}
		self := &authority{t: t}
		ca := self.issue(authorities, long, newKey())
		stranger := self.issue(authorities, long, newKey()) // of the same name
		server := ca.issue(servers, long, newKey())

		key, err := x509.MarshalPKCS8PrivateKey(server.key)
		if err != nil {
			t.Fatal(err)
		}
		for name, b := range map[string]*pem.Block{
			"ca-cert.pem":     {Type: "CERTIFICATE", Bytes: ca.cert.Raw},
			"server-cert.pem": {Type: "CERTIFICATE", Bytes: server.cert.Raw},
			"server-key.pem":  {Type: "PRIVATE KEY", Bytes: key},
		} {
			if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		files := readCertificates(dir)
		if err := files.wait(); err != nil {
			t.Fatal(err)
		}
		serverConfig := files.server() // one for all, as the server has it: it makes the tickets
		roots := x509.NewCertPool()
		roots.AddCert(ca.cert)

		var resumed bool
		// connect returns what the server says of a client, after both have sent something.
		connect := func(cfg *tls.Config) error {
			t.Helper()
			result := make(chan error, 1)
			go func() {
				nc, err := ln.Accept()
				if err != nil {
					result <- err
					return
				}
				defer nc.Close()
				conn := tls.Server(nc, serverConfig)
				if err := conn.Handshake(); err != nil {
					result <- err
					return
				}
				_, err = conn.Write([]byte{1})
				result <- err
			}()
			nc, err := net.Dial("unix", ln.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			conn := tls.Client(nc, cfg)
			_, err = conn.Read(make([]byte, 1)) // and the tickets before it
			if serr := <-result; serr != nil || err != nil {
				return errors.Join(serr, err)
			}
			resumed = conn.ConnectionState().DidResume
			return nil
		}
		clientConfig := func(version uint16, c tls.Certificate) *tls.Config {
			cfg := &tls.Config{RootCAs: roots, ServerName: "localhost", MinVersion: version, MaxVersion: version}
			if c.Certificate != nil {
				// Shown whatever the server asks for.
				cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &c, nil }
			}
			return cfg
		}

		for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
			authorities.Subject.Organization = []string{"between"}
			between := ca.issue(authorities, 24*time.Hour, newKey())
			for _, tt := range []struct {
				name string
				cert tls.Certificate
				ok   bool
			}{
				{"of the CA", ca.issue(clients, time.Hour, newKey()).shown(), true},
				{"for any use", ca.issue(x509.Certificate{}, time.Hour, newKey()).shown(), true},
				{"by way of another authority", between.issue(clients, time.Hour, newKey()).shown(between), true},
				{"the authority between isn't shown", between.issue(clients, time.Hour, newKey()).shown(), false},
				{"none", tls.Certificate{}, false},
				{"of a CA of the same name", stranger.issue(clients, time.Hour, newKey()).shown(), false},
				{"and that CA", stranger.issue(clients, time.Hour, newKey()).shown(stranger), false},
				{"its own", self.issue(clients, time.Hour, newKey()).shown(), false},
				{"the server's", server.shown(), false},
				{"expired", ca.issue(clients, -time.Minute, newKey()).shown(), false},
				{"signed by a client", ca.issue(clients, time.Hour, newKey()).issue(clients, time.Hour, newKey()).shown(), false},
			} {
				if err := connect(clientConfig(version, tt.cert)); (err == nil) != tt.ok {
					t.Errorf("%s, certificate %s: %v, want it accepted: %v", tls.VersionName(version), tt.name, err, tt.ok)
				}
			}
			// The session's certificate is good for longer than what vouches for it.
			cfg := clientConfig(version, between.issue(clients, long, newKey()).shown(between))
			cfg.ClientSessionCache = tls.NewLRUClientSessionCache(1)
			for _, want := range []bool{false, true} {
				if err := connect(cfg); err != nil || resumed != want {
					t.Errorf("%s: %v, resumed: %v, want %v", tls.VersionName(version), err, resumed, want)
				}
			}
			time.Sleep(25 * time.Hour)
			if err := connect(cfg); err == nil {
				t.Errorf("%s: a session goes on after the end of an authority's certificate", tls.VersionName(version))
			}
		}
	})
}
