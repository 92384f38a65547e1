package main

import (
	"context"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"hostcryptd/keyunseal"
	"hostcryptd/sector"
)

// completeTimeout is how long a person who presses Tab waits for servers that hang, and
// for a header that is locked.
const completeTimeout = time.Second

// flagWords are the values of flags that have some of their own.
var flagWords = map[string][]string{
	"key":           {keyunseal.SpecPlatform, "tpm", "host-key"},
	"identity":      {"managed", "arc"},
	"on-revocation": {"stop", "freeze", "read-only", "warn"},
	"expired-key":   {"warn", "deny"},
	"sector-size":   {"4096", "512"},
}

// complete says of every argument and flag what can stand there, by the word that
// stands for it in the help. The shell asks by a hidden command of cobra's.
func complete(c *cobra.Command) {
	for _, sub := range c.Commands() {
		complete(sub)
	}
	c.Flags().VisitAll(func(f *pflag.Flag) {
		word, _ := pflag.UnquoteUsage(f)
		switch word {
		case "FILE", "PATH", "SOCKET":
			return // as the shell does by itself
		case "DIR", "DIRECTORY":
			_ = c.MarkFlagDirname(f.Name)
			return
		}
		_ = c.RegisterFlagCompletionFunc(f.Name, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			if f.Name == "attach" {
				devices, _ := filepath.Glob("/dev/nbd*[0-9]")
				return append([]string{"auto"}, devices...), cobra.ShellCompDirectiveNoFileComp
			}
			return flagWords[f.Name], cobra.ShellCompDirectiveNoFileComp
		})
	})
	words := argWords(c.Use)
	c.ValidArgsFunction = func(c *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		word := ""
		if n := len(args); n < len(words) {
			word = words[n]
		} else if n := len(words); n > 0 && strings.HasSuffix(words[n-1], "...") {
			word = words[n-1]
		}
		if f := c.Flag("in-use"); f != nil && f.Changed && word == "DEVICE" {
			word = "VOLUME" // of erase
		}
		switch word {
		case "DEVICE", "FILE", "FILE...":
			return nil, cobra.ShellCompDirectiveDefault
		case "DEVICE|NAME":
			return tabNames(tabFile), cobra.ShellCompDirectiveDefault
		case "VOLUME":
			return servedNames(c.Context()), cobra.ShellCompDirectiveNoFileComp
		case "TOKEN":
			return tokenNumbers(c.Context(), args[0]), cobra.ShellCompDirectiveNoFileComp
		case "OPTION":
			return []string{"x-initrd.attach", "x-kdump.attach"}, cobra.ShellCompDirectiveNoFileComp
		case "":
		case strings.ToLower(word):
			return strings.Split(word, "|"), cobra.ShellCompDirectiveNoFileComp
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}

// argWords are the words for arguments in a line of usage.
func argWords(use string) (words []string) {
	fields := strings.Fields(use)[1:]
	for i := 0; i < len(fields); i++ {
		if strings.HasPrefix(fields[i], "--") {
			i++ // with its value
			continue
		}
		words = append(words, strings.Trim(fields[i], "[]"))
	}
	return words
}

// tabNames are the names of a table's volumes, with their devices.
func tabNames(file string) (names []string) {
	entries, _, _ := readTab(file)
	for _, e := range entries {
		names = append(names, cobra.CompletionWithDesc(e.unit.Name, printable(e.unit.Device)))
	}
	return names
}

// servedNames are names of the volumes that are served now: each one's in the table, or
// else its UUID, and its devices. A label is what anybody can write on a disk.
func servedNames(ctx context.Context) (names []string) {
	ctx, cancel := context.WithTimeout(ctx, completeTimeout)
	defer cancel()
	list, _ := running(ctx, "")
	for _, s := range list {
		name := s.UUID
		if s.Name != "" {
			name = s.Name
		}
		names = append(names, cobra.CompletionWithDesc(name, printable(s.Device)))
		if s.Attached != "" {
			names = append(names, cobra.CompletionWithDesc(s.Attached, name))
		}
		names = append(names, cobra.CompletionWithDesc(s.Device, name))
	}
	return names
}

// tokenNumbers are those of the tokens on a device, or on that of a volume of the table,
// with their keys.
func tokenNumbers(ctx context.Context, device string) (numbers []string) {
	if e, err := named(device); err == nil && e != nil {
		device = e.unit.Device
	}
	ctx, cancel := context.WithTimeout(ctx, completeTimeout)
	defer cancel()
	_ = withHeader(device, true, func(d *sector.Device) error {
		h, _, err := sector.ReadHeader(ctx, d)
		if err != nil {
			return err
		}
		for _, t := range tokenInfos(h) {
			if t.Key != nil {
				numbers = append(numbers, cobra.CompletionWithDesc(strconv.Itoa(t.ID), printable(t.text())))
			}
		}
		return nil
	})
	return numbers
}

const completionLong = `completion prints a script that completes command lines of hostcryptd in a shell.
'make install' has installed those for bash, fish and zsh. By hand, for this session:

  bash (with the package bash-completion): source <(hostcryptd completion bash)
  zsh (with compinit):                     source <(hostcryptd completion zsh)
  fish:                                    hostcryptd completion fish | source`

// tidyDefaults gives cobra's own commands the words of the others. It speaks of other
// systems than Linux, and each shell's help is a page.
func tidyDefaults(root *cobra.Command) {
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		switch c.Name() {
		case "help":
			c.Short = "show the help of a command"
		case "completion":
			c.Short, c.Long = "print a script that completes command lines in a shell", completionLong
			for _, shell := range c.Commands() {
				shell.Short, shell.Long = "for "+shell.Name(), ""
				if shell.Name() == "powershell" {
					c.RemoveCommand(shell)
				}
			}
		}
	}
}
