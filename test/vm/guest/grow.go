package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// grow has a volume grow below a file system that is mounted and written to: with
// its server at work, and while there is none. enlarge gives the disk a size; s
// serves it, and key is the host key that has been moved away.
func (m *machine) grow(s *server, key string, disk int64, enlarge func(size int64) error) error {
	before, err := deviceSize(s.dev)
	if err != nil {
		return err
	}
	if _, err := m.run("mkfs.ext4", "-q", s.dev); err != nil {
		return err
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	resize := func(what string, want int64) error {
		begun := time.Now()
		if _, err := m.run("hostcryptd", "resize", m.disk); err != nil {
			return err
		}
		m.figure(what, float64(time.Since(begun).Milliseconds()), "ms")
		if size, err := deviceSize(s.dev); err != nil || size != want {
			return errors.Join(fmt.Errorf("%s has %d bytes, want %d", s.dev, size, want), err)
		}
		_, err := m.run("resize2fs", s.dev)
		return err
	}
	pages := filepath.Join(m.mnt, "pages")
	if err := os.WriteFile(pages, nil, 0o600); err != nil {
		return err
	}
	// The kernel waits for its requests when it changes the size.
	w, err := startPageWriter(pages, 8<<20)
	if err != nil {
		return err
	}
	if err := errors.Join(w.waitWrite(), enlarge(disk-headerArea), resize("resize", disk-2*headerArea), w.waitWrite()); err != nil {
		return err
	}
	// More than there was room for; a server that takes over serves it too.
	big := filepath.Join(m.mnt, "big")
	if err := writePattern(big, before); err != nil {
		return err
	}
	if err := errors.Join(m.killServer(), w.waitWrite()); err != nil {
		return err
	}

	// Nobody tells the kernel of a disk that grew while nobody served it.
	now, err := m.status()
	if err != nil {
		return err
	}
	m.typed("kill", "-KILL", fmt.Sprint(now.Keeper), fmt.Sprint(now.PID))
	if err := errors.Join(unix.Kill(now.Keeper, unix.SIGKILL), unix.Kill(now.PID, unix.SIGKILL)); err != nil {
		return err
	}
	<-s.ended
	if err := enlarge(disk); err != nil {
		return err
	}
	next, err := m.launch("--host-key", key)
	if err != nil {
		return err
	}
	next.dev = s.dev // the kernel still has it
	if err := next.waitReady(); err != nil {
		return err
	}
	if err := next.attached(); err != nil {
		return err
	}
	if size, err := deviceSize(next.dev); err != nil || size != disk-2*headerArea {
		return errors.Join(fmt.Errorf("%s has %d bytes before it is resized, want %d", next.dev, size, disk-2*headerArea), err)
	}
	if err := errors.Join(resize("resize after a death", disk-headerArea), w.waitWrite()); err != nil {
		return err
	}
	if err := w.failed(); err != nil {
		return err
	}
	w.stop()
	if _, err := w.verify(); err != nil {
		return err
	}
	m.figure("writes while it grew", float64(w.writes), "")
	if err := errors.Join(w.f.Close(), m.unmount()); err != nil {
		return err
	}
	if _, err := m.run("e2fsck", "-f", "-n", next.dev); err != nil {
		return err
	}
	if err := m.mount(next.dev); err != nil {
		return err
	}
	return errors.Join(verifyPattern(big, before), m.unmount(), next.detach())
}

// writePattern writes a file whose pages tell where they belong, and flushes it.
func writePattern(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	out, page := bufio.NewWriterSize(f, 1<<20), alignedPage()
	for n := range size / pageSize {
		fillPage(page, int(n), 1)
		if _, err := out.Write(page); err != nil {
			return err
		}
	}
	return errors.Join(out.Flush(), f.Sync())
}

// verifyPattern reads what writePattern wrote. The caller has mounted the file
// system anew, so it comes from the disk.
func verifyPattern(name string, size int64) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	in, got, want := bufio.NewReaderSize(f, 1<<20), alignedPage(), alignedPage()
	for n := range size / pageSize {
		fillPage(want, int(n), 1)
		if _, err := io.ReadFull(in, got); err != nil || string(got) != string(want) {
			return errors.Join(fmt.Errorf("%s: page %d is not what was written", name, n), err)
		}
	}
	return nil
}
