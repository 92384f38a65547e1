package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// A keeperMessage goes from a server to its keeper.
type keeperMessage struct {
	Standby bool            `json:"standby,omitempty"` // it is prepared
	Version string          `json:"version,omitempty"` // with Standby
	Hold    string          `json:"hold,omitempty"`    // keep the descriptor under this name
	State   json.RawMessage `json:"state,omitempty"`   // a serverState
	Notify  []string        `json:"notify,omitempty"`  // tell the service manager
	Ready   bool            `json:"ready,omitempty"`   // it serves
	Reload  bool            `json:"reload,omitempty"`  // it wants to be replaced
	Left    bool            `json:"left,omitempty"`    // it has left: nothing of it is under way
	Over    bool            `json:"over,omitempty"`    // it ends because it wants to
	Pin     string          `json:"pin,omitempty"`     // why it must not be replaced, until Unpin
	Unpin   bool            `json:"unpin,omitempty"`
}

// A keeperOrder goes from the keeper to a server.
type keeperOrder struct {
	Prepare bool            `json:"prepare,omitempty"` // with the State of now, if there is one
	Reload  bool            `json:"reload,omitempty"`  // with Prepare: another one serves as long as that isn't done
	Hold    string          `json:"hold,omitempty"`    // here is what is held under this name
	Go      bool            `json:"go,omitempty"`      // serve, with State if there is one
	State   json.RawMessage `json:"state,omitempty"`
	Leave   bool            `json:"leave,omitempty"`   // leave everything to the next server
	Refused string          `json:"refused,omitempty"` // why a reload came to nothing
}

// maxKeeperMessage bounds a packet.
const maxKeeperMessage = 64 << 10

// packetConn makes a connection of a socket, which it takes over.
func packetConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return c.(*net.UnixConn), nil
}

// sendPacket sends a message, with a descriptor or nil.
func sendPacket(c *net.UnixConn, m any, f *os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if len(b) > maxKeeperMessage {
		return fmt.Errorf("a message of %d bytes between server and keeper", len(b))
	}
	if f == nil {
		_, _, err = c.WriteMsgUnix(b, nil, nil)
		return err
	}
	fd, err := descriptor(f)
	if err == nil {
		_, _, err = c.WriteMsgUnix(b, unix.UnixRights(fd), nil)
	}
	runtime.KeepAlive(f)
	return err
}

// receivePacket receives a message, and its descriptor or nil.
func receivePacket(c *net.UnixConn, m any) (f *os.File, err error) {
	b, oob := make([]byte, maxKeeperMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := c.ReadMsgUnix(b, oob)
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		return nil, err
	}
	if list, err := unix.ParseSocketControlMessage(oob[:oobn]); err == nil && len(list) == 1 {
		if fds, err := unix.ParseUnixRights(&list[0]); err == nil && len(fds) == 1 {
			unix.CloseOnExec(fds[0])
			f = os.NewFile(uintptr(fds[0]), "held")
		}
	}
	return f, json.Unmarshal(b[:n], m)
}

// descriptor is f.Fd(), which would make a socket block, for all who share it. The
// caller keeps f alive.
func descriptor(f *os.File) (n int, err error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(fd uintptr) { n = int(fd) })
	return n, err
}
