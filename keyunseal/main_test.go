package keyunseal

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/vaulttest"
)

const testVolume = "0f8fad5b-d9cb-469f-a165-70867728950e"

// TestMain is also the program of the children that the tests start. What such a
// child needs to know comes by argument, because its environment is clean.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case ChildArg:
			os.Exit(ChildMain())
		case "child-with-double": // TLS address, IMDS address, file with the CA
			ca, err := os.ReadFile(os.Args[4])
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(childMain(vaulttest.Dial(os.Args[2], os.Args[3], ca)))
		case "child-on-arc": // directory of the agent's keys, then as above; in a mount namespace of its own
			if err := fakeArcAgent(os.Args[2]); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			ca, err := os.ReadFile(os.Args[5])
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(childMain(vaulttest.Dial(os.Args[3], os.Args[4], ca)))
		case "child-transport":
			os.Exit(childMain(childTransports[os.Args[2]]))
		case "child-misbehaves":
			misbehaviours[os.Args[2]]()
			os.Exit(0)
		case "relay": // standard input and output to a Unix socket
			c, err := net.Dial("unix", os.Args[2])
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			go io.Copy(os.Stdout, c)
			io.Copy(c, os.Stdin)
			os.Exit(0)
		case "locks":
			if err := lockAndShow(os.Args[2] == "capable"); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		case "parent":
			parentOfHangingChild()
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

// fakeArcAgent puts the files of an Azure Arc agent where its clients look for
// them. The process has its own mounts.
func fakeArcAgent(keys string) error {
	for _, dir := range []string{"/opt", "/var/opt"} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
			return fmt.Errorf("mounting on %s: %w", dir, err)
		}
	}
	const tokens = "/var/opt/azcmagent/tokens"
	for _, dir := range []string{"/opt/azcmagent/bin", tokens} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(keys, tokens, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mounting on %s: %w", tokens, err)
	}
	return os.WriteFile("/opt/azcmagent/bin/himds", nil, 0o755)
}

type roundTripFunc func(*http.Request) (*http.Response, error)

func (f roundTripFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// childTransports are transports that look at the process they run in.
var childTransports = map[string]http.RoundTripper{
	"probe": roundTripFunc(func(*http.Request) (*http.Response, error) {
		dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
		if err != nil {
			return nil, err
		}
		var core unix.Rlimit
		if err := unix.Getrlimit(unix.RLIMIT_CORE, &core); err != nil {
			return nil, err
		}
		var names []string
		for _, kv := range os.Environ() {
			name, _, _ := strings.Cut(kv, "=")
			names = append(names, name)
		}
		return nil, fmt.Errorf("dumpable=%d core=%d/%d env=%s", dumpable, core.Cur, core.Max, strings.Join(names, ","))
	}),
	"panic": roundTripFunc(func(*http.Request) (*http.Response, error) {
		panic("in the transport")
	}),
	"panic elsewhere": roundTripFunc(func(*http.Request) (*http.Response, error) {
		go func() { panic("in another goroutine") }()
		select {}
	}),
	"hang": roundTripFunc(func(r *http.Request) (*http.Response, error) {
		<-r.Context().Done()
		return nil, r.Context().Err()
	}),
}

func randomKey(t testing.TB) *[KeySize]byte {
	t.Helper()
	var k [KeySize]byte
	rand.Read(k[:])
	return &k
}

// newDouble starts a double with an RSA-2048 key at the URL it returns.
func newDouble(t testing.TB, opts vaulttest.Options) (*vaulttest.Server, string) {
	t.Helper()
	s, err := vaulttest.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("closing the double: %v", err)
		}
	})
	const url = "https://unit.vault.azure.net/keys/kek"
	if _, err := s.AddKey(url, 2048); err != nil {
		t.Fatal(err)
	}
	return s, url
}

// withIdentity returns options that reach the double by a user assigned identity
// of its own: tokens of managed identities are cached by client id for the whole
// process.
func withIdentity(t testing.TB, s *vaulttest.Server, permissions ...string) (opts Options, clientID string) {
	t.Helper()
	var b [16]byte
	rand.Read(b[:])
	clientID = fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
	s.AddIdentity(vaulttest.Identity{ClientID: clientID, Assigned: true}, permissions...)
	tr := s.Transport()
	t.Cleanup(tr.CloseIdleConnections)
	return Options{Identity: "managed:" + clientID, Transport: tr}, clientID
}

var allPermissions = []string{"get", "wrapKey", "unwrapKey"}

func mustSeal(t testing.TB, opts Options, spec string, key *[KeySize]byte) json.RawMessage {
	t.Helper()
	token, err := Seal(t.Context(), opts, spec, testVolume, key)
	if err != nil {
		t.Fatalf("Seal(%s): %v", spec, err)
	}
	return token
}

// wantClass fails the test unless err is an *Error of class, and returns it.
func wantClass(t testing.TB, err error, class Class) *Error {
	t.Helper()
	e, ok := errors.AsType[*Error](err)
	if !ok {
		t.Fatalf("error %v (%T), want an *Error of class %q", err, err, class)
	}
	if e.Class != class {
		t.Fatalf("error %v has class %q, want %q", err, e.Class, class)
	}
	return e
}

// wantOpens fails the test unless token unseals to key.
func wantOpens(t testing.TB, opts Options, token json.RawMessage, key *[KeySize]byte) {
	t.Helper()
	var got [KeySize]byte
	if err := Unseal(t.Context(), opts, token, testVolume, &got); err != nil {
		t.Fatalf("Unseal: %v", err)
	}
	if got != *key {
		t.Fatal("Unseal returned another key than was sealed")
	}
}

// spellings are the forms in which a secret could end up in text.
func spellings(secret []byte) [][]byte {
	return [][]byte{
		secret,
		[]byte(hex.EncodeToString(secret)),
		[]byte(strings.ToUpper(hex.EncodeToString(secret))),
		[]byte(base64.RawStdEncoding.EncodeToString(secret)),
		[]byte(base64.RawURLEncoding.EncodeToString(secret)),
		[]byte(strings.Trim(fmt.Sprint(secret), "[]")), // %v
	}
}

func wantNoSecret(t testing.TB, where string, text []byte, secrets ...[]byte) {
	t.Helper()
	for i, s := range secrets {
		for _, form := range spellings(s) {
			if bytes.Contains(text, form) {
				t.Errorf("%s holds secret %d", where, i)
			}
		}
	}
}

func shortContext(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}
