package vmtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
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
	proxy  *flushProxy
}

// StartVolatileDisk serves a raw image on a Unix socket. onFlush, if not nil,
// is asked what to do with each flush.
func StartVolatileDisk(ctx context.Context, image, socket string, onFlush func(n int) FlushAction) (*VolatileDisk, error) {
	nbdkit, err := Tool("nbdkit")
	if err != nil {
		return nil, err
	}
	d := &VolatileDisk{socket: socket}
	inner := socket
	if onFlush != nil {
		inner += ".nbdkit"
	}
	d.cmd = exec.CommandContext(ctx, nbdkit, "-f", "-U", inner, "--filter=cache", "file", image, "cache=writeback")
	d.cmd.Stderr = &d.stderr
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	d.cmd.WaitDelay = 10 * time.Second
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("vmtest: starting nbdkit: %w", err)
	}
	if !waitFor(inner) {
		return nil, errors.Join(fmt.Errorf("vmtest: nbdkit made no socket %s in 10 s", inner), d.Cut())
	}
	if onFlush == nil {
		return d, nil
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("vmtest: %w", err), d.Cut())
	}
	d.proxy = &flushProxy{l: l, inner: inner, onFlush: onFlush}
	go d.proxy.serve()
	return d, nil
}

func waitFor(name string) bool {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(name); err == nil {
			return true
		}
	}
	return false
}

// Cut ends the disk at once: what was written and not flushed is gone. Cut
// the disk before its guest, or the guest's last writes may still be flushed.
func (d *VolatileDisk) Cut() error {
	if d.proxy != nil {
		d.proxy.expectEnd()
	}
	if err := d.cmd.Process.Kill(); err != nil {
		d.cmd.Wait()
		return fmt.Errorf("vmtest: nbdkit ended by itself: %s", tail(d.stderr.String(), 5))
	}
	err := d.cmd.Wait()
	status, ok := d.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return fmt.Errorf("vmtest: nbdkit ended by itself: %w: %s", err, tail(d.stderr.String(), 5))
	}
	inner := d.socket
	if d.proxy != nil {
		inner = d.proxy.inner
		if err := d.proxy.close(); err != nil {
			return err
		}
	}
	if err := os.Remove(inner); err != nil {
		return fmt.Errorf("vmtest: removing the socket of nbdkit: %w", err)
	}
	return nil
}
