package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// A writeLog reads what the device mapper's target log-writes has recorded: the
// writes to a disk, in the order in which they became durable. Its form is in
// the kernel's drivers/md/dm-log-writes.c: a sector with a head (magic, version,
// number of entries, sector size), then for each entry one sector that
// describes it and its data, all little-endian.
type writeLog struct {
	r       io.ReaderAt
	sector  int64
	entries int64
	next    int64 // the number of the next entry
	off     int64 // where it is
}

const (
	writeLogMagic   = 0x6a736677736872
	writeLogVersion = 1
)

// Flags of a logEntry.
const (
	logFlush = 1 << iota
	logFUA
	logDiscard
	logMark
	logMetadata
)

// A logEntry is one write, or a flush, or a mark that was set by hand.
type logEntry struct {
	number int64 // from 1
	flags  uint64
	offset int64 // in bytes
	length int64
	data   []byte // of a write; nil for a discard
	mark   string
}

// durable tells whether the disk has answered a flush or a write with FUA: what
// the log has up to here can't be lost any more.
func (e *logEntry) durable() bool { return e.flags&(logFlush|logFUA) != 0 }

func openWriteLog(r io.ReaderAt) (*writeLog, error) {
	var head [28]byte
	if _, err := r.ReadAt(head[:], 0); err != nil {
		return nil, fmt.Errorf("reading the head of the write log: %w", err)
	}
	if magic := binary.LittleEndian.Uint64(head[:]); magic != writeLogMagic {
		return nil, fmt.Errorf("write log: magic %#x, want %#x", magic, writeLogMagic)
	}
	if v := binary.LittleEndian.Uint64(head[8:]); v != writeLogVersion {
		return nil, fmt.Errorf("write log: version %d, want %d", v, writeLogVersion)
	}
	l := &writeLog{r: r, entries: int64(binary.LittleEndian.Uint64(head[16:])), sector: int64(binary.LittleEndian.Uint32(head[24:]))}
	if l.sector < 512 || l.sector > 4096 || l.entries < 0 {
		return nil, fmt.Errorf("write log: %d entries in sectors of %d bytes", l.entries, l.sector)
	}
	l.off = l.sector
	return l, nil
}

// read returns the next entry, or io.EOF. An entry beyond the number that the
// head names was not yet complete.
func (l *writeLog) read() (*logEntry, error) {
	if l.next >= l.entries {
		return nil, io.EOF
	}
	head := make([]byte, l.sector)
	if _, err := l.r.ReadAt(head, l.off); err != nil {
		return nil, fmt.Errorf("write log: entry %d: %w", l.next+1, err)
	}
	var (
		sector  = binary.LittleEndian.Uint64(head)
		sectors = binary.LittleEndian.Uint64(head[8:])
		length  = binary.LittleEndian.Uint64(head[24:])
	)
	e := &logEntry{number: l.next + 1, flags: binary.LittleEndian.Uint64(head[16:])}
	if e.flags&^(logFlush|logFUA|logDiscard|logMark|logMetadata) != 0 || sectors > 1<<22 || sector > 1<<40 || length > uint64(l.sector-32) {
		return nil, fmt.Errorf("write log: entry %d is none: sector %d, %d sectors, flags %#x, %d bytes", e.number, sector, sectors, e.flags, length)
	}
	e.offset, e.length = int64(sector)*l.sector, int64(sectors)*l.sector
	l.off += l.sector
	if e.flags&logMark != 0 {
		e.mark = string(head[32 : 32+length])
	}
	if e.flags&logDiscard == 0 && e.length > 0 {
		e.data = make([]byte, e.length)
		if _, err := l.r.ReadAt(e.data, l.off); err != nil {
			return nil, fmt.Errorf("write log: data of entry %d: %w", e.number, err)
		}
		l.off += e.length
	}
	l.next++
	return e, nil
}

// errStop ends a replay early.
var errStop = errors.New("stop")

// replay does the writes of the log again, on w, and calls after with each
// entry. It stops if that returns an error, and takes errStop for the end.
func (l *writeLog) replay(w io.WriterAt, after func(*logEntry) error) error {
	for {
		e, err := l.read()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if e.data != nil {
			if _, err := w.WriteAt(e.data, e.offset); err != nil {
				return fmt.Errorf("doing entry %d of the write log again: %w", e.number, err)
			}
		}
		if err := after(e); err == errStop {
			return nil
		} else if err != nil {
			return fmt.Errorf("at entry %d of the write log: %w", e.number, err)
		}
	}
}
