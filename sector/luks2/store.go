package luks2

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"unsafe"
)

// A File is the backing device as far as the header needs it. All reads and
// writes are multiples of 4096 bytes at multiples of 4096, into memory that is
// aligned so, which suits O_DIRECT. Sync makes what was written durable.
type File interface {
	io.ReaderAt
	io.WriterAt
	Sync() error
}

// Copies tells what [Read] found in the two places where a header can stand.
type Copies struct {
	// Primary and Secondary say what is wrong with each copy; nil is a valid
	// one. A valid copy may still be behind: see Stale.
	Primary, Secondary error
	// Stale means that both copies are valid and one has a lower sequence id:
	// power failed between the two halves of an update.
	Stale bool
	// Conflict means that both copies are valid, have the same sequence id and
	// differ, which no interrupted update leaves behind: two programs wrote at
	// once, or somebody edited one. The first is used.
	Conflict bool

	foreign bool // the damaged copy holds something else than a damaged copy
	second  bool // the header that was returned is the second copy's
}

// Damaged tells whether [Repair] has something to do.
func (c Copies) Damaged() bool {
	return c.Primary != nil || c.Secondary != nil || c.Stale || c.Conflict
}

// Foreign tells whether something else stands in the place of the bad copy: a
// partition table, the start of a file system, the header of another volume or
// of another format. A repair would destroy that, so it should be a person's
// decision. A copy that only fails its checksum, or is wiped, is not foreign, nor is
// one in a sector that can't be read, which is mended by writing it.
func (c Copies) Foreign() bool { return c.foreign }

// Describe says in words for people what is wrong, or "" when nothing is.
func (c Copies) Describe() string {
	switch {
	case c.Primary != nil && c.Secondary != nil:
		return fmt.Sprintf("both header copies are unusable (first: %v; second: %v)", c.Primary, c.Secondary)
	case c.Primary != nil:
		return fmt.Sprintf("the first header copy is damaged (%v); the second is good", c.Primary)
	case c.Secondary != nil:
		return fmt.Sprintf("the second header copy is damaged (%v); the first is good", c.Secondary)
	case c.Stale:
		return "one header copy is an update behind the other"
	case c.Conflict:
		return "the header copies have the same sequence id and differ; the first is used"
	}
	return ""
}

// Read returns the header of a backing device: the valid copy, or of two valid
// copies the one with the higher sequence id. It never writes; what it found
// is in Copies, and [Repair] acts on it. If no copy is valid, the error wraps
// the reason of the first copy, or of the second when that says more.
func Read(f io.ReaderAt) (*Header, Copies, error) {
	var c Copies
	first, err := readCopy(f, 0)
	c.Primary = err

	// The second copy stands at the size of a copy. Only if the first can't
	// tell, every size that the format knows is tried, as cryptsetup does.
	var second *Header
	c.Secondary = fmt.Errorf("luks2: second copy: %w", ErrMagic)
	offsets := validSizes
	if first != nil {
		offsets = []uint64{first.Size}
	}
	for _, off := range offsets {
		h, err := readCopy(f, off)
		if h != nil || !errors.Is(err, ErrMagic) || len(offsets) == 1 {
			second, c.Secondary = h, err
		}
		if h != nil {
			break
		}
	}

	switch {
	case first != nil && second != nil:
		// The copies of one header have one UUID and size. If they don't, the
		// second is a leftover of another header.
		if first.UUID != second.UUID || first.Size != second.Size {
			c.Secondary = fmt.Errorf("luks2: second copy: %w: it belongs to volume %q, the first to %q", ErrInvalid, second.UUID, first.UUID)
			c.foreign = true
			return first, c, nil
		}
		first.salts[1], second.salts[0] = second.salts[1], first.salts[0]
		c.Stale = first.SeqID != second.SeqID
		if !c.Stale && !first.sameAs(second) {
			// Which of them is right is for a person to say.
			c.Conflict, c.foreign = true, true
		}
		if second.SeqID > first.SeqID {
			c.second = true
			return second, c, nil
		}
		return first, c, nil
	case first != nil:
		first.newSalt(first.Size) // the damaged copy's is lost
		c.foreign = !repairable(f, c.Secondary, int64(first.Size))
		return first, c, nil
	case second != nil:
		second.newSalt(0)
		c.second = true
		c.foreign = !repairable(f, c.Primary, 0)
		return second, c, nil
	}
	err = c.Primary
	if errors.Is(err, ErrMagic) && !errors.Is(c.Secondary, ErrMagic) {
		err = c.Secondary
	}
	return nil, c, err
}

// sameAs tells whether two copies of one header say the same.
func (h *Header) sameAs(other *Header) bool {
	a, err1 := h.encodeJSON()
	b, err2 := other.encodeJSON()
	return err1 == nil && err2 == nil && bytes.Equal(a, b) && h.Label == other.Label && h.Subsystem == other.Subsystem
}

// Sum tells headers apart by all that they say, whichever copy they came from, and by
// their sequence ids.
func (h *Header) Sum() (sum [sha256.Size]byte, err error) {
	js, err := h.encodeJSON()
	if err != nil {
		return sum, err
	}
	s := sha256.New()
	fmt.Fprintf(s, "%d %d %q %q %q ", h.Size, h.SeqID, h.UUID, h.Label, h.Subsystem)
	s.Write(js)
	return [sha256.Size]byte(s.Sum(nil)), nil
}

// Remnant tells whether page is the binary header of a copy of that volume, whatever its
// checksum, and nothing else: many file systems leave the first 512 bytes alone.
func Remnant(page []byte, uuid string) bool {
	for _, offset := range []uint64{0, 1} {
		if _, err := sizeOf(page, offset); err == nil {
			return cstring(page[offUUID:offUUID+uuidBytes]) == uuid && len(bytes.TrimLeft(page[binaryUsed:], "\x00")) == 0
		}
	}
	return false
}

// repairable tells whether what stands at offset, for which reading a copy gave
// err, is what is left of a copy: one whose checksum is wrong, or zeros, or what
// can't be read.
func repairable(f io.ReaderAt, err error, offset int64) bool {
	return errors.Is(err, ErrChecksum) || unreadable(err) || errors.Is(err, ErrMagic) && zeroAt(f, offset)
}

// A readError is that of the device, not of what it holds.
type readError struct{ error }

func (e readError) Unwrap() error { return e.error }

func unreadable(err error) bool {
	_, ok := errors.AsType[readError](err)
	return ok
}

// readCopy reads the copy at an offset.
func readCopy(f io.ReaderAt, offset uint64) (*Header, error) {
	b := pages(binarySize)
	if _, err := f.ReadAt(b, int64(offset)); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrMagic // the device ends before a header could
		} else {
			err = readError{err}
		}
		return nil, fmt.Errorf("luks2: reading the copy at %d: %w", offset, err)
	}
	size, err := sizeOf(b, offset)
	if err != nil {
		return nil, fmt.Errorf("luks2: copy at %d: %w", offset, err)
	}
	b = pages(int(size))
	if _, err := f.ReadAt(b, int64(offset)); err != nil {
		if errors.Is(err, io.EOF) {
			err = ErrChecksum
		} else {
			err = readError{err}
		}
		return nil, fmt.Errorf("luks2: reading the copy at %d: %w", offset, err)
	}
	return Decode(b, offset)
}

// zeroAt tells whether the binary header at an offset is all zeros: wiped, and
// so nobody's.
func zeroAt(f io.ReaderAt, offset int64) bool {
	b := pages(binarySize)
	if _, err := f.ReadAt(b, offset); err != nil {
		return false
	}
	return len(bytes.TrimLeft(b, "\x00")) == 0
}

// Write replaces the header on f by h, which must have been read from f (or
// was made by [Format]). It raises h.SeqID by one.
//
// Each copy is written as cryptsetup does it: first the binary header without
// its checksum, so that the copy is invalid until the end, then the JSON area,
// then the binary header with the checksum, then a flush; the first copy
// before the second. So at any moment one copy is whole, and it is the new one
// as soon as the first flush has returned.
//
// A copy that is damaged or behind is repaired before; if something else stands
// in its place ([Copies.Foreign]), nothing is written.
//
// If the sequence id on the device is no longer the one that h was read with,
// nothing is written and the error is [ErrChanged]. Callers hold [Lock], so
// only programs that don't can cause it.
func Write(f File, h *Header) error {
	if err := h.Validate(); err != nil {
		return fmt.Errorf("luks2: writing: %w", err)
	}
	current, copies, err := Read(f)
	if err != nil {
		return fmt.Errorf("luks2: writing: reading the header it replaces: %w", err)
	}
	if current.SeqID != h.SeqID || current.UUID != h.UUID {
		return fmt.Errorf("luks2: writing: %w: sequence id is %d, was %d", ErrChanged, current.SeqID, h.SeqID)
	}
	// The first copy is written first, and is invalid meanwhile. So the second
	// must be good before.
	if copies.Foreign() {
		return fmt.Errorf("luks2: writing: %w; run 'cryptsetup repair' first", errors.New(copies.Describe()))
	}
	if err := Repair(f, current, copies); err != nil {
		return err
	}
	h.SeqID++
	if err := writeBoth(f, h); err != nil {
		h.SeqID-- // so that a retry compares with what the device may still hold
		return err
	}
	return nil
}

// Format writes h to a device that has no header, or one that is to be
// forgotten, with sequence id 1 and new salts.
func Format(f File, h *Header) error {
	h.SeqID = 1
	h.newSalt(0)
	h.newSalt(h.Size)
	return writeBoth(f, h)
}

// Repair makes both copies equal to h, the header that [Read] returned
// together with c, by rewriting the copy that is damaged or behind with a new
// salt. It does nothing when c has no damage. The error is [ErrChanged] if that copy
// could not be read and can be now: it may be the newer one.
func Repair(f File, h *Header, c Copies) error {
	if !c.Damaged() {
		return nil
	}
	bad, why := h.Size, c.Secondary
	if c.second {
		bad, why = 0, c.Primary
	}
	if unreadable(why) {
		if _, err := readCopy(f, bad); !unreadable(err) {
			return fmt.Errorf("luks2: repairing: %w: the copy at %d could not be read, and can be now", ErrChanged, bad)
		}
	}
	h.newSalt(bad)
	return writeCopy(f, h, bad)
}

// Put writes h over whatever stands in the place of the two copies: h was on f, and is
// to be there again. It raises h.SeqID above its own and that of each copy of the same
// volume that it finds, so h counts as soon as its first copy is whole. It keeps a part
// of nothing else, so what must not be lost was saved before.
func Put(f File, h *Header) error {
	if err := h.Validate(); err != nil {
		return fmt.Errorf("luks2: writing: %w", err)
	}
	before, last := h.SeqID, h.SeqID
	for _, offset := range []uint64{0, h.Size} {
		if c, err := readCopy(f, offset); err == nil && c.UUID == h.UUID {
			last = max(last, c.SeqID)
		}
	}
	h.SeqID = last + 1
	if err := writeBoth(f, h); err != nil {
		h.SeqID = before
		return err
	}
	return nil
}

func writeBoth(f File, h *Header) error {
	if err := writeCopy(f, h, 0); err != nil {
		return err
	}
	return writeCopy(f, h, h.Size)
}

// writeCopy writes one copy and reads it back.
func writeCopy(f File, h *Header, offset uint64) error {
	enc, err := h.Encode(offset)
	if err != nil {
		return err
	}
	b := pages(len(enc))
	copy(b, enc)

	fail := func(err error) error {
		return fmt.Errorf("luks2: writing the copy at %d: %w", offset, err)
	}
	sum := bytes.Clone(b[offChecksum : offChecksum+lenChecksum])
	clear(b[offChecksum : offChecksum+lenChecksum])
	if _, err := f.WriteAt(b[:binarySize], int64(offset)); err != nil {
		return fail(err)
	}
	if _, err := f.WriteAt(b[binarySize:], int64(offset)+binarySize); err != nil {
		return fail(err)
	}
	copy(b[offChecksum:], sum)
	if _, err := f.WriteAt(b[:binarySize], int64(offset)); err != nil {
		return fail(err)
	}
	if err := f.Sync(); err != nil {
		return fail(err)
	}
	// The other copy is about to be replaced on the strength of this one.
	if _, err := readCopy(f, offset); err != nil {
		return fail(fmt.Errorf("reading it back: %w", err))
	}
	return nil
}

// pages returns zeroed memory that starts at a multiple of 4096.
func pages(n int) []byte {
	b := make([]byte, n+areaMultiple)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (areaMultiple - 1)
	return b[skip : skip+n : skip+n]
}
