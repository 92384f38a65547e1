package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"hostcryptd/systemd"
)

// generatorName is the name under which systemd runs this program in every boot
// and on every 'systemctl daemon-reload', before any unit: a systemd.generator(7).
const generatorName = "hostcryptd-generator"

// generatorMain makes units of the table. args are the three directories for
// them, of which it uses the first.
func generatorMain(args []string) int {
	// In early boot nobody reads standard error.
	var log io.Writer = os.Stderr
	if k, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); err == nil {
		log = kernelLog{k}
	}
	if len(args) == 0 {
		fmt.Fprintf(log, "<3>%s: no directory to write to was given\n", generatorName)
		return codeUsage
	}
	code := 0
	for _, err := range generate(tabFile, args[0]) {
		code = exitCode(err)
		fmt.Fprintf(log, "<3>%s: %s\n", generatorName, printable(err.Error()))
	}
	return code
}

// generate makes the units of a table in dir. A line that is wrong has a unit
// too, which fails at once and says why; so do those that wait for it.
func generate(file, dir string) []error {
	entries, errs, err := readTab(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []error{err}
	}
	var volumes []systemd.Volume
	for _, e := range entries {
		// What flags refuse shows only when they are set.
		a := &app{}
		if err := e.apply(a.serveCommand().Flags()); err != nil {
			errs = append(errs, err)
		}
		if e.unit.Device == "" {
			continue // there is nothing to order it by
		}
		volumes = append(volumes, e.unit)
	}
	if err := systemd.Generate(dir, file, volumes); err != nil {
		errs = append(errs, err)
	}
	return errs
}
