package verify

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// later is one later attestation whose result is genuine.
type later struct {
	bundle.Reattestation
	result receipt.Result
}

// reattestGroup looks at how the job attested while it ran: each result that the
// bundle has is the verifier's, newer than the one before, over evidence that is
// appraised again; the job went on only where it might; and no result became older
// than plan and owners allow.
func (v *verification) reattestGroup() {
	const id = "reattest.complete"
	g := v.group("reattestations", "What the devices said while it ran")
	defer v.done("reattestations", g)
	asked := v.resultAge()
	b, ok := v.part(bundle.ReattestPart)
	switch {
	case ok && asked == 0:
		g.Fail(id, "no later attestation, because neither the plan nor an owner asks for one", fmt.Sprintf("%d bytes", len(b)), "")
		return
	case ok:
	case asked > 0 && v.reached(bundle.StageStart):
		g.Fail(id, "the later attestations that plan or owners ask for", "none that can be relied on", "the record is not complete")
		return
	case asked > 0:
		g.Skip(id, "the job did not start")
		return
	default:
		g.Skip(id, "neither the plan nor an owner asks for an attestation after the first")
		return
	}
	l, err := bundle.Decode[bundle.Reattestations](b)
	if err != nil {
		g.Fail("reattest.form", "a list of attestations", err.Error(), "")
		return
	}
	if v.env == nil || v.result == nil {
		g.Fail(id, "a first attestation before later ones", "none", "")
		return
	}
	v.reattestOrder(g, l)
	last := *v.result
	seen := map[string]bool{last.ID: true, last.Nonce: true}
	raw, bare := 0, 0
	for _, a := range l.List {
		switch {
		case a.Verdict == bundle.ReattestNone && a.Result == "" && a.ResultDigest == "":
		case a.Result == "" && a.Verdict == bundle.ReattestAffirmed:
			bare++
		default:
			raw++
			r, ok := v.reattested(g, a, last, seen)
			if !ok {
				continue
			}
			v.laters = append(v.laters, later{a, r})
			if a.Verdict == bundle.ReattestAffirmed {
				last = r
			}
		}
	}
	// The agent leaves out what does not fit, and evidence of one machine has about one
	// size: where there is room for several, it was left out for another reason.
	first, _ := v.part(bundle.Evidence)
	switch {
	case l.Omitted > 0 && len(l.List) < bundle.MaxReattestations:
		g.Fail("reattest.raw", fmt.Sprintf("%d attestations in the list before any is left out", bundle.MaxReattestations), fmt.Sprintf("%d, and %d left out", len(l.List), l.Omitted), "the record is not complete")
	case bare > 0 && l.Room(len(first)*4/3+receipt.MaxToken) > 0:
		g.Fail("reattest.raw", "evidence and result of each attestation for which there is room", fmt.Sprintf("%d without", bare), "the record is not complete")
	case bare > 0 || l.Omitted > 0:
		g.Skip("reattest.raw", fmt.Sprintf("%d that affirmed are here without evidence and result, and %d not at all, for want of room", bare, l.Omitted))
	}
	v.omitted = bare + l.Omitted
	if v.omitted > 0 {
		g.Skip("reattest.age", "results are left out for want of room")
	} else {
		v.reattestAges(g, "reattest.age", asked, nil)
	}
	if len(g.Failed()) == 0 {
		g.Pass(id, fmt.Sprintf("%d, of which %d were appraised again", len(l.List)+l.Omitted, raw))
	}
}

// resultAge is how old, in seconds, the newest result of the job might become, by
// the plan and by the releases; 0 is any age.
func (v *verification) resultAge() int64 {
	var out int64
	if v.pl != nil {
		out = v.pl.Reattest.MaxAge()
	}
	for _, r := range v.releases {
		if r.ResultSeconds > 0 && (out == 0 || r.ResultSeconds < out) {
			out = r.ResultSeconds
		}
	}
	return out
}

// reattestOrder holds the list against itself: nothing is left out of it unsaid, and
// the job went on after an attestation only as that allowed.
func (v *verification) reattestOrder(g *check.List, l bundle.Reattestations) {
	missing, at, paused := 0, 0, false
	began := int64(0)
	for i, a := range l.List {
		if a.Number <= at || a.StartUnixNano < began-int64(clockJitter) {
			g.Fail("reattest.order", fmt.Sprintf("an attestation after number %d", at), fmt.Sprintf("number %d", a.Number), "attestations were reordered")
			return
		}
		missing += a.Number - at - 1
		at, began = a.Number, a.StartUnixNano
		may := []string{bundle.ReattestStopped}
		switch {
		case a.Verdict == bundle.ReattestAffirmed && paused:
			if may = append(may, bundle.ReattestResumed); !a.Shown {
				may = append(may, bundle.ReattestPaused)
			}
		case a.Verdict == bundle.ReattestAffirmed:
			may = append(may, bundle.ReattestGoesOn)
		case v.pl != nil && v.pl.Reattest.Pauses() && (a.Verdict == bundle.ReattestRefused || paused):
			may = append(may, bundle.ReattestPaused)
		}
		if !slices.Contains(may, a.Then) {
			g.Fail("reattest.then", strings.Join(may, " or ")+" after "+a.Verdict, fmt.Sprintf("%.40q after number %d", a.Then, a.Number), "the job went on though its machine was not affirmed")
			return
		}
		paused = a.Then == bundle.ReattestPaused
		if a.Then == bundle.ReattestStopped && i < len(l.List)-1 {
			g.Fail("reattest.then", "nothing after the job was stopped", fmt.Sprintf("%d attestations", len(l.List)-1-i), "")
			return
		}
	}
	if missing != l.Omitted {
		g.Fail("reattest.order", fmt.Sprintf("%d left out, as the list says", l.Omitted), fmt.Sprint(missing), "attestations were left out")
	}
	o := v.st.Outcome
	ended := o.Reason == bundle.ReasonReattestRefused || o.Reason == bundle.ReasonReattestLate
	stopped := len(l.List) > 0 && l.List[len(l.List)-1].Then == bundle.ReattestStopped
	switch {
	case stopped && o.State == bundle.Succeeded:
		g.Fail("reattest.then", "a job that its last attestation stopped", "one that succeeded", "")
	case o.Reason == bundle.ReasonReattestRefused && (len(l.List) == 0 || l.List[len(l.List)-1].Verdict == bundle.ReattestAffirmed):
		g.Fail("reattest.then", "the attestation for which the job ended as "+o.Reason, "none", "the record hides why the job was stopped")
	case ended:
		g.Pass("reattest.then", o.Reason)
	}
}

// reattested checks one attestation: that its result is the verifier's, of this job
// and newer than the last, and that its evidence says what the result says.
func (v *verification) reattested(g *check.List, a bundle.Reattestation, last receipt.Result, seen map[string]bool) (receipt.Result, bool) {
	which := fmt.Sprintf("number %d: ", a.Number)
	var r receipt.Result
	var l check.List
	issuer, err := issuerOf(a.Result)
	pinned := false
	if err == nil && issuer != v.result.Issuer {
		err = fmt.Errorf("issued by %.80q, the first by %q", issuer, v.result.Issuer)
	}
	if err == nil {
		keys, p, kerr := v.keys(v.trust.VerifierKeys, bundle.VerifierKeys, issuer)
		if err, pinned = kerr, p; err == nil {
			err = keys.Open(receipt.TypeResult, a.Result, &r)
		}
	}
	if err != nil {
		g.Fail("reattest.signature", "a result signed by the verifier", which+err.Error(), "the result is not the verifier's, or the keys are not")
		return r, false
	}
	env, err := evidence.Parse(a.Evidence)
	if err != nil {
		g.Fail("reattest.evidence", "an evidence envelope", which+err.Error(), "")
		return r, false
	}
	nonce := sha256.Sum256([]byte(env.Nonce))
	l.Equal("reattest.digest", string(a.ResultDigest)+" "+string(a.EvidenceDigest), string(plan.Sum([]byte(a.Result)))+" "+string(plan.Sum(a.Evidence)), "")
	l.Equal("reattest.evidence", string(r.EvidenceDigest), string(plan.Sum(a.Evidence)), "the result speaks of other evidence")
	l.Equal("reattest.nonce", r.Nonce, hex.EncodeToString(nonce[:]), "the result speaks of another challenge")
	l.Equal("reattest.job", v.st.JobID+" "+v.st.JobID, r.JobID+" "+env.JobID, "another job's")
	l.Equal("reattest.plan", string(v.st.PlanDigest)+" "+string(v.st.PlanDigest), string(r.PlanDigest)+" "+string(plan.Sum(env.Plan)), "another plan's")
	l.Equal("reattest.sandbox", string(v.result.SandboxDigest)+" "+string(v.result.SandboxDigest), string(r.SandboxDigest)+" "+string(plan.Sum(env.Sandbox)), "of another sandbox")
	l.Equal("reattest.audience", v.result.Audience, r.Audience, "meant for another broker")
	l.Equal("reattest.policy", v.result.Policy.Name+" "+string(v.result.Policy.Digest), r.Policy.Name+" "+string(r.Policy.Digest), "appraised by another policy")
	same := bytes.Equal(env.SessionKey, v.env.SessionKey) && bytes.Equal(env.RecipientKey, v.env.RecipientKey) && bytes.Equal(r.Confirmation.Recipient, env.RecipientKey) &&
		r.Confirmation.JWK != nil && v.session != nil && v.session.Equal(r.Confirmation.JWK.Key)
	if !same {
		l.Fail("reattest.keys", "the session and recipient key of the first attestation", "others", "it was not this job that attested")
	}
	if r.IssuedAt < last.IssuedAt || seen[r.ID] || seen[r.Nonce] {
		l.Fail("reattest.newer", "a result after "+time.Unix(last.IssuedAt, 0).UTC().Format(time.RFC3339)+" with a nonce of its own", time.Unix(r.IssuedAt, 0).UTC().Format(time.RFC3339), "an older result was shown again")
	}
	seen[r.ID], seen[r.Nonce] = true, true
	// The clocks may differ as far as a result lives.
	life := int64(receipt.ResultLifetime / time.Second)
	if start := a.StartUnixNano / int64(time.Second); start-r.IssuedAt > life || r.IssuedAt-start-max(a.Nanos, 0)/int64(time.Second) > life {
		l.Fail("reattest.time", "a result issued while it attested, at "+time.Unix(start, 0).UTC().Format(time.RFC3339), time.Unix(r.IssuedAt, 0).UTC().Format(time.RFC3339), "compare the clocks of node and verifier")
	}
	if a.Verdict == bundle.ReattestAffirmed {
		l.Equal("reattest.machine", machine(*v.result), machine(r), "the keys of this job left its machine")
	}
	verdict := bundle.ReattestAffirmed
	if receipt.RefusedFor(r) != "" {
		verdict = bundle.ReattestRefused
	}
	failed := ids(r.AllChecks().Failed())
	slices.Sort(failed)
	l.Equal("reattest.verdict", verdict+" "+strings.Join(failed, ", "), a.Verdict+" "+strings.Join(a.Failed, ", "), "the record says something else than the result")
	made, skipped := v.appraiseAgain(&l, env, r)
	if n := l.Failed(); len(n) > 0 {
		for _, c := range n {
			c.Found = which + c.Found
			*g = append(*g, c)
		}
		return r, true
	}
	said := fmt.Sprintf("%s%s at %s (%s); %d checks of its evidence hold, %d were not made", which, a.Verdict, time.Unix(r.IssuedAt, 0).UTC().Format(time.RFC3339), a.Cause, made, skipped)
	if len(failed) > 0 {
		said += "; refused for " + strings.Join(failed, ", ")
	}
	if pinned {
		g.Pass("reattest.result", said)
	} else {
		g.Skip("reattest.result", said+"; "+fromBundle)
	}
	return r, true
}

// machine names chip, guest and GPUs of a result.
func machine(r receipt.Result) string {
	var out []string
	for _, s := range r.Submods {
		for _, name := range []string{"snp.chip-id", "snp.measurement", "gpu.device"} {
			if id, ok := s.Claims[name].(string); ok {
				out = append(out, name+" "+id)
			}
		}
	}
	slices.Sort(out)
	return strings.Join(out, ", ")
}

// appraiseAgain appraises the evidence of a later attestation as that of the first,
// adds to l what does not hold, and counts what does and what was not checked.
func (v *verification) appraiseAgain(l *check.List, env *evidence.Envelope, r receipt.Result) (held, skipped int) {
	again := &verification{
		trust: v.trust, b: v.b, st: v.st, pl: v.pl, sb: v.sb, env: env, session: v.session, result: &r, verifierKeys: v.verifierKeys,
		again: true, affirmed: receipt.RefusedFor(r) == "",
	}
	again.trust.Endorsements = v.laterEndorsements(r)
	if again.rep.At = v.trust.At.UTC(); v.trust.At.IsZero() {
		again.rep.At = time.Unix(r.IssuedAt, 0).UTC()
	}
	found := again.appraise()
	if !again.affirmed {
		found = again.asRefused("reattest.refusal", found)
	}
	again.simulated(&found)
	for _, c := range found {
		switch c.Outcome {
		case check.Pass:
			held++
		case check.NotChecked:
			skipped++
		default:
			*l = append(*l, c)
		}
	}
	return held, skipped
}

// laterEndorsements are those of the caller, and those that the bundle carries of
// what a later appraisal used. What it used besides was published since the first,
// and is not in the bundle: checks that need it are not made.
func (v *verification) laterEndorsements(r receipt.Result) *endorse.Library {
	out := endorse.NewLibrary()
	if v.trust.Endorsements != nil {
		for _, h := range v.trust.Endorsements.All() {
			_ = out.Put(h.Item, h.Checked) // it has held as many before
		}
	}
	b, ok := v.part(bundle.Endorsements)
	used, err := endorse.UsedIn(r)
	if !ok || err != nil {
		return out
	}
	items, err := endorse.Decode(b)
	if err != nil {
		return out // the first appraisal has said so
	}
	for _, i := range items {
		grows := i.Key.Kind == endorse.CRL || i.Key.Kind == endorse.OCSP
		listed := slices.ContainsFunc(used, func(u endorse.Used) bool { return u.Key == i.Key && u.Digest == i.Digest })
		if listed && (!grows || v.believed()) {
			_ = out.Put(i, time.Unix(r.IssuedAt, 0)) // one that does not fit is not checked
		}
	}
	return out
}

// reattestAges holds the time between two results against how old one might become:
// those that are here, and those issued at the given times. The lease comes on top: a
// node that hears nothing goes on so long.
func (v *verification) reattestAges(g *check.List, id string, asked int64, issued []int64) {
	var lease int64
	for _, r := range v.releases {
		lease = max(lease, r.LeaseSeconds)
	}
	limit := asked + lease + int64(receipt.Leeway/time.Second)
	for _, a := range v.laters {
		if a.Verdict == bundle.ReattestAffirmed {
			issued = append(issued, a.result.IssuedAt)
		}
	}
	slices.Sort(issued)
	last, oldest := v.result.IssuedAt, int64(0)
	for _, at := range issued {
		oldest, last = max(oldest, at-last), max(last, at)
	}
	for _, s := range v.st.Timeline {
		if s.Stage == bundle.StageRun {
			end := (s.StartUnixNano + s.Nanos) / int64(time.Second)
			if v.st.Outcome.Stop != nil {
				end -= int64(receipt.MaxGrace / time.Second)
			}
			oldest = max(oldest, end-last)
		}
	}
	if oldest > limit {
		g.Fail(id, fmt.Sprintf("results of at most %d s, and a lease of %d s besides", asked, lease), fmt.Sprintf("one of %d s", oldest), "the job went on without attesting")
		return
	}
	g.Pass(id, fmt.Sprintf("no result became older than %d s; %d s were allowed, and a lease of %d s besides", max(oldest, 0), asked, lease))
}

// logReattest holds what the job attested against what the broker logged of it.
func (v *verification) logReattest(g *check.List, bodies []translog.Body) {
	const id = "log.reattest"
	logged := 0
	var issued []int64
	for _, b := range bodies {
		if b.Kind != translog.KindReattest {
			continue
		}
		logged++
		e := b.Reattest
		if e.Refused == "" {
			issued = append(issued, e.IssuedAt)
		}
		i := slices.IndexFunc(v.laters, func(a later) bool { return a.result.ID == e.ResultID })
		switch {
		case i < 0 && v.omitted > 0 && e.Refused == "":
			// It may be one of those that are left out.
		case i < 0:
			g.Fail(id, "the attestation of entry "+fmt.Sprint(b.Index), "none", "the broker was shown a result that the bundle does not tell of")
			return
		default:
			r := v.laters[i].result
			if e.Verifier != r.Issuer || e.Evidence != r.EvidenceDigest || e.IssuedAt != r.IssuedAt || e.Refused != receipt.RefusedFor(r) {
				g.Fail(id, "the same in bundle and log", "a difference in entry "+fmt.Sprint(b.Index), "")
				return
			}
		}
	}
	for _, a := range v.laters {
		entry := slices.ContainsFunc(bodies, func(b translog.Body) bool {
			return b.Kind == translog.KindReattest && b.Reattest.ResultID == a.result.ID
		})
		if a.Shown != entry && logged < reattestLogged {
			g.Fail(id, "an entry for each result that the broker took", fmt.Sprintf("number %d, taken: %t, logged: %t", a.Number, a.Shown, entry), "")
			return
		}
	}
	// Where results are left out, the broker's entries say when they were issued.
	if v.omitted > 0 && logged < reattestLogged && v.result != nil {
		v.reattestAges(g, "log.reattest-age", v.resultAge(), issued)
	}
	if logged > 0 {
		g.Pass(id, fmt.Sprintf("%d results of later attestations", logged))
	}
}

// reattestLogged is from how many entries of one job on the broker logs no more.
const reattestLogged = 512
