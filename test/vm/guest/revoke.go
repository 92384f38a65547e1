package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The times of the scenario: short, so that the whole of it is.
const (
	revokeHeartbeat = 5 * time.Second
	revokeConfirm   = 6 * time.Second
	revokeGrace     = 10 * time.Second
)

// keyStatus is what status says of a volume's key.
type keyStatus struct {
	State      string    `json:"state"`
	Wiped      bool      `json:"wiped"`
	Attempts   int       `json:"attempts"`
	LastGood   time.Time `json:"last_good"`
	NextTry    time.Time `json:"next_try"`
	AccessLost time.Time `json:"access_lost"`
	Stopped    time.Time `json:"stopped"`
	Reason     string    `json:"reason"`
}

func (m *machine) keyStatus() (keyStatus, error) {
	out, err := command("hostcryptd", "status", m.disk, "--json").Output()
	if err != nil {
		return keyStatus{}, err
	}
	var s struct {
		Key keyStatus `json:"key"`
	}
	err = json.Unmarshal(out, &s)
	return s.Key, err
}

// waitKey waits until the key is in a state.
func (m *machine) waitKey(state string, limit time.Duration) (keyStatus, error) {
	var s keyStatus
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		var err error
		if s, err = m.keyStatus(); err != nil {
			return s, err
		}
		if s.State == state {
			return s, nil
		}
	}
	return s, fmt.Errorf("after %v the key is %s, want %s: %s", limit, s.State, state, s.Reason)
}

// A pageWriter writes pages of a device at random places, each stable when it
// has been answered, until one fails.
type pageWriter struct {
	f       *os.File
	pages   []uint32 // what was answered, by page; 0 for nothing
	pending int      // page of the write that failed, which may be there or not
	writes  int
	err     error
	failed  time.Time
	done    chan struct{}
	end     chan struct{} // closed by stop
	slowest time.Duration // write

	mu     sync.Mutex
	recent []time.Duration // how long each write took since take
}

// take returns how long each of the writes took that were answered since the last
// call.
func (w *pageWriter) take() []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.recent
	w.recent = nil
	return list
}

// takeSlowest is the slowest of take.
func (w *pageWriter) takeSlowest() time.Duration {
	return slices.Max(append(w.take(), 0))
}

// waitWrite waits until another write is answered.
func (w *pageWriter) waitWrite() error {
	count := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.recent)
	}
	n := count()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if count() > n {
			return nil
		}
	}
	return errors.New("no write was answered for 30 s")
}

const pageSize = 4096

// alignedPage returns a page as O_DIRECT wants it.
func alignedPage() []byte {
	b := make([]byte, 2*pageSize)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (pageSize - 1)
	return b[skip : skip+pageSize : skip+pageSize]
}

func fillPage(p []byte, page int, value uint32) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint32(p[i:], uint32(page))
		binary.LittleEndian.PutUint32(p[i+4:], value)
	}
}

func startPageWriter(dev string, size int64) (*pageWriter, error) {
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		return nil, err
	}
	w := &pageWriter{f: f, pages: make([]uint32, size/pageSize), pending: -1, done: make(chan struct{}), end: make(chan struct{})}
	go func() {
		defer close(w.done)
		p := alignedPage()
		r := rand.New(rand.NewPCG(1, 2))
		for n := uint32(1); ; n++ {
			select {
			case <-w.end:
				return
			default:
			}
			page := r.IntN(len(w.pages))
			begun := time.Now()
			fillPage(p, page, n)
			if _, w.err = f.WriteAt(p, int64(page)*pageSize); w.err != nil {
				w.pending, w.failed = page, time.Now()
				return
			}
			took := time.Since(begun)
			w.slowest = max(w.slowest, took)
			w.mu.Lock()
			w.recent = append(w.recent, took)
			w.mu.Unlock()
			w.pages[page] = n
			w.writes++
		}
	}()
	return w, nil
}

// stop ends the writing, after a write that is answered.
func (w *pageWriter) stop() {
	close(w.end)
	<-w.done
}

// verify reads back what was answered.
func (w *pageWriter) verify() (checked int, err error) {
	p, want := alignedPage(), alignedPage()
	for page, value := range w.pages {
		if value == 0 || page == w.pending {
			continue
		}
		if _, err := w.f.ReadAt(p, int64(page)*pageSize); err != nil {
			return checked, err
		}
		fillPage(want, page, value)
		if string(p) != string(want) {
			return checked, fmt.Errorf("page %d was answered, and reads as something else now", page)
		}
		checked++
	}
	return checked, nil
}

// tellVault gives the double a command.
func (m *machine) tellVault(what string) error {
	m.say("the vault's administrator: %s the key", what)
	_, err := io.WriteString(m.hangUp.(io.Writer), what+"\n")
	return err
}

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
	if !s.running() {
		return fmt.Errorf("hostcryptd serve ended with exit code %d", s.code)
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
	if w.failed.Sub(key.LastGood) < revokeGrace {
		return fmt.Errorf("the volume stopped %v after the last success, want %v at least", w.failed.Sub(key.LastGood), revokeGrace)
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
	m.figure("keys wiped after the last write was refused", key.Stopped.Sub(w.failed).Seconds(), "s")
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
	if !s.running() {
		return fmt.Errorf("hostcryptd serve ended with exit code %d: %s", s.code, s.log.String())
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
	out, err := command("hostcryptd", "status", m.disk, "--json").Output()
	if err != nil {
		return fmt.Errorf("hostcryptd status: %w", err)
	}
	var volume struct {
		UUID string `json:"uuid"`
	}
	if err := json.Unmarshal(out, &volume); err != nil {
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
	if key, err := m.keyStatus(); err != nil || key.State != "erased" || !key.Wiped {
		return errors.Join(fmt.Errorf("erased, but %+v", key), err)
	}
	if err := errors.Join(w.f.Close(), e.f.Close(), s.detach()); err != nil {
		return err
	}
	if s, err = m.serve("--unseal-timeout", "60s"); err != nil {
		return err
	}
	if s.running() || s.code != exitDevice {
		return fmt.Errorf("an erased volume: hostcryptd serve is running %v, exit code %d, want %d", s.running(), s.code, exitDevice)
	}
	return nil
}
