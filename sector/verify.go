package sector

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"hostcryptd/sector/luks2"
)

func newNoise(seed [32]byte) *rand.ChaCha8 { return rand.NewChaCha8(seed) }

// A Report is what [Verify] found. Findings are what is wrong, for people.
type Report struct {
	Header   *luks2.Header
	Copies   luks2.Copies
	Tokens   []TokenReport // in the order in which Open tries them
	Keyslots []int         // that a recovery key may open
	Intact   []int         // those of Keyslots that are as they were written
	Noted    []int         // those that are as they were when they were noted, long after
	Unknown  []int         // those of which that can't be told
	Pin      *Pin          // nil if this host has none
	PinError error         // why the header isn't the one that is pinned
	Opens    bool          // a token opens the volume, the pin permits it, and the device is big enough
	Findings []string
}

// A TokenReport is what became of one token.
type TokenReport struct {
	KeyToken
	Err  error         // nil if it gives the volume key of an authentic header
	Took time.Duration // to find out
}

// Verify checks a header as it would be opened, and more thoroughly: every
// token is tried, all at once. Without unseal it checks what can be checked
// without a key. It writes nothing, not even a pin. The error is that there is
// no header that could be checked.
//
// The header may be changed meanwhile. What is wrong with one that isn't there any
// more by then is not said: the next is checked.
func Verify(ctx context.Context, b Backing, unseal Unsealer, o OpenOptions) (*Report, error) {
	h, copies, err := ReadHeader(ctx, b)
	for tries := 1; err == nil; tries++ {
		r, refused := verify(ctx, b, h, copies, unseal, o)
		if refused == nil && len(r.Findings) == 0 || tries == judgeTries {
			return r, refused
		}
		before, was := h, copies
		if h, copies, err = ReadHeader(ctx, b); err == nil && h.SeqID == before.SeqID && copies.Describe() == was.Describe() {
			return r, refused
		}
	}
	return nil, err
}

// verify is Verify of a header that was read from b.
func verify(ctx context.Context, b Backing, h *luks2.Header, copies luks2.Copies, unseal Unsealer, o OpenOptions) (*Report, error) {
	r := &Report{Header: h, Copies: copies, Keyslots: recoverySlots(h)}
	find := func(format string, args ...any) { r.Findings = append(r.Findings, fmt.Sprintf(format, args...)) }
	switch {
	case copies.Foreign():
		find("%s; if what stands in its place can go, 'hostcryptd header repair --force' overwrites it", copies.Describe())
	case copies.Damaged():
		find("%s; 'hostcryptd header repair' repairs it", copies.Describe())
	}
	v, err := supported(h)
	if err != nil {
		return r, err
	}
	unfit := errors.Join(o.CheckUUID(h), fits(b, h, v.size()))
	if unfit != nil {
		find("%v", unfit)
	}
	areas := map[int][]byte{}
	for _, id := range keyslotIDs(h) {
		area := alignedBytes(int(min(h.Keyslots[id].Area.Size, 1<<20)))
		if _, err := b.ReadAt(area, int64(h.Keyslots[id].Area.Offset)); err != nil {
			find("keyslot %d can't be read: %v", id, err)
			continue
		}
		areas[id] = area
	}
	if v.Version < formatVersion {
		find("the header is of version %d: its tokens are not under its MAC, and an old one can't be told from it; the next change of a key makes it version %d", v.Version, formatVersion)
	}
	tokens := keyTokens(h)
	if len(tokens) == 0 {
		find("no token holds the volume key; only the recovery key opens it")
	}
	if o.Pins != nil {
		if r.Pin, r.PinError = o.Pins.Load(h.UUID); r.PinError != nil {
			find("%v", r.PinError)
		}
	}
	if unseal == nil {
		for _, t := range tokens {
			r.Tokens = append(r.Tokens, TokenReport{KeyToken: t})
		}
		r.Unknown = slices.DeleteFunc(slices.Clone(r.Keyslots), func(id int) bool { return areas[id] == nil })
		if r.Pin != nil && r.Pin.Generation > v.generation() {
			find("the header says that it is of generation %d, and this host has seen generation %d", v.generation(), r.Pin.Generation)
		}
		return r, nil
	}

	r.Tokens = make([]TokenReport, len(tokens))
	prints := make([]string, len(tokens))
	judged := make([]map[int]bool, len(tokens)) // whether an area is intact, where that is known
	var wg sync.WaitGroup
	for i, t := range tokens {
		wg.Go(func() {
			begun := time.Now()
			a := try(ctx, h, i, t, unseal, o)
			r.Tokens[i] = TokenReport{KeyToken: t, Err: a.err, Took: time.Since(begun)}
			prints[i] = a.fingerprint
			if a.err == nil {
				judged[i] = map[int]bool{}
				for id, area := range areas {
					if intact, known := v.keyslotIntact(a.keys.volumeKey, h, id, area); known {
						judged[i][id] = intact
					}
				}
			}
			a.keys.free()
		})
	}
	wg.Wait()
	known := map[int]bool{}
	for _, j := range judged {
		maps.Copy(known, j) // an authentic header has one volume key
	}
	for _, id := range r.Keyslots {
		intact, ok := known[id]
		switch {
		case intact && !v.keyslotNoted(id).IsZero():
			r.Noted = append(r.Noted, id)
		case intact:
			r.Intact = append(r.Intact, id)
		case ok:
			find("keyslot %d is damaged: it isn't as it was written, so no recovery key opens it; 'hostcryptd recovery rotate --keyslot %d' replaces it", id, id)
		case areas[id] != nil:
			r.Unknown = append(r.Unknown, id)
		}
	}
	var others []TokenReport // that fail and aren't retired, which come first
	works := false
	for i, t := range r.Tokens {
		if t.Err != nil {
			if t.Retired.IsZero() {
				others = append(others, t)
			}
			if t.Retired.IsZero() || errors.Is(t.Err, ErrAuth) {
				find("%v", t.Err) // else it isn't meant to be used any more
			}
			continue
		}
		works = works || t.Retired.IsZero() || o.Retired == nil || len(others) == 0 || o.Retired(t.KeyToken, others)
		if r.PinError == nil {
			if r.PinError = o.checkOrigin(h.UUID, opened{t.ID, prints[i], v.generation(), v.Signature}); r.PinError != nil {
				find("%v", r.PinError)
			}
		}
		r.Opens = r.PinError == nil && unfit == nil && works
	}
	return r, nil
}
