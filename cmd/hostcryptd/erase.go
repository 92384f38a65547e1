package main

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

func (a *app) eraseCommand() *cobra.Command {
	var (
		keys   keyFlags
		yes    string
		force  bool
		inUse  bool
		copied bool
	)
	c := &cobra.Command{
		Use:   "erase DEVICE",
		Short: "destroy every way into a volume, for ever",
		Long: `erase overwrites both copies of the header with all tokens, and the keyslots, with
random bytes and then zeros, reads that back, discards the area where the device
can do that, and forgets what this host remembers of the volume, in a file and in
the TPM. Without them the data is noise, whatever keys anybody has. The data itself
is not touched.

A volume that is in use is refused, unless --in-use says to stop it now, whoever uses
it: its server lets requests fail, flushes what was answered, wipes the keys, and then
erases the volume. It goes on running, and says so in its status, until it's detached.

A copy of a volume, which stays, is erased with --copy: this host goes on knowing the
volume, as it does, also with --in-use, where its table or its devices show that there
is another, or may be. Where it's being served, from another device, DEVICE is refused
without that.

Out of its reach are backups of the header, copies and snapshots of the disk, and
blocks that the disk itself has set aside. If there may be such, disable or delete
the key in the vault too; for a key of the TPM, clear the TPM.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			if inUse && copied {
				return usagef("--in-use is about the volume itself, --copy about a copy of it")
			}
			if inUse {
				return a.eraseInUse(c.Context(), args[0], yes)
			}
			d, err := sector.OpenDevice(args[0], sector.DeviceOptions{})
			if exitCode(err) == codeBusy {
				return fmt.Errorf("%w, and --in-use stops and erases that", err)
			}
			if err != nil {
				return err
			}
			defer d.Close()
			uuid := strings.ToLower(yes)
			h, _, err := sector.ReadHeader(c.Context(), d)
			if err == nil {
				if err := a.confirmUUID("destroys volume "+h.UUID+" on "+args[0]+" for ever", "--yes-erase", yes, h.UUID); err != nil {
					return err
				}
				uuid = h.UUID
			} else if !force || yes == "" {
				return fmt.Errorf("%s: %w; to overwrite the place of the header all the same, use --force and --yes-erase UUID", args[0], err)
			} else if err := notForeign(args[0], uuid); err != nil {
				return err
			}
			if sector.IsUUID(uuid) && !copied {
				if err := notServed(c.Context(), uuid); err != nil {
					return fmt.Errorf("%s: nothing was changed: %w; if this is another disk, with a copy of the volume, --copy erases it", args[0], err)
				}
			}
			// Before udev notices that it's gone.
			elsewhere, there := "", false
			if h != nil && !copied {
				elsewhere, there = volumeElsewhere(c.Context(), eraseTab(), byUUID, d, uuid, false)
			}
			done, err := sector.Erase(c.Context(), d, uuid, force)
			keys.recordChange(audit.Erase, uuid, args[0], err)
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			// Only a header shows that the volume named is the one that is gone now.
			answer := &eraseAnswer{Device: args[0], UUID: done.UUID, Bytes: done.Bytes, Discarded: done.Discarded, OutOfReach: eraseOutOfReach}
			pins := keys.pinStore(a.cliLog())
			if done.UUID != "" && !copied && elsewhere == "" {
				if answer.Pin, answer.Chip, err = pins.Remove(done.UUID); err != nil {
					err = fmt.Errorf("%s is erased, but not what this host remembers of it: %w; 'hostcryptd header forget' removes that", args[0], err)
				}
			} else if known, perr := pins.Load(uuid); known != nil || perr != nil {
				answer.Kept, answer.Elsewhere, answer.There = uuid, elsewhere, there
			}
			return errors.Join(err, a.printErased(answer))
		},
	}
	c.Flags().StringVar(&yes, "yes-erase", "", "don't ask; erase the volume with this `UUID`")
	c.Flags().BoolVar(&force, "force", false, "erase the place of the header though there is no readable one, as after an interrupted erase, or one that has nothing of a volume's")
	c.Flags().BoolVar(&inUse, "in-use", false, "stop the server of the volume, which may be named as for status, and erase it")
	c.Flags().BoolVar(&copied, "copy", false, "DEVICE holds a copy of the volume, which stays: keep what this host remembers of it")
	c.MarkFlagsMutuallyExclusive("in-use", "force")
	keys.addPins(c)
	return a.jsonFlag(c)
}

// An eraseAnswer is what erase has done.
type eraseAnswer struct {
	Device     string   `json:"device"`
	UUID       string   `json:"uuid"` // of the header that was there, or ""
	Bytes      int64    `json:"bytes"`
	Discarded  bool     `json:"discarded"`
	Pin        bool     `json:"pin_removed"`
	Chip       bool     `json:"tpm_pin_removed"`
	Kept       string   `json:"pin_kept,omitempty"`       // UUID of a volume that this host still remembers
	Elsewhere  string   `json:"elsewhere,omitempty"`      // where that one is, or may be
	There      bool     `json:"elsewhere_read,omitempty"` // it was seen there
	OutOfReach []string `json:"out_of_reach"`
}

// eraseTab is the table that says where the volumes of this host are.
func eraseTab() string { return cmp.Or(os.Getenv(initramfsTab), tabFile) }

// volumeElsewhere says where this host has a volume that is not the one on d, by a line
// of its table or by udev's links, or "", and whether it was seen there. The UUID of a
// header that is to be erased may have been written into it to have this host forget
// another volume, which it would then trust at first sight; authentic says that it is
// d's own. That a line means the volume, wherever it is, then tells of no other device.
func volumeElsewhere(ctx context.Context, tab, links string, d *sector.Device, uuid string, authentic bool) (where string, there bool) {
	device := fmt.Sprintf("/proc/self/fd/%d", d.Descriptor())
	entries, _, err := readTab(tab)
	if err != nil {
		entries = nil
	}
	for _, e := range entries {
		if e.randomKey() || sameFile(e.unit.Device, device) {
			continue
		}
		h, err := readTokens(ctx, e.unit.Device)
		switch {
		case err == nil && h.uuid == uuid:
			return e.unit.Device, true
		case err != nil && e.flag("uuid") == uuid && !(authentic && strings.HasPrefix(e.unit.Device, links)):
			where = e.unit.Device
		}
	}
	link := filepath.Join(links, uuid)
	if target, err := filepath.EvalSymlinks(link); err == nil && !sameFile(link, device) {
		return target, true
	}
	return where, false
}

func (a *app) printErased(e *eraseAnswer) error {
	if a.json {
		return a.printJSON(e)
	}
	fmt.Fprintf(a.stdout, "%s is erased: %s overwritten and read back", e.Device, bytesText(uint64(e.Bytes)))
	if e.Discarded {
		fmt.Fprint(a.stdout, ", and discarded")
	}
	if e.Chip {
		fmt.Fprint(a.stdout, "\nThe TPM has forgotten it")
	}
	if e.Elsewhere != "" && e.Kept != "" {
		is := "is"
		if !e.There {
			is = "can't be read now, and by the table may be"
		}
		fmt.Fprintf(a.stdout, "\n%s %s volume %s too, so this host still remembers it;\n'hostcryptd header forget %s' removes that", e.Elsewhere, is, e.Kept, e.Kept)
	} else if e.Kept != "" && e.UUID != "" {
		fmt.Fprintf(a.stdout, "\nIt was a copy, so this host still remembers volume %s", e.Kept)
	} else if e.Kept != "" {
		fmt.Fprintf(a.stdout, "\nNothing there said which volume it was, so this host still remembers volume %s;\n'hostcryptd header forget %s' removes that", e.Kept, e.Kept)
	}
	fmt.Fprintln(a.stdout, "\nOut of reach of this command:")
	for _, what := range e.OutOfReach {
		fmt.Fprintln(a.stdout, "  "+what)
	}
	return nil
}

// eraseInUse has the server of a volume erase it.
func (a *app) eraseInUse(ctx context.Context, which, yes string) error {
	s, err := theOne(ctx, which)
	if err != nil {
		return err
	}
	if err := a.confirmUUID("stops volume "+s.UUID+" on "+s.Device+", which is in use, and destroys it for ever", "--yes-erase", yes, s.UUID); err != nil {
		return err
	}
	var answer eraseAnswer
	if err := newControlClient(s.Control).do(ctx, "POST", "/v1/erase?uuid="+url.QueryEscape(s.UUID), &answer); err != nil {
		return err
	}
	return a.printErased(&answer)
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
	"blocks that the disk has remapped or not yet erased, and swap that isn't encrypted, if the server's memory was there",
}

// confirmUUID asks a person for the UUID of the volume, because of what this does; flag
// is the other way to say it, and said what it said.
func (a *app) confirmUUID(what, flag, said, uuid string) error {
	if said == "" {
		if !isTerminal(a.stdin) {
			return usagef("this %s; confirm with %s %s", what, flag, uuid)
		}
		fmt.Fprintf(a.stderr, "This %s.\nType its UUID, %s, to go on: ", what, uuid)
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
