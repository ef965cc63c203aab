package jobspec

import "github.com/coffer-run/coffer/attest/plan"

// minShm is the least size of /dev/shm that a job file may name, in bytes, and
// minIO the least rate of I/O, in bytes a second: below it a job does not begin.
const (
	minShm = 64 << 10
	minIO  = 1 << 20
)

// IO bounds the job's traffic with each disk of the node.
type IO struct {
	ReadBytesPerSecond  Bytes `yaml:"readBytesPerSecond,omitempty"`
	WriteBytesPerSecond Bytes `yaml:"writeBytesPerSecond,omitempty"`
	ReadsPerSecond      int64 `yaml:"readsPerSecond,omitempty"`
	WritesPerSecond     int64 `yaml:"writesPerSecond,omitempty"`
}

func (c *checker) limits(r Resources) {
	c.require(r.Shm == 0 || r.Shm >= minShm && r.Shm <= r.Memory, "resources.shm", "want at least 64Ki and at most the job's memory")
	if r.IO != nil {
		c.require(*r.IO != IO{}, "resources.io", "it bounds nothing")
		c.require(r.IO.ReadBytesPerSecond == 0 || r.IO.ReadBytesPerSecond >= minIO, "resources.io.readBytesPerSecond", "want at least 1Mi")
		c.require(r.IO.WriteBytesPerSecond == 0 || r.IO.WriteBytesPerSecond >= minIO, "resources.io.writeBytesPerSecond", "want at least 1Mi")
	}
}

func (io *IO) plan() plan.IO {
	if io == nil {
		return plan.IO{}
	}
	return plan.IO{
		ReadBytesPerSecond: int64(io.ReadBytesPerSecond), WriteBytesPerSecond: int64(io.WriteBytesPerSecond),
		ReadsPerSecond: io.ReadsPerSecond, WritesPerSecond: io.WritesPerSecond,
	}
}
