// Package vaulttest is a test double of what hostcryptd meets in Azure: Key
// Vault, Entra ID and the instance metadata service (IMDS), over real TLS and
// with real RSA.
//
// Nothing in hostcryptd knows that it talks to the double. A unit test calls
// [Server.Start] and gives [Server.Transport] to the client: the transport maps
// vault and login names and 169.254.169.254 to loopback, and refuses everything
// else. A virtual machine runs [Server.Serve] on its own addresses, has the names in
// its hosts file and [Server.CAPEM] in its certificate store.
//
// BEHAVIOUR.md lists what is imitated and how each point is known: recorded from
// the live service, documented, reported in an issue, or inferred.
//
// A Server may be used by several goroutines at once. Changes are visible to
// every request that arrives after the call returns.
package vaulttest

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Options configure a [Server]. The zero value is a double that behaves like the
// live service with purge protection on.
type Options struct {
	// Dir holds the double's state across restarts; empty means none. New loads
	// what [Server.Save] wrote there.
	Dir string

	// Tenant is the UUID of the Entra tenant that owns vaults and identities.
	Tenant string

	// Now is the double's clock; nil means time.Now.
	Now func() time.Time

	// AsyncDelay is how long deletions and recoveries take to become visible; 0
	// means 10 seconds.
	AsyncDelay time.Duration

	// RecoveryLevel of every key; empty means "Recoverable", which is soft delete
	// with purge protection.
	RecoveryLevel string

	// HSMKeys makes vaults Premium ones, whose keys are RSA-HSM.
	HSMKeys bool

	// Throttle makes vaults answer 429 to what is beyond the live service's
	// limits, times this factor. 0 means no limits.
	Throttle float64

	// PermitDelay is how long a change of permissions takes to count. The live
	// service needs several minutes; 0 means none.
	PermitDelay time.Duration

	// ArcKeys is the directory into which the Azure Arc agent writes the files
	// that its clients have to read. They are told that it's
	// /var/opt/azcmagent/tokens, and have to see it there. Empty means no agent.
	ArcKeys string

	// WrapWhenDisabled lets a disabled key wrap, as one report says the live
	// service does. The documentation says that it doesn't.
	WrapWhenDisabled bool

	// Plaintext is told every plaintext that a vault sees, with the route. It's
	// for tests that look for secrets where none should be.
	Plaintext func(route string, value []byte)
}

// A Server is the double. Make one with [New].
type Server struct {
	opts Options

	caCert *x509.Certificate
	caKey  *ecdsa.PrivateKey
	caPEM  []byte

	leafMu     sync.Mutex // guards the next two; separate because TLS handshakes run without mu
	leaves     map[string]*tls.Certificate
	badLeaves  map[string]CertificateFault
	unresolved sync.Map // host names that don't exist

	entraKey *rsa.PrivateKey // signs access tokens

	mu         sync.Mutex // guards all below
	keys       map[string]*key
	identities map[string]*Identity // by client id
	permitted  map[string]grant     // by client id
	system     string               // client id of the system assigned identity
	arcKeys    map[string]string    // outstanding challenges of the Arc agent, by content
	issuers    map[string]*issuer   // of federated tokens, by client id
	buckets    map[string]*bucket   // by vault
	shut       map[string]bool      // by vault
	failover   bool
	faults     []*Fault
	requests   []Request

	running
}

// running is the part of a Server that Start fills.
type running struct {
	tlsAddr, imdsAddr string
	stop              context.CancelFunc
	done              chan error
}

// DefaultTenant is the tenant of a Server whose Options don't name one.
const DefaultTenant = "2f1c5a54-6b0e-4c5b-9d3a-8e7f60112233"

var loginHosts = map[string]string{ // by cloud suffix
	"azure.net":         "login.microsoftonline.com",
	"azure.cn":          "login.chinacloudapi.cn",
	"usgovcloudapi.net": "login.microsoftonline.us",
	privateCloud:        "login." + privateCloud,
}

// privateCloud is a cloud that nobody knows: its vaults are vault.cloud.example,
// its managed HSMs managedhsm.cloud.example.
const privateCloud = "cloud.example"

// arcHost is where the Azure Arc agent answers its own host.
const arcHost = "127.0.0.1:40342"

// New makes a double with one identity, assigned by the system to this machine
// and permitted to get, wrapKey and unwrapKey, and with no keys. If Options.Dir
// holds a saved state, it has the keys, the certificate authority and the system
// assigned identity of that state instead.
func New(opts Options) (*Server, error) {
	opts.Tenant = cmp.Or(opts.Tenant, DefaultTenant)
	opts.AsyncDelay = cmp.Or(opts.AsyncDelay, 10*time.Second)
	opts.RecoveryLevel = cmp.Or(opts.RecoveryLevel, "Recoverable")
	if opts.Now == nil {
		opts.Now = time.Now
	}
	s := &Server{
		opts:       opts,
		leaves:     make(map[string]*tls.Certificate),
		keys:       make(map[string]*key),
		identities: make(map[string]*Identity),
		permitted:  make(map[string]grant),
		badLeaves:  make(map[string]CertificateFault),
		arcKeys:    make(map[string]string),
		issuers:    make(map[string]*issuer),
		buckets:    make(map[string]*bucket),
		shut:       make(map[string]bool),
	}
	var err error
	if s.entraKey, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		return nil, err
	}
	loaded, err := s.load()
	if err != nil {
		return nil, fmt.Errorf("vaulttest: loading state from %s: %w", opts.Dir, err)
	}
	if !loaded {
		if err := s.makeCA(); err != nil {
			return nil, err
		}
		s.system = newUUID()
		s.addIdentity(Identity{ClientID: s.system, ObjectID: newUUID(), Assigned: true}, "get", "wrapKey", "unwrapKey")
	}
	return s, nil
}

// CAPEM returns the certificate that a client has to trust.
func (s *Server) CAPEM() []byte { return s.caPEM }

// Start serves on two loopback ports until Close.
func (s *Server) Start() error {
	tl, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	il, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tl.Close()
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.running = running{tlsAddr: tl.Addr().String(), imdsAddr: il.Addr().String(), stop: cancel, done: make(chan error, 1)}
	go func() { s.done <- s.Serve(ctx, tl, il) }()
	return nil
}

// Close stops what Start started and waits for it.
func (s *Server) Close() error {
	s.stop()
	return <-s.done
}

// Addrs returns the loopback addresses of a started Server, for [Dial] in
// another process.
func (s *Server) Addrs() (tlsAddr, imdsAddr string) { return s.tlsAddr, s.imdsAddr }

// Transport returns a transport that reaches a started Server and nothing else.
func (s *Server) Transport() *http.Transport {
	t := Dial(s.tlsAddr, s.imdsAddr, s.caPEM)
	dial := t.DialContext
	t.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(addr)
		if _, gone := s.unresolved.Load(strings.ToLower(host)); gone {
			return nil, noSuchHost(network, addr)
		}
		return dial(ctx, network, addr)
	}
	return t
}

// SetResolves lets a host name exist or not for new connections of
// [Server.Transport]. All exist at first.
func (s *Server) SetResolves(host string, exists bool) {
	if exists {
		s.unresolved.Delete(strings.ToLower(host))
	} else {
		s.unresolved.Store(strings.ToLower(host), true)
	}
}

func noSuchHost(network, addr string) error {
	return &net.OpError{Op: "dial", Net: network, Err: &net.DNSError{Err: "no such host", Name: addr, IsNotFound: true}}
}

// Dial returns a transport for which every vault and login host is at tlsAddr,
// the IMDS and the Azure Arc agent are at imdsAddr, and no other host exists. It trusts only caPEM.
func Dial(tlsAddr, imdsAddr string, caPEM []byte) *http.Transport {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(caPEM)
	var d net.Dialer
	return &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			host, port, err := net.SplitHostPort(addr)
			switch {
			case err != nil:
				return nil, err
			case addr == "169.254.169.254:80" || addr == arcHost:
				return d.DialContext(ctx, "tcp", imdsAddr)
			case port == "443" && servedHost(host):
				return d.DialContext(ctx, "tcp", tlsAddr)
			}
			return nil, noSuchHost(network, addr)
		},
		TLSClientConfig:   &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		ForceAttemptHTTP2: true,
	}
}

// Serve serves vaults and Entra ID by TLS on one listener, the IMDS by plain HTTP
// on another, and closes both. It returns when ctx ends, with nil, or when accepting
// fails. Requests still under way are cut off.
func (s *Server) Serve(ctx context.Context, tlsListener, imdsListener net.Listener) error {
	base, cancel := context.WithCancel(context.Background())
	defer cancel()
	discard := log.New(io.Discard, "", 0) // aborted connections are part of the service
	web := &http.Server{
		Handler:     http.HandlerFunc(s.serveTLS),
		TLSConfig:   &tls.Config{GetCertificate: s.certificate, MinVersion: tls.VersionTLS12},
		ErrorLog:    discard,
		BaseContext: func(net.Listener) context.Context { return base },
	}
	imds := &http.Server{
		Handler:     http.HandlerFunc(s.serveIMDS),
		ErrorLog:    discard,
		BaseContext: func(net.Listener) context.Context { return base },
	}

	errs := make(chan error, 2)
	go func() { errs <- web.ServeTLS(tlsListener, "", "") }()
	go func() { errs <- imds.Serve(imdsListener) }()
	var err error
	left := 2
	select {
	case <-ctx.Done():
	case err = <-errs:
		left--
	}
	cancel() // ends requests that hang
	web.Close()
	imds.Close()
	for ; left > 0; left-- {
		<-errs
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return err
}

// serveTLS is everything behind port 443, told apart by host name.
func (s *Server) serveTLS(w http.ResponseWriter, r *http.Request) {
	host := hostName(r.Host)
	switch {
	case r.TLS == nil || !strings.EqualFold(r.TLS.ServerName, host):
		http.Error(w, "misdirected request", http.StatusMisdirectedRequest)
	case isLogin(host):
		s.serveEntra(w, r, host)
	case isVault(host):
		s.serveVault(w, r, host)
	default:
		http.NotFound(w, r)
	}
}

func hostName(s string) string {
	return strings.ToLower(strings.TrimSuffix(s, ":443"))
}

func servedHost(h string) bool { h = strings.ToLower(h); return isVault(h) || isLogin(h) }

func isLogin(h string) bool {
	for v := range maps.Values(loginHosts) {
		if h == v {
			return true
		}
	}
	return false
}

// isHSM tells whether a host is a managed HSM.
func isHSM(h string) bool {
	_, rest, _ := strings.Cut(strings.ToLower(h), ".")
	return strings.HasPrefix(rest, "managedhsm.")
}

// isVault tells whether a host is a vault or a managed HSM.
func isVault(h string) bool {
	label, rest, _ := strings.Cut(h, ".")
	service, cloud, _ := strings.Cut(rest, ".")
	_, ok := loginHosts[cloud]
	return label != "" && ok && (service == "vault" || service == "managedhsm")
}

// makeCA makes the certificate authority.
func (s *Server) makeCA() error {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	now := s.opts.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "vaulttest root"},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.AddDate(20, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, k.Public(), k)
	if err != nil {
		return err
	}
	return s.setCA(der, k)
}

func (s *Server) setCA(der []byte, k *ecdsa.PrivateKey) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	s.caCert, s.caKey = cert, k
	s.caPEM = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	return nil
}

// A CertificateFault is what is wrong with a host's certificate.
type CertificateFault int

const (
	CertificateGood CertificateFault = iota
	CertificateExpired
	CertificateNotYetValid
	CertificateOtherHost // it's another host's
	CertificateSelfSigned
)

// SetCertificate changes the certificate that a host shows to new connections.
func (s *Server) SetCertificate(host string, f CertificateFault) {
	host = strings.ToLower(host)
	s.leafMu.Lock()
	defer s.leafMu.Unlock()
	delete(s.leaves, host)
	s.badLeaves[host] = f
}

// certificate makes a certificate for a name that we serve, on first use.
func (s *Server) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	name := strings.ToLower(hello.ServerName)
	if !servedHost(name) {
		return nil, fmt.Errorf("vaulttest: no certificate for %q", name)
	}
	s.leafMu.Lock()
	defer s.leafMu.Unlock()
	if c := s.leaves[name]; c != nil {
		return c, nil
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	now := s.opts.Now()
	tmpl := &x509.Certificate{
		SerialNumber: serial(),
		Subject:      pkix.Name{CommonName: name},
		DNSNames:     []string{name},
		NotBefore:    now.Add(-24 * time.Hour),
		NotAfter:     now.AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	parent, signer := s.caCert, s.caKey
	switch s.badLeaves[name] {
	case CertificateExpired:
		tmpl.NotAfter = now.Add(-time.Hour)
	case CertificateNotYetValid:
		tmpl.NotBefore = now.Add(time.Hour)
	case CertificateOtherHost:
		tmpl.DNSNames = []string{"other.vault.azure.net"}
	case CertificateSelfSigned:
		parent, signer = tmpl, k
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, k.Public(), signer)
	if err != nil {
		return nil, err
	}
	c := &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: crypto.PrivateKey(k)}
	s.leaves[name] = c
	return c, nil
}

func serial() *big.Int {
	var b [16]byte
	rand.Read(b[:])
	return new(big.Int).SetBytes(b[:])
}

func newUUID() string {
	var b [16]byte
	rand.Read(b[:])
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
