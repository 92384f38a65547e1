package main

import (
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestThreads: the threads that startThreads makes stay.
func TestThreads(t *testing.T) {
	startThreads(swapThreads)
	threads, bad, err := threadsWithout(os.Getpid())
	if err != nil || threads < swapThreads {
		t.Errorf("%d threads, want at least %d: %v", threads, swapThreads, err)
	}
	// Those of a test are ordinary ones.
	if bad != threads {
		t.Errorf("%d of %d threads are said to be as --swap wants them", threads-bad, threads)
	}
	time.Sleep(100 * time.Millisecond)
	if again, _, _ := threadsWithout(os.Getpid()); again < threads {
		t.Errorf("of %d threads %d are left", threads, again)
	}
	if want, have, err := minFreeWanted(); err != nil || want < 1<<20 || want > minFree || have == 0 {
		t.Errorf("minFreeWanted() = %d, %d, %v", want, have, err)
	}
}

// A stuckWriter takes nothing until it is released.
type stuckWriter struct {
	release chan struct{}
	mu      sync.Mutex
	got     strings.Builder
}

func (w *stuckWriter) Write(b []byte) (int, error) {
	<-w.release
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.got.Write(b)
}

func (w *stuckWriter) Sync() error { return nil }

// TestAsyncLog: who reads the log can't hold up who writes it.
func TestAsyncLog(t *testing.T) {
	w := &stuckWriter{release: make(chan struct{})}
	l := newAsyncLog(w)
	begun := time.Now()
	for range 2 * asyncLines {
		if n, err := l.Write([]byte("line\n")); n != 5 || err != nil {
			t.Fatalf("Write() = %d, %v", n, err)
		}
	}
	if took := time.Since(begun); took > 10*time.Second {
		t.Errorf("writing took %v", took)
	}
	if err := l.Sync(); err == nil {
		t.Error("Sync succeeded while nothing was taken")
	}
	close(w.release)
	for l.Sync() != nil {
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	lines := strings.Count(w.got.String(), "line\n")
	if lines < asyncLines || !strings.Contains(w.got.String(), "lines of the log were lost") {
		t.Errorf("%d lines were written, and what was lost is told: %v", lines, strings.Contains(w.got.String(), "were lost"))
	}
}
