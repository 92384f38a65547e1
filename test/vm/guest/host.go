package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/report"
)

// insideNamespaces is the argument that runOnHost gives to its child.
const insideNamespaces = "inside-namespaces"

// runOnHost runs a scenario on the kernel of this host. Its child has a
// network namespace with nothing but a loopback interface, where the names
// and addresses of Azure can lead to the double, and a mount namespace, where
// /etc/hosts can say so. The host's own network, mounts and files stay as
// they are; what it shares is /dev/nbdN and the device mapper.
func runOnHost(args []string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, append([]string{insideNamespaces}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running in new namespaces (needs root): %w", err)
	}
	return nil
}

func runInNamespaces(args []string) (err error) {
	flags := flag.NewFlagSet("host", flag.ContinueOnError)
	var (
		scenario = flags.String("scenario", "", "name of the scenario")
		disk     = flags.String("disk", "", "image file to use as the backing device")
		payload  = flags.String("payload", "", "tar archive to copy")
		state    = flags.String("state", "", "folder that is kept between two runs")
		canary   = flags.String("canary", "", "string that must not reach the disk")
	)
	if err := flags.Parse(args); err != nil {
		return err
	}
	w := report.NewWriter(os.Stdout, uptime)
	defer func() { reportDone(w, err) }()
	if err := reportReady(w); err != nil {
		return err
	}
	m := &machine{
		Writer:  w,
		shared:  true,
		canary:  *canary,
		disk:    *disk,
		payload: *payload,
		state:   *state,
		mnt:     filepath.Join(*state, "mnt"),
	}
	if err := os.MkdirAll(m.mnt, 0o755); err != nil {
		return err
	}
	// Nothing that is mounted from here on shows outside.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("making mounts private: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return err
	}
	return m.runScenario(*scenario)
}

// install puts a file of the machine in place. On a host that is a bind
// mount in this mount namespace, so the host's own file is not touched; it
// must exist.
func (m *machine) install(path string, data []byte) error {
	if !m.shared {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		return os.WriteFile(path, data, 0o644)
	}
	copied := filepath.Join(m.state, filepath.Base(path))
	if err := os.WriteFile(copied, data, 0o644); err != nil {
		return err
	}
	if err := unix.Mount(copied, path, "", unix.MS_BIND, ""); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("%s does not exist on this host, so it can't be replaced for the demo", path)
		}
		return fmt.Errorf("replacing %s in the mount namespace: %w", path, err)
	}
	return nil
}
