//go:build vm

package vm

import (
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"time"

	"hostcryptd/test/vm/evidence"
	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

const (
	volumeSize  = 128 << 20
	stateSize   = 32 << 20
	dataOffset  = 16 << 20 // of the data area, see sector/FORMAT.md
	payloadSize = 50 << 20

	oldSeries = "6.1" // of Debian 12
)

func TestMain(m *testing.M) {
	os.Setenv("HOSTCRYPTD_TPM", "none") // what runs on this machine leaves its TPM alone
	os.Exit(m.Run())
}

// A lab is what all boots of one test share.
type lab struct {
	*vmtest.Lab
	mu     sync.Mutex     // guards what follows
	rows   []string       // of the table at the end
	system *vmtest.System // nil before the first call of systems
}

// newLab fetches the kernel and builds the initramfs. The lab's folder is
// removed at the end of a test that passed, and named at the end of one that
// failed.
func newLab(t *testing.T) *lab {
	t.Helper()
	return newLabOf(t, vmtest.Series())
}

// newLabOf is newLab with the kernel of a series.
func newLabOf(t *testing.T, series string) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("", "hostcryptd-vm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { keepOrRemove(t, dir) })
	l, err := vmtest.NewLab(t.Context(), dir, series, t.Logf)
	if err != nil {
		t.Fatal(err)
	}
	return &lab{Lab: l}
}

func keepOrRemove(t *testing.T, dir string) {
	if f := flag.Lookup("test.artifacts"); f != nil && f.Value.String() == "true" {
		for _, pattern := range []string{"*.log", "*.jsonl", "*.command"} {
			files, _ := filepath.Glob(filepath.Join(dir, pattern))
			for _, name := range files {
				if err := vmtest.CopySparse(filepath.Join(t.ArtifactDir(), filepath.Base(name)), name); err != nil {
					t.Error(err)
				}
			}
		}
	}
	if t.Failed() || os.Getenv("HOSTCRYPTD_VM_KEEP") != "" {
		t.Logf("disks, logs and command lines are kept in %s", dir)
		return
	}
	os.RemoveAll(dir)
}

// boot runs one scenario in a virtual machine and fails the test if the
// scenario fails.
func (l *lab) boot(t *testing.T, scenario string, params map[string]string, disks ...vmtest.Disk) *vmtest.Result {
	t.Helper()
	return run(t, l.Config(scenario, params, disks...))
}

// run is boot where more has to be said of the machine.
func run(t *testing.T, c vmtest.Config) *vmtest.Result {
	t.Helper()
	c.OnEvent = func(e report.Event) { t.Log(e) }
	r, err := c.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// play boots a scenario that has no more to it, and adds the test's row to the table.
func (l *lab) play(t *testing.T, scenario string, disks ...vmtest.Disk) {
	t.Helper()
	begun := time.Now()
	r := l.boot(t, scenario, nil, disks...)
	l.row(path.Base(t.Name()), time.Since(begun), r)
}

// sparse makes an empty disk, whose image is called after the test.
func (l *lab) sparse(t *testing.T, serial string, size int64) vmtest.Disk {
	t.Helper()
	d := vmtest.Disk{Serial: serial, Path: filepath.Join(l.Dir, path.Base(t.Name())+"-"+serial+".img")}
	if err := vmtest.Sparse(d.Path, size); err != nil {
		t.Fatal(err)
	}
	return d
}

// format writes a header, on this host and with a host key, which is made if it
// isn't there. Of the volume, the host remembers nothing but beside the key.
func (l *lab) format(t *testing.T, image, hostKey string, more ...string) {
	t.Helper()
	args := []string{"format", image, "--host-key", hostKey, "--yes", "--audit-log", "none", "--pins", hostKey + ".pins", "--tpm", "none"}
	l.command(t, l.Hostcryptd, append(args, more...)...)
}

// row adds a line to the table: the scenario, its wall time with everything
// that the host did, and the figures of its boots.
func (l *lab) row(name string, wall time.Duration, boots ...*vmtest.Result) {
	var cells []string
	for _, r := range boots {
		cells = append(cells, fmt.Sprintf("kernel %.1f s, VM %.1f s", r.Boot.Seconds(), r.Wall.Seconds()))
		for _, key := range slices.Sorted(maps.Keys(r.Figures)) {
			f := r.Figures[key]
			cells = append(cells, strings.TrimSpace(fmt.Sprintf("%s %.4g %s", key, f.Value, f.Text)))
		}
	}
	l.add(fmt.Sprintf("%s\t%.1f s\t%s\n", name, wall.Seconds(), strings.Join(cells, "; ")))
}

func (l *lab) add(row string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.rows = append(l.rows, row)
}

func (l *lab) table() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "scenario\twall\tfigures (Linux %s, emulated: good for comparisons with earlier runs only)\n", l.Kernel.Release)
	for _, r := range l.rows {
		fmt.Fprint(w, r)
	}
	w.Flush()
	return b.String()
}

// newCanary returns a string that occurs nowhere else.
func newCanary() string { return "HOSTCRYPTD-CANARY-" + rand.Text() }

// TestGuest boots without hostcryptd taking part: if this fails, the cause
// is the kernel, QEMU or the guest program.
func TestGuest(t *testing.T) {
	l := newLab(t)
	t.Run("Works", func(t *testing.T) {
		r := l.boot(t, "smoke", nil, l.sparse(t, "state", stateSize))
		l.row("smoke", r.Wall, r)
	})
	// The control: what the kernel complains about fails a boot.
	t.Run("KernelComplains", func(t *testing.T) {
		_, err := l.Config("complain", nil).Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), "the kernel log has: test: I/O error") {
			t.Errorf("a boot with an I/O error in the kernel log: %v, want that error", err)
		}
	})
	t.Logf("\n%s", l.table())
}

// TestDemoOnHost runs the demo the way it runs on a host's own kernel. The
// host is a virtual machine.
func TestDemoOnHost(t *testing.T) {
	l := newLab(t)
	payload, err := vmtest.Payload(t.Context(), filepath.Join(l.Dir, "payload.tar"), 6<<20)
	if err != nil {
		t.Fatal(err)
	}
	r := l.boot(t, "demo-on-host", map[string]string{"canary": newCanary()}, l.sparse(t, "volume", volumeSize), payload.Disk())
	l.row("demo on host", r.Wall, r)
	t.Logf("\n%s", l.table())
}

// A scenario is a subtest of TestVM.
type scenario struct {
	name string
	run  func(t *testing.T)
}

// TestVM runs the scenarios. Each of them can be asked for alone: Reboot,
// StolenDisk and Leave make the disk of Boot first if Boot didn't. As many run at a
// time as -parallel says, which is the number of processors (an emulated machine takes
// one): those of a list that share a disk one after the other, and the list that takes
// longest first, so that none is left to run alone at the end. Subtests with t.Parallel
// come in any order: the longest was the last.
func TestVM(t *testing.T) {
	l := newLab(t)
	t.Cleanup(func() { t.Logf("\n%s", l.table()) })
	d := &disk{lab: l}
	volumes := &volumeSystem{}
	queue := make(chan []scenario)
	var workers sync.WaitGroup
	for range flag.Lookup("test.parallel").Value.(flag.Getter).Get().(int) {
		workers.Go(func() {
			for list := range queue {
				for _, s := range list {
					t.Run(s.name, s.run)
				}
			}
		})
	}
	for _, list := range [][]scenario{
		{{"OldKernel", testOldKernel}},
		{
			{"SystemdBoot", func(t *testing.T) { volumes.systemLab = l.systems(t); volumes.make(t) }},
			{"Shutdown", func(t *testing.T) { volumes.systemLab = l.systems(t); testShutdown(t, volumes) }},
		},
		{{"RootOnVolume", func(t *testing.T) { testRootOnVolume(t, l.systems(t)) }}},
		{{"Kdump", func(t *testing.T) { testKdump(t, l.systems(t)) }}},
		{{"HeaderPowerCut", func(t *testing.T) { testHeaderPowerCut(t, l) }}},
		{{"PowerCut", func(t *testing.T) { testPowerCut(t, l) }}},
		{{"Swap", func(t *testing.T) { testSwap(t, l, false) }}},
		{{"Watchdog", func(t *testing.T) { testWatchdog(t, l.systems(t)) }}},
		{{"Restart", func(t *testing.T) { testOnDisk(t, l, "restart") }}},
		{{"LogWrites", func(t *testing.T) { testLogWrites(t, l) }}},
		{{"Kill", func(t *testing.T) { testOnDisk(t, l, "kill") }}},
		{
			{"Boot", func(t *testing.T) { d.make(t) }},
			{"Reboot", func(t *testing.T) { testOnBootDisk(t, d, "reboot") }},
			{"StolenDisk", func(t *testing.T) { testStolenDisk(t, d) }},
			{"Leave", func(t *testing.T) { testOnBootDisk(t, d, "leave") }},
			// Last: it adds a file, which the others would find to be one too many.
			{"InUse", func(t *testing.T) { testOnBootDisk(t, d, "inuse") }},
		},
		{{"SwapControl", func(t *testing.T) { testSwap(t, l, true) }}},
		{{"Logs", func(t *testing.T) { testLogs(t, l.systems(t)) }}},
		{{"Outage", func(t *testing.T) { testOutage(t, l) }}},
		{{"Stress", func(t *testing.T) { testStress(t, l) }}},
		{{"Revoke", func(t *testing.T) {
			l.play(t, "revoke", l.sparse(t, "volume", volumeSize), l.sparse(t, "state", stateSize), l.tools(t))
		}}},
		{{"DiskErrors", func(t *testing.T) { l.play(t, "disk-errors", l.sparse(t, "volume", volumeSize)) }}},
		{{"QEMUExport", func(t *testing.T) { testQEMUExport(t, l) }}},
	} {
		queue <- list
	}
	close(queue)
	workers.Wait()
}

// testOnBootDisk runs a scenario on the disk of Boot.
func testOnBootDisk(t *testing.T, d *disk, scenario string) {
	d.make(t)
	d.play(t, scenario, d.disks()...)
}

// tools returns the disk with fio, which is made once.
func (l *lab) tools(t *testing.T) vmtest.Disk {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	d := vmtest.Disk{Serial: "tools", Path: filepath.Join(l.Dir, "tools.img"), ReadOnly: true}
	if _, err := os.Stat(d.Path); err == nil {
		return d
	}
	if err := vmtest.ToolsDisk(t.Context(), d.Path+".new", "fio"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(d.Path+".new", d.Path); err != nil {
		t.Fatal(err)
	}
	return d
}

// testOutage boots while the vault is down, with disks of its own.
func testOutage(t *testing.T, l *lab) {
	length := 40 * time.Second
	if s := os.Getenv("HOSTCRYPTD_VM_OUTAGE"); s != "" {
		var err error
		if length, err = time.ParseDuration(s); err != nil || length < 10*time.Second {
			t.Fatalf("HOSTCRYPTD_VM_OUTAGE: %q is no time of 10s or more", s)
		}
	}
	begun := time.Now()
	c := l.Config("outage", map[string]string{"outage": strconv.Itoa(int(length.Seconds()))}, l.sparse(t, "volume", volumeSize), l.sparse(t, "state", stateSize))
	c.Timeout += length
	r := run(t, c)
	l.row("Outage", time.Since(begun), r)
}

// testOldKernel runs what depends most on the kernel on the oldest one that is
// supported.
func testOldKernel(t *testing.T) {
	l := newLabOf(t, oldSeries)
	defer func() { t.Logf("\n%s", l.table()) }()
	t.Run("Kill", func(t *testing.T) { testOnDisk(t, l, "kill") })
	t.Run("Restart", func(t *testing.T) { testOnDisk(t, l, "restart") })
	t.Run("Swap", func(t *testing.T) { testSwap(t, l, false) })
}

// testOnDisk runs a scenario that needs a disk of its own and fio.
func testOnDisk(t *testing.T, l *lab, scenario string) {
	l.play(t, scenario, l.sparse(t, "volume", volumeSize), l.tools(t))
}

// A disk is the volume that Boot makes and the other scenarios use.
type disk struct {
	*lab
	begun   bool
	made    bool
	canary  string
	payload *vmtest.Tree
}

func (d *disk) path() string  { return filepath.Join(d.Dir, "volume.img") }
func (d *disk) state() string { return filepath.Join(d.Dir, "state.img") }

func (d *disk) disks() []vmtest.Disk {
	return []vmtest.Disk{{Serial: "volume", Path: d.path()}, {Serial: "state", Path: d.state()}}
}

// make runs the scenario Boot, once.
func (d *disk) make(t *testing.T) {
	t.Helper()
	if d.made {
		return
	}
	if d.begun {
		t.Fatal("there is no disk: the scenario Boot failed")
	}
	d.begun = true
	begun := time.Now()
	d.canary = newCanary()
	err := errors.Join(vmtest.Sparse(d.path(), volumeSize), vmtest.Sparse(d.state(), stateSize))
	if err != nil {
		t.Fatal(err)
	}
	if d.payload, err = vmtest.Payload(t.Context(), filepath.Join(d.Dir, "payload.tar"), payloadSize); err != nil {
		t.Fatal(err)
	}
	r := d.boot(t, "boot", map[string]string{"canary": d.canary}, append(d.disks(), d.payload.Disk())...)
	if n := int64(r.Figures["bytes"].Value); n < d.payload.Bytes {
		t.Fatalf("the guest wrote %d bytes of files, want %d", n, d.payload.Bytes)
	}
	d.made = true
	d.row("Boot", time.Since(begun), r)
}

// testStolenDisk boots the disk where there is no vault, then looks at the
// raw disk the way a thief would.
func testStolenDisk(t *testing.T, d *disk) {
	d.make(t)
	begun := time.Now()
	r := d.boot(t, "stolen", nil, d.disks()...)
	checkCiphertext(t, d.path(), d.canary, d.payload)
	d.row("StolenDisk", time.Since(begun), r)
}

// checkCiphertext checks that a raw image holds no plaintext and that every
// block of its data area that was written looks random, and that the same
// two checks find the plaintext when they are shown it.
func checkCiphertext(t *testing.T, image, canary string, payload *vmtest.Tree) {
	t.Helper()
	secrets := [][]byte{[]byte(canary), []byte(vmtest.Source), []byte("plaintext-label"), []byte("lost+found")}

	counts, blocks := inspect(t, payload.Path, 0, secrets...)
	if counts[1] < 100 {
		t.Errorf("control: %q is %d times in the plaintext, want at least 100", secrets[1], counts[1])
	}
	if blocks.Patterned < blocks.Written()*9/10 || blocks.LooksEncrypted() == nil {
		t.Errorf("control: only %d of %d blocks of the plaintext fail the test for randomness, want 90 %%", blocks.Patterned, blocks.Written())
	}

	// The whole image is searched; the test for randomness is for the data
	// area, as the header is text.
	_, counts = searchDisk(t, image, secrets...)
	for i, n := range counts {
		if n != 0 {
			t.Errorf("%q is %d times on the raw disk", secrets[i], n)
		}
	}
	_, blocks = inspect(t, image, dataOffset)
	t.Logf("raw disk: %d blocks of the data area written (%d in part), worst chi-square %.0f, all %.0f (random: 255, limits %d and %d)",
		blocks.Written(), blocks.Partial, blocks.Worst, blocks.Sum, evidence.ChiSquareLow, evidence.ChiSquareHigh)
	if err := blocks.LooksEncrypted(); err != nil {
		t.Errorf("raw disk: %v", err)
	}
	if want := payload.Bytes / evidence.BlockSize; int64(blocks.Written()) < want {
		t.Errorf("raw disk: %d blocks are written, want at least the %d of the files", blocks.Written(), want)
	}
}

// inspect counts needles in a file from an offset on, and measures its blocks.
func inspect(t *testing.T, name string, from int64, needles ...[]byte) ([]int, evidence.Blocks) {
	t.Helper()
	f, extents := openExtents(t, name, from)
	defer f.Close()
	counts, err := evidence.Search(f, extents, needles...)
	if err != nil {
		t.Fatal(err)
	}
	blocks, err := evidence.Measure(f, extents)
	if err != nil {
		t.Fatal(err)
	}
	return counts, blocks
}

// searchDisk counts needles on a raw disk, and the bytes that were looked at: all
// that were ever written.
func searchDisk(t *testing.T, name string, needles ...[]byte) (size int64, hits []int) {
	t.Helper()
	f, extents := openExtents(t, name, 0)
	defer f.Close()
	hits, err := evidence.Search(f, extents, needles...)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range extents {
		size += e.Len
	}
	return size, hits
}

func openExtents(t *testing.T, name string, from int64) (*os.File, []evidence.Extent) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	extents, err := evidence.Extents(f, from)
	if err != nil {
		t.Fatal(err)
	}
	return f, extents
}
