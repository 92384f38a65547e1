package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/sector"
)

// A serverState is what a server with a kernel device leaves to the next one,
// with what the keeper holds. It has no key.
type serverState struct {
	// Version is that of this struct and of what it means, and of what is held.
	// A server that doesn't know it doesn't take over. It changes when an older
	// version could misunderstand a state: what it doesn't know, it ignores.
	Version int `json:"version"`

	Volume sector.State       `json:"volume"`
	Life   lifecycle.Snapshot `json:"life"`
	Bits   int                `json:"bits"`   // of the largest RSA key in a vault
	Remote bool               `json:"remote"` // there is a key in a vault
	Index  int                `json:"index"`  // of the kernel device

	// Requests is what becomes of requests to a volume without a key, which isn't
	// always what the policy says: requestsWait or requestsRefused, and "" if it has
	// one, or from a version that didn't say.
	Requests string `json:"requests,omitempty"`

	// Connections is how many sockets that has; 0 from a version that didn't say.
	Connections int `json:"connections,omitempty"`

	// TabLine is the line of hostcrypttab by which a server has served last, "" if
	// there is none. It may have changed since.
	TabLine string `json:"tab_line,omitempty"`

	// What comes from files that may be on this very volume: there a server can't read
	// them before the volume has its kernel device back.
	Phase   float64             `json:"phase,omitempty"`   // see phaseOf
	Signer  string              `json:"signer,omitempty"`  // the file of --signer
	Trusted []sector.TrustedKey `json:"trusted,omitempty"` // what it held
}

// maxTrusted bounds the keys in a state, which has to fit in a packet: one of RSA-4096
// takes 1.3 kB.
const maxTrusted = 16

// trust makes the keys of a file part of the state.
func (s *serverState) trust(file string, keys []sector.TrustedKey) {
	s.Signer, s.Trusted = "", nil
	if file != "" && len(keys) <= maxTrusted {
		s.Signer, s.Trusted = file, keys
	}
}

// trusted returns the keys of a file, as far as the state has them. No key is not nil,
// which would be to ask for no signature.
func (s *serverState) trusted(file string) []sector.TrustedKey {
	switch {
	case file == "":
		return nil
	case file == s.Signer && len(s.Trusted) > 0:
		return s.Trusted
	}
	return []sector.TrustedKey{}
}

const serverStateVersion = 1

const (
	requestsWait    = "wait"
	requestsRefused = "refused"
)

// parseState returns the state to go on with, or nil.
func parseState(b []byte) (*serverState, error) {
	if len(b) == 0 || string(b) == "null" {
		return nil, nil
	}
	s := &serverState{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("state of the server before: %w", err)
	}
	if s.Version != serverStateVersion {
		return nil, fmt.Errorf("the server before has left a state of version %d; this program, %s, knows version %d: stop the volume with the program that serves it, and start it again", s.Version, version(), serverStateVersion)
	}
	return s, nil
}

// pushState tells the keeper what the next server has to know. It does so from
// the moment on that there is a kernel device, and at each change of the key's
// life.
func (d *daemon) pushState() {
	if d.link == nil {
		return
	}
	d.pushing.Lock()
	defer d.pushing.Unlock()
	d.mu.Lock()
	s, known := d.left, d.index >= 0 && d.volume != nil
	if known {
		s.Version, s.Volume, s.Index = serverStateVersion, d.volume.State(), d.index
		switch s.Requests = ""; {
		case d.volume.Waiting():
			s.Requests = requestsWait
		case d.volume.Suspended():
			s.Requests = requestsRefused
		}
	}
	v := d.volume
	d.mu.Unlock()
	if !known {
		return
	}
	// Each is without use to a next server that has another of the other.
	var herr error
	if f := v.KeptHeader(); f != d.heldHeader && f != nil {
		if herr = d.link.send(keeperMessage{Hold: heldHeader}, f); herr == nil {
			d.heldHeader = f
		}
	}
	b, err := json.Marshal(s)
	if err == nil {
		err = errors.Join(herr, d.link.send(keeperMessage{State: b}, nil))
	}
	if err != nil {
		d.log.Warn("the keeper was not told of a change", zap.Error(err))
	}
}

// adopt makes options what they are for the volume in use, whatever they are by now: a
// server that took --read-only for what it goes on with would open the device so, and
// fail the writes of a file system that is mounted.
func (d *daemon) adopt(before *serverState) {
	for _, o := range []struct {
		flag  string
		value *bool
		is    bool
	}{
		{"--read-only", &d.opts.readOnly, before.Volume.ReadOnly},
		{"--discard", &d.opts.discard, before.Volume.Discard},
		{"--random-key", &d.opts.randomKey, before.Volume.Token == sector.RandomToken},
	} {
		if *o.value != o.is {
			d.log.Warn("the volume is served as before until it is stopped and served anew", zap.String("flag", o.flag), zap.Bool("is", o.is), zap.Bool("wanted", *o.value))
			*o.value = o.is
		}
	}
}

// nameOf returns a name of the device that is held: name, if that isn't another's by
// now. A link of udev goes to a copy of the disk when there is one, and a line of
// hostcrypttab can be changed, and what goes by the name would change another header.
// The name of a device in use may also have gone.
func nameOf(held *os.File, name string) string {
	is, err := held.Stat()
	if err != nil {
		return name
	}
	same := func(name string) bool {
		fi, err := os.Stat(name)
		if err != nil || os.SameFile(is, fi) {
			return err == nil
		}
		a, b := is.Sys().(*syscall.Stat_t), fi.Sys().(*syscall.Stat_t)
		return is.Mode()&os.ModeDevice != 0 && is.Mode().Type() == fi.Mode().Type() && a.Rdev == b.Rdev
	}
	if opened, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", held.Fd())); err == nil && !same(name) && same(opened) {
		return opened
	}
	return name
}

// takeKept takes over what the server before has kept of the header.
func (d *daemon) takeKept() {
	f := d.keptBefore
	if f == nil {
		return
	}
	if err := d.volume.TakeKept(f); err != nil {
		d.log.Warn("what the server before has kept of the header is of no use; the header on the disk is kept from the next look at it", zap.Error(err))
		return
	}
	d.pushing.Lock()
	if d.volume.KeptHeader() == f { // the keeper has it
		d.heldHeader = f
	}
	d.pushing.Unlock()
}

// readFilesAgain reads what a server that goes on couldn't, or may have changed.
func (d *daemon) readFilesAgain() {
	d.takeKept()
	if d.opts.tls != nil {
		if err := d.opts.tls.wait(); err != nil {
			d.log.Error("clients of --tcp are refused before this is mended and the server reloaded", zap.Error(err))
		}
	}
	keys := d.opts.keys // a copy
	if keys.signer == "" {
		return
	}
	if err := keys.readSigner(); err != nil {
		d.log.Error("the volume goes on, and will not be unsealed again before this is mended", zap.Error(err))
		keys.trusted = []sector.TrustedKey{}
	}
	d.mu.Lock()
	d.opts.keys.trusted = keys.trusted
	d.left.trust(keys.signer, keys.trusted)
	d.mu.Unlock()
	d.pushState()
}

// openDevice opens the backing device, behind the fence. With a keeper, that holds it
// exclusively, and this process opens it once more.
func (d *daemon) openDevice(ctx context.Context) (*sector.Device, error) {
	o := sector.DeviceOptions{ReadOnly: d.opts.readOnly, Direct: d.opts.direct}
	if d.link == nil {
		dev, err := sector.OpenDevice(d.opts.device, o)
		if err != nil {
			return nil, err
		}
		return d.fence(ctx, dev)
	}
	held := d.link.take(heldDevice)
	if held == nil {
		dev, err := sector.OpenDevice(d.opts.device, o)
		if err != nil {
			return nil, err
		}
		if err := d.link.send(keeperMessage{Hold: heldDevice}, dev.File()); err != nil {
			return nil, errors.Join(err, dev.Close())
		}
		held = dev.File()
	}
	defer held.Close()
	if name := nameOf(held, d.opts.device); name != d.opts.device {
		d.log.Warn("the volume stays on the device that it is on, whose name is another now", zap.String("device", name), zap.String("wanted", d.opts.device))
		d.mu.Lock()
		d.opts.device = name
		d.mu.Unlock()
	}
	dev, err := sector.Reopen(held, d.opts.device, o)
	if err != nil {
		return nil, err
	}
	return d.fence(ctx, dev)
}

// fence returns the device when no I/O of a server that has served it before is under
// way any more.
func (d *daemon) fence(ctx context.Context, dev *sector.Device) (*sector.Device, error) {
	begun := time.Now()
	waited, err := dev.Fence(ctx, func() {
		d.log.Error("waiting for the I/O of the server before to end; until then nothing may be served, or old data could overwrite new", zap.String("device", d.opts.device))
	})
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	if waited {
		d.log.Warn("waited for the I/O of the server before", zap.Duration("took", time.Since(begun)))
	}
	return dev, nil
}

// openHandover makes the memory in which the next server finds the key, or opens
// what the server before has left.
func (d *daemon) openHandover() (err error) {
	if d.link == nil {
		return nil
	}
	if f := d.link.take(heldKey); f != nil {
		d.handover, err = sector.OpenHandover(f)
		return err
	}
	if d.goesOn {
		d.keyLost = true
		d.log.Error("the keeper has lost the key of the volume; I/O waits until it is unsealed again", zap.Bool("random_key", d.opts.randomKey))
	}
	if d.handover, err = sector.NewHandover(); err != nil {
		return err
	}
	return d.link.send(keeperMessage{Hold: heldKey}, d.handover.File())
}

// goOn makes the volume of the server before.
func (d *daemon) goOn(s *serverState) error {
	mode := sector.SuspendRefuse
	wait := s.Requests == requestsWait || s.Requests == "" && (s.Life.Policy == lifecycle.Freeze || d.keyLost)
	if wait && !s.Life.Locked && s.Life.State != lifecycle.Erased {
		mode = sector.SuspendWait
	}
	v, err := sector.Continue(d.device, s.Volume, d.handover, mode)
	if err != nil {
		return fmt.Errorf("%s: %w", d.opts.device, err)
	}
	if s.Life.State == lifecycle.Revoked {
		v.Restrict(true)
	}
	if f := d.link.take(heldHeader); s.Life.State == lifecycle.Erased {
		v.ForgetHeader()
		if f != nil {
			_ = f.Truncate(0)
			f.Close()
		}
	} else {
		d.keptBefore = f
	}
	d.mu.Lock()
	d.volume = v
	d.mu.Unlock()
	return nil
}

// heldListener returns a listener that the server before has opened, or nil.
func (k *keeperLink) heldListener(name string) (net.Listener, error) {
	f := k.take(name)
	if f == nil {
		return nil, nil
	}
	l, err := net.FileListener(f)
	f.Close()
	if u, ok := l.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(true)
	}
	return l, err
}

// holdListener has the keeper hold a listener.
func (k *keeperLink) holdListener(name string, l net.Listener) error {
	if k == nil {
		return nil
	}
	f, err := l.(interface{ File() (*os.File, error) }).File()
	if err != nil {
		return err
	}
	defer f.Close()
	return k.send(keeperMessage{Hold: name}, f)
}

// inheritedListeners are those that the service manager gave to the keeper.
func (k *keeperLink) inheritedListeners() (list []net.Listener, err error) {
	for name := range k.held {
		if !strings.HasPrefix(name, heldInherited) {
			continue
		}
		l, err := k.heldListener(name)
		if err != nil {
			return nil, err
		}
		if u, ok := l.(*net.UnixListener); ok {
			u.SetUnlinkOnClose(false)
		}
		list = append(list, l)
	}
	return list, nil
}

// leaveVolume leaves the volume to the next server: the key's life, the clients, which
// have to connect again, and last the kernel's sockets, so that its I/O waits
// for no more than is on the device. What the next one needs is with the keeper
// when it returns.
func (d *daemon) leaveVolume(stopClients, stopKernel context.CancelCauseFunc, clients, kernel *sync.WaitGroup) error {
	d.resizing <- struct{}{} // for good; the kernel is not waited for any more
	d.volume.StopRepairs()   // nothing is written once the device is left
	d.leaving = true
	d.log.Info("leaving the volume to another server")
	d.stopLife()
	d.mu.Lock()
	d.left.Life = d.life.Snapshot()
	d.mu.Unlock()
	begun := time.Now()
	// Else requests may wait for a key. The kernel sends them again when its sockets
	// are dead.
	if d.parked = d.volume.Suspended(); !d.parked {
		// The log of key use may be on this volume. A record that is being written when
		// the kernel's sockets are left waits for the next server, and at a restart that
		// is started when this process has ended, which it can't as long as it waits.
		if q := d.opts.keys.queue; q != nil && !q.CloseWithin(auditLimit) {
			d.log.Warn("the log of key use can't be written; if it is on this volume, a restart doesn't end", zap.Duration("waited", auditLimit))
		}
		stopClients(nbd.ErrLeave)
		clients.Wait()
		begun = time.Now()
		stopKernel(nbd.ErrLeave)
		kernel.Wait()
	}
	drained := time.Since(begun)
	d.pushState()
	var errs []error
	if d.parked {
		errs = append(errs, d.hangUp())
	}
	for i, c := range d.leftSockets {
		f, err := c.File()
		if err == nil {
			err = d.link.send(keeperMessage{Hold: fmt.Sprintf("%s%d", heldKernel, i)}, f)
			f.Close()
		}
		errs = append(errs, err, c.Close())
	}
	// The fence opens with it.
	errs = append(errs, d.device.Close(), d.link.send(keeperMessage{Left: true}, nil))
	d.log.Info("the volume is left", zap.Int("kernel_sockets", len(d.leftSockets)), zap.Duration("drained", drained))
	return errors.Join(errs...)
}

// hangUp ends the connections with the kernel. Their end with this process may not come:
// a thread that writes the log of key use to this very volume can't be killed as long as
// the volume waits.
func (d *daemon) hangUp() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	var errs []error
	for _, s := range d.kernelSockets {
		if err := s.Shutdown(); !errors.Is(err, unix.ENOTCONN) { // the kernel was faster
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// auditLimit is how long a server that leaves waits for the log of key use, which may
// be on a disk that hangs. It is part of leaveTimeout. Tests change it.
var auditLimit = 5 * time.Second
