package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A heldFlush is a volume, held in the table, with a file system whose fsync hangs as
// its flush does. Meanwhile it is reloaded, which has to wait for that.
type heldFlush struct {
	m        *machine
	disk     *heldDisk
	begun    time.Time
	unit     unitState // before that
	server   int       // the same
	synced   <-chan error
	reloaded chan error // from systemctl
}

const (
	heldUnit = "hostcryptd@held.service"
	heldMnt  = "/held"
	heldFile = heldMnt + "/file"

	// heldFor is longer than the keeper waits for a server that is to leave, which is 30 s,
	// and than a server's watchdog does for a request while the disk can be read: a minute
	// from the time that a read was answered, and it looks every 10 s.
	heldFor = 85 * time.Second
)

func (m *machine) startHeldFlush() (h *heldFlush, err error) {
	// A task that waits for a flush is no fault of the kernel here.
	if err := os.WriteFile("/proc/sys/kernel/hung_task_timeout_secs", []byte("900"), 0); err != nil {
		return nil, err
	}
	h = &heldFlush{m: m, reloaded: make(chan error, 1)}
	raw := diskBySerial("held")
	size, err := deviceSize(raw)
	if err != nil {
		return nil, err
	}
	if h.disk, err = m.holdable("held", raw, size/512); err != nil {
		return nil, err
	}
	if _, err := m.run("systemctl", "start", heldUnit); err != nil {
		return nil, err
	}
	if h.unit, h.server, err = m.service("held"); err != nil {
		return nil, err
	}
	if err := os.Mkdir(heldMnt, 0o700); err != nil {
		return nil, err
	}
	m.typed("mount", "/dev/hostcryptd/held", heldMnt)
	if err := unix.Mount("/dev/hostcryptd/held", heldMnt, "ext4", 0, ""); err != nil {
		return nil, fmt.Errorf("mounting held: %w", err)
	}
	if err := h.disk.hold(); err != nil {
		return nil, err
	}
	h.begun = time.Now()
	h.synced = m.writeSynced(heldFile, "held")
	if err := h.disk.waitHeld(); err != nil {
		return nil, errors.Join(err, h.disk.letGo())
	}
	m.typed("systemctl", "reload", heldUnit, "&")
	go func() {
		_, err := command("systemctl", "reload", heldUnit).Output()
		h.reloaded <- err
	}()
	if err := m.waitJournal(heldUnit, "the server leaves the volume to another"); err != nil {
		return nil, errors.Join(err, h.disk.letGo())
	}
	return h, nil
}

// end lets the flush go, when the server that is to take over has died.
func (h *heldFlush) end() error {
	m := h.m
	time.Sleep(time.Until(h.begun.Add(heldFor)))
	select {
	case err := <-h.synced:
		return errors.Join(errors.New("an fsync has ended whose flush hangs"), err)
	case err := <-h.reloaded:
		return errors.Join(errors.New("systemctl reload has ended while the server waits for a flush"), err)
	default:
	}
	if err := h.same(); err != nil {
		return err
	}
	// Why the keeper hasn't killed the server.
	if err := m.waitJournal(heldUnit, "it waits for a flush of the disk"); err != nil {
		return err
	}
	standby, err := h.standby()
	if err != nil {
		return err
	}
	m.typed("kill", "-KILL", strconv.Itoa(standby))
	if err := unix.Kill(standby, unix.SIGKILL); err != nil {
		return err
	}
	if err := errors.Join(m.waitJournal(heldUnit, "a server died before it served"), h.disk.letGo()); err != nil {
		return err
	}
	if err := <-h.synced; err != nil {
		return fmt.Errorf("the fsync whose flush hung: %w", err)
	}
	err = <-h.reloaded
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() <= 0 {
		return fmt.Errorf("systemctl reload, whose new server died: %v, want an exit code", err)
	}
	m.say("systemctl reload has failed: %s", strings.TrimSpace(string(exit.Stderr)))
	m.disk = "held"
	after, err := m.waitServed(h.server)
	if err != nil {
		return err
	}
	if len(after.Volume.Warnings) > 0 || after.Volume.Failed {
		return fmt.Errorf("the volume whose flush hung has failed: %v, and warns: %v", after.Volume.Failed, after.Volume.Warnings)
	}
	if text, err := os.ReadFile(heldFile); err != nil || string(text) != "held" {
		return errors.Join(fmt.Errorf("%s holds %q", heldFile, text), err)
	}
	return unix.Unmount(heldMnt, 0)
}

// same checks that nobody was replaced.
func (h *heldFlush) same() error {
	now, server, err := h.m.service("held")
	if err != nil {
		return err
	}
	if now["MainPID"] != h.unit["MainPID"] || now["NRestarts"] != "0" || server != h.server {
		return fmt.Errorf("while its flush hung, %s was %v, server %d, and is %v, server %d", heldUnit, h.unit, h.server, now, server)
	}
	return nil
}

// standby is the process that waits for its turn: the keeper's other child.
func (h *heldFlush) standby() (int, error) {
	lists, err := filepath.Glob("/proc/" + h.unit["MainPID"] + "/task/*/children") // each thread has its own
	if err != nil {
		return 0, err
	}
	var others []int
	for _, name := range lists {
		b, _ := os.ReadFile(name) // if the thread has not ended
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid != h.server {
				others = append(others, pid)
			}
		}
	}
	if len(others) != 1 {
		return 0, fmt.Errorf("the keeper's children are %v, want one besides the server, %d", others, h.server)
	}
	return others[0], nil
}

// waitJournal waits until a unit has logged a text.
func (m *machine) waitJournal(unit, text string) error {
	for end := time.Now().Add(commandLimit); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		out, err := exec.Command("journalctl", "-b", "--no-pager", "-o", "cat", "-u", unit).Output()
		if err != nil {
			return fmt.Errorf("journalctl: %w", err)
		}
		if strings.Contains(string(out), text) {
			return nil
		}
	}
	return fmt.Errorf("in %v, %s hasn't logged: %s", commandLimit, unit, text)
}
