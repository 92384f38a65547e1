package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// swapStall is how long the program that uses the memory may make no progress:
	// each is a megabyte.
	swapStall = 90 * time.Second

	hogStep = 1 << 20
)

// swapOn makes a volume with a random key the machine's swap.
func (m *machine) swapOn(protected bool) (*server, error) {
	args := []string{"--random-key"}
	if protected {
		args = append(args, "--swap")
	}
	s, err := m.serve(args...)
	if err != nil {
		return nil, err
	}
	if _, err := m.run("mkswap", s.dev); err != nil {
		return nil, err
	}
	return s, m.swapCall("swapon", unix.SYS_SWAPON, s.dev)
}

// swapCall is swapon or swapoff, without flags.
func (m *machine) swapCall(op string, trap uintptr, dev string) error {
	m.typed(op, dev)
	begun := time.Now()
	name, err := unix.BytePtrFromString(dev)
	if err != nil {
		return err
	}
	if _, _, errno := unix.Syscall(trap, uintptr(unsafe.Pointer(name)), 0, 0); errno != 0 {
		return fmt.Errorf("%s %s: %w", op, dev, errno)
	}
	m.exited(0, begun)
	return nil
}

// swap uses more memory than there is, for a time, checking every page, with swap
// on a volume of this machine. In the middle the server is killed, and replaced by
// a reload.
func swap(m *machine) error { return m.swapScenario(true) }

// swapControl is the same without --swap and without a restart: it has to fail.
func swapControl(m *machine) error { return m.swapScenario(false) }

func (m *machine) swapScenario(protected bool) error {
	m.reconnects = protected
	percent, err1 := m.number("percent")
	seconds, err2 := m.number("seconds")
	if err := errors.Join(err1, err2); err != nil {
		return err
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return err
	}
	total := int64(info.Totalram) * int64(info.Unit)
	size := total * int64(percent) / 100 / hogStep * hogStep
	m.figure("memory", float64(total>>20), "MiB")
	m.figure("memory used", float64(size>>20), "MiB")

	s, err := m.swapOn(protected)
	if err != nil {
		return err
	}
	if protected {
		if err := m.checkSwapSafe(); err != nil {
			return err
		}
	}
	before, err := vmstat("pswpin", "pswpout", "oom_kill")
	if err != nil {
		return err
	}
	faults := &faultCounter{m: m, last: map[int]uint64{}}
	if err := faults.look(); err != nil && protected {
		return err
	}

	h, err := startHog(size, time.Duration(seconds)*time.Second)
	if err != nil {
		return err
	}
	var (
		begun  = time.Now()
		span   = time.Duration(seconds) * time.Second
		kill   = begun.Add(span / 3)
		reload = begun.Add(span * 2 / 3)
		tick   = time.NewTicker(time.Second)
		used   int64
		goesOn bool // the keeper has become another version
	)
	defer tick.Stop()
	if !protected {
		kill, reload = time.Time{}, time.Time{}
	}
	for done := false; !done; {
		select {
		case line, ok := <-h.lines:
			if !ok {
				done = true
				break
			}
			m.output(line)
		case <-tick.C:
			now := time.Now()
			if done := h.steps.Load(); !protected && done != used {
				used = done
				m.say("%d MiB used or checked", used) // who waits for the hang sees that it isn't one
			}
			if stalled := now.Sub(h.progress()); stalled > swapStall {
				return fmt.Errorf("no progress in %v", stalled)
			}
			if !kill.IsZero() && now.After(kill) {
				kill = time.Time{}
				if err := errors.Join(faults.look(), m.killServer()); err != nil {
					return err
				}
			}
			if !goesOn && strings.Contains(s.log.String(), "the keeper goes on with this version") {
				goesOn = true
				if err := faults.forget(); err != nil {
					return err
				}
			}
			if !reload.IsZero() && now.After(reload) {
				reload = time.Time{}
				if err := faults.look(); err != nil {
					return err
				}
				pid := s.cmd.Process.Pid
				m.typed("kill", "-HUP", strconv.Itoa(pid))
				if err := unix.Kill(pid, unix.SIGHUP); err != nil {
					return err
				}
			}
		}
	}
	if err := h.wait(); err != nil {
		return fmt.Errorf("the program that uses the memory: %w", err)
	}
	m.figure("time", time.Since(begun).Seconds(), "s")
	m.figure("longest time for a megabyte", h.slowest.Seconds(), "s")
	after, err := vmstat("pswpin", "pswpout", "oom_kill")
	if err != nil {
		return err
	}
	m.figure("pages out", float64(after[1]-before[1]), "")
	m.figure("pages in", float64(after[0]-before[0]), "")
	if after[1] == before[1] || after[0] == before[0] {
		return errors.New("nothing was swapped")
	}
	if after[2] != before[2] {
		return fmt.Errorf("%d processes were killed for memory", after[2]-before[2])
	}
	if protected {
		if !kill.IsZero() || !reload.IsZero() {
			return errors.New("it was over before the server was killed and reloaded")
		}
		if err := errors.Join(faults.look(), m.checkSwapSafe()); err != nil {
			return err
		}
		m.figure("major faults of server and keeper", float64(faults.sum), "")
		if faults.sum != 0 {
			return fmt.Errorf("server and keeper had %d major faults", faults.sum)
		}
		if n := strings.Count(s.log.String(), "another server has taken over"); n != 1 {
			return fmt.Errorf("the server was replaced %d times by a reload, want 1", n)
		}
	}
	if err := m.swapCall("swapoff", unix.SYS_SWAPOFF, s.dev); err != nil {
		return err
	}
	return s.detach()
}

// checkSwapSafe asks the server.
func (m *machine) checkSwapSafe() error {
	s, err := m.status()
	if err != nil {
		return err
	}
	if !s.Swap.Safe {
		return fmt.Errorf("swap isn't safe: %s", strings.Join(s.Swap.Problems, "; "))
	}
	m.figure("memory of the server", s.Memory.Resident/(1<<20), "MiB")
	return nil
}

// vmstat returns counters of the kernel.
func vmstat(names ...string) ([]int64, error) {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return nil, err
	}
	list := make([]int64, len(names))
	for i, name := range names {
		_, after, ok := strings.Cut("\n"+string(b), "\n"+name+" ")
		value, _, _ := strings.Cut(after, "\n")
		if list[i], err = strconv.ParseInt(value, 10, 64); err != nil || !ok {
			return nil, fmt.Errorf("/proc/vmstat has no %s", name)
		}
	}
	return list, nil
}

// A faultCounter adds up the major faults of servers and keeper since the first
// look at each.
type faultCounter struct {
	m    *machine
	last map[int]uint64
	sum  uint64
}

func (c *faultCounter) look() error {
	s, err := c.m.status()
	if err != nil {
		return err
	}
	for _, pid := range []int{s.PID, s.Keeper} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return err
		}
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		n, err := strconv.ParseUint(f[12-3], 10, 64)
		if err != nil {
			return err
		}
		if last, ok := c.last[pid]; ok {
			c.sum += n - last
		}
		c.last[pid] = n
	}
	return nil
}

// forget leaves out what there was since the last look. What execve(2) loads is not
// locked until the program is so far, so a keeper that becomes another version may have
// to wait for pages of it. It can: the server, which is locked, serves the swap.
func (c *faultCounter) forget() error {
	sum := c.sum
	err := c.look()
	c.sum = sum
	return err
}

// A hog is a process that uses memory.
type hog struct {
	lines   chan string
	wait    func() error
	slowest time.Duration
	last    chan time.Time // capacity 1: of the last progress
	steps   atomic.Int64   // megabytes so far
}

func (h *hog) progress() time.Time {
	t := <-h.last
	h.last <- t
	return t
}

func startHog(size int64, d time.Duration) (*hog, error) {
	cmd := command("/proc/self/exe", "hog", strconv.FormatInt(size, 10), d.String())
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	h := &hog{lines: make(chan string, 16), last: make(chan time.Time, 1), wait: cmd.Wait}
	h.last <- time.Now()
	go func() {
		defer close(h.lines)
		for scan := bufio.NewScanner(out); scan.Scan(); {
			t := <-h.last
			now := time.Now()
			h.slowest = max(h.slowest, now.Sub(t))
			h.last <- now
			h.steps.Add(1)
			if line := scan.Text(); line != "." {
				h.lines <- line
			}
		}
	}()
	return h, nil
}

// runHog fills memory with pages that it recognizes, checks and changes them at
// random for a time, and then checks them all. It prints a dot for each megabyte.
func runHog(args []string) error {
	if len(args) != 2 {
		return errors.New("usage: hog SIZE TIME")
	}
	size, err := strconv.ParseInt(args[0], 10, 64)
	if err != nil {
		return err
	}
	d, err := time.ParseDuration(args[1])
	if err != nil {
		return err
	}
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return err
	}
	begun := time.Now()
	stamps := make([]uint32, size/pageSize)
	write := func(page int, stamp uint32) {
		stamps[page] = stamp
		fillPage(mem[page*pageSize:][:pageSize], page, stamp)
	}
	check := func(page int) error {
		p := mem[page*pageSize:][:pageSize]
		for i := 0; i < pageSize; i += 8 {
			if binary.LittleEndian.Uint32(p[i:]) != uint32(page) || binary.LittleEndian.Uint32(p[i+4:]) != stamps[page] {
				return fmt.Errorf("page %d is not what was written to it: at %d % x, stamp %d", page, i, p[i:i+8], stamps[page])
			}
		}
		return nil
	}
	const step = hogStep / pageSize
	for page := range stamps {
		write(page, 1)
		if page%step == step-1 {
			fmt.Println(".")
		}
	}
	fmt.Printf("%d MiB filled after %.1f s\n", size>>20, time.Since(begun).Seconds())
	r := rand.New(rand.NewPCG(1, 2))
	changed := 0
	for n := uint32(2); time.Since(begun) < d; n++ {
		first := r.IntN(len(stamps) - step + 1)
		for page := first; page < first+step; page++ {
			if err := check(page); err != nil {
				return err
			}
			if page%2 == 0 {
				write(page, n)
			}
		}
		changed++
		fmt.Println(".")
	}
	fmt.Printf("%d MiB checked at random and half of it changed after %.1f s\n", changed, time.Since(begun).Seconds())
	for page := range stamps {
		if err := check(page); err != nil {
			return err
		}
		if page%step == step-1 {
			fmt.Println(".")
		}
	}
	fmt.Printf("%d MiB checked after %.1f s\n", size>>20, time.Since(begun).Seconds())
	return nil
}
