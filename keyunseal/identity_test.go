package keyunseal

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/vaulttest"
)

func TestParseIdentity(t *testing.T) {
	const a, b = "2f1c5a54-6b0e-4c5b-9d3a-8e7f60112233", "11111111-2222-3333-4444-5555aaaabbbb"
	for in, want := range map[string]identity{
		"managed":                       {kind: "managed"},
		"managed:" + strings.ToUpper(a): {kind: "managed", id: a},
		"managed-object:" + a:           {kind: "managed-object", id: a},
		"managed-resource:/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/n": {kind: "managed-resource", id: "/subscriptions/s/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/n"},
		"arc":                             {kind: "arc"},
		"workload:" + a + ":" + b:         {kind: "workload", tenant: a, id: b, file: defaultTokenFile},
		"workload:" + a + ":" + b + ":/x": {kind: "workload", tenant: a, id: b, file: "/x"},
		"certificate:" + a + ":" + b + ":/etc/a:b.pem": {kind: "certificate", tenant: a, id: b, file: "/etc/a:b.pem"},
	} {
		if got, err := parseIdentity(in); err != nil || got != want {
			t.Errorf("parseIdentity(%q) = %+v, %v; want %+v", in, got, err, want)
		}
	}
	for _, in := range []string{
		"", "default", "environment", "Managed", "managed:", "managed:x", "managed:" + a + ":" + b, "managed-object:", "managed-object:x",
		"managed-resource:", "managed-resource:x", "managed-resource:/subscriptions/a b", "arc:", "arc:" + a, "cli", "secret:" + a + ":" + b + ":x",
		"workload", "workload:" + a, "workload:" + a + ":x", "workload:common:" + b, "workload:" + a + ":" + b + ":", "workload:" + a + ":" + b + ":relative",
		"certificate:" + a + ":" + b, "certificate:" + a + ":" + b + ":", "certificate:" + a + ":" + b + ":c.pem", "managed\n", "workload:" + a + ":" + b + ":/a\x00b",
		"managed-resource:/subscriptions/" + strings.Repeat("x", maxIdentity),
	} {
		if got, err := parseIdentity(in); err == nil {
			t.Errorf("parseIdentity(%q) = %+v, want an error", in, got)
		}
	}
}

// writeFile writes a file of a mode into a directory of the test.
func writeFile(t testing.TB, name string, mode fs.FileMode, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

const privateKeyURL = "https://unit.vault.cloud.example/keys/kek"

const privateCloudFile = `{"dns_suffix": "vault.cloud.example", "hsm_dns_suffix": "managedhsm.cloud.example", "authority_host": "https://login.cloud.example", "disable_instance_discovery": true}`

func TestSite(t *testing.T) {
	good := writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))
	for url, want := range map[string]site{
		"https://unit.vault.azure.net/keys/k":              {resource: "https://vault.azure.net", authority: "https://login.microsoftonline.com/"},
		"https://unit.managedhsm.azure.net/keys/k":         {resource: "https://managedhsm.azure.net", authority: "https://login.microsoftonline.com/"},
		"https://unit.vault.azure.cn/keys/k":               {resource: "https://vault.azure.cn", authority: "https://login.chinacloudapi.cn/"},
		"https://unit.managedhsm.azure.cn/keys/k":          {resource: "https://managedhsm.azure.cn", authority: "https://login.chinacloudapi.cn/"},
		"https://unit.vault.usgovcloudapi.net/keys/k":      {resource: "https://vault.usgovcloudapi.net", authority: "https://login.microsoftonline.us/"},
		"https://unit.managedhsm.usgovcloudapi.net/keys/k": {resource: "https://managedhsm.usgovcloudapi.net", authority: "https://login.microsoftonline.us/"},
		privateKeyURL: {resource: "https://vault.cloud.example", authority: "https://login.cloud.example/", noDiscovery: true},
		"https://unit.managedhsm.cloud.example/keys/k": {resource: "https://managedhsm.cloud.example", authority: "https://login.cloud.example/", noDiscovery: true},
	} {
		id, err := parseKeyURL(url)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := (Options{Cloud: good}).site(id); err != nil || *got != want {
			t.Errorf("site(%s) = %+v, %v; want %+v", url, got, err, want)
		}
	}
	for _, url := range []string{
		"https://v42.vault.azure.net.evil.com/keys/kek", "https://evilvault.azure.net/keys/kek", "https://vault.azure.net/keys/kek",
		"https://unit.cloud.example/keys/kek", "https://a.unit.vault.cloud.example/keys/kek", "https://x.vault.cloud.example/keys/kek",
		"https://unit.vault.cloud.example.com/keys/kek", "https://unitvault.cloud.example/keys/kek",
	} {
		id, err := parseKeyURL(url)
		if err != nil {
			t.Fatal(err)
		}
		for _, opts := range []Options{{Cloud: good}, {}} {
			if got, err := opts.site(id); err == nil {
				t.Errorf("site(%s) with %q = %+v, want an error", url, opts.Cloud, got)
			}
		}
	}

	// What is wrong with a description.
	id, err := parseKeyURL(privateKeyURL)
	if err != nil {
		t.Fatal(err)
	}
	ca := writeFile(t, "ca.pem", 0o644, []byte("-----BEGIN NOTHING-----"))
	for content, want := range map[string]string{
		``:                      "EOF",
		`[]`:                    "cannot unmarshal",
		`{}`:                    "dns_suffix is missing",
		privateCloudFile + `{}`: "something follows",
		`{"dns_suffix":"vault.cloud.example","authority":"https://login.cloud.example/"}`: `unknown field "authority"`,
		`{"dns_suffix":"example"}`:                                                                 "two or more labels",
		`{"dns_suffix":".vault.cloud.example"}`:                                                    "two or more labels",
		`{"dns_suffix":"Vault.cloud.example"}`:                                                     "lower case",
		`{"dns_suffix":"10.0.0.1"}`:                                                                "two or more labels",
		`{"dns_suffix":"vault.cloud.example:8443"}`:                                                "two or more labels",
		`{"dns_suffix":"vault.azure.net"}`:                                                         "public cloud",
		`{"dns_suffix":"azure.net"}`:                                                               "public cloud",
		`{"dns_suffix":"private.vault.azure.net"}`:                                                 "public cloud",
		`{"dns_suffix":"vault.cloud.example","hsm_dns_suffix":"managedhsm.azure.net"}`:             "public cloud",
		`{"dns_suffix":"vault.cloud.example","authority_host":"http://login.cloud.example/"}`:      "authority_host",
		`{"dns_suffix":"vault.cloud.example","authority_host":"https://login.cloud.example/adfs"}`: "authority_host",
		`{"dns_suffix":"vault.cloud.example","authority_host":"https://u:p@login.cloud.example"}`:  "authority_host",
		`{"dns_suffix":"vault.cloud.example","ca_file":"ca.pem"}`:                                  "absolute",
		`{"dns_suffix":"vault.cloud.example","ca_file":"/nonexistent/ca.pem"}`:                     "no such file",
		`{"dns_suffix":"vault.cloud.example","ca_file":"` + ca + `"}`:                              "no certificate",
		`{"dns_suffix":"vault.other.example"}`:                                                     "nor in the private cloud's vault.other.example",
	} {
		path := writeFile(t, "cloud.json", 0o600, []byte(content))
		if got, err := (Options{Cloud: path}).site(id); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v; want an error with %q", content, got, err, want)
		}
	}
	writable := writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))
	if err := os.Chmod(writable, 0o666); err != nil {
		t.Fatal(err)
	}
	if _, err := (Options{Cloud: writable}).site(id); err == nil || !strings.Contains(err.Error(), "others may write") {
		t.Errorf("a file that others may write: %v", err)
	}
	for _, path := range []string{"/nonexistent/cloud.json", "/dev/null", t.TempDir()} {
		if _, err := (Options{Cloud: path}).site(id); err == nil {
			t.Errorf("%s is a description of a cloud", path)
		}
	}
}

// TestFilesPass: a file that an identity needs and that isn't there, isn't whole or can't
// be read now ends no boot; what is wrong with one as it is does.
func TestFilesPass(t *testing.T) {
	opts := Options{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
		t.Errorf("request to %s", r.URL.Host)
		return nil, errors.New("no network here")
	})}
	withCA := func(ca string) string {
		return writeFile(t, "cloud.json", 0o600, []byte(`{"dns_suffix":"vault.cloud.example","ca_file":"`+ca+`"}`))
	}
	loose := writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))
	if err := os.Chmod(loose, 0o666); err != nil {
		t.Fatal(err)
	}
	for path, passes := range map[string]bool{
		"/nonexistent/cloud.json":              true,
		writeFile(t, "cloud.json", 0o600, nil): true,
		writeFile(t, "cloud.json", 0o600, []byte(privateCloudFile[:len(privateCloudFile)/2])): true,
		withCA("/nonexistent/ca.pem"):              true,
		withCA(writeFile(t, "ca.pem", 0o600, nil)): true,
		loose:       false,
		t.TempDir(): false,
		writeFile(t, "cloud.json", 0o600, []byte(`{}`)):                                                   false,
		writeFile(t, "cloud.json", 0o600, []byte(`{"dns_suffix":"vault.cloud.example","authority":"x"}`)): false,
	} {
		opts.Cloud = path
		_, err := Seal(t.Context(), opts, privateKeyURL, testVolume, randomKey(t))
		e, ok := errors.AsType[*Error](err)
		if !ok {
			t.Errorf("%s: %v", path, err)
			continue
		}
		for where, e := range map[string]*Error{"here": e, "in the parent": newWireError(e).err().(*Error)} {
			if e.Transient() != passes || e.Local != passes || e.Denied() {
				t.Errorf("%s, %s: it passes %v, want %v: %v", path, where, e.Transient(), passes, e)
			}
		}
	}
	for _, errno := range []unix.Errno{unix.EMFILE, unix.ENFILE, unix.ENOMEM, unix.EIO} {
		err := &os.PathError{Op: "open", Path: "f", Err: errno}
		if c := fileClass(fmt.Errorf("x: %w", err)); c != ClassIdentity {
			t.Errorf("%v: %v", errno, c)
		}
		if c := hostKeyClass(err); c != ClassInternal {
			t.Errorf("%v of a host key: %v", errno, c)
		}
	}
	if c := hostKeyClass(&os.PathError{Op: "open", Path: "f", Err: unix.EACCES}); c != ClassWrongKey {
		t.Errorf("a host key that may not be read: %v", c)
	}
}

// TestForeignVault: neither a token nor a person makes this host show a token to
// a vault outside of the clouds.
func TestForeignVault(t *testing.T) {
	opts := Options{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
		t.Errorf("request to %s", r.URL.Host)
		return nil, errors.New("no network here")
	})}
	foreign := edit(t, examples(t)[TypeKeyVault].token, func(m map[string]any) {
		m["kid"] = "https://unit.vault.azure.net.evil.com/keys/kek/" + version32
	})
	for op, err := range map[string]error{
		"unseal":  Unseal(t.Context(), opts, foreign, testVolume, new([KeySize]byte)),
		"probe":   Probe(t.Context(), opts, foreign, testVolume),
		"seal":    func() error { _, err := Seal(t.Context(), opts, privateKeyURL, testVolume, randomKey(t)); return err }(),
		"rewrap":  func() error { _, err := Rewrap(t.Context(), opts, foreign, testVolume, randomKey(t)); return err }(),
		"inspect": func() error { _, err := Inspect(t.Context(), opts, foreign, testVolume); return err }(),
	} {
		e := wantClass(t, err, ClassConfig)
		if !strings.Contains(e.Error(), DefaultCloud) || e.Transient() || e.Denied() {
			t.Errorf("%s: %v", op, e)
		}
	}
}

// newCertificate makes a self-signed client certificate, and a file with it and
// its key.
func newCertificate(t testing.TB, notAfter time.Time) (*x509.Certificate, string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "host"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	content := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})...)
	return cert, writeFile(t, "client.pem", 0o600, content)
}

// randomUUID is one that no other test uses.
func randomUUID() string {
	var b [16]byte
	rand.Read(b[:])
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// TestClouds seals and unseals in every cloud with a client certificate: the
// token comes from that cloud's login host.
func TestClouds(t *testing.T) {
	s, _ := newDouble(t, vaulttest.Options{})
	cert, file := newCertificate(t, time.Now().AddDate(1, 0, 0))
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Certificate: cert}, allPermissions...)
	cloud := writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	identity := "certificate:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file
	for host, login := range map[string]string{
		"unit.vault.azure.net":              "login.microsoftonline.com",
		"unit.vault.azure.cn":               "login.chinacloudapi.cn",
		"unit.vault.usgovcloudapi.net":      "login.microsoftonline.us",
		"unit.managedhsm.usgovcloudapi.net": "login.microsoftonline.us",
		"unit.vault.cloud.example":          "login.cloud.example",
		"unit.managedhsm.cloud.example":     "login.cloud.example",
	} {
		url := "https://" + host + "/keys/cert"
		if _, err := s.AddKey(url, 2048); err != nil {
			t.Fatal(err)
		}
		before := len(s.Requests())
		opts, key := Options{Transport: tr, Identity: identity, Cloud: cloud}, randomKey(t)
		token := mustSeal(t, opts, url, key)
		// The token says everything but where the cloud's description is.
		wantOpens(t, Options{Transport: tr, Cloud: cloud}, token, key)
		if err := Probe(t.Context(), Options{Transport: tr, Cloud: cloud}, token, testVolume); err != nil {
			t.Error(err)
		}
		if d, _ := Describe(token); d.Identity != identity || d.Tenant != vaulttest.DefaultTenant {
			t.Errorf("%+v", d)
		}
		n := 0
		for _, r := range s.Requests()[before:] {
			// A dialer has to connect to all that the SDK asks.
			if err := MayDial(r.Host+":443", nil, func() ([]string, error) { return []string{cloud}, nil }); err != nil {
				t.Errorf("%s: a request to %s: %v", host, r.Host, err)
			}
			switch {
			case r.Route == "token":
				n++
				if r.Host != login {
					t.Errorf("%s: a token from %s, want %s", host, r.Host, login)
				}
			case r.Route == "discovery" && strings.HasSuffix(host, ".cloud.example") && r.Host != login:
				t.Errorf("%s: discovery at %s, want it disabled", host, r.Host)
			case r.Route == "imds":
				t.Errorf("%s: a request to the identity endpoint", host)
			}
		}
		if n == 0 {
			t.Errorf("%s: no token was asked for", host)
		}
	}
	if _, err := s.AddKey("https://unit.vault.cloud.example/keys/cert", 2048); err != nil {
		t.Fatal(err)
	}
	// A private cloud without an authority has nobody to ask.
	bare := writeFile(t, "cloud.json", 0o644, []byte(`{"dns_suffix":"vault.cloud.example"}`))
	_, err := Seal(t.Context(), Options{Transport: tr, Identity: identity, Cloud: bare}, privateKeyURL, testVolume, randomKey(t))
	if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "authority_host") {
		t.Error(e)
	}
}

// TestCertificateIdentity: what can be wrong with a client certificate.
func TestCertificateIdentity(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	cert, file := newCertificate(t, time.Now().AddDate(1, 0, 0))
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Certificate: cert}, allPermissions...)
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	base := "certificate:" + vaulttest.DefaultTenant + ":" + clientID + ":"
	token := mustSeal(t, Options{Transport: tr, Identity: base + file}, url, randomKey(t))

	content, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, otherFile := newCertificate(t, time.Now().AddDate(1, 0, 0))
	_, soonFile := newCertificate(t, time.Now().AddDate(0, 0, 3))
	for _, tt := range []struct {
		name, identity string
		class          Class
		transient      bool
		code, text     string
	}{
		{"no file", base + "/nonexistent/client.pem", ClassIdentity, true, "", "on no volume that it helps to open"},
		{"readable by others", base + writeFile(t, "c.pem", 0o644, content), ClassConfig, false, "", "chmod 600"},
		{"empty", base + writeFile(t, "c.pem", 0o600, nil), ClassIdentity, true, "", "just being written"},
		{"no key", base + writeFile(t, "c.pem", 0o600, content[:strings.Index(string(content), "-----BEGIN PRIVATE")]), ClassIdentity, true, "", "just being written"},
		{"half", base + writeFile(t, "c.pem", 0o600, content[:len(content)/2]), ClassIdentity, true, "", "just being written"},
		{"a device", base + "/dev/null", ClassConfig, false, "", ""},
		{"unknown certificate", base + otherFile, ClassIdentity, false, "AADSTS700027", "does it have this certificate"},
		{"certificate that expires soon, and is unknown", base + soonFile, ClassIdentity, false, "AADSTS700027", ""},
		{"unknown client", "certificate:" + vaulttest.DefaultTenant + ":" + randomUUID() + ":" + file, ClassIdentity, false, "AADSTS700016", "in this tenant"},
	} {
		core, logs := observer.New(zapcore.WarnLevel)
		err := Unseal(t.Context(), Options{Transport: tr, Identity: tt.identity, Log: zap.New(core)}, token, testVolume, new([KeySize]byte))
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Class != tt.class || e.Transient() != tt.transient || e.Denied() != (tt.code != "") || e.Code != tt.code || !strings.Contains(e.Error(), tt.text) {
			t.Errorf("%s: %v; transient %v, want %v %v %s", tt.name, err, ok && e.Transient(), tt.class, tt.transient, tt.code)
		}
		if n := logs.FilterMessageSnippet("client certificate expires").Len(); (n == 1) != strings.Contains(tt.name, "expires soon") {
			t.Errorf("%s: %d warnings", tt.name, n)
		}
	}

	// Another tenant than the vault's.
	err = Unseal(t.Context(), Options{Transport: tr, Identity: "certificate:" + testVolume + ":" + clientID + ":" + file}, token, testVolume, new([KeySize]byte))
	if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "is of tenant") {
		t.Error(e)
	}
	_, err = Seal(t.Context(), Options{Transport: tr, Identity: "certificate:" + testVolume + ":" + clientID + ":" + file}, url, testVolume, randomKey(t))
	if e := wantClass(t, err, ClassIntegrity); !strings.Contains(e.Error(), "tenant") {
		t.Error(e)
	}
	// The login host: outages are no denials.
	for name, do := range map[string]vaulttest.FaultFunc{
		"fault":      vaulttest.Answer(500, nil, ""),
		"page":       vaulttest.Page(502),
		"throttled":  vaulttest.Answer(429, http.Header{"Retry-After": {"7"}}, `{"error":"too_many_requests"}`),
		"reset":      vaulttest.Reset,
		"no token":   vaulttest.Answer(200, nil, "{}"),
		"the clock":  vaulttest.Answer(401, nil, `{"error":"invalid_client","error_description":"AADSTS700024: Client assertion is not within its valid time range.","error_codes":[700024]}`),
		"a bad time": vaulttest.Answer(400, nil, `{"error":"temporarily_unavailable","error_codes":[1]}`),
	} {
		s.Inject(vaulttest.Fault{Route: "token", Times: -1, Do: do})
		e := wantClass(t, Unseal(t.Context(), Options{Transport: tr}, token, testVolume, new([KeySize]byte)), ClassIdentity)
		s.ClearFaults()
		if !e.Transient() || e.Denied() {
			t.Errorf("%s: %v is not transient", name, e)
		}
		if name == "throttled" && e.RetryAfter != 7*time.Second {
			t.Errorf("throttled: RetryAfter %v", e.RetryAfter)
		}
		if name == "the clock" && !strings.Contains(e.Error(), "is the clock right?") {
			t.Error(e)
		}
	}
	s.SetResolves("login.microsoftonline.com", false)
	unconnected := s.Transport()
	t.Cleanup(unconnected.CloseIdleConnections)
	if e := wantClass(t, Unseal(t.Context(), Options{Transport: unconnected}, token, testVolume, new([KeySize]byte)), ClassIdentity); !e.Transient() {
		t.Error(e)
	}
}

// TestIdentityRefused: what Entra ID and the identity endpoints answer takes an identity
// away only where they say that. All else passes, whatever its status is.
func TestIdentityRefused(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	cert, file := newCertificate(t, time.Now().AddDate(1, 0, 0))
	old, oldFile := newCertificate(t, time.Now().Add(-time.Hour))
	clientID, oldID, workloadID := randomUUID(), randomUUID(), randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Certificate: cert}, allPermissions...)
	s.AddIdentity(vaulttest.Identity{ClientID: oldID, Certificate: old}, allPermissions...)
	s.AddIdentity(vaulttest.Identity{ClientID: workloadID}, allPermissions...)
	issued, err := s.Federate(workloadID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	managed, _ := withIdentity(t, s, allPermissions...)
	certificate := "certificate:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file
	expired := "certificate:" + vaulttest.DefaultTenant + ":" + oldID + ":" + oldFile
	workload := "workload:" + vaulttest.DefaultTenant + ":" + workloadID + ":" + writeFile(t, "token", 0o600, []byte(issued))
	token := mustSeal(t, Options{Transport: tr, Identity: certificate}, url, randomKey(t))

	for _, tt := range []struct {
		name, identity string
		status         int
		body           string
		refused        bool
		text           string
	}{
		{"no such application", certificate, 400, `{"error":"unauthorized_client","error_codes":[700016]}`, true, "in this tenant"},
		{"application disabled", certificate, 400, `{"error":"unauthorized_client","error_codes":[7000112]}`, true, "disabled"},
		{"application disabled, by its older number", certificate, 400, `{"error":"unauthorized_client","error_codes":[70001]}`, true, ""},
		{"no service principal", certificate, 401, `{"error":"invalid_client","error_codes":[7000229]}`, true, ""},
		{"no role", certificate, 400, `{"error":"invalid_grant","error_codes":[501051]}`, true, ""},
		{"Conditional Access", certificate, 400, `{"error":"invalid_grant","error_codes":[53003]}`, true, "Conditional Access"},
		{"certificate removed", certificate, 401, `{"error":"invalid_client","error_codes":[700027]}`, true, ""},
		{"certificate revoked", certificate, 401, `{"error":"invalid_client","error_codes":[7000214]}`, true, ""},
		{"federated credential removed", workload, 401, `{"error":"invalid_client","error_codes":[700213]}`, true, ""},
		{"all federated credentials removed", workload, 401, `{"error":"invalid_client","error_codes":[70025]}`, true, ""},
		{"an authority without numbers", certificate, 400, `{"error":"unauthorized_client"}`, true, ""},

		{"a loop", certificate, 400, `{"error":"invalid_grant","error_codes":[50196]}`, false, "too many requests"},
		{"a tenant throttled", certificate, 400, `{"error":"invalid_request","error_codes":[90055]}`, false, "too many requests"},
		{"time out", certificate, 400, `{"error":"invalid_request","error_codes":[90012]}`, false, "error?code=90012"},
		{"no token issued", certificate, 400, `{"error":"server_error","error_codes":[50000]}`, false, ""},
		{"busy, and a number of a refusal", certificate, 400, `{"error":"temporarily_unavailable","error_codes":[700016]}`, false, ""},
		{"busy, without a number", certificate, 400, `{"error":"temporarily_unavailable"}`, false, ""},
		{"two numbers", certificate, 401, `{"error":"invalid_client","error_codes":[700016,90033]}`, false, ""},
		{"a number that nobody knows", certificate, 403, `{"error":"unauthorized_client","error_codes":[123456789]}`, false, "error?code=123456789"},
		{"the client is wrong, without a number", certificate, 401, `{"error":"invalid_client"}`, false, ""},
		{"a secret that has expired", certificate, 401, `{"error":"invalid_client","error_codes":[7000222]}`, false, ""},
		{"the certificate outside its time", certificate, 401, `{"error":"invalid_client","error_codes":[1000502]}`, false, ""},
		{"the certificate not known, and expired", expired, 401, `{"error":"invalid_client","error_codes":[700027]}`, false, "renew"},
		{"an issuer's new key", workload, 401, `{"error":"invalid_client","error_codes":[700027]}`, false, ""},
		{"the vault's application", certificate, 400, `{"error":"invalid_resource","error_codes":[500011]}`, false, ""},
		{"a number in a fault", certificate, 500, `{"error":"unauthorized_client","error_codes":[700016]}`, false, ""},
		{"a number in too many requests", certificate, 429, `{"error":"unauthorized_client","error_codes":[700016]}`, false, ""},

		{"not assigned", managed.Identity, 400, `{"error":"invalid_request","error_description":"Identity not found"}`, true, "assigned to this machine"},
		{"no identity of the machine", managed.Identity, 401, `{"error":"unauthorized_client"}`, true, ""},
		{"access denied", managed.Identity, 403, `{"error":"access_denied"}`, true, ""},
		{"throttled behind the endpoint", managed.Identity, 400, `{"error":"temporarily_unavailable"}`, false, ""},
		{"an error that nobody knows", managed.Identity, 403, `{"error":"fabric_busy"}`, false, "assigned to this machine"},
		{"one of several, that is named", managed.Identity, 400, `{"error":"invalid_request"}`, true, "assigned to this machine"},
		{"the vault's application, by the endpoint", managed.Identity, 400, `{"error":"invalid_resource"}`, false, ""},
	} {
		route := "token"
		if tt.identity == managed.Identity {
			// One that has no token yet.
			fresh, _ := withIdentity(t, s, allPermissions...)
			tt.identity, route = fresh.Identity, "imds"
		}
		s.Inject(vaulttest.Fault{Route: route, Times: -1, Do: vaulttest.Answer(tt.status, nil, tt.body)})
		err := Unseal(t.Context(), Options{Transport: tr, Identity: tt.identity}, token, testVolume, new([KeySize]byte))
		s.ClearFaults()
		e, ok := errors.AsType[*Error](err)
		if !ok || e.Class != ClassIdentity {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		for where, e := range map[string]*Error{"here": e, "in the parent": newWireError(e).err().(*Error)} {
			if e.Denied() != tt.refused || e.Transient() == tt.refused || e.Status != tt.status || !strings.Contains(e.Error(), tt.text) {
				t.Errorf("%s, %s: denied %v, want %v: %v", tt.name, where, e.Denied(), tt.refused, e)
			}
		}
	}
}

// TestIdentityRefusedPrivate: a login host without numbers has only OAuth 2's words.
func TestIdentityRefusedPrivate(t *testing.T) {
	s, _ := newDouble(t, vaulttest.Options{})
	cert, file := newCertificate(t, time.Now().AddDate(1, 0, 0))
	old, oldFile := newCertificate(t, time.Now().Add(-time.Hour))
	clientID, oldID, workloadID := randomUUID(), randomUUID(), randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Certificate: cert}, allPermissions...)
	s.AddIdentity(vaulttest.Identity{ClientID: oldID, Certificate: old}, allPermissions...)
	s.AddIdentity(vaulttest.Identity{ClientID: workloadID}, allPermissions...)
	issued, err := s.Federate(workloadID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.AddKey(privateKeyURL, 2048); err != nil {
		t.Fatal(err)
	}
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	opts := Options{Transport: tr, Cloud: writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))}
	certificate := "certificate:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file
	workload := "workload:" + vaulttest.DefaultTenant + ":" + workloadID + ":" + writeFile(t, "token", 0o600, []byte(issued))
	expired := "certificate:" + vaulttest.DefaultTenant + ":" + oldID + ":" + oldFile
	opts.Identity = certificate
	token := mustSeal(t, opts, privateKeyURL, randomKey(t))
	date := func(ahead time.Duration) http.Header {
		return http.Header{"Date": {time.Now().Add(ahead).UTC().Format(http.TimeFormat)}}
	}
	const msis = `{"error":"invalid_client","error_description":"MSIS9622: Client authentication failed."}`
	for _, tt := range []struct {
		name, identity string
		header         http.Header
		status         int
		body           string
		refused        bool
		text           string
	}{
		{"application or certificate removed", certificate, nil, 400, msis, true, "does it have this certificate"},
		{"the same with the other status", certificate, nil, 401, msis, true, ""},
		{"not permitted", certificate, nil, 400, `{"error":"unauthorized_client"}`, true, ""},

		{"its clock is ahead", certificate, date(10 * time.Minute), 400, msis, false, "is the clock right"},
		{"ours is", certificate, date(-10 * time.Minute), 400, msis, false, "is the clock right"},
		{"it tells no time", certificate, http.Header{"Date": nil}, 400, msis, false, "is the clock right"},
		{"a certificate that nobody has renewed", expired, nil, 400, msis, false, "renew"},
		{"an issuer's token", workload, nil, 400, msis, false, "issuer's token"},
		{"a fault", certificate, nil, 500, msis, false, ""},
		{"busy", certificate, nil, 400, `{"error":"temporarily_unavailable"}`, false, ""},
		{"another resource", certificate, nil, 400, `{"error":"invalid_scope"}`, false, ""},
		{"a number that is no refusal", certificate, nil, 401, `{"error":"invalid_client","error_codes":[700024]}`, false, ""},
	} {
		s.Inject(vaulttest.Fault{Route: "token", Times: -1, Do: vaulttest.Answer(tt.status, tt.header, tt.body)})
		opts.Identity = tt.identity
		e := wantClass(t, Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)), ClassIdentity)
		s.ClearFaults()
		if e.Denied() != tt.refused || e.Transient() == tt.refused || e.Status != tt.status || !strings.Contains(e.Error(), tt.text) {
			t.Errorf("%s: denied %v, want %v: %v", tt.name, e.Denied(), tt.refused, e)
		}
	}
}

// TestWorkloadIdentity opens a vault by another issuer's token.
func TestWorkloadIdentity(t *testing.T) {
	now := time.Now()
	s, url := newDouble(t, vaulttest.Options{Now: func() time.Time { return now }})
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID}, allPermissions...)
	issued, err := s.Federate(clientID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, "token", 0o600, []byte(issued))
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	opts := Options{Transport: tr, Identity: "workload:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file}
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	wantOpens(t, Options{Transport: tr}, token, key)

	if err := os.WriteFile(file, []byte("e30."+strings.SplitN(issued, ".", 2)[1]), 0o600); err != nil {
		t.Fatal(err)
	}
	e := wantClass(t, Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)), ClassIdentity)
	if e.Code != "AADSTS70021" || !e.Denied() {
		t.Error(e)
	}
	// An issuer's token that is too old is for the issuer to renew.
	if err := os.WriteFile(file, []byte(issued), 0o600); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Hour)
	if e := wantClass(t, Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)), ClassIdentity); e.Code != codeClock || !e.Transient() {
		t.Error(e)
	}
	os.Remove(file)
	if e := wantClass(t, Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)), ClassIdentity); !e.Transient() || !strings.Contains(e.Error(), file) {
		t.Error(e)
	}
	for text := range map[string]bool{issued: true} {
		wantNoSecret(t, "the error", []byte(e.Error()), []byte(text))
	}
}

// TestWorkloadFile: an identity is in a token, which is in a header that anybody may have
// written. So of the file that it names no more is read than an issuer's token has, and
// nothing else is sent.
func TestWorkloadFile(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID}, allPermissions...)
	issued, err := s.Federate(clientID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	base := "workload:" + vaulttest.DefaultTenant + ":" + clientID + ":"
	good := writeFile(t, "token", 0o600, []byte(issued+"\n"))
	token := mustSeal(t, Options{Transport: tr, Identity: base + good}, url, randomKey(t))
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	long := issued + strings.Repeat("A", maxAssertion)
	for name, tt := range map[string]struct {
		file  string
		class Class
		text  string
	}{
		"a device that never ends": {"/dev/zero", ClassConfig, "not a regular file"},
		"a FIFO":                   {fifo, ClassConfig, "not a regular file"},
		"a folder":                 {t.TempDir(), ClassConfig, "not a regular file"},
		"too long":                 {writeFile(t, "token", 0o600, []byte(long)), ClassConfig, "longer than"},
		"another file of root's":   {writeFile(t, "shadow", 0o600, []byte("root:$y$secret:19000:0:99999:7:::\n")), ClassIdentity, "no issuer's token"},
		"32 bytes":                 {writeFile(t, "host.key", 0o600, make([]byte, 32)), ClassIdentity, "no issuer's token"},
		"a name with two dots":     {writeFile(t, "x", 0o600, []byte("a.b.c")), ClassIdentity, "no issuer's token"},
		"being written":            {writeFile(t, "token", 0o600, nil), ClassIdentity, "no issuer's token"},
		"half":                     {writeFile(t, "token", 0o600, []byte(issued[:strings.LastIndex(issued, ".")])), ClassIdentity, "no issuer's token"},
	} {
		before, begun := s.Count("token"), time.Now()
		e := wantClass(t, Unseal(t.Context(), Options{Transport: tr, Identity: base + tt.file}, token, testVolume, new([KeySize]byte)), tt.class)
		if e.Denied() || e.Transient() != (tt.class == ClassIdentity) || !strings.Contains(e.Error(), tt.file) || !strings.Contains(e.Error(), tt.text) {
			t.Errorf("%s: %v", name, e)
		}
		if n := s.Count("token") - before; n != 0 {
			t.Errorf("%s: %d requests", name, n)
		}
		if d := time.Since(begun); d > 10*time.Second {
			t.Errorf("%s: took %v", name, d)
		}
		wantNoSecret(t, "the error", []byte(e.Error()), []byte("$y$secret"))
	}
	// A mount of Kubernetes is a link, and the file of another user.
	link := filepath.Join(t.TempDir(), "link")
	if err := errors.Join(os.Symlink(good, link), os.Chown(good, 12345, 12345), os.Chmod(good, 0o640)); err != nil {
		t.Fatal(err)
	}
	if err := Unseal(t.Context(), Options{Transport: tr, Identity: base + link}, token, testVolume, new([KeySize]byte)); err != nil {
		t.Error(err)
	}
}

// TestManagedSelectors: a user assigned identity by its object and its resource.
func TestManagedSelectors(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	clientID, objectID := randomUUID(), randomUUID()
	resource := "/subscriptions/" + randomUUID() + "/resourcegroups/g/providers/Microsoft.ManagedIdentity/userAssignedIdentities/host"
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, ObjectID: objectID, ResourceID: resource, Assigned: true}, allPermissions...)
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	for _, identity := range []string{"managed-object:" + objectID, "managed-resource:" + resource} {
		key := randomKey(t)
		token := mustSeal(t, Options{Transport: tr, Identity: identity}, url, key)
		wantOpens(t, Options{Transport: tr}, token, key)
		if r := s.Requests(); r[len(r)-1].ClientID != clientID {
			t.Errorf("%s: unwrapped by %s", identity, r[len(r)-1].ClientID)
		}
		if d, _ := Describe(token); d.Identity != identity {
			t.Errorf("%+v", d)
		}
	}
	_, err := Seal(t.Context(), Options{Transport: tr, Identity: "managed-object:" + randomUUID()}, url, testVolume, randomKey(t))
	if e := wantClass(t, err, ClassIdentity); !e.Denied() {
		t.Error(e)
	}
}

// TestManagedSource: the named endpoint is asked or none, whatever is installed
// or set.
func TestManagedSource(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	_, err := Seal(t.Context(), Options{Transport: opts.Transport, Identity: "arc"}, url, testVolume, randomKey(t))
	if e := wantClass(t, err, ClassIdentity); !e.Transient() || !e.Local || !strings.Contains(e.Error(), "not mounted yet") || !strings.Contains(e.Error(), "azcmagent show") {
		t.Errorf("no agent yet: %v", e)
	}
	t.Setenv("MSI_ENDPOINT", "http://127.0.0.1:1/")
	_, err = Seal(t.Context(), opts, url, testVolume, randomKey(t))
	if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "MSI_ENDPOINT") {
		t.Error(e)
	}
	if n := len(s.Requests()); n != 0 {
		t.Errorf("%d requests", n)
	}
	// A child doesn't inherit it.
	if _, err := childWithDouble(t, s, nil).Seal(t.Context(), Options{Identity: opts.Identity}, url, testVolume, randomKey(t)); err != nil {
		t.Error(err)
	}
}

// unitCapabilities are what the service of a volume can do, in the form of setpriv(1).
func unitCapabilities(t *testing.T) string {
	t.Helper()
	unit, err := os.ReadFile("../systemd/hostcryptd@.service")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(unit)) {
		if list, ok := strings.CutPrefix(line, "CapabilityBoundingSet="); ok {
			return strings.Join(append([]string{"-all"}, strings.Fields(strings.ReplaceAll(strings.ToLower(list), "cap_", "+"))...), ",")
		}
	}
	t.Fatal("the unit has no CapabilityBoundingSet=")
	return ""
}

// TestArc opens a vault with the identity of the Azure Arc agent, in a process
// that sees the agent's files where they belong, and has the service's capabilities.
// The agent's folder is closed to others.
func TestArc(t *testing.T) {
	dir := t.TempDir()
	if err := errors.Join(os.Chown(dir, 12345, 12345), os.Chmod(dir, 0o770)); err != nil {
		t.Fatal(err)
	}
	s, url := newDouble(t, vaulttest.Options{ArcKeys: dir})
	plain := childWithDouble(t, s, nil)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	args := append([]string{"setpriv", "--bounding-set=" + unitCapabilities(t), "unshare", "-m", self, "child-on-arc", dir}, plain.Args[2:]...)
	onArc := &Child{Args: args}
	key := randomKey(t)
	token, err := onArc.Seal(t.Context(), Options{Identity: "arc"}, url, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	if d, _ := Describe(token); d.Identity != "arc" {
		t.Errorf("%+v", d)
	}
	var got [KeySize]byte
	if err := onArc.Unseal(t.Context(), Options{}, token, testVolume, &got); err != nil || got != *key {
		t.Errorf("Unseal = %v", err)
	}
	if s.Count("imds") != 0 || s.Count("arc") != 4 {
		t.Errorf("%d requests to the Azure VM's endpoint, %d to the agent; want 0 and 4", s.Count("imds"), s.Count("arc"))
	}

	// An agent's machine has no other identity, and a machine without one not this.
	err = onArc.Unseal(t.Context(), Options{Identity: "managed"}, token, testVolume, &got)
	if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "is named arc") {
		t.Error(e)
	}
	if e := wantClass(t, plain.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassIdentity); !e.Transient() || !e.Local {
		t.Errorf("without the agent: %v", e)
	}

	for name, do := range map[string]vaulttest.FaultFunc{
		"reset":            vaulttest.Reset,
		"fault":            vaulttest.Answer(500, nil, ""),
		"no challenge":     vaulttest.Answer(401, nil, ""),
		"a file elsewhere": vaulttest.Answer(401, http.Header{"Www-Authenticate": {"Basic realm=/etc/shadow"}}, ""),
		"no way out":       vaulttest.Answer(401, http.Header{"Www-Authenticate": {"Basic realm=/var/opt/azcmagent/tokens/../tokens/x.key"}}, ""),
		"a missing file":   vaulttest.Answer(401, http.Header{"Www-Authenticate": {"Basic realm=/var/opt/azcmagent/tokens/x.key"}}, ""),
	} {
		s.Inject(vaulttest.Fault{Route: "arc", Times: -1, Do: do})
		e := wantClass(t, onArc.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassIdentity)
		s.ClearFaults()
		if !e.Transient() || e.Denied() || !strings.Contains(e.Error(), "azcmagent show") {
			t.Errorf("%s: %v", name, e)
		}
	}
	// A file of the agent's name that isn't the agent's: none of its content may
	// reach who asks for it.
	secret := filepath.Join(t.TempDir(), "shadow")
	if err := os.WriteFile(secret, []byte("root:secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	if err := errors.Join(
		os.Symlink(secret, in("link.key")), os.Link(secret, in("hard.key")), os.Mkdir(in("dir.key"), 0o755),
		os.WriteFile(in("large.key"), make([]byte, 4097), 0o600),
		os.WriteFile(in("other.key"), []byte("x"), 0o600), os.Chown(in("other.key"), 54321, 54321),
		os.WriteFile(in("loose.key"), []byte("x"), 0o600), os.Chmod(in("loose.key"), 0o666),
	); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"link": "not a regular file", "hard": "2 names", "dir": "not a regular file", "large": "4097 bytes", "other": "not the agent's", "loose": "not the agent's",
	} {
		// The agent's second answer would be to a request that has the content.
		before := s.Count("arc")
		s.Inject(vaulttest.Fault{Route: "arc", Times: 2, Do: vaulttest.Answer(401, http.Header{"Www-Authenticate": {"Basic realm=/var/opt/azcmagent/tokens/" + name + ".key"}}, "")})
		e := wantClass(t, onArc.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassIdentity)
		s.ClearFaults()
		if n := s.Count("arc") - before; n != 1 || !e.Transient() || !strings.Contains(e.Error(), want) {
			t.Errorf("%s: %d requests, %v", name, n, e)
		}
	}

	// Who answers at the agent's port may be anybody. The vault is asked by TLS.
	for _, body := range []string{`{"error":"invalid_request","error_description":"Identity not found"}`, `{"error":"unauthorized_client"}`, `{"error":"access_denied"}`} {
		for _, status := range []int{400, 403, 404} {
			s.Inject(vaulttest.Fault{Route: "arc", Times: -1, Do: vaulttest.Answer(status, nil, body)})
			e := wantClass(t, onArc.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassIdentity)
			s.ClearFaults()
			if e.Denied() || !e.Transient() {
				t.Errorf("%d %s: %v", status, body, e)
			}
		}
	}
	s.Permit(s.System(), "get")
	if e := wantClass(t, onArc.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassDenied); !e.Denied() {
		t.Errorf("without the role: %v", e)
	}
	s.Unassign(s.System())
	if e := wantClass(t, onArc.Unseal(t.Context(), Options{}, token, testVolume, &got), ClassIdentity); e.Denied() {
		t.Errorf("without an identity: %v", e)
	}
}

// TestChildCloud: the description's path crosses to a child, and the environment
// of identities doesn't.
func TestChildCloud(t *testing.T) {
	s, _ := newDouble(t, vaulttest.Options{})
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID}, allPermissions...)
	issued, err := s.Federate(clientID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	file := writeFile(t, "token", 0o600, []byte(issued))
	if _, err := s.AddKey(privateKeyURL, 2048); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{
		"AZURE_TENANT_ID": testVolume, "AZURE_CLIENT_ID": testVolume, "AZURE_FEDERATED_TOKEN_FILE": "/nonexistent",
		"AZURE_AUTHORITY_HOST": "https://login.evil.example/", "AZURE_CLIENT_SECRET": "x",
	} {
		t.Setenv(name, value)
	}
	opts := Options{
		Cloud:    writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile)),
		Identity: "workload:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file,
	}
	c, key := childWithDouble(t, s, nil), randomKey(t)
	token, err := c.Seal(t.Context(), opts, privateKeyURL, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	var got [KeySize]byte
	if err := c.Unseal(t.Context(), Options{Cloud: opts.Cloud}, token, testVolume, &got); err != nil || got != *key {
		t.Errorf("Unseal = %v", err)
	}
	if err := c.Unseal(t.Context(), Options{}, token, testVolume, &got); err == nil {
		t.Error("opened without the cloud's description")
	}
}

// TestRoots: a private cloud's authority is trusted where the description says
// so, beside the system's.
func TestRoots(t *testing.T) {
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	ca := writeFile(t, "ca.pem", 0o644, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	opts := Options{Cloud: writeFile(t, "cloud.json", 0o644, []byte(`{"dns_suffix":"vault.cloud.example","ca_file":"`+ca+`"}`))}
	id, err := parseKeyURL(privateKeyURL)
	if err != nil {
		t.Fatal(err)
	}
	where, err := opts.site(id)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := newHTTPClient(nil, where.roots).Get(srv.URL)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if _, err := newHTTPClient(nil, nil).Get(srv.URL); err == nil {
		t.Error("trusted without the description")
	}
	public, _ := parseKeyURL("https://unit.vault.azure.net/keys/k")
	if where, err := opts.site(public); err != nil || where.roots != nil {
		t.Errorf("a public vault trusts %v, %v", where.roots, err)
	}
	system, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	if where.roots.Equal(system) {
		t.Error("the file's certificate isn't among the roots")
	}
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		t.Fatal(err)
	}
	noCert := writeFile(t, "ca.pem", 0o644, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	if _, err := readRoots(noCert); err == nil {
		t.Error("a key is taken for certificates")
	}
}
