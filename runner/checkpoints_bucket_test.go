package runner

import (
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/holder"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// TestNoBucketNoCountersignature: a checkpoint that goes to a bucket is not shown to
// the broker by an agent that has no bucket for it, as after a change of its
// configuration, nor one of which nobody can tell where it goes.
func TestNoBucketNoCountersignature(t *testing.T) {
	a := &Agent{}
	inBucket := &Job{id: "job", plan: plan.Plan{Checkpoints: &plan.Checkpoints{}}, spec: jobspec.Spec{Checkpoints: &jobspec.Checkpoints{URI: "s3://ckpt/run"}}}
	unreadable := &Job{id: "job", plan: plan.Plan{Checkpoints: &plan.Checkpoints{}}, redacted: []byte("not a job file")}
	for name, j := range map[string]*Job{"no bucket is configured": inBucket, "the job file cannot be read": unreadable} {
		// There is no broker to ask: whoever asks it ends the test.
		if token, err := a.anchorOne(t.Context(), &Job{id: j.id, plan: j.plan, spec: j.spec, redacted: j.redacted, holder: &holder.Holder{}}, holdapi.Checkpoint{Sequence: 1, Name: "x"}); err == nil {
			t.Errorf("%s: countersigned as %q", name, token)
		}
	}
	if _, err := a.createSink(t.Context(), inBucket); err == nil {
		t.Error("a sink without a bucket was made")
	}
	if err := a.trim(t.Context(), inBucket, "000001-x"); err == nil {
		t.Error("trimmed in no bucket")
	}
	// A folder of the node needs none.
	folder := &Job{id: "job", plan: inBucket.plan, spec: jobspec.Spec{Checkpoints: &jobspec.Checkpoints{URI: "file://" + t.TempDir()}}}
	if err := a.bring(t.Context(), folder, holdapi.Checkpoint{Sequence: 1, Name: "x"}); err != nil {
		t.Error(err)
	}
}
