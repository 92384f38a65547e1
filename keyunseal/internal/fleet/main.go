// Command fleet simulates many hosts that unseal from one vault, with the
// product's own timing code and a virtual clock: a data center that boots at
// once, one that boots while the vault is down for half an hour, and the day on
// which the key gets a new version. It writes a table and a plot.
//
// The vault is modelled by its documented limit: so many requests in each window
// of 10 seconds, and 429 without Retry-After for all others. Whether refused
// requests and challenges count against the limit is not documented; -count
// counts the challenge.
//
// It ends with 1 if the last host is unlocked later than twice the time that the
// vault needs at least.
package main

import (
	"container/heap"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"time"

	"hostcryptd/keyunseal/lifecycle"
)

// A limit is what a vault serves in 10 s (service limits of Azure Key Vault).
type limit struct {
	name      string
	perWindow int
	bits      int
}

var limits = []limit{
	{"RSA-2048, software", 4000, 2048},
	{"RSA-2048, HSM", 2000, 2048},
	{"RSA-3072, HSM", 500, 3072},
	{"RSA-4096, HSM", 250, 4096},
}

const (
	window  = 10 * time.Second
	latency = 50 * time.Millisecond
)

var epoch = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

// A vault counts requests in windows. Between downFrom and downTo nobody gets
// an answer.
type vault struct {
	perWindow        int
	downFrom, downTo time.Time

	begun             time.Time
	count             int
	requests, refused int
	turnedAway        int // operations, of one request or several
	peak              int // of requests in a window
}

// ask is one unseal or one other operation, of n counted requests.
func (v *vault) ask(now time.Time, n int) lifecycle.Outcome {
	if !now.Before(v.downFrom) && now.Before(v.downTo) {
		return lifecycle.Outcome{Text: "no answer"}
	}
	if w := now.Truncate(window); !w.Equal(v.begun) {
		v.begun, v.count = w, 0
	}
	v.requests += n
	v.count += n
	v.peak = max(v.peak, v.count)
	if v.count > v.perWindow {
		v.count -= n
		v.refused += n
		v.turnedAway++
		return lifecycle.Outcome{Answered: true, Text: "429"}
	}
	return lifecycle.Outcome{Kind: lifecycle.Success}
}

// A host is one machine, and when it wants to do something next.
type host struct {
	m        *lifecycle.Machine
	at       time.Time
	action   lifecycle.Action
	attempts int
	rewrap   time.Time // when it had the new version
}

func (h *host) plan() { h.action, h.at = h.m.Next() }

type queue []*host

func (q queue) Len() int           { return len(q) }
func (q queue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q queue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)        { *q = append(*q, x.(*host)) }
func (q *queue) Pop() any {
	old := *q
	h := old[len(old)-1]
	*q = old[:len(old)-1]
	return h
}

// A run is what one simulation gave.
type run struct {
	limit    limit
	hosts    int
	from     time.Time       // that times are counted from
	minimum  time.Duration   // physically
	unlocked []time.Duration // of each host, sorted
	attempts []int           // sorted
	vault    *vault
	rewrap   []time.Duration // sorted
}

func (r *run) last() time.Duration { return r.unlocked[len(r.unlocked)-1] }
func (r *run) factor() float64     { return r.last().Seconds() / r.minimum.Seconds() }

func newFleet(n, bits int, seed uint64) (queue, error) {
	random := rand.New(rand.NewPCG(seed, 7))
	q := make(queue, 0, n)
	for range n {
		c := lifecycle.Config{
			Heartbeat: lifecycle.HeartbeatFor(bits), Rotation: lifecycle.DefaultRotation, Grace: lifecycle.DefaultGrace,
			Splay: lifecycle.DefaultSplay, Phase: random.Float64(), Random: random.Float64,
		}
		if err := c.Check(); err != nil {
			return nil, err
		}
		h := &host{m: lifecycle.New(c, epoch)}
		h.plan()
		q = append(q, h)
	}
	heap.Init(&q)
	return q, nil
}

// boot lets n hosts boot at once, with the vault down for the first while.
func boot(l limit, n, perUnseal int, down time.Duration, seed uint64) (*run, error) {
	q, err := newFleet(n, l.bits, seed)
	if err != nil {
		return nil, err
	}
	v := &vault{perWindow: l.perWindow, downFrom: epoch, downTo: epoch.Add(down)}
	r := &run{limit: l, hosts: n, from: v.downTo, vault: v}
	r.minimum = time.Duration(float64(n*perUnseal) / float64(l.perWindow) * float64(window))
	for len(r.unlocked) < n {
		h := q[0]
		now := h.at
		if h.action != lifecycle.Unseal {
			return nil, fmt.Errorf("a host that isn't unlocked wants to %v", h.action)
		}
		o := v.ask(now, perUnseal)
		h.attempts++
		h.m.Unsealed(now.Add(latency), o)
		if o.Kind == lifecycle.Success {
			r.unlocked = append(r.unlocked, now.Add(latency).Sub(v.downTo))
			r.attempts = append(r.attempts, h.attempts)
			heap.Pop(&q)
			continue
		}
		h.plan()
		heap.Fix(&q, 0)
	}
	slices.Sort(r.unlocked)
	slices.Sort(r.attempts)
	return r, nil
}

// rotate lets n hosts run, and gives the key a new version after two hours.
// Beside the rewraps there are the heartbeats.
func rotate(l limit, n int, seed uint64) (*run, error) {
	const (
		published = 2 * time.Hour
		look      = 2 // GET, and the challenge
		rewrap    = 9 // GET; unwrap; GET, wrap twice, unwrap and probe; two challenges
	)
	q, err := newFleet(n, l.bits, seed)
	if err != nil {
		return nil, err
	}
	for _, h := range q {
		h.m.Unsealed(epoch, lifecycle.Outcome{Kind: lifecycle.Success})
		h.plan()
	}
	heap.Init(&q)
	v := &vault{perWindow: l.perWindow}
	r := &run{limit: l, hosts: n, from: epoch.Add(published), vault: v}
	// What heartbeats and looks leave of the limit has to do for the rewraps; and a
	// host looks once in an interval.
	per := func(requests int, every time.Duration) float64 { return float64(n*requests) / every.Seconds() }
	left := float64(l.perWindow)/window.Seconds() - per(1, lifecycle.HeartbeatFor(l.bits)) - per(look, lifecycle.DefaultRotation)
	r.minimum = max(lifecycle.DefaultRotation, time.Duration(float64(n*rewrap)/left*float64(time.Second)))
	for len(r.rewrap) < n {
		h := q[0]
		now := h.at
		if now.Sub(epoch) > 24*time.Hour {
			return nil, fmt.Errorf("after a day %d of %d hosts have the new version", len(r.rewrap), n)
		}
		switch h.action {
		case lifecycle.Probe:
			h.m.Probed(now.Add(latency), v.ask(now, 1))
		case lifecycle.Rotate:
			o := v.ask(now, look)
			if o.Kind == lifecycle.Success && !now.Before(r.from) && h.rewrap.IsZero() {
				if o = v.ask(now, rewrap); o.Kind == lifecycle.Success {
					h.rewrap = now
					r.rewrap = append(r.rewrap, now.Sub(r.from))
				}
			}
			h.m.Rotated(now.Add(latency), o)
		default:
			return nil, fmt.Errorf("a host that serves wants to %v", h.action)
		}
		h.plan()
		heap.Fix(&q, 0)
	}
	slices.Sort(r.rewrap)
	return r, nil
}

func percentile[T any](sorted []T, p float64) T { return sorted[int(p*float64(len(sorted)-1))] }

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f", d.Seconds()) }

func main() {
	n := flag.Int("hosts", 10_000, "`number` of hosts")
	seed := flag.Uint64("seed", 1, "of all that is random")
	count := flag.Bool("count", false, "count the challenge against the limit too")
	out := flag.String("out", "", "`folder` for fleet.md and fleet.svg")
	flag.Parse()
	per := 1
	if *count {
		per = 2
	}
	if err := simulate(*n, per, *seed, *out); err != nil {
		fmt.Fprintln(os.Stderr, "fleet:", err)
		os.Exit(1)
	}
}

func simulate(n, per int, seed uint64, out string) error {
	var text strings.Builder
	var plots []*run
	var late []error
	boots := func(title string, down time.Duration) error {
		fmt.Fprintf(&text, "\n%s\n\n", title)
		fmt.Fprintf(&text, "| key | physical minimum s | last unlocked s | factor | median s | 99 %% s | requests | refused | tries, median | tries, most |\n|---|---|---|---|---|---|---|---|---|---|\n")
		for _, l := range limits {
			r, err := boot(l, n, per, down, seed)
			if err != nil {
				return err
			}
			fmt.Fprintf(&text, "| %s: %d in 10 s | %s | %s | %.2f | %s | %s | %d | %d | %d | %d |\n", l.name, l.perWindow,
				seconds(r.minimum), seconds(r.last()), r.factor(), seconds(percentile(r.unlocked, 0.5)), seconds(percentile(r.unlocked, 0.99)),
				r.vault.requests, r.vault.refused, percentile(r.attempts, 0.5), r.attempts[len(r.attempts)-1])
			if down == 0 {
				plots = append(plots, r)
			}
			if r.factor() > 2 {
				late = append(late, fmt.Errorf("%s, vault down for %v: the last of %d hosts after %.2f of the least time", l.name, down, n, r.factor()))
			}
		}
		return nil
	}
	if err := boots(fmt.Sprintf("%d hosts boot at once; times since then:", n), 0); err != nil {
		return err
	}
	if err := boots(fmt.Sprintf("%d hosts boot at once, and the vault is down for 30 minutes; times since it is back:", n), 30*time.Minute); err != nil {
		return err
	}
	fmt.Fprintf(&text, "\n%d hosts that run, and a new version of the key; heartbeats every 10 to 30 minutes go on:\n\n", n)
	fmt.Fprintf(&text, "| key | least possible min | last rewrapped min | factor | half rewrapped min | most requests in 10 s | operations refused |\n|---|---|---|---|---|---|---|\n")
	for _, l := range limits {
		r, err := rotate(l, n, seed)
		if err != nil {
			return err
		}
		last := r.rewrap[len(r.rewrap)-1]
		fmt.Fprintf(&text, "| %s: %d in 10 s | %.0f | %.0f | %.2f | %.0f | %d | %d |\n", l.name, l.perWindow,
			r.minimum.Minutes(), last.Minutes(), last.Seconds()/r.minimum.Seconds(), percentile(r.rewrap, 0.5).Minutes(), r.vault.peak, r.vault.turnedAway)
	}
	fmt.Print(strings.TrimPrefix(text.String(), "\n"))
	if out == "" {
		return errors.Join(late...)
	}
	doc := "# Many hosts and one vault\n\nWritten by `go run ./keyunseal/internal/fleet -out keyunseal/lifecycle`: the timing code of this package, a\nvirtual clock, and a vault that serves so many requests in each window of 10 seconds and answers 429 to all others.\n" +
		text.String() + "\nA rewrap takes nine requests here. A look that finds a new version and is refused is repeated after a quarter of an hour.\n" +
		"\nUnlocked hosts over time, after they have booted at once; the dashes are what the limit permits:\n\n![unlocked hosts over time](fleet.svg)\n"
	if err := os.WriteFile(out+"/fleet.md", []byte(doc), 0o644); err != nil {
		return err
	}
	f, err := os.Create(out + "/fleet.svg")
	if err != nil {
		return err
	}
	if err := plot(f, plots); err != nil {
		return err
	}
	return errors.Join(append(late, f.Close())...)
}

// niceStep returns a step for some five marks up to an end.
func niceStep(end float64) float64 {
	step := math.Pow(10, math.Floor(math.Log10(end/4)))
	for _, n := range []float64{1, 2, 5} {
		if end/(n*step) <= 6 {
			return n * step
		}
	}
	return 10 * step
}

// plot draws how many hosts are unlocked over time, a panel for each limit,
// with the physical minimum as a line of dashes.
func plot(w io.Writer, runs []*run) error {
	const (
		width, height = 420, 230
		left, bottom  = 72, 36
		top, right    = 30, 28
	)
	var b strings.Builder
	cols := 2
	rows := (len(runs) + 1) / cols
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n", cols*width, rows*height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, r := range runs {
		x0, y0 := (i%cols)*width, (i/cols)*height
		pw, ph := float64(width-left-right), float64(height-top-bottom)
		step := niceStep(max(r.last(), r.minimum).Seconds())
		end := math.Ceil(max(r.last(), r.minimum).Seconds()/step) * step
		px := func(t float64) float64 { return float64(x0+left) + t/end*pw }
		py := func(n float64) float64 { return float64(y0+top) + ph - n/float64(r.hosts)*ph }
		fmt.Fprintf(&b, `<text x="%d" y="%d" font-weight="bold">%s, %d in 10 s</text>`+"\n", x0+left, y0+18, r.limit.name, r.limit.perWindow)
		for t := 0.0; t <= end; t += step {
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%.1f" stroke="#e4e4e4"/>`+"\n", px(t), px(t), y0+top, float64(y0+top)+ph)
			fmt.Fprintf(&b, `<text x="%.0f" y="%d" text-anchor="middle" fill="#444">%.0f s</text>`+"\n", px(t), y0+height-bottom+16, t)
		}
		for k := range 5 {
			n := float64(r.hosts) * float64(k) / 4
			fmt.Fprintf(&b, `<line x1="%d" x2="%.1f" y1="%.1f" y2="%.1f" stroke="#e4e4e4"/>`+"\n", x0+left, float64(x0+left)+pw, py(n), py(n))
			fmt.Fprintf(&b, `<text x="%d" y="%.0f" text-anchor="end" fill="#444">%.0f</text>`+"\n", x0+left-6, py(n)+4, n)
		}
		fmt.Fprintf(&b, `<text transform="translate(%d,%d) rotate(-90)" text-anchor="middle" fill="#444">unlocked hosts</text>`+"\n", x0+14, y0+top+int(ph)/2)
		fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.0f" height="%.0f" fill="none" stroke="#999"/>`+"\n", x0+left, y0+top, pw, ph)
		// What could be: a window's worth at the beginning of each.
		var ideal strings.Builder
		for n, t := 0, 0.0; n < r.hosts; t += window.Seconds() {
			fmt.Fprintf(&ideal, "%.1f,%.1f ", px(min(t, end)), py(float64(n)))
			n = min(n+r.limit.perWindow, r.hosts)
			fmt.Fprintf(&ideal, "%.1f,%.1f ", px(min(t, end)), py(float64(n)))
		}
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="#888" stroke-dasharray="5 3"/>`+"\n", strings.TrimSpace(ideal.String()))
		var line strings.Builder
		for n := 0; n < r.hosts; n += max(1, r.hosts/400) {
			fmt.Fprintf(&line, "%.1f,%.1f ", px(r.unlocked[n].Seconds()), py(float64(n+1)))
		}
		fmt.Fprintf(&line, "%.1f,%.1f", px(r.last().Seconds()), py(float64(r.hosts)))
		fmt.Fprintf(&b, `<polyline points="%s" fill="none" stroke="#0b62a4" stroke-width="2"/>`+"\n", line.String())
		fmt.Fprintf(&b, `<text x="%.0f" y="%d" text-anchor="end" fill="#0b62a4">last after %.0f s, minimum %.0f s</text>`+"\n", float64(x0+left)+pw-6, y0+height-bottom-8, r.last().Seconds(), r.minimum.Seconds())
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}
