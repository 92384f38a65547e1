package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/systemd"
)

// A keeperState is what a keeper leaves to itself when it executes another
// program. Descriptors are numbers.
type keeperState struct {
	Version int             `json:"version"`
	Swap    bool            `json:"swap"`
	Path    string          `json:"path"`
	Program int             `json:"program"`
	Held    map[string]int  `json:"held"`
	State   json.RawMessage `json:"state"`
	PID     int             `json:"pid"`     // of the server
	Link    int             `json:"link"`    // to it
	Stop    unix.Signal     `json:"stop"`    // that the keeper was told to stop by, or 0
	Stopped bool            `json:"stopped"` // the server was told
	Pinned  string          `json:"pinned"`  // as of the server
	Wanted  wish            `json:"wanted"`
}

const keeperStateVersion = 1

// become executes the program from which servers are started now. It returns if
// that fails.
func (k *keeper) become() error {
	c := k.active
	if err := k.hearOut(c); err != nil {
		return err
	}
	defer func() { // it has failed
		_ = c.link.SetReadDeadline(time.Time{})
		c.done = make(chan struct{})
		go k.listen(c)
	}()
	var pass passedFiles
	defer pass.close()
	s := keeperState{Version: keeperStateVersion, Swap: k.swap, Path: k.path, Held: map[string]int{}, PID: c.process.Pid}
	link, err := c.link.File()
	if err != nil {
		return err
	}
	defer link.Close()
	if s.Link, err = pass.add(link); err != nil {
		return err
	}
	if s.Program, err = pass.add(k.program.f); err != nil {
		return err
	}
	for name, f := range k.held {
		if s.Held[name], err = pass.add(f); err != nil {
			return err
		}
	}
	k.log.Sync()
	for len(keeperSignals) > 0 || k.asking > 0 {
		select {
		case s := <-keeperSignals:
			k.signal(s)
		case e := <-k.events:
			k.handle(e)
		}
	}
	if k.active != c || c.over || k.next != nil || k.copying || k.exit != nil {
		return errors.New("a signal came first")
	}
	s.State, s.Wanted, s.Pinned = k.state, k.wanted, c.pinned
	if k.stop != nil {
		s.Stop, s.Stopped = k.stop.(unix.Signal), c.stopping
	}
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	f, err := memoryFile("hostcryptd-keeper", b)
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := pass.add(f)
	if err != nil {
		return err
	}
	return k.exec(fmt.Sprintf("/proc/self/fd/%d", s.Program), append(os.Environ(), fmt.Sprintf("%s=%d", keeperEnv, fd)))
}

// hearOut stops listening to the active server when all was heard that it has said.
func (k *keeper) hearOut(c *child) error {
	if err := c.link.SetReadDeadline(time.Unix(1, 0)); err != nil {
		return err
	}
	for {
		select {
		case <-c.done:
			return nil
		case e := <-k.events:
			k.handle(e)
			if k.active != c || c.over || k.next != nil {
				return errors.New("something else came first")
			}
		}
	}
}

// passedFiles stay open across an execve(2), by numbers.
type passedFiles []*os.File

// add returns the number of a file that stays open.
func (p *passedFiles) add(f *os.File) (int, error) {
	n, err := descriptor(f)
	if err != nil {
		return 0, err
	}
	fd, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD, 3)
	if err == nil {
		*p = append(*p, os.NewFile(uintptr(fd), "passed"))
	}
	return fd, err
}

func (p *passedFiles) close() {
	for _, f := range *p {
		f.Close()
	}
}

// exec executes a program, and returns if that fails. A service manager says only
// once that a process is to stop, and then waits for its end. Here it would wait for
// ever, or there would be no keeper any more: a signal that was taken before the
// execve(2) may not have come as far as the channel, and between that and
// listenToSignals nobody takes one. Blocking them doesn't help, as Go's runtime
// unblocks in all threads what ends a process, before it has its handlers. So they are
// ignored meanwhile, and then the service manager is asked: what it sent before, it
// knows of, and what it sends later is heard.
//
// This is why the unit has KillSignal=SIGINT. As to SIGINT and SIGHUP, the runtime
// leaves it at that when they are ignored at the start. SIGTERM ends the process from
// the runtime's start to listenToSignals, which are some milliseconds.
func (k *keeper) exec(path string, env []string) error {
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	err := unix.Exec(path, k.args, env)
	listenToSignals()
	k.askForStop()
	return err
}

// resume goes on with what another version of this process has left; ok is false
// if there is nothing.
func (a *app) resume() (ok bool, err error) {
	text, ok := os.LookupEnv(keeperEnv)
	if !ok {
		return false, nil
	}
	os.Unsetenv(keeperEnv)
	fd, err := strconv.Atoi(text)
	if err != nil {
		return true, fmt.Errorf("$%s is %.20q", keeperEnv, text)
	}
	open := func(fd int, name string) *os.File {
		unix.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), name)
	}
	f := open(fd, "keeper")
	defer f.Close()
	b, err := readMemoryFile(f)
	if err != nil {
		return true, err
	}
	var s keeperState
	if err := json.Unmarshal(b, &s); err != nil {
		return true, fmt.Errorf("what the keeper has left: %w", err)
	}
	k := &keeper{log: a.daemonLog(true), swap: s.Swap, path: s.Path, args: os.Args, held: map[string]*os.File{}, state: s.State, wanted: s.Wanted, events: make(chan keeperEvent)}
	defer k.log.Sync()
	if s.Stop != 0 {
		k.stop = s.Stop
	}
	k.program = &program{f: open(s.Program, "program")}
	if fi, err := k.program.f.Stat(); err == nil {
		k.program.size = int(fi.Size())
	}
	k.program.lock()
	for name, fd := range s.Held {
		k.hold(name, open(fd, name))
	}
	c := &child{program: k.program, version: version(), prepared: true, ready: true, stopping: s.Stopped, pinned: s.Pinned, state: s.State, done: make(chan struct{})}
	if c.link, err = packetConn(open(s.Link, "server")); err != nil {
		return true, err
	}
	if c.process, err = os.FindProcess(s.PID); err != nil {
		return true, err
	}
	k.active = c
	go k.listen(c)
	k.askForStop()
	k.log.Info("the keeper goes on with this version", zap.String("version", version()))
	if err := systemd.Notify(systemd.Ready); err != nil {
		k.log.Warn("service manager was not notified", zap.Error(err))
	}
	return true, k.run()
}
