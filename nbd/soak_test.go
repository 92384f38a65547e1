package nbd_test

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// soakTime is how long TestSoak runs.
const soakTime = 2 * time.Second

// soakRegion is the part of the device that a connection has for itself.
const soakRegion = 2 << 20

// TestSoak mixes valid and invalid requests, and connections that end in every
// way, in every reply mode, with and without TLS. Every byte that is read, and
// in the end the whole device, is compared with a model. At the end nothing may
// be left: no goroutine, descriptor, or memory of the arena.
func TestSoak(t *testing.T) {
	const connections = 8
	p := newPKI(t)
	dev := nbdtest.NewDevice(connections*soakRegion, false)
	model := make([]byte, connections*soakRegion)
	var delays atomic.Uint64
	dev.Before = func(nbdtest.Op) error {
		if delays.Add(1)%200 == 0 {
			time.Sleep(time.Millisecond)
		}
		return nil
	}
	goroutines, descriptors := runtime.NumGoroutine(), countDescriptors(t)
	var requests, invalid, dials atomic.Int64
	t.Run("run", func(t *testing.T) {
		h := newHarness(t, nbd.Config{TLS: p.server, InFlight: 8}, nbd.Export{Name: "x", Device: dev, Trim: true})
		end := time.Now().Add(soakTime)
		var clients sync.WaitGroup
		for i := range connections {
			clients.Go(func() {
				k := &soaker{
					rng:   rand.New(rand.NewPCG(uint64(i), 5)),
					base:  uint64(i) * soakRegion,
					size:  uint64(len(model)),
					model: model[i*soakRegion:][:soakRegion],
				}
				for time.Now().Before(end) {
					dials.Add(1)
					if err := k.connection(t, h, p, end); err != nil {
						t.Errorf("connection %d: %v", i, err)
						break
					}
				}
				requests.Add(k.requests)
				invalid.Add(k.invalid)
			})
		}
		clients.Wait()
	})
	if !bytes.Equal(dev.Bytes(0, int64(len(model))), model) {
		t.Error("the device differs from the model")
	}
	t.Logf("%d requests, %d of them invalid, on %d connections", requests.Load(), invalid.Load(), dials.Load())
	if requests.Load() < 100 || invalid.Load() < 10 || dials.Load() < connections {
		t.Error("too little was done to say anything")
	}
	eventually(t, "all goroutines have ended", func() bool { return runtime.NumGoroutine() <= goroutines })
	eventually(t, "all descriptors are closed", func() bool { return countDescriptors(t) <= descriptors })
}

func countDescriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// A soaker makes connections, one after the other, and has a region of the
// device for itself.
type soaker struct {
	rng               *rand.Rand
	base, size        uint64
	model             []byte
	requests, invalid int64
}

// connection runs one connection until it ends in one of many ways.
func (k *soaker) connection(t *testing.T, h *harness, p *pki, end time.Time) error {
	client, server := socketpair(t)
	defer client.Close()
	if err := client.SetDeadline(time.Now().Add(60 * time.Second)); err != nil {
		return err
	}
	result := h.serve(server)
	defer func() {
		client.Close()
		<-result // before the region is used again
	}()

	c := &nbdtest.Client{Conn: client}
	if _, err := c.Greet(3); err != nil {
		return err
	}
	if k.rng.IntN(4) == 0 {
		if r, err := c.Option(nbdtest.OptStartTLS, nil); err != nil || r[0].Type != nbdtest.RepAck {
			return fmt.Errorf("STARTTLS: %+v, %v", r, err)
		}
		conn := tls.Client(client, p.client)
		if err := conn.Handshake(); err != nil {
			return err
		}
		c = &nbdtest.Client{Conn: conn}
	}
	switch k.rng.IntN(20) { // ends in the handshake
	case 0:
		_, err := c.Conn.Write(make([]byte, 16))
		return err
	case 1:
		_, err := c.Conn.Write(nbdtest.AppendOption(nil, nbdtest.OptGo, nbdtest.GoData("x"))[:10])
		return err
	case 2:
		_, err := c.Option(nbdtest.OptAbort, nil)
		return err
	}
	for range k.rng.IntN(3) { // nonsense that has to be refused
		opt := []uint32{0, 4, nbdtest.OptGo, nbdtest.OptInfo, nbdtest.OptListMeta, nbdtest.OptSetMeta, nbdtest.OptStructuredReply, 99}[k.rng.IntN(8)]
		r, err := c.Option(opt, pattern(1+k.rng.IntN(200), k.rng.Uint64()))
		if err != nil || r[0].Type&(1<<31) == 0 {
			return fmt.Errorf("option %d with nonsense: %+v, %v", opt, r, err)
		}
	}
	mode := k.rng.IntN(3)
	if opt := []uint32{0, nbdtest.OptStructuredReply, nbdtest.OptExtendedHeaders}[mode]; opt != 0 {
		c.Extended = mode == 2
		if r, err := c.Option(opt, nil); err != nil || r[0].Type != nbdtest.RepAck {
			return fmt.Errorf("option %d: %+v, %v", opt, r, err)
		}
		if r, err := c.Option(nbdtest.OptSetMeta, nbdtest.MetaData("x", "base:allocation")); err != nil || len(r) != 2 {
			return fmt.Errorf("SET_META_CONTEXT: %+v, %v", r, err)
		}
	}
	if err := c.Go("x"); err != nil {
		return err
	}
	for range 1 + k.rng.IntN(40) {
		if time.Now().After(end) {
			break
		}
		if err := k.batch(c, mode); err != nil {
			return fmt.Errorf("mode %d: %w", mode, err)
		}
	}
	switch k.rng.IntN(4) { // ends
	case 0:
		return c.Disconnect()
	case 1:
		_, err := c.Conn.Write(make([]byte, 40))
		return err
	case 2: // in a payload of which nothing may be written
		return c.Send(nbdtest.Request{Cmd: nbdtest.Write, Flags: k.payloadLen(mode), Off: k.base, Len: 30_000}, make([]byte, 20_000))
	}
	return nil
}

func (k *soaker) payloadLen(mode int) uint16 {
	if mode == 2 {
		return nbdtest.PayloadLen
	}
	return 0
}

// batch sends some requests that share no byte unless all of them read, and
// checks the replies, in whatever order they come.
func (k *soaker) batch(c *nbdtest.Client, mode int) error {
	type pending struct {
		req   nbdtest.Request
		errno uint32
		data  []byte // of a read that succeeds
		seen  bool
	}
	n := 1 + k.rng.IntN(16)
	all := make([]pending, n)
	var out []byte
	add := func(r nbdtest.Request, payload []byte) {
		if c.Extended {
			out = r.AppendExtended(out)
		} else {
			out = r.Append(out)
		}
		out = append(out, payload...)
	}
	slice := soakRegion / n // of each request
	for i := range all {
		p := &all[i]
		length := k.rng.IntN(slice)
		if k.rng.IntN(3) > 0 {
			length = min(length, 1+k.rng.IntN(8192))
		}
		off := i*slice + k.rng.IntN(slice-length+1)
		part := k.model[off : off+length]
		r := nbdtest.Request{Cookie: uint64(i), Off: k.base + uint64(off), Len: uint32(length)}
		if k.rng.IntN(6) == 0 {
			r.Flags = nbdtest.FUA
		}
		var payload []byte
		switch k.rng.IntN(16) {
		default:
			p.data = bytes.Clone(part)
			if mode > 0 {
				r.Flags |= nbdtest.DF
			}
		case 0, 1, 2, 3:
			r.Cmd, r.Flags = nbdtest.Write, r.Flags|k.payloadLen(mode)
			payload = pattern(length, k.rng.Uint64())
			copy(part, payload)
		case 4:
			r.Cmd = nbdtest.WriteZeroes
			clear(part)
		case 5:
			r.Cmd = nbdtest.Trim
			for i := range part {
				part[i] = 0xdb // what the device does
			}
		case 6:
			r.Cmd, r.Off, r.Len = nbdtest.Flush, 0, 0
		case 7:
			r.Cmd = nbdtest.Cache
		case 8:
			r.Cmd = nbdtest.BlockStatus
			if mode == 0 || length == 0 {
				p.errno = eINVAL
			}
		case 9, 10: // invalid in some way
			p.errno = eINVAL
			switch k.rng.IntN(7) {
			case 0:
				r.Cmd = 9 + uint16(k.rng.IntN(1000))
			case 1:
				r.Off = k.size + 1
			case 2:
				r.Off, p.errno, r.Cmd = 1<<64-1, eNOSPC, nbdtest.WriteZeroes
			case 3:
				r.Flags = 1 << 15
			case 4:
				r.Cmd, r.Flags, p.errno = nbdtest.WriteZeroes, nbdtest.FastZero, eNOTSUP
			case 5: // its payload must be thrown away
				r.Cmd, r.Flags, r.Len = nbdtest.Write, 1<<14, uint32(k.rng.IntN(70_000))
				payload = make([]byte, r.Len)
			case 6:
				r.Cmd, r.Off, r.Len = nbdtest.Flush, 1, 1
			}
		}
		if p.errno != 0 {
			k.invalid++
		}
		p.req = r
		add(r, payload)
	}
	k.requests += int64(n)
	sent := make(chan error, 1)
	go func() {
		cut := len(out) / 3 // anywhere
		_, err := c.Conn.Write(out[:cut])
		if err == nil {
			_, err = c.Conn.Write(out[cut:])
		}
		sent <- err
	}()
	for range all {
		errno, cookie, data, err := soakReply(c, mode, func(cookie uint64) int {
			if cookie >= uint64(n) {
				return 0
			}
			return len(all[cookie].data)
		})
		if err != nil {
			return err
		}
		if cookie >= uint64(n) || all[cookie].seen {
			return fmt.Errorf("reply with cookie %d", cookie)
		}
		p := &all[cookie]
		p.seen = true
		if errno != p.errno || !bytes.Equal(data, p.data) {
			return fmt.Errorf("%+v: error %d, %d bytes; want %d, %d bytes", p.req, errno, len(data), p.errno, len(p.data))
		}
	}
	return <-sent
}

// soakReply reads one reply. size says how much data a read wants.
func soakReply(c *nbdtest.Client, mode int, size func(cookie uint64) int) (errno uint32, cookie uint64, data []byte, err error) {
	if mode == 0 {
		if errno, cookie, err = c.ReadReply(); err == nil && errno == 0 {
			data = make([]byte, size(cookie))
			_, err = io.ReadFull(c.Conn, data)
		}
		return
	}
	k, err := c.ReadChunk()
	if err != nil {
		return 0, 0, nil, err
	}
	if !k.Done() {
		return 0, 0, nil, fmt.Errorf("%+v is not the last chunk", k)
	}
	if k.Type == nbdtest.ChunkOffsetData {
		data = k.Data[8:]
	}
	return k.Errno, k.Cookie, data, nil
}
