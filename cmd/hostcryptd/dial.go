package main

import (
	"context"
	"crypto/rand"
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
		Use:    "dial SOCKET [HOST...]",
		Short:  "connect to vaults for the servers of volumes, if there are HOSTs to these alone",
		Hidden: true,
		Args:   cobra.MatchAll(cobra.MinimumNArgs(1), notEmpty),
		RunE: func(c *cobra.Command, args []string) error {
			for _, host := range args[1:] {
				if err := keyunseal.CheckDialHost(host); err != nil {
					return usagef("ExecStart= of hostcryptd-dial: %w", err)
				}
			}
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
			return keyunseal.ServeDialer(ctx, l, mayDial(args[1:], tabFile))
		},
	}
}

// mayDial permits what volumes of a table may need, see [keyunseal.MayDial]. The service
// manager is told of the last refusal: who asked may be one who has broken in.
func mayDial(only []string, tab string) func(address string) error {
	clouds := func() ([]string, error) {
		files := []string{keyunseal.DefaultCloud}
		entries, _, err := readTab(tab)
		if errors.Is(err, fs.ErrNotExist) {
			return files, nil
		}
		for _, e := range entries {
			for _, f := range e.flags {
				if f.name == "cloud" {
					files = append(files, f.value)
				}
			}
		}
		return files, err
	}
	return func(address string) error {
		err := keyunseal.MayDial(address, only, clouds)
		if err != nil {
			systemd.Notify(systemd.Status("refused last: %q: %v", address, err))
		}
		return err
	}
}

// dialAsService has this process and its children connect as the service of a volume
// does: through the dialer or, where that doesn't run, by its rules.
func dialAsService(ctx context.Context) (runs bool, err error) {
	if os.Getenv(keyunseal.DialerEnv) != "" {
		return true, nil
	}
	if _, err := os.Stat(systemd.DialerSocket); err == nil {
		return true, os.Setenv(keyunseal.DialerEnv, systemd.DialerSocket)
	}
	name := "@hostcryptd-" + rand.Text() // of no file, so nothing is left of it
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: name, Net: "unixpacket"})
	if err != nil {
		return false, err
	}
	go keyunseal.ServeDialer(ctx, l, mayDial(nil, tabFile))
	return false, os.Setenv(keyunseal.DialerEnv, name)
}
