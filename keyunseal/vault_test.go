package keyunseal

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"hostcryptd/keyunseal/vaulttest"
)

func TestVaultRoundTrip(t *testing.T) {
	s, _ := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	for _, bits := range []int{2048, 3072, 4096} {
		url := "https://Unit.vault.azure.net/keys/Round-Trip"
		kid, err := s.AddKey(url, bits)
		if err != nil {
			t.Fatal(err)
		}
		key := randomKey(t)
		token := mustSeal(t, opts, url, key)
		wantOpens(t, opts, token, key)

		d, err := Describe(token)
		if err != nil {
			t.Fatal(err)
		}
		want := Description{
			Type: TypeKeyVault, Version: 1, Algorithm: "RSA-OAEP-256", Bits: bits,
			KeyID: "https://unit.vault.azure.net/keys/Round-Trip", KeyVersion: kid[len(kid)-32:],
			Identity: opts.Identity, Tenant: vaulttest.DefaultTenant,
		}
		if d != want {
			t.Errorf("Describe = %+v, want %+v", d, want)
		}
	}
}

// After a rotation the old token must still be unwrapped by the old version, and
// a new one sealed by the new version.
func TestVaultRotation(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	before := mustSeal(t, opts, url, key)
	kid, err := s.AddKey(url, 2048)
	if err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, before, key)
	after := mustSeal(t, opts, url, key)
	if d, _ := Describe(after); !strings.HasSuffix(kid, d.KeyVersion) {
		t.Errorf("sealed with version %s after the rotation to %s", d.KeyVersion, kid)
	}

	// A version in the URL is kept.
	d, _ := Describe(before)
	pinned := mustSeal(t, opts, url+"/"+strings.ToUpper(d.KeyVersion), key)
	if p, _ := Describe(pinned); p.KeyVersion != d.KeyVersion {
		t.Errorf("sealed with version %s, asked for %s", p.KeyVersion, d.KeyVersion)
	}
}

// The permission to look at the key is optional.
func TestVaultWithoutGet(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, "wrapKey", "unwrapKey")
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	wantOpens(t, opts, token, key)
	if d, _ := Describe(token); d.KeyVersion == "" {
		t.Error("the token doesn't name the version that wrapped")
	}
}

// Unsealing costs one unauthorized request, one token and one unwrap. More would
// count against the vault's limit on every boot.
func TestVaultRequests(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, clientID := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	before := len(s.Requests())
	wantOpens(t, opts, token, key)
	var routes []string
	for _, r := range s.Requests()[before:] {
		routes = append(routes, r.Route)
		if !strings.HasPrefix(r.UserAgent, "hostcryptd-"+testVolume[:8]+" ") || r.ClientRequestID == "" {
			t.Errorf("the vault's log can't tell the volume: user agent %q, client request id %q", r.UserAgent, r.ClientRequestID)
		}
		if r.Route == "unwrapkey" && r.ClientID != clientID {
			t.Errorf("unwrapped by identity %s, want %s", r.ClientID, clientID)
		}
	}
	if got := strings.Join(routes, " "); got != "challenge unwrapkey" {
		t.Errorf("requests %q, want \"challenge unwrapkey\"", got)
	}
}

// TestVaultClasses makes the double fail in every way that a class stands for.
func TestVaultClasses(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, clientID := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	kid, _ := s.KeyURL(url)
	other, err := s.AddKey("https://unit.vault.azure.net/keys/other", 2048)
	if err != nil {
		t.Fatal(err)
	}

	unwrap := func(do vaulttest.FaultFunc) func() {
		return func() { s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: do}) }
	}
	// fresh makes the next request open a connection.
	fresh := func() {
		tr := s.Transport()
		t.Cleanup(tr.CloseIdleConnections)
		opts.Transport = tr
	}
	good := func() { s.SetCertificate("unit.vault.azure.net", vaulttest.CertificateGood) }
	tests := []struct {
		name      string
		break_    func()
		repair    func()
		class     Class
		code      string
		status    int
		transient bool
		text      string // in the message
	}{
		{name: "disabled", class: ClassKeyUnusable, code: "KeyDisabled", status: 403, text: "enable or recover that version of the key in the vault; if it is gone for good, with the recovery key 'hostcryptd key add --recovery-key'",
			break_: func() { s.SetEnabled(kid, false) }, repair: func() { s.SetEnabled(kid, true) }},
		{name: "deleted", class: ClassKeyUnusable, code: "KeyNotFound", status: 404, text: kid,
			break_: func() { s.Delete(url) }, repair: nil /* last row that needs the key */},
		{name: "innerError", class: ClassKeyUnusable, code: "KeyDisabled", status: 403,
			break_: unwrap(vaulttest.Answer(403, nil, `{"error":{"code":"Forbidden","message":"m","innerError":{"code":"KeyDisabled"}}}`))},
		{name: "expired", class: ClassKeyUnusable, code: "KeyExpired", status: 403,
			break_: unwrap(vaulttest.AnswerError(403, "Forbidden", "KeyExpired", "m"))},
		{name: "no permission", class: ClassDenied, code: "ForbiddenByRbac", status: 403, text: "Key Vault Crypto Service Encryption User",
			break_: func() { s.Permit(clientID, "get", "wrapKey") }, repair: func() { s.Permit(clientID, allPermissions...) }},
		{name: "access policy", class: ClassDenied, code: "AccessDenied", status: 403,
			break_: unwrap(vaulttest.AnswerError(403, "Forbidden", "AccessDenied", "m"))},
		{name: "firewall", class: ClassDenied, code: "ForbiddenByFirewall", status: 403, text: "firewall allow this host",
			break_: unwrap(vaulttest.AnswerError(403, "Forbidden", "ForbiddenByFirewall", "Client address is not authorized and caller is not a trusted service."))},
		// Also what a vault says when it is the one that has lost Entra ID.
		{name: "token not accepted", class: ClassDenied, code: "Unauthorized", status: 401, transient: true, text: "tenant of the identity",
			break_: unwrap(vaulttest.AnswerError(401, "Unauthorized", "", "AKV10046: Unable to resolve the key used for signature validation."))},
		{name: "throttled", class: ClassThrottled, code: "Throttled", status: 429, transient: true,
			break_: unwrap(vaulttest.Throttled())},
		{name: "server fault", class: ClassUnreachable, code: "InternalServerError", status: 500, transient: true,
			break_: unwrap(vaulttest.AnswerError(500, "InternalServerError", "", "m"))},
		{name: "HTML", class: ClassUnreachable, status: 503, transient: true,
			break_: unwrap(vaulttest.Answer(503, http.Header{"Content-Type": {"text/html"}}, "<html>"))},
		{name: "empty", class: ClassUnreachable, status: 502, transient: true,
			break_: unwrap(vaulttest.Answer(502, nil, ""))},
		{name: "reset", class: ClassUnreachable, transient: true, text: "route to the vault",
			break_: unwrap(vaulttest.Reset)},
		{name: "truncated", class: ClassUnreachable, transient: true,
			break_: unwrap(vaulttest.Truncate)},
		{name: "bad parameter", class: ClassIntegrity, code: "BadParameter", status: 400,
			break_: unwrap(vaulttest.AnswerError(400, "BadParameter", "", "m"))},
		{name: "slow", class: ClassUnreachable, transient: true,
			break_: unwrap(vaulttest.Slow(0, time.Hour))},
		{name: "throttled for a while", class: ClassThrottled, code: "Throttled", status: 429, transient: true,
			break_: unwrap(vaulttest.ThrottledFor(90 * time.Second))},
		{name: "firewall that is shut", class: ClassDenied, code: "ForbiddenByFirewall", status: 403, text: "firewall allow this host",
			break_: func() { s.SetFirewall("unit.vault.azure.net", true) }, repair: func() { s.SetFirewall("unit.vault.azure.net", false) }},
		{name: "certificate expired", class: ClassUnreachable, transient: true, text: "is the clock right",
			break_: func() { fresh(); s.SetCertificate("unit.vault.azure.net", vaulttest.CertificateExpired) }, repair: good},
		{name: "certificate not yet valid", class: ClassUnreachable, transient: true, text: "is the clock right",
			break_: func() { fresh(); s.SetCertificate("unit.vault.azure.net", vaulttest.CertificateNotYetValid) }, repair: good},
		{name: "another host's certificate", class: ClassUnreachable, transient: true, text: "intercept TLS",
			break_: func() { fresh(); s.SetCertificate("unit.vault.azure.net", vaulttest.CertificateOtherHost) }, repair: good},
		{name: "self-signed", class: ClassUnreachable, transient: true, text: "ca-certificates",
			break_: func() { fresh(); s.SetCertificate("unit.vault.azure.net", vaulttest.CertificateSelfSigned) }, repair: good},
		{name: "no such host", class: ClassUnreachable, transient: true, text: "no such host",
			break_: func() { fresh(); s.SetResolves("unit.vault.azure.net", false) }, repair: func() { s.SetResolves("unit.vault.azure.net", true) }},
		// What a proxy says is no denial.
		{name: "403 of a proxy", class: ClassMalformed, status: 403, transient: true, text: "proxy or a portal",
			break_: unwrap(vaulttest.Page(403))},
		{name: "404 of a proxy", class: ClassMalformed, status: 404, transient: true,
			break_: unwrap(vaulttest.Page(404))},
		{name: "401 of a proxy", class: ClassMalformed, status: 401, transient: true,
			break_: unwrap(vaulttest.Page(401))},
		{name: "400 of a proxy", class: ClassMalformed, status: 400, transient: true,
			break_: unwrap(vaulttest.Page(400))},
		{name: "403 with JSON of something else", class: ClassMalformed, status: 403, transient: true,
			break_: unwrap(vaulttest.Answer(403, http.Header{"Content-Type": {"application/json"}}, `{"message":"Forbidden"}`))},
		{name: "407", class: ClassMalformed, status: 407, transient: true,
			break_: unwrap(vaulttest.Answer(407, nil, ""))},
		{name: "redirect", class: ClassMalformed, status: 307, transient: true,
			break_: unwrap(vaulttest.Answer(307, http.Header{"Location": {"https://unit.vault.azure.net/elsewhere"}}, ""))},
		{name: "empty object", class: ClassMalformed, transient: true, text: "the answer is empty",
			break_: unwrap(vaulttest.Answer(200, nil, "{}"))},
		{name: "null", class: ClassMalformed, transient: true, break_: unwrap(vaulttest.Answer(200, nil, "null"))},
		{name: "not JSON", class: ClassMalformed, transient: true, break_: unwrap(vaulttest.Answer(200, nil, "surprise"))},
		{name: "no value", class: ClassIntegrity, text: "0 bytes",
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { delete(a, "value") }))},
		{name: "short value", class: ClassIntegrity, text: "3 bytes",
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { a["value"] = "AQID" }))},
		{name: "other value", class: ClassIntegrity, text: "doesn't authenticate",
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { a["value"] = strings.Repeat("A", 43) }))},
		{name: "other key", class: ClassIntegrity, text: "the answer is about " + other,
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { a["kid"] = other }))},
		{name: "other version", class: ClassIntegrity,
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { a["kid"] = url + "/" + strings.Repeat("0", 32) }))},
		{name: "other vault", class: ClassIntegrity,
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) {
				a["kid"] = strings.Replace(a["kid"].(string), "unit.", "evil.", 1)
			}))},
		{name: "kid of no vault", class: ClassIntegrity,
			break_: unwrap(vaulttest.Rewrite(func(a map[string]any) { a["kid"] = "https://example.com/keys/kek" }))},
		{name: "too long", class: ClassMalformed, transient: true, text: "longer than 1 MiB",
			break_: unwrap(func(w http.ResponseWriter, _ *http.Request, _ http.HandlerFunc) {
				for range 40 {
					io.WriteString(w, strings.Repeat(" ", 64<<10))
				}
			})},
	}
	// The row that deletes the key comes last.
	for i, tt := range tests {
		if tt.name == "deleted" {
			tests = append(append(tests[:i:i], tests[i+1:]...), tt)
			break
		}
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.break_()
			defer func() {
				s.ClearFaults()
				if tt.repair != nil {
					tt.repair()
				}
			}()
			dst, before := [KeySize]byte{1, 2, 3}, [KeySize]byte{1, 2, 3}
			ctx := t.Context()
			if tt.name == "slow" {
				ctx = shortContext(t, 100*time.Millisecond)
			}
			var observed []Exchange
			watched := opts
			watched.Observe = func(x Exchange) { observed = append(observed, x) }
			err := Unseal(ctx, watched, token, testVolume, &dst)
			e := wantClass(t, err, tt.class)
			// The log of key use says the same; but for what only opening the token tells.
			if len(observed) != 1 || observed[0].OK() != (tt.name == "other value") || !observed[0].OK() && observed[0].Class != tt.class.String() {
				t.Errorf("observed %+v", observed)
			}
			if e.Denied() != (!tt.transient && (tt.class == ClassDenied || tt.class == ClassKeyUnusable)) || e.Integrity() != (tt.class == ClassIntegrity) {
				t.Errorf("denied %v, integrity %v", e.Denied(), e.Integrity())
			}
			if dst != before {
				t.Error("Unseal changed dst")
			}
			if e.Code != tt.code || e.Status != tt.status || e.Transient() != tt.transient {
				t.Errorf("code %q, status %d, transient %v; want %q, %d, %v\n%v", e.Code, e.Status, e.Transient(), tt.code, tt.status, tt.transient, err)
			}
			if !strings.Contains(err.Error(), tt.text) || strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("message %q, want one line with %q", err, tt.text)
			}
			if tt.status == 403 && tt.code != "" && tt.name != "innerError" && e.RequestID == "" {
				t.Error("no request id")
			}
			if e.Op != "unwrap" || e.KeyID != kid {
				t.Errorf("op %q, key %q; want \"unwrap\", %q", e.Op, e.KeyID, kid)
			}
		})
	}
}

// A failed call must not make the SDK try again by itself.
func TestVaultNoRetryInside(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	s.Inject(vaulttest.Fault{Route: "unwrapkey", Times: -1, Do: vaulttest.Throttled()})
	before := s.Count("unwrapkey")
	var dst [KeySize]byte
	wantClass(t, Unseal(t.Context(), opts, token, testVolume, &dst), ClassThrottled)
	if n := s.Count("unwrapkey") - before; n != 1 {
		t.Errorf("%d requests, want 1", n)
	}
}

func TestVaultRetryAfter(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	for value, want := range map[string]time.Duration{
		"":       0,
		"7":      7 * time.Second,
		"999999": maxRetryAfter,
		"-5":     0,
		"soon":   0,
		time.Now().Add(time.Hour).UTC().Format(http.TimeFormat):    maxRetryAfter,
		time.Now().Add(-time.Hour).UTC().Format(http.TimeFormat):   0,
		"Fri, 31 Dec 9999 23:59:59 GMT":                            maxRetryAfter,
		time.Now().Add(100 * time.Second).UTC().Format(time.ANSIC): 100 * time.Second,
	} {
		s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Answer(429, http.Header{"Retry-After": {value}}, "")})
		var dst [KeySize]byte
		e := wantClass(t, Unseal(t.Context(), opts, token, testVolume, &dst), ClassThrottled)
		if d := e.RetryAfter - want; d > 0 || d < -3*time.Second {
			t.Errorf("Retry-After %q: %v, want about %v", value, e.RetryAfter, want)
		}
	}
}

func TestVaultHang(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Hang})
	var dst [KeySize]byte
	err := Unseal(shortContext(t, 300*time.Millisecond), opts, token, testVolume, &dst)
	if e := wantClass(t, err, ClassUnreachable); !e.Transient() {
		t.Error("not transient")
	}
}

// One exchange is bounded even if ctx isn't.
func TestExchangeTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := transportFunc(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		pl := runtime.NewPipeline("test", "v1", runtime.PipelineOptions{}, &policy.ClientOptions{
			Transport: hang, PerRetryPolicies: []policy.Policy{&exchange{}}, Retry: policy.RetryOptions{MaxRetries: -1},
		})
		req, err := runtime.NewRequest(t.Context(), http.MethodGet, "https://unit.vault.azure.net/")
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		_, err = pl.Do(req)
		wantClass(t, classify("get", "k", err), ClassUnreachable)
		if d := time.Since(start); d != exchangeTimeout {
			t.Errorf("gave up after %v, want %v", d, exchangeTimeout)
		}
	})
}

type transportFunc func(*http.Request) (*http.Response, error)

func (f transportFunc) Do(r *http.Request) (*http.Response, error) { return f(r) }

func TestVaultChallenge(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	const tenant = vaulttest.DefaultTenant
	good := `Bearer authorization="https://login.microsoftonline.com/` + tenant + `", resource="https://vault.azure.net"`

	for name, tt := range map[string]struct {
		challenge string
		class     Class // ClassInternal stands for success
	}{
		"good":               {good, ClassInternal},
		"upper case tenant":  {strings.Replace(good, tenant, strings.ToUpper(tenant), 1), ClassInternal},
		"scope":              {strings.Replace(good, "resource", "scope", 1), ClassInternal},
		"none":               {"", ClassIntegrity},
		"no tenant":          {strings.Replace(good, "/"+tenant, "", 1), ClassIntegrity}, // the SDK panics on this
		"empty tenant":       {strings.Replace(good, tenant, "", 1), ClassIntegrity},
		"no authority":       {`Bearer resource="https://vault.azure.net"`, ClassIntegrity},
		"http authority":     {strings.Replace(good, "https://login", "http://login", 1), ClassIntegrity},
		"other tenant":       {strings.Replace(good, tenant, testVolume, 1), ClassIntegrity},
		"foreign resource":   {strings.Replace(good, "vault.azure.net", "graph.microsoft.com", 1), ClassIntegrity},
		"parent of resource": {strings.Replace(good, "https://vault.azure.net", "https://azure.net", 1), ClassIntegrity},
		"top-level resource": {strings.Replace(good, "https://vault.azure.net", "https://net", 1), ClassIntegrity},
		"scope overrides":    {good + ` scope="https://graph.microsoft.com/.default"`, ClassIntegrity},
		"second resource":    {good + `, resource="https://graph.microsoft.com"`, ClassIntegrity},
		"basic":              {`Basic realm="x"`, ClassIntegrity},
	} {
		t.Run(name, func(t *testing.T) {
			header := make(http.Header)
			if tt.challenge != "" {
				header.Set("WWW-Authenticate", tt.challenge)
			}
			s.Inject(vaulttest.Fault{Route: "challenge", Do: vaulttest.Answer(401, header, "")})
			defer s.ClearFaults()
			before := s.Count("imds")
			var dst [KeySize]byte
			err := Unseal(t.Context(), opts, token, testVolume, &dst)
			if tt.class == ClassInternal {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantClass(t, err, tt.class)
			if s.Count("imds") != before {
				t.Error("asked for a token although the challenge is bad")
			}
		})
	}
}

// The SDK's own panics, and any below it, become errors.
func TestVaultPanic(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	opts.Transport = roundTripFunc(func(*http.Request) (*http.Response, error) {
		var parts []string
		_ = parts[3]
		return nil, nil
	})
	var dst [KeySize]byte
	err := Unseal(t.Context(), opts, token, testVolume, &dst)
	if e := wantClass(t, err, ClassInternal); !e.Transient() {
		t.Error("not transient")
	}
	if !strings.Contains(err.Error(), "index out of range") || !strings.Contains(err.Error(), "in hostcryptd/keyunseal.TestVaultPanic") {
		t.Errorf("message %q doesn't say what panicked", err)
	}
}

func TestIdentityErrors(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	for name, tt := range map[string]struct {
		do        vaulttest.FaultFunc
		status    int
		code      string
		transient bool
		text      string
	}{
		"not assigned": {nil, 400, "invalid_request", false, "assigned to this machine"},
		"updating":     {vaulttest.Answer(410, nil, ""), 410, "", true, "Gone"},
		"not there":    {vaulttest.Answer(404, nil, ""), 404, "", true, "Not Found"},
		"throttled":    {vaulttest.Answer(429, nil, `{"error":"too_many","error_description":"slow down"}`), 429, "too_many", true, "slow down"},
		"fault":        {vaulttest.Answer(500, nil, "<html>"), 500, "", true, ""},
		"reset":        {vaulttest.Reset, 0, "", true, "169.254.169.254"},
		"a proxy, 403": {vaulttest.Page(403), 403, "", true, "Forbidden"},
		"a proxy, 400": {vaulttest.Page(400), 400, "", true, "Bad Request"},
		"not a token":  {vaulttest.Answer(200, nil, "{}"), 200, "", true, "holds no token"},
		"not JSON":     {vaulttest.Answer(200, nil, "hello"), 200, "", true, "holds no token"},
	} {
		t.Run(name, func(t *testing.T) {
			// An identity that has no token yet.
			opts := opts
			if tt.do == nil {
				opts.Identity = "managed:" + testVolume
			} else {
				fresh, _ := withIdentity(t, s, allPermissions...)
				opts.Identity = fresh.Identity
				s.Inject(vaulttest.Fault{Route: "imds", Times: -1, Do: tt.do})
				defer s.ClearFaults()
			}
			before := s.Count("imds")
			var dst [KeySize]byte
			err := Unseal(t.Context(), opts, token, testVolume, &dst)
			e := wantClass(t, err, ClassIdentity)
			if e.Status != tt.status || e.Code != tt.code || e.Transient() != tt.transient || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("status %d, code %q, transient %v, %q; want %d, %q, %v, %q", e.Status, e.Code, e.Transient(), err, tt.status, tt.code, tt.transient, tt.text)
			}
			if strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("message has several lines: %q", err)
			}
			limit := 1
			if name == "reset" {
				limit = 2 // net/http repeats a GET whose reused connection broke
			}
			if n := s.Count("imds") - before; n < 1 || n > limit {
				t.Errorf("%d requests to the identity endpoint, want %d", n, limit)
			}
		})
	}
}

// TestSealRefuses has the keys that look fine and aren't.
func TestSealRefuses(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{WrapWhenDisabled: true})
	opts, clientID := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	kid, _ := s.KeyURL(url)
	rewrite := func(route string, f func(map[string]any)) func() {
		return func() { s.Inject(vaulttest.Fault{Route: route, Do: vaulttest.Rewrite(f)}) }
	}
	for _, tt := range []struct {
		name   string
		break_ func()
		repair func()
		class  Class
		op     string
	}{
		{"disabled", func() { s.SetEnabled(url, false) }, func() { s.SetEnabled(url, true) }, ClassKeyUnusable, "get"},
		{"disabled, seen by the unwrap only", // finding: such a key is reported to wrap
			func() { s.SetEnabled(url, false); s.Permit(clientID, "wrapKey", "unwrapKey") },
			func() { s.SetEnabled(url, true); s.Permit(clientID, allPermissions...) }, ClassKeyUnusable, "verify"},
		{"wraps but may not unwrap", func() { s.Permit(clientID, "get", "wrapKey") }, func() { s.Permit(clientID, allPermissions...) }, ClassDenied, "verify"},
		{"expired", func() { s.SetValidity(url, time.Time{}, time.Now().Add(-time.Hour)) }, func() { s.SetValidity(url, time.Time{}, time.Time{}) }, ClassKeyUnusable, "wrap"},
		{"not for unwrapping", func() { s.SetOperations(url, "wrapKey", "sign") }, func() { s.SetOperations(url, "wrapKey", "unwrapKey") }, ClassConfig, "get"},
		{"elliptic", rewrite("get", func(a map[string]any) { a["key"].(map[string]any)["kty"] = "EC" }), nil, ClassConfig, "get"},
		{"RSA-1024", rewrite("get", func(a map[string]any) { a["key"].(map[string]any)["n"] = strings.Repeat("_", 171) }), nil, ClassConfig, "get"},
		{"get of another key", rewrite("get", func(a map[string]any) {
			a["key"].(map[string]any)["kid"] = "https://unit.vault.azure.net/keys/kex/" + strings.Repeat("0", 32)
		}), nil, ClassIntegrity, "get"},
		{"get without attributes", rewrite("get", func(a map[string]any) { delete(a, "attributes") }), nil, ClassMalformed, "get"},
		{"wrap by another version", rewrite("wrapkey", func(a map[string]any) { a["kid"] = url + "/" + strings.Repeat("0", 32) }), nil, ClassIntegrity, "wrap"},
		{"wrap to nothing", rewrite("wrapkey", func(a map[string]any) { delete(a, "value") }), nil, ClassIntegrity, "wrap"},
		{"wrap to garbage", rewrite("wrapkey", func(a map[string]any) { a["value"] = strings.Repeat("A", 342) }), nil, ClassIntegrity, "verify"},
		{"wrap to itself", func() { s.Inject(vaulttest.Fault{Route: "wrapkey", Do: wrapNothing(kid)}) }, nil, ClassIntegrity, "wrap"},
		{"unknown key", func() {
			s.Inject(vaulttest.Fault{Route: "get", Do: vaulttest.AnswerError(404, "KeyNotFound", "", "m")})
		}, nil, ClassKeyUnusable, "get"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.break_()
			defer func() {
				s.ClearFaults()
				if tt.repair != nil {
					tt.repair()
				}
			}()
			token, err := Seal(t.Context(), opts, url, testVolume, key)
			e := wantClass(t, err, tt.class)
			if e.Op != tt.op || token != nil {
				t.Errorf("op %q, token %s; want op %q and no token\n%v", e.Op, token, tt.op, err)
			}
		})
	}
	if _, err := Seal(t.Context(), opts, url, testVolume, key); err != nil {
		t.Errorf("the key isn't repaired: %v", err)
	}
}

// wrapNothing answers a wrap with the plaintext and zeros. It would unwrap.
func wrapNothing(kid string) vaulttest.FaultFunc {
	return func(w http.ResponseWriter, r *http.Request, _ http.HandlerFunc) {
		var p struct{ Value string }
		if err := json.NewDecoder(r.Body).Decode(&p); err != nil {
			panic(err)
		}
		plain, err := base64.RawURLEncoding.DecodeString(p.Value)
		if err != nil {
			panic(err)
		}
		padded := append(make([]byte, 256-len(plain)), plain...)
		json.NewEncoder(w).Encode(map[string]string{"kid": kid, "value": base64.RawURLEncoding.EncodeToString(padded)})
	}
}

// The token says which identity opens it, and the caller may say another.
func TestVaultIdentity(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, first := withIdentity(t, s, allPermissions...)
	other, second := withIdentity(t, s, "unwrapKey")
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	last := func() string { r := s.Requests(); return r[len(r)-1].ClientID }

	wantOpens(t, Options{Transport: opts.Transport}, token, key)
	if last() != first {
		t.Errorf("unwrapped by %s, the token says %s", last(), first)
	}
	wantOpens(t, other, token, key)
	if last() != second {
		t.Errorf("unwrapped by %s, the options say %s", last(), second)
	}
}

func TestSealSpecs(t *testing.T) {
	opts := Options{Transport: roundTripFunc(func(r *http.Request) (*http.Response, error) {
		t.Errorf("request to %s", r.URL.Host)
		return nil, errors.New("no network here")
	})}
	for _, tt := range []struct{ spec, volume, identity string }{
		{"https://example.com/keys/kek", testVolume, ""},
		{"https://user:hunter2@unit.vault.azure.net/keys/kek", testVolume, ""},
		{"", testVolume, ""},
		{"Platform", testVolume, ""},
		{"https://unit.vault.azure.net/keys/kek", "not-a-uuid", ""},
		{"https://unit.vault.azure.net/keys/kek", testVolume, "environment"},
		{"https://unit.vault.azure.net/keys/kek", testVolume, "managed:"},
		{"https://unit.vault.azure.net/keys/kek", testVolume, "managed:me"},
	} {
		opts.Identity = tt.identity
		_, err := Seal(t.Context(), opts, tt.spec, tt.volume, randomKey(t))
		wantClass(t, err, ClassConfig)
		if strings.Contains(err.Error(), "hunter2") {
			t.Errorf("message %q holds a password", err)
		}
	}
}

func TestSealWarns(t *testing.T) {
	for _, tt := range []struct {
		level   string
		expires time.Duration
		want    int
	}{
		{"Recoverable", 0, 0},
		{"Recoverable", 365 * 24 * time.Hour, 0},
		{"Recoverable", 24 * time.Hour, 1},
		{"Recoverable+Purgeable", 0, 1},
		{"CustomizedRecoverable+Purgeable", 24 * time.Hour, 2},
	} {
		s, url := newDouble(t, vaulttest.Options{RecoveryLevel: tt.level})
		if tt.expires != 0 {
			s.SetValidity(url, time.Time{}, time.Now().Add(tt.expires))
		}
		opts, _ := withIdentity(t, s, allPermissions...)
		core, logs := observer.New(zapcore.WarnLevel)
		opts.Log = zap.New(core)
		mustSeal(t, opts, url, randomKey(t))
		if n := logs.Len(); n != tt.want {
			t.Errorf("%s, expires in %v: %d warnings %v, want %d", tt.level, tt.expires, n, logs.All(), tt.want)
		}
	}
}

// TestVaultSecrets follows the volume key and the wrapped secret: the vault never
// sees the volume key, and no error repeats what a hostile vault echoes.
func TestVaultSecrets(t *testing.T) {
	var mu sync.Mutex
	var seen [][]byte
	s, url := newDouble(t, vaulttest.Options{Plaintext: func(_ string, p []byte) {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, append([]byte(nil), p...))
	}})
	opts, _ := withIdentity(t, s, allPermissions...)
	core, logs := observer.New(zapcore.DebugLevel)
	opts.Log = zap.New(core)
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	// The secret and the canary are wrapped, and then unwrapped to check them.
	if len(seen) != 4 || string(seen[0]) != string(seen[2]) || string(seen[1]) != string(seen[3]) || string(seen[0]) == string(seen[1]) || len(seen[0]) != KeySize {
		t.Fatalf("the vault saw %d plaintexts, want two of 32 bytes twice", len(seen))
	}
	wantNoSecret(t, "what the vault saw", seen[0], key[:])
	wantNoSecret(t, "the token", token, key[:], seen[0], seen[1])

	// A second token of the same volume key has another secret.
	mustSeal(t, opts, url, key)
	if string(seen[4]) == string(seen[0]) {
		t.Error("two tokens share a secret")
	}

	echo := func(w http.ResponseWriter, r *http.Request, next http.HandlerFunc) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		var p struct{ Value string }
		if err := json.Unmarshal(body, &p); err != nil {
			t.Error(err)
		}
		b, _ := json.Marshal(map[string]any{"error": map[string]any{"code": p.Value, "message": "you sent " + p.Value, "innererror": map[string]any{"code": p.Value}}})
		w.Header().Set("x-ms-request-id", p.Value)
		w.WriteHeader(400)
		w.Write(b)
		var raw []byte
		if raw, err = base64.RawURLEncoding.DecodeString(p.Value); err != nil {
			t.Error(err)
		}
		seen = append(seen, raw)
	}
	s.Inject(vaulttest.Fault{Route: "wrapkey", Do: echo})
	_, err := Seal(t.Context(), opts, url, testVolume, key)
	wantClass(t, err, ClassConfig)
	wantNoSecret(t, "the error", []byte(err.Error()), key[:], seen[len(seen)-1])
	e, _ := errors.AsType[*Error](err)
	wantNoSecret(t, "the cause", []byte(e.Err.Error()+e.Code+e.RequestID), key[:], seen[len(seen)-1])
	for _, l := range logs.All() {
		b, _ := json.Marshal(l)
		wantNoSecret(t, "the log", b, key[:], seen[0], seen[len(seen)-1])
	}
}

// A redirect would carry the secret to wherever it points.
func TestVaultRedirectIsNotFollowed(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	for _, status := range []int{301, 302, 303, 307, 308} {
		s.Inject(vaulttest.Fault{Route: "wrapkey", Do: vaulttest.Answer(status, http.Header{"Location": {"https://evil.vault.azure.net/keys/x"}}, "")})
		_, err := Seal(t.Context(), opts, url, testVolume, randomKey(t))
		wantClass(t, err, ClassMalformed)
	}
	for _, r := range s.Requests() {
		if strings.HasPrefix(r.Host, "evil") {
			t.Errorf("followed a redirect to %s", r.Host)
		}
	}
}

// A token moved to another volume under the same KEK must not open it.
func TestVaultTokenIsBoundToVolume(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	var dst [KeySize]byte
	err := Unseal(t.Context(), opts, token, "11111111-2222-3333-4444-555555555555", &dst)
	wantClass(t, err, ClassIntegrity)
	// The case of the UUID doesn't matter.
	if err := Unseal(t.Context(), opts, token, strings.ToUpper(testVolume), &dst); err != nil {
		t.Error(err)
	}
}

func TestVaultUntrustedCertificate(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	tr := s.Transport()
	defer tr.CloseIdleConnections()
	tr.TLSClientConfig.RootCAs = nil // those of the system
	opts.Transport = tr
	var dst [KeySize]byte
	err := Unseal(t.Context(), opts, token, testVolume, &dst)
	wantClass(t, err, ClassUnreachable)
	if !strings.Contains(err.Error(), "ca-certificates") {
		t.Errorf("message %q has no hint about certificates", err)
	}
}

// The transport of the product never uses a proxy, whatever the environment says.
func TestDirectTransport(t *testing.T) {
	if tr := directTransport(nil); tr.Proxy != nil {
		t.Error("the transport has a proxy function")
	}
	if tr := directTransport(nil); tr.TLSClientConfig.InsecureSkipVerify || tr.TLSClientConfig.RootCAs != nil {
		t.Error("the transport doesn't check against the system's roots")
	}
}
