package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// hostPins are what this host remembers of its volumes: a file for each, and
// where the host has a TPM 64 bytes in it, which who can write to the host's disks
// can't put back. What either of them says counts.
type hostPins struct {
	sector.PinDir
	tpm keyunseal.Options
	log *zap.Logger
}

var _ sector.Pins = (*hostPins)(nil)

// pinTimeout bounds what the TPM gets for one pin: some commands, of which chips
// take up to a second for those that write.
const pinTimeout = 15 * time.Second

// pinStore says where this host remembers its volumes.
func (k *keyFlags) pinStore(log *zap.Logger) *hostPins {
	p := &hostPins{PinDir: k.pinDir(), tpm: keyunseal.Options{TPM: k.tpmPath()}, log: log}
	if os.Geteuid() != 0 && k.tpmPath() == keyunseal.DefaultTPM {
		p.tpm.TPM = keyunseal.NoTPM // it's root's
	}
	return p
}

func (p *hostPins) loadTPM(volume string) (*sector.Pin, error) {
	ctx, cancel := context.WithTimeout(context.Background(), pinTimeout)
	defer cancel()
	pin, err := keyunseal.LoadPin(ctx, p.tpm, volume)
	if err != nil || pin == nil {
		return nil, err
	}
	return &sector.Pin{Fingerprint: hex.EncodeToString(pin.Fingerprint[:]), Generation: pin.Generation}, nil
}

func (p *hostPins) storeTPM(volume string, pin sector.Pin) (stored bool, err error) {
	b, err := hex.DecodeString(pin.Fingerprint)
	if err != nil || len(b) != len(keyunseal.Pin{}.Fingerprint) {
		return false, fmt.Errorf("pin: %q is no fingerprint", pin.Fingerprint)
	}
	ctx, cancel := context.WithTimeout(context.Background(), pinTimeout)
	defer cancel()
	return keyunseal.StorePin(ctx, p.tpm, volume, keyunseal.Pin{Fingerprint: [32]byte(b), Generation: pin.Generation})
}

// Load is as [sector.Pins] says. A TPM that doesn't answer is no reason to trust
// the file alone.
func (p *hostPins) Load(volume string) (*sector.Pin, error) {
	file, err := p.PinDir.Load(volume)
	if err != nil {
		return nil, err
	}
	chip, err := p.loadTPM(volume)
	switch {
	case err != nil:
		return nil, fmt.Errorf("%w: %w", sector.ErrNoPins, err)
	case chip == nil:
		return file, nil
	case file != nil && file.Fingerprint == chip.Fingerprint && file.Generation > chip.Generation:
		return file, nil // the TPM could not be told
	}
	return chip, nil
}

// Raise is as [sector.Pins] says. Where the TPM can't be told, the file knows, and
// the next time that the volume is opened tells the TPM.
func (p *hostPins) Raise(volume string, pin sector.Pin) error {
	return p.PinDir.RaiseWith(volume, pin, func() { p.raiseTPM(volume, pin) })
}

// raiseTPM is Raise for the TPM. It's called under the lock on the pins: if another
// process wrote to the TPM between what is read here and what is written, the older
// of the two generations could be the last.
func (p *hostPins) raiseTPM(volume string, pin sector.Pin) {
	known, _ := p.PinDir.Load(volume)
	chip, err := p.loadTPM(volume)
	if err == nil && (chip == nil || chip.Fingerprint == pin.Fingerprint && chip.Generation < pin.Generation) {
		var stored bool
		if stored, err = p.storeTPM(volume, pin); stored && chip == nil && known != nil {
			p.log.Warn("the TPM held nothing of this volume, which this host knows: it's new to it, or was cleared or replaced; now it does", zap.String("volume", volume))
		}
	}
	if err != nil {
		p.log.Warn("the TPM does not hold the newest header of this volume; the host's file of it does", zap.String("volume", volume), zap.Error(err))
	}
}

// Set is as [sector.Pins] says.
func (p *hostPins) Set(volume string, pin sector.Pin) error {
	return p.PinDir.SetWith(volume, pin, func() error { return p.setTPM(volume, pin) })
}

func (p *hostPins) setTPM(volume string, pin sector.Pin) error {
	if _, err := p.storeTPM(volume, pin); err != nil {
		e, ok := errors.AsType[*keyunseal.Error](err)
		chip, lerr := p.loadTPM(volume)
		// A TPM that holds something else would refuse the volume from now on.
		if !ok || e.Class != keyunseal.ClassConfig || lerr != nil || chip != nil {
			return err
		}
		p.log.Warn("the TPM can't remember this volume; the host's file of it does", zap.String("volume", volume), zap.Error(err))
	}
	return nil
}

// Remove forgets a volume, and says where it was remembered.
func (p *hostPins) Remove(volume string) (file, chip bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), pinTimeout)
	defer cancel()
	chip, err1 := keyunseal.RemovePin(ctx, p.tpm, volume)
	file, err2 := p.PinDir.Remove(volume)
	return file, chip, errors.Join(err1, err2)
}

// inTPM tells whether the TPM remembers a volume.
func (p *hostPins) inTPM(volume string) bool {
	chip, err := p.loadTPM(volume)
	return err == nil && chip != nil
}
