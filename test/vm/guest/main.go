// Command guest is the program that runs inside of a virtual machine of
// test/vm: as PID 1 of an initramfs it sets the machine up, runs the scenario
// that the kernel command line names, reports and powers off.
//
//	hostcryptd.scenario=NAME   which one, see scenarios
//	hostcryptd.canary=TEXT     a string to write through the volume
//
// It finds its disks by their serial: "volume" is the backing device, "state"
// a small disk whose files outlive the boot, "payload" a tar archive.
//
// With the argument "host" it runs the same scenario on the kernel of a host
// instead, as root, in a mount and a network namespace of its own, and
// reports on standard output. With "vault" it is the double of the key vault.
// With "agent" it runs the scenario as a unit of systemd, see system.go. With
// "connect" it is what QEMU runs on the host to connect a guest to a double
// there, see [vmtest.Network].
// In both places the hostcryptd under test is the product as it is: it talks
// to the real names on the real ports, and only the machine around it knows
// that they lead to the double.
package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/test/vm/report"
)

func main() {
	if os.Getpid() == 1 {
		initMachine() // does not return
	}
	args := os.Args[1:]
	if name := filepath.Base(os.Args[0]); name == "systemctl" || name == "activate" {
		args = append([]string{name}, args...)
	}
	if err := subcommand(args); err != nil {
		fmt.Fprintf(os.Stderr, "guest: %v\n", err)
		os.Exit(1)
	}
}

func subcommand(args []string) error {
	if len(args) == 0 {
		return errors.New("usage: guest host|agent|vault ... (or as PID 1)")
	}
	switch args[0] {
	case "host":
		return runOnHost(args[1:])
	case insideNamespaces:
		return runInNamespaces(args[1:])
	case "agent":
		return runAgent(runFromCommandLine)
	case "emergency":
		return runAgent(func(*report.Writer) error { return errors.New("the boot has failed: systemd is in emergency mode") })
	case "busy":
		return runBusy()
	case "late-vault":
		return runLateVault()
	case "vault":
		return runVault(args[1:])
	case "hog":
		return runHog(args[1:])
	case "activate":
		return activate(args[1:])
	case "systemctl":
		return fakeSystemctl(args[1:], os.Stdout)
	case "connect":
		return runConnect(args[1:])
	}
	return fmt.Errorf("unknown argument %q", args[0])
}

// reportReady says that this program runs, and on which kernel.
func reportReady(w *report.Writer) error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	w.Emit(report.Event{Kind: report.Ready, Text: unix.ByteSliceToString(uts.Release[:])})
	return nil
}

// reportDone says how the scenario went.
func reportDone(w *report.Writer, err error) {
	e := report.Event{Kind: report.Done}
	if err != nil {
		e.Text = err.Error()
	}
	w.Emit(e)
}

// uptime is the time since the kernel started.
func uptime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
