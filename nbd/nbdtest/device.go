// Package nbdtest has what tests of NBD servers need: a [Device] in memory
// that can fail, block and lose what was not flushed, and a [Client] that says
// exactly what it is told to, right or wrong.
package nbdtest

import (
	"fmt"
	"sync"
	"sync/atomic"
)

// An Op is a call of a method of a [Device].
type Op struct {
	Method string // "ReadAt", "WriteAt", "WriteAtFUA", "Trim", "WriteZeroes", "Sync"
	Off    int64
	Len    int64
	FUA    bool
}

// A Device is memory that behaves as a disk with a volatile cache: what was
// written without FUA is lost by [Device.PowerCut] unless a Sync came between.
// It is safe for concurrent use.
type Device struct {
	// Before, if not nil, is called at the start of every operation, with no
	// lock held. An error fails the operation, which then does nothing. Set it
	// before the device is served.
	Before func(Op) error

	// Short, if not nil, may cut a read or write short: the operation moves at
	// most as many bytes as it returns and gives no error.
	Short func(Op) int64

	calls atomic.Int64

	mu     sync.RWMutex
	mem    []byte // what reads see
	stable []byte // what survives; nil if nobody asked for it
}

// NewDevice returns a device of size bytes that reads as zeros. With volatile,
// it keeps track of what a power cut would lose, which doubles its memory.
func NewDevice(size int64, volatile bool) *Device {
	d := &Device{mem: make([]byte, size)}
	if volatile {
		d.stable = make([]byte, size)
	}
	return d
}

func (d *Device) begin(op Op) error {
	d.calls.Add(1)
	if op.Off < 0 || op.Len < 0 || op.Off > int64(len(d.mem)) || op.Len > int64(len(d.mem))-op.Off {
		panic(fmt.Sprintf("nbdtest: %s of %d bytes at %d: device has %d", op.Method, op.Len, op.Off, len(d.mem)))
	}
	if d.Before != nil {
		return d.Before(op)
	}
	return nil
}

func (d *Device) cut(op Op) int64 {
	if d.Short != nil {
		return min(op.Len, d.Short(op))
	}
	return op.Len
}

// Calls returns how often the device was called, not counting Size.
func (d *Device) Calls() int64 { return d.calls.Load() }

// Size returns the size in bytes.
func (d *Device) Size() (int64, error) { return int64(len(d.mem)), nil }

// ReadAt reads.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	op := Op{Method: "ReadAt", Off: off, Len: int64(len(p))}
	if err := d.begin(op); err != nil {
		return 0, err
	}
	d.mu.RLock()
	defer d.mu.RUnlock()
	return copy(p[:d.cut(op)], d.mem[off:]), nil
}

func (d *Device) write(op Op, p []byte) (int, error) {
	if err := d.begin(op); err != nil {
		return 0, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	n := copy(d.mem[op.Off:], p[:d.cut(op)])
	if op.FUA && d.stable != nil {
		copy(d.stable[op.Off:], p[:n])
	}
	return n, nil
}

// WriteAt writes to the volatile cache.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	return d.write(Op{Method: "WriteAt", Off: off, Len: int64(len(p))}, p)
}

// WriteAtFUA writes to stable memory.
func (d *Device) WriteAtFUA(p []byte, off int64) (int, error) {
	return d.write(Op{Method: "WriteAtFUA", Off: off, Len: int64(len(p)), FUA: true}, p)
}

// Trim fills the range with 0xdb, so that nobody takes it for zeros.
func (d *Device) Trim(off, length int64, fua bool) error {
	return d.fill(Op{Method: "Trim", Off: off, Len: length, FUA: fua}, 0xdb)
}

// WriteZeroes fills the range with zeros.
func (d *Device) WriteZeroes(off, length int64, fua bool) error {
	return d.fill(Op{Method: "WriteZeroes", Off: off, Len: length, FUA: fua}, 0)
}

func (d *Device) fill(op Op, b byte) error {
	if err := d.begin(op); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	set := func(mem []byte) {
		for i := range mem {
			mem[i] = b
		}
	}
	set(d.mem[op.Off : op.Off+op.Len])
	if op.FUA && d.stable != nil {
		set(d.stable[op.Off : op.Off+op.Len])
	}
	return nil
}

// Sync makes everything written so far stable.
func (d *Device) Sync() error {
	if err := d.begin(Op{Method: "Sync"}); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stable != nil {
		copy(d.stable, d.mem)
	}
	return nil
}

// PowerCut forgets what is not stable. The device must have been made with
// volatile.
func (d *Device) PowerCut() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stable == nil {
		panic("nbdtest: PowerCut of a device that isn't volatile")
	}
	copy(d.mem, d.stable)
}

// Bytes returns a copy of n bytes at off as reads see them, without counting as
// an operation.
func (d *Device) Bytes(off, n int64) []byte {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return append([]byte(nil), d.mem[off:off+n]...)
}
