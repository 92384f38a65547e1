package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

// keySpecs lists what --key takes, for help and errors.
const keySpecs = "platform, tpm, tpm:PCR+PCR, host-key, host-key:FILE, or https://VAULT.vault.azure.net/keys/NAME[/VERSION]"

// keyFlags are the flags that say how KEKs are reached, and where this host
// remembers its volumes.
type keyFlags struct {
	hostKey  string
	otherKey string // another host key file, see keyunseal.Options.OtherHostKey; no flag
	tpm      string
	identity string
	cloud    string
	pins     string
	signer   string
	auditLog string

	trusted []sector.TrustedKey // of signer

	header   *sector.Known     // that a command has just written
	before   []sector.KeyToken // that were in the header before
	accepted bool              // header was not written, but accepted
	repinned bool              // and it was another one than this host had trusted
	hinted   bool              // what has to be done with the initramfs was said

	// How to write it, see audit.go.
	queue       *audit.Queue
	auditFailed *sync.Once
}

func (k *keyFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&k.hostKey, "host-key", keyunseal.DefaultHostKey, "`FILE` with the host key")
	c.Flags().StringVar(&k.identity, "identity", "", "`WHO` asks the vault: managed, managed:CLIENT-ID, managed-object:ID, managed-resource:ID, arc, workload:TENANT:CLIENT-ID[:FILE], or certificate:TENANT:CLIENT-ID:FILE (default: what the token was sealed with, else managed)")
	c.Flags().StringVar(&k.cloud, "cloud", "", "`FILE` that describes a private cloud (default: "+keyunseal.DefaultCloud+", if it exists)")
	c.Flags().StringVar(&k.signer, "signer", "", "`FILE` with public keys in PEM, of which one must have signed the volume (see 'hostcryptd header sign')")
	c.PreRunE = func(c *cobra.Command, _ []string) error {
		err := k.readSigner()
		if c.Flags().Lookup("sign") != nil && errors.Is(err, fs.ErrNotExist) {
			return nil // it will be made
		}
		return err
	}
	k.addPins(c)
}

// addAudit adds the flag of a command whose doings are recorded.
func (k *keyFlags) addAudit(c *cobra.Command) {
	k.auditFailed = new(sync.Once)
	c.Flags().StringVar(&k.auditLog, "audit-log", "", "`FILE` with the log of key use, or none (default: $HOSTCRYPTD_AUDIT_LOG, else "+audit.DefaultFile+")")
}

// addPins adds the flags for a command that needs no KEK.
func (k *keyFlags) addPins(c *cobra.Command) {
	k.addAudit(c)
	c.Flags().StringVar(&k.tpm, "tpm", "", "`PATH` of the TPM's device, or of a software TPM's socket, or none (default: $HOSTCRYPTD_TPM, else "+keyunseal.DefaultTPM+", if this host has it)")
	c.Flags().StringVar(&k.pins, "pins", "", "`DIRECTORY` where this host remembers the headers of its volumes, beside the TPM (default: $HOSTCRYPTD_PINS, else "+string(sector.DefaultPins)+")")
}

// pinDir is where this host keeps its pins.
func (k *keyFlags) pinDir() sector.PinDir {
	for _, dir := range []string{k.pins, os.Getenv("HOSTCRYPTD_PINS")} {
		if dir != "" {
			return sector.PinDir(dir)
		}
	}
	// An ordinary user can't write to the host's.
	if home, err := os.UserHomeDir(); err == nil && os.Geteuid() != 0 {
		return sector.PinDir(filepath.Join(home, ".local/state/hostcryptd/pins"))
	}
	return sector.DefaultPins
}

// tpmPath is this host's TPM, whether it has one or not.
func (k *keyFlags) tpmPath() string {
	return cmp.Or(k.tpm, os.Getenv("HOSTCRYPTD_TPM"), keyunseal.DefaultTPM)
}

// open says how commands unlock a header.
func (k *keyFlags) open(log *zap.Logger) sector.OpenOptions {
	return sector.OpenOptions{Pins: k.pinStore(log), Trusted: k.trusted, Changed: func(before []sector.KeyToken, now *sector.Known) { k.before, k.header = before, now }}
}

// readSigner reads the file of --signer.
func (k *keyFlags) readSigner() (err error) {
	if k.signer == "" {
		return nil
	}
	if k.trusted, err = keyunseal.ReadPublicKeys(k.signer); err != nil {
		return fmt.Errorf("--signer: %w", err)
	}
	return nil
}

// signing lets a vault's key sign volume keys. The public key goes into the file
// of --signer if there isn't one yet; commit makes it.
func (k *keyFlags) signing(spec string, log *zap.Logger) (sign sector.Signer, commit func() error) {
	missing := k.signer != "" && k.trusted == nil
	var made *keyunseal.Signature
	sign = func(ctx context.Context, volume string, digest [sha256.Size]byte) (*sector.Signature, error) {
		s, err := (&keyunseal.Child{Log: log}).Sign(ctx, k.options(volume, log), spec, volume, digest)
		if err != nil {
			return nil, err
		}
		made = s
		return &sector.Signature{KeyID: s.KeyID, Algorithm: s.Algorithm, Value: base64.StdEncoding.EncodeToString(s.Value)}, nil
	}
	return sign, func() error {
		if !missing {
			return nil
		}
		return writeNew(k.signer, made.EncodePublicKey(), 0o644)
	}
}

// options are those for a volume: each use of a KEK is recorded.
func (k *keyFlags) options(volume string, log *zap.Logger) keyunseal.Options {
	return keyunseal.Options{HostKey: k.hostKey, OtherHostKey: k.otherKey, TPM: k.tpmPath(), Identity: k.identity, Cloud: k.cloud, Log: log, Observe: k.observe(volume)}
}

// sealer wraps volume keys with the KEK that spec names, in a process of its
// own.
func (k *keyFlags) sealer(spec string, log *zap.Logger) sector.Sealer {
	child := &keyunseal.Child{Log: log}
	return func(ctx context.Context, volume string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
		return child.Seal(ctx, k.options(volume, log), spec, volume, key)
	}
}

// unsealer gets volume keys out of tokens, in a process of its own.
func (k *keyFlags) unsealer(log *zap.Logger) sector.Unsealer {
	child := &keyunseal.Child{Log: log}
	return func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
		return child.Unseal(ctx, k.options(volume, log), token, volume, key)
	}
}

// unsealerUnless is an unsealer that takes a key for denied that deniedExpired does.
func (k *keyFlags) unsealerUnless(expired string, log *zap.Logger) sector.Unsealer {
	unseal := k.unsealer(log)
	return func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
		if err := k.deniedExpired(ctx, expired, volume, token, log); err != nil {
			return err
		}
		return unseal(ctx, volume, token, key)
	}
}

// deniedExpired returns an error if the policy for expired keys takes one for a denial,
// and that of the token has expired, or it can't be told. The vault itself unwraps with
// it.
func (k *keyFlags) deniedExpired(ctx context.Context, expired, volume string, token json.RawMessage, log *zap.Logger) error {
	d, err := keyunseal.Describe(token)
	if expired != "deny" || err != nil || d.Type != keyunseal.TypeKeyVault {
		return nil
	}
	s, err := k.inspect(ctx, volume, token, log)
	if err != nil {
		return fmt.Errorf("--expired-key deny has to look whether the key has expired, which takes the permission get: %w", err)
	}
	if s.Expires.IsZero() || time.Now().Before(s.Expires) {
		return nil
	}
	return &keyunseal.Error{Op: "inspect", KeyID: d.KeyID, Class: keyunseal.ClassKeyUnusable, Code: "KeyExpired",
		Err: fmt.Errorf("the key has expired on %s, and --expired-key deny takes that for a denial", s.Expires.Format(time.DateOnly))}
}

// checkExpired checks a policy for expired keys.
func checkExpired(action string) error {
	if action != "warn" && action != "deny" {
		return usagef("--expired-key is warn or deny, not %q", action)
	}
	return nil
}

// watchHostKey returns what says that a host key was made since. A mistyped name, or
// a file that was lost, would go unnoticed.
func (a *app) watchHostKey(file string) func() {
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return func() {}
	}
	return func() {
		if _, err := os.Lstat(file); err != nil {
			return
		}
		out := a.stdout
		if a.json {
			out = a.stderr
		}
		fmt.Fprintf(out, "%s is a new host key: keep a copy of it elsewhere; what was sealed with another host key doesn't open with it\n", file)
	}
}

// probe looks whether a token's KEK may still be used, inspect for a newer
// version of it; each in a process of its own.
func (k *keyFlags) probe(ctx context.Context, volume string, token json.RawMessage, log *zap.Logger) error {
	return (&keyunseal.Child{Log: log}).Probe(ctx, k.options(volume, log), token, volume)
}

func (k *keyFlags) inspect(ctx context.Context, volume string, token json.RawMessage, log *zap.Logger) (keyunseal.KeyStatus, error) {
	return (&keyunseal.Child{Log: log}).Inspect(ctx, k.options(volume, log), token, volume)
}

// deviceEnv is the number of the descriptor by which a server hands its device to a
// command that it runs. The device's name may be another's by then, see nameOf.
const deviceEnv = "HOSTCRYPTD_DEVICE_FD"

// withHeader opens the device that a command changes the header of, beside
// whoever uses it.
func withHeader(device string, readOnly bool, f func(d *sector.Device) error) error {
	o := sector.DeviceOptions{ReadOnly: readOnly, Shared: true}
	open := func() (*sector.Device, error) { return sector.OpenDevice(device, o) }
	if fd, err := strconv.Atoi(os.Getenv(deviceEnv)); err == nil {
		open = func() (*sector.Device, error) { return sector.Reopen(os.NewFile(uintptr(fd), device), device, o) }
	}
	d, err := open()
	if err != nil {
		return err
	}
	defer d.Close()
	err = f(d)
	if err == nil {
		return nil
	}
	err = fmt.Errorf("%s: %w", device, err)
	if sector.FlushFailed(err) {
		if terr := tellFlushFailed(d); terr != nil {
			err = fmt.Errorf("%w; the server of the volume could not be told that the disk may have lost what was written before: %w", err, terr)
		}
	}
	return err
}

func (a *app) keyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "key",
		Short: "manage the keys that open a volume",
		Long: `A volume has one or more keys, in a vault or on this host, and any one of them
opens it. Each has a token in the header.`,
		Args: noArgs,
	}
	c.AddCommand(a.keyListCommand(), a.keyAddCommand(), a.keyRemoveCommand())
	return c
}

func (a *app) keyListCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "list DEVICE",
		Short: "list the keys of a volume, in the order in which they are tried",
		Args:  oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			return withHeader(args[0], true, func(d *sector.Device) error {
				h, _, err := sector.ReadHeader(c.Context(), d)
				if err != nil {
					return err
				}
				byID := map[int]tokenInfo{}
				for _, t := range tokenInfos(h) {
					byID[t.ID] = t
				}
				list := []tokenInfo{}
				for _, k := range sector.KeyTokens(h) {
					list = append(list, byID[k.ID])
				}
				if a.json {
					return a.printJSON(list)
				}
				for _, t := range list {
					fmt.Fprintln(a.stdout, printable(fmt.Sprintf("%2d  %s", t.ID, t.text())))
				}
				return nil
			})
		},
	}
	return a.jsonFlag(c)
}

func (a *app) keyAddCommand() *cobra.Command {
	var (
		keys     keyFlags
		spec     string
		recovery string
	)
	c := &cobra.Command{
		Use:   "add DEVICE|NAME --key KEY",
		Short: "let another key open a volume",
		Long: `add unseals the volume with one of its keys, seals it with KEY too, unseals what
that gave, and writes it to the header. The volume may be in use meanwhile. A key that
it has already is refused: it would be no second way in. Of a NAME in ` + tabFile + `
the line says where the host key is.

--key host-key:FILE is another host key than the one of --host-key, to exchange it on
every volume that it opens: add the new one to each; move the old file aside, and keep it
until no volume has a token of it; then give the new file its name, or change --host-key
or the line; make an initramfs that has it anew; see that 'hostcryptd check' is content,
and 'hostcryptd key remove' the old one's token from each.

Where none of its keys unseals the volume any more, such as after the loss of a TPM
or of the vault's key, --recovery-key does. The keys that are lost stay in the header
until 'hostcryptd key remove' takes them out.`,
		Example: `  hostcryptd key add /dev/sdb --key https://VAULT.vault.azure.net/keys/NAME
  hostcryptd key add data --key host-key:/etc/hostcryptd/new.key
  hostcryptd key add /dev/sdb --key tpm --recovery-key sdb.recovery`,
		Args: oneArg("DEVICE or NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			if spec == "" {
				return usagef("--key KEY says which key: %s", keySpecs)
			}
			device, err := keys.tabDevice(c, args[0])
			if err != nil {
				return err
			}
			keys.otherKey = keyunseal.OtherHostKey(spec)
			return withHeader(device, false, func(d *sector.Device) error {
				defer a.watchHostKey(cmp.Or(keys.otherKey, keys.hostKey))()
				var (
					id   int
					err  error
					log  = a.cliLog()
					by   string
					seal = keys.sealerOfNew(d, spec, log)
					o    = keys.open(log)
				)
				o.Admit = notSameKey
				if recovery != "" {
					key, kerr := a.readRecoveryKey(recovery)
					if kerr != nil {
						return kerr
					}
					defer clear(key)
					by = " by recovery key"
					id, err = sector.AddTokenByRecovery(c.Context(), d, key, keys.unsealer(log), seal, o)
				} else {
					id, err = sector.AddToken(c.Context(), d, keys.unsealer(log), seal, o)
				}
				added := fmt.Sprintf("token %d%s", id, by)
				if err != nil {
					added = "of " + spec + by // it has no number
				}
				keys.changed(c.Context(), d, audit.KeyAdd, added, err)
				if err == nil {
					a.warnSameKey(c.Context(), d, id)
				}
				return a.answer(err, map[string]any{"device": device, "token": id}, "token %d of %s now opens the volume with %s", id, device, spec)
			})
		},
	}
	c.Flags().StringVar(&spec, "key", "", "`KEY` to add: "+keySpecs)
	c.Flags().StringVar(&recovery, "recovery-key", "", "`FILE` with a recovery key that opens the volume instead of its keys, - for standard input")
	keys.add(c)
	return a.jsonFlag(c)
}

// tabDevice returns the device that a command's argument means. Of a name in hostcrypttab
// the line has flags of the command, too.
func (k *keyFlags) tabDevice(c *cobra.Command, arg string) (string, error) {
	e, err := named(arg)
	if err != nil || e == nil {
		return arg, err
	}
	if e.randomKey() {
		return "", usagef("volume %s has a key of this boot, and no header", e.unit.Name)
	}
	e.flags = slices.DeleteFunc(e.flags, func(f tabFlag) bool { return c.Flags().Lookup(f.name) == nil })
	return e.unit.Device, errors.Join(e.apply(c.Flags()), k.readSigner())
}

// sameKey returns a token of those that a header has that is of the same key as one that
// is added, and whether it's of the same version of the key; -1 if there is none.
func sameKey(has []sector.KeyToken, added json.RawMessage) (id int, version bool) {
	id = -1
	is, err := keyunseal.Describe(added)
	if err != nil {
		return id, false
	}
	for _, t := range has {
		k, err := keyunseal.Describe(t.Text)
		if err == nil && t.Retired.IsZero() && k.Type == is.Type && k.KeyID == is.KeyID && k.PCRs == is.PCRs && k.Identity == is.Identity && k.Tenant == is.Tenant {
			if id = t.ID; k.KeyVersion == is.KeyVersion {
				return id, true
			}
		}
	}
	return id, false
}

// errSameKey refuses a key that a volume has.
func errSameKey(id int) error {
	return withCode(codeBusy, fmt.Errorf("token %d is of the same key already, so another token of it is no second way in; nothing was changed", id))
}

// notSameKey refuses a token of a key that a header has, see [sector.OpenOptions]. A
// TPM's is another matter: its PCRs may hold something else since.
func notSameKey(has []sector.KeyToken, added json.RawMessage) error {
	id, version := sameKey(has, added)
	if d, err := keyunseal.Describe(added); version && err == nil && d.Type != keyunseal.TypeTPM {
		return errSameKey(id)
	}
	return nil
}

// sealerOfNew is a sealer that refuses to seal with a TPM with which a token of the
// volume on d unseals now.
func (k *keyFlags) sealerOfNew(d *sector.Device, spec string, log *zap.Logger) sector.Sealer {
	seal := k.sealer(spec, log)
	return func(ctx context.Context, volume string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
		added, err := seal(ctx, volume, key)
		if err != nil {
			return nil, err
		}
		h, _, err := sector.ReadHeader(ctx, d)
		if err != nil {
			return nil, err
		}
		has := sector.KeyTokens(h)
		if is, err := keyunseal.Describe(added); err != nil || is.Type != keyunseal.TypeTPM {
			return added, err
		}
		for {
			id, version := sameKey(has, added)
			if !version {
				return added, nil
			}
			i := slices.IndexFunc(has, func(t sector.KeyToken) bool { return t.ID == id })
			if k.probe(ctx, volume, has[i].Text, log) == nil {
				return nil, errSameKey(id)
			}
			has = slices.Delete(has, i, i+1) // it doesn't unseal any more
		}
	}
}

// warnSameKey says so if another token is of the same TPM as a new one, which was mostly
// sealed to what its PCRs held before, or of another version of the same key.
func (a *app) warnSameKey(ctx context.Context, d *sector.Device, added int) {
	h, _, err := sector.ReadHeader(ctx, d)
	if err != nil {
		return // it was there just now, and what is wrong will be said
	}
	infos := tokenInfos(h)
	i := slices.IndexFunc(infos, func(t tokenInfo) bool { return t.ID == added && t.Key != nil })
	if i < 0 {
		return
	}
	is := infos[i].Key
	for _, t := range infos {
		k := t.Key
		if t.ID == added || k == nil || k.Type != is.Type || k.KeyID != is.KeyID || k.Identity != is.Identity || k.Tenant != is.Tenant {
			continue
		}
		switch {
		case k.Type == keyunseal.TypeTPM:
			a.warnf("token %d is of the same TPM, and goes on opening the volume where the machine starts as it did when that was sealed; where that is not to be so, 'hostcryptd key remove' takes it out", t.ID)
		case t.Retired == nil:
			a.warnf("token %d is of another version of the same key, so token %d is hardly a second way in; 'hostcryptd rewrap' replaces a version by the newest", t.ID, added)
		}
	}
}

func (a *app) keyRemoveCommand() *cobra.Command {
	var (
		keys  keyFlags
		force bool
	)
	c := &cobra.Command{
		Use:   "remove DEVICE|NAME TOKEN",
		Short: "take a key from a volume",
		Long: `remove takes the token of that number, as 'key list' shows it, out of the header.
Another token has to unseal now: a recovery key doesn't count. Of a NAME in
` + tabFile + ` the line says where the host key is. --force does without
what can't be shown now, and it also removes the last token of a volume with a
recovery key: after that only this opens it, by 'hostcryptd key add'. The last way in
of all is never removed; 'hostcryptd erase' is for that.

Who has a backup of the header and the key that was removed can still open the
volume.`,
		Args: twoArgs("DEVICE or NAME", "TOKEN"),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := strconv.Atoi(args[1])
			if err != nil || id < 0 {
				return usagef("TOKEN is the number of a token, not %q; 'hostcryptd key list' shows them", args[1])
			}
			device, err := keys.tabDevice(c, args[0])
			if err != nil {
				return err
			}
			return withHeader(device, false, func(d *sector.Device) error {
				err := sector.RemoveToken(c.Context(), d, keys.unsealer(a.cliLog()), id, force, keys.open(a.cliLog()))
				keys.changed(c.Context(), d, audit.KeyRemove, fmt.Sprintf("token %d", id), err)
				return a.answer(err, map[string]any{"device": device, "removed": id}, "token %d of %s is removed", id, device)
			})
		},
	}
	c.Flags().BoolVar(&force, "force", false, "remove it though no other key can be shown to work now")
	keys.add(c)
	return a.jsonFlag(c)
}
