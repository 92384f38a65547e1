package keyunseal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A process that has keys and disks has no use for a network of its own: all that it
// needs are connections to a vault and to who vouches for this host. With DialerEnv it
// asks another process for each, which has the network and nothing else. What goes over
// them, TLS, identity and tokens, is as it is without.
//
// One question is one connection to a SOCK_SEQPACKET socket:
//
//	question  HOST:PORT
//	answer    a dialerAnswer, and the connected socket if it has no error
//
// Who asked and goes away ends the try.

// DialerEnv names the socket of a dialer, of a process and of its children. Without it,
// this package connects by itself.
const DialerEnv = "HOSTCRYPTD_DIALER"

// maxQuestion bounds HOST:PORT: a name has at most 253 bytes.
const maxQuestion = 300

// maxDials is how many connections a dialer makes at once; more wait.
const maxDials = 64

// dialTimeout is for name lookup and connection together. The resolver gives a dead
// first name server 5 seconds, so that less would never reach the second.
const dialTimeout = 8 * time.Second

type dialerAnswer struct {
	Error string `json:"error,omitempty"`
}

// mayDial tells whether a dialer connects to an address. Vaults, login hosts and their
// private clouds have TLS and no other port, see parseKeyURL; the two endpoints without
// are those of the SDK for the identity of a machine.
func mayDial(address string) error {
	host, port, err := net.SplitHostPort(address)
	switch {
	case err != nil:
		return err
	case host == "", port != "443" && address != "169.254.169.254:80" && address != "127.0.0.1:40342" && address != "localhost:40342":
		return errors.New("neither HOST:443 nor an endpoint for the identity of a machine")
	}
	return nil
}

// dial connects for directTransport.
func dial(ctx context.Context, network, address string) (net.Conn, error) {
	if socket := os.Getenv(DialerEnv); socket != "" {
		return dialThrough(ctx, socket, address)
	}
	return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, network, address)
}

// dialThrough has the dialer at socket connect.
func dialThrough(ctx context.Context, socket, address string) (net.Conn, error) {
	c, err := (&net.Dialer{}).DialContext(ctx, "unixpacket", socket)
	if err != nil {
		return nil, fmt.Errorf("the process that connects to the network isn't there ('systemctl status hostcryptd-dial' says why): %w", err)
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := c.Write([]byte(address)); err != nil {
		return nil, err
	}
	b, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.(*net.UnixConn).ReadMsgUnix(b, oob)
	f := passedFile(oob[:oobn])
	if f != nil {
		defer f.Close()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	var a dialerAnswer
	if err == nil {
		err = json.Unmarshal(b[:n], &a)
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("the process that connects to the network gave no answer: %w", err)
	case a.Error != "":
		return nil, errors.New(a.Error)
	case f == nil:
		return nil, errors.New("the process that connects to the network gave no connection")
	}
	return net.FileConn(f)
}

// passedFile is the one descriptor that came with a message, or nil.
func passedFile(oob []byte) *os.File {
	list, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(list) != 1 {
		return nil
	}
	fds, err := unix.ParseUnixRights(&list[0])
	if err != nil || len(fds) != 1 {
		return nil
	}
	unix.CloseOnExec(fds[0])
	return os.NewFile(uintptr(fds[0]), "connection")
}

// ServeDialer connects for who asks at l, a SOCK_SEQPACKET socket, until l is closed or
// ctx ends. Only processes of its own user are answered. It allocates little and logs
// nothing: the log may be on a volume that waits for its key.
func ServeDialer(ctx context.Context, l *net.UnixListener) error {
	return serveDialer(ctx, l, mayDial)
}

func serveDialer(ctx context.Context, l *net.UnixListener, may func(address string) error) error {
	defer context.AfterFunc(ctx, func() { l.Close() })()
	free := make(chan struct{}, maxDials)
	for {
		c, err := l.AcceptUnix()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // no descriptors, no memory
			time.Sleep(100 * time.Millisecond)
			continue
		}
		free <- struct{}{}
		go func() {
			defer func() { <-free }()
			defer c.Close()
			answerDial(ctx, c, may)
		}()
	}
}

// answerDial answers one question.
func answerDial(ctx context.Context, c *net.UnixConn, may func(address string) error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var a dialerAnswer
	conn, err := func() (net.Conn, error) {
		if err := samePeer(c); err != nil {
			return nil, err
		}
		b := make([]byte, maxQuestion)
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		c.SetReadDeadline(time.Time{})
		go func() { // the end of who asked
			c.Read(make([]byte, 1))
			cancel()
		}()
		address := string(b[:n])
		if err := may(address); err != nil {
			return nil, fmt.Errorf("no connection is made to %q: %w", address, err)
		}
		return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "tcp", address)
	}()
	var rights []byte
	if err == nil {
		defer conn.Close()
		var f *os.File
		if f, err = conn.(*net.TCPConn).File(); err == nil {
			defer f.Close()
			rights = unix.UnixRights(int(f.Fd()))
		}
	}
	if err != nil {
		a.Error = clean(err.Error())
	}
	b, err := json.Marshal(a)
	if err == nil {
		c.WriteMsgUnix(b, rights, nil)
	}
}

// samePeer refuses other users.
func samePeer(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); cerr != nil {
		return cerr
	}
	if err == nil && int(cred.Uid) != os.Geteuid() {
		err = errors.New("another user asks")
	}
	return err
}
