package keyunseal

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal/vaulttest"
)

func TestMayDial(t *testing.T) {
	private := writeFile(t, "cloud.json", 0o644, []byte(privateCloudFile))
	open := writeFile(t, "open.json", 0o644, []byte(strings.ReplaceAll(privateCloudFile, "cloud.example", "open.example")))
	if err := os.Chmod(open, 0o666); err != nil {
		t.Fatal(err)
	}
	// Nothing is read for the public clouds: a file may be on what waits for its key.
	unread := func() ([]string, error) {
		t.Error("asked for the files of private clouds")
		return nil, nil
	}
	none := func() ([]string, error) { return []string{DefaultCloud}, nil }
	described := func() ([]string, error) { return []string{DefaultCloud, "/nonexistent.json", open, private}, nil }
	broken := func() ([]string, error) { return nil, errors.New("no table") }
	for _, tt := range []struct {
		address string
		only    []string
		clouds  func() ([]string, error)
		want    string // of the error
	}{
		{"unit.vault.azure.net:443", nil, unread, ""},
		{"unit.managedhsm.usgovcloudapi.net:443", nil, unread, ""},
		{"login.microsoftonline.com:443", nil, unread, ""},
		{"login.chinacloudapi.cn:443", nil, unread, ""},
		{"login.microsoftonline.us:443", nil, unread, ""},
		{"169.254.169.254:80", nil, unread, ""},
		{"127.0.0.1:40342", nil, unread, ""},
		{"localhost:40342", nil, unread, ""},
		{"unit.vault.cloud.example:443", nil, described, ""},
		{"unit.managedhsm.cloud.example:443", nil, described, ""},
		{"login.cloud.example:443", nil, described, ""},
		{"unit.vault.cloud.example:443", nil, none, DefaultCloud},
		{"unit.vault.cloud.example:443", nil, broken, "no table"},
		{"unit.vault.open.example:443", nil, described, "others may write"},
		{"evil.example:443", nil, described, "/nonexistent.json"},
		{"vault.cloud.example:443", nil, described, "cloud="},
		{"a.unit.vault.cloud.example:443", nil, described, "cloud="},
		{"cloud.example:443", nil, described, "cloud="},
		{"unit:443", nil, described, "cloud="},
		{"unit.vault.azure.net.evil.example:443", nil, none, "cloud="},
		{"evilvault.azure.net:443", nil, none, "cloud="},
		{"a.b.vault.azure.net:443", nil, none, "cloud="},
		{"a.login.microsoftonline.com:443", nil, none, "cloud="},
		{"unit.vault.azure.net:80", nil, unread, "port 443"},
		{"unit.vault.azure.net:https", nil, unread, "port 443"},
		{"169.254.169.254:443", nil, none, "cloud="},
		{"169.254.169.254:8080", nil, unread, "port 443"},
		{"[2001:db8::1]:443", nil, none, "cloud="},
		{"10.0.0.1:40342", nil, unread, "port 443"},
		{"127.0.0.1:22", nil, unread, "port 443"},
		{":443", nil, none, "cloud="}, {"443", nil, unread, "port"}, {"", nil, unread, "port"}, {"\x00:44", nil, unread, "port 443"},

		// A unit that names the hosts.
		{"unit.vault.azure.net:443", []string{"unit.vault.azure.net"}, unread, ""},
		{"169.254.169.254:80", []string{"unit.vault.azure.net"}, unread, ""},
		{"unit.vault.azure.net:443", []string{"Unit.Vault.Azure.NET"}, unread, ""},
		{"login.elsewhere.example:443", []string{"unit.vault.azure.net", "login.elsewhere.example"}, unread, ""},
		{"other.vault.azure.net:443", []string{"unit.vault.azure.net"}, unread, "names the hosts"},
		{"login.microsoftonline.com:443", []string{"unit.vault.azure.net"}, unread, "names the hosts"},
		{"unit.vault.azure.net:80", []string{"unit.vault.azure.net"}, unread, "port 443"},
	} {
		err := MayDial(tt.address, tt.only, tt.clouds)
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("MayDial(%q, %q) = %v, want %q", tt.address, tt.only, err, tt.want)
		}
	}
}

func TestCheckDialHost(t *testing.T) {
	for name, ok := range map[string]bool{
		"unit.vault.azure.net": true, "Login.Cloud.Example": true, "a-1.example": true,
		"https://unit.vault.azure.net/": false, "unit.vault.azure.net:443": false, "unit.vault.azure.net/": false, "unit.vault.azure.net.": false,
		"unit.vault.azure.net,login.cloud.example": false, "*.vault.azure.net": false, ".vault.azure.net": false, "unit": false, "localhost": false,
		"10.0.0.1": false, "::1": false, "[::1]": false, "": false, " unit.vault.azure.net": false, "--help": false, strings.Repeat("a", 64) + ".example": false,
	} {
		if err := CheckDialHost(name); (err == nil) != ok {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// startDialer serves a dialer that connects to what may permits.
func startDialer(t *testing.T, may func(address string) error) (stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "dial")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- ServeDialer(ctx, l, may) }()
	stop = func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		ended <- nil
	}
	t.Cleanup(stop)
	t.Setenv(DialerEnv, socket)
	return stop
}

// TestDialer asks over connections that a dialer has made.
func TestDialer(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) }))
	defer s.Close()
	gone := httptest.NewServer(nil)
	gone.Close()
	address := func(s *httptest.Server) string { return strings.TrimPrefix(s.URL, "http://") }
	stop := startDialer(t, func(address string) error {
		if address == "127.0.0.1:22" {
			return errors.New("not this one")
		}
		return nil
	})
	tr := directTransport(nil)
	defer tr.CloseIdleConnections()
	client := newHTTPClient(tr, nil)
	for range 2 {
		tr.CloseIdleConnections()
		resp, err := client.Post(s.URL, "text/plain", strings.NewReader("to and fro"))
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || string(b) != "to and fro" {
			t.Errorf("answered %q, %v", b, err)
		}
	}
	for to, want := range map[string]string{address(gone): "connection refused", "127.0.0.1:22": "not this one", strings.Repeat("a", 400) + ":443": ""} {
		c, err := dial(t.Context(), "tcp", to)
		if err == nil {
			c.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("dial(%.20q): %v, want %q", to, err, want)
		}
	}
	stop()
	if c, err := dial(t.Context(), "tcp", address(s)); err == nil {
		c.Close()
		t.Error("connected without a dialer")
	} else if !strings.Contains(err.Error(), "hostcryptd-dial") {
		t.Errorf("no dialer: %v", err)
	}
	os.Unsetenv(DialerEnv)
	c, err := dial(t.Context(), "tcp", address(s))
	if err != nil {
		t.Fatal(err)
	}
	c.Close()
}

// TestDialerRefuses: what a dialer doesn't permit reaches who asked, as nobody's denial
// and nothing of the network, and is tried again.
func TestDialerRefuses(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	cert, file := newCertificate(t, time.Now().AddDate(1, 0, 0))
	clientID := randomUUID()
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Certificate: cert}, allPermissions...)
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	token := mustSeal(t, Options{Transport: tr}, url, randomKey(t))
	stop := startDialer(t, func(string) error { return errors.New("not in this test") })
	// The identity's endpoints through the dialer, and the vault without.
	direct := directTransport(nil)
	mixed := roundTripFunc(func(r *http.Request) (*http.Response, error) {
		if strings.HasSuffix(r.URL.Host, ".vault.azure.net") {
			return tr.RoundTrip(r)
		}
		return direct.RoundTrip(r)
	})
	var key [KeySize]byte
	for host, err := range map[string]error{
		"unit.vault.azure.net:443": (&Child{}).Unseal(t.Context(), Options{}, token, testVolume, &key),
		// Tokens of managed identities are cached for the whole process, by client id.
		"169.254.169.254:80": Unseal(t.Context(), Options{Transport: mixed, Identity: "managed:" + randomUUID()}, token, testVolume, &key),
		"login.microsoftonline.com:443": Unseal(t.Context(), Options{Transport: mixed,
			Identity: "certificate:" + vaulttest.DefaultTenant + ":" + clientID + ":" + file}, token, testVolume, &key),
	} {
		e := wantClass(t, err, map[bool]Class{true: ClassUnreachable, false: ClassIdentity}[strings.HasPrefix(host, "unit.")])
		if text := e.Error(); !strings.HasSuffix(text, "no connection is made to \""+host+"\": not in this test") || !e.Transient() || e.Denied() {
			t.Errorf("%s: transient %v, denied %v: %s", host, e.Transient(), e.Denied(), text)
		}
	}
	stop()
	err := (&Child{}).Unseal(t.Context(), Options{}, token, testVolume, &key)
	if e := wantClass(t, err, ClassUnreachable); !strings.HasSuffix(e.Error(), "no such file or directory") || !strings.Contains(e.Error(), "hostcryptd-dial") {
		t.Errorf("without a dialer: %v", e)
	}
}

// TestDialerSilent has a dialer that gives no answer.
func TestDialerSilent(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "dial")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := dialThrough(ctx, socket, "a:443"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dialThrough: %v", err)
	}
}
