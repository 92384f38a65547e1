package main

import (
	"context"
	"encoding/json"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// keyFlags are the flags that say how KEKs are reached.
type keyFlags struct {
	hostKey  string
	identity string
}

func (k *keyFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&k.hostKey, "host-key", keyunseal.DefaultHostKey, "`FILE` with the host key")
	c.Flags().StringVar(&k.identity, "identity", "", "managed identity for the vault: managed, or managed:CLIENT-ID (default: what the token was sealed with, else managed)")
}

func (k *keyFlags) options(log *zap.Logger) keyunseal.Options {
	return keyunseal.Options{HostKey: k.hostKey, Identity: k.identity, Log: log}
}

// sealer wraps volume keys with the KEK that spec names, in a process of its
// own.
func (k *keyFlags) sealer(spec string, log *zap.Logger) sector.Sealer {
	child := &keyunseal.Child{Log: log}
	return func(ctx context.Context, volume string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
		return child.Seal(ctx, k.options(log), spec, volume, key)
	}
}

// unsealer gets volume keys out of tokens, in a process of its own.
func (k *keyFlags) unsealer(log *zap.Logger) sector.Unsealer {
	child := &keyunseal.Child{Log: log}
	return func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
		return child.Unseal(ctx, k.options(log), token, volume, key)
	}
}
