package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
	"hostcryptd/sector/luks2"
)

// TestHeaderHandedOver: what a server keeps of the header outlives it. The next one writes
// it back, also if the header was overwritten in between or the first one was killed while
// it repaired it; after an erase none can.
func TestHeaderHandedOver(t *testing.T) {
	dir := t.TempDir()
	image, key := filepath.Join(dir, "image"), filepath.Join(dir, "key")
	if err := errors.Join(os.WriteFile(image, nil, 0o600), os.Truncate(image, 18<<20)); err != nil {
		t.Fatal(err)
	}
	link, keeper := unixPair(t, unix.SOCK_SEQPACKET)
	server := func() *daemon {
		o := serveOptions{device: image, attach: "auto", connections: 1}
		o.keys = keyFlags{auditLog: "none", hostKey: key, pins: filepath.Join(dir, "pins"), tpm: "none"}
		o.life.add(&cobra.Command{}) // what is the default
		return &daemon{opts: o, log: zap.NewNop(), index: 7, finished: make(chan struct{}), resizing: make(chan struct{}, 1), detach: make(chan *os.File, 1),
			headerChanged: make(chan struct{}, 1), link: &keeperLink{conn: link, held: map[string]*os.File{}}}
	}
	first := server()
	var err error
	if first.device, err = first.openDevice(t.Context()); err != nil {
		t.Fatal(err)
	}
	_, err = sector.Format(t.Context(), first.device, sector.FormatOptions{SectorSize: 4096, Seal: []sector.Sealer{first.opts.keys.sealer("host-key", first.log)}})
	if err := errors.Join(err, first.openHandover(), first.readHeader(t.Context())); err != nil {
		t.Fatal(err)
	}
	first.uuid = first.left.Volume.UUID
	begin := func(d *daemon, before *serverState) {
		t.Helper()
		life, err := d.opts.life.config(0, 0, false)
		if err != nil {
			t.Fatal(err)
		}
		if d.stopLife, err = d.startLife(t.Context(), life, before); err != nil {
			t.Fatal(err)
		}
	}
	begin(first, nil)
	first.pushState()
	// state is what the keeper knows when it has got the header that is newest, or the
	// first state.
	held := map[string]*os.File{}
	state := func() *serverState {
		t.Helper()
		for header := false; ; {
			var m keeperMessage
			f, err := receivePacket(keeper, &m)
			if err != nil {
				t.Fatal(err)
			}
			if f != nil {
				held[m.Hold] = f
				header = header || m.Hold == heldHeader
			}
			if m.State != nil && header {
				s, err := parseState(m.State)
				if err != nil {
					t.Fatal(err)
				}
				return s
			}
		}
	}
	before := state()
	next := func() *daemon {
		t.Helper()
		d := server()
		for name, f := range held {
			fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 3)
			if err != nil {
				t.Fatal(err)
			}
			d.link.held[name] = os.NewFile(uintptr(fd), name)
		}
		d.goesOn, d.left, d.uuid = true, *before, before.Volume.UUID
		if d.device, err = d.openDevice(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.openHandover(), d.goOn(before)); err != nil {
			t.Fatal(err)
		}
		d.takeKept()
		begin(d, before)
		return d
	}
	leave := func(d *daemon) {
		t.Helper()
		d.stopLife()
		if err := errors.Join(d.volume.Leave(), d.device.Close()); err != nil {
			t.Fatal(err)
		}
	}
	overwrite := func(b []byte) {
		t.Helper()
		f, err := os.OpenFile(image, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(b, 0); err != nil {
			t.Fatal(err)
		}
	}
	leave(first)
	overwrite(make([]byte, 1<<20))
	second := next()
	p, err := second.repairHeader(t.Context(), sector.RepairOptions{})
	if err != nil || !p.Whole {
		t.Fatalf("repairHeader() = %+v, %v", p, err)
	}
	if h, _, err := sector.ReadHeader(t.Context(), second.device); err != nil || h.UUID != before.Volume.UUID {
		t.Fatalf("the header: %v", err)
	}
	overwrite(make([]byte, 300<<10)) // as if it had been killed in the middle
	before = state()
	leave(second)
	third := next()
	if p, err = third.repairHeader(t.Context(), sector.RepairOptions{}); err != nil || !p.Whole {
		t.Fatalf("repairHeader() = %+v, %v", p, err)
	}
	before = state()
	// While it leaves, none begins.
	third.volume.StopRepairs()
	overwrite(make([]byte, 1<<20))
	if _, err := third.repairHeader(t.Context(), sector.RepairOptions{}); !errors.Is(err, sector.ErrClosed) {
		t.Errorf("repairHeader() of a server that leaves = %v", err)
	}
	leave(third)

	fourth := next()
	if _, err := fourth.repairHeader(t.Context(), sector.RepairOptions{}); err != nil {
		t.Fatal(err)
	}
	before = state()
	// One that only looks may have what is kept replaced too.
	h, _, err := luks2.Read(fourth.device)
	if err != nil {
		t.Fatal(err)
	}
	h.Label = "changed by another program"
	if err := luks2.Write(fourth.device, h); err != nil {
		t.Fatal(err)
	}
	if p, err := fourth.repairHeader(t.Context(), sector.RepairOptions{DryRun: true}); err != nil || p.Problem != "" {
		t.Fatalf("repairHeader() = %+v, %v", p, err)
	}
	fourth.pushing.Lock()
	sent := fourth.heldHeader
	fourth.pushing.Unlock()
	if sent != fourth.volume.KeptHeader() {
		t.Fatal("the keeper has a header that isn't kept any more")
	}
	// What it has of the header may be in swap on a volume that is frozen.
	if err := fourth.volume.Suspend(sector.SuspendWait); err != nil {
		t.Fatal(err)
	}
	fourth.opts.swap = true
	_, err = fourth.repairHeader(t.Context(), sector.RepairOptions{DryRun: true})
	fourth.opts.swap = false
	if exitCode(err) != codeBusy {
		t.Errorf("repairHeader() of a frozen volume with swap = %v", err)
	}
	if _, err := fourth.repairHeader(t.Context(), sector.RepairOptions{DryRun: true}); err != nil {
		t.Errorf("repairHeader() of a frozen volume = %v", err)
	}
	if err := fourth.volume.Resume(t.Context(), fourth.opts.keys.unsealer(fourth.log), fourth.lifeHost.openOptions()); err != nil {
		t.Fatal(err)
	}
	before = state()
	if _, err := fourth.erase(t.Context(), before.Volume.UUID); err != nil {
		t.Fatal(err)
	}
	before.Life = fourth.life.Snapshot()
	if fi, err := held[heldHeader].Stat(); err != nil || fi.Size() != 0 {
		t.Errorf("the keeper still has the header: %v, %v", fi.Size(), err)
	}
	for i := range 2 {
		if _, err := fourth.repairHeader(t.Context(), sector.RepairOptions{}); exitCode(err) != codeBusy {
			t.Errorf("server %d after the erase: %v", i, err)
		}
		if before.Life.State != lifecycle.Erased {
			t.Fatalf("after an erase it is %v", before.Life.State)
		}
		leave(fourth)
		fourth = next()
	}
	leave(fourth)
}

// TestRepairAfterLook: a look that waits for a key stops no repair, and one that hangs in the
// disk does.
func TestRepairAfterLook(t *testing.T) {
	for name, tt := range map[string]struct {
		ends  time.Duration // after it was told to
		hangs bool
	}{"at once": {0, false}, "late": {2 * time.Second, false}, "never": {time.Hour, true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &headerLook{done: make(chan struct{}), err: context.Canceled}
				var once sync.Once
				l.cancel = func() { once.Do(func() { time.AfterFunc(tt.ends, func() { close(l.done) }) }) }
				d := &daemon{log: zap.NewNop(), lifeHost: &keyHost{look: l}}
				d.lifeHost.d = d
				ctx, cancel := context.WithTimeout(t.Context(), headerTimeout)
				defer cancel()
				err := d.lookToRepair(ctx, &sector.Volume{})
				if tt.hangs != errors.Is(err, sector.ErrDevice) || !tt.hangs && err != nil {
					t.Errorf("lookToRepair() = %v", err)
				}
			})
		})
	}
}
