package main

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A cutVolume is a volume of the power cut scenarios, with a file system that
// holds numbered records. What record n holds follows from its number and the
// seed, so that a check needs no copy of what was written.
//
// Three of four records are a file each, acknowledged after an fsync of the
// file and one of its folder. The fourth is a block of the file slots,
// acknowledged when a write with O_DIRECT and O_DSYNC returns, which a file
// system may turn into a write with FUA in place of a flush.
type cutVolume struct {
	m      *machine
	fstype string // "ext4" or "xfs", and the serial of its disk
	seed   uint64
	only   bool // every record is a slot
	server *server
	slots  *os.File
}

// slotSize is the size of a record in the file slots.
const slotSize = pageSize

func (m *machine) cutVolume(fstype string) (*cutVolume, error) {
	seed, err := strconv.ParseUint(m.params["seed"], 10, 64)
	if err != nil {
		return nil, fmt.Errorf("parameter seed: %w", err)
	}
	key, err := hex.DecodeString(m.params["hostkey"])
	if err != nil {
		return nil, fmt.Errorf("parameter hostkey: %w", err)
	}
	c := &cutVolume{m: m, fstype: fstype, seed: seed, only: m.params["slots"] == "only"}
	if m.disk = diskBySerial(fstype); m.disk == "" {
		return nil, fmt.Errorf("there is no disk %s", fstype)
	}
	return c, os.WriteFile(hostKey, key, 0o600)
}

func (c *cutVolume) open(args ...string) (err error) {
	if c.server, err = c.m.serve(append([]string{"--host-key", hostKey, "--audit-log", "none"}, args...)...); err != nil {
		return fmt.Errorf("the volume doesn't open: %w", err)
	}
	// Without a write cache the kernel sends no flushes, and the scenario
	// would say nothing about them.
	queue := filepath.Join("/sys/block", filepath.Base(c.server.dev), "queue")
	for name, want := range map[string]string{"write_cache": "write back", "fua": "1"} {
		got, err := os.ReadFile(filepath.Join(queue, name))
		if err != nil || strings.TrimSpace(string(got)) != want {
			return errors.Join(fmt.Errorf("%s of %s is %q, want %q", name, c.server.dev, bytes.TrimSpace(got), want), err)
		}
	}
	return nil
}

func (c *cutVolume) mount() error {
	c.m.typed("mount", "-t", c.fstype, c.server.dev, c.m.mnt)
	if err := unix.Mount(c.server.dev, c.m.mnt, c.fstype, 0, ""); err != nil {
		return fmt.Errorf("the file system doesn't mount: %w", err)
	}
	return nil
}

// path is where record n is, if it is a file.
func (c *cutVolume) path(n int) string {
	return filepath.Join(c.m.mnt, "records", strconv.Itoa(n/256), strconv.Itoa(n))
}

func (c *cutVolume) isSlot(n int) bool { return c.only || n%4 == 3 }

// slot is where record n is in the file slots.
func (c *cutVolume) slot(n int) int64 {
	if c.only {
		return int64(n) * slotSize
	}
	return int64(n/4) * slotSize
}

// content is what record n holds.
func (c *cutVolume) content(n int) []byte {
	var seed [32]byte
	binary.LittleEndian.PutUint64(seed[:], c.seed)
	binary.LittleEndian.PutUint64(seed[8:], uint64(n))
	r := rand.NewChaCha8(seed)
	size := slotSize
	if !c.isSlot(n) {
		size = 1 + int(r.Uint64()%12000)
	}
	b := make([]byte, size)
	r.Read(b) // never fails
	return b
}

// write makes record n durable. When it returns nil, the record must outlive
// a power cut.
func (c *cutVolume) write(n int) error {
	if c.isSlot(n) {
		buf := alignedPage()
		copy(buf, c.content(n))
		_, err := c.slots.WriteAt(buf, c.slot(n))
		return err
	}
	name := c.path(n)
	dir := filepath.Dir(name)
	if err := os.Mkdir(dir, 0o755); err == nil {
		if err := syncPath(filepath.Dir(dir)); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrExist) {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(c.content(n))
	err = errors.Join(err, f.Sync(), f.Close())
	if err != nil {
		return err
	}
	return syncPath(dir)
}

// syncPath makes the entries of a folder durable.
func syncPath(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// openSlots creates the file slots and its folder, if they aren't there.
func (c *cutVolume) openSlots() (err error) {
	if err := os.MkdirAll(filepath.Join(c.m.mnt, "records"), 0o755); err != nil {
		return err
	}
	c.slots, err = os.OpenFile(filepath.Join(c.m.mnt, "slots"), os.O_RDWR|os.O_CREATE|unix.O_DIRECT|unix.O_DSYNC, 0o600)
	return errors.Join(err, syncPath(c.m.mnt))
}

// lost counts the records 1 to acked that are not there as they were written.
// The error is for the first of them.
func (c *cutVolume) lost(acked int) (lost int, first error) {
	slots, err := os.Open(filepath.Join(c.m.mnt, "slots"))
	if err != nil {
		return acked, err
	}
	defer slots.Close()
	for n := 1; n <= acked; n++ {
		var (
			got []byte
			err error
		)
		if c.isSlot(n) {
			got = make([]byte, slotSize)
			_, err = io.ReadFull(io.NewSectionReader(slots, c.slot(n), slotSize), got)
		} else {
			got, err = os.ReadFile(c.path(n))
		}
		if err == nil && !bytes.Equal(got, c.content(n)) {
			err = fmt.Errorf("record %d has changed", n)
		}
		if err != nil {
			lost++
			if first == nil {
				first = err
			}
		}
	}
	return lost, first
}

// recover mounts the file system, which replays its journal, finds every
// acknowledged record, and has the file system's own checker look at it.
func (c *cutVolume) recover(acked int) error {
	lost, err := acked, c.open()
	if err == nil {
		err = c.mount()
	}
	if err == nil {
		lost, err = c.lost(acked)
	}
	c.m.figure(c.fstype+" records checked", float64(acked), "")
	c.m.figure(c.fstype+" records lost", float64(lost), "")
	if err != nil {
		return fmt.Errorf("%d of %d acknowledged records are lost: %w", lost, acked, err)
	}
	if err := c.m.unmount(); err != nil {
		return err
	}
	return c.fsck()
}

// fsck has the file system's own checker look at it, unmounted.
func (c *cutVolume) fsck() error {
	check := []string{"e2fsck", "-fn", c.server.dev}
	if c.fstype == "xfs" {
		check = []string{"xfs_repair", "-n", c.server.dev}
	}
	_, err := c.m.run(check[0], check[1:]...)
	return err
}

// powerCutPrepare makes the file systems.
func powerCutPrepare(m *machine) error {
	for _, fstype := range []string{"ext4", "xfs"} {
		c, err := m.cutVolume(fstype)
		if err != nil {
			return err
		}
		if err := c.open(); err != nil {
			return err
		}
		if _, err := m.run("mkfs."+fstype, "-q", c.server.dev); err != nil {
			return err
		}
		if err := c.mount(); err != nil {
			return err
		}
		if err := errors.Join(c.openSlots(), c.slots.Close(), m.unmount(), c.server.detach()); err != nil {
			return err
		}
	}
	return nil
}

// powerCutWrite checks what the last power cut left and then writes records
// until the next one.
func powerCutWrite(m *machine) error {
	c, err := m.cutVolume(m.params["fs"])
	if err != nil {
		return err
	}
	acked, err := m.number("acked." + c.fstype)
	if err != nil {
		return err
	}
	if err := c.recover(acked); err != nil {
		return err
	}
	if err := kernelComplaints(false); err != nil {
		return err
	}
	if err := errors.Join(c.mount(), c.openSlots()); err != nil {
		return err
	}
	m.say("writing")
	for n := acked + 1; ; n++ {
		if err := c.write(n); err != nil {
			return fmt.Errorf("writing record %d: %w", n, err)
		}
		m.figure("acked", float64(n), "records")
	}
}

// powerCutCheck checks what the last power cuts left of the volumes that
// there are, and that they can be detached cleanly.
func powerCutCheck(m *machine) error {
	checked := 0
	for _, fstype := range []string{"ext4", "xfs"} {
		if !slices.Contains(strings.Split(m.params["fs"], ","), fstype) {
			continue
		}
		c, err := m.cutVolume(fstype)
		if err != nil {
			return err
		}
		acked, err := m.number("acked." + fstype)
		if err != nil {
			return err
		}
		if err := c.recover(acked); err != nil {
			return err
		}
		if err := c.server.detach(); err != nil {
			return err
		}
		checked++
	}
	if checked == 0 {
		return errors.New("parameter fs names no file system")
	}
	return nil
}
