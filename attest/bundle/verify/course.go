package verify

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// strict records what must hold for a job that succeeded. A job that failed may
// have failed for just that: then it is told, and not counted against the record.
func (v *verification) strict(g *check.List, id string, ok bool, expected, found string) {
	switch {
	case ok:
		g.Pass(id, found)
	case v.st.Outcome.State == bundle.Succeeded:
		g.Fail(id, expected, found, "")
	default:
		g.Skip(id, fmt.Sprintf("%s; the job %s", found, v.st.Outcome.State))
	}
}

func (v *verification) runGroup() {
	g := v.group("run", "How it ran")
	defer v.done("run", g)
	v.holder(g)
	v.trace(g)
	v.alerts(g)
	v.logs(g)
	if len(*g) == 0 {
		g.Skip("run.started", "the job did not start")
	}
}

func (v *verification) holder(g *check.List) {
	b, ok := v.part(bundle.HolderStatus)
	if !ok {
		if _, keys := v.b.Parts[bundle.Releases]; keys {
			v.strict(g, "holder.scrubbed", false, "every region zeroed and checked", "not scrubbed: holder lost")
		}
		return
	}
	s, err := bundle.Decode[bundle.Status](b)
	if err != nil {
		g.Fail("holder.form", "the holder's status", err.Error(), "")
		return
	}
	v.status = &s
	if v.reseals() {
		v.strict(g, "holder.started", !s.Started, "no container", said(s.Started, "a container started", "no container started"))
	} else {
		v.strict(g, "holder.started", s.Started, "a trace that showed the container's start", said(s.Started, "the trace showed the container's start", "no start was seen"))
	}
	v.strict(g, "holder.trace", !s.TraceLost, "a trace to the end", said(!s.TraceLost, "to the end", "lost while the job ran"))
	v.strict(g, "holder.scrubbed", s.Scrubbed && s.RegionBytes == 0, "every region zeroed and checked", said(s.Scrubbed && s.RegionBytes == 0, "every region zeroed and checked", fmt.Sprintf("%d bytes held, scrubbed: %t", s.RegionBytes, s.Scrubbed)))
	v.metrics(g)
	if s.Dropped > 0 {
		g.Skip("trace.complete", fmt.Sprintf("%d trace messages were lost by the runtime", s.Dropped))
	}
	g.Skip("holder.word", "what the holder counted reaches the bundle through the agent")
}

func said(ok bool, yes, no string) string {
	if ok {
		return yes
	}
	return no
}

func (v *verification) trace(g *check.List) {
	b, ok := v.part(bundle.Trace)
	if !ok {
		return
	}
	events, err := bundle.Decode[[]bundle.Event](b)
	if err != nil {
		g.Fail("trace.form", "a list of events", err.Error(), "")
		return
	}
	start := -1
	execs, missing, last := int64(0), uint64(0), uint64(0)
	var operator, inputs []string
	for i, e := range events {
		if e.Sequence <= last {
			g.Fail("trace.order", fmt.Sprintf("an event after number %d", last), fmt.Sprint(e.Sequence), "events were reordered")
		} else {
			missing += e.Sequence - last - 1
		}
		last = max(last, e.Sequence)
		switch e.Kind {
		case bundle.EventContainerStart:
			if start < 0 {
				start = i
			}
		case bundle.EventExec:
			execs++
		case bundle.EventOperatorExec:
			execs++
			operator = append(operator, e.Detail)
		case bundle.EventInputError, bundle.EventInputsFailed:
			inputs = append(inputs, e.Detail)
		case bundle.EventTraceLost:
			v.strict(g, "trace.lost", false, "a trace to the end", "lost while the job ran")
		case bundle.EventCheckpoint:
			if start < 0 {
				g.Fail("trace.start", "the container's start before any checkpoint", "a checkpoint first", "a key was used before the container was seen to start")
			}
		}
	}
	if v.reseals() {
		v.strict(g, "trace.start", start < 0 && execs == 0, "no container", said(start < 0 && execs == 0, "no container", "a container's events"))
	} else {
		v.strict(g, "trace.start", start >= 0, "the container's start", said(start >= 0, "seen", "not seen"))
	}
	if len(inputs) > 0 {
		v.strict(g, "trace.inputs", false, "inputs that could be read", fmt.Sprintf("%d reads refused: %.200s", len(inputs), strings.Join(inputs, "; ")))
	}
	if missing > 0 {
		g.Fail("trace.complete", "every event that the holder numbered", fmt.Sprintf("%d are missing", missing), "events were cut out, or were too many for a bundle")
	}
	if len(operator) > 0 {
		g.Fail("trace.operator", "nobody but the job in the sandbox", fmt.Sprintf("%d programs run from outside: %.200s", len(operator), strings.Join(operator, ", ")), "ask the operator what was run, and why")
	} else if missing > 0 {
		g.Fail("trace.operator", "a trace without a gap", fmt.Sprintf("%d events are missing", missing), "what is missing may be a program that was run from outside")
	} else if start >= 0 {
		g.Pass("trace.operator", "no program was run from outside")
	}
	if v.status == nil || v.status.Execs <= execs {
		return
	}
	if len(events) < holderLists {
		g.Fail("trace.execs", fmt.Sprintf("%d executed programs, as the holder counted them", v.status.Execs), fmt.Sprint(execs), "the end of the trace was cut off")
	} else {
		g.Skip("trace.execs", fmt.Sprintf("%d of %d executed programs are listed", execs, v.status.Execs))
	}
}

// holderLists is up to how many events a holder lists whatever happens; beyond
// it, it only counts those that a job can cause at will.
const holderLists = 8000

func (v *verification) logs(g *check.List) {
	b, ok := v.part(bundle.LogsDigest)
	if !ok {
		return
	}
	l, err := bundle.Decode[bundle.Logs](b)
	if err != nil {
		g.Fail("logs.form", "the digests of what was printed", err.Error(), "")
		return
	}
	total := l.Stdout.Bytes + l.Stderr.Bytes
	if v.pl != nil {
		if l.Stdout.Bytes < 0 || l.Stderr.Bytes < 0 || total > v.pl.Output.LogBytes {
			g.Fail("logs.budget", fmt.Sprintf("at most %d bytes", v.pl.Output.LogBytes), fmt.Sprintf("%d bytes", total), "the job said more than the plan allows")
		} else {
			g.Pass("logs.budget", fmt.Sprintf("%d of %d bytes", total, v.pl.Output.LogBytes))
		}
	}
	if v.status != nil {
		// The words are with whoever watched the job.
		g.Skip("logs.digest", "the agent's word: what was printed is not in the bundle")
		g.Equal("logs.holder", fmt.Sprintf("%d bytes, %d cut", v.status.LogBytes, v.status.LogCut), fmt.Sprintf("%d bytes, %d cut", total, l.Cut), "agent and holder disagree on what was printed")
	}
}

func (v *verification) checkpointGroup() {
	g := v.group("checkpoints", "What came out")
	defer v.done("checkpoints", g)
	v.line = v.resumed(g)
	b, ok := v.part(bundle.Checkpoints)
	if !ok {
		g.Skip("checkpoint.signature", "the bundle has no checkpoints that can be relied on")
		return
	}
	list, err := bundle.Decode[[]bundle.Checkpoint](b)
	if err != nil {
		g.Fail("checkpoint.form", "a list of checkpoints", err.Error(), "")
		return
	}
	if v.status != nil {
		var told, held []string
		for _, c := range list {
			told = append(told, sealed(c))
		}
		for _, c := range v.status.Checkpoints {
			held = append(held, sealed(c))
		}
		// A status has the newest only; sequence and parents show the others.
		if len(held) == statusCheckpoints && len(told) > len(held) {
			told = told[len(told)-len(held):]
		}
		if !slices.Equal(told, held) {
			g.Fail("checkpoint.complete", fmt.Sprintf("the %d that the holder sealed, in order", len(held)), fmt.Sprintf("%d", len(told)), "checkpoints were left out, added or reordered")
		} else {
			g.Pass("checkpoint.complete", fmt.Sprintf("%d, the newest %d as the holder's status has them", len(list), len(held)))
		}
	}
	v.records = []plan.Digest{}
	parent := v.line.digest
	for i, c := range list {
		v.records = append(v.records, plan.Sum(c.Record))
		r, ok := v.checkpoint(g, c)
		if !ok {
			continue
		}
		g.Equal("checkpoint.sequence", fmt.Sprint(v.line.sequence+uint64(i)+1), fmt.Sprint(r.Sequence), "checkpoints were left out or reordered")
		g.Equal("checkpoint.parent", orNone(parent), orNone(r.Parent), "the chain of checkpoints is broken")
		parent = r.Digest
	}
	v.anchors(g, list)
	if len(list) > 0 {
		g.Skip("checkpoint.content", "the sealed files themselves are not in the bundle; their digests are")
	}
}

// sealed is all that the holder says of a checkpoint: countersignatures come later,
// from the broker.
func sealed(c bundle.Checkpoint) string {
	return fmt.Sprintf("%d %q %s %s %d %d %s %x", c.Sequence, c.Name, c.Digest, c.Parent, c.Bytes, c.Nanos, plan.Sum(c.Record), c.Signature)
}

// statusCheckpoints is how many checkpoints a holder's status has at most.
const statusCheckpoints = 100

func orNone(d plan.Digest) string {
	if d == "" {
		return "none"
	}
	return string(d)
}

func (v *verification) checkpoint(g *check.List, c bundle.Checkpoint) (receipt.CheckpointRecord, bool) {
	r, err := receipt.DecodeCheckpointRecord(c.Record)
	if err != nil {
		g.Fail("checkpoint.form", "a checkpoint record", err.Error(), "")
		return r, false
	}
	if !v.signed(receipt.CheckpointLabel, c.Record, c.Signature) {
		g.Fail("checkpoint.signature", "a signature by the session key in the evidence", "none that holds", "the checkpoint is not the attested job's")
		return r, false
	}
	g.Pass("checkpoint.signature", r.Name)
	if c.Sequence != r.Sequence || c.Name != r.Name || c.Digest != r.Digest || c.Parent != r.Parent || c.Bytes != r.Bytes {
		g.Fail("checkpoint.record", "what the signed record says", "something else around it", "")
	}
	g.Equal("checkpoint.job", v.st.JobID, r.JobID, "the checkpoint is another job's")
	g.Equal("checkpoint.plan", string(v.st.PlanDigest), string(r.Plan), "the checkpoint is another plan's")
	if v.pl != nil {
		want := "none"
		if v.pl.Checkpoints != nil {
			want = v.pl.Checkpoints.Asset
		}
		g.Equal("checkpoint.asset", want, r.Asset, "sealed under another key than the plan's")
	}
	return r, true
}

var reasonForm = regexp.MustCompile(`^[a-z0-9-]{1,128}$`)

func (v *verification) outcomeGroup() {
	g := v.group("outcome", "How it ended")
	defer v.done("outcome", g)
	v.timeline(g)
	o, steps := v.st.Outcome, v.st.Timeline
	order := v.order()
	last := steps[0]
	for _, s := range steps {
		if !beside(s.Stage) {
			last = s
		}
	}
	switch at, end := slices.Index(order, last.Stage), slices.Index(order, o.Stage); {
	case last.Stage == bundle.StageVerify && last.Outcome != bundle.StepDone && o.Stage == bundle.StageCollect:
		// A verifier that went away is asked again, with new evidence.
		g.Pass("outcome.stage", "collect, again after verify")
	case last.Outcome != bundle.StepDone:
		g.Equal("outcome.stage", string(last.Stage), string(o.Stage), "the job ended in another stage than the timeline shows")
	case end < at || end > at+1:
		g.Fail("outcome.stage", "an end right after "+string(last.Stage)+", which was done", string(o.Stage), "the job ended in another stage than the timeline shows")
	default:
		g.Pass("outcome.stage", string(o.Stage))
	}
	v.exitCode(g)
	v.attempt(g)
	switch {
	case o.State == bundle.Succeeded:
		v.success(g, last)
	case o.Reason == "":
		g.Fail("outcome.state", "a reason for "+string(o.State), "none", "")
	case !reasonForm.MatchString(o.Reason):
		// The summary repeats it beside the verdict: it must not read like more of one.
		g.Fail("outcome.state", "a reason code: at most 128 lower-case letters, digits and '-'", fmt.Sprintf("%.80q", o.Reason), "")
	default:
		g.Pass("outcome.state", fmt.Sprintf("%s at %s: %s", o.State, o.Stage, o.Reason))
	}
	v.outcomeRefusal(g)
	v.outcomeStop(g)
	if v.result != nil {
		v.resultTime(g)
	}
}

// clockJitter is how far the ends and beginnings of stages may overlap: they
// are read from a clock that may be set while a job runs.
const clockJitter = time.Second

// beside are the stages that follow no other: checkpoints are made while the job
// runs, and evidence is gathered for every job, wherever it ended.
func beside(s bundle.Stage) bool { return s == bundle.StageCheckpoint || s == bundle.StageEvidence }

// order are the stages of this job. It went through approval only if it says so:
// what people approved is held against the releases, not against a wait.
func (v *verification) order() []bundle.Stage {
	waited := v.st.Outcome.Stage == bundle.StageApproval || slices.ContainsFunc(v.st.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageApproval })
	reseals := v.reseals()
	return slices.DeleteFunc(bundle.Stages(), func(s bundle.Stage) bool {
		switch s {
		case bundle.StageApproval:
			return !waited
		case bundle.StageReseal:
			return !reseals
		case bundle.StageDecrypt, bundle.StageStart, bundle.StageRun, bundle.StageCheckpoint:
			return reseals
		default:
			return false
		}
	})
}

// timeline checks that the stages stand one after the other without a gap: parts
// and checks are asked for by stage, and a stage that is left out hides them.
func (v *verification) timeline(g *check.List) {
	steps, order := v.st.Timeline, v.order()
	end, over, early := int64(0), false, false
	seen := map[bundle.Stage]bool{}
	for i, s := range steps {
		next := !seen[s.Stage]
		if beside(s.Stage) {
			next = next && i > 0 && (s.Stage != bundle.StageCheckpoint || seen[bundle.StageStart])
		} else {
			next = next && !over && order[i] == s.Stage
			early = early || s.StartUnixNano < end-int64(clockJitter)
			over = s.Outcome != bundle.StepDone
		}
		if !next || s.Nanos < 0 {
			g.Fail("outcome.timeline", "stages one after the other without a gap, each done before the next", fmt.Sprintf("%s, %s, in place %d", s.Stage, s.Outcome, i+1), "")
			return
		}
		seen[s.Stage] = true
		end = max(end, s.StartUnixNano+s.Nanos)
	}
	if early {
		// An agent that takes over a job knows its stages' times from notes.
		g.Skip("outcome.clock", "stages that begin before the one before them has ended, by the agent's clock")
	}
	g.Pass("outcome.timeline", fmt.Sprintf("%d stages, %s", len(steps), time.Duration(end-steps[0].StartUnixNano).Round(time.Millisecond)))
}

// success holds a job that is said to have succeeded against what that takes.
func (v *verification) success(g *check.List, last bundle.Step) {
	o := v.st.Outcome
	if last.Outcome != bundle.StepDone || o.ExitCode != 0 || o.Reason != "" {
		g.Fail("outcome.state", "every stage done, exit code 0, no reason", fmt.Sprintf("%s %s, exit code %d, reason %.80q", last.Stage, last.Outcome, o.ExitCode, o.Reason), "")
		return
	}
	for _, s := range v.order() {
		if !beside(s) && !v.reached(s) {
			g.Fail("outcome.state", "a job that succeeded went through "+string(s), "it did not", "")
			return
		}
	}
	g.Pass("outcome.state", string(o.State))
}

// outcomeRefusal holds a refusal at verification against the signed result: the
// agent can neither make one up nor hide one.
func (v *verification) outcomeRefusal(g *check.List) {
	o := v.st.Outcome
	if o.State != bundle.Refused {
		return
	}
	if v.result == nil || o.Stage != bundle.StageVerify {
		g.Skip("outcome.refusal", fmt.Sprintf("refused at %s by the agent's word: only what the verifier refuses is signed by whoever refused", o.Stage))
		return
	}
	if v.affirmed {
		// The relying party may refuse what the verifier affirms: an expired
		// result, a simulated one. The result cannot show that.
		g.Skip("outcome.refusal", "the result affirms; the agent refused it for "+strings.Join(ids(o.Checks.Failed()), ", "))
		return
	}
	signed := ids(v.result.AllChecks().Failed())
	for _, id := range signed {
		if !slices.Contains(ids(o.Checks), id) {
			g.Fail("outcome.refusal", "every failed check of the result", "not "+id, "the record hides why the job was refused")
			return
		}
	}
	g.Pass("outcome.refusal", "for what the verifier signed: "+strings.Join(signed, ", "))
}

// resultTime holds the agent's clock against the verifier's, as far as a result
// lives.
func (v *verification) resultTime(g *check.List) {
	i := slices.IndexFunc(v.st.Timeline, func(s bundle.Step) bool { return s.Stage == bundle.StageVerify })
	if i < 0 && v.st.Outcome.Stage == bundle.StageVerify {
		// An agent that is killed before it has noted the end of a stage.
		g.Skip("outcome.time", "the timeline ends before stage verify was over")
		return
	}
	if i < 0 {
		g.Fail("outcome.time", "a stage verify, because there is a result", "none", "")
		return
	}
	s := v.st.Timeline[i]
	from := time.Unix(0, s.StartUnixNano).Add(-receipt.ResultLifetime)
	to := time.Unix(0, s.StartUnixNano+max(s.Nanos, 0)).Add(receipt.ResultLifetime)
	iat := time.Unix(v.result.IssuedAt, 0)
	if iat.Before(from) || iat.After(to) {
		g.Fail("outcome.time", "the result issued in stage verify, "+time.Unix(0, s.StartUnixNano).UTC().Format(time.RFC3339), iat.UTC().Format(time.RFC3339), "the timeline is not of this attempt, or a clock is wrong")
		return
	}
	g.Pass("outcome.time", "the result was issued in stage verify")
}

func (v *verification) logGroup() {
	g := v.group("log", "The evidence log")
	defer v.done("log", g)
	if v.b.Log == nil {
		v.strict(g, "log.receipt", false, "a receipt of the evidence log", "the bundle was not logged")
		return
	}
	token := v.b.Log.Receipt
	issuer, err := issuerOf(token)
	var r translog.Receipt
	if err == nil {
		keys, pinned, kerr := v.keys(v.trust.BrokerKeys, bundle.BrokerKeys, issuer)
		if err = kerr; err == nil {
			if r, err = translog.OpenReceipt(keys, token); err == nil {
				byKeys(g, "log.receipt", pinned, issuer)
			}
		}
	}
	if err != nil {
		g.Fail("log.receipt", "a receipt signed by the broker", err.Error(), "")
		return
	}
	if v.result != nil && len(v.releases) > 0 {
		g.Equal("log.broker", v.result.Audience, r.Issuer, "logged by another broker than the one that released")
	}
	g.Equal("log.job", v.st.JobID, r.Job, "the receipt speaks of another job")
	g.Equal("log.statement", string(v.rep.Statement), string(r.Digest), "another statement was logged")
	bodies, err := translog.VerifyJob(issuer, v.st.JobID, v.b.Log.Entries)
	if err != nil {
		g.Fail("log.entries", "every entry of the job, unchanged and in order", err.Error(), "entries were changed, left out or reordered")
		return
	}
	g.Pass("log.entries", fmt.Sprintf("%d of this job", len(bodies)))
	v.logSingle(g, bodies)
	i := slices.IndexFunc(v.b.Log.Entries, func(e translog.Entry) bool { return e.Index == r.Index })
	if i < 0 {
		g.Fail("log.included", fmt.Sprintf("entry %d", r.Index), "none", "the entry that the receipt promises was left out")
	} else if err := r.Includes(v.b.Log.Entries[i]); err != nil {
		g.Fail("log.included", "the entry that the receipt promises", err.Error(), "")
	} else {
		g.Pass("log.included", fmt.Sprintf("entry %d", r.Index))
	}
	v.logReleases(g, bodies)
	v.logStop(g, bodies)
	v.logReattest(g, bodies)
	v.logCheckpoints(g, bodies)
	v.logReseal(g, bodies)
	v.logTree(g, issuer)
}

// logTree checks that the log's Merkle tree has the entries, and who beside the
// broker has seen the tree. What the bundle does not have yet is not checked, and
// no pass: who names keys gets the verdict that it could not be told.
func (v *verification) logTree(g *check.List, broker string) {
	const inclusion, witness = "log.inclusion", "log.witness"
	l := v.b.Log
	quorum, named := v.trust.Log.Quorum()
	switch {
	case v.trust.Log.Origin() == "":
		g.Skip(inclusion, "no key of the log is named to check a checkpoint by")
		g.Skip(witness, "no witness is named: nobody but the broker is known to have seen this log")
		return
	case len(l.Checkpoint) == 0:
		v.unproven = "the bundle has no proof yet that the log has the record"
		g.Skip(inclusion, "not yet: no checkpoint was published when the bundle was made; coffer log prove adds it")
		if named > 0 {
			g.Skip(witness, "not witnessed: there is no checkpoint yet")
		} else {
			g.Skip(witness, "no witness is named")
		}
		return
	}
	c, err := v.trust.Log.Open(l.Checkpoint)
	if err != nil {
		g.Fail(inclusion, "a checkpoint that "+v.trust.Log.Origin()+" signed", err.Error(), "")
		return
	}
	switch {
	case c.Origin != translog.KeyName(broker):
		g.Fail(inclusion, "a checkpoint of the log of "+broker, "one of "+c.Origin, "")
	case len(l.Proofs) != len(l.Entries):
		g.Fail(inclusion, fmt.Sprintf("a proof for each of %d entries", len(l.Entries)), fmt.Sprint(len(l.Proofs)), "proofs were left out")
	default:
		for i, e := range l.Entries {
			if err := c.Includes(e, l.Proofs[i]); err != nil {
				g.Fail(inclusion, "every entry of the job in the tree that the log signed", err.Error(), "the log signed another history, or the proofs were changed")
				return
			}
		}
		g.Pass(inclusion, fmt.Sprintf("%d entries in a tree of %d", len(l.Entries), c.Size))
	}
	switch {
	case c.Witnessed:
		g.Pass(witness, fmt.Sprintf("%d of the %d named, %d wanted", len(c.Cosigned), named, quorum))
	case named > 0:
		v.unproven = fmt.Sprintf("of the %d witnesses named, %d have cosigned the log: %d are wanted", named, len(c.Cosigned), quorum)
		g.Skip(witness, fmt.Sprintf("not witnessed: %d of the %d named have cosigned, %d are wanted", len(c.Cosigned), named, quorum))
	default:
		g.Skip(witness, "no witness is named: nobody but the broker is known to have seen this log")
	}
}

// logReleases holds the receipts against the log: each is logged, and no key of
// the job was released that the bundle does not tell of.
func (v *verification) logReleases(g *check.List, bodies []translog.Body) {
	entries := map[uint64][]byte{}
	for _, e := range v.b.Log.Entries {
		entries[e.Index] = e.Hash
	}
	logged := 0
	for _, b := range bodies {
		if b.Kind != translog.KindRelease {
			continue
		}
		logged++
		i := slices.IndexFunc(v.releases, func(r receipt.Release) bool { return r.LogIndex == b.Index })
		if i < 0 {
			g.Fail("log.releases", "a receipt for each logged release", "none for "+b.Release.Asset, "a key was released that the bundle does not tell of")
			continue
		}
		r, e := v.releases[i], b.Release
		same := bytes.Equal(r.LogHash, entries[b.Index]) && r.Grant == e.Grant && r.Attempt == e.Attempt && r.Asset == e.Asset &&
			r.Plan == e.Plan && r.ResultID == e.ResultID && r.WrappedDigest == e.Wrapped && r.Simulated == e.Simulated && slices.Equal(r.Approvals, e.Approvals)
		if v.result != nil && v.env != nil {
			same = same && e.Verifier == v.result.Issuer && e.Evidence == v.result.EvidenceDigest && e.Recipient == plan.Sum(v.env.RecipientKey)
		}
		if !same {
			g.Fail("log.releases", "the same in receipt and log", "a difference for "+e.Asset, "")
		}
	}
	if logged != len(v.releases) {
		g.Fail("log.releases", fmt.Sprintf("%d releases, as logged", logged), fmt.Sprintf("%d receipts", len(v.releases)), "")
		return
	}
	switch {
	case len(g.Failed()) > 0:
	case v.trust.BrokerKeys == nil:
		g.Skip("log.releases", fmt.Sprintf("%d, each logged: %s", logged, fromBundle))
	default:
		g.Pass("log.releases", fmt.Sprintf("%d, each logged", logged))
	}
}

// logSingle checks that the job has one record: of two that differ, nobody can
// say which is true.
func (v *verification) logSingle(g *check.List, bodies []translog.Body) {
	const id = "log.single"
	for _, b := range bodies {
		if b.Kind == translog.KindBundle && b.Bundle.Digest != v.rep.Statement {
			g.Fail(id, "one record of the job", fmt.Sprintf("another in entry %d, %s", b.Index, b.Bundle.Digest), "ask for the other record, and why there are two")
			return
		}
	}
	g.Pass(id, "no other record of the job up to this one")
}
