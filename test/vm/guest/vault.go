package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// The vault, the login host and the key that scenarios use. Only the
// machine's own files know that the names lead to the double.
const (
	vaultHost = "hostcryptd-test.vault.azure.net"
	loginHost = "login.microsoftonline.com"
	keyName   = "disk-kek"
	keyURL    = "https://" + vaultHost + "/keys/" + keyName
)

// startVault starts the double of the key vault, of the login host and of
// the instance metadata service in a process of its own, and lets the real
// names and addresses lead to it. Its key is kept on the state disk. Later
// calls do nothing.
func (m *machine) startVault() error {
	if m.vault != nil {
		return nil
	}
	if !m.replaced {
		if err := addMetadataAddress(); err != nil {
			return err
		}
		hosts := fmt.Sprintf("127.0.0.1 localhost\n127.0.0.1 %s %s\n", vaultHost, loginHost)
		if err := m.install("/etc/hosts", []byte(hosts)); err != nil {
			return err
		}
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Join(m.state, "vault")
	cmd := command(self, "vault", dir)
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	begun := time.Now()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting the vault double: %w", err)
	}
	m.vault, m.tell = cmd, stdin
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil || strings.TrimSpace(line) != vaultReady {
		m.stopVault()
		return fmt.Errorf("starting the vault double: it said %q: %w", line, err)
	}
	if !m.replaced {
		roots, err := os.ReadFile(filepath.Join(dir, rootsName))
		if err != nil {
			return err
		}
		if err := m.install("/etc/ssl/certs/ca-certificates.crt", roots); err != nil {
			return err
		}
		m.replaced = true
	}
	m.figure("vault double ready", time.Since(begun).Seconds(), "s")
	return nil
}

// tellVault gives the double a command.
func (m *machine) tellVault(what string) error {
	m.say("the vault's administrator: %s the key", what)
	_, err := io.WriteString(m.tell, what+"\n")
	return err
}

// stopVault ends the double, if it runs.
func (m *machine) stopVault() {
	if m.vault == nil {
		return
	}
	m.tell.Close()
	m.vault.Wait()
	m.vault = nil
}
