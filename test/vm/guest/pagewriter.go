package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A pageWriter writes pages of a device at random places, each stable when it
// has been answered, until one fails.
type pageWriter struct {
	f        *os.File
	pages    []uint32 // what was answered, by page; 0 for nothing
	pending  int      // page of the write that failed, which may be there or not
	writes   int
	err      error
	failedAt time.Time
	done     chan struct{}
	end      chan struct{} // closed by stop
	slowest  time.Duration // write

	mu     sync.Mutex
	recent []time.Duration // how long each write took since take
}

func startPageWriter(dev string, size int64) (*pageWriter, error) {
	f, err := os.OpenFile(dev, os.O_RDWR|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		return nil, err
	}
	w := &pageWriter{f: f, pages: make([]uint32, size/pageSize), pending: -1, done: make(chan struct{}), end: make(chan struct{})}
	go func() {
		defer close(w.done)
		p := alignedPage()
		r := rand.New(rand.NewPCG(1, 2))
		for n := uint32(1); ; n++ {
			select {
			case <-w.end:
				return
			default:
			}
			page := r.IntN(len(w.pages))
			begun := time.Now()
			fillPage(p, page, n)
			if _, w.err = f.WriteAt(p, int64(page)*pageSize); w.err != nil {
				w.pending, w.failedAt = page, time.Now()
				return
			}
			took := time.Since(begun)
			w.slowest = max(w.slowest, took)
			w.mu.Lock()
			w.recent = append(w.recent, took)
			w.mu.Unlock()
			w.pages[page] = n
			w.writes++
		}
	}()
	return w, nil
}

// failed returns the error of the write that has failed, or nil.
func (w *pageWriter) failed() error {
	select {
	case <-w.done:
		return fmt.Errorf("a write failed: %w", w.err)
	default:
		return nil
	}
}

// take returns how long each of the writes took that were answered since the last
// call.
func (w *pageWriter) take() []time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.recent
	w.recent = nil
	return list
}

// takeSlowest is the slowest of take.
func (w *pageWriter) takeSlowest() time.Duration {
	return slices.Max(append(w.take(), 0))
}

// waitWrite waits until another write is answered.
func (w *pageWriter) waitWrite() error {
	count := func() int {
		w.mu.Lock()
		defer w.mu.Unlock()
		return len(w.recent)
	}
	n := count()
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if count() > n {
			return nil
		}
	}
	return errors.New("no write was answered for 30 s")
}

// stop ends the writing, after a write that is answered.
func (w *pageWriter) stop() {
	close(w.end)
	<-w.done
}

// verify reads back what was answered.
func (w *pageWriter) verify() (checked int, err error) {
	p, want := alignedPage(), alignedPage()
	for page, value := range w.pages {
		if value == 0 || page == w.pending {
			continue
		}
		if _, err := w.f.ReadAt(p, int64(page)*pageSize); err != nil {
			return checked, err
		}
		fillPage(want, page, value)
		if string(p) != string(want) {
			return checked, fmt.Errorf("page %d was answered, and reads as something else now", page)
		}
		checked++
	}
	return checked, nil
}

const pageSize = 4096

// alignedPage returns a page as O_DIRECT wants it.
func alignedPage() []byte {
	b := make([]byte, 2*pageSize)
	skip := -int(uintptr(unsafe.Pointer(&b[0]))) & (pageSize - 1)
	return b[skip : skip+pageSize : skip+pageSize]
}

func fillPage(p []byte, page int, value uint32) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint32(p[i:], uint32(page))
		binary.LittleEndian.PutUint32(p[i+4:], value)
	}
}
