package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"hostcryptd/sector"
)

// startServe starts serve, as a service would, for the volume vol of a table. state, if
// it isn't nil, is what the service manager has kept.
func startServe(t *testing.T, table string, state *serverState) *keeperRun {
	t.Helper()
	k := &keeperRun{t: t, dir: t.TempDir(), lines: make(chan string, 1000)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(k.dir, "hostcryptd")
	if err := errors.Join(os.Symlink(self, bin), os.WriteFile(filepath.Join(k.dir, "table"), []byte(table), 0o600)); err != nil {
		t.Fatal(err)
	}
	// Another /etc, which only this process sees.
	args := []string{"--mount"}
	if os.Geteuid() != 0 {
		args = append(args, "--user", "--map-root-user")
	}
	// Whoever reads a pipe waits.
	const script = `mount -t tmpfs none /etc && mkfifo /etc/machine-id /etc/signer.pem /etc/server-cert.pem && cp table /etc/hostcrypttab && LISTEN_PID=$$ exec "$0" serve vol`
	k.cmd = exec.Command(tool("unshare"), append(args, "sh", "-c", script, bin)...)
	k.cmd.Dir = k.dir
	k.cmd.Env = append(os.Environ(), "HOSTCRYPTD_AUDIT_LOG=none", "HOSTCRYPTD_TPM=none", "HOSTCRYPTD_PINS="+k.dir)
	if state != nil {
		b, err := json.Marshal(state)
		if err != nil {
			t.Fatal(err)
		}
		f, err := memoryFile("state", b)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		k.cmd.ExtraFiles = []*os.File{f}
		k.cmd.Env = append(k.cmd.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES="+storedPrefix+storedState)
	}
	k.start()
	return k
}

// TestStoredLine restarts the service of a volume that is in use, whose line was changed
// to one that is of no use.
func TestStoredLine(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	const of = "it had, as that of now can't be used"
	for name, tt := range map[string]struct{ table, says string }{
		"typo":       {"vol " + image + " - discrad\n", of},
		"removed":    {"other " + image + "\n", of},
		"not now":    {"vol " + image + " - listen=/run/sock\n", of},
		"wrong flag": {"vol " + image + " - connections=999\n", of},
		"no use":     {"vol /missing/device\n", "it had, as no server comes up with that of now"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			// The server that reads this can't go on, as the image is too short, and
			// says so of the image of the line that it uses.
			line := "vol " + image + " - control=" + filepath.Join(filepath.Dir(image), strings.ReplaceAll(name, " ", ""))
			k := startServe(t, tt.table, &serverState{Version: serverStateVersion, TabLine: line, Index: 1 << 19, Connections: 1, Volume: sector.State{UUID: "0f8fad5b-d9cb-469f-a165-70867728950e", Size: 1 << 40, Sector: 4096}})
			k.line(tt.says)
			k.line("hostcryptd: " + image + ": ")
			k.line("the server has died; another one goes on")
			k.line("hostcryptd: " + image + ": ")
		})
	}
	t.Run("nothing stored", func(t *testing.T) {
		t.Parallel()
		k := startServe(t, fmt.Sprintf("vol %s - discrad\n", image), nil)
		for line := range k.lines {
			fmt.Fprintln(&k.log, line)
		}
		if _ = k.cmd.Wait(); k.cmd.ProcessState.ExitCode() != codeUsage || strings.Contains(k.log.String(), of) {
			t.Errorf("it ended with %v", k.cmd.ProcessState)
		}
	})
}

// TestGoesOnWithoutFiles: a server that takes over waits for no file but the backing
// device, as any other may be on the volume.
func TestGoesOnWithoutFiles(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	// It can't go on, as the image is too short, but comes as far as to say so.
	line := "vol " + image + " - attach=auto,signer=/etc/signer.pem,tls-certificates=/etc,tcp=127.0.0.1:0,control=" + filepath.Join(dir, "control")
	k := startServe(t, line, &serverState{Version: serverStateVersion, TabLine: line, Index: 1 << 19, Connections: 1, Volume: sector.State{UUID: "0f8fad5b-d9cb-469f-a165-70867728950e", Size: 1 << 40, Sector: 4096}})
	k.line("hostcryptd: " + image + ": ")
	k.line("the server has died; another one goes on")
	k.line("hostcryptd: " + image + ": ")
}

// panicEnv has the test binary panic at SIGUSR2.
const panicEnv = "HOSTCRYPTD_TEST_PANIC"

func panicOnSignal() {
	if os.Getenv(panicEnv) == "" {
		return
	}
	c := make(chan os.Signal, 1)
	signal.Notify(c, unix.SIGUSR2)
	go func() {
		<-c
		panic("of the test")
	}()
}

// TestPanic: a process of serve that panics ends by SIGABRT, which a service manager
// takes for an accident, and leaves no core.
func TestPanic(t *testing.T) {
	t.Setenv(panicEnv, "1")
	aborted := func(k *keeperRun) {
		t := k.t
		t.Helper()
		p, err := k.cmd.Process.Wait()
		if err != nil {
			t.Fatal(err)
		}
		if s := p.Sys().(syscall.WaitStatus); !s.Signaled() || s.Signal() != unix.SIGABRT || s.CoreDump() {
			t.Errorf("it ended with %v", p)
		}
	}
	// The server waits for the device.
	const table = "vol /missing/device\n"
	t.Run("keeper", func(t *testing.T) {
		k := startServe(t, table, nil)
		k.line("waiting for the device")
		k.kill(k.cmd.Process.Pid, unix.SIGUSR2)
		aborted(k)
	})
	t.Run("server", func(t *testing.T) {
		k := startServe(t, table, nil)
		k.line("waiting for the device")
		k.kill(childOf(t, k.cmd.Process.Pid), unix.SIGUSR2)
		k.line("panic: of the test")
		k.line("the server was killed by signal 6")
	})
	t.Run("no keeper", func(t *testing.T) {
		k := startServe(t, "vol /missing/device - listen=/etc/socket\n", nil)
		k.line("waiting for the device")
		k.kill(k.cmd.Process.Pid, unix.SIGUSR2)
		aborted(k)
	})
}

// childOf is the child of a process that has one.
func childOf(t *testing.T, parent int) int {
	t.Helper()
	for _, pid := range processes() {
		b, _ := os.ReadFile("/proc/" + pid + "/status")
		if strings.Contains(string(b), fmt.Sprintf("\nPPid:\t%d\n", parent)) {
			n, _ := strconv.Atoi(pid)
			return n
		}
	}
	t.Fatalf("process %d has no child", parent)
	return 0
}
