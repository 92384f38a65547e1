package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal"
	"hostcryptd/keyunseal/audit"
	"hostcryptd/sector"
)

// rewrapped is what rewrap did to one token.
type rewrapped struct {
	Token   int  `json:"token"`
	Current bool `json:"current"`       // it was sealed with the newest version already
	New     *int `json:"new,omitempty"` // the token in its place
	kept    int  // days for which it stays a way in
}

func (a *app) rewrapCommand() *cobra.Command {
	var (
		keys  keyFlags
		keep  int
		token int
		all   bool
		drop  bool
	)
	c := &cobra.Command{
		Use:   "rewrap DEVICE",
		Short: "wrap the volume key with the newest version of its key",
		Long: `rewrap seals the volume key with the newest version of the vault's key, unseals
what that gave, and writes it to the header, one copy after the other. The token
of the old version stays a way in for some days, and is removed by the first
rewrap after, or by the daemon that serves the volume. Until then the old version of
the key must not be deleted. The data is not encrypted anew, and the volume may be in
use meanwhile.

The token of a TPM that doesn't unseal any more, because its PCRs hold something
else or it is another TPM, is sealed anew to what this host's TPM holds now. That
takes another key which opens the volume. The old token goes at once: it would open the
volume where the machine starts as it did before, such as without Secure Boot.`,
		Args: oneArg("DEVICE"),
		RunE: func(c *cobra.Command, args []string) error {
			if keep < 0 || keep > 3650 {
				return usagef("--keep-old is 0 to 3650 days, not %d", keep)
			}
			if drop && (token >= 0 || all) {
				return usagef("--drop-only rewraps nothing: it excludes --token and --all")
			}
			return withHeader(args[0], false, func(d *sector.Device) error {
				h, _, err := sector.ReadHeader(c.Context(), d)
				if err != nil {
					return err
				}
				var ids []int
				if !drop {
					if ids, err = rewrapWhich(sector.KeyTokens(h), token, all); err != nil {
						return err
					}
				}
				keepOf := func(id int) int {
					if h.Tokens[id].Type == keyunseal.TypeTPM && !c.Flags().Changed("keep-old") {
						return 0
					}
					return keep
				}
				log := a.cliLog()
				child := &keyunseal.Child{Log: log}
				rewrap := func(ctx context.Context, volume string, token json.RawMessage, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
					return child.Rewrap(ctx, keys.options(volume, log), token, volume, key)
				}
				var (
					done   = []rewrapped{}
					failed []error
				)
				for _, id := range ids {
					kept := keepOf(id)
					n, err := sector.ReplaceToken(c.Context(), d, keys.unsealer(log), id, rewrap, time.Duration(kept)*24*time.Hour, keys.open(log))
					if !errors.Is(err, keyunseal.ErrCurrent) {
						becomes := fmt.Sprintf("token %d becomes token %d", id, n)
						if err != nil {
							becomes = fmt.Sprintf("token %d", id)
						}
						keys.changed(c.Context(), d, audit.Rewrap, becomes, err)
					}
					switch {
					case errors.Is(err, keyunseal.ErrCurrent):
						done = append(done, rewrapped{Token: id, Current: true})
					case err != nil:
						failed = append(failed, err)
					default:
						done = append(done, rewrapped{Token: id, New: &n, kept: kept})
					}
				}
				dropped := []int{}
				if failed == nil {
					gone, err := sector.DropRetired(c.Context(), d, keys.unsealer(log), time.Now(), keys.open(log))
					dropped, failed = append(dropped, gone...), append(failed, err)
					for _, id := range gone {
						keys.changed(c.Context(), d, audit.KeyRemove, fmt.Sprintf("token %d, retired", id), nil)
					}
				}
				if a.json {
					failed = append(failed, a.printJSON(map[string]any{"device": args[0], "tokens": done, "dropped": dropped}))
					return errors.Join(failed...)
				}
				for _, r := range done {
					switch {
					case r.Current:
						fmt.Fprintf(a.stdout, "token %d is sealed with the newest version of its key\n", r.Token)
					case r.kept == 0:
						fmt.Fprintf(a.stdout, "token %d takes the place of token %d\n", *r.New, r.Token)
					default:
						fmt.Fprintf(a.stdout, "token %d takes the place of token %d, which is kept for %d days\n", *r.New, r.Token, r.kept)
					}
				}
				for _, id := range dropped {
					fmt.Fprintf(a.stdout, "token %d was retired, and is removed\n", id)
				}
				return errors.Join(failed...)
			})
		},
	}
	f := c.Flags()
	f.IntVar(&keep, "keep-old", 7, "`DAYS` for which the old token stays a way in; that of a TPM only where this is given")
	numberVar(f, &token, -1, "token", "`NUMBER` of the token to rewrap, where there are several")
	f.BoolVar(&all, "all", false, "rewrap all tokens that are not retired")
	f.BoolVar(&drop, "drop-only", false, "rewrap nothing, only remove retired tokens whose time is over")
	keys.add(c)
	return a.jsonFlag(c)
}

// rewrapWhich chooses the tokens to rewrap.
func rewrapWhich(tokens []sector.KeyToken, token int, all bool) ([]int, error) {
	var ids, vault []int
	for _, t := range tokens {
		if !t.Retired.IsZero() {
			continue
		}
		ids = append(ids, t.ID)
		if t.Type == keyunseal.TypeKeyVault {
			vault = append(vault, t.ID)
		}
	}
	switch {
	case token >= 0 && all:
		return nil, usagef("--token and --all exclude each other")
	case token >= 0 && !slices.Contains(ids, token):
		return nil, usagef("there is no token %d that could be rewrapped, only %v", token, ids)
	case token >= 0:
		return []int{token}, nil
	case all || len(ids) == 1:
		return ids, nil
	case len(vault) == 1:
		return vault, nil
	}
	return nil, usagef("there are tokens %v: choose with --token NUMBER, or --all", ids)
}
