package nbd_test

import (
	"context"
	"fmt"
	"net"

	"hostcryptd/nbd"
	"hostcryptd/nbd/nbdtest"
)

// A server for libnbd clients listens on a Unix socket.
func ExampleServer_ServeListener() {
	dev := nbdtest.NewDevice(1<<20, false)
	s, err := nbd.New(nbd.Config{}, nbd.Export{Name: "disk", Device: dev, BlockSize: 4096})
	if err != nil {
		fmt.Println(err)
		return
	}
	ln, err := net.Listen("unix", "@nbd-example") // no file
	if err != nil {
		fmt.Println(err)
		return
	}
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	done := make(chan error)
	go func() { done <- s.ServeListener(ctx, ln) }()

	conn, err := net.Dial("unix", "@nbd-example")
	if err != nil {
		fmt.Println(err)
		return
	}
	client, err := nbdtest.Dial(conn, "disk")
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("size:", client.Size)
	errno, err := client.Write([]byte("hello"), 4096, nbdtest.FUA)
	fmt.Println("write:", errno, err)
	fmt.Printf("device: %q\n", dev.Bytes(4096, 5))

	cancel(fmt.Errorf("that's it"))
	fmt.Println("server:", <-done)
	fmt.Println("close:", s.Close())

	// Output:
	// size: 1048576
	// write: 0 <nil>
	// device: "hello"
	// server: that's it
	// close: <nil>
}
