// Package keyunseal seals a volume key under a key encryption key (KEK) and
// unseals it again.
//
// The result of [Seal] is a token: a LUKS2 JSON object that the caller stores
// in the header and that says everything [Unseal] needs except the KEK. Three
// kinds of KEKs exist: a key in Azure Key Vault or in a Managed HSM, the storage root key of
// this host's TPM, and the host key, 32 random bytes in a file of this host.
// FORMAT.md specifies the tokens.
//
// Afterwards [Probe] looks whether the KEK may still be used, [Inspect] whether
// there is a newer version of it, and [Rewrap] seals under that one.
//
// Most callers want [Child], which has the same calls and runs each of them in a
// short-lived process of its own. The Azure SDK, its HTTP and TLS
// buffers, its tokens and its panics then never share an address space with
// the process that serves the volume.
//
// # Secrets
//
// The caller owns the volume key; Unseal fills the caller's array, and only
// when it succeeds. No error, log line, argument or environment variable holds
// key material. A vault never sees the volume key: what it wraps is a random
// secret made for that one token, and the volume key is sealed under that
// secret together with the volume's UUID. So a token can't be moved to another
// volume, and an answer with the wrong plaintext is noticed here.
//
// # Errors
//
// Every error is an [*Error]. Its [Class] says what a caller would do about it;
// [Error.Transient] says whether trying again can help, [Error.Denied] whether it
// was an authoritative no. Nothing here tries again, nor does the Azure SDK: one
// loop owns the timing, package lifecycle.
//
// All functions may be called from several goroutines at once.
package keyunseal

import (
	"bytes"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"go.uber.org/zap"
)

// KeySize is the length of a volume key in bytes.
const KeySize = 32

// DefaultHostKey is the host key file that an empty [Options.HostKey] means. It is
// not in /var, which may be on a volume that needs it.
const DefaultHostKey = "/etc/hostcryptd/host.key"

// Token types, the "type" member of the JSON object.
const (
	TypeHostKey  = "hostcryptd-hostkey"
	TypeTPM      = "hostcryptd-tpm2"
	TypeKeyVault = "hostcryptd-akv"
)

// Specs of KEKs, beside the URLs of vault keys.
const (
	// SpecPlatform is the KEK that needs no configuration: the TPM if this host
	// has one, else the host key file. The token's type records which it was. A
	// TPM that is there and doesn't work is an error: it's never passed over.
	SpecPlatform = "platform"
	// SpecTPM is the TPM. "tpm:7+11" chooses the PCRs; without it's PCR 7.
	SpecTPM = "tpm"
	// SpecHostKey is the host key file of [Options.HostKey]. "host-key:FILE" is another
	// one, for a host key that is to take the place of that.
	SpecHostKey = "host-key"
)

// ErrNotOurs is in the chain of errors about a token of a type that this
// package doesn't know. Other programs' tokens share the header, so a caller
// that goes through all tokens skips those.
var ErrNotOurs = errors.New("not a token of hostcryptd")

// Options are the parts of a KEK's configuration that a token doesn't hold.
// The zero value is what a host with defaults uses. What can cross to a [Child] is its
// JSON.
type Options struct {
	// HostKey is the path of the host key file; empty means [DefaultHostKey].
	HostKey string `json:"host_key,omitempty"`

	// OtherHostKey, if not empty, is the path of another host key file, of which a token
	// may be that isn't of HostKey.
	OtherHostKey string `json:"other_host_key,omitempty"`

	// TPM is the path of the TPM's device, or of the socket of a software TPM;
	// empty means [DefaultTPM], [NoTPM] that there is none.
	TPM string `json:"tpm,omitempty"`

	// Identity names whose permissions open the vault, in one of these forms:
	//
	//	managed                            that the system assigned to this Azure VM
	//	managed:CLIENT-ID                  a user assigned one
	//	managed-object:OBJECT-ID           the same, by its object
	//	managed-resource:RESOURCE-ID       the same, by its Azure resource
	//	arc                                that of the Azure Arc agent on this host
	//	workload:TENANT:CLIENT-ID[:FILE]   federated: FILE holds another issuer's token
	//	certificate:TENANT:CLIENT-ID:FILE  FILE holds a certificate and its key in PEM
	//
	// Exactly this one is used, whatever the environment says. Empty means
	// "managed" to Seal, and to Unseal the identity that the token was sealed with.
	Identity string `json:"identity,omitempty"`

	// Cloud is the path of the file that describes a private cloud; empty means
	// [DefaultCloud]. Vaults of the public clouds don't need it.
	Cloud string `json:"cloud,omitempty"`

	// Log receives warnings about a KEK that works but shouldn't be relied on.
	// Nil means no log.
	Log *zap.Logger `json:"-"`

	// Observe, if not nil, is told of every use of a KEK, good or bad. It's
	// called by the goroutine that called this package.
	Observe func(Exchange) `json:"-"`

	// Transport carries every HTTP request to the vault and to the identity
	// endpoint; nil means direct connections that check certificates against the
	// system's roots. It's for tests: it can't be set from outside the program.
	Transport http.RoundTripper `json:"-"`
}

func (o Options) log() *zap.Logger {
	if o.Log == nil {
		return zap.NewNop()
	}
	return o.Log
}

// Seal wraps key with the KEK that spec names and returns the token. Spec is one
// of the specs above or the URL of a key in Key Vault or in a Managed HSM, with
// or without a version; volume is the UUID of the volume.
//
// Sealing under the host key makes the host key file if there is none.
// A version that the URL doesn't name is the newest one now, and the token
// records which one that was.
//
// Seal returns a token only after it has unsealed that token the way Unseal
// will: a KEK that wraps and then refuses to unwrap, as a disabled vault key is
// reported to do, is an error here and not at the next boot.
func Seal(ctx context.Context, opts Options, spec, volume string, key *[KeySize]byte) (json.RawMessage, error) {
	volume, err := canonicalUUID(volume)
	if err != nil {
		return nil, fail("seal", spec, ClassConfig, err)
	}
	kek := spec
	if spec == SpecPlatform {
		have, err := opts.HaveTPM()
		if err != nil {
			return nil, err
		}
		if have {
			kek = SpecTPM
			opts.log().Info("this host has a TPM, which becomes the key", zap.String("tpm", opts.tpm()))
		} else {
			kek = SpecHostKey
			opts.log().Info("this host has no TPM; the host key file becomes the key", zap.String("tpm", opts.tpm()), zap.String("host_key", opts.hostKey()))
		}
	}
	var t token
	switch pcrs, chosen := strings.CutPrefix(kek, SpecTPM+":"); {
	case kek == SpecHostKey:
		t, err = opts.sealHere(opts.hostKey(), func() (token, error) { return sealHostKey(opts.hostKey(), volume, key) })
	case OtherHostKey(kek) != "":
		opts.OtherHostKey = OtherHostKey(kek)
		t, err = opts.sealHere(opts.OtherHostKey, func() (token, error) { return sealHostKey(opts.OtherHostKey, volume, key) })
	case kek == SpecTPM || chosen && pcrs != "":
		selected := defaultPCRs
		if chosen {
			if selected, err = parsePCRs(pcrs); err != nil {
				return nil, fail("seal", clean(spec), ClassConfig, err)
			}
		}
		t, err = opts.sealHere(opts.tpm(), func() (token, error) { return sealTPM(ctx, opts, selected, volume, key) })
	case strings.Contains(spec, "://"):
		id, perr := parseKeySpec("seal", spec)
		if perr != nil {
			return nil, perr
		}
		t, err = sealVault(ctx, opts, id, volume, nil, key)
	default:
		return nil, fail("seal", clean(spec), ClassConfig, errors.New("is none of platform, tpm, tpm:PCR+PCR, host-key, host-key:FILE, and the URL of a vault's key"))
	}
	if err != nil {
		return nil, err
	}
	return verified(ctx, opts, t, volume, key)
}

// OtherHostKey returns FILE of the spec "host-key:FILE", and "" of any other.
func OtherHostKey(spec string) string {
	file, ok := strings.CutPrefix(spec, SpecHostKey+":")
	if !ok {
		return ""
	}
	return file
}

// verified encodes a token that was just sealed, if it unseals.
func verified(ctx context.Context, opts Options, t token, volume string, key *[KeySize]byte) (json.RawMessage, error) {
	raw, err := json.Marshal(t)
	if err != nil {
		return nil, fail("seal", t.keyID(), ClassInternal, err)
	}

	var check [KeySize]byte
	defer clear(check[:])
	if err := Unseal(ctx, opts, raw, volume, &check); err != nil {
		return nil, verifyError(err)
	}
	if subtle.ConstantTimeCompare(check[:], key[:]) != 1 {
		return nil, fail("verify", t.keyID(), ClassIntegrity, errors.New("the token unseals to another key than was sealed"))
	}
	// The canary of a vault token is wrapped by itself. What else a probe looks at,
	// unsealing has needed.
	if _, ok := t.(*vaultToken); ok {
		if err := Probe(ctx, opts, raw, volume); err != nil {
			return nil, verifyError(err)
		}
	}
	return raw, nil
}

// verifyError marks err as found by Seal's own check, because "the vault
// refuses to unwrap" means something else to a person who is just sealing.
func verifyError(err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		marked := *e
		marked.Op = "verify"
		return &marked
	}
	return err
}

// Unseal unwraps the volume key in a token into dst. It never creates anything.
// dst is left alone when Unseal returns an error.
func Unseal(ctx context.Context, opts Options, raw json.RawMessage, volume string, dst *[KeySize]byte) error {
	t, volume, err := parse("unseal", raw, volume)
	if err != nil {
		return err
	}
	return t.unseal(ctx, opts, volume, dst)
}

// A Description is what a token says about its KEK. It holds no secret and may
// be shown to anyone who may read the header.
type Description struct {
	Type       string `json:"type"`
	Version    int    `json:"version"`               // of the token's format
	KeyID      string `json:"key_id"`                // host key id, TPM id, or the vault key's URL without its version
	KeyVersion string `json:"key_version,omitempty"` // of the vault key
	Algorithm  string `json:"algorithm"`
	Bits       int    `json:"bits,omitempty"` // of the vault key, if it's an RSA key
	PCRs       string `json:"pcrs,omitempty"` // that the TPM looks at, "7+11"
	Identity   string `json:"identity,omitempty"`
	Tenant     string `json:"tenant,omitempty"`
}

// Describe reads a token without touching its KEK. An error about a foreign
// token has [ErrNotOurs] in its chain.
func Describe(raw json.RawMessage) (Description, error) {
	t, err := decodeToken(raw)
	if err != nil {
		return Description{}, err
	}
	return t.describe(), nil
}

// canonicalUUID returns s in lower case. The UUID is bound into tokens, so that
// two spellings of one UUID must not be two volumes.
func canonicalUUID(s string) (string, error) {
	if !isUUID(s) {
		return "", fmt.Errorf("volume %q is not a UUID", s)
	}
	return strings.ToLower(s), nil
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i := range len(s) {
		switch i {
		case 8, 13, 18, 23:
			if s[i] != '-' {
				return false
			}
		default:
			if !isHex(s[i]) {
				return false
			}
		}
	}
	return true
}

func isHex(c byte) bool {
	return bytes.IndexByte([]byte("0123456789abcdefABCDEF"), c) >= 0
}
