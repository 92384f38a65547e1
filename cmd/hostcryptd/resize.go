package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/nbd/nbdnl"
)

// How a volume grows while it is in use:
//
//  1. The volume takes the room that its backing device has now. Nothing is written:
//     the header doesn't have its size. From here on the server serves all of it, to
//     the kernel as soon as it asks (nbd.Device).
//  2. The keeper is told, so that a server that takes over serves it too.
//  3. The kernel is told, and may use it at once. A server that dies before this
//     leaves a kernel device that is smaller than the volume, which is no harm;
//     resize again goes on here.

// A resized is the answer to POST /v1/resize.
type resized struct {
	UUID   string `json:"uuid"`
	Device string `json:"device"`
	Before int64  `json:"before"` // bytes that the users of the volume had
	Size   int64  `json:"size"`   // bytes that they have

	Attached string `json:"attached,omitempty"`
	Sockets  bool   `json:"sockets,omitempty"` // there are clients that have to connect again
}

// resizeTimeout is how long the kernel may take to show a size that it has
// accepted.
const resizeTimeout = 10 * time.Second

// resize makes the volume as big as its device.
func (d *daemon) resize(ctx context.Context) (*resized, error) {
	// One at a time, and none when the volume is left to another server: the kernel
	// may let this one wait for its own requests, see nbdnl.Conn.Resize.
	select {
	case d.resizing <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-d.finished:
		return nil, withCode(codeBusy, errors.New("another server goes on with the volume, or it was detached; ask again"))
	}
	defer func() { <-d.resizing }()
	d.mu.Lock()
	r := &resized{UUID: d.uuid, Device: d.opts.device, Attached: d.attached, Sockets: d.opts.listen != "" || d.tcp != "" || len(d.inherited) > 0}
	v, state, index := d.volume, d.state, d.index
	d.mu.Unlock()
	if state != stateServing {
		return nil, withCode(codeBusy, fmt.Errorf("%s is not being served: its server is %s", r.Device, state))
	}
	if r.Attached != "" && v.Suspended() {
		return nil, d.noKeyToResize()
	}
	before, _ := v.Size()
	size, err := v.Grow()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.Device, err)
	}
	r.Before, r.Size = before, size
	if size != before {
		d.pushState()
	}
	if r.Attached != "" {
		was, err := nbdnl.Size(index)
		if err != nil {
			return nil, err
		}
		if r.Before = int64(was); r.Before < size {
			if err := d.resizeKernel(ctx, index, uint64(size)); err != nil {
				return nil, fmt.Errorf("the volume has %d bytes now, but not its kernel device: %w; 'hostcryptd resize' tries again", size, err)
			}
		}
	}
	if r.Before != r.Size {
		d.log.Info("the volume has grown", zap.Int64("before", r.Before), zap.Int64("size", size), zap.String("attached", r.Attached))
	}
	return r, nil
}

func (d *daemon) noKeyToResize() error {
	return withCode(codeBusy, fmt.Errorf("%s has no key now, and the kernel would wait for requests that wait for it", d.opts.device))
}

func (d *daemon) resizeKernel(ctx context.Context, index int, size uint64) error {
	if !d.sizing.TryLock() {
		return d.noKeyToResize() // in a moment
	}
	sized := sync.OnceFunc(d.sizing.Unlock)
	defer sized()
	if d.volume.Suspended() {
		return d.noKeyToResize()
	}
	conn, err := nbdnl.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	// Who replaced this server now could give the kernel no sockets, see Conn.Resize.
	if err := d.link.send(keeperMessage{Pin: "the kernel waits for its requests to change the size of the device"}, nil); err != nil {
		d.log.Warn("the keeper was not told that this server can't be replaced now", zap.Error(err))
	}
	err = conn.Resize(index, d.backend(), size)
	sized() // a freeze doesn't wait for the rest
	if err := d.link.send(keeperMessage{Unpin: true}, nil); err != nil {
		d.log.Warn("the keeper was not told that this server can be replaced again", zap.Error(err))
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resizeTimeout)
	defer cancel()
	return nbdnl.WaitReady(ctx, index, size)
}

// sizingLimit is how long a volume whose key is to be wiped waits for the kernel to
// change the size of its device. Tests change it.
var sizingLimit = 10 * time.Second

// holdSize keeps the kernel from changing the size of its device until release is called.
// A change that is under way is waited for: if requests began to wait for a key in the
// middle of it, all generic netlink of the machine would wait with them, and no volume
// could be attached, detached or given another server. It takes as long as the requests
// that are with the disk, which the keys are not wiped before either.
func (d *daemon) holdSize() (release func()) {
	for begun := time.Now(); !d.sizing.TryLock(); time.Sleep(10 * time.Millisecond) {
		if time.Since(begun) > sizingLimit {
			d.log.Error("the kernel still changes the size of its device; the volume is frozen all the same, and generic netlink may wait until the key is back")
			return func() {}
		}
	}
	return d.sizing.Unlock
}

// serveResize answers POST /v1/resize.
func (d *daemon) serveResize(w http.ResponseWriter, r *http.Request) {
	done, err := d.resize(r.Context())
	switch {
	case err == nil:
		w.Header().Set("Content-Type", "application/json")
		json.NewEncoder(w).Encode(done)
	case exitCode(err) == codeBusy:
		http.Error(w, err.Error(), http.StatusConflict)
	case exitCode(err) == codeDevice:
		http.Error(w, err.Error(), http.StatusUnprocessableEntity)
	default:
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}

// kernelSize checks the size of a kernel device with which the volume goes on, and
// returns it.
func (d *daemon) kernelSize(index int, size uint64) (uint64, error) {
	has, err := nbdnl.Size(index)
	switch {
	case err != nil:
		return 0, err
	case has > size:
		return 0, withCode(codeDevice, fmt.Errorf("%s has %d bytes and the volume only %d: give the backing device its size back, or unmount and detach", nbdnl.Path(index), has, size))
	case has < size:
		d.log.Warn("the kernel device is smaller than the volume; 'hostcryptd resize' makes it grow", zap.Uint64("size", has), zap.Uint64("volume", size))
	}
	return has, nil
}

func (a *app) resizeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "resize VOLUME",
		Short: "make a volume in use as big as its backing device has become",
		Long: `resize is for a backing device that has grown while its volume is served, such as
a logical volume or a disk in a cloud. The volume and its kernel device get the room while
they are in use, and what is on them can then grow too (resize2fs, xfs_growfs). The header
does not change. Without resize, a volume has the size of its device when it is served
anew.

The kernel is told by itself. The NBD protocol can't tell other clients: those of --listen
and --tcp see the size when they connect again.

A volume is not made smaller. If its device has become smaller, data is missing, and resize
says so.

Since Linux 6.9 the kernel waits for the requests under way before a device gets another
size. Reload and restart wait for that too. If the server is killed in just that moment,
it can't be replaced: what uses the device then waits until the machine is rebooted.

` + whichHelp,
		Example: `  lvextend -L +10G vg/data
  hostcryptd resize data
  resize2fs /dev/hostcryptd/data`,
		Args: oneArg("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := theOne(c.Context(), args[0])
			if err != nil {
				return err
			}
			var r resized
			if err := newControlClient(s.Control).do(c.Context(), "POST", "/v1/resize", &r); err != nil {
				return err
			}
			if a.json {
				return a.printJSON(r)
			}
			if r.Size == r.Before {
				fmt.Fprintf(a.stdout, "%s: the volume has %s, which is all that its device has room for\n", r.Device, bytesText(uint64(r.Size)))
				return nil
			}
			fmt.Fprintf(a.stdout, "%s: the volume has %s now, and had %d bytes\n", r.Device, bytesText(uint64(r.Size)), r.Before)
			if r.Attached != "" {
				fmt.Fprintf(a.stdout, "%s has it too; what is on it can grow now (resize2fs, xfs_growfs)\n", r.Attached)
			}
			if r.Sockets {
				fmt.Fprintln(a.stdout, "clients of its sockets see that when they connect again")
			}
			return nil
		},
	}
	return a.jsonFlag(c)
}
