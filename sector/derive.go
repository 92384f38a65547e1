package sector

import (
	"bytes"
	"context"

	"hostcryptd/sector/luks2"
)

// DEKSize is the size of a DEK in bytes: two keys of AES-256.
const DEKSize = dekSize

// A Deriver does what [DeriveDEK] does, in another process: authenticating a
// header and unwrapping its DEK leaves copies of both keys on the Go heap, where
// nothing can reach them to wipe them. It fills dek and returns the fingerprint
// of the volume key, which is no secret, or leaves dek alone and returns an error
// of this package's kinds.
type Deriver func(ctx context.Context, header []byte, volumeKey *[VolumeKeySize]byte, dek *[DEKSize]byte) (fingerprint string, err error)

// DeriveDEK authenticates an encoded header with the volume key and unwraps the
// DEK of its segment. It's for the process that a [Deriver] starts.
func DeriveDEK(header []byte, volumeKey *[VolumeKeySize]byte, dek *[DEKSize]byte) (fingerprint string, err error) {
	h, err := luks2.Decode(header, 0)
	if err != nil {
		return "", err
	}
	return deriveHere(h, volumeKey, dek)
}

func deriveHere(h *luks2.Header, volumeKey *[VolumeKeySize]byte, dek *[DEKSize]byte) (string, error) {
	if err := openDEK(h, volumeKey, dek); err != nil {
		return "", err
	}
	return fingerprint(volumeKey, h.UUID), nil
}

// derive is deriveHere, by way of elsewhere if that isn't nil.
func derive(ctx context.Context, h *luks2.Header, k *keys, elsewhere Deriver) (string, error) {
	if elsewhere == nil {
		return deriveHere(h, k.volumeKey, k.dek)
	}
	header, err := h.Encode(0)
	if err != nil {
		return "", err
	}
	name, err := elsewhere(ctx, header, k.volumeKey, k.dek)
	if err != nil {
		return "", err
	}
	if bytes.Equal(k.dek[:32], k.dek[32:]) { // in secret memory: nothing is copied
		return "", ErrAuth
	}
	return name, nil
}
