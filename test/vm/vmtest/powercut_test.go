package vmtest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// TestVolatileDisk writes three blocks through QEMU's client, with a flush
// after each, and cuts the power.
func TestVolatileDisk(t *testing.T) {
	qemuIO, err := Tool("qemu-io")
	if err != nil {
		t.Fatal(err)
	}
	always := func(a FlushAction) func(int) FlushAction { return func(int) FlushAction { return a } }
	for _, c := range []struct {
		name    string
		onFlush func(n int) FlushAction
		want    []byte // of each block
	}{
		{"NoProxy", nil, []byte{1, 2, 3}},
		{"Do", always(FlushDo), []byte{1, 2, 3}},
		{"Lie", always(FlushLie), []byte{0, 0, 0}},
		{"LieOnceThenHold", func(n int) FlushAction { return []FlushAction{FlushDo, FlushLie, FlushHold}[min(n, 3)-1] }, []byte{1, 0, 0}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			image, socket := filepath.Join(dir, "disk.img"), filepath.Join(dir, "disk.sock")
			if err := Sparse(image, 1<<20); err != nil {
				t.Fatal(err)
			}
			held := make(chan struct{})
			var once atomic.Bool
			onFlush := c.onFlush
			if onFlush != nil {
				onFlush = func(n int) FlushAction {
					a := c.onFlush(n)
					if a == FlushHold && once.CompareAndSwap(false, true) {
						close(held)
					}
					return a
				}
			}
			d, err := StartVolatileDisk(t.Context(), image, socket, onFlush)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			cmd := exec.CommandContext(ctx, qemuIO, "-t", "writeback", "-f", "raw", "nbd+unix:///?socket="+socket,
				"-c", "write -P 1 0 64k", "-c", "flush",
				"-c", "write -P 2 64k 64k", "-c", "flush",
				"-c", "write -P 3 128k 64k", "-c", "flush")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case err := <-ended:
				if err != nil {
					t.Errorf("qemu-io: %v: %s", err, &out)
				}
			case <-held:
			}
			if err := d.Cut(); err != nil {
				t.Error(err)
			}
			cancel()
			b, err := os.ReadFile(image)
			if err != nil {
				t.Fatal(err)
			}
			for i, want := range c.want {
				if got := b[i*64<<10]; got != want {
					t.Errorf("block %d is %d after the power cut, want %d: %s", i, got, want, &out)
				}
			}
		})
	}
}
