package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

// initramfsTable has the command read a table.
func initramfsTable(t *testing.T, text string) (ask func(what, option string) (out, said string, code int)) {
	t.Helper()
	tab := filepath.Join(t.TempDir(), "hostcrypttab")
	if err := os.WriteFile(tab, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(initramfsTab, tab)
	return func(what, option string) (string, string, int) {
		t.Helper()
		var out, said bytes.Buffer
		a := &app{stdout: &out, stderr: &said}
		c := a.initramfsCommand()
		c.SilenceErrors, c.SilenceUsage = true, true
		c.SetArgs([]string{what, option})
		err := c.ExecuteContext(t.Context())
		if err != nil {
			said.WriteString(err.Error())
		}
		return out.String(), said.String(), exitCode(err)
	}
}

// TestInitramfsAge: who asks about a volume that the initramfs attaches learns that it is
// asked by newer files than the boot will be.
func TestInitramfsAge(t *testing.T) {
	boot := t.TempDir()
	pin, tab := filepath.Join(boot, "pin"), filepath.Join(boot, "tab")
	made := time.Now().Add(-time.Hour)
	age := func(name string, after time.Duration) {
		t.Helper()
		path := filepath.Join(boot, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chtimes(path, time.Time{}, made.Add(after))); err != nil {
			t.Fatal(err)
		}
	}
	ask := func() string { return initramfsAge(boot, "6.1", tab, pin, "", filepath.Join(boot, "gone")) }
	if said := ask(); !strings.HasSuffix(said, "which are asked here") {
		t.Errorf("without an initramfs: %q", said)
	}
	age("initrd.img-5.0", 0)
	age("initramfs-6.1.img", 0)
	age("pin", -time.Second)
	age("tab", 0)
	if said := ask(); !strings.HasSuffix(said, "none of them is newer than "+boot+"/initramfs-6.1.img") {
		t.Errorf("older files: %q", said)
	}
	age("pin", time.Second)
	if said := ask(); !strings.Contains(said, "; "+pin+" is newer than ") {
		t.Errorf("a newer pin: %q", said)
	}
}

// TestTPMModules: a TPM on SPI takes the drivers of all that it is on, and not of what is
// beside that. Those that are in the kernel have no module, or one that no file is of.
func TestTPMModules(t *testing.T) {
	sys := t.TempDir()
	const bus = "devices/pci0000:00/0000:00:1f.5/spi_master/spi0/spi-PRP0001:00"
	for name, to := range map[string]string{
		"class/tpm/tpm0":                          "../../" + bus + "/tpm/tpm0",
		"class/tpm/tpm1":                          "../../devices/virtual/tpm/tpm1",
		bus + "/tpm/tpm0/device":                  "../..",
		bus + "/driver":                           "../../../../../../bus/spi/drivers/tpm_tis_spi",
		"bus/spi/drivers/tpm_tis_spi/module":      "../../../../module/tpm_tis_spi",
		"devices/pci0000:00/0000:00:1f.5/driver":  "../../../bus/pci/drivers/intel-spi",
		"bus/pci/drivers/intel-spi/module":        "../../../../module/spi_intel_pci",
		"devices/pci0000:00/0000:00:02.0/driver":  "../../../bus/pci/drivers/i915",
		"bus/pci/drivers/i915/module":             "../../../../module/i915",
		"devices/pci0000:00/driver":               "../../bus/pci/drivers/none",
		"devices/virtual/tpm/tpm1/power/anything": "nowhere",
	} {
		path := filepath.Join(sys, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.Symlink(to, path)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"tpm_tis_spi", "spi_intel_pci", "i915"} {
		if err := os.MkdirAll(filepath.Join(sys, "module", name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := tpmModules(sys); !slices.Equal(got, []string{"tpm_tis_spi", "spi_intel_pci"}) {
		t.Errorf("modules %q", got)
	}
	if got := tpmModules(t.TempDir()); got != nil {
		t.Errorf("modules of no TPM %q", got)
	}
}

// TestInitramfsLines compares what is in the initramfs with the table: a line that is
// lost is a host that doesn't boot.
func TestInitramfsLines(t *testing.T) {
	const option = "x-initrd.attach"
	for _, text := range []string{
		"", "# only a comment", "\n\n",
		"root /dev/sda - x-initrd.attach", // no newline at the end
		"# c\n  # x-initrd.attach\n\troot\t /dev/sda  none  discard,x-initrd.attach,nofail # a comment\n",
		"root UUID=\"12-34\" - x-initrd.attach\nb PARTUUID='5-6' - x-initrd.attach\n",
		`root LABEL="d/ü#+-.:=@_x" - x-initrd.attach` + "\n" + `b PARTLABEL=a\x20b\n!"$%&'()*,;<>?[]^{|}~` + "` - x-initrd.attach",
		"root /dev/disk/by-partlabel/a\\x20b\\nc - x-initrd.attach\n",
		"root UUID=1\t-\tx-initrd.attach\r\nb UUID=2 - x-initrd.attach\r\n",
		"root\u00a0UUID=1 -\u00a0x-initrd.attach\v\nb\fUUID=2 - x-initrd.attach",
		"root UUID=1 /etc/a#b signer=/etc/s#1,x-initrd.attach\nb UUID=2 - x-initrd.attach # x-kdump.attach\n",
		"other /dev/sdc - x-initrd.attachment,listen=/run/s\nroot UUID=1 - x-initrd.attach,attach=/dev/nbd0\nvar /dev/sdb - attach=/dev/nbd1",
		"var /dev/sdb /var.key attach=/dev/nbd0\nroot UUID=1 - x-initrd.attach\ndata /dev/sdc -\nb /dev/sdd - attach=/dev/nbd12,bogus",
	} {
		all, bad := parseTab(text)
		if bad != nil {
			t.Fatalf("%q: %v", text, bad)
		}
		var want []*tabEntry
		var names, devices []string
		for _, e := range all {
			if slices.Contains(e.words, option) {
				want, names, devices = append(want, e), append(names, e.unit.Name), append(devices, e.unit.Device)
			}
		}
		ask := initramfsTable(t, text)
		lines, said, code := ask("lines", option)
		if code != 0 || said != "" {
			t.Errorf("%q: exit code %d, %s", text, code, said)
		}
		got, bad := parseTab(lines)
		for i, w := range want {
			if i >= len(got) || got[i].err != nil || got[i].unit != w.unit || !slices.Equal(got[i].flags, w.flags) {
				t.Errorf("%q became %q: %v", text, lines, bad)
				break
			}
		}
		// auto in the initramfs leaves to the others what they have.
		if strings.HasPrefix(text, "var") {
			if others := "\nvar /dev/sdb - attach=/dev/nbd0\nb /dev/sdd - attach=/dev/nbd12\n"; !strings.HasSuffix(lines, others) || len(got) != len(want)+2 {
				t.Errorf("%q became %q, want %q at its end", text, lines, others)
			}
		} else if len(got) != len(want) {
			t.Errorf("%q became %q", text, lines)
		}
		if got, _, _ := ask("devices", option); got != join(devices) {
			t.Errorf("the devices of %q are %q, want %q", text, got, devices)
		}
		// What the initramfs itself reads.
		file := filepath.Join(t.TempDir(), "hostcrypttab")
		if err := os.WriteFile(file, []byte(lines), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, shell := range []string{"dash", "bash"} {
			out, err := exec.CommandContext(t.Context(), shell, "-c", `hostcryptd_tab=$1; . ../../systemd/initrd/initrd.sh; hostcryptd_names "$2"`, shell, file, option).CombinedOutput()
			if err != nil || string(out) != join(names) {
				t.Errorf("%s: an initramfs with %q attaches %q, %v; want %q", shell, lines, out, err, names)
			}
		}
	}
}

// TestInitramfsRefuses: what is refused at boot is refused before.
func TestInitramfsRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"root UUID=1 - x-initrd.attach,bogus":                         "bogus",
		"root UUID=1 - x-initrd.attach more # than four":              "fields",
		"root sda - x-initrd.attach":                                  "no absolute path",
		"root LABEL=\" - x-initrd.attach\nroot UUID=2 -":              "line 2 has the name root too",
		"root UUID=1 -\nroot UUID=2 - x-initrd.attach":                "line 2 has the name root too",
		"root UUID=1 - x-initrd.attach,listen=/run/s":                 "no kernel device",
		"root UUID=1 - x-initrd.attach,grace=many":                    "no time",
		"root UUID=1 - x-initrd.attach,connections=many":              "connections",
		"root UUID=1 /nowhere/a.key x-initrd.attach":                  "/nowhere/a.key",
		"root UUID=1 - x-initrd.attach,signer=/nowhere/s.pem":         "/nowhere/s.pem",
		"root UUID=1 - x-initrd.attach,tls-certificates=/nowhere":     "/nowhere/server-cert.pem",
		"root UUID=1 - x-initrd.attach,_netdev,cloud=/nowhere/c.json": "/nowhere/c.json",
		"root UUID=1 - x-initrd.attach,_netdev,identity=certificate:01234567-89ab-4def-8123-456789abcdef:01234567-89ab-4def-8123-456789abcdef:/nowhere/i.pem": "/nowhere/i.pem",
		"root UUID=1 - x-initrd.attach,identity=somebody": "somebody",
	} {
		ask := initramfsTable(t, text)
		if out, said, code := ask("files", "x-initrd.attach"); code == 0 || out != "" || !strings.Contains(said, want) {
			t.Errorf("%q: exit code %d, printed %q, said %q, want %s in it", text, code, out, said, want)
		}
		if out, said, code := ask("files", "x-kdump.attach"); code != 0 || out != "" {
			t.Errorf("%q is no matter to the kernel after a crash: exit code %d, %q, %s", text, code, out, said)
		}
	}
	ask := initramfsTable(t, "a/b UUID=1 - x-initrd.attach\n")
	if out, said, code := ask("files", "x-initrd.attach"); code != 0 || out != "" || !strings.Contains(said, `W: hostcryptd: `) || !strings.Contains(said, "no name for a volume") {
		t.Errorf("a line without a name: exit code %d, %q, %s", code, out, said)
	}
}

// TestInitramfsHostKey: the usual host key is copied if it opens the volume, and not
// because somebody has put a token of another volume into its header.
func TestInitramfsHostKey(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	t.Setenv("HOSTCRYPTD_PINS", in("pins"))
	t.Setenv("HOSTCRYPTD_TPM", keyunseal.NoTPM)
	t.Setenv("HOSTCRYPTD_AUDIT_LOG", "none")
	format := func(name, uuid, hostKey string) *luks2.Header {
		t.Helper()
		if err := errors.Join(os.WriteFile(in(name), nil, 0o600), os.Truncate(in(name), 32<<20)); err != nil {
			t.Fatal(err)
		}
		d, err := sector.OpenDevice(in(name), sector.DeviceOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		h, err := sector.Format(t.Context(), d, sector.FormatOptions{UUID: uuid, SectorSize: 4096, Seal: []sector.Sealer{
			func(ctx context.Context, volume string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
				return keyunseal.Seal(ctx, keyunseal.Options{HostKey: in(hostKey)}, "host-key", volume, key)
			}}})
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	data := format("data.img", "dddddddd-89ab-4def-8123-456789abcdef", "usual.key")
	root := format("root.img", "aaaaaaaa-89ab-4def-8123-456789abcdef", "other.key")
	fails := 0
	ask := func(image string) (files []string, said string) {
		t.Helper()
		entries, bad := parseTab("root " + in(image) + " - x-initrd.attach\n")
		n := &initramfsNeeds{usual: in("usual.key"), warn: func(format string, args ...any) { said += fmt.Sprintf(format+"\n", args...) }}
		if n.volume(t.Context(), entries[0]); bad != nil || len(n.errs) != fails {
			t.Fatal(bad, n.errs)
		}
		for _, err := range n.errs {
			said += err.Error()
		}
		return n.files, said
	}
	if files, said := ask("data.img"); !slices.Equal(files, []string{in("usual.key")}) || !strings.Contains(said, "the host key of root is in the initramfs") {
		t.Errorf("files %q; %s", files, said)
	}
	root.Tokens[5] = data.Tokens[0]
	f, err := os.OpenFile(in("root.img"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, off := range []uint64{0, root.Size} {
		b, err := root.Encode(off)
		if err == nil {
			_, err = f.WriteAt(b, int64(off))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	fails = 1
	if files, said := ask("root.img"); len(files) > 0 || !strings.Contains(said, "none of its keys opens with that") || !strings.Contains(said, "no other key opens it at boot") {
		t.Errorf("with a key of another volume in the header: files %q; %s", files, said)
	}
}

// join has each of lines end in a newline.
func join(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}
