package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// claimTime is how long what looks at every new or changed device, as udev does,
// may have it open.
const claimTime = 2 * time.Second

// claimDevice opens a block device exclusively, which it can only if nobody uses
// it: no mount, no swap, no device on top of it. Nobody can begin to use it in
// such a way while it is open. A process that just has it open doesn't keep it from
// that, and would lose what it has not yet written; so it is looked for. A device
// that is gone gives nil.
func claimDevice(path string) (*os.File, error) {
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
		switch {
		case errors.Is(err, unix.EBUSY):
			return nil, inUse(path, users(path))
		case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, os.ErrNotExist):
			return nil, nil
		case err != nil:
			return nil, err
		}
		list := (&usedDevice{numbers: deviceNumbers(path)}).processes()
		if len(list) == 0 {
			return f, nil
		}
		f.Close()
		if time.Since(begun) > claimTime {
			return nil, inUse(path, list)
		}
	}
}

func inUse(path string, by []string) error {
	what := ""
	if len(by) > 0 {
		what = ": " + strings.Join(by, ", ")
	}
	return withCode(codeBusy, fmt.Errorf("%s is in use%s", path, what))
}

// users says who uses a block device or a partition of it, as far as this process
// can see: mounts in all namespaces, swap, devices on top, processes.
func users(path string) []string {
	d := &usedDevice{path: path, numbers: deviceNumbers(path)}
	return slices.Concat(d.mounts(), d.swaps(), d.holders(), d.processes())
}

// A usedDevice is a block device with its partitions.
type usedDevice struct {
	path    string
	numbers map[uint64]bool
}

// deviceNumbers are those of a block device and its partitions.
func deviceNumbers(path string) map[uint64]bool {
	numbers := map[uint64]bool{}
	name := filepath.Base(path)
	files, _ := filepath.Glob("/sys/block/" + name + "/" + name + "p*/dev")
	for _, f := range append(files, "/sys/block/"+name+"/dev") {
		if b, err := os.ReadFile(f); err == nil {
			if n, ok := parseDevice(strings.TrimSpace(string(b))); ok {
				numbers[n] = true
			}
		}
	}
	return numbers
}

// parseDevice parses "43:0".
func parseDevice(s string) (uint64, bool) {
	major, minor, _ := strings.Cut(s, ":")
	a, err1 := strconv.ParseUint(major, 10, 32)
	b, err2 := strconv.ParseUint(minor, 10, 32)
	return unix.Mkdev(uint32(a), uint32(b)), err1 == nil && err2 == nil
}

func (d *usedDevice) is(path string) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK && d.numbers[uint64(st.Rdev)]
}

// mounts looks into every mount namespace that a process is in.
func (d *usedDevice) mounts() (list []string) {
	seen := map[string]bool{}
	own, _ := os.Readlink("/proc/self/ns/mnt")
	for _, pid := range append([]string{"self"}, processes()...) {
		ns, err := os.Readlink("/proc/" + pid + "/ns/mnt")
		if err != nil || seen[ns] {
			continue
		}
		seen[ns] = true
		b, err := os.ReadFile("/proc/" + pid + "/mountinfo")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			// 36 25 43:0 / /mnt rw,relatime shared:1 - ext4 /dev/nbd0 rw
			before, after, ok := strings.Cut(line, " - ")
			f, source := strings.Fields(before), strings.Fields(after)
			if !ok || len(f) < 5 || len(source) < 2 {
				continue
			}
			// Of some file systems, such as btrfs, the number is not the device's.
			if n, ok := parseDevice(f[2]); !(ok && d.numbers[n]) && source[1] != d.path && !strings.HasPrefix(source[1], d.path+"p") {
				continue
			}
			where := "mounted on " + f[4]
			if ns != own {
				where += " as process " + pid + " sees it"
			}
			list = append(list, where)
		}
	}
	return list
}

func (d *usedDevice) swaps() (list []string) {
	b, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 0 && d.is(f[0]) {
			list = append(list, "swap")
		}
	}
	return list
}

func (d *usedDevice) holders() (list []string) {
	name := filepath.Base(d.path)
	files, _ := filepath.Glob("/sys/block/" + name + "/holders/*")
	more, _ := filepath.Glob("/sys/block/" + name + "/" + name + "p*/holders/*")
	for _, h := range append(files, more...) {
		holder := filepath.Base(h)
		if b, err := os.ReadFile(h + "/dm/name"); err == nil {
			holder = strings.TrimSpace(string(b)) + " (" + holder + ")"
		}
		list = append(list, "used by "+holder)
	}
	return list
}

// maxProcesses are named at most.
const maxProcesses = 5

// processes are those that have it open.
func (d *usedDevice) processes() (list []string) {
	own := strconv.Itoa(os.Getpid())
	for _, pid := range processes() {
		if pid == own {
			continue
		}
		fds, _ := filepath.Glob("/proc/" + pid + "/fd/*")
		if !slices.ContainsFunc(fds, d.is) {
			continue
		}
		if len(list) == maxProcesses {
			return append(list, "and others")
		}
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		list = append(list, fmt.Sprintf("opened by %s (process %s)", strings.TrimSpace(string(name)), pid))
	}
	return list
}

// processes are the numbers of all processes.
func processes() (list []string) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		if _, err := strconv.Atoi(name); err == nil {
			list = append(list, name)
		}
	}
	return list
}
