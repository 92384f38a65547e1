// Package sectortest provides a disk in memory that misbehaves as disks do: it
// loses what was not flushed, tears what was being written, fails when told
// to, and returns less than it was asked for.
//
// A [Disk] implements sector.Backing and may be used concurrently.
package sectortest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"unsafe"
)

// Op names an operation for [Disk.Fail].
type Op string

const (
	Read    Op = "read"
	Write   Op = "write"
	Sync    Op = "sync"
	Discard Op = "discard"
)

// A Disk has a volatile write cache over durable content.
type Disk struct {
	// Align is the alignment that offsets, lengths and addresses are checked
	// for; set it before use. 0 and 1 check nothing.
	Align int
	// Cached makes it a disk behind a page cache: of operations that flush and
	// run at the same time, one may be given the error of another.
	Cached bool

	mu      sync.Mutex
	current []byte // what reads see
	durable []byte // what survives [Disk.Crash] for certain
	pending []write
	fail    func(op Op, n int, off int64, length int) error
	calls   map[Op]int
}

type write struct {
	off int64
	b   []byte
}

// New returns a disk of zeros.
func New(size int64) *Disk {
	return &Disk{current: make([]byte, size), durable: make([]byte, size), calls: map[Op]int{}}
}

// Fail installs a hook that is asked before each operation. n counts the
// operations of that kind from 1. An error makes the operation fail without
// effect; [io.ErrShortWrite] and [io.ErrUnexpectedEOF] make it do the first
// half and return a count without an error, as a broken driver would.
func (d *Disk) Fail(hook func(op Op, n int, off int64, length int) error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail, d.calls = hook, map[Op]int{}
}

// Calls returns how often an operation was called since the last Fail.
func (d *Disk) Calls(op Op) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls[op]
}

// begin counts an operation, checks its alignment and asks the hook. A half
// operation is reported by half.
func (d *Disk) begin(op Op, p []byte, off int64, length int) (half bool, err error) {
	d.calls[op]++
	if a := d.Align; a > 1 && (off%int64(a) != 0 || length%a != 0 || p != nil && uintptr(unsafe.Pointer(unsafe.SliceData(p)))%uintptr(a) != 0) {
		return false, fmt.Errorf("sectortest: %s of %d bytes at %d is not aligned to %d", op, length, off, a)
	}
	if off < 0 || off > int64(len(d.current)) {
		return false, io.EOF
	}
	if d.fail == nil {
		return false, nil
	}
	err = d.fail(op, d.calls[op], off, length)
	if errors.Is(err, io.ErrShortWrite) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true, nil
	}
	return false, err
}

// ReadAt reads from the cache and the content below it.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	half, err := d.begin(Read, p, off, len(p))
	if err != nil {
		return 0, err
	}
	n := copy(p, d.current[off:])
	if half {
		return n / 2, nil
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes to the cache.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.write(p, off)
}

func (d *Disk) write(p []byte, off int64) (int, error) {
	half, err := d.begin(Write, p, off, len(p))
	if err != nil {
		return 0, err
	}
	if int64(len(p)) > int64(len(d.current))-off {
		return 0, io.ErrShortWrite
	}
	if half {
		p = p[:len(p)/2]
	}
	copy(d.current[off:], p)
	d.pending = append(d.pending, write{off, bytes.Clone(p)})
	return len(p), nil
}

// WriteAtSync writes to the cache and to the content below it, and leaves
// other writes in the cache.
func (d *Disk) WriteAtSync(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.write(p, off)
	if err == nil {
		copy(d.durable[off:], p[:n])
	}
	return n, err
}

// Sync makes the cache durable. When it fails the cache is lost, as Linux
// does with pages whose write-back failed: reads still show them.
func (d *Disk) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.begin(Sync, nil, 0, 0); err != nil {
		d.pending = nil
		return err
	}
	for _, w := range d.pending {
		copy(d.durable[w.off:], w.b)
	}
	d.pending = nil
	return nil
}

// Discard fills a range with a pattern, which a reader must not rely on.
func (d *Disk) Discard(off, length int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.begin(Discard, nil, off, int(length)); err != nil {
		return err
	}
	gone := bytes.Repeat([]byte{0xdd}, int(length))
	copy(d.current[off:], gone)
	d.pending = append(d.pending, write{off, gone})
	return nil
}

// Size is in bytes.
func (d *Disk) Size() int64 { return int64(len(d.current)) }

// Alignment is Align, at least 1.
func (d *Disk) Alignment() int { return max(1, d.Align) }

// Direct is the opposite of Cached.
func (d *Disk) Direct() bool { return !d.Cached }

// LockHeader does nothing: nobody else sees this disk.
func (d *Disk) LockHeader(context.Context, bool) (func(), error) { return func() {}, nil }

// Bytes returns a copy of what reads would see.
func (d *Disk) Bytes() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return bytes.Clone(d.current)
}

// Crash returns what is left after a power cut: the durable content, and of
// each write that was not flushed whatever the cache had got to, whole units
// of atomic bytes chosen at random. The writes that survive keep their order.
func (d *Disk) Crash(r *rand.Rand, atomic int) *Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	after := &Disk{Align: d.Align, Cached: d.Cached, current: bytes.Clone(d.durable), calls: map[Op]int{}}
	for _, w := range d.pending {
		for i := 0; i < len(w.b); i += atomic {
			if r.IntN(2) == 0 {
				copy(after.current[w.off+int64(i):], w.b[i:min(i+atomic, len(w.b))])
			}
		}
	}
	after.durable = bytes.Clone(after.current)
	return after
}
