package vmtest

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// systemPackages are installed in the root file system of a [System], with
// what they depend on. Recommendations are not.
var systemPackages = []string{
	"systemd", "systemd-sysv", "udev", "kmod", "dbus", "systemd-coredump", // the system
	"e2fsprogs", "xfsprogs", "cryptsetup-bin", "dmsetup", "util-linux", "procps", "file", "iproute2",
	"initramfs-tools", "dracut-core", "busybox", "zstd", // both makers of an initramfs
	"kdump-tools", "kexec-tools", "makedumpfile", // crash dumps
	"fio", "libnbd-bin", // load
	"tpm-udev", // gives the TPM to a user of its own, as wherever something uses one
}

// systemOptions of mmdebstrap: what nobody reads in a test stays out.
var systemOptions = []string{
	"--variant=minbase",
	"--dpkgopt=path-exclude=/usr/share/doc/*", "--dpkgopt=path-exclude=/usr/share/man/*",
	"--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/info/*",
}

// archiveKeyring signs Debian's packages.
const archiveKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// rootSize is the size of a root file system, of which a third is full.
const rootSize = 1 << 30

// systemModules are what the initramfs of a [System] loads: as much as it takes
// to mount the root. The rest is in the root.
var systemModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "ext4"}

// Where a guest finds what belongs to a [System].
const (
	Overlay    = "/overlay"                 // of the initramfs: to be copied over the root
	SystemDir  = "/usr/lib/hostcryptd-test" // of the root
	agentUnit  = "hostcryptd-test.service"  // runs [SystemDir]/guest agent
	rootSerial = "root"                     // of the disk with the root
	SystemInit = "/lib/systemd/systemd"     // PID 1 after the initramfs
	unitDir    = "/etc/systemd/system"      // for what a test adds
	wants      = unitDir + "/multi-user.target.wants"
)

// masked units take time, or wait for what an emulated machine doesn't have.
var masked = []string{
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
	"fstrim.timer", "getty@tty1.service", "serial-getty@ttyS0.service", "ldconfig.service",
	"systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-update-utmp.service", "systemd-update-utmp-runlevel.service",
	"kexec-load.service", "kexec.service", "dracut-shutdown.service", "systemd-logind.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount",
}

const agentText = `[Unit]
Description=Scenario of test/vm
After=multi-user.target

[Service]
Type=exec
ExecStart=` + SystemDir + `/guest agent
StandardOutput=journal+console
StandardError=journal+console
`

// emergencyDropIn is for a boot that has failed: nobody will log in.
const emergencyDropIn = `[Service]
ExecStartPre=
ExecStart=
ExecStart=` + SystemDir + `/guest emergency
`

// A System is a machine whose PID 1 is systemd: Debian's own, with hostcryptd
// installed the way 'make install' does it. It is made of two images: a root
// file system, which is the same for all, and an initramfs per boot, which puts
// the files of that boot over the root before systemd starts. So a unit or a
// table that a test brings is there from the first moment.
type System struct {
	lab  *Lab
	root string // an image that nobody writes to
	base *Image // what every boot puts over the root
	init *Image // the initramfs without that
}

// A SystemBoot says what to boot. The zero value of a field but Scenario is
// good for most tests.
type SystemBoot struct {
	Name     string            // of the logs, if a scenario is booted more than once
	Scenario string            // of the guest program, which a unit runs after multi-user.target
	Params   map[string]string // on the kernel command line, so without spaces
	Files    *Image            // to put over the root: see [NewFiles]
	Append   []string          // further words of the kernel command line
	MemoryMB int
	Disks    []Disk // one of them is from [System.NewRoot]
	TPM      string // see [Config]
}

// System builds the root file system for the lab's kernel, unless the cache
// has it: it takes two minutes and downloads 100 MB. Like the kernels it comes
// from the package archives that this host uses.
func (l *Lab) System(ctx context.Context, logf func(format string, args ...any)) (*System, error) {
	if logf == nil {
		logf = func(string, ...any) {}
	}
	s := &System{lab: l, base: NewFiles(), init: newImage()}
	var err error
	if s.root, err = fetchRoot(ctx, l.Kernel, logf); err != nil {
		return nil, err
	}
	guest := filepath.Join(l.Dir, "guest")
	s.init.AddFile("/init", guest, 0o755)
	if err := s.init.addModules(ctx, l.Kernel, systemModules...); err != nil {
		return nil, err
	}
	s.base.AddFile(path.Join(SystemDir, "guest"), guest, 0o755)
	s.base.AddBytes(path.Join(unitDir, agentUnit), []byte(agentText), 0o644)
	s.base.AddSymlink(path.Join(wants, agentUnit), "../"+agentUnit)
	for _, unit := range []string{"emergency.service", "rescue.service"} {
		s.base.AddBytes(path.Join(unitDir, unit+".d", "test.conf"), []byte(emergencyDropIn), 0o644)
	}
	for _, unit := range masked {
		s.base.AddSymlink(path.Join(unitDir, unit), "/dev/null")
	}
	s.base.AddBytes("/etc/machine-id", []byte("5f6a1d3b0c9e4e7f8a2b4c6d8e0f1a3c\n"), 0o444) // or every boot would be a first boot
	s.base.AddBytes("/etc/hostname", []byte("vm\n"), 0o644)
	s.base.AddBytes("/etc/hosts", []byte("127.0.0.1 localhost vm\n"), 0o644)
	s.base.AddBytes("/etc/fstab", nil, 0o644)
	return s, s.install(ctx)
}

// install adds what 'make install' installs, with the program under test.
func (s *System) install(ctx context.Context) error {
	mod, err := Run(ctx, "", "go", "env", "GOMOD")
	if err != nil {
		return err
	}
	dir := filepath.Join(s.lab.Dir, "install")
	if _, err := Run(ctx, filepath.Dir(strings.TrimSpace(string(mod))), "make", "-s", "-o", "build", "install", "BIN="+s.lab.Hostcryptd, "DESTDIR="+dir); err != nil {
		return err
	}
	return s.base.addTree("/", dir)
}

// NewRoot makes a disk with a root file system of its own, at name. It may be
// used for several boots, which then find what those before have left.
func (s *System) NewRoot(name string) (Disk, error) {
	return Disk{Serial: rootSerial, Path: name}, CopySparse(name, s.root)
}

// Config writes the initramfs of a boot, and returns the rest of what it takes.
func (s *System) Config(b SystemBoot) (Config, error) {
	c := s.lab.Config(b.Scenario, b.Params, b.Disks...)
	c.Name = cmp.Or(b.Name, b.Scenario)
	c.Append = slices.Concat(c.Append, []string{"hostcryptd.root=" + rootSerial, "systemd.show_status=1"}, b.Append)
	c.MemoryMB, c.TPM = b.MemoryMB, b.TPM
	c.Initrd = filepath.Join(c.Dir, c.Name+".initramfs.cpio")
	im := s.init.clone()
	im.addBelow(Overlay, s.base)
	if b.Files != nil {
		im.addBelow(Overlay, b.Files)
	}
	return c, im.WriteFile(c.Initrd)
}

// fetchRoot returns the image of the root file system for a kernel.
func fetchRoot(ctx context.Context, k *Kernel, logf func(format string, args ...any)) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	sources, err := debianSources(ctx)
	if err != nil {
		return "", err
	}
	recipe := strings.Join(slices.Concat(systemPackages, systemOptions), "\n") + "\n" + sources
	dir := filepath.Join(cache, "root", fmt.Sprintf("%x", sha256.Sum256([]byte(recipe)))[:16])
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("vmtest: creating the cache: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	image := filepath.Join(dir, k.Release+".img")
	if _, err := os.Stat(image); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return image, err
	}
	tar := filepath.Join(dir, "root.tar")
	if _, err := os.Stat(tar); errors.Is(err, fs.ErrNotExist) {
		logf("building a root file system with systemd: %d packages and what they need", len(systemPackages))
		begun := time.Now()
		if err := debootstrap(ctx, tar, sources); err != nil {
			return "", err
		}
		logf("built in %.0f s", time.Since(begun).Seconds())
	}
	return image, makeRoot(ctx, image, tar, k)
}

// debianSources asks apt which archives of Debian this host uses, as lines of
// sources.list(5).
func debianSources(ctx context.Context) (string, error) {
	out, err := Run(ctx, "", "apt-get", "indextargets", "--format", "deb [signed-by="+archiveKeyring+"] $(REPO_URI) $(RELEASE) $(COMPONENT)",
		"Created-By: Packages", "Origin: Debian")
	if err == nil && len(out) == 0 {
		err = errors.New("vmtest: no package lists of Debian on this host (run 'apt-get update' as root)")
	}
	return string(out), err
}

// debootstrap writes the root file system as a tar archive.
func debootstrap(ctx context.Context, tar, sources string) error {
	list := tar + ".list" // apt tells the two forms of such a file by its name
	if err := os.WriteFile(list, []byte(sources), 0o644); err != nil {
		return err
	}
	defer os.Remove(list)
	// How this host reaches its archives, such as a proxy.
	config, err := Run(ctx, "", "apt-config", "dump", "--no-empty", "Acquire")
	if err != nil {
		return err
	}
	args := append(slices.Clone(systemOptions), "--include="+strings.Join(systemPackages, ","))
	for line := range strings.Lines(string(config)) {
		if strings.HasPrefix(line, "Acquire::http") || strings.HasPrefix(line, "Acquire::Check-") {
			args = append(args, "--aptopt="+strings.TrimSpace(line))
		}
	}
	tmp := tar + ".tmp"
	// The empty suite means: whatever is in the list.
	if _, err := Run(ctx, "", "mmdebstrap", append(args, "--format=tar", "", tmp, list)...); err != nil {
		return err
	}
	return os.Rename(tmp, tar)
}

// makeRoot writes the image: the archive, with the kernel and its modules.
func makeRoot(ctx context.Context, image, tar string, k *Kernel) (err error) {
	tree, err := os.MkdirTemp(filepath.Dir(image), "tmp-")
	if err != nil {
		return fmt.Errorf("vmtest: creating a folder in the cache: %w", err)
	}
	defer func() {
		_, rerr := asRoot(ctx, "rm", "-rf", tree)
		err = errors.Join(err, rerr)
	}()
	tmp := image + ".tmp"
	if err := errors.Join(Sparse(tmp, rootSize), fillRoot(ctx, tree, tar, k)); err != nil {
		return err
	}
	if err := mkfsRoot(ctx, tmp, tree); err != nil {
		return err
	}
	return os.Rename(tmp, image)
}

// fillRoot unpacks the archive into a folder, and adds a kernel and its modules.
func fillRoot(ctx context.Context, tree, tar string, k *Kernel) error {
	kernelTree := filepath.Dir(filepath.Dir(k.Image))
	for _, args := range [][]string{
		{"tar", "-C", tree, "--exclude=./dev/*", "-xf", tar},
		{"cp", "-a", filepath.Join(kernelTree, "lib/modules"), filepath.Join(tree, "usr/lib/")},
		{"cp", k.Image, filepath.Join(kernelTree, "boot", "config-"+k.Release), filepath.Join(tree, "boot/")},
	} {
		if _, err := asRoot(ctx, args[0], args[1:]...); err != nil {
			return err
		}
	}
	return nil
}

// mkfsRoot writes a folder as a file system.
func mkfsRoot(ctx context.Context, image, tree string) error {
	_, err := asRoot(ctx, "mkfs.ext4", "-q", "-F", "-L", "root", "-J", "size=8", "-E", "lazy_itable_init=1,nodiscard", "-d", tree, image)
	return err
}

// asRoot runs a tool as the owner of all files: as root, or in a user namespace
// with the ranges of subuid(5), which mmdebstrap needs as well.
func asRoot(ctx context.Context, name string, args ...string) ([]byte, error) {
	if os.Geteuid() == 0 {
		return Run(ctx, "", name, args...)
	}
	path, err := Tool(name)
	if err != nil {
		return nil, err
	}
	return Run(ctx, "", "unshare", append([]string{"--map-root-user", "--map-auto", path}, args...)...)
}
