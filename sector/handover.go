package sector

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"hostcryptd/sector/luks2"
	"hostcryptd/xts"
)

// A Handover is secret memory that outlives the process which serves a volume:
// another process keeps its descriptor and gives it to the next one that
// serves. It holds the DEK as long as the volume has its keys, whether a flush
// has failed, and whether one is under way. It is memfd_secret(2) memory where
// there is such a thing, else an ordinary memfd, locked.
//
// What it says is true at every moment, since its owner may be killed at any:
// the DEK counts only from the moment on that all of it is there, and is wiped
// before anybody is told that the keys are gone.
type Handover struct {
	f   *os.File
	mem *handoverPage
}

// A handoverPage is the layout of that memory, the same in all versions that
// may follow each other. A version that doesn't know a field leaves it alone.
type handoverPage struct {
	magic    uint64
	hasKey   atomic.Uint32
	failed   atomic.Uint32 // a flush has failed, see ErrFailed
	flushing atomic.Int32  // flushes and writes with FUA that are under way
	unknown  atomic.Uint32 // processes that were killed while such was under way
	_        [40]byte
	dek      [dekSize]byte
}

const handoverMagic = 0x31_4f_48_44_43_48 // "HCDHO1"

// NewHandover returns a Handover without a key.
func NewHandover() (*Handover, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		fd, err = unix.MemfdCreate("hostcryptd-key", unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("sector: memory for a handover: %w", err)
	}
	if err := unix.Ftruncate(fd, int64(os.Getpagesize())); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("sector: memory for a handover: %w", err)
	}
	h, err := OpenHandover(os.NewFile(uintptr(fd), "handover"))
	if err != nil {
		return nil, err
	}
	h.mem.magic = handoverMagic
	return h, nil
}

// OpenHandover returns the Handover behind a descriptor, which it takes over.
func OpenHandover(f *os.File) (*Handover, error) {
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(os.Getpagesize()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("sector: memory for a handover: %w", err)
	}
	b := unsafe.Slice((*byte)(p), os.Getpagesize())
	// memfd_secret memory is locked and in no dump already, and says so by
	// refusing.
	_ = unix.Mlock(b)
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	_ = unix.Madvise(b, unix.MADV_DONTFORK)
	h := &Handover{f: f, mem: (*handoverPage)(p)}
	if h.mem.magic != 0 && h.mem.magic != handoverMagic {
		h.Close()
		return nil, errors.New("sector: memory for a handover: it was written by a version that this one doesn't know")
	}
	return h, nil
}

// LockHandover keeps what is behind the descriptor of a Handover from being
// swapped out for as long as this process lives, also while nobody serves the
// volume. memfd_secret memory never is. flushing, which is not nil in any case,
// tells whether who serves the volume waits for a flush of the backing device: if
// it's killed then, nobody is told how that ended.
func LockHandover(f *os.File) (flushing func() bool, err error) {
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(os.Getpagesize()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return func() bool { return false }, fmt.Errorf("sector: memory for a handover: %w", err)
	}
	page := (*handoverPage)(p)
	flushing = func() bool { return page.magic == handoverMagic && page.flushing.Load() > 0 }
	b := unsafe.Slice((*byte)(p), os.Getpagesize())
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	_ = unix.Madvise(b, unix.MADV_DONTFORK)
	err = unix.Mlock(b)
	if name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil || strings.HasPrefix(name, "/secretmem") {
		return flushing, nil
	}
	return flushing, fmt.Errorf("sector: locking the memory for a handover: %w", err)
}

// File is the descriptor to give to who keeps it.
func (h *Handover) File() *os.File { return h.f }

// HasKey tells whether there is a key.
func (h *Handover) HasKey() bool { return h.mem.hasKey.Load() != 0 }

// Close unmaps the memory. What is in it stays as long as somebody has its
// descriptor.
func (h *Handover) Close() error {
	return errors.Join(unix.MunmapPtr(unsafe.Pointer(h.mem), uintptr(os.Getpagesize())), h.f.Close())
}

func (h *Handover) put(dek *[dekSize]byte) {
	if h == nil {
		return
	}
	h.mem.hasKey.Store(0)
	h.mem.dek = *dek
	h.mem.hasKey.Store(1)
}

func (h *Handover) wipe() {
	if h == nil {
		return
	}
	h.mem.hasKey.Store(0)
	clear(h.mem.dek[:])
}

func (h *Handover) fail() {
	if h != nil {
		h.mem.failed.Store(1)
	}
}

// flushes counts those that are under way.
func (h *Handover) flushes(n int32) {
	if h != nil {
		h.mem.flushing.Add(n)
	}
}

// takeFlushes sees to the flushes that were under way when the process before ended,
// and returns in how many of all processes before some were that nobody knows the end
// of. Where there is a cache above the device, the error of a flush comes to the next
// one, see [Reopen].
//
// Linux tells an error of a disk's flush to who asked for that flush, and to nobody
// after that (blkdev_fsync). The next flush may succeed all the same, and mostly what was
// written is there then: a process is killed for other reasons, and this one flushes the
// same cache again. But a disk that has lost its cache says so once. So the volume isn't
// failed, which would stop a host for each server that is killed at the wrong moment, and
// people are told.
func (h *Handover) takeFlushes(direct bool) uint32 {
	if h.mem.flushing.Load() != 0 {
		if direct {
			h.mem.unknown.Add(1)
		}
		h.mem.flushing.Store(0)
	}
	return h.mem.unknown.Load()
}

// A State is what [Continue] needs of a volume besides its key. It is what the
// header said when the header was authenticated: the next server doesn't read
// it again, so that nobody can slip it another one, and needs no vault.
type State struct {
	UUID     string `json:"uuid"`
	Label    string `json:"label"`
	Token    int    `json:"token"`
	Offset   int64  `json:"offset"`
	Size     int64  `json:"size"`
	Sector   int64  `json:"sector"`
	Tweak    uint64 `json:"tweak"`
	ReadOnly bool   `json:"read_only"`
	Discard  bool   `json:"discard"`
	Dynamic  bool   `json:"dynamic"` // it may grow; a version that didn't say so left false

	Known *Known `json:"known,omitempty"` // nil also from a version that didn't say
}

// State returns the volume's.
func (v *Volume) State() State {
	return State{v.uuid, v.label, v.Token(), v.offset, v.size.Load(), v.sector, v.tweak, v.readOnly, v.discard, v.dynamic, v.known.Load().short()}
}

// Continue makes the volume again whose State another process has left, on the
// same backing device. Without a key in h the volume is suspended, as mode
// says. If that process was killed while a flush of the device was under way, which
// may have failed, the volume's Warnings say so. The caller sees to it that no I/O of
// that process is under way any more, see [Device.Fence].
func Continue(b Backing, s State, h *Handover, mode SuspendMode) (*Volume, error) {
	if s.Sector != 512 && s.Sector != 4096 || s.Offset < 0 || s.Size <= 0 || s.Size%s.Sector != 0 || s.Offset > b.Size() || s.Size > b.Size()-s.Offset {
		return nil, fmt.Errorf("%w: it doesn't hold the volume that was served before", ErrDevice)
	}
	header := &luks2.Header{UUID: s.UUID, Label: s.Label, Segments: map[int]*luks2.Segment{0: {
		Offset: uint64(s.Offset), Size: uint64(s.Size), SectorSize: uint32(s.Sector), IVTweak: s.Tweak,
	}}}
	k, err := newKeys(xts.Size)
	if err != nil {
		return nil, err
	}
	var c *xts.Cipher
	if h.HasKey() {
		if c, err = xts.NewCipherIn(k.schedule, &h.mem.dek); err != nil {
			k.free()
			return nil, fmt.Errorf("%w: %w", ErrAuth, err)
		}
	}
	v, err := newVolume(b, header, s.Size, s.Token, k, c, OpenOptions{ReadOnly: s.ReadOnly, Discard: s.Discard, Handover: h})
	if err != nil {
		k.free()
		return nil, err
	}
	v.dynamic = s.Dynamic
	if n := h.takeFlushes(b.Direct()); n > 0 {
		v.warnings = append(v.warnings, fmt.Sprintf("a server was killed while it waited for the disk to flush its cache (%d since the volume was started), and nobody was told how that ended; if the kernel's log of that time shows that the disk failed, what was written before may be lost, though later flushes succeed", n))
	}
	if h.mem.failed.Load() != 0 {
		v.flush.fail()
	}
	v.known.Store(s.Known)
	if c == nil {
		v.keys = nil
		if mode == SuspendWait {
			v.gate.set(gateWait)
		} else {
			v.gate.set(gateRefuse)
		}
		return v, k.free()
	}
	return v, nil
}
