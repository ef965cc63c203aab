package verifier

import (
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/receipt"
)

// Claim values of draft-ietf-rats-ar4si, section 2.3: generic ones first, then
// those that mean something of one claim only.
const (
	noClaim         int8 = 0
	affirmed        int8 = 2
	approvedBoot    int8 = 3
	contraindicated int8 = 96
	unrecognized    int8 = 97
	cryptoFailed    int8 = 99
)

// grade is the worst outcome among the checks of one id. The zero value means
// that there is none.
type grade int

const (
	absent grade = iota
	passed
	skipped
	failed
)

// grades returns a lookup of outcomes by check id.
func grades(l check.List) func(string) grade {
	return func(id string) grade {
		worst := absent
		for i := range l {
			if l[i].ID != id {
				continue
			}
			g := failed
			switch l[i].Outcome {
			case check.Pass:
				g = passed
			case check.NotChecked:
				g = skipped
			case check.Fail:
			}
			worst = max(worst, g)
		}
		return worst
	}
}

// value is good if every check passed, bad if one failed, and says nothing
// otherwise: what was not checked is not affirmed.
func value(of func(string) grade, good, bad int8, ids ...string) int8 {
	out := good
	for _, id := range ids {
		switch of(id) {
		case failed:
			return bad
		case passed:
		default:
			out = noClaim
		}
	}
	return out
}

// broken is the vector of a device whose evidence failed cryptographically
// (section 2.3.2: 99 for every claim).
func broken() receipt.TrustVector {
	return receipt.TrustVector{
		InstanceIdentity: cryptoFailed, Configuration: cryptoFailed, Executables: cryptoFailed, FileSystem: cryptoFailed,
		Hardware: cryptoFailed, RuntimeOpaque: cryptoFailed, StorageOpaque: cryptoFailed, SourcedData: cryptoFailed,
	}
}

// missing is the vector of a device that did not attest.
func missing() receipt.TrustVector {
	return receipt.TrustVector{InstanceIdentity: unrecognized, Hardware: unrecognized}
}

func vector(k composite.Kind, of func(string) grade) receipt.TrustVector {
	switch k {
	case composite.CPU:
		return cpuVector(of)
	case composite.TPM:
		return tpmVector(of)
	case composite.GPU:
		return gpuVector(of)
	default:
		return broken()
	}
}

func cpuVector(of func(string) grade) receipt.TrustVector {
	if of("snp.parse") == failed || of("snp.signature") != passed || of("snp.report-data") != passed || of("hcl.binding") == failed {
		return broken()
	}
	return receipt.TrustVector{
		InstanceIdentity: value(of, affirmed, unrecognized, "snp.chain", "snp.hwid"),
		Configuration:    value(of, affirmed, contraindicated, "policy.snp.debug", "policy.snp.migration", "policy.snp.vmpl"),
		Executables:      value(of, approvedBoot, contraindicated, "policy.snp.measurement"),
		Hardware:         value(of, affirmed, unrecognized, "snp.chain", "snp.vcek-tcb", "policy.snp.simulated"),
		RuntimeOpaque:    value(of, affirmed, contraindicated, "policy.snp.debug", "policy.snp.simulated"),
	}
}

func tpmVector(of func(string) grade) receipt.TrustVector {
	if of("tpm.signature") != passed || of("tpm.extra-data") != passed || of("tpm.pcr-digest") != passed {
		return broken()
	}
	return receipt.TrustVector{
		InstanceIdentity: value(of, affirmed, unrecognized, "tpm.ak-credential"),
		Configuration:    value(of, affirmed, contraindicated, "tpm.ak"),
		Executables:      value(of, affirmed, contraindicated, "tpm.event-log", "tpm.tcg-log", "policy.tpm.pcr14", "policy.tpm.self-measured"),
		Hardware:         value(of, affirmed, unrecognized, "tpm.ak-credential", "policy.tpm.trust-class", "policy.tpm.simulated"),
	}
}

func gpuVector(of func(string) grade) receipt.TrustVector {
	if of("gpu.parse") == failed || of("gpu.signature") != passed || of("gpu.nonce") != passed {
		return broken()
	}
	return receipt.TrustVector{
		InstanceIdentity: value(of, affirmed, unrecognized, "gpu.chain"),
		Configuration:    value(of, affirmed, contraindicated, "policy.gpu.feature-flag"),
		Executables:      value(of, approvedBoot, contraindicated, "gpu.driver-rim", "gpu.vbios-rim", "gpu.measurements"),
		Hardware:         value(of, affirmed, unrecognized, "gpu.chain", "gpu.fwid", "policy.gpu.simulated"),
	}
}
