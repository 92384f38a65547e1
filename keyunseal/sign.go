package keyunseal

import (
	"cmp"
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
)

// AlgorithmPS256 is the one by which [Sign] lets a key sign: RSASSA-PSS with
// SHA-256 (RFC 7518, 3.5).
const AlgorithmPS256 = "PS256"

// A Signature was made by a key in a vault.
type Signature struct {
	KeyID     string `json:"kid"` // with version
	Algorithm string `json:"alg"`
	Value     []byte `json:"value"`
	PublicKey []byte `json:"public_key"` // of that version: a SubjectPublicKeyInfo in DER
}

// Sign lets an RSA key in a vault sign a digest, and checks what it gets with the
// public key that the vault shows. Spec is the key's URL, volume the UUID of the
// volume that it's about. It takes the permissions get and sign.
func Sign(ctx context.Context, opts Options, spec, volume string, digest [sha256.Size]byte) (*Signature, error) {
	volume, err := canonicalUUID(volume)
	if err != nil {
		return nil, fail("sign", "", ClassConfig, err)
	}
	id, err := parseKeySpec("sign", spec)
	if err != nil {
		return nil, err
	}
	v, err := newVault(opts, id, cmp.Or(opts.Identity, identityManaged), "", volume)
	if err != nil {
		return nil, err
	}
	info, err := v.get(ctx, id)
	if err != nil {
		return nil, err
	}
	id = info.id
	public, err := info.signs()
	if err != nil {
		return nil, err
	}
	var resp azkeys.SignResponse
	err = v.call("sign", id, func() (err error) {
		alg := azkeys.SignatureAlgorithmPS256
		resp, err = v.client.Sign(ctx, id.name, id.version, azkeys.SignParameters{Algorithm: &alg, Value: digest[:]}, nil)
		if err != nil {
			return err
		}
		if _, err := answered(id, resp.KeyOperationResult); err != nil {
			return err
		}
		if rsa.VerifyPSS(public, crypto.SHA256, digest[:], resp.Result, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}) != nil {
			return &Error{Class: ClassIntegrity, Err: errors.New("the signature in the answer isn't one by this key")}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, fail("sign", id.String(), ClassInternal, err)
	}
	return &Signature{KeyID: id.String(), Algorithm: AlgorithmPS256, Value: resp.Result, PublicKey: der}, nil
}

// signs returns the public part of a key that may sign.
func (k *keyInfo) signs() (*rsa.PublicKey, error) {
	switch {
	case !k.enabled:
		return nil, &Error{Op: "get", KeyID: k.id.String(), Class: ClassKeyUnusable, Code: "KeyDisabled", Err: errors.New("the key is disabled")}
	case k.kind != string(azkeys.KeyTypeRSA) && k.kind != string(azkeys.KeyTypeRSAHSM):
		return nil, fail("get", k.id.String(), ClassConfig, fmt.Errorf("is a key of type %.20q; to sign it has to be RSA or RSA-HSM", k.kind))
	case !slices.Contains(k.operations, "sign"):
		return nil, fail("get", k.id.String(), ClassConfig, errors.New("doesn't permit the operation sign"))
	}
	public := &rsa.PublicKey{N: new(big.Int).SetBytes(k.modulus), E: int(new(big.Int).SetBytes(k.exponent).Int64())}
	if err := checkPublicKey(public); err != nil {
		return nil, fail("get", k.id.String(), ClassConfig, err)
	}
	return public, nil
}

func checkPublicKey(k *rsa.PublicKey) error {
	if n := k.N.BitLen(); n < 8*minRSABytes || n > 8*maxRSABytes {
		return fmt.Errorf("is an RSA key of %d bits, want %d to %d", n, 8*minRSABytes, 8*maxRSABytes)
	}
	if k.E < 3 || k.E > 1<<31-1 || k.E%2 == 0 {
		return fmt.Errorf("is an RSA key with the exponent %d", k.E)
	}
	return nil
}

// ReadPublicKeys reads a file of RSA public keys, each a PEM block PUBLIC KEY.
// Who can write it decides which volumes are trusted, so it has to be a regular
// file that nobody but root or the user of this process can write.
func ReadPublicKeys(path string) ([]*rsa.PublicKey, error) {
	b, err := readTrusted(path, 1<<20)
	if err != nil {
		return nil, err
	}
	var keys []*rsa.PublicKey
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			break
		}
		b = rest
		if block.Type != "PUBLIC KEY" {
			return nil, fmt.Errorf("%s has a PEM block %.40q, want PUBLIC KEY", path, block.Type)
		}
		any, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		key, ok := any.(*rsa.PublicKey)
		if !ok {
			return nil, fmt.Errorf("%s has a key that is not RSA", path)
		}
		if err := checkPublicKey(key); err != nil {
			return nil, fmt.Errorf("%s: a key %w", path, err)
		}
		keys = append(keys, key)
	}
	if len(strings.TrimSpace(string(b))) > 0 {
		return nil, fmt.Errorf("%s has something that is not a PEM block", path)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s has no key", path)
	}
	return keys, nil
}

// EncodePublicKey writes a key the way ReadPublicKeys reads it.
func (s *Signature) EncodePublicKey() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: s.PublicKey})
}
