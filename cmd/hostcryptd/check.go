package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// A checkReport is the answer of check.
type checkReport struct {
	Device   string `json:"device"`
	UUID     string `json:"uuid"`
	Opens    bool   `json:"opens"` // it would open now
	Copies   string `json:"copies"`
	Pin      string `json:"pin"`
	Recovery []int  `json:"recovery_keyslots"`
	Intact   []int  `json:"recovery_keyslots_intact"`
	Noted    []int  `json:"recovery_keyslots_noted"` // as they were at a time after they were made
	unknown  []int
	Tokens   []checkToken `json:"tokens"`
	Findings []string     `json:"findings"` // what is wrong
	Notices  []string     `json:"notices"`  // what is not, but should be known
}

type checkToken struct {
	tokenInfo
	OK      bool                 `json:"ok"`
	Reason  string               `json:"reason,omitempty"`  // why it doesn't open the volume
	Meaning string               `json:"meaning,omitempty"` // what that means at boot
	Took    float64              `json:"took_seconds"`
	Status  *keyunseal.KeyStatus `json:"status,omitempty"` // of the key in the vault
}

// A nextBoot is what check is asked about: what the host would have to open the
// volume, and what it would refuse.
type nextBoot struct {
	device     string
	keys       *keyFlags
	uuid       string // of the volume that it wants, or ""
	requirePin bool
	expired    string // what it does about an expired key
}

func (a *app) checkCommand() *cobra.Command {
	var keys keyFlags
	boot := nextBoot{keys: &keys}
	c := &cobra.Command{
		Use:   "check DEVICE|NAME",
		Short: "tell whether a volume would open if this host rebooted now",
		Long: `check tries every token of the volume, as a boot would, and says what each failure
would mean. It also looks at the copies of the header, at what this host remembers
of it, at the recovery keyslots, at when the keys expire, and where the host key
file is. Of a NAME in ` + tabFile + ` it takes the options that say what may
open the volume, and asks its vault in the way of its service, by hostcryptd-dial, so this
is the way to ask about a volume of a boot. For one that the initramfs attaches it judges
by the files of the host, and says if those are newer. It changes nothing, and ends with 19 if
something is wrong, even if the volume would open by another key.`,
		Args: oneArg("DEVICE or NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			itself, initramfs := true, false
			boot.device = args[0]
			if e, err := named(boot.device); err != nil {
				return err
			} else if e != nil {
				if e.randomKey() {
					return usagef("volume %s has a key of this boot, not one that could fail at the next", e.unit.Name)
				}
				// How it is served is another matter.
				e.flags = slices.DeleteFunc(e.flags, func(f tabFlag) bool { return c.Flags().Lookup(f.name) == nil })
				if err := errors.Join(e.apply(c.Flags()), keys.readSigner()); err != nil {
					return err
				}
				boot.device = e.unit.Device
				initramfs = slices.Contains(e.words, "x-initrd.attach")
				if e.unit.Vault && !initramfs { // which has no dialer
					if itself, err = dialAsService(c.Context()); err != nil {
						return err
					}
				}
			}
			if err := checkExpired(boot.expired); err != nil {
				return err
			}
			return withHeader(boot.device, true, func(d *sector.Device) error {
				report, err := a.check(c.Context(), boot, d)
				if err != nil {
					return err
				}
				if boot.device != args[0] && boot.uuid == "" {
					report.Notices = append(report.Notices, "the line doesn't say which volume it means, so another one of this host would be served if its disk were in this place; the option uuid="+report.UUID+" says it")
				}
				if !itself && slices.ContainsFunc(report.Tokens, func(t checkToken) bool { return t.Type == keyunseal.TypeKeyVault }) {
					report.Notices = append(report.Notices, "hostcryptd-dial.service doesn't run here now; this was asked by its rules, not through it")
				}
				if initramfs {
					report.Notices = append(report.Notices, initramfsAge("/boot", kernelRelease(), tabFile, keys.pinDir().Path(report.UUID), keys.hostKey, keys.signer))
				}
				if a.json {
					err = a.printJSON(report)
				} else {
					a.printCheck(report)
				}
				return errors.Join(err, foundErrors(len(report.Findings)))
			})
		},
	}
	keys.add(c)
	c.Flags().Var((*uuidFlag)(&boot.uuid), "uuid", "ask as for a host that wants the volume with this `UUID` on DEVICE")
	c.Flags().StringVar(&boot.expired, "expired-key", "warn", "ask as for a host that takes this `ACTION` when the key has expired: warn or deny")
	c.Flags().BoolVar(&boot.requirePin, "require-pin", false, "ask as for a host that serves only volumes it knows")
	return a.jsonFlag(c)
}

func (a *app) check(ctx context.Context, boot nextBoot, d *sector.Device) (*checkReport, error) {
	log, keys := a.cliLog(), boot.keys
	o := keys.open(log)
	o.RequirePin, o.UUID, o.Retired = boot.requirePin, boot.uuid, retiredMayOpen
	r, err := sector.Verify(ctx, d, keys.unsealerUnless(boot.expired, log), o)
	if err != nil {
		return nil, err
	}
	infos := map[int]tokenInfo{}
	for _, t := range tokenInfos(r.Header) {
		infos[t.ID] = t
	}
	report := &checkReport{
		Device: boot.device, UUID: r.Header.UUID, Opens: r.Opens, Copies: r.Copies.Describe(), Pin: pinText(r, keys.pinStore(log).inTPM(r.Header.UUID)),
		Recovery: append([]int{}, r.Keyslots...), Intact: append([]int{}, r.Intact...), Noted: append([]int{}, r.Noted...), unknown: r.Unknown, Findings: append([]string{}, r.Findings...), Notices: []string{},
		Tokens: make([]checkToken, len(r.Tokens)),
	}
	if report.Copies == "" {
		report.Copies = "good"
	}
	notice := func(format string, args ...any) {
		report.Notices = append(report.Notices, fmt.Sprintf(format, args...))
	}
	if len(r.Keyslots) == 0 {
		notice("there is no recovery key: if the keys are lost, so is the data; 'hostcryptd recovery add' makes one")
	}
	var wg sync.WaitGroup
	for i, t := range r.Tokens {
		ct := &report.Tokens[i]
		*ct = checkToken{tokenInfo: infos[t.ID], OK: t.Err == nil, Took: t.Took.Seconds()}
		if t.Err != nil {
			ct.Reason, ct.Meaning = t.Err.Error(), meaning(t.Err)
		}
		if t.Type != keyunseal.TypeKeyVault {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, sector.DefaultTryTimeout)
			defer cancel()
			// The permission to ask is optional, so not to have it says nothing.
			if s, err := (&keyunseal.Child{Log: log}).Inspect(ctx, keys.options(r.Header.UUID, log), t.Text, r.Header.UUID); err == nil {
				ct.Status = &s
			}
		})
	}
	wg.Wait()
	now := time.Now()
	for _, t := range report.Tokens {
		if t.Type == keyunseal.TypeHostKey {
			if where := hostKeyPlace(keys.hostKey, boot.device, r.Header.UUID); where != "" {
				notice("token %d: the host key file %s is %s", t.ID, keys.hostKey, where)
			}
		}
		s := t.Status
		switch {
		case s == nil:
		case !s.Expires.IsZero() && now.After(s.Expires):
			notice("token %d: the key expired on %s; it still unwraps, but rewrap it with a new version", t.ID, s.Expires.Format(time.DateOnly))
		case !s.Expires.IsZero() && s.Expires.Sub(now) < 30*24*time.Hour:
			notice("token %d: the key expires on %s", t.ID, s.Expires.Format(time.DateOnly))
		}
		if s != nil && s.Stale() && t.Retired == nil {
			notice("token %d: the vault has a newer version of the key; 'hostcryptd rewrap' uses it", t.ID)
		}
		if s != nil && s.Purgeable {
			notice("token %d: the vault has no purge protection: who deletes the key can destroy it at once", t.ID)
		}
	}
	return report, nil
}

func pinText(r *sector.Report, chip bool) string {
	switch {
	case r.PinError != nil:
		return r.PinError.Error()
	case r.Pin == nil:
		return "none: this host has not seen the volume, and would trust it"
	}
	text := fmt.Sprintf("matches, generation %d", r.Pin.Generation)
	if chip {
		text += ", and the TPM remembers it"
	}
	return text
}

// initramfsAge says which of the files that an initramfs has a copy of are newer than it,
// which is what counts at the next boot.
func initramfsAge(boot, release string, files ...string) string {
	const asks = "the initramfs attaches this volume, by the table, the keys and the pin that it has had since it was made, and not by this host's files, which are asked here"
	for _, name := range []string{"initrd.img-" + release, "initramfs-" + release + ".img", "initrd-" + release} {
		image, err := os.Stat(filepath.Join(boot, name))
		if err != nil {
			continue
		}
		newer := slices.DeleteFunc(files, func(file string) bool {
			fi, err := os.Stat(file)
			return err != nil || !fi.ModTime().After(image.ModTime())
		})
		if len(newer) == 0 {
			return asks + "; none of them is newer than " + filepath.Join(boot, name)
		}
		return asks + "; " + strings.Join(newer, ", ") + " is newer than " + filepath.Join(boot, name) + ", which 'update-initramfs -u' or 'dracut -f' makes anew"
	}
	return asks
}

// kernelRelease is that of the running kernel, as the names of its files have it.
func kernelRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// meaning says what the failure of a token would mean at boot.
func meaning(err error) string {
	e, ok := errors.AsType[*keyunseal.Error](err)
	switch {
	case errors.Is(err, sector.ErrAuth):
		return "the volume is not served by this token before the header is restored"
	case !ok:
		return "the token would not be used"
	case e.Transient():
		return "at boot it's tried again until it works; the volume waits, unless another token opens it"
	}
	switch e.Class {
	case keyunseal.ClassDenied, keyunseal.ClassIdentity:
		return "the volume stays locked until this host's identity is let in again, unless another token opens it"
	case keyunseal.ClassKeyUnusable, keyunseal.ClassWrongKey:
		return "the volume stays locked until the key is back, unless another token opens it; with the recovery key 'hostcryptd key add --recovery-key' adds one"
	case keyunseal.ClassTPMState:
		return "the volume stays locked until the machine starts as it did when the token was sealed, unless another token opens it; after that, 'hostcryptd rewrap' seals to the new state; with the recovery key 'hostcryptd key add --recovery-key' does"
	case keyunseal.ClassIntegrity:
		return "the token was changed, or is another volume's; it can't open the volume any more"
	}
	return "the token would not be used"
}

// hostKeyPlace says what is wrong with where the host key file is, or "".
func hostKeyPlace(hostKey, device, uuid string) string {
	var key, dev unix.Stat_t
	if unix.Stat(hostKey, &key) != nil || unix.Stat(device, &dev) != nil {
		return ""
	}
	sys := func(n uint64) string {
		p, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(n), unix.Minor(n)))
		if err != nil {
			return ""
		}
		return p
	}
	place := sys(key.Dev)
	if b, err := os.ReadFile(filepath.Join(place, "backend")); err == nil && place != "" && strings.TrimSpace(string(b)) == "hostcryptd-"+uuid {
		return "on the volume itself, which it can't open"
	}
	if dev.Mode&unix.S_IFMT != unix.S_IFBLK {
		if key.Dev == dev.Dev {
			return "on the same file system as the image: who gets hold of that disk has both"
		}
		return ""
	}
	// A partition stands below its disk.
	disk := sys(dev.Rdev)
	if _, err := os.Stat(filepath.Join(disk, "partition")); err == nil {
		disk = filepath.Dir(disk)
	}
	if disk != "" && (place == disk || strings.HasPrefix(place, disk+"/")) {
		return "on the same disk: who gets hold of it has both"
	}
	return ""
}

// slotsTexts says what was found out about keyslots. Damage to one that hostcryptd
// has not written can't be seen without its key.
func slotsTexts(intact, noted, unknown []int) (list []string) {
	if len(intact) > 0 {
		list = append(list, fmt.Sprintf("keyslots %v are as they were written", intact))
	}
	if len(noted) > 0 {
		list = append(list, fmt.Sprintf("keyslots %v are as they were when they were noted first, some time after they were made; 'hostcryptd recovery test' tells whether a recovery key opens one", noted))
	}
	if len(unknown) > 0 {
		list = append(list, fmt.Sprintf("keyslots %v can be read, and only 'hostcryptd recovery test' tells whether a recovery key opens one", unknown))
	}
	return list
}

func (a *app) printCheck(r *checkReport) {
	line := func(format string, args ...any) { fmt.Fprintln(a.stdout, printable(fmt.Sprintf(format, args...))) }
	line("%-15s %s on %s", "volume:", r.UUID, r.Device)
	line("%-15s %s", "header copies:", r.Copies)
	line("%-15s %s", "pin:", r.Pin)
	for _, t := range r.Tokens {
		name := fmt.Sprintf("token %d:", t.ID)
		if t.OK {
			line("%-15s opens the volume, in %.1f s: %s", name, t.Took, t.text())
			continue
		}
		if t.Retired != nil {
			line("%-15s doesn't open the volume, and is to be used no more: %s", name, t.text())
			line("%-15s %s", "", t.Reason)
			continue
		}
		line("%-15s FAILS: %s", name, t.text())
		line("%-15s %s", "", t.Reason)
		line("%-15s %s", "", t.Meaning)
	}
	for _, text := range slotsTexts(r.Intact, r.Noted, r.unknown) {
		line("%-15s %s", "recovery:", text)
	}
	for _, f := range r.Findings {
		if !slices.ContainsFunc(r.Tokens, func(t checkToken) bool { return t.Reason == f }) { // which stands above
			line("%-15s %s", "error:", f)
		}
	}
	for _, n := range r.Notices {
		line("%-15s %s", "notice:", n)
	}
	if r.Opens {
		line("The volume would open if this host rebooted now.")
	} else {
		line("The volume would NOT open if this host rebooted now.")
	}
}
