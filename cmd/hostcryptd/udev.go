package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd/nbdnl"
	"hostcryptd/systemd"
)

// udev gives the kernel device its names, by systemd/hostcryptd.rules. What the
// rules can't know is in a file, which is there before the device is.

// udevFile is read by the rules: the device's backend attribute is in its name.
func (d *daemon) udevFile() string { return filepath.Join(runDir, d.backend()+".udev") }

// backingLine is not for udev, but for who finds the kernel device later.
const backingLine = "HOSTCRYPTD_BACKING="

// backingOf identifies a backing device, until it is gone or the host boots anew. A
// disk's number may be another's after it was pulled out; its sequence number
// (Documentation/ABI/stable/sysfs-block, from Linux 5.15) isn't.
func backingOf(f *os.File) string {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return ""
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Sprintf("file-%d:%d-%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	sys := "/sys/dev/block/" + number
	if _, err := os.Stat(sys + "/partition"); err == nil {
		sys += "/.."
	}
	sequence, _ := os.ReadFile(sys + "/diskseq")
	return fmt.Sprintf("disk-%s-%s", number, bytes.TrimSpace(sequence))
}

// checkBacking refuses a backing device for a kernel device that was attached for
// another: a copy of the disk has the same UUID, and what its kernel device has not
// written yet belongs on the first. A file that doesn't say refuses nothing.
func checkBacking(file, backing string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(b)) {
		if was, ok := strings.CutPrefix(strings.TrimSpace(line), backingLine); ok && was != backing {
			return withCode(codeBusy, fmt.Errorf("its server has died that served the volume of this UUID from another backing device (%s, and this is %s), and what waits there must not be written to a copy: serve that one, or detach it; if it is the same disk, which was away, remove %s", was, backing, file))
		}
	}
	return nil
}

// dropName takes a name out of the files of other volumes for which no server answers,
// and returns their backend strings: a volume with a random key, whose server and keeper
// have died, comes back as another one of the same name.
func dropName(dir, name, uuid string, answers func(uuid string) bool) (backends []string) {
	if name == "" {
		return nil
	}
	files, _ := filepath.Glob(filepath.Join(dir, backendPrefix+"*.udev"))
	for _, file := range files {
		backend := strings.TrimSuffix(filepath.Base(file), ".udev")
		other := strings.TrimPrefix(backend, backendPrefix)
		b, err := os.ReadFile(file)
		line := "HOSTCRYPTD_NAME=" + name + "\n"
		if err != nil || other == uuid || !strings.Contains(string(b), line) || answers(other) {
			continue
		}
		if os.WriteFile(file, []byte(strings.Replace(string(b), line, "", 1)), 0o600) == nil {
			backends = append(backends, backend)
		}
	}
	return backends
}

// tellUdev writes the file. A device without names works too.
func (d *daemon) tellUdev() {
	if os.Geteuid() != 0 {
		return
	}
	text := fmt.Sprintf("HOSTCRYPTD_UUID=%s\n", d.uuid)
	if d.opts.name != "" {
		text += fmt.Sprintf("HOSTCRYPTD_NAME=%s\n", d.opts.name)
	}
	if d.opts.makesFS {
		text += "HOSTCRYPTD_MAKEFS=1\n"
	}
	if is := backingOf(d.device.File()); is != "" {
		text += backingLine + is + "\n"
	}
	for _, backend := range dropName(runDir, d.opts.name, d.uuid, answers) {
		d.log.Warn("the name is taken from a kernel device that nobody serves any more", zap.String("name", d.opts.name), zap.String("backend", backend))
		if index := nbdnl.Find(backend); index >= 0 {
			_ = nbdnl.Announce(index)
		}
	}
	err := os.MkdirAll(runDir, 0o700)
	if err == nil {
		err = os.WriteFile(d.udevFile(), []byte(text), 0o600)
	}
	if err != nil {
		d.log.Warn("udev was not told the device's names", zap.Error(err))
	}
}

// udevLimit bounds the wait for udev, whose queue is long early in boot.
const udevLimit = 30 * time.Second

// waitUdev waits until the device has its name: what is ordered after the
// service opens it by that.
func (d *daemon) waitUdev(ctx context.Context, index int) {
	if os.Geteuid() != 0 {
		return
	}
	// The kernel says that the device has a size before it shows its backend.
	if err := nbdnl.Announce(index); err != nil {
		d.log.Warn("udev was not told of the device", zap.Error(err))
	}
	if _, err := os.Stat("/run/udev/control"); err != nil || d.opts.name == "" {
		return
	}
	link, want := filepath.Join(systemd.VolumeDir, d.opts.name), nbdnl.Path(index)
	for begun := time.Now(); time.Since(begun) < udevLimit; {
		if got, err := filepath.EvalSymlinks(link); err == nil && got == want {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(20 * time.Millisecond):
		}
	}
	d.log.Warn("udev has not made the device's name; are hostcryptd's udev rules installed?", zap.String("name", link))
}

// forgetUdev has udev take the names away.
func (d *daemon) forgetUdev(index int) {
	if os.Geteuid() != 0 {
		return
	}
	err := os.Remove(d.udevFile())
	if err = errors.Join(err, nbdnl.Announce(index)); err != nil {
		d.log.Debug("udev was not told that the device is gone", zap.Error(err))
	}
}
