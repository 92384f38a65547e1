package vaulttest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
)

// TestRecordedRotationPolicy compares with the recording, and rotates by it.
func TestRecordedRotationPolicy(t *testing.T) {
	clk := new(clock)
	s, c := start(t, Options{Now: clk.now})
	s.Permit(s.System(), append(everything, "getRotationPolicy", "setRotationPolicy")...)
	if _, err := s.AddKey(testKey, 2048); err != nil {
		t.Fatal(err)
	}
	token := vaultToken(t, c)
	recorded := at(testdata(t, "recorded-lifecycle.json"), "rotationpolicy_put")
	body, err := json.Marshal(recorded["request"])
	if err != nil {
		t.Fatal(err)
	}
	const q = "/rotationpolicy?api-version=7.5"
	if a := do(t, c, "GET", testKey+q, token, ""); a.status != 200 || !strings.Contains(string(a.body), "P30D") {
		t.Errorf("the service's own policy: %d %s", a.status, a.body)
	}
	put := do(t, c, "PUT", testKey+q, token, string(body))
	wantShape(t, "policy", put.json(t), recorded["response"])
	want, _ := json.Marshal(at(recorded, "response")["lifetimeActions"])
	got, _ := json.Marshal(put.json(t)["lifetimeActions"])
	if !bytes.Equal(got, want) {
		t.Errorf("actions %s, recorded %s", got, want)
	}
	if a := do(t, c, "GET", testKey+q, token, ""); !bytes.Equal(a.body, put.body) {
		t.Errorf("read back: %s, written %s", a.body, put.body)
	}
	rotated := do(t, c, "POST", testKey+"/rotate?api-version=7.5", token, "").json(t)
	attributes := at(rotated, "attributes")
	wantShape(t, "attributes", attributes, at(testdata(t, "recorded-lifecycle.json"), "rotate_response_attributes"))
	if exp, created := attributes["exp"].(float64), attributes["created"].(float64); exp-created != 90*24*3600 {
		t.Errorf("expires %v s after it was created, the policy says 90 days", exp-created)
	}
	for _, bad := range []string{
		`{`, `{"attributes":{"expiryTime":"90 days"}}`, `{"lifetimeActions":[{"action":{"type":"Rotate"},"trigger":{}}]}`,
		`{"lifetimeActions":[{"action":{"type":"Rotate"},"trigger":{"timeAfterCreate":"P"}}]}`,
		`{"lifetimeActions":[{"action":{"type":"Rotate"},"trigger":{"timeBeforeExpiry":"P7D"}}]}`,
	} {
		if a := do(t, c, "PUT", testKey+q, token, bad); a.status != 400 {
			t.Errorf("%s: %d", bad, a.status)
		}
	}
	for period, want := range map[string]string{"P1Y2M3D": "2028-03-04", "P2Y": "2029-01-01", "P90D": "2027-04-01"} {
		got, err := addPeriod(time.Date(2027, 1, 1, 0, 0, 0, 0, time.UTC), period)
		if err != nil || got.Format(time.DateOnly) != want {
			t.Errorf("%s: %v, %v; want %s", period, got, err, want)
		}
	}
}

// TestPaging reads versions page by page, by hand and by the SDK.
func TestPaging(t *testing.T) {
	s, c := start(t, Options{})
	s.Permit(s.System(), everything...)
	for range 5 {
		if _, err := s.AddKey(testKey, 2048); err != nil {
			t.Fatal(err)
		}
	}
	token := vaultToken(t, c)
	example := at(testdata(t, "spec-GetKeyVersions.json"), "responses", "200", "body")
	seen, next := map[string]bool{}, testKey+"/versions?api-version=7.5&maxresults=2"
	var sizes []int
	for next != "" {
		a := do(t, c, "GET", next, token, "").json(t)
		values := a["value"].([]any)
		sizes = append(sizes, len(values))
		for _, v := range values {
			seen[v.(map[string]any)["kid"].(string)] = true
		}
		next, _ = a["nextLink"].(string)
		if next == "" {
			break
		}
		u, err := url.Parse(next)
		want, _ := url.Parse(example["nextLink"].(string))
		if err != nil || u.Port() != want.Port() || u.Query().Get("maxresults") != "2" || !u.Query().Has("$skiptoken") {
			t.Errorf("nextLink %s, the specification's example is %s", next, want)
		}
	}
	if len(seen) != 5 || fmt.Sprint(sizes) != "[2 2 1]" {
		t.Errorf("%d versions on pages of %v", len(seen), sizes)
	}
	for _, q := range []string{"maxresults=0", "maxresults=26", "maxresults=x", "$skiptoken=!"} {
		if a := do(t, c, "GET", testKey+"/versions?api-version=7.5&"+q, token, ""); a.status != 400 {
			t.Errorf("%s: %d", q, a.status)
		}
	}
}

// TestThrottle: a vault serves what the service's limits say, for each size of
// key, and a managed HSM has none.
func TestThrottle(t *testing.T) {
	for _, tt := range []struct {
		name string
		url  string
		bits int
		hsm  bool
		want int // of 60, with a hundredth of the limits
	}{
		{"RSA-2048", testKey, 2048, false, 40},
		{"RSA-3072", testKey, 3072, false, 10},
		{"RSA-4096", testKey, 4096, false, 5},
		{"RSA-HSM 2048", testKey, 2048, true, 20},
		{"RSA-HSM 3072", testKey, 3072, true, 5},
		{"managed HSM", "https://unit.managedhsm.azure.net/keys/kek", 2048, true, 60},
	} {
		now := time.Now()
		s, err := New(Options{Throttle: 0.01, HSMKeys: tt.hsm, Now: func() time.Time { return now }})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.AddKey(tt.url, tt.bits); err != nil {
			t.Fatal(err)
		}
		host, name, _, _ := splitURL(tt.url)
		served := func() (n int) {
			for range 60 {
				s.mu.Lock()
				err := s.admit(routes["POST unwrapkey"], &call{host: host, name: name, identity: &Identity{ClientID: s.system}})
				s.mu.Unlock()
				switch {
				case err == nil:
					n++
				case err != error(throttled):
					t.Fatal(err)
				}
			}
			return n
		}
		if got := served(); got != tt.want {
			t.Errorf("%s: %d of 60 at once, want %d", tt.name, got, tt.want)
		}
		now = now.Add(limitWindow / 2)
		if got := served(); tt.want < 60 && got != tt.want/2 {
			t.Errorf("%s: %d half a window later, want %d", tt.name, got, tt.want/2)
		}
	}
	// Through HTTP.
	s, c := start(t, Options{Throttle: 0.001})
	s.AddKey(testKey, 2048)
	token := vaultToken(t, c)
	var statuses []int
	for range 6 {
		a := do(t, c, "GET", testKey+"?api-version=7.5", token, "")
		statuses = append(statuses, a.status)
		if a.status == 429 && (a.code(t) != "Throttled" || a.header.Get("Retry-After") != "") {
			t.Errorf("%s, Retry-After %q", a.body, a.header.Get("Retry-After"))
		}
	}
	if statuses[0] != 200 || statuses[5] != 429 {
		t.Errorf("statuses %v", statuses)
	}
}

func TestPermitDelay(t *testing.T) {
	clk := new(clock)
	s, c := start(t, Options{Now: clk.now, PermitDelay: 5 * time.Minute})
	s.AddKey(testKey, 2048)
	token := vaultToken(t, c)
	status := func() int { return do(t, c, "GET", testKey+"?api-version=7.5", token, "").status }
	s.Permit(s.System())
	if got := status(); got != 200 {
		t.Errorf("%d at once after a permission was taken", got)
	}
	clk.advance(5 * time.Minute)
	if got := status(); got != 403 {
		t.Errorf("%d five minutes later", got)
	}
	s.Permit(s.System(), "get")
	if got := status(); got != 403 {
		t.Errorf("%d at once after a permission was given", got)
	}
	clk.advance(5 * time.Minute)
	if got := status(); got != 200 {
		t.Errorf("%d five minutes later", got)
	}
}

func TestFirewallAndFailover(t *testing.T) {
	s, c := start(t, Options{})
	s.Permit(s.System(), everything...)
	s.AddKey(testKey, 2048)
	s.AddKey("https://other.vault.azure.net/keys/kek", 2048)
	token := vaultToken(t, c)
	get := func(url string) answer { return do(t, c, "GET", url+"?api-version=7.5", token, "") }
	s.SetFirewall("Unit.vault.azure.net", true)
	if a := get(testKey); a.status != 403 || a.code(t) != "ForbiddenByFirewall" {
		t.Errorf("%d %s", a.status, a.body)
	}
	if a := do(t, c, "GET", testKey+"?api-version=7.5", "", ""); a.status != 401 {
		t.Errorf("without a token: %d", a.status)
	}
	if a := get("https://other.vault.azure.net/keys/kek"); a.status != 200 {
		t.Errorf("another vault: %d", a.status)
	}
	s.SetFirewall("unit.vault.azure.net", false)
	before := get(testKey)
	s.SetFailover(true)
	after := get(testKey)
	if after.status != 200 || after.header.Get("x-ms-keyvault-region") == before.header.Get("x-ms-keyvault-region") {
		t.Errorf("%d, region %s, before %s", after.status, after.header.Get("x-ms-keyvault-region"), before.header.Get("x-ms-keyvault-region"))
	}
	wrapped := do(t, c, "POST", testKey+"/wrapkey?api-version=7.5", token, `{"alg":"RSA-OAEP-256","value":"AAAA"}`)
	if wrapped.status != 200 {
		t.Errorf("wrap: %d %s", wrapped.status, wrapped.body)
	}
	for _, m := range [][2]string{{"POST", "/rotate"}, {"DELETE", ""}, {"POST", "/create"}} {
		if a := do(t, c, m[0], testKey+m[1]+"?api-version=7.5", token, `{"kty":"RSA"}`); a.status != 403 {
			t.Errorf("%s%s where the vault is read-only: %d", m[0], m[1], a.status)
		}
	}
	s.SetFailover(false)
	if a := do(t, c, "POST", testKey+"/rotate?api-version=7.5", token, ""); a.status != 200 {
		t.Errorf("rotate after the failover: %d", a.status)
	}
}

func TestCertificatesAndNames(t *testing.T) {
	s, _ := start(t, Options{})
	get := func() error {
		tr := s.Transport()
		defer tr.CloseIdleConnections()
		req, err := http.NewRequestWithContext(t.Context(), "GET", testKey+"?api-version=7.5", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err == nil {
			resp.Body.Close()
		}
		return err
	}
	for f, want := range map[CertificateFault]func(err error) bool{
		CertificateExpired: func(err error) bool {
			e, ok := errors.AsType[x509.CertificateInvalidError](err)
			return ok && e.Reason == x509.Expired
		},
		CertificateNotYetValid: func(err error) bool {
			e, ok := errors.AsType[x509.CertificateInvalidError](err)
			return ok && e.Reason == x509.Expired
		},
		CertificateOtherHost:  func(err error) bool { _, ok := errors.AsType[x509.HostnameError](err); return ok },
		CertificateSelfSigned: func(err error) bool { _, ok := errors.AsType[*tls.CertificateVerificationError](err); return ok },
		CertificateGood:       func(err error) bool { return err == nil },
	} {
		s.SetCertificate("unit.vault.azure.net", f)
		if err := get(); !want(err) {
			t.Errorf("certificate fault %d: %v", f, err)
		}
	}
	s.SetCertificate("unit.vault.azure.net", CertificateGood)
	s.SetResolves("Unit.Vault.Azure.net", false)
	if e, ok := errors.AsType[*net.DNSError](get()); !ok || !e.IsNotFound {
		t.Errorf("a name that doesn't exist: %v", e)
	}
	s.SetResolves("unit.vault.azure.net", true)
	if err := get(); err != nil {
		t.Error(err)
	}
}

func TestSlowAndPages(t *testing.T) {
	s, c := start(t, Options{})
	s.AddKey(testKey, 2048)
	token := vaultToken(t, c)
	s.Inject(Fault{Route: "get", Do: Slow(30*time.Millisecond, 30*time.Millisecond)})
	begun := time.Now()
	if a := do(t, c, "GET", testKey+"?api-version=7.5", token, ""); a.status != 200 || time.Since(begun) < 60*time.Millisecond {
		t.Errorf("%d after %v", a.status, time.Since(begun))
	}
	s.Inject(Fault{Route: "get", Do: Slow(0, time.Hour)})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	req, _ := http.NewRequestWithContext(ctx, "GET", testKey+"?api-version=7.5", nil)
	req.Header.Set("Authorization", "Bearer "+token)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatalf("no headers: %v", err)
	}
	if _, err := resp.Body.Read(make([]byte, 1)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("reading the body: %v", err)
	}
	resp.Body.Close()
	s.Inject(Fault{Route: "get", Do: ThrottledFor(90 * time.Second)})
	if a := do(t, c, "GET", testKey+"?api-version=7.5", token, ""); a.status != 429 || a.header.Get("Retry-After") != "90" {
		t.Errorf("%d, Retry-After %q", a.status, a.header.Get("Retry-After"))
	}
	s.Inject(Fault{Route: "get", Do: Page(502)})
	if a := do(t, c, "GET", testKey+"?api-version=7.5", token, ""); a.status != 502 || a.header.Get("Content-Type") != "text/html" {
		t.Errorf("%d %s", a.status, a.body)
	}
	last := s.Requests()[len(s.Requests())-1]
	if last.Operation != "KeyGet" || last.Duration <= 0 {
		t.Errorf("the log has %+v", last)
	}
}

// TestArc does the agent's dance by hand.
func TestArc(t *testing.T) {
	dir := t.TempDir()
	s, c := start(t, Options{ArcKeys: dir})
	get := func(query, authorization string) answer {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+arcHost+"/metadata/identity/oauth2/token?"+query, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Metadata", "true")
		if authorization != "" {
			req.Header.Set("Authorization", authorization)
		}
		resp, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var b bytes.Buffer
		b.ReadFrom(resp.Body)
		return answer{resp.StatusCode, resp.Header, b.Bytes()}
	}
	const q = "api-version=2020-06-01&resource=https%3A%2F%2Fvault.azure.net"
	a := get(q, "")
	path, ok := strings.CutPrefix(a.header.Get("WWW-Authenticate"), "Basic realm="+arcDir+"/")
	if a.status != 401 || !ok || !strings.HasSuffix(path, ".key") {
		t.Fatalf("%d %q", a.status, a.header.Get("WWW-Authenticate"))
	}
	secret, err := os.ReadFile(filepath.Join(dir, path))
	if err != nil || len(secret) > 4096 {
		t.Fatal(err)
	}
	if a := get(q, "Basic "+newUUID()); a.status != 401 {
		t.Errorf("a wrong secret: %d", a.status)
	}
	a = get(q, "Basic "+string(secret))
	if a.status != 200 || a.json(t)["client_id"] != s.System() {
		t.Errorf("%d %s", a.status, a.body)
	}
	s.AddKey(testKey, 2048)
	if a := do(t, c, "GET", testKey+"?api-version=7.5", a.json(t)["access_token"].(string), ""); a.status != 200 {
		t.Errorf("the vault says %d to the token", a.status)
	}
	if a := get(q, "Basic "+string(secret)); a.status != 401 {
		t.Errorf("a secret used twice: %d", a.status)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("%d files left", len(left))
	}
	if a := get("resource=x", ""); a.status != 400 {
		t.Errorf("without api-version: %d", a.status)
	}
	if s.Count("arc") != 5 {
		t.Errorf("%d requests in the log", s.Count("arc"))
	}
	// Without an agent nobody answers.
	_, c = start(t, Options{})
	if resp, err := c.Get("http://" + arcHost + "/metadata/identity/oauth2/token?" + q); err == nil {
		t.Errorf("an agent that isn't there says %d", resp.StatusCode)
		resp.Body.Close()
	}
}

// TestFederated gets tokens by the unmodified client, in a public and in the
// private cloud.
func TestFederated(t *testing.T) {
	clk := new(clock)
	s, c := start(t, Options{Now: clk.now})
	clientID := newUUID()
	s.AddIdentity(Identity{ClientID: clientID}, everything...)
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	get := func(authority string, noDiscovery bool) error {
		w, err := azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: azcore.ClientOptions{
				Transport: c, Retry: policy.RetryOptions{MaxRetries: -1},
				Cloud: cloud.Configuration{ActiveDirectoryAuthorityHost: authority},
			},
			ClientID: clientID, TenantID: DefaultTenant, TokenFilePath: file, DisableInstanceDiscovery: noDiscovery,
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.GetToken(t.Context(), policy.TokenRequestOptions{Scopes: []string{"https://vault.azure.net/.default"}})
		return err
	}
	const public, private = "https://login.microsoftonline.com/", "https://login.cloud.example/"
	good, err := s.Federate(clientID, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	write(good)
	if err := get(public, false); err != nil {
		t.Errorf("public: %v", err)
	}
	if err := get(private, true); err != nil {
		t.Errorf("private: %v", err)
	}
	if err := get(private, false); err == nil {
		t.Error("the public cloud knows the private one")
	}
	for want, token := range map[string]string{
		"AADSTS70021": "e30." + strings.SplitN(good, ".", 2)[1],
	} {
		write(token)
		if err := get(public, false); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	write(good)
	clk.advance(2 * time.Hour)
	if err := get(public, false); err == nil || !strings.Contains(err.Error(), "AADSTS700024") {
		t.Errorf("an old token: %v", err)
	}
	if _, err := s.Federate(newUUID(), time.Hour); err == nil {
		t.Error("an unknown identity was federated")
	}
}

// TestKeyWrapPad uses the vectors of RFC 5649 section 6.
func TestKeyWrapPad(t *testing.T) {
	unhex := func(s string) []byte { b, _ := hex.DecodeString(s); return b }
	kek := unhex("5840df6e29b02af1ab493b705bf16ea1ae8338f4dcc176a8")
	for plain, want := range map[string]string{
		"c37b7e6492584340bed12207808941155068f738": "138bdeaa9b8fa7fc61f97742e72248ee5ae6ae5360d1ae6a5f54f373fa543b6a",
		"466f7250617369": "afbeb0f07dfbf5419200f2ccb50bb24f",
	} {
		got, err := aesWrapPad(kek, unhex(plain))
		if err != nil || hex.EncodeToString(got) != want {
			t.Errorf("aesWrapPad(%s) = %x, %v; want %s", plain, got, err, want)
		}
		back, err := aesUnwrapPad(kek, unhex(want))
		if err != nil || hex.EncodeToString(back) != plain {
			t.Errorf("aesUnwrapPad = %x, %v", back, err)
		}
		for i := range got {
			bad := bytes.Clone(got)
			bad[i] ^= 1
			if _, err := aesUnwrapPad(kek, bad); err == nil {
				t.Errorf("byte %d changed, and it unwraps", i)
			}
		}
	}
}

// TestHSMAlgorithms lets the SDK wrap by every algorithm of an AES key.
func TestHSMAlgorithms(t *testing.T) {
	s, c := start(t, Options{})
	const hsm = "https://unit.managedhsm.azure.net"
	kid, err := s.AddAESKey(hsm + "/keys/aes")
	if err != nil {
		t.Fatal(err)
	}
	options := azcore.ClientOptions{Transport: c, Retry: policy.RetryOptions{MaxRetries: -1}}
	id := newUUID()
	s.AddIdentity(Identity{ClientID: id, Assigned: true}, everything...)
	cred, err := azidentity.NewManagedIdentityCredential(&azidentity.ManagedIdentityCredentialOptions{ClientOptions: options, ID: azidentity.ClientID(id)})
	if err != nil {
		t.Fatal(err)
	}
	client, err := azkeys.NewClient(hsm, cred, &azkeys.ClientOptions{ClientOptions: options})
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		alg  azkeys.EncryptionAlgorithm
		size int
		want int // bytes wrapped; 0 for a refusal
	}{
		{azkeys.EncryptionAlgorithmA256KW, 32, 40},
		{azkeys.EncryptionAlgorithmA256KW, 33, 0},
		{"CKM_AES_KEY_WRAP", 64, 72},
		{"CKM_AES_KEY_WRAP_PAD", 33, 48},
		{"CKM_AES_KEY_WRAP_PAD", 5, 16},
		{azkeys.EncryptionAlgorithmA128KW, 32, 0},
		{azkeys.EncryptionAlgorithmRSAOAEP256, 32, 0},
	} {
		p := azkeys.KeyOperationParameters{Algorithm: &tt.alg, Value: bytes.Repeat([]byte{7}, tt.size)}
		w, err := client.WrapKey(t.Context(), "aes", kid[len(kid)-32:], p, nil)
		if len(w.Result) != tt.want || (err == nil) != (tt.want > 0) {
			t.Errorf("%s of %d bytes: %d, %v", tt.alg, tt.size, len(w.Result), err)
			continue
		}
		if err != nil {
			continue
		}
		back, err := client.UnwrapKey(t.Context(), "aes", kid[len(kid)-32:], azkeys.KeyOperationParameters{Algorithm: &tt.alg, Value: w.Result}, nil)
		if err != nil || !bytes.Equal(back.Result, p.Value) {
			t.Errorf("%s: unwraps to %x, %v", tt.alg, back.Result, err)
		}
	}
}

// TestSign checks signatures with the key that the double shows.
func TestSign(t *testing.T) {
	s, c := start(t, Options{})
	s.AddKey(testKey, 2048)
	s.Permit(s.System(), "get", "sign")
	token := vaultToken(t, c)
	var shown struct{ Key struct{ KID, N, E string } }
	if err := json.Unmarshal(do(t, c, "GET", testKey+"?api-version=7.5", token, "").body, &shown); err != nil {
		t.Fatal(err)
	}
	n, err1 := unb64(shown.Key.N)
	e, err2 := unb64(shown.Key.E)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	public := &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(new(big.Int).SetBytes(e).Int64())}
	digest := sha256.Sum256([]byte("message"))
	sign := func(alg string, digest []byte) answer {
		return do(t, c, "POST", testKey+"/sign?api-version=7.5", token, fmt.Sprintf(`{"alg":%q,"value":%q}`, alg, b64(digest)))
	}
	for _, alg := range []string{"PS256", "RS256"} {
		a := sign(alg, digest[:])
		var got struct{ KID, Value string }
		if err := json.Unmarshal(a.body, &got); a.status != 200 || err != nil || got.KID != shown.Key.KID {
			t.Fatalf("%s: %d %s", alg, a.status, a.body)
		}
		value, err := unb64(got.Value)
		if err == nil && alg == "PS256" {
			err = rsa.VerifyPSS(public, crypto.SHA256, digest[:], value, &rsa.PSSOptions{SaltLength: 32})
		} else if err == nil {
			err = rsa.VerifyPKCS1v15(public, crypto.SHA256, digest[:], value)
		}
		if err != nil {
			t.Errorf("%s: %v", alg, err)
		}
	}
	for _, tt := range []struct {
		change func()
		alg    string
		digest []byte
		status int
	}{
		{nil, "ES256", digest[:], 400}, {nil, "PS512", digest[:], 400}, {nil, "PS256", digest[:20], 400},
		{func() { s.SetOperations(testKey, "verify") }, "PS256", digest[:], 403},
		{func() { s.SetOperations(testKey, "sign"); s.SetEnabled(testKey, false) }, "PS256", digest[:], 403},
		{func() { s.SetEnabled(testKey, true); s.SetValidity(testKey, time.Time{}, time.Now().Add(-time.Hour)) }, "PS256", digest[:], 403},
		{func() { s.SetValidity(testKey, time.Now().Add(time.Hour), time.Time{}) }, "PS256", digest[:], 403},
		{func() { s.SetValidity(testKey, time.Time{}, time.Time{}); s.Permit(s.System(), "get") }, "PS256", digest[:], 403},
	} {
		if tt.change != nil {
			tt.change()
		}
		if a := sign(tt.alg, tt.digest); a.status != tt.status {
			t.Errorf("%s of %d bytes: %d %s, want %d", tt.alg, len(tt.digest), a.status, a.body, tt.status)
		}
	}
}

// TestSpecification compares the answers to wrap, unwrap and rotate with the
// examples of the REST specification.
func TestSpecification(t *testing.T) {
	s, c := start(t, Options{})
	s.Permit(s.System(), everything...)
	if _, err := s.AddKey(testKey, 2048); err != nil {
		t.Fatal(err)
	}
	token := vaultToken(t, c)
	body := func(file string) map[string]any { return at(testdata(t, file), "responses", "200", "body") }
	post := func(operation, parameters string) map[string]any {
		t.Helper()
		a := do(t, c, "POST", testKey+"/"+operation+"?api-version=2025-07-01", token, parameters)
		if a.status != 200 {
			t.Fatalf("%s: %d %s", operation, a.status, a.body)
		}
		return a.json(t)
	}
	// What is wrapped is what the example wraps, by the algorithm that it names.
	p := at(testdata(t, "spec-wrapKey.json"), "parameters", "parameters")
	wrapped := post("wrapkey", fmt.Sprintf(`{"alg":%q,"value":%q}`, p["alg"], p["value"]))
	wantShape(t, "wrap", wrapped, body("spec-wrapKey.json"))
	unwrapped := post("unwrapkey", fmt.Sprintf(`{"alg":%q,"value":%q}`, p["alg"], wrapped["value"]))
	want := body("spec-unwrapKey.json")
	wantShape(t, "unwrap", unwrapped, want)
	if unwrapped["value"] != want["value"] {
		t.Errorf("unwrapped %v, the example has %v", unwrapped["value"], want["value"])
	}
	rotated, want := post("rotate", ""), body("spec-RotateKey.json")
	wantShape(t, "rotate: key", rotated["key"], want["key"])
	// The example is older than some attributes.
	for name, v := range at(want, "attributes") {
		if got, ok := at(rotated, "attributes")[name]; !ok || reflect.TypeOf(got) != reflect.TypeOf(v) {
			t.Errorf("rotate: attribute %s is %T, the example has %T", name, got, v)
		}
	}
}
