package vaulttest

import (
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// stateFile is the one file in Options.Dir. It holds private keys: those of a
// test double, which protect nothing.
const stateFile = "vaulttest.json"

type savedState struct {
	Tenant string     `json:"tenant"`
	CACert []byte     `json:"ca_cert"` // DER
	CAKey  []byte     `json:"ca_key"`  // PKCS #8
	System *Identity  `json:"system,omitempty"`
	Keys   []savedKey `json:"keys"`
}

type savedKey struct {
	Host      string            `json:"host"`
	Name      string            `json:"name"`
	Tags      map[string]string `json:"tags,omitempty"`
	Deleted   time.Time         `json:"deleted"`
	Recovered time.Time         `json:"recovered"`
	Policy    *rotationPolicy   `json:"policy,omitempty"`
	Versions  []savedVersion    `json:"versions"`
}

type savedVersion struct {
	ID        string    `json:"id"`
	Key       []byte    `json:"key,omitempty"` // PKCS #8
	AES       []byte    `json:"aes,omitempty"`
	Ops       []string  `json:"ops"`
	Enabled   bool      `json:"enabled"`
	NotBefore time.Time `json:"nbf"`
	Expires   time.Time `json:"exp"`
	Created   time.Time `json:"created"`
	Updated   time.Time `json:"updated"`
}

// Save writes the keys, the certificate authority and the system assigned
// identity to Options.Dir. Other identities, permissions and faults aren't saved.
func (s *Server) Save() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	caKey, err := x509.MarshalPKCS8PrivateKey(s.caKey)
	if err != nil {
		return err
	}
	st := savedState{Tenant: s.opts.Tenant, CACert: s.caCert.Raw, CAKey: caKey, System: s.identities[s.system]}
	for _, k := range s.keys {
		sk := savedKey{Host: k.host, Name: k.name, Tags: k.tags, Deleted: k.deleted, Recovered: k.recovered, Policy: k.policy}
		for _, v := range k.versions {
			var der []byte
			if v.priv != nil {
				if der, err = x509.MarshalPKCS8PrivateKey(v.priv); err != nil {
					return err
				}
			}
			sk.Versions = append(sk.Versions, savedVersion{v.id, der, v.aes, v.ops, v.enabled, v.nbf, v.exp, v.created, v.updated})
		}
		st.Keys = append(st.Keys, sk)
	}
	b, err := json.MarshalIndent(st, "", "\t")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.opts.Dir, 0o700); err != nil {
		return err
	}
	// A guest that is switched off must find the old state or the new one.
	tmp := filepath.Join(s.opts.Dir, stateFile+".new")
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp, filepath.Join(s.opts.Dir, stateFile)); err != nil {
		return err
	}
	d, err := os.Open(s.opts.Dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// load reads what Save wrote. It reports false if there is nothing.
func (s *Server) load() (bool, error) {
	if s.opts.Dir == "" {
		return false, nil
	}
	b, err := os.ReadFile(filepath.Join(s.opts.Dir, stateFile))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	var st savedState
	if err := json.Unmarshal(b, &st); err != nil {
		return false, err
	}
	s.opts.Tenant = st.Tenant
	caKey, err := parsePKCS8[*ecdsa.PrivateKey](st.CAKey)
	if err != nil {
		return false, err
	}
	if err := s.setCA(st.CACert, caKey); err != nil {
		return false, err
	}
	if st.System != nil {
		s.system = st.System.ClientID
		s.addIdentity(*st.System, "get", "wrapKey", "unwrapKey")
	}
	for _, sk := range st.Keys {
		k := &key{host: sk.Host, name: sk.Name, tags: sk.Tags, deleted: sk.Deleted, recovered: sk.Recovered, policy: sk.Policy}
		for _, sv := range sk.Versions {
			var priv *rsa.PrivateKey
			if sv.AES == nil {
				if priv, err = parsePKCS8[*rsa.PrivateKey](sv.Key); err != nil {
					return false, err
				}
			}
			k.versions = append(k.versions, &version{sv.ID, priv, sv.AES, sv.Ops, sv.Enabled, sv.NotBefore, sv.Expires, sv.Created, sv.Updated})
		}
		if len(k.versions) == 0 {
			return false, fmt.Errorf("key %s has no version", sk.Name)
		}
		s.keys[keyID(k.host, k.name)] = k
	}
	return true, nil
}

func parsePKCS8[K any](der []byte) (K, error) {
	var zero K
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return zero, err
	}
	k, ok := parsed.(K)
	if !ok {
		return zero, fmt.Errorf("private key is a %T", parsed)
	}
	return k, nil
}
