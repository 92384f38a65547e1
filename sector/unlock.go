package sector

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"hostcryptd/sector/luks2"
)

// A KeyToken is a token that holds the volume key, without what is secret.
type KeyToken struct {
	ID   int             `json:"id"`
	Type string          `json:"type"`
	Text json.RawMessage `json:"text"` // the token

	// Retired is when another token took its place, or zero. It opens the volume
	// as before, and goes with the first change of the header after KeepUntil.
	Retired   time.Time `json:"retired,omitzero"`
	KeepUntil time.Time `json:"keep_until,omitzero"`
}

// retirement are the members that this package adds to a token. They stand
// under the header's MAC; the tokens' owner ignores them.
type retirement struct {
	Retired   time.Time `json:"retired,omitzero"`
	KeepUntil time.Time `json:"keep_until,omitzero"`
}

// KeyTokens lists the tokens that hold the volume key, in the order in which
// [Open] tries them. What it says is authentic only when the volume was opened.
func KeyTokens(h *luks2.Header) []KeyToken { return keyTokens(h) }

func keyTokens(h *luks2.Header) []KeyToken {
	var list []KeyToken
	for _, id := range slices.Sorted(maps.Keys(h.Tokens)) {
		t := h.Tokens[id]
		if !isKeyToken(t) {
			continue
		}
		k := KeyToken{ID: id, Type: t.Type}
		k.Text, _ = t.MarshalJSON() // of what was JSON before
		var r retirement
		if json.Unmarshal(k.Text, &r) == nil {
			k.Retired, k.KeepUntil = r.Retired, r.KeepUntil
		}
		list = append(list, k)
	}
	slices.SortStableFunc(list, func(a, b KeyToken) int {
		switch {
		case a.Retired.IsZero() == b.Retired.IsZero():
			return a.ID - b.ID
		case a.Retired.IsZero():
			return -1
		}
		return 1
	})
	return list
}

// Generation returns the generation that a header claims; it's authentic only
// when the volume was opened.
func Generation(h *luks2.Header) (uint64, error) {
	_, v, err := findVolumeToken(h)
	if err != nil {
		return 0, err
	}
	return v.generation(), nil
}

// opened says how a header was unlocked.
type opened struct {
	token       int
	fingerprint string // of the volume key
	generation  uint64
	signature   *Signature // that the header has, or nil
}

// unlock fills k with the volume key and the DEK of h, by any token but those of
// skip.
func unlock(ctx context.Context, h *luks2.Header, k *keys, unseal Unsealer, o OpenOptions, skip ...int) (opened, error) {
	v, err := supported(h)
	if err != nil {
		return opened{}, err
	}
	tokens := slices.DeleteFunc(keyTokens(h), func(t KeyToken) bool {
		return slices.Contains(skip, t.ID) || o.SkipRetired && !t.Retired.IsZero()
	})
	if len(tokens) == 0 {
		if len(skip) > 0 || o.SkipRetired {
			return opened{}, tokensFailed{errors.New("there is no other token that is not retired")}
		}
		back := "'hostcryptd key add --recovery-key' makes one with its recovery key"
		if !takesRecovery(h, v) {
			back = "it can be opened with its recovery key and 'cryptsetup open'"
		}
		return opened{}, fmt.Errorf("%w: no token is left that holds its key; %s", ErrNotVolume, back)
	}
	headStart := o.HeadStart
	if headStart == 0 {
		headStart = DefaultHeadStart
	}

	ctx, cancel := context.WithCancel(ctx)
	results := make(chan attempt, len(tokens))
	running, next := 0, 0
	defer func() {
		cancel()
		// Those who are late wipe what they got.
		go func() {
			for range running {
				(<-results).keys.free()
			}
		}()
	}()
	var later <-chan time.Time
	may := len(tokens) // how many may be tried
	if o.Retired != nil {
		if i := slices.IndexFunc(tokens, func(t KeyToken) bool { return !t.Retired.IsZero() }); i > 0 {
			may = i
		}
	}
	start := func() {
		i := next
		next++
		running++
		go func() { results <- try(ctx, h, i, tokens[i], unseal, o) }()
		later = nil
		if next < may {
			later = time.After(headStart)
		}
	}
	failed := make([]TokenReport, len(tokens))
	start()
	for running > 0 {
		select {
		case <-later:
			start()
		case a := <-results:
			running--
			if a.err == nil {
				// Not by a tuple assignment, which goes through the stack.
				copy(k.volumeKey[:], a.keys.volumeKey[:])
				copy(k.dek[:], a.keys.dek[:])
				return opened{a.token, a.fingerprint, v.generation(), v.Signature}, a.keys.free()
			}
			failed[a.index] = TokenReport{KeyToken: tokens[a.index], Err: a.err}
			if running == 0 && may < len(tokens) && next == may && ctx.Err() == nil {
				others := failed[:may]
				tokens = slices.DeleteFunc(tokens, func(t KeyToken) bool { return !t.Retired.IsZero() && !o.Retired(t, others) })
				may = len(tokens)
			}
			if next < may && ctx.Err() == nil {
				start()
			}
		}
	}
	var errs []error
	for _, t := range failed {
		errs = append(errs, t.Err)
	}
	return opened{}, tokensFailed{errors.Join(errs...)}
}

// tokensFailed is the error of unlock when none of the tokens that may opens the
// volume.
type tokensFailed struct{ error }

func (e tokensFailed) Unwrap() error { return e.error }

// An attempt is how a token was tried. Only one without an error has keys.
type attempt struct {
	index, token int
	keys         *keys
	fingerprint  string
	err          error
}

// tryGrace is what an unsealer gets to return in after its time has ended.
const tryGrace = 3 * time.Second

// try tries one token, with keys of its own. It returns in time also when unseal
// doesn't; the keys are then freed when that returns.
func try(ctx context.Context, h *luks2.Header, index int, t KeyToken, unseal Unsealer, o OpenOptions) attempt {
	limit := o.TryTimeout
	if limit == 0 {
		limit = DefaultTryTimeout
	}
	a := attempt{index: index, token: t.ID}
	fail := func(err error) attempt {
		return attempt{index: index, token: t.ID, err: fmt.Errorf("token %d (%s): %w", t.ID, t.Type, err)}
	}
	var err error
	if a.keys, err = newKeys(0); err != nil {
		return fail(err)
	}
	late := fmt.Errorf("no answer in %v: %w", limit, context.DeadlineExceeded)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, late)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		err := unseal(ctx, h.UUID, t.Text, a.keys.volumeKey)
		if err == nil {
			a.fingerprint, err = derive(ctx, h, a.keys, o.Derive)
		}
		done <- err
	}()
	hung := make(chan struct{})
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(tryGrace, func() { close(hung) }) })
	defer stop()
	select {
	case err = <-done:
	case <-hung:
		go func() { <-done; a.keys.free() }()
		return fail(context.Cause(ctx))
	}
	if err != nil {
		a.keys.free()
		return fail(err)
	}
	return a
}
