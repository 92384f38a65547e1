package sector

import (
	"fmt"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// RandomOptions say how a volume with a random key is to be.
type RandomOptions struct {
	SectorSize int    // 512 or 4096
	Label      string // for people
	Discard    bool   // as in OpenOptions
	Handover   *Handover
}

// OpenRandom makes all of b a volume with a key that was drawn just now and
// exists nowhere but in secret memory: for swap and for temporary files, whose
// content nobody wants after a reboot. There is no header. None is read, as
// nothing on the device can be what this key opens, and none is written, so
// that what is on the disk afterwards is noise from its first byte on and the
// next start finds it unused. The volume's UUID is as new as its key.
//
// What was on b is lost with the first writes; the caller has made sure that it
// may be. The volume can't be resumed once it was suspended.
func OpenRandom(b Backing, o RandomOptions) (*Volume, error) {
	if o.SectorSize != 512 && o.SectorSize != 4096 {
		return nil, fmt.Errorf("sector: sector size %d; it can be 512 or 4096", o.SectorSize)
	}
	if b.Size() < int64(o.SectorSize) {
		return nil, fmt.Errorf("%w: it has %d bytes, which is less than a sector of %d", ErrDevice, b.Size(), o.SectorSize)
	}
	k, err := newKeys(xts.Size)
	if err != nil {
		return nil, err
	}
	v, err := openRandom(b, k, o)
	if err != nil {
		k.free()
		return nil, err
	}
	return v, nil
}

func openRandom(b Backing, k *keys, o RandomOptions) (*Volume, error) {
	defer k.wipeRaw()
	newDEK(k.dek)
	c, err := xts.NewCipherIn(k.schedule, k.dek)
	if err != nil {
		return nil, err
	}
	header := &luks2.Header{UUID: newUUID(), Label: o.Label, Segments: map[int]*luks2.Segment{0: {
		Dynamic: true, SectorSize: uint32(o.SectorSize),
	}}}
	v, err := newVolume(b, header, 0, RandomToken, k, c, OpenOptions{Discard: o.Discard, Handover: o.Handover})
	if err == nil {
		o.Handover.put(k.dek)
	}
	return v, err
}

// RandomToken is what [Volume.Token] gives for a volume that no token opened.
const RandomToken = -1
