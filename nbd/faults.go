package nbd

import (
	"sync"
	"time"

	"go.uber.org/zap"
)

// faultInterval is how long no further error of a device is logged after one.
// A disk that is gone fails every request.
const faultInterval = 10 * time.Second

var commandNames = map[uint16]string{
	cmdRead: "read", cmdWrite: "write", cmdFlush: "flush", cmdTrim: "trim", cmdCache: "cache", cmdWriteZeroes: "write zeroes",
}

// faults decides which errors of devices are logged. A client learns no more
// than the number in the reply.
type faults struct {
	mu     sync.Mutex
	last   time.Time // when one was logged
	silent int       // how many were not, since then
}

// take reports whether an error at now is one to log, and how many before it
// were not.
func (f *faults) take(now time.Time) (silent int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.last.IsZero() && now.Sub(f.last) < faultInterval {
		f.silent++
		return 0, false
	}
	silent, f.last, f.silent = f.silent, now, 0
	return silent, true
}

// outcome returns the NBD error for what the device made of a request, and logs
// an error that says something about the device. What a device refuses as a
// matter of policy (a volume that is stopped or read-only) is no fault, and who
// does so says it.
func (s *Server) outcome(r *request, err error) uint32 {
	number := errorNumber(err)
	switch number {
	case 0, errPerm, errShutdown:
		return number
	}
	if silent, ok := s.faults.take(time.Now()); ok {
		command, off, length := commandNames[r.cmd], r.off, r.length
		// Who reads the log may wait for this very device.
		go s.cfg.Log.Error("I/O error", zap.String("command", command), zap.Uint64("offset", off), zap.Uint64("length", length),
			zap.Error(err), zap.Int("not_logged_before", silent))
	}
	return number
}
