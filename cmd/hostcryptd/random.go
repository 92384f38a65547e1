package main

import (
	"fmt"

	"go.uber.org/zap"

	"hostcryptd/sector"
)

// checkRandomKey checks the flags of --random-key against the others.
func (o *serveOptions) checkRandomKey(given func(flag string) bool) error {
	if !o.randomKey {
		for _, flag := range []string{"sector-size", "force"} {
			if given(flag) {
				return usagef("--%s is for --random-key; a volume's header says what else is needed", flag)
			}
		}
		return nil
	}
	switch {
	case o.uuid != "":
		return usagef("--random-key with --uuid: there is no header that would have one")
	case o.readOnly:
		return usagef("--random-key with --read-only: there would be nothing to read")
	case o.sectorSize != 512 && o.sectorSize != 4096:
		return usagef("--sector-size is 512 or 4096, not %d", o.sectorSize)
	}
	return nil
}

// openRandom makes the volume of --random-key, whose UUID is known only then.
// The device is open exclusively by now, so that what blkid finds stays what is
// there.
func (d *daemon) openRandom() error {
	values, err := probe(d.opts.device)
	if err != nil && !d.opts.force {
		return err
	}
	// What was in swap is worth nothing after a reboot. An image of a system that
	// hibernates has another type, swsuspend.
	if found := describeSignature(values); found != "" && values["TYPE"] != "swap" {
		if !d.opts.force {
			return withCode(codeBusy, fmt.Errorf("%s carries %s, which --random-key would destroy; if that can go, remove it with wipefs, or use --force", d.opts.device, found))
		}
		d.log.Warn("what is on the device will be lost, as --force says", zap.String("device", d.opts.device), zap.String("found", found))
	}
	v, err := sector.OpenRandom(d.device, sector.RandomOptions{
		SectorSize: d.opts.sectorSize, Label: d.opts.name, Discard: d.opts.discard, Handover: d.handover,
	})
	if err != nil {
		return fmt.Errorf("%s: %w", d.opts.device, err)
	}
	d.volume = v
	d.left.Volume = v.State()
	return nil
}
