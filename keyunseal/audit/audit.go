// Package audit is the log of key use: who unwrapped which volume's key, with
// which version of which KEK, and how that went.
//
// # Format
//
// A log is a file of lines; each is a JSON object, a [Record], and ends with a
// line feed. `seq` counts the records from 1. `prev` is the SHA-256, in
// hexadecimal, of the line before, without its line feed; 64 zeros in record 1. So
// a line that was changed, removed, inserted or moved is found by its successor,
// by hand like this:
//
//	sed -n 41p audit.log | tr -d '\n' | sha256sum; sed -n 42p audit.log | jq -r .prev
//
// A write that a power cut has torn leaves a last line without line feed. The
// next record is written on a line of its own, its `prev` is that of the last
// whole line, and its `torn` the SHA-256 of what was torn. If only the line feed
// is missing, it's a record like any other.
//
// When a log has reached [MaxSize], it's renamed to NAME.1, NAME.1 to NAME.2,
// and so on to [Keep], and the chain goes on in a new file.
//
// # What it can't show
//
// Who can write the file can write all of it anew, cut off its end, or change its
// last record into another one. Against
// that the head of the chain, the number and hash of its last record, is told to
// who appends, to be kept where this host can't change it; [Verify] checks
// against it. hostcryptd logs it with every record, and each record goes to the
// journal too (journal.go), so both are wherever that goes.
//
// Nothing secret is ever in a record: callers have none to give.
package audit

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// DefaultFile is the log of the host.
const DefaultFile = "/var/log/hostcryptd/audit.log"

const (
	// MaxSize is the size in bytes at which a log is rotated: some 40,000 records.
	MaxSize = 16 << 20
	// Keep is how many rotated logs are kept.
	Keep = 9

	maxLine = 8 << 10 // bytes of a record
	maxText = 1 << 10 // bytes of one of its texts
)

// What happened.
const (
	Wrap       = "wrap"
	Unwrap     = "unwrap"
	Get        = "get"
	Probe      = "probe"
	Sign       = "sign"
	Unsealed   = "unsealed" // the volume opened
	Refused    = "refused"  // it didn't, and the reason isn't an outage
	AccessLost = "access-lost"
	Wiped      = "wiped"   // the volume has stopped and its keys are gone
	Stopped    = "stopped" // it refuses writes, and keeps its keys to read
	Resumed    = "resumed"
	Closed     = "closed"
	Format     = "format"
	KeyAdd     = "key-add"
	KeyRemove  = "key-remove"
	Rewrap     = "rewrap"
	Recovery   = "recovery"
	Header     = "header"
	Erase      = "erase"
	Lock       = "lock"
	Unlock     = "unlock"
	Dropped    = "dropped" // records that couldn't be written, by number
)

// A Record is one event. Append fills in Seq, Prev, Torn, Time and PID.
type Record struct {
	Seq  uint64    `json:"seq"`
	Prev string    `json:"prev"`
	Torn string    `json:"torn,omitempty"`
	Time time.Time `json:"time"`
	PID  int       `json:"pid"`

	Event   string `json:"event"`
	Volume  string `json:"volume,omitempty"`      // UUID
	Key     string `json:"key,omitempty"`         // the KEK, without version
	Version string `json:"key_version,omitempty"` // of the KEK
	Token   *int   `json:"token,omitempty"`       // its number in the header

	Outcome  string `json:"outcome"` // "ok", or "failed"
	Class    string `json:"class,omitempty"`
	Code     string `json:"code,omitempty"`
	Status   int    `json:"status,omitempty"` // of HTTP
	Duration int64  `json:"duration_ms"`

	ClientRequestID string `json:"client_request_id,omitempty"`
	RequestID       string `json:"request_id,omitempty"` // the service's

	Detail string `json:"detail,omitempty"`
}

// Outcomes of a Record.
const (
	OK     = "ok"
	Failed = "failed"
)

// A Head names the last record of a chain.
type Head struct {
	Seq  uint64
	Hash string // SHA-256 of the line, in hexadecimal
}

// String is SEQ:HASH, as [ParseHead] takes it.
func (h Head) String() string { return fmt.Sprintf("%d:%s", h.Seq, h.Hash) }

// ParseHead reads what String wrote.
func ParseHead(s string) (h Head, err error) {
	if n, _ := fmt.Sscanf(s, "%d:%64s", &h.Seq, &h.Hash); n != 2 || len(h.Hash) != 64 || h.String() != s {
		return Head{}, fmt.Errorf("%q is no head of an audit log; that is a number, a colon and 64 hexadecimal digits", s)
	}
	return h, nil
}

func hashOf(line []byte) string {
	sum := sha256.Sum256(line)
	return hex.EncodeToString(sum[:])
}

// zeroHash is the prev of record 1.
var zeroHash = strings.Repeat("0", 2*sha256.Size)

// Append adds a record to the log and returns its head. The record is on stable
// storage then. Several processes may append at once: a lock on the file makes
// it one chain. The file and its folder are made if they aren't there.
func Append(file string, r Record) (Head, error) {
	h, err := appendTo(file, r)
	if err != nil {
		return Head{}, fmt.Errorf("audit log: %w", err)
	}
	return h, nil
}

func appendTo(file string, r Record) (Head, error) {
	f, end, err := openEnd(file)
	if err != nil {
		return Head{}, err
	}
	defer f.Close()

	r.Seq, r.Prev = end.head.Seq+1, end.head.Hash
	if r.Seq == 1 {
		r.Prev = zeroHash
	}
	if r.Time.IsZero() {
		r.Time = time.Now()
	}
	r.Time = r.Time.UTC().Truncate(time.Microsecond)
	r.PID = os.Getpid()
	line := []byte{}
	if end.torn != nil {
		r.Torn = hashOf(end.torn)
	}
	if end.open {
		line = append(line, '\n')
	}
	text, err := encode(r)
	if err != nil {
		return Head{}, err
	}
	line = append(append(line, text...), '\n')
	// One write: a reader without the lock sees a whole record or, after a
	// crash, a torn one.
	if _, err := f.Write(line); err != nil {
		// What was written of it must not become the beginning of the next.
		_ = f.Truncate(end.size)
		return Head{}, err
	}
	if err := f.Sync(); err != nil {
		return Head{}, err
	}
	h := Head{r.Seq, hashOf(text)}
	toJournal(text, r, h)
	return h, nil
}

// encode makes a line that isn't too long and that a terminal can show: JSON
// escapes control characters.
func encode(r Record) ([]byte, error) {
	for _, s := range []*string{&r.Event, &r.Volume, &r.Key, &r.Version, &r.Outcome, &r.Class, &r.Code, &r.ClientRequestID, &r.RequestID, &r.Detail} {
		*s = shorten(*s)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(r); err != nil {
		return nil, err
	}
	line := bytes.TrimSuffix(b.Bytes(), []byte("\n"))
	if len(line) > maxLine {
		return nil, fmt.Errorf("a record of %d bytes, at most %d fit", len(line), maxLine)
	}
	return line, nil
}

// shorten cuts a text so that ten of them, with every character escaped, fit
// in a line.
func shorten(s string) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	const most = 120 // where all of it is escaped
	if len(s) <= most {
		return s
	}
	escaped := 0
	for i, c := range s {
		n := utf8.RuneLen(c)
		if c < 0x20 || c == 0x7f || c == '"' || c == '\\' || c == 0x2028 || c == 0x2029 {
			n = 6
		}
		if escaped += n; escaped > maxText/2 {
			return s[:i] + "…"
		}
	}
	return s
}

// openEnd opens the log for appending, with the lock on it, and finds the end of
// the chain. A log that is full is rotated before.
func openEnd(file string) (*os.File, end, error) {
	for {
		f, err := openLocked(file)
		if err != nil {
			return nil, end{}, err
		}
		e, err := readEnd(f)
		if err == nil && e.head.Seq == 0 {
			// Who rotated it may have been killed, or had no room, before the first
			// record, or not be there yet: the chain goes on all the same.
			e.head, err = rotatedHead(file)
		}
		switch {
		case err != nil:
			f.Close()
			return nil, end{}, fmt.Errorf("%s: %w", file, err)
		case e.size < MaxSize:
			return f, e, nil
		}
		// The lock is on the old file: who waits for it looks again at the name.
		err = rotate(file)
		f.Close()
		if err != nil {
			return nil, end{}, err
		}
	}
}

// rotatedHead returns the last record of the log before, if there is one.
func rotatedHead(file string) (Head, error) {
	f, err := os.OpenFile(file+".1", os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return Head{}, nil
	}
	if err != nil {
		return Head{}, err
	}
	defer f.Close()
	e, err := readEnd(f)
	if err != nil {
		return Head{}, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return e.head, nil
}

// openLocked opens the log for appending, with the lock on it.
func openLocked(file string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, err
	}
	for {
		f, err := os.OpenFile(file, os.O_RDWR|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
		if err != nil {
			return nil, err
		}
		for {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
			if err != unix.EINTR {
				break
			}
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("locking %s: %w", file, err)
		}
		// It may have been rotated meanwhile.
		mine, err1 := f.Stat()
		named, err2 := os.Stat(file)
		if err1 == nil && err2 == nil && os.SameFile(mine, named) {
			return f, nil
		}
		f.Close()
	}
}

// An end is what is at the end of a log.
type end struct {
	head Head
	open bool   // it has no line feed
	torn []byte // what is after the last line feed, if that's no record
	size int64
}

// readEnd finds the last whole record.
func readEnd(f *os.File) (e end, err error) {
	fi, err := f.Stat()
	if err != nil {
		return e, err
	}
	e.size = fi.Size()
	if e.size == 0 {
		return e, nil
	}
	// Two torn writes and a record fit in this.
	buf := make([]byte, min(e.size, 4*maxLine))
	if _, err := f.ReadAt(buf, e.size-int64(len(buf))); err != nil && err != io.EOF {
		return e, err
	}
	i := bytes.LastIndexByte(buf, '\n')
	if rest := buf[i+1:]; len(rest) > 0 {
		e.open = true
		if _, ok := decode(rest); !ok {
			e.torn = rest
		} else {
			i = len(buf) // only the line feed is missing
		}
	}
	for lines := buf[:max(i, 0)]; len(lines) > 0; {
		j := bytes.LastIndexByte(lines, '\n')
		line := lines[j+1:]
		if r, ok := decode(line); ok {
			e.head = Head{r.Seq, hashOf(line)}
			return e, nil
		}
		lines = lines[:max(j, 0)]
	}
	if int64(len(buf)) == e.size && i < 0 {
		return e, nil // the very first record was torn
	}
	return e, errors.New("its end is not an audit log; move the file away, and a new chain begins")
}

// decode reads a line. It tells whether that is a record.
func decode(line []byte) (r Record, ok bool) {
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	return r, err == nil && r.Seq > 0 && d.InputOffset() == int64(len(line))
}

// rotate renames the log and its older ones. The caller has the lock.
func rotate(file string) error {
	for i := Keep; i > 0; i-- {
		from := fmt.Sprintf("%s.%d", file, i-1)
		if i == 1 {
			from = file
		}
		if err := os.Rename(from, fmt.Sprintf("%s.%d", file, i)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
