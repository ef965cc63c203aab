package broker_test

import (
	"bytes"
	"errors"
	"testing"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// resumed asks where a job goes on from and checks the answer.
func (w *world) resumed(t *testing.T, j *job) receipt.ResumePoint {
	t.Helper()
	challenge := bytes.Repeat([]byte{7}, receipt.ChallengeSize)
	token := must[string](t)(w.ResumeCheckpoint(t.Context(), node, j.result.JobID, "ckpt", challenge))
	return must[receipt.ResumePoint](t)(receipt.VerifyResumePoint(w.brokerKeys, token, j.result.JobID, j.result.PlanDigest, "ckpt", challenge))
}

func TestResumeCheckpoint(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, alice, "ckpt", broker.KindCheckpoints)
	w.asset(t, alice, "other", broker.KindCheckpoints)
	g := w.grant(t, func(n *broker.NewGrant) { n.Assets = []string{"ckpt"}; n.MaxReleases = 9 })
	run := func(name string) *job {
		j := newJob(t, w, func(r *receipt.Result) { r.JobID = name })
		must[broker.Answer](t)(j.release(t, w.Broker, g, "ckpt"))
		return j
	}
	commit := func(j *job, seq uint64, content string, parent plan.Digest) (plan.Digest, error) {
		rec, sig, digest := j.record(t, func(r *receipt.CheckpointRecord) {
			r.Sequence, r.Digest, r.Parent = seq, plan.Sum([]byte(content)), parent
		})
		_, err := w.CountersignCheckpoint(t.Context(), node, j.result.JobID, rec, sig)
		return digest, err
	}
	a := run("job-a")
	if p := w.resumed(t, a); !p.Nothing() || p.From != "" {
		t.Fatalf("the first job of a plan resumes from %+v", p)
	}
	one := must[plan.Digest](t)(commit(a, 1, "1", ""))
	two := must[plan.Digest](t)(commit(a, 2, "2", one))
	if p := w.resumed(t, a); p.From != "job-a" || p.Sequence != 2 || p.Digest != two {
		t.Errorf("a job that is tried again resumes from %+v", p)
	}

	b := run("job-b")
	if p := w.resumed(t, b); p.From != "job-a" || p.Sequence != 2 || p.Digest != two || p.Record.Bytes() == nil {
		t.Fatalf("the second job resumes from %+v", p)
	}
	if _, err := commit(a, 3, "3", two); !refusedWith(err, "checkpoint.fork") {
		t.Errorf("the job that was resumed from goes on: %v", err)
	}
	for name, tc := range map[string]struct {
		seq     uint64
		parent  plan.Digest
		content string
		want    string
	}{
		"from the beginning":       {1, "", "b", "checkpoint.rollback"},
		"from an older checkpoint": {2, one, "b", "checkpoint.fork"},
		"with another parent":      {3, one, "b", "checkpoint.fork"},
		"after a gap":              {4, two, "b", "checkpoint.gap"},
	} {
		if _, err := commit(b, tc.seq, tc.content, tc.parent); !refusedWith(err, tc.want) {
			t.Errorf("%s: %v, want %s", name, err, tc.want)
		}
	}
	three := must[plan.Digest](t)(commit(b, 3, "b3", two))

	// A job that makes nothing hands on what it got, from whoever made it.
	must[plan.Digest](t)(three, nil)
	c := run("job-c")
	if p := w.resumed(t, c); p.From != "job-b" || p.Digest != three {
		t.Errorf("the third job resumes from %+v", p)
	}
	d := run("job-d")
	p := w.resumed(t, d)
	if p.From != "job-b" || p.Sequence != 3 || p.Digest != three {
		t.Errorf("after a job that made nothing, the fourth resumes from %+v", p)
	}
	entries := must[[]translog.Entry](t)(w.Entries(t.Context(), node, "job-d"))
	bodies := must[[]translog.Body](t)(translog.VerifyJob(brokerID, "job-d", entries))
	if last := bodies[len(bodies)-1]; last.Kind != translog.KindResume || last.Index != p.LogIndex || last.Resume.From != "job-b" || last.Resume.Digest != three || last.Resume.Record != p.Record {
		t.Errorf("the log says %+v", last)
	}
	if again := w.resumed(t, d); again.LogIndex != p.LogIndex {
		t.Error("asked again, the line was taken once more")
	}
	// Whoever lost the line gets it back only as another job.
	challenge := make([]byte, receipt.ChallengeSize)
	if _, err := w.ResumeCheckpoint(t.Context(), node, "job-b", "ckpt", challenge); !refusedWith(err, "resume.started") {
		t.Errorf("a job whose line another took: %v", err)
	}

	for name, tc := range map[string]struct {
		agent      broker.Actor
		job, asset string
		challenge  []byte
		want       string // check id, or "" for ErrInvalid
	}{
		"by another agent":    {stranger, "job-d", "ckpt", challenge, "resume.lease"},
		"without a lease":     {node, "job-9", "ckpt", challenge, "resume.lease"},
		"by an engineer":      {erin, "job-d", "ckpt", challenge, "role"},
		"under another asset": {node, "job-d", "other", challenge, "resume.asset"},
		"without a challenge": {node, "job-d", "ckpt", nil, ""},
		"without an asset":    {node, "job-d", "", challenge, ""},
	} {
		token, err := w.ResumeCheckpoint(t.Context(), tc.agent, tc.job, tc.asset, tc.challenge)
		if tc.want == "" && !errors.Is(err, broker.ErrInvalid) || tc.want != "" && !refusedWith(err, tc.want) || token != "" {
			t.Errorf("%s: %q, %v, want %s", name, token, err, tc.want)
		}
	}
}
