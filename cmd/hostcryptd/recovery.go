package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

func (a *app) recoveryCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "recovery",
		Short: "manage the recovery keys of a volume",
		Long: `A recovery key opens a volume without the vault and without this host. It is an
ordinary LUKS2 keyslot: cryptsetup open --key-file FILE DEVICE NAME
After the loss of all keys 'hostcryptd key add --recovery-key' gives the volume
another one.`,
		Args: noArgs,
	}
	c.AddCommand(a.recoveryAddCommand(), a.recoveryRotateCommand(), a.recoveryRemoveCommand(), a.recoveryTestCommand())
	return c
}

// writeKeyslot generates a recovery key, writes it to file and gives it to
// change, which makes a keyslot of it.
func (a *app) writeKeyslot(device, file string, change func(d *sector.Device, key []byte) (int, error)) (int, error) {
	if file == "" {
		return -1, usagef("--recovery-key FILE says where the generated key goes")
	}
	d, err := sector.OpenDevice(device, sector.DeviceOptions{Shared: true})
	if err != nil {
		return -1, err
	}
	defer d.Close()
	key, err := writeRecoveryKey(file)
	if err != nil {
		return -1, err
	}
	defer clear(key)
	id, err := change(d, key)
	if err != nil {
		err = fmt.Errorf("%s: %w", device, err)
		if id >= 0 {
			return id, fmt.Errorf("%w; the key in %s may open keyslot %d or not, 'hostcryptd recovery test' tells", err, file, id)
		}
		return id, errors.Join(err, removeUnused(file))
	}
	return id, nil
}

func (a *app) recoveryAddCommand() *cobra.Command {
	var (
		keys keyFlags
		file string
	)
	c := &cobra.Command{
		Use:   "add DEVICE --recovery-key FILE",
		Short: "generate a recovery key and add a keyslot for it",
		Long: `add unseals the volume with one of its keys, generates a recovery key, writes it
to FILE and adds a keyslot that it opens. The volume may be in use meanwhile.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := a.writeKeyslot(args[0], file, func(d *sector.Device, key []byte) (int, error) {
				id, err := sector.AddRecoveryKey(c.Context(), d, keys.unsealer(a.cliLog()), key, keys.open(a.cliLog()))
				keys.changed(c.Context(), d, audit.Recovery, fmt.Sprintf("add keyslot %d", id), err)
				return id, err
			})
			return a.answer(err, map[string]any{"device": args[0], "keyslot": id, "recovery_key": file}, "keyslot %d of %s now opens with the key in %s; keep it somewhere else", id, args[0], file)
		},
	}
	keys.add(c)
	c.Flags().StringVar(&file, "recovery-key", "", "write the generated key to this new `FILE`")
	return a.jsonFlag(c)
}

func (a *app) recoveryRotateCommand() *cobra.Command {
	var (
		keys keyFlags
		file string
		slot int
	)
	c := &cobra.Command{
		Use:   "rotate DEVICE --recovery-key FILE",
		Short: "replace a recovery key by a new one",
		Long: `rotate generates a recovery key, writes it to FILE, and puts its keyslot in the
place of the old one in a single update of the header, so that at any moment one
of the two keys opens the volume. The area of the old keyslot is overwritten. Who
has a backup of the header and the old key can still open the volume.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			var old int
			id, err := a.writeKeyslot(args[0], file, func(d *sector.Device, key []byte) (int, error) {
				var (
					id  int
					err error
				)
				id, old, err = sector.RotateRecoveryKey(c.Context(), d, keys.unsealer(a.cliLog()), slot, key, keys.open(a.cliLog()))
				keys.changed(c.Context(), d, audit.Recovery, fmt.Sprintf("rotate, now keyslot %d", id), err)
				return id, err
			})
			return a.answer(err, map[string]any{"device": args[0], "keyslot": id, "removed": old, "recovery_key": file}, "keyslot %d of %s now opens with the key in %s; keyslot %d is removed", id, args[0], file, old)
		},
	}
	keys.add(c)
	c.Flags().StringVar(&file, "recovery-key", "", "write the generated key to this new `FILE`")
	numberVar(c.Flags(), &slot, sector.OnlySlot, "keyslot", "`NUMBER` of the keyslot to replace, where there are several")
	return a.jsonFlag(c)
}

func (a *app) recoveryRemoveCommand() *cobra.Command {
	var (
		keys keyFlags
		slot int
	)
	c := &cobra.Command{
		Use:   "remove DEVICE",
		Short: "remove a recovery keyslot",
		Long: `remove takes a keyslot out of the header and overwrites its area. One of the
volume's keys has to unseal it now: the last way in is never removed.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return withHeader(args[0], false, func(d *sector.Device) error {
				id, err := sector.RemoveRecoveryKey(c.Context(), d, keys.unsealer(a.cliLog()), slot, keys.open(a.cliLog()))
				removed := "remove"
				if id != sector.OnlySlot {
					removed = fmt.Sprintf("remove keyslot %d", id)
				}
				keys.changed(c.Context(), d, audit.Recovery, removed, err)
				return a.answer(err, map[string]any{"device": args[0], "removed": id}, "keyslot %d of %s is removed", id, args[0])
			})
		},
	}
	keys.add(c)
	numberVar(c.Flags(), &slot, sector.OnlySlot, "keyslot", "`NUMBER` of the keyslot, where there are several")
	return a.jsonFlag(c)
}

func (a *app) recoveryTestCommand() *cobra.Command {
	var (
		keys keyFlags
		file string
	)
	c := &cobra.Command{
		Use:   "test DEVICE",
		Short: "tell whether a recovery key opens a volume, and change nothing",
		Long: `test reads a recovery key, from a file, from standard input, or typed, with or
without dashes, and says which keyslot it opens. A group that is mistyped is named
before anything is tried. The exit code is 2 if the key opens none. A file that has
more than the key is taken, with a warning: cryptsetup --key-file doesn't take it. So
is a keyslot that another program has made, which 'hostcryptd key add' can't use.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return withHeader(args[0], true, func(d *sector.Device) error {
				key, err := a.readRecoveryKey(file)
				if err != nil {
					return err
				}
				defer clear(key)
				id, adds, err := sector.FindRecoveryKey(c.Context(), d, key)
				keys.changed(c.Context(), d, audit.Recovery, "test", err)
				if err == nil && !adds {
					a.warnf("keyslot %d was made by another program or an old version: 'hostcryptd key add' can't use it, and 'hostcryptd recovery rotate' replaces it", id)
				}
				return a.answer(err, map[string]any{"device": args[0], "keyslot": id, "adds_keys": adds}, "the recovery key opens keyslot %d of %s", id, args[0])
			})
		},
	}
	c.Flags().StringVar(&file, "recovery-key", "", "`FILE` with the key, - for standard input (default: it is asked for)")
	keys.addAudit(c)
	return a.jsonFlag(c)
}

// readRecoveryKey reads a recovery key and brings it into its proper form. A person
// at standard input is asked for it.
func (a *app) readRecoveryKey(file string) ([]byte, error) {
	in := a.stdin
	if file == "-" && isTerminal(a.stdin) {
		file = ""
	}
	switch {
	case file == "" && !isTerminal(a.stdin):
		return nil, usagef("--recovery-key FILE says where the key is, - means standard input")
	case file == "":
		fmt.Fprint(a.stderr, "Recovery key: ")
		restore, err := hideInput(a.stdin)
		if err != nil {
			return nil, err
		}
		defer restore()
		defer fmt.Fprintln(a.stderr)
	case file != "-":
		f, err := os.Open(file)
		if err != nil {
			return nil, fmt.Errorf("recovery key: %w", err)
		}
		defer f.Close()
		in = f
	}
	var text [1024]byte
	defer clear(text[:])
	n := 0
	for n < len(text) {
		m, err := in.Read(text[n:])
		n += m
		if errors.Is(err, io.EOF) || file == "" && bytes.ContainsRune(text[:n], '\n') {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("recovery key: %w", err)
		}
	}
	key, err := sector.ParseRecoveryKey(text[:n])
	if err != nil {
		return nil, err
	}
	if info, err := in.Stat(); err == nil && info.Mode().IsRegular() && in != a.stdin && !bytes.Equal(key, text[:n]) {
		a.warnf("%s isn't the key alone as it was written, such as by a line feed at the end or without the dashes: 'cryptsetup open --key-file' doesn't take the file; without --key-file it asks for the key", file)
	}
	return key, nil
}

// hideInput keeps a terminal from showing what is typed, until restore, or a signal
// ends this process.
func hideInput(f *os.File) (restore func(), err error) {
	fd := int(f.Fd())
	before, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	show := func() { unix.IoctlSetTermios(fd, unix.TCSETS, before) }
	go func() {
		if s, ok := (<-signals).(unix.Signal); ok {
			show()
			signal.Reset(s)
			unix.Kill(os.Getpid(), s)
		}
	}()
	restore = func() {
		signal.Stop(signals)
		close(signals)
		show()
	}
	hidden := *before
	hidden.Lflag &^= unix.ECHO
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &hidden); err != nil {
		restore()
		return nil, err
	}
	return restore, nil
}
