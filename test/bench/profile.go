package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A kind of work that the server spends time on. A sample is of the first kind
// one of whose words is in a function of its stack.
type kind struct {
	name  string
	words []string
}

var kinds = []kind{
	{"cipher", []string{"hostcryptd/xts."}},
	{"backing device: finding the page", []string{"filemap_get_entry", "shmem_get_folio", "xas_load"}},
	{"backing device: copying", []string{"copy_page_to_iter", "copy_folio_from_iter"}},
	{"backing device: the rest of pread, pwrite", []string{"sys_pread", "sys_pwrite", "internal/poll.(*FD).P", "unix.Pwrite"}},
	{"socket: waking the client", []string{"sock_def_readable", "sock_def_write_space", "unix_write_space"}},
	{"socket: copying and memory", []string{"unix_stream_"}},
	{"socket: the rest of readv, writev", []string{"sys_readv", "sys_writev", "sys_sendmsg"}},
	{"waiting: poll, yield, sleep, futex", []string{"sys_ppoll", "sys_poll", "sys_sched_yield", "sys_futex", "sys_nanosleep", "sys_epoll", "schedule"}},
	{"Go runtime", []string{"runtime.mcall", "runtime.mstart", "runtime.sysmon"}},
	{"server and volume", []string{"hostcryptd/"}},
}

// profiled are the loads of a profile.
var profiled = []load{loads[0], loads[2], loads[5], loads[6]}

// profile says where the time of hostcryptd goes on tmpfs, by the samples of
// perf(1), and writes that beside the results.
func (b *bench) profile(c config, r *result) error {
	if _, err := exec.LookPath("perf"); err != nil {
		return errors.New("perf is not installed: apt-get install linux-perf")
	}
	dir, err := b.temp("/dev/shm")
	if err != nil {
		return err
	}
	servers, err := b.startAll(peers[:1], c.size, dir, false)
	if err != nil {
		return err
	}
	s := servers[0]
	columns := make([]map[string]float64, len(profiled))
	var rates []float64
	for i, l := range profiled {
		data := filepath.Join(dir, "perf.data")
		// The clock, as virtual machines often have no counters.
		perf := exec.CommandContext(b.ctx, "perf", "record", "-q", "-e", "cpu-clock", "-F", "5000", "-g",
			"-p", fmt.Sprint(s.cmd.Process.Pid), "-o", data, "--", "sleep", fmt.Sprint(c.slice.Seconds()))
		perf.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
		var stderr bytes.Buffer
		perf.Stderr = &stderr
		if err := perf.Start(); err != nil {
			return err
		}
		v, err := s.measure(b.ctx, l, c.slice+1500*time.Millisecond)
		if err := errors.Join(err, perf.Wait()); err != nil {
			return fmt.Errorf("profiling: %w: %s", err, stderr.Bytes())
		}
		script, err := b.command("perf", "script", "-i", data, "-F", "ip,sym")
		if err != nil {
			return err
		}
		if columns[i] = attribute(script); len(columns[i]) == 0 {
			return fmt.Errorf("perf saw nothing of %s", l.Name)
		}
		rates = append(rates, v.IOPS)
	}
	var out strings.Builder
	fmt.Fprintf(&out, "%s, %s, Linux %s, %s, load before %s\n%s\n", r.Machine, r.CPU, r.Kernel, r.Started, r.Load, r.Versions[hostcryptd])
	fmt.Fprintf(&out, "Where the server's processor time goes, tmpfs, percent of samples (perf, cpu-clock). By 'make bench-profile'.\n\n%-44s", "")
	for _, l := range profiled {
		fmt.Fprintf(&out, "%20s", strings.TrimSuffix(strings.Replace(l.Name, "rand ", "", 1), " c1"))
	}
	for _, k := range append(kinds, kind{name: "other"}) {
		fmt.Fprintf(&out, "\n%-44s", k.name)
		for _, column := range columns {
			fmt.Fprintf(&out, "%20.1f", column[k.name])
		}
	}
	fmt.Fprintf(&out, "\n\n%-44s", "requests/s under the profiler")
	for _, v := range rates {
		fmt.Fprintf(&out, "%20.0f", v)
	}
	out.WriteByte('\n')
	fmt.Print(out.String())
	if err := os.MkdirAll(c.out, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(c.out, "profile.txt"), []byte(out.String()), 0o644)
}

// attribute returns for each kind the percentage of the samples that are of it.
// Samples are stacks, innermost function first, with a blank line after each.
func attribute(script string) map[string]float64 {
	counts := map[string]float64{}
	total := 0.0
	var stack []string
	flush := func() {
		if len(stack) > 0 {
			counts[kindOf(stack)]++
			total++
			stack = stack[:0]
		}
	}
	lines := bufio.NewScanner(strings.NewReader(script))
	for lines.Scan() {
		if f := strings.Fields(lines.Text()); len(f) > 1 {
			stack = append(stack, strings.Join(f[1:], " "))
		} else {
			flush()
		}
	}
	flush()
	for k := range counts {
		counts[k] *= 100 / total
	}
	return counts
}

func kindOf(stack []string) string {
	all := strings.Join(stack, "\n")
	for _, k := range kinds {
		for _, w := range k.words {
			if strings.Contains(all, w) {
				return k.name
			}
		}
	}
	return "other"
}
