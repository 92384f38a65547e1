package sector

import (
	"bytes"
	"errors"
	"testing"

	"hostcryptd/sector/sectortest"
)

// TestOpenRandom writes to a volume that has no header.
func TestOpenRandom(t *testing.T) {
	const size = 1<<20 + 4096 + 512
	disk := sectortest.New(size)
	for _, sectorSize := range []int{512, 4096} {
		v, err := OpenRandom(disk, RandomOptions{SectorSize: sectorSize, Label: "swap"})
		if err != nil {
			t.Fatal(err)
		}
		n, _ := v.Size()
		if want := int64(size / sectorSize * sectorSize); n != want {
			t.Errorf("sectors of %d: size %d, want %d", sectorSize, n, want)
		}
		if v.UUID() == "" || v.Label() != "swap" || v.Token() != RandomToken {
			t.Errorf("UUID %q, label %q, token %d", v.UUID(), v.Label(), v.Token())
		}
		want := bytes.Repeat([]byte("first of all sectors"), 1000)[:8192]
		if _, err := v.WriteAt(want, 0); err != nil {
			t.Fatal(err)
		}
		raw, got := make([]byte, len(want)), make([]byte, len(want))
		if _, err := disk.ReadAt(raw, 0); err != nil || bytes.Contains(raw, want[:20]) {
			t.Errorf("the disk begins with %.20q: %v", raw, err)
		}
		if _, err := v.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Errorf("reads as something else: %v", err)
		}

		// Another start has another key.
		next, err := OpenRandom(disk, RandomOptions{SectorSize: sectorSize})
		if err != nil {
			t.Fatal(err)
		}
		if next.UUID() == v.UUID() {
			t.Error("two volumes with the same UUID")
		}
		if _, err := next.ReadAt(got, 0); err != nil || bytes.Contains(got, want[:20]) {
			t.Errorf("the next volume reads %.20q: %v", got, err)
		}
		if err := errors.Join(next.Close(), v.Suspend(SuspendRefuse)); err != nil {
			t.Fatal(err)
		}
		if _, err := v.ReadAt(got, 0); !errors.Is(err, ErrSuspended) {
			t.Errorf("ReadAt without a key: %v, want %v", err, ErrSuspended)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := OpenRandom(disk, RandomOptions{SectorSize: 1024}); err == nil {
		t.Error("sectors of 1024 bytes were accepted")
	}
	if _, err := OpenRandom(sectortest.New(100), RandomOptions{SectorSize: 512}); !errors.Is(err, ErrDevice) {
		t.Errorf("a device of 100 bytes: %v, want %v", err, ErrDevice)
	}
}

// TestHandoverRandom hands a random key over, which is nowhere else.
func TestHandoverRandom(t *testing.T) {
	disk := sectortest.New(1 << 20)
	h, err := NewHandover()
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	v, err := OpenRandom(disk, RandomOptions{SectorSize: 4096, Handover: h})
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{1, 2, 3, 4}, 1024)
	if _, err := v.WriteAt(want, 4096); err != nil {
		t.Fatal(err)
	}
	next, err := Continue(disk, v.State(), h, SuspendRefuse)
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := next.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) || next.Token() != RandomToken {
		t.Errorf("after the handover: %v, equal %v, token %d", err, bytes.Equal(got, want), next.Token())
	}
	if err := next.Close(); err != nil || h.HasKey() {
		t.Errorf("Close: %v; the key is still in the handover: %v", err, h.HasKey())
	}
}
