package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/sector"
)

// nextMessage returns what a server says next at the other end of its link.
func nextMessage(t *testing.T, keeper *net.UnixConn) (m keeperMessage) {
	t.Helper()
	f, err := receivePacket(keeper, &m)
	if err != nil {
		t.Fatal(err)
	}
	if f != nil {
		f.Close()
	}
	return m
}

// leavingServer returns a daemon that serves a random key's volume, and the other end
// of its link to a keeper.
func leavingServer(t *testing.T) (d *daemon, keeper *net.UnixConn) {
	t.Helper()
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	link, keeper := unixPair(t, unix.SOCK_SEQPACKET)
	o := serveOptions{device: image, attach: "auto", randomKey: true, sectorSize: 4096, connections: 1, control: filepath.Join(dir, "control")}
	o.keys.auditLog = "none"
	o.life.add(&cobra.Command{}) // what is the default
	d = &daemon{opts: o, log: zap.NewNop(), index: 7, finished: make(chan struct{}), resizing: make(chan struct{}, 1), detach: make(chan *os.File, 1),
		link: &keeperLink{conn: link, held: map[string]*os.File{}}}
	var err error
	if d.device, err = d.openDevice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(d.openHandover(), d.openRandom()); err != nil {
		t.Fatal(err)
	}
	life, err := d.opts.life.config(0, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	if d.stopLife, err = d.startLife(t.Context(), life, nil); err != nil {
		t.Fatal(err)
	}
	return d, keeper
}

func unixPair(t *testing.T, kind int) (a, b *net.UnixConn) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range pair {
		if ends[i], err = packetConn(os.NewFile(uintptr(fd), "end")); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

// TestLeaveFrozen: a server that leaves while requests wait for the key answers none
// of them. The kernel sends them again when the socket is dead, so that isn't handed
// over but ended, also if this process can't end: what is left of it may write to this
// very volume.
func TestLeaveFrozen(t *testing.T) {
	d, keeper := leavingServer(t)
	var err error
	if d.server, err = nbd.New(d.serverConfig(), nbd.Export{Name: d.exportName(), Device: d.volume, BlockSize: 4096}); err != nil {
		t.Fatal(err)
	}
	kernel, socket := unixPair(t, unix.SOCK_STREAM)
	var serving sync.WaitGroup
	d.serveKernel(t.Context(), &kernelDevice{serving: &serving, ended: make(chan error, 1)}, socket)
	if err := d.volume.Suspend(sector.SuspendWait); err != nil {
		t.Fatal(err)
	}
	// A write of 4096 bytes, NBD_CMD_WRITE of the protocol.
	request := binary.BigEndian.AppendUint32(nil, 0x25609513)
	request = binary.BigEndian.AppendUint32(request, 1)
	request = binary.BigEndian.AppendUint64(request, 42)
	request = binary.BigEndian.AppendUint64(request, 0)
	request = binary.BigEndian.AppendUint32(request, 4096)
	if _, err := kernel.Write(append(request, make([]byte, 4096)...)); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); d.server.Stats().InFlight == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the request is not under way")
		}
	}

	left := make(chan error, 1)
	stop := func(cause error) {
		if cause != nbd.ErrLeave {
			t.Errorf("clients or kernel: stopped for %v, which is an I/O error for them", cause)
		}
	}
	go func() {
		err := d.leaveVolume(stop, stop, &sync.WaitGroup{}, &serving)
		if !d.abrupt() { // as run does
			err = errors.Join(err, d.volume.Leave())
		}
		left <- err
	}()
	for {
		if err := keeper.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		m := nextMessage(t, keeper)
		if strings.HasPrefix(m.Hold, heldKernel) {
			t.Error("it gave the socket away, on which a request waits")
		}
		if m.Left {
			break
		}
	}
	if err := <-left; err != nil {
		t.Error(err)
	}
	if err := kernel.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 16)
	if n, err := kernel.Read(reply); n != 0 || !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the kernel got %x, %v", reply[:n], err)
	}
	_ = d.volume.Close() // lets the request go
	kernel.Close()
	serving.Wait()
}

// A kernelDouble is the driver of a kernel device.
type kernelDouble struct {
	kernelDriver
	errs   []error            // of the first calls of Reconfigure
	socket chan *net.UnixConn // that Reconfigure was given
}

func (k *kernelDouble) Reconfigure(_ int, _ string, socks ...*os.File) error {
	if len(k.errs) > 0 {
		err := k.errs[0]
		k.errs = k.errs[1:]
		return err
	}
	c, err := net.FileConn(socks[0])
	if err == nil {
		k.socket <- c.(*net.UnixConn)
	}
	return err
}

// TestConnectionLostWhileStopping: a server that waits until nobody uses the kernel
// device goes on to replace connections, or it could never be unmounted.
func TestConnectionLostWhileStopping(t *testing.T) {
	defer func(before time.Duration) { settleGiven = before }(settleGiven)
	settleGiven = 10 * time.Millisecond
	d, _ := leavingServer(t)
	var err error
	if d.server, err = nbd.New(d.serverConfig(), nbd.Export{Name: d.exportName(), Device: d.volume, BlockSize: 4096}); err != nil {
		t.Fatal(err)
	}
	kernel, socket := unixPair(t, unix.SOCK_STREAM)
	driver := &kernelDouble{errs: []error{unix.ENOMEM, unix.ENOMEM}, socket: make(chan *net.UnixConn, 1)}
	var serving sync.WaitGroup
	// Of a device that isn't there, nothing tells that it is unused.
	k := &kernelDevice{conn: driver, index: 1 << 19, serving: &serving, ended: make(chan error, 1)}
	d.serveKernel(t.Context(), k, socket)
	failed := make(chan error, 1)
	d.keepConnected(t.Context(), k, failed)
	stopped := make(chan bool, 1)
	go func() {
		_, attached := d.waitUnused(k, failed)
		stopped <- attached
	}()
	kernel.Close()
	select {
	case kernel = <-driver.socket:
	case <-time.After(time.Minute):
		t.Fatal("the kernel got no other connection")
	}
	defer kernel.Close()
	if err := kernel.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	// A flush, NBD_CMD_FLUSH of the protocol, then NBD_CMD_DISC.
	request := binary.BigEndian.AppendUint32(nil, 0x25609513)
	request = append(binary.BigEndian.AppendUint32(request, 3), make([]byte, 20)...)
	if _, err := kernel.Write(request); err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 16)
	if _, err := io.ReadFull(kernel, reply); err != nil || binary.BigEndian.Uint32(reply[4:]) != 0 {
		t.Fatalf("the reply is %x, %v", reply, err)
	}
	select {
	case <-stopped:
		t.Fatal("it doesn't wait any more")
	default:
	}
	request[7] = 2
	if _, err := kernel.Write(request); err != nil {
		t.Fatal(err)
	}
	select {
	case attached := <-stopped:
		if attached {
			t.Error("it has claimed a device that isn't there")
		}
	case <-time.After(time.Minute):
		t.Error("it waits for a device that was detached")
	}
	k.stopKeeping()
	serving.Wait()
	_ = d.server.Close()
	_ = d.volume.Close()
}

// TestLateDetach: who asks a server to detach when it leaves the volume to another is
// told so, instead of that it is done.
func TestLateDetach(t *testing.T) {
	d, _ := leavingServer(t)
	stop, err := d.serveControl()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	d.setState(stateServing, "")
	answer := make(chan error, 1)
	go func() { answer <- newControlClient(d.opts.control).do(t.Context(), "POST", "/v1/detach", nil) }()
	for deadline := time.Now().Add(time.Minute); len(d.detach) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the request has not come")
		}
	}
	var none sync.WaitGroup
	stopNone := func(error) {}
	if err := d.leaveVolume(stopNone, stopNone, &none, &none); err != nil {
		t.Fatal(err)
	}
	close(d.finished)
	if err := <-answer; err == nil || exitCode(err) != codeBusy || !strings.Contains(err.Error(), "another server goes on") {
		t.Errorf("detach = %v", err)
	}
	_ = d.volume.Close()
}

// TestLateResize: a volume that was left to another server doesn't grow any more, and
// who asks for that hears of it, or goes away.
func TestLateResize(t *testing.T) {
	d, _ := leavingServer(t)
	var none sync.WaitGroup
	stopNone := func(error) {}
	if err := d.leaveVolume(stopNone, stopNone, &none, &none); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.resize(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("resize = %v, want that it has waited", err)
	}
	close(d.finished)
	if _, err := d.resize(t.Context()); err == nil || exitCode(err) != codeBusy {
		t.Errorf("resize = %v, want exit code %d", err, codeBusy)
	}
	_ = d.volume.Close()
}

// TestFreezeWhileResizing: a freeze waits for the kernel to have changed the size of its
// device, as long as that is no reason to keep the key for long; and the kernel isn't asked
// to when requests wait.
func TestFreezeWhileResizing(t *testing.T) {
	defer func(before time.Duration) { sizingLimit = before }(sizingLimit)
	d, _ := leavingServer(t)
	d.stopLife()
	h := &keyHost{d: d}
	d.sizing.Lock() // as resizeKernel does
	halted := make(chan bool)
	go func() {
		h.Halt(lifecycle.Freeze)
		close(halted)
	}()
	time.Sleep(50 * time.Millisecond)
	if d.volume.Suspended() {
		t.Error("requests wait for a key while the kernel waits for them")
	}
	d.sizing.Unlock()
	<-halted
	if !d.volume.Waiting() {
		t.Error("the volume isn't frozen")
	}
	if err := d.resizeKernel(t.Context(), 1<<19, 2<<20); err == nil || exitCode(err) != codeBusy {
		t.Errorf("resizeKernel of a frozen volume: %v, want exit code %d", err, codeBusy)
	}
	_ = d.volume.Close()

	d, _ = leavingServer(t)
	d.stopLife()
	sizingLimit = 0
	d.sizing.Lock()
	(&keyHost{d: d}).Halt(lifecycle.Freeze)
	if !d.volume.Waiting() {
		t.Error("the volume isn't frozen as long as the kernel hangs")
	}
	_ = d.volume.Close()
}

// TestFlushFailedElsewhere: if a flush fails that a command does which changes the header,
// the volume has failed. The disk's page cache is written to memory that is sealed, which
// is an I/O error.
func TestFlushFailedElsewhere(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Fatal("this test makes a loop device, which takes root")
	}
	disk, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(disk)
	if err := unix.Ftruncate(disk, 1<<20); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(tool("losetup"), "--show", "-f", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), disk)).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	name := strings.TrimSpace(string(out))
	defer exec.Command(tool("losetup"), "-d", name).Run()

	d, _ := leavingServer(t)
	stop, err := d.serveControl()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	t.Setenv(controlEnv, d.opts.control)
	if err := withHeader(name, false, func(*sector.Device) error { return unix.EIO }); !errors.Is(err, unix.EIO) || d.volume.Failed() {
		t.Errorf("a write failed with %v, and the volume has failed: %v", err, d.volume.Failed())
	}
	if err := withHeader(name, false, (*sector.Device).Sync); err != nil || d.volume.Failed() {
		t.Errorf("a flush ended with %v, and the volume has failed: %v", err, d.volume.Failed())
	}
	err = withHeader(name, false, func(dev *sector.Device) error {
		cached, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer cached.Close()
		if _, err := cached.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(disk), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
			t.Fatal(err)
		}
		return dev.Sync()
	})
	if !errors.Is(err, unix.EIO) || !d.volume.Failed() {
		t.Errorf("a flush failed with %v, want %v, and the volume has failed: %v", err, unix.EIO, d.volume.Failed())
	}
	if err := d.volume.Sync(); !errors.Is(err, sector.ErrFailed) {
		t.Errorf("the next flush of the volume: %v, want %v", err, sector.ErrFailed)
	}
	d.stopLife()
	_ = d.volume.Close()
}

// TestLeaveAudit: the log of key use may be on the volume, so its last record is written
// before the kernel's requests wait for the next server.
func TestLeaveAudit(t *testing.T) {
	d, _ := leavingServer(t)
	d.opts.keys.auditLog = filepath.Join(t.TempDir(), "audit.log")
	lock, err := os.Create(d.opts.keys.auditLog)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	d.opts.keys.startAudit(zap.NewNop())
	d.record(audit.Record{Event: audit.Lock, Outcome: audit.OK})
	time.AfterFunc(200*time.Millisecond, func() { lock.Close() })
	var none sync.WaitGroup
	stopKernel := func(error) {
		if text, err := os.ReadFile(d.opts.keys.auditLog); err != nil || !strings.Contains(string(text), audit.Lock) {
			t.Errorf("the log of key use is %q, %v", text, err)
		}
	}
	if err := d.leaveVolume(func(error) {}, stopKernel, &none, &none); err != nil {
		t.Fatal(err)
	}
	d.stopAudit()
	_ = d.volume.Close()
}

// TestLeaveStuckAudit: a server that leaves a frozen volume on which the log of key use
// is ends, although that can't be written.
func TestLeaveStuckAudit(t *testing.T) {
	before := auditLimit
	auditLimit = 50 * time.Millisecond
	defer func() { auditLimit = before }()
	d, _ := leavingServer(t)
	d.opts.keys.auditLog = filepath.Join(t.TempDir(), "audit.log")
	lock, err := os.Create(d.opts.keys.auditLog)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	d.opts.keys.startAudit(zap.NewNop())
	defer func() { lock.Close(); d.opts.keys.queue.Close() }()
	if err := d.volume.Suspend(sector.SuspendWait); err != nil {
		t.Fatal(err)
	}
	d.record(audit.Record{Event: audit.Wiped, Outcome: audit.OK})
	left := make(chan error, 1)
	go func() {
		var none sync.WaitGroup
		err := d.leaveVolume(func(error) {}, func(error) {}, &none, &none)
		d.stopAudit()
		left <- err
	}()
	select {
	case err := <-left:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(time.Minute):
		t.Error("it waits for the log of key use")
	}
	_ = d.volume.Close()
}

// TestPushState: what the keeper is told last is what is true, whoever tells it. If that
// were an older size, the next server would refuse to go on.
func TestPushState(t *testing.T) {
	d, keeper := leavingServer(t)
	d.stopLife()
	const pushes, each = 4, 200
	var pushing sync.WaitGroup
	for range pushes {
		pushing.Go(func() {
			for range each {
				d.mu.Lock()
				d.left.Bits++
				d.mu.Unlock()
				d.pushState()
			}
		})
	}
	last := 0
	for n := 0; n < pushes*each; {
		m := nextMessage(t, keeper)
		s, err := parseState(m.State)
		if err != nil {
			t.Fatal(err)
		}
		if s == nil || s.Bits == 0 {
			continue // from before
		}
		n++
		if s.Bits < last {
			t.Fatalf("state %d came after state %d", s.Bits, last)
		}
		last = s.Bits
	}
	pushing.Wait()
	if last != pushes*each {
		t.Errorf("the last of %d states is %d", pushes*each, last)
	}
	_ = d.volume.Close()
}

// TestKeptSockets: a server that goes on with other flags serves the sockets that there
// are, and says where those are: who asks it to lock the volume goes there.
func TestKeptSockets(t *testing.T) {
	d, _ := leavingServer(t)
	for name, path := range map[string]string{heldControl: "control.then", heldListener: "listen.then"} {
		l, err := listenUnix(filepath.Join(t.TempDir(), path))
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if d.link.held[name], err = l.File(); err != nil {
			t.Fatal(err)
		}
	}
	d.opts.control, d.opts.listen = filepath.Join(t.TempDir(), "control.now"), filepath.Join(t.TempDir(), "listen.now")
	stop, err := d.serveControl()
	if err != nil {
		t.Fatal(err)
	}
	defer stop()
	list, err := d.listen(t.Context())
	if err != nil || len(list) != 1 {
		t.Fatalf("%d listeners, %v", len(list), err)
	}
	defer list[0].Close()
	var s status
	if err := newControlClient(d.opts.control).do(t.Context(), "GET", "/v1/status", &s); err != nil {
		t.Fatal(err)
	}
	if filepath.Base(s.Control) != "control.then" || filepath.Base(s.Listen) != "listen.then" || list[0].Addr().String() != s.Listen {
		t.Errorf("control is at %s, clients at %s", s.Control, s.Listen)
	}
	d.stopLife()
	_ = d.volume.Close()
}

// TestChangedOptions: a server that goes on serves the volume as it was, whatever its
// options and the name of its device are by now.
func TestChangedOptions(t *testing.T) {
	d, _ := leavingServer(t)
	d.stopLife()
	state := &serverState{Volume: d.volume.State()}
	if err := d.volume.Leave(); err != nil {
		t.Fatal(err)
	}
	if err := d.device.Close(); err != nil {
		t.Fatal(err)
	}
	hold := func(name string) {
		t.Helper()
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		d.link.held[heldDevice] = f
	}
	image := d.opts.device
	hold(image)
	d.opts.readOnly, d.opts.discard, d.opts.randomKey = true, true, false
	d.adopt(state)
	var err error
	if d.device, err = d.openDevice(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.goOn(state); err != nil {
		t.Fatal(err)
	}
	if _, err := d.volume.WriteAt(make([]byte, 4096), 0); err != nil || d.opts.readOnly || d.opts.discard || !d.opts.randomKey {
		t.Errorf("a write gave %v; the options are %+v", err, d.opts)
	}
	_ = d.volume.Close()
	_ = d.device.Close()

	other := filepath.Join(t.TempDir(), "other")
	if err := errors.Join(os.WriteFile(other, nil, 0o600), os.Truncate(other, 2<<20)); err != nil {
		t.Fatal(err)
	}
	// Its name has become another's, or nobody's.
	for _, d.opts.device = range []string{other, filepath.Join(t.TempDir(), "gone"), image} {
		hold(image)
		if d.device, err = d.openDevice(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d.opts.device != image || d.device.Size() != 1<<20 {
			t.Errorf("the device is %s, of %d bytes", d.opts.device, d.device.Size())
		}
		_ = d.device.Close()
	}
}

// TestFenceWithoutKeeper: a server without --attach, too, waits for what one that was
// killed still has with the disk.
func TestFenceWithoutKeeper(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 1<<20)); err != nil {
		t.Fatal(err)
	}
	held, err := sector.OpenDevice(image, sector.DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	killed, err := sector.Reopen(held.File(), image, sector.DeviceOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := killed.Fence(t.Context(), func() {}); err != nil {
		t.Fatal(err)
	}
	// Has what it opened open, as a request in flight does.
	inFlight, err := unix.FcntlInt(killed.File().Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(killed.Close(), held.Close()); err != nil {
		t.Fatal(err)
	}
	d := &daemon{opts: serveOptions{device: image}, log: zap.NewNop()}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := d.openDevice(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("openDevice = %v, want that it has waited", err)
	}
	if err := unix.Close(inFlight); err != nil {
		t.Fatal(err)
	}
	dev, err := d.openDevice(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
}
