package keyunseal

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// A softTPM is swtpm, a TPM that we didn't write.
type softTPM struct {
	t       testing.TB
	dir     string
	path    string // of its socket
	process *exec.Cmd
}

// newTPM makes a TPM with seeds of its own and switches it on.
func newTPM(t testing.TB) *softTPM {
	t.Helper()
	// The name of a Unix socket has at most 107 bytes: not t.TempDir.
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	s := &softTPM{t: t, dir: dir, path: filepath.Join(dir, "s")}
	t.Cleanup(func() {
		s.off()
		os.RemoveAll(dir)
	})
	s.on()
	return s
}

// on boots the TPM: its PCRs begin anew.
func (s *softTPM) on() {
	s.t.Helper()
	var out bytes.Buffer
	s.process = exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+s.dir,
		"--server", "type=unixio,path="+s.path, "--flags", "not-need-init,startup-clear")
	s.process.Stdout, s.process.Stderr = &out, &out
	if err := s.process.Start(); err != nil {
		s.t.Fatalf("%v; the package swtpm has it", err)
	}
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", s.path); err == nil {
			c.Close()
			return
		}
		if time.Since(begun) > 10*time.Second {
			s.t.Fatalf("swtpm doesn't listen: %s", out.String())
		}
	}
}

func (s *softTPM) off() {
	if s.process == nil {
		return
	}
	s.process.Process.Kill()
	s.process.Wait()
	s.process = nil
	os.Remove(s.path)
}

func (s *softTPM) reboot() { s.off(); s.on() }

// do runs commands on the TPM as another program would.
func (s *softTPM) do(f func(c *tpmConn) error) {
	s.t.Helper()
	c, err := openTPM(s.t.Context(), s.path)
	if err == nil {
		err = f(c)
		c.Close()
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// extend measures something into a PCR.
func (s *softTPM) extend(pcr uint, what string) {
	s.t.Helper()
	s.do(func(c *tpmConn) error {
		sum := sha256.Sum256([]byte(what))
		_, err := tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
		}.Execute(c)
		return err
	})
}

// boot measures what a firmware would: Secure Boot in PCR 7, the kernel in 11.
func (s *softTPM) boot(secureBoot, kernel string) {
	s.t.Helper()
	s.reboot()
	s.extend(7, secureBoot)
	s.extend(11, kernel)
}

// clear is what "Clear TPM" in the firmware's menu does.
func (s *softTPM) clear() {
	s.t.Helper()
	s.do(func(c *tpmConn) error {
		_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(c)
		return err
	})
}

func (s *softTPM) options() Options { return Options{TPM: s.path} }

func TestTPM(t *testing.T) {
	s := newTPM(t)
	s.boot("secure boot on", "kernel 1")
	opts, key := s.options(), randomKey(t)
	token := mustSeal(t, opts, SpecTPM, key)
	wantOpens(t, opts, token, key)
	s.boot("secure boot on", "kernel 2")
	wantOpens(t, opts, token, key)
	if err := Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Error(err)
	}
	d, err := Describe(token)
	if err != nil || d.Type != TypeTPM || d.PCRs != "7" || !strings.HasPrefix(d.KeyID, "tpm2:") {
		t.Errorf("Describe = %+v, %v", d, err)
	}

	s.extend(7, "an unsigned boot loader")
	for op, err := range map[string]error{
		"unseal": Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)),
		"probe":  Probe(t.Context(), opts, token, testVolume),
	} {
		e := wantClass(t, err, ClassTPMState)
		if e.Op != op || e.Code != "TPM_RC_POLICY_FAIL" || !strings.Contains(e.Error(), "PCR 7 changed") || !strings.Contains(e.Error(), "'hostcryptd key add --recovery-key' adds another token") || e.Transient() || e.Denied() || e.Integrity() {
			t.Errorf("%s: %v", op, e)
		}
	}
	s.boot("secure boot on", "kernel 3")
	wantOpens(t, opts, token, key)

	e := wantClass(t, Unseal(t.Context(), opts, token, strings.Replace(testVolume, "0f", "1f", 1), new([KeySize]byte)), ClassIntegrity)
	if !e.Integrity() {
		t.Error("not an integrity error")
	}
}

// TestSecureBootOff: only what the firmware says counts.
func TestSecureBootOff(t *testing.T) {
	file := filepath.Join(t.TempDir(), "SecureBoot")
	if secureBootOff(file) {
		t.Error("off without a variable")
	}
	for text, want := range map[string]bool{"\x06\x00\x00\x00\x00": true, "\x06\x00\x00\x00\x01": false, "\x06\x00\x00\x00": false, "": false} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := secureBootOff(file); got != want {
			t.Errorf("%q: off %v", text, got)
		}
	}
}

// TestTPMChoosesPCRs: other PCRs, and that a token asks for all of them.
func TestTPMChoosesPCRs(t *testing.T) {
	s := newTPM(t)
	s.boot("on", "kernel 1")
	key := randomKey(t)
	token := mustSeal(t, s.options(), "tpm:11+7", key)
	if d, _ := Describe(token); d.PCRs != "7+11" {
		t.Errorf("%+v", d)
	}
	wantOpens(t, s.options(), token, key)
	s.boot("on", "kernel 2")
	e := wantClass(t, Unseal(t.Context(), s.options(), token, testVolume, new([KeySize]byte)), ClassTPMState)
	if !strings.Contains(e.Error(), "PCR 11 changed") {
		t.Error(e)
	}
	// A token that asks for fewer PCRs than its policy doesn't open either.
	fewer := edit(t, token, func(m map[string]any) {
		m["pcrs"], m["pcr_values"] = []int{7}, m["pcr_values"].([]any)[:1]
	})
	wantClass(t, Unseal(t.Context(), s.options(), fewer, testVolume, new([KeySize]byte)), ClassTPMState)

	for _, spec := range []string{"tpm:", "tpm:x", "tpm:7+", "tpm:07", "tpm:7+7", "tpm:24", "tpm:-1", "tpm:7,11", "tpm:16", "tpm:23", "TPM", "tpm2"} {
		_, err := Seal(t.Context(), s.options(), spec, testVolume, key)
		if e := wantClass(t, err, ClassConfig); !strings.Contains(e.Error(), "PCR") {
			t.Errorf("Seal(%s): %v says nothing about PCRs", spec, e)
		}
	}
}

// TestOtherTPM: a token opens with its TPM alone, and not after that was cleared.
func TestOtherTPM(t *testing.T) {
	a, b := newTPM(t), newTPM(t)
	key := randomKey(t)
	token := mustSeal(t, a.options(), SpecTPM, key)
	other := mustSeal(t, b.options(), SpecTPM, key)
	e := wantClass(t, Unseal(t.Context(), b.options(), token, testVolume, new([KeySize]byte)), ClassWrongKey)
	if e.Code != codeOtherTPM || !strings.Contains(e.Error(), "cleared or replaced") || !strings.Contains(e.Error(), "'hostcryptd key add --recovery-key' adds another token") || e.Transient() || e.Denied() {
		t.Error(e)
	}
	// Not even when the token says so: the TPM itself doesn't accept it.
	names := make(map[string]any)
	json.Unmarshal(other, &names)
	forged := edit(t, token, func(m map[string]any) { m["srk_name"] = names["srk_name"] })
	wantClass(t, Unseal(t.Context(), b.options(), forged, testVolume, new([KeySize]byte)), ClassIntegrity)
	wantOpens(t, a.options(), token, key)

	a.clear()
	e = wantClass(t, Probe(t.Context(), a.options(), token, testVolume), ClassWrongKey)
	if e.Code != codeOtherTPM {
		t.Error(e)
	}
	// Who still has the volume key, by another token, seals it anew.
	fresh, err := Rewrap(t.Context(), a.options(), token, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	wantOpens(t, a.options(), fresh, key)
}

// TestTPMRewrap: after PCRs have changed, and only then.
func TestTPMRewrap(t *testing.T) {
	s := newTPM(t)
	s.boot("dbx 1", "kernel")
	opts, key := s.options(), randomKey(t)
	token := mustSeal(t, opts, "tpm:0+7", key)
	if _, err := Rewrap(t.Context(), opts, token, testVolume, key); !errors.Is(err, ErrCurrent) {
		t.Errorf("Rewrap = %v, want ErrCurrent", err)
	}
	s.boot("dbx 2", "kernel")
	var seen []string
	opts.Observe = func(x Exchange) { seen = append(seen, x.Op+" "+x.Class) }
	fresh, err := Rewrap(t.Context(), opts, token, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"wrap ", "unwrap "}; !slices.Equal(seen, want) {
		t.Errorf("observed %q, want %q", seen, want)
	}
	wantOpens(t, opts, fresh, key)
	if d, _ := Describe(fresh); d.PCRs != "0+7" {
		t.Errorf("%+v", d)
	}
	if _, err := Inspect(t.Context(), opts, fresh, testVolume); !errors.Is(err, ErrNoStatus) {
		t.Errorf("Inspect = %v", err)
	}
	s.off()
	_, err = Rewrap(t.Context(), opts, token, testVolume, key)
	wantClass(t, err, ClassNoTPM)
}

// TestTPMAltered: whatever of a token is changed, it doesn't open, and no change
// of one member is taken for the state of the platform or for an outage.
func TestTPMAltered(t *testing.T) {
	s := newTPM(t)
	token := mustSeal(t, s.options(), SpecTPM, randomKey(t))
	for _, member := range []string{"public", "private", "secret_sha256", "salt", "sealed", "srk_name"} {
		var m map[string]json.RawMessage
		if err := json.Unmarshal(token, &m); err != nil {
			t.Fatal(err)
		}
		var value []byte
		if err := json.Unmarshal(m[member], &value); err != nil {
			t.Fatal(err)
		}
		for _, i := range []int{2, len(value) / 2, len(value) - 1} {
			bad := slices.Clone(value)
			bad[i] ^= 1
			altered := edit(t, token, func(m map[string]any) { m[member] = bad })
			e, ok := errors.AsType[*Error](Unseal(t.Context(), s.options(), altered, testVolume, new([KeySize]byte)))
			if !ok || e.Class != ClassIntegrity && !(member == "srk_name" && e.Class == ClassWrongKey) {
				t.Errorf("%s, byte %d: %v", member, i, e)
			}
		}
	}
}

// TestTPMLockout: too many wrong passwords for something else don't lock us out.
func TestTPMLockout(t *testing.T) {
	s := newTPM(t)
	opts, key := s.options(), randomKey(t)
	token := mustSeal(t, opts, SpecTPM, key)
	s.do(func(c *tpmConn) error {
		// An object that is protected against guessing, and guesses.
		parent, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(c)
		if err != nil {
			return err
		}
		created, err := tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")},
				Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte("secret")}),
			}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true},
			}),
		}.Execute(c)
		if err != nil {
			return err
		}
		loaded, err := tpm2.Load{
			ParentHandle: tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)},
			InPrivate:    created.OutPrivate, InPublic: created.OutPublic,
		}.Execute(c)
		if err != nil {
			return err
		}
		for range 100 {
			_, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))}}.Execute(c)
			if errors.Is(err, tpm2.TPMRCLockout) {
				e := wantClass(t, classifyTPM("unseal", "tpm2", err), ClassTPMLockout)
				if e.Code != "TPM_RC_LOCKOUT" || !e.Transient() || !strings.Contains(e.Error(), "wait") {
					t.Error(e)
				}
				break
			}
		}
		if !errors.Is(err, tpm2.TPMRCLockout) {
			t.Errorf("after 100 guesses: %v, want a lockout", err)
		}
		flushTPM(c, loaded.ObjectHandle)
		flushTPM(c, parent.ObjectHandle)
		return nil
	})
	wantOpens(t, opts, token, key)
	mustSeal(t, opts, SpecTPM, key)
}

// TestPlatform: the TPM where there is one, and a TPM that doesn't work is never
// passed over.
func TestPlatform(t *testing.T) {
	key := randomKey(t)
	dir := t.TempDir()
	none := Options{TPM: dir + "/none", HostKey: dir + "/host.key"}
	token := mustSeal(t, none, SpecPlatform, key)
	if d, _ := Describe(token); d.Type != TypeHostKey {
		t.Errorf("without a TPM: %s", d.Type)
	}

	s := newTPM(t)
	opts := Options{TPM: s.path, HostKey: dir + "/unused.key"}
	sealed := mustSeal(t, opts, SpecPlatform, key)
	if d, _ := Describe(sealed); d.Type != TypeTPM {
		t.Errorf("with a TPM: %s", d.Type)
	}
	wantOpens(t, opts, sealed, key)
	explicit := mustSeal(t, Options{TPM: s.path, HostKey: dir + "/host.key"}, SpecHostKey, key)
	if d, _ := Describe(explicit); d.Type != TypeHostKey {
		t.Errorf("%s: %s", SpecHostKey, d.Type)
	}

	s.off()
	if err := os.WriteFile(s.path, nil, 0o600); err != nil { // there, and no TPM
		t.Fatal(err)
	}
	_, err := Seal(t.Context(), opts, SpecPlatform, testVolume, key)
	if e := wantClass(t, err, ClassNoTPM); !strings.Contains(e.Error(), "host-key") {
		t.Errorf("%v doesn't say how to do without", e)
	}
	if _, err := os.Stat(opts.HostKey); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a TPM that doesn't work was passed over for the host key")
	}
}

// TestTPMErrors: what can be in the way of a TPM, and what one is told to do.
func TestTPMErrors(t *testing.T) {
	key := randomKey(t)
	dir, err := os.MkdirTemp("", "tpm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	good := newTPM(t)
	token := mustSeal(t, good.options(), SpecTPM, key)

	// answering serves a socket where each command gets what answer returns; nil
	// for nothing at all.
	n := 0
	answering := func(answer func(command []byte) []byte) string {
		n++
		path := filepath.Join(dir, "s"+string(rune('a'+n)))
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					buf := make([]byte, 4096)
					for {
						n, err := c.Read(buf)
						if err != nil {
							return
						}
						switch a := answer(buf[:n]); {
						case a == nil:
						case len(a) == 0:
							return
						default:
							c.Write(a)
						}
					}
				}()
			}
		}()
		return path
	}
	code := func(rc uint32) func([]byte) []byte {
		return func([]byte) []byte {
			return []byte{0x80, 0x01, 0, 0, 0, 10, byte(rc >> 24), byte(rc >> 16), byte(rc >> 8), byte(rc)}
		}
	}
	if err := os.WriteFile(dir+"/file", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	closed, err := net.Listen("unix", dir+"/closed")
	if err != nil {
		t.Fatal(err)
	}
	closed.(*net.UnixListener).SetUnlinkOnClose(false)
	closed.Close()

	for _, tt := range []struct {
		name, path string
		class      Class
		code, text string
	}{
		{"no device", dir + "/none", ClassNoTPM, "", "is the TPM on in the firmware"},
		{"a file", dir + "/file", ClassNoTPM, "", "neither a character device nor a socket"},
		{"a directory", dir, ClassNoTPM, "", "neither"},
		{"a device that isn't one", "/dev/null", ClassNoTPM, "", "TPM's answer is cut off"},
		{"nobody listens", dir + "/closed", ClassNoTPM, "", "refused"},
		{"silence", answering(func([]byte) []byte { return nil }), ClassTPMBusy, "", "no answer"},
		{"hangs up", answering(func([]byte) []byte { return []byte{} }), ClassNoTPM, "", "cut off"},
		{"half an answer", answering(func([]byte) []byte { return []byte{0x80, 0x01, 0, 0, 1, 0, 0, 0, 0, 0, 1} }), ClassTPMBusy, "", "no answer"},
		{"a huge answer", answering(func([]byte) []byte { return bytes.Repeat([]byte{0x7f}, 10) }), ClassNoTPM, "", "size"},
		{"an empty success", answering(code(0)), ClassNoTPM, "", ""},
		{"always testing itself", answering(code(0x90a)), ClassTPMBusy, "TPM_RC_TESTING", "try again"},
		{"no memory", answering(code(0x902)), ClassTPMBusy, "TPM_RC_OBJECT_MEMORY", "try again"},
		{"failure mode", answering(code(0x101)), ClassNoTPM, "TPM_RC_FAILURE", "reboot"},
		{"not started", answering(code(0x100)), ClassNoTPM, "TPM_RC_INITIALIZE", ""},
		{"locked out", answering(code(0x921)), ClassTPMLockout, "TPM_RC_LOCKOUT", "wait"},
		{"owner password", answering(code(0x9a2)), ClassConfig, codeOwnerAuth, "tpm2_changeauth"},
		{"hierarchy off", answering(code(0x185)), ClassConfig, "TPM_RC_HIERARCHY", "disabled"},
		{"an unknown code", answering(code(0x8ff)), ClassNoTPM, "", ""},
	} {
		opts := Options{TPM: tt.path}
		for op, f := range map[string]func(context.Context) error{
			"seal":   func(ctx context.Context) error { _, err := Seal(ctx, opts, SpecTPM, testVolume, key); return err },
			"unseal": func(ctx context.Context) error { return Unseal(ctx, opts, token, testVolume, new([KeySize]byte)) },
			"probe":  func(ctx context.Context) error { return Probe(ctx, opts, token, testVolume) },
		} {
			begun := time.Now()
			e, ok := errors.AsType[*Error](f(shortContext(t, 150*time.Millisecond)))
			if !ok || e.Class != tt.class || e.Op != op || tt.code != "" && e.Code != tt.code || !strings.Contains(e.Error(), tt.text) {
				t.Errorf("%s, %s: %v, want %v %s %q", tt.name, op, e, tt.class, tt.code, tt.text)
			}
			if ok && e.Transient() != (tt.class != ClassConfig) {
				t.Errorf("%s: transient %v", tt.name, e.Transient())
			}
			if d := time.Since(begun); d > 10*time.Second {
				t.Errorf("%s: took %v", tt.name, d)
			}
		}
	}

	// A real password of the owner, and a TPM without the bank.
	good.do(func(c *tpmConn) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("owner")},
		}.Execute(c)
		return err
	})
	if e := wantClass(t, Unseal(t.Context(), good.options(), token, testVolume, new([KeySize]byte)), ClassConfig); e.Code != codeOwnerAuth {
		t.Error(e)
	}
	bare := newTPM(t)
	bare.off()
	if out, err := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", bare.dir, "--pcr-banks", "sha384", "--reconfigure").CombinedOutput(); err != nil {
		t.Fatalf("swtpm_setup: %v: %s", err, out)
	}
	bare.on()
	_, err = Seal(t.Context(), bare.options(), SpecTPM, testVolume, key)
	if e := wantClass(t, err, ClassConfig); e.Code != codeNoBank {
		t.Error(e)
	}
}

// TestTPMTriesAgain: a TPM that asks for patience gets it.
func TestTPMTriesAgain(t *testing.T) {
	s := newTPM(t)
	p := newInterposer(t, s.path)
	refusals := 0
	p.mu.Lock()
	p.change = func(command, answer []byte) []byte {
		if refusals++; refusals%2 == 1 {
			return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x09, 0x0a} // TPM_RC_TESTING
		}
		return answer
	}
	p.mu.Unlock()
	// Each command is repeated here, though the TPM has done it: only what may be
	// done twice works.
	c, err := openTPM(t.Context(), p.path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = readPCRs(c, []uint{7})
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil || refusals != 2 {
		t.Errorf("%v after %d answers", err, refusals)
	}
}

// An interposer sits on the bus between a program and a TPM.
type interposer struct {
	path   string
	mu     sync.Mutex
	seen   []byte // in both directions
	change func(command, answer []byte) []byte
}

func newInterposer(t testing.TB, tpm string) *interposer {
	t.Helper()
	p := &interposer{path: tpm + ".bus"}
	l, err := net.Listen("unix", p.path)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	t.Cleanup(func() { l.Close(); serving.Wait() })
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			up, err := net.Dial("unix", tpm)
			if err != nil {
				c.Close()
				continue
			}
			p.carry(c, up)
			c.Close()
			up.Close()
		}
	})
	return p
}

func (p *interposer) carry(c, up net.Conn) {
	command, answer := make([]byte, 4096), make([]byte, 4096)
	for {
		n, err := c.Read(command)
		if err != nil {
			return
		}
		up.Write(command[:n])
		m, err := up.Read(answer)
		if err != nil {
			return
		}
		p.mu.Lock()
		p.seen = append(append(p.seen, command[:n]...), answer[:m]...)
		a := answer[:m]
		if p.change != nil {
			a = p.change(command[:n], a)
		}
		p.mu.Unlock()
		c.Write(a)
	}
}

// TestTPMBus: what an interposer on the bus sees opens nothing, and what it
// changes is noticed.
func TestTPMBus(t *testing.T) {
	s := newTPM(t)
	p := newInterposer(t, s.path)
	opts, key := Options{TPM: p.path}, randomKey(t)
	token := mustSeal(t, opts, SpecTPM, key)
	wantOpens(t, opts, token, key)

	decoded, err := decodeToken(token)
	if err != nil {
		t.Fatal(err)
	}
	var secret [KeySize]byte
	if err := decoded.(*tpmToken).findSecret(t.Context(), opts, "test", &secret); err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	if len(p.seen) < 2000 {
		t.Errorf("the interposer saw only %d bytes", len(p.seen))
	}
	wantNoSecret(t, "the bus", p.seen, secret[:], key[:])
	p.mu.Unlock()

	// A changed bit in any answer to TPM2_Unseal.
	const unseal = 0x15e
	for _, at := range []int{14, 20, 40, -20} {
		changed := false
		p.mu.Lock()
		p.change = func(command, answer []byte) []byte {
			if command[8] == unseal>>8 && command[9] == unseal&0xff && len(answer) > 60 {
				changed = true
				if at < 0 {
					answer[len(answer)+at] ^= 1
				} else {
					answer[at] ^= 1
				}
			}
			return answer
		}
		p.mu.Unlock()
		var got [KeySize]byte
		err := Unseal(t.Context(), opts, token, testVolume, &got)
		p.mu.Lock()
		if err == nil || !changed || got != [KeySize]byte{} {
			t.Errorf("byte %d changed (%v): %v", at, changed, err)
		}
		p.mu.Unlock()
	}

	// An SRK of its own, to which the session would be salted.
	mine := newTPM(t)
	var answer []byte
	mine.do(func(c *tpmConn) error {
		rc, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(recordingTPM{c, &answer})
		if err == nil {
			flushTPM(c, rc.ObjectHandle)
		}
		return err
	})
	p.mu.Lock()
	p.change = func(command, a []byte) []byte {
		const createPrimary = 0x131
		if command[8] == createPrimary>>8 && command[9] == createPrimary&0xff {
			return answer
		}
		return a
	}
	p.mu.Unlock()
	wantClass(t, Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte)), ClassWrongKey)
}

// A recordingTPM keeps the last answer.
type recordingTPM struct {
	*tpmConn
	answer *[]byte
}

func (r recordingTPM) Send(command []byte) ([]byte, error) {
	a, err := r.tpmConn.Send(command)
	*r.answer = slices.Clone(a)
	return a, err
}

// shell runs a script in a folder, where the TPM tools of the distribution talk to
// the TPM.
func (s *softTPM) shell(dir, script string) []byte {
	s.t.Helper()
	self, err := os.Executable()
	if err != nil {
		s.t.Fatal(err)
	}
	cmd := exec.CommandContext(shortContext(s.t, 30*time.Second), "sh", "-ec", script)
	cmd.WaitDelay = 5 * time.Second
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=cmd:"+self+" relay "+s.path,
		"GORACE=atexit_sleep_ms=0") // each command starts a relay
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		s.t.Fatalf("%v: %s; the package tpm2-tools has the commands", err, stderr.String())
	}
	return out
}

// TestTPMTools opens a token by FORMAT.md's commands, with the TPM tools of the
// distribution.
func TestTPMTools(t *testing.T) {
	s := newTPM(t)
	s.boot("on", "kernel")
	key := randomKey(t)
	token := mustSeal(t, s.options(), "tpm:7+11", key)
	var tk tpmToken
	if err := json.Unmarshal(token, &tk); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for name, b := range map[string][]byte{"public": tk.Public, "private": tk.Private} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	run := func(script string) []byte { t.Helper(); return s.shell(dir, script) }
	script := formatSection(t, "sh")
	secret := run(strings.ReplaceAll(script, "sha256:7", "sha256:7,11"))
	if sum := sha256.Sum256(secret); !bytes.Equal(sum[:], tk.SecretHash) {
		t.Fatalf("tpm2_unseal gives %d bytes, and not the secret", len(secret))
	}
	var got [KeySize]byte
	if err := tk.open((*[KeySize]byte)(secret), TypeTPM, testVolume, &got); err != nil || got != *key {
		t.Errorf("the envelope: %v", err)
	}
	name := run("tpm2_readpublic -Q -c srk.ctx -n name && od -An -v -tx1 name | tr -d ' \\n'; tpm2_flushcontext -t")
	if string(name) != hex.EncodeToString(tk.SRKName) {
		t.Errorf("the SRK is %s, the token says %x", name, tk.SRKName)
	}
}

// TestTPMPolicy compares the policy with what a TPM makes of it.
func TestTPMPolicy(t *testing.T) {
	s := newTPM(t)
	s.boot("on", "kernel")
	for _, pcrs := range [][]uint{{7}, {0}, {7, 11}, {0, 2, 4, 7, 8, 9, 11, 12, 13, 14, 15, 22}} {
		s.do(func(c *tpmConn) error {
			values, err := readPCRs(c, pcrs)
			if err != nil {
				return err
			}
			policy, err := pcrPolicy(pcrs, values)
			if err != nil {
				return err
			}
			session, done, err := tpm2.PolicySession(c, tpm2.TPMAlgSHA256, 16, tpm2.Trial())
			if err != nil {
				return err
			}
			defer done()
			if _, err := (tpm2.PolicyPCR{PolicySession: session.Handle(), Pcrs: pcrSelection(pcrs)}).Execute(c); err != nil {
				return err
			}
			want, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(c)
			if err == nil && !bytes.Equal(policy, want.PolicyDigest.Buffer) {
				t.Errorf("PCRs %v: %x, the TPM computes %x", pcrs, policy, want.PolicyDigest.Buffer)
			}
			return err
		})
	}
}

// TestTPMLeavesNothing: after success and after failure the TPM holds no objects
// and no sessions of ours; without a resource manager it has room for three.
func TestTPMLeavesNothing(t *testing.T) {
	s := newTPM(t)
	opts, key := s.options(), randomKey(t)
	token := mustSeal(t, opts, SpecTPM, key)
	bad := make([]byte, len(token))
	rand.Read(bad)
	for range 5 {
		s.extend(7, "x")
		Unseal(t.Context(), opts, token, testVolume, new([KeySize]byte))
		mustSeal(t, opts, SpecTPM, key)
		altered := edit(t, token, func(m map[string]any) {
			var b tpmToken
			json.Unmarshal(token, &b)
			b.Private[20] ^= 1
			m["private"] = b.Private
		})
		wantClass(t, Unseal(t.Context(), opts, altered, testVolume, new([KeySize]byte)), ClassIntegrity)
	}
	s.do(func(c *tpmConn) error {
		for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} { // transient objects, sessions
			resp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 16}.Execute(c)
			if err != nil {
				return err
			}
			handles, err := resp.CapabilityData.Data.Handles()
			if err != nil {
				return err
			}
			if len(handles.Handle) > 0 {
				t.Errorf("left in the TPM: %x", handles.Handle)
			}
		}
		return nil
	})
}

// TestTPMInChild does it through a process.
func TestTPMInChild(t *testing.T) {
	s := newTPM(t)
	opts, key := s.options(), randomKey(t)
	c := &Child{}
	token, err := c.Seal(t.Context(), opts, SpecPlatform, testVolume, key)
	if err != nil {
		t.Fatal(err)
	}
	var got [KeySize]byte
	if err := c.Unseal(t.Context(), opts, token, testVolume, &got); err != nil || got != *key {
		t.Errorf("Unseal = %v", err)
	}
	if err := c.Probe(t.Context(), opts, token, testVolume); err != nil {
		t.Error(err)
	}
	s.extend(7, "x")
	e := wantClass(t, c.Probe(t.Context(), opts, token, testVolume), ClassTPMState)
	if !strings.Contains(e.Error(), "PCR 7 changed") || e.Code != "TPM_RC_POLICY_FAIL" {
		t.Error(e)
	}
	opts.TPM = "/nonexistent/tpm"
	e = wantClass(t, c.Probe(t.Context(), opts, token, testVolume), ClassNoTPM)
	if !strings.Contains(e.Error(), "in the firmware") {
		t.Errorf("%v: the hint was lost on the way", e)
	}
}
