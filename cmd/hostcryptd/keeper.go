package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/systemd"
)

// With --attach there are two processes. The keeper, which the service manager
// started, does no I/O and opens nothing: it holds what a server needs to go on
// where another was killed, and starts the next. Its child, the server, does
// everything else. What is held are descriptors by name (held below), and a
// serverState. They talk over a socket pair: each message is a keeperMessage in
// one packet, with the descriptor that it is about.
//
// How a killed server is replaced:
//
//  1. Its sockets are closed with it. The kernel finds that its device's
//     connection is dead, and lets requests wait (Config.DeadConnTimeout).
//  2. The keeper starts the next server from its own copy of the program, which
//     is locked in memory: the file may be on the device that is to be recovered.
//  3. That opens the backing device anew and waits for the fence: until the last
//     I/O of the dead one has ended. See sector.Device.Fence.
//  4. It takes the key from the secret memory, and neither asks a vault nor reads
//     the header.
//  5. It gives the kernel new sockets, and the kernel sends again what had not
//     been answered.

// Environment of a server that has a keeper: the names of the descriptors from
// keeperFD+1 on.
const (
	keeperEnv = "HOSTCRYPTD_HELD"
	keeperFD  = 3
)

// Names of what is held.
const (
	heldDevice    = "device"    // the backing device, opened exclusively; no I/O is done on it
	heldKey       = "key"       // a sector.Handover
	heldListener  = "listen"    // the socket of --listen
	heldTCP       = "tcp"       // that of --tcp
	heldInherited = "inherited" // and a number: from the service manager
	heldState     = "state"     // a serverState, of a server that is to go on
)

// A keeperMessage goes from the server to its keeper.
type keeperMessage struct {
	Hold   string          `json:"hold,omitempty"`   // keep the descriptor under this name
	State  json.RawMessage `json:"state,omitempty"`  // a serverState
	Notify []string        `json:"notify,omitempty"` // tell the service manager
	Ready  bool            `json:"ready,omitempty"`  // it serves
	Over   bool            `json:"over,omitempty"`   // it ends because it wants to
}

// maxKeeperMessage bounds a packet.
const maxKeeperMessage = 64 << 10

// A keeper holds what servers leave to each other. One goroutine uses it.
type keeper struct {
	log     *zap.Logger
	program *os.File // a sealed copy
	args    []string
	held    map[string]*os.File
	state   json.RawMessage // nil before there is something to go on with
}

// keep is the whole life of the keeper. It returns the exit code of the last
// server.
func (a *app) keep(inherited []net.Listener) (err error) {
	k := &keeper{log: a.daemonLog(), args: os.Args, held: map[string]*os.File{}}
	defer k.log.Sync()
	for i, l := range inherited {
		f, err := l.(interface{ File() (*os.File, error) }).File()
		if err != nil {
			return err
		}
		k.held[fmt.Sprintf("%s%d", heldInherited, i)] = f
	}
	if k.program, err = copyProgram("/proc/self/exe"); err != nil {
		return fmt.Errorf("copying the program to memory: %w", err)
	}
	defer k.program.Close()
	// What is needed when the device below is dead must not have to come from
	// it. What the heap still grows by is locked when it is used.
	if err := lockMemory(); err != nil {
		k.log.Warn("the keeper's memory can't be locked (LimitMEMLOCK=); a volume that is used for swap may not survive the death of its server", zap.Error(err))
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	defer signal.Stop(signals)

	var deaths []time.Time
	for {
		over, state, err := k.runServer(signals)
		if err != nil {
			return err
		}
		if over || k.state == nil {
			if state.Signaled() {
				return fmt.Errorf("the server was killed by signal %d (%v) before it served", int(state.Signal()), state.Signal())
			}
			if code := state.ExitStatus(); code != 0 {
				return &silentError{code}
			}
			return nil
		}
		now := time.Now()
		deaths = append(slices.DeleteFunc(deaths, func(t time.Time) bool { return now.Sub(t) > time.Minute }), now)
		wait := time.Duration(0)
		if n := len(deaths); n > 3 {
			wait = min(100*time.Millisecond<<(n-4), 5*time.Second)
		}
		k.log.Error("the server has died; another one goes on, and I/O waits for it",
			zap.String("how", describeDeath(state)), zap.Int("deaths_in_a_minute", len(deaths)), zap.Duration("wait", wait))
		time.Sleep(wait)
	}
}

// A silentError is an exit code whose reason another process has printed.
type silentError struct{ code int }

func (e *silentError) Error() string { return fmt.Sprintf("exit code %d", e.code) }

func describeDeath(s syscall.WaitStatus) string {
	if s.Signaled() {
		return fmt.Sprintf("signal %d (%v)", int(s.Signal()), s.Signal())
	}
	return fmt.Sprintf("exit code %d", s.ExitStatus())
}

// runServer runs one server to its end. over tells whether it ended because it
// wanted to.
func (k *keeper) runServer(signals <-chan os.Signal) (over bool, _ syscall.WaitStatus, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, 0, err
	}
	theirs := os.NewFile(uintptr(pair[1]), "keeper")
	f := os.NewFile(uintptr(pair[0]), "server")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		theirs.Close()
		return false, 0, err
	}
	link := conn.(*net.UnixConn)
	defer link.Close()

	files, names := []*os.File{theirs}, []string{}
	for name, f := range k.held {
		files, names = append(files, f), append(names, name)
	}
	if k.state != nil {
		f, err := memoryFile("hostcryptd-state", k.state)
		if err != nil {
			theirs.Close()
			return false, 0, err
		}
		defer f.Close()
		files, names = append(files, f), append(names, heldState)
	}
	cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", k.program.Fd()), k.args[1:]...)
	cmd.Args[0] = k.args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), keeperEnv+"="+strings.Join(names, ","))
	cmd.ExtraFiles = files
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return false, 0, fmt.Errorf("starting the server: %w", err)
	}
	messages := make(chan keeperMessage)
	go func() {
		defer close(messages)
		for {
			m, f, err := receiveMessage(link)
			if err != nil {
				return
			}
			if m.Hold != "" && f != nil {
				if old := k.held[m.Hold]; old != nil {
					old.Close()
				}
				k.held[m.Hold] = f
			} else if f != nil {
				f.Close()
			}
			messages <- m
		}
	}()
	// The link ends with the server: nobody else has its end.
	for open := true; open; {
		select {
		case s := <-signals:
			cmd.Process.Signal(s)
		case m, ok := <-messages:
			open = ok
			over = over || m.Over
			if m.State != nil {
				k.state = m.State
			}
			if m.Notify != nil {
				if err := systemd.Notify(m.Notify...); err != nil {
					k.log.Warn("service manager was not notified", zap.Error(err))
				}
			}
		}
	}
	_ = cmd.Wait() // its error is the status
	return over, cmd.ProcessState.Sys().(syscall.WaitStatus), nil
}

// copyProgram copies a program to memory that nobody can change, and locks it
// there.
func copyProgram(name string) (_ *os.File, err error) {
	src, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer src.Close()
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate("hostcryptd", flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate("hostcryptd", flags)
	}
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "hostcryptd")
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	n, err := io.Copy(f, src)
	if err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err != nil {
		return nil, err
	}
	p, err := unix.Mmap(fd, 0, int(n), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	_ = unix.Mlock(p) // Mlockall says it if it may not
	// A descriptor that is open for writing can't be executed.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	f.Close()
	return ro, nil
}

// memoryFile returns a file in memory that holds b.
func memoryFile(name string, b []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.WriteAt(b, 0); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// receiveMessage receives a message and its descriptor, or nil.
func receiveMessage(c *net.UnixConn) (m keeperMessage, f *os.File, err error) {
	b, oob := make([]byte, maxKeeperMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return m, nil, err
	}
	if list, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(list) == 1 {
		if fds, err := unix.ParseUnixRights(&list[0]); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			f = os.NewFile(uintptr(fds[0]), "held")
		}
	}
	return m, f, json.Unmarshal(b[:n], &m)
}

// A keeperLink is the server's end. A nil one stands for no keeper.
type keeperLink struct {
	conn *net.UnixConn
	held map[string]*os.File

	mu sync.Mutex // one message at a time
}

// openKeeperLink takes over what the keeper of this process has given it, or
// returns nil.
func openKeeperLink() (*keeperLink, error) {
	names, ok := os.LookupEnv(keeperEnv)
	if !ok {
		return nil, nil
	}
	os.Unsetenv(keeperEnv)
	k := &keeperLink{held: map[string]*os.File{}}
	unix.CloseOnExec(keeperFD)
	f := os.NewFile(keeperFD, "keeper")
	conn, err := net.FileConn(f)
	f.Close()
	if err != nil {
		return nil, fmt.Errorf("$%s is set, but there is no keeper: %w", keeperEnv, err)
	}
	k.conn = conn.(*net.UnixConn)
	for i, name := range strings.FieldsFunc(names, func(r rune) bool { return r == ',' }) {
		unix.CloseOnExec(keeperFD + 1 + i)
		k.held[name] = os.NewFile(uintptr(keeperFD+1+i), name)
	}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData("hostcryptd\x00"))), 0, 0, 0) // not the number of a descriptor
	return k, nil
}

// send sends a message, with a descriptor or nil.
func (k *keeperLink) send(m keeperMessage, f *os.File) error {
	if k == nil {
		return nil
	}
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxKeeperMessage {
		return fmt.Errorf("a message of %d bytes to the keeper", len(b))
	}
	var oob []byte
	if f != nil {
		oob = unix.UnixRights(int(f.Fd()))
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	_, _, err = k.conn.WriteMsgUnix(b, oob, nil)
	return err
}

// watch tells when the keeper is gone.
func (k *keeperLink) watch(ctx context.Context, log *zap.Logger) {
	if k == nil {
		return
	}
	stop := context.AfterFunc(ctx, func() { k.conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var b [1]byte
	if _, err := k.conn.Read(b[:]); ctx.Err() == nil {
		log.Error("the keeper has died; this server goes on, but nothing replaces it if it dies", zap.Error(err))
	}
}
