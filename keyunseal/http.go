package keyunseal

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
)

// newHTTPClient returns the client for vault and identity endpoint. roots are
// the certificate authorities, nil for the system's.
func newHTTPClient(rt http.RoundTripper, roots *x509.CertPool) *http.Client {
	if rt == nil {
		rt = directTransport(roots)
	}
	return &http.Client{
		Transport: boundedBody{rt},
		// A request to wrap holds a secret, and every one a token: never send them
		// where an answer says. The redirect itself becomes the answer.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// directTransport connects without a proxy: the identity endpoint
// 169.254.169.254 must never be asked through one, and Key Vault is reached by
// private endpoints where networks are closed.
func directTransport(roots *x509.CertPool) *http.Transport {
	return &http.Transport{
		Proxy:                  nil,
		DialContext:            dial,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		TLSHandshakeTimeout:    5 * time.Second,
		ForceAttemptHTTP2:      true,
		MaxResponseHeaderBytes: 64 << 10,
		MaxIdleConnsPerHost:    1,
		IdleConnTimeout:        5 * time.Second,
	}
}

// boundedBody cuts answers off: the SDK reads all of one into memory. It also
// takes from a redirect where it leads to: the client would rewind the request's
// body before it asks CheckRedirect, while HTTP/2 may still be sending it.
type boundedBody struct{ next http.RoundTripper }

const maxBody = 1 << 20

func (b boundedBody) RoundTrip(req *http.Request) (*http.Response, error) {
	resp, err := b.next.RoundTrip(req)
	if err == nil {
		if resp.StatusCode/100 == 3 {
			resp.Header.Del("Location")
		}
		resp.Body = &boundedReader{ReadCloser: resp.Body, left: maxBody}
	}
	return resp, err
}

type boundedReader struct {
	io.ReadCloser
	left int
}

func (r *boundedReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, errTooLong
	}
	n, err := r.ReadCloser.Read(p[:min(len(p), r.left)])
	r.left -= n
	return n, err
}

// An exchange is the innermost policy of the vault's pipeline: it sees every
// request as it's sent and every answer before the SDK does.
type exchange struct {
	resource string // the audience that a challenge has to name
	tenant   string // the tenant that a challenge has to name; learned from the first if empty

	// Of the last call, for whoever compares logs.
	requests                   int
	clientRequestID, requestID string
}

func (x *exchange) Do(req *policy.Request) (*http.Response, error) {
	// The time for a token isn't part of this: IMDS may take longer than a vault.
	ctx, cancel := context.WithTimeout(req.Raw().Context(), exchangeTimeout)
	defer cancel() // the body is read by then
	x.requests++
	x.clientRequestID, x.requestID = req.Raw().Header.Get("x-ms-client-request-id"), ""
	resp, err := req.Clone(ctx).Next()
	if err != nil {
		return nil, &transportError{withoutURL(err)}
	}
	x.requestID = clean(resp.Header.Get("x-ms-request-id"))
	if resp.StatusCode == http.StatusUnauthorized {
		if err := x.checkChallenge(resp, req.Raw().Header.Get("Authorization") != ""); err != nil {
			return nil, &Error{Class: ClassIntegrity, Status: resp.StatusCode, RequestID: clean(resp.Header.Get("x-ms-request-id")), Err: err}
		}
	}
	return resp, nil
}

// checkChallenge holds a challenge against what we know: the SDK takes the
// resource from it that it then asks a token for, and it panics on some
// malformed ones.
func (x *exchange) checkChallenge(resp *http.Response, authorized bool) error {
	header := resp.Header.Get("WWW-Authenticate")
	if header == "" {
		if authorized {
			return nil // the token was refused, and that's all
		}
		return errors.New("the vault asks for authorization without a challenge")
	}
	scheme, rest, _ := strings.Cut(header, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return fmt.Errorf("the challenge has the scheme %.20q", scheme)
	}
	params := make(map[string]string)
	for field := range strings.FieldsFuncSeq(rest, func(r rune) bool { return r == ' ' || r == ',' }) {
		name, value, _ := strings.Cut(field, "=")
		params[name] = strings.Trim(value, `"`)
	}
	if params["error"] == "insufficient_claims" {
		return nil // continuous access evaluation; it names no resource
	}
	resource := params["resource"]
	if s, ok := params["scope"]; ok { // the SDK prefers it
		resource = strings.TrimSuffix(s, "/.default")
	}
	if !strings.EqualFold(strings.TrimSuffix(resource, "/"), x.resource) {
		return fmt.Errorf("the challenge is for the resource %.60q, want %s", resource, x.resource)
	}
	authority, ok := strings.CutPrefix(params["authorization"], "https://")
	_, tenant, _ := strings.Cut(authority, "/")
	if !ok || !isUUID(tenant) {
		return fmt.Errorf("the challenge has the authority %.100q, want https://HOST/TENANT", params["authorization"])
	}
	tenant = strings.ToLower(tenant)
	if x.tenant == "" {
		x.tenant = tenant
	}
	if !strings.EqualFold(tenant, x.tenant) {
		return fmt.Errorf("the vault is in tenant %s now, the token was sealed in %s", tenant, x.tenant)
	}
	return nil
}
