package sector

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"hostcryptd/sector/luks2"
)

// A volume that is served needs no header on its disk before it is to be opened again.
// So if something has overwritten the header, its server has the last key to the data,
// and what it keeps of the header is the last copy of that. [Volume.RepairHeader] writes
// it back:
//
//  1. A look at the header ([Volume.Tokens]) judges what is on the disk. What is
//     authentic there, and newer, is what is kept from then on.
//  2. Under the lock on the header it is read again. If it's the one that is known, at
//     most a copy of it, and its keyslots, are repaired. Another one must be the one that
//     was judged and refused. One that says that it is newer is overwritten only if a
//     person says so.
//  3. What is kept must be what is known, and not older than what this host has seen: a
//     way in that was removed must not come back.
//  4. What would be overwritten must be nobody's, or be saved before.
//  5. The keyslots are written, flushed, then the copies of the header, one after the
//     other, each flushed and read back. So a valid copy has its keyslots at any moment.

// A keptHeader is the newest header that was known, with its keyslots, as it stood on the
// disk.
type keptHeader struct {
	// f is the header area without what is in no copy and no keyslot: a memfd with holes.
	// None of it is secret, so it's in no locked memory, and nobody maps it; the next
	// server can have it from who has its descriptor. It takes the length of the JSON
	// twice and, of a recovery keyslot, 252 KiB: 272 KiB for a volume with one, and never
	// more than maxKeptAreas and two copies.
	f *os.File

	slots  map[int]*luks2.Keyslot // of the header
	sum    [sha256.Size]byte      // see luks2.Header.Sum
	digest string                 // as in Known
	seen   time.Time              // when it was on the disk last; guarded by refreshing
}

// maxKeptAreas bounds what is kept of keyslots, in bytes: all that a header can have of
// the kind that hostcryptd and cryptsetup make for a volume. Beyond that they are left
// out, which a repair tells.
const maxKeptAreas = luks2.MaxKeyslots * keyslotAreaSize

// keepTimeout is how long the lock on the header is waited for in order to keep it, which
// holds up whoever opens a volume. The next look tries again.
const keepTimeout = 2 * time.Second

// keptSlots lists the keyslots of which the areas are kept.
func keptSlots(h *luks2.Header) []int {
	room := uint64(maxKeptAreas)
	return slices.DeleteFunc(keyslotIDs(h), func(id int) bool {
		a := h.Keyslots[id].Area
		if a.Offset%backupPage != 0 || a.Size%backupPage != 0 || a.Size > room {
			return true
		}
		room -= a.Size
		return false
	})
}

// newKept copies h, which is on b. What old has of its keyslots is taken from there: the
// disk's may be damaged since, and nobody changes one without a new salt. The caller has
// locked the header.
func newKept(b Backing, h *luks2.Header, old *keptHeader) (_ *keptHeader, err error) {
	fd, err := unix.MemfdCreate("hostcryptd-header", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("sector: memory for the header: %w", err)
	}
	k := &keptHeader{f: os.NewFile(uintptr(fd), "header"), slots: h.Keyslots, seen: time.Now()}
	defer func() {
		if err != nil {
			k.f.Close()
		}
	}()
	if k.sum, err = h.Sum(); err != nil {
		return nil, err
	}
	if err := k.f.Truncate(headerArea(h)); err != nil {
		return nil, err
	}
	for _, offset := range []uint64{0, h.Size} {
		c, err := h.Encode(offset)
		if err != nil {
			return nil, err
		}
		for i := 0; i < len(c); i += backupPage {
			page := c[i : i+backupPage]
			if isZero(page) {
				continue // stays a hole
			}
			if _, err := k.f.WriteAt(page, int64(offset)+int64(i)); err != nil {
				return nil, err
			}
		}
	}
	for _, id := range keptSlots(h) {
		a := h.Keyslots[id].Area
		area := old.slot(id, h.Keyslots[id])
		if area == nil {
			area = alignedBytes(int(a.Size))
			if readFull(b, area, int64(a.Offset)) != nil {
				continue // zeros, which are no keyslot
			}
		}
		if _, err := k.f.WriteAt(area, int64(a.Offset)); err != nil {
			return nil, err
		}
	}
	_, v, err := findVolumeToken(h)
	if err == nil {
		k.digest, err = digestHeader(h, v)
	}
	return k, err
}

// area returns what is kept of a keyslot, or nil.
func (k *keptHeader) area(a luks2.Area) ([]byte, error) {
	b := alignedBytes(int(a.Size))
	if _, err := k.f.ReadAt(b, int64(a.Offset)); err != nil {
		return nil, err
	}
	if isZero(b) {
		return nil, nil
	}
	return b, nil
}

// slot returns what is kept of a keyslot of another header, or nil if that has another
// one of that number, or there is nothing.
func (k *keptHeader) slot(id int, s *luks2.Keyslot) []byte {
	if k == nil || k.slots[id] == nil {
		return nil
	}
	is := k.slots[id]
	if is.Area.Offset != s.Area.Offset || is.Area.Size != s.Area.Size || !bytes.Equal(is.KDF.Salt, s.KDF.Salt) {
		return nil
	}
	area, err := k.area(s.Area)
	if err != nil {
		return nil
	}
	return area
}

func isZero(b []byte) bool { return len(bytes.TrimLeft(b, "\x00")) == 0 }

// keep makes h, which has just become the one that is known, the one that is kept. The
// caller holds refreshing, or nobody else has the volume yet. If it can't be, the one
// that was is not the one that is known, and so no good for a repair.
func (v *Volume) keep(ctx context.Context, h *luks2.Header) {
	sum, err := h.Sum()
	if err != nil || v.forgotten.Load() {
		return
	}
	if k := v.kept.Load(); k != nil && k.sum == sum {
		k.seen = time.Now()
		return
	}
	ctx, cancel := context.WithTimeout(ctx, keepTimeout)
	defer cancel()
	release, err := v.b.LockHeader(ctx, false)
	if err != nil {
		return
	}
	defer release()
	h, _, err = readHeader(v.b)
	if err != nil {
		return
	}
	if again, err := h.Sum(); err != nil || again != sum {
		return // the next look finds it
	}
	old := v.kept.Load()
	if v.Waiting() {
		old = nil // it may be in swap on this very volume, and reading it would wait for that
	}
	if k, err := newKept(v.b, h, old); err == nil {
		v.setKept(k)
	}
}

// setKept replaces what is kept. What was kept before is gone for all who have its
// descriptor: it may have a way in that was removed.
func (v *Volume) setKept(k *keptHeader) {
	if old := v.kept.Swap(k); old != nil {
		_ = old.f.Truncate(0)
	}
	if v.forgotten.Load() {
		v.dropKept()
	}
}

func (v *Volume) dropKept() {
	if k := v.kept.Swap(nil); k != nil {
		_ = k.f.Truncate(0)
	}
}

// KeptHeader is the descriptor of memory that holds the newest authentic header and its
// keyslots, for [Volume.TakeKept] of the next process; nil if there is none. It changes
// when the header does.
func (v *Volume) KeptHeader() *os.File {
	if k := v.kept.Load(); k != nil {
		return k.f
	}
	return nil
}

// TakeKept takes over what the process before has kept, if it's what is known of the
// header and nothing is kept yet. It takes over f, and reads it, which may wait for swap:
// where that is on this very volume, it has to be served before.
func (v *Volume) TakeKept(f *os.File) error {
	v.refreshing.Lock()
	defer v.refreshing.Unlock()
	if v.kept.Load() != nil { // a look was faster
		return f.Close()
	}
	known := v.known.Load()
	h, _, err := luks2.Read(f)
	if err != nil {
		err = fmt.Errorf("sector: the header that was kept: %w", err)
	} else if known == nil {
		err = errors.New("sector: the header that was kept is not known to be authentic")
	}
	k := &keptHeader{f: f}
	if err == nil {
		k.slots = h.Keyslots
		k.sum, err = h.Sum()
	}
	var t *volumeToken
	if err == nil {
		t, err = supported(h)
	}
	if err == nil {
		k.digest, err = digestHeader(h, t)
	}
	if err == nil && k.digest != known.Digest {
		err = errors.New("sector: the header that was kept is not the one that is known")
	}
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if fi, err := f.Stat(); err == nil {
		k.seen = fi.ModTime()
	}
	v.setKept(k)
	return nil
}

// StopRepairs returns when no [Volume.RepairHeader] is under way, and none begins after.
func (v *Volume) StopRepairs() {
	v.endOnce.Do(func() { close(v.ended) })
	v.repairing.Lock()
	defer v.repairing.Unlock() // it's held by who is under way
}

// ForgetHeader drops what is kept of the header, for whoever has its descriptor, and
// keeps nothing from then on: it is for a header that is about to be erased.
func (v *Volume) ForgetHeader() {
	v.forgotten.Store(true)
	v.repairing.Lock()
	defer v.repairing.Unlock()
	v.dropKept()
}

// RepairOptions say what a repair may do.
type RepairOptions struct {
	DryRun bool // nothing is written
	// Force permits to overwrite something else, of which Saved shows that it isn't
	// lost: the SHA-256, in hexadecimal, of the first Area bytes of the backing device.
	Force bool
	Saved string
}

// A HeaderRepair is what a repair has done, or would do.
type HeaderRepair struct {
	Problem    string    `json:"problem"`    // what is wrong with the header on the disk; "" if nothing is
	Whole      bool      `json:"whole"`      // all of it is written from memory, not one copy from the other
	Foreign    bool      `json:"foreign"`    // something else stands where it is written
	Area       int64     `json:"area"`       // bytes at the start of the device that what is written lies in
	Generation uint64    `json:"generation"` // of the header that is written
	Seen       time.Time `json:"seen"`       // when that was on the disk last, as far as is known
	Keyslots   []int     `json:"keyslots"`   // that are written
	Missing    []int     `json:"missing"`    // that aren't: their areas were too large to be kept, or could not be read

	header *luks2.Header
	copies luks2.Copies
	none   bool    // no copy of a header could be read
	unread []int64 // pages that are written over and could not be read
}

// RepairHeader puts the header that is known back on the disk where it is not, or not
// whole, any more: damaged, overwritten, or replaced by one that isn't authentic. It
// needs no key, so the volume may be suspended, and writes to the disk of one that has
// failed too. [Volume.Tokens] must have looked at the header just before.
//
// What can't be read, zeros, what is left of the volume's own header, and what is to be
// written anyway may be overwritten. Something else may be with Force and Saved only;
// else the error is [ErrDamaged]. It is [ErrAuth] if the header that is kept isn't the
// newest that this host has seen, and [luks2.ErrChanged] if another was written
// meanwhile, something else than was saved stands there, or what could not be read can be
// again. After another error it can be repeated.
func (v *Volume) RepairHeader(ctx context.Context, o OpenOptions, r RepairOptions) (HeaderRepair, error) {
	v.refreshing.Lock()
	defer v.refreshing.Unlock()
	v.repairing.Lock()
	defer v.repairing.Unlock()
	waiting, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-v.ended:
			cancel(ErrClosed)
		case <-waiting.Done():
		}
	}()
	release, err := v.b.LockHeader(waiting, !r.DryRun)
	if err != nil {
		return HeaderRepair{}, err
	}
	defer release()
	select {
	case <-v.ended:
		return HeaderRepair{}, ErrClosed
	default:
	}
	p, k, err := v.planRepair(o)
	if err != nil || p.Problem == "" || r.DryRun {
		return p, err
	}
	if p.Foreign && (!r.Force || r.Saved == "") {
		return p, fmt.Errorf("%w: %s; something else stands where it would be written, which has to be saved first", ErrDamaged, p.Problem)
	}
	if r.Saved != "" {
		sum, err := v.sumOf(p.Area)
		if err != nil {
			return p, err
		}
		if sum != r.Saved {
			return p, fmt.Errorf("%w: the device holds something else than was saved; nothing was overwritten; run this again", luks2.ErrChanged)
		}
	}
	if err := v.stillUnread(p); err != nil {
		return p, err
	}
	// From here on it is not given up: half a header is none.
	b := failing{v}
	if err = v.putKeyslots(b, k, p); err == nil && p.Whole {
		err = luks2.Put(b, p.header)
	} else if err == nil {
		err = luks2.Repair(b, p.header, p.copies)
	}
	if err != nil {
		return p, fmt.Errorf("sector: repairing the header; repeat it: %w", err)
	}
	h, copies, err := readHeader(v.b)
	switch {
	case err != nil:
		return p, fmt.Errorf("sector: reading back the header: %w", err)
	case copies.Damaged():
		return p, fmt.Errorf("%w: reading back the header: %s", ErrDamaged, copies.Describe())
	case !v.Knows(h):
		return p, fmt.Errorf("%w: the header reads back as another one than was written", ErrDamaged)
	}
	if k, err := newKept(v.b, h, v.kept.Load()); err == nil { // with its new sequence id
		v.setKept(k)
	}
	return p, nil
}

// failing is the backing device of a volume, which has failed if a flush of it fails,
// whoever has asked for that: the error may be about what was written before.
type failing struct{ v *Volume }

func (f failing) ReadAt(p []byte, off int64) (int, error)  { return f.v.b.ReadAt(p, off) }
func (f failing) WriteAt(p []byte, off int64) (int, error) { return f.v.b.WriteAt(p, off) }
func (f failing) Sync() error {
	f.v.flush.begin()
	defer f.v.flush.end()
	err := f.v.b.Sync()
	if err != nil {
		f.v.flush.fail()
	}
	return err
}

// planRepair looks what there is to do. The caller has locked the header.
func (v *Volume) planRepair(o OpenOptions) (p HeaderRepair, k *keptHeader, err error) {
	h, copies, err := readHeader(v.b)
	switch {
	case err == nil && v.Knows(h):
		p.header, p.copies, p.Problem, p.Foreign = h, copies, copies.Describe(), copies.Foreign()
		p.Area, p.Seen = headerArea(h), time.Now()
		if p.Generation, err = Generation(h); err != nil {
			return p, nil, err
		}
		k = v.kept.Load()
		v.planKeyslots(&p, k)
		return p, k, nil
	case err == nil:
		// What is refused here may be the newest, made by who has told nobody of it.
		if sum, err := h.Sum(); err != nil || sum != v.looked.sum || v.looked.err == nil {
			return p, nil, fmt.Errorf("the header on the disk is another one: %w meanwhile; run this again", luks2.ErrChanged)
		}
		p.Problem, p.Foreign = v.looked.err.Error(), true
	default:
		p.Problem, p.none = copies.Describe(), true
	}

	const copyData = "copy the data while the volume is served, or stop it and 'hostcryptd header restore' a backup"
	p.Whole = true
	k, known := v.kept.Load(), v.known.Load()
	if k == nil || known == nil || k.digest != known.Digest {
		return p, nil, fmt.Errorf("%w: %s; this server has no copy of the header; %s", ErrNotVolume, p.Problem, copyData)
	}
	if p.header, _, err = luks2.Read(k.f); err != nil {
		return p, nil, fmt.Errorf("sector: the header that was kept: %w", err)
	}
	if p.Generation, err = Generation(p.header); err != nil {
		return p, nil, err
	}
	newer := false
	if h != nil && h.UUID == v.uuid {
		is, err := Generation(h)
		if errors.Is(v.looked.err, ErrUnsupported) || errors.Is(err, ErrUnsupported) {
			return p, nil, fmt.Errorf("the header on the disk says that another program has changed the volume, so it is left alone: %w; if none has, save the first %d bytes of the device, overwrite them with zeros and run this again", v.looked.err, 2*p.header.Size)
		}
		// Each change with the volume key raises the generation. Whoever can write to the
		// disk can claim a high one, which is no reason to refuse a person who says that
		// none was made elsewhere.
		if newer = err == nil && is > p.Generation; newer {
			p.Problem = fmt.Sprintf("%s; it says that it is a newer one of the volume, of generation %d: overwrite it only if no other host has made it", p.Problem, is)
		}
	}
	h = p.header
	p.Area, p.Seen = headerArea(h), k.seen
	if h.UUID != v.uuid || h.Segments[0] == nil || int64(h.Segments[0].Offset) != v.offset || p.Area > v.offset {
		return p, nil, fmt.Errorf("%w: the header that was kept is of another layout than the volume that is served", ErrAuth)
	}
	if o.Pins != nil {
		pin, err := o.Pins.Load(v.uuid)
		switch {
		case errors.Is(err, ErrNoPins):
			return p, nil, err
		case err != nil:
			return p, nil, fmt.Errorf("%w: %w", ErrAuth, err)
		case newer && pin != nil && pin.Generation > p.Generation:
			return p, nil, fmt.Errorf("the header on the disk says that it is a newer one of the volume, and this host has seen one, so it is left alone: %w", v.looked.err)
		case pin != nil && (pin.Fingerprint != known.Fingerprint || pin.Generation > p.Generation):
			return p, nil, fmt.Errorf("%w: %s; this server has the header of generation %d, and this host has seen another one, of generation %d: keys that were removed since would come back; %s", ErrAuth, p.Problem, p.Generation, pin.Generation, copyData)
		}
	}
	for _, id := range keyslotIDs(h) {
		area := []byte(nil)
		if slices.Contains(keptSlots(h), id) {
			if area, err = k.area(h.Keyslots[id].Area); err != nil {
				return p, nil, err
			}
		}
		if area == nil {
			p.Missing = append(p.Missing, id)
			continue
		}
		p.Keyslots = append(p.Keyslots, id)
		p.Foreign = p.Foreign || !v.isOurs(&p.unread, area, int64(h.Keyslots[id].Area.Offset), false)
	}
	for _, offset := range []uint64{0, h.Size} {
		c, err := h.Encode(offset)
		if err != nil {
			return p, nil, err
		}
		p.Foreign = p.Foreign || !v.isOurs(&p.unread, c, int64(offset), true)
	}
	return p, k, nil
}

// planKeyslots adds the keyslots of a header that is on the disk whose areas are not
// what is kept of them.
func (v *Volume) planKeyslots(p *HeaderRepair, k *keptHeader) {
	for _, id := range keptSlots(p.header) {
		a := p.header.Keyslots[id].Area
		area, is := k.slot(id, p.header.Keyslots[id]), alignedBytes(int(a.Size))
		if area == nil || readFull(v.b, is, int64(a.Offset)) == nil && bytes.Equal(is, area) {
			continue
		}
		p.Keyslots, p.Seen = append(p.Keyslots, id), k.seen
		p.Foreign = p.Foreign || !v.isOurs(&p.unread, area, int64(a.Offset), false)
		if p.Problem != "" {
			p.Problem += "; "
		}
		p.Problem += fmt.Sprintf("the area of keyslot %d is not what this server has read of it", id)
	}
}

// isOurs tells whether nothing is lost by writing want at off: what stands there is
// zeros, the same, or the first page of a copy of this volume's header, or can't be read:
// such pages are added to unread.
func (v *Volume) isOurs(unread *[]int64, want []byte, off int64, isCopy bool) bool {
	page := alignedBytes(backupPage)
	for i := 0; i < len(want); i += len(page) {
		if err := readFull(v.b, page, off+int64(i)); err != nil {
			*unread = append(*unread, off+int64(i))
			continue
		}
		if !isZero(page) && !bytes.Equal(page, want[i:i+len(page)]) && !(isCopy && i == 0 && luks2.Remnant(page, v.uuid)) {
			return false
		}
	}
	return true
}

// stillUnread is [luks2.ErrChanged] if what could not be read for a plan can be now, as
// after another path to the disk took over: nobody has looked whose that is.
func (v *Volume) stillUnread(p HeaderRepair) error {
	if p.none {
		if _, _, err := readHeader(v.b); err == nil {
			return fmt.Errorf("%w: the header could not be read, and can be now; nothing was overwritten; run this again", luks2.ErrChanged)
		}
	}
	page := alignedBytes(backupPage)
	for _, off := range p.unread {
		if readFull(v.b, page, off) == nil {
			return fmt.Errorf("%w: the page at %d could not be read, and can be now; nothing was overwritten; run this again", luks2.ErrChanged, off)
		}
	}
	return nil
}

// sumOf is the SHA-256 of the first n bytes of the backing device, in hexadecimal.
func (v *Volume) sumOf(n int64) (string, error) {
	s := sha256.New()
	err := CopyArea(s, v.b, n)
	return hex.EncodeToString(s.Sum(nil)), err
}

// CopyArea writes the first n bytes of a backing device to w, whatever they are.
func CopyArea(w io.Writer, b Backing, n int64) error {
	part := alignedBytes(copySize)
	for off := int64(0); off < n; off += int64(len(part)) {
		p := part[:min(int64(len(part)), n-off)]
		if err := readFull(b, p, off); err != nil {
			return fmt.Errorf("sector: reading the header area: %w", err)
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// putKeyslots writes what is kept of the keyslots, and reads it back.
func (v *Volume) putKeyslots(b luks2.File, k *keptHeader, p HeaderRepair) error {
	if len(p.Keyslots) == 0 {
		return nil
	}
	for _, id := range p.Keyslots {
		a := p.header.Keyslots[id].Area
		area, err := k.area(a)
		if err == nil && area == nil {
			err = io.ErrUnexpectedEOF
		}
		if err == nil {
			_, err = b.WriteAt(area, int64(a.Offset))
		}
		if err != nil {
			return fmt.Errorf("keyslot %d: %w", id, err)
		}
	}
	if err := b.Sync(); err != nil {
		return err
	}
	for _, id := range p.Keyslots {
		a := p.header.Keyslots[id].Area
		want, err := k.area(a)
		got := alignedBytes(int(a.Size))
		if err = cmp.Or(err, readFull(v.b, got, int64(a.Offset))); err != nil {
			return fmt.Errorf("keyslot %d: reading it back: %w", id, err)
		}
		if !bytes.Equal(want, got) {
			return fmt.Errorf("%w: keyslot %d reads back as something else than was written", ErrDamaged, id)
		}
	}
	return nil
}
