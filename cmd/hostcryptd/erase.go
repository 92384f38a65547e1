package main

import (
	"bufio"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

func (a *app) eraseCommand() *cobra.Command {
	var (
		keys  keyFlags
		yes   string
		force bool
	)
	c := &cobra.Command{
		Use:   "erase DEVICE",
		Short: "destroy every way into a volume, for ever",
		Long: `erase overwrites both copies of the header with all tokens, and the keyslots, with
random bytes and then zeros, reads that back, discards the area where the device
can do that, and forgets what this host remembers of the volume, in a file and in
the TPM. Without them the data is noise, whatever keys anybody has. The data itself
is not touched. The volume must not be in use.

Out of its reach are backups of the header, copies and snapshots of the disk, and
blocks that the disk itself has set aside. If there may be such, disable or delete
the key in the vault too; for a key of the TPM, clear the TPM.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := sector.OpenDevice(args[0], sector.DeviceOptions{})
			if err != nil {
				return err
			}
			defer d.Close()
			uuid := strings.ToLower(yes)
			h, _, err := sector.ReadHeader(c.Context(), d)
			if err == nil {
				if err := a.confirmUUID("This destroys volume "+h.UUID+" on "+args[0]+" for ever.", "--yes-erase", yes, h.UUID); err != nil {
					return err
				}
				uuid = h.UUID
			} else if !force || yes == "" {
				return fmt.Errorf("%s: %w; to overwrite the place of the header all the same, use --force and --yes-erase UUID", args[0], err)
			} else if err := notForeign(args[0], uuid); err != nil {
				return err
			}
			done, err := sector.Erase(c.Context(), d, uuid, force)
			keys.recordChange(audit.Erase, uuid, args[0], err)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			// Only a header shows that the volume named is the one that is gone now.
			var pin, chip bool
			if done.UUID != "" {
				if pin, chip, err = keys.pinStore(a.cliLog()).Remove(done.UUID); err != nil {
					err = fmt.Errorf("%s is erased, but not what this host remembers of it: %w", args[0], err)
				}
			}
			if a.json {
				return errors.Join(err, a.printJSON(map[string]any{
					"device": args[0], "uuid": done.UUID, "bytes": done.Bytes, "discarded": done.Discarded, "pin_removed": pin, "tpm_pin_removed": chip,
					"out_of_reach": eraseOutOfReach,
				}))
			}
			fmt.Fprintf(a.stdout, "%s is erased: %s overwritten and read back", args[0], bytesText(uint64(done.Bytes)))
			if done.Discarded {
				fmt.Fprint(a.stdout, ", and discarded")
			}
			if chip {
				fmt.Fprint(a.stdout, "\nThe TPM has forgotten it")
			}
			fmt.Fprintln(a.stdout, "\nOut of reach of this command:")
			for _, what := range eraseOutOfReach {
				fmt.Fprintln(a.stdout, "  "+what)
			}
			return err
		},
	}
	c.Flags().StringVar(&yes, "yes-erase", "", "don't ask; erase the volume with this `UUID`")
	c.Flags().BoolVar(&force, "force", false, "erase the place of the header though there is no readable one, as after an interrupted erase")
	keys.addPins(c)
	return a.jsonFlag(c)
}

// notForeign refuses a device that carries something else than what is left of
// the volume.
func notForeign(device, uuid string) error {
	found, err := probe(device)
	if err != nil {
		return err
	}
	what := describeSignature(found)
	if what == "" || found["TYPE"] == "crypto_LUKS" && found["SUBSYSTEM"] == sector.Subsystem && found["UUID"] == uuid {
		return nil
	}
	return withCode(codeBusy, fmt.Errorf("%s carries %s, not volume %s; nothing was changed; if it can go, remove it with 'wipefs --all' first", device, what, uuid))
}

// eraseOutOfReach is what erase can't destroy.
var eraseOutOfReach = []string{
	"backups of the header, made by hostcryptd or cryptsetup",
	"copies and snapshots of the disk or image",
	"the key in the vault and its backups, and the host key file, which other volumes may need",
	"the TPM's storage key, with which a backup of the header still opens on this host until the TPM is cleared",
	"blocks that the disk has remapped or not yet erased",
}

// confirmUUID asks a person for the UUID of the volume; flag is the other way to
// say it, and said what it said.
func (a *app) confirmUUID(what, flag, said, uuid string) error {
	if said == "" {
		if !isTerminal(a.stdin) {
			return usagef("%s Confirm with %s %s", what, flag, uuid)
		}
		fmt.Fprintf(a.stderr, "%s\nType its UUID, %s, to go on: ", what, uuid)
		line, err := bufio.NewReader(a.stdin).ReadString('\n')
		if err != nil {
			return usagef("not confirmed; nothing was changed")
		}
		said = strings.TrimSpace(line)
	}
	if !strings.EqualFold(said, uuid) {
		return withCode(codeDevice, fmt.Errorf("%q is not the UUID of the volume, %s; nothing was changed", said, uuid))
	}
	return nil
}
