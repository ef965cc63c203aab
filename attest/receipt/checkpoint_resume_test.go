package receipt_test

import (
	"crypto/elliptic"
	"errors"
	"testing"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// TestVerifyResumePoint: in each row one thing alone is wrong, and one check finds it.
func TestVerifyResumePoint(t *testing.T) {
	s, keys := signerAndKeys(t, "broker.test")
	other, _ := signerAndKeys(t, "broker.test")
	p, d := plan.Sum([]byte("plan")), plan.Sum([]byte("d"))
	challenge := make([]byte, receipt.ChallengeSize)
	good := receipt.ResumePoint{Issuer: "broker.test", IssuedAt: 1, JobID: "b", Plan: p, Asset: "ckpt", Challenge: challenge, From: "a", Sequence: 5, Digest: d, Record: d}
	for name, tc := range map[string]struct {
		signer *receipt.Signer
		change func(*receipt.ResumePoint)
		want   string
	}{
		"good":                                {s, func(*receipt.ResumePoint) {}, ""},
		"nothing to resume from":              {s, func(r *receipt.ResumePoint) { r.From, r.Sequence, r.Digest, r.Record = "", 0, "", "" }, ""},
		"another key's":                       {other, func(*receipt.ResumePoint) {}, "resume.signature"},
		"another job's":                       {s, func(r *receipt.ResumePoint) { r.JobID = "c" }, "resume.job"},
		"another plan's":                      {s, func(r *receipt.ResumePoint) { r.Plan = d }, "resume.plan"},
		"another asset's":                     {s, func(r *receipt.ResumePoint) { r.Asset = "weights" }, "resume.asset"},
		"an old answer":                       {s, func(r *receipt.ResumePoint) { r.Challenge = make([]byte, receipt.ChallengeSize); r.Challenge[0] = 1 }, "resume.challenge"},
		"no number but a digest":              {s, func(r *receipt.ResumePoint) { r.Sequence = 0 }, "resume.form"},
		"no digest":                           {s, func(r *receipt.ResumePoint) { r.Digest = "" }, "resume.form"},
		"no record":                           {s, func(r *receipt.ResumePoint) { r.Record = "x" }, "resume.form"},
		"no job that made it":                 {s, func(r *receipt.ResumePoint) { r.From = "" }, "resume.form"},
		"a countersignature, not an answer":   {nil, nil, "resume.signature"},
		"nothing, but with the job that made": {s, func(r *receipt.ResumePoint) { r.Sequence, r.Digest, r.Record = 0, "", "" }, "resume.form"},
	} {
		t.Run(name, func(t *testing.T) {
			var token string
			var err error
			if tc.signer == nil {
				token, err = s.Sign(receipt.TypeCheckpointHead, good)
			} else {
				r := good
				tc.change(&r)
				token, err = tc.signer.Sign(receipt.TypeResumePoint, r)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, err := receipt.VerifyResumePoint(keys, token, "b", p, "ckpt", challenge)
			onlyFailed(t, err, tc.want)
			if (err == nil) != (got.JobID != "") {
				t.Errorf("%+v, %v", got, err)
			}
		})
	}
	token, err := s.Sign(receipt.TypeResumePoint, good)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := receipt.VerifyResumePoint(keys, token, "b", p, "ckpt", nil); err == nil {
		t.Error("an answer to no challenge is taken")
	}
}

func TestVerifyCheckpointHead(t *testing.T) {
	s, keys := signerAndKeys(t, "broker.test")
	other, _ := signerAndKeys(t, "broker.test")
	record := []byte(`{"the":"record"}`)
	d := plan.Sum([]byte("d"))
	r := receipt.CheckpointRecord{JobID: "a", Plan: d, Asset: "ckpt", Sequence: 5, Digest: d}
	good := receipt.CheckpointHead{Issuer: "broker.test", IssuedAt: 1, JobID: "a", Plan: d, Asset: "ckpt", Sequence: 5, Digest: d, Record: plan.Sum(record)}
	x := plan.Sum([]byte("x"))
	for name, tc := range map[string]struct {
		signer *receipt.Signer
		change func(*receipt.CheckpointHead)
		want   string
	}{
		"good":             {s, func(*receipt.CheckpointHead) {}, ""},
		"another key's":    {other, func(*receipt.CheckpointHead) {}, "checkpoint.countersignature"},
		"another record's": {s, func(h *receipt.CheckpointHead) { h.Record = x }, "checkpoint.countersigned-record"},
		"another digest":   {s, func(h *receipt.CheckpointHead) { h.Digest = x }, "checkpoint.countersigned-digest"},
		"another number":   {s, func(h *receipt.CheckpointHead) { h.Sequence = 4 }, "checkpoint.countersigned-sequence"},
		"another job's":    {s, func(h *receipt.CheckpointHead) { h.JobID = "b" }, "checkpoint.countersigned-job"},
		"another plan's":   {s, func(h *receipt.CheckpointHead) { h.Plan = x }, "checkpoint.countersigned-plan"},
		"another asset's":  {s, func(h *receipt.CheckpointHead) { h.Asset = "x" }, "checkpoint.countersigned-asset"},
	} {
		t.Run(name, func(t *testing.T) {
			h := good
			tc.change(&h)
			token, err := tc.signer.Sign(receipt.TypeCheckpointHead, h)
			if err != nil {
				t.Fatal(err)
			}
			_, err = receipt.VerifyCheckpointHead(keys, token, record, r)
			onlyFailed(t, err, tc.want)
		})
	}
}

func signerAndKeys(t *testing.T, id string) (*receipt.Signer, receipt.Keys) {
	t.Helper()
	s, err := receipt.NewSigner(id, newKey(t, elliptic.P384()))
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := receipt.ParseKeys(id, jwks)
	if err != nil {
		t.Fatal(err)
	}
	return s, keys
}

// onlyFailed wants a refusal by one check and no other, or success if id is empty.
func onlyFailed(t *testing.T, err error, id string) {
	t.Helper()
	if id == "" {
		if err != nil {
			t.Error(err)
		}
		return
	}
	var refusal *check.Refusal
	if !errors.As(err, &refusal) || len(refusal.Checks.Failed()) != 1 || refusal.Checks.Failed()[0].ID != id {
		t.Errorf("got %v, want a refusal by %s alone", err, id)
	}
}
