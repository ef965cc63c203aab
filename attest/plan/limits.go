package plan

import "fmt"

// IO bounds what a job reads from and writes to the node's disks, each disk by
// itself. A bound of 0 is none.
type IO struct {
	ReadBytesPerSecond  int64 `json:"readBytesPerSecond,omitempty"`
	WriteBytesPerSecond int64 `json:"writeBytesPerSecond,omitempty"`
	ReadsPerSecond      int64 `json:"readsPerSecond,omitempty"`
	WritesPerSecond     int64 `json:"writesPerSecond,omitempty"`
}

// maxDefaultShm bounds /dev/shm where a plan names no size, in bytes.
const maxDefaultShm = 1 << 30

// Shm is the size of the job's /dev/shm in bytes: a quarter of its memory and at
// most 1 GiB where the plan names none. What lies there counts as memory.
func (r Resources) Shm() int64 {
	if r.ShmBytes == 0 {
		return min(r.MemoryBytes/4, maxDefaultShm)
	}
	return r.ShmBytes
}

func (r Resources) validateLimits() error {
	if r.ShmBytes < 0 || r.ShmBytes > r.MemoryBytes {
		return fmt.Errorf("plan shared memory %d bytes: want at most the job's memory, %d", r.ShmBytes, r.MemoryBytes)
	}
	if r.IO.ReadBytesPerSecond < 0 || r.IO.WriteBytesPerSecond < 0 || r.IO.ReadsPerSecond < 0 || r.IO.WritesPerSecond < 0 {
		return fmt.Errorf("plan I/O limits %+v: want 0 or more", r.IO)
	}
	return nil
}
