// Command hostcryptd is encryption at host for any Linux machine: it stands in
// front of a raw backing disk as an NBD server and encrypts every sector, so
// that the host's swap, file systems, dumps and logs never reach the disk in
// plaintext. This one binary is the daemon ("serve") and its administration.
//
// This package is the composition root: it is the only one that knows all the
// others, and it holds no logic that one of them could hold. serve.go is where
// the parts are put together; read it first.
//
// Rules of the user interface. What a command was asked for goes to standard
// output, everything else to standard error. With --json standard output is
// one JSON value. Messages start in lower case and have no full stop; an error
// says what was being done, to what, why it went wrong and, where that is
// known, what to do next. Nothing secret is ever printed, logged, or taken from
// an argument or the environment.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"path/filepath"
	"strings"
	"unicode"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"hostcryptd/keyunseal"
)

func main() {
	if os.Getenv(keeperEnv) != "" {
		listenToSignals()
	}
	if len(os.Args) > 1 && os.Args[1] == keyunseal.ChildArg {
		os.Exit(keyunseal.ChildMain())
	}
	if len(os.Args) > 1 && os.Args[1] == deriveArg {
		os.Exit(deriveMain())
	}
	if filepath.Base(os.Args[0]) == generatorName {
		os.Exit(generatorMain(os.Args[1:]))
	}
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run is main without the process: it executes one command line and returns
// its exit code.
func run(ctx context.Context, args []string, stdin *os.File, stdout, stderr io.Writer) int {
	stderr = logTo(stderr)
	log.SetOutput(io.Discard) // net/http tells there what its errors say again
	out := &answerWriter{w: stdout}
	a := &app{stdin: stdin, stdout: out, stderr: stderr}
	root := a.root()
	root.SetArgs(args)
	root.SetOut(out)
	root.SetErr(stderr)
	err := knownCommand(root, args)
	if err == nil {
		err = root.ExecuteContext(ctx)
	}
	if silent, ok := errors.AsType[*silentError](err); ok {
		return silent.code
	}
	if out.err != nil && !errors.Is(err, out.err) {
		err = errors.Join(err, fmt.Errorf("the answer could not be written: %w", out.err))
	}
	if err != nil {
		fmt.Fprintln(stderr, "hostcryptd:", printable(err.Error()))
	}
	return exitCode(err)
}

// An answerWriter remembers that an answer, of many writes, was lost.
type answerWriter struct {
	w   io.Writer
	err error
}

func (a *answerWriter) Write(p []byte) (int, error) {
	n, err := a.w.Write(p)
	if err != nil && a.err == nil {
		a.err = err
	}
	return n, err
}

// An app is what all commands share.
type app struct {
	stdin          *os.File
	stdout, stderr io.Writer
	json           bool // --json
}

const rootLong = `hostcryptd encrypts a disk at the host. It stands in front of a raw backing
device as an NBD server and encrypts every sector with AES-256-XTS; the kernel
attaches it as /dev/nbdN, and QEMU or any libnbd client uses a Unix socket.

The data key is stored wrapped in the disk's LUKS2 header. It is unwrapped with a
key in Azure Key Vault or a Managed HSM that never leaves it, or with the platform's
key that needs no configuration: the TPM's, or a key file's on a host without a TPM.
With its recovery key cryptsetup opens the same disk.

The manual is hostcryptd(8), and hostcrypttab(5) for volumes that are attached at boot.`

const rootExample = `  hostcryptd format /dev/sdb --recovery-key sdb.recovery
  hostcryptd serve /dev/sdb --attach /dev/nbd0 &
  until hostcryptd status /dev/nbd0 2>/dev/null; do sleep 1; done
  mkfs.ext4 /dev/nbd0

  hostcryptd format disk.img --key https://VAULT.vault.azure.net/keys/NAME
  hostcryptd serve disk.img --listen /run/disk.sock &
  until [ -S /run/disk.sock ]; do sleep 1; done
  qemu-system-x86_64 -drive file=nbd+unix:///?socket=/run/disk.sock,format=raw`

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:     "hostcryptd",
		Short:   "encryption at host: encrypted disks over NBD",
		Long:    rootLong + "\n\n" + exitCodesHelp(),
		Example: rootExample,

		SilenceUsage:  true, // an error message is worth more than a page of flags
		SilenceErrors: true,

		PersistentPreRunE: func(c *cobra.Command, _ []string) error {
			switch c.Name() {
			case "serve", "dial", "speed":
				// Servers have secret memory for their keys and children for what computes
				// with them, and lock all of theirs, which is more, where that is asked for.
			default:
				// These compute with keys themselves.
				keyunseal.LockMemory()
			}
			return errors.Join(harden(), noEmptyFlags(c))
		},
	}
	root.SetFlagErrorFunc(flagError)
	root.Flags().Bool("version", false, "print the version") // cobra's own would have -v too, which is verbose elsewhere
	root.Version = versionText()
	root.SetVersionTemplate("{{.Version}}\n")
	root.AddCommand(
		a.formatCommand(), a.serveCommand(), a.statusCommand(), a.lockCommand(), a.unlockCommand(), a.reloadCommand(), a.resizeCommand(), a.detachCommand(), a.dumpCommand(),
		a.checkCommand(), a.keyCommand(), a.rewrapCommand(), a.recoveryCommand(), a.headerCommand(), a.eraseCommand(), a.auditCommand(), a.speedCommand(), a.versionCommand(), a.dialCommand(), a.initramfsCommand(),
	)
	complete(root)
	tidyDefaults(root)
	return root
}

// jsonFlag adds --json to a command whose answer a program may read.
func (a *app) jsonFlag(c *cobra.Command) *cobra.Command {
	c.Flags().BoolVar(&a.json, "json", false, "print the answer as JSON")
	return c
}

// printJSON prints the answer of a command with --json.
func (a *app) printJSON(v any) error {
	e := json.NewEncoder(a.stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// answer ends a command: with its error, else with v if --json was given, or a line.
func (a *app) answer(err error, v any, format string, args ...any) error {
	if err == nil && a.json {
		return a.printJSON(v)
	}
	if err == nil {
		fmt.Fprintf(a.stdout, format+"\n", args...)
	}
	return err
}

func (a *app) warnf(format string, args ...any) {
	fmt.Fprintf(a.stderr, "hostcryptd: warning: "+format+"\n", args...)
}

// harden keeps keys out of core dumps, and other processes of the same user
// out of our memory.
func harden() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("switching off core dumps: %w", err)
	}
	return nil
}

// isTerminal tells whether a person sits at f.
func isTerminal(f any) bool {
	file, ok := f.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(file.Fd()), unix.TCGETS)
	return err == nil
}

// printable makes one line of text harmless to a terminal. Labels and tokens
// come from headers that anybody may have written.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\n':
			return r // of our own: JSON and headers have none
		case unicode.IsPrint(r):
			return r
		}
		return unicode.ReplacementChar
	}, s)
}

// bytesText writes a size for people: exact in bytes, and rounded.
func bytesText(n uint64) string {
	units := []string{"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, unit := float64(n), ""
	for i := 0; f >= 1024 && i < len(units); i++ {
		f, unit = f/1024, units[i]
	}
	if unit == "" {
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprintf("%d bytes (%.1f %s)", n, f, unit)
}
