package sector

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Ciphertext on its way to or from the backing device is kept in buffers of
// two sizes, so that a small request does not take the room of a large one.
// They are mapped once, page-aligned, outside of the Go heap: the volume never
// allocates while it serves, and its memory has a ceiling of 6 MiB.
const (
	smallBuffer, smallBuffers = 8 << 10, 256
	largeBuffer, largeBuffers = 256 << 10, 16
)

// buffers is a bounded pool; get waits when it is empty.
type buffers struct {
	mem          []byte // all of it
	small, large chan []byte
}

// spare are the buffers of Preallocate.
var spare atomic.Pointer[buffers]

// Preallocate makes the buffers of the next volume of this process, and locks them
// in memory.
func Preallocate() error {
	p, err := newBuffers()
	if err != nil {
		return err
	}
	if err := unix.Mlock(p.mem); err != nil {
		return errors.Join(fmt.Errorf("sector: buffers: %w", err), p.free())
	}
	spare.Store(p)
	return nil
}

func newBuffers() (*buffers, error) {
	if p := spare.Swap(nil); p != nil {
		return p, nil
	}
	mem, err := unix.Mmap(-1, 0, smallBuffer*smallBuffers+largeBuffer*largeBuffers,
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("sector: buffers: %w", err)
	}
	p := &buffers{mem: mem, small: make(chan []byte, smallBuffers), large: make(chan []byte, largeBuffers)}
	for range smallBuffers {
		p.small <- mem[:smallBuffer:smallBuffer]
		mem = mem[smallBuffer:]
	}
	for range largeBuffers {
		p.large <- mem[:largeBuffer:largeBuffer]
		mem = mem[largeBuffer:]
	}
	return p, nil
}

// get returns a buffer that holds n bytes, or largeBuffer of them if that is
// less.
func (p *buffers) get(n int64) []byte {
	if n <= smallBuffer {
		return <-p.small
	}
	return <-p.large
}

func (p *buffers) put(b []byte) {
	if len(b) == smallBuffer {
		p.small <- b
	} else {
		p.large <- b
	}
}

// free gives the memory back. It held plaintext while sectors were merged, so
// it is cleared. No buffer may be in use.
func (p *buffers) free() error {
	clear(p.mem)
	return unix.Munmap(p.mem)
}

// alignedBytes returns n zeroed bytes that start at a multiple of 4096.
func alignedBytes(n int) []byte {
	b := make([]byte, n+4096)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & 4095
	return b[skip : skip+n : skip+n]
}

// aligned tells whether p starts at a multiple of n, a power of two.
func aligned(p []byte, n int) bool {
	return uintptr(unsafe.Pointer(unsafe.SliceData(p)))&uintptr(n-1) == 0
}
