package verify_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/bundle/verify"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
	"github.com/coffer-run/coffer/attest/translog"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// Minting RSA roots takes seconds, so that all tests share one machine.
var machine = sync.OnceValues(func() (*simulate.Vendor, error) {
	return simulate.New(simulate.Options{Now: clock})
})

func newLab(t testing.TB) *bundletest.Lab {
	t.Helper()
	v, err := machine()
	if err != nil {
		t.Fatal(err)
	}
	l, err := bundletest.On(v.Chip(), v.GPUs(), v.Anchors(), clock)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func newJob(t testing.TB, l *bundletest.Lab, o bundletest.Options) *bundletest.Job {
	t.Helper()
	j, err := l.Job(o)
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func build(t testing.TB, j *bundletest.Job) []byte {
	t.Helper()
	b, err := j.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func pinned(t testing.TB, l *bundletest.Lab) verify.Trust {
	t.Helper()
	vk, err := l.Verifier.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	bk, err := l.Broker.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	return verify.Trust{Anchors: l.Anchors, VerifierKeys: vk, BrokerKeys: bk}
}

func failedIDs(r verify.Report) []string {
	var out []string
	for _, c := range r.Checks().Failed() {
		out = append(out, c.ID)
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func outcomes(r verify.Report, id string) []check.Outcome {
	var out []check.Outcome
	for _, c := range r.Checks() {
		if c.ID == id {
			out = append(out, c.Outcome)
		}
	}
	return out
}

func dump(t testing.TB, r verify.Report) {
	t.Helper()
	for _, g := range r.Groups {
		for _, c := range g.Checks {
			if c.Outcome != check.Pass {
				t.Logf("%-12s %-11s %-24s expected %q found %q", g.Name, c.Outcome, c.ID, c.Expected, c.Found)
			}
		}
	}
	t.Log(r.Verdict, r.Summary)
}

func TestVerify(t *testing.T) {
	l := newLab(t)
	file := build(t, newJob(t, l, bundletest.Options{}))

	t.Run("with pinned keys", func(t *testing.T) {
		r := verify.Verify(file, pinned(t, l))
		if r.Verdict != verify.Verified || !r.Simulated || !r.At.Equal(clock) {
			dump(t, r)
			t.Fatalf("verdict %s, simulated %t, at %s", r.Verdict, r.Simulated, r.At)
		}
		for _, id := range []string{"statement.signature", "result.signature", "release.signature", "log.receipt", "tpm.ak-credential", "snp.signature", "gpu.signature", "tpm.signature", "policy.known", "checkpoint.signature", "log.releases", "trace.start"} {
			for _, o := range append(outcomes(r, id), outcomes(r, id)...) {
				if o != check.Pass {
					t.Errorf("%s: %s", id, o)
				}
			}
			if len(outcomes(r, id)) == 0 {
				t.Errorf("%s: not made", id)
			}
		}
	})
	t.Run("keys that are not pinned pass nothing", func(t *testing.T) {
		r := verify.Verify(file, verify.Trust{Anchors: l.Anchors})
		if r.Verdict != verify.Unknown {
			dump(t, r)
			t.Fatal(r.Verdict)
		}
		for _, id := range []string{"log.releases", "result.signature", "release.signature", "log.receipt", "tpm.ak-credential", "result.status", "policy.tpm.trust-class"} {
			if len(outcomes(r, id)) == 0 {
				t.Errorf("%s: not reported", id)
			}
			for _, o := range outcomes(r, id) {
				if o != check.NotChecked {
					t.Errorf("%s: %s", id, o)
				}
			}
		}
	})
	t.Run("other keys than the pinned", func(t *testing.T) {
		other := pinned(t, newLab(t))
		other.Anchors = l.Anchors
		r := verify.Verify(file, other)
		want := []string{"log.receipt", "release.complete", "release.signature", "result.signature", "tpm.ak-credential"}
		for _, id := range want {
			if !slices.Contains(failedIDs(r), id) {
				t.Errorf("%s did not fail: %v", id, failedIDs(r))
			}
		}
	})
	t.Run("under the vendors' anchors", func(t *testing.T) {
		trust := pinned(t, l)
		trust.Anchors = anchor.Vendor()
		r := verify.Verify(file, trust)
		if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), "snp.chain") || !slices.Contains(failedIDs(r), "gpu.chain") {
			t.Errorf("verdict %s, failed %v", r.Verdict, failedIDs(r))
		}
	})
	t.Run("under no anchors", func(t *testing.T) {
		r := verify.Verify(file, verify.Trust{})
		if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), "evidence.anchors") {
			t.Errorf("verdict %s, failed %v", r.Verdict, failedIDs(r))
		}
	})
	t.Run("at a time before the certificates", func(t *testing.T) {
		trust := pinned(t, l)
		trust.At = clock.AddDate(-1, 0, 0)
		r := verify.Verify(file, trust)
		if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), "snp.chain-validity") {
			t.Errorf("verdict %s, failed %v", r.Verdict, failedIDs(r))
		}
	})
	t.Run("not a bundle", func(t *testing.T) {
		r := verify.Verify([]byte("not a bundle"), pinned(t, l))
		if r.Verdict != verify.Failed || !slices.Equal(failedIDs(r), []string{"bundle.form"}) {
			t.Errorf("verdict %s, failed %v", r.Verdict, failedIDs(r))
		}
	})
}

func TestVerifyRefusals(t *testing.T) {
	l := newLab(t)
	t.Run("refused at verify", func(t *testing.T) {
		r := verify.Verify(build(t, newJob(t, l, bundletest.Options{FlipGPU: true})), pinned(t, l))
		if r.Verdict != verify.Verified || !strings.Contains(r.Summary, "refused at verify for gpu.") {
			dump(t, r)
			t.Fatal(r.Verdict, r.Summary)
		}
		if o := outcomes(r, "evidence.refusal"); !slices.Equal(o, []check.Outcome{check.Pass}) {
			t.Errorf("evidence.refusal: %v", o)
		}
	})
	for name, o := range map[string]bundletest.Options{
		"sandbox.profile":      {OtherRuntime: true},
		"policy.snp.simulated": {Policy: "production"},
	} {
		t.Run("refused for "+name, func(t *testing.T) {
			r := verify.Verify(build(t, newJob(t, l, o)), pinned(t, l))
			if r.Verdict != verify.Verified || !strings.Contains(r.Summary, "refused at verify for "+name) {
				dump(t, r)
				t.Fatal(r.Verdict, r.Summary)
			}
		})
	}
	t.Run("refused before there was evidence", func(t *testing.T) {
		r := verify.Verify(build(t, newJob(t, l, bundletest.Options{RefuseAdmit: true})), pinned(t, l))
		if r.Verdict != verify.Unknown {
			dump(t, r)
			t.Fatal(r.Verdict, r.Summary)
		}
	})
	t.Run("refused for evidence that is not genuine", func(t *testing.T) {
		file := build(t, newJob(t, l, bundletest.Options{FlipSNP: true}))
		if r := verify.Verify(file, pinned(t, l)); r.Verdict != verify.Verified || !strings.Contains(r.Summary, "snp.signature") {
			dump(t, r)
			t.Error("the pinned verifier's refusal is not believed")
		}
		// Anyone can make such evidence, and a result about it.
		if r := verify.Verify(file, verify.Trust{Anchors: l.Anchors}); r.Verdict != verify.Unknown {
			dump(t, r)
			t.Errorf("verdict %s without anything to believe", r.Verdict)
		}
	})
	t.Run("evidence without a CPU", func(t *testing.T) {
		r := verify.Verify(build(t, newJob(t, l, bundletest.Options{OmitSNP: true})), verify.Trust{Anchors: l.Anchors})
		if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), "evidence.root") {
			dump(t, r)
			t.Errorf("verdict %s, failed %v", r.Verdict, failedIDs(r))
		}
	})
	t.Run("a refusal that the verifier did not sign", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{FlipGPU: true})
		j.Outcome.Checks = nil
		r := verify.Verify(build(t, j), pinned(t, l))
		if !slices.Contains(failedIDs(r), "outcome.refusal") {
			dump(t, r)
			t.Error("a hidden reason was not found")
		}
	})
	t.Run("evidence that fails and a result that does not say so", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{FlipGPU: true})
		if err := j.SignResult(func(r *receipt.Result) {
			r.Submods = map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}, "tpm0": {Status: receipt.Affirming}, "gpu0": {Status: receipt.Affirming}}
		}); err != nil {
			t.Fatal(err)
		}
		r := verify.Verify(build(t, j), pinned(t, l))
		if !slices.Contains(failedIDs(r), "gpu.signature") && !slices.Contains(failedIDs(r), "gpu.parse") {
			dump(t, r)
			t.Error("the evidence was not appraised again")
		}
	})
}

// Whoever has the file, and no key, can change nothing.
func TestTamperFile(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, bundletest.Options{})
	file := build(t, j)
	other := newJob(t, l, bundletest.Options{ID: "job-2"})
	otherFile, err := bundle.Parse(build(t, other))
	if err != nil {
		t.Fatal(err)
	}
	trust := pinned(t, l)

	tamper := func(name, want string, change func(*bundle.Bundle)) {
		t.Run(name, func(t *testing.T) {
			b, err := bundle.Parse(file)
			if err != nil {
				t.Fatal(err)
			}
			change(b)
			out, err := plan.Canonical(b)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(out, file) {
				t.Fatal("nothing was changed")
			}
			r := verify.Verify(out, trust)
			if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), want) {
				t.Errorf("verdict %s, failed %v, want %s", r.Verdict, failedIDs(r), want)
			}
		})
	}
	for _, p := range bundle.Parts() {
		body, there := otherFile.Parts[p]
		if !there {
			continue // TestTamperCorpus has a job with more parts
		}
		tamper("part removed/"+string(p), "part."+string(p), func(b *bundle.Bundle) { delete(b.Parts, p) })
		tamper("one byte changed/"+string(p), "part."+string(p), func(b *bundle.Bundle) { b.Parts[p][len(b.Parts[p])/2] ^= 1 })
		if !bytes.Equal(body, j.Parts[p]) {
			tamper("part of another job/"+string(p), "part."+string(p), func(b *bundle.Bundle) { b.Parts[p] = body })
		}
	}
	tamper("extra part", "part.unknown", func(b *bundle.Bundle) { b.Parts["extra"] = []byte("x") })
	tamper("releases reordered", "part.releases", func(b *bundle.Bundle) { b.Parts[bundle.Releases] = reversed(t, b.Parts[bundle.Releases]) })
	tamper("checkpoints reordered", "part.checkpoints", func(b *bundle.Bundle) { b.Parts[bundle.Checkpoints] = reversed(t, b.Parts[bundle.Checkpoints]) })
	tamper("signature removed", "statement.signature", func(b *bundle.Bundle) { b.Signature = nil })
	tamper("signature of another job", "statement.signature", func(b *bundle.Bundle) { b.Signature = otherFile.Signature })
	tamper("statement of another job", "statement.signature", func(b *bundle.Bundle) { b.Statement = otherFile.Statement })
	tamper("log removed", "log.receipt", func(b *bundle.Bundle) { b.Log = nil })
	tamper("log receipt changed", "log.receipt", func(b *bundle.Bundle) { b.Log.Receipt = b.Log.Receipt[:len(b.Log.Receipt)-4] + "AAAA" })
	tamper("log receipt of another job", "log.statement", func(b *bundle.Bundle) { b.Log = otherFile.Log })
	tamper("log entry removed", "log.entries", func(b *bundle.Bundle) { b.Log.Entries = b.Log.Entries[1:] })
	tamper("last log entry removed", "log.included", func(b *bundle.Bundle) { b.Log.Entries = b.Log.Entries[:len(b.Log.Entries)-1] })
	tamper("log entries reordered", "log.entries", func(b *bundle.Bundle) {
		b.Log.Entries[0], b.Log.Entries[1] = b.Log.Entries[1], b.Log.Entries[0]
	})
	tamper("log entry changed", "log.entries", func(b *bundle.Bundle) {
		b.Log.Entries[0].Body = bytes.Replace(b.Log.Entries[0].Body, []byte("dataset"), []byte("dataser"), 1)
	})

	fields := map[string]func(*bundle.Statement){
		"job":           func(s *bundle.Statement) { s.JobID = "job-9" },
		"plan digest":   func(s *bundle.Statement) { s.PlanDigest = plan.Sum([]byte("x")) },
		"part digest":   func(s *bundle.Statement) { s.Parts[bundle.Trace] = plan.Sum([]byte("x")) },
		"part left out": func(s *bundle.Statement) { delete(s.Parts, bundle.JobFile) },
		"state":         func(s *bundle.Statement) { s.Outcome.State = bundle.Failed },
		"exit code":     func(s *bundle.Statement) { s.Outcome.ExitCode = 7 },
		"reason":        func(s *bundle.Statement) { s.Outcome.Reason = "x" },
		"stage":         func(s *bundle.Statement) { s.Outcome.Stage = bundle.StageEvidence },
		"start time":    func(s *bundle.Statement) { s.Timeline[0].StartUnixNano -= 1 << 20 },
		"duration":      func(s *bundle.Statement) { s.Timeline[0].Nanos-- },
		"step":          func(s *bundle.Statement) { s.Timeline = s.Timeline[1:] },
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		tamper("statement changed/"+name, "statement.signature", func(b *bundle.Bundle) {
			s, err := bundle.ParseStatement(b.Statement)
			if err != nil {
				t.Fatal(err)
			}
			fields[name](&s)
			if b.Statement, err = plan.Canonical(s); err != nil {
				t.Fatal(err)
			}
		})
	}

	// A sample of bits of the file, whatever they are.
	t.Run("any bit", func(t *testing.T) {
		mutatetest.Run(t, mutatetest.Target{
			Kind: "bundle", Good: file, MaxAlloc: 16 << 20, Every: 8*len(file)/150 | 1,
			Accepts: func(b []byte) bool { return verify.Verify(b, trust).Verdict != verify.Failed },
		})
	})
}

func reversed(t *testing.T, b []byte) []byte {
	t.Helper()
	var list []json.RawMessage
	if err := json.Unmarshal(b, &list); err != nil {
		t.Fatal(err)
	}
	slices.Reverse(list)
	out, err := plan.Canonical(list)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// An agent that lies can have its lies signed by the job's key and logged. What
// it says must still agree with what devices, verifier, broker and holder signed.
func TestLyingAgent(t *testing.T) {
	l := newLab(t)
	good := build(t, newJob(t, l, bundletest.Options{}))
	trust := pinned(t, l)
	if r := verify.Verify(good, trust); r.Verdict != verify.Verified {
		t.Fatal(r.Summary)
	}
	other := newJob(t, l, bundletest.Options{ID: "job-2"})

	tests := []struct {
		name, want string
		lie        func(t *testing.T, j *bundletest.Job)
	}{
		{"plan of another job", "plan.digest", swap(other, bundle.Plan)},
		{"plan and digest of another job", "plan.evidence", func(t *testing.T, j *bundletest.Job) {
			j.Parts[bundle.Plan], j.Plan = other.Parts[bundle.Plan], other.Plan
		}},
		{"sandbox of another job", "sandbox.evidence", swap(other, bundle.Sandbox)},
		{"evidence of another job", "statement.signature", swap(other, bundle.Evidence)},
		{"evidence of another job, sandbox", "evidence.job", swap(other, bundle.Evidence, bundle.Sandbox)},
		{"result of another job", "result.job", swap(other, bundle.Result)},
		{"result of another job, evidence", "result.evidence", swap(other, bundle.Result)},
		{"result of another job, keys", "result.session-key", swap(other, bundle.Result)},
		{"result of another job, recipient", "result.recipient-key", swap(other, bundle.Result)},
		{"result of another job, nonce", "result.nonce", swap(other, bundle.Result)},
		{"releases of another job", "release.job", swap(other, bundle.Releases)},
		{"checkpoints of another job", "checkpoint.signature", swap(other, bundle.Checkpoints)},
		{"another job's id", "evidence.job", func(_ *testing.T, j *bundletest.Job) { j.ID = "job-9" }},
		{"other runtime", "sandbox.agent", edit(bundle.AgentPart, func(a *bundle.Agent) { a.Runtime = "runc" })},
		{"stage without its part", "part.trace", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.Trace) }},
		{"evidence withheld", "part.evidence", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.Evidence) }},
		{"result that refuses", "result.status", func(t *testing.T, j *bundletest.Job) {
			resign(t, j, func(r *receipt.Result) {
				r.Submods = maps.Clone(r.Submods)
				r.Submods["gpu0"] = receipt.Appraisal{Status: receipt.Contraindicated}
			})
		}},
		{"result without a device", "evidence.devices", func(t *testing.T, j *bundletest.Job) {
			resign(t, j, func(r *receipt.Result) {
				r.Submods = maps.Clone(r.Submods)
				delete(r.Submods, "gpu0")
			})
		}},
		{"result that lives long", "result.lifetime", func(t *testing.T, j *bundletest.Job) {
			resign(t, j, func(r *receipt.Result) { r.Expires += 3600 })
		}},
		{"result by another policy", "result.policy", func(t *testing.T, j *bundletest.Job) {
			resign(t, j, func(r *receipt.Result) { r.Policy.Name = "production" })
		}},
		{"result that hides simulation", "evidence.simulated", func(t *testing.T, j *bundletest.Job) {
			resign(t, j, func(r *receipt.Result) { r.Simulated = false })
		}},
		{"result of another hour", "outcome.time", func(_ *testing.T, j *bundletest.Job) {
			for i := range j.Timeline {
				j.Timeline[i].StartUnixNano += int64(time.Hour)
			}
		}},
		{"release left out", "release.complete", edit(bundle.Releases, func(l *[]string) { *l = (*l)[:2] })},
		{"release left out, log", "log.releases", edit(bundle.Releases, func(l *[]string) { *l = (*l)[:2] })},
		{"release twice", "release.repeated", edit(bundle.Releases, func(l *[]string) { *l = append(*l, (*l)[2]) })},
		{"releases reordered", "release.order", edit(bundle.Releases, func(l *[]string) { slices.Reverse(*l) })},
		{"release by a key of the agent's own", "release.signature", edit(bundle.Releases, func(l *[]string) { (*l)[0] = (*l)[0][:len((*l)[0])-8] + "AAAAAAAA" })},
		{"release that is a result", "release.signature", func(t *testing.T, j *bundletest.Job) {
			edit(bundle.Releases, func(l *[]string) { (*l)[0] = string(j.Parts[bundle.Result]) })(t, j)
		}},
		{"checkpoint left out", "checkpoint.complete", edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = (*l)[:1] })},
		{"first checkpoint left out", "checkpoint.sequence", edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = (*l)[1:] })},
		{"first checkpoint left out, parent", "checkpoint.parent", edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = (*l)[1:] })},
		{"checkpoints reordered", "checkpoint.sequence", edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { slices.Reverse(*l) })},
		{"checkpoint described otherwise", "checkpoint.record", edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { (*l)[0].Bytes++ })},
		{"checkpoint under another key", "checkpoint.asset", checkpoint(func(r *receipt.CheckpointRecord) { r.Asset = "mine" })},
		{"checkpoint of another plan", "checkpoint.plan", checkpoint(func(r *receipt.CheckpointRecord) { r.Plan = plan.Sum(nil) })},
		{"checkpoint of another job", "checkpoint.job", checkpoint(func(r *receipt.CheckpointRecord) { r.JobID = "job-9" })},
		{"not scrubbed", "holder.scrubbed", edit(bundle.HolderStatus, func(s *bundle.Status) { s.Scrubbed = false })},
		{"holder's status withheld", "holder.scrubbed", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.HolderStatus) }},
		{"trace lost", "holder.trace", edit(bundle.HolderStatus, func(s *bundle.Status) { s.TraceLost = true })},
		{"start not seen", "holder.started", edit(bundle.HolderStatus, func(s *bundle.Status) { s.Started = false })},
		{"no start in the trace", "trace.start", edit(bundle.Trace, func(l *[]bundle.Event) { *l = (*l)[1:] })},
		{"checkpoint before the start", "trace.start", edit(bundle.Trace, func(l *[]bundle.Event) { (*l)[0], (*l)[2] = (*l)[2], (*l)[0] })},
		{"event cut out", "trace.operator", edit(bundle.Trace, func(l *[]bundle.Event) { *l = slices.Delete(*l, 2, 3) })},
		{"event cut out, trace", "trace.complete", edit(bundle.Trace, func(l *[]bundle.Event) { *l = slices.Delete(*l, 2, 3) })},
		{"programs cut out, events renumbered", "trace.execs", edit(bundle.Trace, func(l *[]bundle.Event) {
			*l = slices.Delete(*l, 1, 2)
			for i := range *l {
				(*l)[i].Sequence = uint64(i) + 1 //nolint:gosec // an index
			}
		})},
		{"input that could not be read", "trace.inputs", edit(bundle.Trace, func(l *[]bundle.Event) {
			*l = append(*l, bundle.Event{Sequence: 5, Kind: bundle.EventInputError, Detail: "does not open"})
		})},
		{"trace reordered", "trace.order", edit(bundle.Trace, func(l *[]bundle.Event) { (*l)[1], (*l)[2] = (*l)[2], (*l)[1] })},
		{"an operator looked in", "trace.operator", edit(bundle.Trace, func(l *[]bundle.Event) { (*l)[1].Kind = bundle.EventOperatorExec })},
		{"trace lost in the trace", "trace.lost", edit(bundle.Trace, func(l *[]bundle.Event) { (*l)[1].Kind = bundle.EventTraceLost })},
		{"output over the budget", "logs.budget", edit(bundle.LogsDigest, func(l *bundle.Logs) { l.Stdout.Bytes = 2 << 20 })},
		{"output that the holder did not see", "logs.holder", edit(bundle.LogsDigest, func(l *bundle.Logs) { l.Cut++ })},
		{"releases withheld", "release.complete", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.Releases) }},
		{"stages in another order", "outcome.timeline", func(_ *testing.T, j *bundletest.Job) { j.Timeline[1], j.Timeline[2] = j.Timeline[2], j.Timeline[1] }},
		{"stage left out", "outcome.state", func(_ *testing.T, j *bundletest.Job) { j.Timeline = slices.Delete(j.Timeline, 3, 4) }},
		{"first stages left out", "outcome.state", withoutPlan},
		{"first stages left out, timeline", "outcome.timeline", withoutPlan},
		{"first stages left out, plan", "plan.digest", withoutPlan},
		{"plan withheld", "plan.digest", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.Plan) }},
		{"sandbox withheld", "sandbox.form", func(_ *testing.T, j *bundletest.Job) { delete(j.Parts, bundle.Sandbox) }},
		{"stage decrypt left out", "outcome.timeline", func(_ *testing.T, j *bundletest.Job) { j.Timeline = slices.Delete(j.Timeline, 6, 7) }},
		{"checkpoints before the start", "outcome.timeline", func(_ *testing.T, j *bundletest.Job) {
			j.Timeline = append(j.Timeline[:6:6], j.Timeline[len(j.Timeline)-1])
		}},
		{"stages after one that failed", "outcome.timeline", func(_ *testing.T, j *bundletest.Job) { j.Timeline[3].Outcome = bundle.StepFailed }},
		{"another plan digest", "plan.bound", func(_ *testing.T, j *bundletest.Job) { j.Plan = plan.Sum([]byte("x")) }},
		{"failure long after the last stage", "outcome.stage", func(_ *testing.T, j *bundletest.Job) {
			j.Timeline = j.Timeline[:4]
			j.Outcome = bundle.Outcome{State: bundle.Cancelled, Stage: bundle.StageRun, Reason: "cancelled"}
		}},
		{"reason that reads like a verdict", "outcome.state", func(_ *testing.T, j *bundletest.Job) {
			j.Timeline[8].Outcome = bundle.StepFailed
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, ExitCode: 3, Reason: "exit-code); every check holds, and the devices are genuine ("}
		}},
		{"job id that reads like a verdict", "statement.form", func(_ *testing.T, j *bundletest.Job) { j.ID = "job-1 succeeded; every check that was made holds\n" }},
		{"timeline with holes, evidence alone", "outcome.timeline", evidenceAlone},
		{"timeline with holes, evidence alone, plan", "plan.bound", evidenceAlone},
		{"second record of the job", "log.single", func(t *testing.T, j *bundletest.Job) {
			last := j.Log.Entries[len(j.Log.Entries)-1]
			e, err := l.Append(translog.Body{
				Kind: translog.KindBundle, Job: j.ID, JobSequence: uint64(len(j.Log.Entries)) + 1, JobPrev: last.Hash,
				Bundle: &translog.Bundle{Digest: plan.Sum([]byte("another statement"))},
			})
			if err != nil {
				t.Fatal(err)
			}
			j.Log.Entries = append(j.Log.Entries, e)
		}},
		{"success in another stage", "outcome.stage", func(_ *testing.T, j *bundletest.Job) { j.Outcome.Stage = bundle.StageStart }},
		{"success with an exit code", "outcome.state", func(_ *testing.T, j *bundletest.Job) { j.Outcome.ExitCode = 1 }},
		{"success that was not logged", "log.receipt", func(_ *testing.T, j *bundletest.Job) { j.Log = nil }},
		{"log entries of the job left out", "log.entries", func(_ *testing.T, j *bundletest.Job) { j.Log.Entries = j.Log.Entries[:2] }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			tt.lie(t, j)
			file := build(t, j)
			if tt.want == "log.entries" {
				file = dropEntry(t, file)
			}
			r := verify.Verify(file, trust)
			if r.Verdict != verify.Failed || !slices.Contains(failedIDs(r), tt.want) {
				t.Errorf("verdict %s, failed %v, want %s", r.Verdict, failedIDs(r), tt.want)
			}
		})
	}
}

// withoutPlan leaves out the first stages, and with them everything that would
// have to be there and could be held against a plan.
func withoutPlan(_ *testing.T, j *bundletest.Job) {
	j.Timeline = j.Timeline[2:]
	for _, p := range []bundle.Part{bundle.Plan, bundle.JobFile, bundle.AgentPart} {
		delete(j.Parts, p)
	}
	j.Parts[bundle.Releases] = []byte("[]")
	j.Log.Entries = nil
}

// evidenceAlone hides all that followed the evidence.
func evidenceAlone(_ *testing.T, j *bundletest.Job) {
	j.Plan, j.Log = plan.Sum([]byte("x")), nil
	j.Outcome = bundle.Outcome{State: bundle.Cancelled, Stage: bundle.StageRun, Reason: "cancelled"}
	run := j.Timeline[8]
	run.Outcome = bundle.StepFailed
	j.Timeline = []bundle.Step{j.Timeline[3], run}
	j.Parts = map[bundle.Part][]byte{bundle.Evidence: j.Parts[bundle.Evidence]}
}

// A record that leaves out the log can leave out what the log would show.
func TestNotLogged(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, bundletest.Options{})
	j.Log = nil
	j.Outcome = bundle.Outcome{State: bundle.Cancelled, Stage: bundle.StageVerify, Reason: "cancelled"}
	j.Timeline = j.Timeline[:4]
	keep := []bundle.Part{bundle.JobFile, bundle.Plan, bundle.AgentPart, bundle.Sandbox, bundle.ImageSignaturePart, bundle.ImageSBOMPart, bundle.Evidence, bundle.VerifierKeys, bundle.BrokerKeys}
	for _, p := range bundle.Parts() {
		if !slices.Contains(keep, p) {
			delete(j.Parts, p)
		}
	}
	r := verify.Verify(build(t, j), pinned(t, l))
	if r.Verdict != verify.Unknown || !strings.Contains(r.Summary, "no evidence log") {
		dump(t, r)
		t.Error(r.Verdict, r.Summary)
	}
	for _, c := range r.Checks() {
		if strings.Contains(c.Found, "no key was released") {
			t.Errorf("%s: %s", c.ID, c.Found)
		}
	}
}

// What is true, though not as usual, still verifies.
func TestHonestAgent(t *testing.T) {
	l := newLab(t)
	tests := map[string]func(t *testing.T, j *bundletest.Job){
		"more checkpoints than a status has": func(t *testing.T, j *bundletest.Job) {
			var list []bundle.Checkpoint
			parent := plan.Digest("")
			for i := range uint64(130) {
				c, err := j.Checkpoint(i+1, parent, nil)
				if err != nil {
					t.Fatal(err)
				}
				list, parent = append(list, c), c.Digest
			}
			edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = list })(t, j)
			edit(bundle.HolderStatus, func(s *bundle.Status) { s.Checkpoints = list[30:] })(t, j)
		},
		"ended by another agent than began it": func(_ *testing.T, j *bundletest.Job) {
			for i := range j.Timeline {
				if j.Timeline[i].Stage == bundle.StageRun {
					j.Timeline[i].StartUnixNano += int64(time.Minute)
				}
			}
		},
		"taken over, by the times of notes": func(_ *testing.T, j *bundletest.Job) {
			j.Timeline[1].StartUnixNano -= int64(3 * time.Second)
			j.Timeline[1].Nanos += int64(3 * time.Second)
		},
		"ended while it attested again": func(_ *testing.T, j *bundletest.Job) {
			j.Timeline = j.Timeline[:5]
			j.Timeline[4].Outcome = bundle.StepFailed
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageCollect, Reason: "agent-restarted"}
			for _, p := range []bundle.Part{bundle.Result, bundle.Releases, bundle.Approvals, bundle.HolderStatus, bundle.Trace, bundle.Checkpoints, bundle.LogsDigest} {
				delete(j.Parts, p)
			}
			j.Log = &bundle.Log{}
		},
		"concluded twice": func(_ *testing.T, j *bundletest.Job) {
			last := j.Timeline[len(j.Timeline)-1]
			last.Stage = bundle.StageEvidence
			j.Timeline = append(j.Timeline[:len(j.Timeline)-1:len(j.Timeline)-1], last, j.Timeline[len(j.Timeline)-1])
		},
		"failed in its run": func(_ *testing.T, j *bundletest.Job) {
			j.Timeline[8].Outcome = bundle.StepFailed
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "exit-code", ExitCode: 3}
		},
		"agent killed after the start": func(_ *testing.T, j *bundletest.Job) {
			j.Timeline = j.Timeline[:8]
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageRun, Reason: "internal"}
		},
		"agent killed before it noted the verifier's answer": func(t *testing.T, j *bundletest.Job) {
			j.Timeline = j.Timeline[:4]
			j.Outcome = bundle.Outcome{State: bundle.Failed, Stage: bundle.StageVerify, Reason: "agent-restarted"}
			for _, p := range []bundle.Part{bundle.Releases, bundle.Approvals, bundle.HolderStatus, bundle.Trace, bundle.Checkpoints, bundle.LogsDigest} {
				delete(j.Parts, p)
			}
			j.Log = &bundle.Log{}
		},
	}
	for name, change := range tests {
		t.Run(name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			change(t, j)
			if r := verify.Verify(build(t, j), pinned(t, l)); r.Verdict != verify.Verified {
				dump(t, r)
				t.Error(r.Verdict, r.Summary)
			}
		})
	}
}

// The status's newest checkpoints must still be the last of the list.
func TestNewestCheckpoints(t *testing.T) {
	l := newLab(t)
	j := newJob(t, l, bundletest.Options{})
	var list []bundle.Checkpoint
	parent := plan.Digest("")
	for i := range uint64(101) {
		c, err := j.Checkpoint(i+1, parent, nil)
		if err != nil {
			t.Fatal(err)
		}
		list, parent = append(list, c), c.Digest
	}
	edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = list })(t, j)
	edit(bundle.HolderStatus, func(s *bundle.Status) { s.Checkpoints = list[:100] })(t, j)
	if r := verify.Verify(build(t, j), pinned(t, l)); !slices.Contains(failedIDs(r), "checkpoint.complete") {
		t.Error(r.Verdict, failedIDs(r))
	}
}

// Whoever makes the result's keys makes the result: it neither accepts nor
// refuses anything.
func TestUnknownVerifier(t *testing.T) {
	l := newLab(t)
	nobody := verify.Trust{Anchors: l.Anchors}
	t.Run("a policy that nobody knows", func(t *testing.T) {
		file := build(t, newJob(t, l, bundletest.Options{Policy: bundletest.OwnPolicy}))
		if r := verify.Verify(file, pinned(t, l)); r.Verdict != verify.Verified {
			dump(t, r)
			t.Error("by pinned keys:", r.Verdict, r.Summary)
		}
		if r := verify.Verify(file, nobody); r.Verdict != verify.Unknown {
			dump(t, r)
			t.Error(r.Verdict, r.Summary)
		}
	})
	t.Run("an invented refusal", func(t *testing.T) {
		j := newJob(t, l, bundletest.Options{})
		failed := check.List{{ID: "policy.snp.debug", Outcome: check.Fail, Expected: "off", Found: "on"}}
		resign(t, j, func(r *receipt.Result) {
			r.Submods = maps.Clone(r.Submods)
			a := r.Submods["cpu0"]
			a.Status, a.Checks = receipt.Contraindicated, failed
			r.Submods["cpu0"] = a
		})
		j.Timeline = j.Timeline[:5]
		j.Timeline[4].Outcome = bundle.StepFailed
		j.Outcome = bundle.Outcome{State: bundle.Refused, Stage: bundle.StageVerify, Reason: "verify-refused", Checks: failed}
		for _, p := range []bundle.Part{bundle.Releases, bundle.Approvals, bundle.HolderStatus, bundle.Trace, bundle.Checkpoints, bundle.LogsDigest} {
			delete(j.Parts, p)
		}
		j.Log = &bundle.Log{}
		r := verify.Verify(build(t, j), nobody)
		if r.Verdict != verify.Unknown {
			dump(t, r)
			t.Error(r.Verdict, r.Summary)
		}
		if !slices.ContainsFunc(r.Checks(), func(c check.Check) bool {
			return c.ID == "evidence.refusal" && strings.Contains(c.Found, "here it does: policy.snp.debug")
		}) {
			dump(t, r)
			t.Error("what the result says against the evidence is not told")
		}
	})
}

// What nobody but the agent says is told as such.
func TestAgentsWord(t *testing.T) {
	l := newLab(t)
	r := verify.Verify(build(t, newJob(t, l, bundletest.Options{})), pinned(t, l))
	for _, id := range []string{"agent.word", "holder.word", "logs.digest"} {
		if o := outcomes(r, id); !slices.Equal(o, []check.Outcome{check.NotChecked}) {
			t.Errorf("%s: %v", id, o)
		}
	}
	j := newJob(t, l, bundletest.Options{RefuseAdmit: true})
	r = verify.Verify(build(t, j), pinned(t, l))
	if o := outcomes(r, "outcome.refusal"); !slices.Equal(o, []check.Outcome{check.NotChecked}) {
		t.Errorf("outcome.refusal: %v", o)
	}
}

func dropEntry(t *testing.T, file []byte) []byte {
	t.Helper()
	b, err := bundle.Parse(file)
	if err != nil {
		t.Fatal(err)
	}
	b.Log.Entries = b.Log.Entries[1:]
	out, err := plan.Canonical(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func swap(from *bundletest.Job, parts ...bundle.Part) func(*testing.T, *bundletest.Job) {
	return func(_ *testing.T, j *bundletest.Job) {
		for _, p := range parts {
			j.Parts[p] = from.Parts[p]
		}
	}
}

func edit[T any](part bundle.Part, change func(*T)) func(*testing.T, *bundletest.Job) {
	return func(t *testing.T, j *bundletest.Job) {
		t.Helper()
		v, err := bundle.Decode[T](j.Parts[part])
		if err != nil {
			t.Fatal(err)
		}
		change(&v)
		if j.Parts[part], err = plan.Canonical(v); err != nil {
			t.Fatal(err)
		}
	}
}

func resign(t *testing.T, j *bundletest.Job, change func(*receipt.Result)) {
	t.Helper()
	if err := j.SignResult(change); err != nil {
		t.Fatal(err)
	}
}

func checkpoint(change func(*receipt.CheckpointRecord)) func(*testing.T, *bundletest.Job) {
	return func(t *testing.T, j *bundletest.Job) {
		t.Helper()
		c, err := j.Checkpoint(1, "", change)
		if err != nil {
			t.Fatal(err)
		}
		edit(bundle.Checkpoints, func(l *[]bundle.Checkpoint) { *l = []bundle.Checkpoint{c} })(t, j)
		edit(bundle.HolderStatus, func(s *bundle.Status) { s.Checkpoints = []bundle.Checkpoint{c} })(t, j)
	}
}

// TestApproval has jobs that waited for people, or ended while they did.
func TestApproval(t *testing.T) {
	l := newLab(t)
	waited := func(j *bundletest.Job, at int) {
		s := bundle.Step{Stage: bundle.StageApproval, StartUnixNano: j.Timeline[at-1].StartUnixNano + j.Timeline[at-1].Nanos, Outcome: bundle.StepDone}
		j.Timeline = slices.Insert(j.Timeline, at, s)
	}
	for _, c := range []struct {
		name, failed string
		change       func(*bundletest.Job)
	}{
		{"waited", "", func(j *bundletest.Job) { waited(j, 2) }},
		{"waited after the sandbox was made", "outcome.timeline", func(j *bundletest.Job) { waited(j, 3) }},
		{"never approved and ran on", "outcome.timeline", func(j *bundletest.Job) {
			waited(j, 2)
			j.Timeline[2].Outcome = bundle.StepFailed
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			j := newJob(t, l, bundletest.Options{})
			c.change(j)
			r := verify.Verify(build(t, j), pinned(t, l))
			if got := r.Verdict == verify.Verified; got != (c.failed == "") {
				t.Fatalf("verdict %v", r.Verdict)
			}
			if c.failed != "" && !slices.Contains(failedIDs(r), c.failed) {
				t.Errorf("failed %v, want %s", failedIDs(r), c.failed)
			}
		})
	}
}

// TestDocumented holds the parts' names in the format's description against the
// code.
func TestDocumented(t *testing.T) {
	b, err := os.ReadFile("../../../docs/formats/bundle.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range bundle.Parts() {
		if !bytes.Contains(b, fmt.Appendf(nil, "| `%s` |", p)) {
			t.Errorf("docs/formats/bundle.md does not name part %s", p)
		}
	}
	for _, s := range bundle.Stages() {
		if !bytes.Contains(b, fmt.Appendf(nil, "`%s`", s)) {
			t.Errorf("docs/formats/bundle.md does not name stage %s", s)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	l := newLab(b)
	file := build(b, newJob(b, l, bundletest.Options{}))
	trust := pinned(b, l)
	b.ReportAllocs()
	for b.Loop() {
		if r := verify.Verify(file, trust); r.Verdict != verify.Verified {
			b.Fatal(r.Summary)
		}
	}
}

// Whatever is put in the place of some bytes of a part, and whoever signed it, the
// answer is a report, and only the true part verifies. The input is the change and
// not the part: each process mints devices of its own, whose evidence would be
// strange to every other, and a change is small enough to vary and to shrink.
func FuzzPart(f *testing.F) {
	l := newLab(f)
	good := newJob(f, l, bundletest.Options{})
	names := bundle.Parts()
	for i := range names {
		n := uint8(i) //nolint:gosec // there are few parts
		f.Add(n, uint32(0), uint16(0), []byte{})
		f.Add(n, uint32(0), uint16(0), []byte(" "))
		f.Add(n, uint32(0), uint16(0xffff), []byte("{}"))
		f.Add(n, uint32(1), uint16(0), []byte(`"x":1,`))
		f.Add(n, uint32(40), uint16(1), []byte("0"))
		f.Add(n, uint32(0xffffffff), uint16(0), []byte("x"))
	}
	trust := pinned(f, l)
	// What is free text to verification may be replaced without notice: here
	// the liar has the job's key. Of approvals, the rules are the agent's word, and so
	// is most of egress and alerts: docs/tamper.md says what is not found.
	free := []bundle.Part{bundle.Approvals, bundle.EgressPart, bundle.AlertsPart, bundle.JobFile, bundle.AgentPart, bundle.LogsDigest, bundle.VerifierKeys, bundle.BrokerKeys, bundle.Trace, bundle.HolderStatus}
	f.Fuzz(func(t *testing.T, i uint8, at uint32, drop uint16, insert []byte) {
		name := names[int(i)%len(names)]
		was := good.Parts[name]
		from := int(at) % (len(was) + 1)
		to := min(from+int(drop), len(was))
		body := slices.Concat(was[:from], insert, was[to:])
		j := *good
		j.Parts = maps.Clone(good.Parts)
		j.Parts[name] = body
		file, err := j.Bundle()
		if err != nil {
			return
		}
		r := verify.Verify(file, trust)
		if r.Verdict == verify.Verified && !bytes.Equal(body, was) && !sameJSON(body, was) && !slices.Contains(free, name) {
			t.Errorf("part %s: %q in the place of %d bytes at %d, and verified", name, insert, to-from, from)
		}
	})
}

// sameJSON reports whether two texts are one JSON value: the liar who signs for
// the job may put a space where it says nothing.
func sameJSON(a, b []byte) bool {
	x, y := jsontext.Value(bytes.Clone(a)), jsontext.Value(bytes.Clone(b))
	return x.Canonicalize() == nil && y.Canonicalize() == nil && bytes.Equal(x, y)
}
