package policy

import (
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Device is what appraisal found of one device.
type Device struct {
	Claims map[string]any
	Checks check.List
	// Simulated is true if its chain ended in a simulation's anchor.
	Simulated bool
}

// Evidence is all that a policy looks at. A nil device was not there.
type Evidence struct {
	SNP  *Device
	TPM  *Device
	GPUs []Device
	// WantGPUs is how many the plan asks for.
	WantGPUs int
	// Failures say by source ("snp", "tpm", "gpu") what could not be collected.
	Failures map[string]string
	// Alone says that the devices are of no job: each is held against the
	// document by itself. Which of them there must be, and how many GPUs, is then
	// not asked; a decision on them is none on a job.
	Alone bool
	// Now is the time of the appraisal. Without it, rules and reference values
	// that need a time refuse.
	Now time.Time
}

// Decision are the outcomes. Evidence is acceptable if none failed.
type Decision struct {
	// Platform are those of no single device: what must be there at all.
	Platform check.List
	SNP      check.List
	TPM      check.List
	GPUs     []check.List
	// Tiers are by submodule: "cpu0", "tpm0", "gpu0". One that is not there is none.
	Tiers map[string]receipt.Tier
}

// All returns the outcomes in one list.
func (d Decision) All() check.List {
	return slices.Concat(append([]check.List{d.Platform, d.SNP, d.TPM}, d.GPUs...)...)
}
