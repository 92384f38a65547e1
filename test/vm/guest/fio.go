package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A fioRun is fio at work.
type fioRun struct {
	cmd    *exec.Cmd
	out    bytes.Buffer
	ended  chan struct{}
	err    error
	result struct {
		Jobs []struct {
			Error int
			Read  fioSide
			Write fioSide
		}
	}
}

type fioSide struct {
	TotalIOs int64 `json:"total_ios"`
	ClatNS   struct {
		Max        float64
		Percentile map[string]float64
	} `json:"clat_ns"`
}

// startFIO starts fio, which is on the disk with tools.
func (m *machine) startFIO(args ...string) (*fioRun, error) {
	const dir = "/run/tools"
	if m.tools == "" {
		return nil, errors.New("there is no disk with tools")
	}
	loaders, _ := filepath.Glob(dir + "/lib/ld-*.so*")
	if loaders == nil {
		if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return nil, err
		}
		if err := unix.Mount(m.tools, dir, "ext4", unix.MS_RDONLY, ""); err != nil {
			return nil, fmt.Errorf("mounting the disk with tools: %w", err)
		}
		if loaders, _ = filepath.Glob(dir + "/lib/ld-*.so*"); loaders == nil {
			return nil, errors.New("the disk with tools has no program loader")
		}
	}
	m.typed(append([]string{"fio"}, append(args, "&")...)...)
	args = append(args, "--output-format=json")
	f := &fioRun{cmd: command(loaders[0], append([]string{"--library-path", dir + "/lib", dir + "/bin/fio"}, args...)...), ended: make(chan struct{})}
	f.cmd.Stdout, f.cmd.Stderr = &f.out, &f.out
	if err := f.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(f.ended)
		f.err = f.cmd.Wait()
	}()
	return f, nil
}

// wait waits for the end, and reads what fio says.
func (f *fioRun) wait() error {
	<-f.ended
	text := f.out.Bytes()
	begin, end := bytes.IndexByte(text, '{'), bytes.LastIndexByte(text, '}')
	if begin < 0 || end < begin {
		return fmt.Errorf("fio printed no JSON: %w: %s", f.err, strings.TrimSpace(f.out.String()))
	}
	if err := json.Unmarshal(text[begin:end+1], &f.result); err != nil {
		return fmt.Errorf("fio's JSON: %w", err)
	}
	if len(f.result.Jobs) != 1 {
		return fmt.Errorf("fio ran %d jobs, want 1", len(f.result.Jobs))
	}
	return nil
}
