package vmtest

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

// modules that a guest loads, in this order, each after what it needs. A
// kernel that has one built in does without.
var modules = []string{
	"virtio_pci", "virtio_blk", "nvme", "virtio_console", "virtio_net", "nbd", "ext4", "xfs",
	"dm-crypt", "dm-flakey", "dm-delay", "dm-log-writes", "xts", "ecb", "aesni-intel", "algif_skcipher", "algif_hash", "loop",
}

// guestTools that a guest runs, copied from the host.
var guestTools = []string{"mkfs.ext4", "e2fsck", "resize2fs", "mkfs.xfs", "xfs_repair", "cryptsetup", "dmsetup", "blkid", "mkswap"}

// A Lab is what several boots share: a folder, a kernel and an initramfs
// with hostcryptd and the guest program. Its fields may be read by several
// goroutines.
type Lab struct {
	Dir        string // disks, logs and the initramfs
	Kernel     *Kernel
	Initrd     string
	Hostcryptd string // the program under test, on the host
}

// NewLab fetches the kernel of a series, see [Series], builds the programs,
// see [Programs], and writes the initramfs into dir, which must exist.
func NewLab(ctx context.Context, dir, series string, logf func(format string, args ...any)) (*Lab, error) {
	kernel, err := fetchKernel(ctx, series, logf)
	if err != nil {
		return nil, err
	}
	hostcryptd, guest, err := Programs(ctx, dir)
	if err != nil {
		return nil, err
	}
	im := newImage()
	im.AddFile("/init", guest, 0o755)
	err = errors.Join(
		im.addProgram(ctx, "/bin/hostcryptd", hostcryptd),
		im.addTools(ctx, guestTools...),
		im.addModules(ctx, kernel, modules...),
	)
	if err != nil {
		return nil, err
	}
	l := &Lab{Dir: dir, Kernel: kernel, Initrd: filepath.Join(dir, "initramfs.cpio"), Hostcryptd: hostcryptd}
	return l, im.WriteFile(l.Initrd)
}

// Series is the kernel series to boot: $HOSTCRYPTD_VM_KERNEL, such as "6.1",
// else 6.12.
func Series() string {
	if s := os.Getenv("HOSTCRYPTD_VM_KERNEL"); s != "" {
		return s
	}
	return "6.12"
}

// Config is a boot of one scenario of the guest program. params go onto the
// kernel command line, so they can't have spaces.
func (l *Lab) Config(scenario string, params map[string]string, disks ...Disk) Config {
	words := []string{"hostcryptd.scenario=" + scenario}
	for _, key := range slices.Sorted(maps.Keys(params)) {
		words = append(words, "hostcryptd."+key+"="+params[key])
	}
	return Config{
		Name: scenario, Dir: l.Dir, Kernel: l.Kernel, Initrd: l.Initrd,
		Append: words, Disks: disks, Timeout: BootLimit,
	}
}

// Programs builds hostcryptd and the guest program into dir, static, and
// returns their paths. $HOSTCRYPTD_BIN names a hostcryptd to take instead.
// The working directory must be inside of the module.
func Programs(ctx context.Context, dir string) (hostcryptd, guest string, err error) {
	guest = filepath.Join(dir, "guest")
	if err := build(ctx, guest, "hostcryptd/test/vm/guest"); err != nil {
		return "", "", err
	}
	if bin := os.Getenv("HOSTCRYPTD_BIN"); bin != "" {
		bin, err = filepath.Abs(bin)
		return bin, guest, err
	}
	hostcryptd = filepath.Join(dir, "hostcryptd")
	return hostcryptd, guest, build(ctx, hostcryptd, "hostcryptd/cmd/hostcryptd")
}

func build(ctx context.Context, out, pkg string) error {
	_, err := run(ctx, "", []string{"CGO_ENABLED=0"}, "go", "build", "-trimpath", "-o", out, pkg)
	return err
}
