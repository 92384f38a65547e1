package main

import (
	"encoding/xml"
	"fmt"
	"strings"
)

// Measures of the chart, in pixels.
const (
	chartWidth  = 1080
	panelWidth  = 500
	labelWidth  = 92
	valueWidth  = 88
	barHeight   = 17
	barStep     = 22
	panelMargin = 26
	chartTop    = 112
)

// A panel is one group of bars, longer is better.
type panel struct {
	title string
	bars  []bar
}

type bar struct {
	label string
	value float64
	text  string // the value as people read it
	kind  string // "own", "encrypted" or "plain"
}

// escape makes s fit for the text of an SVG element.
func escape(s string) string {
	var b strings.Builder
	xml.EscapeText(&b, []byte(s)) // a strings.Builder doesn't fail
	return b.String()
}

var barColour = map[string]string{"own": "#0b6e4f", "encrypted": "#d17a22", "plain": "#9aa5b1"}

// chart draws panels in two columns.
func chart(title string, caption []string, panels []panel) string {
	rows := 0
	for i := 0; i < len(panels); i += 2 {
		n := len(panels[i].bars)
		if i+1 < len(panels) {
			n = max(n, len(panels[i+1].bars))
		}
		rows += n*barStep + 30 + panelMargin
	}
	height := chartTop + rows + 18*len(caption) + 14
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="DejaVu Sans, Verdana, Arial, sans-serif">`+"\n", chartWidth, height)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", chartWidth, height)
	fmt.Fprintf(&b, `<text x="24" y="40" font-size="22" font-weight="bold" fill="#1b1f24">%s</text>`+"\n", escape(title))
	x := 24
	for _, k := range []struct{ kind, text string }{
		{"own", "hostcryptd (encrypts)"}, {"encrypted", "others that encrypt"}, {"plain", "no encryption"},
	} {
		fmt.Fprintf(&b, `<rect x="%d" y="62" width="14" height="14" fill="%s"/><text x="%d" y="74" font-size="13" fill="#1b1f24">%s</text>`+"\n", x, barColour[k.kind], x+20, k.text)
		x += 210
	}
	y := chartTop
	for i, p := range panels {
		left := 24
		if i%2 == 1 {
			left += panelWidth + 32
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" font-size="15" font-weight="bold" fill="#1b1f24">%s</text>`+"\n", left, y+4, escape(p.title))
		most := 0.0
		for _, v := range p.bars {
			most = max(most, v.value)
		}
		for j, v := range p.bars {
			top, width, weight := y+18+j*barStep, 0.0, "normal"
			if most > 0 {
				width = v.value / most * (panelWidth - labelWidth - valueWidth)
			}
			if v.kind == "own" {
				weight = "bold"
			}
			fmt.Fprintf(&b, `<text x="%d" y="%d" font-size="12.5" text-anchor="end" font-weight="%s" fill="#1b1f24">%s</text>`, left+labelWidth-8, top+13, weight, escape(v.label))
			fmt.Fprintf(&b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"/>`, left+labelWidth, top, width, barHeight, barColour[v.kind])
			fmt.Fprintf(&b, `<text x="%.1f" y="%d" font-size="12.5" font-weight="%s" fill="#1b1f24">%s</text>`+"\n", float64(left+labelWidth)+width+6, top+13, weight, escape(v.text))
		}
		if i%2 == 1 || i == len(panels)-1 {
			n := len(p.bars)
			if i%2 == 1 {
				n = max(n, len(panels[i-1].bars))
			}
			y += n*barStep + 30 + panelMargin
		}
	}
	for i, c := range caption {
		fmt.Fprintf(&b, `<text x="24" y="%d" font-size="12" fill="#57606a">%s</text>`+"\n", y+8+18*i, escape(c))
	}
	b.WriteString("</svg>\n")
	return b.String()
}

// svg is the chart of a result: the own load generator on tmpfs, and the disk.
func (r *result) svg() string {
	var panels []panel
	for _, medium := range []struct {
		name, client string
		loads        []load
	}{{"tmpfs", "own", loads}, {"disk", "own", diskLoads}} {
		for _, l := range medium.loads {
			p := panel{title: medium.name + ": " + l.Name}
			for _, s := range r.Series {
				raw := s.Server == rawFile && s.Medium == medium.name
				if s.Load.Name != l.Name || s.Medium != medium.name || s.Client != medium.client && !raw || s.Server == null {
					continue
				}
				v := bar{label: s.Server, kind: "plain", value: s.medianOf(func(x sample) float64 { return x.IOPS })}
				v.text = fmt.Sprintf("%.1f k/s", v.value/1e3)
				if !l.Random {
					v.value = s.medianOf(func(x sample) float64 { return x.MBps })
					v.text = fmt.Sprintf("%.2f GB/s", v.value/1e3)
				}
				for _, q := range peers {
					if q.name == s.Server && q.encrypted {
						v.kind = "encrypted"
					}
				}
				if s.Server == hostcryptd {
					v.kind = "own"
				}
				p.bars = append(p.bars, v)
			}
			if len(p.bars) > 0 {
				panels = append(panels, p)
			}
		}
	}
	return chart("NBD servers: requests and bytes per second", []string{
		fmt.Sprintf("%s, %s, Linux %s, %s", r.Machine, r.CPU, r.Kernel, r.Started),
		fmt.Sprintf("Medians of %d rounds of %.2f s, client and server on the same machine, Unix sockets. Disk: O_DIRECT; raw-file is fio's io_uring engine.", r.Rounds, r.Slice),
		"qd: requests in flight on each connection; c: connections. passthrough is hostcryptd's server without its cipher.",
	}, panels)
}
