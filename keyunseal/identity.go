package keyunseal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/runtime"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
)

const (
	identityManaged = "managed"

	// tokenTimeout bounds one attempt to get a token. The endpoint mostly answers
	// in milliseconds; more than 6 seconds have been seen at boot.
	tokenTimeout = 30 * time.Second
)

// parseIdentity returns the client id of a user assigned identity, or "" for the
// system assigned one.
func parseIdentity(s string) (clientID string, err error) {
	if s == identityManaged {
		return "", nil
	}
	id, ok := strings.CutPrefix(s, identityManaged+":")
	if !ok || !isUUID(id) {
		return "", fmt.Errorf("identity %.60q is neither \"managed\" nor \"managed:CLIENT-ID\"", s)
	}
	return strings.ToLower(id), nil
}

// A credential gets tokens for exactly the identity that was named. The SDK's
// default chain isn't used: what it tries depends on the environment, and it
// gives the identity endpoint one second at boot.
type credential struct {
	next     azcore.TokenCredential
	endpoint *identityEndpoint
}

func newCredential(client *http.Client, identity string) (*credential, error) {
	clientID, err := parseIdentity(identity)
	if err != nil {
		return nil, err
	}
	endpoint := new(identityEndpoint)
	options := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: azcore.ClientOptions{
		Transport:        client,
		Retry:            policy.RetryOptions{MaxRetries: -1, TryTimeout: tokenTimeout},
		PerRetryPolicies: []policy.Policy{endpoint},
	}}
	if clientID != "" {
		options.ID = azidentity.ClientID(clientID)
	}
	next, err := azidentity.NewManagedIdentityCredential(options)
	if err != nil {
		return nil, err
	}
	return &credential{next: next, endpoint: endpoint}, nil
}

func (c *credential) GetToken(ctx context.Context, o policy.TokenRequestOptions) (azcore.AccessToken, error) {
	*c.endpoint = identityEndpoint{}
	tk, err := c.next.GetToken(ctx, o)
	if err == nil {
		return tk, nil
	}
	if c.endpoint.err != nil || c.endpoint.status != 0 {
		// The SDK's text is a page long and its errors don't unwrap.
		err = c.endpoint.cause()
	}
	return azcore.AccessToken{}, &Error{Op: "get a token for", Class: ClassIdentity, Code: c.endpoint.code, Status: c.endpoint.status, Err: err}
}

// An identityEndpoint is a policy that keeps the last answer of the endpoint.
type identityEndpoint struct {
	status  int
	code    string
	message string
	err     error // there was no answer
}

func (e *identityEndpoint) Do(req *policy.Request) (*http.Response, error) {
	resp, err := req.Next()
	*e = identityEndpoint{err: err}
	if err != nil {
		return nil, err
	}
	e.status = resp.StatusCode
	if body, err := runtime.Payload(resp); err == nil && resp.StatusCode != http.StatusOK {
		var b struct {
			Error       string `json:"error"`
			Description string `json:"error_description"`
		}
		if json.Unmarshal(body, &b) == nil {
			e.code, e.message = clean(b.Error), clean(b.Description)
		}
	}
	return resp, nil
}

func (e *identityEndpoint) cause() error {
	switch {
	case e.err != nil:
		return withoutURL(e.err)
	case e.message != "":
		return errors.New(brief(e.message))
	case e.status == http.StatusOK:
		return errors.New("the identity endpoint's answer holds no token")
	}
	return fmt.Errorf("the identity endpoint answered %s", http.StatusText(e.status))
}
