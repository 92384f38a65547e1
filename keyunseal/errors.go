package keyunseal

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
)

// A Class says what kind of failure an [Error] is, by what one would do about it.
type Class int

const (
	// ClassInternal is a fault of this program or of the SDK, such as a panic or
	// a child process that died.
	ClassInternal Class = iota
	// ClassUnreachable means that the vault gave no answer: name, network, TLS,
	// or a server fault.
	ClassUnreachable
	// ClassThrottled means that the vault answered too many requests (429).
	ClassThrottled
	// ClassIdentity means that no token could be had for the identity.
	ClassIdentity
	// ClassDenied means that the vault refused the identity (403), or did not accept
	// its token (401), which is no denial, see [Error.Denied].
	ClassDenied
	// ClassKeyUnusable means that the KEK is disabled, expired, deleted or unknown,
	// or that there is no host key file.
	ClassKeyUnusable
	// ClassWrongKey means that there is a host key or a TPM and it isn't the one, or
	// that the host key is refused because others could have read it.
	ClassWrongKey
	// ClassIntegrity means that the token, or an answer about it, is malformed or
	// doesn't authenticate.
	ClassIntegrity
	// ClassConfig means that what was asked for is wrong or not supported.
	ClassConfig
	// ClassMalformed means an answer that is none of a vault: a proxy's page, a
	// body that was cut off, `200 {}`. It says nothing about the key, and passes.
	ClassMalformed
	// ClassNoTPM means that the TPM is absent, can't be opened or doesn't work.
	ClassNoTPM
	// ClassTPMBusy means that the TPM has no time or no room now.
	ClassTPMBusy
	// ClassTPMLockout means that the TPM refuses because of too many wrong
	// passwords, not ours, for some minutes or hours.
	ClassTPMLockout
	// ClassTPMState means that the TPM refuses because this host was started in
	// another way, as its PCRs tell, than when the token was sealed.
	ClassTPMState
)

// Class names are part of the protocol between parent and child.
var classNames = [...]string{
	ClassInternal:    "internal error",
	ClassUnreachable: "vault unreachable",
	ClassThrottled:   "throttled",
	ClassIdentity:    "identity unavailable",
	ClassDenied:      "access denied",
	ClassKeyUnusable: "key unusable",
	ClassWrongKey:    "wrong or refused key",
	ClassIntegrity:   "integrity failure",
	ClassConfig:      "bad configuration",
	ClassMalformed:   "malformed answer",
	ClassNoTPM:       "TPM unavailable",
	ClassTPMBusy:     "TPM busy",
	ClassTPMLockout:  "TPM locked out",
	ClassTPMState:    "platform state changed",
}

// String returns words for people, such as "vault unreachable".
func (c Class) String() string {
	if c < 0 || int(c) >= len(classNames) {
		return "class " + strconv.Itoa(int(c))
	}
	return classNames[c]
}

// An Error is returned by every function of this package that fails. Match it
// with [errors.AsType]; the fields other than Class are for people and logs.
type Error struct {
	Op         string        // "get", "wrap", "unwrap", "verify", "read host key", ...
	KeyID      string        // key URL, host key path, spec or token type; never key material
	Class      Class         // what one would do about it
	Code       string        // innermost error code of the vault, such as "KeyDisabled", or the TPM's
	Status     int           // HTTP status of the vault or identity endpoint; 0 if there was no answer
	RequestID  string        // x-ms-request-id, which the vault's own log has too
	RetryAfter time.Duration // how long the vault asked to wait; 0 if it didn't say
	Refused    bool          // of ClassIdentity: it was said that the identity is none, or not any more
	Local      bool          // of ClassIdentity: nobody was asked, for want of something that this host has to have
	Err        error         // the cause
}

// Error says what was being done to which key, what went wrong, and what to look
// at next.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("keyunseal: ")
	b.WriteString(e.Op)
	if e.KeyID != "" {
		b.WriteByte(' ')
		b.WriteString(e.KeyID)
	}
	b.WriteString(": ")
	b.WriteString(e.Class.String())
	var facts []string
	if e.Status != 0 {
		facts = append(facts, "HTTP "+strconv.Itoa(e.Status))
	}
	if e.Code != "" {
		facts = append(facts, e.Code)
	}
	if e.RequestID != "" {
		facts = append(facts, "request "+e.RequestID)
	}
	if len(facts) > 0 {
		b.WriteString(" (" + strings.Join(facts, ", ") + ")")
	}
	if e.Err != nil {
		b.WriteString(": ")
		b.WriteString(clean(e.Err.Error()))
	}
	if h := e.hint(); h != "" {
		b.WriteString("; ")
		b.WriteString(h)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.Err }

// Transient reports whether the same call may succeed later without anyone
// changing the configuration, the vault or the token.
func (e *Error) Transient() bool {
	switch e.Class {
	case ClassInternal, ClassUnreachable, ClassThrottled, ClassMalformed, ClassNoTPM, ClassTPMBusy, ClassTPMLockout:
		return true
	case ClassDenied:
		// A vault says so to a token that Entra ID has just issued when it can't check
		// it ("AKV10046: Unable to resolve the key used for signature validation"), and
		// then to all hosts of a region at once. Who takes access away is not seen
		// here: that is a 403, a 404, or no token at all.
		return e.Status == http.StatusUnauthorized
	case ClassIdentity:
		return !e.Refused
	}
	return false
}

// codeClock says that the client's assertion isn't valid yet or any more, as it is
// with a clock that wasn't set yet.
const codeClock = "AADSTS700024"

// tooMany are what Entra ID answers, with the status of a bad request, to an
// application that asks too often, and to one of a tenant whose applications do.
var tooMany = map[string]bool{"AADSTS50196": true, "AADSTS90055": true}

// Denied reports whether somebody who may decide has said no: the vault refused
// this identity or has disabled, deleted or never had the key, or this machine
// does not have the identity. Everything else may be an outage.
func (e *Error) Denied() bool {
	switch e.Class {
	case ClassDenied:
		return !e.Transient()
	case ClassKeyUnusable:
		return e.Status != 0 || e.Code != "" // else it's a host key file
	case ClassIdentity:
		return e.Refused
	}
	return false
}

// Integrity reports whether something isn't what it says it is: the token, or an
// answer about it. That's a reason to alarm, and trying again soon helps nothing.
func (e *Error) Integrity() bool { return e.Class == ClassIntegrity }

// anotherToken is what helps where a KEK is lost, resealed where it is the TPM's.
const (
	anotherToken = "with the recovery key 'hostcryptd key add --recovery-key' adds another token"
	resealed     = "'hostcryptd rewrap' seals to what is there now if another token opens the volume; " + anotherToken
)

// hint says what to look at, for the classes where something is known.
func (e *Error) hint() string {
	if errors.Is(e.Err, errDialer) {
		return "" // it says so itself
	}
	switch e.Class {
	case ClassUnreachable:
		if e.certificate() {
			return "is the clock right, is ca-certificates installed, does something intercept TLS?"
		}
		if e.Status != 0 {
			return "the service is at fault; try again"
		}
		return "do DNS and the route to the vault work from this host, and does a firewall or private endpoint allow it?"
	case ClassThrottled:
		return "too many hosts or volumes use this vault at once; try again, or spread them over several vaults"
	case ClassIdentity:
		switch {
		case e.Code == codeClock:
			return "is the clock right?"
		case e.Code == codeExpired:
			return "renew it, here and in the application; that takes nothing away meanwhile, but nobody hears of a revocation either"
		case tooMany[e.Code]:
			return "too many requests for tokens of one application or tenant at once; it's tried again, and takes nothing away"
		case e.Op == opEntra && e.Code == invalidClient && !e.Refused:
			return "is the clock right, and is the certificate or the issuer's token the one that the application has? nothing says that it takes the identity away, so it's tried again"
		case e.Op == opEntra && e.Refused:
			return "is the application in this tenant and not disabled, does it have this certificate or federated credential, and does Conditional Access let it in from here?"
		case e.Op == opEntra && strings.HasPrefix(e.Code, "AADSTS"):
			return "https://login.microsoftonline.com/error?code=" + strings.TrimPrefix(e.Code, "AADSTS") + " says what that means; nothing says that it takes the identity away, so it's tried again"
		case e.Local && (errors.Is(e.Err, fs.ErrNotExist) || errors.Is(e.Err, fs.ErrPermission)):
			return "the file has to be readable, and on no volume that it helps to open"
		case e.Local && e.Op != opArc:
			return ""
		case e.Op == opEntra:
			return "do DNS and the route to the login host work from this host?"
		case e.Op == opArc:
			return "is the Azure Arc agent running and connected (azcmagent show), and does this process run as root?"
		case e.Refused:
			return "is this managed identity assigned to this machine?"
		case e.Op == opIMDS && e.Code == "invalid_request":
			return "which of this machine's identities is meant? --identity managed:CLIENT-ID names it; that takes nothing away, so it's tried again"
		case e.Code != "" && e.Status != http.StatusTooManyRequests && e.Status < 500:
			return "is this managed identity assigned to this machine? nothing says that it isn't, so it's tried again"
		}
		return "is this an Azure VM whose identity endpoint 169.254.169.254 can be reached directly, without a proxy?"
	case ClassDenied:
		switch e.Code {
		case "ForbiddenByFirewall":
			return "does the vault's firewall allow this host's address or network?"
		case "ForbiddenByPolicy":
			return "does a network policy or a private endpoint of the vault shut this host out?"
		}
		if e.Status == http.StatusUnauthorized {
			return "the service may be at fault, then it passes; is the vault in the tenant of the identity, and is the clock right?"
		}
		return "does the identity have wrapKey and unwrapKey? the role is Key Vault Crypto Service Encryption User, and a new assignment takes some minutes"
	case ClassKeyUnusable:
		if e.Code != "" || e.Status != 0 {
			return "enable or recover that version of the key in the vault" + e.goneForGood("unwrap")
		}
		return "restore the file, or unseal by another token; " + anotherToken
	case ClassWrongKey:
		if e.Code == codeOtherTPM {
			return "the TPM was cleared or replaced, or the disk is in another host: " + resealed
		}
		if errors.Is(e.Err, fs.ErrPermission) {
			return "may this user read it? --host-key names another file"
		}
		return "--host-key names the file; another token may open the volume, and " + anotherToken
	case ClassIntegrity:
		switch e.Op {
		case "get", "wrap", "unwrap", "probe", "verify", "sign":
			return "does something answer in the vault's place? if not, the token is damaged: another token or a header backup may open the volume"
		}
		return "another token, the second header copy or a header backup may open the volume"
	case ClassMalformed:
		return "does a proxy or a portal answer in the vault's place?"
	case ClassNoTPM:
		switch {
		case errors.Is(e.Err, fs.ErrNotExist):
			return "is the TPM on in the firmware, and its driver loaded? a volume without TPM has the key host-key" + e.goneForGood("unseal")
		case errors.Is(e.Err, fs.ErrPermission):
			if os.Geteuid() == 0 {
				return "it belongs to another user, and this process has not root's CAP_DAC_OVERRIDE; the unit that hostcryptd installs does"
			}
			return "only root may use the TPM"
		}
		if strings.HasSuffix(e.Op, " pin") {
			return "a reboot may bring the TPM back; --tpm none goes on without it, if that the TPM doesn't work is no attack"
		}
		return "a reboot may bring the TPM back; the key host-key needs none" + e.goneForGood("unseal")
	case ClassTPMBusy:
		return "try again; /dev/tpmrm0 is shared, /dev/tpm0 is not"
	case ClassTPMLockout:
		return "wait, or reset the lockout: tpm2_dictionarylockout --clear-lockout"
	case ClassTPMState:
		return "the firmware, Secure Boot or its keys were changed: if you did that, " + resealed
	case ClassConfig:
		switch e.Code {
		case codeOwnerAuth:
			return "hostcryptd needs the owner hierarchy without a password: tpm2_changeauth, or the key host-key and --tpm none"
		case codeNoRoom:
			return "tpm2_getcap handles-nv-index lists what takes it, 'hostcryptd erase' frees what a volume took, and --tpm none does without"
		case codeNoBank:
			return "turn the SHA-256 bank on in the firmware, or use the key host-key"
		}
	case ClassInternal:
		return "this is a bug or a lack of memory; try again and report it if it stays"
	}
	return ""
}

// goneForGood goes on with a hint where a token is not unsealed, which is what op is
// about.
func (e *Error) goneForGood(op string) string {
	if e.Op != op {
		return ""
	}
	return "; if it is gone for good, " + anotherToken
}

// certificate reports whether the cause is the vault's certificate.
func (e *Error) certificate() bool {
	_, direct := errors.AsType[*tls.CertificateVerificationError](e.Err)
	_, fromChild := errors.AsType[*certificateError](e.Err)
	return direct || fromChild
}

// A certificateError is a tls.CertificateVerificationError that came from a child.
type certificateError struct{ error }

// fail makes an *Error. It's for failures that have no HTTP answer.
func fail(op, keyID string, class Class, err error) error {
	return &Error{Op: op, KeyID: keyID, Class: class, Err: err}
}

// transportError marks what the HTTP exchange itself failed with, because the
// SDK returns that and its own failures to read an answer through one channel.
type transportError struct{ err error }

func (e *transportError) Error() string { return e.err.Error() }
func (e *transportError) Unwrap() error { return e.err }

// withoutURL drops what net/http puts before the cause: our errors name the key.
func withoutURL(err error) error {
	if ue, ok := errors.AsType[*url.Error](err); ok {
		return ue.Err
	}
	return err
}

// errTooLong is the read error of an answer that no vault sends.
var errTooLong = errors.New("the answer is longer than 1 MiB")

// classify turns whatever an SDK call returned into an *Error. It maps nil to nil.
func classify(op, keyID string, err error) error {
	if err == nil {
		return nil
	}
	if e, ok := errors.AsType[*Error](err); ok { // made by our own policies or credential
		filled := *e
		if filled.Op == "" {
			filled.Op = op
		}
		filled.KeyID = keyID
		return &filled
	}
	if re, ok := errors.AsType[*azcore.ResponseError](err); ok {
		return classifyResponse(op, keyID, re)
	}
	e := &Error{Op: op, KeyID: keyID, Err: err}
	_, transport := errors.AsType[*transportError](err)
	switch {
	case errors.Is(err, errTooLong):
		e.Class = ClassMalformed
	case transport || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded):
		e.Class = ClassUnreachable
	default:
		// The exchange worked and the SDK couldn't make sense of the answer.
		e.Class = ClassMalformed
		e.Err = fmt.Errorf("the answer isn't one of a vault: %w", err)
	}
	return e
}

// classifyResponse goes by status and code; the texts of messages are not
// contractual.
func classifyResponse(op, keyID string, re *azcore.ResponseError) error {
	e := &Error{Op: op, KeyID: keyID, Status: re.StatusCode, Code: re.ErrorCode}
	var codes []string
	message := http.StatusText(re.StatusCode)
	if resp := re.RawResponse; resp != nil {
		e.RequestID = clean(resp.Header.Get("x-ms-request-id"))
		e.RetryAfter = retryAfter(resp.Header, time.Now())
		if body, err := runtime.Payload(resp); err == nil {
			var m string
			if codes, m = errorCodes(body); m != "" {
				message = m
			}
		}
	}
	if len(codes) > 0 {
		e.Code = codes[len(codes)-1]
	}
	e.Code = clean(e.Code)
	e.Err = errors.New(clean(brief(message)))

	// A denial counts only if a vault says it: it has a body with a code or, of a
	// managed HSM, the challenge that exchange has checked. A page is a proxy's.
	said := len(codes) > 0
	if re.StatusCode == http.StatusUnauthorized && re.RawResponse != nil {
		said = said || re.RawResponse.Header.Get("WWW-Authenticate") != ""
	}
	switch s := re.StatusCode; {
	case s == http.StatusTooManyRequests:
		e.Class = ClassThrottled
	case s == http.StatusRequestTimeout || s >= 500:
		e.Class = ClassUnreachable
	case !said || s < 400:
		// Among them redirects, which are never followed because the request holds a
		// secret.
		e.Class = ClassMalformed
	case s == http.StatusForbidden && keyState(codes):
		e.Class = ClassKeyUnusable
	case s == http.StatusUnauthorized || s == http.StatusForbidden:
		e.Class = ClassDenied
	case s == http.StatusNotFound || s == http.StatusGone || s == http.StatusConflict:
		e.Class = ClassKeyUnusable
	case s == http.StatusBadRequest && (op == "unwrap" || op == "probe"):
		e.Class = ClassIntegrity // all but the wrapped value is ours
	case s == http.StatusBadRequest:
		e.Class = ClassConfig
	default:
		e.Class = ClassMalformed
	}
	return e
}

// keyState reports whether one of the codes of a 403 is about the key and not
// about the caller.
func keyState(codes []string) bool {
	for _, c := range codes {
		switch c {
		case "KeyDisabled", "KeyExpired", "KeyNotYetValid":
			return true
		}
	}
	return false
}

// errorCodes returns the codes of an error body from the outermost to the
// innermost, and the outermost message. The specification says "innererror",
// services also send "innerError"; encoding/json takes either.
func errorCodes(body []byte) (codes []string, message string) {
	type level struct {
		Code    string          `json:"code"`
		Message string          `json:"message"`
		Inner   json.RawMessage `json:"innererror"`
	}
	var outer struct {
		Error json.RawMessage `json:"error"`
	}
	if json.Unmarshal(body, &outer) != nil {
		return nil, ""
	}
	raw := outer.Error
	for depth := 0; len(raw) > 0 && depth < 8; depth++ {
		var l level
		if json.Unmarshal(raw, &l) != nil {
			break
		}
		if l.Code != "" {
			codes = append(codes, l.Code)
		}
		if depth == 0 {
			message = l.Message
		}
		raw = l.Inner
	}
	return codes, message
}

// brief returns the first sentence of a vault's message and the line that says
// whom the vault takes the caller for. The rest is general advice.
func brief(message string) string {
	lines := strings.Split(strings.ReplaceAll(message, "\r\n", "\n"), "\n")
	s, _, _ := strings.Cut(lines[0], ". ")
	s = strings.TrimSuffix(s, ".")
	for _, l := range lines[1:] {
		if strings.HasPrefix(l, "Caller: ") {
			s += "; " + l
		}
	}
	return s
}

// maxRetryAfter bounds what a vault may ask for, so that one broken answer
// doesn't lock a host out for a day.
const maxRetryAfter = 5 * time.Minute

func retryAfter(h http.Header, now time.Time) time.Duration {
	s := h.Get("Retry-After")
	var d time.Duration
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		d = time.Duration(n) * time.Second
	} else if t, err := http.ParseTime(s); err == nil {
		d = t.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}

// longToken matches what could be a secret in text that came from outside: 40 or
// more characters of base64. Key versions have 32, UUIDs 36.
var longToken = regexp.MustCompile(`[A-Za-z0-9+_-]{40,}={0,2}`)

// clean makes text from outside fit for one line of a log: one line, bounded,
// no control characters, nothing that could be a key.
func clean(s string) string {
	const limit = 600
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }), " ")
	s = strings.ToValidUTF8(s, "?")
	s = longToken.ReplaceAllString(s, "(long value removed)")
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "..."
	}
	return strings.TrimSpace(s)
}
