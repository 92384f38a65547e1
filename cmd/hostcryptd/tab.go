package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/pflag"

	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
	"hostcryptd/systemd"
)

// tabFile lists volumes by name, in the form of crypttab(5): a name, a device,
// a key and options, separated by blanks. As there, # begins a comment only
// where a line begins, and nothing is quoted but what follows UUID= and its like.
const tabFile = "/etc/hostcrypttab"

// A tabEntry is one line of it.
type tabEntry struct {
	line int
	unit systemd.Volume // what concerns who starts the service; Name and Device are set
	// flags of serve that the line sets, in its order.
	flags []tabFlag
	words []string // of the fourth field, also of another line with the name
	rest  []string // the third field and the fourth
	// err says what is wrong with the line, whose name is known.
	err error
}

type tabFlag struct{ name, value string }

// A tabWord is what a word of the fourth field means: a flag of serve, or
// something for who starts the service.
type tabWord struct {
	flag  string
	value int // noValue and so on
	set   func(e *tabEntry, value string) error
	no    string // why it is refused
}

// What a word is followed by.
const (
	noValue = iota
	someText
	someTime // of systemd.time(7); a number alone is in seconds, as in crypttab
	maybeText
)

// tabWords are the words of crypttab(5) that make sense here, and the flags of
// serve.
var tabWords = map[string]tabWord{
	"defaults": {}, "luks": {},
	"noauto":  {set: func(e *tabEntry, _ string) error { e.unit.NoAuto = true; return nil }},
	"nofail":  {set: func(e *tabEntry, _ string) error { e.unit.NoFail = true; return nil }},
	"_netdev": {set: func(e *tabEntry, _ string) error { e.unit.NetDev = true; return nil }},
	"x-systemd.device-timeout": {value: someTime, set: func(e *tabEntry, value string) error {
		d, err := parseSpan(value)
		e.unit.DeviceTimeout = &d
		return err
	}},
	"read-only": {flag: "read-only"}, "readonly": {flag: "read-only"},
	"discard": {flag: "discard"},
	"timeout": {flag: "unseal-timeout", value: someTime},
	"swap": {set: func(e *tabEntry, _ string) error {
		e.unit.Swap = true
		e.flags = append(e.flags, tabFlag{"swap", "true"})
		return e.makeFS("swap")
	}},
	"swapfile": {set: func(e *tabEntry, _ string) error {
		e.unit.Swap = true
		e.flags = append(e.flags, tabFlag{"swap", "true"})
		return nil
	}},
	"tmp": {value: maybeText, set: func(e *tabEntry, value string) error {
		if value == "" {
			value = "ext4"
		}
		return e.makeFS(value)
	}},
	"header": {no: "a detached header isn't supported; the header is at the start of the device"},
	"offset": {no: "the header says where the data begins"}, "skip": {no: "the header says where the data begins"},
	"size": {no: "it is in the header"}, "cipher": {no: "it is always aes-xts-plain64"}, "hash": {no: "there is no passphrase"},
	"plain": {no: "there is no volume without a header; for a key that is drawn at each boot, the key is /dev/urandom"},

	"pins": {value: someText, set: func(e *tabEntry, value string) error {
		e.flags = append(e.flags, tabFlag{"pins", value})
		return e.pinsIn(filepath.Join("/", value)) // serve runs in /
	}},
	"uuid": {value: someText, set: func(e *tabEntry, value string) error {
		id, err := volumeUUID(value)
		e.flags = append(e.flags, tabFlag{"uuid", id})
		return err
	}},
	"attach": {flag: "attach", value: someText}, "listen": {flag: "listen", value: someText},
	"tcp": {flag: "tcp", value: someText}, "tls-certificates": {flag: "tls-certificates", value: someText},
	"connections": {flag: "connections", value: someText}, "direct": {flag: "direct"},
	"sector-size": {flag: "sector-size", value: someText}, "control": {flag: "control", value: someText},
	"identity": {flag: "identity", value: someText}, "tpm": {flag: "tpm", value: someText}, "cloud": {flag: "cloud", value: someText},
	"require-pin": {flag: "require-pin"}, "signer": {flag: "signer", value: someText}, "audit-log": {flag: "audit-log", value: someText},
	"on-revocation": {flag: "on-revocation", value: someText}, "expired-key": {flag: "expired-key", value: someText},
	"heartbeat": {flag: "heartbeat", value: someTime}, "grace": {flag: "grace", value: someTime},
	"max-offline": {flag: "max-offline", value: someTime}, "confirm": {flag: "confirm", value: someTime},
	"rotate-check": {flag: "rotate-check", value: someTime},
}

// randomKeys are the key files of crypttab that stand for a key of this boot.
var randomKeys = map[string]bool{"random": true, "/dev/urandom": true, "/dev/random": true, "/dev/hw_random": true}

// readTab reads a table. What is wrong with a line is the error of its entry,
// or, if it has no name, in bad.
func readTab(file string) (entries []*tabEntry, bad []error, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	entries, bad = parseTab(string(b))
	for _, e := range entries {
		if e.err != nil {
			e.err = usagef("%s line %d: %w", file, e.line, e.err)
		}
	}
	for i, err := range bad {
		bad[i] = usagef("%s %w", file, err)
	}
	return entries, bad, nil
}

func parseTab(text string) (entries []*tabEntry, bad []error) {
	first := map[string]*tabEntry{}
	n := 0
	for line := range strings.Lines(text) {
		n++
		f := strings.Fields(line)
		if len(f) == 0 || strings.HasPrefix(f[0], "#") {
			continue
		}
		name := f[0]
		if err := checkTabName(name); err != nil {
			bad = append(bad, fmt.Errorf("line %d: %w", n, err))
			continue
		}
		e := &tabEntry{line: n, unit: systemd.Volume{Name: name}}
		if len(f) > 3 {
			e.words = strings.Split(f[3], ",")
		}
		e.rest = f[min(2, len(f)):min(4, len(f))]
		e.err = e.parse(f[1:])
		if before := first[name]; before != nil {
			// Which of the two is meant is nobody's to guess.
			before.err = errors.Join(before.err, fmt.Errorf("line %d has the name %s too", n, name))
			before.words = append(before.words, e.words...)
			continue
		}
		first[name] = e
		entries = append(entries, e)
	}
	return entries, bad
}

// checkTabName allows what can be part of a unit's and of a file's name as it is.
func checkTabName(name string) error {
	ok := len(name) <= 64 && name != "." && name != ".." && name[0] != '-'
	for _, c := range name {
		ok = ok && (c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.ContainsRune("_.-", c))
	}
	if !ok {
		return fmt.Errorf("%q is no name for a volume: that is up to 64 letters, digits and _ . -", name)
	}
	return nil
}

// parse reads the fields after the name.
func (e *tabEntry) parse(f []string) error {
	if len(f) == 0 {
		return errors.New("no device; a line is: name device [key [options]]")
	}
	// crypttab ignores what is behind the fourth field, which is most often a
	// comment. Here it has to be one.
	if len(f) > 3 && !strings.HasPrefix(f[3], "#") {
		return fmt.Errorf("%d fields; a line is: name device [key [options]]", 1+len(f))
	}
	var err error
	if e.unit.Device, err = tabDevice(f[0]); err != nil {
		return err
	}
	// All of it is read, whatever is wrong with a part: what waits for the volume
	// is to fail with it, and not after a timeout.
	var errs []error
	if len(f) > 2 {
		for _, word := range e.words {
			if err := e.option(word); err != nil {
				errs = append(errs, fmt.Errorf("option %q: %w", word, err))
			}
		}
	}
	errs = append(errs, e.where())
	e.unit.Vault = true
	if len(f) > 1 {
		errs = append(errs, e.key(f[1]))
	}
	for _, f := range e.flags {
		e.unit.Network = e.unit.Network || f.name == "tcp"
	}
	errs = append(errs, e.bind())
	return errors.Join(errs...)
}

// bind makes UUID= mean the volume, and not what udev or a disk says of itself: who
// has the storage could exchange two volumes of a host.
func (e *tabEntry) bind() error {
	id, ok := strings.CutPrefix(e.unit.Device, byUUID)
	given := e.flag("uuid")
	switch {
	case !ok || !sector.IsUUID(id) || e.randomKey():
	case given == "":
		e.flags = append(e.flags, tabFlag{"uuid", id})
	case given != id:
		return fmt.Errorf("option \"uuid=%s\": the device is that of volume %s", given, id)
	}
	return nil
}

// pinsIn says where the service of the line has to be let write, or why it can't.
func (e *tabEntry) pinsIn(dir string) error {
	below := func(parent, dir string) bool {
		return dir == parent || strings.HasPrefix(dir, strings.TrimSuffix(parent, "/")+"/")
	}
	plain := !strings.ContainsFunc(dir, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && !strings.ContainsRune("_.-/", r)
	})
	const usual = string(sector.DefaultPins)
	switch {
	case dir != usual && below(dir, usual):
		return fmt.Errorf("the service would have to be let write to all of %s; it has to be a directory of its own, such as %s", dir, usual)
	case below("/usr", dir), below("/boot", dir), below("/efi", dir): // ProtectSystem=full
		return errors.New("the service of a volume can't write there")
	case below("/etc", dir) && !plain:
		return errors.New("the name of a directory in /etc has only letters, digits and _ . - here")
	case below("/etc", dir) && !below(usual, dir):
		e.unit.Pins = dir
	}
	return nil
}

// flag is the value that a line gives to a flag of serve, or "".
func (e *tabEntry) flag(name string) (value string) {
	for _, f := range e.flags {
		if f.name == name {
			value = f.value
		}
	}
	return value
}

// key reads the third field.
func (e *tabEntry) key(s string) error {
	switch {
	case s == "-" || s == "none":
		return nil
	case randomKeys[s]:
		e.unit.Vault = false
		e.flags = append(e.flags, tabFlag{"random-key", "true"})
		return nil
	case strings.HasPrefix(s, "https://"):
		return fmt.Errorf("key %q: which vault opens a volume is in its header; here it is -", s)
	case !filepath.IsAbs(s):
		return fmt.Errorf("key %q: it is the path of the host key file, /dev/urandom for a key of this boot, or -", s)
	}
	e.unit.KeyFile = s
	e.flags = append(e.flags, tabFlag{"host-key", s})
	return nil
}

// option reads a word of the fourth field.
func (e *tabEntry) option(word string) error {
	name, value, hasValue := strings.Cut(word, "=")
	w, ok := tabWords[name]
	switch {
	case name == "" && !hasValue:
		return nil
	case !ok && strings.HasPrefix(name, "x-"):
		return nil // for others, as in crypttab
	case !ok:
		return errors.New("it is not known")
	case w.no != "":
		return errors.New(w.no)
	case w.value == noValue && hasValue:
		return errors.New("it takes no value")
	case (w.value == someText || w.value == someTime) && value == "", w.value == maybeText && hasValue && value == "":
		return errors.New("it needs a value")
	}
	if w.set != nil {
		return w.set(e, value)
	}
	switch {
	case w.flag == "":
		return nil
	case w.value == noValue:
		value = "true"
	case value == "infinity" && (name == "grace" || name == "confirm"):
		return errors.New("it has an end")
	case w.value == someTime:
		d, err := parseSpan(value)
		if err != nil {
			return err
		}
		value = d.String()
	}
	e.flags = append(e.flags, tabFlag{w.flag, value})
	return nil
}

func (e *tabEntry) makeFS(kind string) error {
	if e.unit.MakeFS != "" {
		return fmt.Errorf("there is to be %s on it already", e.unit.MakeFS)
	}
	for _, c := range kind {
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '_' {
			return fmt.Errorf("%q is no type of file system", kind)
		}
	}
	e.unit.MakeFS = kind
	return nil
}

// where decides where the volume is to appear: as a kernel device, unless the
// line says something else.
func (e *tabEntry) where() error {
	elsewhere := false
	for _, f := range e.flags {
		switch f.name {
		case "attach":
			e.unit.Attach = f.value
		case "listen", "tcp":
			elsewhere = true
		}
	}
	if e.unit.Attach == "" && !elsewhere {
		e.unit.Attach = "auto"
		e.flags = append(e.flags, tabFlag{"attach", "auto"})
	}
	if e.unit.Attach == "" && e.unit.MakeFS != "" {
		return errors.New("swap and tmp need a kernel device: attach=auto")
	}
	return nil
}

// apply sets the flags of serve that the line says, unless the command line has
// them too.
func (e *tabEntry) apply(flags *pflag.FlagSet) error {
	if e.err != nil {
		return e.err
	}
	given := map[string]bool{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = true })
	if given["attach"] || given["listen"] || given["tcp"] {
		given["attach"], given["listen"], given["tcp"] = true, true, true
	}
	for _, f := range e.flags {
		if given[f.name] {
			continue
		}
		if err := flags.Set(f.name, f.value); err != nil {
			return usagef("volume %s: %w", e.unit.Name, err)
		}
	}
	return nil
}

// randomKey tells whether the volume has a key of this boot.
func (e *tabEntry) randomKey() bool { return e.flag("random-key") != "" }

// tabIndexes are the kernel devices that a table gives to volumes of other names, also
// to those that aren't attached yet.
func tabIndexes(file, name string) (list []int, err error) {
	entries, _, err := readTab(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	for _, e := range entries {
		if index, err := nbdnl.ParsePath(e.unit.Attach); err == nil && e.unit.Name != name {
			list = append(list, index)
		}
	}
	return list, err
}

// named returns the entry of an argument that may be a name in the table, or nil
// if it's a path.
func named(arg string) (*tabEntry, error) {
	if strings.Contains(arg, "/") {
		return nil, nil
	}
	e, err := lookupOnce(tabFile, arg)
	if err == nil {
		return e, nil
	}
	if _, serr := os.Stat(arg); serr == nil && (exitCode(err) == codeDevice || errors.Is(err, os.ErrPermission)) {
		return nil, nil // a file, and no name
	}
	return nil, err
}

// lookup finds a name in a table.
func lookup(file, name string) (*tabEntry, error) {
	entries, bad, err := readTab(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, withCode(codeDevice, fmt.Errorf("%q is no path, and there is no %s to look the name up in", name, file))
	}
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		if e.unit.Name == name {
			return e, e.err
		}
	}
	return nil, withCode(codeDevice, errors.Join(append([]error{fmt.Errorf("%s has no volume %q", file, name)}, bad...)...))
}

// byUUID has links to devices by the UUID that udev has found on them.
const byUUID = "/dev/disk/by-uuid/"

// tabDevice makes a path of the second field.
func tabDevice(s string) (string, error) {
	for tag, dir := range map[string]string{"UUID": "by-uuid", "LABEL": "by-label", "PARTUUID": "by-partuuid", "PARTLABEL": "by-partlabel"} {
		if v, ok := strings.CutPrefix(s, tag+"="); ok {
			if n := len(v); n > 1 && (v[0] == '"' || v[0] == '\'') && v[n-1] == v[0] {
				v = v[1 : n-1]
			}
			if v == "" {
				return "", fmt.Errorf("device %q names nothing", s)
			}
			if id, err := volumeUUID(v); err == nil && strings.HasSuffix(dir, "uuid") {
				v = id // as udev has those of this form
			}
			return filepath.Join("/dev/disk", dir, udevName(v)), nil
		}
	}
	if !filepath.IsAbs(s) {
		return "", fmt.Errorf("device %q is no absolute path and no UUID=, LABEL=, PARTUUID= or PARTLABEL=", s)
	}
	return filepath.Clean(s), nil
}

// udevName writes a label as udev does in the name of a link: what isn't plain
// becomes \xNN.
func udevName(label string) string {
	var b strings.Builder
	for len(label) > 0 {
		r, n := utf8.DecodeRuneInString(label)
		c := label[0]
		switch {
		case n > 1, c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("#+-.:=@_", r):
			b.WriteString(label[:n])
		default:
			fmt.Fprintf(&b, `\x%02x`, c)
		}
		label = label[n:]
	}
	return b.String()
}

// parseSpan reads a time span of systemd.time(7): numbers with units, of which
// seconds can be left out. Infinity is 0, which to the flags means never.
func parseSpan(s string) (time.Duration, error) {
	if s == "infinity" {
		return 0, nil
	}
	var total time.Duration
	rest := strings.TrimSpace(s)
	if rest == "" {
		return 0, errors.New("it needs a time")
	}
	for rest != "" {
		n := strings.IndexFunc(rest, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
		if n < 0 {
			n = len(rest)
		}
		number, tail := rest[:n], strings.TrimLeft(rest[n:], " ")
		n = strings.IndexFunc(tail, func(r rune) bool { return r < 'a' || r > 'z' })
		if n < 0 {
			n = len(tail)
		}
		unit, ok := spanUnits[tail[:n]]
		v, err := strconv.ParseFloat(number, 64)
		if !ok || err != nil || v > float64(1<<62)/float64(unit) {
			return 0, fmt.Errorf("%q is no time: 30, 90s, 1min 30s, 2h", s)
		}
		total += time.Duration(v * float64(unit))
		rest = strings.TrimLeft(tail[n:], " ")
	}
	return total, nil
}

var spanUnits = func() map[string]time.Duration {
	m := map[string]time.Duration{}
	for unit, names := range map[time.Duration]string{
		time.Microsecond: "us usec", time.Millisecond: "ms msec", time.Second: "s sec second seconds",
		time.Minute: "m min minute minutes", time.Hour: "h hr hour hours", 24 * time.Hour: "d day days", 7 * 24 * time.Hour: "w week weeks",
	} {
		for name := range strings.FieldsSeq(names) {
			m[name] = unit
		}
	}
	m[""] = time.Second
	return m
}()
