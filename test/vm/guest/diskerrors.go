package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A brokenDisk is a device of the device mapper over a disk, whose sectors
// can be made to fail while it is in use.
type brokenDisk struct {
	m       *machine
	raw     string
	sectors int64 // of 512 bytes
}

const brokenName = "hostcryptd-broken"

// headerCopy is the size of a copy of the header in sectors of 512 bytes, see
// sector/FORMAT.md.
const headerCopy = 256 << 10 / 512

func (m *machine) breakable() (*brokenDisk, error) {
	size, err := deviceSize(m.disk)
	if err != nil {
		return nil, err
	}
	b := &brokenDisk{m: m, raw: m.disk, sectors: size / 512}
	if _, err := m.run("dmsetup", "create", brokenName, "--table", b.good()); err != nil {
		return nil, err
	}
	m.disk = filepath.Join("/dev/mapper", brokenName)
	m.brokenDisk = true
	return b, nil
}

func (b *brokenDisk) good() string {
	return fmt.Sprintf("0 %d linear %s 0", b.sectors, b.raw)
}

// unreadable fails what is read or written in the first n sectors.
func (b *brokenDisk) unreadable(n int64) string {
	return fmt.Sprintf("0 %d error\n%d %d linear %s %d", n, n, b.sectors-n, b.raw, n)
}

// unwritable fails writes and flushes, and reads as ever. dm-flakey is always
// in its bad interval here.
func (b *brokenDisk) unwritable() string {
	return fmt.Sprintf("0 %d flakey %s 0 0 3600 1 error_writes", b.sectors, b.raw)
}

// become replaces the table under whoever uses the device.
func (b *brokenDisk) become(table string) error {
	return b.m.replaceTable(brokenName, table, "--noflush") // what is in flight must meet the new table
}

// diskErrors checks that errors of the disk reach the application, and that a
// flush that failed is never followed by one that succeeds.
func diskErrors(m *machine) error {
	b, err := m.breakable()
	if err != nil {
		return err
	}
	m.step(1, "A header that can't be read")
	if err := m.formatHostKey(); err != nil {
		return err
	}
	if err := b.become(b.unreadable(2 * headerCopy)); err != nil {
		return err
	}
	s, err := m.serveRefused("--host-key", hostKey)
	if err != nil {
		return fmt.Errorf("no copy of the header can be read: %w", err)
	}
	if log := s.log.String(); s.code == 0 || !strings.Contains(log, "input/output error") {
		return fmt.Errorf("with both headers unreadable hostcryptd serve ended with exit code %d, want another and the error: %s", s.code, log)
	}
	m.figure("exit code, both headers unreadable", float64(s.code), "")
	if err := b.become(b.unreadable(headerCopy)); err != nil {
		return err
	}
	if s, err = m.serve("--host-key", hostKey); err != nil {
		return fmt.Errorf("the second copy of the header can be read: %w", err)
	}
	if err := s.detach(); err != nil {
		return err
	}

	m.step(2, "A write that fails")
	if err := b.become(b.good()); err != nil {
		return err
	}
	if s, err = m.serve("--host-key", hostKey); err != nil {
		return err
	}
	f, err := os.OpenFile(s.dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	block := alignedPage()
	// The control: without the error all of it works.
	if _, err := f.WriteAt(block, 0); err != nil {
		return fmt.Errorf("control: a write to the good disk: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("control: an fsync on the good disk: %w", err)
	}
	if _, err := f.WriteAt(block, 4096); err != nil {
		return err
	}
	if err := b.become(b.unwritable()); err != nil {
		return err
	}
	if _, err := f.WriteAt(block, 8192); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("a write to the broken disk: %v, want EIO", err)
	}
	if _, err := f.ReadAt(block, 0); err != nil {
		return fmt.Errorf("a read from a disk that fails writes only: %w", err)
	}

	m.step(3, "A flush that fails, and those after it")
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("an fsync on the broken disk: %v, want EIO", err)
	}
	// The kernel below has forgotten the write that failed: a flush that
	// succeeds now would be a lie.
	if err := b.become(b.good()); err != nil {
		return err
	}
	for range 3 {
		if err := f.Sync(); !errors.Is(err, unix.EIO) {
			return fmt.Errorf("an fsync after one that failed: %v, want EIO", err)
		}
	}
	out, err := m.run("hostcryptd", "status", s.m.disk)
	if err != nil {
		return err
	}
	if !strings.Contains(out, "FAILED") {
		return errors.New("hostcryptd status doesn't say that the volume has failed")
	}

	m.step(4, "Detaching what could not be flushed")
	if err := f.Close(); err != nil {
		return err
	}
	code, out, err := m.try("hostcryptd", "detach", m.disk)
	if err != nil {
		return err
	}
	<-s.ended
	m.figure("exit code of detach", float64(code), "")
	m.figure("exit code of serve", float64(s.code), "")
	if s.code == 0 {
		return errors.New("hostcryptd serve ended with exit code 0 after a flush that failed")
	}
	if code == 0 {
		return fmt.Errorf("hostcryptd detach ended with exit code 0 after a flush that failed and said: %s", strings.TrimSpace(out))
	}
	return nil
}
