package main

import (
	"os"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// daemonLog is the log of "serve": lines for people on a terminal, JSON for a
// journal.
func (a *app) daemonLog() *zap.Logger {
	c := zap.NewProductionEncoderConfig()
	c.TimeKey = "time"
	c.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	encoder := zapcore.NewJSONEncoder(c)
	if isTerminal(a.stderr) {
		c.EncodeTime = zapcore.TimeEncoderOfLayout(time.TimeOnly)
		c.EncodeLevel = zapcore.CapitalLevelEncoder
		encoder = zapcore.NewConsoleEncoder(c)
	}
	return zap.New(zapcore.NewCore(encoder, zapcore.Lock(syncer{a.stderr}), zapcore.InfoLevel))
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
