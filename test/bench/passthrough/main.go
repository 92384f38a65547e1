// Passthrough serves a raw file with the NBD server of hostcryptd and no
// encryption, so that benchmarks can tell the cost of encryption from that of
// the server. It is test code and no part of the product.
//
//	passthrough [-direct] FILE SOCKET
//	passthrough -null BYTES SOCKET
//
// With -null there is no file either: a read returns what happens to be in the
// memory, and a write goes nowhere. That is the most that this server and a client
// can reach together on a machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"

	"hostcryptd/nbd"
)

func main() {
	direct := flag.Bool("direct", false, "open FILE with O_DIRECT; clients must keep to its sectors")
	null := flag.Int64("null", 0, "serve that many `bytes` of nothing instead of a file")
	flag.Parse()
	if flag.NArg() != 2 && (*null == 0 || flag.NArg() != 1) {
		fmt.Fprintln(os.Stderr, "usage: passthrough [-direct] FILE SOCKET, or passthrough -null BYTES SOCKET")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	var err error
	if *null > 0 {
		err = serve(ctx, nothing{size: *null}, flag.Arg(0))
	} else {
		err = serveFile(ctx, flag.Arg(0), flag.Arg(1), *direct)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "passthrough:", err)
		os.Exit(1)
	}
}

func serveFile(ctx context.Context, path, socket string, direct bool) error {
	flags := os.O_RDWR
	if direct {
		flags |= unix.O_DIRECT
	}
	f, err := os.OpenFile(path, flags, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return serve(ctx, rawFile{f, int(f.Fd()), direct}, socket)
}

func serve(ctx context.Context, d nbd.Device, socket string) error {
	s, err := nbd.New(nbd.Config{}, nbd.Export{Device: d})
	if err != nil {
		return err
	}
	defer s.Close()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	if err := s.ServeListener(ctx, ln); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// A rawFile is a file as a device.
type rawFile struct {
	*os.File
	fd     int
	direct bool
}

var _ nbd.AsyncDevice = rawFile{}

func (f rawFile) Async() bool { return f.direct }

func (f rawFile) BeginRead(_ []byte, off int64) (fd int, at int64, ok bool) { return f.fd, off, true }

func (f rawFile) EndRead(_ []byte, _ int64, n int, err error) (int, error) { return n, err }

func (f rawFile) BeginWrite(_ []byte, off int64, _ bool) (fd int, at int64, ticket uint64, ok bool) {
	return f.fd, off, 0, true
}

func (f rawFile) EndWrite(_ []byte, _ int64, _ bool, _ uint64, n int, err error) (int, error) {
	return n, err
}

func (f rawFile) Size() (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return st.Size(), nil
}

func (f rawFile) Sync() error { return unix.Fdatasync(f.fd) }

func (f rawFile) WriteAtFUA(p []byte, off int64) (int, error) {
	n, err := f.WriteAt(p, off)
	if err != nil {
		return n, err
	}
	return n, f.Sync()
}

func (f rawFile) Trim(_, _ int64, _ bool) error { return nil }

func (f rawFile) WriteZeroes(off, length int64, fua bool) error {
	const zeroRange = unix.FALLOC_FL_ZERO_RANGE
	if err := unix.Fallocate(f.fd, zeroRange, off, length); err != nil || !fua {
		return err
	}
	return f.Sync()
}

// Nothing is a device without content.
type nothing struct{ size int64 }

func (n nothing) Size() (int64, error)                    { return n.size, nil }
func (nothing) ReadAt(p []byte, _ int64) (int, error)     { return len(p), nil }
func (nothing) WriteAt(p []byte, _ int64) (int, error)    { return len(p), nil }
func (nothing) WriteAtFUA(p []byte, _ int64) (int, error) { return len(p), nil }
func (nothing) Sync() error                               { return nil }
func (nothing) Trim(_, _ int64, _ bool) error             { return nil }
func (nothing) WriteZeroes(_, _ int64, _ bool) error      { return nil }
