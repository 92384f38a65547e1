package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// A heldDisk is a device of the device mapper over another, whose flushes can be held
// back: they hang until they are let go on to the device below. Reads and writes go
// through as ever.
type heldDisk struct {
	m       *machine
	name    string // of the device mapper
	below   string // the device below
	sectors int64  // of 512 bytes
}

func (m *machine) holdable(name, below string, sectors int64) (*heldDisk, error) {
	h := &heldDisk{m: m, name: name, below: below, sectors: sectors}
	_, err := m.run("dmsetup", "create", name, "--table", h.open())
	return h, err
}

func (h *heldDisk) path() string { return filepath.Join("/dev/mapper", h.name) }

func (h *heldDisk) open() string { return fmt.Sprintf("0 %d linear %s 0", h.sectors, h.below) }

// hold holds back all flushes from now on.
func (h *heldDisk) hold() error {
	const endless = time.Hour // dm-delay is told one delay for reads, writes and flushes each
	return h.m.replaceTable(h.name, fmt.Sprintf("0 %d delay %[2]s 0 0 %[2]s 0 0 %[2]s 0 %d", h.sectors, h.below, endless.Milliseconds()))
}

// letGo ends that. What was held back is sent on when dm-delay is suspended.
func (h *heldDisk) letGo() error { return h.m.replaceTable(h.name, h.open()) }

// waitHeld waits until a flush is held back.
func (h *heldDisk) waitHeld() error {
	for end := time.Now().Add(commandLimit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		// "0 262144 delay READS WRITES FLUSHES"
		out, err := command("dmsetup", "status", h.name).Output()
		if err != nil {
			return fmt.Errorf("dmsetup status %s: %w", h.name, err)
		}
		f := strings.Fields(string(out))
		if len(f) != 6 || f[2] != "delay" {
			return fmt.Errorf("dmsetup status %s says %q, want three numbers of a delay", h.name, out)
		}
		if f[5] != "0" {
			return nil
		}
	}
	return errors.New("no flush has come as far as the disk")
}

// writeSynced has a file written and fsynced, and returns how that ends.
func (m *machine) writeSynced(name, text string) <-chan error {
	m.typed("echo", text, ">", name, "&&", "sync", name)
	ended := make(chan error, 1)
	go func() {
		f, err := os.Create(name)
		if err == nil {
			_, err = f.WriteString(text)
			err = errors.Join(err, f.Sync(), f.Close())
		}
		ended <- err
	}()
	return ended
}
