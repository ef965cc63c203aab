package dma

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel says of each map which policy it has (numa_maps, proc(5)).
func TestRegionPrefersItsNode(t *testing.T) {
	p := NewPool(0)
	defer p.Close()
	p.Near(1)
	r, err := p.Get("near", 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.prefer(0); errors.Is(err, unix.ENOSYS) {
		t.Skip("this kernel has no memory policies")
	} else if err != nil {
		t.Fatal(err)
	}
	maps, err := os.ReadFile("/proc/self/numa_maps")
	if err != nil {
		t.Skip("this kernel shows no policies")
	}
	at := fmt.Sprintf("%x ", uintptr(unsafe.Pointer(unsafe.SliceData(r.mem))))
	for line := range strings.Lines(string(maps)) {
		if strings.HasPrefix(line, at) && !strings.Contains(line, "prefer:0") && !strings.Contains(line, "prefer=relative:0") {
			t.Errorf("policy %q", line)
		}
	}
	fill(t, r, 3)
	b := make([]byte, 1<<20)
	if _, err := r.ReadAt(b, 7<<20); err != nil || !bytes.Equal(b, bytes.Repeat([]byte{3}, len(b))) {
		t.Errorf("content: %v", err)
	}
}

// A node that is not there keeps nobody from memory.
func TestRegionWithoutItsNode(t *testing.T) {
	p := NewPool(0)
	defer p.Close()
	p.Near(maxNode)
	r, err := p.Get("far", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	if r.prefer(maxNode-1) == nil || r.prefer(-1) == nil || r.prefer(maxNode) == nil {
		t.Error("a node that is not there was taken")
	}
	fill(t, r, 4)
}
