package keyunseal

import (
	"context"
	"encoding/json"
	"errors"
	"time"
)

// What a daemon does with a token while its volume is unlocked: look whether the
// KEK still may be used, look for a newer version, and rewrap.

// ErrCurrent means that there is no newer version of the KEK to rewrap with.
var ErrCurrent = errors.New("the token is sealed with the newest version of its key")

// Probe looks whether the KEK of a token would unwrap now, without unwrapping
// what opens the volume: a vault unwraps the token's canary, a host key file has
// to be there and the right one, a TPM has to give out the token's secret, which
// isn't used. It's the only look that tells: a disabled key can be read, and is
// reported to wrap.
func Probe(ctx context.Context, opts Options, raw json.RawMessage, volume string) error {
	t, volume, err := parse("probe", raw, volume)
	if err != nil {
		return err
	}
	return t.probe(ctx, opts, volume)
}

// A KeyStatus is what a vault says of a token's key.
type KeyStatus struct {
	Version      string    `json:"version"` // that the token was sealed with
	Enabled      bool      `json:"enabled"`
	NotBefore    time.Time `json:"not_before,omitzero"`
	Expires      time.Time `json:"expires,omitzero"`
	Newest       string    `json:"newest"`        // version
	NewestUsable bool      `json:"newest_usable"` // it's enabled and in its time
	Type         string    `json:"type"`          // "RSA", "RSA-HSM", "oct-HSM"
	Bits         int       `json:"bits,omitempty"`
	Purgeable    bool      `json:"purgeable"` // the vault has no purge protection
}

// Stale tells whether there is a newer version to rewrap with.
func (k KeyStatus) Stale() bool { return k.NewestUsable && k.Newest != k.Version }

// ErrNoStatus means that the KEK has no versions and no attributes: a host
// key or a TPM.
var ErrNoStatus = errors.New("this kind of key has no versions")

// Inspect asks a vault about the key of a token. The permission to do so is
// optional: without it the error is of [ClassDenied].
func Inspect(ctx context.Context, opts Options, raw json.RawMessage, volume string) (KeyStatus, error) {
	t, volume, err := parse("inspect", raw, volume)
	if err != nil {
		return KeyStatus{}, err
	}
	if t, ok := t.(*vaultToken); ok {
		return t.inspect(ctx, opts, volume)
	}
	return KeyStatus{}, fail("inspect", "", ClassConfig, ErrNoStatus)
}

// Rewrap seals key anew under the newest version of the KEK of a token, with the
// same identity in the same tenant, and returns the new token, after unsealing
// it. Without a newer version the error has [ErrCurrent] in its chain. The old
// token goes on being good as long as its version may be used.
//
// A TPM has no versions. There Rewrap seals to the PCRs as they are now, if they
// have changed, or with the TPM of this host, if the token is another's.
func Rewrap(ctx context.Context, opts Options, raw json.RawMessage, volume string, key *[KeySize]byte) (json.RawMessage, error) {
	old, volume, err := parse("rewrap", raw, volume)
	if err != nil {
		return nil, err
	}
	fresh, err := old.rewrap(ctx, opts, volume, key)
	if err != nil {
		return nil, err
	}
	return verified(ctx, opts, fresh, volume, key)
}

// An Exchange is one use of a KEK, for an audit: what was asked and how it went.
// It holds nothing secret.
type Exchange struct {
	Op              string        `json:"op"`                    // "get", "wrap", "unwrap", "probe"
	KeyID           string        `json:"key_id"`                // without version
	KeyVersion      string        `json:"key_version,omitempty"` // "" for the newest
	Class           string        `json:"class,omitempty"`       // of the error; "" if there was none
	Code            string        `json:"code,omitempty"`
	Status          int           `json:"status,omitempty"`
	Duration        time.Duration `json:"duration"`           // ns, with the time to get a token
	Requests        int           `json:"requests,omitempty"` // HTTP requests to the vault; the first has no token, and is 1 of 2
	ClientRequestID string        `json:"client_request_id,omitempty"`
	RequestID       string        `json:"request_id,omitempty"` // x-ms-request-id
}

// OK tells whether it worked.
func (x *Exchange) OK() bool { return x.Class == "" }

// observeHere observes a use of a KEK of this host, when that returns.
func (o Options) observeHere(op, keyID string, begun time.Time, err *error) {
	reporter(o.Observe).observe(Exchange{Op: op, KeyID: keyID, Duration: time.Since(begun)}, *err)
}

// sealHere observes f, which seals under a KEK of this host. where names the KEK as
// long as no token does.
func (o Options) sealHere(where string, f func() (token, error)) (t token, err error) {
	begun := time.Now()
	if t, err = f(); err == nil {
		where = t.keyID()
	}
	o.observeHere("wrap", where, begun, &err)
	return t, err
}

// A reporter is Options.Observe; nil observes nothing.
type reporter func(Exchange)

// tell observes an exchange with a vault.
func (o reporter) tell(op string, id keyURL, x *exchange, took time.Duration, err error) {
	o.observe(Exchange{
		Op: op, KeyID: id.newest().String(), KeyVersion: id.version, Duration: took,
		Requests: x.requests, ClientRequestID: x.clientRequestID, RequestID: x.requestID,
	}, err)
}

func (o reporter) observe(x Exchange, err error) {
	if o == nil {
		return
	}
	if e, ok := errors.AsType[*Error](err); ok {
		x.Class, x.Code, x.Status = e.Class.String(), e.Code, e.Status
		if e.RequestID != "" {
			x.RequestID = e.RequestID
		}
	} else if err != nil {
		x.Class = ClassInternal.String()
	}
	o(x)
}
