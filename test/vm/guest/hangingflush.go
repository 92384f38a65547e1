package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// hangingFlushes has flushes hang below a file system, and who serves it be replaced
// meanwhile.
func (m *machine) hangingFlushes(b *brokenDisk) error {
	s, err := m.serve("--host-key", hostKey)
	if err != nil {
		return err
	}
	if _, err := m.run("mkfs.ext4", "-q", s.dev); err != nil {
		return err
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	m.step(5, "A reload in the middle of a resize, which waits for a flush")
	if err := m.reloadInResize(b, s); err != nil {
		return err
	}
	if err := m.saysOfFlushes(false, 0); err != nil {
		return err
	}

	m.step(6, "Killed while it waits for a flush, which succeeds")
	kept := filepath.Join(m.mnt, "kept")
	synced, err := m.killInFlush(b, kept, b.good())
	if err != nil {
		return err
	}
	if synced != nil {
		return fmt.Errorf("an fsync whose server was killed, on a good disk: %w", synced)
	}
	if err := m.saysOfFlushes(false, 1); err != nil {
		return err
	}

	m.step(7, "Killed while it waits for a flush, which fails")
	if synced, err = m.killInFlush(b, filepath.Join(m.mnt, "lost"), b.unwritable()); err != nil {
		return err
	}
	if !errors.Is(synced, unix.EIO) {
		return fmt.Errorf("an fsync whose server was killed, on a disk that fails: %v, want EIO", synced)
	}
	if err := m.saysOfFlushes(true, 2); err != nil {
		return err
	}

	m.step(8, "Killed after a flush that failed")
	if err := b.become(b.good()); err != nil {
		return err
	}
	if err := m.killFailed(s); err != nil {
		return err
	}
	if err := errors.Join(m.unmount(), s.detachFails()); err != nil {
		return err
	}

	m.step(9, "Stopped while it waits for a flush, which fails")
	if s, err = m.serve("--host-key", hostKey); err != nil {
		return err
	}
	if code, _, err := m.try("e2fsck", "-f", "-y", s.dev); err != nil || code > 1 { // 1: it had a journal to do again
		return errors.Join(fmt.Errorf("e2fsck ended with exit code %d", code), err)
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	if text, err := os.ReadFile(kept); err != nil || string(text) != kept {
		return errors.Join(fmt.Errorf("%s, whose fsync succeeded, holds %q", kept, text), err)
	}
	if err := m.unmount(); err != nil {
		return err
	}
	return m.stopInFlush(b, s)
}

// whileFlushing writes a file and has f run when the fsync of that has come as far as
// the disk and hangs there. Before the flush is let go the disk gets a table. It returns
// the error of the fsync; that of all else is fatal.
func (m *machine) whileFlushing(b *brokenDisk, name, table string, f func() error) (synced, fatal error) {
	if err := b.flushes.hold(); err != nil {
		return nil, err
	}
	written := m.writeSynced(name, name)
	if fatal = b.flushes.waitHeld(); fatal == nil {
		fatal = f()
	}
	select {
	case err := <-written:
		fatal = errors.Join(fatal, errors.New("an fsync has ended whose flush hangs"), err)
	default:
	}
	if fatal = errors.Join(fatal, b.become(table), b.flushes.letGo()); fatal != nil {
		return nil, fatal
	}
	select {
	case synced = <-written:
		return synced, nil
	case <-time.After(commandLimit):
		return nil, fmt.Errorf("an fsync still waits %v after its flush was let go", commandLimit)
	}
}

// killInFlush kills the server while it waits for the flush of a file.
func (m *machine) killInFlush(b *brokenDisk, name, table string) (synced, fatal error) {
	var before volumeStatus
	synced, fatal = m.whileFlushing(b, name, table, func() (err error) {
		if before, err = m.status(); err != nil {
			return err
		}
		if err := m.killServer(); err != nil {
			return err
		}
		// It is not dead before its flush has ended, and nobody may answer in its place.
		if now, err := m.status(); err == nil {
			return fmt.Errorf("pid %d serves while a flush of pid %d hangs, which was killed", now.PID, before.PID)
		}
		return nil
	})
	if fatal == nil {
		_, fatal = m.waitServed(before.PID)
	}
	return synced, fatal
}

// killFailed kills the server of a volume that has failed, whose disk is as good as new.
func (m *machine) killFailed(s *server) error {
	before, err := m.status()
	if err != nil {
		return err
	}
	if err := m.killServer(); err != nil {
		return err
	}
	if _, err := m.waitServed(before.PID); err != nil {
		return err
	}
	f, err := os.Open(s.dev)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := neverFlushed(f); err != nil {
		return err
	}
	return m.saysOfFlushes(true, 2)
}

// stopInFlush detaches a volume whose last flush hangs, and then fails.
func (m *machine) stopInFlush(b *brokenDisk, s *server) error {
	f, err := os.OpenFile(s.dev, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(alignedPage(), 0)
	if err := errors.Join(err, f.Close(), b.flushes.hold()); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- s.detachFails() }()
	err = b.flushes.waitHeld()
	if !s.running() {
		err = errors.Join(err, errors.New("hostcryptd serve has ended though its flush hangs"))
	}
	if err := errors.Join(err, b.become(b.unwritable()), b.flushes.letGo()); err != nil {
		return err
	}
	return <-ended
}

// reloadInResize has the volume grow, which from Linux 6.9 on waits for the requests under
// way, and asks for a reload meanwhile.
func (m *machine) reloadInResize(b *brokenDisk, s *server) error {
	size, err := deviceSize(s.dev)
	if err != nil {
		return err
	}
	before, err := m.status()
	if err != nil {
		return err
	}
	b.sectors += brokenGrows / 512
	if err := b.become(b.good()); err != nil {
		return err
	}
	b.flushes.sectors = b.sectors
	resized, reloaded := make(chan error, 1), make(chan error, 1)
	hostcryptd := func(verb string, ended chan<- error) {
		_, err := m.run("hostcryptd", verb, m.disk)
		ended <- err
	}
	synced, err := m.whileFlushing(b, filepath.Join(m.mnt, "resized"), b.good(), func() error {
		go hostcryptd("resize", resized)
		if err := s.waitLog("the server can't be replaced now", nil); err != nil {
			return err
		}
		go hostcryptd("reload", reloaded)
		return s.waitLog("the reload waits", resized)
	})
	if err != nil {
		return err
	}
	if err := errors.Join(synced, <-resized, <-reloaded); err != nil {
		return err
	}
	if now, err := deviceSize(s.dev); err != nil || now != size+brokenGrows {
		return errors.Join(fmt.Errorf("%s has %d bytes, want %d", s.dev, now, size+brokenGrows), err)
	}
	if now, err := m.status(); err != nil || now.PID == before.PID {
		return errors.Join(errors.New("after the reload the same server serves"), err)
	}
	return nil
}
