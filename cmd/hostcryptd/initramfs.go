package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
)

// What the makers of an initramfs have to know of the table: their scripts
// (systemd/initrd) ask here, so that nothing but the daemon's own code reads a line.

// initramfsTab names another table for the maker of an initramfs.
const initramfsTab = "HOSTCRYPTTAB"

func (a *app) initramfsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "initramfs lines|devices|modules|network|files OPTION",
		Short: "what an initramfs needs of the lines of " + tabFile + " that have an option",
		Long: `initramfs is for the scripts that make an initramfs: with the option x-initrd.attach
or x-kdump.attach it prints the table that is to be in it, the backing devices, the
modules of the TPM, the names of volumes that wait for the network, or the files of this
host that are needed.
What could keep a volume from being attached at boot is a warning, what is going to is
an error.`,
		Hidden: true,
		Args:   twoArgs("lines, devices, modules, network or files", "OPTION"),
		RunE: func(c *cobra.Command, args []string) error {
			table := cmp.Or(os.Getenv(initramfsTab), tabFile)
			entries, bad, err := readTab(table)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if args[0] == "files" { // once is enough
				for _, err := range bad {
					a.initramfsWarn("%v", err)
				}
			}
			ours, err := initramfsEntries(entries, args[1])
			if err != nil {
				return err
			}
			var list []string
			switch args[0] {
			case "lines":
				list = initramfsLines(ours, entries, func(device string) string {
					h, err := readTokens(c.Context(), device)
					if err != nil {
						return "" // files warns
					}
					return h.uuid
				})
			case "devices":
				for _, e := range ours {
					list = append(list, e.unit.Device)
				}
			case "modules":
				if len(ours) > 0 {
					list = tpmModules("/sys")
				}
			case "network":
				for _, e := range ours {
					if e.unit.NetDev {
						list = append(list, e.unit.Name)
					}
				}
			case "files":
				if list, err = a.initramfsFiles(c.Context(), ours); err != nil {
					return err
				}
			default:
				return usagef("%q is none of lines, devices, modules, network and files", args[0])
			}
			for _, s := range list {
				fmt.Fprintln(a.stdout, s)
			}
			return nil
		},
	}
}

// tpmModules are the modules that drive this host's TPM and the buses that it is on. One
// on SPI, I2C or FF-A has others than most have, and without them no volume is attached:
// its pin may be in the TPM, see [keyunseal.HaveTPM].
func tpmModules(sys string) (list []string) {
	devices, _ := filepath.Glob(filepath.Join(sys, "class/tpm/tpm*/device"))
	for _, device := range devices {
		dir, err := filepath.EvalSymlinks(device)
		if err != nil {
			continue
		}
		for ; strings.HasPrefix(dir, filepath.Join(sys, "devices")+"/"); dir = filepath.Dir(dir) {
			module, err := filepath.EvalSymlinks(filepath.Join(dir, "driver/module"))
			if name := filepath.Base(module); err == nil && !slices.Contains(list, name) {
				list = append(list, name)
			}
		}
	}
	return list
}

// initramfsWarn says what initramfs-tools' hooks say, and dracut's module looks for.
func (a *app) initramfsWarn(format string, args ...any) {
	fmt.Fprintln(a.stderr, "W: hostcryptd:", printable(fmt.Sprintf(format, args...)))
}

// initramfsEntries are those with an option. That one of them is refused is an error
// now: at boot it would be a host without its root.
func initramfsEntries(entries []*tabEntry, option string) (ours []*tabEntry, err error) {
	for _, e := range entries {
		if !slices.Contains(e.words, option) {
			continue
		}
		err = errors.Join(err, e.apply((&app{}).serveCommand().Flags()))
		if e.err == nil && e.unit.Attach == "" {
			err = errors.Join(err, usagef("volume %s has the option %s, and no kernel device: it needs attach=auto or attach=/dev/nbdN", e.unit.Name, option))
		}
		ours = append(ours, e)
	}
	return ours, err
}

// initramfsLines is the table for the initramfs, whose scripts read it with less than
// the daemon: blanks are single, devices are paths, comments are left out. Where the
// kernel device of one is any that is free, those of the other volumes are there too,
// without the option, to be left to them. A line that doesn't say which volume it means
// means the one that is there now, by uuid: who has the storage could put a disk of
// another volume in its place, of which the initramfs may have no pin.
func initramfsLines(ours, all []*tabEntry, uuid func(device string) string) (lines []string) {
	auto := false
	for _, e := range ours {
		auto = auto || e.unit.Attach == "auto"
		line := strings.Join(append([]string{e.unit.Name, e.unit.Device}, e.rest...), " ")
		if e.flag("uuid") == "" && !e.randomKey() {
			if id := uuid(e.unit.Device); id != "" {
				line += ",uuid=" + id
			}
		}
		lines = append(lines, line)
	}
	for _, e := range all {
		if _, err := nbdnl.ParsePath(e.unit.Attach); auto && err == nil && !slices.Contains(ours, e) {
			lines = append(lines, fmt.Sprintf("%s %s - attach=%s", e.unit.Name, e.unit.Device, e.unit.Attach))
		}
	}
	return lines
}

// initramfsFiles are the files of this host that serve reads for the volumes.
func (a *app) initramfsFiles(ctx context.Context, entries []*tabEntry) ([]string, error) {
	n := &initramfsNeeds{warn: a.initramfsWarn, usual: keyunseal.DefaultHostKey}
	for _, e := range entries {
		n.volume(ctx, e)
	}
	return n.files, errors.Join(n.errs...)
}

// initramfsNeeds collects files.
type initramfsNeeds struct {
	warn  func(format string, args ...any)
	usual string // the host key file that no line names
	files []string
	errs  []error

	tokens *tabTokens // of a volume whose header is authentic, which is then not read
	keys   keyFlags   // of the last volume
}

// add adds a file, once.
func (n *initramfsNeeds) add(file string) {
	// The scripts read a path in a line, without blanks around it.
	if strings.ContainsFunc(file, func(r rune) bool { return r < ' ' || r == 0x7f }) || strings.TrimSpace(file) != file {
		n.fail("the path %q can't be that of a file in an initramfs", file)
	} else if !slices.Contains(n.files, file) {
		n.files = append(n.files, file)
	}
}

func (n *initramfsNeeds) fail(format string, args ...any) {
	n.errs = append(n.errs, withCode(codeDevice, fmt.Errorf(format, args...)))
}

// secret adds a file that not everybody may have.
func (n *initramfsNeeds) secret(file, format string, args ...any) {
	n.add(file)
	n.warn(format, args...)
}

// named adds a file that a line names. Without it the volume isn't opened.
func (n *initramfsNeeds) named(volume, what, file string) bool {
	if _, err := os.Stat(file); err != nil {
		n.fail("%s of volume %s: %w", what, volume, err)
		return false
	}
	n.add(file)
	return true
}

// volume adds what a volume needs. That can be less than its line names: a key that
// nobody needs isn't copied to where it is less protected.
func (n *initramfsNeeds) volume(ctx context.Context, e *tabEntry) {
	name := e.unit.Name
	flags := (&app{}).serveCommand().Flags()
	if err := e.apply(flags); err != nil {
		n.errs = append(n.errs, err)
		return
	}
	flag := func(name string) string { return flags.Lookup(name).Value.String() }
	path := func(name string) string { // serve runs in /
		if s := flag(name); s != "" {
			return filepath.Join("/", s)
		}
		return ""
	}
	if dir := path("tls-certificates"); dir != "" {
		if _, err := loadTLS(dir); err != nil {
			n.fail("volume %s: tls-certificates: %w", name, err)
		}
		for _, f := range []string{"ca-cert.pem", "server-cert.pem"} {
			n.add(filepath.Join(dir, f))
		}
		n.secret(filepath.Join(dir, "server-key.pem"), "the private key of the TLS server of %s is in the initramfs", name)
	}
	if e.randomKey() {
		return
	}
	if file := path("signer"); file != "" {
		if _, err := keyunseal.ReadPublicKeys(file); err != nil {
			n.fail("volume %s: signer: %w", name, err)
		}
		n.add(file)
	}
	h, err := n.tokens, error(nil)
	if h == nil {
		h, err = readTokens(ctx, e.unit.Device)
	}
	if err != nil {
		n.warn("which keys volume %s has can't be read, so what opens it may be missing in the initramfs: %v", name, err)
	}
	if id := flag("uuid"); h != nil && id != "" && id != h.uuid {
		n.fail("volume %s: on %s is volume %s, and its line means %s", name, e.unit.Device, h.uuid, id)
		return
	}
	n.keys = keyFlags{
		pins: cmp.Or(path("pins"), string(sector.DefaultPins)), tpm: flag("tpm"),
		hostKey: n.usual, auditLog: flag("audit-log"), auditFailed: new(sync.Once),
	}
	left := n.hostKey(ctx, e, h, &n.keys)
	if e.flag("tpm") == keyunseal.NoTPM {
		left = append(left, slices.Repeat([]string{"the line has tpm=none, so its key in the TPM doesn't open it"}, len(h.of(keyunseal.TypeTPM)))...)
	}
	left = append(left, n.vault(e, h, flag("identity"), path("cloud"))...)
	n.leftOut(name, h, left)
	n.pins(name, h, &n.keys, flag("require-pin") == "true")
}

// leftOut tells of the keys of a volume that don't open it at boot, one text for each.
// If that is all of them, it's an error.
func (n *initramfsNeeds) leftOut(name string, h *tabTokens, left []string) {
	none := h != nil && len(left) == len(h.tokens)
	if none && len(left) == 0 {
		n.fail("volume %s: its header has no key of hostcryptd's, so nothing opens it at boot; 'hostcryptd key add --recovery-key' adds one", name)
	}
	for _, text := range slices.Compact(left) {
		if none {
			n.fail("volume %s: %s; no other key opens it at boot", name, text)
		} else {
			n.warn("volume %s: %s", name, text)
		}
	}
}

// tabTokens is what a header says of the keys.
type tabTokens struct {
	uuid   string
	tokens []tabToken
}

type tabToken struct {
	keyunseal.Description
	text json.RawMessage
}

// of are the tokens of a type.
func (h *tabTokens) of(typ string) (list []tabToken) {
	if h == nil {
		return nil
	}
	for _, t := range h.tokens {
		if t.Type == typ {
			list = append(list, t)
		}
	}
	return list
}

func readTokens(ctx context.Context, device string) (*tabTokens, error) {
	d, err := sector.OpenDevice(device, sector.DeviceOptions{ReadOnly: true, Shared: true})
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// A program that changes the header holds a lock, and may be a person's that waits.
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	h, _, err := sector.ReadHeader(ctx, d)
	if err == nil {
		err = sector.CheckUUID(h)
	}
	if err != nil {
		return nil, err
	}
	return describeTokens(h.UUID, sector.KeyTokens(h)), nil
}

func describeTokens(uuid string, tokens []sector.KeyToken) *tabTokens {
	r := &tabTokens{uuid: uuid}
	for _, k := range tokens {
		if d, err := keyunseal.Describe(k.Text); err == nil {
			r.tokens = append(r.tokens, tabToken{d, k.Text})
		}
	}
	return r
}

// hostKey adds the host key, and says for each token of a host key that opens nothing
// why. A file that no line names is added if it opens the volume: who can
// write to the disk can put a token of another volume of this host's into the header, to
// have the key of that one where he can read it. (He can put the whole header there, UUID
// and all, if the line doesn't say which volume it means.)
func (n *initramfsNeeds) hostKey(ctx context.Context, e *tabEntry, h *tabTokens, keys *keyFlags) (left []string) {
	name, tokens := e.unit.Name, h.of(keyunseal.TypeHostKey)
	file := cmp.Or(e.unit.KeyFile, n.usual)
	const who = "the host key of %s is in the initramfs: who has that, and the disk, opens the volume"
	if e.unit.KeyFile != "" && n.named(name, "the host key", file) {
		n.warn(who, name)
	}
	if h == nil && e.unit.KeyFile == "" {
		n.warn("no host key of %s is in the initramfs; if that is what opens it, it will not open at boot, unless the third field of its line is the key's file", name)
	}
	if len(tokens) == 0 {
		return nil
	}
	var errs []error
	if _, err := os.Stat(file); err != nil {
		errs = append(errs, err)
	} else if n.tokens == nil {
		options := keys.options(h.uuid, zap.NewNop())
		options.HostKey = file
		for _, t := range tokens {
			var key [sector.VolumeKeySize]byte
			err := keyunseal.Unseal(ctx, options, t.text, h.uuid, &key)
			clear(key[:])
			if err == nil {
				errs = nil
				break
			}
			errs = append(errs, err)
		}
	}
	if errs == nil {
		if e.unit.KeyFile == "" {
			n.secret(file, who, name)
		}
		return nil
	}
	why := "none of its keys opens with the host key %s that its line names: %v"
	if e.unit.KeyFile == "" {
		why = "the host key %s isn't in the initramfs, as none of its keys opens with that: %v"
	}
	return slices.Repeat([]string{fmt.Sprintf(why, file, errors.Join(errs...))}, len(tokens))
}

// vault adds what the way to a vault needs, for a volume that has a key there, or may
// have one, and says for each that opens nothing why.
func (n *initramfsNeeds) vault(e *tabEntry, h *tabTokens, identity, cloud string) (left []string) {
	name, tokens := e.unit.Name, h.of(keyunseal.TypeKeyVault)
	if h != nil && len(tokens) == 0 || h == nil && !e.unit.NetDev && identity == "" && cloud == "" {
		return nil
	}
	if !e.unit.NetDev {
		n.warn("volume %s has a key in a vault, and no _netdev in its line: the initramfs doesn't wait for the network, and does without that key", name)
	}
	if identity != "" {
		n.identity(name, identity)
	} else {
		left = n.identitiesOf(name, h)
	}

	private := h == nil
	for _, t := range tokens {
		private = private || !keyunseal.IsPublic(t.KeyID)
	}
	files, err := keyunseal.CloudFiles(cloud)
	switch {
	case err != nil && cloud != "":
		n.fail("volume %s: cloud: %w", name, err)
	case err != nil && private:
		n.warn("volume %s: the description of the private cloud: %v", name, err)
	}
	for _, f := range append(files, "/etc/hosts") {
		if _, err := os.Stat(f); err == nil {
			n.add(f)
		}
	}
	roots := keyunseal.SystemRoots()
	if len(roots) == 0 && len(files) < 2 {
		n.warn("this host has no certificates of authorities (the package ca-certificates), so the initramfs will trust no vault")
	}
	for _, f := range roots {
		n.add(f)
	}
	return left
}

// identity adds the file that the identity of a line logs in with.
func (n *initramfsNeeds) identity(volume, identity string) {
	file, err := keyunseal.IdentityFile(identity)
	if err != nil {
		n.fail("volume %s: %w", volume, err)
		return
	}
	n.warnIdentity(volume, identity)
	if file != "" && n.named(volume, "the identity", file) && !strings.HasPrefix(identity, "workload:") {
		n.warn("the private key of the identity of %s is in the initramfs: who has that is this identity to the vault", volume)
	}
}

// warnIdentity says what an identity lacks in an initramfs.
func (n *initramfsNeeds) warnIdentity(volume, identity string) {
	switch kind, _, _ := strings.Cut(identity, ":"); kind {
	case "arc":
		n.warn("volume %s: the identity is that of the Azure Arc agent, which doesn't run in an initramfs", volume)
	case "workload":
		n.warn("volume %s: the identity is a workload's, whose token nobody renews in an initramfs", volume)
	}
}

// identitiesOf says what the identities of a header's tokens lack, and adds none of
// their files: nothing authenticates the header here, and who can write to the disk
// would choose the file of root's that he then reads in /boot.
func (n *initramfsNeeds) identitiesOf(volume string, h *tabTokens) (left []string) {
	for _, t := range h.of(keyunseal.TypeKeyVault) {
		n.warnIdentity(volume, t.Identity)
		if file, err := keyunseal.IdentityFile(t.Identity); err == nil && file != "" {
			left = append(left, fmt.Sprintf("a key in the header is for an identity that names the file %s, and the line has no identity=; what only the header names isn't put into an initramfs, so that key won't open the volume at boot; if this is how the host logs in, the line needs identity=%s", file, t.Identity))
		}
	}
	return left
}

// pins adds what this host remembers of the volume, so that an older header is refused
// there too.
func (n *initramfsNeeds) pins(name string, h *tabTokens, keys *keyFlags, required bool) {
	dir := sector.PinDir(keys.pins)
	if h == nil {
		files, _ := filepath.Glob(filepath.Join(string(dir), "*.json"))
		for _, f := range files {
			n.add(f)
		}
		if len(files) == 0 && required {
			n.warn("there are no pins in %s, and the line of volume %s has require-pin", dir, name)
		}
		return
	}
	if _, err := os.Stat(dir.Path(h.uuid)); err == nil {
		n.add(dir.Path(h.uuid))
		return
	}
	// The chip is there at boot too.
	switch pin, err := keys.pinStore(nil).Load(h.uuid); {
	case err != nil:
		n.warn("what this host remembers of volume %s: %v", name, err)
	case pin == nil && required:
		n.fail("volume %s: require-pin, and this host doesn't remember the volume, neither in %s nor in a TPM: open it once without", name, dir)
	case pin == nil:
		n.warn("this host doesn't remember volume %s, neither in %s nor in a TPM: at boot it is trusted at first sight", name, dir)
	}
}

// An initramfsKind is one of the two that attach volumes, those with an option.
type initramfsKind struct{ option, name, anew string }

var initramfsKinds = []initramfsKind{
	{"x-initrd.attach", "the initramfs", "'update-initramfs -u' or 'dracut -f' makes it anew"},
	{"x-kdump.attach", "the initramfs for crash dumps", "'/etc/kernel/postinst.d/kdump-tools $(uname -r)' and 'kdump-config reload', or 'kdumpctl rebuild' and 'kdumpctl reload', make it anew"},
}

// initramfsOf returns those that attach the volume of a line.
func initramfsOf(e *tabEntry) []initramfsKind {
	return slices.DeleteFunc(slices.Clone(initramfsKinds), func(k initramfsKind) bool { return !slices.Contains(e.words, k.option) })
}

// hintFormatted says if an initramfs of this host attaches the volume that was on a
// device, and takes no other, as the one that is there now.
func hintFormatted(device, uuid string) {
	entries, _, err := readTab(cmp.Or(os.Getenv(initramfsTab), tabFile))
	if err != nil {
		return
	}
	for _, e := range entries {
		if !sameFile(e.unit.Device, device) || e.flag("uuid") == uuid {
			continue
		}
		why := "takes there only the volume that was on it when it was made"
		if id := e.flag("uuid"); id != "" {
			why = "its line means volume " + id + ": first change that"
		}
		warnInitramfs(e, why)
	}
}

// warnInitramfs tells why those that attach the volume of a line have to be made anew.
func warnInitramfs(e *tabEntry, why string) {
	for _, kind := range initramfsOf(e) {
		fmt.Fprintf(os.Stderr, "hostcryptd: warning: %s attaches volume %s, and %s: %s\n", kind.name, e.unit.Name, why, kind.anew)
	}
}

// hintInitramfs says if an initramfs of this host has to be made anew since the
// header of a volume that it attaches was changed, and why. repinned says that this
// host was made to trust another header than the one that it remembered.
func (k *keyFlags) hintInitramfs(device, volume string, before []sector.KeyToken, now *sector.Known, repinned bool) {
	entries, _, err := readTab(cmp.Or(os.Getenv(initramfsTab), tabFile))
	if err != nil || k.hinted {
		return
	}
	for _, e := range entries {
		if len(initramfsOf(e)) == 0 || !sameFile(e.unit.Device, device) {
			continue
		}
		if why := k.initramfsLacks(e, volume, before, now, repinned); why != "" {
			k.hinted = true
			warnInitramfs(e, printable(why))
		}
	}
}

// initramfsLacks is what is wrong with an initramfs that was made before a change of
// the volume of a line, or "". It needs other files for other tokens, and has a copy of
// the pin. One that is older than the TPM's, which is there at boot too, does no harm.
func (k *keyFlags) initramfsLacks(e *tabEntry, volume string, before []sector.KeyToken, now *sector.Known, repinned bool) string {
	needs := func(tokens []sector.KeyToken) *initramfsNeeds {
		n := &initramfsNeeds{warn: func(string, ...any) {}, usual: keyunseal.DefaultHostKey, tokens: describeTokens(volume, tokens)}
		n.volume(context.Background(), e)
		return n
	}
	was, is := needs(before), needs(now.Tokens)
	pin := is.keys.pinDir().Path(volume)
	ours := slices.Contains(is.files, pin) && pin == k.pinDir().Path(volume)
	without := func(list, other []string) []string {
		return slices.DeleteFunc(slices.Clone(list), func(f string) bool { return f == pin || slices.Contains(other, f) })
	}
	list := func(files []string) string {
		if n := len(files); n > 3 {
			files = append(files[:2], fmt.Sprintf("%d others", n-2)) // the certificates of a system
		}
		return strings.Join(files, ", ")
	}
	if more := without(is.files, was.files); len(more) > 0 {
		return "lacks what its keys need now, " + list(more)
	}
	if repinned && ours {
		return "will refuse it at the next boot, as it remembers another header"
	}
	// Its file has the same name, whichever key is in it.
	ids := func(n *initramfsNeeds) (ids []string) {
		for _, t := range n.tokens.of(keyunseal.TypeHostKey) {
			ids = append(ids, t.KeyID)
		}
		return ids
	}
	if now := ids(is); len(now) > 0 && slices.Contains(is.files, cmp.Or(e.unit.KeyFile, is.usual)) && len(without(ids(was), now)) > 0 {
		return "has the host key of before, unless it was made since that was exchanged"
	}
	if ours {
		chip, err := is.keys.pinStore(zap.NewNop()).loadTPM(volume)
		if err != nil || chip == nil || chip.Fingerprint != now.Fingerprint || chip.Generation < now.Generation {
			return "remembers an older header, which it would take if somebody has kept it and puts it back"
		}
	}
	if less := without(was.files, is.files); len(less) > 0 {
		return "has what none of its keys needs any more, " + list(less)
	}
	return ""
}
