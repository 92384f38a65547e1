package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"hostcryptd/sector"
)

func (a *app) recoveryCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "recovery",
		Short: "manage the recovery keys of a volume",
		Long: `A recovery key opens a volume without the vault and without this host. It is an
ordinary LUKS2 keyslot: cryptsetup open --key-file FILE DEVICE NAME`,
		Args: cobra.NoArgs,
	}
	c.AddCommand(a.recoveryAddCommand())
	return c
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
			if file == "" {
				return usagef("--recovery-key FILE says where the generated key goes")
			}
			d, err := sector.OpenDevice(args[0], sector.DeviceOptions{Shared: true})
			if err != nil {
				return err
			}
			defer d.Close()
			key, err := writeRecoveryKey(file)
			if err != nil {
				return err
			}
			defer clear(key)
			id, err := sector.AddRecoveryKey(c.Context(), d, keys.unsealer(a.cliLog()), key)
			if err != nil {
				err = fmt.Errorf("%s: %w", args[0], err)
				if id >= 0 {
					return fmt.Errorf("%w; the key in %s may open keyslot %d or not, 'cryptsetup open --test-passphrase' tells", err, file, id)
				}
				return errors.Join(err, removeUnused(file))
			}
			if a.json {
				return a.printJSON(map[string]any{"device": args[0], "keyslot": id, "recovery_key": file})
			}
			fmt.Fprintf(a.stdout, "keyslot %d of %s now opens with the key in %s; keep it somewhere else\n", id, args[0], file)
			return nil
		},
	}
	keys.add(c)
	c.Flags().StringVar(&file, "recovery-key", "", "write the generated key to this new `FILE`")
	return a.jsonFlag(c)
}
