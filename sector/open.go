package sector

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// OpenOptions say how a volume is to be served.
type OpenOptions struct {
	ReadOnly bool // nothing is written, not even a repair of the header
	Discard  bool // pass [Volume.Trim] on to the backing device

	// Derive, if not nil, keeps the keys off this process's heap.
	Derive Deriver
}

// Open unlocks the volume on b: it reads the header, lets unseal try each
// token in the order of their numbers until one gives the volume key, checks
// the header against that key and the DEK against its digest. If every token
// fails, the error holds what unseal said of each.
//
// A header copy that is damaged or behind is rewritten from the good one,
// unless something else stands in its place; [Volume.Warnings] tells. Open
// does not take over b: the caller closes it after the volume.
func Open(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions) (*Volume, error) {
	h, copies, err := ReadHeader(ctx, b)
	if err != nil {
		return nil, err
	}
	k, err := newKeys(xts.Size)
	if err != nil {
		return nil, err
	}
	v, err := open(ctx, b, h, k, unseal, o)
	if err != nil {
		k.free()
		return nil, err
	}
	if copies.Damaged() {
		v.warnings = append(v.warnings, repairHeader(ctx, b, copies, o.ReadOnly))
	}
	return v, nil
}

func open(ctx context.Context, b Backing, h *luks2.Header, k *keys, unseal Unsealer, o OpenOptions) (*Volume, error) {
	defer k.wipeRaw()
	token, err := unlock(ctx, h, k, unseal, o.Derive)
	if err != nil {
		return nil, err
	}
	c, err := xts.NewCipherIn(k.schedule, k.dek)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrAuth, err)
	}
	_, v, err := findVolumeToken(h)
	if err != nil {
		return nil, err
	}
	return newVolume(b, h, v.size(), token, k, c, o)
}

// repairHeader acts on damage that ReadHeader found, and says what it did.
// The header was authenticated by then: a forged copy is not spread.
func repairHeader(ctx context.Context, b Backing, found luks2.Copies, readOnly bool) string {
	switch {
	case readOnly:
		return found.Describe() + "; it was not repaired, as the volume is read-only"
	case found.Foreign():
		return found.Describe() + "; something else stands in its place, so it was not repaired; if that can go, run 'cryptsetup repair'"
	}
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return fmt.Sprintf("%s; it was not repaired: %v", found.Describe(), err)
	}
	defer release()
	// Read again under the lock: cryptsetup may have repaired it meanwhile.
	h, copies, err := readHeader(b)
	if err == nil && !copies.Foreign() {
		err = luks2.Repair(b, h, copies)
	}
	if err != nil {
		return fmt.Sprintf("%s; it was not repaired: %v", found.Describe(), err)
	}
	return found.Describe() + "; it was repaired"
}

// unlock fills k with the volume key and the DEK of h, and returns the number
// of the token that gave them.
func unlock(ctx context.Context, h *luks2.Header, k *keys, unseal Unsealer, elsewhere Deriver) (token int, err error) {
	if _, err := supported(h); err != nil {
		return 0, err
	}
	var failed []error
	for _, id := range slices.Sorted(maps.Keys(h.Tokens)) {
		t := h.Tokens[id]
		if !isKeyToken(t) {
			continue
		}
		text, err := t.MarshalJSON()
		if err != nil {
			return 0, err
		}
		err = unseal(ctx, h.UUID, text, k.volumeKey)
		if err == nil {
			err = derive(ctx, h, k, elsewhere)
		}
		if err == nil {
			return id, nil
		}
		k.wipeRaw()
		failed = append(failed, fmt.Errorf("token %d (%s): %w", id, t.Type, err))
		if ctx.Err() != nil {
			break
		}
	}
	if failed == nil {
		return 0, fmt.Errorf("%w: no token is left that holds its key; it can be opened with its recovery key and 'cryptsetup open'", ErrNotVolume)
	}
	return 0, errors.Join(failed...)
}

// supported returns the volume token of a header that this version can serve.
func supported(h *luks2.Header) (*volumeToken, error) {
	_, v, err := findVolumeToken(h)
	if err != nil {
		return nil, err
	}
	if err := h.CheckRequirements(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnsupported, err)
	}
	s := h.Segments[0]
	switch {
	case len(h.Segments) != 1:
		return nil, fmt.Errorf("%w: %d segments", ErrUnsupported, len(h.Segments))
	case s.Type != "crypt" || s.Encryption != Cipher:
		// There is no other cipher, so there is none to be downgraded to.
		return nil, fmt.Errorf("%w: segment of type %q with cipher %q; only %s is accepted", ErrUnsupported, s.Type, s.Encryption, Cipher)
	case s.SectorSize != 512 && s.SectorSize != 4096:
		return nil, fmt.Errorf("%w: sector size %d", ErrUnsupported, s.SectorSize)
	case s.Integrity || len(s.Flags) > 0:
		return nil, fmt.Errorf("%w: segment with integrity or flags", ErrUnsupported)
	case len(v.DEKs) != 1:
		return nil, fmt.Errorf("%w: %d DEKs", ErrUnsupported, len(v.DEKs))
	}
	return v, nil
}

// openDEK authenticates h with a volume key and unwraps the DEK of its segment.
func openDEK(h *luks2.Header, volumeKey *[VolumeKeySize]byte, dek *[dekSize]byte) error {
	v, err := supported(h)
	if err != nil {
		return err
	}
	if err := v.verify(h, volumeKey); err != nil {
		return err
	}
	digest := digestOf(h, 0)
	w, ok := v.DEKs[digest]
	if !ok {
		return fmt.Errorf("%w: no DEK for digest %s", ErrAuth, digest)
	}
	if err := unwrapDEK(volumeKey, w, dek, h.UUID, digest, h.Segments[0].SectorSize); err != nil {
		return err
	}
	return checkDigest(h.SegmentDigest(0), dek)
}

// AddRecoveryKey adds a keyslot that opens the volume with a recovery key, and
// returns its number. The volume may be in use meanwhile. With an error the
// number is -1 if nothing was added for certain; otherwise the key may open
// the volume or not.
func AddRecoveryKey(ctx context.Context, b Backing, unseal Unsealer, recoveryKey []byte) (int, error) {
	k, err := newKeys(xts.Size)
	if err != nil {
		return -1, err
	}
	defer k.free()
	// Unsealing may take long, so it comes before the lock; what it gave is
	// checked again under it.
	h, _, err := ReadHeader(ctx, b)
	if err != nil {
		return -1, err
	}
	if _, err := unlock(ctx, h, k, unseal, nil); err != nil {
		return -1, err
	}

	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return -1, err
	}
	defer release()
	h, copies, err := readHeader(b)
	if err != nil {
		return -1, err
	}
	if copies.Foreign() {
		return -1, fmt.Errorf("%w: %s; run 'cryptsetup repair' first", ErrDamaged, copies.Describe())
	}
	if err := openDEK(h, k.volumeKey, k.dek); err != nil {
		return -1, err
	}
	id, err := luks2.Free(h.Keyslots, luks2.MaxKeyslots)
	if err != nil {
		return -1, err
	}
	offset, err := h.FreeArea(keyslotAreaSize)
	if err != nil {
		return -1, err
	}
	slot := newKeyslot(offset)
	area := alignedBytes(keyslotAreaSize)
	if err := sealKeyslot(slot, recoveryKey, k.dek, area); err != nil {
		return -1, err
	}
	// The area first, then the header that makes it count.
	if _, err := b.WriteAt(area, int64(offset)); err != nil {
		return -1, fmt.Errorf("sector: writing keyslot %d: %w", id, err)
	}
	if err := b.Sync(); err != nil {
		return -1, fmt.Errorf("sector: writing keyslot %d: %w", id, err)
	}
	h.Keyslots[id] = slot
	d := h.SegmentDigest(0)
	d.Keyslots = append(d.Keyslots, id)
	if err := openKeyslot(b, h, id, recoveryKey, k.dek); err != nil {
		return -1, fmt.Errorf("sector: reading back keyslot %d: %w", id, err)
	}
	return id, luks2.Write(b, h)
}
