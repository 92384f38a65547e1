package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/systemd"
)

// dialCommand is what hostcryptd-dial.service runs.
func (a *app) dialCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "dial SOCKET",
		Short:  "connect to vaults for the servers of volumes",
		Hidden: true,
		Args:   oneArg("SOCKET"),
		RunE: func(c *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT)
			defer stop()
			log := a.daemonLog(true)
			defer log.Sync()
			// Nothing that it needs may have to come from a volume that waits for its key.
			if err := lockMemory(); err != nil {
				log.Warn("memory can't be locked (LimitMEMLOCK=)", zap.Error(err))
			}
			// The service manager runs one of these: what is there is of one before.
			if err := os.Remove(args[0]); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			old := unix.Umask(0o177)
			l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: args[0], Net: "unixpacket"})
			unix.Umask(old)
			if err != nil {
				return fmt.Errorf("listening for servers: %w", err)
			}
			if err := systemd.Notify(systemd.Ready); err != nil {
				log.Warn("service manager was not notified", zap.Error(err))
			}
			return keyunseal.ServeDialer(ctx, l)
		},
	}
}
