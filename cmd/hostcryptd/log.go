package main

import (
	"bytes"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// daemonLog is the log of "serve": lines for people on a terminal, JSON for a
// journal. With a kernel device, whoever reads the log may wait for that device, so
// lines are then written by another goroutine.
func (a *app) daemonLog(async bool) *zap.Logger {
	c := zap.NewProductionEncoderConfig()
	c.TimeKey = "time"
	c.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(c)
	if isTerminal(a.stderr) {
		c.EncodeTime = zapcore.TimeEncoderOfLayout(time.TimeOnly)
		c.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(c)
	}
	out := zapcore.Lock(syncer{a.stderr})
	if async {
		out = newAsyncLog(out)
	}
	return zap.New(zapcore.NewCore(encoder, out, zapcore.InfoLevel))
}

const (
	// asyncLines are kept for a reader that is slow; further ones are dropped.
	asyncLines = 256
	// asyncFlush is how long the end of the program waits for one.
	asyncFlush = time.Second
)

// An asyncLog never makes who logs wait for who reads the log.
type asyncLog struct {
	lines   chan []byte // nil: tell flushed
	flushed chan struct{}
	dropped atomic.Int64
}

func newAsyncLog(out zapcore.WriteSyncer) *asyncLog {
	l := &asyncLog{lines: make(chan []byte, asyncLines), flushed: make(chan struct{}, 1)}
	go func() {
		for line := range l.lines {
			if line == nil {
				_ = out.Sync()
				select {
				case l.flushed <- struct{}{}:
				default:
				}
				continue
			}
			_, _ = out.Write(line)
			if n := l.dropped.Swap(0); n > 0 {
				fmt.Fprintf(out, "hostcryptd: %d lines of the log were lost, as nobody read them\n", n)
			}
		}
	}()
	return l
}

func (l *asyncLog) Write(b []byte) (int, error) {
	select {
	case l.lines <- bytes.Clone(b):
	default:
		l.dropped.Add(1)
	}
	return len(b), nil
}

// Sync returns when everything is written, or after asyncFlush.
func (l *asyncLog) Sync() error {
	timeout := time.After(asyncFlush)
	select {
	case l.lines <- nil:
	case <-timeout:
		return os.ErrDeadlineExceeded
	}
	select {
	case <-l.flushed:
		return nil
	case <-timeout:
		return os.ErrDeadlineExceeded
	}
}

// cliLog is the log of the commands that a person waits for: warnings, as the
// commands' own.
func (a *app) cliLog() *zap.Logger {
	c := zapcore.EncoderConfig{MessageKey: "msg", LineEnding: "\n", ConsoleSeparator: " "}
	core := zapcore.NewCore(zapcore.NewConsoleEncoder(c), zapcore.Lock(syncer{prefixed{a.stderr}}), zapcore.WarnLevel)
	return zap.New(core)
}

// prefixed writes log lines the way warnf does.
type prefixed struct {
	w interface{ Write([]byte) (int, error) }
}

func (p prefixed) Write(b []byte) (int, error) {
	if _, err := p.w.Write(append([]byte("hostcryptd: warning: "), b...)); err != nil {
		return 0, err
	}
	return len(b), nil
}

type syncer struct {
	w interface{ Write([]byte) (int, error) }
}

func (s syncer) Write(b []byte) (int, error) { return s.w.Write(b) }
func (s syncer) Sync() error {
	if f, ok := s.w.(*os.File); ok && !isTerminal(f) {
		f.Sync() // a pipe can't, and need not
	}
	return nil
}
