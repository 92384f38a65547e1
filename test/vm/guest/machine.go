package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/report"
)

// A machine is where a scenario runs: its disks, and the steps that
// scenarios are made of. The steps report what they do. It is used by one
// goroutine.
type machine struct {
	*report.Writer
	params  map[string]string // of the kernel command line
	canary  string            // a string that must not reach the backing device
	disk    string            // the backing device
	payload string            // a tar archive, or the disk that holds one
	state   string            // a folder that outlives the boot
	mnt     string            // where the file system is mounted
	tools   string            // the disk with tools that the initramfs has no room for
	shared  bool              // this is a host, whose files must stay as they are
	// The scenario breaks its disk, so the kernel is expected to complain.
	brokenDisk bool
	// The scenario kills servers, so the kernel is expected to say that it lost a
	// connection. Everything else counts.
	reconnects bool

	vault    *exec.Cmd
	tell     io.WriteCloser // its standard input: commands; its end ends it
	replaced bool           // the machine's own files lead to the double
}

// number is a parameter of the scenario.
func (m *machine) number(param string) (int, error) {
	n, err := strconv.Atoi(m.params[param])
	if err != nil {
		return 0, fmt.Errorf("parameter %s: %w", param, err)
	}
	return n, nil
}

func (m *machine) step(n int, title string) {
	m.Emit(report.Event{Kind: report.Step, Number: n, Text: title})
}

func (m *machine) say(format string, args ...any) {
	m.Emit(report.Event{Kind: report.Say, Text: fmt.Sprintf(format, args...)})
}

func (m *machine) figure(name string, value float64, unit string) {
	m.Emit(report.Event{Kind: report.Figure, Name: name, Value: value, Text: unit})
}

// typed reports a command the way a person would type it.
func (m *machine) typed(args ...string) {
	m.Emit(report.Event{Kind: report.Command, Text: strings.Join(args, " ")})
}

func (m *machine) output(text string) {
	for line := range strings.Lines(text) {
		m.Emit(report.Event{Kind: report.Output, Text: strings.TrimRight(line, " \r\n")})
	}
}

func (m *machine) exited(code int, since time.Time) {
	m.Emit(report.Event{Kind: report.Exit, Code: code, Seconds: time.Since(since).Seconds()})
}

// command is exec.Command for a program that dies with this one.
func command(name string, args ...string) *exec.Cmd {
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd
}

// commandLimit is how long one command may take, on an emulated and busy
// machine.
const commandLimit = 90 * time.Second

// try runs a program, reports it, and returns its exit code and what it
// printed.
func (m *machine) try(name string, args ...string) (code int, out string, err error) {
	m.typed(append([]string{name}, args...)...)
	begun := time.Now()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	b, err := cmd.CombinedOutput()
	out = string(b)
	m.output(out)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.Exited() {
		err = nil
		code = exit.ExitCode()
	}
	if err != nil {
		return -1, out, fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), errors.Join(err, ctx.Err()))
	}
	m.exited(code, begun)
	return code, out, nil
}

// run is try for a program that must succeed.
func (m *machine) run(name string, args ...string) (out string, err error) {
	code, out, err := m.try(name, args...)
	if err == nil && code != 0 {
		err = fmt.Errorf("%s %s: exit code %d: %s", name, strings.Join(args, " "), code, strings.TrimSpace(out))
	}
	return out, err
}

// replaceTable gives a device of the device mapper another table, under whoever
// uses it.
func (m *machine) replaceTable(name, table string, suspend ...string) error {
	for _, args := range [][]string{append([]string{"suspend", name}, suspend...), {"load", name, "--table", table}, {"resume", name}} {
		if _, err := m.run("dmsetup", args...); err != nil {
			return err
		}
	}
	return nil
}

// A server is a hostcryptd serve that runs, or has run.
type server struct {
	m     *machine
	dev   string // the kernel device that it is to serve, "/dev/nbd0"
	cmd   *exec.Cmd
	begun time.Time

	notify *net.UnixConn // where its notifications arrive
	ready  chan struct{} // closed by READY=1
	logged chan struct{} // closed by the first line that it printed

	ended    chan struct{} // closed after the fields below are set
	code     int
	err      error
	log      lockedBuffer
	stopping bool                // it has said STOPPING=1
	stored   map[string]*os.File // what it has given to the service manager to keep
}

// A lockedBuffer is a buffer that is read while it is written to.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// waitLog waits until the server or its keeper has logged a text, or until something has
// ended that makes it needless.
func (s *server) waitLog(text string, needless <-chan error) error {
	for end := time.Now().Add(commandLimit); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if strings.Contains(s.log.String(), text) || len(needless) > 0 {
			return nil
		}
	}
	return fmt.Errorf("in %v, hostcryptd hasn't logged: %s", commandLimit, text)
}

// listenNotify makes the socket that a service manager would listen on.
func listenNotify() (*net.UnixConn, error) {
	name := filepath.Join(os.TempDir(), "notify-"+strconv.Itoa(os.Getpid()))
	os.Remove(name)
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return nil, fmt.Errorf("listening for notifications: %w", err)
	}
	return conn, nil
}

// readNotify reads notifications until the socket's deadline.
func (s *server) readNotify() {
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := s.notify.ReadMsgUnix(buf, oob)
		if err != nil {
			return
		}
		if f := passedFile(oob[:oobn]); f != nil {
			if name, ok := strings.CutPrefix(string(buf[:n]), "FDSTORE=1\nFDPOLL=0\nFDNAME="); ok {
				if s.stored == nil {
					s.stored = map[string]*os.File{}
				}
				s.stored[name] = f
			} else {
				f.Close() // a barrier: it is answered thereby
			}
		}
		for line := range strings.Lines(string(buf[:n])) {
			switch strings.TrimSpace(line) {
			case "READY=1":
				select {
				case <-s.ready:
				default:
					close(s.ready)
				}
			case "STOPPING=1":
				s.stopping = true
			}
		}
	}
}

// passedFile returns the descriptor that came with a message, or nil.
func passedFile(oob []byte) *os.File {
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(list) == 0 {
		return nil
	}
	for _, m := range list {
		if fds, err := unix.ParseUnixRights(&m); err == nil && len(fds) > 0 {
			unix.CloseOnExec(fds[0])
			return os.NewFile(uintptr(fds[0]), "passed")
		}
	}
	return nil
}

// serve starts hostcryptd on the backing device, attached to the first free
// kernel device, and waits until it serves.
func (m *machine) serve(args ...string) (*server, error) {
	s, err := m.launch(args...)
	if err != nil {
		return nil, err
	}
	if err := s.waitReady(); err != nil {
		return nil, err
	}
	return s, s.attached()
}

// serveRefused is serve where the volume must not open. The server that it
// returns has ended.
func (m *machine) serveRefused(args ...string) (*server, error) {
	s, err := m.launch(args...)
	if err != nil {
		return nil, err
	}
	if err = s.waitReady(); err == nil {
		return nil, errors.Join(errors.New("the volume opened"), s.kill())
	}
	if !errors.Is(err, errEnded) {
		return nil, err
	}
	return s, nil
}

// launch is serve without the waiting.
func (m *machine) launch(args ...string) (*server, error) {
	dev, err := freeDevice()
	if err != nil {
		return nil, err
	}
	words := append([]string{"serve", m.disk, "--attach", dev}, args...)
	m.typed(append([]string{"hostcryptd"}, append(words, "&")...)...)
	return m.start(command("hostcryptd", words...), dev)
}

// start starts a process that is to serve a kernel device, and three goroutines
// that end with it.
func (m *machine) start(cmd *exec.Cmd, dev string) (*server, error) {
	s := &server{m: m, dev: dev, cmd: cmd, begun: time.Now(), ready: make(chan struct{}), logged: make(chan struct{}), ended: make(chan struct{})}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if s.notify, err = listenNotify(); err != nil {
		return nil, errors.Join(err, r.Close(), w.Close())
	}
	cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+s.notify.LocalAddr().String())
	cmd.Stdout, cmd.Stderr = w, w
	err = cmd.Start()
	w.Close()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting hostcryptd: %w", err), r.Close(), s.notify.Close())
	}
	var lines sync.WaitGroup
	lines.Go(func() {
		defer r.Close()
		first := sync.OnceFunc(func() { close(s.logged) })
		for scan := bufio.NewScanner(r); scan.Scan(); {
			fmt.Fprintln(&s.log, scan.Text())
			s.m.output(scan.Text())
			first()
		}
	})
	lines.Go(s.readNotify)
	go func() {
		err := s.cmd.Wait()
		// What it sent before its end is in the socket: read until nothing
		// comes for a moment.
		s.notify.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
		lines.Wait()
		s.notify.Close()
		s.code = s.cmd.ProcessState.ExitCode()
		if _, ok := errors.AsType[*exec.ExitError](err); !ok {
			s.err = err
		}
		close(s.ended)
	}()
	return s, nil
}

func (s *server) running() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// errEnded is in the chain of waitReady's error about a server that has ended.
var errEnded = errors.New("hostcryptd serve ended before it was ready")

// waitReady waits for the readiness notification.
func (s *server) waitReady() error {
	select {
	case <-s.ready:
		return nil
	case <-s.ended:
		s.m.exited(s.code, s.begun)
		return errors.Join(fmt.Errorf("%w, with exit code %d: %s", errEnded, s.code, strings.TrimSpace(s.log.String())), s.err)
	case <-time.After(commandLimit):
		return errors.Join(fmt.Errorf("hostcryptd wasn't ready after %s", commandLimit), s.kill())
	}
}

// attached checks the device of a server that is ready.
func (s *server) attached() error {
	if size, err := deviceSize(s.dev); err != nil || size == 0 {
		return errors.Join(fmt.Errorf("hostcryptd said that it is ready, but %s has %d bytes", s.dev, size), err, s.kill())
	}
	s.m.figure("serve until ready", time.Since(s.begun).Seconds(), "s")
	// Let what it prints about being ready come before the next step.
	select {
	case <-s.logged:
	case <-time.After(500 * time.Millisecond):
	}
	return nil
}

// waitEnd waits for an end in order, which has to come within 30 s after
// something.
func (s *server) waitEnd(after string) error {
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		return errors.Join(fmt.Errorf("hostcryptd serve still runs 30 s after %s", after), s.kill())
	}
	if s.err != nil || s.code != 0 {
		return errors.Join(fmt.Errorf("hostcryptd serve ended with exit code %d after %s", s.code, after), s.err)
	}
	return nil
}

// detach stops the server the way an administrator does, and checks that it
// ended cleanly and that the kernel device is free again.
func (s *server) detach() error {
	if _, err := s.m.run("hostcryptd", "detach", s.m.disk); err != nil {
		return errors.Join(err, s.kill())
	}
	if err := s.waitEnd("hostcryptd detach"); err != nil {
		return err
	}
	if !s.stopping {
		return errors.New("hostcryptd serve didn't tell its service manager that it was stopping")
	}
	size, err := deviceSize(s.dev)
	if err != nil {
		return err
	}
	if size != 0 {
		return fmt.Errorf("%s still has %d bytes after hostcryptd detach", s.dev, size)
	}
	return nil
}

// kill ends the server at once. It says how, for the error that it is part of.
func (s *server) kill() error {
	s.cmd.Process.Kill()
	<-s.ended
	return fmt.Errorf("hostcryptd serve was killed; it had printed: %s", strings.TrimSpace(s.log.String()))
}

// freeDevice returns the first kernel device that nobody uses.
func freeDevice() (string, error) {
	for i := range 16 {
		name := fmt.Sprintf("nbd%d", i)
		if _, err := os.Stat("/dev/" + name); err != nil {
			break
		}
		if _, err := os.Stat("/sys/block/" + name + "/pid"); err == nil {
			continue
		}
		if size, err := deviceSize("/dev/" + name); err == nil && size == 0 {
			return "/dev/" + name, nil
		}
	}
	return "", errors.New("no free /dev/nbdN: is the kernel module nbd loaded?")
}

// deviceSize is the size of a block device in bytes.
func deviceSize(dev string) (int64, error) {
	text, err := os.ReadFile("/sys/block/" + filepath.Base(dev) + "/size")
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	return n * 512, err
}

// mount mounts an ext4 file system.
func (m *machine) mount(dev string) error { return m.mountAs("ext4", dev) }

func (m *machine) mountAs(fstype, dev string) error {
	m.typed("mount", dev, m.mnt)
	begun := time.Now()
	if err := unix.Mount(dev, m.mnt, fstype, 0, ""); err != nil {
		return fmt.Errorf("mounting %s: %w", dev, err)
	}
	m.exited(0, begun)
	return nil
}

// unmount writes everything back.
func (m *machine) unmount() error {
	m.typed("umount", m.mnt)
	begun := time.Now()
	if err := unix.Unmount(m.mnt, 0); err != nil {
		return fmt.Errorf("unmounting %s: %w", m.mnt, err)
	}
	m.exited(0, begun)
	return nil
}
