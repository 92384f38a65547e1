package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/nbd"
	"hostcryptd/sector"
)

// A status is the answer of the control socket. Its JSON names are part of the
// interface.
type status struct {
	Version  string `json:"version"`
	PID      int    `json:"pid"`                // of the server
	Keeper   int    `json:"keeper,omitempty"`   // process that replaces the server if it dies
	Rollback string `json:"rollback,omitempty"` // why this server took over again from one that had come by reload
	State    string `json:"state"`              // unsealing, serving, stopping
	Reason   string `json:"reason,omitempty"`
	Name     string `json:"name,omitempty"` // in hostcrypttab
	UUID     string `json:"uuid"`
	Label    string `json:"label"`
	Device   string `json:"device"`
	Uptime   int64  `json:"uptime_seconds"`
	Control  string `json:"control"`
	Listen   string `json:"listen,omitempty"`
	TCP      string `json:"tcp,omitempty"`
	Attached string `json:"attached,omitempty"`

	Key struct {
		lifecycle.Snapshot
		Token   *int      `json:"token,omitempty"`  // the one that opened the volume
		Random  bool      `json:"random,omitempty"` // the key is stored nowhere
		Expires time.Time `json:"expires,omitzero"` // the vault's key
		// Tokens are those that the header has now: an old version of a key may be
		// disabled when none of any volume names it.
		Tokens []tokenInfo `json:"tokens,omitempty"`
		Header string      `json:"header,omitempty"` // what is wrong with the header on the disk
	} `json:"key"`

	Volume *volumeStatus `json:"volume,omitempty"` // once it is unsealed
	Server *serverStatus `json:"server,omitempty"`
	Swap   *swapStatus   `json:"swap,omitempty"` // with --swap
	Memory memoryStatus  `json:"memory"`
}

type volumeStatus struct {
	Size       int64         `json:"size"`
	SectorSize int           `json:"sector_size"`
	ReadOnly   bool          `json:"read_only"`
	Discard    bool          `json:"discard"`
	Failed     bool          `json:"failed"` // a flush failed; writes are refused
	Cipher     string        `json:"cipher"`
	Runs       string        `json:"implementation"`
	KeyMemory  string        `json:"key_memory"`
	Warnings   []string      `json:"warnings,omitempty"`
	Requests   *sector.Stats `json:"requests"`
}

type serverStatus struct {
	Engine      string `json:"engine"` // how it does the disk's I/O: io_uring, portable
	Connections int    `json:"connections"`
	Clients     int    `json:"clients"` // of them those of sockets, which detach cuts off
	InFlight    int    `json:"in_flight"`
	ArenaSize   int64  `json:"arena_size"` // ceiling of the memory for payloads
	ArenaUsed   int64  `json:"arena_used"`
	ArenaPeak   int64  `json:"arena_peak"`
	ArenaWaits  uint64 `json:"arena_waits"`
}

type memoryStatus struct {
	Resident uint64 `json:"resident"` // bytes
	Peak     uint64 `json:"peak"`
}

func (a *app) statusCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "show what the daemons are doing",
		Long:  "status shows the daemon of one volume, or of all.\n\n" + whichHelp,
		Args:  atMostOneArg("VOLUME"),
		RunE: func(c *cobra.Command, args []string) error {
			which := ""
			if len(args) > 0 {
				which = args[0]
			}
			if a.json && which != "" {
				s, err := theOne(c.Context(), which)
				if err != nil {
					return err
				}
				return a.printJSON(s)
			}
			// With an error there may be answers of others, to be shown first.
			list, failed := running(c.Context(), which)
			if failed != nil && len(list) == 0 {
				return failed
			}
			if a.json {
				return errors.Join(a.printJSON(list), failed)
			}
			if len(list) == 0 {
				fmt.Fprintln(a.stdout, "no volume is being served")
			}
			for i, s := range list {
				if i > 0 {
					fmt.Fprintln(a.stdout)
				}
				s.print(a.stdout)
			}
			return failed
		},
	}
	return a.jsonFlag(c)
}

func (s *status) print(w io.Writer) {
	p := func(name, format string, args ...any) {
		fmt.Fprintln(w, printable(fmt.Sprintf("%-10s "+format, append([]any{name + ":"}, args...)...)))
	}
	name := s.UUID
	if known := cmp.Or(s.Name, s.Label); known != "" {
		name = known + " (" + s.UUID + ")"
	}
	p("volume", "%s", name)
	p("device", "%s", s.Device)
	state := fmt.Sprintf("%s, pid %d, for %v", s.State, s.PID, time.Duration(s.Uptime)*time.Second)
	p("state", "%s", state)
	if s.Reason != "" {
		p("waiting", "%s", s.Reason)
	}
	s.printKey(p)
	if s.Attached != "" {
		p("kernel", "%s", s.Attached)
		if s.Keeper == 0 {
			p("keeper", "NONE: it has died, and nothing replaces the server if that dies too; restart the daemon when the volume can be detached")
		}
	}
	if s.Listen != "" {
		p("socket", "%s", s.Listen)
	}
	if s.TCP != "" {
		p("tcp", "%s", s.TCP)
	}
	if v := s.Volume; v != nil {
		mode := "read and write"
		if v.ReadOnly {
			mode = "read-only"
		}
		if v.Failed {
			mode = "FAILED: a flush was not completed, writes are refused; look at the disk, and start the server anew"
			if s.Attached != "" {
				// What has failed goes on with the handover: a restart or reload changes nothing.
				mode = fmt.Sprintf("FAILED: a flush was not completed, writes are refused; look at the disk, unmount the volume, 'hostcryptd detach %s', and start it again; a restart or reload doesn't help. If it is the root file system, reboot", cmp.Or(s.Name, s.UUID))
			}
		}
		p("size", "%s, sectors of %d bytes, %s", bytesText(uint64(v.Size)), v.SectorSize, mode)
		keys := "no keys in memory"
		if v.KeyMemory != "" {
			keys = "keys in " + v.KeyMemory
		}
		p("cipher", "%s, %s, %s", v.Cipher, v.Runs, keys)
		if s.Key.Random {
			p("opened by", "a random key, which is stored nowhere")
		} else {
			p("opened by", "token %d", *s.Key.Token)
		}
		for _, warning := range v.Warnings {
			p("warning", "%s", warning)
		}
		r := v.Requests
		p("requests", "%d reads, %d writes, %d flushes, %d trims, %d zeroes, %d errors", r.Reads, r.Writes, r.Flushes, r.Trims, r.Zeroes, r.Errors)
	}
	if n := s.Server; n != nil {
		p("clients", "%d connections, %d requests in flight, %s engine", n.Connections, n.InFlight, n.Engine)
		p("buffers", "%s of %s, peak %s", bytesText(uint64(n.ArenaUsed)), bytesText(uint64(n.ArenaSize)), bytesText(uint64(n.ArenaPeak)))
	}
	if s.Swap != nil && s.Swap.Safe {
		p("swap", "safe")
	} else if s.Swap != nil {
		p("swap", "NOT SAFE: %s", strings.Join(s.Swap.Problems, "; "))
	}
	p("memory", "%s, peak %s", bytesText(s.Memory.Resident), bytesText(s.Memory.Peak))
}

// printKey prints what is known of the volume's key.
func (s *status) printKey(p func(name, format string, args ...any)) {
	k := &s.Key
	text := k.State.String()
	switch {
	case k.Locked && k.Random:
		text += " by an operator: its key was random and is wiped, so its data is gone"
	case k.Locked:
		text += " by an operator; 'hostcryptd unlock' opens it again"
		if k.Header != "" {
			text += " if the header on the disk allows it"
		}
	case k.State == lifecycle.Erased:
		text += ": the volume has stopped, and every way into it is destroyed"
	case k.State == lifecycle.Revoked && k.Wiped:
		text += ": the volume has stopped and its keys are wiped"
	case k.State == lifecycle.Revoked:
		text += ": the volume is read-only"
	case !k.StopsAt.IsZero() && k.State == lifecycle.Grace:
		text += fmt.Sprintf(": the volume stops in %v", max(0, time.Until(k.StopsAt)).Round(time.Second))
	}
	p("key", "%s", text)
	if k.Reason != "" {
		p("waiting", "%s", k.Reason)
	}
	if !k.LastGood.IsZero() {
		p("last good", "%v ago", time.Since(k.LastGood).Round(time.Second))
	}
	if !k.NextTry.IsZero() {
		p("next try", "in %v, after %d tries", max(0, time.Until(k.NextTry)).Round(time.Second), k.Attempts)
	}
	if k.Header != "" {
		p("HEADER", "%s", k.Header)
	}
	for _, t := range k.Tokens {
		p(fmt.Sprintf("token %d", t.ID), "%s", t.text())
	}
	if !k.Expires.IsZero() {
		p("expires", "%s", k.Expires.Format(time.DateOnly))
	}
}

func (d *daemon) status() *status {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := &status{
		Version: version(), PID: os.Getpid(), State: d.state, Reason: d.stateErr,
		Name: d.opts.name, UUID: d.uuid, Label: d.label, Device: d.opts.device, Uptime: int64(time.Since(d.started).Seconds()),
		Control: d.opts.control, Listen: d.opts.listen, TCP: d.tcp, Attached: d.attached,
		Memory: memoryNow(),
	}
	s.Keeper = d.link.keeper()
	if d.link != nil {
		s.Rollback = d.link.rollback
	}
	s.Key.Tokens = d.tokens
	if d.opts.swap {
		s.Swap = d.swapNow()
	}
	if d.life != nil {
		s.Key.Snapshot = d.life.Snapshot()
		s.Key.Expires, s.Key.Header = d.lifeHost.firstExpiry(), d.lifeHost.headerProblem()
		if s.Key.Header == "" && s.Key.State != lifecycle.Erased {
			s.Key.Header = d.damage // seen just now
		}
	}
	if v := d.volume; v != nil {
		token, size, requests := v.Token(), int64(0), v.Stats()
		size, _ = v.Size()
		if token != sector.RandomToken {
			s.Key.Token = &token
		}
		s.Key.Random = token == sector.RandomToken
		keysIn := v.SecretMemory()
		if v.Suspended() {
			keysIn = ""
		}
		s.Volume = &volumeStatus{
			Size: size, SectorSize: v.SectorSize(), ReadOnly: v.ReadOnly(), Discard: v.Discards(), Failed: v.Failed(),
			Cipher: sector.Cipher, Runs: v.Implementation(), KeyMemory: keysIn, Warnings: v.Warnings(), Requests: &requests,
		}
	}
	if d.server != nil {
		n := d.server.Stats()
		s.Server = newServerStatus(n)
		s.Server.Clients = max(0, s.Server.Connections-len(d.kernelSockets))
		s.Server.Engine = string(d.server.Engine())
	}
	return s
}

func newServerStatus(n nbd.Stats) *serverStatus {
	return &serverStatus{
		Connections: n.Connections, InFlight: n.InFlight,
		ArenaSize: n.Arena.Size, ArenaUsed: n.Arena.Used, ArenaPeak: n.Arena.Peak, ArenaWaits: n.Arena.Waits,
	}
}

// memoryNow reads the memory of this process from the kernel.
func memoryNow() (m memoryStatus) {
	b, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return m
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "VmRSS":
			m.Resident = kib << 10
		case "VmHWM":
			m.Peak = kib << 10
		}
	}
	return m
}
