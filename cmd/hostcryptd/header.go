package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

func (a *app) headerCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "header",
		Short: "back up, restore, repair and verify the header of a volume",
		Long: `The header holds the only copies of the wrapped keys: without it the data is lost.
The device has two copies of it; a backup is one more, elsewhere. Whoever has a
backup and one of the keys that were in it can open the volume, also after that
key was removed from the volume.`,
		Args: noArgs,
	}
	c.AddCommand(a.headerBackupCommand(), a.headerRestoreCommand(), a.headerRepairCommand(), a.headerVerifyCommand(), a.headerAcceptCommand(), a.headerForgetCommand(), a.headerSignCommand())
	return c
}

func twoArgs(first, second string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != 2 {
			return usagef("%s takes two arguments, %s and %s, not %d", c.CommandPath(), first, second, len(args))
		}
		return notEmpty(c, args)
	}
}

func (a *app) headerBackupCommand() *cobra.Command {
	var keys keyFlags
	c := &cobra.Command{
		Use:   "backup DEVICE FILE",
		Short: "write the header to a new file",
		Long: `backup writes both copies of the header and the keyslots to FILE, which must not
exist. It holds no key in the clear. Make a new one after each change of a key,
and keep it on another disk. The volume may be in use.`,
		Args: twoArgs("DEVICE", "FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			name := args[1]
			if name == "-" {
				return usagef("FILE is the name of a new file, not -")
			}
			return withHeader(args[0], true, func(d *sector.Device) error {
				var info sector.BackupInfo
				err := writeWhole(name, func(f *os.File) (err error) {
					info, err = sector.Backup(c.Context(), d, f)
					return err
				})
				if errors.Is(err, os.ErrExist) {
					return withCode(codeBusy, fmt.Errorf("%s exists; a backup is written to a new file", name))
				}
				keys.changed(c.Context(), d, audit.Header, "backup to "+name, err)
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"device": args[0], "file": name, "backup": info})
				}
				fmt.Fprintf(a.stdout, "%s holds the header of volume %s, generation %s; keep it on another disk\n", name, info.UUID, info.Generation)
				return nil
			})
		},
	}
	keys.addAudit(c)
	return a.jsonFlag(c)
}

// writeWhole makes a file that isn't there before all of it is on the disk. Of one that
// exists already the error is [os.ErrExist]. What interrupts it leaves a file with a
// point before the name.
func writeWhole(name string, write func(f *os.File) error) (err error) {
	if _, err := os.Lstat(name); err == nil {
		return fmt.Errorf("%s: %w", name, os.ErrExist)
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, os.ErrNotExist) { // it has its new name
			err = errors.Join(err, rerr)
		}
	}()
	if err := errors.Join(write(f), f.Sync(), f.Close()); err != nil {
		return err
	}
	for _, rename := range newNames {
		if err = rename(f.Name(), name); !unsupported(err) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return syncDir(filepath.Dir(name))
}

// newNames are the ways to rename a file to a name that is new, and never to one that
// somebody has: the later ones are for file systems that don't have those before.
var newNames = []func(from, to string) error{renameNew, linkNew, replaceOwn}

// unsupported tells whether a file system hasn't what was asked of it.
func unsupported(err error) bool {
	return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPERM)
}

func renameNew(from, to string) error {
	return unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
}

// linkNew is for NFS.
func linkNew(from, to string) error {
	if err := os.Link(from, to); err != nil {
		return err
	}
	return os.Remove(from)
}

// replaceOwn is for what has no links either, such as some of FUSE: it takes the name
// with an empty file and replaces that. A crash between the two leaves the empty one,
// and the whole one under its other name.
func replaceOwn(from, to string) error {
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Close(), os.Rename(from, to)); err != nil {
		return errors.Join(err, os.Remove(to))
	}
	return nil
}

func (a *app) headerRestoreCommand() *cobra.Command {
	var (
		keys  keyFlags
		o     sector.RestoreOptions
		force bool
	)
	c := &cobra.Command{
		Use:   "restore DEVICE FILE",
		Short: "write a backup of the header to its device",
		Long: `restore writes what 'header backup' wrote, and reads it back. The volume must not
be in use. It refuses a damaged backup, one of another volume, and one that is of
an older generation than the device or this host has seen: recovery keys and
tokens that were removed since would come back. Where the device has no readable
header any more, --uuid confirms which volume it was.`,
		Args: twoArgs("DEVICE", "FILE"),
		RunE: func(c *cobra.Command, args []string) error {
			d, err := sector.OpenDevice(args[0], sector.DeviceOptions{})
			if err != nil {
				return err
			}
			defer d.Close()
			f, err := os.Open(args[1])
			if err != nil {
				return err
			}
			defer f.Close()
			h, _, err := sector.ReadHeader(c.Context(), d)
			uuid := strings.ToLower(o.UUID)
			if err == nil {
				uuid = h.UUID
			}
			if sector.IsUUID(uuid) {
				if err := notServed(c.Context(), uuid); err != nil {
					return fmt.Errorf("%s: nothing was changed: %w; detach it first", args[0], err)
				}
			}
			if err != nil && !force {
				// No header, so what is there may be somebody else's.
				found, serr := signatures(args[0])
				if serr != nil {
					return serr
				}
				if found != "" && found != damagedSignature && found != "a hostcryptd volume" {
					return withCode(codeBusy, fmt.Errorf("%s carries %s; if that can go, use --force", args[0], found))
				}
			}
			o.Pins = keys.pinStore(a.cliLog())
			info, err := sector.Restore(c.Context(), d, f, o)
			keys.changed(c.Context(), d, audit.Header, "restore", err)
			if _, ok := errors.AsType[*sector.BackupError](err); ok {
				return fmt.Errorf("%s: %w", args[1], err)
			}
			if err != nil {
				return fmt.Errorf("%s: %w", args[0], err)
			}
			if h, _, err := sector.ReadHeader(c.Context(), d); err == nil && o.OlderGeneration {
				tokens := sector.KeyTokens(h)
				keys.hintInitramfs(args[0], info.UUID, tokens, &sector.Known{Tokens: tokens}, true)
			}
			if a.json {
				return a.printJSON(map[string]any{"device": args[0], "backup": info})
			}
			fmt.Fprintf(a.stdout, "%s has the header of volume %s, generation %s, of %s\nNext: hostcryptd check %s\n", args[0], info.UUID, info.Generation, info.Created.Format("2006-01-02 15:04:05 MST"), args[0])
			return nil
		},
	}
	c.Flags().StringVar(&o.UUID, "uuid", "", "`UUID` of the volume, where the device has no header that tells")
	c.Flags().BoolVar(&o.OlderGeneration, "older-generation", false, "restore a backup that is older than the header was last seen")
	c.Flags().BoolVar(&force, "force", false, "overwrite a device that carries another known signature")
	keys.addPins(c)
	return a.jsonFlag(c)
}

// damagedSignature is what blkid finds of a LUKS header of ours that is damaged.
const damagedSignature = "a signature of type crypto_LUKS"

func (a *app) headerRepairCommand() *cobra.Command {
	var (
		keys              keyFlags
		unverified, force bool
		save              string
	)
	c := &cobra.Command{
		Use:   "repair DEVICE",
		Short: "write the header again where it is damaged, or gone under a server",
		Long: `repair unseals the volume, to know that the good copy is authentic, and writes it
over the other one. serve does so by itself; this is for what serve leaves alone.

While the volume is served, its server does it. That needs no key, and also helps where
no good copy is left, as after a partitioner, dd or mkfs on the wrong device: the server
has the header that it has authenticated, with its keyslots, in memory, and writes all of
it back; or the keyslots alone, where only these are damaged. It brings nothing back that
hostcryptd has removed. Of a keyslot that cryptsetup has removed it knows from its last
look at the header, which it takes as often as --heartbeat says; repair tells when that
was. It's refused for a volume that was erased or is served read-only.

Where something else stands in the place of the header, --force overwrites that; of a
volume that is served only with --save FILE, which writes it to a new file first. The
volume may be named as for status then.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			s := servedAs(c.Context(), args[0])
			var hint error
			if s != nil && s.Volume.ReadOnly {
				hint = errors.New("it is served read-only, so its server can't write the header that it has in memory: copy the data while it's served")
			} else if s != nil {
				err := a.repairServed(c.Context(), s, force, save)
				if !errors.Is(err, errOtherVersion) {
					return err
				}
				hint = err
			}
			err := withHeader(args[0], false, func(d *sector.Device) error {
				unseal := keys.unsealer(a.cliLog())
				if unverified {
					unseal = nil
				}
				if save != "" {
					h, _, err := sector.ReadHeader(c.Context(), d)
					if err != nil {
						return err
					}
					if _, err := saveArea(args[0], sector.AreaSize(h), save); err != nil {
						return err
					}
				}
				what, err := sector.RepairHeader(c.Context(), d, unseal, force, keys.open(a.cliLog()))
				keys.changed(c.Context(), d, audit.Header, "repair", err)
				if err != nil {
					return err
				}
				return a.printRepaired(&repairAnswer{Device: args[0], Repaired: what, Saved: save})
			})
			if err != nil && hint != nil {
				return fmt.Errorf("%w; %w", err, hint)
			}
			return err
		},
	}
	c.Flags().BoolVar(&unverified, "unverified", false, "repair though no key can be had to tell whether the good copy is authentic")
	c.Flags().BoolVar(&force, "force", false, "overwrite what is no damaged copy but something else")
	c.Flags().StringVar(&save, "save", "", "write the place of the header, as it is, to a new `FILE` first")
	keys.add(c)
	return a.jsonFlag(c)
}

func (a *app) headerVerifyCommand() *cobra.Command {
	var (
		keys  keyFlags
		noKey bool
	)
	c := &cobra.Command{
		Use:   "verify DEVICE",
		Short: "check everything in the header that can be checked",
		Long: `verify checks both copies of the header, tries every token, checks the header's MAC,
its data key and the recovery keyslots with what each gives, and compares it with
what this host has seen before. Of keyslots that cryptsetup or an earlier version has
made, and with --no-key of all, it only sees that they can be read. It changes
nothing, and ends with 19 if it found something.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return withHeader(args[0], true, func(d *sector.Device) error {
				unseal := keys.unsealer(a.cliLog())
				if noKey {
					unseal = nil
				}
				r, err := sector.Verify(c.Context(), d, unseal, keys.open(a.cliLog()))
				if err != nil {
					return err
				}
				if a.json {
					err = a.printJSON(map[string]any{"device": args[0], "uuid": r.Header.UUID, "findings": append([]string{}, r.Findings...)})
				} else {
					for _, f := range r.Findings {
						fmt.Fprintln(a.stdout, printable(f))
					}
					if len(r.Findings) == 0 {
						fmt.Fprintf(a.stdout, "the header of volume %s is good\n", r.Header.UUID)
						for _, text := range slotsTexts(r.Intact, r.Noted, r.Unknown) {
							fmt.Fprintln(a.stdout, text)
						}
					}
				}
				return errors.Join(err, foundErrors(len(r.Findings)))
			})
		},
	}
	c.Flags().BoolVar(&noKey, "no-key", false, "check only what can be checked without a key")
	keys.add(c)
	return a.jsonFlag(c)
}

// foundErrors is the error of a check with findings.
func foundErrors(n int) error {
	switch n {
	case 0:
		return nil
	case 1:
		return withCode(codeCheck, errors.New("the check found an error"))
	}
	return withCode(codeCheck, fmt.Errorf("the check found %d errors", n))
}

func (a *app) headerSignCommand() *cobra.Command {
	var (
		keys keyFlags
		spec string
	)
	c := &cobra.Command{
		Use:   "sign DEVICE --sign KEY",
		Short: "let a vault's key sign the volume",
		Long: `An RSA key wraps for everybody who has its public part, so a header can be forged
whole. A host that has seen the volume before notices. So does one that sees it for
the first time, if it's given the public part of a key that has signed the volume:
commands and serve with --signer FILE refuse a volume without a good signature,
with exit code 16.

sign unseals the volume, lets KEY, an RSA key in a vault, sign which volume key it
has (PS256; permissions get and sign), checks that, and writes it to the header.
The public key is written to the file of --signer if that doesn't exist. A key that
may only sign, in another vault than the one that unwraps, is best. The signature
stays good when keys are added, removed or rewrapped; that an older header was put
back it doesn't tell.`,
		Example: `  hostcryptd header sign /dev/sdb --sign https://VAULT.vault.azure.net/keys/SIGN --signer signer.pem
  hostcryptd serve /dev/sdb --signer signer.pem --attach auto`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			if spec == "" {
				return usagef("--sign KEY says which key signs: https://VAULT.vault.azure.net/keys/NAME")
			}
			log := a.cliLog()
			sign, commit := keys.signing(spec, log)
			return withHeader(args[0], false, func(d *sector.Device) error {
				err := sector.Sign(c.Context(), d, keys.unsealer(log), sign, keys.open(log))
				keys.changed(c.Context(), d, audit.Header, "sign with "+spec, err)
				if err == nil {
					err = commit()
				}
				return a.answer(err, map[string]any{"device": args[0], "signed_by": spec}, "%s is signed by %s", args[0], spec)
			})
		},
	}
	c.Flags().StringVar(&spec, "sign", "", "`KEY` that signs: https://VAULT.vault.azure.net/keys/NAME[/VERSION]")
	keys.add(c)
	return a.jsonFlag(c)
}

func (a *app) headerAcceptCommand() *cobra.Command {
	var (
		keys     keyFlags
		yes      string
		recovery string
	)
	c := &cobra.Command{
		Use:   "accept DEVICE",
		Short: "trust a header that this host has refused",
		Long: `This host remembers which volume key a volume has, and the highest generation of
its header that it has seen. A header with another key, or of an older generation,
is refused with exit code 16. accept unseals the header as it is, and replaces what
the host remembers. Do so only if you know why it is another: who can write to the
disk could have forged it, or put back an old one with a key that you removed. While
the volume is served, its server is told, and trusts an older generation too; a header
with another key it refuses as long as it runs.

Where no key unseals it, --recovery-key does.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return withHeader(args[0], true, func(d *sector.Device) error {
				h, _, err := sector.ReadHeader(c.Context(), d)
				if err != nil {
					return err
				}
				if err := a.confirmUUID("makes the header on "+args[0]+" the one that this host trusts", "--yes", yes, h.UUID); err != nil {
					return err
				}
				var (
					before *sector.Pin
					now    sector.Pin
					by     = "accept"
				)
				if recovery != "" {
					key, kerr := a.readRecoveryKey(recovery)
					if kerr != nil {
						return kerr
					}
					defer clear(key)
					by += " by recovery key"
					before, now, err = sector.AcceptByRecovery(c.Context(), d, key, keys.open(a.cliLog()))
				} else {
					before, now, err = sector.Accept(c.Context(), d, keys.unsealer(a.cliLog()), keys.open(a.cliLog()))
				}
				keys.accepted, keys.repinned = true, before == nil || *before != now
				keys.changed(c.Context(), d, audit.Header, by, err)
				if _, sealed := errors.AsType[*keyunseal.Error](err); sealed {
					err = fmt.Errorf("%w; before that, 'hostcryptd header accept --recovery-key' makes this host trust the header", err)
				}
				if err != nil {
					return err
				}
				if a.json {
					return a.printJSON(map[string]any{"device": args[0], "uuid": h.UUID, "generation": now.Generation, "fingerprint": now.Fingerprint, "before": before})
				}
				fmt.Fprintf(a.stdout, "volume %s: this host now trusts generation %d, key %.16s\n", h.UUID, now.Generation, now.Fingerprint)
				if before != nil {
					fmt.Fprintf(a.stdout, "before it was generation %d, key %.16s\n", before.Generation, before.Fingerprint)
				}
				return nil
			})
		},
	}
	c.Flags().StringVar(&yes, "yes", "", "confirm with the `UUID` of the volume")
	c.Flags().StringVar(&recovery, "recovery-key", "", "`FILE` with a recovery key that opens the volume instead of its keys, - for standard input")
	keys.add(c)
	return a.jsonFlag(c)
}

func (a *app) headerForgetCommand() *cobra.Command {
	var keys keyFlags
	c := &cobra.Command{
		Use:   "forget UUID",
		Short: "forget what this host remembers of a volume that is gone",
		Long: `erase forgets the volume that it erases, as long as a header says which one that
is. forget is for a volume whose disk is gone, or whose erase was interrupted. It
removes what this host remembers, in a file and in the TPM, and nothing else. If the
volume should come back, it's one that this host has never seen: whatever header it
has is trusted at first sight.`,
		Args: oneArg("UUID"),
		RunE: func(c *cobra.Command, args []string) error {
			uuid, err := volumeUUID(args[0])
			if err != nil {
				return withCode(codeUsage, err)
			}
			if err := notServed(c.Context(), uuid); err != nil {
				return fmt.Errorf("nothing was changed: %w", err)
			}
			file, chip, err := keys.pinStore(a.cliLog()).Remove(uuid)
			keys.recordChange(audit.Header, uuid, "forget", err)
			if err != nil {
				return err
			}
			if a.json {
				return a.printJSON(map[string]any{"uuid": uuid, "pin_removed": file, "tpm_pin_removed": chip})
			}
			switch {
			case file && chip:
				fmt.Fprintf(a.stdout, "this host and its TPM have forgotten volume %s\n", uuid)
			case file || chip:
				fmt.Fprintf(a.stdout, "this host has forgotten volume %s\n", uuid)
			default:
				fmt.Fprintf(a.stdout, "this host remembers no volume %s\n", uuid)
			}
			return nil
		},
	}
	keys.addPins(c)
	return a.jsonFlag(c)
}
