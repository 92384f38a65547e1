package keyunseal

import (
	"slices"
	"strings"
	"testing"
)

const version32 = "0123456789abcdef0123456789abcdef"

func TestParseKeyURL(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want string // canonical form; "" for an error
		err  string
	}{
		{in: "https://v42.vault.azure.net/keys/kek", want: "https://v42.vault.azure.net/keys/kek"},
		{in: "HTTPS://V42.Vault.Azure.NET:443/Keys/Kek/" + strings.ToUpper(version32), want: "https://v42.vault.azure.net/keys/Kek/" + version32},
		{in: "https://my-vault.vault.azure.cn/keys/a-1", want: "https://my-vault.vault.azure.cn/keys/a-1"},
		{in: "https://v42.vault.usgovcloudapi.net/keys/k/" + version32, want: "https://v42.vault.usgovcloudapi.net/keys/k/" + version32},
		{in: "https://" + strings.Repeat("v", 24) + ".vault.azure.net/keys/" + strings.Repeat("n", 127), want: "https://" + strings.Repeat("v", 24) + ".vault.azure.net/keys/" + strings.Repeat("n", 127)},

		{in: "", err: "https://"},
		{in: "platform", err: "https://"},
		{in: "http://v42.vault.azure.net/keys/kek", err: "https://"},
		{in: "https:/v42.vault.azure.net/keys/kek", err: "https://"},
		{in: "https://v42.vault.azure.net", err: "want /keys/NAME"},
		{in: "https://v42.vault.azure.net/", err: "want /keys/NAME"},
		{in: "https://v42.vault.azure.net/keys", err: "key name"},
		{in: "https://v42.vault.azure.net/keys/", err: "key name"},
		{in: "https://v42.vault.azure.net/keys/kek/", err: "key version"},
		{in: "https://v42.vault.azure.net/keys//" + version32, err: "key name"},
		{in: "https://v42.vault.azure.net//keys/kek", err: "want /keys/NAME"},
		{in: "https://v42.vault.azure.net/secrets/kek", err: "want /keys/NAME"},
		{in: "https://v42.vault.azure.net/keys/kek/" + version32[1:], err: "key version"},
		{in: "https://v42.vault.azure.net/keys/kek/" + version32 + "/", err: "key version"},
		{in: "https://v42.vault.azure.net/keys/kek/" + version32[1:] + "g", err: "key version"},
		{in: "https://v42.vault.azure.net/keys/k_k", err: "key name"},
		{in: "https://v42.vault.azure.net/keys/..", err: "key name"},
		{in: "https://v42.vault.azure.net/keys/" + strings.Repeat("n", 128), err: "key name"},
		{in: "https://v42.vault.azure.net:8443/keys/kek", err: "domain of Key Vault"},
		{in: "https://v42.vault.azure.net:443:443/keys/kek", err: "domain of Key Vault"},
		{in: "https://v42.vault.azure.net:/keys/kek", err: "domain of Key Vault"},
		{in: "https://v42.vault.azure.net./keys/kek", err: "domain of Key Vault"},
		{in: "https://vault.azure.net/keys/kek", want: "https://vault.azure.net/keys/kek"},
		{in: "https://.vault.azure.net/keys/kek", err: "vault name"},
		{in: "https://v2.vault.azure.net/keys/kek", err: "vault name"},
		{in: "https://" + strings.Repeat("v", 25) + ".vault.azure.net/keys/kek", err: "vault name"},
		{in: "https://-v42.vault.azure.net/keys/kek", err: "vault name"},
		{in: "https://a.b42.vault.azure.net/keys/kek", err: "vault name"},
		{in: "https://localhost/keys/kek", err: "domain of Key Vault"},
		{in: "https://cloud.example/keys/kek", err: "domain of Key Vault"},
		{in: "https://10.0.0.1/keys/kek", err: "domain of Key Vault"},
		{in: "https://[fe80::1]/keys/kek", err: "domain of Key Vault"},
		{in: "https://v42..cloud.example/keys/kek", err: "domain of Key Vault"},
		// These are for site to refuse, see TestSite.
		{in: "https://v42.vault.azure.net.evil.com/keys/kek", want: "https://v42.vault.azure.net.evil.com/keys/kek"},
		{in: "https://evilvault.azure.net/keys/kek", want: "https://evilvault.azure.net/keys/kek"},
		{in: "https://v42.managedhsm.azure.net/keys/kek", want: "https://v42.managedhsm.azure.net/keys/kek"},
		{in: "https://u:p@v42.vault.azure.net/keys/kek", err: `'@'`},
		{in: "https://evil.com/@v42.vault.azure.net/keys/kek", err: `'@'`},
		{in: "https://v42.vault.azure.net/keys/kek?api-version=7", err: `'?'`},
		{in: "https://v42.vault.azure.net/keys/kek#x", err: `'#'`},
		{in: "https://v42.vault.azure.net/keys/%6bek", err: `'%'`},
		{in: `https://v42.vault.azure.net\keys\kek`, err: `'\\'`},
		{in: "https://v42.vault.azure.net/keys/kek\n", err: `'\n'`},
		{in: " https://v42.vault.azure.net/keys/kek", err: `' '`},
		{in: "https://vａult.vault.azure.net/keys/kek", err: "character"},
		{in: "https://v42.vault.azure.net/keys/" + strings.Repeat("n", 600), err: "512"},
	} {
		got, err := parseKeyURL(tt.in)
		switch {
		case tt.want == "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
			t.Errorf("parseKeyURL(%q) = %v, %v; want an error with %q", tt.in, got, err, tt.err)
		case tt.want != "" && (err != nil || got.String() != tt.want):
			t.Errorf("parseKeyURL(%q) = %v, %v; want %s", tt.in, got, err, tt.want)
		}
	}
}

func TestKeyURLResource(t *testing.T) {
	for in, want := range map[string]string{
		"https://v42.vault.azure.net/keys/k":         "https://vault.azure.net",
		"https://v42.vault.azure.cn/keys/k":          "https://vault.azure.cn",
		"https://v42.vault.usgovcloudapi.net/keys/k": "https://vault.usgovcloudapi.net",
		"https://v42.managedhsm.azure.net/keys/k":    "https://managedhsm.azure.net",
	} {
		u, err := parseKeyURL(in)
		if err != nil || u.resource() != want {
			t.Errorf("resource of %s is %s, %v; want %s", in, u.resource(), err, want)
		}
	}
}

func FuzzParseKeyURL(f *testing.F) {
	f.Add("https://v42.vault.azure.net/keys/kek/" + version32)
	f.Add("HTTPS://V42.vault.azure.cn:443/keys/Kek")
	f.Add("https://v42.managedhsm.azure.net/keys/kek")
	f.Add("https://u:p@v42.vault.azure.net/keys/kek?x#y")
	f.Fuzz(func(t *testing.T, in string) {
		u, err := parseKeyURL(in)
		if err != nil {
			return
		}
		label, suffix, _ := strings.Cut(u.host, ".")
		if strings.Trim(u.host, "abcdefghijklmnopqrstuvwxyz0123456789-.") != "" {
			t.Errorf("parseKeyURL(%q) accepts the host %q", in, u.host)
		}
		if _, err := (Options{}).site(u); err == nil && (!slices.Contains(vaultSuffixes, suffix) && !slices.Contains(hsmSuffixes, suffix) || len(label) < 3) {
			t.Errorf("site accepts the host %q", u.host)
		}
		again, err := parseKeyURL(u.String())
		if err != nil || again != u {
			t.Errorf("parseKeyURL(%q) = %v, and of that %v, %v", in, u, again, err)
		}
	})
}
