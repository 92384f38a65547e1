package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// A volumeStatus is what hostcryptd status says of a volume, as far as scenarios
// ask.
type volumeStatus struct {
	UUID     string
	PID      int
	Keeper   int
	Version  string
	State    string
	Attached string
	Key      keyStatus
	Memory   struct {
		Resident float64
		Peak     float64
	}
	Swap struct {
		Safe     bool
		Problems []string
	}
	Volume struct {
		KeyMemory string `json:"key_memory"`
		Failed    bool
		Warnings  []string
	}
	Server struct {
		Engine string
	}
}

// A keyStatus is what it says of the volume's key.
type keyStatus struct {
	State      string
	Wiped      bool
	Attempts   int
	LastGood   time.Time `json:"last_good"`
	NextTry    time.Time `json:"next_try"`
	AccessLost time.Time `json:"access_lost"`
	Stopped    time.Time
	Reason     string
}

// statusOf asks the server of a volume, by its device or its name.
func statusOf(volume string) (s volumeStatus, err error) {
	out, err := command("hostcryptd", "status", volume, "--json").Output()
	if err != nil {
		return s, fmt.Errorf("hostcryptd status: %w", err)
	}
	return s, json.Unmarshal(out, &s)
}

func (m *machine) status() (volumeStatus, error) { return statusOf(m.disk) }

// waitServed waits until another server serves than the one before.
func (m *machine) waitServed(before int) (s volumeStatus, err error) {
	for end := time.Now().Add(60 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if s, err = m.status(); err == nil && s.PID != before && s.State == "serving" {
			return s, nil
		}
	}
	return s, errors.Join(fmt.Errorf("the server with pid %d was not replaced: it is pid %d, and %s", before, s.PID, s.State), err)
}

// waitKey waits until the key is in a state.
func (m *machine) waitKey(state string, limit time.Duration) (keyStatus, error) {
	var s volumeStatus
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		var err error
		if s, err = m.status(); err != nil {
			return s.Key, err
		}
		if s.Key.State == state {
			return s.Key, nil
		}
	}
	return s.Key, fmt.Errorf("after %v the key is %s, want %s: %s", limit, s.Key.State, state, s.Key.Reason)
}

// killServer kills the process that serves, not its keeper.
func (m *machine) killServer() error {
	s, err := m.status()
	if err != nil {
		return err
	}
	if s.Keeper == 0 || s.PID == s.Keeper {
		return fmt.Errorf("the server's pid is %d, the keeper's %d", s.PID, s.Keeper)
	}
	m.typed("kill", "-KILL", strconv.Itoa(s.PID))
	return unix.Kill(s.PID, unix.SIGKILL)
}

// loseKernelSocket shuts down the socket between the server and the kernel, as older
// kernels do themselves when a signal interrupts who sends.
func (m *machine) loseKernelSocket() error {
	s, err := m.status()
	if err != nil {
		return err
	}
	process, err := unix.PidfdOpen(s.PID, 0)
	if err != nil {
		return err
	}
	defer unix.Close(process)
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.PID))
	if err != nil {
		return err
	}
	for _, f := range files {
		number, err := strconv.Atoi(f.Name())
		if err != nil {
			return err
		}
		fd, err := unix.PidfdGetfd(process, number, 0)
		if err == unix.EBADF {
			continue // closed since
		}
		if err != nil {
			return fmt.Errorf("descriptor %d of the server: %w", number, err)
		}
		// It is the one whose ends have no names, which the package says as "@".
		kind, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
		name, _ := unix.Getsockname(fd)
		peer, err := unix.Getpeername(fd)
		u, unixSocket := name.(*unix.SockaddrUnix)
		p, connected := peer.(*unix.SockaddrUnix)
		found := err == nil && kind == unix.SOCK_STREAM && unixSocket && connected && u.Name+p.Name == "@@"
		err = nil
		if found {
			err = unix.Shutdown(fd, unix.SHUT_RDWR) // of all descriptors of it
		}
		if err := errors.Join(err, unix.Close(fd)); err != nil || found {
			return err
		}
	}
	return errors.New("the server has no socket that looks like the kernel's")
}
