package vaulttest

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
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
	payload, err := json.Marshal(federatedClaims{iss.issuer, iss.subject, federatedAudience, now.Add(lifetime).Unix(), now.Add(-time.Minute).Unix()})
	if err != nil {
		return "", err
	}
	signed := b64([]byte(`{"typ":"JWT","alg":"RS256","kid":"cluster"}`)) + "." + b64(payload)
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(rand.Reader, k, crypto.SHA256, sum[:])
	return signed + "." + b64(sig), err
}

type federatedClaims struct {
	Issuer    string `json:"iss"`
	Subject   string `json:"sub"`
	Audience  string `json:"aud"`
	Expires   int64  `json:"exp"`
	NotBefore int64  `json:"nbf"`
}

// checkFederated returns the error body for an issuer's token that isn't good.
func (s *Server) checkFederated(jwt string, iss *issuer) map[string]any {
	signed, sig, ok := cutLast(jwt, ".")
	_, payload, ok2 := strings.Cut(signed, ".")
	sum := sha256.Sum256([]byte(signed))
	sigBytes, err := unb64(sig)
	if !ok || !ok2 || err != nil || rsa.VerifyPKCS1v15(&iss.key.PublicKey, crypto.SHA256, sum[:], sigBytes) != nil {
		return entraError("invalid_client", 70021, "No matching federated identity record found for presented assertion.")
	}
	var c federatedClaims
	body, err := unb64(payload)
	if err == nil {
		err = json.Unmarshal(body, &c)
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

// serveArc is the agent at 127.0.0.1:40342. Who wants a token has to show that it
// may read a file that the agent has just written.
func (s *Server) serveArc(w http.ResponseWriter, r *http.Request) {
	s.run(w, r, Request{Route: "arc"}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json; charset=utf-8")
		secret, challenged := strings.CutPrefix(r.Header.Get("Authorization"), "Basic ")
		q := r.URL.Query()
		var answer any
		status := http.StatusBadRequest
		switch {
		case s.opts.ArcKeys == "":
			panic(http.ErrAbortHandler) // there is no agent
		case r.URL.Path != "/metadata/identity/oauth2/token" || r.Method != http.MethodGet:
			answer, status = map[string]string{"error": "Not found"}, http.StatusNotFound
		case r.Header.Get("Metadata") != "true":
			answer = map[string]string{"error": "invalid_request", "error_description": "Required metadata header not specified"}
		case len(q.Get("api-version")) != 10 || q.Get("api-version") < "2019-08-15" || !strings.HasPrefix(q.Get("resource"), "https://"):
			answer = map[string]string{"error": "invalid_request", "error_description": "api-version or resource is missing or not supported"}
		case !challenged:
			name, err := s.arcChallenge()
			if err != nil {
				answer, status = map[string]string{"error": err.Error()}, http.StatusInternalServerError
				break
			}
			w.Header().Set("WWW-Authenticate", "Basic realm="+filepath.Join(arcDir, name))
			answer, status = map[string]string{"error": "unauthorized_client"}, http.StatusUnauthorized
		case !s.arcAnswer(secret):
			answer, status = map[string]string{"error": "unauthorized_client", "error_description": "The authorization is wrong or was used before"}, http.StatusUnauthorized
		default:
			id := s.assigned(q.Get("client_id"), q.Get("object_id"), q.Get("msi_res_id"))
			if id == nil {
				answer = map[string]string{"error": "invalid_request", "error_description": "Identity not found"}
				break
			}
			token, c, err := s.issue(id, q.Get("resource"))
			if err != nil {
				answer, status = map[string]string{"error": err.Error()}, http.StatusInternalServerError
				break
			}
			answer, status = map[string]string{
				"access_token": token, "client_id": id.ClientID, "expires_in": strconv.FormatInt(c.Expires-c.IssuedAt, 10),
				"expires_on": strconv.FormatInt(c.Expires, 10), "not_before": strconv.FormatInt(c.NotBefore, 10),
				"resource": c.Audience, "token_type": "Bearer",
			}, http.StatusOK
		}
		w.WriteHeader(status)
		json.NewEncoder(w).Encode(answer)
	})
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
