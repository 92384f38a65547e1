// Command demo shows the main job of hostcryptd to somebody who has not seen
// it before: it formats a disk, attaches it, writes files, looks for a secret
// on both sides, restarts, and opens the disk with cryptsetup. Everything on
// the screen happens: the commands are run, the output is theirs.
//
// It needs no disk to spare and changes nothing on this machine. By default
// it runs on the kernel of this machine if it may (as root, with the kernel
// module nbd) and on a disk image; else it boots a virtual machine, which is
// emulated and therefore slow, and takes one to two minutes. -where chooses.
//
// Only the key vault is not real: a test double answers in its place, inside
// of the virtual machine or of a network namespace.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

func main() {
	os.Setenv("HOSTCRYPTD_TPM", "none") // not this machine's
	where := flag.String("where", "auto", "where to run: vm, host, or auto")
	keep := flag.Bool("keep", false, "keep the disk image and the logs")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *where, *keep); err != nil {
		fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

const (
	diskSize    = 128 << 20
	stateSize   = 32 << 20
	payloadSize = 8 << 20
)

// A stage is a place where the two halves of the demo can run: the guest
// program's scenarios demo-1 and demo-2, with a restart between them.
type stage interface {
	// prepare says what is about to happen and gets everything ready.
	prepare(ctx context.Context, dir string) error
	// play runs one scenario and shows what it reports.
	play(ctx context.Context, scenario, canary string, show func(report.Event)) error
}

func run(ctx context.Context, where string, keep bool) (err error) {
	var s stage
	switch where {
	case "vm":
		s = &vmStage{}
	case "host":
		s = &hostStage{}
		if err := hostUsable(ctx); err != nil {
			return err
		}
	case "auto":
		s = &vmStage{}
		if hostUsable(ctx) == nil {
			s = &hostStage{}
		}
	default:
		return fmt.Errorf("-where is %q, want vm, host or auto", where)
	}
	dir, err := os.MkdirTemp("", "hostcryptd-demo-")
	if err != nil {
		return err
	}
	defer func() {
		if keep || err != nil {
			fmt.Printf("\nDisk image and logs are kept in %s\n", dir)
			return
		}
		os.RemoveAll(dir)
	}()
	begun := time.Now()
	p := newPrinter(os.Stdout)
	p.para("hostcryptd encrypts a disk below the file system: what is written reaches the disk only as ciphertext, and the key that opens it never leaves a key vault. This demo shows the main job in six steps.")
	if err := s.prepare(ctx, dir); err != nil {
		return err
	}
	canary := "my-secret-" + rand.Text()
	if err := s.play(ctx, "demo-1", canary, p.event); err != nil {
		return err
	}
	p.endStep()
	if err := s.play(ctx, "demo-2", canary, p.event); err != nil {
		return err
	}
	p.endStep()
	p.next(time.Since(begun))
	return nil
}

// A vmStage is a virtual machine for each half: the restart is real.
type vmStage struct {
	lab     *vmtest.Lab
	payload *vmtest.Tree
}

func (s *vmStage) prepare(ctx context.Context, dir string) (err error) {
	say("It runs in a virtual machine, which is emulated: it takes one to two minutes, and real hardware is far faster. First the programs are built and, the first time, a Debian kernel is downloaded.")
	if s.lab, err = vmtest.NewLab(ctx, dir, vmtest.Series(), func(format string, args ...any) { say(fmt.Sprintf(format, args...)) }); err != nil {
		return err
	}
	if s.payload, err = vmtest.Payload(ctx, filepath.Join(dir, "payload.tar"), payloadSize); err != nil {
		return err
	}
	return errors.Join(
		vmtest.Sparse(filepath.Join(dir, "volume.img"), diskSize),
		vmtest.Sparse(filepath.Join(dir, "state.img"), stateSize),
	)
}

func (s *vmStage) play(ctx context.Context, scenario, canary string, show func(report.Event)) error {
	say(fmt.Sprintf("Starting a virtual machine with Linux %s ...", s.lab.Kernel.Release))
	c := s.lab.Config(scenario, map[string]string{"canary": canary},
		vmtest.Disk{Serial: "volume", Path: filepath.Join(s.lab.Dir, "volume.img")},
		vmtest.Disk{Serial: "state", Path: filepath.Join(s.lab.Dir, "state.img")},
		s.payload.Disk(),
	)
	c.OnEvent = show
	_, err := c.Run(ctx)
	return err
}

// A hostStage is the kernel of this machine and a disk image. Its restart is
// a server that starts again, in new namespaces, with nothing but the disk.
type hostStage struct {
	dir, guest, image string
	payload           *vmtest.Tree
}

// hostUsable says why the demo can't run on this kernel, or nil.
func hostUsable(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("running on this machine's kernel needs root (or -where vm)")
	}
	for _, module := range []string{"nbd", "dm_crypt"} {
		if _, err := os.Stat("/sys/module/" + module); err == nil {
			continue
		}
		if _, err := vmtest.Run(ctx, "", "modprobe", module); err != nil {
			return fmt.Errorf("running on this machine's kernel needs its module %s (or -where vm): %w", module, err)
		}
	}
	for _, tool := range []string{"mkfs.ext4", "e2fsck", "cryptsetup", "dmsetup", "blkid"} {
		if _, err := vmtest.Tool(tool); err != nil {
			return err
		}
	}
	return nil
}

func (s *hostStage) prepare(ctx context.Context, dir string) error {
	say("It runs on this machine's kernel, with a disk image in " + dir + "; nothing else on this machine is touched.")
	s.dir, s.image = dir, filepath.Join(dir, "disk.img")
	hostcryptd, guest, err := vmtest.Programs(ctx, dir)
	if err != nil {
		return err
	}
	// The guest program calls hostcryptd by its name, as a person would.
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return err
	}
	if err := os.Symlink(hostcryptd, filepath.Join(bin, "hostcryptd")); err != nil {
		return err
	}
	if err := os.Setenv("PATH", bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin"); err != nil {
		return err
	}
	s.guest = guest
	if s.payload, err = vmtest.Payload(ctx, filepath.Join(dir, "payload.tar"), payloadSize); err != nil {
		return err
	}
	return vmtest.Sparse(s.image, diskSize)
}

func (s *hostStage) play(ctx context.Context, scenario, canary string, show func(report.Event)) error {
	cmd := exec.CommandContext(ctx, s.guest, "host",
		"-scenario", scenario, "-disk", s.image, "-payload", s.payload.Path, "-state", filepath.Join(s.dir, "state"), "-canary", canary)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	events, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	return errors.Join(report.Read(events, show), cmd.Wait())
}
