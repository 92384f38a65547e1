package luks2

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"
)

// memory is a File in memory. It records the writes, so that a test can cut
// the power after any of them.
type memory struct {
	b      []byte
	writes []write
	failAt int // the number of the write or sync that fails, from 1; 0 is none
	ops    int
}

type write struct {
	off int64
	b   []byte
}

var errDisk = errors.New("disk error")

func newMemory(size int) *memory { return &memory{b: make([]byte, size)} }

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	if off >= int64(len(m.b)) {
		return 0, io.EOF
	}
	n := copy(p, m.b[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if off%4096 != 0 || len(p)%4096 != 0 {
		return 0, fmt.Errorf("write of %d bytes at %d is not aligned", len(p), off)
	}
	if m.ops++; m.ops == m.failAt {
		return 0, errDisk
	}
	m.writes = append(m.writes, write{off, bytes.Clone(p)})
	return copy(m.b[off:], p), nil
}

func (m *memory) Sync() error {
	if m.ops++; m.ops == m.failAt {
		return errDisk
	}
	return nil
}

const (
	testCopy = 256 << 10
	testData = 16 << 20
)

// testHeader is a header of the kind that hostcryptd writes: no keyslots, one
// crypt segment, a digest and a token.
func testHeader() *Header {
	h := New(testCopy, testData)
	h.UUID = "11111111-2222-3333-4444-555555555555"
	h.Label, h.Subsystem = "label", "hostcryptd"
	h.Segments[0] = &Segment{Type: "crypt", Offset: testData, Dynamic: true, Encryption: "aes-xts-plain64", SectorSize: 4096}
	h.Digests[0] = &Digest{Type: "pbkdf2", Segments: []int{0}, Hash: "sha256", Iterations: 1000, Salt: make([]byte, 32), Digest: make([]byte, 32)}
	t, err := NewToken([]byte(`{"type":"hostcryptd-test","keyslots":[],"x":{"y":[1,2]}}`))
	if err != nil {
		panic(err)
	}
	h.Tokens[0] = t
	return h
}

// formatted returns a device that holds testHeader.
func formatted(t *testing.T) *memory {
	t.Helper()
	m := newMemory(2*testCopy + 4096)
	if err := Format(m, testHeader()); err != nil {
		t.Fatal(err)
	}
	m.writes, m.ops = nil, 0
	return m
}

func read(t *testing.T, f io.ReaderAt) (*Header, Copies) {
	t.Helper()
	h, c, err := Read(f)
	if err != nil {
		t.Fatalf("Read() error %v", err)
	}
	return h, c
}

// reseal gives a copy a right checksum after a test has changed it.
func reseal(b []byte) {
	clear(b[offChecksum : offChecksum+lenChecksum])
	copy(b[offChecksum:], checksum(sha256.New(), b))
}

func TestRoundTrip(t *testing.T) {
	m := formatted(t)
	h, c := read(t, m)
	if c.Damaged() {
		t.Errorf("fresh header: %s", c.Describe())
	}
	if h.SeqID != 1 || h.UUID != testHeader().UUID || h.Label != "label" || h.Subsystem != "hostcryptd" {
		t.Errorf("binary header read back as %+v", h)
	}
	for _, off := range []uint64{0, h.Size} {
		enc, err := h.Encode(off)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(enc, m.b[off:off+h.Size]) {
			t.Errorf("Encode(%d) differs from what was read", off)
		}
	}
	if bytes.Equal(m.b[offSalt:offSalt+64], m.b[testCopy+offSalt:testCopy+offSalt+64]) {
		t.Error("both copies have the same salt")
	}
}

// TestWriteKeepsUnknown adds fields that a later format might have at every
// level, and checks that an update carries them along.
func TestWriteKeepsUnknown(t *testing.T) {
	m := formatted(t)
	var doc map[string]any
	area := m.b[binarySize:testCopy]
	if err := json.Unmarshal(bytes.TrimRight(area, "\x00"), &doc); err != nil {
		t.Fatal(err)
	}
	doc["future"] = "<&>"
	for _, path := range [][]string{{"config"}, {"segments", "0"}, {"digests", "0"}, {"tokens", "0"}} {
		o := doc
		for _, p := range path {
			o = o[p].(map[string]any)
		}
		o["future"] = map[string]any{"n": 1.5}
	}
	js, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	clear(area)
	copy(area, js)
	copy(m.b[testCopy+binarySize:2*testCopy], area)
	reseal(m.b[:testCopy])
	reseal(m.b[testCopy : 2*testCopy])

	h, _ := read(t, m)
	h.Label = "changed"
	if err := Write(m, h); err != nil {
		t.Fatal(err)
	}
	var after map[string]any
	if err := json.Unmarshal(bytes.TrimRight(m.b[binarySize:testCopy], "\x00"), &after); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(doc, after) {
		t.Errorf("JSON area changed:\n%v\n%v", doc, after)
	}
	if h, c := read(t, m); h.Label != "changed" || h.SeqID != 2 || c.Damaged() {
		t.Errorf("after Write: label %q, sequence id %d, %s", h.Label, h.SeqID, c.Describe())
	}
}

// TestDecodeRejects changes one thing in a valid copy, gives it a right
// checksum where that is not the point, and expects the kind of refusal.
func TestDecodeRejects(t *testing.T) {
	text := func(old, new string) func([]byte) {
		return func(b []byte) {
			js := bytes.TrimRight(b[binarySize:], "\x00")
			if !bytes.Contains(js, []byte(old)) {
				panic("test looks for what is not there: " + old)
			}
			js = bytes.Replace(bytes.Clone(js), []byte(old), []byte(new), 1)
			clear(b[binarySize:])
			copy(b[binarySize:], js)
		}
	}
	tests := []struct {
		name   string
		change func(b []byte)
		broken bool // leave the checksum wrong
		want   error
	}{
		{"nothing", func([]byte) {}, false, nil},
		{"magic", func(b []byte) { b[0] = 'l' }, false, ErrMagic},
		{"magic of the other copy", func(b []byte) { copy(b, backupMagic) }, false, ErrMagic},
		{"version 1", func(b []byte) { b[7] = 1 }, false, ErrVersion},
		{"checksum", func(b []byte) { b[offChecksum] ^= 1 }, true, ErrChecksum},
		{"flipped bit in JSON", func(b []byte) { b[binarySize+5] ^= 1 }, true, ErrChecksum},
		{"flipped bit in padding", func(b []byte) { b[len(b)-1] ^= 1 }, true, ErrChecksum},
		{"copy size", func(b []byte) { binary.BigEndian.PutUint64(b[offSize:], 12345) }, false, ErrInvalid},
		{"algorithm", func(b []byte) { copy(b[offAlg:], "md5\x00\x00\x00") }, false, ErrInvalid},
		{"moved", func(b []byte) { b[offHdrOffset+7] = 1 }, false, ErrInvalid},
		{"no UUID", func(b []byte) { b[offUUID] = 0 }, false, ErrInvalid},
		{"bytes after JSON", func(b []byte) { b[len(b)-1] = 'x' }, false, ErrInvalid},
		{"not an object", func(b []byte) { b[binarySize] = '[' }, false, ErrInvalid},
		{"no config", text(`"config"`, `"konfig"`), false, ErrInvalid},
		{"member in capitals", text(`"encryption"`, `"Encryption"`), false, ErrInvalid},
		{"json_size", text(`"json_size":"258048"`, `"json_size":"258047"`), false, ErrInvalid},
		{"number for a size", text(`"json_size":"258048"`, `"json_size":258048`), false, ErrInvalid},
		{"keyslots_size", text(`"keyslots_size":"16252928"`, `"keyslots_size":"16252929"`), false, ErrInvalid},
		{"no segment", text(`"segments":{"0":`, `"segments":{},"s":{"0":`), false, ErrInvalid},
		{"segment not 0", text(`"segments":{"0":`, `"segments":{"1":`), false, ErrInvalid},
		{"segment 00", text(`"segments":{"0":`, `"segments":{"00":`), false, ErrInvalid},
		{"segment null", text(`"segments":{"0":{`, `"segments":{"0":null,"1":{`), false, ErrInvalid},
		{"segment in header", text(`"offset":"16777216"`, `"offset":"16776704"`), false, ErrInvalid},
		{"segment offset", text(`"offset":"16777216"`, `"offset":"16777217"`), false, ErrInvalid},
		{"segment size 0", text(`"dynamic"`, `"0"`), false, ErrInvalid},
		{"segment size wraps", text(`"dynamic"`, `"18446744073709551104"`), false, ErrInvalid},
		{"sector size 1024+1", text(`"sector_size":4096`, `"sector_size":1025`), false, ErrInvalid},
		{"sector size 0", text(`"sector_size":4096`, `"sector_size":0`), false, ErrInvalid},
		{"sector size 8192", text(`"sector_size":4096`, `"sector_size":8192`), false, ErrInvalid},
		{"iv_tweak", text(`"iv_tweak":"0"`, `"iv_tweak":"1"`), false, ErrInvalid},
		{"no digest", text(`"segments":["0"]`, `"segments":[]`), false, ErrInvalid},
		{"digest of nothing", text(`"segments":["0"]`, `"segments":["0","7"]`), false, ErrInvalid},
		{"digest type", text(`"pbkdf2"`, `"pbkdf3"`), false, ErrInvalid},
		{"digest salt", text(`"salt":"AAAA`, `"salt":"`), false, ErrInvalid},
		{"token of nothing", text(`"keyslots":[],"type":"host`, `"keyslots":["3"],"type":"host`), false, ErrInvalid},
		{"token without keyslots", text(`"keyslots":[],"type":"host`, `"type":"host`), false, ErrInvalid},
		{"unknown keyslot kept", text(`"keyslots":{}`, `"keyslots":{"0":{"type":"zz","key_size":1,"area":{"type":"zz","offset":"524288","size":"4096"}}}`), false, nil},
		{"keyslot outside", text(`"keyslots":{}`, `"keyslots":{"0":{"type":"zz","key_size":1,"area":{"type":"zz","offset":"0","size":"4096"}}}`), false, ErrInvalid},
		{"keyslot wraps", text(`"keyslots":{}`, `"keyslots":{"0":{"type":"zz","key_size":1,"area":{"type":"zz","offset":"524288","size":"18446744073709551615"}}}`), false, ErrInvalid},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := bytes.Clone(formatted(t).b[:testCopy])
			tt.change(b)
			if !tt.broken {
				reseal(b)
			}
			if _, err := Decode(b, 0); !errors.Is(err, tt.want) {
				t.Errorf("Decode() error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestRequirements(t *testing.T) {
	h := testHeader()
	h.Config.Requirements = []string{"online-reencrypt-v2"}
	m := newMemory(2 * testCopy)
	if err := Format(m, h); err != nil {
		t.Fatal(err)
	}
	got, _ := read(t, m)
	if err := got.CheckRequirements(); !errors.Is(err, ErrRequirement) || !strings.Contains(err.Error(), "online-reencrypt-v2") {
		t.Errorf("CheckRequirements() = %v, want ErrRequirement that names it", err)
	}
	if err := got.CheckRequirements("online-reencrypt-v2"); err != nil {
		t.Errorf("CheckRequirements(known) = %v", err)
	}
	// A kind that is not defined must not be taken for optional.
	b := bytes.Clone(m.b[:testCopy])
	js := bytes.Replace(bytes.TrimRight(b[binarySize:], "\x00"), []byte(`"mandatory"`), []byte(`"compulsory"`), 1)
	clear(b[binarySize:])
	copy(b[binarySize:], js)
	reseal(b)
	if h, err := Decode(b, 0); err != nil || !errors.Is(h.CheckRequirements(), ErrRequirement) {
		t.Errorf("header with an unknown kind of requirement was accepted (%v)", err)
	}
}

// TestOneCopy destroys each copy in several ways and checks that the other is
// used, that it is said, and that Repair restores it.
func TestOneCopy(t *testing.T) {
	wreck := map[string]func(b []byte){
		"wiped":        func(b []byte) { clear(b) },
		"head wiped":   func(b []byte) { clear(b[:4096]) },
		"torn":         func(b []byte) { clear(b[offChecksum : offChecksum+lenChecksum]) },
		"flipped":      func(b []byte) { b[binarySize+100] ^= 4 },
		"file system":  func(b []byte) { copy(b, bytes.Repeat([]byte("not a header "), 400)) },
		"LUKS1":        func(b []byte) { copy(b[6:], "\x00\x01") },
		"other volume": func(b []byte) { b[offUUID] = 'x'; reseal(b) },
	}
	for name, f := range wreck {
		for _, off := range []int{0, testCopy} {
			t.Run(fmt.Sprintf("%s at %d", name, off), func(t *testing.T) {
				m := formatted(t)
				f(m.b[off : off+testCopy])
				h, c, err := Read(m)
				if name == "other volume" && off == 0 {
					// Two valid copies that disagree: the first is taken, and
					// the second is said to be wrong.
					if err != nil || h.UUID[0] != 'x' || c.Secondary == nil || !c.Foreign() {
						t.Fatalf("Read() = %v, %s, %v", h, c.Describe(), err)
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if bad := map[int]error{0: c.Primary, testCopy: c.Secondary}[off]; bad == nil || !c.Damaged() {
					t.Fatalf("copy at %d: no damage reported", off)
				}
				foreign := name == "file system" || name == "other volume" || name == "LUKS1"
				if c.Foreign() != foreign {
					t.Errorf("Foreign() = %v, want %v", c.Foreign(), foreign)
				}
				if foreign {
					before := bytes.Clone(m.b)
					if err := Write(m, h); err == nil || !bytes.Equal(before, m.b) {
						t.Errorf("Write over something foreign: %v", err)
					}
				}
				if err := Repair(m, h, c); err != nil {
					t.Fatal(err)
				}
				if h2, c := read(t, m); c.Damaged() || h2.SeqID != h.SeqID {
					t.Errorf("after Repair: sequence id %d, %s", h2.SeqID, c.Describe())
				}
			})
		}
	}
}

// TestRepairReadError: a good copy that can't be read for a moment is not written over.
func TestRepairReadError(t *testing.T) {
	for good, bad := range map[int]int{0: testCopy, testCopy: 0} {
		m := formatted(t)
		m.b[bad+binarySize+100] ^= 4
		before := bytes.Clone(m.b[good : good+testCopy])
		h, c := read(t, m)
		err := Repair(badSector{m, int64(good)}, h, c)
		if !bytes.Equal(before, m.b[good:good+testCopy]) {
			t.Fatalf("the good copy at %d was written over", good)
		}
		if _, c := read(t, m); err != nil || c.Damaged() {
			t.Errorf("Repair() = %v; then %s", err, c.Describe())
		}
	}
}

// A badSector can't be read at one offset.
type badSector struct {
	*memory
	at int64
}

func (m badSector) ReadAt(p []byte, off int64) (int, error) {
	if off == m.at {
		return 0, syscall.EIO
	}
	return m.memory.ReadAt(p, off)
}

// TestBadSector: a copy that can't be read is written anew, which is what mends a sector,
// unless it can be read again.
func TestBadSector(t *testing.T) {
	for _, at := range []int{0, testCopy} {
		m, good := formatted(t), testCopy-at
		h, c, err := Read(badSector{m, int64(at)})
		if err != nil || !c.Damaged() || c.Foreign() {
			t.Fatalf("unreadable at %d: %s, foreign %v, %v", at, c.Describe(), c.Foreign(), err)
		}
		h.Label = "new"
		d := &mending{badSector: badSector{m, int64(at)}}
		if err := Write(d, h); err != nil || !d.mended {
			t.Errorf("unreadable at %d: Write() = %v, mended %v", at, err, d.mended)
		}
		if got, c := read(t, m); c.Damaged() || got.Label != "new" {
			t.Errorf("unreadable at %d: %q, %s", at, got.Label, c.Describe())
		}
		// One that stays bad is no success, and costs the other copy nothing.
		m = formatted(t)
		if h, _, err = Read(m); err != nil {
			t.Fatal(err)
		}
		before := bytes.Clone(m.b[good : good+testCopy])
		if err := Write(badSector{m, int64(at)}, h); !errors.Is(err, syscall.EIO) || !bytes.Equal(before, m.b[good:good+testCopy]) {
			t.Errorf("always unreadable at %d: Write() = %v", at, err)
		}
		// One that was unreadable for a moment may be the newer.
		m = formatted(t)
		if h, c, err = Read(badSector{m, int64(at)}); err != nil {
			t.Fatal(err)
		}
		before = bytes.Clone(m.b)
		if err := Repair(m, h, c); !errors.Is(err, ErrChanged) || !bytes.Equal(before, m.b) {
			t.Errorf("unreadable at %d for a moment: Repair() = %v", at, err)
		}
	}
	// Both: there is nothing to mend with.
	if _, _, err := Read(deadDisk{}); !errors.Is(err, syscall.EIO) {
		t.Errorf("Read() of a dead disk = %v", err)
	}
}

// A mending disk has a sector that can't be read until it's written.
type mending struct {
	badSector
	mended bool
}

func (m *mending) ReadAt(p []byte, off int64) (int, error) {
	if m.mended {
		return m.memory.ReadAt(p, off)
	}
	return m.badSector.ReadAt(p, off)
}

func (m *mending) WriteAt(p []byte, off int64) (int, error) {
	m.mended = m.mended || off <= m.at && m.at < off+int64(len(p))
	return m.memory.WriteAt(p, off)
}

type deadDisk struct{}

func (deadDisk) ReadAt([]byte, int64) (int, error) { return 0, syscall.EIO }

func TestBothCopies(t *testing.T) {
	m := formatted(t)
	m.b[binarySize] ^= 1
	m.b[testCopy+binarySize] ^= 1
	if _, c, err := Read(m); !errors.Is(err, ErrChecksum) || c.Primary == nil || c.Secondary == nil {
		t.Errorf("Read() error %v, want ErrChecksum", err)
	}
	if _, _, err := Read(newMemory(1 << 20)); !errors.Is(err, ErrMagic) {
		t.Errorf("Read(zeros) error %v, want ErrMagic", err)
	}
	if _, _, err := Read(newMemory(100)); !errors.Is(err, ErrMagic) {
		t.Errorf("Read(100 bytes) error %v, want ErrMagic", err)
	}
	m = formatted(t)
	m.b = m.b[:5000] // the device was cut off
	if _, _, err := Read(m); !errors.Is(err, ErrChecksum) {
		t.Errorf("Read(truncated) error %v, want ErrChecksum", err)
	}
}

// TestConflict has two valid copies of one sequence id that differ: that's
// damage, and which of them is right isn't decided here.
func TestConflict(t *testing.T) {
	for name, off := range map[string]int{"label": testCopy + offLabel, "JSON": testCopy + binarySize + bytes.Index(formatted(t).b[binarySize:], []byte(`"y"`)) + 1} {
		m := formatted(t)
		m.b[off] ^= 1
		reseal(m.b[testCopy : 2*testCopy])
		h, c := read(t, m)
		if !c.Conflict || !c.Damaged() || !c.Foreign() || h.Label != "label" || c.Describe() == "" {
			t.Errorf("%s: %+v, label %q", name, c, h.Label)
		}
		before := bytes.Clone(m.b)
		if err := Write(m, h); err == nil || !bytes.Equal(before, m.b) {
			t.Errorf("%s: Write() = %v", name, err)
		}
		if err := Repair(m, h, c); err != nil {
			t.Fatal(err)
		}
		if _, c := read(t, m); c.Damaged() {
			t.Errorf("%s: after Repair: %s", name, c.Describe())
		}
	}
}

func TestChanged(t *testing.T) {
	m := formatted(t)
	mine, _ := read(t, m)
	theirs, _ := read(t, m)
	if err := Write(m, theirs); err != nil {
		t.Fatal(err)
	}
	before := bytes.Clone(m.b)
	if err := Write(m, mine); !errors.Is(err, ErrChanged) {
		t.Errorf("Write over a newer header: error %v, want ErrChanged", err)
	}
	if !bytes.Equal(before, m.b) {
		t.Error("the refused Write wrote")
	}
}

// TestPowerCutOneCopy updates a header of which one copy is damaged, and cuts
// the power after every write: the good copy must not be touched before the
// other is.
func TestPowerCutOneCopy(t *testing.T) {
	for _, bad := range []int{binarySize, testCopy + binarySize} {
		disk := formatted(t)
		disk.b[bad] ^= 1
		old := bytes.Clone(disk.b)
		h, _ := read(t, disk)
		if err := Write(disk, h); err != nil {
			t.Fatal(err)
		}
		for i := range disk.writes {
			cut := &memory{b: bytes.Clone(old)}
			for _, w := range disk.writes[:i] {
				copy(cut.b[w.off:], w.b)
			}
			if _, _, err := Read(cut); err != nil {
				t.Errorf("copy with byte %d damaged, power cut after %d writes: %v", bad, i, err)
			}
		}
	}
}

// TestPowerCut stops an update after every write, and inside each write after
// every 512 bytes, and checks that the header read afterwards is the old or
// the new one, that both stay readable through a repair, and that the old one
// is never seen again after the new one was durable.
func TestPowerCut(t *testing.T) {
	before := formatted(t)
	old := bytes.Clone(before.b)
	h, _ := read(t, before)
	h.Label = "new"
	if err := Write(before, h); err != nil {
		t.Fatal(err)
	}
	writes := before.writes
	if len(writes) != 6 {
		t.Fatalf("an update is %d writes, want 6", len(writes))
	}
	seenNew := false
	for i, w := range writes {
		for torn := 0; torn <= len(w.b); torn += 512 {
			if torn > 8192 && torn < len(w.b)-8192 {
				continue // the inside of the JSON area is zeros
			}
			disk := &memory{b: bytes.Clone(old)}
			for _, done := range writes[:i] {
				copy(disk.b[done.off:], done.b)
			}
			copy(disk.b[w.off:], w.b[:torn])

			got, c, err := Read(disk)
			if err != nil {
				t.Fatalf("write %d, %d bytes: %v", i, torn, err)
			}
			isNew := got.Label == "new" && got.SeqID == 2
			if !isNew && (got.Label != "label" || got.SeqID != 1) {
				t.Fatalf("write %d, %d bytes: label %q, sequence id %d", i, torn, got.Label, got.SeqID)
			}
			if seenNew && !isNew {
				t.Fatalf("write %d, %d bytes: the old header came back", i, torn)
			}
			seenNew = seenNew || isNew
			if c.Foreign() {
				t.Errorf("write %d, %d bytes: a torn update is taken for foreign data", i, torn)
			}
			if err := Repair(disk, got, c); err != nil {
				t.Fatal(err)
			}
			if again, c := read(t, disk); c.Damaged() || again.Label != got.Label {
				t.Fatalf("write %d, %d bytes: after repair: %s", i, torn, c.Describe())
			}
		}
	}
	if !seenNew {
		t.Error("the new header was never seen")
	}
}

// TestDiskError fails each operation of an update in turn.
func TestDiskError(t *testing.T) {
	for n := 1; n <= 8; n++ {
		m := formatted(t)
		h, _ := read(t, m)
		m.failAt = n
		if err := Write(m, h); !errors.Is(err, errDisk) {
			t.Errorf("operation %d fails: Write error %v", n, err)
		}
		if _, _, err := Read(m); err != nil {
			t.Errorf("operation %d fails: no header left: %v", n, err)
		}
	}
}

func TestFreeArea(t *testing.T) {
	h := testHeader()
	const slot = 258048
	want := []uint64{524288, 524288 + slot, 524288 + 2*slot}
	for i, w := range want {
		off, err := h.FreeArea(slot)
		if err != nil || off != w {
			t.Fatalf("FreeArea %d = %d, %v, want %d", i, off, err, w)
		}
		h.Keyslots[i] = &Keyslot{Type: "luks2", Area: Area{Offset: off, Size: slot}}
	}
	delete(h.Keyslots, 1)
	if off, err := h.FreeArea(slot); err != nil || off != want[1] {
		t.Errorf("FreeArea in a gap = %d, %v, want %d", off, err, want[1])
	}
	if _, err := h.FreeArea(testData); err == nil {
		t.Error("FreeArea larger than the whole area succeeded")
	}
}

// cryptsetup runs cryptsetup and returns what it printed.
func cryptsetup(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("cryptsetup", args...).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Fatal("cryptsetup is not installed (Debian package cryptsetup-bin); run make deps")
	}
	if err != nil {
		t.Fatalf("cryptsetup %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// TestCryptsetupReadsOurs lets cryptsetup and blkid judge a header of ours,
// also after cryptsetup has rewritten it.
func TestCryptsetupReadsOurs(t *testing.T) {
	name := filepath.Join(t.TempDir(), "ours.img")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(20 << 20); err != nil {
		t.Fatal(err)
	}
	if err := Format(f, testHeader()); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "isLuks", "--type", "luks2", name)
	dump := cryptsetup(t, "luksDump", name)
	for _, want := range []string{"11111111-2222-3333-4444-555555555555", "hostcryptd-test", "aes-xts-plain64", "sector: 4096 [bytes]", "Subsystem:     \thostcryptd"} {
		if !strings.Contains(dump, want) {
			t.Errorf("luksDump does not show %q:\n%s", want, dump)
		}
	}
	cryptsetup(t, "config", name, "--label", "theirs")
	h, c := read(t, f)
	if h.Label != "theirs" || c.Damaged() {
		t.Errorf("after cryptsetup config: label %q, %s", h.Label, c.Describe())
	}
	if tok, _ := h.Tokens[0].MarshalJSON(); !bytes.Contains(tok, []byte(`"y":[1,2]`)) {
		t.Errorf("token after cryptsetup's rewrite: %s", tok)
	}
	if err := Write(f, h); err != nil {
		t.Fatal(err)
	}
	cryptsetup(t, "luksDump", name)
}

// TestCryptsetupHeaders reads headers that cryptsetup makes, of every size,
// and checks that Encode gives its JSON back in meaning.
func TestCryptsetupHeaders(t *testing.T) {
	dir := t.TempDir()
	pw := filepath.Join(dir, "pw")
	if err := os.WriteFile(pw, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, kib := range []int{16, 256, 4096} {
		for _, pbkdf := range []string{"argon2id", "pbkdf2"} {
			t.Run(fmt.Sprintf("%dk %s", kib, pbkdf), func(t *testing.T) {
				name := filepath.Join(t.TempDir(), "theirs.img")
				f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := f.Truncate(32 << 20); err != nil {
					t.Fatal(err)
				}
				args := []string{"luksFormat", "--type", "luks2", "-q", "--cipher", "aes-xts-plain64", "--key-size", "512",
					"--sector-size", "512", "--luks2-metadata-size", fmt.Sprintf("%dk", kib), "--pbkdf", pbkdf}
				if pbkdf == "argon2id" {
					args = append(args, "--pbkdf-force-iterations", "4", "--pbkdf-memory", "32", "--pbkdf-parallel", "1")
				} else {
					args = append(args, "--pbkdf-force-iterations", "1000")
				}
				cryptsetup(t, append(args, name, pw)...)
				h, c := read(t, f)
				if c.Damaged() || h.Size != uint64(kib)<<10 || len(h.Keyslots) != 1 || h.Keyslots[0].KDF.Type != pbkdf {
					t.Fatalf("read %+v, %s", h, c.Describe())
				}
				raw := make([]byte, h.Size)
				if _, err := f.ReadAt(raw, 0); err != nil {
					t.Fatal(err)
				}
				enc, err := h.Encode(0)
				if err != nil {
					t.Fatal(err)
				}
				var a, b any
				if err := errors.Join(json.Unmarshal(bytes.TrimRight(raw[binarySize:], "\x00"), &a), json.Unmarshal(bytes.TrimRight(enc[binarySize:], "\x00"), &b)); err != nil {
					t.Fatal(err)
				}
				if !reflect.DeepEqual(a, b) {
					t.Errorf("JSON changed:\n%v\n%v", a, b)
				}
				if err := Write(f, h); err != nil {
					t.Fatal(err)
				}
				cryptsetup(t, "open", "--test-passphrase", "--key-file", pw, name)
			})
		}
	}
}

// TestLockExcludesCryptsetup holds the lock and sees cryptsetup wait for it.
func TestLockExcludesCryptsetup(t *testing.T) {
	name := filepath.Join(t.TempDir(), "d.img")
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Truncate(20<<20), Format(f, testHeader())); err != nil {
		t.Fatal(err)
	}
	unlock, err := Lock(t.Context(), f, true)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "cryptsetup", "luksDump", name)
	if err := cmd.Start(); err != nil {
		t.Fatalf("cryptsetup (Debian package cryptsetup-bin, make deps): %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		t.Errorf("cryptsetup read the header while it was locked (%v)", err)
	case <-time.After(500 * time.Millisecond):
	}
	unlock()
	if err := <-done; err != nil {
		t.Errorf("cryptsetup after unlock: %v", err)
	}

	// Two locks of one process exclude each other, too.
	unlock, err = Lock(t.Context(), f, false)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan func())
	go func() {
		u, err := Lock(t.Context(), f, true)
		if err != nil {
			t.Error(err)
			u = func() {}
		}
		got <- u
	}()
	select {
	case <-got:
		t.Error("exclusive lock granted beside a shared one")
	case <-time.After(100 * time.Millisecond):
		unlock()
		(<-got)()
	}
}

func FuzzDecode(f *testing.F) {
	seed, err := testHeader().Encode(0)
	if err != nil {
		f.Fatal(err)
	}
	js := bytes.TrimRight(seed[binarySize:], "\x00")
	f.Add(js)
	f.Add([]byte(`{"keyslots":{},"tokens":{},"segments":{},"digests":{},"config":{}}`))
	f.Fuzz(func(t *testing.T, js []byte) {
		if len(js) > testCopy-binarySize-1 {
			return
		}
		b := bytes.Clone(seed)
		clear(b[binarySize:])
		copy(b[binarySize:], js)
		reseal(b)
		h, err := Decode(b, 0)
		if err != nil {
			return
		}
		enc, err := h.Encode(0)
		if err != nil {
			if strings.Contains(err.Error(), "room for") {
				return // escapes may take more room than they had
			}
			t.Fatalf("decoded, but can't be encoded: %v", err)
		}
		again, err := Decode(enc, 0)
		if err != nil {
			t.Fatalf("encoded, but can't be decoded: %v", err)
		}
		if len(again.Segments) != len(h.Segments) || len(again.Tokens) != len(h.Tokens) || !maps.EqualFunc(h.Segments, again.Segments, func(a, b *Segment) bool {
			a.raw, b.raw = nil, nil
			return reflect.DeepEqual(a, b)
		}) {
			t.Errorf("%+v\n%+v", h, again)
		}
	})
}
