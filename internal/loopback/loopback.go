// Package loopback lends ports of 127.0.0.1 to tests whose programs listen on
// them.
//
// A port that the kernel chose, and that is let go for a program to listen on,
// is anyone's until the program does: the kernel gives it to the next who asks,
// or who connects to somewhere (net.ipv4.ip_local_port_range). The ports here lie
// below those, and whoever has some has them alone among all tests of a machine.
package loopback

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"testing"
)

// Ports is how many ports one loan has.
const Ports = 19

// Ranges of ports begin at first, apart from those of a stack that people use. The
// port after a range's last is listened on by whoever has the range.
const (
	first  = 17441
	ranges = 480
)

// turn makes a process begin to look elsewhere than others, and never at the range
// that it gave back last: a connection that is kept open leads to no other server.
var turn atomic.Int64

// Lend returns the first of Ports free ports. They are the caller's until release
// is called, or its process ends.
func Lend() (base int, release func(), err error) {
	from := int64(os.Getpid()) + turn.Add(1)
	for i := range int64(ranges) {
		base = first + int((from+i)%ranges)*(Ports+1)
		var claim net.Listener
		if claim, err = listen(base + Ports); err != nil {
			continue
		}
		if err = free(base); err == nil {
			return base, func() { _ = claim.Close() }, nil
		}
		_ = claim.Close()
	}
	return 0, nil, fmt.Errorf("no %d free ports from %d: %w", Ports, first, err)
}

// Base lends ports until a test has ended, and returns the first.
func Base(t testing.TB) int {
	t.Helper()
	base, release, err := Lend()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(release)
	return base
}

// Addr lends a test an address to listen on, as Base does.
func Addr(t testing.TB) string {
	t.Helper()
	return address(Base(t))
}

// free looks for programs that outlived their test: they have its ports still.
func free(base int) error {
	var errs []error
	for port := base; port < base+Ports; port++ {
		l, err := listen(port)
		if err == nil {
			err = l.Close()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func listen(port int) (net.Listener, error) { return net.Listen("tcp", address(port)) }

func address(port int) string { return fmt.Sprintf("127.0.0.1:%d", port) }
