package keyunseal

import (
	"crypto/x509"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"hostcryptd/keyunseal/vaulttest"
)

// TestSystemRoots: hosts as distributions lay them out, and one with an authority
// that its administrator has put beside the others.
func TestSystemRoots(t *testing.T) {
	var pems []string
	for range 2 {
		double, err := vaulttest.New(vaulttest.Options{})
		if err != nil {
			t.Fatal(err)
		}
		pems = append(pems, string(double.CAPEM()))
	}
	for name, tt := range map[string]struct {
		files, links map[string]string
		want         []string
	}{
		"none": {},
		"Debian": {
			files: map[string]string{"etc/ssl/certs/ca-certificates.crt": pems[0] + pems[1], "usr/share/a.crt": pems[0], "usr/share/b.crt": pems[1]},
			links: map[string]string{"etc/ssl/certs/a.pem": "/usr/share/a.crt", "etc/ssl/certs/1234.0": "a.pem"},
			want:  []string{"/etc/ssl/certs/ca-certificates.crt"},
		},
		"Debian with one more": {
			files: map[string]string{"etc/ssl/certs/ca-certificates.crt": pems[0], "etc/ssl/certs/own.pem": pems[1]},
			links: map[string]string{"etc/ssl/certs/1234.0": "own.pem"},
			want:  []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/ssl/certs/own.pem"},
		},
		"RHEL": {
			files: map[string]string{"etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem": pems[0], "etc/pki/tls/certs/README": "no certificate"},
			links: map[string]string{"etc/pki/tls/certs/ca-bundle.crt": "../../ca-trust/extracted/pem/tls-ca-bundle.pem", "etc/ssl/certs": "../pki/tls/certs"},
			want:  []string{"/etc/pki/tls/certs/ca-bundle.crt"},
		},
		"SUSE": {
			files: map[string]string{"var/lib/ca-certificates/ca-bundle.pem": pems[0], "var/lib/ca-certificates/pem/a.pem": pems[0]},
			links: map[string]string{"etc/ssl/ca-bundle.pem": "../../var/lib/ca-certificates/ca-bundle.pem", "etc/ssl/certs": "../../var/lib/ca-certificates/pem"},
			want:  []string{"/etc/ssl/ca-bundle.pem"},
		},
		"a folder only": {
			files: map[string]string{"etc/ssl/certs/a.pem": pems[0], "etc/ssl/certs/b.pem": pems[1]},
			want:  []string{"/etc/ssl/certs/a.pem", "/etc/ssl/certs/b.pem"},
		},
	} {
		host := t.TempDir()
		make := func(name string) string {
			name = filepath.Join(host, name)
			if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
				t.Fatal(err)
			}
			return name
		}
		for file, text := range tt.files {
			if err := os.WriteFile(make(file), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		for link, to := range tt.links {
			if strings.HasPrefix(to, "/usr") {
				to = host + to
			}
			if err := os.Symlink(to, make(link)); err != nil {
				t.Fatal(err)
			}
		}
		if got := systemRoots(host); !slices.Equal(got, tt.want) {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}

	// As crypto/x509 itself finds them, on this host.
	all, err := x509.SystemCertPool()
	if err != nil {
		t.Fatal(err)
	}
	ours := x509.NewCertPool()
	for _, name := range SystemRoots() {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		ours.AppendCertsFromPEM(b)
	}
	if !ours.Equal(all) {
		t.Errorf("%q have not the authorities that crypto/x509 finds", SystemRoots())
	}
}

func TestCloudFiles(t *testing.T) {
	double, err := vaulttest.New(vaulttest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ca, cloud := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cloud.json")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(cloud, `{"dns_suffix": "vault.cloud.example", "ca_file": "`+ca+`"}`)
	if got, err := CloudFiles(cloud); err == nil || !slices.Equal(got, []string{cloud, ca}) {
		t.Errorf("without the certificates: %q, %v", got, err)
	}
	write(ca, string(double.CAPEM()))
	if got, err := CloudFiles(cloud); err != nil || !slices.Equal(got, []string{cloud, ca}) {
		t.Errorf("%q, %v", got, err)
	}
	write(cloud, `{"dns_suffix": "vault.cloud.example"}`)
	if got, err := CloudFiles(cloud); err != nil || !slices.Equal(got, []string{cloud}) {
		t.Errorf("without ca_file: %q, %v", got, err)
	}
	if got, err := CloudFiles(filepath.Join(dir, "none")); err == nil || got != nil {
		t.Errorf("no such file: %q, %v", got, err)
	}
}
