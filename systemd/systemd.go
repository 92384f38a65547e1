// Package systemd is the service manager's side of hostcryptd: the units
// beside this file, and the notifications by which a service says how far it
// is. Most callers want [Notify].
package systemd

import (
	"fmt"
	"net"
	"os"
	"strings"
)

// States for [Notify], of sd_notify(3).
const (
	Ready     = "READY=1"
	Reloading = "RELOADING=1" // with MONOTONIC_USEC=
	Stopping  = "STOPPING=1"
	Watchdog  = "WATCHDOG=1"
)

// Status is the state that 'systemctl status' shows as a line of text.
func Status(format string, args ...any) string {
	return "STATUS=" + strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " ")
}

// Notify tells the service manager about one or several states. It does
// nothing when there is none to tell, that is without $NOTIFY_SOCKET. It may be
// called from any goroutine.
func Notify(states ...string) error {
	name := os.Getenv("NOTIFY_SOCKET")
	if name == "" {
		return nil
	}
	// A name that starts with @ is in the abstract namespace, for Go too.
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("systemd: notifying: %w", err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(strings.Join(states, "\n"))); err != nil {
		return fmt.Errorf("systemd: notifying: %w", err)
	}
	return nil
}
