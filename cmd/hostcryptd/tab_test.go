package main

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"hostcryptd/systemd"
)

// tabFlags are the flags of serve that a line sets.
func tabFlags(t *testing.T, e *tabEntry, given ...string) (map[string]string, error) {
	t.Helper()
	flags := (&app{}).serveCommand().Flags()
	if err := flags.Parse(given); err != nil {
		t.Fatal(err)
	}
	err := e.apply(flags)
	got := map[string]string{}
	flags.Visit(func(f *pflag.Flag) { got[f.Name] = f.Value.String() })
	return got, err
}

func TestTab(t *testing.T) {
	seconds := func(n time.Duration) *time.Duration { n *= time.Second; return &n }
	for _, tt := range []struct {
		line  string
		given []string
		unit  systemd.Volume
		flags map[string]string
		err   string // part of it
	}{
		{line: "a /dev/sdx", unit: systemd.Volume{Device: "/dev/sdx", Attach: "auto"}, flags: map[string]string{"attach": "auto"}},
		{line: "\ta  /dev//sdx\t-   -", err: `option "-": it is not known`},
		{line: "a /dev/sdx none luks,defaults,,nofail,noauto,_netdev # a comment, and more",
			unit: systemd.Volume{Device: "/dev/sdx", Attach: "auto", NoFail: true, NoAuto: true, NetDev: true}, flags: map[string]string{"attach": "auto"}},
		{line: "a PARTLABEL=x#1 /etc/k#2 attach=/dev/nbd3,tmp",
			unit:  systemd.Volume{Device: "/dev/disk/by-partlabel/x#1", KeyFile: "/etc/k#2", Attach: "/dev/nbd3", MakeFS: "ext4"},
			flags: map[string]string{"attach": "/dev/nbd3", "host-key": "/etc/k#2"}},
		{line: `a LABEL="d/ü" /dev/urandom swap,discard`,
			unit:  systemd.Volume{Device: `/dev/disk/by-label/d\x2fü`, Attach: "auto", MakeFS: "swap", Swap: true},
			flags: map[string]string{"attach": "auto", "swap": "true", "random-key": "true", "discard": "true"}},
		// The volume, and not what udev finds; but for one without a header.
		{line: "a UUID=0f8fad5b-d9cb-469f-a165-70867728950e", unit: systemd.Volume{Device: "/dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto"},
			flags: map[string]string{"attach": "auto", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e"}},
		{line: "a /dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e - uuid=0f8fad5b-d9cb-469f-a165-70867728950e", unit: systemd.Volume{Device: "/dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto"},
			flags: map[string]string{"attach": "auto", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e"}},
		{line: "a UUID=0f8fad5b-d9cb-469f-a165-70867728950e random swap", unit: systemd.Volume{Device: "/dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto", MakeFS: "swap", Swap: true},
			flags: map[string]string{"attach": "auto", "random-key": "true", "swap": "true"}},
		{line: "a UUID=0F8FAD5B-D9CB-469F-A165-70867728950E", unit: systemd.Volume{Device: "/dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto"},
			flags: map[string]string{"attach": "auto", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e"}},
		{line: `a PARTUUID="0F8FAD5B-D9CB-469F-A165-70867728950E" - uuid=1F8FAD5B-D9CB-469F-A165-70867728950E`, unit: systemd.Volume{Device: "/dev/disk/by-partuuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto"},
			flags: map[string]string{"attach": "auto", "uuid": "1f8fad5b-d9cb-469f-a165-70867728950e"}},
		{line: "a UUID=0F8FAD5B-D9CB-469F-A165-70867728950E - uuid=0f8fad5b-d9cb-469F-A165-70867728950E", unit: systemd.Volume{Device: "/dev/disk/by-uuid/0f8fad5b-d9cb-469f-a165-70867728950e", Attach: "auto"},
			flags: map[string]string{"attach": "auto", "uuid": "0f8fad5b-d9cb-469f-a165-70867728950e"}},
		{line: "a LABEL=0F8FAD5B-D9CB-469F-A165-70867728950E", unit: systemd.Volume{Device: "/dev/disk/by-label/0F8FAD5B-D9CB-469F-A165-70867728950E", Attach: "auto"}, flags: map[string]string{"attach": "auto"}},
		{line: "a UUID=1-2", unit: systemd.Volume{Device: "/dev/disk/by-uuid/1-2", Attach: "auto"}, flags: map[string]string{"attach": "auto"}},
		{line: "a /dev/x - uuid=1-2", err: "not the UUID of a volume"},
		{line: "a UUID=0f8fad5b-d9cb-469f-a165-70867728950e - uuid=1f8fad5b-d9cb-469f-a165-70867728950e", err: "the device is that of volume 0f8fad5b"},
		{line: "a /img - listen=/run/s,readonly,timeout=30", unit: systemd.Volume{Device: "/img"},
			flags: map[string]string{"listen": "/run/s", "read-only": "true", "unseal-timeout": "30s"}},
		{line: "a /img - timeout=1min,x-systemd.device-timeout=5,x-initrd.attach,x-anything=1,grace=1min30s,connections=2,on-revocation=warn",
			unit:  systemd.Volume{Device: "/img", Attach: "auto", DeviceTimeout: seconds(5)},
			flags: map[string]string{"attach": "auto", "unseal-timeout": "1m0s", "grace": "1m30s", "connections": "2", "on-revocation": "warn"}},
		{line: "a /img - attach=auto,listen=/s,timeout=infinity", given: []string{"--listen=/other", "--unseal-timeout=5s"},
			unit: systemd.Volume{Device: "/img", Attach: "auto"}, flags: map[string]string{"listen": "/other", "unseal-timeout": "5s"}},
		{line: "a /dev/x - swapfile,attach=/dev/nbd0,x-initrd.attach",
			unit:  systemd.Volume{Device: "/dev/x", Attach: "/dev/nbd0", Swap: true},
			flags: map[string]string{"attach": "/dev/nbd0", "swap": "true"}},
		{line: "a /dev/x - pins=/etc/hostcryptd/other/../second", unit: systemd.Volume{Device: "/dev/x", Attach: "auto", Pins: "/etc/hostcryptd/second"},
			flags: map[string]string{"attach": "auto", "pins": "/etc/hostcryptd/other/../second"}},
		{line: "a /dev/x - pins=/etc/hostcryptd/pins/", unit: systemd.Volume{Device: "/dev/x", Attach: "auto"}, flags: map[string]string{"attach": "auto", "pins": "/etc/hostcryptd/pins/"}},
		{line: "a /dev/x - pins=/var/lib/ü", unit: systemd.Volume{Device: "/dev/x", Attach: "auto"}, flags: map[string]string{"attach": "auto", "pins": "/var/lib/ü"}},
		{line: "a /dev/x - pins=/etc/hostcryptd", err: "a directory of its own"},
		{line: "a /dev/x - pins=etc/", err: "a directory of its own"},
		{line: "a /dev/x - pins=/", err: "a directory of its own"},
		{line: "a /dev/x - pins=/usr/share/pins", err: "can't write there"},
		{line: "a /dev/x - pins=/etc/p:q", err: "only letters"},
		{line: "a /img - tmp=xfs,tcp=127.0.0.1:1", err: "swap and tmp need a kernel device"},

		{line: "a", err: "no device"},
		{line: "a sdx", err: "no absolute path"},
		{line: "a UUID=", err: "names nothing"},
		{line: "a /dev/x - discard more", err: "5 fields"},
		{line: "a /dev/x # comment", err: `key "#"`},
		{line: "a /dev/x https://v.vault.azure.net/keys/k", err: "in its header"},
		{line: "a /dev/x - header=/h", err: "a detached header isn't supported"},
		{line: "a /dev/x - bogus", err: `option "bogus": it is not known`},
		{line: "a /dev/x - =", err: "it is not known"},
		{line: "a /dev/x - read-only=no", err: "it takes no value"},
		{line: "a /dev/x - attach", err: "it needs a value"},
		{line: "a /dev/x - tmp=", err: "it needs a value"},
		{line: "a /dev/x - tmp=ext4;reboot", err: "no type of file system"},
		{line: "a /dev/x - tmp,swap", err: "there is to be ext4 on it already"},
		{line: "a /dev/x - timeout=soon", err: "no time"},
		{line: "a /dev/x - grace=infinity", err: "it has an end"},
		{line: "a /dev/x - connections=many", err: "connections"},
	} {
		entries, bad := parseTab(tt.line + "\n")
		if len(entries) != 1 || len(bad) != 0 {
			t.Errorf("%q: %d entries, errors %v", tt.line, len(entries), bad)
			continue
		}
		flags, err := tabFlags(t, entries[0], tt.given...)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%q: error %v, want %q in it", tt.line, err, tt.err)
			}
			continue
		}
		tt.unit.Name = "a"
		tt.unit.Vault, tt.unit.Network = flags["random-key"] == "", flags["tcp"] != ""
		got := entries[0].unit
		if d, w := got.DeviceTimeout, tt.unit.DeviceTimeout; (d == nil) != (w == nil) || d != nil && *d != *w {
			t.Errorf("%q: device timeout %v, want %v", tt.line, d, w)
		}
		got.DeviceTimeout, tt.unit.DeviceTimeout = nil, nil
		if err != nil || got != tt.unit || !maps.Equal(flags, tt.flags) {
			t.Errorf("%q: %+v, flags %v, error %v; want %+v, flags %v", tt.line, got, flags, err, tt.unit, tt.flags)
		}
	}
}

// TestTabWordsAreFlags checks that no word of the table sets a flag that serve
// doesn't have.
func TestTabWordsAreFlags(t *testing.T) {
	flags := (&app{}).serveCommand().Flags()
	for word, w := range tabWords {
		if w.flag != "" && flags.Lookup(w.flag) == nil {
			t.Errorf("the word %s sets --%s, which serve doesn't have", word, w.flag)
		}
	}
	// Every flag is a word, or can't be one.
	without := []string{"host-key", "random-key", "unseal-timeout", "force", "initrd", "help"}
	flags.VisitAll(func(f *pflag.Flag) {
		if _, ok := tabWords[f.Name]; !ok && !slices.Contains(without, f.Name) {
			t.Errorf("serve has --%s, and the table no word for it", f.Name)
		}
	})
}

func TestTabFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "tab")
	text := "# comment\n   # another\n\ntwice /dev/sda\nonce /dev/sdb\na/b /dev/sdc\n-x /dev/sdd\n" +
		strings.Repeat("n", 65) + " /dev/sde\ntwice /dev/sdf\nwrong /dev/sdg - bogus,nofail"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if e, err := lookup(file, "once"); err != nil || e.unit.Device != "/dev/sdb" {
		t.Errorf("once: %+v, %v", e, err)
	}
	for name, want := range map[string]string{
		"twice": "line 9 has the name twice too", "wrong": `line 10: option "bogus"`, "none": `has no volume "none"`, "a/b": `"a/b" is no name for a volume`,
	} {
		if _, err := lookup(file, name); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v, want %q in it", name, err, want)
		}
	}
	if _, err := lookup(file+"x", "once"); exitCode(err) != codeDevice {
		t.Errorf("without a table: %v, exit code %d", err, exitCode(err))
	}

	if list, err := tabIndexes(file, "once"); err != nil || list != nil {
		t.Errorf("devices of others: %d, %v", list, err)
	}
	if err := os.WriteFile(file+".indexes", []byte("data /dev/sda\nvar /dev/sdb - attach=/dev/nbd0\nswap /dev/sdc random swap,attach=/dev/nbd12\nwrong /dev/sdd - attach=/dev/nbd3,bogus\nother /dev/sde - attach=/dev/sdf"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][]int{"data": {0, 12, 3}, "": {0, 12, 3}, "swap": {0, 3}} {
		if list, err := tabIndexes(file+".indexes", name); err != nil || !slices.Equal(list, want) {
			t.Errorf("devices of others than %q: %d, %v; want %d", name, list, err, want)
		}
	}
	if list, err := tabIndexes(file+"x", ""); err != nil || list != nil {
		t.Errorf("without a table: devices %d, %v", list, err)
	}

	// The generator says all of it, and makes units of the lines it can.
	dir := t.TempDir()
	errs := generate(file, dir)
	if len(errs) != 5 {
		t.Errorf("%d errors, want 5: %v", len(errs), errs)
	}
	for _, name := range []string{
		"hostcryptd.target.requires/hostcryptd@once.service", "hostcryptd.target.requires/hostcryptd@twice.service",
		"hostcryptd.target.wants/hostcryptd@wrong.service", `dev-hostcryptd-wrong.device.requires/hostcryptd@wrong.service`,
	} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if errs := generate(file+"x", dir); errs != nil {
		t.Errorf("without a table: %v", errs)
	}
}

func TestParseSpan(t *testing.T) {
	for in, want := range map[string]time.Duration{
		"0": 0, "infinity": 0, "30": 30 * time.Second, "1.5": 1500 * time.Millisecond, "1min": time.Minute, "1min 30s": 90 * time.Second,
		"1h30m": 90 * time.Minute, "2 hours": 2 * time.Hour, "1d": 24 * time.Hour, "20ms": 20 * time.Millisecond, "1w": 168 * time.Hour,
	} {
		if got, err := parseSpan(in); err != nil || got != want {
			t.Errorf("parseSpan(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", " ", "s", "-1", "1x", "1..2", "1e9", "99999999999h", "1 min x"} {
		if got, err := parseSpan(in); err == nil {
			t.Errorf("parseSpan(%q) = %v, want an error", in, got)
		}
	}
}

func FuzzTab(f *testing.F) {
	f.Add("a /dev/x - read-only,timeout=1min\n# c\nb LABEL=\"x\" /k swap\n")
	f.Fuzz(func(t *testing.T, text string) {
		entries, _ := parseTab(text)
		seen := map[string]bool{}
		for _, e := range entries {
			if seen[e.unit.Name] || strings.ContainsAny(e.unit.Name, "/ \n%") {
				t.Errorf("name %q", e.unit.Name)
			}
			seen[e.unit.Name] = true
			if e.err == nil && !filepath.IsAbs(e.unit.Device) {
				t.Errorf("device %q", e.unit.Device)
			}
		}
	})
}
