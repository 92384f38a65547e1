package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"hostcryptd/sector"
	"hostcryptd/sector/sectortest"
)

// TestWatchdog plays devices whose I/O stands still for different reasons.
func TestWatchdog(t *testing.T) {
	type look struct {
		inFlight int
		done     uint64
		err      error
	}
	stuck := func(time.Duration) look { return look{inFlight: 1, done: 7} }
	now := func() error { return nil }
	asked := 0
	for _, tt := range []struct {
		name    string
		io      func(since time.Duration) look
		excused bool
		disk    func() error
		hung    time.Duration // when it is found out; 0 for never
	}{
		{name: "idle", io: func(time.Duration) look { return look{done: 7} }, disk: now},
		{name: "progress", io: func(d time.Duration) look { return look{inFlight: 3, done: uint64(d / (50 * time.Second))} }, disk: now},
		{name: "detached", io: func(time.Duration) look { return look{inFlight: 1, err: errors.New("no such device")} }, disk: now},
		{name: "frozen", io: stuck, excused: true, disk: now},
		{name: "hung", io: stuck, disk: now, hung: hungAfter + 10*time.Second},
		{name: "hung, the disk fails", io: stuck, disk: func() error { return errors.New("I/O error") }, hung: hungAfter + 10*time.Second},
		{name: "disk hangs", io: stuck, disk: func() error { time.Sleep(24 * time.Hour); return nil }},
		{name: "disk hangs for a while, then the server", io: stuck, disk: func() error { time.Sleep(5 * time.Minute); return nil }, hung: 5*time.Minute + hungAfter + 10*time.Second},
		{name: "disk hangs for a while", io: func(d time.Duration) look {
			return look{inFlight: 1, done: uint64(d / (5*time.Minute + 30*time.Second))}
		}, disk: func() error { time.Sleep(5 * time.Minute); return nil }},
		// Its first answer comes with those that were waited for, and says nothing later on.
		{name: "disk hangs, and again", io: func(d time.Duration) look {
			switch {
			case d < 5*time.Minute:
				return look{inFlight: 1, done: 7}
			case d < 5*time.Minute+30*time.Second:
				return look{done: 8}
			}
			return look{inFlight: 1, done: 8}
		}, disk: func() error {
			if asked++; asked == 1 {
				time.Sleep(5*time.Minute - 10*time.Second)
			} else {
				time.Sleep(24 * time.Hour)
			}
			return nil
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begun := time.Now()
				w := &watchdog{
					progress: func() (int, uint64, error) {
						l := tt.io(time.Since(begun))
						return l.inFlight, l.done, l.err
					},
					long:    func() (uint64, bool) { return 0, false },
					zeroing: func() bool { return false },
					excused: func() bool { return tt.excused }, disk: tt.disk, moved: begun,
				}
				var hung time.Duration
				for time.Since(begun) < 10*time.Minute && hung == 0 {
					time.Sleep(10 * time.Second)
					synctest.Wait()
					if !w.works(time.Now()) {
						hung = time.Since(begun)
					}
				}
				if hung > 0 != (tt.hung > 0) || hung < tt.hung || hung > tt.hung+20*time.Second {
					t.Errorf("found to hang after %v, want %v", hung, tt.hung)
				}
				time.Sleep(48 * time.Hour) // the probe ends
			})
		})
	}
}

// A slowDisk takes its time for each write, discard and flush.
type slowDisk struct {
	*sectortest.Disk
	each time.Duration
}

func (d *slowDisk) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(d.each)
	return d.Disk.WriteAt(p, off)
}

func (d *slowDisk) Discard(off, length int64) error {
	time.Sleep(d.each)
	return d.Disk.Discard(off, length)
}

func (d *slowDisk) WriteAtSync(p []byte, off int64) (int, error) {
	time.Sleep(d.each)
	return d.Disk.WriteAtSync(p, off)
}

func (d *slowDisk) Sync() error {
	time.Sleep(d.each)
	return d.Disk.Sync()
}

// TestWatchdogLongRequest has requests under way that take longer than the watchdog
// waits, of which the kernel counts nothing before their end.
func TestWatchdogLongRequest(t *testing.T) {
	for _, tt := range []struct {
		name    string
		each    time.Duration
		request func(v *sector.Volume, size int64) error
		hung    bool
		client  bool // has asked for it, while the kernel waits for something else
	}{
		{name: "zeros of a client", each: 10 * time.Second, request: func(v *sector.Volume, size int64) error { return v.WriteZeroes(0, size, false) }, client: true, hung: true},
		{name: "zeros", each: 10 * time.Second, request: func(v *sector.Volume, size int64) error { return v.WriteZeroes(0, size, false) }},
		{name: "zeros that get on no more", each: 10 * hungAfter, request: func(v *sector.Volume, size int64) error { return v.WriteZeroes(0, size, false) }, hung: true},
		{name: "discard", each: 10 * hungAfter, request: func(v *sector.Volume, size int64) error { return v.Trim(0, size, false) }},
		{name: "flush", each: 10 * hungAfter, request: func(v *sector.Volume, _ int64) error { return v.Sync() }},
		{name: "write with FUA", each: 10 * hungAfter, request: func(v *sector.Volume, _ int64) error {
			_, err := v.WriteAtFUA(make([]byte, 4096), 0)
			return err
		}},
		{name: "write that doesn't end", each: 10 * hungAfter, request: func(v *sector.Volume, _ int64) error {
			_, err := v.WriteAt(make([]byte, 4096), 0)
			return err
		}, hung: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				disk := &slowDisk{Disk: sectortest.New(8 << 20), each: tt.each}
				v, err := sector.OpenRandom(disk, sector.RandomOptions{SectorSize: 4096, Discard: true})
				if err != nil {
					t.Fatal(err)
				}
				defer v.Close()
				begun := time.Now()
				answered := make(chan error, 1)
				go func() { answered <- tt.request(v, disk.Size()) }()
				w := &watchdog{
					progress: func() (int, uint64, error) { return 1, 7, nil },
					long:     (&daemon{volume: v}).long,
					zeroing:  func() bool { return !tt.client },
					excused:  func() bool { return false }, disk: func() error { return nil }, moved: begun,
				}
				hung := false
				for {
					time.Sleep(10 * time.Second)
					synctest.Wait()
					select {
					case err := <-answered:
						if took := time.Since(begun); err != nil || took < 4*hungAfter {
							t.Fatalf("the request took %v, error %v", took, err)
						}
						if hung != tt.hung {
							t.Errorf("found to hang: %v, want %v", hung, tt.hung)
						}
						return
					default:
						hung = hung || !w.works(time.Now())
					}
				}
			})
		})
	}
}

// A slowFlush is a device whose flushes take their time.
type slowFlush struct {
	*sector.Device
	each time.Duration
}

func (d slowFlush) Sync() error {
	time.Sleep(d.each)
	return d.Device.Sync()
}

// TestWatchdogFUA: a write with FUA that io_uring does may be with the disk or forgotten
// here. That the disk reads doesn't tell; that it flushes does.
func TestWatchdogFUA(t *testing.T) {
	for _, tt := range []struct {
		name string
		each time.Duration
		hung bool
	}{
		{name: "the disk hangs", each: 20 * hungAfter},
		{name: "the server hangs", each: time.Second, hung: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			name := filepath.Join(t.TempDir(), "disk")
			if err := errors.Join(os.WriteFile(name, nil, 0o600), os.Truncate(name, 1<<20)); err != nil {
				t.Fatal(err)
			}
			device, err := sector.OpenDevice(name, sector.DeviceOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer device.Close()
			synctest.Test(t, func(t *testing.T) {
				v, err := sector.OpenRandom(slowFlush{device, tt.each}, sector.RandomOptions{SectorSize: 4096})
				if err != nil {
					t.Fatal(err)
				}
				p := make([]byte, 8192)
				p = p[-uintptr(unsafe.Pointer(&p[0]))%4096:][:4096]
				_, _, ticket, ok := v.BeginWrite(p, 0, true)
				if !ok {
					t.Fatal("the write doesn't begin")
				}
				d := &daemon{volume: v, device: device}
				begun := time.Now()
				w := &watchdog{
					progress: func() (int, uint64, error) { return 1, 7, nil },
					long:     d.long, zeroing: d.zeroing, excused: func() bool { return false }, disk: d.readDisk, moved: begun,
				}
				hung := false
				for !hung && time.Since(begun) < 10*hungAfter {
					time.Sleep(10 * time.Second)
					synctest.Wait()
					hung = !w.works(time.Now())
				}
				if hung != tt.hung {
					t.Errorf("found to hang: %v, want %v", hung, tt.hung)
				}
				time.Sleep(time.Hour) // the probe ends
				_, err = v.EndWrite(p, 0, true, ticket, len(p), nil)
				if err := errors.Join(err, v.Close()); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
