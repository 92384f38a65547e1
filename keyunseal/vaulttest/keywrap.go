package vaulttest

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"errors"
)

// AES key wrap, RFC 3394 section 2.2, in the index-based form, and with padding,
// RFC 5649.

const (
	keyWrapIV  = 0xa6a6a6a6a6a6a6a6
	keyWrapPad = 0xa65959a6 // the upper half of the initial value; the lower is the length
)

func aesWrap(kek, plain []byte) ([]byte, error) {
	if len(plain) < 16 || len(plain)%8 != 0 {
		return nil, errors.New("the value has to be a multiple of 8 bytes, at least 16")
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	return wrapBlocks(block, keyWrapIV, plain), nil
}

func aesUnwrap(kek, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 24 || len(wrapped)%8 != 0 {
		return nil, errors.New("the value has to be a multiple of 8 bytes, at least 24")
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	iv, plain := unwrapBlocks(block, wrapped)
	if iv != keyWrapIV {
		return nil, errNotAuthentic
	}
	return plain, nil
}

var errNotAuthentic = errors.New("the value doesn't authenticate")

func aesWrapPad(kek, plain []byte) ([]byte, error) {
	if len(plain) == 0 || len(plain) > 4096 {
		return nil, errors.New("the value has to have 1 to 4096 bytes")
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	iv := keyWrapPad<<32 | uint64(len(plain))
	padded := append([]byte(nil), plain...)
	for len(padded)%8 != 0 {
		padded = append(padded, 0)
	}
	if len(padded) == 8 { // one block, without the rounds
		out := binary.BigEndian.AppendUint64(nil, iv)
		out = append(out, padded...)
		block.Encrypt(out, out)
		return out, nil
	}
	return wrapBlocks(block, iv, padded), nil
}

func aesUnwrapPad(kek, wrapped []byte) ([]byte, error) {
	if len(wrapped) < 16 || len(wrapped)%8 != 0 {
		return nil, errors.New("the value has to be a multiple of 8 bytes, at least 16")
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, err
	}
	var iv uint64
	var plain []byte
	if len(wrapped) == 16 {
		out := make([]byte, 16)
		block.Decrypt(out, wrapped)
		iv, plain = binary.BigEndian.Uint64(out), out[8:]
	} else {
		iv, plain = unwrapBlocks(block, wrapped)
	}
	n := int(uint32(iv))
	if iv>>32 != keyWrapPad || n > len(plain) || n <= len(plain)-8 {
		return nil, errNotAuthentic
	}
	for _, b := range plain[n:] {
		if b != 0 {
			return nil, errNotAuthentic
		}
	}
	return plain[:n], nil
}

func wrapBlocks(block cipher.Block, iv uint64, plain []byte) []byte {
	n := len(plain) / 8
	out := make([]byte, 8+len(plain))
	copy(out[8:], plain)
	a := iv
	var b [16]byte
	for j := range 6 {
		for i := 1; i <= n; i++ {
			binary.BigEndian.PutUint64(b[:8], a)
			copy(b[8:], out[8*i:8*i+8])
			block.Encrypt(b[:], b[:])
			a = binary.BigEndian.Uint64(b[:8]) ^ uint64(n*j+i)
			copy(out[8*i:], b[8:])
		}
	}
	binary.BigEndian.PutUint64(out, a)
	return out
}

func unwrapBlocks(block cipher.Block, wrapped []byte) (iv uint64, plain []byte) {
	n := len(wrapped)/8 - 1
	a := binary.BigEndian.Uint64(wrapped)
	out := append([]byte(nil), wrapped...)
	var b [16]byte
	for j := 5; j >= 0; j-- {
		for i := n; i >= 1; i-- {
			binary.BigEndian.PutUint64(b[:8], a^uint64(n*j+i))
			copy(b[8:], out[8*i:8*i+8])
			block.Decrypt(b[:], b[:])
			a = binary.BigEndian.Uint64(b[:8])
			copy(out[8*i:], b[8:])
		}
	}
	return a, out[8:]
}
