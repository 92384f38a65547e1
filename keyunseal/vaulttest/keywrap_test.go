package vaulttest

import (
	"bytes"
	"encoding/hex"
	"testing"
)

// TestKeyWrap uses the vector of RFC 3394 section 4.6, 256 bits under 256 bits.
func TestKeyWrap(t *testing.T) {
	kek, _ := hex.DecodeString("000102030405060708090A0B0C0D0E0F101112131415161718191A1B1C1D1E1F")
	plain, _ := hex.DecodeString("00112233445566778899AABBCCDDEEFF000102030405060708090A0B0C0D0E0F")
	want, _ := hex.DecodeString("28C9F404C4B810F4CBCCB35CFB87F8263F5786E2D80ED326CBC7F0E71A99F43BFB988B9B7A02DD21")
	got, err := aesWrap(kek, plain)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("aesWrap = %x, %v; want %x", got, err, want)
	}
	back, err := aesUnwrap(kek, got)
	if err != nil || !bytes.Equal(back, plain) {
		t.Errorf("aesUnwrap = %x, %v", back, err)
	}
	for i := range got {
		bad := bytes.Clone(got)
		bad[i] ^= 1
		if _, err := aesUnwrap(kek, bad); err == nil {
			t.Errorf("byte %d changed, and it unwraps", i)
		}
	}
}
