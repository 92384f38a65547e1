package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// A headerState is what was acknowledged of a header that is changed until the
// power is cut. It is on the state disk, which loses nothing.
type headerState struct {
	Changes    int    `json:"changes"`
	Generation int    `json:"generation"`
	Tokens     []int  `json:"tokens"`
	Recovery   string `json:"recovery"` // file with the recovery key
}

// A headerChanger changes the header of a volume in all the ways there are.
type headerChanger struct {
	m      *machine
	acked  headerState
	server *server
}

const (
	headerPattern     = 1 << 20 // bytes of data that must stay readable
	headerStateFile   = "header.json"
	headerRecoveryKey = "recovery-"
)

func (h *headerChanger) hostKey() string { return filepath.Join(h.m.state, "host.key") }

// headerCut checks what the last power cut has left of the header, and changes
// it until the next one. With the parameter check it only checks.
func headerCut(m *machine) error {
	if m.disk = diskBySerial("volume"); m.disk == "" || m.state == "" {
		return errors.New("there is no disk volume or no disk state")
	}
	// What the host remembers of a header outlives the cut, as it would on the
	// host's own disk: a header older than that is refused.
	os.Setenv("HOSTCRYPTD_PINS", filepath.Join(m.state, "pins"))
	os.Setenv("HOSTCRYPTD_AUDIT_LOG", "none")
	if err := m.startVault(); err != nil {
		return err
	}
	h := &headerChanger{m: m}
	b, err := os.ReadFile(filepath.Join(m.state, headerStateFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := h.format(); err != nil {
			return err
		}
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(b, &h.acked); err != nil {
			return err
		}
		m.figure("acked", float64(h.acked.Changes), "changes")
		if err := h.check(); err != nil {
			return fmt.Errorf("the header isn't what was acknowledged: %w", err)
		}
	}
	if m.params["check"] != "" {
		return h.server.detach()
	}
	for {
		if err := h.change(); err != nil {
			return err
		}
	}
}

// format makes the volume, and data in it.
func (h *headerChanger) format() error {
	name := filepath.Join(h.m.state, headerRecoveryKey+"0")
	if _, err := h.m.run("hostcryptd", "format", h.m.disk, "--key", keyURL, "--recovery-key", name, "--yes"); err != nil {
		return err
	}
	if _, err := h.m.run("hostcryptd", "key", "add", h.m.disk, "--key", "host-key", "--host-key", h.hostKey()); err != nil {
		return err
	}
	if err := h.serve(); err != nil {
		return err
	}
	f, err := os.OpenFile(h.server.dev, os.O_RDWR|unix.O_EXCL, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(headerData())
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	return h.acknowledge(name)
}

func headerData() []byte {
	b := make([]byte, headerPattern)
	rand.NewChaCha8([32]byte{1}).Read(b) // never fails
	return b
}

func (h *headerChanger) serve() (err error) {
	if h.server, err = h.m.serve("--host-key", h.hostKey()); err != nil {
		return fmt.Errorf("the volume doesn't open: %w", err)
	}
	return nil
}

// A headerDump is what dump shows of a header.
type headerDump struct {
	Generation int `json:"generation"`
	Tokens     []struct {
		ID   int    `json:"id"`
		Type string `json:"type"`
	} `json:"tokens"`
}

// keys are the tokens of a type, or all that open the volume.
func (d *headerDump) keys(kind string) (ids []int) {
	for _, t := range d.Tokens {
		if t.Type == kind || kind == "" && t.Type != "hostcryptd-volume" {
			ids = append(ids, t.ID)
		}
	}
	return ids
}

func (h *headerChanger) dump() (d headerDump, err error) {
	out, err := command("hostcryptd", "dump", h.m.disk, "--json").Output()
	if err != nil {
		return d, fmt.Errorf("hostcryptd dump: %w", err)
	}
	return d, json.Unmarshal(out, &d)
}

// acknowledge makes what the header holds now the least that it must hold
// after the next power cut.
func (h *headerChanger) acknowledge(recovery string) error {
	d, err := h.dump()
	if err != nil {
		return err
	}
	h.acked = headerState{Changes: h.acked.Changes + 1, Generation: d.Generation, Tokens: d.keys(""), Recovery: recovery}
	b, err := json.Marshal(h.acked)
	if err != nil {
		return err
	}
	name := filepath.Join(h.m.state, headerStateFile)
	f, err := os.Create(name + ".new")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := errors.Join(os.Rename(name+".new", name), syncPath(h.m.state)); err != nil {
		return err
	}
	h.m.figure("acked", float64(h.acked.Changes), "changes")
	return nil
}

// check checks that the volume opens, that its header is good then, and that
// nothing acknowledged is lost.
func (h *headerChanger) check() error {
	// Before anything repairs it: would it open?
	code, out, err := h.m.try("hostcryptd", "check", h.m.disk, "--json", "--host-key", h.hostKey())
	if err != nil {
		return err
	}
	var report struct {
		Opens bool `json:"opens"`
	}
	if err := json.Unmarshal([]byte(out[:strings.LastIndex(out, "}")+1]), &report); err != nil || !report.Opens {
		return errors.Join(fmt.Errorf("hostcryptd check ended with exit code %d and doesn't say that the volume opens", code), err)
	}
	if err := h.serve(); err != nil {
		return err
	}
	if _, err := h.m.run("hostcryptd", "header", "verify", h.m.disk, "--host-key", h.hostKey()); err != nil {
		return err
	}
	d, err := h.dump()
	if err != nil {
		return err
	}
	now := d.keys("")
	switch {
	case d.Generation < h.acked.Generation:
		return fmt.Errorf("it is of generation %d, and %d was acknowledged", d.Generation, h.acked.Generation)
	case d.Generation == h.acked.Generation && !slices.Equal(now, h.acked.Tokens):
		return fmt.Errorf("it has the tokens %v, and %v were acknowledged", now, h.acked.Tokens)
	}
	h.m.figure("changes under way that came through", float64(d.Generation-h.acked.Generation), "")
	opens := h.acked.Recovery
	if code, _, err := h.m.try("hostcryptd", "recovery", "test", h.m.disk, "--recovery-key", opens); err != nil {
		return err
	} else if code != 0 {
		// The change that was under way may have been a new recovery key.
		if opens = h.nextRecovery(-1); d.Generation == h.acked.Generation || opens == h.acked.Recovery {
			return fmt.Errorf("the recovery key in %s doesn't open it", h.acked.Recovery)
		}
		if _, err := h.m.run("hostcryptd", "recovery", "test", h.m.disk, "--recovery-key", opens); err != nil {
			return err
		}
	}
	f, err := os.Open(h.server.dev)
	if err != nil {
		return err
	}
	defer f.Close()
	got := make([]byte, headerPattern)
	if _, err := f.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, headerData()) {
		return errors.New("the volume opens, and its data is another")
	}
	h.acked.Recovery = opens
	return nil
}

// nextRecovery returns the name of the newest recovery key, or of one that is
// by add newer.
func (h *headerChanger) nextRecovery(add int) string {
	names, _ := filepath.Glob(filepath.Join(h.m.state, headerRecoveryKey+"*"))
	newest := 0
	for _, name := range names {
		_, n, _ := strings.Cut(filepath.Base(name), headerRecoveryKey)
		if i, err := strconv.Atoi(n); err == nil {
			newest = max(newest, i)
		}
	}
	return filepath.Join(h.m.state, headerRecoveryKey+strconv.Itoa(newest+1+add))
}

// change makes the next change and acknowledges it.
func (h *headerChanger) change() error {
	d, err := h.dump()
	if err != nil {
		return err
	}
	added := d.keys("hostcryptd-hostkey")
	kind, recovery := h.acked.Changes%4, h.acked.Recovery
	switch {
	case kind == 2:
		recovery = h.nextRecovery(0)
		_, err = h.m.run("hostcryptd", "recovery", "rotate", h.m.disk, "--recovery-key", recovery, "--host-key", h.hostKey())
	case kind == 3:
		err = h.rewrap()
	case len(added) > 0: // a key is there once, so it is removed and added in turn
		_, err = h.m.run("hostcryptd", "key", "remove", h.m.disk, strconv.Itoa(added[len(added)-1]), "--host-key", h.hostKey())
	default:
		_, err = h.m.run("hostcryptd", "key", "add", h.m.disk, "--key", "host-key", "--host-key", h.hostKey())
	}
	if err != nil {
		return err
	}
	return h.acknowledge(recovery)
}

// rewrap lets the vault's key have a new version and waits until the token
// has it.
func (h *headerChanger) rewrap() error {
	if err := h.m.tellVault("rotate"); err != nil {
		return err
	}
	for end := time.Now().Add(commandLimit); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		out, err := h.m.run("hostcryptd", "rewrap", h.m.disk, "--keep-old", "0", "--host-key", h.hostKey())
		if err != nil {
			return err
		}
		if strings.Contains(out, "takes the place") {
			return nil
		}
	}
	return errors.New("the vault's key got no new version")
}
