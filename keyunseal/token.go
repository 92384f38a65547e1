package keyunseal

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
)

const (
	tokenVersion = 1
	maxToken     = 64 << 10 // far above a token for RSA-4096, far below a LUKS2 JSON area

	saltSize   = 32
	sealedSize = 12 + KeySize + 16 // nonce, ciphertext, tag
)

// tokenHead is what every token starts with. LUKS2 asks for type and keyslots;
// the list of keyslots is empty because no keyslot is opened by the token.
type tokenHead struct {
	Type     string   `json:"type"`
	Keyslots []string `json:"keyslots"`
	Version  int      `json:"version"`
}

func newHead(typ string) tokenHead {
	return tokenHead{Type: typ, Keyslots: []string{}, Version: tokenVersion}
}

// A token is decoded: a *hostKeyToken, *tpmToken or *vaultToken.
type token interface {
	// check looks whether the fields have their proper form.
	check() error
	// keyID names the KEK: host key id, TPM id, or the vault key's URL.
	keyID() string
	describe() Description
	unseal(ctx context.Context, opts Options, volume string, dst *[KeySize]byte) error
	probe(ctx context.Context, opts Options, volume string) error
	// rewrap seals key under the newest version of the KEK.
	rewrap(ctx context.Context, opts Options, volume string, key *[KeySize]byte) (token, error)
}

// A hostKeyToken holds a volume key sealed under the host key.
type hostKeyToken struct {
	tokenHead
	HostKeyID string `json:"host_key_id"` // says which host key, without saying the key
	envelope
}

// A vaultToken holds a volume key sealed under a random secret, and that secret
// wrapped by a key in a vault.
type vaultToken struct {
	tokenHead
	KeyID     string `json:"kid"` // with version
	Algorithm string `json:"alg"`
	Tenant    string `json:"tenant,omitempty"`
	Identity  string `json:"identity"`
	Wrapped   []byte `json:"wrapped"`

	// The canary is unwrapped, instead of what opens the volume, to see whether
	// the KEK still may be used.
	Canary     []byte `json:"canary"`
	CanaryHash []byte `json:"canary_sha256"`
	envelope

	id keyURL // KeyID, parsed
}

// parse decodes a token, and returns it with the canonical form of its volume's UUID.
func parse(op string, raw json.RawMessage, volume string) (token, string, error) {
	volume, err := canonicalUUID(volume)
	if err != nil {
		return nil, "", fail(op, "", ClassConfig, err)
	}
	t, err := decodeToken(raw)
	return t, volume, err
}

// decodeToken returns a token whose fields have their proper form. It ignores
// members that it doesn't know: cryptsetup keeps them, and a later version may add
// some that don't change the meaning of the others. A change of meaning changes the
// version.
func decodeToken(raw json.RawMessage) (token, error) {
	if len(raw) > maxToken {
		return nil, fail("token", "", ClassIntegrity, fmt.Errorf("%d bytes, at most %d are allowed", len(raw), maxToken))
	}
	var head tokenHead
	if err := json.Unmarshal(raw, &head); err != nil {
		return nil, fail("token", "", ClassIntegrity, err)
	}
	var t token
	switch head.Type {
	case TypeHostKey:
		t = new(hostKeyToken)
	case TypeTPM:
		t = new(tpmToken)
	case TypeKeyVault:
		t = new(vaultToken)
	default:
		return nil, fail("token", "", ClassConfig, fmt.Errorf("type %.40q: %w", head.Type, ErrNotOurs))
	}
	if head.Version != tokenVersion {
		return nil, fail("token", "", ClassConfig, fmt.Errorf("%s has format version %d, this program knows version %d; a newer hostcryptd may have sealed it",
			head.Type, head.Version, tokenVersion))
	}
	if err := json.Unmarshal(raw, t); err != nil {
		return nil, fail("token", head.Type, ClassIntegrity, err)
	}
	if err := t.check(); err != nil {
		return nil, fail("token", head.Type, ClassIntegrity, err)
	}
	return t, nil
}

func (t *hostKeyToken) check() error {
	if len(t.HostKeyID) != 2*hostKeyIDSize {
		return fmt.Errorf("host_key_id has %d characters, want %d", len(t.HostKeyID), 2*hostKeyIDSize)
	}
	for i := range len(t.HostKeyID) {
		if !isHex(t.HostKeyID[i]) {
			return errors.New("host_key_id is not hexadecimal")
		}
	}
	return t.envelope.check()
}

func (t *vaultToken) check() error {
	var err error
	if t.id, err = parseKeyURL(t.KeyID); err != nil {
		return err
	}
	if t.id.version == "" {
		return errors.New("kid has no version")
	}
	if t.Algorithm != algorithmRSA && t.Algorithm != algorithmAES {
		return fmt.Errorf("alg is %.40q, only %s and %s are accepted", t.Algorithm, algorithmRSA, algorithmAES)
	}
	if _, err := parseIdentity(t.Identity); err != nil {
		return err
	}
	if t.Tenant != "" && !isUUID(t.Tenant) {
		return fmt.Errorf("tenant %.40q is not a UUID", t.Tenant)
	}
	for name, value := range map[string][]byte{"wrapped": t.Wrapped, "canary": t.Canary} {
		if err := checkWrapped(t.Algorithm, value); err != nil {
			return fmt.Errorf("%s %w", name, err)
		}
	}
	if n := len(t.CanaryHash); n != sha256.Size {
		return fmt.Errorf("canary_sha256 has %d bytes, want %d", n, sha256.Size)
	}
	return t.envelope.check()
}

// An envelope is a volume key sealed by AES-256-GCM under a key that HKDF-SHA256
// makes from a secret and the salt. The additional data are the token's type
// and version and the volume's UUID.
type envelope struct {
	Salt   []byte `json:"salt"`
	Sealed []byte `json:"sealed"`
}

func (e *envelope) check() error {
	if len(e.Salt) != saltSize {
		return fmt.Errorf("salt has %d bytes, want %d", len(e.Salt), saltSize)
	}
	if len(e.Sealed) != sealedSize {
		return fmt.Errorf("sealed has %d bytes, want %d", len(e.Sealed), sealedSize)
	}
	return nil
}

func sealEnvelope(secret *[KeySize]byte, typ, volume string, key *[KeySize]byte) (envelope, error) {
	e := envelope{Salt: make([]byte, saltSize)}
	rand.Read(e.Salt) // never fails
	aead, err := envelopeCipher(secret, e.Salt, typ)
	if err != nil {
		return envelope{}, err
	}
	e.Sealed = aead.Seal(nil, nil, key[:], envelopeData(typ, volume))
	return e, nil
}

// errEnvelope is all that can be said: GCM doesn't tell a wrong secret from an
// altered token or from the token of another volume.
var errEnvelope = errors.New("the sealed volume key doesn't authenticate")

// open writes the volume key to dst, or leaves dst alone and returns an error.
func (e *envelope) open(secret *[KeySize]byte, typ, volume string, dst *[KeySize]byte) error {
	aead, err := envelopeCipher(secret, e.Salt, typ)
	if err != nil {
		return err
	}
	var buf [KeySize]byte
	defer clear(buf[:])
	key, err := aead.Open(buf[:0], nil, e.Sealed, envelopeData(typ, volume))
	if err != nil || len(key) != KeySize {
		return errEnvelope
	}
	copy(dst[:], key)
	return nil
}

func envelopeCipher(secret *[KeySize]byte, salt []byte, typ string) (cipher.AEAD, error) {
	key, err := hkdf.Key(sha256.New, secret[:], salt, envelopeInfo(typ), 32)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

func envelopeInfo(typ string) string { return "hostcryptd token v1 " + typ }

func envelopeData(typ, volume string) []byte {
	return []byte("hostcryptd token v1\x00" + typ + "\x00" + volume)
}
