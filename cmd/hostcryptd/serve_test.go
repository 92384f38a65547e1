package main

import (
	"encoding/binary"
	"io"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
)

// A writeLog notes the lengths of writes.
type writeLog struct {
	nbd.Device
	mu      sync.Mutex
	lengths []int
}

func (l *writeLog) WriteAt(b []byte, off int64) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lengths = append(l.lengths, len(b))
	return len(b), nil
}

// TestMaxRequest: what the kernel is limited to is given to the volume, and so locked
// there, as a whole; anything longer is not.
func TestMaxRequest(t *testing.T) {
	d, _ := leavingServer(t)
	log := &writeLog{Device: d.volume}
	d.opts.attach = "auto"
	config := d.serverConfig()
	if !config.Kernel {
		t.Error("nothing is kept for the kernel's requests")
	}
	server, err := nbd.New(config, nbd.Export{Device: log, BlockSize: 4096})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	kernel, socket := unixPair(t, unix.SOCK_STREAM)
	served := make(chan error, 1)
	go func() { served <- server.ServeTransmission(t.Context(), socket, "") }()
	for _, length := range []uint32{maxRequest, maxRequest + 4096} {
		// NBD_CMD_WRITE, and its reply without an error.
		request := binary.BigEndian.AppendUint32(nil, 0x25609513)
		request = binary.BigEndian.AppendUint32(request, 1)
		request = append(request, make([]byte, 16)...)
		request = binary.BigEndian.AppendUint32(request, length)
		if _, err := kernel.Write(append(request, make([]byte, length)...)); err != nil {
			t.Fatal(err)
		}
		reply := make([]byte, 16)
		if _, err := io.ReadFull(kernel, reply); err != nil || binary.BigEndian.Uint32(reply[4:]) != 0 {
			t.Fatalf("reply %x, %v", reply, err)
		}
	}
	kernel.Close()
	<-served
	slices.Sort(log.lengths) // the pieces are given away at the same time
	if want := []int{4096, maxRequest, maxRequest}; !slices.Equal(log.lengths, want) {
		t.Errorf("writes of %d, want %d", log.lengths, want)
	}
	_ = d.volume.Close()
}
