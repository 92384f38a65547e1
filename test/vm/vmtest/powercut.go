package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"
)

// A VolatileDisk is a disk with a write cache that a power cut empties: an
// nbdkit whose cache filter holds what was written until a flush comes. To
// kill QEMU alone would prove nothing about flushes, because what QEMU has
// written is in this host's page cache, which outlives it.
//
// It belongs to one goroutine, which must call [VolatileDisk.Cut].
type VolatileDisk struct {
	cmd    *exec.Cmd
	stderr bytes.Buffer
	socket string
}

// StartVolatileDisk serves a raw image on a Unix socket. With ignoreFlush a
// flush is answered and not done, which is how a disk that lies behaves: a
// control for tests that must notice.
func StartVolatileDisk(ctx context.Context, image, socket string, ignoreFlush bool) (*VolatileDisk, error) {
	nbdkit, err := Tool("nbdkit")
	if err != nil {
		return nil, err
	}
	mode := "cache=writeback"
	if ignoreFlush {
		mode = "cache=unsafe"
	}
	d := &VolatileDisk{socket: socket}
	d.cmd = exec.CommandContext(ctx, nbdkit, "-f", "-U", socket, "--filter=cache", "file", image, mode)
	d.cmd.Stderr = &d.stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	d.cmd.WaitDelay = 10 * time.Second
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("vmtest: starting nbdkit: %w", err)
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			return d, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("vmtest: nbdkit made no socket %s in 10 s", socket), d.Cut())
}

// Cut ends the disk at once: what was written and not flushed is gone. Cut
// the disk before its guest, or the guest's last writes may still be flushed.
func (d *VolatileDisk) Cut() error {
	if err := d.cmd.Process.Kill(); err != nil {
		d.cmd.Wait()
		return fmt.Errorf("vmtest: nbdkit ended by itself: %s", tail(d.stderr.String(), 5))
	}
	err := d.cmd.Wait()
	status, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return fmt.Errorf("vmtest: nbdkit ended by itself: %w: %s", err, tail(d.stderr.String(), 5))
	}
	if err := os.Remove(d.socket); err != nil {
		return fmt.Errorf("vmtest: removing the socket of nbdkit: %w", err)
	}
	return nil
}
