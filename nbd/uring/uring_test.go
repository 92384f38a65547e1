package uring

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func newTestRing(t *testing.T, flags uint32) *Ring {
	t.Helper()
	runtime.LockOSThread()
	r, err := newRing(8, flags)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
	return r
}

// one submits, and waits for the only completion.
func one(t *testing.T, r *Ring) Completion {
	t.Helper()
	for {
		if err := r.Enter(true); err != nil {
			t.Fatal(err)
		}
		if c, ok := r.Completed(); ok {
			return c
		}
	}
}

// TestRing does each operation on rings as new and as old kernels have them.
func TestRing(t *testing.T) {
	for name, flags := range map[string]uint32{
		"6.1": setupSingleIssuer | setupDeferTaskrun, "5.19": setupCoopTaskrun | setupTaskrunFlag, "5.6": 0,
	} {
		t.Run(name, func(t *testing.T) {
			r := newTestRing(t, flags)
			f, err := os.Create(filepath.Join(t.TempDir(), "file"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			fd := int(f.Fd())
			data := bytes.Repeat([]byte("0123456789abcdef"), 1000)
			for i, write := range []func() bool{
				func() bool { return r.Write(fd, data, 100, 0, false, 1) },
				func() bool { return r.Write(fd, data, 100, DSync, true, 2) },
			} {
				if !write() {
					t.Fatal("no room")
				}
				if c := one(t, r); c.Result != int32(len(data)) || c.Data != uint64(i+1) {
					t.Errorf("write: %+v", c)
				}
			}
			got := make([]byte, len(data)+1)
			r.Read(fd, got, 100, false, 3)
			if c := one(t, r); c.Result != int32(len(data)) || c.Data != 3 || !bytes.Equal(got[:len(data)], data) {
				t.Errorf("read: %+v", c)
			}
			r.Read(-1, got, 0, false, 4)
			if c := one(t, r); c.Result != -int32(unix.EBADF) {
				t.Errorf("read of no file: %+v", c)
			}

			var p [2]int
			if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
				t.Fatal(err)
			}
			defer unix.Close(p[0])
			defer unix.Close(p[1])
			r.Poll(p[0], unix.POLLIN, 5)
			if err := r.Enter(false); err != nil || r.Pending() != 1 {
				t.Fatalf("Enter() = %v, Pending() = %d", err, r.Pending())
			}
			if c, ok := r.Completed(); ok {
				t.Fatalf("poll of an empty pipe: %+v", c)
			}
			if _, err := unix.Write(p[1], []byte("x")); err != nil {
				t.Fatal(err)
			}
			if c := one(t, r); c.Data != 5 || c.Result&unix.POLLIN == 0 {
				t.Errorf("poll: %+v", c)
			}
			r.Poll(p[1], unix.POLLERR, 6)
			r.Cancel(6, 7)
			for range 2 {
				if c := one(t, r); c.Data == 6 && c.Result != -int32(unix.ECANCELED) {
					t.Errorf("canceled poll: %+v", c)
				}
			}
			if r.Pending() != 0 {
				t.Errorf("Pending() = %d at the end", r.Pending())
			}

			// As many as there are places, and no more; then again.
			for range 3 {
				n := r.Room()
				for range n {
					if !r.Read(fd, got[:1], 0, false, 8) {
						t.Fatal("no room")
					}
				}
				if r.Read(fd, got[:1], 0, false, 8) || r.Room() != 0 {
					t.Error("a full ring takes more")
				}
				for range n {
					one(t, r)
				}
				if r.Room() != n {
					t.Errorf("Room() = %d, want %d", r.Room(), n)
				}
			}
		})
	}
}

// TestPartlyTaken: completions come also when the kernel doesn't take all that was
// added, here as something has an operation that doesn't exist.
func TestPartlyTaken(t *testing.T) {
	for name, flags := range map[string]uint32{
		"6.1": setupSingleIssuer | setupDeferTaskrun, "5.19": setupCoopTaskrun | setupTaskrunFlag, "5.6": 0,
	} {
		t.Run(name, func(t *testing.T) {
			r := newTestRing(t, flags)
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			r.Poll(fd, unix.POLLIN, 1)
			if err := r.Enter(false); err != nil {
				t.Fatal(err)
			}
			if _, err := unix.Write(fd, []byte{7: 1}); err != nil {
				t.Fatal(err)
			}
			*r.next() = sqe{op: 255, userData: 2}
			r.Poll(fd, unix.POLLIN, 3)
			if err := r.Enter(false); err != nil {
				t.Fatal(err)
			}
			got := map[uint64]int32{}
			for c, ok := r.Completed(); ok; c, ok = r.Completed() {
				got[c.Data] = c.Result
			}
			if want := map[uint64]int32{1: unix.POLLIN, 2: -int32(unix.EINVAL)}; !maps.Equal(got, want) {
				t.Errorf("completions %v, want %v", got, want)
			}
			if c := one(t, r); c.Data != 3 || r.Pending() != 0 {
				t.Errorf("then completion %+v, and %d pending", c, r.Pending())
			}
		})
	}
}

// TestRefused: a kernel without memory is asked again after pauses that get
// longer, to a limit, and at once when there is a completion to take.
func TestRefused(t *testing.T) {
	r := newTestRing(t, 0)
	var want time.Duration
	start := time.Now()
	for range 12 {
		want += backoff(r.refused)
		if err := r.entered(0, unix.EAGAIN, true); err != nil {
			t.Fatal(err)
		}
	}
	if got := time.Since(start); got < want || want < 40*time.Millisecond {
		t.Errorf("12 refusals took %v, want at least %v, and that to be 40 ms", got, want)
	}
	if got := backoff(1000); got != 10*time.Millisecond {
		t.Errorf("the pause after 1000 refusals is %v", got)
	}
	before := r.refused
	if err := r.entered(0, unix.EAGAIN, false); err != nil || r.refused != before {
		t.Errorf("who doesn't wait was made to: %v", err)
	}
	// Something else is refused, and in its place there is a completion.
	r.Read(-1, make([]byte, 1), 0, false, 1)
	if err := r.Enter(true); err != nil || r.refused != 0 {
		t.Errorf("after success: %v, refused %d times", err, r.refused)
	}
	if err := r.entered(0, unix.EBUSY, true); err != nil || r.refused != 0 {
		t.Errorf("with a completion to take, it paused: %v", err)
	}
	if _, ok := r.Completed(); !ok {
		t.Error("the completion is gone")
	}
}
