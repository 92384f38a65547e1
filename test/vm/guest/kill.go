package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	killRounds = 2 // besides two of which one comes in the middle of the other

	// writeDelay is how long the disk takes for a write: longer than the whole
	// recovery from a kill takes otherwise, with the 5 s after which the kernel
	// sends a request again.
	writeDelay = 9 * time.Second

	slowName = "hostcryptd-slow"
	slowSize = 56 << 20 // before it grows
)

// kill kills the server again and again under verified writes, then while a write
// of its is still on its way to the disk, and then after the disk has grown.
func kill(m *machine) error {
	m.reconnects = true
	raw := m.disk
	size, err := deviceSize(raw)
	if err != nil {
		return err
	}
	if _, err := m.run("dmsetup", "create", slowName, "--table", fmt.Sprintf("0 %d delay %s 0 0 %s 0 0", slowSize/512, raw, raw)); err != nil {
		return err
	}
	m.disk = filepath.Join("/dev/mapper", slowName)
	if err := m.formatHostKey(); err != nil {
		return err
	}
	s, err := m.serve("--host-key", hostKey)
	if err != nil {
		return err
	}
	// What opened it must not be needed again.
	const away = hostKey + ".away"
	if err := os.Rename(hostKey, away); err != nil {
		return err
	}

	w, err := startPageWriter(s.dev, 32<<20)
	if err != nil {
		return err
	}
	defer w.f.Close()
	m.step(1, "Killed again and again, under writes")
	if err := m.killUnderWrites(s.dev, w); err != nil {
		return err
	}

	m.step(2, "Killed with a write on its way to the disk")
	reload := func(size int64, d time.Duration) error {
		return m.replaceTable(slowName, fmt.Sprintf("0 %d delay %s 0 0 %s 0 %d", size/512, raw, raw, d.Milliseconds()))
	}
	if err := reload(slowSize, writeDelay); err != nil {
		return err
	}
	if err := m.killUnderWay(w.f); err != nil {
		return err
	}
	if err := errors.Join(w.f.Close(), reload(slowSize, 0)); err != nil {
		return err
	}

	m.step(3, "Grown under a mounted file system, and killed")
	return m.grow(s, away, size, func(size int64) error { return reload(size, 0) })
}

// killUnderWrites kills the server of a device again and again, under verified
// writes.
func (m *machine) killUnderWrites(dev string, w *pageWriter) error {
	fio, err := m.startVerified(dev)
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	p := &pauses{}
	for i := range 1 + killRounds {
		before, err := m.status()
		if err != nil {
			return err
		}
		if i == 0 {
			if err := m.killServer(); err != nil {
				return err
			}
			time.Sleep(3 * time.Second) // the kernel has not yet sent again what it had sent
			if before, err = m.waitServed(before.PID); err != nil {
				return err
			}
		}
		w.take()
		if err := m.killServer(); err != nil {
			return err
		}
		if _, err := m.waitServed(before.PID); err != nil {
			return err
		}
		if err := w.waitWrite(); err != nil {
			return err
		}
		if i > 0 {
			p.add(w.take())
		}
	}
	if err := w.failed(); err != nil {
		return err
	}
	p.figures(m, "kill")
	if err := m.endVerified(fio); err != nil {
		return err
	}
	if err := m.endWrites(w); err != nil {
		return err
	}
	m.figure("longest write", float64(w.slowest.Milliseconds()), "ms")
	if w.slowest > 15*time.Second {
		return fmt.Errorf("a write took %v", w.slowest)
	}
	return nil
}

// killUnderWay kills the server while a write of its takes writeDelay to be on the
// disk.
func (m *machine) killUnderWay(dev *os.File) error {
	page := alignedPage()
	fillPage(page, 1, 1)
	begun, written := time.Now(), make(chan error, 1)
	go func() {
		_, err := dev.WriteAt(page, pageSize)
		written <- err
	}()
	time.Sleep(500 * time.Millisecond)
	if err := m.killServer(); err != nil {
		return err
	}
	// The disk reads at once. As long as the dead server's write is not over,
	// nothing may be answered, as what is written next could be overwritten by it.
	if _, err := dev.ReadAt(alignedPage(), 64*pageSize); err != nil {
		return err
	}
	waited := time.Since(begun)
	m.figure("first answer after the dead server's write began", float64(waited.Milliseconds()), "ms")
	if waited < writeDelay {
		return fmt.Errorf("the next server answered %v after a write of the dead one began that takes %v", waited, writeDelay)
	}
	if err := <-written; err != nil {
		return fmt.Errorf("the write that was under way: %w", err)
	}
	got := alignedPage()
	if _, err := dev.ReadAt(got, pageSize); err != nil || string(got) != string(page) {
		return errors.Join(errors.New("the write that was under way reads as something else"), err)
	}
	return nil
}
