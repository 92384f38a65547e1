// Bench measures hostcryptd against other NBD servers, on tmpfs and on a real
// disk, in one go:
//
//	go run ./test/bench [-quick] [-peers LIST] [-loads REGEXP]
//
// It builds hostcryptd from the tree, starts all servers, and gives each load
// to one server after the other in short slices, several rounds of them, so
// that what else runs on the machine hits all alike. Judged are the ratios
// within a round. Every read of the own load generator checks its data, and
// before fio overwrites it all of it is compared byte for byte.
//
// On the real disk only servers take part that can bypass the page cache.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var loads = []load{
	{"rand read 4k qd32 c1", false, true, 4096, 32, 1},
	{"rand read 4k qd32 c2", false, true, 4096, 32, 2},
	{"rand write 4k qd32 c1", true, true, 4096, 32, 1},
	{"rand write 4k qd32 c2", true, true, 4096, 32, 2},
	{"rand read 4k qd1 c1", false, true, 4096, 1, 1},
	{"seq read 128k qd8 c1", false, false, 128 << 10, 8, 1},
	{"seq write 128k qd8 c1", true, false, 128 << 10, 8, 1},
}

// diskLoads run on the real disk.
var diskLoads = []load{loads[0], loads[2]}

// fioJobs are the job files that do what a load does.
var fioJobs = map[string]string{
	loads[0].Name: "rand-read.fio", loads[2].Name: "rand-write.fio",
	loads[5].Name: "seq-read.fio", loads[6].Name: "seq-write.fio",
}

type config struct {
	slice, fioSlice   time.Duration
	rounds, fioRounds int
	size              int64
	peers             []peer
	loads             *regexp.Regexp
	out, disk         string
	profile           bool
}

func main() {
	os.Setenv("HOSTCRYPTD_TPM", "none") // not this machine's
	var c config
	var names, match string
	var mib int64
	quick := flag.Bool("quick", false, "short slices, two rounds: at most a minute, and rough")
	flag.DurationVar(&c.slice, "duration", 800*time.Millisecond, "length of one slice")
	flag.IntVar(&c.rounds, "rounds", 3, "how often each server gets each load")
	flag.StringVar(&names, "peers", "", "comma-separated servers besides hostcryptd (default all)")
	flag.StringVar(&match, "loads", "", "only loads whose name matches this regular expression")
	flag.StringVar(&c.out, "out", "test/bench/results", "folder for latest.txt, latest.json and latest.svg, from the root of the module")
	flag.StringVar(&c.disk, "disk", "", "folder on the real disk (default: hostcryptd-bench in the user's cache folder)")
	flag.Int64Var(&mib, "size", 256, "size of each volume in MiB")
	flag.BoolVar(&c.profile, "profile", false, "only sample, with perf, where the server's time goes on tmpfs: profile.txt")
	flag.Parse()
	c.size, c.fioSlice, c.fioRounds = mib<<20, c.slice, 2
	if *quick {
		c.slice, c.fioSlice, c.rounds, c.fioRounds, c.size = 120*time.Millisecond, 150*time.Millisecond, 2, 1, 32<<20
	}
	if err := run(c, names, match); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(c config, names, match string) error {
	// Children die with the thread that started them.
	runtime.LockOSThread()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if c.slice < 10*time.Millisecond || c.rounds < 1 || c.size < 8<<20 {
		return errors.New("-duration is at least 10ms, -rounds 1, -size 8")
	}
	var err error
	if c.loads, err = regexp.Compile(match); err != nil {
		return err
	}
	if c.peers, err = choosePeers(names); err != nil {
		return err
	}
	mod, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		return err
	}
	root := filepath.Dir(strings.TrimSpace(string(mod)))
	if c.disk == "" {
		cache, err := os.UserCacheDir()
		if err != nil {
			return err
		}
		c.disk = filepath.Join(cache, "hostcryptd-bench")
	}
	if err := os.MkdirAll(c.disk, 0o700); err != nil {
		return err
	}
	if !filepath.IsAbs(c.out) {
		c.out = filepath.Join(root, c.out)
	}
	b := &bench{ctx: ctx}
	defer b.close()
	if err := b.build(root); err != nil {
		return err
	}
	// The collector must not run in the middle of a slice.
	debug.SetGCPercent(400)
	r := describe(b, c, root)
	if c.profile {
		return b.profile(c, r)
	}
	if err := b.tmpfs(c, r); err != nil {
		return err
	}
	if err := b.realDisk(c, r); err != nil {
		return err
	}
	r.judge()
	fmt.Print(r.text())
	return r.save(c.out)
}

// choosePeers returns hostcryptd and the servers of a comma-separated list, or all, and
// an error if what they need is missing.
func choosePeers(names string) (chosen []peer, err error) {
	tools := []string{"go", "fio"}
	known := map[string]bool{}
	for _, p := range peers {
		known[p.name] = true
		if p.name == hostcryptd || names == "" || slices.Contains(strings.Split(names, ","), p.name) {
			chosen = append(chosen, p)
			tools = append(tools, p.tools...)
		}
	}
	for n := range strings.SplitSeq(names, ",") {
		if n != "" && !known[n] {
			return nil, fmt.Errorf("no server %q; there are %v", n, peers)
		}
	}
	slices.Sort(tools)
	return chosen, requireTools(slices.Compact(tools)...)
}

// build builds the servers that are in this tree.
func (b *bench) build(root string) (err error) {
	if b.bin, err = b.temp(""); err != nil {
		return err
	}
	for name, pkg := range map[string]string{"hostcryptd": "./cmd/hostcryptd", "passthrough": "./test/bench/passthrough", "gonbd": "./test/bench/gonbd"} {
		cmd := exec.CommandContext(b.ctx, "go", "build", "-o", filepath.Join(b.bin, name), pkg)
		cmd.Dir, cmd.Env = root, append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("building %s: %w\n%s", pkg, err, out)
		}
	}
	return nil
}

// temp makes a folder that close removes.
func (b *bench) temp(parent string) (string, error) {
	dir, err := os.MkdirTemp(parent, "hostcryptd-bench-")
	if err == nil {
		b.cleanup = append(b.cleanup, func() { os.RemoveAll(dir) })
	}
	return dir, err
}

// startAll starts the servers that take part on a medium.
func (b *bench) startAll(ps []peer, size int64, dir string, direct bool) (out []*server, err error) {
	if direct {
		ps = slices.DeleteFunc(slices.Clone(ps), func(p peer) bool { return !p.direct })
	}
	var files []string
	for _, p := range ps {
		file, err := b.image(p, dir, size)
		if err != nil {
			return nil, err
		}
		if file != "" {
			files = append(files, file)
		}
	}
	chunk := int64(1 << 20)
	if direct {
		chunk = 1 << 40 // each file in one piece
	}
	if err := spread(files, chunk); err != nil {
		return nil, err
	}
	for _, p := range ps {
		s, err := b.start(p, dir, size, direct)
		if err != nil {
			return nil, err
		}
		out = append(out, s)
	}
	return out, nil
}

// rounds gives each load to each server in turn.
func (b *bench) rounds(c config, r *result, medium string, ls []load, servers []*server, after func(load) error) error {
	for _, l := range ls {
		if !c.loads.MatchString(l.Name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: %s: %s\n", medium, l.Name)
		for range c.rounds {
			for _, s := range servers {
				v, err := s.measure(b.ctx, l, c.slice)
				if err != nil {
					return err
				}
				r.add(medium, "own", l, s.name, v)
			}
			if after != nil {
				if err := after(l); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func (b *bench) fio(c config, r *result, medium string, l load, dir string, s *server) error {
	before := s.cpu()
	v, err := runFio(b.ctx, dir, fioJobs[l.Name], c.fioSlice, "BENCH_URI=nbd+unix:///?socket="+s.socket)
	if err != nil {
		return s.explain(err)
	}
	v.ServerCPUu = float64((s.cpu() - before).Microseconds()) / (v.IOPS * c.fioSlice.Seconds())
	r.add(medium, "fio", l, s.name, v)
	return nil
}

func (b *bench) tmpfs(c config, r *result) error {
	dir, err := b.temp("/dev/shm")
	if err != nil {
		return err
	}
	started := len(b.cleanup)
	servers, err := b.startAll(c.peers, c.size, dir, false)
	if err != nil {
		return err
	}
	if err := b.rounds(c, r, "tmpfs", loads, servers, nil); err != nil {
		return err
	}
	for _, s := range servers {
		r.IdleMiB[s.name] = s.idle
		for _, l := range []load{
			{"rand write 4k qd32 c4", true, true, 4096, 32, 4},
			{"rand read 4k qd32 c4", false, true, 4096, 32, 4},
			{"seq write 128k qd8 c4", true, false, 128 << 10, 8, 4},
			{"seq read 128k qd8 c4", false, false, 128 << 10, 8, 4},
		} {
			if _, err := s.measure(b.ctx, l, c.slice/2); err != nil {
				return err
			}
		}
		r.PeakMiB[s.name] = s.memory("VmHWM:")
		if err := verify(b.ctx, s.socket, s.model); err != nil {
			return s.explain(err)
		}
	}
	for _, l := range loads {
		if fioJobs[l.Name] == "" || !c.loads.MatchString(l.Name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: tmpfs, fio: %s\n", l.Name)
		for range c.fioRounds {
			for _, s := range servers {
				if err := b.fio(c, r, "tmpfs", l, dir, s); err != nil {
					return err
				}
			}
		}
	}
	// Memory and processors are free again for what comes next.
	for i := len(b.cleanup) - 1; i >= started; i-- {
		b.cleanup[i]()
	}
	b.cleanup = b.cleanup[:started]
	return nil
}

func (b *bench) realDisk(c config, r *result) error {
	dir, err := b.temp(c.disk)
	if err != nil {
		return err
	}
	servers, err := b.startAll(c.peers, c.size, dir, true)
	if err != nil {
		return err
	}
	raw := filepath.Join(dir, "raw.img")
	if err := os.WriteFile(raw, make([]byte, c.size), 0o600); err != nil {
		return err
	}
	unix.Sync() // what was written so far must not compete
	checked := map[string]bool{}
	return b.rounds(c, r, "disk", diskLoads, servers, func(l load) error {
		job := "raw-rand-read.fio"
		if l.Write {
			job = "raw-rand-write.fio"
		}
		v, err := runFio(b.ctx, dir, job, c.fioSlice, "BENCH_FILE="+raw, "BENCH_SIZE="+strconv.FormatInt(c.size, 10))
		if err != nil {
			return err
		}
		r.add("disk", "fio", l, rawFile, v)
		for _, s := range servers {
			if l.Write && !checked[s.name] {
				if err := verify(b.ctx, s.socket, s.model); err != nil {
					return s.explain(err)
				}
				checked[s.name] = true
			}
			if err := b.fio(c, r, "disk", l, dir, s); err != nil {
				return err
			}
		}
		return nil
	})
}

// describe names the machine and what runs on it.
func describe(b *bench, c config, root string) *result {
	r := &result{
		Started: time.Now().UTC().Format("2006-01-02 15:04 UTC"), Slice: c.slice.Seconds(), Rounds: c.rounds,
		Versions: map[string]string{}, PeakMiB: map[string]float64{}, IdleMiB: map[string]float64{},
	}
	r.Machine, _ = os.Hostname()
	var u unix.Utsname
	if unix.Uname(&u) == nil {
		r.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	load, _ := os.ReadFile("/proc/loadavg")
	r.Load, _, _ = strings.Cut(string(load), " ")
	info, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(info)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			r.CPU = fmt.Sprintf("%d x %s", runtime.NumCPU(), strings.TrimSpace(v))
			break
		}
	}
	for _, p := range c.peers {
		switch {
		case p.name == goNBD:
			r.Versions[p.name] = "v0.3.2, file backend"
		case p.name == hostcryptd:
			// An export of the sources has no revision to show.
			revision, _ := b.command("git", "-C", root, "describe", "--always", "--dirty")
			r.Versions[p.name] = strings.TrimSpace("from this tree " + revision)
		case p.name == null:
			r.Versions[p.name] = "hostcryptd's server on nothing: no file, no encryption; what the client and the machine allow"
		case p.name == passthrough:
			r.Versions[p.name] = "hostcryptd's server on the raw file"
		default:
			out, _ := b.command(p.tools[0], "--version")
			r.Versions[p.name], _, _ = strings.Cut(out, "\n")
		}
	}
	return r
}

func (r *result) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	j, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	for name, text := range map[string]string{"latest.json": string(j) + "\n", "latest.txt": r.text(), "latest.svg": r.svg()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}
