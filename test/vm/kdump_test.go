//go:build vm

package vm

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"hostcryptd/test/vm/vmtest"
)

// crashMemory is what the kernel that runs after a crash has, in MiB.
const crashMemory = 192

// kdumpDefaults configure kdump-tools.
const kdumpDefaults = `USE_KDUMP=1
KDUMP_KERNEL=/var/lib/kdump/vmlinuz
KDUMP_INITRD=/var/lib/kdump/initrd.img
`

// listModules makes initramfs-tools take these modules and no others: in a
// folder it can't find out what the root is on.
func listModules(files *vmtest.Image, names ...string) {
	files.AddBytes("/etc/initramfs-tools/conf.d/modules", []byte("MODULES=list\n"), 0o644)
	files.AddBytes("/etc/initramfs-tools/modules", []byte(strings.Join(names, "\n")+"\n"), 0o644)
}

// luksUUID is the UUID of a volume that nobody uses.
func (l *lab) luksUUID(t *testing.T, image string) string {
	t.Helper()
	out, err := vmtest.Run(t.Context(), "", "cryptsetup", "luksUUID", image)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

// testKdump lets a kernel panic, twice. The kernel that kdump-tools has loaded for
// that attaches a volume in its initramfs, which is once initramfs-tools' and once
// dracut's, and writes the dump to it. The next boot reads the dump back, and finds
// what only the memory of the first kernel held.
func testKdump(t *testing.T, l *systemLab) {
	volume, hostKey := l.sparse(t, "volume", 512<<20), filepath.Join(l.Dir, "kdump.key")
	l.format(t, volume.Path, hostKey, "--key", "host-key")

	files := vmtest.NewFiles()
	files.AddBytes("/etc/hostcrypttab", fmt.Appendf(nil, "dump UUID=%s /etc/hostcryptd/dump.key noauto,attach=/dev/nbd3,x-kdump.attach\n", l.luksUUID(t, volume.Path)), 0o644)
	files.AddFile("/etc/hostcryptd/dump.key", hostKey, 0o600)
	files.AddBytes("/etc/default/kdump-tools", []byte(kdumpDefaults), 0o644)
	// The journal would have the kernel's log on the root's disk, which is no volume here.
	files.AddBytes("/etc/systemd/journald.conf.d/volatile.conf", []byte("[Journal]\nStorage=volatile\n"), 0o644)
	listModules(files, "virtio_pci", "virtio_blk")
	tree := l.tree(t, files)
	initrds := map[string]string{}
	name := "/var/lib/kdump/initrd.img-" + l.Kernel.Release
	for maker, command := range map[string]string{
		// As kdump-tools does it when a kernel is installed.
		"initramfs-tools": "/etc/kernel/postinst.d/kdump-tools " + l.Kernel.Release,
		"dracut": "HOSTCRYPTD_KDUMP=1 dracut --force --no-hostonly --modules 'dash base udev-rules rootfs-block hostcryptd'" +
			" --add-drivers 'virtio_pci virtio_blk' --kver " + l.Kernel.Release + " " + name + " 2>&1",
	} {
		out, err := tree.Run(t.Context(), command)
		t.Logf("%s", out)
		initrds[maker] = filepath.Join(l.Dir, "kdump-"+maker+".img")
		if err := errors.Join(err, tree.CopyOut(t.Context(), name, initrds[maker])); err != nil {
			t.Fatal(err)
		}
	}
	// By this kdump-tools knows that what it made is still good.
	sysctl := filepath.Join(l.Dir, "kdump-sysctl")
	if err := tree.CopyOut(t.Context(), "/etc/kdump/sysctl.conf", sysctl); err != nil {
		t.Fatal(err)
	}
	files.AddFile("/var/lib/kdump/latest_sysctls-"+l.Kernel.Release, sysctl, 0o644)

	for _, c := range [][2]string{{"initramfs-tools", "ext4"}, {"dracut", "xfs"}} {
		maker, fstype := c[0], c[1]
		begun := time.Now()
		files.AddFile(name, initrds[maker], 0o600)
		said, dump := kdump(t, l, "kdump-"+maker, fstype, files, volume)
		l.add(fmt.Sprintf("Kdump %s, "+fstype+"\t%.1f s\tcrash kernel: %s; dump %.4g MiB\n", maker, time.Since(begun).Seconds(), strings.Join(said, ", "), dump))
	}
}

// kdump lets one kernel panic. It returns what the kernel said that ran then,
// and the size of the dump in MiB.
func kdump(t *testing.T, l *systemLab, name, fstype string, files *vmtest.Image, volume vmtest.Disk) (said []string, dump float64) {
	t.Helper()
	root := l.root(t, name)
	canary := newCanary()
	boot := vmtest.SystemBoot{
		Name: name + "-crash", Scenario: "kdump-crash", Params: map[string]string{"canary": canary, "fs": fstype}, Files: files,
		Append: []string{fmt.Sprintf("crashkernel=%dM", crashMemory)}, MemoryMB: 1024, Disks: []vmtest.Disk{root, volume},
	}
	c, err := l.system.Config(boot)
	if err != nil {
		t.Fatal(err)
	}
	v, err := vmtest.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	crash, err := v.Wait()
	if !errors.Is(err, vmtest.ErrDied) || len(crash.Events) == 0 || crash.Events[len(crash.Events)-1].Text != "panic" {
		t.Fatalf("the machine ended otherwise than by a panic: %v", err)
	}
	console, err := os.ReadFile(v.Serial)
	if err != nil {
		t.Fatal(err)
	}
	said = regexp.MustCompile(`hostcryptd: .* s after the start of this kernel\)`).FindAllString(string(console), -1)
	t.Logf("the kernel after the crash:\n%s", strings.Join(said, "\n"))
	if !strings.Contains(strings.Join(said, "\n"), "the dump is on volume dump") {
		t.Fatalf("the kernel after the crash wrote no dump; its console is %s", v.Serial)
	}

	boot.Name, boot.Scenario, boot.Append = name+"-read", "kdump-read", nil
	read := l.bootSystem(t, boot)
	if n := read.Figures["canaries in the dump"].Value; n == 0 {
		t.Error("the canary is not in the dump, so that it's not on the disk proves nothing")
	}
	secret := fmt.Sprintf("%x", sha256.Sum256([]byte(canary))) // see guest/kdump.go
	for _, d := range []vmtest.Disk{volume, root} {
		if _, hits := searchDisk(t, d.Path, []byte(secret)); hits[0] != 0 {
			t.Errorf("the canary is %d times on the disk %s", hits[0], d.Serial)
		}
	}
	return said, read.Figures["dump"].Value
}
