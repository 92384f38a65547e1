package vmtest

import (
	"fmt"
	"net"
	"strings"
)

// Addresses of a guest's network. All are in one subnet, so that the address of
// the instance metadata service needs no route.
const (
	GuestAddress    = "169.254.169.15" // by DHCP
	VaultAddress    = "169.254.169.100"
	metadataAddress = "169.254.169.254"

	netName = "net0"
)

// Network is what QEMU needs to connect a guest to two listeners on this host's
// loopback interface, by way of a program that connects its standard input and
// output to the address that it is given; and to nothing else. In the guest they
// are port 443 of VaultAddress and port 80 of metadataAddress.
func Network(connect []string, vault, metadata net.Addr) string {
	forward := func(addr string, port int, to net.Addr) string {
		// A command is for each connection; an address would be for one only.
		return fmt.Sprintf("guestfwd=tcp:%s:%d-cmd:%s", addr, port, escape(strings.Join(append(connect, to.String()), " ")))
	}
	return strings.Join([]string{
		"user", "id=" + netName, "restrict=on", "net=169.254.169.0/24", "host=169.254.169.1", "dhcpstart=" + GuestAddress,
		forward(VaultAddress, 443, vault), forward(metadataAddress, 80, metadata),
	}, ",")
}
