package audit

import (
	"net"
	"strings"
	"time"
)

// Each record goes to systemd's journal too, where the host has one: MESSAGE is
// the line as it stands in the file, so that what was kept elsewhere can be
// compared with it, and
//
//	journalctl HOSTCRYPTD_VOLUME=UUID
//	journalctl HOSTCRYPTD_EVENT=wiped
//
// find records. It's a copy, and the file is the log: that the journal can't be
// reached is no error.

// journalSocket is where the journal takes entries (systemd.io,
// JOURNAL_NATIVE_PROTOCOL).
const journalSocket = "/run/systemd/journal/socket"

// Priorities of syslog.
const (
	priorityNotice = "5"
	priorityInfo   = "6"
)

func toJournal(line []byte, r Record, h Head) {
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: journalSocket, Net: "unixgram"})
	if err != nil {
		return
	}
	defer c.Close()
	// A journal that hangs must not hang who writes.
	c.SetWriteDeadline(time.Now().Add(100 * time.Millisecond))
	priority := priorityInfo
	if r.Outcome != OK {
		priority = priorityNotice
	}
	var b strings.Builder
	for _, f := range [][2]string{
		{"MESSAGE", string(line)}, {"PRIORITY", priority}, {"SYSLOG_IDENTIFIER", "hostcryptd-audit"},
		{"HOSTCRYPTD_EVENT", r.Event}, {"HOSTCRYPTD_VOLUME", r.Volume}, {"HOSTCRYPTD_OUTCOME", r.Outcome}, {"HOSTCRYPTD_HEAD", h.String()},
	} {
		// JSON has no line feeds; of the others none has either, or it's left out.
		if f[1] != "" && !strings.ContainsAny(f[1], "\n") {
			b.WriteString(f[0] + "=" + f[1] + "\n")
		}
	}
	c.Write([]byte(b.String()))
}
