package sector

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// All changes of a header go the same way: unlock it, which may take long and
// holds no lock; get ready what is to be written; then, under the lock, read the
// header again, authenticate it with the keys at hand, edit it, raise its
// generation, and write both copies, one after the other, each read back before
// the next is touched. So wherever the power fails, one copy is whole, and it is
// the old header or the new one. The volume may be in use meanwhile.

// unlocked is a header that was opened in order to be changed.
type unlocked struct {
	b    Backing
	o    OpenOptions
	h    *luks2.Header // as it was read
	keys *keys
	opened
	resign bool // update puts in the signature of opened
}

func unlockHeader(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions, skip ...int) (*unlocked, error) {
	return unlockWith(ctx, b, o, func(h *luks2.Header, k *keys) (opened, error) { return unlock(ctx, h, k, unseal, o, skip...) })
}

func unlockWith(ctx context.Context, b Backing, o OpenOptions, unlock func(h *luks2.Header, k *keys) (opened, error)) (*unlocked, error) {
	u := &unlocked{b: b, o: o}
	var err error
	if u.keys, err = newKeys(xts.Size); err != nil {
		return nil, err
	}
	u.h, _, err = readAndJudge(ctx, b, func(h *luks2.Header, _ luks2.Copies) (err error) {
		if u.opened, err = unlock(h, u.keys); err == nil {
			err = o.checkOrigin(h.UUID, u.opened)
		}
		return err
	})
	if err != nil {
		u.keys.free()
		return nil, err
	}
	return u, nil
}

// update lets edit change the header, and writes it. touched tells whether the
// device may hold the change when there is an error.
func (u *unlocked) update(ctx context.Context, edit func(h *luks2.Header, v *volumeToken) error) (touched bool, err error) {
	release, err := u.b.LockHeader(ctx, true)
	if err != nil {
		return false, err
	}
	defer release()
	h, copies, err := readHeader(u.b)
	if err != nil {
		return false, err
	}
	if copies.Foreign() {
		return false, fmt.Errorf("%w: %s; see 'hostcryptd header repair'", ErrDamaged, copies.Describe())
	}
	if h.UUID != u.h.UUID {
		return false, fmt.Errorf("%w: the device now holds volume %s", ErrAuth, h.UUID)
	}
	if err := openDEK(h, u.keys.volumeKey, u.keys.dek); err != nil {
		return false, err
	}
	_, v, err := findVolumeToken(h)
	if err != nil {
		return false, err
	}
	u.generation = v.generation()
	if u.resign {
		v.Signature = u.signature
	}
	u.signature = v.Signature
	if err := u.o.checkOrigin(h.UUID, u.opened); err != nil {
		return false, err
	}
	before := keyTokens(h)
	if err := edit(h, v); err != nil {
		return false, err
	}
	v.noteOldKeyslots(u.b, u.keys.volumeKey, h, time.Now())
	v.setGeneration(u.generation + 1)
	if err := setVolumeToken(h, u.keys.volumeKey, v); err != nil {
		return false, err
	}
	if err := luks2.Write(u.b, h); err != nil {
		return true, err
	}
	// Not what the code meant to write, but what an Open will find.
	if h, copies, err = readHeader(u.b); err != nil {
		return true, fmt.Errorf("sector: reading back the header: %w", err)
	}
	if copies.Damaged() {
		return true, fmt.Errorf("%w: reading back the header: %s", ErrDamaged, copies.Describe())
	}
	if err := openDEK(h, u.keys.volumeKey, u.keys.dek); err != nil {
		return true, fmt.Errorf("sector: reading back the header: %w", err)
	}
	u.h = h
	u.generation++
	if u.o.Changed != nil {
		known, err := newKnown(h, v, u.opened)
		if err != nil {
			return true, err
		}
		u.o.Changed(before, known)
	}
	if u.o.Pins != nil {
		if err := u.o.Pins.Raise(h.UUID, Pin{u.fingerprint, u.generation}); err != nil {
			return true, fmt.Errorf("%w: %w", errNotNoted, err)
		}
	}
	return true, nil
}

// errNotNoted is the error of update when both copies are as they should be.
var errNotNoted = errors.New("sector: the header was changed, but this host could not note its generation")

// verified checks that a token gives the volume key at hand.
func (u *unlocked) verified(ctx context.Context, unseal Unsealer, text json.RawMessage) (*luks2.Token, error) {
	t, err := ownToken(text)
	if err != nil {
		return nil, err
	}
	check, err := newKeys(0)
	if err != nil {
		return nil, err
	}
	defer check.free()
	if err := unseal(ctx, u.h.UUID, text, check.volumeKey); err != nil {
		return nil, fmt.Errorf("the new token (%s) does not unseal, so nothing was changed: %w", t.Type, err)
	}
	if !bytes.Equal(check.volumeKey[:], u.keys.volumeKey[:]) {
		return nil, fmt.Errorf("%w: the new token (%s) unseals to another key than was sealed; nothing was changed", ErrAuth, t.Type)
	}
	return t, nil
}

// AddToken wraps the volume key with another KEK and returns the number of the
// token. The token has been unsealed before it's written. After an error the
// token may be there or not, and does no harm.
func AddToken(ctx context.Context, b Backing, unseal Unsealer, seal Sealer, o OpenOptions) (id int, err error) {
	u, err := unlockHeader(ctx, b, unseal, o)
	if err != nil {
		return 0, err
	}
	return u.addToken(ctx, unseal, seal)
}

// AddTokenByRecovery is AddToken where no token opens the volume any more, but a
// recovery key does. The tokens that there are stay, and are not tried: unseal is
// for the new one. A wrong recovery key gives [ErrWrongKey], and [ErrUnsupported] one
// whose keyslot another program has made.
func AddTokenByRecovery(ctx context.Context, b Backing, recoveryKey []byte, unseal Unsealer, seal Sealer, o OpenOptions) (id int, err error) {
	u, err := unlockWith(ctx, b, o, func(h *luks2.Header, k *keys) (opened, error) { return unlockByRecovery(b, h, k, recoveryKey) })
	if err != nil {
		return 0, err
	}
	return u.addToken(ctx, unseal, seal)
}

// addToken ends with the keys gone.
func (u *unlocked) addToken(ctx context.Context, unseal Unsealer, seal Sealer) (id int, err error) {
	defer u.keys.free()
	text, err := seal(ctx, u.h.UUID, u.keys.volumeKey)
	if err != nil {
		return 0, err
	}
	t, err := u.verified(ctx, unseal, text)
	if err != nil {
		return 0, err
	}
	_, err = u.update(ctx, func(h *luks2.Header, _ *volumeToken) error {
		if u.o.Admit != nil {
			if err := u.o.Admit(keyTokens(h), text); err != nil {
				return err
			}
		}
		dropExpired(h, time.Now(), u.token)
		if id, err = luks2.Free(h.Tokens, luks2.MaxTokens); err == nil {
			h.Tokens[id] = t
		}
		return err
	})
	return id, err
}

// A Rewrapper makes a new token in place of one, for the same volume key and a
// newer KEK.
type Rewrapper func(ctx context.Context, volume string, token json.RawMessage, key *[VolumeKeySize]byte) (json.RawMessage, error)

// ReplaceToken adds the token that rewrap makes of token id, and retires that:
// it stays a way in for the time keep, since the vault may yet have to go back
// to the old version, and goes with the first change after. With keep 0 it goes
// at once. The new token has been unsealed before anything is written. At any
// moment of a crash one of the two opens the volume.
func ReplaceToken(ctx context.Context, b Backing, unseal Unsealer, id int, rewrap Rewrapper, keep time.Duration, o OpenOptions) (newID int, err error) {
	u, err := unlockHeader(ctx, b, unseal, o)
	if err != nil {
		return 0, err
	}
	defer u.keys.free()
	old, ok := u.h.Tokens[id]
	if !ok || !isKeyToken(old) {
		return 0, noToken(id)
	}
	was, err := old.MarshalJSON()
	if err != nil {
		return 0, err
	}
	text, err := rewrap(ctx, u.h.UUID, was, u.keys.volumeKey)
	if err != nil {
		return 0, fmt.Errorf("token %d (%s): %w", id, old.Type, err)
	}
	t, err := u.verified(ctx, unseal, text)
	if err != nil {
		return 0, err
	}
	now := time.Now()
	_, err = u.update(ctx, func(h *luks2.Header, _ *volumeToken) error {
		if err := sameToken(h, id, old); err != nil {
			return err
		}
		dropExpired(h, now, u.token)
		// A number of its own, also where the old token goes at once.
		if newID, err = luks2.Free(h.Tokens, luks2.MaxTokens); err != nil {
			return err
		}
		if keep <= 0 {
			delete(h.Tokens, id)
		} else if h.Tokens[id], err = retired(old, now, keep); err != nil {
			return err
		}
		h.Tokens[newID] = t
		return nil
	})
	return newID, err
}

func noToken(id int) error {
	return fmt.Errorf("there is no token %d that holds the volume key; 'hostcryptd key list' shows those there are", id)
}

// retired returns t with the time until which it's kept. A token that was
// retired before keeps its time.
func retired(t *luks2.Token, now time.Time, keep time.Duration) (*luks2.Token, error) {
	text, err := t.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil {
		return nil, err
	}
	if _, ok := members["retired"]; ok {
		return t, nil
	}
	now = now.UTC().Truncate(time.Second)
	for name, at := range map[string]time.Time{"retired": now, "keep_until": now.Add(keep)} {
		if members[name], err = at.MarshalJSON(); err != nil {
			return nil, err
		}
	}
	if text, err = json.Marshal(members); err != nil {
		return nil, err
	}
	return luks2.NewToken(text)
}

// dropExpired removes retired tokens whose time is over, if the token that has
// just opened the volume is there and isn't one of those.
func dropExpired(h *luks2.Header, now time.Time, openedBy int) (dropped []int) {
	list := keyTokens(h)
	if !slices.ContainsFunc(list, func(t KeyToken) bool { return t.ID == openedBy && t.Retired.IsZero() }) {
		return nil // the tokens that are meant to be used don't work, or the one that does is gone
	}
	for _, t := range list {
		if !t.Retired.IsZero() && now.After(t.KeepUntil) {
			delete(h.Tokens, t.ID)
			dropped = append(dropped, t.ID)
		}
	}
	return dropped
}

// DropRetired removes the retired tokens whose time is over at now, and returns
// their numbers. It does nothing if only a retired token opens the volume.
func DropRetired(ctx context.Context, b Backing, unseal Unsealer, now time.Time, o OpenOptions) (dropped []int, err error) {
	h, _, err := ReadHeader(ctx, b)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(keyTokens(h), func(t KeyToken) bool { return !t.Retired.IsZero() && now.After(t.KeepUntil) }) {
		return nil, nil
	}
	u, err := unlockHeader(ctx, b, unseal, o)
	if err != nil {
		return nil, err
	}
	defer u.keys.free()
	_, err = u.update(ctx, func(h *luks2.Header, _ *volumeToken) error {
		if dropped = dropExpired(h, now, u.token); dropped == nil {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		err = nil
	}
	return dropped, err
}

var errNothing = errors.New("nothing to change")

// RemoveToken removes a token. Another has to be left that isn't retired and was just
// shown to unseal. With force other tokens, or a recovery keyslot, are enough by
// themselves. The error is [ErrLastWay] if that's not so; when there is neither
// another token nor a keyslot, force changes nothing.
//
// A volume whose last token is gone can be opened with its recovery key only, by
// cryptsetup, or by hostcryptd after [AddTokenByRecovery].
func RemoveToken(ctx context.Context, b Backing, unseal Unsealer, id int, force bool, o OpenOptions) error {
	h, _, err := ReadHeader(ctx, b)
	if err != nil {
		return err
	}
	victim, ok := h.Tokens[id]
	if !ok || !isKeyToken(victim) {
		return noToken(id)
	}
	tokens, recovery := keyTokens(h), len(recoverySlots(h)) > 0
	// A retired one goes soon, and with it its version of the KEK.
	others := slices.ContainsFunc(tokens, func(t KeyToken) bool { return t.ID != id && t.Retired.IsZero() })
	if len(tokens) == 1 && !recovery {
		return fmt.Errorf("token %d: %w: there is no other token and no recovery keyslot; add one first ('hostcryptd key add', 'hostcryptd recovery add')", id, ErrLastWay)
	}
	active := o
	active.SkipRetired = true
	u, err := unlockHeader(ctx, b, unseal, active, id)
	if err != nil {
		switch {
		case errors.Is(err, ErrAuth):
			return err
		case !others && len(tokens) > 1 && !force:
			return fmt.Errorf("token %d: %w that stays: the others are retired; --force removes it all the same", id, ErrLastWay)
		case !others && !force:
			return fmt.Errorf("token %d: %w for hostcryptd: after it only the recovery key opens the volume; --force removes it", id, ErrLastWay)
		case !force:
			return fmt.Errorf("token %d: %w that is known to work: the others do not unseal now; --force removes it all the same: %w", id, ErrLastWay, err)
		}
		// The token itself has to give the key that the change is made with.
		other := err
		if u, err = unlockHeader(ctx, b, unseal, o); err != nil {
			return errors.Join(other, err)
		}
	}
	defer u.keys.free()
	_, err = u.update(ctx, func(h *luks2.Header, _ *volumeToken) error {
		// All that was looked at before the lock is looked at again: another command
		// may have taken away what was to stay, and numbers are given again.
		if err := sameToken(h, id, victim); err != nil {
			return err
		}
		delete(h.Tokens, id)
		switch {
		case len(keyTokens(h)) == 0 && len(recoverySlots(h)) == 0:
			return fmt.Errorf("token %d: %w: %w", id, ErrLastWay, luks2.ErrChanged)
		case !force:
			return sameToken(h, u.token, u.h.Tokens[u.token]) // what was shown to unseal
		}
		return nil
	})
	return err
}

// sameToken returns an error unless token id of h is the one that it was when it was
// read: there, and not retired or replaced since.
func sameToken(h *luks2.Header, id int, was *luks2.Token) error {
	is, ok := h.Tokens[id]
	if !ok {
		return fmt.Errorf("token %d is gone: %w meanwhile; run this again", id, luks2.ErrChanged)
	}
	a, err := was.MarshalJSON()
	if err != nil {
		return err
	}
	if b, err := is.MarshalJSON(); err != nil || !bytes.Equal(a, b) {
		return fmt.Errorf("token %d is another one: %w meanwhile; run this again", id, luks2.ErrChanged)
	}
	return nil
}

// recoverySlots lists the keyslots that hold the DEK of the data.
func recoverySlots(h *luks2.Header) []int {
	d := h.SegmentDigest(0)
	if d == nil {
		return nil
	}
	return slices.DeleteFunc(keyslotIDs(h), func(id int) bool { return !slices.Contains(d.Keyslots, id) })
}

// Accept makes the header as it is the one that this host trusts, whatever it
// has seen before, and returns the pin it had, or nil, and the one it has now.
// The header must open and be authentic in itself.
func Accept(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions) (before *Pin, now Pin, err error) {
	return accept(ctx, b, o, func(h *luks2.Header, k *keys) (opened, error) { return unlock(ctx, h, k, unseal, o) })
}

// AcceptByRecovery is Accept where no token opens the volume any more, but a recovery
// key does. Errors are as of [AddTokenByRecovery].
func AcceptByRecovery(ctx context.Context, b Backing, recoveryKey []byte, o OpenOptions) (before *Pin, now Pin, err error) {
	return accept(ctx, b, o, func(h *luks2.Header, k *keys) (opened, error) { return unlockByRecovery(b, h, k, recoveryKey) })
}

func accept(ctx context.Context, b Backing, o OpenOptions, unlock func(h *luks2.Header, k *keys) (opened, error)) (before *Pin, now Pin, err error) {
	pins := o.Pins
	if pins == nil {
		return nil, now, errors.New("sector: internal error: nowhere to keep a pin")
	}
	o.Pins = nil
	u, err := unlockWith(ctx, b, o, unlock)
	if err != nil {
		return nil, now, err
	}
	defer u.keys.free()
	_, v, err := findVolumeToken(u.h)
	if err != nil {
		return nil, now, err
	}
	known, err := newKnown(u.h, v, u.opened)
	if err != nil {
		return nil, now, err
	}
	before, _ = pins.Load(u.h.UUID) // a damaged one is replaced
	now = Pin{u.fingerprint, u.generation}
	if err = pins.Set(u.h.UUID, now); err == nil && o.Changed != nil {
		o.Changed(known.Tokens, known)
	}
	return before, now, err
}

// RepairHeader rewrites the copy of the header that is damaged or behind from
// the good one, and says what it did, or "" if there was nothing to do. The good
// copy is authenticated first, unless unseal is nil. With force it also
// overwrites what isn't a damaged copy, such as a partition table, and a second
// copy that contradicts the first.
func RepairHeader(ctx context.Context, b Backing, unseal Unsealer, force bool, o OpenOptions) (string, error) {
	if unseal != nil {
		u, err := unlockHeader(ctx, b, unseal, o)
		if err != nil {
			return "", err
		}
		defer u.keys.free()
	}
	release, err := b.LockHeader(ctx, true)
	if err != nil {
		return "", err
	}
	defer release()
	h, copies, err := readHeader(b)
	if err != nil {
		return "", err
	}
	if !copies.Damaged() {
		return "", nil
	}
	if copies.Foreign() && !force {
		return "", fmt.Errorf("%w: %s; something else stands there, which --force overwrites", ErrDamaged, copies.Describe())
	}
	if err := luks2.Repair(b, h, copies); err != nil {
		return "", err
	}
	if _, after, err := readHeader(b); err != nil || after.Damaged() {
		return "", errors.Join(fmt.Errorf("%w: reading back the header: %s", ErrDamaged, after.Describe()), err)
	}
	return copies.Describe(), nil
}
