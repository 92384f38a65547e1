package report

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"
)

func TestRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf, func() time.Duration { return 1500 * time.Millisecond })
	want := []Event{
		{Kind: Ready, Text: "6.12"},
		{Kind: Exit, Code: 14, Seconds: 0.25},
		{Kind: Figure, Name: "copy", Value: 17.5, Text: "MB/s"},
		{Kind: Output, Text: "a \"quoted\"\nline"},
		{Kind: Done},
	}
	for _, e := range want {
		w.Emit(e)
	}
	lines := bytes.Split(bytes.TrimSuffix(buf.Bytes(), []byte("\n")), []byte("\n"))
	if len(lines) != len(want) {
		t.Fatalf("%d events made %d lines", len(want), len(lines))
	}
	for i, line := range lines {
		got, err := Decode(line)
		if err != nil {
			t.Fatal(err)
		}
		w := want[i]
		w.Time = 1.5
		if got != w {
			t.Errorf("event %d = %+v, want %+v", i, got, w)
		}
	}
}

func TestRead(t *testing.T) {
	const figure = `{"kind":"figure","name":"copy"}` + "\n"
	for _, tt := range []struct {
		name, in, want string // want is of the error, "" for none
		shown          int
	}{
		{"passes", figure + `{"kind":"done"}` + "\n", "", 2},
		{"fails", figure + `{"kind":"done","text":"a file has changed"}`, "a file has changed", 2},
		{"dies", figure, "no end after", 1},
		{"dies in a line", figure + `{"kind":"do`, "decoding", 1},
		{"says nothing", "", "nothing was reported", 0},
	} {
		shown := 0
		err := Read(strings.NewReader(tt.in), func(Event) { shown++ })
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) || shown != tt.shown {
			t.Errorf("%s: %v after %d events, want %q after %d", tt.name, err, shown, tt.want, tt.shown)
		}
	}
}

func TestDecodeRefuses(t *testing.T) {
	for _, line := range []string{"", "{", `{"text":"no kind"}`, "[    1.2] a console line"} {
		if e, err := Decode([]byte(line)); err == nil {
			t.Errorf("Decode(%q) = %+v, want an error", line, e)
		}
	}
}

func TestEmitPanicsOnNaN(t *testing.T) {
	defer func() {
		if r, ok := recover().(string); !ok || !strings.HasPrefix(r, "report: ") {
			t.Errorf("recovered %v, want a panic of this package", r)
		}
	}()
	NewWriter(&bytes.Buffer{}, func() time.Duration { return 0 }).Emit(Event{Kind: Figure, Value: math.NaN()})
}
