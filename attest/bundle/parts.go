package bundle

import (
	"github.com/coffer-run/coffer/attest/plan"
)

// Agent says what ran the job. It is the node's word; what of it is measured
// stands in the evidence.
type Agent struct {
	Node       string `json:"node"`
	Agent      string `json:"agent"`
	Containerd string `json:"containerd"`
	// Runtime is what `runsc --version` says.
	Runtime string `json:"runtime"`
	Shim    string `json:"shim"`
	// Submitter is who submitted the job, as the agent authenticated it.
	Submitter string `json:"submitter"`
	// Attempt is there if and only if the plan has a budget or allows several attempts.
	Attempt *Attempt `json:"attempt,omitempty"`
	// Devices are the job's GPUs; absent for a job without.
	Devices *Devices `json:"devices,omitempty"`
}

// Logs are the digests of what the job printed, and how much of it.
type Logs struct {
	Stdout Stream `json:"stdout"`
	Stderr Stream `json:"stderr"`
	// Cut counts the bytes beyond the plan's budget, which were dropped.
	Cut int64 `json:"cut"`
}

// Stream is one output stream, up to the budget.
type Stream struct {
	Bytes  int64       `json:"bytes"`
	Digest plan.Digest `json:"digest"`
}

// Approved is one grant that keys were released under: what it allows, and on
// whose word. Release receipts name the approvals by their digests.
type Approved struct {
	// Terms are the grant's canonical terms (receipt.GrantTerms).
	Terms []byte `json:"terms"`
	// Rules are those of its assets, as the broker told the agent right after the
	// release.
	Rules []ApprovalRule `json:"rules,omitempty"`
	// Approvals are those that counted, and the owner's consent.
	Approvals []SignedApproval `json:"approvals,omitempty"`
	// Policies are the policy statements that the receipts name: canonical
	// receipt.PolicyStatement with their SSHSIG signatures.
	Policies []SignedApproval `json:"policies,omitempty"`
}

// ApprovalRule asks for the approvals of Count members of Group before the key of
// Asset is released.
type ApprovalRule struct {
	Asset string `json:"asset"`
	Group string `json:"group"`
	Count int    `json:"count"`
}

// SignedApproval is a canonical receipt.Approval, or another document, with its
// SSHSIG signature.
type SignedApproval struct {
	Document  []byte `json:"document"`
	Signature []byte `json:"signature"`
}

// Status is the holder's last state, as the holder reports it.
type Status struct {
	Started     bool         `json:"started"`
	TraceLost   bool         `json:"traceLost"`
	Execs       int64        `json:"execs"`
	Dropped     int64        `json:"dropped"`
	RegionBytes int64        `json:"regionBytes"`
	Scrubbed    bool         `json:"scrubbed"`
	LogBytes    int64        `json:"logBytes"`
	LogCut      int64        `json:"logCut"`
	Checkpoints []Checkpoint `json:"checkpoints,omitempty"`
	// Metrics is there if and only if the plan has metrics.
	Metrics *Metrics `json:"metrics,omitempty"`
}

// Metrics is what a job reported as numbers.
type Metrics struct {
	// Values has those names of the plan that the job reported, in the plan's order.
	Values []Metric `json:"values"`
	// Cut counts values beyond the plan's bounds.
	Cut int64 `json:"cut"`
}

// Metric is one name's values: how many, the last, the least and the most.
type Metric struct {
	Name  string  `json:"name"`
	Count int64   `json:"count"`
	Last  float64 `json:"last"`
	Min   float64 `json:"min"`
	Max   float64 `json:"max"`
}

// Checkpoint is one commit, as the holder reports it. Record and Signature are
// the truth; the other fields repeat Record.
type Checkpoint struct {
	Sequence  uint64      `json:"sequence"`
	Name      string      `json:"name"`
	Digest    plan.Digest `json:"digest"`
	Parent    plan.Digest `json:"parent,omitempty"`
	Bytes     int64       `json:"bytes"`
	Nanos     int64       `json:"nanos"`
	Record    []byte      `json:"record"`
	Signature []byte      `json:"signature"`
	// Anchor is the broker's countersignature (receipt.CheckpointHead). A checkpoint
	// without is unanchored.
	Anchor string `json:"anchor,omitempty"`
}

// Resume is what the job went on from, as its plan says it.
type Resume struct {
	// Point is the broker's word (receipt.ResumePoint) where the plan resumes from
	// the latest.
	Point string `json:"point,omitempty"`
	// Record is the record of the checkpoint and Signature the one by SessionKey, of
	// the job that made it. All are absent where there was none to go on from.
	Record     []byte `json:"record,omitempty"`
	Signature  []byte `json:"signature,omitempty"`
	SessionKey []byte `json:"sessionKey,omitempty"`
	// Anchor is the countersignature of a checkpoint that the plan names.
	Anchor string `json:"anchor,omitempty"`
}

// Event is something the trace or the sealer saw, as the holder reports it.
type Event struct {
	Sequence   uint64      `json:"sequence"`
	UnixNano   int64       `json:"unixNano"`
	Kind       string      `json:"kind"`
	Detail     string      `json:"detail,omitempty"`
	Process    string      `json:"process,omitempty"`
	Digest     string      `json:"digest,omitempty"`
	Checkpoint *Checkpoint `json:"checkpoint,omitempty"`
}

// Kinds of events that verification looks for.
const (
	EventContainerStart = "container-start"
	EventExec           = "exec"
	EventOperatorExec   = "operator-exec"
	EventTraceLost      = "trace-lost"
	EventInputError     = "input-error"
	EventInputsFailed   = "inputs-failed"
	EventCheckpoint     = "checkpoint"
	EventResumed        = "resumed"
	EventJobKilled      = "job-killed"
	EventScrubbed       = "scrubbed"
)

// Decode reads a JSON part strictly.
func Decode[T any](b []byte) (T, error) {
	var v T
	if err := plan.Decode(b, MaxPart, &v); err != nil {
		var zero T
		return zero, err
	}
	return v, nil
}
