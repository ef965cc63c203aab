package bundle

import "github.com/coffer-run/coffer/attest/plan"

// ReattestPart is a Reattestations: how the job attested again while it ran. It is
// there if the job started and its plan or an asset's policy asks for that.
const ReattestPart Part = "reattestations"

// Reasons of jobs whose later attestations ended them. They have a Stop.
const (
	// ReasonReattestRefused: the verifier did not affirm what the job showed.
	ReasonReattestRefused = "reattest-refused"
	// ReasonReattestLate: there was no result in time.
	ReasonReattestLate = "reattest-late"
)

// MaxReattestRaw bounds, in bytes, the evidence and results in a Reattestations.
const MaxReattestRaw = 3 << 20

// MaxReattestations bounds how many are listed.
const MaxReattestations = 4096

// Reattestations are the later attestations of one job, in order.
type Reattestations struct {
	List []Reattestation `json:"list"`
	// Omitted counts those that affirmed and are not listed, for want of room.
	Omitted int `json:"omitted,omitempty"`
}

// Verdicts of a Reattestation.
const (
	ReattestAffirmed = "affirmed"
	ReattestRefused  = "refused"
	// ReattestNone: there was no evidence, or no verifier, in time.
	ReattestNone = "none"
)

// What became of the job.
const (
	ReattestGoesOn  = "goes-on"
	ReattestPaused  = "paused"
	ReattestResumed = "resumed"
	ReattestStopped = "stopped"
)

// Reattestation is one of them. Times and Cause are the node's word.
type Reattestation struct {
	// Number counts from 1.
	Number int `json:"number"`
	// Cause says what asked for it: "timer", or what happened to the machine.
	Cause string `json:"cause"`
	// StartUnixNano and Nanos are when it began and how long it took, with Tries.
	StartUnixNano int64  `json:"startUnixNano"`
	Nanos         int64  `json:"nanos"`
	Tries         int    `json:"tries"`
	Verdict       string `json:"verdict"`
	// Failed are the ids of the failed checks of a refusal, each once.
	Failed []string `json:"failed,omitempty"`
	// Message says why there is no result, or why the broker did not take it.
	Message string `json:"message,omitempty"`
	// Shown is that the broker took the result.
	Shown bool `json:"shown,omitempty"`
	// Then is what became of the job.
	Then string `json:"then"`
	// ResultDigest and EvidenceDigest are of Result and Evidence; absent without a
	// result.
	ResultDigest   plan.Digest `json:"resultDigest,omitempty"`
	EvidenceDigest plan.Digest `json:"evidenceDigest,omitempty"`
	// Result is the signed result, Evidence the envelope. Of old ones that affirmed
	// both are left out where there is no room (MaxReattestRaw).
	Result   string `json:"result,omitempty"`
	Evidence []byte `json:"evidence,omitempty"`
}

// Add appends one and makes room for it: what affirmed goes first, the oldest
// before, and first its evidence and result.
func (r *Reattestations) Add(a Reattestation) {
	r.List = append(r.List, a)
	raw := 0
	for _, a := range r.List {
		raw += a.raw()
	}
	for i := range r.List[:len(r.List)-1] {
		if raw <= MaxReattestRaw {
			break
		}
		if a := &r.List[i]; a.Verdict == ReattestAffirmed {
			raw -= a.raw()
			a.Result, a.Evidence = "", nil
		}
	}
	for i := 0; len(r.List) > MaxReattestations && i < len(r.List)-1; {
		if r.List[i].Verdict != ReattestAffirmed {
			i++
			continue
		}
		r.List = append(r.List[:i], r.List[i+1:]...)
		r.Omitted++
	}
}

// Room is for how many more attestations like the largest that the list has, or like
// one of size bytes, it has room for evidence and result.
func (r *Reattestations) Room(size int) int {
	raw := 0
	for _, a := range r.List {
		raw += a.raw()
		size = max(size, a.raw())
	}
	return max(MaxReattestRaw-raw, 0) / max(size, 1)
}

func (a Reattestation) raw() int { return len(a.Result) + len(a.Evidence)*4/3 }
