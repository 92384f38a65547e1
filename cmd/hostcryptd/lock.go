package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal/lifecycle"
)

// lockCommand and unlockCommand are an operator's hand on the key.
func (a *app) lockCommand() *cobra.Command {
	return a.postCommand("lock", "stop a volume now and wipe its keys", `lock refuses requests from now on, flushes what was written, and wipes the keys,
without a grace period. The daemon goes on running, and the volume stays locked
until 'hostcryptd unlock' or a restart of the daemon. Whoever uses the volume sees
I/O errors, also with --on-revocation freeze, and also where I/O waited for a key.

Where nothing brings the keys back, as with --random-key, or because the header on the disk
is gone or isn't authentic, it asks for --force: the data is lost then.`,
		func(lifecycle.State) string { return "is locked: its keys are wiped" })
}

func (a *app) unlockCommand() *cobra.Command {
	return a.postCommand("unlock", "undo a lock, or try to unseal now", `unlock lets the daemon unseal a volume that was locked. Where it is waiting for
its next try, it tries now.`, func(was lifecycle.State) string {
		switch {
		case was == lifecycle.Unlocked:
			return "is unlocked already"
		case was.Serving():
			return "is unlocked, and its key is looked at now"
		}
		return "is being unsealed"
	})
}

// postCommand is a command without an answer of its own: done says what became of a
// volume whose key was in a state.
func (a *app) postCommand(name, short, long string, done func(was lifecycle.State) string) *cobra.Command {
	force := false
	c := &cobra.Command{
		Use:   name + " VOLUME",
		Short: short,
		Long:  long + "\n\n" + whichHelp,
		Args:  oneArg("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			s, err := theOne(c.Context(), args[0])
			if err != nil {
				return err
			}
			if err := newControlClient(s.Control).do(c.Context(), "POST", fmt.Sprintf("/v1/%s?force=%t", name, force), nil); err != nil {
				return err
			}
			return a.answer(nil, map[string]string{"uuid": s.UUID, "device": s.Device}, "%s %s", s.Device, done(s.Key.State))
		},
	}
	if name == "lock" {
		c.Flags().BoolVar(&force, "force", false, "wipe the keys also if nothing brings them back, and so the data")
	}
	return a.jsonFlag(c)
}
