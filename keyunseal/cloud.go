package keyunseal

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A site is what follows from the name of a vault: where its identities get
// their tokens, and for which resource.
type site struct {
	resource    string         // the audience of tokens, and what a challenge has to name
	authority   string         // of Entra ID, "https://login.microsoftonline.com/"
	noDiscovery bool           // the authority isn't known to login.microsoft.com
	roots       *x509.CertPool // nil for the system's
}

// The clouds that everybody may use. Their vaults have the suffixes of keyurl.go.
var authorities = map[string]string{ // by what follows "vault." and "managedhsm."
	"azure.net":         "https://login.microsoftonline.com/",
	"azure.cn":          "https://login.chinacloudapi.cn/",
	"usgovcloudapi.net": "https://login.microsoftonline.us/",
}

// DefaultCloud is the file that an empty [Options.Cloud] means.
const DefaultCloud = "/etc/hostcryptd/cloud.json"

// A cloudFile describes a private cloud, in JSON:
//
//	{"dns_suffix": "vault.cloud.example",
//	 "authority_host": "https://login.cloud.example/",
//	 "ca_file": "/etc/hostcryptd/cloud.pem",
//	 "disable_instance_discovery": true}
//
// It has no effect on vaults of the public clouds. It decides to whom this host
// shows its tokens, so nobody but root may write it.
type cloudFile struct {
	// Suffix is what follows the vault's own label in its host name; required.
	Suffix string `json:"dns_suffix"`
	// HSMSuffix is the same of managed HSMs, if the cloud has them.
	HSMSuffix string `json:"hsm_dns_suffix"`
	// Authority is the login host; required for identities that log in there.
	Authority string `json:"authority_host"`
	// CAFile holds certificates in PEM that are trusted beside the system's.
	CAFile string `json:"ca_file"`
	// NoDiscovery is for authorities that login.microsoft.com doesn't know.
	NoDiscovery bool `json:"disable_instance_discovery"`
}

func (o Options) cloud() string { return cmp.Or(o.Cloud, DefaultCloud) }

// site finds out where a vault is. It reads the private cloud's file only for a
// vault that isn't in a public one.
func (o Options) site(id keyURL) (*site, error) {
	if cloud, ok := id.publicCloud(); ok {
		return &site{resource: id.resource(), authority: authorities[cloud]}, nil
	}
	f, err := readCloud(o.cloud())
	if errors.Is(err, fs.ErrNotExist) && o.Cloud == "" {
		return nil, fmt.Errorf("host %q is not in a domain of Key Vault or Managed HSM (%s); a private cloud has to be described in %s",
			id.host, strings.Join(slices.Concat(vaultSuffixes, hsmSuffixes), ", "), DefaultCloud)
	}
	if err != nil {
		return nil, fmt.Errorf("the private cloud: %w", err)
	}
	label, ok := f.cut(id.host)
	if !ok {
		return nil, fmt.Errorf("host %q is neither in a domain of Key Vault or Managed HSM (%s) nor in the private cloud's %s (%s)",
			id.host, strings.Join(slices.Concat(vaultSuffixes, hsmSuffixes), ", "), f.Suffix, o.cloud())
	}
	if err := checkVaultName(label); err != nil {
		return nil, err
	}
	s := &site{resource: id.resource(), authority: f.Authority, noDiscovery: f.NoDiscovery}
	if f.CAFile != "" {
		if s.roots, err = readRoots(f.CAFile); err != nil {
			return nil, fmt.Errorf("the private cloud's ca_file: %w", err)
		}
	}
	return s, nil
}

// cut splits the host of a vault or managed HSM of the cloud into the vault's name and
// the domain.
func (f *cloudFile) cut(host string) (label string, ok bool) {
	label, suffix, _ := strings.Cut(host, ".")
	return label, suffix != "" && (suffix == f.Suffix || suffix == f.HSMSuffix)
}

// has tells whether a host is one of the cloud's.
func (f *cloudFile) has(host string) bool {
	label, ok := f.cut(host)
	return ok && checkVaultName(label) == nil || strings.EqualFold(f.Authority, "https://"+host+"/")
}

func readCloud(path string) (*cloudFile, error) {
	b, err := readTrusted(path, 64<<10)
	if err != nil {
		return nil, err
	}
	f := new(cloudFile)
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields() // a misspelt word must not be a missing one
	if err := d.Decode(f); errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, fmt.Errorf("%s: %w: %w", path, err, errNotWhole)
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if d.Decode(new(any)) != io.EOF {
		return nil, fmt.Errorf("%s: something follows the JSON object", path)
	}
	if err := f.check(); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return f, nil
}

func (f *cloudFile) check() error {
	if f.Suffix == "" {
		return errors.New("dns_suffix is missing")
	}
	for name, suffix := range map[string]string{"dns_suffix": f.Suffix, "hsm_dns_suffix": f.HSMSuffix} {
		if suffix == "" {
			continue
		}
		if !isDNSName(suffix) || !strings.Contains(suffix, ".") || suffix != strings.ToLower(suffix) {
			return fmt.Errorf("%s %q is not a domain of two or more labels in lower case, such as vault.cloud.example", name, suffix)
		}
		for _, public := range slices.Concat(vaultSuffixes, hsmSuffixes) {
			if public == suffix || strings.HasSuffix(public, "."+suffix) || strings.HasSuffix(suffix, "."+public) {
				return fmt.Errorf("%s %q is in the public cloud %s, which needs no description", name, suffix, public)
			}
		}
	}
	if f.Authority != "" {
		host, ok := strings.CutPrefix(f.Authority, "https://")
		host = strings.TrimSuffix(host, "/")
		if !ok || !isDNSName(host) || !strings.Contains(host, ".") {
			return fmt.Errorf("authority_host %q is not https://HOST/", f.Authority)
		}
		f.Authority = "https://" + host + "/"
	}
	if f.CAFile != "" && !filepath.IsAbs(f.CAFile) {
		return fmt.Errorf("ca_file %q is not an absolute path", f.CAFile)
	}
	return nil
}

func isDNSName(s string) bool {
	if len(s) > 253 {
		return false
	}
	for label := range strings.SplitSeq(s, ".") {
		if len(label) > 63 || !isKeyName(label) || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
	}
	return strings.Trim(s, "0123456789.") != "" // an address is no name
}

// readRoots returns the system's certificate authorities and those of a file.
func readRoots(path string) (*x509.CertPool, error) {
	b, err := readTrusted(path, 1<<20)
	if err != nil {
		return nil, err
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		roots = x509.NewCertPool() // none is installed
	}
	if !roots.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s holds no certificate in PEM: %w", path, errNotWhole)
	}
	return roots, nil
}

// readTrusted reads a regular file that nobody but root or this user can write.
func readTrusted(path string, limit int) ([]byte, error) {
	return readFile(path, limit, func(st *unix.Stat_t) error {
		switch {
		case st.Mode&0o022 != 0:
			return fmt.Errorf("%s has mode %04o, others may write it; chmod go-w it", path, st.Mode&0o7777)
		case st.Uid != 0 && int(st.Uid) != os.Geteuid():
			return fmt.Errorf("%s is owned by user %d, neither root nor this process", path, st.Uid)
		}
		return nil
	})
}

// errNotWhole is in the chain of an error about what a file holds, if that may be the
// beginning of what it will hold.
var errNotWhole = errors.New("if that is not all of it, it is just being written")

// fileClass is the class of an error of reading what an identity needs. A file that isn't
// there may be on a disk that comes later, one that isn't whole is being written, and the
// system may have no descriptor left. None of that may end a boot, which would be for
// ever. A file that others may write, or which isn't one, doesn't pass.
func fileClass(err error) Class {
	if _, errno := errors.AsType[unix.Errno](err); errno || errors.Is(err, errNotWhole) {
		return ClassIdentity
	}
	return ClassConfig
}

// readFile reads a regular file of up to limit bytes, if check agrees.
func readFile(path string, limit int, check func(*unix.Stat_t) error) ([]byte, error) {
	// O_NONBLOCK: a FIFO of that name must be an error, not a wait.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	if err := check(&st); err != nil {
		return nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("%s is longer than %d bytes", path, limit)
	}
	return b, err
}
