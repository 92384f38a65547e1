package keyunseal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// An example of FORMAT.md, parsed out of it.
type example struct {
	secret, volumeKey [KeySize]byte
	volume            string
	token             json.RawMessage
}

var examplePattern = regexp.MustCompile("(?s)Example: [^`]*`([0-9a-f]{64})`,\\s*volume `([0-9a-f-]{36})`,\\s*volume key `([0-9a-f]{64})`.*?```json\n(.*?)```")

func examples(t testing.TB) map[string]example {
	t.Helper()
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]example)
	for _, m := range examplePattern.FindAllSubmatch(doc, -1) {
		var e example
		hex.Decode(e.secret[:], m[1])
		hex.Decode(e.volumeKey[:], m[3])
		e.volume, e.token = string(m[2]), m[4]
		var head tokenHead
		if err := json.Unmarshal(e.token, &head); err != nil {
			t.Fatalf("example in FORMAT.md: %v", err)
		}
		found[head.Type] = e
	}
	if len(found) != 2 {
		t.Fatalf("FORMAT.md has %d examples, want one of each type", len(found))
	}
	return found
}

// specOpen opens a token by the letter of FORMAT.md, with an HKDF of its own.
func specOpen(t testing.TB, e example) []byte {
	t.Helper()
	var token map[string]any
	if err := json.Unmarshal(e.token, &token); err != nil {
		t.Fatal(err)
	}
	binary := func(name string) []byte {
		var b []byte
		quoted, _ := json.Marshal(token[name])
		if err := json.Unmarshal(quoted, &b); err != nil {
			t.Fatal(err)
		}
		return b
	}
	mac := func(key, data []byte) []byte {
		h := hmac.New(sha256.New, key)
		h.Write(data)
		return h.Sum(nil)
	}
	typ := token["type"].(string)
	prk := mac(binary("salt"), e.secret[:])
	key := mac(prk, []byte("hostcryptd token v1 "+typ+"\x01")) // one block of HKDF-Expand is 32 bytes
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	sealed := binary("sealed")
	got, err := gcm.Open(nil, sealed[:12], sealed[12:], []byte("hostcryptd token v1\x00"+typ+"\x00"+e.volume))
	if err != nil {
		t.Fatalf("example %s: %v", typ, err)
	}
	return got
}

func TestFormatExamples(t *testing.T) {
	for typ, e := range examples(t) {
		if got := specOpen(t, e); !bytes.Equal(got, e.volumeKey[:]) {
			t.Errorf("%s: the example opens to %x", typ, got)
		}
		decoded, err := decodeToken(e.token)
		if err != nil {
			t.Errorf("%s: %v", typ, err)
			continue
		}
		var got [KeySize]byte
		switch tok := decoded.(type) {
		case *hostKeyToken:
			opts := Options{HostKey: filepath.Join(t.TempDir(), "host.key")}
			if err := os.WriteFile(opts.HostKey, e.secret[:], 0o600); err != nil {
				t.Fatal(err)
			}
			err = Unseal(t.Context(), opts, e.token, e.volume, &got)
		case *vaultToken:
			err = tok.open(&e.secret, typ, e.volume, &got)
		}
		if err != nil || got != e.volumeKey {
			t.Errorf("%s: the program opens the example to %x, %v", typ, got, err)
		}

		// What the program seals is what the document describes.
		again := e
		env, err := sealEnvelope(&e.secret, typ, e.volume, &e.volumeKey)
		if err != nil {
			t.Fatal(err)
		}
		again.token = edit(t, e.token, func(m map[string]any) { m["salt"], m["sealed"] = env.Salt, env.Sealed })
		if got := specOpen(t, again); !bytes.Equal(got, e.volumeKey[:]) {
			t.Errorf("%s: what the program seals opens to %x", typ, got)
		}
	}
}

// edit changes members of a JSON object; nil removes one.
func edit(t testing.TB, raw json.RawMessage, f func(map[string]any)) json.RawMessage {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal(raw, &m); err != nil {
		t.Fatal(err)
	}
	f(m)
	b, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDecodeToken(t *testing.T) {
	ex := examples(t)
	set := func(name string, v any) func(map[string]any) { return func(m map[string]any) { m[name] = v } }
	for _, tt := range []struct {
		name  string
		typ   string
		edit  func(map[string]any)
		class Class // ClassInternal stands for success
		text  string
	}{
		{"unchanged", TypeKeyVault, func(map[string]any) {}, ClassInternal, ""},
		{"unknown member", TypeKeyVault, set("added_by", map[string]any{"x": 1}), ClassInternal, ""},
		{"no tenant", TypeKeyVault, func(m map[string]any) { delete(m, "tenant") }, ClassInternal, ""},
		{"keyslots", TypeKeyVault, set("keyslots", []string{"0"}), ClassInternal, ""},
		{"newer version", TypeKeyVault, set("version", 2), ClassConfig, "a newer hostcryptd"},
		{"no version", TypeHostKey, func(m map[string]any) { delete(m, "version") }, ClassConfig, "version 0"},
		{"version as string", TypeHostKey, set("version", "1"), ClassIntegrity, ""},
		{"foreign type", TypeHostKey, set("type", "systemd-tpm2"), ClassConfig, "systemd-tpm2"},
		{"no type", TypeHostKey, func(m map[string]any) { delete(m, "type") }, ClassConfig, ""},
		{"kid without version", TypeKeyVault, set("kid", "https://example.vault.azure.net/keys/kek"), ClassIntegrity, "no version"},
		{"kid elsewhere", TypeKeyVault, set("kid", "https://example.com/keys/kek/"+version32), ClassIntegrity, "domain of Key Vault"},
		{"RSA1_5", TypeKeyVault, set("alg", "RSA1_5"), ClassIntegrity, "RSA1_5"},
		{"RSA-OAEP", TypeKeyVault, set("alg", "RSA-OAEP"), ClassIntegrity, "RSA-OAEP"},
		{"identity", TypeKeyVault, set("identity", "environment"), ClassIntegrity, "environment"},
		{"no identity", TypeKeyVault, set("identity", ""), ClassIntegrity, "identity"},
		{"tenant", TypeKeyVault, set("tenant", "common"), ClassIntegrity, "tenant"},
		{"wrapped short", TypeKeyVault, set("wrapped", make([]byte, 255)), ClassIntegrity, "wrapped"},
		{"wrapped long", TypeKeyVault, set("wrapped", make([]byte, 513)), ClassIntegrity, "wrapped"},
		{"wrapped not base64", TypeKeyVault, set("wrapped", "!"), ClassIntegrity, ""},
		{"wrapped as by AES", TypeKeyVault, set("wrapped", make([]byte, 40)), ClassIntegrity, "wrapped"},
		{"AES, wrapped as by RSA", TypeKeyVault, set("alg", "A256KW"), ClassIntegrity, "want 40 to 40"},
		{"A128KW", TypeKeyVault, set("alg", "A128KW"), ClassIntegrity, "A128KW"},
		{"no canary", TypeKeyVault, func(m map[string]any) { delete(m, "canary") }, ClassIntegrity, "canary"},
		{"canary's hash short", TypeKeyVault, set("canary_sha256", make([]byte, 31)), ClassIntegrity, "canary_sha256"},
		{"salt short", TypeHostKey, set("salt", make([]byte, 31)), ClassIntegrity, "salt"},
		{"sealed short", TypeHostKey, set("sealed", make([]byte, 59)), ClassIntegrity, "sealed"},
		{"sealed long", TypeHostKey, set("sealed", make([]byte, 61)), ClassIntegrity, "sealed"},
		{"id short", TypeHostKey, set("host_key_id", "00"), ClassIntegrity, "host_key_id"},
		{"id not hex", TypeHostKey, set("host_key_id", "zzzzzzzzzzzzzzzz"), ClassIntegrity, "host_key_id"},
		{"too long", TypeHostKey, set("x", strings.Repeat("x", maxToken)), ClassIntegrity, "65"},
	} {
		_, err := decodeToken(edit(t, ex[tt.typ].token, tt.edit))
		if tt.class == ClassInternal {
			if err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			continue
		}
		wantClass(t, err, tt.class)
		if !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: message %q, want %q in it", tt.name, err, tt.text)
		}
		if foreign := strings.Contains(tt.name, "type"); errors.Is(err, ErrNotOurs) != foreign {
			t.Errorf("%s: ErrNotOurs is %v", tt.name, !foreign)
		}
	}
	for _, raw := range []string{"", "{", "null", "[]", `"x"`, "{} {}", "\x00"} {
		_, err := decodeToken(json.RawMessage(raw))
		if err == nil {
			t.Errorf("decodeToken(%q) succeeds", raw)
		}
	}
}

// cryptsetup writes JSON of its own: escaped slashes, other order and spaces.
func TestTokenReformatted(t *testing.T) {
	opts := Options{HostKey: filepath.Join(t.TempDir(), "host.key")}
	key := randomKey(t)
	var token json.RawMessage
	for !bytes.Contains(token, []byte("/")) {
		token = mustSeal(t, opts, SpecPlatform, key)
	}
	token = edit(t, token, func(map[string]any) {}) // sorts the members
	var indented bytes.Buffer
	if err := json.Indent(&indented, bytes.ReplaceAll(token, []byte("/"), []byte(`\/`)), "  ", "  "); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, opts, indented.Bytes(), key)
}

// What cryptsetup takes into a header and gives back is still the token.
func TestTokenThroughCryptsetup(t *testing.T) {
	cryptsetup, err := exec.LookPath("cryptsetup")
	if err != nil {
		t.Fatalf("%v: install the Debian package cryptsetup-bin (make deps)", err)
	}
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 20<<20); err != nil {
		t.Fatal(err)
	}
	run := func(stdin []byte, args ...string) []byte {
		t.Helper()
		cmd := exec.Command(cryptsetup, args...)
		cmd.Stdin = bytes.NewReader(stdin)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("cryptsetup %s: %v: %s", strings.Join(args, " "), err, stderr.Bytes())
		}
		return out
	}
	run([]byte("passphrase"), "luksFormat", "--batch-mode", "--type", "luks2", "--uuid", testVolume,
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "--key-file", "-", image)

	opts := Options{HostKey: filepath.Join(dir, "host.key")}
	key := randomKey(t)
	ex := examples(t)
	for id, token := range []json.RawMessage{mustSeal(t, opts, SpecPlatform, key), ex[TypeKeyVault].token} {
		slot := fmt.Sprint(id)
		run(token, "token", "import", "--token-id", slot, "--json-file", "-", image)
		back := run(nil, "token", "export", "--token-id", slot, image)
		want, err := Describe(token)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := Describe(back); err != nil || got != want {
			t.Errorf("came back as %+v, %v; want %+v\n%s", got, err, want, back)
		}
		if want.Type == TypeHostKey {
			wantOpens(t, opts, back, key)
		}
	}
}

// Every bit of the sealed part matters, and so do type and volume.
func TestEnvelopeAuthenticates(t *testing.T) {
	secret, key := randomKey(t), randomKey(t)
	e, err := sealEnvelope(secret, TypeHostKey, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	var got [KeySize]byte
	if err := e.open(secret, TypeHostKey, testVolume, &got); err != nil || got != *key {
		t.Fatalf("open: %v", err)
	}
	refused := func(what string, e envelope, secret *[KeySize]byte, typ, volume string) {
		t.Helper()
		dst, before := [KeySize]byte{3}, [KeySize]byte{3}
		if err := e.open(secret, typ, volume, &dst); !errors.Is(err, errEnvelope) || dst != before {
			t.Errorf("%s: error %v, dst changed %v", what, err, dst != before)
		}
	}
	for i := range 8 * sealedSize {
		bad := envelope{Salt: e.Salt, Sealed: bytes.Clone(e.Sealed)}
		bad.Sealed[i/8] ^= 1 << (i % 8)
		refused("sealed", bad, secret, TypeHostKey, testVolume)
	}
	for i := range 8 * saltSize {
		bad := envelope{Salt: bytes.Clone(e.Salt), Sealed: e.Sealed}
		bad.Salt[i/8] ^= 1 << (i % 8)
		refused("salt", bad, secret, TypeHostKey, testVolume)
	}
	refused("secret", e, key, TypeHostKey, testVolume)
	refused("type", e, secret, TypeKeyVault, testVolume)
	refused("volume", e, secret, TypeHostKey, strings.Replace(testVolume, "0", "1", 1))
}

func FuzzToken(f *testing.F) {
	for _, e := range examples(f) {
		f.Add([]byte(e.token))
	}
	f.Add([]byte(`{"type":"hostcryptd-akv","version":1}`))
	f.Add([]byte(`{"type":"luks2-keyring","keyslots":["0"],"key_description":"x"}`))
	opts := Options{HostKey: filepath.Join(f.TempDir(), "no such file")}
	f.Fuzz(func(t *testing.T, raw []byte) {
		d, err := Describe(raw)
		if err != nil {
			if _, ok := errors.AsType[*Error](err); !ok {
				t.Fatalf("Describe: %v is no *Error", err)
			}
			return
		}
		if d.Version != tokenVersion || d.KeyID == "" {
			t.Errorf("Describe(%q) = %+v", raw, d)
		}
		decoded, err := decodeToken(raw)
		if err != nil {
			t.Fatal(err)
		}
		// What was decoded encodes to a token that decodes to the same.
		again, err := json.Marshal(decoded)
		if err != nil {
			t.Fatal(err)
		}
		if d2, err := Describe(again); err != nil || d2 != d {
			t.Errorf("Describe = %+v, and after encoding %+v, %v", d, d2, err)
		}
		if d.Type == TypeHostKey {
			var dst [KeySize]byte
			if Unseal(t.Context(), opts, raw, testVolume, &dst) == nil {
				t.Error("a token opens without a host key")
			}
		}
	})
}
