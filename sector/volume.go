package sector

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"syscall"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// A Volume is an unlocked volume: plaintext blocks on a backing device. Its
// methods may be called concurrently; see the package documentation for what
// that means for overlapping requests and for durability. Offsets and lengths
// are bytes of the volume and need no alignment.
type Volume struct {
	b        Backing
	uuid     string
	label    string
	token    atomic.Int64 // that opened it last
	warnings []string

	secretMemory string // kind of

	offset   int64        // of the volume on the backing device
	size     atomic.Int64 // of the volume
	dynamic  bool         // it is as big as the backing device, see Grow
	sector   int64        // size of a sector
	tweak    uint64       // of the first sector
	align    int64        // of the backing device
	fd       int          // of the backing device, or -1 if it isn't a descriptor
	readOnly bool
	discard  bool

	ranges rangeLock
	bufs   *buffers
	flush  flusher

	handover *Handover // or nil

	known      atomic.Pointer[Known] // nil without a header
	refreshing sync.Mutex            // one look at the header at a time
	looked     headerLook            // the last one; guarded by refreshing

	// See kept.go. Who holds repairing writes a header that was kept; after refreshing.
	kept      atomic.Pointer[keptHeader]
	repairing sync.Mutex
	ended     chan struct{} // closed: no repair begins any more
	endOnce   sync.Once
	forgotten atomic.Bool

	// open is held shared by each request, so that Close and Suspend can't take
	// the keys and buffers from under one. It guards keys and cipher. gate says
	// what is to become of new requests, see suspend.go.
	open   sync.RWMutex
	gate   gate
	keys   *keys // nil while the volume is suspended
	cipher *xts.Cipher

	stats stats
	parts atomic.Uint64 // see Long
	calls atomic.Int64  // the same
}

// newVolume makes a volume of what Open has found; made is the size of the
// data area when it was formatted.
func newVolume(b Backing, h *luks2.Header, made int64, token int, k *keys, c *xts.Cipher, o OpenOptions) (*Volume, error) {
	if err := fits(b, h, made); err != nil {
		return nil, err
	}
	s := h.Segments[0]
	size := b.Size() - int64(s.Offset)
	sectorSize := int64(s.SectorSize)
	v := &Volume{
		b: b, uuid: h.UUID, label: h.Label,
		offset: int64(s.Offset), sector: sectorSize, tweak: s.IVTweak,
		align:    int64(b.Alignment()),
		dynamic:  s.Dynamic,
		readOnly: o.ReadOnly, discard: o.Discard, fd: -1,
		keys: k, cipher: c, secretMemory: k.mem.kind, handover: o.Handover, ended: make(chan struct{}),
	}
	v.flush.handover = v.handover
	v.token.Store(int64(token))
	if d, ok := b.(descriptor); ok {
		v.fd = d.Descriptor()
	}
	v.size.Store(size / sectorSize * sectorSize)
	if !s.Dynamic {
		v.size.Store(int64(s.Size))
	} else if size%sectorSize != 0 {
		v.warnings = append(v.warnings, fmt.Sprintf("the backing device is not a multiple of %d bytes any more; the last %d are not used", sectorSize, size%sectorSize))
	}
	var err error
	v.bufs, err = newBuffers()
	return v, err
}

// fits tells whether a device has room for a volume that had made bytes of data
// when it was formatted.
func fits(b Backing, h *luks2.Header, made int64) error {
	s := h.Segments[0]
	size := b.Size() - int64(s.Offset)
	sectorSize := int64(s.SectorSize)
	switch {
	case s.Offset > maxIOOffset || s.Size > maxIOOffset || size < sectorSize || !s.Dynamic && int64(s.Size) > size:
		return fmt.Errorf("%w: it has %d bytes, which is less than its header says; was it cut off or only partly copied?", ErrDevice, b.Size())
	case size < made:
		return fmt.Errorf("%w: it has room for %d bytes of data; when it was formatted it had %d; was it cut off or only partly copied?", ErrDevice, size, made)
	case !s.Dynamic && int64(s.Size)%sectorSize != 0:
		return fmt.Errorf("%w: segment of %d bytes, not a multiple of its sector size", ErrUnsupported, s.Size)
	case b.Alignment() > int(sectorSize):
		return fmt.Errorf("%w: its logical blocks are %d bytes, the volume's sectors %d", ErrDevice, b.Alignment(), sectorSize)
	case int64(s.Offset)%int64(b.Alignment()) != 0:
		return fmt.Errorf("%w: the data starts at %d, inside of a logical block", ErrDevice, s.Offset)
	}
	return nil
}

// UUID identifies the volume.
func (v *Volume) UUID() string { return v.uuid }

// Label is the name that was given at format, or "".
func (v *Volume) Label() string { return v.label }

// Token is the number of the token whose key opened the volume.
func (v *Volume) Token() int { return int(v.token.Load()) }

// SectorSize is 512 or 4096 bytes.
func (v *Volume) SectorSize() int { return int(v.sector) }

// ReadOnly tells whether writes are refused.
func (v *Volume) ReadOnly() bool { return v.readOnly }

// Discards tells whether Trim reaches the backing device.
func (v *Volume) Discards() bool { return v.discard && !v.readOnly }

// Fail has the volume fail as after a flush that failed, see [ErrFailed]: another process
// was told of such a flush. Of a disk's cache that is lost the disk tells once, and who
// has not flushed at that time, but wrote before, is not told.
func (v *Volume) Fail() { v.flush.fail() }

// Failed tells whether a flush has failed, see [ErrFailed].
func (v *Volume) Failed() bool { return v.flush.hasFailed() }

// Warnings are what opening the volume found that an operator should know.
func (v *Volume) Warnings() []string { return v.warnings }

// SecretMemory names the kind of memory that holds the keys.
func (v *Volume) SecretMemory() string { return v.secretMemory }

// Implementation names the XTS implementation at work.
func (v *Volume) Implementation() string { return xts.Implementation() }

// Size is the size of the volume in bytes, which only [Volume.Grow] changes. The
// error is always nil; it is there for go-nbd's backend.Backend.
func (v *Volume) Size() (int64, error) { return v.size.Load(), nil }

// A measurer is a [Backing] whose size can change.
type measurer interface {
	Backing
	Measure() (int64, error)
}

// Grow gives the volume the room by which its backing device has grown since it
// was opened, and returns its size. It writes nothing: a segment whose size is
// dynamic has no size in the header. What the new sectors hold is noise.
//
// A volume never shrinks. Of a device that has less than it had, which is
// [ErrDevice], data is missing; and a header that gives the segment a size is
// [ErrUnsupported]. Requests may run meanwhile.
func (v *Volume) Grow() (size int64, err error) {
	before := v.size.Load()
	now := v.b.Size()
	if m, ok := v.b.(measurer); ok {
		if now, err = m.Measure(); err != nil {
			return before, fmt.Errorf("sector: size of the backing device: %w", err)
		}
	}
	size = (now - v.offset) / v.sector * v.sector
	switch {
	case size < before:
		return before, fmt.Errorf("%w: it has room for %d bytes of data now, and the volume has %d; a volume is not made smaller, and what was beyond the end can't be read until the device has its size back", ErrDevice, max(size, 0), before)
	case size > before && !v.dynamic:
		return before, fmt.Errorf("%w: its header gives the volume %d bytes, whatever the device has", ErrUnsupported, before)
	}
	for {
		if v.size.CompareAndSwap(before, size) {
			return size, nil
		}
		if before = v.size.Load(); before >= size {
			return before, nil // somebody else saw more
		}
	}
}

// Stats are counts since the volume was opened.
type Stats struct {
	Reads        uint64 `json:"reads"` // requests, as are the next four
	Writes       uint64 `json:"writes"`
	Flushes      uint64 `json:"flushes"`
	Trims        uint64 `json:"trims"`
	Zeroes       uint64 `json:"zeroes"`
	BytesRead    uint64 `json:"bytes_read"`    // of plaintext
	BytesWritten uint64 `json:"bytes_written"` // without zeroes
	Merges       uint64 `json:"merges"`        // sectors read before being written
	Errors       uint64 `json:"errors"`        // requests that failed
}

type stats struct {
	reads, writes, flushes, trims, zeroes, bytesRead, bytesWritten, merges, errors atomic.Uint64
}

// Stats returns a snapshot of the counts.
func (v *Volume) Stats() Stats {
	s := &v.stats
	return Stats{
		Reads: s.reads.Load(), Writes: s.writes.Load(), Flushes: s.flushes.Load(), Trims: s.trims.Load(), Zeroes: s.zeroes.Load(),
		BytesRead: s.bytesRead.Load(), BytesWritten: s.bytesWritten.Load(), Merges: s.merges.Load(), Errors: s.errors.Load(),
	}
}

// Long shows how the requests get on that may take hours, up to 4 GiB of zeros and
// discards, to who sees nothing of them but their ends: parts counts the buffers that
// were written and the parts that were discarded, and only ever grows. Of such a part, of
// up to 1 GiB, nothing is seen, nor of a flush, which a disk with errors may try for
// minutes: waits tells whether a call of the backing device for one of these has not
// returned.
func (v *Volume) Long() (parts uint64, waits bool) {
	return v.parts.Load(), v.calls.Load() > 0
}

// Flushing tells whether a flush or a write with FUA is under way on the backing
// device, also one that somebody else does, see [Volume.BeginWrite].
func (v *Volume) Flushing() bool { return v.flush.underWay.Load() > 0 }

// enter begins a request. Each ends with leave. It waits while the volume is
// suspended with [SuspendWait].
func (v *Volume) enter() error {
	for {
		// Before the lock, which Suspend may be waiting for: on a disk that has
		// stalled, new requests are refused all the same.
		if err := v.gate.pass(); err != nil {
			return err
		}
		v.open.RLock()
		if v.gate.isOpen() {
			return nil
		}
		v.open.RUnlock()
	}
}

func (v *Volume) leave() { v.open.RUnlock() }

// place gives a request that changes length bytes at off its place among those that
// touch the same sectors, and waits until it's its turn. It comes before enter, so that
// requests which wait for the keys are in the order in which they came: one that is sent
// again while the first waits would otherwise be answered and the first come then, over
// what was written since. The ticket is for ranges.unlock, after leave.
func (v *Volume) place(op string, off, length int64) (e extent, ticket uint64, err error) {
	if err := v.check(off, length); err != nil {
		return e, 0, v.count(op, off, err)
	}
	e = extentOf(off, length, v.sector)
	return e, v.ranges.lock(e.from, e.to), nil
}

// count adds to the error count what a request returned, and returns it.
func (v *Volume) count(op string, off int64, err error) error {
	if err == nil {
		return nil
	}
	v.stats.errors.Add(1)
	return fmt.Errorf("sector: %s at %d: %w", op, off, err)
}

// check tells whether a range lies in the volume.
func (v *Volume) check(off, length int64) error {
	if size := v.size.Load(); off < 0 || length < 0 || off > size || length > size-off {
		return fmt.Errorf("%d bytes reach over the end of the volume at %d: %w", length, size, syscall.EINVAL)
	}
	return nil
}

// writable tells whether the volume takes writes now.
func (v *Volume) writable() error {
	if v.readOnly {
		return fmt.Errorf("volume is read-only: %w", syscall.EPERM)
	}
	if v.gate.restricted.Load() {
		return fmt.Errorf("volume is read-only, as access to its key was lost: %w", syscall.EPERM)
	}
	if v.flush.hasFailed() {
		return ErrFailed
	}
	return nil
}

// tweakAt is the 512-byte sector number that XTS is given for a position, as
// dm-crypt's plain64 counts it, also with sectors of 4096 bytes.
func (v *Volume) tweakAt(off int64) uint64 { return v.tweak + uint64(off)/sector512 }

// ReadAt reads len(p) bytes at off. As [io.ReaderAt] wants it, a range that
// reaches over the end gives what there is and [io.EOF]. After another error p
// holds nothing of use.
func (v *Volume) ReadAt(p []byte, off int64) (int, error) {
	if err := v.enter(); err != nil {
		return 0, err
	}
	defer v.leave()
	v.stats.reads.Add(1)
	var eof error
	if size := v.size.Load(); off >= 0 && off <= size && int64(len(p)) > size-off {
		p, eof = p[:size-off], io.EOF
	}
	err := v.check(off, int64(len(p)))
	if err == nil {
		err = v.read(p, extentOf(off, int64(len(p)), v.sector))
	}
	if err != nil {
		clear(p)
		return 0, v.count("read", off, err)
	}
	v.stats.bytesRead.Add(uint64(len(p)))
	return len(p), eof
}

func (v *Volume) read(p []byte, e extent) error {
	// Whole sectors are read to where they are wanted and decrypted there. To do
	// that by 32 KiB, so that they stay in the nearest cache, made no difference to
	// reads of 128 KiB (0.97 times as many).
	if e.whole() && aligned(p, int(v.align)) {
		if err := readFull(v.b, p, v.offset+e.from); err != nil {
			return err
		}
		v.cipher.DecryptSectors(p, p, v.tweakAt(e.from), int(v.sector))
		return nil
	}
	for e.len() > 0 {
		buf := v.bufs.get(e.to - e.from)
		part, rest := e.head(int64(len(buf)))
		sectors := buf[:part.to-part.from]
		err := v.readSectors(sectors, part.from)
		if err == nil {
			copy(p[:part.len()], sectors[part.off-part.from:])
		}
		v.bufs.put(buf)
		if err != nil {
			return err
		}
		p, e = p[part.len():], rest
	}
	return nil
}

// readSectors fills sectors with the plaintext at from.
func (v *Volume) readSectors(sectors []byte, from int64) error {
	if err := readFull(v.b, sectors, v.offset+from); err != nil {
		return err
	}
	v.cipher.DecryptSectors(sectors, sectors, v.tweakAt(from), int(v.sector))
	return nil
}

// readFull makes an error of a backing device that returns less than it was
// asked for.
func readFull(b Backing, p []byte, off int64) error {
	n, err := b.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = fmt.Errorf("backing device returned %d of %d bytes: %w", n, len(p), syscall.EIO)
	}
	return err
}

// WriteAt writes p at off. It is not durable before [Volume.Sync] returns. p
// is not changed and not kept.
func (v *Volume) WriteAt(p []byte, off int64) (int, error) {
	return v.writeAt(p, off, v.b.WriteAt, false)
}

// WriteAtFUA is WriteAt, and p is durable when it returns; earlier writes need
// not be. If it fails, the volume has failed as after a failed flush, unless the
// backing device had no room for it (ENOSPC, EDQUOT).
func (v *Volume) WriteAtFUA(p []byte, off int64) (int, error) {
	if v.b.Direct() {
		return v.writeAt(p, off, v.writeSync, false)
	}
	// Not WriteAtSync: the error of its flush could be that of an earlier
	// write, which a flush then would not be told of, see flusher.
	return v.writeAt(p, off, v.b.WriteAt, true)
}

func (v *Volume) writeSync(p []byte, off int64) (int, error) {
	v.flush.begin()
	defer v.flush.end()
	v.calls.Add(1)
	n, err := v.b.WriteAtSync(p, off)
	v.calls.Add(-1)
	if err != nil {
		if err = v.failedFUA(err, p, off); err == nil {
			n = len(p)
		}
	}
	return n, err
}

// failedFUA does what is to be done when a write with FUA of p, at off of the backing
// device, has failed with err, and returns what it has ended with then.
//
// A write that is durable at once is a write and a flush (pwritev2 with RWF_DSYNC), and
// the error may be that of the flush, which is told once: then the volume has failed. But
// where there was no room, it is most likely the write that failed, and that is no reason
// to stop: so the write is done alone. If there is no room for that either, nothing else
// has failed. If there is, either somebody has made room just now or it was the flush, and
// another flush tells: a device that has no room for what is in its cache keeps it there.
func (v *Volume) failedFUA(err error, p []byte, off int64) error {
	full := func(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }
	if full(err) {
		n, again := v.b.WriteAt(p, off)
		if again == nil && n == len(p) {
			return v.sync()
		}
		if full(again) {
			return err
		}
	}
	v.flush.fail()
	return err
}

// writeAt writes, and then, with sync, flushes.
func (v *Volume) writeAt(p []byte, off int64, write writeFunc, sync bool) (int, error) {
	e, ticket, err := v.place("write", off, int64(len(p)))
	if err != nil {
		return 0, err
	}
	defer v.ranges.unlock(ticket)
	if err := v.enter(); err != nil {
		return 0, err
	}
	defer v.leave()
	v.stats.writes.Add(1)
	if err = v.writable(); err == nil {
		_, err = v.write(p, e, write)
	}
	if err != nil {
		return 0, v.count("write", off, err)
	}
	if sync {
		if err := v.sync(); err != nil {
			return 0, v.count("flush", off, err)
		}
	}
	v.stats.bytesWritten.Add(uint64(len(p)))
	return len(p), nil
}

// writeFunc is Backing.WriteAt or Backing.WriteAtSync.
type writeFunc func(p []byte, off int64) (int, error)

// write encrypts p, or zeros if p is nil, to the sectors of e, a buffer at a
// time. No other write comes between the buffers: callers hold the range. Zeros can go
// on for hours, and who stops the volume waits for this request: what is left of them is
// refused as others are, or returned without an error, if it is to wait.
func (v *Volume) write(p []byte, e extent, write writeFunc) (rest extent, err error) {
	for e.len() > 0 {
		if p == nil {
			if stop, err := v.stopped(); stop {
				return e, err
			}
		}
		buf := v.bufs.get(e.to - e.from)
		part, rest := e.head(int64(len(buf)))
		var src []byte
		if p != nil {
			src, p = p[:part.len()], p[part.len():]
		}
		err := v.writePart(buf[:part.to-part.from], src, part, write)
		v.bufs.put(buf)
		if err != nil {
			return e, err
		}
		if p == nil {
			v.parts.Add(1)
		}
		e = rest
	}
	return e, nil
}

// stopped tells whether a request that takes long has to stop here: with an error,
// or with none if the volume waits for its keys.
func (v *Volume) stopped() (bool, error) {
	if !v.gate.isOpen() {
		return true, v.gate.refuses()
	}
	err := v.writable()
	return err != nil, err
}

// zeros is what WRITE_ZEROES encrypts. It is only read.
var zeros [largeBuffer]byte

// writePart writes one extent whose sectors fit in buf.
func (v *Volume) writePart(buf, src []byte, e extent, write writeFunc) error {
	if src == nil {
		src = zeros[:e.len()]
	}
	if e.whole() {
		v.cipher.EncryptSectors(buf, src, v.tweakAt(e.from), int(v.sector))
	} else {
		if err := v.mergeEdges(buf, e); err != nil {
			return err
		}
		copy(buf[e.off-e.from:], src)
		v.cipher.EncryptSectors(buf, buf, v.tweakAt(e.from), int(v.sector))
	}
	n, err := write(buf, v.offset+e.from)
	if err == nil && n != len(buf) {
		err = fmt.Errorf("backing device took %d of %d bytes: %w", n, len(buf), syscall.EIO)
	}
	return err
}

// mergeEdges puts the plaintext of the sectors that e covers only in part into
// their place in buf.
func (v *Volume) mergeEdges(buf []byte, e extent) error {
	last := e.to - v.sector
	if e.off != e.from || e.end < e.from+v.sector {
		v.stats.merges.Add(1)
		if err := v.readSectors(buf[:v.sector], e.from); err != nil {
			return err
		}
	}
	if e.end != e.to && last != e.from {
		v.stats.merges.Add(1)
		return v.readSectors(buf[last-e.from:], last)
	}
	return nil
}

// WriteZeroes makes a range read as zeros. Zeros are encrypted and written
// like any data, as a hole would decrypt to noise; with fua they are durable
// when it returns. What a suspension or restriction comes upon is treated as a
// request of its own: the rest waits or fails.
func (v *Volume) WriteZeroes(off, length int64, fua bool) error {
	rest, ticket, err := v.place("write zeroes", off, length)
	if err != nil {
		return err
	}
	defer v.ranges.unlock(ticket) // and not before all zeros are there, whatever they wait for
	for {
		if rest, err = v.writeZeroes(rest, fua); rest.len() == 0 || err != nil {
			return err
		}
	}
}

// writeZeroes returns what is left when the volume is being suspended.
func (v *Volume) writeZeroes(e extent, fua bool) (rest extent, err error) {
	if err := v.enter(); err != nil {
		return e, err
	}
	defer v.leave()
	if err = v.writable(); err == nil {
		if rest, err = v.write(nil, e, v.b.WriteAt); err == nil && rest.len() > 0 {
			return rest, nil
		}
	}
	v.stats.zeroes.Add(1)
	if err == nil && fua {
		err = v.sync() // once, instead of with every buffer
	}
	return rest, v.count("write zeroes", e.off, err)
}

// Trim tells the backing device that the content of a range is not needed. It
// is a hint: without [OpenOptions].Discard, or where the device can't do it,
// nothing happens. Afterwards the range reads as noise, not as zeros.
func (v *Volume) Trim(off, length int64, fua bool) error {
	e, ticket, err := v.place("trim", off, length)
	if err != nil {
		return err
	}
	defer v.ranges.unlock(ticket)
	if err := v.enter(); err != nil {
		return err
	}
	defer v.leave()
	v.stats.trims.Add(1)
	if err = v.writable(); err == nil && v.discard {
		err = v.trim(e)
	}
	if err == nil && fua {
		err = v.sync()
	}
	return v.count("trim", off, err)
}

// discardPart is how much of the backing device is discarded at once, between
// multiples of that, so that nothing is cut which a device discards only as a whole.
// That is no more than 1 GiB, the largest block of a thin pool.
const discardPart = 1 << 30

func (v *Volume) trim(e extent) error {
	from, to := e.within(v.sector)
	if from == to {
		return nil
	}
	for from < to {
		if stop, err := v.stopped(); stop {
			return err // without one the rest is a hint that isn't followed
		}
		end := min(to, (v.offset+from)/discardPart*discardPart+discardPart-v.offset)
		v.calls.Add(1)
		err := v.b.Discard(v.offset+from, end-from)
		v.calls.Add(-1)
		if errors.Is(err, errors.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return err
		}
		v.parts.Add(1)
		from = end
	}
	return nil
}

// Sync makes durable whatever was written before it was called, by anybody.
// If it fails, the volume has failed: see [ErrFailed].
func (v *Volume) Sync() error {
	if err := v.enter(); err != nil {
		return err
	}
	defer v.leave()
	v.stats.flushes.Add(1)
	if v.readOnly {
		return nil // nothing was written
	}
	return v.count("flush", 0, v.sync())
}

func (v *Volume) sync() error { return v.flush.flush(v.flushDevice) }

func (v *Volume) flushDevice() error {
	v.calls.Add(1)
	defer v.calls.Add(-1)
	return v.b.Sync()
}

// Close waits for the requests under way, wipes the keys and frees the memory.
// It does not flush: who has to, calls Sync before. Requests after it fail
// with [ErrClosed]. Closing twice is harmless.
func (v *Volume) Close() error {
	if !v.gate.set(gateClosed) {
		return nil
	}
	v.StopRepairs()
	v.open.Lock()
	defer v.open.Unlock()
	return errors.Join(v.wipe(), v.bufs.free())
}

// Leave is Close, and the key stays in the [Handover] for the next process.
func (v *Volume) Leave() error {
	if !v.gate.set(gateClosed) {
		return nil
	}
	v.StopRepairs()
	v.open.Lock()
	defer v.open.Unlock()
	v.handover = nil
	return errors.Join(v.wipe(), v.bufs.free())
}
