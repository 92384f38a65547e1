package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

// TestMain lets the test binary be hostcryptd when a script calls it by that
// name, so that scripts test the real command line, with real processes. The
// children are this binary too, under its own name.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == keyunseal.ChildArg || os.Args[1] == deriveArg) {
		main()
	}
	if os.Getenv(notifyEnv) != "" {
		os.Exit(notifyMain())
	}
	if os.Getenv(claimEnv) != "" {
		os.Exit(claimMain())
	}
	if os.Getenv(fakeKeeperEnv) != "" {
		if os.Getenv(keeperEnv) != "" {
			listenToSignals()
		}
		os.Exit(fakeKeeper())
	}
	testscript.Main(apart{m}, map[string]func(){
		"hostcryptd":  func() { panicOnSignal(); main() },
		"@hostcryptd": func() { main() }, // the mark of serve --initrd
	})
}

// apart runs the tests with what a host keeps in a directory of their own: what they do
// is no use of this machine's keys, and nothing for it to remember.
type apart struct{ m *testing.M }

func (a apart) Run() int {
	dir, err := os.MkdirTemp("", "hostcryptd-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	for name, file := range map[string]string{"HOSTCRYPTD_PINS": "pins", "HOSTCRYPTD_AUDIT_LOG": "audit.log", "HOSTCRYPTD_TPM": "tpm.sock"} {
		if os.Getenv(name) == "" {
			os.Setenv(name, filepath.Join(dir, file))
		}
	}
	return a.m.Run()
}

// TestApart: what runs in the tests' own process leaves the machine's state alone.
func TestApart(t *testing.T) {
	var k keyFlags
	if pins, log, tpm := k.pinDir(), k.auditFile(), k.tpmPath(); pins == sector.DefaultPins || log == audit.DefaultFile || tpm == keyunseal.DefaultTPM {
		t.Errorf("the tests use this machine's own pins, log of key use or TPM: %s, %s, %s", pins, log, tpm)
	}
}

// tools are what the scripts call, by the Debian package that has them.
var tools = map[string]string{
	"nbdinfo": "libnbd-bin", "nbdcopy": "libnbd-bin", "qemu-io": "qemu-utils", "qemu-img": "qemu-utils",
	"cryptsetup": "cryptsetup-bin", "mkfs.ext4": "e2fsprogs", "e2fsck": "e2fsprogs", "sfdisk": "fdisk", "blkid": "util-linux", "mkswap": "util-linux", "losetup": "mount",
	"fio": "fio", "ip": "iproute2", "unshare": "util-linux", "setpriv": "util-linux", "prlimit": "util-linux",
	"swtpm": "swtpm",
}

func TestScripts(t *testing.T) {
	for name, pkg := range tools {
		if !isExecutable(tool(name)) {
			t.Errorf("%s is not installed (Debian package %s); run make deps", name, pkg)
		}
	}
	if t.Failed() {
		return
	}
	testscript.Run(t, params("testdata/script"))
}

// params are those of all scripts. The names of Cmds must not be those of
// testscript's own commands, which would win.
func params(dir string) testscript.Params {
	return testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup: func(env *testscript.Env) error {
			// System tools live in sbin, and HOME must not be the user's.
			env.Setenv("PATH", env.Getenv("PATH")+string(os.PathListSeparator)+"/usr/sbin:/sbin:/usr/bin:/bin")
			env.Setenv("XDG_RUNTIME_DIR", filepath.Join(env.WorkDir, "run"))
			env.Setenv("GORACE", os.Getenv("GORACE"))
			env.Setenv("HOSTCRYPTD_PINS", filepath.Join(env.WorkDir, "pins"))
			// Also where this machine has a TPM: scripts start one of their own.
			env.Setenv("HOSTCRYPTD_TPM", filepath.Join(env.WorkDir, "tpm.sock"))
			env.Setenv("HOSTCRYPTD_AUDIT_LOG", filepath.Join(env.WorkDir, "audit.log"))
			unit, err := filepath.Abs("../../systemd/hostcryptd@.service")
			env.Setenv("UNIT", unit)
			return err
		},
		Condition: func(cond string) (bool, error) {
			switch cond {
			case "root":
				return os.Geteuid() == 0, nil
			case "kernelnbd":
			default:
				return false, fmt.Errorf("unknown condition %q", cond)
			}
			c, err := nbdnl.Dial()
			if err == nil {
				c.Close()
			}
			return !errors.Is(err, nbdnl.ErrNotSupported), nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"size":       cmdSize,
			"noise":      cmdNoise,
			"poke":       cmdPoke,
			"splice":     cmdSplice,
			"setuuid":    cmdSetUUID,
			"waitfor":    cmdWaitFor,
			"waitstatus": cmdWaitStatus,
			"waitlog":    cmdWaitLog,
			"code":       cmdCode,
			"terminate":  cmdTerminate,
			"cmpn":       cmdCompare,
			"measure":    cmdMeasure,
			"retire":     cmdRetire,
		},
	}
}

// size FILE BYTES makes a file of a size.
func cmdSize(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR|os.O_CREATE, 0o600)
	ts.Check(err)
	ts.Check(errors.Join(f.Truncate(n), f.Close()))
}

// noise FILE BYTES makes a file of random bytes.
func cmdNoise(ts *testscript.TestScript, neg bool, args []string) {
	n, err := strconv.Atoi(args[1])
	ts.Check(err)
	b := make([]byte, n)
	rand.Read(b)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// poke FILE OFFSET TEXT overwrites a part of a file.
func cmdPoke(ts *testscript.TestScript, neg bool, args []string) {
	off, err := strconv.ParseInt(args[1], 10, 64)
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	_, err = f.WriteAt([]byte(args[2]), off)
	ts.Check(errors.Join(err, f.Close()))
}

// splice FILE FROM N puts token N of another header into the one of a file, as
// somebody does who can write to the disk and has no key.
func cmdSplice(ts *testscript.TestScript, neg bool, args []string) {
	from, err := os.Open(ts.MkAbs(args[1]))
	ts.Check(err)
	defer from.Close()
	old, _, err := luks2.Read(from)
	ts.Check(err)
	id, err := strconv.Atoi(args[2])
	ts.Check(err)
	forge(ts, args[0], func(h *luks2.Header) {
		if h.Tokens[id] = old.Tokens[id]; h.Tokens[id] == nil {
			ts.Fatalf("%s has no token %d", args[1], id)
		}
	})
}

// setuuid FILE TEXT puts a text into the place of a header's UUID.
func cmdSetUUID(ts *testscript.TestScript, neg bool, args []string) {
	forge(ts, args[0], func(h *luks2.Header) { h.UUID = args[1] })
}

// forge changes both copies of a file's header, and makes their checksums right.
func forge(ts *testscript.TestScript, file string, change func(h *luks2.Header)) {
	f, err := os.OpenFile(ts.MkAbs(file), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	h, _, err := luks2.Read(f)
	ts.Check(err)
	change(h)
	for _, off := range []uint64{0, h.Size} {
		b, err := h.Encode(off)
		ts.Check(err)
		_, err = f.WriteAt(b, int64(off))
		ts.Check(err)
	}
}

// waitfor SOCKET waits until somebody listens on a socket.
func cmdWaitFor(ts *testscript.TestScript, neg bool, args []string) {
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		for _, network := range []string{"unix", "unixpacket"} {
			if c, err := net.Dial(network, ts.MkAbs(args[0])); err == nil {
				c.Close()
				return
			}
		}
	}
	ts.Fatalf("nobody listens on %s", args[0])
}

// waitstatus SOCKET REGEXP waits until what status prints matches.
func cmdWaitStatus(ts *testscript.TestScript, neg bool, args []string) {
	want := regexp.MustCompile(args[1])
	var out strings.Builder
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		list, err := running(context.Background(), ts.MkAbs(args[0]))
		ts.Check(err)
		out.Reset()
		list[0].print(&out)
		if want.MatchString(out.String()) {
			return
		}
	}
	ts.Fatalf("status never said %q, last:\n%s", args[1], out.String())
}

// waitlog FILE PATTERN waits until a file has a match.
func cmdWaitLog(ts *testscript.TestScript, neg bool, args []string) {
	want := regexp.MustCompile(args[1])
	var b []byte
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if b, _ = os.ReadFile(ts.MkAbs(args[0])); want.Match(b) {
			return
		}
	}
	ts.Fatalf("%s never had %q, it has:\n%s", args[0], args[1], b)
}

// codeLimit is what a command gets that is about to fail. A serve that doesn't would
// go on for ever.
const codeLimit = 2 * time.Minute

// code N COMMAND... runs a command, and fails unless its exit code is N.
func cmdCode(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	limit := []string{"--foreground", "--kill-after=10", strconv.Itoa(int(codeLimit.Seconds()))}
	err = ts.Exec("timeout", append(limit, args[1:]...)...)
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else {
		ts.Check(err)
	}
	if got == 124 {
		ts.Fatalf("it had not ended after %v, and should have with exit code %d", codeLimit, want)
	}
	if got != want {
		ts.Fatalf("exit code %d, want %d", got, want)
	}
}

// terminate sends SIGTERM to the process whose daemon has the control socket.
func cmdTerminate(ts *testscript.TestScript, neg bool, args []string) {
	list, err := running(context.Background(), ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(syscall.Kill(list[0].PID, syscall.SIGTERM))
}

// cmpn N A B compares the first N bytes of two files.
func cmdCompare(ts *testscript.TestScript, neg bool, args []string) {
	err := ts.Exec("cmp", "-n", args[0], args[1], args[2])
	if (err == nil) == neg {
		ts.Fatalf("%s and %s: %v", args[1], args[2], err)
	}
}

// retire FILE HOSTKEY seals token 0 anew with a host key, and keeps it as rewrap
// --keep-old does, which counts in days, for no time to speak of.
func cmdRetire(ts *testscript.TestScript, neg bool, args []string) {
	keys, log := &keyFlags{hostKey: ts.MkAbs(args[1])}, zap.NewNop()
	ts.Check(withHeader(ts.MkAbs(args[0]), false, func(d *sector.Device) error {
		again := keys.sealer("host-key", log)
		rewrap := func(ctx context.Context, volume string, _ json.RawMessage, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
			return again(ctx, volume, key)
		}
		_, err := sector.ReplaceToken(context.Background(), d, keys.unsealer(log), 0, rewrap, time.Millisecond, sector.OpenOptions{})
		return err
	}))
}

// measure SOCKET PCR TEXT extends a PCR of the TPM behind a socket, as firmware
// does.
func cmdMeasure(ts *testscript.TestScript, neg bool, args []string) {
	pcr, err := strconv.ParseUint(args[1], 10, 8)
	ts.Check(err)
	tpm, err := linuxudstpm.Open(ts.MkAbs(args[0]))
	ts.Check(err)
	defer tpm.Close()
	sum := sha256.Sum256([]byte(args[2]))
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: sum[:]}}},
	}.Execute(tpm)
	ts.Check(err)
}

func TestExitCodes(t *testing.T) {
	unreachable := &keyunseal.Error{Class: keyunseal.ClassUnreachable}
	wrong := &keyunseal.Error{Class: keyunseal.ClassWrongKey}
	for _, tt := range []struct {
		err  error
		want int
	}{
		{nil, 0},
		{errors.New("x"), codeUsage},
		{fmt.Errorf("device: %w", unreachable), codeUnreachable},
		{errors.Join(wrong, unreachable), codeWrongKey},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, codeDevice},
		{&os.PathError{Op: "open", Path: "x", Err: syscall.EBUSY}, codeBusy},
	} {
		if got := exitCode(tt.err); got != tt.want {
			t.Errorf("exitCode(%v) = %d, want %d", tt.err, got, tt.want)
		}
	}
}

func TestDescribeSignature(t *testing.T) {
	for in, want := range map[string]string{
		"": "",
		"DEVNAME=x\nTYPE=ext4\nUSAGE=filesystem\nUUID=1-2\n":                "a file system of type ext4 (uuid 1-2)",
		"DEVNAME=x\nPTTYPE=dos\nPTUUID=7\n":                                 "a partition table of type dos",
		"DEVNAME=x\nTYPE=crypto_LUKS\nUSAGE=crypto\n":                       "a signature of type crypto_LUKS",
		"DEVNAME=x\nTYPE=crypto_LUKS\nSUBSYSTEM=hostcryptd\nUSAGE=crypto\n": "a hostcryptd volume",
		"DEVNAME=x\nTYPE=swap\nUSAGE=other\nLABEL=s\n":                      "a signature of type swap (label s)",
	} {
		if got := describeSignature(parseExport(in)); got != want {
			t.Errorf("describeSignature(%q) = %q, want %q", in, got, want)
		}
	}
}

// TestExamplesWait checks that what follows a server in an example runs, and runs
// when the volume is ready.
func TestExamplesWait(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, text := range []string{string(readme), rootExample} {
		lines := strings.Split(text, "\n")
		for i, line := range lines[:len(lines)-1] {
			next := strings.TrimSpace(lines[i+1])
			if !strings.HasPrefix(line, "  ") || !strings.Contains(line, "hostcryptd serve ") || next == "" {
				continue
			}
			seen++
			if !strings.HasSuffix(line, " &") || !strings.HasPrefix(next, "until ") {
				t.Errorf("an example has a server in the foreground, or doesn't wait for it:\n%s\n%s", line, lines[i+1])
			}
		}
	}
	if seen != 5 {
		t.Errorf("%d examples go on after a server, want 5", seen)
	}
}
