package loopback

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestNobodyElseHasThem(t *testing.T) {
	a, b := Base(t), Base(t)
	if a-b < Ports+1 && b-a < Ports+1 {
		t.Errorf("%d and %d overlap", a, b)
	}
	if err := errors.Join(free(a), free(b)); err != nil {
		t.Error(err)
	}
}

func TestGivenBack(t *testing.T) {
	base, release, err := Lend()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := listen(base + Ports); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("lent, and anyone can have it: %v", err)
	}
	release()
	l, err := listen(base + Ports)
	if err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
}

// TestAProgramThatIsLeft: whoever had the ports is gone, and a program of its test
// listens still.
func TestAProgramThatIsLeft(t *testing.T) {
	base := Base(t)
	l, err := listen(base + Ports - 1)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if free(base) == nil {
		t.Error("would be lent with a port that is taken")
	}
}

// TestBelowTheKernelsOwn wants no port that the kernel gives to anybody.
func TestBelowTheKernelsOwn(t *testing.T) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		t.Fatal(err)
	}
	low, err := strconv.Atoi(strings.Fields(string(b))[0])
	if err != nil {
		t.Fatal(err)
	}
	if last := first + ranges*(Ports+1) - 1; last >= low {
		t.Errorf("up to %d, and the kernel's own begin at %d", last, low)
	}
}
