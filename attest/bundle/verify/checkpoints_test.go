package verify_test

import (
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// resumedJob is a job that goes on from the second checkpoint of another of the
// same plan, as its plan says.
func resumedJob(t *testing.T, l *bundletest.Lab, nothing bool, change func(*receipt.ResumePoint)) *bundletest.Job {
	t.Helper()
	j := newJob(t, l, bundletest.Options{ID: "job-2", Resume: plan.ResumeLatest})
	from := newJob(t, l, bundletest.Options{ID: "job-1", Resume: plan.ResumeLatest})
	first := must2(from.Checkpoint(1, "", func(r *receipt.CheckpointRecord) { r.Plan = j.Plan }))(t)
	second := must2(from.Checkpoint(2, first.Digest, func(r *receipt.CheckpointRecord) { r.Plan = j.Plan }))(t)
	c := &second
	if nothing {
		c = nil
	}
	if err := j.Resumed(from, c, change); err != nil {
		t.Fatal(err)
	}
	return j
}

func must2[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func passes(r verify.Report, id string) bool {
	return slices.ContainsFunc(r.Checks(), func(c check.Check) bool { return c.ID == id && c.Outcome == check.Pass })
}

func TestResumedJob(t *testing.T) {
	l := newLab(t)
	for _, nothing := range []bool{false, true} {
		r := verify.Verify(build(t, resumedJob(t, l, nothing, nil)), pinned(t, l))
		if r.Verdict != verify.Verified {
			t.Fatalf("nothing to go on from %t: %s: %s", nothing, r.Verdict, r.Summary)
		}
		for _, id := range []string{"resume.signature", "resume.record", "checkpoint.anchor", "checkpoint.sequence", "log.checkpoints", "log.resume"} {
			if !passes(r, id) {
				t.Errorf("nothing to go on from %t: %s does not pass", nothing, id)
			}
		}
	}
}

// TestResumedJobForged: one thing is false in each record, and the named check says so.
func TestResumedJobForged(t *testing.T) {
	l := newLab(t)
	point := func(f func(*receipt.ResumePoint)) func(*testing.T) *bundletest.Job {
		return func(t *testing.T) *bundletest.Job { return resumedJob(t, l, false, f) }
	}
	part := func(f func(*testing.T, *bundletest.Job)) func(*testing.T) *bundletest.Job {
		return func(t *testing.T) *bundletest.Job {
			j := resumedJob(t, l, false, nil)
			f(t, j)
			return j
		}
	}
	x := plan.Sum([]byte("x"))
	for name, tc := range map[string]struct {
		make func(*testing.T) *bundletest.Job
		want string
	}{
		"the point of another job":        {point(func(p *receipt.ResumePoint) { p.JobID = "job-9" }), "resume.job"},
		"the point of another plan":       {point(func(p *receipt.ResumePoint) { p.Plan = x }), "resume.plan"},
		"the point of another asset":      {point(func(p *receipt.ResumePoint) { p.Asset = "x" }), "resume.asset"},
		"another record than the newest":  {point(func(p *receipt.ResumePoint) { p.Record = x }), "resume.record"},
		"another job's checkpoint":        {point(func(p *receipt.ResumePoint) { p.From = "job-9" }), "resume.from"},
		"another place in the log":        {point(func(p *receipt.ResumePoint) { p.LogIndex-- }), "log.resume"},
		"an older point than the log's":   {point(func(p *receipt.ResumePoint) { p.Sequence-- }), "log.resume"},
		"no word of what it resumed from": {part(func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.ResumePart) }), "resume.plan"},
		"a point that nobody signed": {part(func(t *testing.T, j *bundletest.Job) {
			edit(bundle.ResumePart, func(r *bundle.Resume) { r.Point = r.Point[:len(r.Point)-8] + "AAAAAAAA" })(t, j)
		}), "resume.signature"},
		"a record that nobody signed":              {part(edit(bundle.ResumePart, func(r *bundle.Resume) { r.Signature[9] ^= 1 })), "resume.record-signature"},
		"no event of the holder":                   {part(edit(bundle.Trace, func(l *[]bundle.Event) { (*l)[1].Digest = string(x) })), "resume.seen"},
		"a countersignature of another checkpoint": {part(edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { (*l)[0].Anchor = (*l)[1].Anchor })), "checkpoint.anchor"},
		"a countersignature that nobody signed":    {part(edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { (*l)[0].Anchor += "A" })), "checkpoint.anchor"},
		"a logged checkpoint left out": {part(func(t *testing.T, j *bundletest.Job) {
			edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = (*l)[:1] })(t, j)
			edit(bundle.HolderStatus, func(s *bundle.Status) { s.Checkpoints = s.Checkpoints[:1] })(t, j)
		}), "log.checkpoints"},
		"a line that begins anew": {part(func(t *testing.T, j *bundletest.Job) {
			c := must2(j.Checkpoint(1, "", nil))(t)
			edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = []bundle.Checkpoint{c} })(t, j)
			edit(bundle.HolderStatus, func(s *bundle.Status) { s.Checkpoints = []bundle.Checkpoint{c} })(t, j)
		}), "checkpoint.sequence"},
		"a resume under a plan without": {func(t *testing.T) *bundletest.Job {
			j := newJob(t, l, bundletest.Options{ID: "job-2"})
			j.Parts[bundle.ResumePart] = resumedJob(t, l, false, nil).Parts[bundle.ResumePart]
			return j
		}, "resume.plan"},
	} {
		t.Run(name, func(t *testing.T) {
			r := verify.Verify(build(t, tc.make(t)), pinned(t, l))
			if !slices.Contains(failedIDs(r), tc.want) || r.Verdict != verify.Failed {
				t.Errorf("%s, failed %v, want %s", r.Verdict, failedIDs(r), tc.want)
			}
		})
	}
}

// An unanchored checkpoint is told and fails nothing.
func TestUnanchoredCheckpoint(t *testing.T) {
	l := newLab(t)
	r := verify.Verify(build(t, newJob(t, l, bundletest.Options{})), pinned(t, l))
	if r.Verdict != verify.Verified || passes(r, "checkpoint.anchor") {
		t.Errorf("%s, %v", r.Verdict, failedIDs(r))
	}
	if !slices.ContainsFunc(r.Checks(), func(c check.Check) bool { return c.ID == "checkpoint.anchor" && c.Outcome == check.NotChecked }) {
		t.Error("nobody says that the checkpoints are unanchored")
	}
}

// A plan that names a checkpoint by its digest.
func TestResumedFromANamedCheckpoint(t *testing.T) {
	l := newLab(t)
	from := newJob(t, l, bundletest.Options{ID: "job-1"})
	c := must2(from.Checkpoint(1, "", nil))(t)
	for name, tc := range map[string]struct {
		named plan.Digest
		want  string
	}{"the one that the plan names": {c.Digest, ""}, "another": {plan.Sum([]byte("x")), "resume.digest"}} {
		j := newJob(t, l, bundletest.Options{ID: "job-2", Resume: string(tc.named)})
		other := resumedJob(t, l, false, nil)
		j.Parts[bundle.ResumePart] = other.Parts[bundle.ResumePart]
		edit(bundle.ResumePart, func(r *bundle.Resume) {
			// The record and its key are the first job's; the broker says nothing of it.
			r.Point, r.Record, r.Signature, r.SessionKey = "", c.Record, c.Signature, must2(from.SessionDER())(t)
		})(t, j)
		edit(bundle.Trace, func(l *[]bundle.Event) {
			*l = slices.Insert(*l, 1, bundle.Event{Sequence: 2, UnixNano: (*l)[0].UnixNano, Kind: bundle.EventResumed, Digest: string(c.Digest)})
			for i := range *l {
				(*l)[i].Sequence = uint64(i + 1)
			}
		})(t, j)
		r := verify.Verify(build(t, j), pinned(t, l))
		if tc.want == "" && r.Verdict != verify.Verified || tc.want != "" && !slices.Contains(failedIDs(r), tc.want) {
			t.Errorf("%s: %s, failed %v", name, r.Verdict, failedIDs(r))
		}
	}
}
