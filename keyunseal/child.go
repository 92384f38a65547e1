package keyunseal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"
)

// ChildArg is the argument by which a program that was started by [Child]
// knows that it has to call [ChildMain] and nothing else.
const ChildArg = "unseal-child"

// A Child seals and unseals in a short-lived process: the same binary, started
// with [ChildArg]. The zero value is ready to use, and may be used by several
// goroutines at once; every call is a process of its own.
//
// The volume key crosses by an inherited pipe, never by argument, environment
// or JSON. The process has a clean environment, dies with this one, and is
// killed when ctx ends; without a deadline in ctx it gets two minutes.
type Child struct {
	// Args is the program and its arguments; nil means this program and ChildArg.
	Args []string

	// Log receives what the process logs and what it writes to standard error.
	// Nil means [Options.Log].
	Log *zap.Logger
}

const (
	protocolVersion = 1

	childTimeout = 2 * time.Minute
	// childGrace is what a child gets after its own deadline, which is before that
	// of ctx, to say what it was waiting for; then it's killed.
	childGrace = 2 * time.Second

	maxMessage = 256 << 10 // of the JSON in either direction
	maxStderr  = 256       // lines of standard error
	maxLine    = 4096      // bytes of one

	keyFD = 3 // the pipe for the volume key, as the child sees it
)

// A request goes to the child's standard input.
type request struct {
	Version int             `json:"version"`
	Op      string          `json:"op"` // one of the op constants
	Volume  string          `json:"volume"`
	Spec    string          `json:"spec,omitempty"`
	Token   json.RawMessage `json:"token,omitempty"`
	Options Options         `json:"options"`
	Digest  []byte          `json:"digest,omitempty"` // to be signed
	Timeout time.Duration   `json:"timeout"`          // ns
}

// A verdict comes from the child's standard output. A child that has given one
// ends with status 0, whatever the verdict is.
type verdict struct {
	Version   int             `json:"version"`
	Token     json.RawMessage `json:"token,omitempty"`  // of a seal or rewrap that worked
	Status    *KeyStatus      `json:"status,omitempty"` // of an inspect that worked
	Signature *Signature      `json:"signature,omitempty"`
	Error     *wireError      `json:"error,omitempty"`
	Exchanges []Exchange      `json:"exchanges,omitempty"` // for Options.Observe
}

// Operations of a request.
const (
	opSeal    = "seal"
	opUnseal  = "unseal"
	opProbe   = "probe"
	opInspect = "inspect"
	opRewrap  = "rewrap"
	opSign    = "sign"
)

// maxExchanges bounds what one child reports: no operation has more than ten.
const maxExchanges = 64

// A wireError is an [Error] on its way to the parent. The cause becomes text.
type wireError struct {
	Op         string        `json:"op"`
	KeyID      string        `json:"key_id,omitempty"`
	Class      string        `json:"class"`
	Code       string        `json:"code,omitempty"`
	Status     int           `json:"status,omitempty"`
	RequestID  string        `json:"request_id,omitempty"`
	RetryAfter time.Duration `json:"retry_after,omitempty"` // ns
	Refused    bool          `json:"refused,omitempty"`
	Local      bool          `json:"local,omitempty"`
	Text       string        `json:"text"`
	TLS        bool          `json:"tls,omitempty"`  // the cause is a certificate
	Kind       string        `json:"kind,omitempty"` // the cause is one of wireKinds
}

// wireKinds are errors that are looked for in a chain.
var wireKinds = map[string]error{
	"dialer": errDialer, "current": ErrCurrent, "no status": ErrNoStatus, "not exist": fs.ErrNotExist, "permission": fs.ErrPermission,
}

// A kindError has the text of an error that came from a child, and its kind.
type kindError struct {
	text string
	kind error
}

func (e *kindError) Error() string { return e.text }
func (e *kindError) Unwrap() error { return e.kind }

func newWireError(err error) *wireError {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		e = &Error{Op: "child", Err: err}
	}
	w := &wireError{
		Op: e.Op, KeyID: e.KeyID, Class: e.Class.String(), Code: e.Code, Status: e.Status,
		RequestID: e.RequestID, RetryAfter: e.RetryAfter, Refused: e.Refused, Local: e.Local, TLS: e.certificate(),
	}
	if e.Err != nil {
		w.Text = clean(e.Err.Error())
	}
	for name, kind := range wireKinds {
		if errors.Is(e, kind) {
			w.Kind = name
		}
	}
	return w
}

func (w *wireError) err() error {
	class := ClassInternal // also for a class of another version
	for c, name := range classNames {
		if name == w.Class {
			class = Class(c)
		}
	}
	e := &Error{
		Op: w.Op, KeyID: w.KeyID, Class: class, Code: w.Code, Status: w.Status,
		RequestID: w.RequestID, RetryAfter: w.RetryAfter, Refused: w.Refused, Local: w.Local, Err: errors.New(w.Text),
	}
	if w.TLS {
		e.Err = &certificateError{e.Err}
	}
	if kind := wireKinds[w.Kind]; kind != nil {
		e.Err = &kindError{w.Text, kind}
	}
	return e
}

// Seal is the package's [Seal] in a process of its own. opts.Transport has to be
// nil: it can't cross.
func (c *Child) Seal(ctx context.Context, opts Options, spec, volume string, key *[KeySize]byte) (json.RawMessage, error) {
	return c.seal(ctx, opts, request{Op: opSeal, Spec: spec, Volume: volume}, key)
}

// Rewrap is the package's [Rewrap] in a process of its own.
func (c *Child) Rewrap(ctx context.Context, opts Options, token json.RawMessage, volume string, key *[KeySize]byte) (json.RawMessage, error) {
	return c.seal(ctx, opts, request{Op: opRewrap, Token: token, Volume: volume}, key)
}

func (c *Child) seal(ctx context.Context, opts Options, req request, key *[KeySize]byte) (json.RawMessage, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fail("child", "", ClassInternal, err)
	}
	defer r.Close()
	// 32 bytes always fit, so there is nobody to wait for.
	_, err = w.Write(key[:])
	if err := errors.Join(err, w.Close()); err != nil {
		return nil, fail("child", "", ClassInternal, err)
	}
	v, err := c.run(ctx, opts, req, r)
	if err != nil {
		return nil, err
	}
	if _, err := Describe(v.Token); err != nil {
		return nil, fail("child", "", ClassInternal, fmt.Errorf("the child sealed a token that can't be read: %w", err))
	}
	return v.Token, nil
}

// Probe is the package's [Probe] in a process of its own.
func (c *Child) Probe(ctx context.Context, opts Options, token json.RawMessage, volume string) error {
	_, err := c.run(ctx, opts, request{Op: opProbe, Token: token, Volume: volume}, nil)
	return err
}

// Inspect is the package's [Inspect] in a process of its own.
func (c *Child) Inspect(ctx context.Context, opts Options, token json.RawMessage, volume string) (KeyStatus, error) {
	v, err := c.run(ctx, opts, request{Op: opInspect, Token: token, Volume: volume}, nil)
	if err != nil {
		return KeyStatus{}, err
	}
	if v.Status == nil {
		return KeyStatus{}, fail("child", "", ClassInternal, errors.New("the child's verdict has no status"))
	}
	return *v.Status, nil
}

// Sign is the package's [Sign] in a process of its own.
func (c *Child) Sign(ctx context.Context, opts Options, spec, volume string, digest [sha256.Size]byte) (*Signature, error) {
	v, err := c.run(ctx, opts, request{Op: opSign, Spec: spec, Volume: volume, Digest: digest[:]}, nil)
	if err != nil {
		return nil, err
	}
	if v.Signature == nil {
		return nil, fail("child", "", ClassInternal, errors.New("the child's verdict has no signature"))
	}
	return v.Signature, nil
}

// Unseal is the package's [Unseal] in a process of its own. opts.Transport has to
// be nil: it can't cross. The volume key goes from the pipe straight into dst.
func (c *Child) Unseal(ctx context.Context, opts Options, token json.RawMessage, volume string, dst *[KeySize]byte) error {
	r, w, err := os.Pipe()
	if err != nil {
		return fail("child", "", ClassInternal, err)
	}
	defer r.Close()
	_, err = c.run(ctx, opts, request{Op: opUnseal, Token: token, Volume: volume}, w)
	w.Close() // nothing below may wait for more
	if err != nil {
		return err
	}
	// The child has ended well and the pipe has room for all that it wrote. Look
	// at how much that is first, because a short read would spoil dst.
	n, err := unix.IoctlGetInt(int(r.Fd()), unix.TIOCINQ)
	if err != nil {
		return fail("child", "", ClassInternal, os.NewSyscallError("TIOCINQ", err))
	}
	if n != KeySize {
		return fail("child", "", ClassInternal, fmt.Errorf("the child handed over %d bytes, want %d", n, KeySize))
	}
	for {
		n, err := unix.Read(int(r.Fd()), dst[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n != KeySize { // can't be: nobody else has this pipe
			return fail("child", "", ClassInternal, fmt.Errorf("reading the volume key: %d bytes, %w", n, err))
		}
		return nil
	}
}

// run starts a child with pipe, if there is one, as its keyFD, waits for it, and
// returns its verdict if that isn't an error.
func (c *Child) run(ctx context.Context, opts Options, req request, pipe *os.File) (*verdict, error) {
	if opts.Transport != nil {
		panic("keyunseal: a Transport can't cross to a child")
	}
	log := c.Log
	if log == nil {
		log = opts.log()
	}
	ctx, cancel := context.WithTimeout(ctx, childTimeout)
	defer cancel()
	deadline, _ := ctx.Deadline()
	req.Version, req.Options = protocolVersion, opts
	left := time.Until(deadline)
	req.Timeout = max(left-childGrace, left/2)
	stdin, err := json.Marshal(req)
	if err != nil {
		return nil, fail("child", "", ClassConfig, err)
	}
	if len(stdin) > maxMessage {
		return nil, fail("child", "", ClassConfig, fmt.Errorf("the request has %d bytes, at most %d are allowed", len(stdin), maxMessage))
	}

	// Not os.Executable: after an upgrade that name is another program.
	cmd := exec.CommandContext(ctx, "/proc/self/exe", ChildArg)
	cmd.Args[0] = os.Args[0] // for ps
	if c.Args != nil {
		cmd = exec.CommandContext(ctx, c.Args[0], c.Args[1:]...)
	}
	cmd.Env = childEnv(os.Environ())
	cmd.Stdin = bytes.NewReader(stdin)
	stdout := &boundedBuffer{limit: maxMessage}
	cmd.Stdout = stdout
	stderr := &lineLogger{log: log}
	cmd.Stderr = stderr
	if pipe != nil {
		cmd.ExtraFiles = []*os.File{pipe}
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second // for the pipes, should the child leave one open elsewhere

	// The parent-death signal is about the thread that forked: keep it.
	runtime.LockOSThread()
	err = cmd.Run()
	runtime.UnlockOSThread()
	stderr.flush()

	var v verdict
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, fail("child", "", ClassUnreachable, fmt.Errorf("no verdict in time: %w", context.Cause(ctx)))
	case err != nil:
		return nil, fail("child", "", ClassInternal, fmt.Errorf("the child ended without a verdict: %w", err))
	case stdout.over:
		return nil, fail("child", "", ClassInternal, fmt.Errorf("the child's verdict is longer than %d bytes", maxMessage))
	}
	if err := json.Unmarshal(stdout.buf.Bytes(), &v); err != nil {
		return nil, fail("child", "", ClassInternal, fmt.Errorf("reading the child's verdict: %w", err))
	}
	if v.Version != protocolVersion {
		return nil, fail("child", "", ClassInternal, fmt.Errorf("the child speaks protocol version %d, want %d", v.Version, protocolVersion))
	}
	if opts.Observe != nil {
		for _, x := range v.Exchanges[:min(len(v.Exchanges), maxExchanges)] {
			opts.Observe(x)
		}
	}
	if v.Error != nil {
		return nil, v.Error.err()
	}
	return &v, nil
}

// childEnv keeps what a Go program needs to find the certificates, and who connects to
// the network for it, and drops the rest. Proxies must not be used; IDENTITY_ENDPOINT,
// MSI_ENDPOINT and the like would send the request for a token elsewhere;
// AZURE_SDK_GO_LOGGING prints exchanges.
func childEnv(environ []string) []string {
	var env []string
	for _, kv := range environ {
		switch name, _, _ := strings.Cut(kv, "="); name {
		case "PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", DialerEnv,
			"GORACE": // of tests: under the race detector a process sleeps for a second before it ends
			env = append(env, kv)
		}
	}
	return env
}

// A boundedBuffer takes everything and keeps the first limit bytes. It doesn't
// embed the buffer: io.Copy would find its ReadFrom and go past the limit.
type boundedBuffer struct {
	buf   bytes.Buffer
	limit int
	over  bool
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	keep := p[:min(len(p), b.limit-b.buf.Len())]
	b.over = b.over || len(keep) < len(p)
	b.buf.Write(keep)
	return len(p), nil
}

// A lineLogger passes lines on to a logger: those of the child's own log with
// their level, others, such as a panic's, as errors.
type lineLogger struct {
	log   *zap.Logger
	rest  []byte
	lines int
}

func (l *lineLogger) Write(p []byte) (int, error) {
	for rest := p; len(rest) > 0; {
		line, after, found := bytes.Cut(rest, []byte("\n"))
		l.rest = append(l.rest, line[:min(len(line), maxLine-len(l.rest))]...)
		if found {
			l.flush()
		}
		rest = after
	}
	return len(p), nil
}

func (l *lineLogger) flush() {
	line := string(l.rest)
	l.rest = l.rest[:0]
	l.lines++
	if line == "" || l.lines > maxStderr {
		return
	}
	var entry struct {
		Level   *zapcore.Level `json:"level"`
		Message string         `json:"msg"`
	}
	fields := make(map[string]any)
	if json.Unmarshal([]byte(line), &entry) != nil || entry.Level == nil || *entry.Level > zapcore.ErrorLevel ||
		json.Unmarshal([]byte(line), &fields) != nil {
		l.log.Error("unseal child", zap.String("stderr", clean(line)))
		return
	}
	var zf []zap.Field
	for k, v := range fields {
		if k != "level" && k != "msg" {
			zf = append(zf, zap.Any(k, v))
		}
	}
	l.log.Log(*entry.Level, entry.Message, zf...)
}
