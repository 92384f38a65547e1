package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// tabFile lists volumes by name, in the form of crypttab(5): a name, a device,
// a key and options, separated by blanks, with # before a comment.
const tabFile = "/etc/hostcrypttab"

// A tabEntry is one line of it.
type tabEntry struct {
	name, device string
	hostKey      string // "" and "-" are the default
	options      []string
}

// lookup finds a name in a table.
func lookup(file, name string) (*tabEntry, error) {
	b, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, withCode(codeDevice, fmt.Errorf("%q is no path, and there is no %s to look the name up in", name, file))
	}
	if err != nil {
		return nil, err
	}
	n := 0
	for line := range strings.Lines(string(b)) {
		n++
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		if len(f) == 0 || f[0] != name {
			continue
		}
		if len(f) < 2 || len(f) > 4 {
			return nil, usagef("%s line %d: %d fields; a line is: name device [key [options]]", file, n, len(f))
		}
		e := &tabEntry{name: f[0]}
		if e.device, err = tabDevice(f[1]); err != nil {
			return nil, usagef("%s line %d: %w", file, n, err)
		}
		if len(f) > 2 && f[2] != "-" && f[2] != "none" {
			e.hostKey = f[2]
		}
		if len(f) > 3 {
			e.options = strings.Split(f[3], ",")
		}
		return e, nil
	}
	return nil, withCode(codeDevice, fmt.Errorf("%s has no volume %q", file, name))
}

// tabDevice makes a path of the second field.
func tabDevice(s string) (string, error) {
	for tag, dir := range map[string]string{"UUID": "by-uuid", "LABEL": "by-label", "PARTUUID": "by-partuuid", "PARTLABEL": "by-partlabel"} {
		if v, ok := strings.CutPrefix(s, tag+"="); ok {
			return filepath.Join("/dev/disk", dir, strings.Trim(v, `"`)), nil
		}
	}
	if !filepath.IsAbs(s) {
		return "", fmt.Errorf("device %q is no absolute path and no UUID= or LABEL=", s)
	}
	return s, nil
}

// apply puts the options of an entry into those of serve. Words that concern
// only who starts the service, not the service, are skipped; a word that
// nobody knows is an error.
func (e *tabEntry) apply(o *serveOptions) error {
	o.name = e.name
	if e.hostKey != "" {
		o.keys.hostKey = e.hostKey
	}
	attach, listen := "", ""
	for _, word := range e.options {
		name, value, hasValue := strings.Cut(word, "=")
		var err error
		switch name {
		case "", "defaults", "noauto", "nofail", "_netdev", "luks":
		case "read-only", "readonly":
			o.readOnly = true
		case "discard":
			o.discard = true
		case "require-pin":
			o.requirePin = true
		case "attach":
			attach = value
		case "listen":
			listen = value
		case "identity":
			o.keys.identity = value
		case "tpm":
			o.keys.tpm = value
		case "signer":
			o.keys.signer = value
		case "cloud":
			o.keys.cloud = value
		case "timeout":
			o.unsealTimeout, err = time.ParseDuration(value)
		default:
			if strings.HasPrefix(name, "x-") {
				continue // for who starts the service, as in crypttab
			}
			err = errors.New("it is not known")
		}
		if takesValue := slices.Contains([]string{"attach", "listen", "identity", "tpm", "cloud", "timeout"}, name); err == nil && takesValue != (hasValue && value != "") {
			err = map[bool]error{true: errors.New("it needs a value"), false: errors.New("it takes no value")}[takesValue]
		}
		if err != nil {
			return usagef("%s: volume %s: option %q: %w", tabFile, e.name, word, err)
		}
	}
	if attach == "" && listen == "" {
		attach = "auto"
	}
	if o.attach == "" && o.listen == "" {
		o.attach, o.listen = attach, listen
	}
	return nil
}
