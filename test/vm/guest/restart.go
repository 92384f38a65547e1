package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	reloads  = 8
	restarts = 3
)

// served is what status says of who serves.
type served struct {
	PID     int    `json:"pid"`
	Keeper  int    `json:"keeper"`
	Version string `json:"version"`
	State   string `json:"state"`
}

func (m *machine) served() (s served, err error) {
	out, err := command("hostcryptd", "status", m.disk, "--json").Output()
	if err != nil {
		return s, fmt.Errorf("hostcryptd status: %w", err)
	}
	return s, json.Unmarshal(out, &s)
}

// waitServed waits until another server serves than the one before.
func (m *machine) waitServed(before int) (s served, err error) {
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s, err = m.served(); err == nil && s.PID != before && s.State == "serving" {
			return s, nil
		}
	}
	return s, errors.Join(fmt.Errorf("the server with pid %d was not replaced: %+v", before, s), err)
}

// restart replaces the server, again and again, under verified writes: by the
// same program, by another version, by one that can't run, and by the way of a
// service manager that keeps descriptors.
func restart(m *machine) error {
	const key = "/run/host.key"
	if _, err := m.run("hostcryptd", "format", m.disk, "--key", "host-key", "--host-key", key, "--yes"); err != nil {
		return err
	}
	s, err := m.serve("--host-key", key)
	if err != nil {
		return err
	}
	if !s.running() {
		return fmt.Errorf("hostcryptd serve ended with exit code %d: %s", s.code, s.log.String())
	}
	// What opened it must not be needed again.
	if err := os.Remove(key); err != nil {
		return err
	}
	w, err := startPageWriter(s.dev, 32<<20)
	if err != nil {
		return err
	}
	defer w.f.Close()
	failed := func() error {
		select {
		case <-w.done:
			return fmt.Errorf("a write failed: %w", w.err)
		default:
			return nil
		}
	}
	fio, err := m.startVerified(s.dev)
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	m.figure("longest write without a restart", float64(w.takeSlowest().Milliseconds()), "ms")
	keeper := s.cmd.Process.Pid

	reload := func(n int) (p *pauses, last served, err error) {
		p = &pauses{}
		for range n {
			before, err := m.served()
			if err != nil {
				return nil, last, err
			}
			w.take()
			m.typed("kill", "-HUP", strconv.Itoa(keeper))
			if err := unix.Kill(keeper, unix.SIGHUP); err != nil {
				return nil, last, err
			}
			if last, err = m.waitServed(before.PID); err != nil {
				return nil, last, err
			}
			if last.Keeper != keeper {
				return nil, last, fmt.Errorf("the keeper is %d now, and was %d", last.Keeper, keeper)
			}
			time.Sleep(time.Second) // the keeper executes the new program
			if err := failed(); err != nil {
				return nil, last, err
			}
			p.add(w.take())
		}
		return p, last, nil
	}

	m.step(1, "Reloaded under writes")
	p, old, err := reload(reloads)
	if err != nil {
		return err
	}
	p.figures(m, "reload")

	m.step(2, "Another version")
	program, err := exec.LookPath("hostcryptd")
	if err != nil {
		return err
	}
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	name := []byte(strings.Repeat("N", len(old.Version)))
	if !bytes.Contains(text, []byte(old.Version)) || len(old.Version) < 4 {
		return fmt.Errorf("the program doesn't have its version %q in it", old.Version)
	}
	if err := replaceFile(program, bytes.ReplaceAll(text, []byte(old.Version), name)); err != nil {
		return err
	}
	p, next, err := reload(1)
	if err != nil {
		return err
	}
	if next.Version != string(name) {
		return fmt.Errorf("version %q serves, want %q", next.Version, name)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", keeper)); err != nil || !bytes.Contains(b, name) || bytes.Contains(b, []byte(old.Version)) {
		return errors.Join(errors.New("the keeper does not run the new version"), err)
	}
	m.figure("upgrade: longest write", float64(p.longest[0].Milliseconds()), "ms")

	m.step(3, "A version that can't run")
	for _, bad := range [][]byte{[]byte("no program"), text[:len(text)/2]} {
		if err := replaceFile(program, bad); err != nil {
			return err
		}
		w.take()
		if err := unix.Kill(keeper, unix.SIGHUP); err != nil {
			return err
		}
		time.Sleep(3 * time.Second)
		if err := errors.Join(failed(), replaceFile(program, text)); err != nil {
			return err
		}
		now, err := m.served()
		if err != nil {
			return err
		}
		if now.PID != next.PID || now.Version != next.Version {
			return fmt.Errorf("%+v serves after a program that can't run, want %+v", now, next)
		}
		m.figure("refused upgrade: longest write", float64(w.takeSlowest().Milliseconds()), "ms")
	}
	if !strings.Contains(s.log.String(), "the volume stays with the server that it has") {
		return errors.New("nothing in the log says why there was no upgrade")
	}

	m.step(4, "Restarted by a service manager that keeps descriptors")
	p = &pauses{}
	for range restarts {
		w.take()
		if s, err = m.restartUnit(s); err != nil {
			return err
		}
		time.Sleep(time.Second)
		if err := failed(); err != nil {
			return err
		}
		p.add(w.take())
	}
	p.figures(m, "restart")

	if err := m.endVerified(fio); err != nil {
		return err
	}
	w.stop()
	m.figure("writes answered", float64(w.writes), "")
	checked, err := w.verify()
	if err != nil {
		return err
	}
	m.figure("pages verified", float64(checked), "")
	w.f.Close()
	return s.detach()
}

// replaceFile puts another file in a file's place, as a package manager does.
func replaceFile(name string, b []byte) error {
	tmp := name + ".new"
	if err := os.WriteFile(tmp, b, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// unitGroup is the control group by which a process finds what unit it is.
const unitGroup = "/sys/fs/cgroup/hostcryptd@test.service"

// restartUnit does with the server what systemd does for 'systemctl restart':
// it keeps the descriptors that it is given, ends it, and starts it again.
func (m *machine) restartUnit(s *server) (*server, error) {
	if _, err := os.Stat(unitGroup); err != nil {
		if err := unix.Mount("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""); err != nil {
			return nil, fmt.Errorf("mounting the control groups: %w", err)
		}
		if err := os.Mkdir(unitGroup, 0o755); err != nil {
			return nil, err
		}
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			return nil, err
		}
		if err := os.WriteFile("/bin/systemctl", self, 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.WriteFile(filepath.Join(unitGroup, "cgroup.procs"), []byte(strconv.Itoa(s.cmd.Process.Pid)), 0); err != nil {
		return nil, err
	}
	m.typed("systemctl", "restart", filepath.Base(unitGroup))
	begun := time.Now()
	if err := s.cmd.Process.Signal(unix.SIGTERM); err != nil {
		return nil, err
	}
	select {
	case <-s.ended:
	case <-time.After(30 * time.Second):
		return nil, errors.Join(errors.New("hostcryptd serve doesn't end for a restart"), s.kill())
	}
	if s.err != nil || s.code != 0 {
		return nil, errors.Join(fmt.Errorf("hostcryptd serve ended with exit code %d for a restart", s.code), s.err)
	}
	if len(s.stored) == 0 {
		return nil, errors.New("hostcryptd serve has left nothing for the next one")
	}
	next := &server{m: m, dev: s.dev, begun: time.Now(), ready: make(chan struct{}), logged: make(chan struct{}), ended: make(chan struct{})}
	var err error
	if next.notify, err = listenNotify(); err != nil {
		return nil, err
	}
	words := s.cmd.Args
	if words[0] == "activate" {
		words = words[1:]
	}
	next.cmd = command("/proc/self/exe", words...)
	next.cmd.Args = append([]string{"activate"}, words...)
	var names []string
	for name, f := range s.stored {
		names = append(names, name)
		next.cmd.ExtraFiles = append(next.cmd.ExtraFiles, f)
	}
	next.cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+next.notify.LocalAddr().String(),
		"LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	if err := next.start(); err != nil {
		return nil, err
	}
	for _, f := range s.stored {
		f.Close()
	}
	if err := next.waitReady(); err != nil {
		return nil, err
	}
	if !next.running() {
		return nil, fmt.Errorf("hostcryptd serve ended with exit code %d after a restart: %s", next.code, next.log.String())
	}
	m.exited(0, begun)
	return next, nil
}

// activate becomes a program that takes LISTEN_FDS to be its own.
func activate(args []string) error {
	if len(args) == 0 {
		return errors.New("activate what?")
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return err
	}
	if err := os.Setenv("LISTEN_PID", strconv.Itoa(os.Getpid())); err != nil {
		return err
	}
	return unix.Exec(path, args, os.Environ())
}

// fakeSystemctl answers what hostcryptd asks when it is told to end.
func fakeSystemctl(args []string, w io.Writer) error {
	switch {
	case len(args) > 0 && args[0] == "list-jobs":
		fmt.Fprintf(w, "101 %s restart running\n", filepath.Base(unitGroup))
	case len(args) > 0 && args[0] == "show":
		fmt.Fprintln(w, "32")
	default:
		return fmt.Errorf("systemctl %v is not known here", args)
	}
	return nil
}
