package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"hostcryptd/test/vm/report"
)

const (
	width    = 78 // columns of text
	maxLines = 8  // of the output of one command
)

// A printer turns events into a narration for a terminal.
type printer struct {
	w     io.Writer
	begun time.Time // of the step, zero between steps
	lines int       // of output since the last command
}

func newPrinter(w io.Writer) *printer { return &printer{w: w} }

// say prints a paragraph of the demo's own.
func say(text string) { newPrinter(os.Stdout).para(text) }

func (p *printer) event(e report.Event) {
	switch e.Kind {
	case report.Step:
		p.endStep()
		p.begun = time.Now()
		title := fmt.Sprintf("%d. %s", e.Number, e.Text)
		fmt.Fprintf(p.w, "%s\n%s\n", title, strings.Repeat("=", len(title)))
	case report.Say:
		p.endOutput()
		p.para(e.Text)
	case report.Command:
		p.endOutput()
		fmt.Fprintf(p.w, "    # %s\n", e.Text)
	case report.Output:
		text := brief(e.Text)
		if text == "" {
			return
		}
		if p.lines++; p.lines <= maxLines {
			fmt.Fprintf(p.w, "    %s\n", cut(text, width-4))
		}
	case report.Exit:
		if e.Code != 0 {
			p.endOutput()
			fmt.Fprintf(p.w, "    (exit code %d)\n", e.Code)
		}
	}
}

// brief shortens lines that say little for their length: of a log line in
// JSON it keeps the message and where, of e2fsck what it found.
func brief(line string) string {
	if strings.HasPrefix(line, "Pass ") || strings.HasPrefix(line, "e2fsck ") {
		return ""
	}
	var log struct{ Level, Msg, Device, Attached, Error string }
	if !strings.HasPrefix(line, "{") || json.Unmarshal([]byte(line), &log) != nil || log.Msg == "" {
		return line
	}
	text := log.Level + ": " + log.Msg
	for _, f := range []struct{ name, value string }{{"device", log.Device}, {"attached", log.Attached}, {"error", log.Error}} {
		if f.value != "" {
			text += " " + f.name + "=" + f.value
		}
	}
	return text
}

// endOutput tells how much output was left out.
func (p *printer) endOutput() {
	if p.lines > maxLines {
		fmt.Fprintf(p.w, "    ... and %d more lines\n", p.lines-maxLines)
	}
	p.lines = 0
}

func (p *printer) endStep() {
	p.endOutput()
	if !p.begun.IsZero() {
		fmt.Fprintf(p.w, "  (%.1f s)\n\n", time.Since(p.begun).Seconds())
	}
	p.begun = time.Time{}
}

// para prints text in lines that fit, with an empty line after it.
func (p *printer) para(text string) {
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			fmt.Fprintln(p.w, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	fmt.Fprintf(p.w, "%s\n\n", line)
}

// cut shortens a line to n characters.
func cut(s string, n int) string {
	s = strings.ReplaceAll(s, "\t", "  ")
	if r := []rune(s); len(r) > n {
		return string(r[:n-3]) + "..."
	}
	return s
}

// next ends the demo.
func (p *printer) next(took time.Duration) {
	p.para(fmt.Sprintf("All six steps worked, in %.0f seconds.", took.Seconds()))
	fmt.Fprint(p.w, `What to try next, on a disk that holds nothing you need:

    # hostcryptd format /dev/DISK --recovery-key recovery.key
    # hostcryptd serve /dev/DISK --attach auto &
    # hostcryptd status
    # hostcryptd detach /dev/DISK

With no --key, what opens the disk is this host's TPM, or a key file where there
is none. With --key https://VAULT.vault.azure.net/keys/KEY the key stays in your
own vault, as above. Keep recovery.key somewhere else.
`)
}
