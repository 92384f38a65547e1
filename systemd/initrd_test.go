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
