// Package reasons says of every reason code with which a job can end, or for which it
// waits, what it means, who or what can do something about it, and what to run next.
// docs/refusals.md and coffer why are made from it.
package reasons

import (
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
)

// Reason is one code. Next are commands of coffer in which JOB stands for the job's id
// and FILE for its job file; they may be followed by words in parentheses.
type Reason struct {
	Code    string
	Meaning string
	Who     string
	Next    []string
}

// rulePrefix begins the codes of jobs that a rule of the node stopped; the rule's name
// follows.
const rulePrefix = bundle.ReasonRule

// All returns every code.
func All() []Reason {
	return []Reason{
		{"admit-refused", "the node does not take the job: its checks say why", "who wrote the job file, or who configured the node", []string{"coffer status JOB", "coffer plan FILE"}},
		{"agent-restarted", "the node agent was restarted at a moment at which the job could not be taken up again", "nobody: submit it again", []string{"coffer retry JOB"}},
		{"broker-unavailable", "the broker did not answer when a key was to be released", "who operates the broker", []string{"coffer doctor", "coffer retry JOB"}},
		{"budget", "its attempts together used what its budget allows", "who wrote the job file; a larger budget is another plan and needs new approvals", []string{"coffer explain budget", "coffer plan FILE"}},
		{"cancelled", "somebody told it to stop", "who cancelled it", []string{"coffer retry JOB"}},
		{"containerd-unavailable", "containerd on the node did not answer", "who operates the node", []string{"coffer doctor", "coffer retry JOB"}},
		{"deadline", "it ran as long as maxDuration allows", "who wrote the job file; a longer time is another plan and needs new approvals", []string{"coffer explain maxDuration", "coffer plan FILE"}},
		{"evidence", "the job ran, and its bundle could not be made: it counts as failed because nothing proves what it did", "who operates the node", []string{"coffer events JOB", "coffer retry JOB"}},
		{"exit-code", "its program ended with another code than 0", "who wrote the program", []string{"coffer logs JOB", "coffer retry JOB"}},
		{"gang-failed", "another job of its gang did not succeed: the message names it", "whoever the other job's reason names", []string{"coffer ps", "coffer events JOB"}},
		{"holder-lost", "the process that held its keys died, and with it the memory that they opened; the job was stopped", "who operates the node: often too little memory", []string{"coffer events JOB", "coffer retry JOB"}},
		{"inputs-failed", "an input was damaged or could not be read: it was found while the container started, and the job was stopped", "who operates the node: the message names the input", []string{"coffer events JOB", "coffer retry JOB"}},
		{"inputs-missing", "an input, or the folder for checkpoints, is not on the node where its job file says: the message names it", "who wrote the job file, or who operates the node", []string{"coffer explain inputs.uri", "coffer retry JOB --file FILE"}},
		{"internal", "something failed on the node for which there is no code of its own: the message says what", "who operates the node", []string{"coffer events JOB", "coffer retry JOB"}},
		{"journal", "what the node kept of the job could not be read after a restart", "who operates the node", []string{"coffer retry JOB"}},
		{"lease-lapsed", "the node heard nothing from the broker for longer than the lease, and stopped the job", "who operates the network between node and broker; the weights' owner sets how long a lease is", []string{"coffer events JOB", "coffer retry JOB"}},
		{"no-space", "the node had no room left for it: on the agent's disk, in its cache, or where containerd keeps images and sandboxes; the message says where it showed", "who operates the node: make room, and see that it stays", []string{"coffer doctor", "coffer retry JOB"}},
		{"plan-changed", "an image or a policy came to mean something else while the job waited, so that it is not the job that was approved", "who approves: the plan is another one", []string{"coffer plan FILE", "coffer grant request --job FILE"}},
		{"release-refused", "the broker gives no key for it: its checks say why", "the owner of the assets, and who approves grants", []string{"coffer grant request --job FILE"}},
		{"revoked", "a grant, a node or an asset's key was taken back while it ran", "the owner of the assets", []string{"coffer grant request --job FILE"}},
		{"submission-lost", "the node was restarted while the job waited, and the values of its variables are gone", "nobody: submit it again with its job file", []string{"coffer retry JOB --file FILE"}},
		{"trace-lost", "the node lost sight of what the job does, and stopped it", "who operates the node", []string{"coffer events JOB", "coffer retry JOB"}},
		{"verifier-unavailable", "the verifier did not answer when evidence was to be judged", "who operates the verifier", []string{"coffer doctor", "coffer retry JOB"}},
		{"verify-refused", "the verifier does not accept the evidence: its checks say why", "who operates the node; the attestation policy says what is asked for", []string{"coffer status JOB"}},
		{"waited-too-long", "approvals or room did not come within maxWait", "who approves, or who operates the node", []string{"coffer explain maxWait", "coffer retry JOB"}},
	}
}

// Find returns what is known of a code. A code of a rule and of a refusal of a stage is
// found by its kind.
func Find(code string) (Reason, bool) {
	for _, r := range All() {
		if r.Code == code {
			return r, true
		}
	}
	switch {
	case strings.HasPrefix(code, rulePrefix):
		return Reason{code, "a rule of the node stopped it: something ran or was opened that the plan's image does not need", "who wrote the program, and who keeps the node's rules", []string{"coffer events JOB"}}, true
	case strings.HasSuffix(code, "-refused"):
		return Reason{code, "it was refused: its checks say why", "the checks say who", []string{"coffer status JOB"}}, true
	}
	return Reason{}, false
}
