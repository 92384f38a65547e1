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
// serves. It holds the DEK as long as the volume has its keys, and whether a
// flush has failed. It is memfd_secret(2) memory where there is such a thing,
// else an ordinary memfd, locked.
//
// What it says is true at every moment, since its owner may be killed at any:
// the DEK counts only from the moment on that all of it is there, and is wiped
// before anybody is told that the keys are gone.
type Handover struct {
	f   *os.File
	mem *handoverPage
}

// A handoverPage is the layout of that memory, the same in all versions that
// may follow each other.
type handoverPage struct {
	magic  uint64
	hasKey atomic.Uint32
	failed atomic.Uint32 // a flush has failed, see ErrFailed
	_      [48]byte
	dek    [dekSize]byte
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
// volume. memfd_secret memory never is.
func LockHandover(f *os.File) error {
	p, err := unix.MmapPtr(int(f.Fd()), 0, nil, uintptr(os.Getpagesize()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("sector: memory for a handover: %w", err)
	}
	b := unsafe.Slice((*byte)(p), os.Getpagesize())
	_ = unix.Madvise(b, unix.MADV_DONTDUMP)
	_ = unix.Madvise(b, unix.MADV_DONTFORK)
	err = unix.Mlock(b)
	if name, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil || strings.HasPrefix(name, "/secretmem") {
		return nil
	}
	return errors.Join(fmt.Errorf("sector: locking the memory for a handover: %w", err), unix.MunmapPtr(p, uintptr(os.Getpagesize())))
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
// says. The caller sees to it that no I/O of that process is under way any
// more, see [Device.Fence].
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
