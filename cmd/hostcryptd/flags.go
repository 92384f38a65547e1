package main

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"hostcryptd/sector"
)

// What is wrong with a command line is said here, in the words of the manual rather
// than of cobra.

// knownCommand refuses a mistyped subcommand. Of one below another command, cobra says
// no more than the help of that, and that it all went well.
func knownCommand(root *cobra.Command, args []string) error {
	c, rest, err := root.Find(args)
	if err != nil {
		// Where it finds no command at all it doesn't say which word it took for one.
		c, rest = root, args
	}
	if c.Name() == "help" && c.Parent() == root {
		if c, rest, err = root.Find(rest); err != nil {
			c = root
		}
	}
	i := slices.IndexFunc(rest, func(arg string) bool { return !strings.HasPrefix(arg, "-") })
	if err == nil && c.Runnable() || i < 0 || strings.HasPrefix(rest[i], cobra.ShellCompRequestCmd) {
		return nil
	}
	c.SuggestionsMinimumDistance = 2
	hint := ""
	if near := c.SuggestionsFor(rest[i]); len(near) > 0 {
		hint = fmt.Sprintf("did you mean %s? ", strings.Join(near, " or "))
	}
	return usagef("unknown command %q for %q; %s'%s --help' lists them", rest[i], c.CommandPath(), hint, c.CommandPath())
}

// oneArg checks for exactly one argument, and says what it should have been.
func oneArg(name string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) != 1 {
			return usagef("%s takes one argument, %s, not %d", c.CommandPath(), name, len(args))
		}
		return notEmpty(c, args)
	}
}

// atMostOneArg is the same for an argument that may be left out.
func atMostOneArg(name string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if len(args) > 1 {
			return usagef("%s takes one argument at most, %s, not %d", c.CommandPath(), name, len(args))
		}
		return notEmpty(c, args)
	}
}

// noArgs checks that there is no argument.
func noArgs(c *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usagef("%s takes no argument, and got %q", c.CommandPath(), args[0])
	}
	return nil
}

// notEmpty refuses what a script makes of a variable that isn't set. It would mean
// every volume, and so the only one.
func notEmpty(c *cobra.Command, args []string) error {
	if slices.Contains(args, "") {
		return usagef("an argument of %s is empty", c.CommandPath())
	}
	return nil
}

// noEmptyFlags refuses what a script makes of a variable that isn't set. It would mean
// that the flag wasn't given, such as no recovery key.
func noEmptyFlags(c *cobra.Command) (err error) {
	c.Flags().Visit(func(f *pflag.Flag) {
		if f.Value.String() == "" && err == nil {
			err = usagef("--%s is empty; leave it out if it is not meant", f.Name)
		}
	})
	return err
}

// flagError makes an error of pflag's, which has one for programmers in it, one for
// people.
func flagError(c *cobra.Command, err error) error {
	if e, ok := errors.AsType[*pflag.InvalidValueError](err); ok {
		f := e.GetFlag()
		want := map[string]string{
			"duration": "a number with a unit, such as 90s, 10m or 1h30m",
			"int":      "a number",
			"number":   "a number from 0 on",
			"bool":     "true or false",
		}[f.Value.Type()]
		if want != "" {
			err = fmt.Errorf("--%s is %s, not %q", f.Name, want, e.GetValue())
		}
	}
	return usagef("%w; '%s --help' lists the flags", err, c.CommandPath())
}

// A number is a flag's value that is below 0 only if the flag isn't given.
type number int

// numberVar is for a flag that names one of several things by its number; *p is unset,
// which is below 0, without the flag.
func numberVar(f *pflag.FlagSet, p *int, unset int, name, usage string) {
	*p = unset
	f.Var((*number)(p), name, usage)
}

func (n *number) Set(s string) error {
	v, err := strconv.ParseUint(s, 10, 31)
	if err == nil {
		*n = number(v)
	}
	return err
}

func (n *number) String() string {
	if *n < 0 {
		return "" // so that --help shows no default
	}
	return strconv.Itoa(int(*n))
}

func (n *number) Type() string { return "number" }

// A uuidFlag is a flag with the UUID of a volume, or "" without it.
type uuidFlag string

func (f *uuidFlag) String() string { return string(*f) }

func (f *uuidFlag) Type() string { return "string" }

// Set is that of pflag.Value.
func (f *uuidFlag) Set(s string) error {
	uuid, err := volumeUUID(s)
	*f = uuidFlag(uuid)
	return err
}

// volumeUUID is the UUID of a volume that s writes. Headers have it in lower case, and
// people read both as the same (RFC 9562 section 4).
func volumeUUID(s string) (string, error) {
	uuid := strings.ToLower(s)
	if !sector.IsUUID(uuid) {
		return "", fmt.Errorf("%.100q is not the UUID of a volume", s)
	}
	return uuid, nil
}
