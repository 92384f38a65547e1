package main

import (
	"bytes"
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

// restart replaces the server, again and again, under verified writes: by the
// same program, by another version, by one that can't run, and by the way of a
// service manager that keeps descriptors.
func restart(m *machine) error {
	if err := m.formatHostKey(); err != nil {
		return err
	}
	s, err := m.serve("--host-key", hostKey)
	if err != nil {
		return err
	}
	// What opened it must not be needed again.
	if err := os.Remove(hostKey); err != nil {
		return err
	}
	w, err := startPageWriter(s.dev, 32<<20)
	if err != nil {
		return err
	}
	defer w.f.Close()
	fio, err := m.startVerified(s.dev)
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	m.figure("longest write without a restart", float64(w.takeSlowest().Milliseconds()), "ms")
	r := &reloader{m: m, w: w, server: s, keeper: s.cmd.Process.Pid}

	m.step(1, "Reloaded under writes")
	p, old, err := r.reload(reloads)
	if err != nil {
		return err
	}
	p.figures(m, "reload")

	program, err := exec.LookPath("hostcryptd")
	if err != nil {
		return err
	}
	text, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	m.step(2, "Another version")
	next, err := r.upgrade(program, text, old.Version)
	if err != nil {
		return err
	}

	m.step(3, "A version that can't run")
	if err := r.refused(program, text, next); err != nil {
		return err
	}

	m.step(4, "Restarted by a service manager that keeps descriptors")
	p = &pauses{}
	for range restarts {
		w.take()
		if s, err = m.restartUnit(s); err != nil {
			return err
		}
		time.Sleep(time.Second)
		if err := w.failed(); err != nil {
			return err
		}
		p.add(w.take())
	}
	p.figures(m, "restart")

	if err := m.endVerified(fio); err != nil {
		return err
	}
	if err := errors.Join(m.endWrites(w), w.f.Close()); err != nil {
		return err
	}
	return s.detach()
}

// A reloader tells the keeper of a server, under writes, to let the program that is
// installed take over.
type reloader struct {
	m      *machine
	w      *pageWriter
	server *server
	keeper int // its process
}

// reload does so n times. It returns who serves then, and what the writes took.
func (r *reloader) reload(n int) (p *pauses, last volumeStatus, err error) {
	p = &pauses{}
	for range n {
		before, err := r.m.status()
		if err != nil {
			return nil, last, err
		}
		r.w.take()
		r.m.typed("kill", "-HUP", strconv.Itoa(r.keeper))
		if err := unix.Kill(r.keeper, unix.SIGHUP); err != nil {
			return nil, last, err
		}
		if last, err = r.m.waitServed(before.PID); err != nil {
			return nil, last, err
		}
		if last.Keeper != r.keeper {
			return nil, last, fmt.Errorf("the keeper is %d now, and was %d", last.Keeper, r.keeper)
		}
		time.Sleep(time.Second) // the keeper executes the new program
		if err := r.w.failed(); err != nil {
			return nil, last, err
		}
		p.add(r.w.take())
	}
	return p, last, nil
}

// upgrade makes another version out of the program, and lets it take over.
func (r *reloader) upgrade(program string, text []byte, version string) (next volumeStatus, err error) {
	name := []byte(strings.Repeat("N", len(version)))
	if !bytes.Contains(text, []byte(version)) || len(version) < 4 {
		return next, fmt.Errorf("the program doesn't have its version %q in it", version)
	}
	if err := replaceFile(program, bytes.ReplaceAll(text, []byte(version), name)); err != nil {
		return next, err
	}
	p, next, err := r.reload(1)
	if err != nil {
		return next, err
	}
	if next.Version != string(name) {
		return next, fmt.Errorf("version %q serves, want %q", next.Version, name)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/exe", r.keeper)); err != nil || !bytes.Contains(b, name) || bytes.Contains(b, []byte(version)) {
		return next, errors.Join(errors.New("the keeper does not run the new version"), err)
	}
	r.m.figure("upgrade: longest write", float64(p.longest[0].Milliseconds()), "ms")
	return next, nil
}

// refused puts what can't run in the program's place: who serves must go on. In the
// end the program is as it was at first.
func (r *reloader) refused(program string, text []byte, serves volumeStatus) error {
	for _, bad := range [][]byte{[]byte("no program"), text[:len(text)/2]} {
		if err := replaceFile(program, bad); err != nil {
			return err
		}
		r.w.take()
		if err := unix.Kill(r.keeper, unix.SIGHUP); err != nil {
			return err
		}
		time.Sleep(3 * time.Second)
		if err := errors.Join(r.w.failed(), replaceFile(program, text)); err != nil {
			return err
		}
		now, err := r.m.status()
		if err != nil {
			return err
		}
		if now.PID != serves.PID || now.Version != serves.Version {
			return fmt.Errorf("after a program that can't run, the server is pid %d of version %s, want %d of %s", now.PID, now.Version, serves.PID, serves.Version)
		}
		r.m.figure("refused upgrade: longest write", float64(r.w.takeSlowest().Milliseconds()), "ms")
	}
	if !strings.Contains(r.server.log.String(), "the volume stays with the server that it has") {
		return errors.New("nothing in the log says why there was no upgrade")
	}
	return nil
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
	if err := s.waitEnd("the signal for a restart"); err != nil {
		return nil, err
	}
	if len(s.stored) == 0 {
		return nil, errors.New("hostcryptd serve has left nothing for the next one")
	}
	words := s.cmd.Args
	if words[0] == "activate" {
		words = words[1:]
	}
	cmd := command("/proc/self/exe", words...)
	cmd.Args = append([]string{"activate"}, words...)
	var names []string
	for name, f := range s.stored {
		names = append(names, name)
		cmd.ExtraFiles = append(cmd.ExtraFiles, f)
	}
	cmd.Env = append(os.Environ(), "LISTEN_FDS="+strconv.Itoa(len(names)), "LISTEN_FDNAMES="+strings.Join(names, ":"))
	next, err := m.start(cmd, s.dev)
	if err != nil {
		return nil, err
	}
	for _, f := range s.stored {
		f.Close()
	}
	if err := next.waitReady(); err != nil {
		return nil, fmt.Errorf("after a restart: %w", err)
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
