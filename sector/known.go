package sector

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"hostcryptd/sector/luks2"
)

// A Known is what a process that serves a volume knows of its header from when
// that was authentic last. Who can write to the disk under a running volume can
// put anything there; what counts is this. It holds no secret.
type Known struct {
	Fingerprint string     `json:"fingerprint"` // of the volume key
	Generation  uint64     `json:"generation"`  // no header of a lower one may follow
	Digest      string     `json:"digest"`      // SHA-256 of all that is authenticated, in hexadecimal
	Tokens      []KeyToken `json:"tokens"`      // in the order in which they are tried
}

func newKnown(h *luks2.Header, v *volumeToken, got opened) (*Known, error) {
	digest, err := digestHeader(h, v)
	if err != nil {
		return nil, err
	}
	return &Known{got.fingerprint, got.generation, digest, keyTokens(h)}, nil
}

// digestHeader tells headers apart by what is authenticated of them, and by their
// key tokens also where these are not, in version 1.
func digestHeader(h *luks2.Header, v *volumeToken) (string, error) {
	list, err := authenticated(h, v)
	if err != nil {
		return "", err
	}
	for _, t := range keyTokens(h) {
		list = append(list, string(t.Text))
	}
	sum := sha256.Sum256(fields(append(list, v.MAC)...))
	return hex.EncodeToString(sum[:]), nil
}

// sameHeader tells whether two headers that can be served are one.
func sameHeader(a, b *luks2.Header) (bool, error) {
	var digests [2]string
	for i, h := range []*luks2.Header{a, b} {
		v, err := supported(h)
		if err != nil {
			return false, err
		}
		if digests[i], err = digestHeader(h, v); err != nil {
			return false, err
		}
	}
	return digests[0] == digests[1], nil
}

// follows tells whether a header, authentic in itself, may take the place of the
// one that was known. A nil Known says nothing.
func (k *Known) follows(next *Known) error {
	switch {
	case k == nil:
		return nil
	case next.Fingerprint != k.Fingerprint:
		return fmt.Errorf("%w: the header was made with another volume key than the one of the volume that is served", ErrAuth)
	case next.Generation < k.Generation:
		return fmt.Errorf("%w: the header is of generation %d, and the volume that is served had one of generation %d: an older header was put back; if that was meant, 'hostcryptd header accept' says so", ErrOlder, next.Generation, k.Generation)
	}
	return nil
}

// maxStateTokens bounds the tokens in a State, in bytes: sixteen of RSA-4096. A
// message between processes has a limit.
const maxStateTokens = 32 << 10

// short leaves out the tokens that are too many for a State. The next server finds
// them in the header, as long as that is the same.
func (k *Known) short() *Known {
	if k == nil {
		return nil
	}
	n, size := 0, 0
	for n < len(k.Tokens) && size+len(k.Tokens[n].Text) <= maxStateTokens {
		size += len(k.Tokens[n].Text)
		n++
	}
	return &Known{k.Fingerprint, k.Generation, k.Digest, k.Tokens[:n:n]}
}

// Known is what is known of the volume's header, or nil: the volume has none, or
// another server has left it that didn't say. It is not to be changed.
func (v *Volume) Known() *Known { return v.known.Load() }

// Knows tells whether a header is the one that is known. Of another it doesn't tell
// whether that is authentic.
func (v *Volume) Knows(h *luks2.Header) bool {
	known := v.known.Load()
	t, err := supported(h)
	if known == nil || err != nil || h.UUID != v.uuid {
		return false
	}
	digest, err := digestHeader(h, t)
	return err == nil && digest == known.Digest
}

// Tokens looks at the header, which other processes may have changed, and returns
// its key tokens. If it is another one than the one known, it's unlocked as by
// [Open], and becomes the one known if it is authentic, of the same volume key
// and not of a lower generation. If it isn't, can't be authenticated now, or can't
// be read, Tokens returns the tokens that are known, and the error that says so.
//
// To unlock it has the volume key for a moment, so that isn't begun while the volume
// is suspended: the error is [ErrSuspended].
func (v *Volume) Tokens(ctx context.Context, unseal Unsealer, o OpenOptions) ([]KeyToken, error) {
	v.refreshing.Lock()
	defer v.refreshing.Unlock()
	known := v.known.Load()
	next, h, err := v.lookAtHeader(ctx, known, unseal, o)
	if err == nil {
		if next != known {
			v.known.CompareAndSwap(known, next) // or Resume was faster
		}
		v.keep(ctx, h)
		return next.Tokens, nil
	}
	if known == nil {
		return nil, err
	}
	return known.Tokens, err
}

// Learn makes k the header that is known, without authenticating it: its maker has.
// It must be the one that is on the disk, and may follow the one known before. With
// accepted it may be an older one too, see [Accept], but of the same volume key.
func (v *Volume) Learn(ctx context.Context, k *Known, accepted bool) error {
	v.refreshing.Lock()
	defer v.refreshing.Unlock()
	known := v.known.Load()
	before := known
	if accepted && known != nil {
		before = &Known{Fingerprint: known.Fingerprint}
	}
	if err := before.follows(k); err != nil {
		return err
	}
	h, _, err := ReadHeader(ctx, v.b)
	if err != nil {
		return err
	}
	t, err := supported(h)
	if err != nil {
		return err
	}
	if digest, err := digestHeader(h, t); err != nil || digest != k.Digest {
		return fmt.Errorf("%w: the header on the disk is another one", ErrAuth)
	}
	v.known.CompareAndSwap(known, &Known{k.Fingerprint, k.Generation, k.Digest, keyTokens(h)})
	v.keep(ctx, h)
	return nil
}

// A headerLook is what a look has found.
type headerLook struct {
	sum [sha256.Size]byte // of the header that was judged
	err error
}

func (v *Volume) lookAtHeader(ctx context.Context, known *Known, unseal Unsealer, o OpenOptions) (next *Known, h *luks2.Header, err error) {
	v.looked = headerLook{}
	h, _, err = readAndJudge(ctx, v.b, func(h *luks2.Header, copies luks2.Copies) (err error) {
		if v.looked.sum, err = h.Sum(); err == nil {
			next, err = v.judgeHeader(ctx, h, copies, known, unseal, o)
		}
		v.looked.err = err
		return err
	})
	return next, h, err
}

func (v *Volume) judgeHeader(ctx context.Context, h *luks2.Header, copies luks2.Copies, known *Known, unseal Unsealer, o OpenOptions) (*Known, error) {
	if h.UUID != v.uuid {
		return nil, fmt.Errorf("%w: the device now holds the header of volume %s", ErrAuth, h.UUID)
	}
	t, err := supported(h)
	if err != nil {
		return nil, err
	}
	digest, err := digestHeader(h, t)
	if err != nil {
		return nil, err
	}
	if known != nil && digest == known.Digest {
		if all := keyTokens(h); len(all) != len(known.Tokens) { // it came in a State
			return &Known{known.Fingerprint, known.Generation, digest, all}, nil
		}
		return known, nil
	}
	if known != nil && t.Version < formatVersion {
		return nil, fmt.Errorf("%w: a header of version %d has other tokens now, which nothing authenticates", ErrAuth, t.Version)
	}
	if v.Suspended() { // maybe since the disk was asked for the header
		return nil, ErrSuspended
	}
	k, err := newKeys(0)
	if err != nil {
		return nil, err
	}
	defer k.free()
	got, err := unlock(ctx, h, k, unseal, o)
	if err != nil {
		return nil, err
	}
	next, err := newKnown(h, t, got)
	if err != nil {
		return nil, err
	}
	if err := known.follows(next); err != nil {
		return nil, err
	}
	if err := o.checkOrigin(h.UUID, got); err != nil {
		return nil, err
	}
	if copies.Damaged() && known != nil {
		next.Generation = known.Generation // see Open
	} else if copies.Damaged() {
		next.Generation = 0
	}
	return next, nil
}
