package main

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"time"
)

const (
	// retryInterval is the longest pause between two tries of a server that gets
	// no answer, see lifecycle.Backoff.
	retryInterval = 15 * time.Second
	// headStart is how long the first key of a volume may take before the second
	// one is tried.
	headStart = 2 * time.Second
	// emulated is how much longer an emulated machine may take: TLS, two child
	// processes and a kernel device are some seconds of it.
	emulated = 10 * time.Second
)

// A silentVault takes connections in the vault's place and never answers: what a
// firewall that drops packets looks like, to one who has no other machine.
type silentVault []net.Listener

func (m *machine) silence() (silentVault, error) {
	m.say("the vault takes connections, and says nothing")
	var s silentVault
	for _, addr := range []string{"127.0.0.1:443", metadataAddress + ":80"} {
		l, err := net.Listen("tcp", addr) // the kernel accepts; nobody reads
		if err != nil {
			return nil, errors.Join(err, s.end())
		}
		s = append(s, l)
	}
	return s, nil
}

func (s silentVault) end() error {
	var err error
	for _, l := range s {
		err = errors.Join(err, l.Close())
	}
	return err
}

// watchLocked looks at a server that waits, until end: it must not exit, must say
// why it waits, and when it tries again.
func (m *machine) watchLocked(s *server, until time.Time) (last keyStatus, err error) {
	for time.Now().Before(until) {
		if !s.running() {
			return last, fmt.Errorf("hostcryptd serve ended with exit code %d while the vault was down", s.code)
		}
		select {
		case <-s.ready:
			return last, errors.New("the volume opened without the vault")
		default:
		}
		if status, err := m.status(); err == nil {
			last = status.Key
			if status.State != "unsealing" || last.State != "acquiring" && last.State != "verifying" {
				return last, fmt.Errorf("status says %s, key %s: %s", status.State, last.State, last.Reason)
			}
			if pause := time.Until(last.NextTry); pause > retryInterval {
				return last, fmt.Errorf("the next try is in %v, want %v at most", pause, retryInterval)
			}
		}
		time.Sleep(time.Second)
	}
	if last.Attempts < 2 || !strings.Contains(last.Reason, "vault unreachable") {
		return last, fmt.Errorf("status says after the outage: %d tries, %q", last.Attempts, last.Reason)
	}
	return last, nil
}

// outage boots a volume while the vault is down: half of the time nothing listens
// there, half of it nothing answers. The server waits, says why, and opens the
// volume within one retry interval after the vault is back. With a second key it
// does not wait.
func outage(m *machine) error {
	seconds, err := m.number("outage")
	if err != nil {
		return err
	}
	if err := m.format(); err != nil {
		return err
	}
	m.stopVault()
	m.say("the vault is down, for %d s", seconds)
	begun := time.Now()
	half, end := begun.Add(time.Duration(seconds)*time.Second/2), begun.Add(time.Duration(seconds)*time.Second)
	s, err := m.launch()
	if err != nil {
		return err
	}
	if _, err := m.watchLocked(s, half); err != nil {
		return errors.Join(err, s.kill())
	}
	silent, err := m.silence()
	if err != nil {
		return errors.Join(err, s.kill())
	}
	key, err := m.watchLocked(s, end)
	if err := errors.Join(err, silent.end()); err != nil {
		return errors.Join(err, s.kill())
	}
	if err := m.startVault(); err != nil {
		return errors.Join(err, s.kill())
	}
	back := time.Now()
	m.say("the vault is back, after %.0f s and %d tries", back.Sub(begun).Seconds(), key.Attempts)
	if err := s.waitReady(); err != nil {
		return err
	}
	waited := time.Since(back)
	m.figure("outage", back.Sub(begun).Seconds(), "s")
	m.figure("tries in it", float64(key.Attempts), "")
	m.figure("vault back until unlocked", waited.Seconds(), "s")
	if waited > retryInterval+emulated {
		return fmt.Errorf("unlocked %v after the vault was back, want %v, and %v for the emulation, at most", waited, retryInterval, emulated)
	}
	if err := s.attached(); err != nil {
		return err
	}

	secondKey := filepath.Join(m.state, "host.key")
	if _, err := m.run("hostcryptd", "key", "add", m.disk, "--key", "host-key", "--host-key", secondKey); err != nil {
		return err
	}
	if err := s.detach(); err != nil {
		return err
	}
	m.stopVault()
	for _, quiet := range []bool{false, true} {
		name := "second key, vault refuses, until unlocked"
		if quiet {
			name = "second key, vault silent, until unlocked"
			if silent, err = m.silence(); err != nil {
				return err
			}
		}
		begun = time.Now()
		if s, err = m.serve("--host-key", secondKey); err != nil {
			return fmt.Errorf("with a second key: %w", err)
		}
		took := time.Since(begun)
		m.figure(name, took.Seconds(), "s")
		if took > headStart+emulated {
			return fmt.Errorf("with a second key unlocked after %v, want %v, and %v for the emulation, at most", took, headStart, emulated)
		}
		if err := s.detach(); err != nil {
			return err
		}
	}
	if err := silent.end(); err != nil {
		return err
	}
	_, err = m.run("hostcryptd", "audit", "verify")
	return err
}
