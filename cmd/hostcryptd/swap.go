package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdnl"
	"hostcryptd/sector"
)

// Swap on a volume of the same machine: when the kernel has no memory left, it
// writes pages to the volume, and gets memory when they are answered for. What
// answers must not need memory in order to do so, nor wait for anybody who does.
// --swap sees to that, for the server and its keeper:
//
//   - Every thread is an I/O flusher (PR_SET_IO_FLUSHER): where it allocates in
//     the kernel, it doesn't write out other pages to get memory, which would be
//     to wait for itself, and writes of its own aren't throttled.
//   - Every thread has a real-time priority. It is run at once, and where free
//     memory is below the watermark at which others have to wait, it still gets
//     some. A reply is such an allocation, of the socket, which nothing can make
//     in advance. How much there is below the watermark, vm.min_free_kbytes says.
//   - All memory is there and locked: program, heap, buffers, threads. Nothing is
//     allocated for a request.
//   - The kernel has no more requests under way than the server can take in, and
//     they are no larger than its buffers: what waits in the socket is memory too.
//   - Log lines are written by a goroutine of their own, and dropped when who
//     reads them is slow.
//   - Another server stands by, with all its memory: there is none to be had when
//     one dies.
//
// The first two are properties of threads that those that they start inherit, and
// that stay when a thread executes a program. So a process that has threads
// already, as each in Go, sets them for one and executes itself.

const (
	// swapRequest and swapDepth are the size and number of requests of the kernel
	// device. swapInFlight is how many of them the server runs at the same time; it
	// takes in twice as many.
	swapRequest  = 128 << 10
	swapDepth    = 2 * swapInFlight
	swapInFlight = 16

	// swapLocked is what of the arena is locked: all requests at once, and as much
	// again for clients of --listen.
	swapLocked = 2 * swapDepth * swapRequest

	// swapHeap is what the heap is grown to at the start. Served at full load it
	// has about 4 MiB.
	swapHeap = 12 << 20

	// swapThreads are the threads that exist from the start: one for each request
	// that is on the disk, and some for the rest.
	swapThreads = swapInFlight + 16

	// minFree is the memory that the kernel is to keep free, at most a 16th of all.
	// With 1 MiB on a machine of 384 MiB, a server that had all the rest of this
	// but real-time priority was stuck in sending a reply; with 32 MiB it wasn't.
	minFree = 32 << 20

	minFreeFile = "/proc/sys/vm/min_free_kbytes"
	realTime    = 1 // priority
)

// Flags of a thread, from the kernel's include/linux/sched.h, as they are in the
// ninth field of /proc/PID/stat. They are no ABI; the test in the virtual machine
// checks them on each kernel.
const (
	pfMemallocNoIO  = 0x00080000
	pfLocalThrottle = 0x00100000
)

// enterSwapMode makes this process one whose threads are all I/O flushers with a
// real-time priority. It doesn't return if it has to execute the program again
// for that.
func enterSwapMode() error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if flusher, policy := threadMode(); flusher && policy == unix.SCHED_RR {
		return nil
	}
	param := struct{ priority int32 }{realTime}
	if _, _, errno := unix.Syscall(unix.SYS_SCHED_SETSCHEDULER, 0, unix.SCHED_RR, uintptr(unsafe.Pointer(&param))); errno != 0 {
		return withCode(codeKernel, fmt.Errorf("--swap: real-time scheduling: %w; it needs CAP_SYS_NICE, and a unit without RestrictRealtime=", errno))
	}
	if err := unix.Prctl(unix.PR_SET_IO_FLUSHER, 1, 0, 0, 0); err != nil {
		return withCode(codeKernel, fmt.Errorf("--swap: PR_SET_IO_FLUSHER: %w; it needs CAP_SYS_RESOURCE and Linux 5.6", err))
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return withCode(codeKernel, fmt.Errorf("--swap: keeping the process from being killed for memory: %w", reasonOfPath(err)))
	}
	return fmt.Errorf("--swap: executing the program again: %w", unix.Exec("/proc/self/exe", os.Args, os.Environ()))
}

func reasonOfPath(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

// threadMode tells what this thread is.
func threadMode() (flusher bool, policy int) {
	on, _, errno := unix.Syscall6(unix.SYS_PRCTL, unix.PR_GET_IO_FLUSHER, 0, 0, 0, 0, 0)
	p, _, perr := unix.Syscall(unix.SYS_SCHED_GETSCHEDULER, 0, 0, 0)
	if perr != 0 {
		p = 0
	}
	return errno == 0 && on == 1, int(p)
}

// checkSwap checks what --swap wants of the other flags.
func (o *serveOptions) checkSwap() error {
	switch {
	case !o.swap:
		return nil
	case o.attach == "":
		return usagef("--swap is for a device of this kernel: it needs --attach")
	case o.readOnly:
		return usagef("--swap with --read-only: the kernel writes to swap")
	case o.connections > 1:
		return usagef("--swap with --connections: one is what it is safe with")
	}
	return nil
}

// checkSwapDevice refuses what lies between the server and the disk.
func checkSwapDevice(name string) error {
	fi, err := os.Stat(name)
	if err == nil && fi.Mode().IsRegular() {
		return withCode(codeDevice, fmt.Errorf("%s: --swap needs a block device: the file system below an image file allocates memory for its writes", name))
	}
	return nil
}

// prepare is done before it is this server's turn: what takes time, and with
// --swap also what takes memory.
func (d *daemon) prepare() error {
	if !d.opts.swap {
		return nil
	}
	if err := checkSwapDevice(d.opts.device); err != nil {
		return err
	}
	keepHeap()
	startThreads(swapThreads)
	if err := errors.Join(lockMemory(), sector.Preallocate()); err != nil {
		return withCode(codeKernel, fmt.Errorf("--swap: locking memory: %w; is LimitMEMLOCK= too low?", err))
	}
	var err error
	if d.memory, err = nbd.NewMemory(nbd.MaxPayload+swapLocked, swapLocked); err != nil {
		return withCode(codeKernel, fmt.Errorf("--swap: %w", err))
	}
	return nil
}

// keepHeap has the heap take swapHeap bytes from the system and keep them. The
// collector gives memory back as long as it decides itself when to run, also
// memory that is locked, which it replaces by a new mapping: with GOGC=400, of 16
// MiB between 3 and 14 were away at a time. So it is told when to run.
func keepHeap() {
	debug.SetGCPercent(-1)
	var chunks [][]byte
	for n := 0; n < swapHeap; n += 64 << 10 {
		c := make([]byte, 64<<10)
		for i := 0; i < len(c); i += 4096 {
			c[i] = 1
		}
		chunks = append(chunks, c)
	}
	runtime.KeepAlive(chunks)
	chunks = nil
	runtime.GC()
	go func() {
		used := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		for range time.Tick(time.Second) {
			if metrics.Read(used); used[0].Value.Uint64() > swapHeap/2 {
				runtime.GC()
			}
		}
	}()
}

// startThreads has the runtime make n threads, which it keeps: each goroutine that is
// locked to one has its own, and none ends before all have one.
func startThreads(n int) {
	var all, running sync.WaitGroup
	all.Add(n)
	for range n {
		running.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			all.Done()
			all.Wait()
		})
	}
	running.Wait()
}

// tuneSwap limits what the kernel has under way for the device to what the server
// can take in, and sees to the memory that the kernel keeps free.
func (d *daemon) tuneSwap(index int) error {
	got, err := nbdnl.SetMaxRequest(index, swapRequest)
	if err == nil && got > swapRequest {
		err = fmt.Errorf("requests of the kernel are %d bytes, want %d at most", got, swapRequest)
	}
	if err == nil {
		err = nbdnl.SetQueueDepth(index, swapDepth)
	}
	if err != nil {
		return fmt.Errorf("--swap: %w", err)
	}
	want, have, err := minFreeWanted()
	if err != nil {
		d.log.Warn("it can't be seen how much memory the kernel keeps free (sysctl vm.min_free_kbytes)", zap.Error(reasonOfPath(err)))
		return nil
	}
	if have >= want {
		return nil
	}
	if err := os.WriteFile(minFreeFile, []byte(strconv.FormatUint(want>>10, 10)), 0); err != nil {
		d.log.Warn("the kernel keeps little memory free; set the sysctl vm.min_free_kbytes", zap.Uint64("is", have>>10), zap.Uint64("should_be", want>>10), zap.Error(reasonOfPath(err)))
		return nil
	}
	d.log.Info("vm.min_free_kbytes was raised", zap.Uint64("from", have>>10), zap.Uint64("to", want>>10))
	return nil
}

// minFreeWanted returns what the kernel should keep free and does, in bytes.
func minFreeWanted() (want, have uint64, err error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0, 0, err
	}
	b, err := os.ReadFile(minFreeFile)
	if err != nil {
		return 0, 0, err
	}
	kb, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return min(minFree, info.Totalram*uint64(info.Unit)/16) &^ 1023, kb << 10, err
}

// A swapStatus says whether swap on the volume is safe.
type swapStatus struct {
	Safe     bool     `json:"safe"`
	Problems []string `json:"problems,omitempty"`
}

// swapNow looks whether everything is as --swap wants it, at this process as the
// kernel shows it.
func (d *daemon) swapNow() *swapStatus {
	var s swapStatus
	problem := func(format string, args ...any) { s.Problems = append(s.Problems, fmt.Sprintf(format, args...)) }
	pids := []int{os.Getpid()}
	if keeper := d.link.keeper(); keeper != 0 {
		pids = append(pids, keeper)
	} else {
		problem("the keeper has died: nothing replaces the server if that dies too")
	}
	for _, pid := range pids {
		threads, bad, err := threadsWithout(pid)
		switch {
		case err != nil:
			problem("process %d: %v", pid, err)
		case bad > 0:
			problem("%d of the %d threads of process %d are no I/O flushers with real-time priority", bad, threads, pid)
		}
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid)); err != nil || strings.TrimSpace(string(b)) != "-1000" {
			problem("process %d may be killed for memory", pid)
		}
	}
	if d.memory == nil {
		problem("memory is not locked")
	}
	if want, have, err := minFreeWanted(); err != nil {
		problem("%v", err)
	} else if have < want {
		problem("vm.min_free_kbytes is %d, and should be %d", have>>10, want>>10)
	}
	s.Safe = len(s.Problems) == 0
	return &s
}

// threadsWithout counts the threads of a process, and those that are not as
// enterSwapMode makes them.
func threadsWithout(pid int) (threads, bad int, err error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		return 0, 0, err
	}
	for _, t := range list {
		b, err := os.ReadFile(dir + "/" + t.Name() + "/stat")
		if err != nil {
			continue // it has ended
		}
		// The fields after the name, which stands in parentheses: state is the third.
		f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		if len(f) < 39 {
			return 0, 0, fmt.Errorf("%s/%s/stat has %d fields", dir, t.Name(), len(f))
		}
		flags, err := strconv.ParseUint(f[9-3], 10, 64)
		threads++
		if want := uint64(pfMemallocNoIO | pfLocalThrottle); err != nil || flags&want != want || f[41-3] != strconv.Itoa(unix.SCHED_RR) {
			bad++
		}
	}
	return threads, bad, nil
}
