package sector

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A secret is memory for keys outside of the Go heap: never swapped, not in
// core dumps, not inherited by children, between two pages that fault.
//
// It is memfd_secret(2) memory, which the kernel unmaps from its own address
// space too, so that neither /proc/PID/mem nor a kernel bug that reads memory
// shows it. Where the kernel has no memfd_secret (before 5.14, or switched
// off before 6.5), it is locked anonymous memory.
type secret struct {
	b     []byte         // the usable bytes
	base  unsafe.Pointer // of the whole mapping, guard pages included
	total uintptr
	kind  string
}

// newSecret returns at least n zeroed bytes, page aligned.
func newSecret(n int) (*secret, error) {
	page := os.Getpagesize()
	n = (n + page - 1) / page * page
	s := &secret{total: uintptr(n + 2*page), kind: "memfd_secret"}
	var err error
	s.base, err = unix.MmapPtr(-1, 0, nil, s.total, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("sector: secret memory: %w", err)
	}
	inner := unsafe.Add(s.base, page)
	if err := mapSecretFile(inner, uintptr(n)); err != nil {
		s.kind = "locked memory"
		if err := mapLocked(inner, uintptr(n)); err != nil {
			unix.MunmapPtr(s.base, s.total)
			return nil, fmt.Errorf("sector: secret memory of %d bytes: %w; is the limit on locked memory (ulimit -l, LimitMEMLOCK=) too low?", n, err)
		}
	}
	s.b = unsafe.Slice((*byte)(inner), n)
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_DONTFORK} {
		if err := unix.Madvise(s.b, advice); err != nil {
			s.free()
			return nil, fmt.Errorf("sector: secret memory: madvise %d: %w", advice, err)
		}
	}
	return s, nil
}

func mapSecretFile(at unsafe.Pointer, n uintptr) error {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return err
	}
	defer unix.Close(fd) // the mapping keeps the memory
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		return err
	}
	if _, err := unix.MmapPtr(fd, 0, at, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		return err
	}
	// Fault the pages in now: memory that is not there when a key must be
	// written would be a SIGBUS.
	clear(unsafe.Slice((*byte)(at), n))
	return nil
}

func mapLocked(at unsafe.Pointer, n uintptr) error {
	if _, err := unix.MmapPtr(-1, 0, at, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED); err != nil {
		return err
	}
	return unix.Mlock(unsafe.Slice((*byte)(at), n))
}

// free wipes the memory and gives it back. It may be called twice, and never
// while somebody still uses the bytes.
func (s *secret) free() error {
	if s == nil || s.b == nil {
		return nil
	}
	clear(s.b)
	s.b = nil
	return unix.MunmapPtr(s.base, s.total)
}

// keys is the secret memory of one volume, laid out for the lifetimes of what
// is in it: the volume key and the DEK are needed while a header is opened or
// changed, the key schedule as long as the volume is served.
type keys struct {
	mem       *secret
	volumeKey *[VolumeKeySize]byte
	dek       *[dekSize]byte
	schedule  []byte
}

func newKeys(schedule int) (*keys, error) {
	mem, err := newSecret(schedule + dekSize + VolumeKeySize)
	if err != nil {
		return nil, err
	}
	b := mem.b
	return &keys{
		mem:       mem,
		schedule:  b[:schedule:schedule], // first, for its alignment
		dek:       (*[dekSize]byte)(b[schedule:]),
		volumeKey: (*[VolumeKeySize]byte)(b[schedule+dekSize:]),
	}, nil
}

// wipeRaw forgets what only opening needed.
func (k *keys) wipeRaw() {
	clear(k.dek[:])
	clear(k.volumeKey[:])
}

func (k *keys) free() error {
	if k == nil {
		return nil
	}
	return errors.Join(k.mem.free())
}
