package main

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/vaulttest"
	"hostcryptd/sector"
)

// The product has no switch that points it at another vault, so to test it
// whole, names and addresses must be real. TestVault starts this binary again
// in network and mount namespaces of its own, where 169.254.169.254 is an
// address of the loopback interface, /etc/hosts leads the vault's names there,
// and the double's certificate authority is the only one. Nothing in there can
// reach any other network.

const (
	insideVariable = "HOSTCRYPTD_TEST_NAMESPACE"
	vaultKey       = "https://testvault.vault.azure.net/keys/disks"
)

func TestVault(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestVaultInside$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), insideVariable+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: TestVaultInside") {
		t.Errorf("in the namespace: %v\n%s", err, out)
	}
	t.Logf("%s", out)
}

// TestVaultInside is the part of TestVault that runs in the namespaces; by
// itself it has nothing to do.
func TestVaultInside(t *testing.T) {
	if os.Getenv(insideVariable) == "" {
		return
	}
	double, err := vaulttest.New(vaulttest.Options{AsyncDelay: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	enterNetwork(t, double.CAPEM())
	v := &vault{double: double}
	if err := v.up(); err != nil {
		t.Fatal(err)
	}
	defer v.down()

	p := params("testdata/vault")
	setup := p.Setup
	p.Setup = func(env *testscript.Env) error {
		// Each script has a key of its own name.
		url := vaultKey + "-" + strings.TrimPrefix(filepath.Base(env.WorkDir), "script-")
		for _, url := range []string{url, url + "-other", strings.Replace(url, "testvault.vault.azure.net/keys/disks-", "unit.vault.cloud.example/keys/", 1)} {
			if _, err := double.AddKey(url, 2048); err != nil {
				return err
			}
		}
		env.Setenv("KEY", url)
		env.Setenv("CLIENT", double.System())
		return setup(env)
	}
	p.Cmds["vault"] = v.command
	// One after the other: the double is shared.
	files, err := filepath.Glob("testdata/vault/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, f := range files {
		p.Dir, p.Files = "", []string{f}
		t.Run("", func(t *testing.T) { testscript.Run(t, p) })
		// Whatever the script left behind must not hide the next one's errors.
		v.down()
		if err := v.up(); err != nil {
			t.Fatal(err)
		}
		double.ClearFaults()
		double.Permit(double.System(), "get", "wrapKey", "unwrapKey")
	}
	t.Run("RewrapLatency", func(t *testing.T) { testRewrapLatency(t, double) })
}

// enterNetwork makes the namespace look like a machine in Azure.
func enterNetwork(t *testing.T, ca []byte) {
	t.Helper()
	if list, err := net.Interfaces(); err != nil || len(list) != 1 || list[0].Name != "lo" {
		t.Fatalf("this is no namespace of its own: interfaces %v, %v", list, err)
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"address", "add", "169.254.169.254/32", "dev", "lo"},
	} {
		if out, err := exec.Command(tool("ip"), args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %v (Debian package iproute2): %v %s", args, err, out)
		}
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatal(err)
	}
	// A dialer of this host's has its network.
	if err := unix.Mount("none", "/run", "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	for target, content := range map[string]string{
		"/etc/hosts":                         "127.0.0.1 localhost testvault.vault.azure.net login.microsoftonline.com unit.vault.cloud.example\n",
		"/etc/resolv.conf":                   "",
		"/etc/ssl/certs/ca-certificates.crt": string(ca),
	} {
		f := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(f, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(f, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatalf("mounting over %s: %v", target, err)
		}
	}
}

// A vault is the double, with a network cable.
type vault struct {
	double *vaulttest.Server
	cancel context.CancelFunc
	done   sync.WaitGroup
}

func (v *vault) up() error {
	tls, err1 := net.Listen("tcp", "127.0.0.1:443")
	imds, err2 := net.Listen("tcp", "169.254.169.254:80")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	v.cancel = cancel
	v.done.Go(func() { v.double.Serve(ctx, tls, imds) })
	return nil
}

func (v *vault) down() {
	if v.cancel != nil {
		v.cancel()
		v.done.Wait()
	}
	v.cancel = nil
}

// garbled are answers that no vault gives, and those of a vault that isn't the one.
var garbled = map[string]vaulttest.FaultFunc{
	"empty":    vaulttest.Answer(200, nil, "{}"),
	"html":     vaulttest.Answer(200, http.Header{"Content-Type": {"text/html"}}, "<html>please log in</html>"),
	"fault":    vaulttest.Page(502),
	"proxy":    vaulttest.Page(403),
	"reset":    vaulttest.Reset,
	"value":    vaulttest.Rewrite(func(a map[string]any) { a["value"] = strings.Repeat("A", 43) }),
	"short":    vaulttest.Rewrite(func(a map[string]any) { a["value"] = "AQID" }),
	"kid":      vaulttest.Rewrite(func(a map[string]any) { a["kid"] = vaultKey + "-other/" + strings.Repeat("0", 32) }),
	"tenant":   challenge("https://login.microsoftonline.com/11111111-2222-4333-8444-555555555555", "https://vault.azure.net"),
	"suffix":   challenge("https://login.microsoftonline.com/"+vaulttest.DefaultTenant, "https://vault.example.com"),
	"notenant": challenge("https://login.microsoftonline.com", "https://vault.azure.net"), // the SDK panics on this one
}

func challenge(authority, resource string) vaulttest.FaultFunc {
	return vaulttest.Answer(401, http.Header{"Www-Authenticate": {`Bearer authorization="` + authority + `", resource="` + resource + `"`}}, "")
}

// command is the script command: vault down|up|disable|enable|delete|deny|permit|
// permitsign|large|noidentity|throttle|expire|unexpire|garble WHAT|retire DEVICE|clear.
func (v *vault) command(ts *testscript.TestScript, neg bool, args []string) {
	key := ts.Getenv("KEY")
	switch args[0] {
	case "down":
		v.down()
	case "up":
		ts.Check(v.up())
	case "disable":
		ts.Check(v.double.SetEnabled(key, false))
	case "enable":
		ts.Check(v.double.SetEnabled(key, true))
	case "rotate":
		_, err := v.double.AddKey(key, 2048)
		ts.Check(err)
	case "large":
		_, err := v.double.AddKey(key+"-large", 4096)
		ts.Check(err)
	case "delete":
		ts.Check(v.double.Delete(key))
	case "deny":
		v.double.Permit(v.double.System(), "get")
	case "permit":
		v.double.Permit(v.double.System(), "get", "wrapKey", "unwrapKey")
	case "permitsign":
		v.double.Permit(v.double.System(), "get", "wrapKey", "unwrapKey", "sign")
	case "throttle":
		v.double.Inject(vaulttest.Fault{Route: "unwrapkey", Times: -1, Do: vaulttest.Throttled()})
	case "noidentity":
		v.double.Inject(vaulttest.Fault{Route: "imds", Times: -1, Do: vaulttest.Answer(400, nil, `{"error":"invalid_request","error_description":"Identity not found"}`)})
	case "garble":
		v.double.ClearFaults()
		route := "unwrapkey"
		if args[1] == "tenant" || args[1] == "suffix" || args[1] == "notenant" {
			route = "challenge"
		}
		do, ok := garbled[args[1]]
		if !ok {
			ts.Fatalf("unknown: vault garble %s", args[1])
		}
		v.double.Inject(vaulttest.Fault{Route: route, Times: -1, Do: do})
	case "expire":
		ts.Check(v.double.SetValidity(key, time.Time{}, time.Now().Add(-time.Hour)))
	case "unexpire":
		ts.Check(v.double.SetValidity(key, time.Time{}, time.Time{}))
	case "retire":
		// As rewrap --keep-old, which counts in days, for no time to speak of.
		keys, log := &keyFlags{}, zap.NewNop()
		ts.Check(withHeader(ts.MkAbs(args[1]), false, func(d *sector.Device) error {
			rewrap := func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
				return (&keyunseal.Child{Log: log}).Rewrap(ctx, keys.options(volume, log), token, volume, key)
			}
			_, err := sector.ReplaceToken(context.Background(), d, keys.unsealer(log), 0, rewrap, time.Millisecond, sector.OpenOptions{})
			return err
		}))
	case "clear":
		v.double.ClearFaults()
	default:
		ts.Fatalf("unknown: vault %s", args[0])
	}
}
