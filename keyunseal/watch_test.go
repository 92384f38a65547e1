package keyunseal

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal/vaulttest"
)

// TestManagedHSM does with keys of a managed HSM what is done with a vault's.
func TestManagedHSM(t *testing.T) {
	s, _ := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	const url = "https://unit.managedhsm.azure.net/keys/aes"
	kid, err := s.AddAESKey(url)
	if err != nil {
		t.Fatal(err)
	}
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	wantOpens(t, opts, token, key)
	if d, _ := Describe(token); d.Algorithm != "A256KW" || d.KeyVersion != kid[len(kid)-32:] {
		t.Errorf("%+v", d)
	}
	// An altered wrapped value is refused by the HSM, which authenticates it.
	bad := edit(t, token, func(m map[string]any) { m["wrapped"] = make([]byte, 40) })
	wantClass(t, Unseal(t.Context(), opts, bad, testVolume, new([KeySize]byte)), ClassIntegrity)

	if _, err := s.AddAESKey(url); err != nil {
		t.Fatal(err)
	}
	fresh, err := Rewrap(t.Context(), opts, token, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, fresh, key)
	wantOpens(t, opts, token, key)
	// Who may not look at the key wraps as the token was.
	if _, err := s.AddAESKey(url); err != nil {
		t.Fatal(err)
	}
	blind, _ := withIdentity(t, s, "wrapKey", "unwrapKey")
	if fresh, err = Rewrap(t.Context(), blind, fresh, testVolume, key); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, fresh, key)

	const rsa = "https://unit.managedhsm.azure.net/keys/rsa"
	if _, err := s.AddKey(rsa, 3072); err != nil {
		t.Fatal(err)
	}
	token = mustSeal(t, opts, rsa, key)
	wantOpens(t, opts, token, key)
	if st, err := Inspect(t.Context(), opts, token, testVolume); err != nil || st.Type != "RSA-HSM" || st.Bits != 3072 {
		t.Errorf("%+v, %v", st, err)
	}
}

// TestProbe: a probe tells what an unseal would, without the volume key being
// anywhere.
func TestProbe(t *testing.T) {
	var seen [][]byte
	s, url := newDouble(t, vaulttest.Options{Plaintext: func(_ string, p []byte) { seen = append(seen, slices.Clone(p)) }})
	opts, clientID := withIdentity(t, s, allPermissions...)
	token := mustSeal(t, opts, url, randomKey(t))
	var vt vaultToken
	if err := json.Unmarshal(token, &vt); err != nil {
		t.Fatal(err)
	}
	seen = nil
	before := len(s.Requests())
	if err := Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Fatal(err)
	}
	if len(seen) != 1 || sha256.Sum256(seen[0]) != [32]byte(vt.CanaryHash) {
		t.Errorf("the vault unwrapped %d values, want the canary alone", len(seen))
	}
	var routes []string
	for _, r := range s.Requests()[before:] {
		routes = append(routes, r.Route)
	}
	if got := strings.Join(routes, " "); got != "challenge unwrapkey" && got != "challenge imds unwrapkey" {
		t.Errorf("requests %q", got)
	}

	kid, _ := s.KeyURL(url)
	for _, tt := range []struct {
		name   string
		break_ func()
		class  Class
		denied bool
	}{
		{"disabled", func() { s.SetEnabled(kid, false) }, ClassKeyUnusable, true},
		{"not permitted", func() { s.SetEnabled(kid, true); s.Permit(clientID, "get", "wrapKey") }, ClassDenied, true},
		{"firewall", func() {
			s.Permit(clientID, allPermissions...)
			s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.AnswerError(403, "Forbidden", "ForbiddenByFirewall", "m")})
		}, ClassDenied, true},
		{"token not accepted", func() {
			s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.AnswerError(401, "Unauthorized", "", "AKV10046: Unable to resolve the key used for signature validation.")})
		}, ClassDenied, false},
		{"throttled", func() { s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Throttled()}) }, ClassThrottled, false},
		{"fault", func() { s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Answer(503, nil, "")}) }, ClassUnreachable, false},
		{"reset", func() { s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Reset}) }, ClassUnreachable, false},
		{"empty object", func() { s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Answer(200, nil, "{}")}) }, ClassMalformed, false},
		{"a page", func() {
			s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Answer(200, http.Header{"Content-Type": {"text/html"}}, "<html>")})
		}, ClassMalformed, false},
		{"another plaintext", func() {
			s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Rewrite(func(a map[string]any) { a["value"] = strings.Repeat("A", 43) })})
		}, ClassIntegrity, false},
		{"bad parameter", func() {
			s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.AnswerError(400, "BadParameter", "", "m")})
		}, ClassIntegrity, false},
		{"deleted", func() { s.Delete(url) }, ClassKeyUnusable, true},
		{"purged, or never there", func() { s.Recover(url) }, ClassKeyUnusable, true}, // it takes time
	} {
		tt.break_()
		e := wantClass(t, Probe(t.Context(), opts, token, testVolume), tt.class)
		if e.Denied() != tt.denied || e.Denied() && e.Transient() || e.Op != "probe" {
			t.Errorf("%s: denied %v, transient %v, op %q", tt.name, e.Denied(), e.Transient(), e.Op)
		}
	}
}

// TestExpiredKeyUnwraps: only Inspect tells that a key has expired.
func TestExpiredKeyUnwraps(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, _ := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	expired := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := s.SetValidity(url, time.Time{}, expired); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, token, key)
	if err := Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Error(err)
	}
	st, err := Inspect(t.Context(), opts, token, testVolume)
	if err != nil || !st.Expires.Equal(expired) || !st.Enabled || st.NewestUsable || st.Stale() {
		t.Errorf("%+v, %v", st, err)
	}
	// A token under an expired key can't be renewed, and says why.
	_, err = Seal(t.Context(), opts, url, testVolume, key)
	wantClass(t, err, ClassKeyUnusable)
}

func TestInspectAndRewrap(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{RecoveryLevel: "Recoverable+Purgeable"})
	opts, clientID := withIdentity(t, s, allPermissions...)
	key := randomKey(t)
	token := mustSeal(t, opts, url, key)
	old, _ := s.KeyURL(url)
	st, err := Inspect(t.Context(), opts, token, testVolume)
	if err != nil || st.Stale() || !st.Enabled || st.Type != "RSA" || st.Bits != 2048 || !st.Purgeable || st.Version != old[len(old)-32:] || st.Newest != st.Version {
		t.Errorf("%+v, %v", st, err)
	}
	_, err = Rewrap(t.Context(), opts, token, testVolume, key)
	if !errors.Is(err, ErrCurrent) {
		t.Errorf("Rewrap under the newest version = %v, want ErrCurrent", err)
	}
	if _, err := s.AddKey(url, 2048); err != nil {
		t.Fatal(err)
	}
	if st, err := Inspect(t.Context(), opts, token, testVolume); err != nil || !st.Stale() {
		t.Errorf("%+v, %v", st, err)
	}
	fresh, err := Rewrap(t.Context(), opts, token, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, fresh, key)
	wantOpens(t, opts, token, key)
	// The old version may be disabled now.
	if err := s.SetEnabled(old, false); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, fresh, key)
	wantClass(t, Probe(t.Context(), opts, token, testVolume), ClassKeyUnusable)
	if st, err := Inspect(t.Context(), opts, token, testVolume); err != nil || st.Enabled || !st.Stale() {
		t.Errorf("%+v, %v", st, err)
	}

	// Without the permission to look, a rewrap finds out by wrapping.
	s.Permit(clientID, "wrapKey", "unwrapKey")
	_, err = Inspect(t.Context(), opts, fresh, testVolume)
	wantClass(t, err, ClassDenied)
	if _, err = Rewrap(t.Context(), opts, fresh, testVolume, key); !errors.Is(err, ErrCurrent) {
		t.Errorf("Rewrap without get = %v, want ErrCurrent", err)
	}
	// A newest version that is disabled is not used.
	s.Permit(clientID, allPermissions...)
	newest, _ := s.AddKey(url, 2048)
	s.SetEnabled(newest, false)
	if st, err := Inspect(t.Context(), opts, fresh, testVolume); err != nil || st.Stale() || st.NewestUsable {
		t.Errorf("%+v, %v", st, err)
	}
	_, err = Rewrap(t.Context(), opts, fresh, testVolume, key)
	wantClass(t, err, ClassKeyUnusable)
}

// TestHostKeyProbe: what there is to see of a host key.
func TestHostKeyProbe(t *testing.T) {
	opts := Options{HostKey: t.TempDir() + "/host.key"}
	token := mustSeal(t, opts, SpecHostKey, randomKey(t))
	if err := Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Error(err)
	}
	elsewhere := Options{HostKey: t.TempDir() + "/other.key"}
	e := wantClass(t, Probe(t.Context(), elsewhere, token, testVolume), ClassKeyUnusable)
	if e.Denied() {
		t.Error("a missing file is taken for a denial")
	}
	mustSeal(t, elsewhere, SpecHostKey, randomKey(t))
	wantClass(t, Probe(t.Context(), elsewhere, token, testVolume), ClassWrongKey)
	if _, err := Inspect(t.Context(), opts, token, testVolume); !errors.Is(err, ErrNoStatus) {
		t.Errorf("Inspect = %v", err)
	}
	if _, err := Rewrap(t.Context(), opts, token, testVolume, randomKey(t)); !errors.Is(err, ErrCurrent) {
		t.Errorf("Rewrap = %v", err)
	}
}

// TestObserve: every use of a KEK is told, good or bad, with the ids by which the
// vault's own log can be searched.
func TestObserve(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, clientID := withIdentity(t, s, allPermissions...)
	var got []Exchange
	opts.Observe = func(x Exchange) { got = append(got, x) }
	token := mustSeal(t, opts, url, randomKey(t))
	var ops []string
	for i, x := range got {
		ops = append(ops, x.Op)
		// Sealing, unsealing and probing each have a client of their own.
		if want := map[bool]int{true: 2, false: 1}[i == 0 || i >= 3]; x.Requests != want {
			t.Errorf("%s took %d requests, want %d", x.Op, x.Requests, want)
		}
		if !x.OK() || x.KeyID != url || x.Duration <= 0 || x.RequestID == "" || x.ClientRequestID == "" {
			t.Errorf("%+v", x)
		}
	}
	if o := strings.Join(ops, " "); o != "get wrap wrap unwrap probe" {
		t.Errorf("observed %q", o)
	}
	known := make(map[string]bool)
	for _, r := range s.Requests() {
		known[r.RequestID+" "+r.ClientRequestID] = true
	}
	for _, x := range got {
		if !known[x.RequestID+" "+x.ClientRequestID] {
			t.Errorf("the vault doesn't know the request %+v", x)
		}
	}
	s.Permit(clientID)
	got = nil
	Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte))
	if len(got) != 1 || got[0].OK() || got[0].Class != "access denied" || got[0].Code != "ForbiddenByRbac" || got[0].Status != 403 || got[0].KeyVersion == "" {
		t.Errorf("%+v", got)
	}

	// What is wrong with an answer is observed too.
	s.Permit(clientID, allPermissions...)
	got = nil
	s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Rewrite(func(a map[string]any) { a["value"] = strings.Repeat("A", 43) })})
	wantClass(t, Probe(t.Context(), opts, token, testVolume), ClassIntegrity)
	if len(got) != 1 || got[0].Op != "probe" || got[0].Class != "integrity failure" {
		t.Errorf("a probe with a wrong canary: %+v", got)
	}

	host := Options{HostKey: t.TempDir() + "/host.key", Observe: opts.Observe}
	got = nil
	mustSeal(t, host, SpecHostKey, randomKey(t))
	if len(got) != 2 || got[0].Op != "wrap" || got[1].Op != "unwrap" || len(got[0].KeyID) != 16 || got[0].KeyID != got[1].KeyID {
		t.Errorf("%+v", got)
	}
}

// TestChildWatch: the same through a process.
func TestChildWatch(t *testing.T) {
	opts := Options{HostKey: t.TempDir() + "/host.key"}
	var got []Exchange
	opts.Observe = func(x Exchange) { got = append(got, x) }
	c := &Child{}
	key := randomKey(t)
	token, err := c.Seal(t.Context(), opts, SpecHostKey, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || !got[0].OK() {
		t.Errorf("observed %+v", got)
	}
	if err := c.Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Error(err)
	}
	if _, err := c.Inspect(t.Context(), opts, token, testVolume); !errors.Is(err, ErrNoStatus) {
		t.Errorf("Inspect = %v", err)
	}
	if _, err := c.Rewrap(t.Context(), opts, token, testVolume, key); !errors.Is(err, ErrCurrent) {
		t.Errorf("Rewrap = %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.Probe(ctx, opts, token, testVolume); err == nil {
		t.Error("a probe with a context that has ended succeeded")
	}
}
