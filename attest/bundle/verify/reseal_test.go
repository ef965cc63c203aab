package verify_test

import (
	"encoding/json"
	"slices"
	"testing"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

func TestResealedJob(t *testing.T) {
	l := newLab(t)
	r := verify.Verify(build(t, newJob(t, l, bundletest.Options{Reseal: true})), pinned(t, l))
	if r.Verdict != verify.Verified {
		dump(t, r)
		t.Fatalf("%s: %s", r.Verdict, r.Summary)
	}
	for _, id := range []string{"reseal.signature", "reseal.job", "reseal.plan", "reseal.from", "reseal.to", "reseal.files", "reseal.countersignature", "log.reseal", "outcome.timeline", "release.complete"} {
		if !passes(r, id) {
			t.Errorf("%s does not pass", id)
		}
	}
}

// The asset of an exported checkpoint has no digest: the plan has the checkpoint's.
func TestExportedCheckpoint(t *testing.T) {
	l := newLab(t)
	r := verify.Verify(build(t, newJob(t, l, bundletest.Options{Reseal: true, Export: true})), pinned(t, l))
	if r.Verdict != verify.Verified {
		dump(t, r)
		t.Fatalf("%s: %s", r.Verdict, r.Summary)
	}
	for _, id := range []string{"reseal.from", "reseal.to", "reseal.countersignature", "release.complete"} {
		if !passes(r, id) {
			t.Errorf("%s does not pass", id)
		}
	}
}

// Each lie here is told by an agent that has the job's key and the broker's answer
// to it, so that the one check named stands against it.
func TestResealLies(t *testing.T) {
	l := newLab(t)
	about := func(f func(*receipt.Resealing)) func(*receipt.ResealRecord) {
		return func(r *receipt.ResealRecord) { f(&r.Resealing) }
	}
	file := func(f func(*receipt.ResealFile)) func(int, *receipt.ResealFile) {
		return func(i int, r *receipt.ResealFile) {
			if i == 1 {
				f(r)
			}
		}
	}
	for name, tc := range map[string]struct {
		file   func(int, *receipt.ResealFile)
		record func(*receipt.ResealRecord)
		part   func(*testing.T, *bundletest.Job, *bundle.Reseal)
		want   string
	}{
		"the record of another job":         {record: about(func(r *receipt.Resealing) { r.JobID = "job-9" }), want: "reseal.job"},
		"the record of another plan":        {record: about(func(r *receipt.Resealing) { r.Plan = plan.Sum(nil) }), want: "reseal.plan"},
		"another source":                    {record: about(func(r *receipt.Resealing) { r.From = "dataset" }), want: "reseal.from"},
		"another digest of the source":      {record: about(func(r *receipt.Resealing) { r.FromDigest = plan.Sum(nil) }), want: "reseal.from"},
		"another target":                    {record: about(func(r *receipt.Resealing) { r.To = "weights-3" }), want: "reseal.to"},
		"a file of another job":             {file: file(func(r *receipt.ResealFile) { r.JobID = "job-9" }), want: "reseal.file.job"},
		"a file of another plan":            {file: file(func(r *receipt.ResealFile) { r.Plan = plan.Sum(nil) }), want: "reseal.file.plan"},
		"a file of another source":          {file: file(func(r *receipt.ResealFile) { r.From = "dataset" }), want: "reseal.file.from"},
		"a file under another key":          {file: file(func(r *receipt.ResealFile) { r.To = "weights-3" }), want: "reseal.file.to"},
		"one file twice":                    {file: file(func(r *receipt.ResealFile) { r.ID = "000001" }), want: "reseal.file.order"},
		"more bytes than the files have":    {record: func(r *receipt.ResealRecord) { r.Bytes++ }, want: "reseal.files"},
		"more files than there are":         {record: func(r *receipt.ResealRecord) { r.Files++ }, want: "reseal.files"},
		"a digest of other records":         {record: func(r *receipt.ResealRecord) { r.Records = plan.Sum(nil) }, want: "reseal.files"},
		"a file left out":                   {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Files = p.Files[:1] }, want: "reseal.files"},
		"all files left out":                {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Files = nil }, want: "reseal.files"},
		"a file that nobody signed":         {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Files[1].Signature[10] ^= 1 }, want: "reseal.files"},
		"a record that nobody signed":       {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Signature[10] ^= 1 }, want: "reseal.signature"},
		"a record signed as something else": {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Signature = p.Files[0].Signature }, want: "reseal.signature"},
		"no word of the broker's":           {part: func(_ *testing.T, _ *bundletest.Job, p *bundle.Reseal) { p.Receipt = "" }, want: "reseal.countersignature"},
		"the broker's word on another digest": {part: func(t *testing.T, j *bundletest.Job, p *bundle.Reseal) {
			p.Receipt = must2(j.CommitReseal(p.Record, func(w *receipt.Resealed) { w.Digest = plan.Sum(nil) }))(t)
		}, want: "reseal.countersignature"},
		"the broker's word on another asset": {part: func(t *testing.T, j *bundletest.Job, p *bundle.Reseal) {
			p.Receipt = must2(j.CommitReseal(p.Record, func(w *receipt.Resealed) { w.Asset = "weights-3" }))(t)
		}, want: "reseal.countersignature"},
		"a digest that was set twice": {part: func(t *testing.T, j *bundletest.Job, p *bundle.Reseal) {
			must2(j.CommitReseal(p.Record, nil))(t)
		}, want: "log.reseal"},
		"a second re-sealing in the log": {part: func(t *testing.T, j *bundletest.Job, _ *bundle.Reseal) {
			must2(j.Logged(translog.Body{Kind: translog.KindReseal, Reseal: &translog.Reseal{Plan: j.Plan, From: "weights", FromDigest: plan.Sum(nil), Asset: "weights-3", Digest: plan.Sum(nil), Record: plan.Sum(nil)}}))(t)
		}, want: "log.reseal"},
		"the broker's word on another entry": {part: func(t *testing.T, j *bundletest.Job, p *bundle.Reseal) {
			entries := slices.Clone(j.Log.Entries)
			p.Receipt = must2(j.CommitReseal(p.Record, func(w *receipt.Resealed) { w.LogIndex++ }))(t)
			j.Log.Entries = entries
		}, want: "log.reseal"},
	} {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{Reseal: true})
			// The true one's entry goes with it.
			j.Log.Entries = j.Log.Entries[:len(j.Log.Entries)-1]
			p := must2(j.Resealed(tc.file, tc.record))(t)
			if tc.part != nil {
				tc.part(t, j, &p)
			}
			j.Parts[bundle.ResealPart] = must2(plan.Canonical(p))(t)
			r := verify.Verify(build(t, j), pinned(t, l))
			if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), tc.want) {
				t.Errorf("%s, failed %v, want %s", r.Verdict, failedIDs(r), tc.want)
			}
		})
	}
}

func TestResealPartWhereItDoesNotBelong(t *testing.T) {
	l := newLab(t)
	resealed := newJob(t, l, bundletest.Options{Reseal: true})
	usual := newJob(t, l, bundletest.Options{ID: "job-2"})
	usual.Parts[bundle.ResealPart] = resealed.Parts[bundle.ResealPart]
	if r := verify.Verify(build(t, usual), pinned(t, l)); !slices.Contains(failedIDs(r), "reseal.plan") {
		t.Errorf("in the record of a job with a container: %s, failed %v", r.Verdict, failedIDs(r))
	}
	without := newJob(t, l, bundletest.Options{Reseal: true})
	delete(without.Parts, bundle.ResealPart)
	if r := verify.Verify(build(t, without), pinned(t, l)); !slices.Contains(failedIDs(r), "reseal.record") || !slices.Contains(failedIDs(r), "log.reseal") {
		t.Errorf("left out: %s, failed %v", r.Verdict, failedIDs(r))
	}
	for name, events := range map[string][]bundle.Event{
		"a container's start": {{Sequence: 1, UnixNano: 1, Kind: bundle.EventContainerStart}},
		"a program":           {{Sequence: 1, UnixNano: 1, Kind: bundle.EventExec}},
	} {
		watched := newJob(t, l, bundletest.Options{Reseal: true})
		watched.Parts[bundle.Trace] = must2(json.Marshal(events))(t)
		if r := verify.Verify(build(t, watched), pinned(t, l)); !slices.Contains(failedIDs(r), "trace.start") {
			t.Errorf("%s: %s, failed %v", name, r.Verdict, failedIDs(r))
		}
	}
	for part, want := range map[bundle.Part]string{bundle.HolderStatus: "reseal.holder-status", bundle.Trace: "reseal.trace"} {
		bare := newJob(t, l, bundletest.Options{Reseal: true})
		delete(bare.Parts, part)
		if r := verify.Verify(build(t, bare), pinned(t, l)); !slices.Contains(failedIDs(r), want) {
			t.Errorf("without %s: %s, failed %v", part, r.Verdict, failedIDs(r))
		}
	}
}
