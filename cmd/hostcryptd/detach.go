package main

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) detachCommand() *cobra.Command {
	force := false
	c := &cobra.Command{
		Use:   "detach VOLUME",
		Short: "stop serving a volume: drain, flush, detach, wipe the keys",
		Long: `detach stops the daemon of a volume and waits until it has ended. It refuses while
the kernel device is mounted or otherwise in use, and, without --force, while the header
is gone from the disk: what was not copied by then is lost without a backup of it.
Clients of sockets are cut off; it says how many there were.

` + whichHelp,
		Args: oneArg("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := theOne(c.Context(), args[0])
			if err != nil {
				return err
			}
			if s.Attached != "" {
				// A service can't see what others have open, and this process can.
				d := &usedDevice{path: s.Attached, numbers: deviceNumbers(s.Attached)}
				if by, unseen := d.waitProcesses(s.PID); len(by) > 0 {
					return inUse(s.Attached, slices.Concat(d.mounts(), d.swaps(), d.holders(), by), unseen)
				}
			}
			if err := newControlClient(s.Control).do(c.Context(), "POST", fmt.Sprintf("/v1/detach?force=%t", force), nil); err != nil {
				return err
			}
			for processExists(s.PID) || s.Keeper != 0 && processExists(s.Keeper) {
				select {
				case <-c.Context().Done():
					return c.Context().Err()
				case <-time.After(10 * time.Millisecond):
				}
			}
			cut, text := 0, "%s is detached"
			if s.Server != nil && s.Server.Clients > 0 {
				cut = s.Server.Clients
				text += fmt.Sprintf("; connections of clients that it cut off: %d", cut)
			}
			return a.answer(nil, map[string]any{"uuid": s.UUID, "device": s.Device, "clients_cut_off": cut}, text, s.Device)
		},
	}
	c.Flags().BoolVar(&force, "force", false, "detach also while the header is gone from the disk or isn't authentic, and with it the way into the data")
	return a.jsonFlag(c)
}

// processExists tells whether a process has not ended yet; one that waits for
// its parent to notice has.
func processExists(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	// The state follows the name, which stands in parentheses.
	_, after, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')-1:], []byte(") "))
	return ok && len(after) > 0 && after[0] != 'Z' && after[0] != 'X'
}
