package main

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"hostcryptd/keyunseal/lifecycle"
)

// The manual is written by hand, and these tests compare it with the program.

const commandsPage, tabPage = "hostcryptd.8", "hostcrypttab.5"

// A manSection is what stands between two headings of mdoc(7).
type manSection struct {
	section, sub string // of .Sh, and of .Ss or ""
	lines        []string
}

func readPage(t *testing.T, name string) (list []manSection) {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		line = strings.TrimRight(line, "\n")
		if s, ok := strings.CutPrefix(line, ".Sh "); ok {
			list = append(list, manSection{section: s})
		} else if s, ok := strings.CutPrefix(line, ".Ss "); ok {
			list = append(list, manSection{section: list[len(list)-1].section, sub: s})
		} else if n := len(list); n > 0 {
			list[n-1].lines = append(list[n-1].lines, line)
		}
	}
	return list
}

func findSection(t *testing.T, page []manSection, section, sub string) []string {
	t.Helper()
	i := slices.IndexFunc(page, func(s manSection) bool { return s.section == section && s.sub == sub })
	if i < 0 {
		t.Fatalf("the page has no section %q, %q", section, sub)
	}
	return page[i].lines
}

// A manItem is one of a .Bl list: the words of its .It line, and its text without
// macros.
type manItem struct {
	words []string
	text  string
}

func manItems(lines []string) (list []manItem) {
	for _, line := range lines {
		if s, ok := strings.CutPrefix(line, ".It "); ok {
			list = append(list, manItem{words: strings.Fields(s)})
		} else if n := len(list); n > 0 {
			if strings.HasPrefix(line, ".") {
				_, line, _ = strings.Cut(line, " ")
			}
			list[n-1].text = strings.TrimSpace(list[n-1].text + " " + line)
		}
	}
	return list
}

// manFlags are the flags in the words of a macro line, and whether each has a value.
func manFlags(words []string) map[string]bool {
	flags := map[string]bool{}
	for i, w := range words {
		if w == "Fl" && i+1 < len(words) && strings.HasPrefix(words[i+1], "-") {
			flags[words[i+1][1:]] = i+2 < len(words) && (words[i+2] == "Ar" || words[i+2] == "Cm")
		}
	}
	return flags
}

// keyOptions is what stands for the flags of keyFlags.add.
const keyOptions = "KEY-OPTIONS"

// A manCommand is a command as the page has it.
type manCommand struct {
	flags map[string]bool // and whether each has a value; also keyOptions
	args  string          // as in cobra's Use
}

// readSynopsis returns the commands by their names, and these in order.
func readSynopsis(lines []string) (map[string]*manCommand, []string) {
	commands, names := map[string]*manCommand{}, []string{}
	var name string
	var c *manCommand
	for _, line := range lines {
		if line == ".Nm" {
			continue
		}
		if s, ok := strings.CutPrefix(line, ".Ic "); ok {
			name, c = s, &manCommand{flags: map[string]bool{}}
			names, commands[name] = append(names, name), c
			continue
		}
		words := strings.Fields(line)
		switch {
		case words[0] == ".Cm": // one command for each word
			for _, w := range words[1:] {
				if w != "|" {
					commands[name+" "+w] = c
				}
			}
			delete(commands, name)
		case line == ".Op Ar "+keyOptions:
			c.flags[keyOptions] = true
		case words[0] == ".Ar":
			c.args += " " + strings.Join(words[1:], "")
		case words[0] == ".Op" && words[1] == "Ar":
			c.args += " [" + strings.Join(words[2:], "") + "]"
		default:
			maps.Copy(c.flags, manFlags(strings.Fields(line[1:])))
		}
	}
	return commands, names
}

// programCommands are all that a person can run, by their names.
func programCommands() map[string]*cobra.Command {
	root := (&app{stdout: io.Discard, stderr: io.Discard}).root()
	root.InitDefaultHelpCmd()
	root.InitDefaultCompletionCmd()
	commands := map[string]*cobra.Command{}
	var walk func(c *cobra.Command, name string)
	walk = func(c *cobra.Command, name string) {
		if c != root && c.Runnable() && !c.HasSubCommands() && !c.Hidden { // hidden: what a unit runs
			commands[name] = c
		}
		for _, s := range c.Commands() {
			walk(s, strings.TrimSpace(name+" "+s.Name()))
		}
	}
	walk(root, "")
	return commands
}

// programFlags are those of a command, but for --help, and whether each has a value.
func programFlags(flags *pflag.FlagSet) map[string]bool {
	list := map[string]bool{}
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Name != "help" {
			list[f.Name] = f.NoOptDefVal == ""
		}
	})
	return list
}

// TestManCommands: the page has the commands and flags that the program has.
func TestManCommands(t *testing.T) {
	page := readPage(t, commandsPage)
	synopsis, order := readSynopsis(findSection(t, page, "SYNOPSIS", ""))
	program := programCommands()
	if got, want := slices.Sorted(maps.Keys(synopsis)), slices.Sorted(maps.Keys(program)); !slices.Equal(got, want) {
		t.Fatalf("the synopsis has the commands %q, and the program %q", got, want)
	}

	// What OPTIONS describes for all.
	var group keyFlags
	withKeys := &cobra.Command{}
	group.add(withKeys)
	keys := programFlags(withKeys.Flags())
	common := map[string]manItem{}
	got := map[string]bool{}
	for _, item := range manItems(findSection(t, page, "OPTIONS", "")) {
		flags := manFlags(item.words)
		maps.Copy(got, flags)
		for f := range flags {
			common[f] = item
		}
	}
	want := maps.Clone(keys)
	want["help"], want["json"] = false, false
	if !maps.Equal(got, want) {
		t.Errorf("OPTIONS describes the flags %v, want %v", got, want)
	}

	var described []string
	for _, s := range page {
		if s.section == "COMMANDS" && s.sub != "" {
			described = append(described, s.sub)
		}
	}
	if !slices.Equal(described, order) {
		t.Fatalf("COMMANDS describes %q, and the synopsis has %q", described, order)
	}

	for name, c := range program {
		flags := programFlags(c.Flags())
		m := synopsis[name]
		given := maps.Clone(m.flags)
		if given[keyOptions] {
			delete(given, keyOptions)
			maps.Copy(given, keys)
		}
		if !maps.Equal(given, flags) {
			t.Errorf("%s: the synopsis has the flags %v, and the program %v", name, given, flags)
		}
		// "add DEVICE --key KEY", "help [command]"
		use := regexp.MustCompile(` --\S+ \S+`).ReplaceAllString(c.Use, "")
		use = strings.ReplaceAll(use, c.Name(), "")
		if !strings.EqualFold(strings.TrimSpace(m.args), strings.TrimSpace(use)) {
			t.Errorf("%s: the synopsis has the arguments %q, and --help %q", name, m.args, use)
		}
		heading := name
		if !slices.Contains(described, name) {
			heading = name[:strings.LastIndex(name, " ")]
		}
		own := map[string]manItem{}
		for _, item := range manItems(findSection(t, page, "COMMANDS", heading)) {
			for f := range manFlags(item.words) {
				own[f] = item
				if _, ok := flags[f]; !ok {
					t.Errorf("%s: --%s is described, and the program doesn't have it", name, f)
				}
			}
		}
		for f, value := range flags {
			item, ok := own[f]
			if !ok {
				item, ok = common[f]
			}
			if !ok {
				t.Errorf("%s: --%s is not described", name, f)
			} else if manFlags(item.words)[f] != value {
				t.Errorf("%s: --%s is described as %q, want a value: %t", name, f, item.words, value)
			}
			want, got := defaultText(c.Flags().Lookup(f)), ""
			if d := regexp.MustCompile(`The default is (\S+?) ?\.( |$)`).FindStringSubmatch(item.text); d != nil {
				got = d[1]
			}
			if got != want {
				t.Errorf("%s: the default of --%s is described as %q, want %q", name, f, got, want)
			}
		}
	}
}

// defaultText is the default of a flag as the page has it, "" if it's nothing that
// could be typed.
func defaultText(f *pflag.Flag) string {
	if d, err := time.ParseDuration(f.DefValue); err == nil && f.Value.Type() == "duration" {
		if d <= 0 {
			return ""
		}
		return strings.TrimSuffix(strings.TrimSuffix(d.String(), "0s"), "0m")
	}
	if f.DefValue == "false" || f.DefValue == "0" {
		return ""
	}
	return f.DefValue
}

// TestManExitCodes: the page has the table of the code.
func TestManExitCodes(t *testing.T) {
	var got, want []string
	for _, item := range manItems(findSection(t, readPage(t, commandsPage), "EXIT STATUS", "")) {
		sentence, _, _ := strings.Cut(item.text+" ", ". ")
		got = append(got, item.words[0]+" "+strings.TrimSpace(sentence))
	}
	for _, e := range exitCodes {
		want = append(want, fmt.Sprintf("%d %c%s", e.code, unicode.ToUpper(rune(e.meaning[0])), e.meaning[1:]))
	}
	if !slices.Equal(got, want) {
		t.Errorf("the exit codes are\n%q, want\n%q", got, want)
	}
}

// TestManStates: the page explains the states that status shows.
func TestManStates(t *testing.T) {
	page := readPage(t, commandsPage)
	states := func(sub, field string) (list []string) {
		for _, item := range manItems(findSection(t, page, "DIAGNOSTICS", sub)) {
			if item.words[0] == field {
				list = append(list, item.words[1])
			}
		}
		slices.Sort(list)
		return list
	}
	if got, want := states("The server", "state:"), []string{stateServing, stateStopping, stateUnsealing}; !slices.Equal(got, want) {
		t.Errorf("states of the server: %q, want %q", got, want)
	}
	var want []string
	for s := lifecycle.Locked; s <= lifecycle.Erased; s++ {
		want = append(want, s.String())
	}
	slices.Sort(want)
	if got := states("The key", "key:"); !slices.Equal(got, want) {
		t.Errorf("states of the key: %q, want %q", got, want)
	}
}

// TestManEnvironment: the page has the variables that the program reads, but for
// those by which its processes tell each other something.
func TestManEnvironment(t *testing.T) {
	own := []string{keeperEnv, serverEnv, initrdEnv, lockEnv, tabEnv, deviceEnv}
	name := regexp.MustCompile(`"(HOSTCRYPTD_[A-Z_]+)"`)
	want := map[string]bool{}
	err := filepath.WalkDir("../..", func(path string, e fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case e.IsDir() && (e.Name() == "test" || e.Name() == "internal" || e.Name() == "audit"): // audit: fields of the journal
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		b, err := os.ReadFile(path)
		for _, m := range name.FindAllSubmatch(b, -1) {
			if v := string(m[1]); !slices.Contains(own, v) {
				want[v] = true
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]bool{}
	for _, item := range manItems(findSection(t, readPage(t, commandsPage), "ENVIRONMENT", "")) {
		if v := item.words[1]; strings.HasPrefix(v, "HOSTCRYPTD_") {
			got[v] = true
		}
	}
	if !maps.Equal(got, want) {
		t.Errorf("the page has the variables %q, and the program reads %q", slices.Sorted(maps.Keys(got)), slices.Sorted(maps.Keys(want)))
	}
}

// TestManTab: the page has the words of hostcrypttab that the parser knows, and
// those that the scripts of an initramfs do.
func TestManTab(t *testing.T) {
	scripts, err := os.ReadFile("../../systemd/initrd/initrd.sh")
	if err != nil {
		t.Fatal(err)
	}
	type word struct {
		value   int // noValue and so on
		refused bool
	}
	want, got := map[string]word{}, map[string]word{}
	for name, w := range tabWords {
		want[name] = word{w.value, w.no != ""}
	}
	for _, name := range regexp.MustCompile(`\bx-[a-z.-]+`).FindAllString(string(scripts), -1) {
		want[name] = word{}
	}
	for _, s := range readPage(t, tabPage) {
		if s.section != "OPTIONS" {
			continue
		}
		for _, item := range manItems(s.lines) {
			line := strings.Join(item.words, " ")
			var w word
			line, value, hasValue := strings.Cut(line, " Ns ")
			switch {
			case strings.HasPrefix(value, "Op ="):
				w.value = maybeText
			case value == "= Ns Ar TIME":
				w.value = someTime
			case hasValue:
				w.value = someText
			}
			w.refused = s.sub == "Refused"
			for name := range strings.SplitSeq(strings.TrimPrefix(line, "Cm "), " , ") {
				got[name] = w
			}
		}
	}
	for name, w := range want {
		if g, ok := got[name]; !ok || g != w {
			t.Errorf("%s is described as %+v (%t), want %+v", name, g, ok, w)
		}
		delete(got, name)
	}
	if len(got) > 0 {
		t.Errorf("the page has %q, which nothing knows", slices.Sorted(maps.Keys(got)))
	}
}

// TestManExamples: the program understands what the examples say, also those of the
// README.
func TestManExamples(t *testing.T) {
	tabs, commands := 0, 0
	for _, name := range []string{commandsPage, tabPage} {
		text := strings.Join(findSection(t, readPage(t, name), "EXAMPLES", ""), "\n")
		for _, block := range strings.Split(text, "\n.Bd ")[1:] {
			block, _, _ = strings.Cut(block, "\n.Ed")
			_, block, _ = strings.Cut(block, "\n")
			block = strings.ReplaceAll(block, "\\e\n", " ")
			tab, ok := strings.CutPrefix(block, "# "+tabFile+"\n")
			if !ok {
				commands += checkCommands(t, name, block)
				continue
			}
			entries, bad := parseTab(tab)
			for _, e := range entries {
				tabs++
				if err := e.apply((&app{}).serveCommand().Flags()); err != nil {
					bad = append(bad, err)
				}
			}
			if bad != nil {
				t.Errorf("%s: %v in\n%s", name, bad, tab)
			}
		}
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	code := regexp.MustCompile(`(?m)^    .*\n`).FindAllString(string(readme), -1)
	inReadme := checkCommands(t, "README.md", strings.Join(code, ""))
	if tabs < 6 || commands < 15 || inReadme < 15 {
		t.Errorf("found %d lines of hostcrypttab, %d commands and %d in the README; does the test still know the form of the examples?", tabs, commands, inReadme)
	}
}

var commandLine = regexp.MustCompile(`(?m)^ *(?:until |.*&& )?hostcryptd ([^&#\n]*)`)

// checkCommands checks the command lines in a text, and returns their number.
func checkCommands(t *testing.T, where, text string) int {
	t.Helper()
	lines := commandLine.FindAllStringSubmatch(text, -1)
	for _, m := range lines {
		line, _, _ := strings.Cut(m[1], " 2>")
		c, args, err := (&app{stdout: io.Discard, stderr: io.Discard}).root().Find(strings.Fields(line))
		if err == nil && !c.Runnable() {
			err = fmt.Errorf("%s is no command", c.Name())
		}
		if err == nil {
			err = c.ParseFlags(args)
		}
		if err == nil {
			err = c.ValidateArgs(c.Flags().Args())
		}
		if err != nil {
			t.Errorf("%s: hostcryptd %s: %v", where, line, err)
		}
	}
	return len(lines)
}

// TestManForm: two programs that show manuals find nothing to complain of.
func TestManForm(t *testing.T) {
	for _, page := range []string{commandsPage, tabPage} {
		for _, tt := range []struct {
			pkg  string
			args []string
		}{
			{"mandoc", []string{"mandoc", "-T", "lint", "-W", "warning", page}},
			{"man-db", []string{"man", "--warnings", "-E", "UTF-8", "-l", page}},
		} {
			cmd := exec.Command(tt.args[0], tt.args[1:]...)
			var said bytes.Buffer
			cmd.Stderr = &said
			cmd.Env = append(os.Environ(), "MANWIDTH=80")
			out, err := cmd.Output()
			if cmd.Process == nil {
				t.Fatalf("%v (Debian package %s); run make deps", err, tt.pkg)
			}
			if tt.pkg == "mandoc" { // it complains on standard output
				said.Write(out)
			}
			if err != nil || said.Len() > 0 {
				t.Errorf("%q: %v\n%s", tt.args, err, said.String())
			}
		}
	}
}

// TestManUnits: the pages that units name are there.
func TestManUnits(t *testing.T) {
	units, err := filepath.Glob("../../systemd/*hostcryptd*.*")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, unit := range units {
		b, err := os.ReadFile(unit)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`\bman:(\S+)\((\d)\)`).FindAllSubmatch(b, -1) {
			named[string(m[1])+"."+string(m[2])] = true
		}
	}
	if want := map[string]bool{commandsPage: true, tabPage: true}; !maps.Equal(named, want) {
		t.Errorf("the units name the pages %v, want %v", named, want)
	}
}
