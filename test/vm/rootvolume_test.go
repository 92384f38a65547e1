//go:build vm

package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"hostcryptd/keyunseal/vaulttest"
	"hostcryptd/test/vm/vmtest"
)

const (
	rootVolumeSize = 1<<30 + dataOffset
	rootKeyURL     = "https://hostcryptd-test.vault.azure.net/keys/disk-kek"
)

// rootTabDracut is the table that dracut reads, and rootDracut are its modules:
// those of a small system with systemd.
const (
	rootTabDracut = "/etc/hostcrypttab.dracut"
	rootDracut    = "dash systemd systemd-initrd dracut-systemd base fs-lib rootfs-block udev-rules hostcryptd"
)

// rootHosts lead the names of Azure to the double, in the guest's own network.
const rootHosts = "127.0.0.1 localhost\n" +
	vmtest.VaultAddress + " hostcryptd-test.vault.azure.net login.microsoftonline.com\n"

// vaultOnHost serves the double on this host's loopback interface, and returns
// what connects a guest to it.
func (l *lab) vaultOnHost(t *testing.T) (network string, roots []byte) {
	t.Helper()
	double, err := vaulttest.New(vaulttest.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := double.AddKey(rootKeyURL, 2048); err != nil {
		t.Fatal(err)
	}
	var listeners [2]net.Listener
	for i := range listeners {
		if listeners[i], err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- double.Serve(ctx, listeners[0], listeners[1]) }()
	t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil && !errors.Is(err, context.Canceled) {
			t.Errorf("vault double: %v", err)
		}
	})
	connect := []string{filepath.Join(l.Dir, "guest"), "connect"}
	return vmtest.Network(connect, listeners[0].Addr(), listeners[1].Addr()), double.CAPEM()
}

// testRootOnVolume boots a Debian whose root file system is on a volume with a
// vault's key. The initramfs is that of initramfs-tools, and at the third boot
// dracut's, with the scripts that 'make install' installs.
func testRootOnVolume(t *testing.T, l *systemLab) {
	begun := time.Now()
	network, roots := l.vaultOnHost(t)
	volume, hostKey := l.sparse(t, "volume", rootVolumeSize), filepath.Join(l.Dir, "root.key")
	l.format(t, volume.Path, hostKey, "--key", "host-key")

	files := vmtest.NewFiles()
	files.AddBytes("/etc/hostcrypttab", fmt.Appendf(nil, "root UUID=%s none attach=/dev/nbd0,_netdev,x-initrd.attach\n", l.luksUUID(t, volume.Path)), 0o644)
	files.AddBytes(rootTabDracut, fmt.Appendf(nil, "root UUID=%s /etc/hostcryptd/root.key attach=/dev/nbd0,x-initrd.attach\n", l.luksUUID(t, volume.Path)), 0o644)
	files.AddFile("/etc/hostcryptd/root.key", hostKey, 0o600)
	files.AddBytes("/etc/fstab", []byte("/dev/nbd0 / ext4 defaults 0 1\n"), 0o644)
	files.AddBytes("/etc/hosts", []byte(rootHosts), 0o644)
	files.AddBytes("/etc/ssl/certs/ca-certificates.crt", roots, 0o644)
	files.AddBytes("/etc/default/kdump-tools", []byte("USE_KDUMP=0\n"), 0o644)
	listModules(files, "virtio_pci", "virtio_blk", "virtio_net", "ext4")
	tree := l.tree(t, files)
	initrds := map[string]string{}
	name := "/boot/initrd.img-" + l.Kernel.Release
	for _, c := range [][2]string{
		// dracut's opens the volume with the host key: Debian has its network in
		// another package.
		{"dracut", "HOSTCRYPTTAB=" + rootTabDracut + " dracut --force --no-hostonly --modules '" + rootDracut + "'" +
			" --add-drivers 'virtio_pci virtio_blk ext4' --kver " + l.Kernel.Release + " " + name + " && rm -f " + rootTabDracut + " /etc/hostcryptd/root.key"},
		{"initramfs-tools", "rm " + name + "; update-initramfs -c -k " + l.Kernel.Release},
	} {
		out, err := tree.Run(t.Context(), c[1])
		t.Logf("%s", out)
		initrds[c[0]] = filepath.Join(l.Dir, "root-"+c[0]+".img")
		// A host key or the private key of an identity may be in it, as in dracut's here.
		if mode, merr := tree.Run(t.Context(), "stat -c '%a %U' "+name); merr != nil || strings.TrimSpace(string(mode)) != "600 root" {
			t.Errorf("%s: the initramfs has mode and owner %q, want 600 root: %v", c[0], mode, merr)
		}
		if err := errors.Join(err, tree.CopyOut(t.Context(), name, initrds[c[0]])); err != nil {
			t.Fatal(err)
		}
	}
	plain := filepath.Join(l.Dir, "root-plain.img")
	if err := tree.Image(t.Context(), plain, rootVolumeSize-dataOffset); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(l.Dir, "root.sock")
	stop := l.serve(t, volume.Path, hostKey, socket)
	_, err := vmtest.Run(t.Context(), "", "nbdcopy", "--flush", plain, "nbd+unix:///?socket="+socket)
	stop()
	if err := errors.Join(err, os.Remove(plain)); err != nil {
		t.Fatal(err)
	}

	// initramfs-tools' has no host key, so there the vault's is the only one.
	c := l.Config("root-prepare", nil, volume)
	c.Initrd, c.Network = l.withFiles(t, files, hostKey), network
	run(t, c)

	canary := newCanary()
	boot := func(name, scenario, maker string) *vmtest.Result {
		c := l.Config(scenario, map[string]string{"canary": canary}, volume)
		c.Name, c.Initrd, c.Network, c.Timeout = name, initrds[maker], network, 6*time.Minute
		c.Append = append(c.Append, "root=/dev/nbd0", "ro", "ip=dhcp", "systemd.show_status=1")
		return run(t, c)
	}
	first := boot("root-first", "root-first", "initramfs-tools")
	second := boot("root-second", "root-second", "initramfs-tools")
	third := boot("root-dracut", "root-second", "dracut")

	secrets := [][]byte{[]byte(canary), []byte("lost+found"), []byte("\x7fELF"), []byte("PRETTY_NAME=\"Debian")}
	size, counts := searchDisk(t, volume.Path, secrets...)
	t.Logf("raw disk: %d bytes searched for %q: %v hits", size, secrets, counts)
	for i, n := range counts {
		// Four bytes come by chance, once in four disks of this size.
		if n > 3 || n > 0 && i != 2 {
			t.Errorf("%q is %d times on the raw disk", secrets[i], n)
		}
	}
	l.row("RootOnVolume", time.Since(begun), first, second, third)
}

// withFiles appends an archive with what leads to the double, and a host key, to the lab's initramfs.
func (l *lab) withFiles(t *testing.T, from *vmtest.Image, hostKey string) string {
	t.Helper()
	over := vmtest.NewFiles()
	over.AddFrom(from, "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
	over.AddFile("/run-host.key", hostKey, 0o600)
	name := filepath.Join(l.Dir, "with-files.cpio")
	err := over.WriteFile(name)
	added, err1 := os.ReadFile(name)
	initrd, err2 := os.ReadFile(l.Initrd)
	initrd = append(initrd, make([]byte, -len(initrd)&3)...) // an archive begins at a multiple of 4 bytes
	if err := errors.Join(err, err1, err2, os.WriteFile(name, append(initrd, added...), 0o644)); err != nil {
		t.Fatal(err)
	}
	return name
}
