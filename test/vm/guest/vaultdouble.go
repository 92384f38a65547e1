package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"hostcryptd/keyunseal/vaulttest"
)

// What the process of the double says when it serves, and where its
// certificate is then.
const (
	vaultReady = "ready"
	rootsName  = "roots.pem"
)

// runVault is the process of the double. It keeps its key and its identities
// in the folder given, says when it is ready and ends with its standard
// input.
func runVault(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: guest vault FOLDER")
	}
	dir := args[0]
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	double, err := vaulttest.New(vaulttest.Options{Dir: dir})
	if err != nil {
		return err
	}
	if _, ok := double.KeyURL(keyURL); !ok {
		// The smallest key the vault has: the prime numbers of a larger one
		// take long to find on an emulated machine.
		if _, err := double.AddKey(keyURL, 2048); err != nil {
			return err
		}
		if err := double.Save(); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(dir, rootsName), double.CAPEM(), 0o644); err != nil {
		return err
	}
	tls, err := net.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		return err
	}
	imds, err := net.Listen("tcp", metadataAddress+":80")
	if err != nil {
		return err
	}
	if _, err := fmt.Println(vaultReady); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		defer cancel()
		for in := bufio.NewScanner(os.Stdin); in.Scan(); { // ends with the process that started this one
			if err := tellDouble(double, in.Text()); err != nil {
				fmt.Fprintln(os.Stderr, "vault double:", err)
				return
			}
		}
	}()
	return double.Serve(ctx, tls, imds)
}

// tellDouble does to the key what an administrator of the vault would.
func tellDouble(double *vaulttest.Server, command string) error {
	switch command {
	case "disable":
		return double.SetEnabled(keyURL, false)
	case "enable":
		return double.SetEnabled(keyURL, true)
	case "rotate":
		if _, err := double.AddKey(keyURL, 2048); err != nil {
			return err
		}
		return double.Save()
	}
	return fmt.Errorf("unknown command %q", command)
}
