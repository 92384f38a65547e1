package nbd

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// TestFaultsLogged: the first error of a device is logged with its cause, those
// that come soon after it are counted, and what is no fault of the device isn't.
func TestFaultsLogged(t *testing.T) {
	core, logs := observer.New(zapcore.DebugLevel)
	s := &Server{cfg: Config{Log: zap.New(core)}}
	read := &request{header: header{cmd: cmdRead, off: 8192, length: 4096}}
	for _, err := range []error{nil, syscall.EPERM, fmt.Errorf("stopped: %w", syscall.ESHUTDOWN)} {
		s.outcome(read, err)
	}
	for range 3 {
		if number := s.outcome(read, fmt.Errorf("sector: read at 8192: %w", syscall.EUCLEAN)); number != errIO {
			t.Errorf("outcome = %d, want %d", number, errIO)
		}
	}
	for end := time.Now().Add(30 * time.Second); logs.Len() == 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if logs.Len() != 1 {
		t.Fatalf("%d lines are logged, want 1: %v", logs.Len(), logs.All())
	}
	if got := fmt.Sprint(logs.All()[0].ContextMap()); !strings.Contains(got, "command:read") || !strings.Contains(got, "offset:8192") ||
		!strings.Contains(got, "length:4096") || !strings.Contains(got, "sector: read at 8192: structure needs cleaning") {
		t.Errorf("logged is %s", got)
	}

	var f faults
	now := time.Now()
	for _, step := range []struct {
		after  time.Duration
		silent int
		ok     bool
	}{{0, 0, true}, {time.Second, 0, false}, {faultInterval - 1, 0, false}, {faultInterval, 2, true}, {2*faultInterval - 1, 0, false}, {5 * faultInterval, 1, true}} {
		if silent, ok := f.take(now.Add(step.after)); silent != step.silent || ok != step.ok {
			t.Errorf("an error %v after the first: %d, %v; want %d, %v", step.after, silent, ok, step.silent, step.ok)
		}
	}
}
