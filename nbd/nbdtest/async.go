package nbdtest

import (
	"bytes"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// An Async is a [Device] whose reads and writes come by way of a file
// descriptor, as nbd.AsyncDevice has it. What the Device is told to do, it does:
// a read comes out of a pipe when the Device is done with it, in pieces and with
// the pipe's end if it is short; a write goes to a file in memory first, unless
// Before or Short is set, and is changed for as long as it is under way.
type Async struct {
	*Device
	file *os.File
	end  atomic.Int64 // of what is used of file

	mu    sync.Mutex
	reads map[*byte]*asyncRead
	// Split counts the reads and writes that came in two halves.
	Split atomic.Int64
}

type asyncRead struct {
	fd   int
	done chan struct{}
	err  error
}

// NewAsync makes an Async of d. Close frees what it needs for that.
func NewAsync(d *Device) (*Async, error) {
	fd, err := unix.MemfdCreate("nbdtest", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	return &Async{Device: d, file: os.NewFile(uintptr(fd), "nbdtest"), reads: make(map[*byte]*asyncRead)}, nil
}

// Close frees the file. No read or write may be under way.
func (a *Async) Close() error {
	if len(a.reads) > 0 {
		return fmt.Errorf("nbdtest: %d reads have not ended", len(a.reads))
	}
	return a.file.Close()
}

// Async is true.
func (a *Async) Async() bool { return true }

// BeginRead begins a read of the Device.
func (a *Async) BeginRead(p []byte, off int64) (fd int, at int64, ok bool) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		panic(err)
	}
	a.Split.Add(1)
	read := &asyncRead{fd: fds[0], done: make(chan struct{})}
	a.mu.Lock()
	a.reads[&p[0]] = read
	a.mu.Unlock()
	b := make([]byte, len(p))
	go func() {
		defer close(read.done)
		defer unix.Close(fds[1])
		var n int
		n, read.err = a.Device.ReadAt(b, off)
		for b := b[:n]; len(b) > 0 && read.err == nil; {
			n, read.err = unix.Write(fds[1], b)
			b = b[max(n, 0):]
		}
	}()
	return fds[0], 0, true
}

// EndRead returns what the Device's ReadAt did.
func (a *Async) EndRead(p []byte, _ int64, n int, err error) (int, error) {
	a.mu.Lock()
	read := a.reads[&p[0]]
	delete(a.reads, &p[0])
	a.mu.Unlock()
	<-read.done
	unix.Close(read.fd)
	if read.err != nil {
		err = read.err
	}
	return n, err
}

// BeginWrite begins a write.
func (a *Async) BeginWrite(p []byte, _ int64, _ bool) (fd int, at int64, ticket uint64, ok bool) {
	if a.Before != nil || a.Short != nil {
		return 0, 0, 0, false
	}
	a.Split.Add(1)
	invert(p)
	at = a.end.Add(int64(len(p))) - int64(len(p))
	return int(a.file.Fd()), at, uint64(at), true
}

// EndWrite checks that what BeginWrite gave was written, and gives it to the
// Device.
func (a *Async) EndWrite(p []byte, off int64, fua bool, ticket uint64, n int, err error) (int, error) {
	if n != len(p) || err != nil {
		return n, err
	}
	b := make([]byte, n)
	if _, err := a.file.ReadAt(b, int64(ticket)); err != nil || !bytes.Equal(b, p) {
		return 0, fmt.Errorf("nbdtest: a write of %d bytes at %d did not come: %w", n, off, syscall.EIO)
	}
	_ = unix.Fallocate(int(a.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(ticket), int64(n))
	invert(p)
	if fua {
		return a.WriteAtFUA(p, off)
	}
	return a.WriteAt(p, off)
}

func invert(p []byte) {
	for i := range p {
		p[i] ^= 0xff
	}
}
