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

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// initrdLinesCommand is for the makers of an initramfs (systemd/initrd), which has to
// read of a table what the daemon reads.
func (a *app) initrdLinesCommand() *cobra.Command {
	var devices, files bool
	c := &cobra.Command{
		Use:   "initrd-lines OPTION",
		Short: "print the lines of " + tabFile + " with an option, for the maker of an initramfs",
		Long: `initrd-lines prints the lines of ` + tabFile + `, or of $HOSTCRYPTTAB, that have
OPTION, with single blanks and without comments; or the devices of their volumes; or
the files of this host that they need.`,
		Hidden: true,
		Args:   oneArg("OPTION"),
		RunE: func(c *cobra.Command, args []string) error {
			file := cmp.Or(os.Getenv("HOSTCRYPTTAB"), tabFile)
			b, err := os.ReadFile(file)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			for n, f := range tabLines(string(b)) {
				if len(f) < 4 || !slices.Contains(strings.Split(f[3], ","), args[0]) {
					continue
				}
				if !devices && !files {
					// Also one that is wrong, or there twice: the daemon says so.
					if len(f) > 4 && strings.HasPrefix(f[4], "#") {
						f = f[:4]
					}
					fmt.Fprintln(a.stdout, strings.Join(f, " "))
					continue
				}
				e := &tabEntry{line: n}
				e.unit.Name = f[0]
				if err := e.parse(f[1:]); err != nil {
					a.warnf("%s line %d: %v", file, n, err)
				}
				switch {
				case e.unit.Device == "":
				case devices:
					fmt.Fprintln(a.stdout, e.unit.Device)
				default:
					for _, name := range a.initrdFiles(c.Context(), e) {
						fmt.Fprintln(a.stdout, name)
					}
				}
			}
			return nil
		},
	}
	c.Flags().BoolVar(&devices, "devices", false, "print their devices")
	c.Flags().BoolVar(&files, "files", false, "print the files that they need")
	c.MarkFlagsMutuallyExclusive("devices", "files")
	return c
}

// initrdFiles are the files of this host that a volume needs to open. What isn't needed
// stays where it is better protected.
func (a *app) initrdFiles(ctx context.Context, e *tabEntry) (files []string) {
	value := func(flag string) (value string) {
		for _, f := range e.flags {
			if f.name == flag {
				value = f.value
			}
		}
		return value
	}
	name := e.unit.Name
	if key := a.initrdHostKey(ctx, e); key != "" {
		a.warnf("the host key of %s is in the initramfs: who has that, and the disk, opens the volume", name)
		files = append(files, key)
	}
	identity := strings.SplitN(value("identity"), ":", 4)
	if kind := identity[0]; len(identity) == 4 && (kind == "certificate" || kind == "workload") {
		a.warnf("the secret of the identity of %s is in the initramfs: who has that is this identity to the vault", name)
		files = append(files, identity[3])
	}
	if signer := value("signer"); signer != "" {
		files = append(files, signer)
	}
	have := func(name string) bool {
		fi, err := os.Stat(name)
		return err == nil && fi.Mode().IsRegular()
	}
	if e.unit.NetDev {
		for _, name := range []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/hosts"} {
			if have(name) {
				files = append(files, name)
			}
		}
	}
	if cloud := cmp.Or(value("cloud"), keyunseal.DefaultCloud); value("cloud") != "" || e.unit.NetDev && have(cloud) {
		files = append(files, cloud)
		var parts struct {
			CAFile string `json:"ca_file"`
		}
		if b, err := os.ReadFile(cloud); err == nil && json.Unmarshal(b, &parts) == nil && parts.CAFile != "" {
			files = append(files, parts.CAFile)
		}
	}
	// What this host remembers of the volume: an older header is refused there too.
	pins, _ := filepath.Glob(cmp.Or(value("pins"), string(sector.DefaultPins)) + "/*")
	return append(files, slices.DeleteFunc(pins, func(name string) bool { return !have(name) })...)
}

// initrdHostKey is the host key file, if the volume has such a key.
func (a *app) initrdHostKey(ctx context.Context, e *tabEntry) string {
	switch {
	case e.unit.KeyFile != "":
		return e.unit.KeyFile
	case e.randomKey():
		return ""
	}
	takes := false
	err := withHeader(e.unit.Device, true, func(d *sector.Device) error {
		h, _, err := sector.ReadHeader(ctx, d)
		if err == nil {
			takes = slices.ContainsFunc(tokenInfos(h), func(t tokenInfo) bool { return t.Type == keyunseal.TypeHostKey })
		}
		return err
	})
	if err != nil {
		a.warnf("which keys volume %s has can't be read, so no host key is in the initramfs; if that is what opens it, it will not open at boot, unless the third field of its line is the key's file: %v", e.unit.Name, err)
	}
	if !takes {
		return ""
	}
	return keyunseal.DefaultHostKey
}
