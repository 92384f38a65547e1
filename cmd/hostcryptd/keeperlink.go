package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// A keeperLink is the server's end. A nil one stands for no keeper.
type keeperLink struct {
	conn *net.UnixConn
	held map[string]*os.File

	pid  int         // of the keeper
	dead atomic.Bool // it is
	left atomic.Bool // this server has left, and the keeper has no more use for it

	leave    chan struct{} // closed when the server is to leave
	rollback string        // why the server that came by a reload is not this one

	asking  sync.Mutex // guards what follows
	refusal *refusal   // that is waited for, or nil

	mu sync.Mutex // one message at a time
}

// openKeeperLink returns the link to the keeper of this process, or nil.
func openKeeperLink() (*keeperLink, error) {
	if _, ok := os.LookupEnv(serverEnv); !ok {
		return nil, nil
	}
	os.Unsetenv(serverEnv)
	unix.CloseOnExec(keeperFD)
	conn, err := packetConn(os.NewFile(keeperFD, "keeper"))
	if err != nil {
		return nil, fmt.Errorf("$%s is set, but there is no keeper: %w", serverEnv, err)
	}
	_ = unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(unsafe.StringData("hostcryptd\x00"))), 0, 0, 0) // not the number of a descriptor
	return &keeperLink{conn: conn, pid: os.Getppid(), held: map[string]*os.File{}, leave: make(chan struct{})}, nil
}

// A refusal is why a reload came to nothing.
type refusal struct {
	came chan struct{} // closed when it has come
	why  string
}

// nextRefusal returns the one that comes next, to all who ask.
func (k *keeperLink) nextRefusal() *refusal {
	k.asking.Lock()
	defer k.asking.Unlock()
	if k.refusal == nil {
		k.refusal = &refusal{came: make(chan struct{})}
	}
	return k.refusal
}

func (k *keeperLink) refuse(why string) {
	k.asking.Lock()
	defer k.asking.Unlock()
	if r := k.refusal; r != nil {
		r.why, k.refusal = why, nil
		close(r.came)
	}
}

// errNoTurn means that the keeper has ended, or has no use for this server.
var errNoTurn = errors.New("it never was this server's turn")

// standBy has prepare do what can be done early, which at a reload may be to find that
// this server is of no use. It returns when it is this server's turn, with the state to
// go on with or nil.
func (k *keeperLink) standBy(ctx context.Context, prepare func(reload bool) error) (*serverState, error) {
	defer context.AfterFunc(ctx, func() { k.conn.SetReadDeadline(time.Unix(1, 0)) })()
	for {
		var o keeperOrder
		f, err := receivePacket(k.conn, &o)
		if err != nil {
			return nil, errNoTurn
		}
		if f != nil {
			k.held[o.Hold] = f
		}
		switch {
		case o.Prepare:
			if _, err := parseState(o.State); err != nil {
				return nil, err
			}
			if err := prepare(o.Reload); err != nil {
				return nil, err
			}
			if err := k.send(keeperMessage{Standby: true, Version: version()}, nil); err != nil {
				return nil, err
			}
		case o.Refused != "":
			k.rollback = o.Refused
		case o.Go:
			return parseState(o.State)
		}
	}
}

// listen listens to the keeper, for as long as this server runs.
func (k *keeperLink) listen(log *zap.Logger) {
	if k == nil {
		return
	}
	_ = k.conn.SetReadDeadline(time.Time{})
	left := false
	for {
		var o keeperOrder
		f, err := receivePacket(k.conn, &o)
		if err != nil {
			k.dead.Store(true)
			if k.left.Load() {
				return // it was the keeper that ended this
			}
			log.Error("the keeper has died; this server goes on, but nothing replaces it if it dies", zap.Error(err))
			return
		}
		if f != nil {
			f.Close()
		}
		if o.Leave && !left {
			left = true
			close(k.leave)
		}
		if o.Refused != "" {
			k.refuse(o.Refused)
		}
	}
}

// keeper is the process of the keeper, or 0 if there is none, or none any more. The
// parent of this process is another one then.
func (k *keeperLink) keeper() int {
	if k == nil || k.dead.Load() {
		return 0
	}
	return k.pid
}

// leaving is closed when this server is to leave.
func (k *keeperLink) leaving() <-chan struct{} {
	if k == nil {
		return nil
	}
	return k.leave
}

// take returns what is held under a name, or nil, and forgets it.
func (k *keeperLink) take(name string) *os.File {
	if k == nil {
		return nil
	}
	f := k.held[name]
	delete(k.held, name)
	return f
}

// takeKernel returns the sockets of the kernel device that the server before has
// left.
func (k *keeperLink) takeKernel() (list []*net.UnixConn, err error) {
	if k == nil {
		return nil, nil
	}
	for name, f := range k.held {
		if !strings.HasPrefix(name, heldKernel) {
			continue
		}
		delete(k.held, name)
		c, err := packetConn(f)
		if err != nil {
			return nil, err
		}
		list = append(list, c)
	}
	return list, nil
}

// send sends a message, with a descriptor or nil.
func (k *keeperLink) send(m keeperMessage, f *os.File) error {
	if k == nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if m.Left {
		k.left.Store(true) // its answer may be faster than this
	}
	return sendPacket(k.conn, m, f)
}
