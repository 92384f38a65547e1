package keyunseal

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/security/keyvault/azkeys"
	"go.uber.org/zap"
)

// The steps of sealing under a vault key:
//
//	1. look at the key, if the identity may: which version, is it fit
//	2. make a random secret and let the vault wrap it with that version, and a
//	   canary likewise
//	3. seal the volume key under the secret (token.go)
//	4. unseal the token again, and the canary (Seal does it)
//
// and of unsealing: let the vault unwrap the secret, open the volume key.

const (
	// RSA keys wrap with this one in vaults and managed HSMs alike. RSA1_5 and
	// RSA-OAEP, which is that with SHA-1, are not accepted.
	algorithmRSA = "RSA-OAEP-256"
	// AES keys of 256 bits, which only HSMs have, wrap with this one: AES key
	// wrap (RFC 3394), 8 bytes longer than what it wraps.
	algorithmAES = "A256KW"

	minRSABytes = 2048 / 8
	maxRSABytes = 4096 / 8
	aesBytes    = KeySize + 8

	// exchangeTimeout bounds one HTTP request to the vault with its answer. The
	// first one to a host includes the name lookup, see http.go.
	exchangeTimeout = 10 * time.Second

	// warnExpiry is how far ahead of a key's expiry Seal warns.
	warnExpiry = 30 * 24 * time.Hour
)

// checkWrapped tells whether a wrapped value has a size that it can have.
func checkWrapped(algorithm string, value []byte) error {
	low, high := minRSABytes, maxRSABytes // as long as the modulus
	if algorithm == algorithmAES {
		low, high = aesBytes, aesBytes
	}
	if n := len(value); n < low || n > high {
		return fmt.Errorf("has %d bytes, want %d to %d", n, low, high)
	}
	return nil
}

// sealVault seals under the key with an id. old, if it isn't nil, is the token that
// the new one is to replace: same tenant, and another version of the key, or
// [ErrCurrent].
func sealVault(ctx context.Context, opts Options, id keyURL, volume string, old *vaultToken, key *[KeySize]byte) (token, error) {
	identity := cmp.Or(opts.Identity, identityManaged)
	tenant := ""
	if old != nil {
		tenant = old.Tenant
	}
	v, err := newVault(opts, id, identity, tenant, volume)
	if err != nil {
		return nil, err
	}

	algorithm := algorithmRSA
	if old != nil {
		algorithm = old.Algorithm // to rotate a key keeps its kind
	}
	info, err := v.get(ctx, id)
	switch e, denied := errors.AsType[*Error](err); {
	case denied && e.Class == ClassDenied && e.Status == http.StatusForbidden:
		// The permission to look is optional. Without it the wrap says which
		// version it used, and the length of the result how long the key is.
		// Whether it's an RSA key nobody says but an old token; in a vault it is.
		opts.log().Warn("the identity may not read the vault key's attributes; expiry and purge protection stay unknown",
			zap.String("kek", id.String()))
	case err != nil:
		return nil, err
	default:
		if err := info.check(); err != nil {
			return nil, err
		}
		info.warn(opts.log(), time.Now())
		id, algorithm = info.id, info.algorithm()
	}
	if old != nil && id.version == old.id.version {
		return nil, fail("rewrap", id.String(), ClassConfig, ErrCurrent)
	}

	var secret, canary [KeySize]byte
	defer clear(secret[:])
	rand.Read(secret[:]) // never fails
	rand.Read(canary[:])
	id, wrapped, err := v.wrap(ctx, id, algorithm, &secret)
	if err != nil {
		return nil, err
	}
	if old != nil && id.version == old.id.version { // not known before, without the permission to look
		return nil, fail("rewrap", id.String(), ClassConfig, ErrCurrent)
	}
	_, wrappedCanary, err := v.wrap(ctx, id, algorithm, &canary)
	if err != nil {
		return nil, err
	}
	canaryHash := sha256.Sum256(canary[:])
	e, err := sealEnvelope(&secret, TypeKeyVault, volume, key)
	if err != nil {
		return nil, fail("seal", id.String(), ClassInternal, err)
	}
	return &vaultToken{
		tokenHead:  newHead(TypeKeyVault),
		KeyID:      id.String(),
		Algorithm:  algorithm,
		Tenant:     v.exchange.tenant,
		Identity:   identity,
		Wrapped:    wrapped,
		Canary:     wrappedCanary,
		CanaryHash: canaryHash[:],
		envelope:   e,
		id:         id,
	}, nil
}

func (t *vaultToken) keyID() string { return t.KeyID }

func (t *vaultToken) describe() Description {
	d := Description{
		Type: t.Type, Version: t.Version,
		KeyID: t.id.newest().String(), KeyVersion: t.id.version, Algorithm: t.Algorithm,
		Identity: t.Identity, Tenant: t.Tenant,
	}
	if t.Algorithm == algorithmRSA {
		d.Bits = 8 * len(t.Wrapped)
	}
	return d
}

func (t *vaultToken) unseal(ctx context.Context, opts Options, volume string, dst *[KeySize]byte) error {
	v, err := t.vault(opts, volume)
	if err != nil {
		return err
	}
	var secret [KeySize]byte
	defer clear(secret[:])
	if err := v.unwrap(ctx, "unwrap", t, t.Wrapped, nil, &secret); err != nil {
		return err
	}
	if err := t.open(&secret, TypeKeyVault, volume, dst); err != nil {
		return fail("unwrap", t.id.String(), ClassIntegrity,
			fmt.Errorf("%w: the token is altered or of another volume, or the vault answered with another secret", err))
	}
	return nil
}

// probe unwraps the canary.
func (t *vaultToken) probe(ctx context.Context, opts Options, volume string) error {
	v, err := t.vault(opts, volume)
	if err != nil {
		return err
	}
	var canary [KeySize]byte
	return v.unwrap(ctx, "probe", t, t.Canary, t.CanaryHash, &canary)
}

// rewrap goes on with the identity that the token was sealed with.
func (t *vaultToken) rewrap(ctx context.Context, opts Options, volume string, key *[KeySize]byte) (token, error) {
	opts.Identity = cmp.Or(opts.Identity, t.Identity)
	return sealVault(ctx, opts, t.id.newest(), volume, t, key)
}

// inspect looks at the version that the token was sealed with and at the newest.
func (t *vaultToken) inspect(ctx context.Context, opts Options, volume string) (KeyStatus, error) {
	v, err := t.vault(opts, volume)
	if err != nil {
		return KeyStatus{}, err
	}
	newest, err := v.get(ctx, t.id.newest())
	if err != nil {
		return KeyStatus{}, err
	}
	used := newest
	if newest.id.version != t.id.version {
		if used, err = v.get(ctx, t.id); err != nil {
			return KeyStatus{}, err
		}
	}
	return KeyStatus{
		Version: t.id.version, Enabled: used.enabled, NotBefore: used.notBefore, Expires: used.expires,
		Newest: newest.id.version, NewestUsable: newest.enabled && newest.validAt(time.Now()),
		Type: newest.kind, Bits: newest.bits, Purgeable: newest.purgeable,
	}, nil
}

// A vault talks to the vault of one key. It isn't used by several goroutines.
type vault struct {
	client   *azkeys.Client
	exchange *exchange
	observe  reporter
}

// vault is the one whose key has sealed t.
func (t *vaultToken) vault(opts Options, volume string) (*vault, error) {
	return newVault(opts, t.id, cmp.Or(opts.Identity, t.Identity), t.Tenant, volume)
}

// newVault makes no request. A tenant that isn't empty is the only one whose
// challenge will be answered.
func newVault(opts Options, id keyURL, identity, tenant, volume string) (*vault, error) {
	where, err := opts.site(id)
	if err != nil {
		class := fileClass(err)
		return nil, &Error{Op: "vault", KeyID: id.String(), Class: class, Local: class == ClassIdentity, Err: err}
	}
	who, err := parseIdentity(identity)
	if err != nil {
		return nil, fail("identity", clean(identity), ClassConfig, err)
	}
	if tenant == "" {
		tenant = who.tenant
	}
	if who.tenant != "" && !strings.EqualFold(who.tenant, tenant) {
		return nil, fail("identity", clean(identity), ClassConfig, fmt.Errorf("is of tenant %s, the vault is in tenant %s", who.tenant, tenant))
	}
	client := newHTTPClient(opts.Transport, where.roots)
	cred, err := newCredential(client, who, where, opts.log())
	if err != nil {
		return nil, classify("identity", id.String(), err)
	}
	x := &exchange{resource: where.resource, tenant: tenant}
	options := &azkeys.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: client,
		Retry:     policy.RetryOptions{MaxRetries: -1}, // none: the caller owns the timing
		// The vault's log shows the user agent: it tells which volume called where
		// many hosts share an identity. The limit is 24 characters.
		Telemetry:        policy.TelemetryOptions{ApplicationID: "hostcryptd-" + volume[:8]},
		PerCallPolicies:  []policy.Policy{runtime.NewRequestIDPolicy()},
		PerRetryPolicies: []policy.Policy{x},
	}}
	kc, err := azkeys.NewClient(id.vault(), cred, options)
	if err != nil {
		return nil, fail("vault", id.String(), ClassInternal, err)
	}
	return &vault{client: kc, exchange: x, observe: opts.Observe}, nil
}

// keyInfo is what Seal wants to know of a key before it relies on it.
type keyInfo struct {
	id         keyURL // with version
	kind       string // "RSA", "RSA-HSM", "oct-HSM"
	bits       int    // of an RSA key
	modulus    []byte
	exponent   []byte
	operations []string
	enabled    bool
	notBefore  time.Time // zero for none
	expires    time.Time // zero for never
	purgeable  bool      // anyone with the permission may destroy it for good
}

// algorithm is the one by which the key wraps.
func (k *keyInfo) algorithm() string {
	if k.kind == string(azkeys.KeyTypeOctHSM) {
		return algorithmAES
	}
	return algorithmRSA
}

func (k *keyInfo) validAt(t time.Time) bool {
	return !t.Before(k.notBefore) && (k.expires.IsZero() || t.Before(k.expires))
}

func (k *keyInfo) check() error {
	refuse := func(format string, args ...any) error {
		return fail("get", k.id.String(), ClassConfig, fmt.Errorf(format, args...))
	}
	if !k.enabled {
		// Wrapping with a disabled key is reported to work; unwrapping doesn't.
		return &Error{Op: "get", KeyID: k.id.String(), Class: ClassKeyUnusable, Code: "KeyDisabled", Err: errors.New("the key is disabled")}
	}
	switch k.kind {
	case string(azkeys.KeyTypeRSA), string(azkeys.KeyTypeRSAHSM):
		if k.bits < 8*minRSABytes || k.bits > 8*maxRSABytes {
			return refuse("is an RSA key of %d bits, want %d to %d", k.bits, 8*minRSABytes, 8*maxRSABytes)
		}
	case string(azkeys.KeyTypeOctHSM):
	default:
		return refuse("is a key of type %.20q; it has to be RSA, RSA-HSM or oct-HSM", k.kind)
	}
	for _, op := range []string{"wrapKey", "unwrapKey"} {
		if !slices.Contains(k.operations, op) {
			return refuse("doesn't permit the operation %s", op)
		}
	}
	return nil
}

func (k *keyInfo) warn(log *zap.Logger, now time.Time) {
	if k.purgeable {
		log.Warn("the vault has no purge protection: whoever may purge its keys can destroy this volume's data for good",
			zap.String("kek", k.id.String()))
	}
	if !k.expires.IsZero() && k.expires.Sub(now) < warnExpiry {
		log.Warn("the vault key expires soon; it will still unseal, but not seal",
			zap.String("kek", k.id.String()), zap.Time("expires", k.expires))
	}
}

// get reads the attributes of id, of its newest version if id has none.
func (v *vault) get(ctx context.Context, id keyURL) (*keyInfo, error) {
	var resp azkeys.GetKeyResponse
	var got keyURL
	err := v.call("get", id, func() (err error) {
		if resp, err = v.client.GetKey(ctx, id.name, id.version, nil); err != nil {
			return err
		}
		if resp.Key == nil || resp.Key.KID == nil || resp.Key.Kty == nil || resp.Attributes == nil {
			return &Error{Class: ClassMalformed, Err: errors.New("the answer lacks the key, its type or its attributes")}
		}
		got, err = answeredID(id, resp.Key.KID)
		return err
	})
	if err != nil {
		return nil, err
	}
	info := &keyInfo{
		id: got, kind: clean(string(*resp.Key.Kty)), bits: 8 * len(bytes.TrimLeft(resp.Key.N, "\x00")),
		modulus: resp.Key.N, exponent: resp.Key.E,
		enabled: resp.Attributes.Enabled != nil && *resp.Attributes.Enabled,
	}
	for _, op := range resp.Key.KeyOps {
		if op != nil {
			info.operations = append(info.operations, string(*op))
		}
	}
	if resp.Attributes.NotBefore != nil {
		info.notBefore = *resp.Attributes.NotBefore
	}
	if resp.Attributes.Expires != nil {
		info.expires = *resp.Attributes.Expires
	}
	if l := resp.Attributes.RecoveryLevel; l != nil {
		info.purgeable = strings.Contains(*l, "Purgeable")
	}
	return info, nil
}

// wrap returns the wrapped secret and the versioned id of the key that wrapped it.
func (v *vault) wrap(ctx context.Context, id keyURL, algorithm string, secret *[KeySize]byte) (keyURL, []byte, error) {
	alg := azkeys.EncryptionAlgorithm(algorithm)
	var resp azkeys.WrapKeyResponse
	var got keyURL
	err := v.call("wrap", id, func() (err error) {
		resp, err = v.client.WrapKey(ctx, id.name, id.version, azkeys.KeyOperationParameters{Algorithm: &alg, Value: secret[:]}, nil)
		if err != nil {
			return err
		}
		if got, err = answered(id, resp.KeyOperationResult); err != nil {
			return err
		}
		if err := checkWrapped(algorithm, resp.Result); err != nil {
			return &Error{Class: ClassIntegrity, Err: fmt.Errorf("the value in the answer %w", err)}
		}
		if bytes.Contains(resp.Result, secret[:]) {
			return &Error{Class: ClassIntegrity, Err: errors.New("the answer holds the secret in the clear")}
		}
		return nil
	})
	if err != nil {
		return keyURL{}, nil, err
	}
	return got, resp.Result, nil
}

// unwrap writes what the vault unwraps to dst. The token's key id has a version:
// without one the vault would try its newest, which after a rotation is not the
// one that wrapped. sum, if not nil, is the SHA-256 of what it has to be.
func (v *vault) unwrap(ctx context.Context, op string, t *vaultToken, wrapped, sum []byte, dst *[KeySize]byte) error {
	id := t.id
	alg := azkeys.EncryptionAlgorithm(t.Algorithm)
	var resp azkeys.UnwrapKeyResponse
	err := v.call(op, id, func() (err error) {
		resp, err = v.client.UnwrapKey(ctx, id.name, id.version, azkeys.KeyOperationParameters{Algorithm: &alg, Value: wrapped}, nil)
		if err != nil {
			return err
		}
		if _, err := answered(id, resp.KeyOperationResult); err != nil {
			return err
		}
		if n := len(resp.Result); n != KeySize {
			return &Error{Class: ClassIntegrity, Err: fmt.Errorf("the answer has a value of %d bytes, want %d", n, KeySize)}
		}
		if got := sha256.Sum256(resp.Result); sum != nil && !bytes.Equal(got[:], sum) {
			return &Error{Class: ClassIntegrity, Err: errors.New("the canary unwraps to something else than was wrapped")}
		}
		return nil
	})
	defer clear(resp.Result)
	if err != nil {
		return err
	}
	copy(dst[:], resp.Result)
	return nil
}

// call runs one SDK call, with the check of its answer: what is observed is how
// that went too. The SDK can panic on a malformed answer; only the
// stack says where, so it goes to the error.
func (v *vault) call(op string, id keyURL, f func() error) (err error) {
	begun := time.Now()
	v.exchange.requests, v.exchange.clientRequestID, v.exchange.requestID = 0, "", ""
	defer func() {
		v.observe.tell(op, id, v.exchange, time.Since(begun), err)
	}()
	defer func() {
		if p := recover(); p != nil {
			err = fail(op, id.String(), ClassInternal, fmt.Errorf("the Azure SDK panicked: %v: %s", p, panicSite(debug.Stack())))
		}
	}()
	return classify(op, id.String(), f())
}

// panicSite returns the function that panicked. Arguments are cut off: they may
// be words of a secret.
func panicSite(stack []byte) string {
	lines := strings.Split(string(stack), "\n")
	for i, l := range lines {
		if strings.HasPrefix(l, "panic(") && i+2 < len(lines) {
			site := lines[i+2]
			if j := strings.LastIndexByte(site, '('); j > 0 {
				site = site[:j]
			}
			return "in " + site
		}
	}
	return "in an unknown function"
}

// errEmpty is about `200 {}` and the like, to which the SDK says no error.
var errEmpty = errors.New("the answer is empty")

// answered checks that an answer is one, and about the key that was asked for.
func answered(asked keyURL, r azkeys.KeyOperationResult) (keyURL, error) {
	if r.KID == nil && len(r.Result) == 0 {
		return keyURL{}, &Error{Class: ClassMalformed, Err: errEmpty}
	}
	return answeredID(asked, r.KID)
}

// answeredID parses the key id of an answer and checks that it's about the key
// that was asked for. The SDK checks nothing; to `200 {}` it says no error.
func answeredID(asked keyURL, kid *azkeys.ID) (keyURL, error) {
	wrong := func(format string, args ...any) (keyURL, error) {
		return keyURL{}, &Error{Class: ClassIntegrity, Err: fmt.Errorf(format, args...)}
	}
	if kid == nil {
		return wrong("the answer has no key id")
	}
	got, err := parseKeyURL(string(*kid))
	if err != nil {
		return wrong("the answer's key id: %w", err)
	}
	if !asked.answers(got) {
		return wrong("the answer is about %s", got)
	}
	got.name = asked.name // one spelling in everything we store and show
	return got, nil
}
