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
// nothing can reach them to wipe them. It fills dek, or leaves it alone and
// returns an error of this package's kinds.
type Deriver func(ctx context.Context, header []byte, volumeKey *[VolumeKeySize]byte, dek *[DEKSize]byte) error

// DeriveDEK authenticates an encoded header with the volume key and unwraps the
// DEK of its segment. It's for the process that a [Deriver] starts.
func DeriveDEK(header []byte, volumeKey *[VolumeKeySize]byte, dek *[DEKSize]byte) error {
	h, err := luks2.Decode(header, 0)
	if err != nil {
		return err
	}
	return openDEK(h, volumeKey, dek)
}

// derive is openDEK, by way of elsewhere if that isn't nil.
func derive(ctx context.Context, h *luks2.Header, k *keys, elsewhere Deriver) error {
	if elsewhere == nil {
		return openDEK(h, k.volumeKey, k.dek)
	}
	header, err := h.Encode(0)
	if err != nil {
		return err
	}
	if err := elsewhere(ctx, header, k.volumeKey, k.dek); err != nil {
		return err
	}
	if bytes.Equal(k.dek[:32], k.dek[32:]) { // in secret memory: nothing is copied
		return ErrAuth
	}
	return nil
}
