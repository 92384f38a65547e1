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
	canary  string // a string that must not reach the backing device
	disk    string // the backing device
	payload string // a tar archive, or the disk that holds one
	state   string // a folder that outlives the boot
	mnt     string // where the file system is mounted
	tools   string // the disk with tools that the initramfs has no room for
	shared  bool   // this is a host, whose files must stay as they are
	// The scenario breaks its disk, so the kernel is expected to complain.
	brokenDisk bool
	// The scenario kills servers, so the kernel is expected to say that it lost a
	// connection. Everything else counts.
	reconnects bool

	vault    *exec.Cmd
	hangUp   io.Closer // its standard input, whose end ends it
	replaced bool      // the machine's own files lead to the double
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

// A server is a running hostcryptd serve with an attached kernel device.
type server struct {
	m     *machine
	dev   string // "/dev/nbd0"
	cmd   *exec.Cmd
	begun time.Time

	notify *net.UnixConn // where its notifications arrive
	ready  chan struct{} // closed by READY=1
	logged chan struct{} // closed by the first line that it printed

	ended    chan struct{} // closed after the fields below are set
	code     int
	err      error
	log      bytes.Buffer
	stopping bool                // it has said STOPPING=1
	stored   map[string]*os.File // what it has given to the service manager to keep
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
// kernel device, and waits for its readiness notification. If the process
// ends before, the server is returned without a device, for its exit code.
func (m *machine) serve(args ...string) (*server, error) {
	s, dev, err := m.launch(args...)
	if err != nil {
		return nil, err
	}
	if err := s.waitReady(); err != nil {
		return s, err
	}
	return s, s.attached(dev)
}

// launch is serve without the waiting.
func (m *machine) launch(args ...string) (s *server, dev string, err error) {
	dev, err = freeDevice()
	if err != nil {
		return nil, "", err
	}
	notify, err := listenNotify()
	if err != nil {
		return nil, "", err
	}
	words := append([]string{"serve", m.disk, "--attach", dev}, args...)
	m.typed(append([]string{"hostcryptd"}, append(words, "&")...)...)
	s = &server{m: m, cmd: command("hostcryptd", words...), begun: time.Now(), ready: make(chan struct{}), logged: make(chan struct{}), ended: make(chan struct{})}
	s.notify = notify
	s.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+notify.LocalAddr().String())
	if err := s.start(); err != nil {
		notify.Close()
		return nil, "", err
	}
	return s, dev, nil
}

// attached checks the device of a server that is ready, if it still runs.
func (s *server) attached(dev string) error {
	m := s.m
	if s.running() {
		if size, err := deviceSize(dev); err != nil || size == 0 {
			return errors.Join(fmt.Errorf("hostcryptd said that it is ready, but %s has %d bytes", dev, size), err, s.kill())
		}
		s.dev = dev
		m.figure("serve until ready", time.Since(s.begun).Seconds(), "s")
		// Let what it prints about being ready come before the next step.
		select {
		case <-s.logged:
		case <-time.After(500 * time.Millisecond):
		}
	}
	return nil
}

// start starts the process and three goroutines that end with it.
func (s *server) start() error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	err = s.cmd.Start()
	w.Close()
	if err != nil {
		r.Close()
		return fmt.Errorf("starting hostcryptd: %w", err)
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
	return nil
}

func (s *server) running() bool {
	select {
	case <-s.ended:
		return false
	default:
		return true
	}
}

// waitReady returns nil when the process has notified or has ended.
func (s *server) waitReady() error {
	select {
	case <-s.ready:
		return nil
	case <-s.ended:
		s.m.exited(s.code, s.begun)
		return s.err
	case <-time.After(commandLimit):
		return errors.Join(fmt.Errorf("hostcryptd wasn't ready after %s", commandLimit), s.kill())
	}
}

// detach stops the server the way an administrator does, and checks that it
// ended cleanly and that the kernel device is free again.
func (s *server) detach() error {
	if _, err := s.m.run("hostcryptd", "detach", s.m.disk); err != nil {
		return errors.Join(err, s.kill())
	}
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		return errors.Join(errors.New("hostcryptd serve still runs 30 s after hostcryptd detach"), s.kill())
	}
	if s.err != nil || s.code != 0 {
		return errors.Join(fmt.Errorf("hostcryptd serve ended with exit code %d after hostcryptd detach", s.code), s.err)
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
