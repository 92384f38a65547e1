package xts

import (
	"bytes"
	"testing"
)

// TestEndOfMemory: a run longer than a call of a kernel, which ends where its
// memory ends, leaves no pointer beyond it. The checks that come with the race
// detector find one, and so may the collector.
func TestEndOfMemory(t *testing.T) {
	key := new([64]byte)
	for i := range key {
		key[i] = byte(i)
	}
	c, err := NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	// Side by side, so that the end of one is the start of another.
	var all [4][]byte
	for i := range all {
		all[i] = make([]byte, 8<<20)
	}
	for _, p := range all {
		c.EncryptSectors(p, p, 0, 512)
		if bytes.Equal(p[len(p)-16:], make([]byte, 16)) {
			t.Error("the last block is not encrypted")
		}
		c.DecryptSectors(p, p, 0, 512)
		if !bytes.Equal(p, make([]byte, len(p))) {
			t.Error("not what was encrypted")
		}
	}
}
