package keyunseal

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// An example of FORMAT.md, parsed out of it.
type example struct {
	typ               string
	secret, volumeKey [KeySize]byte
	volume            string
	token             json.RawMessage
}

var examplePattern = regexp.MustCompile("(?s)Example: [^`]*`([0-9a-f]{64})`,[a-z\\s]*?,?\\s*volume `([0-9a-f-]{36})`,\\s*volume key `([0-9a-f]{64})`.*?```json\n(.*?)```")

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
		e.typ = head.Type
		name := head.Type
		if name == TypeKeyVault && bytes.Contains(e.token, []byte(algorithmAES)) {
			name = exampleHSM
		}
		found[name] = e
	}
	if len(found) != 4 {
		t.Fatalf("FORMAT.md has %d examples, want one of each type and one of a managed HSM", len(found))
	}
	return found
}

// exampleHSM is the example of a token for a managed HSM.
const exampleHSM = TypeKeyVault + " " + algorithmAES

// formatSection returns the code of the one fenced block of a language in
// FORMAT.md.
func formatSection(t testing.TB, language string) string {
	t.Helper()
	doc, err := os.ReadFile("FORMAT.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(doc), "```"+language+"\n")
	code, _, ok2 := strings.Cut(rest, "```")
	if !ok || !ok2 {
		t.Fatalf("FORMAT.md has no block of %s", language)
	}
	return code
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
	for name, e := range examples(t) {
		typ := e.typ
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
		case *tpmToken:
			if hash := sha256.Sum256(e.secret[:]); !bytes.Equal(tok.SecretHash, hash[:]) {
				t.Errorf("%s: the secret's hash is %x", name, tok.SecretHash)
			}
			if err := checkTPMExample(tok); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			err = tok.open(&e.secret, typ, e.volume, &got)
		case *vaultToken:
			canary := make([]byte, KeySize)
			for i := range canary {
				canary[i] = 0xc0 + byte(i)
			}
			if hash := sha256.Sum256(canary); !bytes.Equal(tok.CanaryHash, hash[:]) {
				t.Errorf("%s: the canary's hash is %x", name, tok.CanaryHash)
			}
			if name == exampleHSM {
				kek := make([]byte, 32)
				for i := range kek {
					kek[i] = 0xe0 + byte(i)
				}
				if !bytes.Equal(keyUnwrap(t, kek, tok.Wrapped), e.secret[:]) || !bytes.Equal(keyUnwrap(t, kek, tok.Canary), canary) {
					t.Errorf("%s: the AES key unwraps something else", name)
				}
			}
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

// keyUnwrap is the unwrapping of RFC 3394, section 2.2.2.
func keyUnwrap(t testing.TB, kek, wrapped []byte) []byte {
	t.Helper()
	block, err := aes.NewCipher(kek)
	if err != nil {
		t.Fatal(err)
	}
	n := len(wrapped)/8 - 1
	a, r := bytes.Clone(wrapped[:8]), bytes.Clone(wrapped[8:])
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			binary.BigEndian.PutUint64(a, binary.BigEndian.Uint64(a)^uint64(n*j+i))
			b := append(bytes.Clone(a), r[8*i-8:8*i]...)
			block.Decrypt(b, b)
			copy(a, b[:8])
			copy(r[8*i-8:], b[8:])
		}
	}
	if !bytes.Equal(a, bytes.Repeat([]byte{0xa6}, 8)) {
		t.Error("the wrapped key doesn't authenticate")
	}
	return r
}

// checkTPMExample checks what can be checked without the TPM: what kind of object
// it sealed, and under which policy.
func checkTPMExample(t *tpmToken) error {
	public, err := tpm2.Unmarshal[tpm2.TPM2BPublic](t.Public)
	if err != nil {
		return err
	}
	p, err := public.Contents()
	if err != nil {
		return err
	}
	want := tpm2.TPMAObject{FixedTPM: true, FixedParent: true, NoDA: true, AdminWithPolicy: true}
	if p.Type != tpm2.TPMAlgKeyedHash || p.NameAlg != tpm2.TPMAlgSHA256 || p.ObjectAttributes != want {
		return fmt.Errorf("the object is %v, %v, %+v", p.Type, p.NameAlg, p.ObjectAttributes)
	}
	// TPM2_PolicyPCR as part 3 of the specification, 23.7, has it.
	selection := []byte{0, 0, 0, 1, 0x00, 0x0b, 3, 0, 0, 0}
	for _, n := range t.PCRs {
		selection[7+n/8] |= 1 << (n % 8)
	}
	values := sha256.Sum256(bytes.Join(t.PCRValues, nil))
	policy := sha256.Sum256(slices.Concat(make([]byte, 32), []byte{0, 0, 0x01, 0x7f}, selection, values[:]))
	if !bytes.Equal(p.AuthPolicy.Buffer, policy[:]) {
		return fmt.Errorf("the policy is %x, want %x", p.AuthPolicy.Buffer, policy)
	}
	return nil
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
		{"kid without a host", TypeKeyVault, set("kid", "https:///keys/kek/"+version32), ClassIntegrity, "domain of Key Vault"},
		{"kid at an address", TypeKeyVault, set("kid", "https://127.0.0.1/keys/kek/"+version32), ClassIntegrity, "domain of Key Vault"},
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
		{"AES, a byte short", exampleHSM, set("canary", make([]byte, 39)), ClassIntegrity, "want 40 to 40"},
		{"no PCRs", TypeTPM, set("pcrs", []int{}), ClassIntegrity, "no PCRs"},
		{"PCR twice", TypeTPM, set("pcrs", []int{7, 7}), ClassIntegrity, "ascending"},
		{"PCR too high", TypeTPM, set("pcrs", []int{24}), ClassIntegrity, "no PCR 24"},
		{"PCR that any program resets", TypeTPM, set("pcrs", []int{16}), ClassIntegrity, "PCR 16"},
		{"PCR value missing", TypeTPM, set("pcr_values", []string{}), ClassIntegrity, "pcr_values"},
		{"PCR value short", TypeTPM, set("pcr_values", []string{"AAAA"}), ClassIntegrity, "pcr_values"},
		{"SRK name short", TypeTPM, set("srk_name", []byte{0, 11}), ClassIntegrity, "srk_name"},
		{"SRK name of SHA-1", TypeTPM, set("srk_name", append([]byte{0, 4}, make([]byte, 32)...)), ClassIntegrity, "srk_name"},
		{"public cut off", TypeTPM, set("public", []byte{0, 9, 1}), ClassIntegrity, "public"},
		{"private empty", TypeTPM, set("private", []byte{0, 0}), ClassIntegrity, "private"},
		{"secret's hash missing", TypeTPM, func(m map[string]any) { delete(m, "secret_sha256") }, ClassIntegrity, "secret_sha256"},
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
		token = mustSeal(t, opts, SpecHostKey, key)
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
	for id, token := range []json.RawMessage{mustSeal(t, opts, SpecHostKey, key), ex[TypeKeyVault].token, ex[exampleHSM].token, ex[TypeTPM].token} {
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
	opts := Options{HostKey: filepath.Join(f.TempDir(), "no such file"), TPM: "/no such TPM"}
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
		if d.Type != TypeKeyVault {
			var dst [KeySize]byte
			if Unseal(t.Context(), opts, raw, testVolume, &dst) == nil {
				t.Error("a token opens without a host key or a TPM")
			}
		}
	})
}
