package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

// demoFirstBoot is the first half of the narration of cmd demo: make an
// encrypted disk and use it.
func demoFirstBoot(m *machine) error {
	m.step(1, "Format a disk")
	m.say("%s is an empty raw disk. Formatting writes a small header to its start. The key that opens the disk is wrapped by a key in a key vault, which never gives that key away; a recovery key goes to a file, to be kept somewhere safe.", m.disk)
	if err := m.format(); err != nil {
		return err
	}
	if _, err := m.run("blkid", "-p", "-s", "TYPE", "-s", "VERSION", "-s", "UUID", "-o", "export", m.disk); err != nil {
		return err
	}

	m.step(2, "Attach it")
	m.say("The server asks the vault to unwrap the key once, then stands between the kernel and the raw disk: what the kernel writes to the new device, the disk gets encrypted.")
	s, err := m.attach()
	if err != nil {
		return err
	}

	m.step(3, "Make a file system and write files")
	m.say("%s is a disk like any other.", s.dev)
	if _, err := m.run("mkfs.ext4", "-q", s.dev); err != nil {
		return err
	}
	if err := m.mount(s.dev); err != nil {
		return err
	}
	if err := m.fill(); err != nil {
		return err
	}

	m.step(4, "Look for the secret on both sides")
	m.say("A secret line was among the files. Somebody who reads the device finds it; somebody who reads the raw disk, or steals it, must not.")
	through, err := m.find(s.dev)
	if err != nil {
		return err
	}
	raw, err := m.find(m.disk)
	if err != nil {
		return err
	}
	if !through || raw {
		return fmt.Errorf("the secret is on %s: %t (want true), on %s: %t (want false)", s.dev, through, m.disk, raw)
	}
	m.say("Found through %s, absent from %s.", s.dev, m.disk)
	return s.detach()
}

// demoSecondBoot is the second half: the machine has restarted.
func demoSecondBoot(m *machine) error {
	m.step(5, "Restart, and open it again")
	m.say("Nobody types a passphrase: the machine proves who it is, the vault unwraps the key, the files are there.")
	s, err := m.attach()
	if err != nil {
		return err
	}
	if err := m.checkFiles(s.dev); err != nil {
		return err
	}
	if err := s.detach(); err != nil {
		return err
	}
	m.stopVault()

	m.step(6, "Leave: open it without hostcryptd")
	m.say("The disk is an ordinary LUKS2 volume. With the recovery key, cryptsetup opens it: without hostcryptd, without the vault, without a network.")
	return leave(m)
}

// demoOnHost shows that the demo runs on the kernel of a host as well, with
// an image file: here the host is this virtual machine.
func demoOnHost(m *machine) error {
	// A host has these two files, and the demo must leave them alone.
	names := []string{"/etc/hosts", "/etc/ssl/certs/ca-certificates.crt"}
	for _, name := range names {
		if err := m.install(name, []byte("of the host")); err != nil {
			return err
		}
	}
	if _, err := m.run("mkfs.ext4", "-q", m.disk); err != nil {
		return err
	}
	if err := m.mount(m.disk); err != nil {
		return err
	}
	image := filepath.Join(m.mnt, "disk.img")
	if err := vmtest.Sparse(image, 64<<20); err != nil {
		return err
	}
	for _, scenario := range []string{"demo-1", "demo-2"} {
		if err := m.playOnHost(scenario, image); err != nil {
			return fmt.Errorf("%s: %w", scenario, err)
		}
	}
	for _, name := range names {
		if text, err := os.ReadFile(name); err != nil || string(text) != "of the host" {
			return errors.Join(fmt.Errorf("%s of the host now has %.100q", name, text), err)
		}
	}
	return m.unmount()
}

func (m *machine) playOnHost(scenario, image string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := command(self, "host", "-scenario", scenario, "-disk", image, "-payload", m.payload,
		"-state", filepath.Join(m.mnt, "state"), "-canary", m.canary)
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = report.Read(events, func(e report.Event) {
		if e.Kind != report.Ready && e.Kind != report.Done {
			m.Emit(e)
		}
	})
	return errors.Join(err, cmd.Wait())
}
