package main

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// The times of the scenario: short, so that the whole of it is.
const (
	revokeHeartbeat = 5 * time.Second
	revokeConfirm   = 6 * time.Second
	revokeGrace     = 10 * time.Second
)

// revoke disables the vault's key under a volume that fio reads and writes, and
// beside it a writer that knows what was answered: the volume stops in time and
// its keys are wiped, nothing that was answered is lost, and it goes on when the
// key is back.
func revoke(m *machine) error {
	m.brokenDisk = true // the kernel reports the errors that it's given
	if err := m.format(); err != nil {
		return err
	}
	s, err := m.serve("--unseal-timeout", "60s", "--heartbeat", revokeHeartbeat.String(), "--confirm", revokeConfirm.String(), "--grace", revokeGrace.String())
	if err != nil {
		return err
	}
	size, err := deviceSize(s.dev)
	if err != nil {
		return err
	}
	w, err := startPageWriter(s.dev, min(size, 32<<20))
	if err != nil {
		return err
	}
	defer w.f.Close()
	onTheRest := []string{"--name=load", "--filename=" + s.dev, "--offset=32M", "--size=64M", "--rw=randrw", "--bs=4k",
		"--ioengine=libaio", "--iodepth=8", "--direct=1", "--time_based"}
	fio, err := m.startFIO(append(onTheRest, "--runtime=600")...)
	if err != nil {
		return err
	}
	if _, err := m.waitKey("unlocked", 30*time.Second); err != nil {
		return err
	}
	time.Sleep(3 * time.Second)
	select {
	case <-w.done:
		return fmt.Errorf("writing failed while all was well: %w", w.err)
	case <-fio.ended:
		return fmt.Errorf("fio ended while all was well: %w: %s", fio.err, fio.out.String())
	default:
	}

	begun := time.Now()
	if err := m.tellVault("disable"); err != nil {
		return err
	}
	// Three looks and one more, each some seconds of an emulated machine.
	limit := revokeHeartbeat*6/5 + 2*revokeConfirm + revokeGrace + 30*time.Second
	key, err := m.waitKey("revoked", limit)
	if err != nil {
		return err
	}
	if !key.Wiped || key.AccessLost.IsZero() || key.Stopped.IsZero() {
		return fmt.Errorf("revoked, but %+v", key)
	}
	select {
	case <-w.done:
	case <-time.After(10 * time.Second):
		return errors.New("writes go on after the volume was revoked")
	}
	if !errors.Is(w.err, unix.EIO) && !errors.Is(w.err, unix.ESHUTDOWN) {
		return fmt.Errorf("the write after the revocation failed with %w, want EIO", w.err)
	}
	if w.failedAt.Sub(key.LastGood) < revokeGrace {
		return fmt.Errorf("the volume stopped %v after the last success, want %v at least", w.failedAt.Sub(key.LastGood), revokeGrace)
	}
	if err := fio.wait(); err != nil {
		return err
	}
	job := fio.result.Jobs[0]
	if n := unix.Errno(job.Error); n != unix.EIO && n != unix.ESHUTDOWN || job.Read.TotalIOs == 0 || job.Write.TotalIOs == 0 {
		return fmt.Errorf("fio ended with %v after %d reads and %d writes, want EIO", n, job.Read.TotalIOs, job.Write.TotalIOs)
	}
	// What the volume promises: a look, its confirmation, and the grace period,
	// which counts from the last success. Each look takes a moment here.
	bound := revokeHeartbeat*6/5 + revokeConfirm*6/5 + revokeGrace + emulated
	if took := key.Stopped.Sub(begun); took > bound {
		return fmt.Errorf("keys were wiped %v after the key was disabled, want %v at most", took, bound)
	}
	m.figure("fio: requests until it was refused", float64(job.Read.TotalIOs+job.Write.TotalIOs), "")
	m.figure("key disabled until access was known to be lost", key.AccessLost.Sub(begun).Seconds(), "s")
	m.figure("key disabled until keys wiped", key.Stopped.Sub(begun).Seconds(), "s")
	m.figure("keys wiped after the last write was refused", key.Stopped.Sub(w.failedAt).Seconds(), "s")
	m.figure("writes answered", float64(w.writes), "")
	if w.writes == 0 {
		return errors.New("nothing was written")
	}

	begun = time.Now()
	if err := m.tellVault("enable"); err != nil {
		return err
	}
	if _, err := m.run("hostcryptd", "unlock", m.disk); err != nil {
		return err
	}
	if _, err := m.waitKey("unlocked", 60*time.Second); err != nil {
		return err
	}
	m.figure("key enabled until unlocked", time.Since(begun).Seconds(), "s")
	checked, err := w.verify()
	if err != nil {
		return err
	}
	m.figure("pages verified", float64(checked), "")
	if fio, err = m.startFIO(append(onTheRest, "--runtime=3", "--verify=crc32c", "--verify_fatal=1")...); err != nil {
		return err
	}
	if err := fio.wait(); err != nil {
		return err
	}
	if job := fio.result.Jobs[0]; fio.err != nil || job.Error != 0 || job.Write.TotalIOs == 0 {
		return fmt.Errorf("fio after the key is back: %w, error %d, %d writes", fio.err, job.Error, job.Write.TotalIOs)
	}
	w.f.Close()
	if _, err := m.run("hostcryptd", "audit", "verify"); err != nil {
		return err
	}
	if err := s.detach(); err != nil {
		return err
	}
	return m.freezeAndErase()
}

// freezeAndErase revokes the key of a volume whose requests wait for it then: none is
// answered and none fails, and all go on when the key is back. Then the volume is
// erased while it is written to.
func (m *machine) freezeAndErase() error {
	s, err := m.serve("--unseal-timeout", "60s", "--on-revocation", "freeze", "--heartbeat", "2s", "--confirm", "2s", "--grace", "4s")
	if err != nil {
		return err
	}
	w, err := startPageWriter(s.dev, 8<<20)
	if err != nil {
		return err
	}
	defer w.f.Close()
	// It ends by itself, whenever the volume freezes: each write is done and verified.
	const writes = 96
	fio, err := m.startFIO("--name=frozen", "--filename="+s.dev, "--offset=32M", fmt.Sprintf("--size=%d", writes*pageSize), "--rw=randwrite",
		"--bs=4k", "--ioengine=libaio", "--iodepth=8", "--direct=1", "--rate_iops=10", "--verify=crc32c", "--verify_fatal=1")
	if err != nil {
		return err
	}
	if err := w.waitWrite(); err != nil {
		return err
	}
	if err := m.tellVault("disable"); err != nil {
		return err
	}
	key, err := m.waitKey("revoked", time.Minute)
	if err != nil {
		return err
	}
	if !key.Wiped {
		return fmt.Errorf("frozen, but %+v", key)
	}
	time.Sleep(500 * time.Millisecond) // what was answered before is with the writer
	w.take()
	begun := time.Now()
	time.Sleep(2 * time.Second)
	if n := len(w.take()); n > 0 {
		return fmt.Errorf("%d writes were answered without a key", n)
	}
	if err := m.tellVault("enable"); err != nil {
		return err
	}
	if _, err := m.run("hostcryptd", "unlock", m.disk); err != nil {
		return err
	}
	if err := w.waitWrite(); err != nil {
		return errors.Join(err, w.err)
	}
	m.figure("frozen", time.Since(begun).Seconds(), "s")
	if err := fio.wait(); err != nil {
		return err
	}
	if job := fio.result.Jobs[0]; fio.err != nil || job.Error != 0 || job.Write.TotalIOs != writes || job.Read.TotalIOs != writes {
		return fmt.Errorf("fio over the freeze: %w, error %d, %d of %d writes, %d verified", fio.err, job.Error, job.Write.TotalIOs, writes, job.Read.TotalIOs)
	}
	w.stop()
	if w.err != nil {
		return fmt.Errorf("a write failed while the volume was frozen: %w", w.err)
	}
	if _, err := w.verify(); err != nil {
		return err
	}

	e, err := startPageWriter(s.dev, 8<<20)
	if err != nil {
		return err
	}
	defer e.f.Close()
	if err := e.waitWrite(); err != nil {
		return err
	}
	volume, err := m.status()
	if err != nil {
		return err
	}
	if _, err := m.run("hostcryptd", "erase", m.disk, "--in-use", "--yes-erase", volume.UUID); err != nil {
		return err
	}
	select {
	case <-e.done:
	case <-time.After(10 * time.Second):
		return errors.New("writes go on after the volume was erased")
	}
	if !errors.Is(e.err, unix.EIO) && !errors.Is(e.err, unix.ESHUTDOWN) {
		return fmt.Errorf("the write after the volume was erased failed with %w, want EIO", e.err)
	}
	if volume, err = m.status(); err != nil || volume.Key.State != "erased" || !volume.Key.Wiped {
		return errors.Join(fmt.Errorf("erased, but %+v", volume.Key), err)
	}
	if err := errors.Join(w.f.Close(), e.f.Close(), s.detach()); err != nil {
		return err
	}
	if s, err = m.serveRefused("--unseal-timeout", "60s"); err != nil {
		return fmt.Errorf("an erased volume: %w", err)
	}
	if s.code != exitDevice {
		return fmt.Errorf("an erased volume: hostcryptd serve ended with exit code %d, want %d", s.code, exitDevice)
	}
	return nil
}
