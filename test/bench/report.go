package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// What the encrypted server has to reach, as medians of ratios within a round.
const (
	randomVsBestEncrypted     = 5.0
	randomVsBestPlain         = 2.5
	depthOneVsBestPlain       = 0.95
	sequentialVsBestEncrypted = 8.0
	sequentialVsBestPlain     = 1.1
	randomVsPassthrough       = 0.9
	sequentialVsPassthrough   = 0.8
	diskVsRawFile             = 0.95
	residentBusyMiB           = 64.0 // 4 connections at full load
	residentIdleMiB           = 32.0
)

// A series is every slice of one load on one server, in the order of rounds.
type series struct {
	Medium  string   `json:"medium"` // tmpfs or disk
	Client  string   `json:"client"` // own or fio
	Load    load     `json:"load"`
	Server  string   `json:"server"`
	Samples []sample `json:"samples"`
}

// A check is one line of what must be reached.
type check struct {
	What   string  `json:"what"`
	Value  float64 `json:"value"`
	Target float64 `json:"target"`
	AtMost bool    `json:"at_most"`
	Met    bool    `json:"met"`
}

// A result is what a run found.
type result struct {
	Started  string             `json:"started"`
	Machine  string             `json:"machine"`
	CPU      string             `json:"cpu"`
	Kernel   string             `json:"kernel"`
	Load     string             `json:"load_before"` // processes that ran in the minute before, on average
	Versions map[string]string  `json:"versions"`
	Slice    float64            `json:"slice_seconds"`
	Rounds   int                `json:"rounds"`
	Series   []series           `json:"series"`
	PeakMiB  map[string]float64 `json:"peak_resident_mib"`
	IdleMiB  map[string]float64 `json:"idle_resident_mib"`
	Checks   []check            `json:"checks"`
}

func (r *result) find(medium, client, load, server string) *series {
	i := slices.IndexFunc(r.Series, func(s series) bool {
		return s.Medium == medium && s.Client == client && s.Load.Name == load && s.Server == server
	})
	if i < 0 {
		return nil
	}
	return &r.Series[i]
}

func (r *result) add(medium, client string, l load, server string, s sample) {
	f := r.find(medium, client, l.Name, server)
	if f == nil {
		r.Series = append(r.Series, series{Medium: medium, Client: client, Load: l, Server: server})
		f = &r.Series[len(r.Series)-1]
	}
	f.Samples = append(f.Samples, s)
}

func (s *series) iops() (out []float64) {
	if s != nil {
		for _, x := range s.Samples {
			out = append(out, x.IOPS)
		}
	}
	return out
}

// medianOf is the median of one figure over the rounds.
func (s *series) medianOf(figure func(sample) float64) float64 {
	var v []float64
	for _, x := range s.Samples {
		v = append(v, figure(x))
	}
	return median(v)
}

// others returns the figures of the peers of hostcryptd that encrypt, or of
// those that don't. The passthrough and null are no peers.
func (r *result) others(medium, client, load string, encrypted bool) (out [][]float64) {
	for _, p := range peers {
		if p.name != hostcryptd && p.name != passthrough && p.name != null && p.encrypted == encrypted {
			if s := r.find(medium, client, load, p.name); s != nil {
				out = append(out, s.iops())
			}
		}
	}
	return out
}

// judge fills in the checks that the measurements allow.
func (r *result) judge() {
	r.Checks = nil
	least := func(what string, values []float64, target float64) {
		if v := median(values); !math.IsNaN(v) {
			r.Checks = append(r.Checks, check{what, v, target, false, v >= target})
		}
	}
	most := func(what string, v, target float64) {
		if v > 0 {
			r.Checks = append(r.Checks, check{what, v, target, true, v <= target})
		}
	}
	for _, l := range loads {
		me := r.find("tmpfs", "own", l.Name, hostcryptd).iops()
		encrypted, plain := r.others("tmpfs", "own", l.Name, true), r.others("tmpfs", "own", l.Name, false)
		through := r.find("tmpfs", "own", l.Name, passthrough).iops()
		switch {
		case l.Depth == 1:
			least(l.Name+" / best plain", ratios(me, plain...), depthOneVsBestPlain)
		case l.Random:
			least(l.Name+" / best encrypted", ratios(me, encrypted...), randomVsBestEncrypted)
			least(l.Name+" / best plain", ratios(me, plain...), randomVsBestPlain)
			least(l.Name+" / own passthrough", ratios(me, through), randomVsPassthrough)
		default:
			least(l.Name+" / best encrypted", ratios(me, encrypted...), sequentialVsBestEncrypted)
			least(l.Name+" / best plain", ratios(me, plain...), sequentialVsBestPlain)
			least(l.Name+" / own passthrough", ratios(me, through), sequentialVsPassthrough)
		}
	}
	for _, l := range diskLoads {
		raw := r.find("disk", "fio", l.Name, rawFile).iops()
		least("disk "+l.Name+" / raw file", ratios(r.find("disk", "own", l.Name, hostcryptd).iops(), raw), diskVsRawFile)
		least("disk "+l.Name+" by fio / raw file", ratios(r.find("disk", "fio", l.Name, hostcryptd).iops(), raw), diskVsRawFile)
	}
	most("resident MiB, 4 connections busy", r.PeakMiB[hostcryptd], residentBusyMiB)
	most("resident MiB, idle", r.IdleMiB[hostcryptd], residentIdleMiB)
}

// text is the table for people.
func (r *result) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s, Linux %s, %s, load before %s\n", r.Machine, r.CPU, r.Kernel, r.Started, r.Load)
	for _, p := range peers {
		if v := r.Versions[p.name]; v != "" {
			fmt.Fprintf(&b, "%s: %s\n", p.name, v)
		}
	}
	fmt.Fprintf(&b, "Medians of %d rounds of %.2f s. Ratios are medians of hostcryptd / peer within a round.\n", r.Rounds, r.Slice)
	for _, group := range []struct{ medium, client, title string }{
		{"tmpfs", "own", "tmpfs, own load generator"},
		{"tmpfs", "fio", "tmpfs, fio's nbd engine"},
		{"disk", "own", "disk with O_DIRECT, own load generator"},
		{"disk", "fio", "disk with O_DIRECT, fio: nbd engine, io_uring for raw-file"},
	} {
		title := false
		for _, s := range r.Series {
			if s.Medium != group.medium || s.Client != group.client {
				continue
			}
			if !title {
				title = true
				fmt.Fprintf(&b, "\n%s\n%-22s %-12s %10s %9s %9s %9s %9s %7s\n", group.title, "load", "server", "requests/s", "MB/s", "p50 us", "p99 us", "cpu us", "ratio")
			}
			cpu, ratio := "", ""
			if v := s.medianOf(func(x sample) float64 { return x.ServerCPUu }); v > 0 {
				cpu = fmt.Sprintf("%.2f", v)
			}
			if me := r.find(s.Medium, s.Client, s.Load.Name, hostcryptd); me != nil && s.Server != hostcryptd {
				ratio = fmt.Sprintf("%.2f", median(ratios(me.iops(), s.iops())))
			}
			line := fmt.Sprintf("%-22s %-12s %10.0f %9.1f %9.1f %9.1f %9s %7s", s.Load.Name, s.Server,
				s.medianOf(func(x sample) float64 { return x.IOPS }), s.medianOf(func(x sample) float64 { return x.MBps }),
				s.medianOf(func(x sample) float64 { return x.P50us }), s.medianOf(func(x sample) float64 { return x.P99us }), cpu, ratio)
			fmt.Fprintln(&b, strings.TrimRight(line, " "))
		}
	}
	fmt.Fprintf(&b, "\nresident memory on tmpfs, MiB\n%-22s %10s %10s\n", "server", "idle", "peak")
	for _, p := range peers {
		if r.PeakMiB[p.name] > 0 {
			fmt.Fprintf(&b, "%-22s %10.1f %10.1f\n", p.name, r.IdleMiB[p.name], r.PeakMiB[p.name])
		}
	}
	fmt.Fprintf(&b, "\n%-44s %8s %10s\n", "must reach", "found", "target")
	for _, c := range r.Checks {
		word, sign := "met", ">="
		if !c.Met {
			word = "MISSED"
		}
		if c.AtMost {
			sign = "<="
		}
		fmt.Fprintf(&b, "%-44s %8.2f %3s %6.2f  %s\n", c.What, c.Value, sign, c.Target, word)
	}
	return b.String()
}
