package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

func (a *app) formatCommand() *cobra.Command {
	var (
		keys                       keyFlags
		key, label, uuid, recovery string
		signKey                    string
		sectorSize                 int
		yes, force                 bool
	)
	c := &cobra.Command{
		Use:   "format DEVICE",
		Short: "make a device an encrypted volume",
		Long: `format writes a LUKS2 header with new keys to DEVICE, a block device or an image
file. What was on it is lost. A device that carries a known signature, such as a
file system or a partition table, is refused without --force.

The volume key is wrapped by the key that --key names, and unwrapped again before
anything is written:

  platform      the TPM if this host has one, else a host key file, made at first use
  tpm           the TPM, while PCR 7 (Secure Boot) holds what it holds now
  tpm:7+11      the same with other PCRs
  host-key      the host key file, also on a host with a TPM; host-key:FILE is another one
  https://...   a key in Azure Key Vault (RSA) or a Managed HSM (RSA, AES)

When the state of a PCR changes, as PCR 7 does with the keys of Secure Boot, the
TPM doesn't unwrap any more. So a volume with a TPM's key wants a recovery key.

Without a recovery key, losing the key means losing the data. With
--recovery-key FILE one is generated and written to FILE, and cryptsetup opens the
volume with it: cryptsetup open --key-file FILE DEVICE NAME`,
		Example: `  hostcryptd format /dev/sdb --recovery-key sdb.recovery
  hostcryptd format /dev/sdb --key https://VAULT.vault.azure.net/keys/NAME --yes`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			device := args[0]
			d, err := sector.OpenDevice(device, sector.DeviceOptions{})
			if err != nil {
				return missingFile(err)
			}
			defer d.Close()
			found, err := signatures(device)
			if err != nil && !force {
				return err
			}
			if found != "" && !force {
				return withCode(codeBusy, fmt.Errorf("%s carries %s; if that can go, use --force", device, found))
			}
			pins := keys.pinStore(a.cliLog())
			was, err := formatMay(c.Context(), d, pins, strings.ToLower(uuid))
			if err != nil {
				return fmt.Errorf("%s: nothing was changed: %w", device, err)
			}
			if sectorSize != 512 && sectorSize != 4096 {
				return usagef("--sector-size is 512 or 4096, not %d", sectorSize)
			}
			if !yes {
				if err := a.confirm(device, uint64(d.Size())); err != nil {
					return err
				}
			}
			if n := d.AtomicSize(); n != 0 && sectorSize > n {
				a.warnf("sectors of %d bytes on a disk that writes %d at a time: a power cut can leave a sector half old and half new, as it can a block of a file system on the plain disk; --sector-size %d avoids it", sectorSize, n, n)
			}

			o := sector.FormatOptions{
				UUID: uuid, Label: label, SectorSize: sectorSize, Pins: pins,
				Seal: []sector.Sealer{keys.sealer(key, a.cliLog())},
			}
			commitSigner := func() error { return nil }
			if signKey != "" {
				o.Sign, commitSigner = keys.signing(signKey, a.cliLog())
			} else if keys.signer != "" {
				return usagef("--signer is about a signature, which --sign KEY makes")
			}
			o.Trusted = keys.trusted
			if recovery != "" {
				if o.RecoveryKey, err = writeRecoveryKey(recovery); err != nil {
					return err
				}
				defer clear(o.RecoveryKey)
			}
			if force && found != "" {
				o.BeforeWrite = func() error { return wipeSignatures(device) }
			}
			defer a.watchHostKey(cmp.Or(keyunseal.OtherHostKey(key), keys.hostKey))()
			h, err := sector.Format(c.Context(), d, o)
			if h != nil {
				keys.recordChange(audit.Format, h.UUID, device, err)
			} else {
				keys.recordChange(audit.Format, uuid, device, err)
			}
			if err != nil && h == nil {
				return errors.Join(fmt.Errorf("%s: %w", device, err), removeUnused(recovery))
			}
			if err != nil {
				a.warnf("%s: %v; the first host that opens the volume will trust what it finds", device, err)
			}
			if was != "" && was != h.UUID {
				// Not forgotten by itself: what was there may have been a copy.
				if known, err := pins.Load(was); known != nil || err != nil {
					a.warnf("this host still remembers volume %s, which was on %s; if that was its only disk, 'hostcryptd header forget %s' removes that", was, device, was)
				}
			}
			hintFormatted(device, h.UUID)
			return errors.Join(a.printFormatted(device, h, &keys, recovery), commitSigner())
		},
	}
	f := c.Flags()
	f.StringVar(&key, "key", keyunseal.SpecPlatform, "`KEY` that wraps the volume key: "+keySpecs)
	keys.add(c)
	f.IntVar(&sectorSize, "sector-size", 4096, "size of an encrypted sector in `BYTES`, 512 or 4096")
	f.StringVar(&label, "label", "", "`NAME` of the volume, for people")
	f.StringVar(&uuid, "uuid", "", "`UUID` of the volume (default: a random one)")
	f.StringVar(&signKey, "sign", "", "let this `KEY` of a vault sign the volume, so that hosts with its public key know it: https://VAULT.vault.azure.net/keys/NAME, RSA; the public key is written to the file of --signer")
	f.StringVar(&recovery, "recovery-key", "", "write a generated recovery key to this new `FILE`, exactly as cryptsetup --key-file takes it")
	f.BoolVar(&yes, "yes", false, "don't ask for confirmation")
	f.BoolVar(&force, "force", false, "overwrite a device that carries a known signature")
	return a.jsonFlag(c)
}

// formatMay returns an error if a volume would be lost that isn't what is on d, or one
// that is served, from wherever. It returns the UUID of the one that is there, or "".
func formatMay(ctx context.Context, d *sector.Device, pins sector.Pins, uuid string) (was string, err error) {
	h, _, err := sector.ReadHeader(ctx, d)
	if err == nil && sector.IsUUID(h.UUID) {
		was = h.UUID
		if err := notServed(ctx, was); err != nil {
			return "", fmt.Errorf("it holds the header of that volume: %w; if it's a copy of that, 'hostcryptd erase --copy' destroys it", err)
		}
	}
	if !sector.IsUUID(uuid) || uuid == was {
		return was, nil // Format judges what is no UUID
	}
	if err := notServed(ctx, uuid); err != nil {
		return "", err
	}
	known, err := pins.Load(uuid)
	if known != nil || err != nil && !errors.Is(err, sector.ErrNoPins) {
		return "", withCode(codeBusy, errors.Join(fmt.Errorf("this host knows a volume %s already, and would take that one for a forgery from now on; if it is gone, 'hostcryptd header forget %s' says so", uuid, uuid), err))
	}
	return was, nil
}

// confirm asks a person, who has to type the device's name.
func (a *app) confirm(device string, size uint64) error {
	if !isTerminal(a.stdin) {
		return usagef("%s would lose its content: confirm with --yes", device)
	}
	fmt.Fprintf(a.stderr, "This destroys what is on %s, %s.\nType its name to go on: ", device, bytesText(size))
	line, err := bufio.NewReader(a.stdin).ReadString('\n')
	if err != nil || strings.TrimSpace(line) != device {
		return usagef("not confirmed; nothing was changed")
	}
	return nil
}

// signatures asks blkid what is on a device, and returns words for it, or "".
func signatures(device string) (string, error) {
	values, err := probe(device)
	if err != nil {
		return "", err
	}
	return describeSignature(values), nil
}

// probe asks blkid what is on a device, and returns its values by name. Where
// several things were found that exclude each other, TYPE is "several".
func probe(device string) (map[string]string, error) {
	cmd := exec.Command(tool("blkid"), "--probe", "--output", "export", "--", device)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		switch exit.ExitCode() {
		case 2: // nothing was found
			return nil, nil
		case 8: // blkid(8): several things were found
			return map[string]string{"TYPE": "several"}, nil
		}
	}
	if err != nil {
		return nil, withCode(codeUsage, fmt.Errorf("%s: looking for signatures with blkid (package util-linux): %w %s; --force goes on without", device, err, bytes.TrimSpace(stderr.Bytes())))
	}
	return parseExport(string(out)), nil
}

// parseExport takes blkid's NAME=value lines apart.
func parseExport(text string) map[string]string {
	values := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			values[name] = value
		}
	}
	return values
}

// describeSignature makes words of blkid's values, or "" of none.
func describeSignature(values map[string]string) string {
	var what string
	switch {
	case values["TYPE"] == "several":
		return "several conflicting signatures"
	case values["TYPE"] == "crypto_LUKS" && values["SUBSYSTEM"] == sector.Subsystem:
		what = "a hostcryptd volume"
	case values["USAGE"] == "filesystem":
		what = "a file system of type " + values["TYPE"]
	case values["TYPE"] != "":
		what = "a signature of type " + values["TYPE"]
	case values["PTTYPE"] != "":
		what = "a partition table of type " + values["PTTYPE"]
	case len(values) > 1 || values["DEVNAME"] == "" && len(values) > 0:
		what = "a signature that blkid knows"
	default:
		return ""
	}
	for _, name := range []string{"LABEL", "UUID"} {
		if v := values[name]; v != "" {
			what += fmt.Sprintf(" (%s %s)", strings.ToLower(name), v)
			break
		}
	}
	return what
}

// wipeSignatures removes all signatures, also those behind the header.
func wipeSignatures(device string) error {
	out, err := exec.Command(tool("wipefs"), "--all", "--force", "--quiet", "--", device).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: wiping signatures with wipefs: %w: %s", device, err, bytes.TrimSpace(out))
	}
	return nil
}

// tool finds a program of the system administrator's, whose directories are
// not in everybody's PATH.
func tool(name string) string {
	if path, err := exec.LookPath(name); err == nil {
		return path
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if path := filepath.Join(dir, name); isExecutable(path) {
			return path
		}
	}
	return name
}

func isExecutable(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}

// writeRecoveryKey generates a recovery key and makes sure that it is on disk
// before a volume depends on it.
func writeRecoveryKey(name string) ([]byte, error) {
	if name == "-" {
		return nil, usagef("--recovery-key takes the name of a new file, not -")
	}
	key := sector.NewRecoveryKey()
	err := writeNew(name, key, 0o600)
	if errors.Is(err, os.ErrExist) {
		return nil, withCode(codeBusy, fmt.Errorf("%s exists; a recovery key is written to a new file; if this one is of a command that was interrupted, 'hostcryptd recovery test DEVICE --recovery-key %s' tells whether it opens the volume", name, name))
	}
	if err != nil {
		return nil, fmt.Errorf("recovery key: %w", err)
	}
	return key, nil
}

// writeNew makes a file, and puts it on the disk. After an error it isn't there,
// unless it was before.
func writeNew(name string, content []byte, mode os.FileMode) error {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		err = errors.Join(err, os.Remove(name))
	}
	return err
}

// removeUnused removes the file of a recovery key that opens nothing.
func removeUnused(name string) error {
	if name == "" {
		return nil
	}
	return os.Remove(name)
}

// syncDir flushes the names in a directory. A file system that has nothing for that, such
// as some of those in user space, isn't asked for more than it can.
func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := fsyncDir(d); !unsupported(err) {
		return err
	}
	return nil
}

var fsyncDir = (*os.File).Sync

// printFormatted tells what was made, and what to do with it.
func (a *app) printFormatted(device string, h *luks2.Header, keys *keyFlags, recovery string) error {
	if a.json {
		return a.printJSON(map[string]any{
			"device": device, "uuid": h.UUID, "label": h.Label,
			"sector_size": h.Segments[0].SectorSize, "recovery_key": recovery,
			"tokens": tokenInfos(h),
		})
	}
	fmt.Fprintf(a.stdout, "%s is now a hostcryptd volume\n", device)
	fmt.Fprintf(a.stdout, "  UUID:         %s\n", h.UUID)
	if h.Label != "" {
		fmt.Fprintf(a.stdout, "  label:        %s\n", h.Label)
	}
	fmt.Fprintf(a.stdout, "  sector size:  %d bytes\n", h.Segments[0].SectorSize)
	for _, t := range tokenInfos(h) {
		if t.Key != nil {
			fmt.Fprintf(a.stdout, "  key:          %s\n", t.Key.text())
		}
	}
	if recovery != "" {
		fmt.Fprintf(a.stdout, "  recovery key: %s; keep it somewhere else\n", recovery)
	} else {
		a.warnf("there is no recovery key: if the key is lost, so is the data; 'hostcryptd recovery add %s' makes one", device)
	}
	next := "hostcryptd serve " + device
	if slices.ContainsFunc(tokenInfos(h), func(t tokenInfo) bool { return t.Type == keyunseal.TypeHostKey }) {
		fmt.Fprintln(a.stdout, "The host key protects a disk that is lost without this host. Keep the host key file off this disk.")
		if keys.hostKey != keyunseal.DefaultHostKey {
			next += " --host-key " + keys.hostKey
		}
	}
	fmt.Fprintf(a.stdout, "What was in the data area before is still there until it is overwritten.\nNext: %s --attach auto\n", next)
	return nil
}
