// Command bench prints how fast package xts is on this machine, beside the ceiling
// of its AES instructions, golang.org/x/crypto/xts and OpenSSL.
//
// # Method
//
// A processor that is shared or changes its clock makes absolute numbers wander, so
// only slices of time next to each other are compared. A pair is one slice of the
// ceiling loop, one of the implementation and one more of the ceiling; its ratio is
// the speed of the middle one by the mean of the outer two. The table has the median
// of 31 pairs; beside it, as "best", is the ratio of the fastest slices. A slice is
// at least 1 ms, as shorter ones flatter. The ratio to x/crypto/xts is measured the
// same way, in a third as many pairs.
//
// Source and destination are different, as when an I/O request is on its way. Up to
// 128 KiB they rotate through 4 pairs of buffers, so that nothing is loaded that has
// just been stored.
//
// About hyperthreads: AES rounds alone issue one or two instructions per cycle, and
// hardly notice another thread on the same core, but XTS issues more, most with narrow
// vectors. So the fraction falls when the core is shared, which a guest of a virtual
// machine can neither see nor help. The column "core" tells how many instructions per
// cycle a loop got that takes all there are, as a fraction of 5, between the pairs: 0.99
// on AMD (Zen 4) and 0.9 on a recent Intel processor mean that the core was ours, and
// 0.55 that it was not.
//
// What an instruction costs beside AES rounds, which is what the code was made by, is
// measured by "go -C xts/_asm run . -costs". The roof for any way to make masks, which is
// rounds, input, output and tweaks without them, is measured by
//
//	go -C xts/_asm run . -bare && go run ./xts/internal/bench; go generate ./xts
//
// On Zen 4, with 128 KiB of 4 KiB sectors, it is 0.97 to 0.98 with zmm, 0.95 to 0.96 with
// ymm and 0.96 to 0.98 with xmm; with sectors of 512 bytes 0.94, 0.92 to 0.94, and 0.94.
//
// OpenSSL is measured by its own command "openssl speed", at another time, and with
// one data unit per call and always the same tweak, which favours it.
package main

import (
	"crypto/aes"
	"flag"
	"fmt"
	"log"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	xcrypto "golang.org/x/crypto/xts"
	"golang.org/x/sys/unix"

	"hostcryptd/xts"
	"hostcryptd/xts/internal/ceiling"
)

// sizes are those of I/O requests, and what they show: 512-byte sectors that of
// batching tweaks, 4 KiB requests that of starting.
var sizes = []struct{ buffer, sector int }{
	{512, 512},
	{4096, 512},
	{4096, 4096},
	{16384, 512},
	{16384, 4096},
	{131072, 512},
	{131072, 4096},
	{131072, 131072},
	{1048576, 4096},
}

type crypt func(dst, src []byte, first uint64, sectorSize int)

func main() {
	log.SetFlags(0)
	log.SetPrefix("bench: ")
	var (
		only     = flag.String("impl", "", "measure only the implementations whose `name` starts so")
		onlySize = flag.String("size", "", "measure only this `buffer/sector` size")
		pairs    = flag.Int("pairs", 31, "`number` of pairs of slices")
		slice    = flag.Duration("slice", time.Millisecond, "least `duration` of a slice")
		offset   = flag.Int("offset", 0, "`bytes` that output is off from the start of a page")
		openssl  = flag.Bool("openssl", true, "run openssl speed if it is installed")
	)
	flag.Parse()
	runtime.LockOSThread()
	fmt.Printf("%s, %s/%s, %s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH, processor())
	fmt.Printf("default implementation: %s; median of %d pairs of slices of %v\n\n", xts.Implementation(), *pairs, *slice)

	ossl := map[string]float64{}
	if *openssl {
		ossl = runOpenSSL()
	}

	var key [64]byte
	for i := range key {
		key[i] = byte(i)
	}
	peer, err := xcrypto.NewCipher(aes.NewCipher, key[:])
	if err != nil {
		log.Fatal(err)
	}

	const row = "%8v %7v  %-8v %-8v %6v %11v %6v %5v %9v %8v\n"
	fmt.Printf(row, "buffer", "sector", "", "", "GB/s", "of ceiling", "best", "core", "x/crypto", "openssl")
	measured := false
	for _, size := range sizes {
		if *onlySize != "" && *onlySize != fmt.Sprintf("%d/%d", size.buffer, size.sector) {
			continue
		}
		for _, direction := range []string{"encrypt", "decrypt"} {
			for _, name := range xts.Implementations() {
				if !strings.HasPrefix(name, *only) {
					continue
				}
				measured = true
				c, err := xts.NewCipherWith(name, &key)
				if err != nil {
					log.Fatal(err)
				}
				ours, theirs := crypt(c.EncryptSectors), perSector(peer.Encrypt)
				if direction == "decrypt" {
					ours, theirs = c.DecryptSectors, perSector(peer.Decrypt)
				}
				b := newBuffers(size.buffer, *offset)
				run := func(n int) int { return b.run(ours, size.sector, n) }
				runPeer := func(n int) int { return b.run(theirs, size.sector, n) }
				top := func(n int) int { return ceiling.Run(name, n) }

				speed, fraction, best, core := 0.0, "-", "-", "-"
				if top(1) > 0 {
					var f, q, c float64
					speed, f, q, c = compare(run, top, *pairs, *slice)
					fraction, best, core = fmt.Sprintf("%.3f", f), fmt.Sprintf("%.3f", q), fmt.Sprintf("%.2f", c)
				}
				s, ratio, _, _ := compare(run, runPeer, max(1, *pairs/3), *slice)
				if speed == 0 {
					speed = s
				}
				short, _, _ := strings.Cut(name, " ")
				vs := "-"
				if o := ossl[direction+strconv.Itoa(size.sector)]; o != 0 {
					vs = fmt.Sprintf("%.2f×", speed/o)
				}
				fmt.Printf(row, size.buffer, size.sector, direction, short, fmt.Sprintf("%.2f", speed), fraction, best, core, fmt.Sprintf("%.1f×", ratio), vs)
			}
		}
	}
	if !measured {
		log.Fatalf("-impl %q -size %q: no such implementation among %q, or no such size, like 4096/512, among %v",
			*only, *onlySize, xts.Implementations(), sizes)
	}
}

// compare returns the speed of run in GB/s and its ratio to that of base, both medians,
// the ratio of the fastest slices, and the median of coreShare. The functions do about
// n bytes of work and return how many they did.
func compare(run, base func(n int) int, pairs int, slice time.Duration) (speed, ratio, best, core float64) {
	nRun, nBase := calibrate(run, slice), calibrate(base, slice)
	var speeds, ratios, bases, shares []float64
	for range pairs {
		before := measure(base, nBase)
		s := measure(run, nRun)
		after := measure(base, nBase)
		speeds = append(speeds, s)
		ratios = append(ratios, s*2/(before+after))
		bases = append(bases, before, after)
		shares = append(shares, coreShare())
	}
	return median(speeds), median(ratios), slices.Max(speeds) / slices.Max(bases), median(shares)
}

// coreShare returns instructions per cycle as a fraction of 5, of a loop of independent
// additions. A cycle is a third of a multiplication, which takes no notice of others.
func coreShare() float64 {
	const n = 30000
	start := now()
	runtime.KeepAlive(additions(n, 3))
	middle := now()
	runtime.KeepAlive(multiplications(n/3, 3))
	end := now()
	return float64(end-middle) / float64(middle-start)
}

//go:noinline
func additions(n int, x uint64) uint64 {
	var a, b, c, d uint64
	for range n {
		a += x
		b ^= x
		c -= x
		d += x
	}
	return a ^ b ^ c ^ d
}

//go:noinline
func multiplications(n int, x uint64) uint64 {
	y := x
	for range n {
		y *= x
	}
	return y
}

// calibrate returns how many bytes take at least the time of a slice.
func calibrate(run func(n int) int, slice time.Duration) int {
	for n := 4096; ; n *= 2 {
		start := now()
		run(n)
		if d := now() - start; d > slice/4 {
			// The clock may be faster next time.
			return int(float64(n)*float64(slice)/float64(d)*1.2) + 1
		}
	}
}

// measure returns GB/s.
func measure(run func(n int) int, n int) float64 {
	start := now()
	done := run(n)
	return float64(done) / float64((now() - start).Nanoseconds())
}

// now returns the time that this thread has spent on a processor: what other programs
// take from it in between doesn't count.
func now() time.Duration {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t); err != nil {
		log.Fatal(err)
	}
	return time.Duration(t.Nano())
}

func median(s []float64) float64 {
	slices.Sort(s)
	return s[len(s)/2]
}

type buffers struct {
	src, dst [][]byte
}

func newBuffers(n, offset int) *buffers {
	var b buffers
	for range max(1, min(4, 1<<19/n)) {
		b.src = append(b.src, aligned(n, 0))
		b.dst = append(b.dst, aligned(n, offset))
	}
	return &b
}

// aligned returns n bytes that start offset bytes after the start of a page.
func aligned(n, offset int) []byte {
	const page = 4096
	b := make([]byte, n+offset+page)
	for i := range b {
		b[i] = byte(i)
	}
	start := int(-uintptr(unsafe.Pointer(unsafe.SliceData(b))) % page)
	return b[start+offset:][:n]
}

// run crypts at least one buffer and about n bytes.
func (b *buffers) run(f crypt, sectorSize, n int) int {
	size := len(b.src[0])
	times := max(1, n/size)
	for i := range times {
		f(b.dst[i%len(b.dst)], b.src[i%len(b.src)], uint64(i), sectorSize)
	}
	return times * size
}

// perSector gives a function of x/crypto/xts the form of EncryptSectors.
func perSector(f func(dst, src []byte, sector uint64)) crypt {
	return func(dst, src []byte, first uint64, sectorSize int) {
		for i := 0; i < len(src); i += sectorSize {
			f(dst[i:i+sectorSize], src[i:i+sectorSize], first)
			first += uint64(sectorSize / 512)
		}
	}
}

// runOpenSSL returns the speed of "openssl speed" in GB/s by direction and data unit,
// empty if the command isn't installed.
func runOpenSSL() map[string]float64 {
	speeds := map[string]float64{}
	if _, err := exec.LookPath("openssl"); err != nil {
		fmt.Print("openssl is not installed (Debian package openssl): no comparison with it\n\n")
		return speeds
	}
	version, err := exec.Command("openssl", "version").Output()
	if err != nil {
		log.Fatal("openssl version: ", err)
	}
	fmt.Printf("openssl: %s\n", strings.TrimSpace(string(version)))
	units := map[int]bool{}
	for _, s := range sizes {
		units[s.sector] = true
	}
	for unit := range units {
		for _, direction := range []string{"encrypt", "decrypt"} {
			args := []string{"speed", "-mr", "-elapsed", "-seconds", "1", "-bytes", strconv.Itoa(unit), "-evp", "aes-256-xts"}
			if direction == "decrypt" {
				args = append(args, "-decrypt")
			}
			out, err := exec.Command("openssl", args...).Output()
			if err != nil {
				log.Fatalf("openssl %s: %v", strings.Join(args, " "), err)
			}
			// The last line is +F:number:name:bytes per second.
			fields := strings.Split(strings.TrimSpace(string(out)), ":")
			v, err := strconv.ParseFloat(fields[len(fields)-1], 64)
			if err != nil {
				log.Fatalf("openssl speed: no speed in %q", out)
			}
			speeds[direction+strconv.Itoa(unit)] = v / 1e9
		}
	}
	fmt.Println()
	return speeds
}

// processor returns the name of the processor, as far as the kernel tells.
func processor() string {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return err.Error()
	}
	for line := range strings.Lines(string(info)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "processor without a name"
}
