// Gonbd serves a raw file with the server of the go-nbd library, as a peer in
// benchmarks.
//
//	gonbd FILE SOCKET
package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"

	"github.com/pojntfx/go-nbd/pkg/backend"
	"github.com/pojntfx/go-nbd/pkg/server"
	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: gonbd FILE SOCKET")
		os.Exit(1)
	}
	if err := serve(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, "gonbd:", err)
		os.Exit(1)
	}
}

func serve(path, socket string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	ln, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, os.Interrupt, unix.SIGTERM)
	go func() {
		<-stop
		ln.Close()
	}()
	exports := []*server.Export{{Backend: backend.NewFileBackend(f)}}
	for {
		c, err := ln.Accept()
		if errors.Is(err, net.ErrClosed) {
			return nil
		}
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			if err := server.Handle(c, exports, &server.Options{SupportsMultiConn: true}); err != nil {
				fmt.Fprintln(os.Stderr, "gonbd:", err)
			}
		}()
	}
}
