package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal/audit"
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
with 19 if any was. Without FILE it checks ` + audit.DefaultFile + `
and its rotated predecessors; of several files the oldest comes first.

That the end of the log was cut off, or all of it written anew, shows only against
a head of the chain, the number and hash of a record, that was kept elsewhere. The
daemon logs it with every record ("audit_head").`,
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
			if len(files) == 0 {
				files = audit.Files(audit.DefaultFile)
			}
			report, err := audit.Verify(files, anchor)
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
				if report.First > 1 {
					fmt.Fprintf(a.stdout, "the first %d records are in older files\n", report.First-1)
				}
				fmt.Fprintf(a.stdout, "%d records, head %v\n", report.Records, report.Head)
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
