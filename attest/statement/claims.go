package statement

import (
	"fmt"
	"maps"
	"slices"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
)

// Claim is one thing that a record says, with the checks that stand behind it.
type Claim struct {
	Value any `json:"value"`
	// Checks are those that were made and held for a claim that was checked, and
	// those that are missing for one that is only declared. A claim that no check
	// could show has none.
	Checks []string `json:"checks,omitempty"`
}

// claims are what a record says, apart: what every check that speaks to it was made
// of and held, and what is the word of whoever made the record.
type claims struct {
	Checked  map[string]Claim `json:"checked"`
	Declared map[string]Claim `json:"declared"`
}

// bound are the checks by which a plan is this job's and no other's.
var bound = []string{"plan.digest", "plan.bound", "plan.evidence", "statement.signature", "result.signature", "result.status"}

func (r *reading) claims() claims {
	out := claims{Checked: map[string]Claim{}, Declared: map[string]Claim{}}
	all := r.Report.Checks()
	// A claim that names no check is declared.
	add := func(name string, value any, checks ...string) {
		var missing []string
		for _, id := range checks {
			made := slices.ContainsFunc(all, func(c check.Check) bool { return c.ID == id })
			if !made || slices.ContainsFunc(all, func(c check.Check) bool { return c.ID == id && c.Outcome != check.Pass }) {
				missing = append(missing, id)
			}
		}
		if len(checks) == 0 || len(missing) > 0 {
			out.Declared[name] = Claim{value, missing}
			return
		}
		out.Checked[name] = Claim{value, checks}
	}
	and := func(more ...string) []string { return append(slices.Clone(bound), more...) }

	add("plan", r.Report.Plan, bound...)
	if r.plan.Image != "" {
		add("image", r.plan.Image, and("sandbox.image", "sandbox.evidence")...)
		add("command", r.plan.Command, bound...)
		if len(r.sbom.Document) > 0 {
			add("bill of materials of the image", map[string]any{"components": len(r.sbom.Components), "part": plan.Sum(r.bundle.Parts[bundle.ImageSBOMPart])}, and("sandbox.image-sbom", "sandbox.image-sbom-bound")...)
			add("contents of the image", "as its bill of materials lists them", "sandbox.image-contents")
		}
	}
	for _, i := range r.plan.Inputs {
		add("input "+i.Name, map[string]any{"asset": i.Asset, "sealed": i.Digest}, and("release.signature", "release.asset", "release.complete")...)
	}
	add("attestation policy", r.plan.Policy, and("result.policy")...)
	add("devices", r.devices(), "result.signature", "result.status", "evidence.devices", "evidence.simulated")
	add("keys released to this job alone", r.Report.Outcome.State != bundle.Refused, "release.signature", "release.job", "result.recipient-key", "log.releases")
	if _, ok := r.bundle.Parts[bundle.Approvals]; ok {
		add("approvals", "by as many as the owner's rules ask for", "approval.signature", "approvals.keys", "approvals.threshold", "approvals.rules", "approvals.consent")
	}
	for _, c := range r.checkpoints {
		add("checkpoint "+c.Name, map[string]any{"sealed": c.Digest, "bytes": c.Bytes}, "checkpoint.signature", "checkpoint.parent", "checkpoint.plan", "statement.signature")
	}
	if len(r.plan.Egress) == 0 {
		add("network", "none", and("egress.none")...)
	} else {
		add("network", r.plan.Egress, and("egress.sandbox", "egress.destination", "egress.budget", "egress.word")...)
	}
	add("nobody else's program in the sandbox", true, "trace.operator", "holder.trace", "holder.word")
	add("memory scrubbed", true, "holder.scrubbed", "holder.word")
	for _, m := range r.metrics {
		add("metric "+m.Name, m, "metrics.form", "metrics.budget", "holder.word")
	}
	add("outcome", r.Report.Outcome.State, "outcome.state", "agent.word")
	add("record in the log's tree", true, "log.receipt", "log.inclusion")
	add("node", r.agent.Node)
	add("submitter", r.agent.Submitter)
	add("runtime", fmt.Sprintf("%s, containerd %s", r.agent.Runtime, r.agent.Containerd))
	return out
}

// devices are the names of those whose evidence was appraised, as the check says.
func (r *reading) devices() string {
	for _, c := range r.Report.Checks() {
		if c.ID == "result.status" {
			return c.Found
		}
	}
	return ""
}

// training is our own predicate.
func (r *reading) training() map[string]any {
	pass, fail, _ := r.Report.Count()
	open := map[string]bool{}
	for _, c := range r.Report.Checks() {
		if c.Outcome == check.NotChecked {
			open[c.ID] = true
		}
	}
	c := r.claims()
	return map[string]any{
		"job": map[string]any{"id": r.Report.JobID, "name": r.plan.Name}, "record": digests(r.Report.Statement),
		"verdict": r.Report.Verdict, "summary": r.Report.Summary, "simulated": r.Report.Simulated,
		"verifiedAt": stamp(r.Now), "clock": stamp(r.Report.At), "verifier": r.Verifier,
		"outcome":   r.Report.Outcome,
		"checked":   c.Checked,
		"declared":  c.Declared,
		"checks":    map[string]any{"passed": pass, "failed": fail, "notChecked": slices.Sorted(maps.Keys(open))},
		"notProven": r.Report.NotProven,
	}
}
