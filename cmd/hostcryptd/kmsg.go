package main

import (
	"bytes"
	"io"
	"os"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// A kernelLog writes lines to /dev/kmsg, where those of the root's server go. The kernel
// takes a line as a whole or, with EINVAL, not at all: 976 bytes with Linux 6.1, 1024
// later (LOG_LINE_MAX, PRINTKRB_RECORD_MAX of kernel/printk). So long ones are cut in
// pieces.
type kernelLog struct{ w io.Writer }

const (
	kernelLine      = 960
	kernelContinued = "hostcryptd, continued: "
)

// logTo returns what to write log lines to where w may be /dev/kmsg. The kernel drops
// more than 10 writes in 5 seconds to a file that was opened once (printk.devkmsg=), so
// each process opens it for itself.
func logTo(w io.Writer) io.Writer {
	f, ok := w.(*os.File)
	if !ok {
		return w
	}
	var st unix.Stat_t
	if unix.Fstat(int(f.Fd()), &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(1, 11) {
		return w
	}
	if own, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		return kernelLog{own}
	}
	return kernelLog{f}
}

func (k kernelLog) Write(b []byte) (int, error) {
	for line := range bytes.Lines(b) {
		if err := k.writeLine(bytes.TrimSuffix(line, []byte("\n"))); err != nil {
			return 0, err
		}
	}
	return len(b), nil
}

func (k kernelLog) writeLine(line []byte) error {
	for prefix := ""; ; prefix = kernelContinued {
		end := min(len(line), kernelLine-len(prefix)-1)
		for end < len(line) && !utf8.RuneStart(line[end]) {
			end--
		}
		if _, err := k.w.Write([]byte(prefix + string(line[:end]) + "\n")); err != nil {
			return err
		}
		if line = line[end:]; len(line) == 0 {
			return nil
		}
	}
}
