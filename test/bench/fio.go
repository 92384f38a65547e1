package main

import (
	"bytes"
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed *.fio
var jobFiles embed.FS

// runFio runs one of the job files with the environment that it names.
func runFio(ctx context.Context, dir, job string, d time.Duration, env ...string) (sample, error) {
	text, err := jobFiles.ReadFile(job)
	if err != nil {
		return sample{}, err
	}
	path := filepath.Join(dir, job)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return sample{}, err
	}
	// A server that hangs must not hang the run.
	ctx, cancel := context.WithTimeout(ctx, d+20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "fio", "--output-format=json", path)
	cmd.Dir = dir
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	cmd.Env = append(os.Environ(), append(env, fmt.Sprintf("BENCH_RUNTIME=%dms", d.Milliseconds()))...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return sample{}, fmt.Errorf("fio %s: %w: %s", job, err, strings.TrimSpace(stderr.String()))
	}
	return parseFio(out)
}

// parseFio reads the first job of fio's JSON output. Engines print notes
// before it.
func parseFio(out []byte) (sample, error) {
	start := bytes.IndexByte(out, '{')
	if start < 0 {
		return sample{}, errors.New("fio printed no JSON")
	}
	type direction struct {
		IOPS    float64 `json:"iops"`
		BW      float64 `json:"bw_bytes"`
		Total   uint64  `json:"total_ios"`
		Latency struct {
			Percentile map[string]float64 `json:"percentile"`
		} `json:"clat_ns"`
	}
	var report struct {
		Jobs []struct {
			Error int       `json:"error"`
			Read  direction `json:"read"`
			Write direction `json:"write"`
		} `json:"jobs"`
	}
	if err := json.Unmarshal(out[start:], &report); err != nil {
		return sample{}, fmt.Errorf("output of fio: %w", err)
	}
	if len(report.Jobs) != 1 {
		return sample{}, fmt.Errorf("output of fio has %d jobs, want 1", len(report.Jobs))
	}
	j := report.Jobs[0]
	if j.Error != 0 {
		return sample{}, fmt.Errorf("fio: %w", unix.Errno(j.Error))
	}
	d := j.Read
	if j.Write.Total > 0 {
		d = j.Write
	}
	if d.Total == 0 {
		return sample{}, errors.New("fio did no I/O")
	}
	return sample{
		IOPS: d.IOPS, MBps: d.BW / 1e6,
		P50us: d.Latency.Percentile["50.000000"] / 1e3,
		P99us: d.Latency.Percentile["99.000000"] / 1e3,
	}, nil
}
