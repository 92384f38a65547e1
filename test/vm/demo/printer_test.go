package main

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"hostcryptd/test/vm/report"
)

func TestPrinter(t *testing.T) {
	var b bytes.Buffer
	p := newPrinter(&b)
	p.event(report.Event{Kind: report.Ready, Text: "6.12"})
	p.event(report.Event{Kind: report.Step, Number: 1, Text: "Format a disk"})
	p.event(report.Event{Kind: report.Say, Text: strings.Repeat("several words ", 20)})
	p.event(report.Event{Kind: report.Command, Text: "hostcryptd format /dev/vda"})
	for i := range 11 {
		p.event(report.Event{Kind: report.Output, Text: fmt.Sprintf("line %d %s", i, strings.Repeat("x", 100))})
	}
	p.event(report.Event{Kind: report.Figure, Name: "write", Value: 1})
	p.event(report.Event{Kind: report.Command, Text: "umount /mnt"})
	p.event(report.Event{Kind: report.Output, Text: `{"level":"info","time":"2026","msg":"volume is ready","size":117440512,"attached":"/dev/nbd0"}`})
	p.event(report.Event{Kind: report.Output, Text: `{"not":"a log"}`})
	p.event(report.Event{Kind: report.Output, Text: "Pass 1: Checking inodes, blocks, and sizes"})
	p.event(report.Event{Kind: report.Exit, Code: 1})
	p.event(report.Event{Kind: report.Done})
	p.endStep()

	got := b.String()
	for _, want := range []string{
		"1. Format a disk\n================\n",
		"\n    # hostcryptd format /dev/vda\n    line 0 xxx",
		"    line 7 ", "\n    ... and 3 more lines\n    # umount /mnt\n",
		"    info: volume is ready attached=/dev/nbd0\n    {\"not\":\"a log\"}\n    (exit code 1)\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	if strings.Contains(got, "line 8") {
		t.Errorf("too much output in\n%s", got)
	}
	if strings.Count(got, " s)\n") != 1 {
		t.Errorf("want the time of one step in\n%s", got)
	}
	for line := range strings.Lines(got) {
		if n := len(strings.TrimSuffix(line, "\n")); n > width {
			t.Errorf("line of %d characters: %q", n, line)
		}
	}
}
