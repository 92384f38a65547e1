package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func (a *app) reloadCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "reload VOLUME",
		Short: "have the installed version take over a volume that is in use",
		Long: `reload has the program that is installed now take over a volume with a kernel
device, from the server and its keeper. Both go on with the state of the old ones:
I/O pauses for a moment, no request fails, and no key is asked for; clients of --listen
and --tcp have to connect again and send again what had no reply, as QEMU does with
reconnect-delay= and nbd-client with -persist. If the new program can't run, or can't go
on with that state, everything stays as it was. SIGHUP to the keeper does the same.

The volume's options stay as they are. A line of hostcrypttab that was changed counts after
'systemctl restart' of its service, which interrupts no more than a reload does, except for
what would make another volume of the one in use: its device, random-key, read-only, discard,
connections, and where its sockets are, stay until it's stopped and served anew. A volume
that the initramfs has attached has its options until the next boot, from the line that
was there when the initramfs was made.

` + whichHelp,
		Args: oneArg("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			before, err := theOne(c.Context(), args[0])
			if err != nil {
				return err
			}
			client := newControlClient(before.Control)
			if err := client.do(c.Context(), "POST", "/v1/reload", nil); err != nil {
				return err
			}
			for {
				var now status
				err := client.do(c.Context(), "GET", "/v1/status", &now)
				switch {
				case err != nil && before.Keeper != 0 && !processExists(before.Keeper):
					return fmt.Errorf("%s: its server and its keeper have ended: were they told to stop?", before.Device)
				case err == nil && now.PID != before.PID && now.Rollback != "":
					return withCode(codeBusy, fmt.Errorf("%s is served by version %s as before: %s", now.Device, now.Version, now.Rollback))
				case err == nil && now.PID != before.PID && now.State == stateServing:
					return a.answer(nil, map[string]any{"uuid": now.UUID, "device": now.Device, "version": now.Version, "pid": now.PID}, "%s is served by version %s now", now.Device, now.Version)
				}
				select {
				case <-c.Context().Done():
					return c.Context().Err()
				case <-time.After(20 * time.Millisecond):
				}
			}
		},
	}
	return a.jsonFlag(c)
}
