package vaulttest

import (
	"cmp"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"math/big"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A key is all versions of one name in one vault, newest last.
type key struct {
	host, name string
	versions   []*version
	tags       map[string]string
	policy     *rotationPolicy // nil for the service's own

	// Zero unless the key is being deleted or recovered. While deleted it's gone
	// from /keys at once, and in /deletedkeys after the delay; the other way
	// round for a recovery.
	deleted, recovered time.Time
}

type version struct {
	id               string          // 32 hex digits
	priv             *rsa.PrivateKey // nil for an AES key of a managed HSM
	aes              []byte
	ops              []string
	enabled          bool
	nbf, exp         time.Time // zero for none
	created, updated time.Time
}

var allOps = []string{"encrypt", "decrypt", "sign", "verify", "wrapKey", "unwrapKey"}

func keyID(host, name string) string { return strings.ToLower(host + "/" + name) }

func (k *key) kid(v *version) string {
	return "https://" + k.host + "/keys/" + k.name + "/" + v.id
}

// splitURL takes a key URL apart.
func splitURL(url string) (host, name, ver string, err error) {
	rest, ok := strings.CutPrefix(url, "https://")
	parts := strings.Split(rest, "/")
	if !ok || len(parts) < 3 || len(parts) > 4 || !isVault(strings.ToLower(parts[0])) || parts[1] != "keys" {
		return "", "", "", fmt.Errorf("vaulttest: %q is not the URL of a vault's key", url)
	}
	parts = append(parts, "")
	return strings.ToLower(parts[0]), parts[2], parts[3], nil
}

// AddKey makes an RSA key of 2048, 3072 or 4096 bits, or a new version of it if
// there is one of that name already, and returns its URL with version.
func (s *Server) AddKey(url string, bits int) (string, error) {
	host, name, _, err := splitURL(url)
	if err != nil {
		return "", err
	}
	v, err := s.newVersion(bits)
	if err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addVersion(host, name, v), nil
}

// AddAESKey makes a 256-bit AES key (oct-HSM) in a managed HSM, or a new version
// of it, and returns its URL with version.
func (s *Server) AddAESKey(url string) (string, error) {
	host, name, _, err := splitURL(url)
	if err != nil {
		return "", err
	}
	if !isHSM(host) {
		return "", fmt.Errorf("vaulttest: %s is not a managed HSM", host)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.addVersion(host, name, s.newAESVersion()), nil
}

func (s *Server) newVersion(bits int) (*version, error) {
	if bits != 2048 && bits != 3072 && bits != 4096 {
		return nil, fmt.Errorf("vaulttest: RSA key of %d bits", bits)
	}
	priv, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		return nil, err
	}
	v := s.emptyVersion()
	v.priv = priv
	return v, nil
}

func (s *Server) newAESVersion() *version {
	v := s.emptyVersion()
	v.aes = make([]byte, 32)
	rand.Read(v.aes)
	return v
}

func (s *Server) emptyVersion() *version {
	var id [16]byte
	rand.Read(id[:])
	now := s.opts.Now()
	return &version{id: hex.EncodeToString(id[:]), ops: allOps, enabled: true, created: now, updated: now}
}

// addVersion needs mu.
func (s *Server) addVersion(host, name string, v *version) string {
	k := s.keys[keyID(host, name)]
	if k == nil {
		k = &key{host: host, name: name}
		s.keys[keyID(host, name)] = k
	}
	k.versions = append(k.versions, v)
	return k.kid(v)
}

// KeyURL returns the URL with version of the newest version of a key.
func (s *Server) KeyURL(url string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, v, err := s.find(url)
	if err != nil {
		return "", false
	}
	return k.kid(v), true
}

// find needs mu.
func (s *Server) find(url string) (*key, *version, error) {
	host, name, ver, err := splitURL(url)
	if err != nil {
		return nil, nil, err
	}
	k := s.keys[keyID(host, name)]
	if k == nil {
		return nil, nil, fmt.Errorf("vaulttest: no key %s", url)
	}
	v := k.version(ver)
	if v == nil {
		return nil, nil, fmt.Errorf("vaulttest: no version %s", url)
	}
	return k, v, nil
}

// version returns a version, the newest for an empty id.
func (k *key) version(id string) *version {
	if id == "" {
		return k.versions[len(k.versions)-1]
	}
	for _, v := range k.versions {
		if strings.EqualFold(v.id, id) {
			return v
		}
	}
	return nil
}

// SetEnabled enables or disables one version, the newest if url has none.
func (s *Server) SetEnabled(url string, enabled bool) error {
	return s.change(url, func(v *version) { v.enabled = enabled })
}

// SetValidity sets when a version may be used; zero times for no limit.
func (s *Server) SetValidity(url string, notBefore, expires time.Time) error {
	return s.change(url, func(v *version) { v.nbf, v.exp = notBefore, expires })
}

// SetOperations sets the key_ops of a version.
func (s *Server) SetOperations(url string, ops ...string) error {
	return s.change(url, func(v *version) { v.ops = ops })
}

func (s *Server) change(url string, f func(*version)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, v, err := s.find(url)
	if err != nil {
		return err
	}
	f(v)
	v.updated = s.opts.Now()
	return nil
}

// Delete deletes a key with all its versions, softly.
func (s *Server) Delete(url string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, _, err := s.find(url)
	if err == nil {
		k.deleted, k.recovered = s.opts.Now(), time.Time{}
	}
	return err
}

// Recover undoes Delete, after the delay.
func (s *Server) Recover(url string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, _, err := s.find(url)
	if err == nil {
		k.deleted, k.recovered = time.Time{}, s.opts.Now()
	}
	return err
}

// live reports whether a key is visible in /keys.
func (s *Server) live(k *key) bool {
	return k.deleted.IsZero() && !s.opts.Now().Before(k.recovered.Add(s.opts.AsyncDelay))
}

// inDeleted reports whether a key is visible in /deletedkeys.
func (s *Server) inDeleted(k *key) bool {
	if !k.deleted.IsZero() {
		return !s.opts.Now().Before(k.deleted.Add(s.opts.AsyncDelay))
	}
	return !s.live(k)
}

// apiError is an error body of Key Vault.
type apiError struct {
	status               int
	code, inner, message string
}

func (e *apiError) Error() string { return e.message }

func writeError(w http.ResponseWriter, e *apiError) {
	type inner struct {
		Code string `json:"code"`
	}
	var body struct {
		Error struct {
			Code    string `json:"code"`
			Message string `json:"message"`
			Inner   *inner `json:"innererror,omitempty"`
		} `json:"error"`
	}
	body.Error.Code, body.Error.Message = e.code, e.message
	if e.inner != "" {
		body.Error.Inner = &inner{e.inner}
	}
	writeJSON(w, e.status, body)
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		panic("vaulttest: " + err.Error())
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Content-Length", fmt.Sprint(len(b)))
	w.WriteHeader(status)
	w.Write(b)
}

func badParameter(format string, args ...any) *apiError {
	return &apiError{http.StatusBadRequest, "BadParameter", "", fmt.Sprintf(format, args...)}
}

// apiVersions are the values of api-version that the service has had for keys.
var apiVersions = []string{"7.0", "7.1", "7.2", "7.3", "7.4", "7.5", "7.6", "2025-07-01"}

// A route is one operation of the REST interface.
type route struct {
	name       string // as in Fault
	permission string
	action     string // of Azure RBAC
	changes    bool   // not possible where the vault is read-only
	operation  string // as in the log of Key Vault
	serve      func(s *Server, c *call) (any, error)
}

// A call is one authenticated request.
type call struct {
	host, name, version string
	query               url.Values
	body                []byte
	identity            *Identity
}

var routes = map[string]*route{
	"GET key":             {"get", "get", "read", false, "KeyGet", (*Server).getKey},
	"GET versions":        {"versions", "list", "read", false, "KeyListVersions", (*Server).listVersions},
	"POST create":         {"create", "create", "create/action", true, "KeyCreate", (*Server).createKey},
	"PATCH key":           {"update", "update", "update/action", true, "KeyUpdate", (*Server).updateKey},
	"DELETE key":          {"delete", "delete", "delete", true, "KeyDelete", (*Server).deleteKey},
	"POST rotate":         {"rotate", "rotate", "rotate/action", true, "KeyRotate", (*Server).rotateKey},
	"GET rotationpolicy":  {"getpolicy", "getRotationPolicy", "rotationpolicy/read", false, "KeyGetRotationPolicy", (*Server).getPolicy},
	"PUT rotationpolicy":  {"setpolicy", "setRotationPolicy", "rotationpolicy/write", true, "KeyUpdateRotationPolicy", (*Server).setPolicy},
	"POST wrapkey":        {"wrapkey", "wrapKey", "wrap/action", false, "KeyWrap", (*Server).wrap},
	"POST unwrapkey":      {"unwrapkey", "unwrapKey", "unwrap/action", false, "KeyUnwrap", (*Server).unwrap},
	"POST sign":           {"sign", "sign", "sign/action", false, "KeySign", (*Server).sign},
	"GET deletedkey":      {"getdeleted", "get", "read", false, "KeyGetDeleted", (*Server).getDeleted},
	"DELETE deletedkey":   {"purge", "purge", "purge/action", true, "KeyPurge", (*Server).purgeDeleted},
	"POST deletedrecover": {"recover", "recover", "recover/action", true, "KeyRecover", (*Server).recoverDeleted},
}

// match finds the route of a request: /keys/NAME[/VERSION][/OPERATION] or
// /deletedkeys/NAME[/OPERATION]. A trailing slash stands for an empty version.
func match(r *http.Request) (*route, *call) {
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	if len(parts) < 2 || parts[1] == "" {
		return nil, nil
	}
	c := &call{name: parts[1]}
	rest := parts[2:]
	kind := ""
	switch {
	case strings.EqualFold(parts[0], "deletedkeys") && len(rest) == 0:
		kind = "deletedkey"
	case strings.EqualFold(parts[0], "deletedkeys") && len(rest) == 1:
		kind = "deleted" + strings.ToLower(rest[0])
	case strings.EqualFold(parts[0], "keys"):
		kind = "key"
		if len(rest) > 0 && !isVersion(rest[len(rest)-1]) {
			kind, rest = strings.ToLower(rest[len(rest)-1]), rest[:len(rest)-1]
		}
		if len(rest) > 1 {
			return nil, nil
		}
		if len(rest) == 1 {
			c.version = rest[0]
		}
	}
	return routes[r.Method+" "+kind], c
}

func isVersion(s string) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == 16
}

func (s *Server) serveVault(w http.ResponseWriter, r *http.Request, host string) {
	requestID := newUUID()
	h := w.Header()
	for k, v := range map[string]string{
		"Cache-Control": "no-cache", "Pragma": "no-cache", "Expires": "-1",
		"Strict-Transport-Security":     "max-age=31536000;includeSubDomains",
		"X-Content-Type-Options":        "nosniff",
		"X-Ms-Keyvault-Network-Info":    "conn_type=Ipv4;addr=127.0.0.1;act_addr_fam=InterNetwork;",
		"X-Ms-Keyvault-Region":          s.region(),
		"X-Ms-Keyvault-Service-Version": "1.9.1504.1",
		"X-Ms-Request-Id":               requestID,
	} {
		h.Set(k, v)
	}

	_, service, _ := strings.Cut(host, ".") // vault.azure.net
	_, cloud, _ := strings.Cut(service, ".")
	resource := "https://" + service
	identity, err := s.authenticate(r.Header.Get("Authorization"), resource)
	if err != nil {
		s.run(w, r, Request{Route: "challenge", RequestID: requestID}, func(w http.ResponseWriter, r *http.Request) {
			e := &apiError{http.StatusUnauthorized, "Unauthorized", "", "AKV10000: Request is missing a Bearer or PoP token."}
			if errors.Is(err, errExpired) {
				e.message = "[TokenExpired] Error validating token: 'S2S12086'."
			} else if r.Header.Get("Authorization") != "" {
				e.message = "AKV10022: Invalid token: " + err.Error()
			}
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer authorization="https://%s/%s", resource="%s"`, loginHosts[cloud], s.opts.Tenant, resource))
			writeError(w, e)
		})
		return
	}

	rt, c := match(r)
	if rt == nil {
		rt, c = &route{name: "unknown"}, new(call)
	}
	c.host, c.identity, c.query = host, identity, r.URL.Query()
	entry := Request{Route: rt.name, Operation: rt.operation, RequestID: requestID, ClientID: identity.ClientID}
	s.run(w, r, entry, func(w http.ResponseWriter, r *http.Request) {
		answer, err := s.serveRoute(rt, c, r)
		var e *apiError
		switch {
		case errors.As(err, &e):
			writeError(w, e)
		case err != nil:
			writeError(w, &apiError{http.StatusInternalServerError, "InternalServerError", "", err.Error()})
		case answer == nil:
			w.WriteHeader(http.StatusNoContent)
		default:
			writeJSON(w, http.StatusOK, answer)
		}
	})
}

func (s *Server) serveRoute(rt *route, c *call, r *http.Request) (any, error) {
	v := r.URL.Query().Get("api-version")
	switch {
	case v == "":
		return nil, badParameter("The 'api-version' parameter is missing.")
	case !slices.Contains(apiVersions, v):
		return nil, badParameter("The specified version (%s) is not recognized. Consider using the latest supported version (%s).", v, apiVersions[len(apiVersions)-1])
	case rt.serve == nil:
		return nil, &apiError{http.StatusMethodNotAllowed, "MethodNotAllowed", "", "The method is not allowed for this path."}
	}
	var err error
	if c.body, err = io.ReadAll(io.LimitReader(r.Body, 64<<10)); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.admit(rt, c); err != nil {
		return nil, err
	}
	return rt.serve(s, c)
}

// The handlers below run with mu held.

// lookup finds a live key and one of its versions.
func (s *Server) lookup(c *call) (*key, *version, error) {
	k := s.keys[keyID(c.host, c.name)]
	if k != nil && s.live(k) {
		if v := k.version(c.version); v != nil {
			return k, v, nil
		}
	}
	id := c.name
	if c.version != "" {
		id += "/" + c.version
	}
	return nil, nil, &apiError{http.StatusNotFound, "KeyNotFound", "", fmt.Sprintf(
		"A key with (name/id) %s was not found in this key vault. If you recently deleted this key you may be able to recover it using the correct recovery command. For help resolving this issue, please see https://go.microsoft.com/fwlink/?linkid=2125182", id)}
}

type attributes struct {
	Enabled         bool   `json:"enabled"`
	NotBefore       int64  `json:"nbf,omitempty"`
	Expires         int64  `json:"exp,omitempty"`
	Created         int64  `json:"created"`
	Updated         int64  `json:"updated"`
	RecoveryLevel   string `json:"recoveryLevel"`
	RecoverableDays int    `json:"recoverableDays"`
	Exportable      bool   `json:"exportable"`
	HSMPlatform     string `json:"hsmPlatform"`
}

type jwk struct {
	KID string   `json:"kid"`
	Kty string   `json:"kty"`
	Ops []string `json:"key_ops"`
	N   string   `json:"n,omitempty"`
	E   string   `json:"e,omitempty"`
}

type bundle struct {
	RecoveryID  string            `json:"recoveryId,omitempty"`
	DeletedDate int64             `json:"deletedDate,omitempty"`
	PurgeDate   int64             `json:"scheduledPurgeDate,omitempty"`
	Key         jwk               `json:"key"`
	Attributes  attributes        `json:"attributes"`
	Tags        map[string]string `json:"tags,omitempty"`
}

const recoverableDays = 90

func (s *Server) attributes(v *version) attributes {
	a := attributes{
		Enabled: v.enabled, Created: v.created.Unix(), Updated: v.updated.Unix(),
		RecoveryLevel: s.opts.RecoveryLevel, RecoverableDays: recoverableDays, HSMPlatform: "0",
	}
	if !v.nbf.IsZero() {
		a.NotBefore = v.nbf.Unix()
	}
	if !v.exp.IsZero() {
		a.Expires = v.exp.Unix()
	}
	return a
}

func (s *Server) bundle(k *key, v *version) *bundle {
	b := &bundle{Key: jwk{KID: k.kid(v), Kty: "oct-HSM", Ops: v.ops}, Attributes: s.attributes(v), Tags: k.tags}
	if v.priv != nil {
		b.Key.Kty, b.Key.N, b.Key.E = "RSA", b64(v.priv.N.Bytes()), b64(big.NewInt(int64(v.priv.E)).Bytes())
		if isHSM(k.host) || s.opts.HSMKeys {
			b.Key.Kty = "RSA-HSM"
		}
	}
	return b
}

func (s *Server) deletedBundle(k *key) *bundle {
	b := s.bundle(k, k.version(""))
	b.RecoveryID = "https://" + k.host + "/deletedkeys/" + k.name
	b.DeletedDate = k.deleted.Unix()
	b.PurgeDate = k.deleted.AddDate(0, 0, recoverableDays).Unix()
	return b
}

func (s *Server) getKey(c *call) (any, error) {
	k, v, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	return s.bundle(k, v), nil
}

func (s *Server) listVersions(c *call) (any, error) {
	c.version = ""
	k, _, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	type item struct {
		KID        string            `json:"kid"`
		Attributes attributes        `json:"attributes"`
		Tags       map[string]string `json:"tags,omitempty"`
	}
	list := struct {
		Value    []item  `json:"value"`
		NextLink *string `json:"nextLink"`
	}{Value: []item{}}
	size := maxPage
	if m := c.query.Get("maxresults"); m != "" {
		if size, err = strconv.Atoi(m); err != nil || size < 1 || size > maxPage {
			return nil, badParameter("The 'maxresults' parameter has to be between 1 and %d.", maxPage)
		}
	}
	sorted := slices.SortedFunc(slices.Values(k.versions), func(a, b *version) int { return cmp.Compare(a.id, b.id) })
	if skip := c.query.Get("$skiptoken"); skip != "" { // the last version of the page before
		after, err := unb64(skip)
		if err != nil {
			return nil, badParameter("The '$skiptoken' parameter is invalid.")
		}
		sorted = slices.DeleteFunc(sorted, func(v *version) bool { return v.id <= string(after) })
	}
	for _, v := range sorted[:min(size, len(sorted))] {
		list.Value = append(list.Value, item{k.kid(v), s.attributes(v), k.tags})
	}
	if len(sorted) > size {
		q := url.Values{"api-version": c.query["api-version"], "$skiptoken": {b64([]byte(sorted[size-1].id))}}
		if m := c.query.Get("maxresults"); m != "" {
			q.Set("maxresults", m)
		}
		link := "https://" + k.host + ":443/keys/" + k.name + "/versions?" + q.Encode()
		list.NextLink = &link
	}
	return list, nil
}

// maxPage is how many versions a page has at most.
const maxPage = 25

type attributeChange struct {
	Enabled   *bool  `json:"enabled"`
	NotBefore *int64 `json:"nbf"`
	Expires   *int64 `json:"exp"`
}

func (a attributeChange) apply(v *version) {
	if a.Enabled != nil {
		v.enabled = *a.Enabled
	}
	if a.NotBefore != nil {
		v.nbf = time.Unix(*a.NotBefore, 0)
	}
	if a.Expires != nil {
		v.exp = time.Unix(*a.Expires, 0)
	}
}

func (s *Server) createKey(c *call) (any, error) {
	var p struct {
		Kty        string            `json:"kty"`
		Size       int               `json:"key_size"`
		Ops        []string          `json:"key_ops"`
		Attributes attributeChange   `json:"attributes"`
		Tags       map[string]string `json:"tags"`
	}
	if err := json.Unmarshal(c.body, &p); err != nil {
		return nil, badParameter("The request body is not valid JSON.")
	}
	if p.Kty != "RSA" {
		return nil, badParameter("Property kty has the unsupported value %q.", p.Kty)
	}
	if p.Size == 0 {
		p.Size = 2048
	}
	if k := s.keys[keyID(c.host, c.name)]; k != nil && !s.live(k) {
		return nil, &apiError{http.StatusConflict, "Conflict", "ObjectIsDeletedButRecoverable", fmt.Sprintf(
			"Key %s is currently in a deleted but recoverable state, and its name cannot be reused; in this state, the key can only be recovered or purged.", c.name)}
	}
	v, err := s.newVersion(p.Size)
	if err != nil {
		return nil, badParameter("Property key_size has the invalid value %d.", p.Size)
	}
	if p.Ops != nil {
		v.ops = p.Ops
	}
	p.Attributes.apply(v)
	s.addVersion(c.host, c.name, v)
	k := s.keys[keyID(c.host, c.name)]
	k.tags = p.Tags
	return s.bundle(k, v), nil
}

func (s *Server) updateKey(c *call) (any, error) {
	k, v, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	var p struct {
		Ops        []string        `json:"key_ops"`
		Attributes attributeChange `json:"attributes"`
	}
	if err := json.Unmarshal(c.body, &p); err != nil {
		return nil, badParameter("The request body is not valid JSON.")
	}
	if p.Ops != nil {
		v.ops = p.Ops
	}
	p.Attributes.apply(v)
	v.updated = s.opts.Now()
	return s.bundle(k, v), nil
}

func (s *Server) rotateKey(c *call) (any, error) {
	k, old, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	v := s.newAESVersion()
	if old.priv != nil {
		if v, err = s.newVersion(old.priv.N.BitLen()); err != nil {
			return nil, err
		}
	}
	v.ops = old.ops
	if k.policy != nil && k.policy.Attributes.ExpiryTime != "" {
		v.exp, _ = addPeriod(v.created, k.policy.Attributes.ExpiryTime) // checked when it was set
	}
	s.addVersion(c.host, c.name, v)
	return s.bundle(k, v), nil
}

func (s *Server) deleteKey(c *call) (any, error) {
	k, _, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	k.deleted, k.recovered = s.opts.Now(), time.Time{}
	return s.deletedBundle(k), nil
}

func (s *Server) lookupDeleted(c *call) (*key, error) {
	k := s.keys[keyID(c.host, c.name)]
	if k == nil || !s.inDeleted(k) {
		return nil, &apiError{http.StatusNotFound, "KeyNotFound", "", "Deleted Key not found: " + c.name}
	}
	return k, nil
}

func (s *Server) getDeleted(c *call) (any, error) {
	k, err := s.lookupDeleted(c)
	if err != nil {
		return nil, err
	}
	return s.deletedBundle(k), nil
}

func (s *Server) recoverDeleted(c *call) (any, error) {
	k, err := s.lookupDeleted(c)
	if err != nil {
		return nil, err
	}
	k.deleted, k.recovered = time.Time{}, s.opts.Now()
	return s.bundle(k, k.version("")), nil
}

func (s *Server) purgeDeleted(c *call) (any, error) {
	k, err := s.lookupDeleted(c)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(s.opts.RecoveryLevel, "Purgeable") {
		return nil, &apiError{http.StatusForbidden, "Forbidden", "ForbiddenByPolicy", "Operation \"purge\" is not allowed because purge protection is enabled for this vault."}
	}
	delete(s.keys, keyID(k.host, k.name))
	return nil, nil
}

type operation struct {
	Alg   string `json:"alg"`
	Value string `json:"value"`
}

type result struct {
	KID   string `json:"kid"`
	Alg   string `json:"alg,omitempty"` // a managed HSM repeats it
	Value string `json:"value"`
}

// The algorithms of AES keys that pass by the names of PKCS #11; the first is
// A256KW under another name.
const (
	algCKMWrap = "CKM_AES_KEY_WRAP"
	algCKMPad  = "CKM_AES_KEY_WRAP_PAD"
)

// An operand is what wrapkey and unwrapkey work on.
type operand struct {
	key     *key
	version *version
	newHash func() hash.Hash // of OAEP; nil for an AES key
	padded  bool             // how an AES key wraps
	value   []byte
	alg     string // what the answer repeats
}

// operand finds the key of an operation, reads its body and checks that the key may
// be used for it.
func (s *Server) operand(c *call, op string) (*operand, error) {
	k, v, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	var p operation
	if err := json.Unmarshal(c.body, &p); err != nil {
		return nil, badParameter("The request body is missing or not valid JSON.")
	}
	o := &operand{key: k, version: v, padded: p.Alg == algCKMPad}
	switch {
	case p.Alg == "RSA-OAEP-256" && v.priv != nil:
		o.newHash = sha256.New
	case p.Alg == "RSA-OAEP" && v.priv != nil:
		o.newHash = sha1.New
	case (p.Alg == "A256KW" || p.Alg == algCKMWrap || p.Alg == algCKMPad) && v.aes != nil:
	default:
		return nil, badParameter("Property alg has the invalid or unsupported value %q.", p.Alg)
	}
	if o.value, err = unb64(p.Value); err != nil || len(o.value) == 0 {
		return nil, badParameter("Property value is not a valid base64url string.")
	}
	if isHSM(c.host) {
		o.alg = p.Alg
	}
	return o, s.usable(v, op)
}

func (o *operand) result(value []byte) result { return result{o.key.kid(o.version), o.alg, b64(value)} }

// usable checks what a key's attributes allow. Outside its validity a key may
// still unwrap, but neither wrap nor sign; when disabled it may not.
func (s *Server) usable(v *version, op string) error {
	forbidden := func(inner, format string, args ...any) error {
		return &apiError{http.StatusForbidden, "Forbidden", inner, fmt.Sprintf(format, args...)}
	}
	now := s.opts.Now()
	switch {
	case !slices.Contains(v.ops, op):
		return forbidden("KeyOperationForbidden", "Operation %s is not permitted on this key.", op)
	case !v.enabled && (op != "wrapKey" || !s.opts.WrapWhenDisabled):
		return forbidden("KeyDisabled", "Operation %s is not allowed on a disabled key.", op)
	case (op == "wrapKey" || op == "sign") && !v.nbf.IsZero() && now.Before(v.nbf):
		return forbidden("KeyNotYetValid", "Operation %s is not allowed on a key that is not yet valid.", op)
	case (op == "wrapKey" || op == "sign") && !v.exp.IsZero() && !now.Before(v.exp):
		return forbidden("KeyExpired", "Operation %s is not allowed on an expired key.", op)
	}
	return nil
}

func (s *Server) wrap(c *call) (any, error) {
	o, err := s.operand(c, "wrapKey")
	if err != nil {
		return nil, err
	}
	if s.opts.Plaintext != nil {
		s.opts.Plaintext("wrapkey", o.value)
	}
	if o.newHash == nil {
		wrap := aesWrap
		if o.padded {
			wrap = aesWrapPad
		}
		wrapped, err := wrap(o.version.aes, o.value)
		if err != nil {
			return nil, badParameter("%v", err)
		}
		return o.result(wrapped), nil
	}
	wrapped, err := rsa.EncryptOAEP(o.newHash(), rand.Reader, &o.version.priv.PublicKey, o.value, nil)
	if err != nil {
		return nil, badParameter("Property value is too long for this key and algorithm.")
	}
	return o.result(wrapped), nil
}

func (s *Server) unwrap(c *call) (any, error) {
	o, err := s.operand(c, "unwrapKey")
	if err != nil {
		return nil, err
	}
	var plain []byte
	switch priv := o.version.priv; {
	case o.padded:
		plain, err = aesUnwrapPad(o.version.aes, o.value)
	case o.newHash == nil:
		plain, err = aesUnwrap(o.version.aes, o.value)
	case len(o.value) != priv.Size():
		return nil, badParameter("Property value has %d bytes, the key has %d.", len(o.value), priv.Size())
	default:
		plain, err = rsa.DecryptOAEP(o.newHash(), nil, priv, o.value, nil)
	}
	if err != nil {
		return nil, badParameter("The parameter is incorrect.")
	}
	if s.opts.Plaintext != nil {
		s.opts.Plaintext("unwrapkey", plain)
	}
	return o.result(plain), nil
}

// sign signs a digest of SHA-256 with an RSA key.
func (s *Server) sign(c *call) (any, error) {
	k, v, err := s.lookup(c)
	if err != nil {
		return nil, err
	}
	var p operation
	if err := json.Unmarshal(c.body, &p); err != nil {
		return nil, badParameter("The request body is missing or not valid JSON.")
	}
	if v.priv == nil || p.Alg != "PS256" && p.Alg != "RS256" {
		return nil, badParameter("Property alg has the invalid or unsupported value %q.", p.Alg)
	}
	digest, err := unb64(p.Value)
	if err != nil || len(digest) != sha256.Size {
		return nil, badParameter("Property value is not a digest of SHA-256 as a base64url string.")
	}
	if err := s.usable(v, "sign"); err != nil {
		return nil, err
	}
	var value []byte
	if p.Alg == "PS256" {
		value, err = rsa.SignPSS(rand.Reader, v.priv, crypto.SHA256, digest, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
	} else {
		value, err = rsa.SignPKCS1v15(nil, v.priv, crypto.SHA256, digest)
	}
	if err != nil {
		return nil, err
	}
	return result{KID: k.kid(v), Value: b64(value)}, nil
}
