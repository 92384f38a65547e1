package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
	"hostcryptd/sector"
)

// TestVolumeThroughEngines: a volume on a real file, with the page cache and
// with O_DIRECT, behind a real server, with each engine: random reads, writes,
// FUA writes and zeros of any alignment, many in flight on two connections,
// verified byte for byte; and what is written is what the sector package writes
// by itself. Each connection keeps to a half of the volume; the requests of one
// that are in flight at the same time don't overlap.
func TestVolumeThroughEngines(t *testing.T) {
	for _, engine := range []nbd.Engine{nbd.EnginePortable, nbd.EngineURing} {
		for _, direct := range []bool{false, true} {
			for _, size := range []int{512, 4096} {
				t.Run(fmt.Sprintf("%s,direct=%v,sector=%d", engine, direct, size), func(t *testing.T) {
					throughEngine(t, engine, direct, size)
				})
			}
		}
	}
}

const engineVolume = 8 << 20

func throughEngine(t *testing.T, engine nbd.Engine, direct bool, sectorSize int) {
	dir := t.TempDir()
	image := filepath.Join(dir, "image")
	if err := os.WriteFile(image, make([]byte, 16<<20+engineVolume), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := sector.OpenDevice(image, sector.DeviceOptions{Direct: direct})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	_, err = sector.Format(t.Context(), d, sector.FormatOptions{SectorSize: sectorSize, Seal: []sector.Sealer{plainSeal}})
	if d.Alignment() > sectorSize {
		// This file system wants more of O_DIRECT.
		if err == nil {
			t.Errorf("sectors of %d bytes are accepted where %d are wanted", sectorSize, d.Alignment())
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	v, err := sector.Open(t.Context(), d, plainUnseal, sector.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s, err := nbd.New(nbd.Config{Engine: engine}, nbd.Export{Device: v, BlockSize: uint32(sectorSize)})
	if err != nil {
		t.Fatal(err)
	}
	want := engine
	if !direct {
		want = nbd.EnginePortable // in any case
	}
	if got := s.Engine(); got != want {
		t.Errorf("Engine() = %v, want %v", got, want)
	}
	listener, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() { served <- s.ServeListener(ctx, listener) }()

	// What is written before nobody has written is noise.
	model := make([]byte, engineVolume)
	if err := v.WriteZeroes(0, engineVolume, false); err != nil {
		t.Fatal(err)
	}
	var clients sync.WaitGroup
	const half = engineVolume / 2
	for i := range 2 {
		clients.Go(func() {
			if err := randomRequests(listener.Addr().String(), uint64(i), i*half, model[i*half:(i+1)*half]); err != nil {
				t.Errorf("connection %d: %v", i, err)
			}
		})
	}
	clients.Wait()
	got := make([]byte, engineVolume)
	if _, err := v.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, model) {
		t.Error("the volume differs from what was written")
	}
	cancel()
	if err := <-served; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if used := s.Stats().Arena.Used; used != 0 {
		t.Errorf("%d bytes of the arena are out", used)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	raw, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	if i := bytes.Index(raw, model[half:half+64]); i >= 0 {
		t.Errorf("plaintext on the backing device at %d", i)
	}
}

// randomRequests sends rounds of requests, all those of a round before the first
// reply is read, to the part of the volume that starts at base and reads as model.
func randomRequests(socket string, seed uint64, base int, model []byte) error {
	nc, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer nc.Close()
	c, err := nbdtest.Dial(nc, "")
	if err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	const depth = 16
	slot := len(model) / depth
	for round := range 60 {
		var out [depth]struct {
			nbdtest.Request
			p       []byte // of the model
			payload []byte
		}
		for i := range out {
			off, n := rng.IntN(slot), 0
			switch rng.IntN(4) {
			case 0: // one sector of 4 KiB
				off, n = off&^4095, 4096
			case 1: // any
				n = rng.IntN(min(slot-off, 20_000) + 1)
			case 2: // long
				off, n = off&^511, (slot-off&^511)&^511
			case 3: // within a sector
				n = min(slot-off, rng.IntN(600))
			}
			n = max(1, min(n, slot-off))
			off += i * slot
			r := &out[i]
			r.Cookie, r.Off, r.Len = uint64(i), uint64(base+off), uint32(n)
			r.p = model[off : off+n]
			switch rng.IntN(5) {
			case 0, 1:
				r.Cmd = nbdtest.Read
			case 2:
				r.Flags = nbdtest.FUA
				fallthrough
			case 3:
				r.Cmd = nbdtest.Write
				for j := range r.p {
					r.p[j] = byte(rng.Uint32())
				}
				r.payload = r.p
			case 4:
				r.Cmd = nbdtest.WriteZeroes
				clear(r.p)
			}
		}
		sent := make(chan error, 1)
		go func() { // the sockets may be full both ways
			for i := range out {
				if err := c.Send(out[i].Request, out[i].payload); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
		for range depth {
			errno, cookie, err := c.ReadReply()
			if err != nil || errno != 0 || cookie >= depth {
				return fmt.Errorf("round %d: reply: error %d, cookie %d, %w", round, errno, cookie, err)
			}
			if r := &out[cookie]; r.Cmd == nbdtest.Read {
				got := make([]byte, len(r.p))
				if _, err := io.ReadFull(c.Conn, got); err != nil {
					return err
				}
				if !bytes.Equal(got, r.p) {
					return fmt.Errorf("round %d: %d bytes read differ from what was written", round, len(got))
				}
			}
		}
		if err := <-sent; err != nil {
			return err
		}
		if errno, err := c.Do(nbdtest.Request{Cmd: nbdtest.Flush}, nil); errno != 0 || err != nil {
			return fmt.Errorf("flush: error %d, %w", errno, err)
		}
	}
	// Something for the end that isn't zeros.
	p := model[:4096]
	for j := range p {
		p[j] = byte(rng.Uint32())
	}
	if errno, err := c.Write(p, uint64(base), 0); errno != 0 || err != nil {
		return fmt.Errorf("write: error %d, %w", errno, err)
	}
	return c.Disconnect()
}

func plainSeal(_ context.Context, _ string, key *[sector.VolumeKeySize]byte) (json.RawMessage, error) {
	return json.Marshal(map[string]any{"type": "hostcryptd-test", "keyslots": []string{}, "key": key[:]})
}

func plainUnseal(_ context.Context, _ string, token json.RawMessage, key *[sector.VolumeKeySize]byte) error {
	var t struct{ Key []byte }
	if err := json.Unmarshal(token, &t); err != nil {
		return err
	}
	copy(key[:], t.Key)
	return nil
}
