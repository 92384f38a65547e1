package vaulttest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

// A jwt is a JSON web token in its compact form (RFC 7515), taken apart. Nothing of
// it is to be believed before verify.
type jwt struct {
	signed         string // what the signature is of
	header, claims []byte // JSON
	signature      []byte
}

func parseJWT(s string) (*jwt, error) {
	parts := strings.Split(s, ".")
	if len(parts) != 3 {
		return nil, errors.New("not a JWT")
	}
	t := &jwt{signed: parts[0] + "." + parts[1]}
	for i, out := range []*[]byte{&t.header, &t.claims, &t.signature} {
		b, err := unb64(parts[i])
		if err != nil {
			return nil, err
		}
		*out = b
	}
	return t, nil
}

func (t *jwt) verify(alg string, key *rsa.PublicKey) error {
	digest := sha256.Sum256([]byte(t.signed))
	switch alg {
	case "RS256":
		return rsa.VerifyPKCS1v15(key, crypto.SHA256, digest[:], t.signature)
	case "PS256":
		return rsa.VerifyPSS(key, crypto.SHA256, digest[:], t.signature, nil)
	}
	return fmt.Errorf("algorithm %q", alg)
}

// signJWT makes a token with RS256.
func signJWT(key *rsa.PrivateKey, kid string, claims any) (string, error) {
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	signed := b64([]byte(`{"typ":"JWT","alg":"RS256","kid":"`+kid+`"}`)) + "." + b64(payload)
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	return signed + "." + b64(sig), err
}
