package main

import (
	"errors"
	"testing"
	"testing/synctest"
	"time"

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

// A slowDisk takes its time for each write and discard.
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

// TestWatchdogLongRequest has requests under way that take longer than the watchdog
// waits, of which the kernel counts nothing before their end.
func TestWatchdogLongRequest(t *testing.T) {
	for _, tt := range []struct {
		name    string
		each    time.Duration
		request func(v *sector.Volume, size int64) error
		hung    bool
	}{
		{name: "zeros", each: 10 * time.Second, request: func(v *sector.Volume, size int64) error { return v.WriteZeroes(0, size, false) }},
		{name: "zeros that get on no more", each: 10 * hungAfter, request: func(v *sector.Volume, size int64) error { return v.WriteZeroes(0, size, false) }, hung: true},
		{name: "discard", each: 10 * hungAfter, request: func(v *sector.Volume, size int64) error { return v.Trim(0, size, false) }},
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
