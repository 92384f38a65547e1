package main

import (
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// pauses are what the writes of a pageWriter, one after the other, took around
// events of one kind.
type pauses struct {
	longest []time.Duration // around each event
	writes  []time.Duration // around all of them
}

func (p *pauses) add(writes []time.Duration) {
	p.longest = append(p.longest, slices.Max(append(writes, 0)))
	p.writes = append(p.writes, writes...)
}

// percentile is the value that so many of a hundred are not above.
func percentile(list []time.Duration, percent int) time.Duration {
	if len(list) == 0 {
		return 0
	}
	slices.Sort(list)
	return list[(len(list)*percent+99)/100-1]
}

// figures reports them: the pause is the longest write around an event.
func (p *pauses) figures(m *machine, event string) {
	m.figure(event+"s", float64(len(p.longest)), "")
	m.figure(event+": pause, median", float64(percentile(p.longest, 50).Milliseconds()), "ms")
	m.figure(event+": pause, longest", float64(percentile(p.longest, 100).Milliseconds()), "ms")
	m.figure(event+fmt.Sprintf(": p99 of the %d writes around", len(p.writes)), float64(percentile(p.writes, 99).Milliseconds()), "ms")
}

// startVerified has fio write to the device from 32 MiB on, at a rate that leaves an
// emulated machine time for the rest, and read back and check what it wrote.
func (m *machine) startVerified(dev string) (*fioRun, error) {
	return m.startFIO("--name=verified", "--filename="+dev, "--offset=32M", "--size=8M", "--rw=randwrite", "--bs=4k", "--ioengine=libaio",
		"--iodepth=8", "--direct=1", "--rate_iops=15", "--verify=crc32c", "--verify_backlog=32", "--verify_fatal=1", "--time_based", "--runtime=600")
}

// endVerified ends that, and fails if one of its requests has.
func (m *machine) endVerified(f *fioRun) error {
	select {
	case <-f.ended:
		return fmt.Errorf("fio has ended by itself: %w: %s", f.err, f.out.String())
	default:
	}
	if err := f.cmd.Process.Signal(unix.SIGINT); err != nil {
		return err
	}
	if err := f.wait(); err != nil {
		return err
	}
	job := f.result.Jobs[0]
	if job.Error != 0 || job.Write.TotalIOs == 0 || job.Read.TotalIOs == 0 {
		return fmt.Errorf("fio ended with %v after %d writes and %d reads that verify them", unix.Errno(job.Error), job.Write.TotalIOs, job.Read.TotalIOs)
	}
	m.figure("fio: writes", float64(job.Write.TotalIOs), "")
	m.figure("fio: reads that verify them", float64(job.Read.TotalIOs), "")
	m.figure("fio: write latency, p99", job.Write.ClatNS.Percentile["99.000000"]/1e6, "ms")
	m.figure("fio: write latency, longest", job.Write.ClatNS.Max/1e6, "ms")
	return nil
}

// endWrites ends the writing, and checks what was answered.
func (m *machine) endWrites(w *pageWriter) error {
	w.stop()
	m.figure("writes answered", float64(w.writes), "")
	checked, err := w.verify()
	m.figure("pages verified", float64(checked), "")
	return err
}
