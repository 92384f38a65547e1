package sector

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestGrow lets the backing device grow under a volume in use, then the volume,
// and then has others go on with it and open it anew.
func TestGrow(t *testing.T) {
	const before, after = 32 << 20, 48<<20 + 512 // with a rest that is no sector
	name := filepath.Join(t.TempDir(), "disk")
	dev := imageFile(t, name, before, DeviceOptions{})
	h, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	v := handoverVolume(t, dev, h)
	const small, big = before - dataOffset, 32 << 20
	if size, err := v.Grow(); err != nil || size != small {
		t.Fatalf("Grow() of a device that has not = %d, %v; want %d", size, err, small)
	}
	p := bytes.Repeat([]byte("beyond  "), 1024) // both halves alike: the places overlap
	if _, err := v.WriteAt(p, small-4096); err == nil {
		t.Error("a write over the end succeeded")
	}
	if err := os.Truncate(name, after); err != nil {
		t.Fatal(err)
	}
	if size, _ := v.Size(); size != small {
		t.Errorf("the size is %d before Grow, want %d", size, small)
	}
	if size, err := v.Grow(); err != nil || size != big {
		t.Fatalf("Grow() = %d, %v; want %d", size, err, big)
	}
	offsets := []int64{small - 4096, small, big - 8192}
	check := func(what string, v *Volume) {
		t.Helper()
		if size, _ := v.Size(); size != big {
			t.Errorf("%s: the size is %d, want %d", what, size, big)
		}
		got := make([]byte, len(p))
		for _, off := range offsets {
			if _, err := v.ReadAt(got, off); err != nil || !bytes.Equal(got, p) {
				t.Errorf("%s: at %d: %v, equal %v", what, off, err, bytes.Equal(got, p))
			}
		}
		if _, err := v.WriteAt(p, big-4096); err == nil {
			t.Errorf("%s: a write over the new end succeeded", what)
		}
	}
	for _, off := range offsets {
		if _, err := v.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	check("grown", v)

	// Resume compares the header with what was suspended.
	if err := errors.Join(v.Suspend(SuspendRefuse), v.Resume(t.Context(), testUnseal, OpenOptions{Handover: h})); err != nil {
		t.Error(err)
	}
	check("suspended and resumed", v)

	b, err := json.Marshal(v.State())
	if err != nil {
		t.Fatal(err)
	}
	var s State
	if err := json.Unmarshal(b, &s); err != nil {
		t.Fatal(err)
	}
	next, err := Continue(dev, s, h, SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	check("after a handover", next)
	if err := os.Truncate(name, after+4096); err != nil {
		t.Fatal(err)
	}
	if size, err := next.Grow(); err != nil || size != big+4096 {
		t.Errorf("after a handover: Grow() = %d, %v; want %d", size, err, big+4096)
	}
	// A version that didn't say so may have served a volume of a fixed size.
	s.Dynamic = false
	old, err := Continue(dev, s, h, SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	if size, err := old.Grow(); !errors.Is(err, ErrUnsupported) || size != big {
		t.Errorf("after a handover from an older version: Grow() = %d, %v; want %d, %v", size, err, big, ErrUnsupported)
	}

	if err := os.Truncate(name, before); err != nil {
		t.Fatal(err)
	}
	if size, err := v.Grow(); !errors.Is(err, ErrDevice) || size != big {
		t.Errorf("Grow() of a device that was cut off = %d, %v; want %d, %v", size, err, big, ErrDevice)
	}
	if size, _ := v.Size(); size != big {
		t.Errorf("the size is %d after the device was cut off, want %d", size, big)
	}
}

// TestGrowFixed: where the header gives the size, that is the size.
func TestGrowFixed(t *testing.T) {
	const before = 32<<20 + 512
	name := filepath.Join(t.TempDir(), "disk")
	dev := formatted(t, imageFile(t, name, before, DeviceOptions{}))
	v, err := Open(t.Context(), dev, testUnseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	const want = before - 512 - dataOffset
	if size, err := v.Grow(); err != nil || size != want {
		t.Errorf("Grow() = %d, %v; want %d", size, err, want)
	}
	if err := os.Truncate(name, 48<<20); err != nil {
		t.Fatal(err)
	}
	if size, err := v.Grow(); !errors.Is(err, ErrUnsupported) || size != want {
		t.Errorf("Grow() = %d, %v; want %d, %v", size, err, want, ErrUnsupported)
	}
	if size, _ := v.Size(); size != want {
		t.Errorf("the size is %d, want %d", size, want)
	}
}

// A growingDevice is bigger when it is asked anew, as one that was opened again.
type growingDevice struct {
	*Device
	more int64
}

func (d *growingDevice) Size() int64 { return d.Device.Size() + d.more }

// TestResumeGrown: that the device has grown doesn't keep a suspended volume from
// its key; the volume stays as it is until Grow.
func TestResumeGrown(t *testing.T) {
	const before, more = 32 << 20, 16 << 20
	name := filepath.Join(t.TempDir(), "disk")
	dev := formatted(t, imageFile(t, name, before, DeviceOptions{}))
	disk := &growingDevice{Device: dev}
	v, err := Open(t.Context(), disk, testUnseal, OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	if err := v.Suspend(SuspendRefuse); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, before+more); err != nil {
		t.Fatal(err)
	}
	disk.more = more
	if err := v.Resume(t.Context(), testUnseal, OpenOptions{}); err != nil {
		t.Fatal(err)
	}
	if size, _ := v.Size(); size != before-dataOffset {
		t.Errorf("the size is %d, want %d", size, before-dataOffset)
	}
}
