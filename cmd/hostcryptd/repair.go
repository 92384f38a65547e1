package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"go.uber.org/zap"

	"hostcryptd/keyunseal/audit"
	"hostcryptd/keyunseal/lifecycle"
	"hostcryptd/sector"
)

// The header of a volume that is served is repaired by its server, which knows the one
// that is authentic, has all of it in memory, and needs no key for that:
//
//  1. The command asks the server what it would do. The server looks at the header as it
//     does at each heartbeat, and tells.
//  2. If something else stands where the header would be written, the command goes on with
//     --force only, and saves that to a new file.
//  3. The server reads all of it again, under the lock on the header, writes only if it's
//     still what was saved, and reads that back.

// repairTimeout is how long a repair waits for the lock on the header. What it has begun
// to write it ends.
const repairTimeout = 15 * time.Second

// repairHeader repairs the header on the disk.
func (d *daemon) repairHeader(ctx context.Context, r sector.RepairOptions) (p sector.HeaderRepair, err error) {
	d.mu.Lock()
	life, v := d.life, d.volume
	d.mu.Unlock()
	refuse := func(why string) (sector.HeaderRepair, error) {
		return p, withCode(codeBusy, fmt.Errorf("%s; nothing was changed", why))
	}
	switch {
	case d.opts.randomKey:
		return refuse("the volume's key is random and stored nowhere: it has no header")
	case life == nil || v == nil:
		return refuse("the volume is not unsealed yet, so its server doesn't know which header is the right one")
	case life.Snapshot().State == lifecycle.Erased:
		return refuse("the volume was erased; nothing brings it back")
	case d.opts.swap && v.Waiting():
		return refuse("the volume is frozen, and what its server has of the header may be in swap on it; resume it first")
	case d.opts.readOnly && !r.DryRun:
		return refuse("the volume is served read-only, so its server can't write to the disk")
	}
	ctx = context.WithoutCancel(ctx) // whoever asked may have gone: what is begun is ended
	look, end := context.WithTimeout(ctx, headerTimeout)
	defer end()
	if err := d.lookToRepair(look, v); err != nil {
		return p, err
	}
	ctx, end = context.WithTimeout(ctx, repairTimeout)
	defer end()
	p, err = v.RepairHeader(ctx, d.lifeHost.openOptions(), r)
	if r.DryRun || err == nil && p.Problem == "" {
		return p, err
	}
	what := "repair by the server"
	if p.Whole {
		what = fmt.Sprintf("repair by the server, with the header of generation %d, where there was: %s", p.Generation, p.Problem)
	}
	d.opts.keys.recordChange(audit.Header, d.uuid, what+" on "+d.opts.device, err)
	if err != nil {
		d.log.Error("the header was not repaired", zap.Error(err))
		return p, err
	}
	d.log.Warn("the header on the disk was repaired", zap.String("problem", p.Problem), zap.Bool("whole", p.Whole), zap.Uint64("generation", p.Generation), zap.Ints("keyslots", p.Keyslots))
	d.lifeHost.judgeHeader(nil)
	d.pushState()
	return p, nil
}

// lookToRepair looks at the header. Only a look that hangs in the disk stops a repair, which
// needs no key: one that no key answers in time has refused the header as any other.
func (d *daemon) lookToRepair(ctx context.Context, v *sector.Volume) error {
	_, err := d.lifeHost.lookAtHeader(ctx, v)
	hangs := errors.Is(err, errLookHangs) && !d.lifeHost.endLook()
	d.pushState() // it may be another header that is kept now
	if hangs {
		return err
	}
	return nil
}

// serveRepair answers GET and POST of /v1/repair.
func (d *daemon) serveRepair(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	if r.Method != http.MethodGet && r.Method != http.MethodPost {
		http.Error(w, "GET or POST", http.StatusMethodNotAllowed)
		return
	}
	p, err := d.repairHeader(r.Context(), sector.RepairOptions{DryRun: r.Method == http.MethodGet, Force: q.Get("force") == "true", Saved: q.Get("saved")})
	if err != nil {
		w.Header().Set(exitCodeHeader, strconv.Itoa(exitCode(err)))
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(p)
}

// A repairAnswer is the answer of header repair of a volume that is served.
type repairAnswer struct {
	Device               string `json:"device"`
	Repaired             string `json:"repaired"` // what was wrong, or ""
	*sector.HeaderRepair        // by the server, or nil
	Saved                string `json:"saved,omitempty"` // file with what was overwritten
}

// servedAs returns the server that repairs the header of a volume, or nil. A device or a
// file is meant before a volume that is called so.
func servedAs(ctx context.Context, which string) *status {
	s, err := theOne(ctx, which)
	if err != nil || s.Volume == nil || s.Key.Random {
		return nil
	}
	if fi, err := os.Stat(which); err == nil && fi.Mode()&os.ModeSocket == 0 && !sameFile(which, s.Device) && !sameFile(which, s.Attached) {
		return nil
	}
	return s
}

// repairServed has the server of a volume repair its header. The error is
// errOtherVersion if the server can't.
func (a *app) repairServed(ctx context.Context, s *status, force bool, save string) error {
	client := newControlClient(s.Control)
	var p sector.HeaderRepair
	if err := client.do(ctx, "GET", "/v1/repair", &p); err != nil {
		return fmt.Errorf("%s: %w", s.Device, err)
	}
	answer := &repairAnswer{Device: s.Device, Repaired: p.Problem, HeaderRepair: &p}
	if p.Problem == "" {
		return a.printRepaired(answer)
	}
	post := "/v1/repair?"
	if p.Foreign {
		if !force || save == "" {
			return withCode(codeDevice, fmt.Errorf("%s: %s; %s; --force --save FILE writes what stands there to a new FILE, and the header over it", s.Device, p.Problem, inItsPlace(s.Device, p.Whole)))
		}
		post += "force=true&"
	}
	if save != "" {
		sum, err := saveArea(s.Device, p.Area, save)
		if err != nil {
			return err
		}
		answer.Saved = save
		post += "saved=" + url.QueryEscape(sum)
	}
	if err := client.do(ctx, "POST", post, answer.HeaderRepair); err != nil {
		return fmt.Errorf("%s: %w", s.Device, err)
	}
	// Who closes a device that was open for writing has udev look at it again: its links
	// to the volume have gone with the header.
	if d, err := sector.OpenDevice(s.Device, sector.DeviceOptions{Shared: true}); err == nil {
		d.Close()
	}
	return a.printRepaired(answer)
}

// inItsPlace says what stands where a header is to be written.
func inItsPlace(device string, whole bool) string {
	if found, err := signatures(device); err == nil && found != "" && whole && found != damagedSignature {
		return "the device carries " + found
	}
	return "something else stands there"
}

// saveArea writes the first n bytes of a device to a new file, and returns their SHA-256
// in hexadecimal.
func saveArea(device string, n int64, name string) (string, error) {
	d, err := sector.OpenDevice(device, sector.DeviceOptions{ReadOnly: true, Shared: true})
	if err != nil {
		return "", err
	}
	defer d.Close()
	sum := sha256.New()
	err = writeWhole(name, func(f *os.File) error { return sector.CopyArea(io.MultiWriter(f, sum), d, n) })
	if errors.Is(err, os.ErrExist) {
		return "", withCode(codeBusy, fmt.Errorf("%s exists; what is overwritten is saved to a new file", name))
	}
	if err != nil {
		return "", fmt.Errorf("saving what stands at the start of %s, so that nothing was changed: %w", device, err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func (a *app) printRepaired(r *repairAnswer) error {
	if a.json {
		return a.printJSON(r)
	}
	whole := r.HeaderRepair != nil && r.Whole
	switch {
	case r.Repaired == "":
		fmt.Fprintln(a.stdout, "both copies of the header are good")
		return nil
	case !whole:
		fmt.Fprintln(a.stdout, printable(r.Repaired+"; it was repaired"))
	default:
		fmt.Fprintln(a.stdout, printable(r.Repaired))
		fmt.Fprintf(a.stdout, "%s has its header back, of generation %d with keyslots %v, as its server saw it on %s\n", r.Device, r.Generation, r.Keyslots, r.Seen.Local().Format("2006-01-02 15:04:05 MST"))
		for _, id := range r.Missing {
			fmt.Fprintf(a.stdout, "what its server does not have is the area of keyslot %d: 'hostcryptd recovery rotate --keyslot %d' makes another one\n", id, id)
		}
	}
	if r.Saved != "" {
		fmt.Fprintf(a.stdout, "%s holds what stood there\n", r.Saved)
	}
	if whole && r.Foreign {
		fmt.Fprintln(a.stdout, "what has overwritten the header may have overwritten data of the volume too: check what is on it")
	}
	if whole {
		fmt.Fprintf(a.stdout, "Next: hostcryptd check %s\n", r.Device)
	}
	return nil
}
