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
// can be made to fail while it is in use. Above it, its flushes can be held back.
type brokenDisk struct {
	m       *machine
	raw     string
	sectors int64 // of 512 bytes
	flushes *heldDisk
}

const (
	brokenName = "hostcryptd-broken"
	heldName   = "hostcryptd-held"
)

// headerCopy is the size of a copy of the header in sectors of 512 bytes, see
// sector/FORMAT.md.
const headerCopy = 256 << 10 / 512

// breakable puts such a device in the place of the machine's disk, which has some room
// left to grow.
func (m *machine) breakable() (*brokenDisk, error) {
	size, err := deviceSize(m.disk)
	if err != nil {
		return nil, err
	}
	b := &brokenDisk{m: m, raw: m.disk, sectors: (size - brokenGrows) / 512}
	if _, err := m.run("dmsetup", "create", brokenName, "--table", b.good()); err != nil {
		return nil, err
	}
	if b.flushes, err = m.holdable(heldName, filepath.Join("/dev/mapper", brokenName), b.sectors); err != nil {
		return nil, err
	}
	m.disk = b.flushes.path()
	m.brokenDisk = true
	return b, nil
}

// brokenGrows is by how many bytes it can grow.
const brokenGrows = 16 << 20

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

// diskErrors checks that errors of the disk reach the application, that a flush that
// failed is never followed by one that succeeds, and what becomes of a flush whose server
// is killed, stopped or replaced meanwhile.
func diskErrors(m *machine) error {
	b, err := m.breakable()
	if err != nil {
		return err
	}
	m.step(1, "A header that can't be read")
	if err := m.unreadableHeader(b); err != nil {
		return err
	}

	if err := b.become(b.good()); err != nil {
		return err
	}
	s, err := m.serve("--host-key", hostKey)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(s.dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	m.step(2, "A write that fails")
	if err := failedWrite(b, f); err != nil {
		return err
	}
	m.step(3, "A flush that fails, and those after it")
	if err := failedFlush(b, f); err != nil {
		return err
	}
	m.step(4, "Detaching what could not be flushed")
	if err := errors.Join(f.Close(), s.detachFails()); err != nil {
		return err
	}
	return m.hangingFlushes(b)
}

// unreadableHeader has one and both copies of a new header fail.
func (m *machine) unreadableHeader(b *brokenDisk) error {
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
	return s.detach()
}

// failedWrite leaves a disk behind that can't be written to, and a write that failed.
func failedWrite(b *brokenDisk, f *os.File) error {
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
	return nil
}

func failedFlush(b *brokenDisk, f *os.File) error {
	if err := f.Sync(); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("an fsync on the broken disk: %v, want EIO", err)
	}
	// The kernel below has forgotten the write that failed: a flush that
	// succeeds now would be a lie.
	if err := b.become(b.good()); err != nil {
		return err
	}
	if err := neverFlushed(f); err != nil {
		return err
	}
	return b.m.saysOfFlushes(true, 0)
}

// neverFlushed flushes, which must fail each time.
func neverFlushed(f *os.File) error {
	for range 3 {
		if err := f.Sync(); !errors.Is(err, unix.EIO) {
			return fmt.Errorf("an fsync after one that failed: %v, want EIO", err)
		}
	}
	return nil
}

// saysOfFlushes checks what status says: that the volume has failed, or not, and how many
// servers were killed that waited for a flush.
func (m *machine) saysOfFlushes(failed bool, killed int) error {
	out, err := m.run("hostcryptd", "status", m.disk)
	if err != nil {
		return err
	}
	if strings.Contains(out, "FAILED") != failed {
		return fmt.Errorf("hostcryptd status says that the volume has failed: %v, want %v", !failed, failed)
	}
	const of = "a server was killed while it waited for the disk to flush its cache"
	if n := fmt.Sprintf("%s (%d since", of, killed); strings.Contains(out, of) != (killed > 0) || killed > 0 && !strings.Contains(out, n) {
		return fmt.Errorf("hostcryptd status doesn't say of %d servers that they were killed while they waited for a flush", killed)
	}
	return nil
}

// detachFails is detach where something was not written.
func (s *server) detachFails() error {
	code, out, err := s.m.try("hostcryptd", "detach", s.m.disk)
	if err != nil {
		return err
	}
	<-s.ended
	s.m.figure("exit code of detach", float64(code), "")
	s.m.figure("exit code of serve", float64(s.code), "")
	if s.code == 0 {
		return errors.New("hostcryptd serve ended with exit code 0 after a flush that failed")
	}
	if code == 0 {
		return fmt.Errorf("hostcryptd detach ended with exit code 0 after a flush that failed and said: %s", strings.TrimSpace(out))
	}
	return nil
}
