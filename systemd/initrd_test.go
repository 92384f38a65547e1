package systemd

import (
	"crypto/sha256"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// scripts are the shell scripts of an initramfs.
func scripts(t *testing.T) []string {
	t.Helper()
	names, err := filepath.Glob("initrd/*")
	if err != nil || len(names) < 7 {
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

// TestInitrdTab has the script of the initramfs read a table.
func TestInitrdTab(t *testing.T) {
	tab := filepath.Join(t.TempDir(), "hostcrypttab")
	err := os.WriteFile(tab, []byte(`root UUID=1-2 /etc/root.key discard,x-initrd.attach,_netdev,identity=certificate:t:c:/etc/id.pem
data /dev/sdb none nofail
dump LABEL=crash /etc/dump.key noauto,x-kdump.attach
`), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "sh", "-c", `hostcryptd_tab=$1; . initrd/initrd.sh
hostcryptd_names x-initrd.attach; hostcryptd_names x-kdump.attach
name=ours options=ours
hostcryptd_has root _netdev && hostcryptd_has root identity && ! hostcryptd_has root x-initrd && ! hostcryptd_has dump _netdev && ! hostcryptd_has data x-initrd.attach && [ $name$options = oursours ] && echo has`, "sh", tab).CombinedOutput()
	if got := strings.Fields(string(out)); err != nil || strings.Join(got, " ") != "root dump has" {
		t.Errorf("names: %q, %v; want root dump has", got, err)
	}
}

// crashTree copies scripts of an initramfs to a folder that stands for its root,
// with what they call: a daemon that "attaches" dir/volume and writes what it was
// asked for to dir/asked.
func crashTree(t *testing.T, tab string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for _, sub := range []string{"bin", "dev", "etc", "proc", "run", "usr/lib/hostcryptd"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// All paths, those of /proc/sysrq-trigger and /dev first of all, are below dir.
	below := regexp.MustCompile(`(^|[\s"=<>])/(usr|run|proc|dev/k|dev/c|etc|s?bin)`)
	files := map[string]string{
		"etc/hostcrypttab": tab, "proc/uptime": "12.34 5.6\n", "proc/meminfo": "MemAvailable: 1 kB\n", "proc/vmcore": "the memory",
		"bin/hostcryptd": "#!/bin/sh\necho $1 >>" + dir + "/asked\necho " + dir + "/volume\n",
		"bin/mount":      "#!/bin/sh\necho $2 >>" + dir + "/asked\n[ ! -e " + dir + "/unmountable ]\n",
		"bin/umount":     "#!/bin/sh\n[ ! -e " + dir + "/inuse ] && echo umount >>" + dir + "/asked\n",
		"bin/modprobe":   "#!/bin/sh\n", "bin/reboot": "#!/bin/sh\n", "bin/sleep": "#!/bin/sh\n",
		// A file in memory has no O_DIRECT, and no bad block.
		"usr/lib/hostcryptd/dd": `#!/bin/sh
[ ! -e ` + dir + `/unreadable ] || case $* in *if=*) exit 1 ;; esac
[ ! -e ` + dir + `/full ] || case $* in *of=` + dir + `*) cat >/dev/null; exit 1 ;; esac
for word; do
	shift
	case $word in ?flag=direct) ;; *) set -- "$@" "$word" ;; esac
done
exec dd "$@"
`,
	}
	for _, name := range []string{"initrd.sh", "dracut-hook.sh"} {
		b, err := os.ReadFile(filepath.Join("initrd", name))
		if err != nil {
			t.Fatal(err)
		}
		files["usr/lib/hostcryptd/"+name] = below.ReplaceAllString(string(b), "${1}"+dir+"/$2")
	}
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// runIn runs a script after initrd.sh of a crashTree.
func runIn(t *testing.T, dir, script string, args ...string) (out string, err error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", append([]string{"-c", "hostcryptd_tab=" + dir + "/etc/hostcrypttab; . " + dir + "/usr/lib/hostcryptd/initrd.sh; " + script, "sh"}, args...)...)
	cmd.Env = append(os.Environ(), "PATH="+dir+"/bin:"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	b, err := cmd.CombinedOutput()
	console, _ := os.ReadFile(dir + "/dev/console")
	return string(b) + string(console), err
}

// TestInitrdDumpDestroysNothing checks what a dump is written to: a file system, or
// the whole of a volume that has nothing on it.
func TestInitrdDumpDestroysNothing(t *testing.T) {
	for _, tt := range []struct {
		name, make string // what makes the volume, from 64 MiB of zeros
		says       string
		writes     bool // to its first byte
		file       bool
		fails      bool   // after it was written
		asked      string // of the daemon and of mount, in their order
	}{
		{name: "empty", make: ":", says: "writing the dump to", writes: true, asked: "serve detach"},
		{name: "ext4", make: "mkfs.ext4 -q volume", says: "writing the dump to", file: true, asked: "serve ext4 umount detach"},
		{name: "xfs", make: "truncate -s 320M volume && mkfs.xfs -q volume", says: "writing the dump to", file: true, asked: "serve xfs umount detach"},
		// Whatever fails, nothing stays mounted or attached.
		{name: "unmountable", make: "mkfs.ext4 -q volume && touch unmountable", asked: "serve ext4 detach"},
		{name: "full", make: "mkfs.ext4 -q volume && touch full", says: "writing the dump to", asked: "serve ext4 umount detach"},
		{name: "full, empty", make: "touch full", says: "writing the dump to", asked: "serve detach"},
		{name: "in use", make: "mkfs.ext4 -q volume && touch inuse", says: "writing the dump to", file: true, fails: true, asked: "serve ext4 detach"},
		{name: "partitions", make: "echo 'label: gpt\n,8M' | sfdisk -q volume", says: "left as it is", asked: "serve detach"},
		{name: "ambivalent", make: "mkfs.ext4 -q volume && printf '\\001CD001\\001' | dd of=volume bs=1 seek=32768 conv=notrunc status=none", says: "left as it is", asked: "serve detach"},
		{name: "unreadable", make: "touch unreadable", says: "can't be read", asked: "serve detach"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := crashTree(t, "dump /dev/sdb - x-kdump.attach")
			out, err := exec.CommandContext(t.Context(), "sh", "-c", "cd "+dir+" && PATH=$PATH:/usr/sbin:/sbin && truncate -s 64M volume && "+tt.make).CombinedOutput()
			if err != nil {
				t.Fatalf("%s (Debian packages fdisk and e2fsprogs; make deps): %v\n%s", tt.make, err, out)
			}
			before := fileSum(t, dir+"/volume")
			said, err := runIn(t, dir, "hostcryptd_dump_to dump")
			if ok := (tt.writes || tt.file) && !tt.fails; (err == nil) != ok || !strings.Contains(said, tt.says) {
				t.Errorf("%v, said %q; want %q", err, said, tt.says)
			}
			if changed := fileSum(t, dir+"/volume") != before; changed != tt.writes {
				t.Errorf("the volume was changed: %v, want %v", changed, tt.writes)
			}
			asked, _ := os.ReadFile(dir + "/asked")
			if got := strings.Join(strings.Fields(string(asked)), " "); got != tt.asked {
				t.Errorf("asked %q, want %q", got, tt.asked)
			}
			dumps, _ := filepath.Glob(dir + "/run/hostcryptd-dump/*/dump.*")
			if (len(dumps) == 1) != tt.file {
				t.Errorf("files %q", dumps)
			}
			if tt.file && fileSum(t, dumps[0]) != fileSum(t, dir+"/proc/vmcore") {
				t.Error("the dump is not the memory")
			}
		})
	}
}

// TestInitrdDumpEnds checks that a kernel after a crash waits neither for a vault
// nor for the network for ever.
func TestInitrdDumpEnds(t *testing.T) {
	for options, want := range map[string]string{
		"x-kdump.attach": "serve dump --unseal-timeout 5m --initrd",
		"x-kdump.attach,x-systemd.device-timeout=9": "serve dump --unseal-timeout 5m --initrd",
		"timeout=0,x-kdump.attach":                  "serve dump --initrd", // the line says it
	} {
		dir := crashTree(t, "other /dev/sdc - timeout=9\ndump /dev/sdb - "+options)
		said, err := runIn(t, dir, "hostcryptd() { echo \"$*\" >>"+dir+"/asked; return 1; }; hostcryptd_dump_to dump")
		asked, _ := os.ReadFile(dir + "/asked")
		if err == nil || strings.TrimSpace(string(asked)) != want {
			t.Errorf("%s: %v, asked for %q, want %q\n%s", options, err, asked, want, said)
		}
	}

	for _, tt := range []struct {
		options, uptime       string
		online, dumps, nodisk bool
	}{
		{options: "x-kdump.attach", uptime: "3.01", nodisk: true},
		{options: "x-kdump.attach", uptime: "150.00", nodisk: true, dumps: true},
		{options: "x-kdump.attach", uptime: "3.01", dumps: true},
		{options: "x-kdump.attach,_netdev", uptime: "3.01"},
		{options: "x-kdump.attach,_netdev", uptime: "149.99"},
		{options: "x-kdump.attach,_netdev", uptime: "150.00", dumps: true},
		{options: "x-kdump.attach,_netdev", uptime: "9.01", online: true, dumps: true},
	} {
		device := "/dev/null"
		if tt.nodisk {
			device = "/dev/nowhere"
		}
		dir := crashTree(t, "other /dev/null - timeout=9\ndump "+device+" - "+tt.options)
		lib := dir + "/usr/lib/hostcryptd/initrd.sh"
		b, err := os.ReadFile(lib)
		if err == nil {
			err = os.WriteFile(lib, append(b, "\nhostcryptd_dump() { echo dumps; }\n"...), 0o644)
		}
		if err == nil && tt.online {
			err = os.WriteFile(dir+"/run/hostcryptd-online", nil, 0o644)
		}
		if err := errors.Join(err, os.WriteFile(dir+"/proc/uptime", []byte(tt.uptime+" 1.0\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
		out, err := runIn(t, dir, ". "+dir+"/usr/lib/hostcryptd/dracut-hook.sh")
		if got := out == "dumps\n"; err != nil || got != tt.dumps {
			t.Errorf("%s, online %v, %s s after the start: %q, %v; want a dump: %v", tt.options, tt.online, tt.uptime, out, err, tt.dumps)
		}
	}
}

func fileSum(t *testing.T, name string) [sha256.Size]byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(b)
}

// TestInitramfsMakers: where the program knows that the initramfs would not attach a
// volume, or a file that it names can't be copied, there is none, instead of one
// without a root; what it warns of is shown.
func TestInitramfsMakers(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a file")
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What the makers have for their scripts, as far as it matters here.
	write("hook-functions", `copy_file() { case $2 in /usr/*) return ;; esac; [ -f "$2" ] || return 2; echo "$2" >>`+dir+`/copied; }
copy_exec() { :; }
manual_add_modules() { echo "$@" >>`+dir+`/modules; }
`)
	write("dracut", `moddir=`+dir+` initdir=`+dir+`/initrd DRACUT_TMPDIR=`+dir+` hostonly=yes dracutbasedir=`+dir+`
require_binaries() { :; }
inst_multiple() { :; }
inst_rules() { :; }
inst_hook() { :; }
instmods() { echo "$@" >>`+dir+`/modules; }
dracut_need_initqueue() { :; }
inst_simple() { [ -f "$1" ] || return 1; echo "$1" >>`+dir+`/copied; }
dfatal() { echo "FATAL: $*" >&2; }
dwarn() { echo "WARNING: $*" >&2; }
derror() { echo "ERROR: $*" >&2; }
. initrd/dracut-module-setup.sh
check; [ $? = 0 ] || exit 0
depends >/dev/null
installkernel
install
`)
	write("hostcryptd", "#!/bin/sh\n[ $1 = initramfs ] || exit 1\n[ $2 != modules ] || exec echo tpm_tis_spi\n[ ! -e "+dir+"/$2 ] || . "+dir+"/$2\n")
	hook, err := os.ReadFile("initrd/initramfs-hook")
	if err != nil {
		t.Fatal(err)
	}
	write("initramfs-tools", strings.NewReplacer("/usr/share/initramfs-tools/hook-functions", dir+"/hook-functions", "/usr/sbin/hostcryptd", dir+"/hostcryptd").Replace(string(hook)))
	for _, maker := range []string{"initramfs-tools", "dracut"} {
		for _, tt := range []struct {
			name, lines, files string // what the program does when it is asked for them
			there              bool   // the file that it names
			fails, copies      bool
			says               string
		}{
			{name: "nothing", lines: "", files: ""},
			{name: "good", lines: "echo root /dev/sda - x-initrd.attach", files: "echo '" + file + "'", there: true, copies: true},
			{name: "no file", lines: "echo root /dev/sda - x-initrd.attach", files: ""},
			{name: "warning", lines: "echo root /dev/sda - x-initrd.attach", files: "echo 'W: hostcryptd: hear hear' >&2; echo '" + file + "'", there: true, copies: true, says: "hostcryptd: hear hear"},
			{name: "refused", lines: "echo 'hostcryptd: line 7 is wrong' >&2; exit 1", files: "exit 1", fails: true, says: "hostcryptd: line 7 is wrong"},
			{name: "refused file", lines: "echo root /dev/sda - x-initrd.attach", files: "echo 'hostcryptd: no signer' >&2; exit 4", fails: true, says: "hostcryptd: no signer"},
			{name: "network", lines: "echo root /dev/sda - x-initrd.attach,_netdev", files: "", fails: maker == "dracut", says: map[string]string{"dracut": "isn't installed"}[maker]},
			{name: "gone", lines: "echo root /dev/sda - x-initrd.attach", files: "echo '" + file + "'", fails: true},
		} {
			write("lines", tt.lines)
			write("network", map[bool]string{true: "echo root"}[tt.name == "network"])
			write("files", tt.files)
			os.Remove(file)
			if tt.there {
				write("a file", "text")
			}
			if err := errors.Join(os.RemoveAll(dir+"/copied"), os.RemoveAll(dir+"/modules"), os.RemoveAll(dir+"/initrd"), os.MkdirAll(dir+"/initrd/etc/cmdline.d", 0o755)); err != nil {
				t.Fatal(err)
			}
			shell := map[string]string{"initramfs-tools": "sh", "dracut": "bash"}[maker]
			cmd := exec.CommandContext(t.Context(), shell, filepath.Join(dir, maker))
			cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "DESTDIR="+dir+"/initrd", "MODULES=most")
			out, err := cmd.CombinedOutput()
			copied, _ := os.ReadFile(dir + "/copied")
			modules, _ := os.ReadFile(dir + "/modules")
			for _, name := range []string{"nbd", "tpm_tis", "tpm_tis_spi"} {
				if has := slices.Contains(strings.Fields(string(modules)), name); has != (tt.lines != "") && !tt.fails {
					t.Errorf("%s, %s: module %s: %v", maker, tt.name, name, has)
				}
			}
			if (err != nil) != tt.fails || strings.Contains(string(copied), file+"\n") != tt.copies || !strings.Contains(string(out), tt.says) || tt.says == "" && !tt.fails && len(out) > 0 {
				t.Errorf("%s, %s: %v, copied %q, said %q", maker, tt.name, err, copied, out)
			}
		}
	}
}

// TestInitramfsNetwork: where the network comes after initramfs-tools has given up, the
// volume is attached as soon as it is there.
func TestInitramfsNetwork(t *testing.T) {
	for _, tt := range []struct {
		name, line, ip string
		fails          int // times that the network can't be configured
		asked          string
	}{
		{name: "at once", line: "root /dev/sda - x-initrd.attach,_netdev", asked: "once"},
		{name: "late", line: "root /dev/sda - x-initrd.attach,_netdev", fails: 2, asked: "once once once"},
		{name: "none", line: "root /dev/sda - x-initrd.attach"},
		{name: "somebody else's", line: "root /dev/sda - x-initrd.attach,_netdev", ip: "off"},
	} {
		dir := crashTree(t, tt.line)
		files := map[string]string{
			// The last line ends dash, as initramfs-tools' does.
			"functions": `configure_networking() {
	echo once >>` + dir + `/asked
	[ $(wc -l <` + dir + `/asked) -le ` + strconv.Itoa(tt.fails) + ` ] || printf 'IPV4DNS0=192.0.2.1\nIPV6DNS0=2001:db8::1\n' >` + dir + `/run/net-eth0.conf
	. ` + dir + `/run/net-eth0.conf
}
log_begin_msg() { :; }
log_end_msg() { :; }
panic() { echo "panic: $*"; exit 1; }
sleep() { :; }
`,
			// A vault that can be reached when there is a name server.
			"bin/serve": `#!/bin/sh
n=0
while [ -s ` + dir + `/asked ] && [ ! -s ` + dir + `/etc/resolv.conf ]; do
	[ $n -lt 300 ] || exit 10
	n=$((n + 1))
	sleep 0.1
done
echo /dev/nbd0
`,
		}
		script, err := os.ReadFile("initrd/initramfs-local-top")
		if err != nil {
			t.Fatal(err)
		}
		files["local-top"] = strings.NewReplacer("/scripts/functions", dir+"/functions", "/usr/lib", dir+"/usr/lib", "/run/net", dir+"/run/net", "/run/hostcryptd", dir+"/run/hostcryptd").Replace(string(script))
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(os.Remove(filepath.Join(dir, "bin/hostcryptd")), os.Remove(filepath.Join(dir, "bin/sleep")), os.Symlink("serve", filepath.Join(dir, "bin/hostcryptd"))); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), "dash", filepath.Join(dir, "local-top"))
		cmd.Env = append(os.Environ(), "PATH="+dir+"/bin:"+os.Getenv("PATH"), "hostcryptd_tab="+dir+"/etc/hostcrypttab", "IP="+tt.ip)
		out, err := cmd.CombinedOutput()
		asked, _ := os.ReadFile(dir + "/asked")
		resolver, _ := os.ReadFile(dir + "/etc/resolv.conf")
		if got := strings.Join(strings.Fields(string(asked)), " "); err != nil || got != tt.asked {
			t.Errorf("%s: %v, asked for the network %q, want %q\n%s", tt.name, err, got, tt.asked, out)
		}
		if want := "nameserver 192.0.2.1\nnameserver 2001:db8::1\n"; tt.asked != "" && string(resolver) != want {
			t.Errorf("%s: resolv.conf %q, want %q", tt.name, resolver, want)
		}
	}
}

// TestDracutBelow: dracut gets the modules for what is below a volume.
func TestDracutBelow(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"vda/vda2/partition", "vda/slaves/", "dm-0/dm/uuid", "dm-0/slaves/", "md0/md/", "md0/slaves/", "dm-1/dm/uuid", "dm-1/slaves/", "sdb/sdb1/partition", "sdb/slaves/", "sdc/slaves/"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
		} else if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// A logical volume on a RAID of a partition and of a multipath device's partition.
	for name, to := range map[string]string{"dm-0/slaves/md0": "../../md0", "md0/slaves/sdb1": "../../sdb/sdb1", "md0/slaves/dm-1": "../../dm-1", "dm-1/slaves/sdc": "../../sdc"} {
		if err := os.Symlink(to, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	for name, uuid := range map[string]string{"dm-0": "LVM-abc", "dm-1": "part1-mpath-abc"} {
		if err := os.WriteFile(filepath.Join(dir, name, "dm/uuid"), []byte(uuid+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for device, want := range map[string]string{
		"dm-0":     "base lvm mdraid multipath: dm-0 md0 dm-1 sdc sdb",
		"vda/vda2": "base: vda",
		"nowhere":  "base:",
	} {
		out, err := exec.CommandContext(t.Context(), "bash", "-c", `hostcryptd() { :; }
. initrd/dracut-module-setup.sh
_hostcryptd_stack() { _hostcryptd_below "$0"; }
echo "$(echo $(depends)): $(echo $(_hostcryptd_stack))"`, filepath.Join(dir, device)).CombinedOutput()
		if got := strings.TrimSpace(strings.ReplaceAll(string(out), dir+"/", "")); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", device, got, err, want)
		}
	}
}

// TestDracutKdump: the initramfs for the kernel after a crash is known by what makes it.
func TestDracutKdump(t *testing.T) {
	for set, want := range map[string]string{
		"dracut_args=(--force /boot/initrd 6.12) add_dracutmodules=' lvm '":         "x-initrd.attach",
		"add_dracutmodules=' kdumpbase '":                                           "x-kdump.attach",
		"dracut_args=(--force --add-confdir kdump-tools /var/lib/kdump/i.new 6.12)": "x-kdump.attach",
		"HOSTCRYPTD_KDUMP=1": "x-kdump.attach",
	} {
		out, err := exec.CommandContext(t.Context(), "bash", "-uc", set+"; . initrd/dracut-module-setup.sh; _hostcryptd_option").CombinedOutput()
		if got := strings.TrimSpace(string(out)); err != nil || got != want {
			t.Errorf("%s: %q, %v; want %q", set, got, err, want)
		}
	}
}
