package vaulttest

import (
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/subtle"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// An Identity is a service principal of the tenant.
type Identity struct {
	ClientID   string // UUID, also called application id
	ObjectID   string // UUID; empty for a new one
	ResourceID string // Azure resource id of a user assigned identity

	// Assigned identities get tokens from the IMDS.
	Assigned bool

	// Certificate lets an identity get tokens from Entra ID. It needs an RSA key.
	Certificate *x509.Certificate
}

// tokenLifetime is that of an access token.
const tokenLifetime = 24 * time.Hour

// AddIdentity adds an identity with permissions such as "get", "wrapKey" and
// "unwrapKey" on all vaults.
func (s *Server) AddIdentity(id Identity, permissions ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addIdentity(id, permissions...)
}

func (s *Server) addIdentity(id Identity, permissions ...string) {
	if id.ObjectID == "" {
		id.ObjectID = newUUID()
	}
	s.identities[strings.ToLower(id.ClientID)] = &id
	s.permit(id.ClientID, permissions)
}

// Permit replaces the permissions of an identity, after Options.PermitDelay.
func (s *Server) Permit(clientID string, permissions ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.permit(clientID, permissions)
}

func (s *Server) permit(clientID string, permissions []string) {
	set := make(map[string]bool)
	for _, p := range permissions {
		set[p] = true
	}
	clientID = strings.ToLower(clientID)
	old, known := s.permitted[clientID]
	g := grant{new: set}
	if known && s.opts.PermitDelay > 0 {
		g.old, g.from = old.new, s.opts.Now().Add(s.opts.PermitDelay)
	}
	s.permitted[clientID] = g
}

// System returns the client id of the identity that the system assigned to this
// machine.
func (s *Server) System() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.system
}

// Unassign takes an identity from this machine; it stays in the tenant.
func (s *Server) Unassign(clientID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if id := s.identities[strings.ToLower(clientID)]; id != nil {
		id.Assigned = false
	}
	if strings.EqualFold(s.system, clientID) {
		s.system = ""
	}
}

// claims of an access token, of the v1 form that vaults accept.
type claims struct {
	Audience  string `json:"aud"`
	Issuer    string `json:"iss"`
	IssuedAt  int64  `json:"iat"`
	NotBefore int64  `json:"nbf"`
	Expires   int64  `json:"exp"`
	AppID     string `json:"appid"`
	ObjectID  string `json:"oid"`
	Subject   string `json:"sub"`
	Tenant    string `json:"tid"`
	Version   string `json:"ver"`
}

func (s *Server) issue(id *Identity, audience string) (token string, c claims, err error) {
	now := s.opts.Now()
	c = claims{
		Audience: audience, Issuer: s.issuer(),
		IssuedAt: now.Unix(), NotBefore: now.Add(-5 * time.Minute).Unix(), Expires: now.Add(tokenLifetime).Unix(),
		AppID: id.ClientID, ObjectID: id.ObjectID, Subject: id.ObjectID, Tenant: s.opts.Tenant, Version: "1.0",
	}
	token, err = signJWT(s.entraKey, "vaulttest", c)
	return token, c, err
}

func (s *Server) issuer() string { return "https://sts.windows.net/" + s.opts.Tenant + "/" }

// authenticate returns the identity of a bearer token that is good for audience.
func (s *Server) authenticate(header, audience string) (*Identity, error) {
	raw, ok := strings.CutPrefix(header, "Bearer ")
	if !ok {
		return nil, errors.New("no bearer token")
	}
	t, err := parseJWT(raw)
	if err != nil {
		return nil, err
	}
	var c claims
	if err := errors.Join(t.verify("RS256", &s.entraKey.PublicKey), json.Unmarshal(t.claims, &c)); err != nil {
		return nil, err
	}
	now := s.opts.Now().Unix()
	switch {
	case c.Audience != audience:
		return nil, fmt.Errorf("audience %s", c.Audience)
	case c.Issuer != s.issuer() || c.Tenant != s.opts.Tenant:
		return nil, fmt.Errorf("issuer %s", c.Issuer)
	case now < c.NotBefore || now >= c.Expires:
		return nil, errExpired
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.identities[strings.ToLower(c.AppID)]
	if id == nil {
		return nil, errors.New("unknown identity")
	}
	copied := *id
	return &copied, nil
}

var errExpired = errors.New("token expired")

// serveIMDS is http://169.254.169.254, and the agent of Azure Arc if the client
// has asked for that.
func (s *Server) serveIMDS(w http.ResponseWriter, r *http.Request) {
	if r.Host == arcHost {
		s.serveArc(w, r)
		return
	}
	s.run(w, r, Request{Route: "imds"}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		w.Header().Set("Server", "IMDS/150.870.65.1853")
		answer, status := s.imds(r)
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	})
}

func (s *Server) imds(r *http.Request) (answer map[string]string, status int) {
	bad := func(code, description string) (map[string]string, int) {
		return map[string]string{"error": code, "error_description": description}, http.StatusBadRequest
	}
	q := r.URL.Query()
	resource := q.Get("resource")
	switch {
	case r.URL.Path != "/metadata/identity/oauth2/token":
		return map[string]string{"error": "Not found"}, http.StatusNotFound
	case r.Method != http.MethodGet:
		return map[string]string{"error": "Method not allowed"}, http.StatusMethodNotAllowed
	case r.Header.Get("Metadata") != "true":
		return bad("bad_request_102", "Required metadata header not specified")
	case r.Header.Get("X-Forwarded-For") != "":
		return bad("bad_request_103", "X-Forwarded-For header not allowed")
	case len(q.Get("api-version")) != 10 || q.Get("api-version") < "2018-02-01": // a date
		return bad("invalid_request", "Required query variable 'api-version' is missing or not supported")
	case resource == "":
		return bad("invalid_request", "Required query variable 'resource' is missing")
	case !strings.HasPrefix(resource, "https://") || strings.HasSuffix(resource, "/.default"):
		return bad("invalid_resource", "AADSTS500011: The resource principal named "+resource+" was not found in the tenant.")
	}
	id, several := s.assigned(q.Get("client_id"), q.Get("object_id"), q.Get("msi_res_id")+q.Get("mi_res_id"))
	switch {
	case several:
		return bad("invalid_request", "Multiple user assigned identities exist, please specify the clientId / resourceId of the identity in the token request")
	case id == nil:
		return bad("invalid_request", "Identity not found")
	}
	answer, status = s.managedToken(id, resource)
	answer["refresh_token"] = ""
	return answer, status
}

// managedToken is what IMDS and the agent of Azure Arc answer to who may have a token.
func (s *Server) managedToken(id *Identity, resource string) (answer map[string]string, status int) {
	token, c, err := s.issue(id, resource)
	if err != nil {
		return map[string]string{"error": err.Error()}, http.StatusInternalServerError
	}
	return map[string]string{
		"access_token": token, "client_id": id.ClientID,
		"expires_in": strconv.FormatInt(c.Expires-c.IssuedAt, 10),
		"expires_on": strconv.FormatInt(c.Expires, 10), "not_before": strconv.FormatInt(c.NotBefore, 10),
		"resource": resource, "token_type": "Bearer",
	}, http.StatusOK
}

// assigned finds the identity that the IMDS takes for a request. Without a
// selector that's the system assigned one or, if there is none, the only user
// assigned one; several are none.
func (s *Server) assigned(clientID, objectID, resourceID string) (id *Identity, several bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var matches []*Identity
	for cid, id := range s.identities {
		switch {
		case !id.Assigned:
		case clientID != "":
			if strings.EqualFold(cid, clientID) {
				matches = append(matches, id)
			}
		case objectID != "":
			if strings.EqualFold(id.ObjectID, objectID) {
				matches = append(matches, id)
			}
		case resourceID != "":
			if strings.EqualFold(id.ResourceID, resourceID) {
				matches = append(matches, id)
			}
		case s.system == "" || strings.EqualFold(cid, s.system):
			matches = append(matches, id)
		}
	}
	if len(matches) != 1 {
		return nil, len(matches) > 1
	}
	copied := *matches[0]
	return &copied, false
}

// serveEntra is https://login.microsoftonline.com and its sisters.
func (s *Server) serveEntra(w http.ResponseWriter, r *http.Request, host string) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store, no-cache")
	base := "https://" + host + "/" + s.opts.Tenant
	tenant, path, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	inTenant := strings.EqualFold(tenant, s.opts.Tenant)
	var answer map[string]any
	route := "discovery"
	switch {
	case r.Method == http.MethodGet && r.URL.Path == "/common/discovery/instance":
		// About any instance that the public clouds know.
		asked := &url.URL{Host: host}
		if e := r.URL.Query().Get("authorization_endpoint"); e != "" {
			var err error
			if asked, err = url.Parse(e); err != nil {
				break
			}
		}
		if !isLogin(asked.Host) || strings.HasSuffix(asked.Host, "."+privateCloud) {
			break
		}
		host, base := asked.Host, "https://"+asked.Host+"/"+s.opts.Tenant
		answer = map[string]any{
			"tenant_discovery_endpoint": base + "/v2.0/.well-known/openid-configuration",
			"api-version":               "1.1",
			"metadata": []any{map[string]any{
				"preferred_network": host, "preferred_cache": host, "aliases": []string{host},
			}},
		}
	case r.Method == http.MethodGet && inTenant && path == "v2.0/.well-known/openid-configuration":
		answer = map[string]any{
			"authorization_endpoint":                base + "/oauth2/v2.0/authorize",
			"token_endpoint":                        base + "/oauth2/v2.0/token",
			"issuer":                                base + "/v2.0",
			"jwks_uri":                              base + "/discovery/v2.0/keys",
			"token_endpoint_auth_methods_supported": []string{"client_secret_post", "private_key_jwt", "client_secret_basic"},
			"response_types_supported":              []string{"code", "id_token", "code id_token", "id_token token"},
			"subject_types_supported":               []string{"pairwise"},
			"id_token_signing_alg_values_supported": []string{"RS256"},
		}
	case r.Method == http.MethodPost && inTenant && path == "oauth2/v2.0/token":
		route = "token"
	}
	s.run(w, r, Request{Route: route}, func(w http.ResponseWriter, r *http.Request) {
		status := http.StatusOK
		switch {
		case route == "token":
			answer, status = s.token(r, base+"/oauth2/v2.0/token")
		case answer == nil && tenant == "common":
			answer, status = entraError("invalid_instance", 50049, "Unknown or invalid instance."), http.StatusBadRequest
		case answer == nil:
			answer, status = entraError("invalid_request", 90002, "Tenant '"+tenant+"' not found."), http.StatusBadRequest
		}
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	})
}

func entraError(code string, number int, text string) map[string]any {
	return map[string]any{"error": code, "error_description": fmt.Sprintf("AADSTS%d: %s", number, text), "error_codes": []int{number}}
}

// token is the client credentials grant with a signed assertion (RFC 7523).
func (s *Server) token(r *http.Request, endpoint string) (map[string]any, int) {
	if err := r.ParseForm(); err != nil || r.PostForm.Get("grant_type") != "client_credentials" {
		return entraError("unsupported_grant_type", 70003, "The app requested an unsupported grant type."), http.StatusBadRequest
	}
	s.mu.Lock()
	id := s.identities[strings.ToLower(r.PostForm.Get("client_id"))]
	s.mu.Unlock()
	if id == nil {
		return entraError("unauthorized_client", 700016, "Application was not found in the directory."), http.StatusBadRequest
	}
	s.mu.Lock()
	iss := s.issuers[strings.ToLower(id.ClientID)]
	s.mu.Unlock()
	if r.PostForm.Get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer" || id.Certificate == nil && iss == nil {
		return entraError("invalid_client", 7000216, "'client_assertion', 'client_secret' or 'request' is required."), http.StatusUnauthorized
	}
	if iss != nil {
		if e := s.checkFederated(r.PostForm.Get("client_assertion"), iss); e != nil {
			return e, http.StatusUnauthorized
		}
	} else if err := s.checkAssertion(r.PostForm.Get("client_assertion"), id, endpoint); errors.Is(err, errExpired) {
		return entraError("invalid_client", 700024, "Client assertion is not within its valid time range."), http.StatusUnauthorized
	} else if err != nil {
		return entraError("invalid_client", 700027, "The certificate with identifier used to sign the client assertion is not registered, or the assertion is not valid: "+err.Error()), http.StatusUnauthorized
	}
	audience, ok := "", false
	for _, scope := range strings.Fields(r.PostForm.Get("scope")) {
		if a, found := strings.CutSuffix(scope, "/.default"); found {
			audience, ok = a, true
		}
	}
	if !ok {
		return entraError("invalid_scope", 1002012, "The provided value for scope is not valid: it must end with /.default."), http.StatusBadRequest
	}
	token, c, err := s.issue(id, audience)
	if err != nil {
		return map[string]any{"error": err.Error()}, http.StatusInternalServerError
	}
	lifetime := c.Expires - c.IssuedAt
	return map[string]any{"token_type": "Bearer", "expires_in": lifetime, "ext_expires_in": lifetime, "access_token": token}, http.StatusOK
}

// clockSkew is how many seconds a client's clock may be wrong.
const clockSkew = 300

func (s *Server) checkAssertion(assertion string, id *Identity, endpoint string) error {
	t, err := parseJWT(assertion)
	if err != nil {
		return err
	}
	var header struct {
		Alg     string `json:"alg"`
		X5t     string `json:"x5t"`
		X5tS256 string `json:"x5t#S256"`
	}
	var c struct {
		Audience  any    `json:"aud"`
		Issuer    string `json:"iss"`
		Subject   string `json:"sub"`
		Expires   int64  `json:"exp"`
		NotBefore int64  `json:"nbf"`
		ID        string `json:"jti"`
	}
	if err := errors.Join(json.Unmarshal(t.header, &header), json.Unmarshal(t.claims, &c)); err != nil {
		return err
	}
	sum1, sum256 := sha1.Sum(id.Certificate.Raw), sha256.Sum256(id.Certificate.Raw)
	by1, err1 := thumbprint(header.X5t)
	by256, err256 := thumbprint(header.X5tS256)
	if err1 != nil || err256 != nil ||
		subtle.ConstantTimeCompare(by1, sum1[:]) != 1 && subtle.ConstantTimeCompare(by256, sum256[:]) != 1 {
		return errors.New("unknown thumbprint")
	}
	pub, ok := id.Certificate.PublicKey.(*rsa.PublicKey)
	if !ok {
		return errors.New("not an RSA certificate")
	}
	if err := t.verify(header.Alg, pub); err != nil {
		return err
	}
	var audiences []string
	switch a := c.Audience.(type) {
	case string:
		audiences = []string{a}
	case []any:
		for _, v := range a {
			audiences = append(audiences, fmt.Sprint(v))
		}
	}
	now := s.opts.Now().Unix()
	switch {
	case !slices.Contains(audiences, endpoint):
		return fmt.Errorf("audience %v", c.Audience)
	case !strings.EqualFold(c.Issuer, id.ClientID) || !strings.EqualFold(c.Subject, id.ClientID):
		return errors.New("issuer or subject isn't the client")
	case now >= c.Expires+clockSkew || now < c.NotBefore-clockSkew:
		return errExpired
	case c.ID == "":
		return errors.New("no id")
	}
	return nil
}

// thumbprint accepts base64url, as documented, and padded standard base64, which
// the Go SDK sends and the live service therefore takes.
func thumbprint(s string) ([]byte, error) {
	return unb64(strings.NewReplacer("+", "-", "/", "_", "=", "").Replace(s))
}

func b64(p []byte) string { return base64.RawURLEncoding.EncodeToString(p) }

// unb64 accepts unpadded base64url and nothing else. The standard decoder skips
// line breaks.
func unb64(s string) ([]byte, error) {
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("line break in base64url")
	}
	return base64.RawURLEncoding.Strict().DecodeString(s)
}
