package keyunseal

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
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
	Error   string `json:"error,omitempty"`
	Refused bool   `json:"refused,omitempty"` // it didn't try
}

// errDialer is in the chain of errors of a dialer that isn't there or doesn't permit a
// connection. They are a reason to look at this host's configuration, not at the network.
var errDialer = errors.New("the dialer")

// machineEndpoints give tokens for the identity of a machine, without TLS.
var machineEndpoints = []string{"169.254.169.254:80", "127.0.0.1:40342", "localhost:40342"}

// loginHosts are those of [authorities], and their other names by the login library
// (its known_metadata.go), to which one of them may send on.
var loginHosts = []string{
	"login.microsoftonline.com", "login.windows.net", "login.microsoft.com", "sts.windows.net",
	"login.chinacloudapi.cn", "login.partner.microsoftonline.cn",
	"login.microsoftonline.us", "login.usgovcloudapi.net",
}

// MayDial says, by an error, to whom a dialer doesn't connect. It permits the endpoints
// for the identity of a machine, and on port 443, which all others have (see
// parseKeyURL), the hosts that are in only; if that is empty, the vaults, Managed HSMs
// and login hosts of the public clouds and of those that the files of clouds describe.
// clouds is asked for other hosts than those of the public clouds, each time: what it
// returns are paths as of [Options.Cloud], and with an error those that are known.
//
// What is trusted is in the program and in root's files. The header isn't: it says which
// vault a volume needs, and who can write to the disk can write that. Nor is who asks: a
// server that was broken into asks as it likes, and its unit lets it write none of those
// files, short of the disk below them. Two things stay open: it can reach vaults of
// others in the public clouds, unless only names this host's; and who answers this host's
// name lookups decides which address a name has. That the other end is the right one, who
// asks sees by TLS.
func MayDial(address string, only []string, clouds func() ([]string, error)) error {
	if slices.Contains(machineEndpoints, address) {
		return nil
	}
	host, port, err := net.SplitHostPort(address)
	switch label, _, public := cutPublic(host); {
	case err != nil:
		return err
	case port != "443":
		return errors.New("it is neither on port 443 nor an endpoint for the identity of a machine")
	case slices.ContainsFunc(only, func(name string) bool { return strings.EqualFold(name, host) }):
		return nil
	case len(only) > 0:
		return errors.New("the unit of hostcryptd-dial names the hosts that it connects to, and this one isn't among them")
	case public && checkVaultName(label) == nil, slices.Contains(loginHosts, host):
		return nil
	}
	files, err := clouds()
	for _, file := range files {
		f, ferr := readCloud(file)
		switch {
		case ferr == nil && f.has(host):
			return nil
		case ferr != nil && !(file == DefaultCloud && errors.Is(ferr, fs.ErrNotExist)):
			err = errors.Join(err, ferr)
		}
	}
	text := fmt.Sprintf("it is no vault, Managed HSM or login host of a public cloud, nor of a private one that %s describes, or a file that cloud= in /etc/hostcrypttab names", DefaultCloud)
	if err != nil {
		return fmt.Errorf("%s: %w", text, err)
	}
	return errors.New(text)
}

// CheckDialHost says what is wrong with a name for the only of [MayDial], which would
// never be asked for: what is asked for are names, without anything before or behind.
func CheckDialHost(name string) error {
	if !isDNSName(name) || !strings.Contains(name, ".") {
		return fmt.Errorf("%.100q is not the full name of a host, such as NAME.vault.azure.net: no https://, no port (it is always 443), no address", name)
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
	if err != nil && ctx.Err() == nil {
		return nil, &kindError{fmt.Sprintf("the process that connects to the network isn't there ('systemctl status hostcryptd-dial' says why): %v", err), errDialer}
	}
	if err != nil {
		return nil, context.Cause(ctx)
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
	case a.Refused:
		return nil, &kindError{a.Error, errDialer}
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
// ctx ends, to what may has no error for; [MayDial] is such a function. may is called
// by several goroutines at once. Only processes of its own user are answered. It
// allocates little and logs nothing: the log may be on a volume that waits for its key.
func ServeDialer(ctx context.Context, l *net.UnixListener, may func(address string) error) error {
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
			a.Refused = true
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
