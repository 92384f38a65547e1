package vmtest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Kernel is one Debian kernel, unpacked into the cache and not installed.
type Kernel struct {
	Release string // "6.12.117+deb12-cloud-amd64"
	Image   string // path of the bzImage
	modules *moduleTree
}

// cacheDir is where kernels are kept: $HOSTCRYPTD_VM_CACHE, else
// hostcryptd/vm in the user's cache.
func cacheDir() (string, error) {
	if dir := os.Getenv("HOSTCRYPTD_VM_CACHE"); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("vmtest: finding the cache (set HOSTCRYPTD_VM_CACHE): %w", err)
	}
	return filepath.Join(dir, "hostcryptd", "vm"), nil
}

// metapackages are the packages that depend on the newest cloud kernel of a
// series, in the order they are asked. The name of the kernel's own package
// changes with every security update.
func metapackages(series string) []string {
	return []string{
		"linux-image-" + series + "-cloud-amd64", // a series newer than the release's own
		"linux-image-cloud-amd64",                // the release's own series, 6.1 in Debian 12
	}
}

// fetchKernel returns the newest Debian cloud kernel of a series, such as
// "6.12". A kernel is downloaded once; later calls need no network. logf
// tells what takes long and may be nil.
//
// Which kernel is the newest is what the package lists on this host say. If
// there are none, a cached kernel is taken, and without one the lists are
// fetched, which needs root. Several processes may call it at the same time.
func fetchKernel(ctx context.Context, series string, logf func(format string, args ...any)) (*Kernel, error) {
	if logf == nil {
		logf = func(string, ...any) {}
	}
	if runtime.GOARCH != "amd64" {
		// The guest runs programs copied from the host.
		return nil, fmt.Errorf("vmtest: the virtual machine is amd64 and this host is %s", runtime.GOARCH)
	}
	cache, err := cacheDir()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "kernel")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("vmtest: creating the cache: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()

	// What a killed run left behind: the lock is held, so nobody fills it now.
	if left, _ := filepath.Glob(filepath.Join(dir, "tmp-*")); len(left) > 0 {
		for _, d := range left {
			os.RemoveAll(d)
		}
	}
	release, err := newestRelease(ctx, series)
	if err != nil {
		return nil, err
	}
	cached, err := cachedReleases(dir, series)
	if err != nil {
		return nil, err
	}
	switch {
	case slices.Contains(cached, release):
		return openKernel(filepath.Join(dir, release), release)
	case release == "" && len(cached) > 0:
		release = cached[len(cached)-1]
		logf("no package lists on this host: taking the newest cached kernel %s", release)
		return openKernel(filepath.Join(dir, release), release)
	}

	if release != "" {
		logf("downloading kernel %s", release)
		if err = download(ctx, dir, release); err == nil {
			return openKernel(filepath.Join(dir, release), release)
		}
		logf("%v", err) // lists older than the last security update name a file that is gone
	}
	logf("fetching package lists")
	if release, err = updateAndDownload(ctx, dir, series); err != nil {
		if len(cached) == 0 || ctx.Err() != nil {
			return nil, err
		}
		release = cached[len(cached)-1]
		logf("%v\ntaking the newest cached kernel %s", err, release)
	}
	return openKernel(filepath.Join(dir, release), release)
}

func updateAndDownload(ctx context.Context, dir, series string) (release string, err error) {
	if _, err := Run(ctx, "", "apt-get", "update", "-qq"); err != nil {
		return "", fmt.Errorf("%w (run 'apt-get update' as root)", err)
	}
	if release, err = newestRelease(ctx, series); err != nil {
		return "", err
	}
	if release == "" {
		return "", fmt.Errorf("vmtest: none of %s leads to a kernel %s: is this Debian 12 or 13 with its security archive?",
			strings.Join(metapackages(series), ", "), series)
	}
	return release, download(ctx, dir, release)
}

// newestRelease asks the local package lists. It returns "" when they name
// no kernel of the series.
func newestRelease(ctx context.Context, series string) (string, error) {
	if _, err := Tool("apt-cache"); err != nil {
		return "", err
	}
	for _, meta := range metapackages(series) {
		out, err := Run(ctx, "", "apt-cache", "depends", meta)
		if err != nil {
			continue // not in the lists
		}
		if release := releaseOf(string(out), series); release != "" {
			return release, nil
		}
	}
	return "", ctx.Err()
}

// releaseOf finds the kernel in the output of apt-cache depends.
func releaseOf(depends, series string) string {
	for line := range strings.Lines(depends) {
		pkg, ok := strings.CutPrefix(strings.TrimSpace(line), "Depends: linux-image-")
		if ok && strings.HasPrefix(pkg, series+".") {
			return pkg
		}
	}
	return ""
}

// cachedReleases lists the kernels of a series in the cache, oldest first.
func cachedReleases(dir, series string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("vmtest: reading the cache: %w", err)
	}
	var list []string
	for _, e := range entries {
		if e.IsDir() && strings.HasPrefix(e.Name(), series+".") {
			list = append(list, e.Name())
		}
	}
	slices.SortFunc(list, compareReleases)
	return list, nil
}

// compareReleases orders releases by the numbers in them, so that .9 comes
// before .10.
func compareReleases(a, b string) int {
	return slices.Compare(numbers(a), numbers(b))
}

func numbers(s string) []int {
	var list []int
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' }) {
		n, err := strconv.Atoi(f)
		if err != nil {
			n = 0 // more digits than an int holds: no such release
		}
		list = append(list, n)
	}
	return list
}

// download puts a kernel into dir/release, complete or not at all.
func download(ctx context.Context, dir, release string) error {
	tmp, err := os.MkdirTemp(dir, "tmp-")
	if err != nil {
		return fmt.Errorf("vmtest: creating a folder in the cache: %w", err)
	}
	defer os.RemoveAll(tmp)
	// apt-get, as root, checks the signature chain and the hash of the file;
	// its sandbox user must be able to enter the folder.
	if err := os.Chmod(tmp, 0o755); err != nil {
		return fmt.Errorf("vmtest: %w", err)
	}
	if _, err := Run(ctx, tmp, "apt-get", "download", "-qq", "linux-image-"+release); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil || len(debs) != 1 {
		return fmt.Errorf("vmtest: apt-get download of linux-image-%s left %d packages, want 1", release, len(debs))
	}
	tree := filepath.Join(tmp, "tree")
	if _, err := Run(ctx, "", "dpkg-deb", "-x", debs[0], tree); err != nil {
		return err
	}
	// Debian 13 unpacks to usr/lib only; depmod of Debian 12 reads lib only.
	if _, err := os.Stat(filepath.Join(tree, "lib")); errors.Is(err, fs.ErrNotExist) {
		if err := os.Symlink("usr/lib", filepath.Join(tree, "lib")); err != nil {
			return fmt.Errorf("vmtest: %w", err)
		}
	}
	// The package has no modules.dep: it is made when it is installed.
	if _, err := Run(ctx, "", "depmod", "-b", tree, release); err != nil {
		return err
	}
	if _, err := openKernel(tree, release); err != nil {
		return err
	}
	return os.Rename(tree, filepath.Join(dir, release))
}

func openKernel(tree, release string) (*Kernel, error) {
	k := &Kernel{Release: release, Image: filepath.Join(tree, "boot", "vmlinuz-"+release)}
	if _, err := os.Stat(k.Image); err != nil {
		return nil, fmt.Errorf("vmtest: kernel %s in the cache (delete the folder to fetch it again): %w", release, err)
	}
	var err error
	k.modules, err = openModules(filepath.Join(tree, "lib", "modules", release))
	return k, err
}

// lock waits for an exclusive lock on a file that it creates.
func lock(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("vmtest: locking the cache: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err != unix.EINTR {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("vmtest: locking %s: %w", path, err)
	}
	return func() { f.Close() }, nil
}
