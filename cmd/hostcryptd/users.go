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

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// claimTime is how long what looks at every new or changed device, as udev does,
// may have it open.
const claimTime = 2 * time.Second

// claimDevice opens a block device exclusively, which it can only if nobody uses
// it: no mount, no swap, no device on top of it. Nobody can begin to use it in
// such a way while it is open. A process that just has it open doesn't keep it from
// that; so it is looked for, and release waits for those that can't be seen. A
// device that is gone gives nil. That the path leads to none doesn't tell: the /dev of
// a container is filled when that starts, and the device can be in use outside.
func claimDevice(path string, gone func() bool, log *zap.Logger) (*os.File, error) {
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		f, err := os.OpenFile(path, os.O_RDONLY|unix.O_EXCL, 0)
		switch {
		case errors.Is(err, unix.EBUSY):
			by, unseen := users(path)
			return nil, inUse(path, by, unseen)
		case errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV), errors.Is(err, os.ErrNotExist):
			if gone() {
				return nil, nil
			}
			return nil, notNode(path)
		case err != nil:
			return nil, err
		}
		d := &usedDevice{path: path, numbers: deviceNumbers(path)}
		if !d.is(fmt.Sprintf("/proc/self/fd/%d", f.Fd())) {
			f.Close()
			return nil, notNode(path)
		}
		list, unseen := d.processes()
		if len(list) == 0 {
			if unseen != "" {
				log.Info("the device is detached as soon as no process that can't be seen from here has it open", zap.String("device", path), zap.String("unseen", unseen))
			}
			return f, nil
		}
		f.Close()
		if time.Since(begun) > claimTime {
			return nil, inUse(path, list, unseen)
		}
	}
}

// notNode is the error of a path that doesn't lead to the device of that name.
func notNode(path string) error {
	mknod := ""
	if b, err := os.ReadFile("/sys/block/" + filepath.Base(path) + "/dev"); err == nil {
		mknod = " (mknod " + path + " b " + strings.ReplaceAll(strings.TrimSpace(string(b)), ":", " ") + ")"
	}
	return withCode(codeBusy, fmt.Errorf("%s is not the node of the device here, in this /dev, and without it nothing tells whether the device is in use: make the node%s", path, mknod))
}

// waitProcesses is processes, when those that look at a new or changed device are
// done.
func (d *usedDevice) waitProcesses(but ...int) (list []string, unseen string) {
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		if list, unseen = d.processes(but...); len(list) == 0 || time.Since(begun) > claimTime {
			return list, unseen
		}
	}
}

// inUse is the error of a device that by use. unseen says who could not be looked at.
func inUse(path string, by []string, unseen string) error {
	what := ""
	if len(by) > 0 {
		what = ": " + strings.Join(by, ", ")
	}
	if unseen != "" {
		what += "; " + unseen + ", but 'fuser -v " + path + "' as root shows who has it open"
	}
	return withCode(codeBusy, fmt.Errorf("%s is in use%s", path, what))
}

// users says who uses a block device or a partition of it, as far as this process
// can see: mounts in all namespaces, swap, devices on top, processes. unseen says
// which it couldn't.
func users(path string) (by []string, unseen string) {
	d := &usedDevice{path: path, numbers: deviceNumbers(path)}
	list, unseen := d.processes()
	return slices.Concat(d.mounts(), d.swaps(), d.holders(), list), unseen
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

// processes are those that have it open, but for this one and those given. unseen
// says that there are others which can't be looked at, or is "". The service that a
// unit starts is such a place: to look at a process of root with all its rights takes
// CAP_SYS_PTRACE, which would let it read all memory of the host.
func (d *usedDevice) processes(but ...int) (list []string, unseen string) {
	but = append(but, os.Getpid())
	closed := 0
	pids := processes()
	for _, pid := range pids {
		if n, _ := strconv.Atoi(pid); slices.Contains(but, n) {
			continue
		}
		opened, err := d.openedBy(pid)
		if errors.Is(err, os.ErrPermission) {
			closed++
		}
		if !opened {
			continue
		}
		if len(list) == maxProcesses {
			list = append(list, "and others")
			break
		}
		name, _ := os.ReadFile("/proc/" + pid + "/comm")
		list = append(list, fmt.Sprintf("opened by %s (process %s)", strings.TrimSpace(string(name)), pid))
	}
	switch {
	case !slices.Contains(pids, "1"): // proc(5), hidepid=; ProtectProc= in a unit
		unseen = "processes of others can't be looked at from this one"
	case closed > 0:
		unseen = fmt.Sprintf("%d processes can't be looked at from this one", closed)
	}
	return list, unseen
}

// openedBy tells whether a process has it open, or that it can't be told.
func (d *usedDevice) openedBy(pid string) (bool, error) {
	dir := "/proc/" + pid + "/fd"
	fds, err := os.ReadDir(dir)
	for _, fd := range fds {
		if d.is(dir + "/" + fd.Name()) {
			return true, nil
		}
		if _, lerr := os.Readlink(dir + "/" + fd.Name()); errors.Is(lerr, os.ErrPermission) {
			return false, lerr
		}
	}
	return false, err
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
