package keyunseal_test

import (
	"context"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"

	"hostcryptd/keyunseal"
)

// Seal a new volume key under this host's key, and unseal it as at the next boot.
// Where the process goes on to serve the volume, use a [keyunseal.Child] for both.
func Example() {
	dir, err := os.MkdirTemp("", "keyunseal")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)

	const volume = "0f8fad5b-d9cb-469f-a165-70867728950e" // the UUID in the header
	var volumeKey [keyunseal.KeySize]byte
	rand.Read(volumeKey[:])

	ctx := context.Background()
	opts := keyunseal.Options{HostKey: filepath.Join(dir, "host.key")}
	token, err := keyunseal.Seal(ctx, opts, keyunseal.SpecHostKey, volume, &volumeKey)
	if err != nil {
		panic(err)
	}
	d, err := keyunseal.Describe(token)
	if err != nil {
		panic(err)
	}

	var again [keyunseal.KeySize]byte
	err = keyunseal.Unseal(ctx, opts, token, volume, &again)
	fmt.Println(d.Type, d.Algorithm, err, again == volumeKey)
	// Output: hostcryptd-hostkey HKDF-SHA256+A256GCM <nil> true
}
