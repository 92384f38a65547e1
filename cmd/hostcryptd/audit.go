package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"go.uber.org/zap"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

func (a *app) auditCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "audit",
		Short: "the log of key use",
	}
	c.AddCommand(a.auditVerifyCommand())
	return c
}

func (a *app) auditVerifyCommand() *cobra.Command {
	var head string
	c := &cobra.Command{
		Use:   "verify [FILE...]",
		Short: "check that no record of key use was changed or removed",
		Long: `verify follows the chain of the log of key use: every record holds the hash of the
one before. It says which lines were changed, removed, inserted or moved, and ends
with 19 if any was. Without FILE it checks $HOSTCRYPTD_AUDIT_LOG, else
` + audit.DefaultFile + `, and its rotated predecessors, of which none may
be missing; of several files the oldest comes first.

That the end of the log was cut off, its last record changed into another one, or
all of it written anew, shows only against a head of the chain, the number and hash
of a record, that was kept elsewhere. The daemon logs it with every record
("audit_head").`,
		Example: `  hostcryptd audit verify
  hostcryptd audit verify --head 4711:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08`,
		Args: cobra.ArbitraryArgs,
		RunE: func(c *cobra.Command, files []string) error {
			var anchor *audit.Head
			if head != "" {
				h, err := audit.ParseHead(head)
				if err != nil {
					return usagef("--head: %w", err)
				}
				anchor = &h
			}
			var report *audit.Report
			var err error
			if file := new(keyFlags).auditFile(); len(files) > 0 {
				report, err = audit.Verify(files, anchor)
			} else if file == "none" {
				return usagef("this host keeps no log of key use ($HOSTCRYPTD_AUDIT_LOG is none); name a FILE")
			} else {
				report, err = audit.VerifyLog(file, anchor)
			}
			if errors.Is(err, os.ErrNotExist) {
				return withCode(codeDevice, err)
			}
			if err != nil {
				return err
			}
			if a.json {
				err = a.printJSON(struct {
					*audit.Report
					Head string `json:"head"`
				}{report, report.Head.String()})
			} else {
				for _, f := range report.Findings {
					fmt.Fprintln(a.stdout, printable(f.String()))
				}
				if report.First > 1 && len(report.Findings) == 0 {
					fmt.Fprintf(a.stdout, "the first %d records are in older files\n", report.First-1)
				}
				if report.Records == 0 {
					fmt.Fprintln(a.stdout, "no record")
				} else {
					fmt.Fprintf(a.stdout, "%d records, head %v\n", report.Records, report.Head)
				}
			}
			if len(report.Findings) > 0 {
				err = errors.Join(err, withCode(codeCheck, fmt.Errorf("the log of key use is not what was written: %d findings", len(report.Findings))))
			}
			return err
		},
	}
	c.Flags().StringVar(&head, "head", "", "the chain must contain this record, as `NUMBER:HASH`")
	return a.jsonFlag(c)
}

// auditFile is where this host keeps its log of key use; "none" is none.
func (k *keyFlags) auditFile() string {
	for _, file := range []string{k.auditLog, os.Getenv("HOSTCRYPTD_AUDIT_LOG")} {
		if file != "" {
			return file
		}
	}
	// An ordinary user can't write to the host's.
	if home, err := os.UserHomeDir(); err == nil && os.Geteuid() != 0 {
		return filepath.Join(home, ".local/state/hostcryptd/audit.log")
	}
	return audit.DefaultFile
}

// startAudit makes the records of a daemon go through a queue: a disk that
// hangs must not hang the life of the key.
func (k *keyFlags) startAudit(log *zap.Logger) {
	file := k.auditFile()
	if file == "none" {
		return
	}
	k.queue = audit.NewQueue(file, logMounted, func(r audit.Record, h audit.Head, err error) {
		if err != nil {
			log.Error("log of key use can't be written; records wait in memory", zap.Error(err))
			return
		}
		log.Info("key use", zap.String("event", r.Event), zap.String("outcome", r.Outcome), zap.Stringer("audit_head", h))
	})
}

// stopAudit writes the records that wait. A server after which another one goes on
// can't wait for that without a limit: what holds it up may be this very volume, which
// waits for the other one, or for a key.
func (d *daemon) stopAudit() {
	q := d.opts.keys.queue
	switch {
	case q == nil:
	case !d.leaving && !d.unchanged():
		q.Close()
	case !q.CloseWithin(auditLimit):
		d.log.Warn("records of key use that could not be written are lost with this server", zap.Duration("waited", auditLimit))
	}
}

// logMounted tells whether /var/log is what it is going to be. Before that, a
// record would be written below where it is mounted, out of everybody's sight.
// The journal has the same question, and systemd has a service that answers it.
func logMounted() bool {
	if os.Getenv(initrdEnv) != "" {
		return false // this is the initramfs
	}
	const journal = "/run/systemd/journal"
	if _, err := os.Stat(filepath.Join(journal, "socket")); err != nil {
		return true // systemd isn't here to say
	}
	_, err := os.Stat(filepath.Join(journal, "flushed"))
	return err == nil
}

// record writes to the log of key use. That it can't is told once, and nothing
// else depends on it.
func (k *keyFlags) record(r audit.Record) {
	if k.queue != nil {
		k.queue.Append(r)
		return
	}
	file := k.auditFile()
	if file == "none" {
		return
	}
	if _, err := audit.Append(file, r); err != nil {
		k.auditFailed.Do(func() {
			fmt.Fprintf(os.Stderr, "hostcryptd: warning: %v; --audit-log puts it elsewhere\n", err)
		})
	}
}

// recordChange records what a command did to a volume.
func (k *keyFlags) recordChange(event, volume, detail string, err error) {
	r := audit.Record{Event: event, Volume: volume, Outcome: audit.OK, Detail: detail}
	if err != nil {
		r.Outcome = audit.Failed
		r.Detail = strings.TrimPrefix(r.Detail+": "+err.Error(), ": ")
	}
	k.record(r)
}

// changed records what a command did to the volume on a device, and tells the
// server of the volume.
func (k *keyFlags) changed(ctx context.Context, d *sector.Device, event, detail string, err error) {
	volume := ""
	if h, _, err := sector.ReadHeader(ctx, d); err == nil && sector.CheckUUID(h) == nil {
		volume = h.UUID
	}
	k.recordChange(event, volume, detail+" on "+d.Name(), err)
	if k.header == nil {
		return
	}
	if err := tellServer(ctx, volume, k.header, k.accepted); err != nil && k.accepted {
		fmt.Fprintf(os.Stderr, "hostcryptd: warning: this host trusts the header now, but the server of the volume goes on refusing it until that is stopped: %v\n", err)
	} else if err != nil {
		fmt.Fprintf(os.Stderr, "hostcryptd: warning: the header was changed, but the server of the volume did not take that over: %v; it looks for itself, at the latest when it next looks at the key\n", err)
	}
	if !k.accepted || k.repinned {
		k.hintInitramfs(d.Name(), volume, k.before, k.header, k.repinned)
	}
	k.header = nil
}

// observe records each use of a KEK.
func (k *keyFlags) observe(volume string) func(keyunseal.Exchange) {
	return func(x keyunseal.Exchange) {
		r := audit.Record{
			Event: x.Op, Volume: volume, Key: x.KeyID, Version: x.KeyVersion, Outcome: audit.OK,
			Class: x.Class, Code: x.Code, Status: x.Status, Duration: x.Duration.Milliseconds(),
			ClientRequestID: x.ClientRequestID, RequestID: x.RequestID,
		}
		if !x.OK() {
			r.Outcome = audit.Failed
		}
		k.record(r)
	}
}
