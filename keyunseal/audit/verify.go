package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
)

// A Finding is where a chain doesn't hold.
type Finding struct {
	File   string `json:"file"`
	Line   int    `json:"line"` // from 1; 0 means the file as a whole
	Reason string `json:"reason"`
}

func (f Finding) String() string {
	if f.Line == 0 {
		return fmt.Sprintf("%s: %s", f.File, f.Reason)
	}
	return fmt.Sprintf("%s line %d: %s", f.File, f.Line, f.Reason)
}

// A Report is what [Verify] has found.
type Report struct {
	Records  int       `json:"records"`
	First    uint64    `json:"first"` // number of the first record; above 1 if older files weren't given
	Head     Head      `json:"-"`
	Findings []Finding `json:"findings"`
}

// Files returns the log and its rotated predecessors that are there, oldest
// first.
func Files(file string) []string {
	var list []string
	for i := Keep; i > 0; i-- {
		if name := fmt.Sprintf("%s.%d", file, i); exists(name) {
			list = append(list, name)
		}
	}
	return append(list, file)
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// VerifyLog is as [Verify] with the log and its rotated predecessors. The chain
// has to begin with record 1 unless there are so many of them that older ones
// were dropped.
func VerifyLog(file string, anchor *Head) (*Report, error) {
	r, err := Verify(Files(file), anchor)
	if err == nil && r.First > 1 && !exists(fmt.Sprintf("%s.%d", file, Keep)) {
		r.Findings = append(r.Findings, Finding{file, 0, fmt.Sprintf("the first %d records are not there", r.First-1)})
	}
	return r, err
}

// Verify follows the chain through files, oldest first. An anchor, if it isn't
// nil, is a head that the chain has to contain: without one a tail that was
// cut off is not missed, nor a last record that was changed into another one. After a break it goes on with what follows, so that
// each break is one finding. The error is that of reading.
func Verify(files []string, anchor *Head) (*Report, error) {
	v := verifier{report: &Report{Findings: []Finding{}}, anchor: anchor}
	for _, name := range files {
		if err := v.file(name); err != nil {
			return v.report, err
		}
	}
	if v.torn != nil {
		v.found(v.tornFile, v.tornLine, "not a record") // a torn one has no line feed
	}
	if anchor != nil && !v.anchored {
		reason := fmt.Sprintf("record %d of the given head is not there: the end was cut off", anchor.Seq)
		if v.report.Head.Seq >= anchor.Seq {
			reason = fmt.Sprintf("record %d is not the one of the given head", anchor.Seq)
		}
		v.found(files[len(files)-1], 0, "%s", reason)
	}
	return v.report, nil
}

type verifier struct {
	report   *Report
	anchor   *Head
	anchored bool
	torn     []byte // a line that is no record, which the next has to name
	tornFile string
	tornLine int
	last     Head
}

func (v *verifier) found(file string, line int, format string, args ...any) {
	v.report.Findings = append(v.report.Findings, Finding{file, line, fmt.Sprintf(format, args...)})
}

func (v *verifier) file(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 4*maxLine)
	for n := 1; ; n++ {
		line, err := r.ReadSlice('\n')
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			v.found(name, n, "a line of over %d bytes", 4*maxLine)
			for errors.Is(err, bufio.ErrBufferFull) {
				_, err = r.ReadSlice('\n')
			}
			v.last = Head{}
			continue
		case err == io.EOF && len(line) == 0:
			return nil
		case err == io.EOF:
			// The last write was torn. Append will say so in the next record;
			// until then it's as it should be after a power cut.
			if _, ok := decode(line); ok {
				v.line(name, n, line)
			}
			return nil
		case err != nil:
			return fmt.Errorf("%s: %w", name, err)
		}
		v.line(name, n, bytes.TrimSuffix(line, []byte("\n")))
	}
}

func (v *verifier) line(name string, n int, line []byte) {
	r, ok := decode(line)
	if !ok {
		if v.torn != nil {
			v.found(v.tornFile, v.tornLine, "not a record")
		}
		v.torn, v.tornFile, v.tornLine = bytes.Clone(line), name, n
		return
	}
	hash := hashOf(line)
	switch {
	case v.torn != nil && r.Torn != hashOf(v.torn):
		v.found(v.tornFile, v.tornLine, "not a record: it was changed or inserted")
	case v.torn == nil && r.Torn != "":
		v.found(name, n, "the torn record before it was removed")
	}
	v.torn = nil
	switch {
	case v.report.Records == 0 && r.Seq > 1:
		// The chain begins in a file that isn't here.
	case v.report.Records == 0 && r.Prev != zeroHash:
		v.found(name, n, "record 1 has a predecessor")
	case v.report.Records > 0 && v.last.Hash == "":
		// after a line that couldn't be read, which was told
	case v.report.Records > 0 && r.Seq != v.last.Seq+1:
		v.found(name, n, "record %d follows record %d: %s", r.Seq, v.last.Seq,
			map[bool]string{true: "what was between them was removed", false: "it was inserted or moved"}[r.Seq > v.last.Seq])
	case v.report.Records > 0 && r.Prev != v.last.Hash:
		v.found(name, n-1, "record %d was changed", v.last.Seq)
	}
	if v.report.Records++; v.report.Records == 1 {
		v.report.First = r.Seq
	}
	v.last = Head{r.Seq, hash}
	v.report.Head = v.last
	if v.anchor != nil && v.last == *v.anchor {
		v.anchored = true
	}
}
