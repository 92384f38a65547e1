package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/systemd"
)

// 'systemctl restart' stops this process and starts another. What the next one
// needs then waits in the service manager's descriptor store, with the kernel's
// sockets, whose other ends the kernel goes on sending to. A stop empties the
// store, so before a keeper hands anything over it asks which of both it is.

const (
	// storedPrefix is in front of what is held, in the names of the store.
	storedPrefix = "hostcryptd-"
	storedState  = "state"

	// systemctlTimeout is how long the service manager may take to answer.
	systemctlTimeout = 5 * time.Second
)

// unitName is the unit that this process belongs to, as its control group says,
// or "".
func unitName() string {
	b, err := os.ReadFile(cgroupFile)
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(b)) {
		// "0::/system.slice/system-hostcryptd.slice/hostcryptd@data.service"
		for part := range strings.SplitSeq(strings.TrimSpace(line), "/") {
			if strings.HasSuffix(part, ".service") {
				return part
			}
		}
	}
	return ""
}

var cgroupFile = "/proc/self/cgroup"

func systemctl(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), systemctlTimeout)
	defer cancel()
	type answer struct {
		out []byte
		err error
	}
	c := make(chan answer, 1)
	go func() {
		out, err := exec.CommandContext(ctx, "systemctl", args...).Output()
		c <- answer{out, err}
	}()
	select {
	case a := <-c:
		return string(bytes.TrimSpace(a.out)), a.err
	case <-time.After(systemctlTimeout + time.Second):
		return "", ctx.Err() // it can't be killed: its file may be on a disk that hangs
	}
}

// restartJob tells whether the service manager stops this process in order to
// start it again, and keeps that many descriptors meanwhile.
func restartJob(log *zap.Logger, need int) bool {
	unit := unitName()
	if os.Getenv("NOTIFY_SOCKET") == "" || unit == "" {
		return false
	}
	jobs, err := systemctl("list-jobs", "--no-legend", "--plain")
	if err != nil {
		log.Warn("systemctl doesn't say whether this is a restart, so it is taken for a stop", zap.Error(err))
		return false
	}
	restart := false
	for line := range strings.Lines(jobs) {
		f := strings.Fields(line) // "123 hostcryptd@data.service restart running"
		restart = restart || len(f) >= 3 && f[1] == unit && f[2] == "restart"
	}
	if !restart {
		return false
	}
	max, err := systemctl("show", "--property=FileDescriptorStoreMax", "--value", unit)
	if n, _ := strconv.Atoi(max); err != nil || n < need {
		// It would take some and drop the others, without a word to this process.
		log.Warn("the unit can't keep what the next server needs (FileDescriptorStoreMax=), so the restart is a stop and a start", zap.Int("descriptors", need), zap.String("max", max), zap.Error(err))
		return false
	}
	return true
}

// stopJob tells whether the service manager waits for the end of this process, be it
// to start it again.
func stopJob(log *zap.Logger) bool {
	unit := unitName()
	if os.Getenv("NOTIFY_SOCKET") == "" || unit == "" {
		return false
	}
	state, err := systemctl("show", "--property=ActiveState", "--value", unit)
	if err != nil {
		log.Warn("systemctl doesn't say whether this service is to stop; if it is, it has to be told again, by a signal", zap.Error(err))
	}
	return state == "deactivating"
}

// storeSize tells how many descriptors store is going to give away.
func (k *keeper) storeSize() int {
	n := 1 // the state
	for name := range k.held {
		if !strings.HasPrefix(name, heldInherited) {
			n++
		}
	}
	var s serverState
	_ = json.Unmarshal(k.state, &s) // of whatever version
	return n + max(len(k.kernel), s.Connections, 1)
}

// store gives all that is held to the service manager.
func (k *keeper) store() error {
	state, err := memoryFile("hostcryptd-state", k.state)
	if err != nil {
		return err
	}
	defer state.Close()
	files := map[string]*os.File{storedState: state}
	for name, f := range k.held {
		files[name] = f
	}
	for i, f := range k.kernel {
		files[fmt.Sprintf("%s%d", heldKernel, i)] = f
	}
	k.forgetStored()
	for name, f := range files {
		if strings.HasPrefix(name, heldInherited) {
			continue // the service manager has it
		}
		k.stored = append(k.stored, name)
		if err := systemd.Store(storedPrefix+name, f); err != nil {
			return err
		}
	}
	// It has received all when it has answered: then they outlive this process.
	return systemd.Barrier(systemctlTimeout)
}

// forgetStored has the service manager drop what it keeps. It does not by itself
// when it has passed it on; and as long as it has the kernel's sockets, the kernel
// doesn't see that their server has died.
func (k *keeper) forgetStored() {
	for _, name := range k.stored {
		if err := systemd.Remove(storedPrefix + name); err != nil {
			k.log.Error("the service manager was not told to drop a descriptor; if the server dies, the volume may not be recovered", zap.String("name", name), zap.Error(err))
		}
	}
	k.stored = nil
}

// storedLine returns the line of hostcrypttab by which the volume was served that the
// service manager has kept, "" if that is not known. ok is false if there is no such
// volume.
func storedLine() (line string, ok bool) {
	f := systemd.Stored(storedPrefix + storedState)
	if f == nil {
		return "", false
	}
	defer f.Close()
	b, err := readMemoryFile(f)
	if err != nil {
		return "", true
	}
	return tabLineOf(b), true
}

// tabLineOf is the TabLine of a state, of whatever version.
func tabLineOf(state []byte) string {
	var s serverState
	_ = json.Unmarshal(state, &s)
	return s.TabLine
}

// withStoredLine begins anew with the line by which the volume was served that the
// service manager has kept, as why says that the line of now can't be used. To end
// would be to lose a volume that is in use: the service manager would drop what it
// keeps.
func (a *app) withStoredLine(line string, why error) error {
	if line == "" || os.Getenv(tabEnv) == line {
		return why
	}
	log := a.daemonLog(false)
	log.Error("the volume is in use and goes on with the line of "+tabFile+" that it had, as that of now can't be used; mend it and restart the service", zap.String("line", line), zap.Error(why))
	_ = log.Sync()
	if err := os.Setenv(tabEnv, line); err != nil {
		return errors.Join(why, err)
	}
	return errors.Join(why, fmt.Errorf("executing the program again: %w", unix.Exec("/proc/self/exe", os.Args, os.Environ())))
}

// backToTabLine has the next servers use the line of hostcrypttab by which one has
// served last. It is called when one has given up that was to use another.
func (k *keeper) backToTabLine() {
	line := tabLineOf(k.state)
	if line == "" || os.Getenv(tabEnv) == line {
		return
	}
	k.log.Error("the volume goes on with the line of "+tabFile+" that it had, as no server comes up with that of now; mend it and restart the service", zap.String("line", line))
	if err := os.Setenv(tabEnv, line); err != nil {
		k.log.Error("the line is not used", zap.Error(err))
	}
}

// stored returns what a keeper before has given to the service manager, by the
// names under which it is held.
func stored(files map[string]*os.File) map[string]*os.File {
	list := map[string]*os.File{}
	for name, f := range files {
		if name, ok := strings.CutPrefix(name, storedPrefix); ok {
			list[filepath.Base(name)] = f
		}
	}
	return list
}
