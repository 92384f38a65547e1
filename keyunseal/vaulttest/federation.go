package vaulttest

import (
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// An issuer is another identity provider, such as a Kubernetes cluster, that an
// identity trusts by a federated credential.
type issuer struct {
	key             *rsa.PrivateKey
	issuer, subject string
}

const federatedAudience = "api://AzureADTokenExchange"

// Federate gives an identity a federated credential, and returns a token of its
// issuer that is valid for so long from now on. Tokens of earlier calls are
// void.
func (s *Server) Federate(clientID string, lifetime time.Duration) (string, error) {
	k, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return "", err
	}
	iss := &issuer{k, "https://cluster.example/", "system:serviceaccount:default:hostcryptd"}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.identities[strings.ToLower(clientID)] == nil {
		return "", fmt.Errorf("vaulttest: no identity %s", clientID)
	}
	s.issuers[strings.ToLower(clientID)] = iss
	now := s.opts.Now()
	return signJWT(k, "cluster", federatedClaims{iss.issuer, iss.subject, federatedAudience, now.Add(lifetime).Unix(), now.Add(-time.Minute).Unix()})
}

type federatedClaims struct {
	Issuer    string `json:"iss"`
	Subject   string `json:"sub"`
	Audience  string `json:"aud"`
	Expires   int64  `json:"exp"`
	NotBefore int64  `json:"nbf"`
}

// checkFederated returns the error body for an issuer's token that isn't good.
func (s *Server) checkFederated(assertion string, iss *issuer) map[string]any {
	var c federatedClaims
	t, err := parseJWT(assertion)
	if err == nil {
		err = errors.Join(t.verify("RS256", &iss.key.PublicKey), json.Unmarshal(t.claims, &c))
	}
	now := s.opts.Now().Unix()
	switch {
	case err != nil || c.Issuer != iss.issuer || c.Subject != iss.subject || c.Audience != federatedAudience:
		return entraError("invalid_client", 70021, "No matching federated identity record found for presented assertion.")
	case now >= c.Expires+clockSkew || now < c.NotBefore-clockSkew:
		return entraError("invalid_client", 700024, "Client assertion is not within its valid time range.")
	}
	return nil
}

// arcDir is where the Azure Arc agent's clients look for its files.
const arcDir = "/var/opt/azcmagent/tokens"

// serveArc is the agent at 127.0.0.1:40342.
func (s *Server) serveArc(w http.ResponseWriter, r *http.Request) {
	s.run(w, r, Request{Route: "arc"}, func(w http.ResponseWriter, r *http.Request) {
		if s.opts.ArcKeys == "" {
			panic(http.ErrAbortHandler) // there is no agent
		}
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		answer, status := s.arc(w.Header(), r)
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	})
}

// arc answers. Who wants a token has to show that it may read a file that the agent
// has just written.
func (s *Server) arc(header http.Header, r *http.Request) (answer map[string]string, status int) {
	refuse := func(status int, code, description string) (map[string]string, int) {
		return map[string]string{"error": code, "error_description": description}, status
	}
	q := r.URL.Query()
	switch {
	case r.URL.Path != "/metadata/identity/oauth2/token" || r.Method != http.MethodGet:
		return map[string]string{"error": "Not found"}, http.StatusNotFound
	case r.Header.Get("Metadata") != "true":
		return refuse(http.StatusBadRequest, "invalid_request", "Required metadata header not specified")
	case len(q.Get("api-version")) != 10 || q.Get("api-version") < "2019-08-15" || !strings.HasPrefix(q.Get("resource"), "https://"):
		return refuse(http.StatusBadRequest, "invalid_request", "api-version or resource is missing or not supported")
	}
	secret, challenged := strings.CutPrefix(r.Header.Get("Authorization"), "Basic ")
	if !challenged {
		name, err := s.arcChallenge()
		if err != nil {
			return map[string]string{"error": err.Error()}, http.StatusInternalServerError
		}
		header.Set("WWW-Authenticate", "Basic realm="+filepath.Join(arcDir, name))
		return map[string]string{"error": "unauthorized_client"}, http.StatusUnauthorized
	}
	if !s.arcAnswer(secret) {
		return refuse(http.StatusUnauthorized, "unauthorized_client", "The authorization is wrong or was used before")
	}
	id, _ := s.assigned(q.Get("client_id"), q.Get("object_id"), q.Get("msi_res_id"))
	if id == nil {
		return refuse(http.StatusBadRequest, "invalid_request", "Identity not found")
	}
	return s.managedToken(id, q.Get("resource"))
}

// arcChallenge writes a file for the client to read, and returns its name.
func (s *Server) arcChallenge() (string, error) {
	name, secret := newUUID()+".key", newUUID()
	if err := os.WriteFile(filepath.Join(s.opts.ArcKeys, name), []byte(secret), 0o640); err != nil {
		return "", err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.arcKeys[secret] = name
	return name, nil
}

// arcAnswer tells whether a challenge is answered, once.
func (s *Server) arcAnswer(secret string) bool {
	s.mu.Lock()
	name, ok := s.arcKeys[secret]
	delete(s.arcKeys, secret)
	s.mu.Unlock()
	if ok {
		if err := os.Remove(filepath.Join(s.opts.ArcKeys, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return false
		}
	}
	return ok
}
