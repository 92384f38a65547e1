package sector

import (
	"fmt"
	"syscall"
)

// A descriptor is a [Backing] whose reads and writes are those of a file
// descriptor, at the same offsets, with the same errors, so that a server can
// have the kernel do many of them at once.
type descriptor interface {
	Backing
	Descriptor() int
}

// Async tells whether the volume's reads and writes can be split by BeginRead
// and BeginWrite: its backing device is a file descriptor without a cache
// above it. With the page cache, a write is a copy that is over before another
// thread could be told of it.
func (v *Volume) Async() bool { return v.fd >= 0 && v.b.Direct() }

// tryEnter is enter that doesn't wait. Who holds a request open while it is
// with the kernel can't wait for Suspend, which waits for that request.
func (v *Volume) tryEnter() bool {
	if !v.gate.isOpen() || !v.open.TryRLock() {
		return false
	}
	if !v.gate.isOpen() {
		v.open.RUnlock()
		return false
	}
	return true
}

// splits tells whether a request is whole sectors in memory that the backing
// device takes, and that device a descriptor.
func (v *Volume) splits(p []byte, off int64) bool {
	return v.fd >= 0 && len(p) > 0 && v.check(off, int64(len(p))) == nil &&
		(off|int64(len(p)))%v.sector == 0 && aligned(p, int(v.align))
}

// BeginRead begins a read that somebody else does: len(p) bytes at offset at of
// the descriptor fd, to p, after which [Volume.EndRead] must be called. With ok
// false nothing has begun, and the request is one for [Volume.ReadAt]: it is
// not of whole sectors, or would have to wait. BeginRead itself never waits.
func (v *Volume) BeginRead(p []byte, off int64) (fd int, at int64, ok bool) {
	if !v.splits(p, off) || !v.tryEnter() {
		return 0, 0, false
	}
	v.stats.reads.Add(1)
	return v.fd, v.offset + off, true
}

// EndRead makes of the n bytes that were read, or of the error, what ReadAt
// would have returned.
func (v *Volume) EndRead(p []byte, off int64, n int, err error) (int, error) {
	defer v.leave()
	if err == nil && n != len(p) {
		err = fmt.Errorf("backing device returned %d of %d bytes: %w", n, len(p), syscall.EIO)
	}
	if err != nil {
		clear(p)
		return 0, v.count("read", off, err)
	}
	v.cipher.DecryptSectors(p, p, v.tweakAt(off), int(v.sector))
	v.stats.bytesRead.Add(uint64(len(p)))
	return len(p), nil
}

// BeginWrite begins a write that somebody else does: p, which is encrypted in
// place, to offset at of the descriptor fd, with fua by RWF_DSYNC. Then
// [Volume.EndWrite] must be called, with the ticket. With ok false nothing has
// begun, p is as it was, and the request is one for [Volume.WriteAt] or
// [Volume.WriteAtFUA]. BeginWrite itself never waits.
func (v *Volume) BeginWrite(p []byte, off int64, fua bool) (fd int, at int64, ticket uint64, ok bool) {
	if !v.splits(p, off) || !v.tryEnter() {
		return 0, 0, 0, false
	}
	if v.writable() != nil {
		v.leave()
		return 0, 0, 0, false
	}
	// Held until EndWrite, see rangeLock.
	if ticket, ok = v.ranges.try(off, off+int64(len(p))); !ok {
		v.leave()
		return 0, 0, 0, false
	}
	if fua {
		v.flush.begin()
	}
	v.stats.writes.Add(1)
	v.cipher.EncryptSectors(p, p, v.tweakAt(off), int(v.sector))
	return v.fd, v.offset + off, ticket, true
}

// EndWrite makes of the n bytes that were written, or of the error, what
// WriteAt or WriteAtFUA would have returned. Where there was no room for a write
// with FUA, it writes p itself once more, see failedFUA.
func (v *Volume) EndWrite(p []byte, off int64, fua bool, ticket uint64, n int, err error) (int, error) {
	defer v.leave()
	defer v.ranges.unlock(ticket)
	if fua {
		defer v.flush.end()
	}
	if err == nil && n != len(p) {
		err = fmt.Errorf("backing device took %d of %d bytes: %w", n, len(p), syscall.EIO)
	}
	if err != nil && fua {
		err = v.failedFUA(err, p, v.offset+off)
	}
	if err != nil {
		return 0, v.count("write", off, err)
	}
	v.stats.bytesWritten.Add(uint64(len(p)))
	return len(p), nil
}
