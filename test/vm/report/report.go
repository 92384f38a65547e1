// Package report is what the guest program says to the host while a scenario
// runs: a stream of events, one JSON object per line.
//
// A [Writer] writes events and may be used by several goroutines. [Read] reads a
// stream, [Decode] one line. The last event of a stream is of kind [Done]; a stream
// without it means that the guest died.
package report

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// Kinds of an [Event], with the fields each one fills.
const (
	Ready   = "ready"   // the guest program runs; Text is the kernel release
	Step    = "step"    // a numbered step of a narration begins: Number, Text
	Say     = "say"     // one sentence for the reader: Text
	Command = "command" // a command as it would be typed: Text
	Output  = "output"  // one line that a command printed: Text
	Exit    = "exit"    // the command has ended: Code, Seconds
	Figure  = "figure"  // a measurement: Name, Value, Text is the unit
	Done    = "done"    // the scenario is over: Text is its error, or empty
)

// An Event is one line of a stream.
type Event struct {
	Time    float64 `json:"time"` // seconds since the writer's kernel started
	Kind    string  `json:"kind"`
	Text    string  `json:"text,omitempty"`
	Number  int     `json:"number,omitempty"`
	Name    string  `json:"name,omitempty"`
	Value   float64 `json:"value,omitempty"`
	Code    int     `json:"code,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
}

// String gives the event in one line for a log.
func (e Event) String() string {
	at := fmt.Sprintf("[%7.2f] ", e.Time)
	switch e.Kind {
	case Ready:
		return at + "guest program runs on Linux " + e.Text
	case Step:
		return fmt.Sprintf("%sstep %d: %s", at, e.Number, e.Text)
	case Command:
		return at + "# " + e.Text
	case Output:
		return at + "  " + e.Text
	case Exit:
		return fmt.Sprintf("%s  exit %d after %.2f s", at, e.Code, e.Seconds)
	case Figure:
		return fmt.Sprintf("%s%s = %.4g %s", at, e.Name, e.Value, e.Text)
	case Done:
		if e.Text == "" {
			return at + "done"
		}
		return at + "done: error: " + e.Text
	}
	return at + e.Text
}

// Decode reads one line, with or without its newline.
func Decode(line []byte) (Event, error) {
	var e Event
	if err := json.Unmarshal(line, &e); err != nil {
		return Event{}, fmt.Errorf("report: decoding %.200q: %w", line, err)
	}
	if e.Kind == "" {
		return Event{}, fmt.Errorf("report: decoding %.200q: no kind", line)
	}
	return e, nil
}

// Read reads a stream to its end and calls show with each event. It returns the
// error of the scenario, or one that says that there is no end.
func Read(r io.Reader, show func(Event)) error {
	end := errors.New("report: nothing was reported")
	scan := bufio.NewScanner(r)
	for scan.Scan() {
		e, err := Decode(scan.Bytes())
		switch {
		case err != nil:
			end = err
			continue
		case e.Kind != Done:
			end = fmt.Errorf("report: no end after: %s", e)
		case e.Text != "":
			end = errors.New(e.Text)
		default:
			end = nil
		}
		show(e)
	}
	return errors.Join(end, scan.Err())
}

// A Writer writes events. It is safe for concurrent use.
type Writer struct {
	uptime func() time.Duration

	mu sync.Mutex // held for one whole line of w
	w  io.Writer
}

// NewWriter returns a Writer to w whose events are stamped with uptime.
func NewWriter(w io.Writer, uptime func() time.Duration) *Writer {
	return &Writer{w: w, uptime: uptime}
}

// Emit stamps e and writes it in one call to the underlying writer. There is
// nobody to tell about an error: the host notices that the stream ended
// without [Done].
func (w *Writer) Emit(e Event) {
	e.Time = w.uptime().Seconds()
	line, err := json.Marshal(e)
	if err != nil {
		panic("report: " + err.Error()) // only a NaN or infinite figure
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.w.Write(append(line, '\n'))
}
