package bundle

import "github.com/coffer-run/coffer/attest/plan"

// AlertsPart is an Alerts. It is there if the job started on a node with rules.
const AlertsPart Part = "alerts"

// ReasonRule begins the reason of a job that a rule ended; the rule's id follows.
const ReasonRule = "rule-"

// Alerts is what the node's rules found in the job's trace while it ran.
type Alerts struct {
	// Rules is the digest of the rule file, as in the sandbox profile.
	Rules plan.Digest `json:"rules"`
	// Findings are in the order of finding.
	Findings []Finding `json:"findings"`
	// Untold counts findings beyond those.
	Untold int64 `json:"untold"`
}

// Finding is an event that a rule matched. The job chose process, path and address.
type Finding struct {
	// Sequence counts from 1.
	Sequence uint64 `json:"sequence"`
	UnixNano int64  `json:"unixNano"`
	Rule     string `json:"rule"`
	// Action is "record", "alert" or "stop".
	Action   string `json:"action"`
	Severity string `json:"severity"`
	Kind     string `json:"kind"`
	Process  string `json:"process,omitempty"`
	Path     string `json:"path,omitempty"`
	Digest   string `json:"digest,omitempty"`
	Address  string `json:"address,omitempty"`
	Bytes    int64  `json:"bytes,omitempty"`
	// Count is how often the rule was matched so far.
	Count int64 `json:"count"`
	// Trace is the number of the event in the trace; 0 for what the trace does not show.
	Trace uint64 `json:"trace,omitempty"`
}
