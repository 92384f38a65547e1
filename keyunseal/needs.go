package keyunseal

import (
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// What unsealing reads of the host, beside the host key: for who makes an initramfs
// that is to unseal, and has to copy it.

// IdentityFile returns the file that an identity ([Options.Identity]) logs in with:
// the certificate and private key of certificate:..., the issuer's token of
// workload:..., or "" for the others.
func IdentityFile(text string) (string, error) {
	i, err := parseIdentity(text)
	return i.file, err
}

// CloudFiles returns the files that describe a private cloud: that of [Options.Cloud],
// which is path, and the certificates that it names. None are returned if path is
// empty and [DefaultCloud] doesn't exist. With an error, those are returned that are
// known.
func CloudFiles(path string) ([]string, error) {
	o := Options{Cloud: path}
	f, err := readCloud(o.cloud())
	switch {
	case errors.Is(err, fs.ErrNotExist) && path == "":
		return nil, nil
	case err != nil:
		return nil, err
	case f.CAFile == "":
		return []string{o.cloud()}, nil
	}
	_, err = readRoots(f.CAFile)
	return []string{o.cloud(), f.CAFile}, err
}

// IsPublic tells whether the vault of a [Description]'s KeyID is in a public cloud,
// where [Options.Cloud] has no effect.
func IsPublic(keyID string) bool {
	id, err := parseKeyURL(keyID)
	_, ok := id.publicCloud()
	return err == nil && ok
}

// Where crypto/x509 finds the certificate authorities (its root_linux.go): in the
// first of the files that can be read, and in all files of the folders.
var (
	rootFiles = []string{
		"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem",
		"/etc/pki/tls/cacert.pem", "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem", "/etc/ssl/cert.pem",
	}
	rootDirs = []string{"/etc/ssl/certs", "/etc/pki/tls/certs"}
)

// SystemRoots returns files with all the certificate authorities that a vault's
// certificate is verified with. They have the names under which they are found.
func SystemRoots() []string { return systemRoots("/") }

// systemRoots is SystemRoots of a host whose root is a folder. On most hosts a folder
// has what the file has once more, in a file for each authority: of those only what
// adds one is taken.
func systemRoots(host string) (names []string) {
	known := map[[sha256.Size]byte]bool{}
	// add tells whether a file can be read, and whether it has something new.
	add := func(name string) (read, news bool) {
		b, err := os.ReadFile(filepath.Join(host, name))
		for p, rest := pem.Decode(b); p != nil; p, rest = pem.Decode(rest) {
			if sum := sha256.Sum256(p.Bytes); p.Type == "CERTIFICATE" && !known[sum] {
				known[sum], news = true, true
			}
		}
		return err == nil, news
	}
	for _, name := range rootFiles {
		if read, news := add(name); read {
			if news {
				names = append(names, name)
			}
			break
		}
	}
	for _, dir := range rootDirs {
		list, _ := os.ReadDir(filepath.Join(host, dir))
		for _, f := range list {
			name := filepath.Join(dir, f.Name())
			// A link beside its target is an OpenSSL hash.
			if to, err := os.Readlink(filepath.Join(host, name)); err == nil && !strings.Contains(to, "/") {
				continue
			}
			if _, news := add(name); news {
				names = append(names, name)
			}
		}
	}
	return names
}
