//go:build vm

package vm

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"hostcryptd/test/vm/report"
	"hostcryptd/test/vm/vmtest"
)

const (
	// cutVolumeSize is sparse. mkfs.xfs makes no file system below 300 MiB.
	cutVolumeSize = 384 << 20
	cutCycles     = 5 // power cuts, if $HOSTCRYPTD_VM_CYCLES doesn't say
)

// A powerCut is two volumes, one with ext4 and one with xfs, on disks that
// lose what was not flushed when the power is cut.
type powerCut struct {
	*lab
	seed    uint64
	rand    *rand.Rand // when to cut
	hostKey string
	acked   map[string]int // by file system: the last record acknowledged
}

// testPowerCut cuts the power at random moments while records are written
// and fsynced, and finds every acknowledged one after the next boot. The
// controls are a cut of a disk that ignores flushes, which must lose some, and
// one of a disk that has ignored a single one, which must lose one.
func testPowerCut(t *testing.T, l *lab) {
	begun := time.Now()
	cycles, seed := cutParameters(t)
	t.Logf("seed %d: HOSTCRYPTD_VM_SEED=%d has the same records and the same delays", seed, seed)
	p := &powerCut{
		lab: l, seed: seed, rand: rand.New(rand.NewPCG(seed, 0)),
		hostKey: filepath.Join(l.Dir, "powercut.key"),
		acked:   map[string]int{},
	}
	p.prepare(t)

	// The controls begin with a copy, so that all they can lose was
	// written after their disks began to ignore flushes.
	for _, name := range []string{"control", "oneflush"} {
		if err := vmtest.CopySparse(p.image(name), p.image("ext4")); err != nil {
			t.Fatal(err)
		}
	}
	for i := range cycles {
		fstype := []string{"ext4", "xfs"}[i%2]
		n := p.cycle(t, fmt.Sprintf("powercut-%d-%s", i+1, fstype), fstype, p.image(fstype), nil)
		t.Logf("power cut %d of %d: %s, record %d is the last acknowledged", i+1, cycles, fstype, n)
		p.acked[fstype] = n
		p.verifyHeader(t, p.image(fstype))
	}
	last, err := p.bootAs(t.Context(), "powercut-check", "powercut-check", p.params("ext4,xfs"), nil,
		vmtest.Disk{Serial: "ext4", Path: p.image("ext4")}, vmtest.Disk{Serial: "xfs", Path: p.image("xfs")})
	if err != nil {
		t.Fatal(err)
	}
	for _, fstype := range []string{"ext4", "xfs"} {
		checked, lost := last.Figures[fstype+" records checked"], last.Figures[fstype+" records lost"]
		if int(checked.Value) != p.acked[fstype] || lost.Name == "" || lost.Value != 0 {
			t.Errorf("%s: %v of %v records lost, want 0 of %d", fstype, lost.Value, checked.Value, p.acked[fstype])
		}
	}
	wall, total := time.Since(begun), maps.Clone(p.acked)
	acked, lost := p.control(t)
	flushes, last1, lost1 := p.oneFlush(t)
	p.add(fmt.Sprintf("PowerCut\t%.1f s\t%d cuts; ext4 %d records acknowledged, 0 lost; xfs %d, 0 lost; controls in %.1f s: without flushes %d, %d lost; one of %d flushes missing: %d, %d lost\n",
		wall.Seconds(), cycles, total["ext4"], total["xfs"], (time.Since(begun) - wall).Seconds(), acked, lost, flushes, last1, lost1))
}

// cutParameters are the number of power cuts and the seed for what is random.
func cutParameters(t *testing.T) (cycles int, seed uint64) {
	t.Helper()
	cycles = cutCycles
	if s := os.Getenv("HOSTCRYPTD_VM_CYCLES"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("HOSTCRYPTD_VM_CYCLES is %q, want a number of power cuts", s)
		}
		cycles = n
	}
	seed = rand.Uint64()
	if s := os.Getenv("HOSTCRYPTD_VM_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("HOSTCRYPTD_VM_SEED is %q, want a number", s)
		}
		seed = n
	}
	return cycles, seed
}

func (p *powerCut) image(name string) string {
	return filepath.Join(p.Dir, "powercut-"+name+".img")
}

// prepare makes the volumes and their file systems, and ends in order.
func (p *powerCut) prepare(t *testing.T) {
	t.Helper()
	for _, fstype := range []string{"ext4", "xfs"} {
		if err := vmtest.Sparse(p.image(fstype), cutVolumeSize); err != nil {
			t.Fatal(err)
		}
		p.format(t, p.image(fstype), p.hostKey, "--recovery-key", p.image(fstype)+".recovery")
	}
	_, err := p.bootAs(t.Context(), "powercut-prepare", "powercut-prepare", p.params(""), nil,
		vmtest.Disk{Serial: "ext4", Path: p.image("ext4")}, vmtest.Disk{Serial: "xfs", Path: p.image("xfs")})
	if err != nil {
		t.Fatal(err)
	}
}

// verifyHeader checks both copies of the header of an image that nobody uses.
func (p *powerCut) verifyHeader(t *testing.T, image string) {
	t.Helper()
	p.command(t, p.Hostcryptd, "header", "verify", image, "--host-key", p.hostKey, "--audit-log", "none", "--pins", p.hostKey+".pins")
}

// params are the parameters of the guest program.
func (p *powerCut) params(fs string) map[string]string {
	key, _ := os.ReadFile(p.hostKey) // without it no volume opens, which says so
	return map[string]string{
		"fs": fs, "seed": strconv.FormatUint(p.seed, 10), "hostkey": hex.EncodeToString(key),
		"acked.ext4": strconv.Itoa(p.acked["ext4"]), "acked.xfs": strconv.Itoa(p.acked["xfs"]),
	}
}

// bootAs is [lab.boot] with a name for the logs, and a function that is called
// when the guest acknowledges its first record. It returns the error of the boot.
func (l *lab) bootAs(ctx context.Context, name, scenario string, params map[string]string, writing func(*vmtest.VM), disks ...vmtest.Disk) (*vmtest.Result, error) {
	var v *vmtest.VM
	c := l.Config(scenario, params, disks...)
	c.Name = name
	c.OnEvent = func(e report.Event) {
		if e.Kind == report.Figure && e.Name == "acked" && writing != nil {
			writing(v)
			writing = nil
		}
	}
	v, err := vmtest.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	return v.Wait()
}

// cycle boots, has the guest check what the last cycle left and write
// records, and cuts the power at a random moment. It returns the last record
// acknowledged.
func (p *powerCut) cycle(t *testing.T, name, fstype, image string, onFlush func(n int) vmtest.FlushAction) int {
	t.Helper()
	delay := time.Duration(200+p.rand.IntN(3800)) * time.Millisecond
	r := p.cutBoot(t, name, "powercut-write", p.params(fstype), fstype, image, onFlush, func(cut func()) { time.AfterFunc(delay, cut) })
	acked := int(r.Figures["acked"].Value)
	if acked <= p.acked[fstype] {
		t.Fatalf("no record was acknowledged in %s (logs: %s)", delay, filepath.Join(p.Dir, name+".*"))
	}
	return acked
}

// cutBoot boots a guest with a volatile disk and waits for the power cut, which
// must come before the guest's end. writing is called when the guest
// acknowledges its first record, with the function that cuts.
func (l *lab) cutBoot(t *testing.T, name, scenario string, params map[string]string, serial, image string, onFlush func(n int) vmtest.FlushAction, writing func(cut func()), disks ...vmtest.Disk) *vmtest.Result {
	t.Helper()
	socket := filepath.Join(l.Dir, name+".sock")
	disk, err := vmtest.StartVolatileDisk(t.Context(), image, socket, onFlush)
	if err != nil {
		t.Fatal(err)
	}
	cut := make(chan error, 1)
	r, err := l.bootAs(t.Context(), name, scenario, params, func(v *vmtest.VM) {
		var once sync.Once
		writing(func() {
			once.Do(func() {
				err := disk.Cut()
				v.Kill()
				cut <- err
			})
		})
	}, append(disks, vmtest.Disk{Serial: serial, Socket: socket})...)
	select {
	case cutErr := <-cut:
		if cutErr != nil {
			t.Fatal(cutErr)
		}
	default:
		t.Fatal(errors.Join(err, errors.New("the guest ended before the power was cut"), disk.Cut()))
	}
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("the boot ended with %v, want the power cut", err)
	}
	return r
}

// control cuts the power of a disk that ignores flushes and expects that
// acknowledged records are lost: otherwise the disk isn't volatile, and the
// cycles before have proved nothing.
func (p *powerCut) control(t *testing.T) (acked, lost int) {
	t.Helper()
	p.acked = map[string]int{"ext4": 0, "xfs": 0}
	acked = p.cycle(t, "powercut-control", "ext4", p.image("control"), func(int) vmtest.FlushAction { return vmtest.FlushLie })
	lost = p.countLost(t, "powercut-control-check", "control", acked, p.params("ext4"))
	if lost == 0 {
		t.Errorf("control: a disk that ignores flushes lost none of %d acknowledged records", acked)
	}
	return acked, lost
}

// oneFlush cuts the power of a disk that has done every flush but the last one
// before an acknowledgement, and expects that this one record is lost: so much
// the other cycles would notice.
func (p *powerCut) oneFlush(t *testing.T) (flushes, acked, lost int) {
	t.Helper()
	const (
		name = "powercut-oneflush"
		skip = 40 // records before it
	)
	p.acked = map[string]int{"ext4": 0, "xfs": 0}
	params := p.params("ext4")
	params["slots"] = "only"
	var (
		mu      sync.Mutex
		before  int // records acknowledged when the flush was answered that wasn't done
		lied    bool
		pass    int // flushes to do before the next lie
		cut     func()
		counted = func() int {
			// The guest's events reach this process a moment later.
			time.Sleep(300 * time.Millisecond)
			return p.count(name)
		}
	)
	r := p.cutBoot(t, name, "powercut-write", params, "ext4", p.image("oneflush"), func(n int) vmtest.FlushAction {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case cut == nil:
			return vmtest.FlushDo
		case pass > 0:
			pass--
			return vmtest.FlushDo
		case !lied:
			if before = counted(); before < skip {
				pass = 8
				return vmtest.FlushDo
			}
			lied, flushes = true, n
			return vmtest.FlushLie
		case counted() > before:
			go cut()
			return vmtest.FlushHold
		}
		// Nothing was acknowledged by that flush, as another one belongs to
		// the record. Done now, it is late and no more. Try with that other one.
		lied, pass = false, 1
		return vmtest.FlushDo
	}, func(f func()) {
		mu.Lock()
		defer mu.Unlock()
		cut = f
	})
	acked = int(r.Figures["acked"].Value)
	if lost = p.countLost(t, name+"-check", "oneflush", acked, params); lost != 1 {
		t.Errorf("control: of %d flushes the last one was answered and not done; %d of %d acknowledged records are lost, want 1", flushes, lost, acked)
	}
	return flushes, acked, lost
}

// count returns how many records a guest that runs has acknowledged.
func (l *lab) count(name string) int {
	b, _ := os.ReadFile(filepath.Join(l.Dir, name+".events.jsonl"))
	n := 0
	for line := range bytes.Lines(b) {
		if e, err := report.Decode(line); err == nil && e.Name == "acked" {
			n = int(e.Value)
		}
	}
	return n
}

// countLost boots a check that must fail for records that are lost, and
// returns how many are.
func (p *powerCut) countLost(t *testing.T, name, image string, acked int, params map[string]string) int {
	t.Helper()
	params["acked.ext4"] = strconv.Itoa(acked)
	r, err := p.bootAs(t.Context(), name, "powercut-check", params, nil, vmtest.Disk{Serial: "ext4", Path: p.image(image)})
	if err == nil {
		return 0
	}
	if r == nil || !strings.Contains(err.Error(), "acknowledged records are lost") {
		t.Errorf("control: the boot failed, but not for lost records: %v", err)
		return 0
	}
	why, _, _ := strings.Cut(err.Error(), "\n")
	t.Logf("control: %s", why)
	return int(r.Figures["ext4 records lost"].Value)
}
