package keyunseal

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A keyURL is a parsed vault key identifier. Identifiers are case-insensitive,
// so host and version are kept in lower case and names are compared with
// [strings.EqualFold].
type keyURL struct {
	host    string // "v.vault.azure.net"
	name    string
	version string // 32 hex digits, or "" for the newest
}

// Host names of vaults and of managed HSMs in the three Azure clouds. A vault
// whose name ends otherwise could be anyone's: the identity's token would be
// sent there. It's refused unless a file of root's says that it's a private
// cloud's, see cloud.go.
var (
	vaultSuffixes = []string{"vault.azure.net", "vault.azure.cn", "vault.usgovcloudapi.net"}
	hsmSuffixes   = []string{"managedhsm.azure.net", "managedhsm.azure.cn", "managedhsm.usgovcloudapi.net"}
)

// parseKeyURL parses https://VAULT.vault.azure.net/keys/NAME[/VERSION]. It
// accepts nothing else: no other scheme, port, user, query, fragment, escape or
// trailing slash. It doesn't use net/url, whose leniency is meant for browsers.
// Whether a host outside of the public clouds is acceptable, site says later.
func parseKeyURL(s string) (keyURL, error) {
	const scheme = "https://"
	if len(s) > 512 {
		return keyURL{}, errors.New("key URL is longer than 512 bytes")
	}
	for i := range len(s) {
		if c := s[i]; c <= ' ' || c >= 0x7f || strings.IndexByte(`@?#%\"'<>`, c) >= 0 {
			return keyURL{}, fmt.Errorf("key URL has the character %q", c)
		}
	}
	if len(s) < len(scheme) || !strings.EqualFold(s[:len(scheme)], scheme) {
		return keyURL{}, errors.New("key URL doesn't start with https://")
	}
	host, path, _ := strings.Cut(s[len(scheme):], "/")
	host = strings.TrimSuffix(strings.ToLower(host), ":443")
	if err := checkVaultHost(host); err != nil {
		return keyURL{}, err
	}

	kind, path, _ := strings.Cut(path, "/")
	if !strings.EqualFold(kind, "keys") {
		return keyURL{}, fmt.Errorf("key URL has the path /%s, want /keys/NAME or /keys/NAME/VERSION", kind)
	}
	name, version, versioned := strings.Cut(path, "/")
	if !isKeyName(name) {
		return keyURL{}, fmt.Errorf("key name %q is not 1 to 127 letters, digits and hyphens", name)
	}
	if versioned && !isKeyVersion(version) {
		return keyURL{}, fmt.Errorf("key version %q is not 32 hexadecimal digits", version)
	}
	return keyURL{host: host, name: name, version: strings.ToLower(version)}, nil
}

// parseKeySpec is parseKeyURL for what a person has typed.
func parseKeySpec(op, spec string) (keyURL, error) {
	id, err := parseKeyURL(spec)
	if err != nil {
		if strings.Contains(spec, "@") {
			spec = "" // it may hold a password
		}
		return keyURL{}, fail(op, clean(spec), ClassConfig, err)
	}
	return id, nil
}

// checkVaultHost checks a host name in lower case.
func checkVaultHost(host string) error {
	if label, _, ok := cutPublic(host); ok {
		return checkVaultName(label)
	}
	if !isDNSName(host) || strings.Count(host, ".") < 2 {
		return fmt.Errorf("host %q is not a name in a domain of Key Vault or Managed HSM (%s)", host, strings.Join(slices.Concat(vaultSuffixes, hsmSuffixes), ", "))
	}
	return nil
}

// checkVaultName checks a vault's own label: 3 to 24 letters, digits and hyphens.
func checkVaultName(label string) error {
	if len(label) < 3 || len(label) > 24 || !isKeyName(label) || label[0] == '-' || label[len(label)-1] == '-' {
		return fmt.Errorf("vault name %q is not 3 to 24 letters, digits and inner hyphens", label)
	}
	return nil
}

// cutPublic splits a host of a public cloud into the vault's name and the cloud.
func cutPublic(host string) (label, cloud string, ok bool) {
	for _, suffix := range slices.Concat(vaultSuffixes, hsmSuffixes) {
		if label, ok := strings.CutSuffix(host, "."+suffix); ok {
			_, cloud, _ := strings.Cut(suffix, ".")
			return label, cloud, true
		}
	}
	return "", "", false
}

// publicCloud returns "azure.net" and the like for a vault in a public cloud.
func (u keyURL) publicCloud() (string, bool) {
	_, cloud, ok := cutPublic(u.host)
	return cloud, ok
}

func isKeyName(s string) bool {
	if len(s) < 1 || len(s) > 127 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || c == '-') {
			return false
		}
	}
	return true
}

func isKeyVersion(s string) bool {
	if len(s) != 32 {
		return false
	}
	for i := range len(s) {
		if !isHex(s[i]) {
			return false
		}
	}
	return true
}

// String returns the canonical form, which parseKeyURL maps to the same keyURL.
func (u keyURL) String() string {
	s := u.vault() + "/keys/" + u.name
	if u.version != "" {
		s += "/" + u.version
	}
	return s
}

// newest names whatever version is the newest.
func (u keyURL) newest() keyURL {
	u.version = ""
	return u
}

// vault returns the base URL of the vault.
func (u keyURL) vault() string { return "https://" + u.host }

// resource returns the audience that tokens for this vault are issued for.
func (u keyURL) resource() string {
	_, suffix, _ := strings.Cut(u.host, ".")
	return "https://" + suffix
}

// answers reports whether an answer about key got may come from a request about
// u, whose version may be open.
func (u keyURL) answers(got keyURL) bool {
	return got.host == u.host && strings.EqualFold(got.name, u.name) &&
		got.version != "" && (u.version == "" || u.version == got.version)
}
