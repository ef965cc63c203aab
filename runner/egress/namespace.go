package egress

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Every job has the same addresses: its namespaces are its own, and nothing routes
// between them and any others.
var (
	jobAddr     = netip.MustParseAddr("10.77.0.2")
	gatewayAddr = netip.MustParseAddr("10.77.0.1")
	jobMAC      = net.HardwareAddr{2, 0, 0, 0, 0, 2}
	gatewayMAC  = net.HardwareAddr{2, 0, 0, 0, 0, 1}
)

const (
	proxyPort = 3128
	dnsPort   = 53
	prefixLen = 30

	jobLink     = "eth0"
	gatewayLink = "job0"
)

// A new namespace takes some of these from the machine's own.
var settings = map[string]string{
	"/proc/sys/net/ipv4/ip_forward":                   "0",
	"/proc/sys/net/ipv4/conf/all/accept_source_route": "0",
	"/proc/sys/net/ipv6/conf/all/disable_ipv6":        "1",
	"/proc/sys/net/ipv6/conf/default/disable_ipv6":    "1",
}

// harden switches off in the namespace of this thread what would carry packets
// from one side to another.
func harden() error {
	for path, v := range settings {
		err := os.WriteFile(path, []byte(v), 0)
		if errors.Is(err, os.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return fmt.Errorf("set %s: %w", path, err)
		}
	}
	return nil
}

// connect makes the one link between the gateway's namespace, in which it runs, and
// the job's.
func connect(job string) error {
	ns, err := os.Open(job)
	if err != nil {
		return fmt.Errorf("connect namespaces: %w", err)
	}
	defer ns.Close()
	veth := &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: gatewayLink, HardwareAddr: gatewayMAC},
		PeerName:  jobLink, PeerHardwareAddr: jobMAC, PeerNamespace: netlink.NsFd(int(ns.Fd())),
	}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("connect namespaces: %w", err)
	}
	return address(gatewayLink, gatewayAddr, jobAddr, jobMAC)
}

// address gives a link its address and tells it where the other side is, so that
// neither asks.
func address(name string, own, peer netip.Addr, mac net.HardwareAddr) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	mask := net.CIDRMask(prefixLen, own.BitLen())
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: own.AsSlice(), Mask: mask}}); err != nil {
		return fmt.Errorf("address link %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", name, err)
	}
	neigh := &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: peer.AsSlice(), HardwareAddr: mac}
	if err := netlink.NeighSet(neigh); err != nil {
		return fmt.Errorf("set neighbour of link %s: %w", name, err)
	}
	return nil
}

// prepareJob configures the job's side. There is no default route: what is not the
// gateway is unreachable before it is refused.
func prepareJob() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return address(jobLink, jobAddr, gatewayAddr, gatewayMAC)
}
