package image

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// metadata is where clouds answer their machines with credentials. A registry may lie
// in a private network, and redirect into one; it does not lie here.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"), netip.MustParsePrefix("fe80::/10"), // link-local
	netip.MustParsePrefix("fd00:ec2::/32"), netip.MustParsePrefix("fd20:ce::/32"), // Amazon's and Google's over IPv6
	netip.MustParsePrefix("168.63.129.16/32"), netip.MustParsePrefix("192.0.0.192/32"), netip.MustParsePrefix("100.100.100.200/32"), // Azure's, Oracle's, Alibaba's
}

// toRegistries is remote.DefaultTransport that connects to no metadata service, wherever
// a registry redirects to, says that tokens are given out, or has its name resolve to:
// what such a service answers would stand in an error that whoever submits a job reads.
var toRegistries = func() http.RoundTripper {
	t := remote.DefaultTransport.(*http.Transport).Clone() //nolint:errcheck // it is one
	t.DialContext = (&net.Dialer{Timeout: 30 * time.Second, KeepAlive: 30 * time.Second, Control: notMetadata}).DialContext
	return t
}()

func notMetadata(_, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("connect to a registry at %q: %w", address, err)
	}
	a := at.Addr().Unmap().WithZone("")
	if slices.ContainsFunc(metadata, func(p netip.Prefix) bool { return p.Contains(a) }) {
		return fmt.Errorf("connect to a registry at %s: it is the address of a metadata service", a)
	}
	return nil
}
