// Package vmtest boots a Debian kernel in QEMU with an initramfs made for
// one scenario, and hands back what its guest program reports.
//
// In order: [NewLab] finds, downloads and caches a kernel, builds the two Go
// programs and writes an initramfs with them, with libraries, tools and modules;
// [Lab.Config] says what a boot of a scenario is, [Config.Run] runs one QEMU to its
// end. [Lab.System] is a machine with systemd instead, [Payload] packs a tree of real
// files for a guest to copy.
//
// Every tool of the host that is needed is named, with the Debian package
// that provides it, in the error that says it is missing.
package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tools maps each program of the host that this package or its users run to
// the Debian package it comes from.
var tools = map[string]string{
	"apt-cache":          "apt",
	"apt-config":         "apt",
	"apt-get":            "apt",
	"blkid":              "util-linux",
	"cat":                "coreutils",
	"mkswap":             "util-linux",
	"cp":                 "coreutils",
	"cpio":               "cpio",
	"cryptsetup":         "cryptsetup-bin",
	"debugfs":            "e2fsprogs",
	"depmod":             "kmod",
	"dmsetup":            "dmsetup",
	"dpkg-deb":           "dpkg",
	"e2fsck":             "e2fsprogs",
	"go":                 "golang-go",
	"ldd":                "libc-bin",
	"make":               "make",
	"mkfs.ext4":          "e2fsprogs",
	"mkfs.xfs":           "xfsprogs",
	"mmdebstrap":         "mmdebstrap",
	"modprobe":           "kmod",
	"nbdcopy":            "libnbd-bin",
	"nbdkit":             "nbdkit",
	"fio":                "fio",
	"qemu-io":            "qemu-utils",
	"qemu-system-x86_64": "qemu-system-x86",
	"resize2fs":          "e2fsprogs",
	"rm":                 "coreutils",
	"swtpm":              "swtpm",
	"sh":                 "dash",
	"tar":                "tar",
	"unshare":            "util-linux",
	"xfs_repair":         "xfsprogs",
	"xz":                 "xz-utils",
	"zstd":               "zstd",
}

// Tool returns the path of a program, which is also looked for where only
// root's PATH leads. The error of a missing one says what to install. It
// panics if the name is not in the table of this package.
func Tool(name string) (string, error) {
	pkg, ok := tools[name]
	if !ok {
		panic("vmtest: Tool: no package known for " + name)
	}
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		path := filepath.Join(dir, name)
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 && !info.IsDir() {
			return path, nil
		}
	}
	return "", fmt.Errorf("vmtest: %s is missing: install the Debian package %s (make deps)", name, pkg)
}

// Run runs a tool in dir, the working directory if empty, and returns its
// standard output. The error of a tool that fails has what it printed on
// standard error.
func Run(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	return run(ctx, dir, nil, name, args...)
}

// run is Run with more environment.
func run(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	path, err := Tool(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Dir = dir
	cmd.Env = append(append(os.Environ(), "LC_ALL=C"), env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(err, context.Cause(ctx))
		}
		return out, fmt.Errorf("vmtest: %s %s: %w: %s", name, strings.Join(args, " "), err, tail(stderr.String(), 10))
	}
	return out, nil
}

// tail returns the last n lines of s.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
