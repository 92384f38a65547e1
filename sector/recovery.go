package sector

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"syscall"
	"unicode"
	"unicode/utf8"

	"hostcryptd/sector/luks2"
)

// NewRecoveryKey returns a random recovery key of 128 bits: eight groups of six
// digits with dashes between. Each group is a 16-bit number times 11, so the
// alternating sum of its digits is divisible by 11, which catches a mistyped
// digit and two that were swapped. cryptsetup takes the text as it is, dashes
// included, as a passphrase.
func NewRecoveryKey() []byte {
	var r [16]byte
	rand.Read(r[:])
	defer clear(r[:])
	var key bytes.Buffer
	for i := range 8 {
		if i > 0 {
			key.WriteByte('-')
		}
		fmt.Fprintf(&key, "%06d", (int(r[2*i])<<8|int(r[2*i+1]))*11)
	}
	return key.Bytes()
}

const (
	recoveryGroups = 8
	recoveryDigits = 6 // of a group
)

// ErrMistyped is in the errors of [ParseRecoveryKey].
var ErrMistyped = fmt.Errorf("%w: it can't be a recovery key", ErrWrongKey)

// ParseRecoveryKey returns a recovery key in the form of [NewRecoveryKey]. It
// takes the digits with or without dashes, with white space anywhere. An error
// names the group that is wrong, and never shows a digit.
func ParseRecoveryKey(text []byte) ([]byte, error) {
	digits := make([]byte, 0, recoveryGroups*recoveryDigits)
	defer func() { clear(digits[:cap(digits)]) }()
	group := func() int { return len(digits)/recoveryDigits + 1 }
	for rest := text; len(rest) > 0; {
		r, n := utf8.DecodeRune(rest)
		rest = rest[n:]
		switch {
		case unicode.IsSpace(r), unicode.Is(unicode.Pd, r), r == '_', r == '\ufeff', r == '\u200b', r == '\u2212':
			// Where a separator splits a group, a digit before it was left out
			// or doubled; to go on would blame another group.
			if n := len(digits) % recoveryDigits; n != 0 && unicode.Is(unicode.Pd, r) {
				return nil, fmt.Errorf("%w: group %d has %d digits instead of %d", ErrMistyped, group(), n, recoveryDigits)
			}
		case r < '0' || r > '9':
			return nil, fmt.Errorf("%w: group %d has something else than a digit", ErrMistyped, group())
		case len(digits) == cap(digits):
			return nil, fmt.Errorf("%w: it has more than %d groups of %d digits", ErrMistyped, recoveryGroups, recoveryDigits)
		default:
			if digits = append(digits, byte(r)); len(digits)%recoveryDigits != 0 {
				continue
			}
			value := 0
			for _, d := range digits[len(digits)-recoveryDigits:] {
				value = 10*value + int(d-'0')
			}
			if value%11 != 0 || value/11 > 65535 {
				return nil, fmt.Errorf("%w: group %d is mistyped", ErrMistyped, group()-1)
			}
		}
	}
	if len(digits) != cap(digits) {
		return nil, fmt.Errorf("%w: it has %d digits instead of %d groups of %d", ErrMistyped, len(digits), recoveryGroups, recoveryDigits)
	}
	key := make([]byte, 0, recoveryGroups*(recoveryDigits+1)-1)
	for i := range recoveryGroups {
		if i > 0 {
			key = append(key, '-')
		}
		key = append(key, digits[i*recoveryDigits:(i+1)*recoveryDigits]...)
	}
	return key, nil
}

// FindRecoveryKey tells which keyslot a recovery key opens, and whether it is good
// for [AddTokenByRecovery] too. It changes nothing. The error is [ErrWrongKey] if it
// opens none.
func FindRecoveryKey(ctx context.Context, b Backing, recoveryKey []byte) (slot int, adds bool, err error) {
	release, err := b.LockHeader(ctx, false)
	if err != nil {
		return 0, false, err
	}
	defer release()
	h, _, err := readHeader(b)
	if err != nil {
		return 0, false, err
	}
	v, err := supported(h)
	if err != nil {
		return 0, false, err
	}
	check, err := newKeys(0)
	if err != nil {
		return 0, false, err
	}
	defer check.free()
	if slot, err = findKeyslot(b, h, recoveryKey, check.dek); err != nil {
		return 0, false, err
	}
	return slot, v.unwrapVolumeKey(check, recoveryKey, h.UUID, slot) == nil, nil
}

// findKeyslot fills dek by whichever keyslot a recovery key opens.
func findKeyslot(b luks2.File, h *luks2.Header, recoveryKey []byte, dek *[dekSize]byte) (int, error) {
	slots := recoverySlots(h)
	if len(slots) == 0 {
		return 0, fmt.Errorf("%w: the volume has no recovery keyslot; 'hostcryptd recovery add' makes one", ErrWrongKey)
	}
	slices.SortStableFunc(slots, func(a, b int) int { return cmp.Compare(kdfCost(h.Keyslots[a]), kdfCost(h.Keyslots[b])) })
	var failed, untried []error
	for _, id := range slots {
		err := openKeyslot(b, h, id, recoveryKey, dek)
		switch {
		case err == nil:
			return id, nil
		case errors.Is(err, syscall.ENOMEM):
			untried = append(untried, fmt.Errorf("keyslot %d could not be tried: %w", id, err))
		}
		failed = append(failed, err)
	}
	if untried != nil {
		return 0, errors.Join(untried...) // so nobody knows whether the key is wrong
	}
	return 0, errors.Join(failed...)
}

// unlockByRecovery is unlock with a recovery key instead of tokens.
func unlockByRecovery(b luks2.File, h *luks2.Header, k *keys, recoveryKey []byte) (opened, error) {
	v, err := supported(h)
	if err != nil {
		return opened{}, err
	}
	slot, err := findKeyslot(b, h, recoveryKey, k.dek)
	if err != nil {
		return opened{}, err
	}
	if err := v.unwrapVolumeKey(k, recoveryKey, h.UUID, slot); err != nil {
		return opened{}, fmt.Errorf("%w: keyslot %d has the data key and not the volume key, which a token is made of: another program or an old version has made it (%w); while a token opens the volume, 'hostcryptd recovery rotate' makes one that has both; else 'cryptsetup open' opens it, to copy the data", ErrUnsupported, slot, err)
	}
	if err := openDEK(h, k.volumeKey, k.dek); err != nil {
		return opened{}, err
	}
	return opened{byRecovery, fingerprint(k.volumeKey, h.UUID), v.generation(), v.Signature}, nil
}

// byRecovery stands for the token that has opened a header where none has.
const byRecovery = -1

// takesRecovery tells whether the header has a keyslot whose key is good for
// [AddTokenByRecovery], as far as that can be seen.
func takesRecovery(h *luks2.Header, v *volumeToken) bool {
	return slices.ContainsFunc(recoverySlots(h), func(id int) bool { _, ok := v.Recovery[strconv.Itoa(id)]; return ok })
}

// AddRecoveryKey adds a keyslot that opens the volume with a recovery key, and
// returns its number. The volume may be in use meanwhile. With an error the
// number is -1 if nothing was added for certain; otherwise the key may open
// the volume or not.
func AddRecoveryKey(ctx context.Context, b Backing, unseal Unsealer, recoveryKey []byte, o OpenOptions) (int, error) {
	id, _, err := changeRecovery(ctx, b, unseal, recoveryKey, nil, o)
	return id, err
}

// OnlySlot stands for the recovery keyslot of a volume that has no other.
const OnlySlot = -1

// RotateRecoveryKey adds a keyslot for a new recovery key and removes slot in
// the same update of the header, so that at any moment one of the two opens the
// volume. It returns the number of the new one as [AddRecoveryKey] does, and that of
// the old one, which is slot, or the one that [OnlySlot] has meant.
func RotateRecoveryKey(ctx context.Context, b Backing, unseal Unsealer, slot int, recoveryKey []byte, o OpenOptions) (id, removed int, err error) {
	return changeRecovery(ctx, b, unseal, recoveryKey, &slot, o)
}

// RemoveRecoveryKey removes a recovery keyslot, which may be [OnlySlot], overwrites
// its area, and returns its number. A token that isn't retired has to unseal, which
// shows that it isn't the last way in; if none does, the error has [ErrLastWay] in its
// chain.
func RemoveRecoveryKey(ctx context.Context, b Backing, unseal Unsealer, slot int, o OpenOptions) (removed int, err error) {
	_, removed, err = changeRecovery(ctx, b, unseal, nil, &slot, o)
	return removed, err
}

// chooseSlot returns slot, or without a number the only one there is.
func chooseSlot(h *luks2.Header, slot int) (int, error) {
	if slot != OnlySlot {
		return slot, nil
	}
	switch slots := recoverySlots(h); len(slots) {
	case 0:
		return slot, errors.New("there is no recovery keyslot; 'hostcryptd recovery add' makes one")
	case 1:
		return slots[0], nil
	default:
		return slot, fmt.Errorf("there are keyslots %v: choose with --keyslot NUMBER", slots)
	}
}

// changeRecovery adds a keyslot, removes another, or both.
func changeRecovery(ctx context.Context, b Backing, unseal Unsealer, add []byte, remove *int, o OpenOptions) (id, old int, err error) {
	// What only removes has to show that it isn't the last way in.
	show := add == nil
	o.SkipRetired = o.SkipRetired || show
	u, err := unlockWith(ctx, b, o, func(h *luks2.Header, k *keys) (opened, error) {
		if remove != nil {
			// Of the header that the one to be changed is compared with.
			if old, err = chooseSlot(h, *remove); err != nil {
				return opened{}, err
			}
		}
		return unlock(ctx, h, k, unseal, o)
	})
	if err != nil {
		_, tried := errors.AsType[tokensFailed](err)
		if show && tried && !errors.Is(err, ErrAuth) && ctx.Err() == nil {
			err = fmt.Errorf("keyslot %d: %w that is known to work: no token unseals: %w", old, ErrLastWay, err)
		}
		return -1, old, err
	}
	defer u.keys.free()
	id, was := -1, u.h
	var gone *luks2.Area
	touched, err := u.update(ctx, func(h *luks2.Header, v *volumeToken) error {
		d := h.SegmentDigest(0)
		if add != nil {
			if id, err = luks2.Free(h.Keyslots, luks2.MaxKeyslots); err != nil {
				return err
			}
			// The area first, then the header that makes it count.
			offset, err := h.FreeArea(keyslotAreaSize)
			if err != nil {
				return err
			}
			slot := newKeyslot(offset)
			area := alignedBytes(keyslotAreaSize)
			if err := sealKeyslot(slot, add, u.keys.dek, area); err != nil {
				return err
			}
			if _, err := b.WriteAt(area, int64(offset)); err != nil {
				return fmt.Errorf("sector: writing keyslot %d: %w", id, err)
			}
			if err := b.Sync(); err != nil {
				return fmt.Errorf("sector: writing keyslot %d: %w", id, err)
			}
			h.Keyslots[id] = slot
			d.Keyslots = append(d.Keyslots, id)
			if err := openKeyslot(b, h, id, add, u.keys.dek); err != nil {
				return fmt.Errorf("sector: reading back keyslot %d: %w", id, err)
			}
			v.wrapVolumeKey(u.keys, add, h.UUID, id, newNonce())
			v.noteKeyslot(u.keys.volumeKey, h, id, area)
		}
		if show {
			if err := sameToken(h, u.token, was.Tokens[u.token]); err != nil {
				return err
			}
		}
		if remove == nil {
			return nil
		}
		if !slices.Contains(recoverySlots(h), old) {
			return fmt.Errorf("there is no recovery keyslot %d; there are %v", old, recoverySlots(h))
		}
		// Numbers are given again.
		if is, was := h.Keyslots[old], was.Keyslots[old]; was == nil || is.Area.Offset != was.Area.Offset || !bytes.Equal(is.KDF.Salt, was.KDF.Salt) {
			return fmt.Errorf("keyslot %d is another one: %w meanwhile; run this again", old, luks2.ErrChanged)
		}
		gone = &h.Keyslots[old].Area
		delete(h.Keyslots, old)
		for _, d := range h.Digests {
			d.Keyslots = slices.DeleteFunc(d.Keyslots, func(n int) bool { return n == old })
		}
		for _, t := range h.Tokens {
			t.Keyslots = slices.DeleteFunc(t.Keyslots, func(n int) bool { return n == old })
		}
		return nil
	})
	if err != nil && !errors.Is(err, errNotNoted) {
		if !touched {
			id = -1
		}
		return id, old, err
	}
	// What nothing leads to any more is not left for somebody with an old header.
	if gone != nil {
		if werr := wipeArea(ctx, b, *gone); werr != nil {
			err = errors.Join(err, fmt.Errorf("sector: the keyslot is gone, but its area could not be overwritten: %w", werr))
		}
	}
	return id, old, err
}

// wipeArea overwrites the area of a keyslot that is gone, unless another has
// taken the place meanwhile.
func wipeArea(ctx context.Context, b Backing, a luks2.Area) error {
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return err
	}
	defer release()
	h, _, err := readHeader(b)
	if err != nil {
		return err
	}
	for _, k := range h.Keyslots {
		if k.Area.Offset < a.Offset+a.Size && a.Offset < k.Area.Offset+k.Area.Size {
			return nil
		}
	}
	noise := alignedBytes(int(a.Size))
	rand.Read(noise)
	if _, err := b.WriteAt(noise, int64(a.Offset)); err != nil {
		return err
	}
	return b.Sync()
}
