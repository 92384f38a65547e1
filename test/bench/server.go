package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names of what is measured.
const (
	hostcryptd  = "hostcryptd"
	passthrough = "passthrough"
	nbdkitLUKS  = "nbdkit-luks"
	qemuLUKS    = "qemu-luks"
	nbdkitRaw   = "nbdkit-raw"
	qemuRaw     = "qemu-raw"
	goNBD       = "go-nbd"
	null        = "null"     // hostcryptd's server, no file and no encryption
	rawFile     = "raw-file" // fio's io_uring engine, no server
)

// A peer is a server that can be measured.
type peer struct {
	name      string
	encrypted bool
	direct    bool     // can use O_DIRECT, so it takes part on the real disk
	tools     []string // programs that it needs
}

var peers = []peer{
	{hostcryptd, true, true, nil},
	{nbdkitLUKS, true, false, []string{"nbdkit", "qemu-img"}},
	{qemuLUKS, true, true, []string{"qemu-nbd", "qemu-img"}},
	{passthrough, false, true, nil},
	{nbdkitRaw, false, false, []string{"nbdkit"}},
	{qemuRaw, false, true, []string{"qemu-nbd"}},
	{goNBD, false, false, nil},
	{null, false, false, nil},
}

// debianPackage names the package of each program that is run.
var debianPackage = map[string]string{
	"fio": "fio", "nbdkit": "nbdkit", "qemu-nbd": "qemu-utils", "qemu-img": "qemu-utils",
	"nbdinfo": "libnbd-bin", "go": "golang",
}

// requireTools reports the programs that are missing and who has them.
func requireTools(names ...string) error {
	var errs []error
	for _, n := range names {
		if _, err := exec.LookPath(n); err != nil {
			errs = append(errs, fmt.Errorf("%s is not installed: apt-get install %s", n, debianPackage[n]))
		}
	}
	return errors.Join(errs...)
}

// A bench holds what a run shares and has to clean up.
type bench struct {
	ctx     context.Context
	bin     string // folder of the binaries that were built
	cleanup []func()
}

func (b *bench) close() {
	for i := len(b.cleanup) - 1; i >= 0; i-- {
		b.cleanup[i]()
	}
}

// command runs a helper program to its end.
func (b *bench) command(name string, args ...string) (string, error) {
	cmd := exec.CommandContext(b.ctx, name, args...)
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return strings.TrimSpace(string(out)), nil
}

// A server is a peer that runs.
type server struct {
	peer
	cmd    *exec.Cmd
	exited chan struct{}
	stderr *os.File
	socket string
	file   string // backing file
	model  *volumeModel
	idle   float64 // resident MiB when just started
}

// image makes the image of p in dir, with room for size bytes of plaintext. What
// it has no content for is a hole until spread fills it.
func (b *bench) image(p peer, dir string, size int64) (file string, err error) {
	file = filepath.Join(dir, p.name+".img")
	switch p.name {
	case null:
		return "", nil
	case nbdkitLUKS, qemuLUKS:
		secret := filepath.Join(dir, "secret")
		if err := os.WriteFile(secret, []byte("correct horse battery staple"), 0o600); err != nil {
			return "", err
		}
		// On a busy machine qemu-img now and then fails to measure how fast it
		// derives keys ("unable to get accurate CPU usage").
		for range 5 {
			if _, err = b.command("qemu-img", "create", "-q", "-f", "luks", "--object", "secret,id=s,file="+secret,
				"-o", "key-secret=s,iter-time=10", file, strconv.FormatInt(size, 10)); err == nil {
				break
			}
		}
		return file, err
	case hostcryptd:
		size += 32 << 20 // for the header of a LUKS2 volume
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return "", err
	}
	return file, os.Truncate(file, size)
}

// spread allocates the files, a chunk of each in turn. On tmpfs the one that gets
// its memory first gets what is left over in single pages here and there, and its
// server is slow for it: of four servers of the same binary, the first to be
// started had 0.8 of the sequential reads of the others.
func spread(files []string, chunk int64) error {
	for off, more := int64(0), true; more; off += chunk {
		more = false
		for _, name := range files {
			f, err := os.OpenFile(name, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			fi, err := f.Stat()
			if err == nil && off < fi.Size() {
				more = true
				err = unix.Fallocate(int(f.Fd()), 0, off, min(chunk, fi.Size()-off))
			}
			if err := errors.Join(err, f.Close()); err != nil {
				return fmt.Errorf("allocating %s: %w", name, err)
			}
		}
	}
	return nil
}

// start serves size bytes of plaintext from the image of p in dir. With direct,
// the page cache is kept out.
func (b *bench) start(p peer, dir string, size int64, direct bool) (*server, error) {
	s := &server{
		peer: p, model: newVolumeModel(size), exited: make(chan struct{}),
		file: filepath.Join(dir, p.name+".img"), socket: filepath.Join(dir, p.name+".sock"),
	}
	if p.name == null {
		s.model.unchecked = true
	}
	args, err := b.commandLine(s, dir, size, direct)
	if err != nil {
		return nil, err
	}
	if s.stderr, err = os.Create(filepath.Join(dir, p.name+".log")); err != nil {
		return nil, err
	}
	s.cmd = exec.Command(args[0], args[1:]...)
	s.cmd.Dir, s.cmd.Stdout, s.cmd.Stderr = dir, s.stderr, s.stderr
	s.cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		s.cmd.Wait() // how it ended shows in its log
		close(s.exited)
	}()
	b.cleanup = append(b.cleanup, s.stop)
	if err := s.waitReady(b.ctx); err != nil {
		return nil, err
	}
	s.idle = s.memory("VmRSS:")
	if s.model.unchecked {
		return s, nil
	}
	if err := fill(b.ctx, s.socket, s.model); err != nil {
		return nil, s.explain(err)
	}
	return s, nil
}

// commandLine is how s is started. hostcryptd's image is formatted by that.
func (b *bench) commandLine(s *server, dir string, size int64, direct bool) ([]string, error) {
	secret := filepath.Join(dir, "secret")
	cache, aio := "writeback", "threads"
	if direct {
		cache, aio = "none", "native"
	}
	switch s.name {
	case hostcryptd:
		binary, key := filepath.Join(b.bin, "hostcryptd"), filepath.Join(dir, "host.key")
		apart := []string{"--host-key", key, "--audit-log", "none", "--tpm", "none", "--pins", filepath.Join(dir, "pins")} // from what this host keeps
		if _, err := b.command(binary, append([]string{"format", s.file, "--yes", "--sector-size", "4096"}, apart...)...); err != nil {
			return nil, err
		}
		return append([]string{binary, "serve", s.file, "--listen", s.socket, "--control", filepath.Join(dir, "control.sock"),
			"--direct=" + strconv.FormatBool(direct)}, apart...), nil
	case passthrough:
		return []string{filepath.Join(b.bin, "passthrough"), "-direct=" + strconv.FormatBool(direct), s.file, s.socket}, nil
	case null:
		return []string{filepath.Join(b.bin, "passthrough"), "-null", strconv.FormatInt(size, 10), s.socket}, nil
	case goNBD:
		return []string{filepath.Join(b.bin, "gonbd"), s.file, s.socket}, nil
	case nbdkitRaw:
		return []string{"nbdkit", "-f", "-U", s.socket, "file", s.file}, nil
	case nbdkitLUKS:
		return []string{"nbdkit", "-f", "-U", s.socket, "--filter=luks", "file", s.file, "passphrase=+" + secret}, nil
	case qemuRaw:
		return []string{"qemu-nbd", "-t", "-e", "8", "-k", s.socket, "-f", "raw", "--cache=" + cache, "--aio=" + aio, s.file}, nil
	case qemuLUKS:
		return []string{"qemu-nbd", "-t", "-e", "8", "-k", s.socket, "--cache=" + cache, "--aio=" + aio,
			"--object", "secret,id=s,file=" + secret, "--image-opts", "driver=luks,key-secret=s,file.driver=file,file.filename=" + s.file}, nil
	}
	return nil, fmt.Errorf("no server %q", s.name)
}

func (s *server) waitReady(ctx context.Context) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		c, err := net.Dial("unix", s.socket)
		if err == nil {
			return c.Close()
		}
		select {
		case <-s.exited:
			return s.explain(errors.New("ended before it listened"))
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return s.explain(errors.New("didn't listen within 10 s"))
		}
	}
}

// explain adds the end of the server's log to an error.
func (s *server) explain(err error) error {
	text, _ := os.ReadFile(s.stderr.Name())
	if len(text) > 1000 {
		text = text[len(text)-1000:]
	}
	return fmt.Errorf("%s: %w\n%s", s.name, err, bytes.TrimSpace(text))
}

func (s *server) stop() {
	s.cmd.Process.Signal(unix.SIGTERM)
	select {
	case <-s.exited:
	case <-time.After(5 * time.Second):
		s.cmd.Process.Kill()
		<-s.exited
	}
	s.stderr.Close()
}

// memory returns a line of /proc/PID/status in MiB, or 0 of a dead process.
func (s *server) memory(field string) float64 {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == field {
			kib, _ := strconv.ParseFloat(f[1], 64)
			return kib / 1024
		}
	}
	return 0
}

// cpu returns the processor time used so far, in steps of 10 ms.
func (s *server) cpu() time.Duration {
	text, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.cmd.Process.Pid))
	// The name, in parentheses, may hold anything.
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.ParseInt(f[11], 10, 64)
	system, _ := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond
}

// measure runs one slice of l.
func (s *server) measure(ctx context.Context, l load, d time.Duration) (sample, error) {
	before := s.cpu()
	out, err := runLoad(ctx, s.socket, l, s.model, d)
	if err != nil {
		return sample{}, s.explain(err)
	}
	if n := out.IOPS * d.Seconds(); n > 0 {
		out.ServerCPUu = float64((s.cpu() - before).Microseconds()) / n
	}
	return out, nil
}
