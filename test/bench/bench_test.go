package main

import (
	"context"
	"errors"
	"flag"
	"math"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
)

var update = flag.Bool("update", false, "rewrite golden files")

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		in   []float64
		want float64
	}{
		{[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(test.in); got != test.want {
			t.Errorf("median(%v) = %v, want %v", test.in, got, test.want)
		}
	}
	if got := median(nil); !math.IsNaN(got) {
		t.Errorf("median of nothing = %v, want NaN", got)
	}
}

func TestRatios(t *testing.T) {
	// The best of others differs between rounds; rounds that only one side has
	// don't count.
	got := ratios([]float64{10, 20, 30}, []float64{5, 1, 7}, []float64{2, 40})
	if diff := cmp.Diff([]float64{2, 0.5, 30.0 / 7}, got); diff != "" {
		t.Error(diff)
	}
	if got := ratios([]float64{1}); got != nil {
		t.Errorf("ratios to nothing = %v", got)
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	if h.quantile(.5) != 0 {
		t.Error("quantile of nothing is not 0")
	}
	for i := range 10000 {
		h.add(time.Duration(i+1) * time.Microsecond)
	}
	for _, test := range []struct {
		q    float64
		want time.Duration
	}{{.5, 5 * time.Millisecond}, {.99, 9900 * time.Microsecond}, {1, 10 * time.Millisecond}} {
		got := h.quantile(test.q)
		if off := float64(test.want-got) / float64(test.want); off < 0 || off > 1.0/64 {
			t.Errorf("quantile(%v) = %v, want %v less at most 1/64", test.q, got, test.want)
		}
	}
	h.add(-1)
	h.add(math.MaxInt64)
	var exact histogram
	exact.add(7)
	exact.merge(&h)
	if exact.count != 10003 {
		t.Errorf("count after merge = %d, want 10003", exact.count)
	}
	for _, d := range []time.Duration{0, 1, 63, 64, 127, 128, 129, 1000, 1 << 40} {
		var one histogram
		one.add(d)
		if got := one.quantile(.5); got > d || d-got > d/64 {
			t.Errorf("bucket of %d begins at %d", d, got)
		}
	}
}

// memory is a device that can be told to lie.
type memory struct {
	mu   sync.RWMutex
	data []byte

	dropWrites, flipReads atomic.Bool
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := copy(p, m.data[off:])
	if m.flipReads.Load() {
		p[n-1] ^= 1 // the body, not the stamp
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	if m.dropWrites.Load() {
		return len(p), nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.data[off:], p), nil
}

func (m *memory) Size() (int64, error)                        { return int64(len(m.data)), nil }
func (m *memory) Sync() error                                 { return nil }
func (m *memory) WriteAtFUA(p []byte, off int64) (int, error) { return m.WriteAt(p, off) }
func (m *memory) Trim(_, _ int64, _ bool) error               { return nil }
func (m *memory) WriteZeroes(off, length int64, fua bool) error {
	_, err := m.WriteAt(make([]byte, length), off)
	return err
}

func serveMemory(t *testing.T, size int) (*memory, string) {
	t.Helper()
	m := &memory{data: make([]byte, size)}
	s, err := nbd.New(nbd.Config{}, nbd.Export{Device: m})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := s.ServeListener(ctx, ln); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
		s.Close()
	})
	return m, socket
}

func TestLoad(t *testing.T) {
	const size = 4 << 20
	_, socket := serveMemory(t, size)
	m := newVolumeModel(size)
	if err := fill(t.Context(), socket, m); err != nil {
		t.Fatal(err)
	}
	for _, l := range loads {
		got, err := runLoad(t.Context(), socket, l, m, 30*time.Millisecond)
		if err != nil {
			t.Fatalf("%s: %v", l.Name, err)
		}
		if got.IOPS <= 0 || got.P50us <= 0 || got.P99us < got.P50us || math.Abs(got.MBps-got.IOPS*float64(l.Block)/1e6) > 1 {
			t.Errorf("%s: implausible %+v", l.Name, got)
		}
		if err := verify(t.Context(), socket, m); err != nil {
			t.Fatalf("after %s: %v", l.Name, err)
		}
	}
}

func TestLoadNoticesLies(t *testing.T) {
	const size = 1 << 20
	device, socket := serveMemory(t, size)
	m := newVolumeModel(size)
	if err := fill(t.Context(), socket, m); err != nil {
		t.Fatal(err)
	}
	device.flipReads.Store(true)
	if err := verify(t.Context(), socket, m); err == nil || !strings.Contains(err.Error(), "wrong data within") {
		t.Errorf("a flipped bit in the body: %v", err)
	}
	device.flipReads.Store(false)
	device.dropWrites.Store(true)
	if err := fill(t.Context(), socket, m); err != nil {
		t.Fatal(err)
	}
	if _, err := runLoad(t.Context(), socket, loads[0], m, 20*time.Millisecond); err == nil || !strings.Contains(err.Error(), "wrong data at") {
		t.Errorf("writes that were dropped: %v", err)
	}
}

func TestLoadEnds(t *testing.T) {
	_, socket := serveMemory(t, 1<<20)
	if _, err := runLoad(t.Context(), socket, loads[0], newVolumeModel(2<<20), time.Millisecond); err == nil {
		t.Error("an export that is too small: no error")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := runLoad(ctx, socket, loads[0], newVolumeModel(1<<20), time.Hour); err == nil {
		t.Error("a cancelled load: no error")
	}
}

func TestLoadAllocations(t *testing.T) {
	const size = 1 << 20
	_, socket := serveMemory(t, size)
	fd, _, err := dial(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	m := newVolumeModel(size)
	m.next++
	c := newClient(fd, loads[2], m, 0, size/4096, false)
	now := time.Duration(0)
	if n := testing.AllocsPerRun(100, func() {
		c.vectors = c.vectors[:0]
		c.prepare(now)
		for cookie := range c.l.Depth {
			c.end(cookie, now)
		}
	}); n != 0 {
		t.Errorf("a batch of requests allocates %v times", n)
	}
}

func TestParseFio(t *testing.T) {
	for _, test := range []struct {
		name, in string
		want     sample
		err      string
	}{
		{"read", `note: something
{"jobs":[{"error":0,"read":{"iops":1000.5,"bw_bytes":4098048,"total_ios":10,"clat_ns":{"percentile":{"50.000000":2000,"99.000000":9000}}},"write":{"total_ios":0}}]}`,
			sample{IOPS: 1000.5, MBps: 4.098048, P50us: 2, P99us: 9}, ""},
		{"write", `{"jobs":[{"read":{"iops":1},"write":{"iops":7,"bw_bytes":1000000,"total_ios":3}}]}`, sample{IOPS: 7, MBps: 1}, ""},
		{"no output", "", sample{}, "no JSON"},
		{"cut off", `{"jobs":[`, sample{}, "unexpected end"},
		{"no job", `{"jobs":[]}`, sample{}, "0 jobs"},
		{"error", `{"jobs":[{"error":5,"read":{"total_ios":1}}]}`, sample{}, "input/output error"},
		{"idle", `{"jobs":[{"read":{}}]}`, sample{}, "no I/O"},
	} {
		got, err := parseFio([]byte(test.in))
		if (err != nil) != (test.err != "") || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.err)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s: %s", test.name, diff)
		}
	}
}

// sampleResult has one load in which hostcryptd meets one target and misses
// another.
func sampleResult() *result {
	r := &result{
		Started: "2026-01-02 03:04 UTC", Machine: "host <&>", CPU: "2 x Some Processor", Kernel: "6.1", Load: "0.25", Slice: 1, Rounds: 2,
		Versions: map[string]string{qemuRaw: "qemu-nbd 7.2"},
		PeakMiB:  map[string]float64{hostcryptd: 40}, IdleMiB: map[string]float64{hostcryptd: 33},
	}
	for server, iops := range map[string][2]float64{hostcryptd: {300e3, 330e3}, nbdkitLUKS: {50e3, 55e3}, qemuRaw: {200e3, 220e3}, passthrough: {320e3, 340e3}} {
		for _, v := range iops {
			r.add("tmpfs", "own", loads[0], server, sample{IOPS: v, MBps: v * 4096 / 1e6, P50us: 1, P99us: 2, ServerCPUu: 3})
		}
	}
	// Maps have no order, golden files do.
	var ordered []series
	for _, p := range peers {
		if s := r.find("tmpfs", "own", loads[0].Name, p.name); s != nil {
			ordered = append(ordered, *s)
		}
	}
	r.Series = ordered
	r.judge()
	return r
}

func TestJudge(t *testing.T) {
	want := map[string]bool{
		loads[0].Name + " / best encrypted": true, loads[0].Name + " / best plain": false, loads[0].Name + " / own passthrough": true,
		"resident MiB, 4 connections busy": true, "resident MiB, idle": false,
	}
	got := map[string]bool{}
	for _, c := range sampleResult().Checks {
		got[c.What] = c.Met
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestGolden(t *testing.T) {
	r := sampleResult()
	for name, got := range map[string]string{"sample.svg": r.svg(), "sample.txt": r.text()} {
		path := filepath.Join("testdata", name)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("%s (-update rewrites it):\n%s", name, diff)
		}
	}
}

func TestRequireTools(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	err := requireTools("fio", "qemu-img")
	for _, want := range []string{"apt-get install fio", "apt-get install qemu-utils"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v doesn't say %q", err, want)
		}
	}
}

func TestJobFiles(t *testing.T) {
	for _, l := range loads {
		name, ok := fioJobs[l.Name]
		if !ok {
			continue
		}
		if _, err := jobFiles.ReadFile(name); err != nil {
			t.Error(err)
		}
	}
}

func TestAttribute(t *testing.T) {
	got := attribute(`
 ffffffff81 filemap_get_entry
 ffffffff82 shmem_file_read_iter
 ffffffff83 __x64_sys_pread64
     4a0000 hostcryptd/nbd.(*conn).work

     4a0001 hostcryptd/xts.decryptZMM.abi0
     4a0000 hostcryptd/nbd.(*conn).work

     4a0000 hostcryptd/nbd.(*conn).work

 ffffffff84 something_else
`)
	for _, k := range []string{"backing device: finding the page", "cipher", "server and volume", "other"} {
		if got[k] != 25 {
			t.Errorf("%s has %v %%, want 25", k, got[k])
		}
	}
	if len(attribute("")) != 0 {
		t.Error("kinds of nothing")
	}
}
