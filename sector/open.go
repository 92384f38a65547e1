package sector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// OpenOptions say how a volume is unlocked and served. Functions that unlock a
// header only to change it ignore ReadOnly and Discard.
type OpenOptions struct {
	ReadOnly bool // nothing is written, not even a repair of the header
	Discard  bool // pass [Volume.Trim] on to the backing device

	// Derive, if not nil, keeps the keys off this process's heap.
	Derive Deriver

	// UUID, if not "", is that of the volume that is meant. Any other is refused, also
	// one that is as authentic and as well known to this host.
	UUID string

	// Pins tells a forged or an old header from the one that this host has
	// seen. Without it, whoever can write to the disk and wrap with the KEK can
	// replace the whole header.
	Pins Pins
	// RequirePin refuses a volume of which this host remembers nothing, rather
	// than to trust it at first sight: whoever can make a header can give it
	// another UUID too.
	RequirePin bool

	// Trusted, if not nil, are the keys of which one must have signed the volume
	// key. That tells a forged header also on a host that never saw the volume.
	Trusted []TrustedKey

	// SkipRetired leaves out the tokens whose place others took, which open the
	// volume otherwise: those that stand for them were denied.
	SkipRetired bool

	// Retired, if not nil, keeps those tokens back until all others have failed, and
	// is then asked of each, with what was said of the others, whether it may be tried.
	// Its version of a KEK may still be enabled where that of its successor was taken
	// away.
	Retired func(t KeyToken, others []TokenReport) bool

	// Changed, if not nil, is told of a header that was written, and of the key tokens
	// before, under the lock on the header, by functions that change one, and by
	// [Accept] of the one accepted.
	Changed func(before []KeyToken, now *Known)

	// Admit, if not nil, is asked by [AddToken] and [AddTokenByRecovery], under the lock on
	// the header, whether a token may be added to those that the header has.
	Admit func(has []KeyToken, added json.RawMessage) error

	// Handover, if not nil, keeps the DEK for the next process that serves the
	// volume, as long as this one has it.
	Handover *Handover

	// TryTimeout bounds what one token gets; 0 means [DefaultTryTimeout].
	TryTimeout time.Duration
	// HeadStart is how long a token may take before the next one is tried beside
	// it; 0 means [DefaultHeadStart].
	HeadStart time.Duration
}

// Defaults of [OpenOptions].
const (
	DefaultTryTimeout = 25 * time.Second
	DefaultHeadStart  = 2 * time.Second
)

// Open unlocks the volume on b: it reads the header, lets unseal try the tokens
// until one gives the volume key, checks the header against that key and the DEK
// against its digest, and the header against the pin. If every token fails, the
// error holds what unseal said of each.
//
// Tokens are tried in the order of their numbers, retired ones last. A token
// that has not answered after a head start goes on while the next is tried, so
// that one vault that is down doesn't hold up another that is not.
//
// A volume that has no pin here gets one: it's trusted at first sight.
//
// A header copy that is damaged or behind is rewritten from the good one,
// unless something else stands in its place; [Volume.Warnings] tells. Open
// does not take over b: the caller closes it after the volume.
func Open(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions) (*Volume, error) {
	return openAfter(ctx, b, unseal, o, func() *Known { return nil })
}

// openAfter is Open of a volume that is served, and of which before tells what is
// known of its header. The header must follow that.
func openAfter(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions, before func() *Known) (*Volume, error) {
	k, err := newKeys(xts.Size)
	if err != nil {
		return nil, err
	}
	var (
		v   *Volume
		got opened
		was *Known
	)
	h, copies, err := readAndJudge(ctx, b, func(h *luks2.Header, _ luks2.Copies) (err error) {
		v, got, err = open(ctx, b, h, k, unseal, o, func() *Known { was = before(); return was })
		return err
	})
	if err != nil {
		k.free()
		return nil, err
	}
	whole := !copies.Damaged()
	if !whole {
		var what string
		what, whole = repairHeader(ctx, b, copies, o.ReadOnly)
		v.warnings = append(v.warnings, what)
	}
	// Only a header of which both copies are there is what no older one may
	// replace: if the better copy is lost after this, the other has to do, as far
	// as it did before.
	if whole {
		if w := o.raise(h.UUID, got); w != "" {
			v.warnings = append(v.warnings, w)
		}
	} else if known := v.known.Load(); was != nil {
		known.Generation = was.Generation
	} else {
		known.Generation = 0
	}
	v.keep(ctx, h)
	return v, nil
}

// judgeTries bounds how often a header is read that is always another one.
const judgeTries = 3

// readAndJudge reads the header of b and returns the one that judge accepts. What
// judge compares it with, a pin or a [Known], is read after the header, and may be
// of one that this host has written since. So after [ErrAuth] the header is read
// again, and judged again if it's another one by then.
func readAndJudge(ctx context.Context, b Backing, judge func(*luks2.Header, luks2.Copies) error) (*luks2.Header, luks2.Copies, error) {
	h, copies, err := ReadHeader(ctx, b)
	for tries := 1; err == nil; tries++ {
		refused := judge(h, copies)
		if !errors.Is(refused, ErrAuth) || tries == judgeTries {
			return h, copies, refused
		}
		before := h
		if h, copies, err = ReadHeader(ctx, b); err != nil {
			return h, copies, fmt.Errorf("%w; the header was read again after: %v", err, refused)
		}
		if same, err := sameHeader(before, h); err != nil || same {
			return h, copies, refused
		}
	}
	return h, copies, err
}

func open(ctx context.Context, b Backing, h *luks2.Header, k *keys, unseal Unsealer, o OpenOptions, before func() *Known) (*Volume, opened, error) {
	defer k.wipeRaw()
	if err := o.CheckUUID(h); err != nil { // which unlock authenticates
		return nil, opened{}, err
	}
	got, err := unlock(ctx, h, k, unseal, o)
	if err != nil {
		return nil, got, err
	}
	if err := o.checkOrigin(h.UUID, got); err != nil {
		return nil, got, err
	}
	_, t, err := findVolumeToken(h)
	if err != nil {
		return nil, got, err
	}
	known, err := newKnown(h, t, got)
	if err != nil {
		return nil, got, err
	}
	if err := before().follows(known); err != nil {
		return nil, got, err
	}
	c, err := xts.NewCipherIn(k.schedule, k.dek)
	if err != nil {
		return nil, got, fmt.Errorf("%w: %w", ErrAuth, err)
	}
	v, err := newVolume(b, h, t.size(), got.token, k, c, o)
	if err == nil {
		v.known.Store(known)
		o.Handover.put(k.dek)
	}
	return v, got, err
}

// repairHeader acts on damage that ReadHeader found, and says what it did, and
// whether both copies are good now. The header was authenticated by then: a
// forged copy is not spread.
func repairHeader(ctx context.Context, b Backing, found luks2.Copies, readOnly bool) (what string, whole bool) {
	switch {
	case readOnly:
		return found.Describe() + "; it was not repaired, as the volume is read-only", false
	case found.Foreign():
		return found.Describe() + "; something else stands in its place, so it was not repaired; if that can go, run 'hostcryptd header repair --force'", false
	}
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return fmt.Sprintf("%s; it was not repaired: %v", found.Describe(), err), false
	}
	defer release()
	// Read again under the lock: cryptsetup may have repaired it meanwhile.
	h, copies, err := readHeader(b)
	if err == nil && !copies.Foreign() {
		err = luks2.Repair(b, h, copies)
	}
	if err != nil {
		return fmt.Sprintf("%s; it was not repaired: %v", found.Describe(), err), false
	}
	return found.Describe() + "; it was repaired", true
}

// CheckUUID returns [ErrAuth] if what a header has for a UUID is none. File names are
// made of it, before anything can authenticate it.
func CheckUUID(h *luks2.Header) error {
	if !IsUUID(h.UUID) {
		return fmt.Errorf("%w: %.40q in the header is not the UUID of a volume", ErrAuth, h.UUID)
	}
	return nil
}

// CheckUUID returns [ErrAuth] if a header is of another volume than the one that is
// meant. Nothing authenticates the header here; [Open] does.
func (o *OpenOptions) CheckUUID(h *luks2.Header) error {
	if o.UUID != "" && h.UUID != o.UUID {
		return fmt.Errorf("%w: the header is that of volume %s, and volume %s is meant: is another disk in its place?", ErrAuth, h.UUID, o.UUID)
	}
	return nil
}

// supported returns the volume token of a header that this version can serve.
func supported(h *luks2.Header) (*volumeToken, error) {
	_, v, err := findVolumeToken(h)
	if err != nil {
		return nil, err
	}
	if err := CheckUUID(h); err != nil {
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
