package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
)

// claimEnv has the test binary claim a device.
const claimEnv = "HOSTCRYPTD_TEST_CLAIM"

func claimMain() int {
	a := &app{stderr: os.Stdout}
	f, err := claimDevice(os.Getenv(claimEnv), func() bool { return false }, a.daemonLog(false))
	fmt.Printf("claimed: %v, %v\n", f != nil, err)
	return 0
}

// TestClaimDevice uses a loop device in each of the ways that claimDevice has to
// see.
func TestClaimDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes loop devices, which takes root")
	}
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 32<<20)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool("losetup"), "--show", "-f", image).Output()
	if err != nil {
		t.Fatal(err)
	}
	dev := strings.TrimSpace(string(out))
	defer exec.Command(tool("losetup"), "-d", dev).Run()
	if out, err := exec.Command(tool("mkfs.ext4"), "-q", dev).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	gone := false // says the kernel
	claimPath := func(path, want string) {
		t.Helper()
		f, err := claimDevice(path, func() bool { return gone }, zap.NewNop())
		if f != nil {
			f.Close()
		}
		switch {
		case want == "" && (err != nil || f == nil):
			t.Errorf("claimDevice() = %v, %v", f, err)
		case want != "" && (err == nil || exitCode(err) != codeBusy || !strings.Contains(err.Error(), want)):
			t.Errorf("claimDevice() = %v, want an error with %q", err, want)
		}
	}
	claim := func(want string) { t.Helper(); claimPath(dev, want) }
	claim("")

	// A process that has it open.
	cmd := exec.Command("sh", "-c", "exec 3<"+dev+"; echo; read line")
	in, _ := cmd.StdinPipe()
	ready, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fscanln(ready)
	claim(fmt.Sprintf("opened by sh (process %d)", cmd.Process.Pid))
	// From a sandbox it can't be seen, which is said.
	limited := func(want string) {
		t.Helper()
		self, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		for proc, unseen := range map[string]string{
			"true": "processes can't be looked at from this one",
			"mount -t proc -o hidepid=ptraceable proc /proc": "processes of others can't be looked at",
		} {
			const caps = "-sys_ptrace,-dac_override,-dac_read_search"
			c := exec.Command(tool("unshare"), "--mount", "sh", "-c", proc+" && exec "+tool("setpriv")+" --bounding-set="+caps+" --inh-caps="+caps+" "+self)
			c.Env = append(os.Environ(), claimEnv+"="+dev)
			out, err := c.CombinedOutput()
			if err != nil || !strings.Contains(string(out), want) || !strings.Contains(string(out), unseen) {
				t.Errorf("without capabilities, %s: %v: %s, want %q and %q", proc, err, out, want, unseen)
			}
		}
	}
	limited("claimed: true, <nil>")
	in.Close()
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() < 0 {
		t.Fatal(err)
	}
	claim("")

	// A mount that this process doesn't see.
	dir := t.TempDir()
	cmd = exec.Command(tool("unshare"), "--mount", "sh", "-c", fmt.Sprintf("mount %s %s && echo && read line", dev, dir))
	in, _ = cmd.StdinPipe()
	ready, _ = cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	fmt.Fscanln(ready)
	claim(fmt.Sprintf("mounted on %s as process %d sees it", dir, cmd.Process.Pid))
	limited("claimed: false, " + dev + " is in use")
	in.Close()
	_ = cmd.Wait()
	claim("")

	// A /dev without its node, or in which something else has its name.
	number, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/dev")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), filepath.Base(dev))
	claimPath(name, "mknod "+name+" b "+strings.ReplaceAll(strings.TrimSpace(string(number)), ":", " "))
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	claimPath(name, "mknod")
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	gone = true
	if f, err := claimDevice(name, func() bool { return gone }, zap.NewNop()); f != nil || err != nil {
		t.Errorf("claimDevice of a device that is gone: %v, %v", f, err)
	}
}
