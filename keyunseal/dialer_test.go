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
)

func TestMayDial(t *testing.T) {
	for address, ok := range map[string]bool{
		"v.vault.azure.net:443": true, "[2001:db8::1]:443": true, "169.254.169.254:80": true, "127.0.0.1:40342": true, "localhost:40342": true,
		"v.vault.azure.net:80": false, "169.254.169.254:8080": false, "10.0.0.1:40342": false, "127.0.0.1:22": false, ":443": false, "443": false, "": false,
		"a:https": false, "\x00:44": false,
	} {
		if err := mayDial(address); (err == nil) != ok {
			t.Errorf("mayDial(%q) = %v", address, err)
		}
	}
}

// startDialer serves a dialer that lets all addresses pass but one.
func startDialer(t *testing.T, never string) (stop func()) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "dial")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: socket, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- serveDialer(ctx, l, func(address string) error {
			if address == never {
				return errors.New("not this one")
			}
			return nil
		})
	}()
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
	stop := startDialer(t, "127.0.0.1:22")
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
