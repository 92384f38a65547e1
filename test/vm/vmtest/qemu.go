package vmtest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"hostcryptd/test/vm/report"
)

// Config says what to boot.
type Config struct {
	Name     string // of this boot: log files are called after it
	Dir      string // where the log files go; must exist
	Kernel   *Kernel
	Initrd   string   // see [Image.WriteFile]
	Append   []string // further words of the kernel command line
	MemoryMB int      // 1024 if zero
	Disks    []Disk
	TPM      string        // folder with the state of a TPM 2.0, which the first boot makes; "" for none
	Network  string        // of user-mode networking, see [Network]; none if empty
	Timeout  time.Duration // after which the guest is killed; BootLimit if zero

	// OnEvent, if not nil, is called for each event of the guest by the
	// goroutine that is in Wait.
	OnEvent func(report.Event)
}

// BootLimit is how long a boot of most scenarios may take.
const BootLimit = 8 * time.Minute

// Run starts QEMU and waits for its end.
func (c Config) Run(ctx context.Context) (*Result, error) {
	v, err := Start(ctx, c)
	if err != nil {
		return nil, err
	}
	return v.Wait()
}

// A VM is one running QEMU.
//
// It belongs to one goroutine, which must call [VM.Wait]. QEMU is killed when
// the context given to [Start] ends, and by the kernel if this process dies.
type VM struct {
	Serial  string // path of the log of the serial console
	Command string // how to start it again by hand, quoted for a shell

	name    string
	events  *os.File
	onEvent func(report.Event)
	kill    context.CancelFunc
	killed  func() error // why, or nil
	done    chan error   // from cmd.Wait
	stderr  *bytes.Buffer
	begun   time.Time
}

// A Result is the sum of what a guest reported.
type Result struct {
	Wall    time.Duration // from the start of QEMU to its end
	Boot    time.Duration // from the start of the guest's kernel to its first event
	Events  []report.Event
	Figures map[string]report.Event
}

// Start starts QEMU: emulation only, whatever the host could do, so that a
// scenario runs alike everywhere.
func Start(ctx context.Context, c Config) (*VM, error) {
	qemu, err := Tool("qemu-system-x86_64")
	if err != nil {
		return nil, err
	}
	v := &VM{
		Serial:  filepath.Join(c.Dir, c.Name+".serial.log"),
		name:    c.Name,
		onEvent: c.OnEvent,
		done:    make(chan error, 1),
		stderr:  new(bytes.Buffer),
	}
	if v.onEvent == nil {
		v.onEvent = func(report.Event) {}
	}
	eventLog := filepath.Join(c.Dir, c.Name+".events.jsonl")
	var tpm string
	if c.TPM != "" {
		if tpm, err = startTPM(ctx, c.TPM); err != nil {
			return nil, err
		}
	}
	version, err := Run(ctx, "", "qemu-system-x86_64", "--version")
	if err != nil {
		return nil, err
	}
	args := c.arguments(accelerator(string(version)), v.Serial, eventLog)
	if tpm != "" {
		args = append(args, "-chardev", "socket,id=tpm,path="+escape(tpm), "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0")
	}
	v.Command = quote(append([]string{qemu}, args...))
	if err := os.WriteFile(filepath.Join(c.Dir, c.Name+".command"), []byte(v.Command+"\n"), 0o644); err != nil {
		return nil, fmt.Errorf("vmtest: boot %s: %w", c.Name, err)
	}
	// QEMU opens the file again and truncates it; only then does it write.
	if v.events, err = os.Create(eventLog); err != nil {
		return nil, fmt.Errorf("vmtest: boot %s: %w", c.Name, err)
	}
	timeout := cmp.Or(c.Timeout, BootLimit)
	ctx, v.kill = context.WithTimeoutCause(ctx, timeout, fmt.Errorf("no end after %s", timeout))
	v.killed = func() error { return context.Cause(ctx) }
	cmd := exec.CommandContext(ctx, qemu, args...)
	cmd.Stderr = v.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	v.begun = time.Now()
	if err := cmd.Start(); err != nil {
		v.kill()
		v.events.Close()
		return nil, fmt.Errorf("vmtest: boot %s: %w", c.Name, err)
	}
	go func() { v.done <- cmd.Wait() }()
	return v, nil
}

// startTPM starts a TPM that ends with its connection to QEMU, and returns the path
// of its socket.
func startTPM(ctx context.Context, dir string) (string, error) {
	swtpm, err := Tool("swtpm")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("vmtest: state of the TPM: %w", err)
	}
	socket := filepath.Join(dir, "socket")
	os.Remove(socket)
	cmd := exec.CommandContext(ctx, swtpm, "socket", "--tpm2", "--terminate", "--tpmstate", "dir="+dir, "--ctrl", "type=unixio,path="+socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("vmtest: starting the TPM: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for limit := time.After(10 * time.Second); ; {
		if _, err := os.Stat(socket); err == nil {
			return socket, nil
		}
		select {
		case err := <-ended:
			return "", fmt.Errorf("vmtest: the TPM ended: %w", err)
		case <-limit:
			return "", errors.New("vmtest: the TPM has no socket after 10 s")
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// accelerator says how QEMU of this version is to emulate.
//
// Linux changes its own code while other processors run it and covers the
// place with a breakpoint meanwhile. Before QEMU 8.1, which has commit
// deba78709ae8 ("accel/tcg: Always lock pages before translation"), emulation
// in several threads can translate the breakpoint and keep that after the
// kernel has taken it away: the kernel dies of an unknown breakpoint ("Oops:
// int3"). With 7.2, 2 of 65 boots did. In one thread that can't happen, and
// the scenarios take about a fifth longer.
func accelerator(version string) string {
	threads := "multi"
	var major, minor int
	_, text, ok := strings.Cut(version, "version ")
	if _, err := fmt.Sscanf(text, "%d.%d", &major, &minor); !ok || err != nil || major < 8 || major == 8 && minor < 1 {
		threads = "single"
	}
	return "tcg,thread=" + threads + ",tb-size=512"
}

// arguments is QEMU's command line without its name.
func (c *Config) arguments(accel, serial, events string) []string {
	// A hung task and a panic end the guest at once: panic=-1 resets it and
	// -no-reboot makes that the end of QEMU. A healthy guest, emulated on a
	// busy host, may keep a task waiting for long.
	words := append([]string{
		"console=ttyS0", "quiet", "panic=-1",
		// An emulator on a busy host misses the ticks that the kernel counts to see
		// whether the timer works, and the kernel panics; about 1 of 500 boots.
		"no_timer_check",
		"hung_task_panic=1", "sysctl.kernel.hung_task_timeout_secs=60", "panic_print=1",
	}, c.Append...)
	args := []string{
		// QEMU 7.2 computes the upper half of a 256-bit vaesenc from the lower half of
		// the state: with qemu-x86_64 -cpu max, the vectors of IEEE 1619 fail on ymm.
		"-M", "q35", "-accel", accel, "-cpu", "max,vaes=off", "-smp", "2",
		"-m", fmt.Sprintf("%dM", cmp.Or(c.MemoryMB, 1024)),
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-serial", "file:" + escape(serial),
		"-kernel", c.Kernel.Image, "-initrd", c.Initrd,
		"-append", strings.Join(words, " "),
		"-device", "virtio-serial-pci",
		"-chardev", "file,id=events,path=" + escape(events),
		"-device", "virtserialport,chardev=events,name=" + EventPort,
	}
	if c.Network != "" {
		args = append(args, "-netdev", c.Network, "-device", "virtio-net-pci,netdev="+netName)
	}
	for i, d := range c.Disks {
		node := fmt.Sprintf("disk%d", i)
		source := "driver=raw,node-name=" + node + ",file.driver=file,file.filename=" + escape(d.Path)
		if d.Socket != "" {
			source = "driver=nbd,node-name=" + node + ",server.type=unix,server.path=" + escape(d.Socket)
		}
		if d.ReadOnly {
			source += ",read-only=on"
		}
		device := "virtio-blk-pci"
		if d.NVMe {
			device = "nvme"
		}
		args = append(args, "-blockdev", source, "-device", device+",drive="+node+",serial="+escape(d.Serial))
	}
	return args
}

// EventPort is the name of the virtio-serial port that the guest writes its
// events to.
const EventPort = "hostcryptd.events"

// escape protects a value in QEMU's list of options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// quote joins words so that a shell takes them apart again.
func quote(words []string) string {
	out := make([]string, len(words))
	for i, w := range words {
		if strings.ContainsFunc(w, func(r rune) bool {
			return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=+:,./@%", r)
		}) || w == "" {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		out[i] = w
	}
	return strings.Join(out, " ")
}

// Wait returns when QEMU has ended, with what the guest reported up to then.
// It is an error if the guest did not report the end of its scenario, or
// reported that it failed; the error then has a part of the serial log.
func (v *VM) Wait() (*Result, error) {
	defer v.kill()
	defer v.events.Close()
	r := &Result{Figures: map[string]report.Event{}}
	var (
		partial []byte
		bad     error
		buf     = make([]byte, 64<<10)
	)
	// drain takes what QEMU has written to the file so far.
	drain := func() {
		for {
			n, err := v.events.Read(buf)
			partial = append(partial, buf[:n]...)
			if n == 0 || err != nil {
				break
			}
		}
		for {
			line, rest, ok := bytes.Cut(partial, []byte("\n"))
			if !ok {
				return
			}
			partial = rest
			e, err := report.Decode(line)
			if err != nil {
				bad = errors.Join(bad, err)
				continue
			}
			r.take(e)
			v.onEvent(e)
		}
	}
	// A file can't be waited for, and a port that can would need a peer when
	// the command is repeated by hand.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	var exit error
	for running := true; running; {
		select {
		case exit = <-v.done:
			running = false
		case <-tick.C:
		}
		drain()
	}
	r.Wall = time.Since(v.begun)
	return r, v.verdict(r, bad, exit)
}

// Kill ends QEMU at once, as a power cut would end a machine. Call Wait
// afterwards.
func (v *VM) Kill() { v.kill() }

func (r *Result) take(e report.Event) {
	r.Events = append(r.Events, e)
	switch e.Kind {
	case report.Ready:
		r.Boot = time.Duration(e.Time * float64(time.Second))
	case report.Figure:
		r.Figures[e.Name] = e
	}
}

func (v *VM) verdict(r *Result, bad, exit error) error {
	var why error
	killed := v.killed()
	switch {
	case killed != nil:
		why = fmt.Errorf("killed: %w", killed)
	case exit != nil:
		why = fmt.Errorf("qemu: %w: %s", exit, tail(v.stderr.String(), 5))
	case bad != nil:
		why = bad
	case len(r.Events) == 0:
		why = errors.New("the guest reported nothing")
	default:
		last := r.Events[len(r.Events)-1]
		if last.Kind == report.Done && last.Text == "" {
			return nil
		}
		if last.Kind == report.Done {
			why = errors.New(last.Text)
		} else {
			why = fmt.Errorf("%w after: %s", ErrDied, last)
		}
	}
	log, err := os.ReadFile(v.Serial)
	if err != nil {
		log = []byte(err.Error())
	}
	return fmt.Errorf("vmtest: boot %s: %w\n--- from %s:\n%s\n--- repeat by hand:\n%s", v.name, why, v.Serial, excerpt(string(log), 40), v.Command)
}

// ErrDied is the error of a guest that has ended without a report of that.
var ErrDied = errors.New("the guest died")

// troubles begin the part of a kernel log that says what went wrong.
var troubles = []string{"BUG:", "Oops", "Kernel panic", "blocked for more than", "WARNING:"}

// excerpt returns n lines of a console log: from the first trouble on, or
// the last ones.
func excerpt(log string, n int) string {
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(log, "\r", ""), "\n"), "\n")
	for i, line := range lines {
		for _, t := range troubles {
			if strings.Contains(line, t) {
				return strings.Join(lines[i:min(i+n, len(lines))], "\n")
			}
		}
	}
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
