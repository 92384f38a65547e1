package keyunseal

import (
	"bytes"
	"context"
	"crypto/rand"
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
//	2. make a random secret and let the vault wrap it with that version
//	3. seal the volume key under the secret (token.go)
//	4. unseal the token again (Seal does it)
//
// and of unsealing: let the vault unwrap the secret, open the volume key.

const (
	vaultAlgorithm = "RSA-OAEP-256"
	minRSABytes    = 2048 / 8
	maxRSABytes    = 4096 / 8

	// exchangeTimeout bounds one HTTP request to the vault with its answer. The
	// first one to a host includes the name lookup, see http.go.
	exchangeTimeout = 10 * time.Second

	// warnExpiry is how far ahead of a key's expiry Seal warns.
	warnExpiry = 30 * 24 * time.Hour
)

func sealVault(ctx context.Context, opts Options, spec, volume string, key *[KeySize]byte) (*vaultToken, error) {
	id, err := parseKeyURL(spec)
	if err != nil {
		if strings.Contains(spec, "@") {
			spec = "" // it may hold a password
		}
		return nil, fail("seal", clean(spec), ClassConfig, err)
	}
	identity := opts.Identity
	if identity == "" {
		identity = identityManaged
	}
	v, err := newVault(opts, id, identity, "", volume)
	if err != nil {
		return nil, err
	}

	info, err := v.get(ctx, id)
	switch e, denied := errors.AsType[*Error](err); {
	case denied && e.Class == ClassDenied && e.Status == http.StatusForbidden:
		// The permission to look is optional. Without it the wrap says which
		// version it used, and the length of the result how long the key is.
		opts.log().Warn("the identity may not read the vault key's attributes; expiry and purge protection stay unknown",
			zap.String("kek", id.String()))
	case err != nil:
		return nil, err
	default:
		if err := info.check(); err != nil {
			return nil, fail("get", id.String(), ClassConfig, err)
		}
		info.warn(opts.log(), time.Now())
		id = info.id
	}

	var secret [KeySize]byte
	defer clear(secret[:])
	rand.Read(secret[:]) // never fails
	id, wrapped, err := v.wrap(ctx, id, &secret)
	if err != nil {
		return nil, err
	}
	e, err := sealEnvelope(&secret, TypeKeyVault, volume, key)
	if err != nil {
		return nil, fail("seal", id.String(), ClassInternal, err)
	}
	return &vaultToken{
		tokenHead: newHead(TypeKeyVault),
		KeyID:     id.String(),
		Algorithm: vaultAlgorithm,
		Tenant:    v.exchange.tenant,
		Identity:  identity,
		Wrapped:   wrapped,
		envelope:  e,
		id:        id,
	}, nil
}

func unsealVault(ctx context.Context, opts Options, t *vaultToken, volume string, dst *[KeySize]byte) error {
	identity := opts.Identity
	if identity == "" {
		identity = t.Identity
	}
	v, err := newVault(opts, t.id, identity, t.Tenant, volume)
	if err != nil {
		return err
	}
	var secret [KeySize]byte
	defer clear(secret[:])
	if err := v.unwrap(ctx, t.id, t.Wrapped, &secret); err != nil {
		return err
	}
	if err := t.open(&secret, TypeKeyVault, volume, dst); err != nil {
		return fail("unwrap", t.id.String(), ClassIntegrity,
			fmt.Errorf("%w: the token is altered or of another volume, or the vault answered with another secret", err))
	}
	return nil
}

// A vault talks to the vault of one key. It isn't used by several goroutines.
type vault struct {
	client   *azkeys.Client
	exchange *exchange
}

// newVault makes no request. A tenant that isn't empty is the only one whose
// challenge will be answered.
func newVault(opts Options, id keyURL, identity, tenant, volume string) (*vault, error) {
	client := newHTTPClient(opts.Transport)
	cred, err := newCredential(client, identity)
	if err != nil {
		return nil, fail("identity", identity, ClassConfig, err)
	}
	x := &exchange{resource: id.resource(), tenant: tenant}
	options := &azkeys.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: client,
		Retry:     policy.RetryOptions{MaxRetries: -1}, // none: Retry owns the timing
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
	return &vault{client: kc, exchange: x}, nil
}

// keyInfo is what Seal wants to know of a key before it relies on it.
type keyInfo struct {
	id         keyURL // with version
	rsa        bool
	bits       int
	operations []string
	expires    time.Time // zero for never
	purgeable  bool      // anyone with the permission may destroy it for good
}

func (k *keyInfo) check() error {
	if !k.rsa {
		return errors.New("is not an RSA key")
	}
	if k.bits < 8*minRSABytes || k.bits > 8*maxRSABytes {
		return fmt.Errorf("is an RSA key of %d bits, want %d to %d", k.bits, 8*minRSABytes, 8*maxRSABytes)
	}
	for _, op := range []string{"wrapKey", "unwrapKey"} {
		if !slices.Contains(k.operations, op) {
			return fmt.Errorf("doesn't permit the operation %s", op)
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
	err := v.call("get", id, func() (err error) {
		resp, err = v.client.GetKey(ctx, id.name, id.version, nil)
		return err
	})
	if err != nil {
		return nil, err
	}
	if resp.Key == nil || resp.Key.KID == nil || resp.Key.Kty == nil || resp.Attributes == nil {
		return nil, fail("get", id.String(), ClassIntegrity, errors.New("the answer lacks the key, its type or its attributes"))
	}
	got, err := answeredID(id, resp.Key.KID)
	if err != nil {
		return nil, fail("get", id.String(), ClassIntegrity, err)
	}
	if a := resp.Attributes; a.Enabled == nil || !*a.Enabled {
		// Wrapping with a disabled key is reported to work; unwrapping doesn't.
		return nil, &Error{Op: "get", KeyID: got.String(), Class: ClassKeyUnusable, Code: "KeyDisabled", Err: errors.New("the key is disabled")}
	}

	info := &keyInfo{id: got}
	switch *resp.Key.Kty {
	case azkeys.KeyTypeRSA, azkeys.KeyTypeRSAHSM:
		info.rsa = true
		info.bits = 8 * len(bytes.TrimLeft(resp.Key.N, "\x00"))
	}
	for _, op := range resp.Key.KeyOps {
		if op != nil {
			info.operations = append(info.operations, string(*op))
		}
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
func (v *vault) wrap(ctx context.Context, id keyURL, secret *[KeySize]byte) (keyURL, []byte, error) {
	alg := azkeys.EncryptionAlgorithmRSAOAEP256
	var resp azkeys.WrapKeyResponse
	err := v.call("wrap", id, func() (err error) {
		resp, err = v.client.WrapKey(ctx, id.name, id.version, azkeys.KeyOperationParameters{Algorithm: &alg, Value: secret[:]}, nil)
		return err
	})
	if err != nil {
		return keyURL{}, nil, err
	}
	got, err := answeredID(id, resp.KID)
	if err != nil {
		return keyURL{}, nil, fail("wrap", id.String(), ClassIntegrity, err)
	}
	if n := len(resp.Result); n < minRSABytes || n > maxRSABytes {
		return keyURL{}, nil, fail("wrap", id.String(), ClassIntegrity, fmt.Errorf("the answer has a value of %d bytes, want %d to %d", n, minRSABytes, maxRSABytes))
	}
	if bytes.Contains(resp.Result, secret[:]) {
		return keyURL{}, nil, fail("wrap", id.String(), ClassIntegrity, errors.New("the answer holds the secret in the clear"))
	}
	return got, resp.Result, nil
}

// unwrap writes the secret to dst. id has a version: without one the vault would
// try its newest, which after a rotation is not the one that wrapped.
func (v *vault) unwrap(ctx context.Context, id keyURL, wrapped []byte, dst *[KeySize]byte) error {
	alg := azkeys.EncryptionAlgorithmRSAOAEP256
	var resp azkeys.UnwrapKeyResponse
	err := v.call("unwrap", id, func() (err error) {
		resp, err = v.client.UnwrapKey(ctx, id.name, id.version, azkeys.KeyOperationParameters{Algorithm: &alg, Value: wrapped}, nil)
		return err
	})
	if err != nil {
		return err
	}
	defer clear(resp.Result)
	if _, err := answeredID(id, resp.KID); err != nil {
		return fail("unwrap", id.String(), ClassIntegrity, err)
	}
	if n := len(resp.Result); n != KeySize {
		return fail("unwrap", id.String(), ClassIntegrity, fmt.Errorf("the answer has a value of %d bytes, want %d", n, KeySize))
	}
	copy(dst[:], resp.Result)
	return nil
}

// call runs one SDK call. The SDK can panic on a malformed answer; only the
// stack says where, so it goes to the error.
func (v *vault) call(op string, id keyURL, f func() error) (err error) {
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

// answeredID parses the key id of an answer and checks that it's about the key
// that was asked for. The SDK checks nothing; to `200 {}` it says no error.
func answeredID(asked keyURL, kid *azkeys.ID) (keyURL, error) {
	if kid == nil {
		return keyURL{}, errors.New("the answer has no key id")
	}
	got, err := parseKeyURL(string(*kid))
	if err != nil {
		return keyURL{}, fmt.Errorf("the answer's key id: %w", err)
	}
	if !asked.answers(got) {
		return keyURL{}, fmt.Errorf("the answer is about %s", got)
	}
	got.name = asked.name // one spelling in everything we store and show
	return got, nil
}
