package keyunseal

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/vaulttest"
)

// misbehaviours are children that don't keep to the protocol. They get this far
// without having read their standard input.
var misbehaviours = map[string]func(){
	"exit":       func() { os.Exit(3) },
	"killed":     func() { unix.Kill(os.Getpid(), unix.SIGKILL); select {} },
	"silent":     func() {},
	"garbage":    func() { fmt.Print("certainly not JSON") },
	"flood":      func() { io.Copy(os.Stdout, io.LimitReader(zeros{}, 4*maxMessage)) },
	"version":    func() { fmt.Print(`{"version":99}`) },
	"no key":     func() { fmt.Print(`{"version":1}`) },
	"short key":  func() { os.NewFile(keyFD, "").Write(make([]byte, KeySize-1)); fmt.Print(`{"version":1}`) },
	"long key":   func() { os.NewFile(keyFD, "").Write(make([]byte, KeySize+1)); fmt.Print(`{"version":1}`) },
	"key, error": func() { os.NewFile(keyFD, "").Write(make([]byte, KeySize)); os.Exit(1) },
	"class": func() {
		fmt.Print(`{"version":1,"error":{"op":"unwrap","class":"of tomorrow","text":"what is this"}}`)
	},
	"noise": func() {
		fmt.Fprintln(os.Stderr, "plain line\x1b[31m")
		fmt.Fprintln(os.Stderr, `{"level":"warn","msg":"a warning","n":1}`)
		fmt.Fprintln(os.Stderr, `{"level":"fatal","msg":"must not end the parent"}`)
		fmt.Fprint(os.Stderr, strings.Repeat("x", 1<<20))
		fmt.Print(`{"version":1,"error":{"op":"unwrap","class":"throttled","text":"t"}}`)
	},
	"hang": func() { select {} },
	// A grandchild that keeps the pipes open must not keep the parent waiting.
	"leak": func() {
		cmd := exec.Command("sleep", "20")
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
		}
		fmt.Fprintln(os.Stderr, "grandchild", cmd.Process.Pid)
		os.Exit(1)
	},
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// childWith returns a Child that runs this test binary with other arguments.
func childWith(log *zap.Logger, args ...string) *Child {
	return &Child{Args: append([]string{"/proc/self/exe"}, args...), Log: log}
}

func childWithDouble(t testing.TB, s *vaulttest.Server, log *zap.Logger) *Child {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, s.CAPEM(), 0o600); err != nil {
		t.Fatal(err)
	}
	tlsAddr, imdsAddr := s.Addrs()
	return childWith(log, "child-with-double", tlsAddr, imdsAddr, ca)
}

// The child uses the identity that the system assigned, which tests in one
// process can't: its tokens would be shared.
func TestChildVault(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{RecoveryLevel: "Recoverable+Purgeable"})
	core, logs := observer.New(zapcore.DebugLevel)
	c := childWithDouble(t, s, zap.New(core))
	key := randomKey(t)
	token, err := c.Seal(t.Context(), Options{}, url, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := Describe(token); err != nil || d.Identity != "managed" {
		t.Errorf("Describe = %+v, %v; want identity \"managed\"", d, err)
	}
	if n := logs.FilterMessageSnippet("purge protection").FilterLevelExact(zapcore.WarnLevel).Len(); n != 1 {
		t.Errorf("%d warnings about purge protection came from the child, want 1: %v", n, logs.All())
	}
	var dst [KeySize]byte
	if err := c.Unseal(t.Context(), Options{}, token, testVolume, &dst); err != nil {
		t.Fatal(err)
	}
	if dst != *key {
		t.Error("another key came back")
	}
	if s.Count("imds") != 2 {
		t.Errorf("%d tokens for two processes, want 2", s.Count("imds"))
	}
	for _, l := range logs.All() {
		b, _ := json.Marshal(l)
		wantNoSecret(t, "the log", b, key[:])
	}
}

func TestChildHostKey(t *testing.T) {
	// The product's own entry, with nothing injected.
	c := &Child{}
	opts := Options{HostKey: filepath.Join(t.TempDir(), "sub", "host.key")}
	key := randomKey(t)
	token, err := c.Seal(t.Context(), opts, SpecHostKey, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	var dst [KeySize]byte
	if err := c.Unseal(t.Context(), opts, token, testVolume, &dst); err != nil {
		t.Fatal(err)
	}
	if dst != *key {
		t.Error("another key came back")
	}
	wantOpens(t, opts, token, key) // what a child sealed also opens without one
}

// An error has to be the same on both sides.
func TestChildErrors(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	c := childWithDouble(t, s, nil)
	key := randomKey(t)
	token, err := c.Seal(t.Context(), Options{}, url, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	kid, _ := s.KeyURL(url)

	before := [KeySize]byte{9}
	dst := before
	s.SetEnabled(kid, false)
	err = c.Unseal(t.Context(), Options{}, token, testVolume, &dst)
	e := wantClass(t, err, ClassKeyUnusable)
	if e.Op != "unwrap" || e.KeyID != kid || e.Code != "KeyDisabled" || e.Status != 403 || len(e.RequestID) != 36 ||
		!strings.Contains(err.Error(), "Operation unwrapKey is not allowed on a disabled key;") {
		t.Errorf("the error lost something on its way: %+v", e)
	}
	s.SetEnabled(kid, true)

	s.Inject(vaulttest.Fault{Route: "unwrapkey", Do: vaulttest.Answer(429, http.Header{"Retry-After": {"7"}}, "")})
	err = c.Unseal(t.Context(), Options{}, token, testVolume, &dst)
	if e := wantClass(t, err, ClassThrottled); e.RetryAfter != 7*time.Second {
		t.Errorf("RetryAfter = %v, want 7s", e.RetryAfter)
	}

	s.Unassign(s.System())
	if e := wantClass(t, c.Unseal(t.Context(), Options{}, token, testVolume, &dst), ClassIdentity); !e.Denied() {
		t.Errorf("without an identity: %v", e)
	}
	// That a VM got other identities is no denial, it's to be told which is meant.
	for range 2 {
		s.AddIdentity(vaulttest.Identity{ClientID: randomUUID(), Assigned: true}, allPermissions...)
	}
	if e := wantClass(t, c.Unseal(t.Context(), Options{}, token, testVolume, &dst), ClassIdentity); e.Denied() || !e.Transient() || !strings.Contains(e.Error(), "--identity managed:CLIENT-ID") {
		t.Errorf("with several identities: %v", e)
	}
	if dst != before {
		t.Error("a failed Unseal changed dst")
	}

	_, err = c.Seal(t.Context(), Options{}, "https://example.com/keys/kek", testVolume, key)
	wantClass(t, err, ClassConfig)
	err = c.Unseal(t.Context(), Options{}, json.RawMessage(`{"type":"clevis","keyslots":["0"]}`), testVolume, &dst)
	wantClass(t, err, ClassConfig)
	err = c.Unseal(t.Context(), Options{}, json.RawMessage(`not JSON`), testVolume, &dst)
	wantClass(t, err, ClassConfig)

	// A certificate that isn't trusted keeps its hint.
	other, _ := newDouble(t, vaulttest.Options{})
	c.Args[len(c.Args)-1] = childWithDouble(t, other, nil).Args[4]
	err = c.Unseal(t.Context(), Options{}, token, testVolume, &dst)
	wantClass(t, err, ClassUnreachable)
	if !strings.Contains(err.Error(), "ca-certificates") {
		t.Errorf("message %q has no hint about certificates", err)
	}
}

func TestWireError(t *testing.T) {
	for c := range classNames {
		for _, want := range []*Error{
			{Op: "unwrap", KeyID: "k", Class: Class(c), Code: "c", Status: 403, RequestID: "r", RetryAfter: time.Second, Err: errors.New("text")},
			{Op: "unwrap", Class: Class(c), Err: &certificateError{errors.New("text")}},
			{Op: "unwrap", Class: Class(c), Err: errors.New("")},
		} {
			b, err := json.Marshal(newWireError(want))
			if err != nil {
				t.Fatal(err)
			}
			var w wireError
			if err := json.Unmarshal(b, &w); err != nil {
				t.Fatal(err)
			}
			if got := w.err(); !reflect.DeepEqual(got, error(want)) {
				t.Errorf("%+v came back as %+v", want, got)
			}
		}
	}
}

func TestChildMisbehaves(t *testing.T) {
	token := json.RawMessage(`{}`)
	for name, want := range map[string]string{
		"exit": "exit status 3", "killed": "signal: killed", "silent": "unexpected end of JSON",
		"garbage": "invalid character", "flood": "longer than", "version": "protocol version 99",
		"no key": "0 bytes", "short key": "31 bytes", "long key": "33 bytes", "key, error": "exit status 1",
		"class": "what is this",
	} {
		t.Run(name, func(t *testing.T) {
			dst, before := [KeySize]byte{7}, [KeySize]byte{7}
			err := childWith(nil, "child-misbehaves", name).Unseal(t.Context(), Options{}, token, testVolume, &dst)
			if e := wantClass(t, err, ClassInternal); !e.Transient() {
				t.Error("not transient")
			}
			if !strings.Contains(err.Error(), want) {
				t.Errorf("message %q, want %q in it", err, want)
			}
			if dst != before {
				t.Error("dst changed")
			}
		})
	}
	// A seal whose verdict has no token, or none that we can read.
	_, err := childWith(nil, "child-misbehaves", "no key").Seal(t.Context(), Options{}, SpecHostKey, testVolume, randomKey(t))
	wantClass(t, err, ClassInternal)
	// A program that isn't there.
	err = (&Child{Args: []string{"/nonexistent/hostcryptd"}}).Unseal(t.Context(), Options{}, token, testVolume, new([KeySize]byte))
	wantClass(t, err, ClassInternal)
}

func TestChildCrash(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	token, err := childWithDouble(t, s, nil).Seal(t.Context(), Options{}, url, testVolume, randomKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, transport := range []string{"panic", "panic elsewhere"} {
		core, logs := observer.New(zapcore.DebugLevel)
		var dst [KeySize]byte
		err := childWith(zap.New(core), "child-transport", transport).Unseal(t.Context(), Options{}, token, testVolume, &dst)
		if e := wantClass(t, err, ClassInternal); !e.Transient() {
			t.Error("not transient")
		}
		if transport == "panic elsewhere" && logs.FilterField(zap.String("stderr", "panic: in another goroutine")).Len() != 1 {
			t.Errorf("the log doesn't say why the child died: %v", logs.All())
		}
	}
}

func TestChildStderr(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	var dst [KeySize]byte
	err := childWith(zap.New(core), "child-misbehaves", "noise").Unseal(t.Context(), Options{}, json.RawMessage(`{}`), testVolume, &dst)
	wantClass(t, err, ClassThrottled)
	all := logs.All()
	if len(all) != 4 {
		t.Fatalf("%d entries, want 4: %v", len(all), all)
	}
	if all[0].Level != zapcore.ErrorLevel || all[0].ContextMap()["stderr"] != "plain line [31m" {
		t.Errorf("plain line came as %v", all[0])
	}
	if all[1].Level != zapcore.WarnLevel || all[1].Message != "a warning" || all[1].ContextMap()["n"] != 1.0 {
		t.Errorf("log entry came as %v", all[1])
	}
	if all[2].Level != zapcore.ErrorLevel {
		t.Errorf("fatal entry came as %v", all[2])
	}
	if n := len(fmt.Sprint(all[3].ContextMap())); n > 5000 {
		t.Errorf("a line of 1 MiB became an entry of %d bytes", n)
	}
}

func TestChildDeadline(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	token, err := childWithDouble(t, s, nil).Seal(t.Context(), Options{}, url, testVolume, randomKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		args    []string
		timeout time.Duration
	}{
		"vault hangs": {[]string{"child-transport", "hang"}, 2*childGrace + time.Second}, // the child itself says so
		"child hangs": {[]string{"child-misbehaves", "hang"}, time.Second},               // it has to be killed
		"pipes stay":  {[]string{"child-misbehaves", "leak"}, 2 * childGrace},            // a grandchild has them
	} {
		t.Run(name, func(t *testing.T) {
			core, logs := observer.New(zapcore.DebugLevel)
			var dst [KeySize]byte
			start := time.Now()
			err := childWith(zap.New(core), tt.args...).Unseal(shortContext(t, tt.timeout), Options{}, token, testVolume, &dst)
			if d := time.Since(start); d > tt.timeout+3*time.Second {
				t.Errorf("returned after %v, had %v", d, tt.timeout)
			}
			if name == "pipes stay" {
				wantClass(t, err, ClassInternal)
				for _, l := range logs.All() {
					if _, pid, ok := strings.Cut(fmt.Sprint(l.ContextMap()["stderr"]), "grandchild "); ok {
						n, err := strconv.Atoi(pid)
						if err != nil {
							t.Fatal(err)
						}
						unix.Kill(n, unix.SIGKILL)
					}
				}
				return
			}
			if e := wantClass(t, err, ClassUnreachable); !e.Transient() {
				t.Error("not transient")
			}
			if name == "vault hangs" && !strings.Contains(err.Error(), "unwrap https://") {
				t.Errorf("message %q doesn't say what was waited for", err)
			}
		})
	}
	t.Run("canceled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(200*time.Millisecond, cancel)
		var dst [KeySize]byte
		err := childWith(nil, "child-misbehaves", "hang").Unseal(ctx, Options{}, token, testVolume, &dst)
		wantClass(t, err, ClassUnreachable)
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error %v isn't context.Canceled", err)
		}
	})
}

// TestChildProcess asks a child what it runs in.
func TestChildProcess(t *testing.T) {
	s, url := newDouble(t, vaulttest.Options{})
	token, err := childWithDouble(t, s, nil).Seal(t.Context(), Options{}, url, testVolume, randomKey(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"IDENTITY_ENDPOINT", "IDENTITY_HEADER", "MSI_ENDPOINT", "MSI_SECRET", "HTTPS_PROXY", "https_proxy", "ALL_PROXY",
		"AZURE_CLIENT_SECRET", "AZURE_SDK_GO_LOGGING", "GODEBUG", "LD_PRELOAD_X", "SSL_CERT_FILE", "SSL_CERT_DIR"} {
		t.Setenv(name, "")
	}
	t.Setenv(DialerEnv, "")
	var dst [KeySize]byte
	err = childWith(nil, "child-transport", "probe").Unseal(t.Context(), Options{}, token, testVolume, &dst)
	wantClass(t, err, ClassUnreachable)
	_, probe, ok := strings.Cut(err.Error(), "dumpable=")
	if !ok {
		t.Fatalf("no probe in %q", err)
	}
	probe, _, _ = strings.Cut(probe, ";")
	dumpable, env, _ := strings.Cut(probe, " env=")
	if dumpable != "0 core=0/0" {
		t.Errorf("dumpable=%s, want 0 core=0/0", dumpable)
	}
	dialer := false
	for name := range strings.SplitSeq(env, ",") {
		switch name {
		case "PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "GORACE":
		case DialerEnv:
			dialer = true
		default:
			t.Errorf("the child's environment has %s", name)
		}
	}
	if !dialer {
		t.Errorf("the child's environment lacks %s", DialerEnv)
	}
}

// parentOfHangingChild is a process whose child waits forever. It says the
// child's pid, which it learns from its own thread.
func parentOfHangingChild() {
	go func() {
		for {
			time.Sleep(10 * time.Millisecond)
			tasks, _ := filepath.Glob("/proc/self/task/*/children")
			for _, t := range tasks {
				if b, _ := os.ReadFile(t); len(bytes.TrimSpace(b)) > 0 {
					fmt.Println(string(bytes.TrimSpace(b)))
					return
				}
			}
		}
	}()
	var dst [KeySize]byte
	err := childWith(nil, "child-misbehaves", "hang").Unseal(context.Background(), Options{}, json.RawMessage(`{}`), testVolume, &dst)
	fmt.Println(err)
}

// A child must not outlive a parent that was killed.
func TestChildDiesWithParent(t *testing.T) {
	parent := exec.Command("/proc/self/exe", "parent")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatalf("the parent said %q", line)
	}
	parent.Process.Kill()
	parent.Wait()
	for range 200 {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	unix.Kill(pid, unix.SIGKILL)
	t.Errorf("child %d outlived its parent", pid)
}

func TestChildRefusesTransport(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic for a Transport, which can't cross")
		}
	}()
	var dst [KeySize]byte
	(&Child{}).Unseal(t.Context(), Options{Transport: http.DefaultTransport}, nil, testVolume, &dst)
}

// By hand, with no pipe for the key and no request, the hidden argument does
// nothing but say so.
func TestChildByHand(t *testing.T) {
	cmd := exec.Command("/proc/self/exe", ChildArg)
	cmd.Stdin = strings.NewReader("")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var v verdict
	if err := json.Unmarshal(out, &v); err != nil || v.Error == nil || v.Error.Class != ClassInternal.String() {
		t.Errorf("verdict %s, want an error", out)
	}
}

// lockAndShow locks the memory of a process, without the capability for it if that is
// so, and shows the kernel's account of the process.
func lockAndShow(capable bool) error {
	runtime.LockOSThread() // capabilities are a thread's
	if !capable {
		hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
		var data [2]unix.CapUserData
		l := unix.Rlimit{Cur: 64 << 10, Max: 64 << 10}
		if err := errors.Join(unix.Setrlimit(unix.RLIMIT_MEMLOCK, &l), unix.Capset(&hdr, &data[0])); err != nil {
			return err
		}
	}
	LockMemory()
	runtime.KeepAlive(make([]byte, 64<<20)) // what would fail
	status, err := os.ReadFile("/proc/self/status")
	os.Stdout.Write(status)
	return err
}

// TestLockMemory: a process locks its memory where nothing limits that, as in the
// unit, which has no capability, and goes on where something does.
func TestLockMemory(t *testing.T) {
	const lock = 1 << unix.CAP_IPC_LOCK
	for _, tt := range []struct {
		capabilities uint32
		limit        uint64
		may          bool
	}{{lock, 0, true}, {0, unix.RLIM_INFINITY, true}, {0, 8 << 20, false}, {^uint32(lock), 1 << 40, false}} {
		if got := mayLock(tt.capabilities, tt.limit); got != tt.may {
			t.Errorf("capabilities %x, limit %d: %v", tt.capabilities, tt.limit, got)
		}
	}
	for arg, want := range map[string]bool{"capable": os.Geteuid() == 0, "limited": false} {
		out, err := exec.CommandContext(t.Context(), "/proc/self/exe", "locks", arg).CombinedOutput()
		_, rest, ok := strings.Cut(string(out), "\nVmLck:")
		if err != nil || !ok {
			t.Fatalf("%s: %v: %s", arg, err, out)
		}
		if locked := !strings.HasPrefix(strings.TrimSpace(rest), "0 kB"); locked != want {
			t.Errorf("%s: locked is %v", arg, locked)
		}
	}
}
