package main

import (
	"bytes"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// sector is one sector of a log made by hand.
func logSector(fields ...any) []byte {
	var b bytes.Buffer
	for _, f := range fields {
		if s, ok := f.(string); ok {
			b.WriteString(s)
			continue
		}
		binary.Write(&b, binary.LittleEndian, f)
	}
	return append(b.Bytes(), make([]byte, 512-b.Len())...)
}

func TestWriteLog(t *testing.T) {
	one, two := bytes.Repeat([]byte{1}, 1024), bytes.Repeat([]byte{2}, 512)
	log := bytes.Join([][]byte{
		logSector(uint64(writeLogMagic), uint64(1), uint64(5), uint32(512)),
		logSector(uint64(4), uint64(2), uint64(0), uint64(0)), one,
		logSector(uint64(0), uint64(0), uint64(logFlush), uint64(0)),
		logSector(uint64(0), uint64(0), uint64(logMark), uint64(5), "acked"),
		logSector(uint64(5), uint64(1), uint64(logFUA|logMetadata), uint64(0)), two,
		logSector(uint64(0), uint64(8), uint64(logDiscard), uint64(0)),
		logSector(uint64(0), uint64(1), uint64(0), uint64(0)), two, // not complete: beyond the number in the head
	}, nil)
	name := filepath.Join(t.TempDir(), "disk")
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	l, err := openWriteLog(bytes.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	var seen []string
	err = l.replay(f, func(e *logEntry) error {
		s := e.mark
		if e.durable() {
			s += "!"
		}
		seen = append(seen, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := strings.Join(seen, ","), ",!,acked,!,"; got != want {
		t.Errorf("entries %q, want %q", got, want)
	}
	got, _ := os.ReadFile(name)
	if want := bytes.Join([][]byte{make([]byte, 2048), one[:512], two}, nil); !bytes.Equal(got, want) {
		t.Errorf("the disk has %d bytes that differ from the %d wanted", len(got), len(want))
	}
	for name, bad := range map[string][]byte{
		"magic": logSector(uint64(1), uint64(1), uint64(5), uint32(512)),
		"flags": append(bytes.Clone(log[:512]), logSector(uint64(4), uint64(2), uint64(32), uint64(0))...),
		"short": log[:1200],
	} {
		l, err := openWriteLog(bytes.NewReader(bad))
		if err == nil {
			err = l.replay(f, func(*logEntry) error { return nil })
		}
		if err == nil {
			t.Errorf("a log with a bad %s was read", name)
		}
	}
}
