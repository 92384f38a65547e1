package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
	"hostcryptd/sector/sectortest"
	"hostcryptd/systemd"
)

// The keeper is tested with a server that serves nothing: it does all that a
// server does with its keeper, and prints what it has got. This kernel may have no
// nbd. The real one is tested in test/vm.

// fakeKeeperEnv has the test binary be a keeper, or its server: how the server is
// to behave.
const fakeKeeperEnv = "HOSTCRYPTD_TEST_KEEPER"

func fakeKeeper() int {
	a := &app{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	if name := filepath.Join(os.Getenv("FAKE_DIR"), "cgroup"); isFile(name) {
		cgroupFile = name
	}
	if d, err := time.ParseDuration(os.Getenv("FAKE_LEAVE_TIMEOUT")); err == nil {
		leaveTimeout = d
	}
	if _, ok := os.LookupEnv(serverEnv); ok {
		err := fakeServer()
		fmt.Println("server", os.Getpid(), "ends:", err)
		if err != nil {
			return 1
		}
		return 0
	}
	resumed, err := a.resume()
	if !resumed {
		if os.Getenv("LISTEN_FDS") != "" {
			os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid()))
		}
		_, files, err2 := systemd.Inherited(storedPrefix)
		if err2 != nil {
			fmt.Println("keeper:", err2)
			return 1
		}
		err = a.keep(os.Getenv(fakeKeeperEnv) == "standby", nil, stored(files))
	}
	if silent, ok := errors.AsType[*silentError](err); ok {
		return silent.code
	}
	if err != nil {
		fmt.Println("keeper:", err)
		return 1
	}
	return 0
}

func isFile(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

func fakeServer() error {
	behave := os.Getenv(fakeKeeperEnv)
	if b, err := os.ReadFile(filepath.Join(os.Getenv("FAKE_DIR"), "behave")); err == nil {
		behave = string(b)
	}
	crashOnPanic()
	if err := harden(); err != nil {
		return err
	}
	panicOnSignal()
	link, err := openKeeperLink()
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	signal.Ignore(unix.SIGHUP)
	if behave == "unprepared" {
		return errors.New("it can't")
	}
	state, err := link.standBy(ctx, func(bool) error {
		fmt.Println("stands by:", os.Getpid())
		return nil
	})
	if errors.Is(err, errNoTurn) {
		return nil
	}
	if err != nil {
		return err
	}
	if link.rollback != "" {
		fmt.Println("rollback:", link.rollback)
	}
	if behave == "dies" {
		os.Remove(filepath.Join(os.Getenv("FAKE_DIR"), "behave")) // the next one doesn't
		os.Exit(3)
	}
	if behave == "slow" || behave == "slowly" {
		time.Sleep(200 * time.Millisecond)
	}
	if behave == "slowly" {
		os.Exit(3)
	}
	if ctx.Err() != nil && state != nil {
		return errors.New("a signal came before it served")
	}
	count := 0
	if state != nil {
		count = state.Index
	}
	count++
	sockets, err := link.takeKernel()
	if err != nil {
		return err
	}
	fresh := len(sockets) == 0
	if fresh {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		c, err := packetConn(os.NewFile(uintptr(fds[0]), "kernel"))
		if err != nil {
			return err
		}
		sockets = []*net.UnixConn{c}
	}
	held := link.take("thing")
	if held == nil {
		if held, err = memoryFile("thing", []byte("kept")); err != nil {
			return err
		}
		if err := link.send(keeperMessage{Hold: "thing"}, held); err != nil {
			return err
		}
	}
	text, err := readMemoryFile(held)
	if err != nil {
		return err
	}
	b, err := json.Marshal(serverState{Version: serverStateVersion, Index: count})
	if err != nil {
		return err
	}
	if err := errors.Join(link.send(keeperMessage{State: b}, nil), link.send(keeperMessage{Ready: true}, nil), link.send(keeperMessage{Notify: []string{systemd.Ready}}, nil)); err != nil {
		return err
	}
	fmt.Println("serves", os.Getpid(), os.Getppid(), count, fresh, string(text))
	refusal := link.nextRefusal()
	go func() { <-refusal.came; fmt.Println("refused:", refusal.why) }()
	go link.listen(zap.NewNop())
	if behave == "lingers" && count == 1 {
		<-ctx.Done()
		fmt.Println("lingers")
		select {}
	}
	// pin can't be replaced until the file unpin is there.
	pin := func() {
		link.send(keeperMessage{Pin: "it is in the middle of something"}, nil)
		for !isFile(filepath.Join(os.Getenv("FAKE_DIR"), "unpin")) {
			select {
			case <-link.leaving():
				if behave == "pins" {
					os.Exit(5)
				}
			default:
			}
			time.Sleep(10 * time.Millisecond)
		}
		link.send(keeperMessage{Unpin: true}, nil)
	}
	if behave == "pins" && count == 1 {
		pin()
	}
	flushed := make(chan error, 1)
	flushed <- nil
	if behave == "flushes" && count == 1 {
		// A volume that waits for its disk.
		h, err := sector.NewHandover()
		if err != nil {
			return err
		}
		v, err := sector.OpenRandom(&untilUnpinned{sectortest.New(1 << 20)}, sector.RandomOptions{SectorSize: 4096, Handover: h})
		if err != nil {
			return err
		}
		if err := link.send(keeperMessage{Hold: heldKey}, h.File()); err != nil {
			return err
		}
		<-flushed
		go func() { flushed <- v.Sync() }()
		for !v.Flushing() {
			time.Sleep(time.Millisecond)
		}
		fmt.Println("flushes")
	}
	select {
	case <-link.leaving():
		if behave == "stays" {
			os.Exit(4)
		}
		if behave == "pins late" {
			pin()
		}
		if err := <-flushed; err != nil {
			return err
		}
		f, err := sockets[0].File()
		if err != nil {
			return err
		}
		return errors.Join(link.send(keeperMessage{Hold: heldKernel + "0"}, f), link.send(keeperMessage{Left: true}, nil))
	case <-ctx.Done():
		return link.send(keeperMessage{Over: true}, nil)
	}
}

// An untilUnpinned is a disk whose flushes end when there is the file unpin.
type untilUnpinned struct{ *sectortest.Disk }

func (d *untilUnpinned) Sync() error {
	for !isFile(filepath.Join(os.Getenv("FAKE_DIR"), "unpin")) {
		time.Sleep(10 * time.Millisecond)
	}
	return d.Disk.Sync()
}

// A keeperRun is a running keeper.
type keeperRun struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string
	lines chan string
	log   strings.Builder
}

// startKeeper starts a keeper, from a copy of the test binary, which its reload
// finds again.
func startKeeper(t *testing.T, behave string, more ...func(*exec.Cmd)) *keeperRun {
	t.Helper()
	k := &keeperRun{t: t, dir: t.TempDir(), lines: make(chan string, 1000)}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(k.dir, "program")
	if err := os.Link(self, program); err != nil {
		b, err := os.ReadFile(self)
		if err := errors.Join(err, os.WriteFile(program, b, 0o755)); err != nil {
			t.Fatal(err)
		}
	}
	k.cmd = exec.Command(program)
	k.cmd.Env = append(os.Environ(), fakeKeeperEnv+"="+behave, "FAKE_DIR="+k.dir)
	for _, f := range more {
		f(k.cmd)
	}
	k.start()
	return k
}

// start starts cmd in a process group of its own.
func (k *keeperRun) start() {
	t := k.t
	t.Helper()
	k.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := k.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	k.cmd.Stderr = k.cmd.Stdout
	if err := k.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(k.lines)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			k.lines <- scan.Text()
		}
	}()
	t.Cleanup(func() {
		unix.Kill(-k.cmd.Process.Pid, unix.SIGKILL) // its servers too
		for line := range k.lines {
			fmt.Fprintln(&k.log, line)
		}
		if t.Failed() {
			t.Logf("it printed:\n%s", k.log.String())
		}
	})
}

// line waits for a line with a text, or an end of both.
func (k *keeperRun) line(text string) string {
	k.t.Helper()
	for timeout := time.After(time.Minute); ; {
		select {
		case line, ok := <-k.lines:
			if !ok {
				k.t.Fatalf("the keeper has ended before it printed %q", text)
			}
			fmt.Fprintln(&k.log, line)
			if strings.Contains(line, text) {
				return line
			}
		case <-timeout:
			k.t.Fatalf("no line with %q", text)
		}
	}
}

// serves waits for a server, and checks what it has got.
func (k *keeperRun) serves(count int, fresh bool) (pid int) {
	k.t.Helper()
	line := k.line("serves ")
	f := strings.Fields(line)
	pid, _ = strconv.Atoi(f[1])
	if want := fmt.Sprintf("serves %d %d %d %v kept", pid, k.cmd.Process.Pid, count, fresh); line != want {
		k.t.Fatalf("%q, want %q", line, want)
	}
	return pid
}

func (k *keeperRun) kill(pid int, s unix.Signal) {
	k.t.Helper()
	if err := unix.Kill(pid, s); err != nil {
		k.t.Fatal(err)
	}
}

func (k *keeperRun) end() {
	k.t.Helper()
	k.kill(k.cmd.Process.Pid, unix.SIGTERM)
	k.ended()
}

// ended waits for the end of the keeper, and its servers.
func (k *keeperRun) ended() {
	k.t.Helper()
	for timeout := time.After(time.Minute); ; {
		select {
		case line, ok := <-k.lines:
			if !ok {
				if err := k.cmd.Wait(); err != nil {
					k.t.Fatal(err)
				}
				return
			}
			fmt.Fprintln(&k.log, line)
		case <-timeout:
			k.t.Fatal("the keeper does not end")
		}
	}
}

// TestKeeper kills and reloads, with and without a server that stands by.
func TestKeeper(t *testing.T) {
	for _, behave := range []string{"plain", "standby"} {
		t.Run(behave, func(t *testing.T) {
			t.Parallel()
			k := startKeeper(t, behave)
			pid, n := k.serves(1, true), 1
			for range 20 {
				k.kill(k.cmd.Process.Pid, unix.SIGHUP)
				n++
				pid = k.serves(n, false)
				k.line("the keeper goes on with this version")
			}
			for range 3 {
				k.kill(pid, unix.SIGKILL)
				n++
				pid = k.serves(n, true)
			}
			k.kill(k.cmd.Process.Pid, unix.SIGHUP)
			k.serves(n+1, false)
			k.line("the keeper goes on with this version")
			k.end()
		})
	}
}

// TestKeeperStored: what a service manager has kept for a keeper is dropped there.
// As long as it has the socket, the kernel doesn't see its server die.
func TestKeeperStored(t *testing.T) {
	t.Parallel()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	state, err := memoryFile("state", []byte(`{"version":1,"index":5}`))
	if err != nil {
		t.Fatal(err)
	}
	thing, err := memoryFile("thing", []byte("kept"))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	kernel, socket := os.NewFile(uintptr(pair[0]), "kernel"), os.NewFile(uintptr(pair[1]), "socket")
	defer kernel.Close()
	files := map[string]*os.File{"state": state, "thing": thing, "kernel0": socket}
	k := startKeeper(t, "plain", func(c *exec.Cmd) {
		var names []string
		for name, f := range files {
			names, c.ExtraFiles = append(names, storedPrefix+name), append(c.ExtraFiles, f)
		}
		c.Env = append(c.Env, "NOTIFY_SOCKET="+manager.LocalAddr().String(),
			"LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	})
	pid := k.serves(6, false)
	for manager.SetReadDeadline(time.Now().Add(20 * time.Second)); len(files) > 0; {
		b := make([]byte, 200)
		n, err := manager.Read(b)
		if err != nil {
			t.Fatalf("%v is still with the service manager: %v", files, err)
		}
		if name, ok := strings.CutPrefix(string(b[:n]), "FDSTOREREMOVE=1\nFDNAME="+storedPrefix); ok {
			files[name].Close()
			delete(files, name)
		}
	}
	k.kill(pid, unix.SIGKILL)
	if n, err := kernel.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the kernel's end reads %d bytes, %v after the death of the server", n, err)
	}
	k.serves(7, true)
	k.end()
}

// TestKeeperPinned: a server that can't be replaced is not told to leave, and one that
// was told just before is not killed for taking its time, nor is one whose disk takes it
// for a flush.
func TestKeeperPinned(t *testing.T) {
	for behave, waits := range map[string]string{"pins": "the reload waits", "pins late": "the server can't leave yet", "flushes": "it waits for a flush of the disk"} {
		t.Run(behave, func(t *testing.T) {
			t.Parallel()
			k := startKeeper(t, behave, func(c *exec.Cmd) { c.Env = append(c.Env, "FAKE_LEAVE_TIMEOUT=3s") })
			k.serves(1, true)
			if behave == "pins" {
				k.line("the server can't be replaced now")
			}
			if behave == "flushes" {
				k.line("flushes")
			}
			k.kill(k.cmd.Process.Pid, unix.SIGHUP)
			k.line(waits)
			if err := os.WriteFile(filepath.Join(k.dir, "unpin"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			k.serves(2, false)
			k.line("the keeper goes on with this version")
			k.end()
		})
	}
}

// TestProgramInterpreter tells a program that needs others to start from one that
// doesn't, which what is installed has to be.
func TestProgramInterpreter(t *testing.T) {
	static := filepath.Join(t.TempDir(), "hostcryptd")
	build := exec.Command("go", "build", "-o", static, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for name, needs := range map[string]bool{static: false, "/bin/sh": true} {
		p, err := copyProgram(name)
		if err != nil {
			t.Fatal(err)
		}
		defer p.close()
		if got := p.interpreter(); strings.HasPrefix(got, "/") != needs {
			t.Errorf("%s: interpreter %q; want one: %v", name, got, needs)
		}
	}
}

// TestKeeperReloadWhileDead asks a keeper whose server has died for the program that is
// installed, which can't be read before there is a server again.
func TestKeeperReloadWhileDead(t *testing.T) {
	t.Parallel()
	k := startKeeper(t, "plain")
	pid := k.serves(1, true)
	behave, program := filepath.Join(k.dir, "behave"), filepath.Join(k.dir, "program")
	if err := errors.Join(os.WriteFile(behave, []byte("unprepared"), 0o600), os.Remove(program), unix.Mkfifo(program, 0o700)); err != nil {
		t.Fatal(err)
	}
	k.kill(pid, unix.SIGKILL)
	k.line("a server died before it served")
	k.kill(k.cmd.Process.Pid, unix.SIGHUP)
	if err := os.Remove(behave); err != nil {
		t.Fatal(err)
	}
	pid = k.serves(2, true)
	k.kill(pid, unix.SIGKILL)
	k.serves(3, true)
	k.end()
}

// TestKeeperPanic: a server that panics is replaced as one that is killed.
func TestKeeperPanic(t *testing.T) {
	t.Parallel()
	k := startKeeper(t, "plain", func(c *exec.Cmd) { c.Env = append(c.Env, panicEnv+"=1") })
	k.kill(k.serves(1, true), unix.SIGUSR2)
	k.line("signal 6 (aborted)")
	k.serves(2, true)
	k.end()
}

// TestKeeperStops: a server that is killed while it stops leaves the stopping to
// the next one, and nothing is reloaded meanwhile.
func TestKeeperStops(t *testing.T) {
	t.Parallel()
	k := startKeeper(t, "lingers")
	pid := k.serves(1, true)
	k.kill(k.cmd.Process.Pid, unix.SIGTERM)
	k.line("lingers")
	k.kill(k.cmd.Process.Pid, unix.SIGHUP)
	k.line("it is stopping")
	k.kill(pid, unix.SIGKILL)
	k.serves(2, true)
	k.ended()
}

// TestKeeperStopsLate: a server that is to go on where another was killed is told to
// stop when it serves, and not on its way there.
func TestKeeperStopsLate(t *testing.T) {
	t.Parallel()
	k := startKeeper(t, "slow")
	pid := k.serves(1, true)
	k.kill(pid, unix.SIGKILL)
	k.line("the server has died")
	k.line("stands by:")
	k.kill(k.cmd.Process.Pid, unix.SIGTERM)
	k.serves(2, true)
	k.ended()
}

// A fakeManager is what a keeper sees of the service manager.
type fakeManager struct {
	t    *testing.T
	k    *keeperRun
	conn *net.UnixConn
	said chan string // what it was notified of
}

// startManaged starts a keeper that believes to be a service.
func startManaged(t *testing.T, behave string) *fakeManager {
	t.Helper()
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &fakeManager{t: t, conn: conn, said: make(chan string, 1000)}
	go func() {
		defer close(m.said)
		for b, oob := make([]byte, 1000), make([]byte, unix.CmsgSpace(4)); ; {
			n, oobn, _, _, err := conn.ReadMsgUnix(b, oob)
			if err != nil {
				return
			}
			list, _ := unix.ParseSocketControlMessage(oob[:oobn])
			for _, c := range list {
				fds, _ := unix.ParseUnixRights(&c)
				for _, fd := range fds {
					unix.Close(fd) // which is the answer to a barrier
				}
			}
			m.said <- string(b[:n])
		}
	}()
	m.k = startKeeper(t, behave, func(c *exec.Cmd) {
		dir := filepath.Dir(c.Path)
		script := "#!/bin/sh\ncase \"$*\" in\nlist-jobs*) cat jobs;;\n*ActiveState*) cat state;;\n*FileDescriptorStoreMax*) echo 32;;\nesac\n"
		if err := errors.Join(
			os.WriteFile(filepath.Join(dir, "cgroup"), []byte("0::/system.slice/fake.service\n"), 0o600),
			os.WriteFile(filepath.Join(dir, "state"), []byte("active\n"), 0o600),
			os.WriteFile(filepath.Join(dir, "jobs"), nil, 0o600),
			os.WriteFile(filepath.Join(dir, "systemctl"), []byte(script), 0o700)); err != nil {
			t.Fatal(err)
		}
		c.Dir = dir
		c.Env = append(c.Env, "NOTIFY_SOCKET="+conn.LocalAddr().String(), "PATH="+dir+":"+os.Getenv("PATH"))
	})
	return m
}

// ready waits until the keeper knows that its server serves.
func (m *fakeManager) ready() {
	m.t.Helper()
	for timeout := time.After(time.Minute); ; {
		select {
		case s := <-m.said:
			if s == systemd.Ready {
				return
			}
		case <-timeout:
			m.t.Fatal("the service manager was not told that it is ready")
		}
	}
}

// job begins to stop the service, or to restart it.
func (m *fakeManager) job(kind string) {
	m.t.Helper()
	for name, text := range map[string]string{"jobs": "7 fake.service " + kind + " running\n", "state": "deactivating\n"} {
		name = filepath.Join(m.k.dir, name)
		if err := errors.Join(os.WriteFile(name+".new", []byte(text), 0o600), os.Rename(name+".new", name)); err != nil {
			m.t.Fatal(err)
		}
	}
	m.k.kill(m.k.cmd.Process.Pid, unix.SIGINT) // see keeper.exec
}

// TestKeeperStopDuringExec tells a keeper to stop at about the time when it executes
// another program.
func TestKeeperStopDuringExec(t *testing.T) {
	t.Parallel()
	for i := range 20 {
		m := startManaged(t, "plain")
		m.k.serves(1, true)
		m.k.kill(m.k.cmd.Process.Pid, unix.SIGHUP)
		m.k.serves(2, false) // it has said so just before
		time.Sleep(time.Duration(i) * 200 * time.Microsecond)
		m.job("stop")
		m.k.ended()
	}
}

// TestKeeperRestarts: what the next process needs is with the service manager at the
// end, also if a restart was asked for while a reload was under way.
func TestKeeperRestarts(t *testing.T) {
	for _, reload := range []bool{false, true} {
		t.Run(fmt.Sprintf("reload=%v", reload), func(t *testing.T) {
			t.Parallel()
			m := startManaged(t, "plain")
			m.k.serves(1, true)
			m.ready()
			if reload {
				if err := os.WriteFile(filepath.Join(m.k.dir, "behave"), []byte("slow"), 0o600); err != nil {
					t.Fatal(err)
				}
				m.k.kill(m.k.cmd.Process.Pid, unix.SIGHUP)
				m.k.line("stands by:")
			}
			m.job("restart")
			if reload {
				m.k.serves(2, false)
				// Whether the keeper becomes another program first depends on when it hears
				// that this is a restart.
			}
			m.k.line("the service manager keeps what the next server needs")
			m.k.ended()
			m.conn.Close()
			kept := map[string]bool{}
			for s := range m.said {
				if name, ok := strings.CutPrefix(s, "FDSTORE=1\nFDPOLL=0\nFDNAME="+storedPrefix); ok {
					kept[name] = true
				}
			}
			if !kept[storedState] || !kept["thing"] || !kept[heldKernel+"0"] || len(kept) != 3 {
				t.Errorf("the service manager keeps %v", kept)
			}
		})
	}
}

// TestKeeperRestartsAnyway: a restart that was put off until the next server serves
// is done also if none ever does.
func TestKeeperRestartsAnyway(t *testing.T) {
	t.Parallel()
	m := startManaged(t, "plain")
	pid := m.k.serves(1, true)
	m.ready()
	if err := os.WriteFile(filepath.Join(m.k.dir, "behave"), []byte("slowly"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.k.kill(pid, unix.SIGKILL)
	m.k.line("stands by:")
	m.job("restart")
	m.k.line("the service manager keeps what the next server needs")
	m.k.ended()
}

// TestKeeperNotStored: a restart is a stop if the service manager doesn't take what
// the next process needs.
func TestKeeperNotStored(t *testing.T) {
	for _, dead := range []bool{false, true} {
		t.Run(fmt.Sprintf("dead=%v", dead), func(t *testing.T) {
			t.Parallel()
			m := startManaged(t, "plain")
			pid := m.k.serves(1, true)
			m.ready()
			m.conn.Close()
			behave := filepath.Join(m.k.dir, "behave")
			if dead { // the server, and there is no other one that would have to leave
				if err := os.WriteFile(behave, []byte("unprepared"), 0o600); err != nil {
					t.Fatal(err)
				}
				m.k.kill(pid, unix.SIGKILL)
				m.k.line("a server died before it served")
			}
			m.job("restart")
			m.k.line("the service manager can't keep")
			if dead {
				if err := os.Remove(behave); err != nil {
					t.Fatal(err)
				}
			}
			m.k.serves(2, dead)
			m.k.ended()
		})
	}
}

// TestKeeperBothDie: the server that stands by dies, and before there is another,
// so does the one that serves.
func TestKeeperBothDie(t *testing.T) {
	t.Parallel()
	k := startKeeper(t, "standby")
	pid := k.serves(1, true)
	standby, err := strconv.Atoi(strings.Fields(k.line("stands by:"))[2])
	if err != nil {
		t.Fatal(err)
	}
	k.kill(standby, unix.SIGKILL)
	k.line("the server that stood by has died")
	k.kill(pid, unix.SIGKILL)
	k.serves(2, true)
	k.end()
}

// TestKeeperRollback has a new program fail at each point. Who has asked for the reload
// ends when it hears of that, and the service manager takes it for done all the same if
// it isn't told before that the reload is over (systemd, service_enter_running).
func TestKeeperRollback(t *testing.T) {
	for behave, what := range map[string]struct {
		says   string
		serves bool // another server, without sockets, goes on
	}{
		"unprepared": {"the new program did not come up: exit code 1", false},
		"dies":       {"the server died: exit code 3", true},
	} {
		t.Run(behave, func(t *testing.T) {
			t.Parallel()
			manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "notify"), Net: "unixgram"})
			if err != nil {
				t.Fatal(err)
			}
			defer manager.Close()
			k := startKeeper(t, "plain", func(c *exec.Cmd) { c.Env = append(c.Env, "NOTIFY_SOCKET="+manager.LocalAddr().String()) })
			k.serves(1, true)
			if err := os.WriteFile(filepath.Join(k.dir, "behave"), []byte(behave), 0o600); err != nil {
				t.Fatal(err)
			}
			k.kill(k.cmd.Process.Pid, unix.SIGHUP)
			if what.serves {
				k.line("rollback: " + what.says)
			} else {
				k.line("refused: " + what.says)
			}
			raw, err := manager.SyscallConn()
			if err != nil {
				t.Fatal(err)
			}
			told, buf := "", make([]byte, 4096)
			raw.Control(func(fd uintptr) { // what is not there yet doesn't count
				for {
					n, _, err := unix.Recvfrom(int(fd), buf, unix.MSG_DONTWAIT)
					if err != nil {
						return
					}
					told += string(buf[:n]) + "\n"
				}
			})
			if _, after, ok := strings.Cut(told, systemd.Reloading); !ok || !strings.Contains(after, systemd.Ready) {
				t.Errorf("when it was said that the reload has failed, the service manager had been told:\n%s", told)
			}
			if what.serves {
				k.serves(2, true)
			}
			k.end()
		})
	}
	// It dies while the server before it, which was told to leave, waits for its disk.
	t.Run("killed early", func(t *testing.T) {
		t.Parallel()
		k := startKeeper(t, "flushes")
		k.serves(1, true)
		k.line("flushes")
		k.kill(k.cmd.Process.Pid, unix.SIGHUP)
		standby, err := strconv.Atoi(strings.Fields(k.line("stands by:"))[2])
		if err != nil {
			t.Fatal(err)
		}
		k.line("the server leaves the volume to another")
		k.kill(standby, unix.SIGKILL)
		k.line("a server died before it served")
		if err := os.WriteFile(filepath.Join(k.dir, "unpin"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		k.line("rollback: the new program died before it served: ")
		k.serves(2, false)
		k.end()
	})
	t.Run("no program", func(t *testing.T) {
		t.Parallel()
		k := startKeeper(t, "plain")
		k.serves(1, true)
		program := filepath.Join(k.dir, "program")
		if err := errors.Join(os.Remove(program), os.WriteFile(program, []byte("no program"), 0o755)); err != nil {
			t.Fatal(err)
		}
		k.kill(k.cmd.Process.Pid, unix.SIGHUP)
		k.line("the volume stays with the server that it has")
		k.end()
	})
}

// TestStateTrusted: the keys of --signer go on with the state, and where they are
// missing none is believed, instead of any.
func TestStateTrusted(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	var left serverState
	left.Version = serverStateVersion
	left.trust("a.pem", []sector.TrustedKey{&key.PublicKey})
	b, err := json.Marshal(left)
	if err != nil {
		t.Fatal(err)
	}
	got, err := parseState(b)
	if err != nil {
		t.Fatal(err)
	}
	if keys := got.trusted("a.pem"); len(keys) != 1 || !keys[0].Equal(&key.PublicKey) {
		t.Errorf("trusted(a.pem) = %v", keys)
	}
	if keys := got.trusted("b.pem"); keys == nil || len(keys) != 0 {
		t.Errorf("trusted(b.pem) = %v, want none, and not nil", keys)
	}
	if keys := got.trusted(""); keys != nil {
		t.Errorf("trusted() = %v, want nil", keys)
	}
	got.trust("a.pem", make([]sector.TrustedKey, maxTrusted+1))
	if keys := got.trusted("a.pem"); keys == nil || len(keys) != 0 {
		t.Errorf("trusted(a.pem) = %v of too many, want none, and not nil", keys)
	}
}

func TestStateVersion(t *testing.T) {
	if s, err := parseState([]byte(`{"version":1,"index":3}`)); err != nil || s.Index != 3 {
		t.Errorf("parseState() = %+v, %v", s, err)
	}
	if _, err := parseState([]byte(`{"version":2}`)); err == nil {
		t.Error("a state of a version that isn't known was accepted")
	}
	if s, err := parseState(nil); s != nil || err != nil {
		t.Errorf("parseState(nil) = %v, %v", s, err)
	}
}

// TestFailsBeforeServing: a server that was to go on with a volume and fails before
// it serves leaves the key to the next try, and doesn't say that the service stops.
func TestFailsBeforeServing(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := packetConn(os.NewFile(uintptr(pair[0]), "server"))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := packetConn(os.NewFile(uintptr(pair[1]), "keeper"))
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	server := func() *daemon {
		o := serveOptions{device: image, attach: "auto", randomKey: true, sectorSize: 4096, connections: 1, control: filepath.Join(dir, "control")}
		o.keys.auditLog = "none"
		o.life.add(&cobra.Command{}) // what is the default
		return &daemon{opts: o, log: zap.NewNop(), index: nbdnl.FirstFree, finished: make(chan struct{}), resizing: make(chan struct{}, 1), detach: make(chan *os.File, 1),
			link: &keeperLink{conn: theirs, held: map[string]*os.File{}}}
	}
	first := server()
	if first.device, err = first.openDevice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(first.openHandover(), first.openRandom()); err != nil {
		t.Fatal(err)
	}
	// The kernel here has no nbd, or no such device.
	state := serverState{Version: serverStateVersion, Volume: first.volume.State(), Life: lifecycle.Snapshot{State: lifecycle.Unlocked}, Index: 1 << 19, Connections: 1}
	if err := errors.Join(first.volume.Leave(), first.device.Close()); err != nil {
		t.Fatal(err)
	}
	next := server()
	next.goesOn = true
	for range 2 { // device and key
		var m keeperMessage
		f, err := receivePacket(ours, &m)
		if err != nil || f == nil {
			t.Fatalf("received %+v, %v", m, err)
		}
		next.link.held[m.Hold] = f
	}
	fd, err := unix.FcntlInt(next.link.held[heldKey].Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := next.run(t.Context(), &state); err == nil || !strings.Contains(err.Error(), "--attach") {
		t.Fatalf("run() = %v, want that it can't attach", err)
	}
	h, err := sector.OpenHandover(os.NewFile(uintptr(fd), "key"))
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if !h.HasKey() {
		t.Error("the key is gone")
	}
	theirs.Close()
	for {
		var m keeperMessage
		f, err := receivePacket(ours, &m)
		if err != nil {
			break
		}
		if f != nil {
			f.Close()
		}
		if slices.Contains(m.Notify, systemd.Stopping) || m.Over {
			t.Errorf("it said %+v", m)
		}
	}
}

// TestKeyLost: without the key of the server before, requests wait instead of failing.
func TestKeyLost(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[1])
	conn, err := packetConn(os.NewFile(uintptr(pair[0]), "server"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	d := &daemon{opts: serveOptions{device: image}, log: zap.NewNop(), link: &keeperLink{conn: conn}, goesOn: true}
	if d.device, err = sector.OpenDevice(image, sector.DeviceOptions{}); err != nil {
		t.Fatal(err)
	}
	defer d.device.Close()
	if err := errors.Join(d.openHandover(), d.goOn(&serverState{Volume: sector.State{Size: 1 << 20, Sector: 4096}, Life: lifecycle.Snapshot{State: lifecycle.Unlocked, Policy: lifecycle.Stop}})); err != nil {
		t.Fatal(err)
	}
	read := make(chan error, 1)
	go func() {
		_, err := d.volume.ReadAt(make([]byte, 4096), 0)
		read <- err
	}()
	select {
	case err := <-read:
		t.Errorf("a read ended with %v", err)
	case <-time.After(200 * time.Millisecond):
	}
	if err := d.volume.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-read; !errors.Is(err, sector.ErrClosed) {
		t.Errorf("the read ended with %v after the volume was closed", err)
	}
}

func TestStoreSize(t *testing.T) {
	k := &keeper{held: map[string]*os.File{heldDevice: nil, heldKey: nil, heldInherited + "0": nil}, state: json.RawMessage(`{"version":1,"connections":4}`)}
	if n := k.storeSize(); n != 7 {
		t.Errorf("%d descriptors, want the state, device, key, and 4 sockets", n)
	}
}

// TestReloadFailed: who asked for a reload whose server died before its turn is told so
// by the next one.
func TestReloadFailed(t *testing.T) {
	dead := exec.Command("false")
	if err := dead.Run(); err == nil {
		t.Fatal("no error")
	}
	k := &keeper{log: zap.NewNop(), state: json.RawMessage("{}"), next: &program{}, alarm: time.NewTimer(time.Hour)}
	k.standbyEnded(dead.ProcessState)
	if k.next != nil || !strings.HasSuffix(k.failed, "exit code 1") || k.wake == nil {
		t.Errorf("the reload has failed with %q, and goes on: %v; another server is started: %v", k.failed, k.next != nil, k.wake != nil)
	}
}

// TestKeeperHearsTheDead: what a server has said counts also if it died before the keeper
// heard it, and before it read what the keeper had said to it.
func TestKeeperHearsTheDead(t *testing.T) {
	server, link := unixPair(t, unix.SOCK_SEQPACKET)
	k := &keeper{log: zap.NewNop(), events: make(chan keeperEvent)}
	c := &child{link: link, done: make(chan struct{})}
	if !k.order(c, keeperOrder{Refused: "unread"}, nil) {
		t.Fatal("the server was not told")
	}
	if err := errors.Join(sendPacket(server, keeperMessage{State: json.RawMessage("{}")}, nil), sendPacket(server, keeperMessage{Ready: true}, nil)); err != nil {
		t.Fatal(err)
	}
	server.Close()
	go k.listen(c)
	if e := <-k.events; e.end || e.m.State == nil {
		t.Errorf("first comes %+v, want the state", e)
	} else if e := <-k.events; e.end || !e.m.Ready {
		t.Errorf("second comes %+v, want that it serves", e)
	} else if e := <-k.events; !e.end {
		t.Errorf("third comes %+v, want the end", e)
	}
}
