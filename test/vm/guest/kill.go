package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
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

// killServer kills the process that serves, not its keeper.
func (m *machine) killServer() error {
	out, err := command("hostcryptd", "status", m.disk, "--json").Output()
	if err != nil {
		return fmt.Errorf("hostcryptd status: %w", err)
	}
	var s struct {
		PID    int `json:"pid"`
		Keeper int `json:"keeper"`
	}
	if err := json.Unmarshal(out, &s); err != nil {
		return err
	}
	if s.Keeper == 0 || s.PID == s.Keeper {
		return fmt.Errorf("the server's pid is %d, the keeper's %d", s.PID, s.Keeper)
	}
	m.typed("kill", "-KILL", fmt.Sprint(s.PID))
	return unix.Kill(s.PID, unix.SIGKILL)
}

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
	const key = "/run/host.key"
	if _, err := m.run("hostcryptd", "format", m.disk, "--key", "host-key", "--host-key", key, "--yes"); err != nil {
		return err
	}
	s, err := m.serve("--host-key", key)
	if err != nil {
		return err
	}
	if !s.running() {
		return fmt.Errorf("hostcryptd serve ended with exit code %d: %s", s.code, s.log.String())
	}
	// What opened it must not be needed again.
	const away = key + ".away"
	if err := os.Rename(key, away); err != nil {
		return err
	}

	m.step(1, "Killed again and again, under writes")
	w, err := startPageWriter(s.dev, 32<<20)
	if err != nil {
		return err
	}
	defer w.f.Close()
	fio, err := m.startVerified(s.dev)
	if err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	p := &pauses{}
	for i := range 1 + killRounds {
		before, err := m.served()
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
	select {
	case <-w.done:
		return fmt.Errorf("a write failed: %w", w.err)
	default:
	}
	p.figures(m, "kill")
	if err := m.endVerified(fio); err != nil {
		return err
	}
	w.stop()
	m.figure("writes answered", float64(w.writes), "")
	m.figure("longest write", float64(w.slowest.Milliseconds()), "ms")
	checked, err := w.verify()
	if err != nil {
		return err
	}
	m.figure("pages verified", float64(checked), "")
	if w.slowest > 15*time.Second {
		return fmt.Errorf("a write took %v", w.slowest)
	}

	m.step(2, "Killed with a write on its way to the disk")
	reload := func(size int64, d time.Duration) error {
		table := fmt.Sprintf("0 %d delay %s 0 0 %s 0 %d", size/512, raw, raw, d.Milliseconds())
		for _, args := range [][]string{{"suspend", slowName}, {"load", slowName, "--table", table}, {"resume", slowName}} {
			if _, err := m.run("dmsetup", args...); err != nil {
				return err
			}
		}
		return nil
	}
	if err := reload(slowSize, writeDelay); err != nil {
		return err
	}
	page := alignedPage()
	fillPage(page, 1, 1)
	begun, written := time.Now(), make(chan error, 1)
	go func() {
		_, err := w.f.WriteAt(page, pageSize)
		written <- err
	}()
	time.Sleep(500 * time.Millisecond)
	if err := m.killServer(); err != nil {
		return err
	}
	// The disk reads at once. As long as the dead server's write is not over,
	// nothing may be answered, as what is written next could be overwritten by it.
	if _, err := w.f.ReadAt(alignedPage(), 64*pageSize); err != nil {
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
	if _, err := w.f.ReadAt(got, pageSize); err != nil || string(got) != string(page) {
		return errors.Join(errors.New("the write that was under way reads as something else"), err)
	}
	w.f.Close()
	if err := reload(slowSize, 0); err != nil {
		return err
	}

	m.step(3, "Grown under a mounted file system, and killed")
	return m.grow(s, away, size, func(size int64) error { return reload(size, 0) })
}
