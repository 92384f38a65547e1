package sector

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// FormatOptions say how a new volume is to be.
type FormatOptions struct {
	UUID        string       // "" for a random one
	Label       string       // up to 47 bytes of printable UTF-8
	SectorSize  int          // 512 or 4096
	RecoveryKey []byte       // of the recovery keyslot, see [NewRecoveryKey]; nil for none
	Seal        []Sealer     // at least one; each makes a token
	Pins        Pins         // where to remember the volume; nil for nowhere
	Sign        Signer       // signs the volume key; nil for no signature
	Trusted     []TrustedKey // of which one must have made the signature, if not nil

	// BeforeWrite, if not nil, is called when everything that can be refused
	// was not, and the next step destroys what is on the device.
	BeforeWrite func() error
}

// Format makes b a new volume with new keys, and returns its header. Whatever
// a header on b gave access to before is lost. Data behind the header is not
// touched: what was in plaintext there stays so until it is overwritten.
//
// Nothing is written before every Seal has succeeded. Then the first 16 MiB
// are zeroed, the header is written and read back, and the volume is pinned. A
// header that comes with an error is complete; only the pin is missing.
func Format(ctx context.Context, b Backing, o FormatOptions) (*luks2.Header, error) {
	h, err := newHeader(b, &o)
	if err != nil {
		return nil, err
	}
	k, err := newKeys(xts.Size)
	if err != nil {
		return nil, err
	}
	defer k.free()
	newDEK(k.dek)
	rand.Read(k.volumeKey[:])

	for i, seal := range o.Seal {
		text, err := seal(ctx, h.UUID, k.volumeKey)
		if err != nil {
			return nil, err
		}
		if h.Tokens[i], err = ownToken(text); err != nil {
			return nil, err
		}
	}
	h.Digests[0] = newDigest(k.dek)
	var area []byte
	if o.RecoveryKey != nil {
		slot := newKeyslot(2 * h.Size)
		area = alignedBytes(keyslotAreaSize)
		if err := sealKeyslot(slot, o.RecoveryKey, k.dek, area); err != nil {
			return nil, err
		}
		h.Keyslots[0], h.Digests[0].Keyslots = slot, []int{0}
	}
	made := dataSize(b.Size(), h)
	deks := map[string]wrappedKey{"0": wrapDEK(k.volumeKey, k.dek, h.UUID, "0", uint32(o.SectorSize), newNonce())}
	v := &volumeToken{Size: strconv.FormatInt(made, 10), DEKs: deks}
	v.setGeneration(1)
	if o.RecoveryKey != nil {
		v.wrapVolumeKey(k, o.RecoveryKey, h.UUID, 0, newNonce())
		v.noteKeyslot(k.volumeKey, h, 0, area)
	}
	fp := fingerprint(k.volumeKey, h.UUID)
	if o.Sign != nil {
		if v.Signature, err = o.Sign(ctx, h.UUID, SignatureDigest(h.UUID, fp)); err != nil {
			return nil, err
		}
	}
	trust := OpenOptions{Trusted: o.Trusted}
	if err := trust.checkSignature(h.UUID, opened{fingerprint: fp, signature: v.Signature}); err != nil {
		return nil, err
	}
	if err := setVolumeToken(h, k.volumeKey, v); err != nil {
		return nil, err
	}

	unlock, err := b.LockHeader(ctx, true)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if o.BeforeWrite != nil {
		if err := o.BeforeWrite(); err != nil {
			return nil, err
		}
	}
	// All of it, so that no copy or keyslot of an earlier header is left for a
	// recovery to find.
	zeros := alignedBytes(1 << 20)
	for off := int64(0); off < dataOffset; off += int64(len(zeros)) {
		if _, err := b.WriteAt(zeros, off); err != nil {
			return nil, fmt.Errorf("sector: clearing the header area at %d: %w", off, err)
		}
	}
	if area != nil {
		if _, err := b.WriteAt(area, int64(h.Keyslots[0].Area.Offset)); err != nil {
			return nil, fmt.Errorf("sector: writing the recovery keyslot: %w", err)
		}
	}
	if err := b.Sync(); err != nil {
		return nil, fmt.Errorf("sector: clearing the header area: %w", err)
	}
	if err := luks2.Format(b, h); err != nil {
		return nil, err
	}
	if err := verifyWritten(b, h.UUID, k, o.RecoveryKey); err != nil {
		return nil, err
	}
	if o.Pins != nil {
		// Not the pin of a volume that had this UUID before.
		if err := o.Pins.Set(h.UUID, Pin{Fingerprint: fp, Generation: 1}); err != nil {
			return h, fmt.Errorf("sector: the volume is complete, but this host could not note its header key: %w", err)
		}
	}
	return h, nil
}

// verifyWritten reads the header back and opens it with the keys at hand.
func verifyWritten(b Backing, uuid string, k *keys, recoveryKey []byte) error {
	h, copies, err := readHeader(b)
	if err != nil {
		return err
	}
	if copies.Damaged() || h.UUID != uuid {
		return fmt.Errorf("%w: reading back what was written: %s", ErrDamaged, copies.Describe())
	}
	check, err := newKeys(xts.Size)
	if err != nil {
		return err
	}
	defer check.free()
	if err := openDEK(h, k.volumeKey, check.dek); err != nil {
		return fmt.Errorf("sector: reading back what was written: %w", err)
	}
	if recoveryKey != nil {
		if _, err := unlockByRecovery(b, h, check, recoveryKey); err != nil {
			return fmt.Errorf("sector: reading back what was written: %w", err)
		}
	}
	return nil
}

// IsUUID tells whether s has the form that the UUID of a volume has.
func IsUUID(s string) bool { return uuidForm.MatchString(s) }

var uuidForm = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

// newHeader checks the options against the device, and lays out the volume.
func newHeader(b Backing, o *FormatOptions) (*luks2.Header, error) {
	if o.UUID == "" {
		o.UUID = newUUID()
	}
	o.UUID = strings.ToLower(o.UUID)
	switch {
	case !uuidForm.MatchString(o.UUID):
		return nil, fmt.Errorf("sector: %q is not a UUID", o.UUID)
	case len(o.Label) > 47:
		return nil, fmt.Errorf("sector: label %q is longer than 47 bytes", o.Label)
	case !utf8.ValidString(o.Label) || strings.ContainsFunc(o.Label, func(r rune) bool { return !unicode.IsPrint(r) }):
		return nil, fmt.Errorf("sector: label %q is not printable text", o.Label)
	case o.SectorSize != 512 && o.SectorSize != 4096:
		return nil, fmt.Errorf("sector: sector size %d; it can be 512 or 4096", o.SectorSize)
	case b.Alignment() > o.SectorSize:
		return nil, fmt.Errorf("%w: its logical blocks are %d bytes, so the sector size can't be %d", ErrDevice, b.Alignment(), o.SectorSize)
	case len(o.Seal) == 0:
		return nil, errors.New("sector: a volume needs at least one key")
	}
	room := b.Size() - dataOffset
	if room < int64(o.SectorSize) {
		return nil, fmt.Errorf("%w: it has %d bytes; a volume needs 16 MiB for its header and at least one sector of %d bytes after it, so %d", ErrDevice, b.Size(), o.SectorSize, dataOffset+o.SectorSize)
	}
	h := luks2.New(copySize, dataOffset)
	h.UUID, h.Label, h.Subsystem = o.UUID, o.Label, Subsystem
	s := &luks2.Segment{Type: "crypt", Offset: dataOffset, Encryption: Cipher, SectorSize: uint32(o.SectorSize)}
	if room%int64(o.SectorSize) == 0 {
		s.Dynamic = true
	} else {
		// dm-crypt refuses a device that ends inside a sector, so say where
		// the last whole one ends.
		s.Size = uint64(room / int64(o.SectorSize) * int64(o.SectorSize))
	}
	h.Segments[0] = s
	return h, nil
}

// dataSize is the size of the volume of h on a device of the given size, whole
// sectors.
func dataSize(device int64, h *luks2.Header) int64 {
	s := h.Segments[0]
	if !s.Dynamic {
		return int64(s.Size)
	}
	n := int64(s.SectorSize)
	return (device - int64(s.Offset)) / n * n
}

// ownToken checks that a Sealer returned a token of a type that [Open] tries.
func ownToken(text json.RawMessage) (*luks2.Token, error) {
	t, err := luks2.NewToken(text)
	if err != nil {
		return nil, err
	}
	if !isKeyToken(t) {
		return nil, fmt.Errorf("sector: internal error: a token of type %q", t.Type)
	}
	return t, nil
}

// isKeyToken tells whether a token holds a wrapped volume key.
func isKeyToken(t *luks2.Token) bool {
	return strings.HasPrefix(t.Type, TokenPrefix) && t.Type != volumeTokenType
}

// newUUID returns a random (version 4) UUID, RFC 9562.
func newUUID() string {
	var u [16]byte
	rand.Read(u[:])
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
