package sector

import (
	"context"
	"crypto"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"

	"hostcryptd/sector/luks2"
)

// A pin tells a forged header from the one that this host has seen; a host that
// sees a volume for the first time has none. A signature tells there too: it says
// that a volume key was made by one who may sign with a certain key, such as a
// vault's, and a host is given the public part of that key. Who has only the
// public part of the KEK, as everybody has, can't make one. It's made once, for
// the volume key and not for what is in the header: that an older header was put
// back only a pin tells.

// A Signature is by an RSA key over [SignatureDigest]. It stands in the header.
type Signature struct {
	KeyID     string `json:"kid"`   // whose it is, for people
	Algorithm string `json:"alg"`   // AlgorithmPS256
	Value     string `json:"value"` // base64
}

// AlgorithmPS256 is RSASSA-PSS with SHA-256, MGF1 with SHA-256, and a salt of 32
// bytes (RFC 7518, 3.5): the only one.
const AlgorithmPS256 = "PS256"

// A Signer signs a digest of [SignatureDigest] for the volume with a UUID.
type Signer func(ctx context.Context, volume string, digest [sha256.Size]byte) (*Signature, error)

// A TrustedKey is the public part of a key whose signatures are believed.
type TrustedKey = *rsa.PublicKey

// SignatureDigest is what is signed of a volume: its UUID and the fingerprint of
// its volume key.
func SignatureDigest(uuid, fingerprint string) [sha256.Size]byte {
	return sha256.Sum256(fields("hostcryptd v1 signature", uuid, fingerprint))
}

// verify tells whether one of the keys has made the signature.
func (s *Signature) verify(uuid, fingerprint string, keys []TrustedKey) error {
	if s.Algorithm != AlgorithmPS256 {
		return fmt.Errorf("its algorithm is %.20q, only %s is accepted", s.Algorithm, AlgorithmPS256)
	}
	value, err := base64.StdEncoding.DecodeString(s.Value)
	if err != nil {
		return err
	}
	digest := SignatureDigest(uuid, fingerprint)
	for _, key := range keys {
		if err = rsa.VerifyPSS(key, crypto.SHA256, digest[:], value, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash}); err == nil {
			return nil
		}
	}
	return errors.New("it was made for another volume key, or by none of the keys that are trusted")
}

// checkSignature tells whether the header is signed, if it has to be.
func (o *OpenOptions) checkSignature(volume string, got opened) error {
	if o.Trusted == nil {
		return nil
	}
	if got.signature == nil {
		return fmt.Errorf("%w: the header of volume %s has no signature, and this host asks for one; if it's the right one, 'hostcryptd header sign' makes it", ErrAuth, volume)
	}
	if err := got.signature.verify(volume, got.fingerprint, o.Trusted); err != nil {
		return fmt.Errorf("%w: the signature of volume %s, by %.200s: %w; if the volume is the right one, 'hostcryptd header sign' makes a new one", ErrAuth, volume, got.signature.KeyID, err)
	}
	return nil
}

// SignatureOf returns the signature that a header has, or nil.
func SignatureOf(h *luks2.Header) *Signature {
	_, v, err := findVolumeToken(h)
	if err != nil {
		return nil
	}
	return v.Signature
}

// Sign puts a signature into the header, in place of one that is there. It's
// verified with the keys of o before anything is written.
func Sign(ctx context.Context, b Backing, unseal Unsealer, sign Signer, o OpenOptions) error {
	trusted := o.Trusted
	o.Trusted = nil
	u, err := unlockHeader(ctx, b, unseal, o)
	if err != nil {
		return err
	}
	defer u.keys.free()
	s, err := sign(ctx, u.h.UUID, SignatureDigest(u.h.UUID, u.fingerprint))
	if err != nil {
		return err
	}
	u.o.Trusted, u.signature = trusted, s
	if err := u.o.checkSignature(u.h.UUID, u.opened); err != nil {
		return fmt.Errorf("the new signature is not good, so nothing was changed: %w", err)
	}
	u.resign = true
	_, err = u.update(ctx, func(*luks2.Header, *volumeToken) error { return nil })
	return err
}
