package plan_test

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestLimitsOfAPlan(t *testing.T) {
	with := func(r plan.Resources) plan.Plan {
		p := plan.Plan{
			Version: plan.Version, Name: "n", Image: "sha256:" + strings.Repeat("0", 64), Command: []string{"/bin/true"}, Inputs: []plan.Input{},
			Output: plan.Output{LogBytes: 1}, Policy: plan.Policy{Name: "p", Digest: plan.Sum(nil)}, SandboxProfile: plan.Sum(nil),
		}
		r.CPUMillis, r.Pids, r.MaxSeconds = 1, 1, 1
		p.Resources = r
		return p
	}
	seen := map[plan.Digest]string{}
	for name, r := range map[string]plan.Resources{
		"none named":         {MemoryBytes: 8 << 30},
		"shared memory":      {MemoryBytes: 8 << 30, ShmBytes: 8 << 30},
		"bytes to read":      {MemoryBytes: 8 << 30, IO: plan.IO{ReadBytesPerSecond: 1}},
		"bytes to write":     {MemoryBytes: 8 << 30, IO: plan.IO{WriteBytesPerSecond: 1}},
		"reads in a second":  {MemoryBytes: 8 << 30, IO: plan.IO{ReadsPerSecond: 1}},
		"writes in a second": {MemoryBytes: 8 << 30, IO: plan.IO{WritesPerSecond: 1}},
	} {
		d, err := with(r).Digest()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if seen[d] != "" {
			t.Errorf("%s has the digest of %s", name, seen[d])
		}
		seen[d] = name
	}
	for name, r := range map[string]plan.Resources{
		"more shared memory than memory": {MemoryBytes: 1 << 20, ShmBytes: 1<<20 + 1},
		"negative shared memory":         {MemoryBytes: 1 << 20, ShmBytes: -1},
		"negative bytes to read":         {MemoryBytes: 1 << 20, IO: plan.IO{ReadBytesPerSecond: -1}},
		"negative bytes to write":        {MemoryBytes: 1 << 20, IO: plan.IO{WriteBytesPerSecond: -1}},
		"negative reads in a second":     {MemoryBytes: 1 << 20, IO: plan.IO{ReadsPerSecond: -1}},
		"negative writes in a second":    {MemoryBytes: 1 << 20, IO: plan.IO{WritesPerSecond: -1}},
	} {
		if _, err := with(r).Digest(); err == nil {
			t.Errorf("%s: a plan", name)
		}
	}
	for memory, want := range map[int64]int64{1 << 30: 256 << 20, 64 << 30: 1 << 30} {
		if got := (plan.Resources{MemoryBytes: memory}).Shm(); got != want {
			t.Errorf("with %d bytes of memory %d are for /dev/shm, want %d", memory, got, want)
		}
	}
}
