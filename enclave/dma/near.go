package dma

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mpolPreferred is MPOL_PREFERRED (mbind(2)).
const mpolPreferred = 1

// maxNode bounds the numbers of memory nodes.
const maxNode = 1 << 10

// prefer has pages that are not there yet come from a memory node, if it has any.
func (r *Region) prefer(node int) error {
	r.mu.RLock()
	defer r.mu.RUnlock()
	if node < 0 || node >= maxNode || len(r.mem) == 0 {
		return fmt.Errorf("place region on node %d", node)
	}
	var mask [maxNode / 64]uint64
	mask[node/64] = 1 << (node % 64)
	// The kernel takes one bit less than it is told of.
	_, _, e := unix.Syscall6(unix.SYS_MBIND, uintptr(unsafe.Pointer(unsafe.SliceData(r.mem))), uintptr(len(r.mem)), mpolPreferred, // #nosec G103 -- the address of a map
		uintptr(unsafe.Pointer(&mask)), maxNode+1, 0) // #nosec G103 -- as above
	if e != 0 {
		return fmt.Errorf("place region on node %d: %w", node, e)
	}
	return nil
}
