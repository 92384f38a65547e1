package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// scripts are the shell scripts of an initramfs.
func scripts(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("initrd/*")
	if err != nil || len(names) < 8 {
		t.Fatalf("scripts %q: %v", names, err)
	}
	return names
}

func TestShellcheck(t *testing.T) {
	if _, err := exec.LookPath("shellcheck"); err != nil {
		t.Fatal("shellcheck is not installed (Debian package shellcheck); run make deps")
	}
	// 1091: what a script reads is there only where it runs.
	out, err := exec.CommandContext(t.Context(), "shellcheck", append([]string{"--exclude=SC1091"}, scripts(t)...)...).CombinedOutput()
	if err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestInitrdLines(t *testing.T) {
	dir := t.TempDir()
	tab := filepath.Join(dir, "hostcrypttab")
	key := filepath.Join(dir, "root.key")
	err := os.WriteFile(tab, []byte(`# a comment with x-initrd.attach
root	UUID=1-2  `+key+`	discard,x-initrd.attach,_netdev,identity=certificate:t:c:/etc/id.pem,cloud=/etc/cloud.json
data /dev/sdb none nofail
dump LABEL=crash /etc/dump.key noauto,x-kdump.attach # x-initrd.attach
other /dev/sdc - x-initrd.attachment
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	var warnings strings.Builder
	run := func(args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "sh", append([]string{"initrd/initrd-lines"}, args...)...)
		cmd.Env = append(os.Environ(), "HOSTCRYPTTAB="+tab)
		warnings.Reset()
		cmd.Stderr = &warnings
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("initrd-lines %q: %v", args, err)
		}
		return strings.TrimSpace(string(out))
	}
	for _, c := range []struct{ args, want string }{
		{"x-initrd.attach", "root UUID=1-2 " + key + " discard,x-initrd.attach,_netdev,identity=certificate:t:c:/etc/id.pem,cloud=/etc/cloud.json"},
		{"--devices x-initrd.attach", "/dev/disk/by-uuid/1-2"},
		{"x-kdump.attach", "dump LABEL=crash /etc/dump.key noauto,x-kdump.attach"},
		{"--devices x-kdump.attach", "/dev/disk/by-label/crash"},
		{"x-nothing", ""},
	} {
		if got := run(strings.Fields(c.args)...); got != c.want {
			t.Errorf("initrd-lines %s: %q, want %q", c.args, got, c.want)
		}
	}
	files := strings.Split(run("--files", "x-initrd.attach"), "\n")
	for _, want := range []string{"the host key of root", "the private key of the identity of root"} {
		if !strings.Contains(warnings.String(), want) {
			t.Errorf("initrd-lines --files warns %q, want %q", warnings.String(), want)
		}
	}
	for _, want := range []string{key, "/etc/id.pem", "/etc/cloud.json", "/etc/hosts"} {
		found := false
		for _, f := range files {
			found = found || f == want
		}
		if !found {
			t.Errorf("initrd-lines --files: %q, want %s among them", files, want)
		}
	}

	// What the script of the initramfs reads of it.
	out, err := exec.CommandContext(t.Context(), "sh", "-c", `hostcryptd_tab=$1; . initrd/initrd.sh
hostcryptd_names x-initrd.attach; hostcryptd_names x-kdump.attach
hostcryptd_has root _netdev && ! hostcryptd_has dump _netdev && ! hostcryptd_has data x-initrd.attach && echo has`, "sh", tab).CombinedOutput()
	if got := strings.Fields(string(out)); err != nil || strings.Join(got, " ") != "root dump has" {
		t.Errorf("names: %q, %v; want root dump has", got, err)
	}
}

// TestInitrdHostKey checks that a host key is taken along when the volume has one,
// and that not knowing is said.
func TestInitrdHostKey(t *testing.T) {
	dir := t.TempDir()
	tab := filepath.Join(dir, "hostcrypttab")
	for _, tt := range []struct {
		device, key, program string // what hostcryptd does when it is asked for the keys of the device
		file, warning        string
	}{
		{device: `UUID="1"`, key: "-", program: "echo ' 0  hostcryptd-hostkey'", file: "/etc/default.key", warning: "is in the initramfs"},
		{device: "UUID='1'", key: "none", program: "echo ' 0  hostcryptd-azurekv'"},
		{device: "UUID=1", key: "-", program: "echo 'no such device' >&2; exit 4", warning: "no host key is in the initramfs"},
		{device: "UUID=1", key: "/etc/own.key", program: "exit 1", file: "/etc/own.key", warning: "is in the initramfs"},
		{device: "UUID=1", key: "/dev/urandom", program: "exit 1"},
	} {
		program := `#!/bin/sh
case $* in
"key list /dev/disk/by-uuid/1") ` + tt.program + ` ;;
"serve --help") echo '      --host-key FILE   the host key (default "/etc/default.key")' ;;
*) echo "hostcryptd $*" >&2; exit 2 ;;
esac
`
		if err := os.WriteFile(filepath.Join(dir, "hostcryptd"), []byte(program), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(tab, []byte("root "+tt.device+" "+tt.key+" x-initrd.attach"), 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "sh", "initrd/initrd-lines", "--files", "x-initrd.attach")
		cmd.Env = append(os.Environ(), "HOSTCRYPTTAB="+tab, "PATH="+dir+":"+os.Getenv("PATH"))
		var warnings strings.Builder
		cmd.Stderr = &warnings
		out, err := cmd.Output()
		if err != nil || strings.TrimSpace(string(out)) != tt.file {
			t.Errorf("%s %s: files %q, %v; want %q", tt.device, tt.key, out, err, tt.file)
		}
		if !strings.Contains(warnings.String(), tt.warning) || tt.warning == "" && warnings.Len() > 0 {
			t.Errorf("%s %s: warning %q, want %q", tt.device, tt.key, warnings.String(), tt.warning)
		}
	}
}
