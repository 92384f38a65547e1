package main

import (
	"fmt"
	"net"

	"golang.org/x/sys/unix"
)

// metadataAddress is where Azure's instance metadata service answers. In a
// guest it exists only while the double runs, on the guest's own loopback.
const metadataAddress = "169.254.169.254"

// loopbackUp brings the loopback interface up.
func loopbackUp() error {
	return configureInterface("lo", nil, 32)
}

// addMetadataAddress adds 169.254.169.254/32 to the loopback interface. It
// must only be called where that interface is the machine's own, never in
// the network namespace of a host.
func addMetadataAddress() error {
	return configureInterface("lo:0", []byte{169, 254, 169, 254}, 32)
}

// configureInterface gives an interface, or a labeled address of one, an
// IPv4 address in a subnet of so many bits, if it isn't nil, and brings it up.
func configureInterface(name string, addr []byte, bits int) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("opening a socket to configure %s: %w", name, err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if addr != nil {
		for _, set := range []struct {
			ioctl uint
			addr  []byte
		}{
			{unix.SIOCSIFADDR, addr},
			{unix.SIOCSIFNETMASK, net.CIDRMask(bits, 32)},
		} {
			if err := req.SetInet4Addr(set.addr); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(fd, set.ioctl, req); err != nil {
				return fmt.Errorf("setting the address of %s: %w", name, err)
			}
		}
	}
	req.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return fmt.Errorf("bringing %s up: %w", name, err)
	}
	return nil
}
