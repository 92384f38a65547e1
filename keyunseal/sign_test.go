package keyunseal

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal/vaulttest"
)

func TestSign(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	opts, clientID := withIdentity(t, s, "get", "sign")
	digest := sha256.Sum256([]byte("a volume key's fingerprint"))
	hsm := "https://unit.managedhsm.azure.net/keys/aes"
	if _, err := s.AddAESKey(hsm); err != nil {
		t.Fatal(err)
	}
	for _, bits := range []int{2048, 4096} {
		kid, err := s.AddKey(url, bits)
		if err != nil {
			t.Fatal(err)
		}
		sig, err := Sign(t.Context(), opts, url, testVolume, digest)
		if err != nil {
			t.Fatal(err)
		}
		if sig.KeyID != kid || sig.Algorithm != AlgorithmPS256 || len(sig.Value) != bits/8 {
			t.Errorf("%d bits: %+v, want one by %s", bits, sig, kid)
		}
		// As anybody would check it, with the file that is given to hosts.
		file := filepath.Join(t.TempDir(), "signer.pem")
		if err := os.WriteFile(file, sig.EncodePublicKey(), 0o644); err != nil {
			t.Fatal(err)
		}
		keys, err := ReadPublicKeys(file)
		if err != nil || len(keys) != 1 {
			t.Fatalf("ReadPublicKeys = %v, %v", keys, err)
		}
		if err := rsa.VerifyPSS(keys[0], crypto.SHA256, digest[:], sig.Value, &rsa.PSSOptions{SaltLength: 32}); err != nil {
			t.Error(err)
		}
	}
	rewrite := func(route string, f func(map[string]any)) func() {
		return func() { s.Inject(vaulttest.Fault{Route: route, Do: vaulttest.Rewrite(f)}) }
	}
	for _, tt := range []struct {
		name, spec string
		break_     func()
		class      Class
		op         string
	}{
		{"no permission", url, func() { s.Permit(clientID, "get") }, ClassDenied, "sign"},
		{"not even to look", url, func() { s.Permit(clientID, "sign") }, ClassDenied, "get"},
		{"disabled", url, func() { s.SetEnabled(url, false) }, ClassKeyUnusable, "get"},
		{"expired", url, func() { s.SetValidity(url, time.Time{}, time.Now().Add(-time.Hour)) }, ClassKeyUnusable, "sign"},
		{"not for signing", url, func() { s.SetOperations(url, "wrapKey", "unwrapKey") }, ClassConfig, "get"},
		{"AES", hsm, nil, ClassConfig, "get"},
		{"no URL", "platform", nil, ClassConfig, "sign"},
		{"a URL of nobody's", "https://vault.example.com/keys/kek", nil, ClassConfig, "vault"},
		{"empty", url, rewrite("sign", func(a map[string]any) { clear(a) }), ClassMalformed, "sign"},
		{"by another version", url, rewrite("sign", func(a map[string]any) { a["kid"] = url + "/" + strings.Repeat("0", 32) }), ClassIntegrity, "sign"},
		{"of something else", url, rewrite("sign", func(a map[string]any) { a["value"] = strings.Repeat("A", 683) }), ClassIntegrity, "sign"},
		{"with another key shown", url, rewrite("get", func(a map[string]any) { a["key"].(map[string]any)["n"] = strings.Repeat("_", 342) }), ClassIntegrity, "sign"},
		{"a small exponent", url, rewrite("get", func(a map[string]any) { a["key"].(map[string]any)["e"] = "AQ" }), ClassConfig, "get"},
		{"throttled", url, func() { s.Inject(vaulttest.Fault{Route: "sign", Do: vaulttest.Throttled()}) }, ClassThrottled, "sign"},
	} {
		if tt.break_ != nil {
			tt.break_()
		}
		sig, err := Sign(t.Context(), opts, tt.spec, testVolume, digest)
		if e := wantClass(t, err, tt.class); e.Op != tt.op || sig != nil {
			t.Errorf("%s: op %q, %+v; want op %q and nothing\n%v", tt.name, e.Op, sig, tt.op, err)
		}
		s.ClearFaults()
		s.Permit(clientID, "get", "sign")
		s.SetEnabled(url, true)
		s.SetValidity(url, time.Time{}, time.Time{})
		s.SetOperations(url, "sign")
	}
	if _, err := Sign(t.Context(), opts, url, testVolume, digest); err != nil {
		t.Errorf("the key isn't repaired: %v", err)
	}

	// Through a process.
	c := childWithDouble(t, s, nil)
	s.Permit(s.System(), "get", "sign")
	var seen []string
	sig, err := c.Sign(t.Context(), Options{Observe: func(x Exchange) { seen = append(seen, x.Op) }}, url, testVolume, digest)
	if err != nil || strings.Join(seen, " ") != "get sign" {
		t.Fatalf("%v, observed %q", err, seen)
	}
	public, err := x509.ParsePKIXPublicKey(sig.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := rsa.VerifyPSS(public.(*rsa.PublicKey), crypto.SHA256, digest[:], sig.Value, nil); err != nil {
		t.Error(err)
	}
}

func TestReadPublicKeys(t *testing.T) {
	dir := t.TempDir()
	encode := func(typ string, key any) string {
		der, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: typ, Bytes: der}))
	}
	small, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	good, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	one := encode("PUBLIC KEY", &good.PublicKey)
	for text, want := range map[string]string{
		one:                                    "",
		"a comment\n\n" + one + "\n" + one:     "",
		"":                                     "has no key",
		"no PEM at all":                        "not a PEM block",
		one + "garbage":                        "not a PEM block",
		encode("PUBLIC KEY", &small.PublicKey): "1024 bits",
		encode("PUBLIC KEY", &ec.PublicKey):    "not RSA",
		strings.ReplaceAll(one, "PUBLIC KEY", "RSA PUBLIC KEY"): "want PUBLIC KEY",
		one + strings.Replace(one, "MII", "AAA", 1):             "asn1",
	} {
		file := filepath.Join(dir, "keys.pem")
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		keys, err := ReadPublicKeys(file)
		if want == "" {
			if err != nil || len(keys) == 0 {
				t.Errorf("%.60q: %v, %v", text, keys, err)
			}
		} else if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: %v, want %q", text, err, want)
		}
	}
	file := filepath.Join(dir, "loose.pem")
	if err := os.WriteFile(file, []byte(one), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o664); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadPublicKeys(file); err == nil || !strings.Contains(err.Error(), "others may write it") {
		t.Errorf("a file that the group may write: %v", err)
	}
}
