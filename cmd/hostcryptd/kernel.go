package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/systemd"
)

// The volume as a device of this kernel, in the order of its life: it is attached, served,
// given another socket when one has died, and detached when nobody uses it any more.
// What watches over its users is in users.go, and what udev is told in udev.go.

// A kernelDevice is the volume as a device of this kernel.
type kernelDevice struct {
	conn    kernelDriver
	index   int
	room    int             // in each of its sockets, see nbdnl.Room
	serving *sync.WaitGroup // of its connections
	ended   chan error      // how each of them has ended; nil if the kernel said goodbye

	// Of keepConnected.
	stop    context.CancelFunc
	keeping sync.WaitGroup
}

// A kernelDriver is what this needs of an [nbdnl.Conn].
type kernelDriver interface {
	Connect(cfg nbdnl.Config, socks ...*os.File) (int, error)
	Reconfigure(index int, backend string, socks ...*os.File) error
	DetachOnClose(index int, backend string, on bool) error
	Disconnect(index int) error
	Status(index int) (nbdnl.Status, error)
	Close() error
}

// maxRequest is the longest request of the kernel, in bytes. The defaults are 128
// KiB with Linux 6.1 and 1280 KiB with 6.12. A server takes a write that is longer
// than this in pieces (see the package nbd), and not with the others. It is less where
// that doesn't fit into the socket, see nbdnl.Room: the service of the unit may not have
// larger buffers than net.core.wmem_max, whose default makes it 256 KiB.
const maxRequest = 512 << 10

const (
	// deadConnTimeout is how long the kernel lets I/O wait for the next server.
	// After that it fails, for good.
	deadConnTimeout = time.Hour

	// requestTimer is when the kernel looks whether a request that was sent to a
	// dead socket can be sent again: not when it gets the next socket, but when the
	// request's own timer runs out, which is 30 s unless set. That is what the
	// pause after the death of a server is made of. On a device that is slower than
	// this, the kernel logs that a request is possibly stuck, and does nothing; with
	// one second, copying 50 MB in an emulated machine made it say so. With
	// several sockets it would send it twice, so it isn't set then.
	requestTimer = 5 * time.Second

	// reattachTries and reattachWait bound how long the kernel may take to see
	// that its end of a socket has died.
	reattachTries = 1000
	reattachWait  = 10 * time.Millisecond
)

// How long after the death of a socket the kernel gets another one at the earliest:
// of one that another server had, and of one that this server has given it.
//
// Who receives for a socket in the kernel (recv_work of drivers/block/nbd.c) takes
// what its place holds each time. If it has not seen the death by then, because it
// handles a reply or, if the socket was there for a moment only, has not begun, it
// goes on with the new socket, beside who was started for that. Then two take turns
// at the replies, and a read may get what is none of its data before one of them sees
// wrong magic and gives the socket up. And who sends may find out only then that the
// old socket is dead, and gives up the new one.
//
// Both were seen once on a busy emulated machine of one processor thread, where the
// three sockets came within 0.3 s. What was in flight isn't delayed by this: the
// kernel sends that again after 5 s.
const settleDead = 500 * time.Millisecond

var settleGiven = 2 * time.Second // tests change it

// settle waits.
func settle(ctx context.Context, how time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(how):
		return nil
	}
}

// attachKernel makes the volume a kernel device, with one server per socket.
func (d *daemon) attachKernel(ctx context.Context, serving *sync.WaitGroup) (*kernelDevice, error) {
	conn, err := nbdnl.Dial()
	if err != nil {
		return nil, fmt.Errorf("--attach: %w", err)
	}
	flags, err := d.server.TransmissionFlags(d.exportName())
	if err != nil {
		conn.Close()
		return nil, err
	}
	size, _ := d.volume.Size()
	cfg := nbdnl.Config{
		Index: nbdnl.FirstFree, Size: uint64(size), BlockSize: uint64(d.volume.SectorSize()),
		ServerFlags: flags, DeadConnTimeout: deadConnTimeout, Backend: d.backend(),
	}
	if d.opts.attach != "auto" {
		if cfg.Index, err = nbdnl.ParsePath(d.opts.attach); err != nil {
			conn.Close()
			return nil, err
		}
	}
	if d.index >= 0 {
		cfg.Index = d.index
	} else if found := nbdnl.Find(cfg.Backend); found >= 0 {
		// A server and its keeper have died, and the kernel still waits.
		if err := checkBacking(d.udevFile(), backingOf(d.device.File())); err != nil {
			return nil, errors.Join(fmt.Errorf("--attach: %s: %w", nbdnl.Path(found), err), conn.Close())
		}
		d.log.Warn("going on with a kernel device whose server has died", zap.String("attached", nbdnl.Path(found)))
		d.index = found
	} else if cfg.Index == nbdnl.FirstFree && !d.goesOn { // else the table may be on this very volume
		if cfg.Except, err = tabIndexes(tabFile, d.opts.name); err != nil {
			d.log.Warn("the volume may get a kernel device that another is to have", zap.Error(err))
		}
	}
	if d.goesOn && nbdnl.Detached(d.index, cfg.Backend) {
		// By another program, or by the server before just before it died.
		d.gone = true
		return nil, conn.Close()
	}
	d.tellUdev()
	k := &kernelDevice{conn: conn, index: d.index, room: maxRequest, serving: serving, ended: make(chan error, d.left.Connections)}
	again := d.index >= 0
	shown := uint64(size)
	if again {
		if shown, err = d.kernelSize(d.index, uint64(size)); err != nil {
			return nil, errors.Join(fmt.Errorf("--attach: %w", err), conn.Close())
		}
	}
	left, err := d.link.takeKernel()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("--attach: %w", err)
	}
	for _, server := range left {
		d.serveKernel(ctx, k, server)
	}
	if again {
		if d.left.Connections > len(left) {
			if err := settle(ctx, settleDead); err != nil {
				return nil, errors.Join(fmt.Errorf("--attach: %w", err), conn.Close())
			}
		}
		for range d.left.Connections - len(left) {
			if err := d.reconnect(ctx, ctx, k); err != nil {
				conn.Close()
				return nil, fmt.Errorf("--attach: %w", err)
			}
		}
	} else if err := d.connect(ctx, k, cfg); err != nil {
		conn.Close()
		return nil, fmt.Errorf("--attach: %w", err)
	}
	d.mu.Lock()
	d.attached, d.index = k.path(), k.index
	d.mu.Unlock()
	if err := nbdnl.WaitReady(ctx, k.index, shown); err != nil {
		if d.unchanged() {
			return nil, errors.Join(fmt.Errorf("--attach: %w", err), conn.Close())
		}
		return nil, errors.Join(fmt.Errorf("--attach: %w", err), k.detach())
	}
	if again {
		// A server that waited to stop may have asked for it, see release.
		if err := conn.DetachOnClose(k.index, d.backend(), false); err != nil {
			d.log.Warn("the kernel may detach the device when nobody has it open any more", zap.Error(err))
		}
		return k, nil // to set what follows would wait for the requests in flight
	}
	if d.opts.swap {
		err = d.tuneSwap(k.index)
	} else if _, terr := nbdnl.SetMaxRequest(k.index, uint64(k.room)); terr != nil {
		d.log.Warn("the kernel's requests have the size that is its default", zap.Error(terr))
	}
	if err != nil {
		return nil, errors.Join(err, k.detach())
	}
	if d.opts.connections == 1 {
		if err := nbdnl.SetRequestTimer(k.index, requestTimer); err != nil {
			d.log.Warn("if this server is killed, I/O will go on after half a minute only", zap.Error(err))
		}
	}
	return k, nil
}

// connect attaches a device that is free.
func (d *daemon) connect(ctx context.Context, k *kernelDevice, cfg nbdnl.Config) (err error) {
	var kernelEnds []*os.File
	defer func() {
		for _, f := range kernelEnds {
			f.Close()
		}
	}()
	// If attaching fails, closing the kernel's ends ends the servers below.
	for range d.opts.connections {
		kernel, server, err := nbdnl.Socketpair()
		if err != nil {
			return err
		}
		kernelEnds = append(kernelEnds, kernel)
		room, err := nbdnl.Room(kernel)
		if err != nil {
			server.Close()
			return err
		}
		k.room = min(k.room, room)
		d.serveKernel(ctx, k, server)
	}
	k.index, err = k.conn.Connect(cfg, kernelEnds...)
	if err != nil && cfg.Index != nbdnl.FirstFree {
		err = leftBehind(err, cfg.Index, nbdnl.Backend(cfg.Index), answers)
	}
	return err
}

// serveKernel serves a connection of the kernel.
func (d *daemon) serveKernel(ctx context.Context, k *kernelDevice, server *net.UnixConn) {
	k.serving.Go(func() {
		sock, err := nbd.NewSocket(server)
		if err != nil {
			server.Close()
			k.ended <- err
			return
		}
		d.mu.Lock()
		d.kernelSockets = append(d.kernelSockets, sock)
		d.mu.Unlock()
		err = d.server.ServeTransmission(ctx, sock, d.exportName())
		left := errors.Is(err, nbd.ErrLeave)
		d.mu.Lock()
		d.kernelSockets = slices.DeleteFunc(d.kernelSockets, func(s *nbd.Socket) bool { return s == sock })
		if left {
			d.leftSockets = append(d.leftSockets, sock)
		}
		d.mu.Unlock()
		if left {
			return
		}
		sock.Close()
		if ctx.Err() != nil {
			return
		}
		k.ended <- err // nil: the kernel said goodbye
	})
}

// reconnect gives the kernel a new connection in place of a dead one, which is served
// until ctx ends. The kernel is asked for no longer than until asking does.
func (d *daemon) reconnect(ctx, asking context.Context, k *kernelDevice) error {
	server, err := k.reattach(asking, d.backend())
	if err != nil {
		return err
	}
	d.serveKernel(ctx, k, server)
	return nil
}

// reconnectPause is the longest pause before the kernel is asked once more to take
// another connection.
const reconnectPause = 30 * time.Second

// keepConnected gives the kernel another connection for each that fails, until ctx ends
// or stopKeeping is called. It does so also while the server waits to stop, for hours
// maybe: what uses the device could not be unmounted without one. gone receives nil if
// the device was detached by another program.
func (d *daemon) keepConnected(ctx context.Context, k *kernelDevice, gone chan<- error) {
	var keeping context.Context
	keeping, k.stop = context.WithCancel(ctx)
	k.keeping.Go(func() {
		for {
			select {
			case err := <-k.ended:
				if err != nil && d.replaceConnection(ctx, keeping, k, err) {
					continue
				}
				if keeping.Err() == nil {
					gone <- nil
				}
			case <-keeping.Done():
			}
			return
		}
	})
}

// replaceConnection gives the kernel another connection for one that has failed with err.
// It is false if the device is not attached any more, or keeping has ended.
func (d *daemon) replaceConnection(ctx, keeping context.Context, k *kernelDevice, err error) bool {
	for wait := settleGiven; err != nil; wait = min(2*wait, reconnectPause) {
		// No request of that connection is on the device any more, so the kernel may
		// send them again.
		d.log.Error("the kernel's connection has failed; it gets another one", zap.Error(err))
		if settle(keeping, wait) != nil || nbdnl.Detached(k.index, d.backend()) {
			return false
		}
		err = d.reconnect(ctx, keeping, k)
	}
	return true
}

// stopKeeping ends keepConnected.
func (k *kernelDevice) stopKeeping() {
	if k != nil && k.stop != nil {
		k.stop()
		k.keeping.Wait()
	}
}

// reattach gives the kernel a new socket for one that is dead, and returns the
// server's end.
func (k *kernelDevice) reattach(ctx context.Context, backend string) (*net.UnixConn, error) {
	for try := range reattachTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			case <-time.After(reattachWait):
			}
		}
		kernel, server, err := nbdnl.Socketpair()
		if err != nil {
			return nil, err
		}
		err = k.conn.Reconfigure(k.index, backend, kernel)
		kernel.Close()
		if err != nil {
			server.Close()
			return nil, err
		}
		// As long as it has not seen the old socket die, the kernel has no use for
		// a new one, drops it, and says that all is well.
		dropped, err := nbdnl.HungUp(server)
		if err == nil && !dropped {
			return server, nil
		}
		server.Close()
		if err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("%s: the kernel takes no new socket: none of its old ones is dead", k.path())
}

// waitUnused claims the kernel device, however long it takes until nobody uses
// it: to detach it from under a file system would lose data. Only a request to
// detach, which claims it too, ends the wait earlier, or that another program has
// detached it, see keepConnected: then attached is false.
func (d *daemon) waitUnused(k *kernelDevice, gone <-chan error) (claimed *os.File, attached bool) {
	said := ""
	for {
		f, err := d.claim(k.index)
		if err == nil {
			return f, true
		}
		if msg := err.Error(); msg != said {
			said = msg
			d.setState(stateStopping, msg)
			d.log.Warn("waiting to stop", zap.Error(err))
			d.notify(systemd.Stopping, systemd.Status("waiting to stop: %v", err))
		}
		select {
		case f := <-d.detach:
			return f, true
		case <-gone:
			return nil, false
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// release detaches the kernel device that claimed is, which it closes, as soon as
// nobody has it open any more. A process that just has it open can't be seen from the
// sandbox of a unit, and its writes are flushed when it closes the device. The kernel
// is asked to detach it then: who looked before and detached later could be too late.
func (d *daemon) release(k *kernelDevice, claimed *os.File) error {
	if claimed == nil {
		return k.detach()
	}
	err := claimed.Sync()
	if d.life.Snapshot().State == lifecycle.Erased {
		err = nil // refused, as every request is; what was answered before was flushed then
	}
	if derr := k.conn.DetachOnClose(k.index, d.backend(), true); derr != nil {
		err = errors.Join(err, derr, k.detach())
		claimed.Close()
		return err
	}
	claimed.Close()
	for said := false; !nbdnl.Detached(k.index, d.backend()); {
		if s, serr := k.conn.Status(k.index); serr == nil && !s.Connected {
			break
		}
		if !said {
			said = true
			const why = "a process that can't be seen from here has the device open"
			d.setState(stateStopping, why)
			d.log.Warn("waiting to stop: "+why+"; 'fuser -v' as root shows which", zap.String("device", k.path()))
			d.notify(systemd.Stopping, systemd.Status("waiting to stop: %s", why))
		}
		select {
		case again := <-d.detach: // which nobody else closes
			if again != nil {
				again.Close()
			}
		case <-time.After(200 * time.Millisecond):
		}
	}
	return errors.Join(err, k.close())
}

func (k *kernelDevice) path() string { return nbdnl.Path(k.index) }

// claim claims the kernel device of an index, see claimDevice.
func (d *daemon) claim(index int) (*os.File, error) {
	return claimDevice(nbdnl.Path(index), func() bool { return nbdnl.Detached(index, d.backend()) }, d.log)
}

// detach detaches a device that nobody uses.
func (k *kernelDevice) detach() error {
	k.stopKeeping() // a device that is being detached must not get another connection
	return errors.Join(k.conn.Disconnect(k.index), k.conn.Close())
}

// close leaves the device as it is.
func (k *kernelDevice) close() error {
	k.stopKeeping()
	return k.conn.Close()
}

const backendPrefix = "hostcryptd-"

// backend is what the kernel device is called, so that only the same volume is
// given to it again.
func (d *daemon) backend() string { return backendPrefix + d.uuid }

// leftBehind says of a kernel device that is in use what can be done about it, if it is one of
// hostcryptd's that nobody serves any more. A random key's volume has another UUID at
// each start, so its server doesn't find the device again by that.
func leftBehind(err error, index int, backend string, answers func(uuid string) bool) error {
	uuid, ours := strings.CutPrefix(backend, backendPrefix)
	if !errors.Is(err, nbdnl.ErrBusy) || !ours || answers(uuid) {
		return err
	}
	return fmt.Errorf("%w: it is that of volume %s, for which no server answers; if that has died and its keeper too, serve that volume again, or, if its key was random or nobody needs it, unmount it and have the kernel drop it with 'nbd-client -d %s'", err, uuid, nbdnl.Path(index))
}

// answers tells whether the server of a volume answers, if it has the usual control
// socket.
func answers(uuid string) bool {
	c, err := net.Dial("unix", filepath.Join(controlDir(), uuid+".sock"))
	if err != nil {
		return false
	}
	c.Close()
	return true
}
