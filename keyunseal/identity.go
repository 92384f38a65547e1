package keyunseal

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/AzureAD/microsoft-authentication-library-for-go/apps/managedidentity"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	identityManaged     = "managed"
	identityArc         = "arc"
	identityObject      = "managed-object"
	identityResource    = "managed-resource"
	identityWorkload    = "workload"
	identityCertificate = "certificate"

	// defaultTokenFile is where a workload finds its issuer's token, by convention
	// of the Azure Workload Identity webhook.
	defaultTokenFile = "/var/run/secrets/azure/tokens/azure-identity-token"

	// tokenTimeout bounds one attempt to get a token. The endpoint mostly answers
	// in milliseconds; more than 6 seconds have been seen at boot.
	tokenTimeout = 30 * time.Second

	// maxAssertion bounds an issuer's token. Those of Kubernetes have one or two KiB.
	maxAssertion = 64 << 10

	// maxIdentity bounds an identity's text.
	maxIdentity = 1024
)

// An identity is a parsed [Options.Identity].
type identity struct {
	kind   string // one of the constants above
	id     string // client, object or resource id; "" for one that the system assigned
	tenant string // of workload and certificate
	file   string // of workload and certificate
}

func parseIdentity(s string) (identity, error) {
	kind, rest, more := strings.Cut(s, ":")
	i := identity{kind: kind}
	bad := func(form string) (identity, error) {
		return identity{}, fmt.Errorf("identity %.60q is not %s", s, form)
	}
	if len(s) > maxIdentity || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return bad("one line of at most " + strconv.Itoa(maxIdentity) + " bytes")
	}
	switch kind {
	case identityManaged:
		if more && !isUUID(rest) {
			return bad("managed:CLIENT-ID with a UUID")
		}
		i.id = strings.ToLower(rest)
	case identityArc:
		if more {
			return bad("arc alone, which stands for the identity of this host's Arc agent")
		}
	case identityObject:
		if !isUUID(rest) {
			return bad("managed-object:OBJECT-ID with a UUID")
		}
		i.id = strings.ToLower(rest)
	case identityResource:
		if !strings.HasPrefix(strings.ToLower(rest), "/subscriptions/") || strings.ContainsAny(rest, " ?#%&") {
			return bad("managed-resource:/subscriptions/.../userAssignedIdentities/NAME")
		}
		i.id = rest
	case identityWorkload, identityCertificate:
		parts := strings.SplitN(rest, ":", 3)
		form := kind + ":TENANT:CLIENT-ID:FILE with two UUIDs and an absolute path"
		if len(parts) < 2 || !isUUID(parts[0]) || !isUUID(parts[1]) {
			return bad(form)
		}
		i.tenant, i.id = strings.ToLower(parts[0]), strings.ToLower(parts[1])
		switch {
		case len(parts) == 3:
			i.file = parts[2]
		case kind == identityWorkload:
			i.file = defaultTokenFile
		}
		if !filepath.IsAbs(i.file) {
			return bad(form)
		}
	default:
		return bad("one of managed, managed:CLIENT-ID, managed-object:ID, managed-resource:ID, arc, workload:TENANT:CLIENT-ID[:FILE] and certificate:TENANT:CLIENT-ID:FILE")
	}
	return i, nil
}

// What is asked for a token, in the Op of errors.
const (
	opIMDS  = "get a token for"
	opArc   = "get a token of the Azure Arc agent for"
	opEntra = "get a token of Entra ID for"
)

// A credential gets tokens for exactly the identity that was named. The SDK's
// default chain isn't used: what it tries depends on the environment, and it
// gives the identity endpoint one second at boot.
type credential struct {
	next     azcore.TokenCredential
	endpoint *identityEndpoint
	op       string
	identity identity
	expires  time.Time // of a client certificate
	unread   error     // of the last try to read an issuer's token
}

// newCredential makes no request. What it can't use now for want of a file, a
// later call may.
func newCredential(client *http.Client, i identity, where *site, log *zap.Logger) (*credential, error) {
	public := slices.Contains(slices.Collect(maps.Values(authorities)), where.authority)
	c := &credential{endpoint: &identityEndpoint{public: public}, op: opEntra, identity: i}
	options := azcore.ClientOptions{
		Transport:        client,
		Retry:            policy.RetryOptions{MaxRetries: -1, TryTimeout: tokenTimeout},
		PerRetryPolicies: []policy.Policy{c.endpoint},
		Cloud:            cloud.Configuration{ActiveDirectoryAuthorityHost: where.authority, Services: map[cloud.ServiceName]cloud.ServiceConfiguration{}},
	}
	if where.authority == "" && (i.kind == identityWorkload || i.kind == identityCertificate) {
		return nil, &Error{Class: ClassConfig, Err: fmt.Errorf("the private cloud's description has no authority_host, which the identity %s needs", i.kind)}
	}
	var err error
	switch i.kind {
	case identityWorkload:
		// The SDK's own credential for this reads whatever the file is, without a limit.
		read := func(context.Context) (string, error) {
			var assertion string
			assertion, c.unread = readAssertion(i.file)
			return assertion, c.unread
		}
		if _, err := read(context.Background()); err != nil {
			return nil, err
		}
		c.next, err = azidentity.NewClientAssertionCredential(i.tenant, i.id, read, &azidentity.ClientAssertionCredentialOptions{
			ClientOptions: options, DisableInstanceDiscovery: where.noDiscovery,
		})
	case identityCertificate:
		certs, key, cerr := readCertificate(i.file, log)
		if cerr != nil {
			return nil, cerr
		}
		c.expires = certs[0].NotAfter
		c.next, err = azidentity.NewClientCertificateCredential(i.tenant, i.id, certs, key, &azidentity.ClientCertificateCredentialOptions{
			ClientOptions: options, DisableInstanceDiscovery: where.noDiscovery,
		})
	default:
		if c.op, err = managedSource(i.kind); errors.Is(err, errNoAgent) {
			return nil, &Error{Op: opArc, Class: ClassIdentity, Local: true, Err: err}
		} else if err != nil {
			return nil, &Error{Class: ClassConfig, Err: err}
		}
		o := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: options}
		switch {
		case i.kind == identityObject:
			o.ID = azidentity.ObjectID(i.id)
		case i.kind == identityResource:
			o.ID = azidentity.ResourceID(i.id)
		case i.id != "":
			o.ID = azidentity.ClientID(i.id)
		}
		c.next, err = azidentity.NewManagedIdentityCredential(o)
	}
	if err != nil {
		return nil, &Error{Class: ClassConfig, Err: err}
	}
	return c, nil
}

// errNoAgent may pass: at boot /opt may be a file system that isn't mounted yet.
var errNoAgent = errors.New("the Azure Arc agent isn't installed here, or not mounted yet (no /opt/azcmagent/bin/himds)")

// managedSource checks that the SDK will ask the endpoint that the identity
// means: it goes by environment variables, and by whether the Arc agent is
// installed.
func managedSource(kind string) (op string, err error) {
	source, err := managedidentity.GetSource()
	if err != nil {
		return "", err
	}
	switch {
	case kind == identityArc && source != managedidentity.AzureArc:
		return "", errNoAgent
	case kind == identityArc:
		return opArc, nil
	case source == managedidentity.AzureArc:
		return "", errors.New("the identity is that of an Azure VM, and this host has the Azure Arc agent: its identity is named arc")
	case source != managedidentity.DefaultToIMDS:
		return "", fmt.Errorf("the environment redirects managed identities to %s: unset IDENTITY_ENDPOINT and MSI_ENDPOINT", source)
	}
	return opIMDS, nil
}

// readCertificate reads a client certificate and its key. The file is as secret
// as a host key.
func readCertificate(path string, log *zap.Logger) ([]*x509.Certificate, crypto.PrivateKey, error) {
	fail := func(err error) ([]*x509.Certificate, crypto.PrivateKey, error) {
		class := fileClass(err)
		return nil, nil, &Error{Op: opEntra, Class: class, Local: class == ClassIdentity, Err: fmt.Errorf("the client certificate: %w", err)}
	}
	st, err := os.Stat(path)
	if err != nil {
		return fail(err)
	}
	if st.Mode()&0o077 != 0 {
		return fail(fmt.Errorf("%s has mode %04o, others may read or write it; if they haven't, chmod 600 it", path, st.Mode().Perm()))
	}
	b, err := readTrusted(path, 64<<10)
	if err != nil {
		return fail(err)
	}
	defer clear(b)
	certs, key, err := azidentity.ParseCertificates(b, nil)
	if err != nil {
		return fail(fmt.Errorf("%s: %w: %w", path, err, errNotWhole))
	}
	if left := time.Until(certs[0].NotAfter); left < warnExpiry {
		log.Warn("the client certificate expires, and with it this host's way to the vault",
			zap.String("file", path), zap.Time("expires", certs[0].NotAfter))
	}
	return certs, key, nil
}

// readAssertion reads an issuer's token, which is sent to the login host. The file's
// name may come from a header that anybody could write, so nothing is read but a file of
// some KiB, and nothing sent that isn't in the form of a signed JWT. It may be a link and
// belong to an agent of the issuer's.
func readAssertion(path string) (string, error) {
	fail := func(err error) (string, error) {
		class := fileClass(err)
		return "", &Error{Op: opEntra, Class: class, Local: class == ClassIdentity, Err: fmt.Errorf("the issuer's token: %w", err)}
	}
	b, err := readFile(path, maxAssertion, func(*unix.Stat_t) error { return nil })
	if err != nil {
		return fail(err)
	}
	text := strings.TrimSpace(string(b))
	parts := strings.Split(text, ".")
	ok := len(parts) == 3 && parts[2] != ""
	for _, part := range parts[:min(2, len(parts))] {
		var object map[string]json.RawMessage
		b, err := base64.RawURLEncoding.DecodeString(part)
		ok = ok && err == nil && json.Unmarshal(b, &object) == nil
	}
	if !ok {
		return fail(fmt.Errorf("%s holds no issuer's token: %w", path, errNotWhole))
	}
	return text, nil
}

func (c *credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	*c.endpoint = identityEndpoint{arc: c.op == opArc, public: c.endpoint.public}
	tk, err := c.next.GetToken(ctx, o)
	if err == nil {
		return tk, nil
	}
	if c.unread != nil {
		return azcore.AccessToken{}, c.unread
	}
	if c.endpoint.err != nil || c.endpoint.status != 0 {
		// The SDK's text is a page long and its errors don't unwrap.
		err = c.endpoint.cause(c.op, err)
	}
	e := &Error{
		Op: c.op, Class: ClassIdentity, Code: c.endpoint.code, Status: c.endpoint.status, RetryAfter: c.endpoint.retryAfter,
		Refused: c.endpoint.refuses(c.identity), Err: err,
	}
	if (e.Code == codeAssertion || e.Code == invalidClient) && !c.expires.IsZero() && time.Now().After(c.expires) {
		// Entra ID has one number for a certificate that it was told to forget and for
		// one that has expired, and OAuth 2 one word for all that may be wrong with a
		// client. That nobody has renewed it is nobody's decision.
		e.Code, e.Refused = codeExpired, false
		e.Err = fmt.Errorf("the client certificate has expired on %s: %w", c.expires.UTC().Format(time.DateOnly), err)
	}
	return azcore.AccessToken{}, e
}

const (
	// codeAssertion is that of an assertion whose signature Entra ID can't verify.
	codeAssertion = "AADSTS700027"
	// invalidClient is what OAuth 2 has for a client that isn't known or can't show that
	// it's the one (RFC 6749 section 5.2).
	invalidClient = "invalid_client"
	// codeExpired is our own.
	codeExpired = "CertificateExpired"
)

// refusals are the numbers by which Entra ID says that somebody has taken from an
// application what it logs in with (reference-error-codes, and where they aren't there
// the troubleshooting pages of the parts). It has hundreds of others, some for faults of
// its own, and they have the statuses of a denial too: a number that isn't here is no
// denial. Nor are the numbers of what has expired: an owner who says no disables or
// removes, and doesn't wait for a date.
var refusals = map[int]bool{
	70001:   true, // UnauthorizedClient: the application is disabled
	700011:  true, // UnauthorizedClientAppNotFoundInOrgIdTenant
	700016:  true, // UnauthorizedClient_DoesNotMatchRequest: the application isn't in the tenant
	7000112: true, // UnauthorizedClientApplicationDisabled
	7000229: true, // the application has no service principal in the tenant
	501051:  true, // the application isn't assigned to a role, which the vaults' application wants

	53003:  true, // BlockedByConditionalAccess
	530032: true, // BlockedByConditionalAccessOnSecurityPolicy

	700027:  true, // the certificate isn't the application's; see codeAssertion and refuses
	7000214: true, // the certificate was revoked
	7000277: true, // likewise

	70021:  true, // no federated credential is for this issuer's token
	70025:  true, // the application has none at all
	700211: true, // none for this issuer
	700212: true, // none for this audience
	700213: true, // none for this subject
}

// notAssigned is what the endpoint of an Azure VM says of an identity that the VM
// doesn't have, in lower case.
const notAssigned = "identity not found"

// maxSkew is how much a clock may differ from the login host's where the assertion that
// it dates is judged. Login hosts allow five minutes.
const maxSkew = time.Minute

// refuses tells whether the answer says that an identity is none, or not any more.
// Without a code it's something else that answers, such as a proxy.
func (e *identityEndpoint) refuses(i identity) bool {
	switch e.status {
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
	default:
		return false // 404 and 410: it's being updated (how-to-use-vm-token, "Error handling")
	}
	switch i.kind {
	case identityWorkload, identityCertificate:
		switch e.said {
		case "temporarily_unavailable", "server_error": // RFC 6749, whatever else it says
			return false
		}
		for _, n := range e.numbers {
			if !refusals[n] || i.kind == identityWorkload && n == 700027 {
				// Of an issuer it may be that of a key that it has just made, and that
				// Entra ID hasn't fetched.
				return false
			}
		}
		switch {
		case len(e.numbers) > 0, e.said == "unauthorized_client", e.said == "access_denied":
			return true
		}
		// The authority of a private cloud may have no numbers, and only this for an
		// application that was removed or has another certificate now; and for an
		// assertion that one of two clocks has made too old or too young, and an issuer's
		// token that is, or whose key is new.
		return e.said == invalidClient && !e.public && i.kind == identityCertificate && e.skew < maxSkew
	case identityArc:
		// Any user of the host may have the agent's port, when it starts anew, and that's
		// plain HTTP: nobody's no may stop a volume. The vault says itself that a role was
		// taken away.
		return false
	}
	if e.said == "invalid_request" && e.status == http.StatusBadRequest {
		// Where the identity isn't named, it's said too when another one was assigned to
		// a VM that had one: which of them is meant has to be said then, and nobody has
		// taken anything away.
		return i.kind != identityManaged || i.id != "" || strings.Contains(strings.ToLower(e.message), notAssigned)
	}
	return e.said == "unauthorized_client" || e.said == "access_denied"
}

// An identityEndpoint is a policy that keeps the last answer of the endpoint.
type identityEndpoint struct {
	arc        bool
	public     bool // the login host is one of a public cloud
	status     int
	said       string // "error" of the answer
	numbers    []int  // its "error_codes", which Entra ID alone has
	code       string // the first of these, else what it said
	message    string
	retryAfter time.Duration
	skew       time.Duration // between its clock and ours
	err        error         // there was no answer
}

func (e *identityEndpoint) Do(req *policy.Request) (*http.Response, error) {
	resp, err := req.Next()
	*e = identityEndpoint{arc: e.arc, public: e.public, err: err}
	if err != nil {
		return nil, err
	}
	if e.arc && resp.StatusCode == http.StatusUnauthorized {
		if err := checkArcChallenge(resp.Header.Get("WWW-Authenticate")); err != nil {
			resp.Body.Close()
			e.err = fmt.Errorf("the agent's challenge can't be answered: %w", err)
			return nil, e.err
		}
	}
	e.status, e.retryAfter = resp.StatusCode, retryAfter(resp.Header, time.Now())
	if date, err := http.ParseTime(resp.Header.Get("Date")); err == nil {
		e.skew = time.Since(date).Abs()
	} else {
		e.skew = math.MaxInt64
	}
	if body, err := runtime.Payload(resp); err == nil && resp.StatusCode != http.StatusOK {
		var b struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
			Codes       []int  `json:"error_codes"`
		}
		if json.Unmarshal(body, &b) == nil {
			e.said, e.numbers = b.Error, b.Codes
			e.code, e.message = clean(b.Error), clean(b.Description)
			if len(b.Codes) > 0 { // "invalid_client" alone says little
				e.code = "AADSTS" + strconv.Itoa(b.Codes[0])
			}
		}
	}
	return resp, nil
}

// arcTokens is where the Azure Arc agent puts what it asks a client to read.
const arcTokens = "/var/opt/azcmagent/tokens"

// checkArcChallenge looks at the file that an answer of the Azure Arc agent wants
// to have read and sent back, before the SDK does both. The SDK follows links:
// with one in that folder, who can write there, or has taken the agent's port, which
// is none of root's, could have any small file of root's sent to him.
func checkArcChallenge(challenge string) error {
	_, path, ok := strings.Cut(challenge, "Basic realm=")
	if !ok {
		return errors.New("it names no file")
	}
	if filepath.Dir(path) != arcTokens || filepath.Clean(path) != path || filepath.Ext(path) != ".key" {
		return fmt.Errorf("it names %.100q, which is no key file in %s", path, arcTokens)
	}
	var dir, file unix.Stat_t
	if err := unix.Lstat(arcTokens, &dir); err != nil {
		return &os.PathError{Op: "stat", Path: arcTokens, Err: err}
	}
	if err := unix.Lstat(path, &file); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case dir.Mode&unix.S_IFMT != unix.S_IFDIR || dir.Mode&0o002 != 0:
		return fmt.Errorf("%s is no directory, or everybody may write to it", arcTokens)
	case file.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%s is not a regular file", path)
	case file.Uid != 0 && file.Uid != dir.Uid || file.Mode&0o002 != 0:
		return fmt.Errorf("%s is not the agent's: it's owned by user %d and has mode %04o", path, file.Uid, file.Mode&0o7777)
	case file.Nlink != 1:
		return fmt.Errorf("%s has %d names", path, file.Nlink)
	case file.Size > 4096:
		return fmt.Errorf("%s has %d bytes, the agent's have at most 4096", path, file.Size)
	}
	return nil
}

// cause says what went wrong, better than the SDK's error does.
func (e *identityEndpoint) cause(op string, err error) error {
	who := "the identity endpoint"
	if op == opEntra {
		who = "Entra ID"
	}
	switch {
	case e.err != nil:
		return withoutURL(e.err)
	case e.message != "":
		return errors.New(brief(e.message))
	case op == opArc && e.status == http.StatusUnauthorized:
		// The agent asks for what is in a file that only its group may read.
		return fmt.Errorf("the agent's challenge can't be answered: %s", clean(err.Error()))
	case e.status == http.StatusOK:
		return fmt.Errorf("the answer of %s holds no token", who)
	}
	return fmt.Errorf("%s answered %s", who, http.StatusText(e.status))
}
