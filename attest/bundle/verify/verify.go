// Package verify checks a job's bundle offline, from the raw evidence up: it
// appraises again what the verifier appraised, and holds every receipt against
// what it speaks of.
//
// Trusted: the given anchors, the keys that the caller pins, and this package's
// copy of the policies. Checked: everything in the bundle, as the report lists
// it. Not checked, and said so in every report: what no evidence can show. The
// keys in a bundle prove nothing of themselves; what rests on them alone is
// reported as not checked.
package verify

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

// Trust is what the caller believes before looking at the bundle.
type Trust struct {
	// Anchors end every chain of device certificates. The zero value trusts
	// nothing, and no bundle passes under it.
	Anchors anchor.Set
	// VerifierKeys and BrokerKeys are JSON Web Key Sets that the caller has from
	// a source other than the bundle. Where one is nil, the bundle's own are
	// used, and what rests on them counts as not checked.
	VerifierKeys []byte
	BrokerKeys   []byte
	// Log is whose signatures count on a checkpoint of the evidence log. The zero
	// value trusts nobody's, and inclusion and witnesses are not checked then.
	Log translog.Trust
	// Approvers are whose approvals of grants count. Nil knows nobody, and who
	// approved is not checked then.
	Approvers Approvers
	// At is the clock for certificates; zero means the time at which the
	// result was issued.
	At time.Time
	// Endorsements are what vendors published about the devices, besides those
	// that the bundle carries. Nil has none. What the verifier checked with what
	// neither has is its word.
	Endorsements *endorse.Library
	// Policies are those that the caller knows besides the ones that ship. A
	// bundle's own word on what its policy says is none.
	Policies []policy.Policy
	// References are signed reference values for the plan's policy, if that is
	// one of Policies: those that were valid at the time.
	References []string
	// Earlier are the records of the attempts before this one, in any order. Nil has
	// none, and what those attempts used of a budget is the agent's word then.
	Earlier [][]byte
}

// Verdict is what a report comes to. The zero value is not a pass.
type Verdict string

const (
	// Verified means that the record is signed by the attested job and that no
	// check failed. The record may be one of a refusal.
	Verified Verdict = "verified"
	// Failed means that a check failed: the record is not what it says.
	Failed Verdict = "failed"
	// Unknown means that nothing failed, but that there is nothing the caller
	// trusts to hold the record against: the job ended before there was
	// evidence; its evidence is not genuine; nobody whose keys are pinned judged
	// it, and no policy of this program could be applied in full; the record
	// is in no log, so that what it leaves out cannot be seen; the caller names
	// the log's key or witnesses, and no proof under them is there yet; or it names
	// approvers, and no approval counted, or the record does not carry those that did.
	Unknown Verdict = "could not tell"
)

// Group is a set of checks about one part of the record.
type Group struct {
	Name   string     `json:"name"`
	Title  string     `json:"title"`
	Checks check.List `json:"checks"`
}

// Report is what came of a verification.
type Report struct {
	Verdict Verdict `json:"verdict"`
	// Summary is one sentence for people.
	Summary string `json:"summary"`
	// Simulated is true if a device's chain ended in a simulation anchor.
	Simulated bool           `json:"simulated"`
	JobID     string         `json:"jobId"`
	Name      string         `json:"name"`
	Plan      plan.Digest    `json:"plan"`
	Statement plan.Digest    `json:"statement"`
	Outcome   bundle.Outcome `json:"outcome"`
	Timeline  []bundle.Step  `json:"timeline"`
	At        time.Time      `json:"at"`
	Groups    []Group        `json:"groups"`
	NotProven []string       `json:"notProven"`
}

// Checks returns every check of the report, in the order of the groups.
func (r Report) Checks() check.List {
	var out check.List
	for _, g := range r.Groups {
		out = append(out, g.Checks...)
	}
	return out
}

// Count returns how many checks passed, failed and were not made.
func (r Report) Count() (pass, fail, notChecked int) {
	for _, c := range r.Checks() {
		switch c.Outcome {
		case check.Pass:
			pass++
		case check.NotChecked:
			notChecked++
		case check.Fail:
			fail++
		default:
			fail++
		}
	}
	return pass, fail, notChecked
}

// Verify checks a bundle. It always answers: a file that is no bundle is a
// report with one failed check.
func Verify(file []byte, trust Trust) Report {
	v := &verification{trust: trust, session: nil}
	v.rep.NotProven = notProven()
	v.run(file)
	return v.rep
}

// verification is one run. Its fields are filled in the order of run; a nil
// field means that the part is missing or did not parse, which was reported.
type verification struct {
	trust Trust
	rep   Report

	b   *bundle.Bundle
	st  bundle.Statement
	pl  *plan.Plan
	sb  *plan.Sandbox
	env *evidence.Envelope
	// session is the key that the evidence binds.
	session *ecdsa.PublicKey
	// rooted is true once something that the caller trusts stands behind the
	// session key: a genuine SEV-SNP report that binds it, or a result under
	// pinned keys that confirms it.
	rooted bool
	// applied is true if a policy of this program accepts the evidence, and every
	// check that it requires was made here.
	applied bool

	verifierKeys receipt.Keys
	result       *receipt.Result
	// affirmed is true if the result affirms every device.
	affirmed bool

	brokerKeys receipt.Keys
	releases   []receipt.Release
	status     *bundle.Status
	// line is where the job's checkpoints begin, records are the digests of their
	// records, nil if the bundle has none, and heads the countersignatures that hold.
	line    line
	records []plan.Digest
	heads   []receipt.CheckpointHead
	// resealed is what a job without a container sealed anew.
	resealed *resealed
	// laters are the job's later attestations whose results are genuine, and omitted
	// counts those without a result here. again is true for a look at one of them.
	laters  []later
	omitted int
	again   bool
	// unproven is what the caller asks of the log and the bundle does not have yet.
	unproven string
	// stands is whether somebody whom the caller lists signed for the releases.
	stands bool
}

func (v *verification) run(file []byte) {
	g := v.group("bundle", "The file and its signature")
	b, err := bundle.Parse(file)
	if err != nil {
		g.Fail("bundle.form", "a bundle", err.Error(), "ask for the file again, unchanged")
		v.conclude(g)
		return
	}
	g.Pass("bundle.form", fmt.Sprintf("%d bytes, %d parts", len(file), len(b.Parts)))
	v.b = b
	v.rep.Statement = plan.Sum(b.Statement)
	if v.st, err = bundle.ParseStatement(b.Statement); err != nil {
		g.Fail("statement.form", "a statement", err.Error(), "ask for the file again, unchanged")
		v.conclude(g)
		return
	}
	if !jobForm.MatchString(v.st.JobID) {
		// As every word of the statement, it stands beside the verdict.
		g.Fail("statement.form", "a job id: at most 128 letters, digits, '.', '_' and '-'", fmt.Sprintf("%.80q", v.st.JobID), "")
		v.conclude(g)
		return
	}
	g.Pass("statement.form", v.st.Version)
	v.rep.JobID, v.rep.Plan, v.rep.Outcome, v.rep.Timeline = v.st.JobID, v.st.PlanDigest, v.st.Outcome, v.st.Timeline
	v.parts(g)
	v.openEvidence(g)
	v.signature(g)
	v.done("bundle", g)

	v.planGroup()
	v.sandboxGroup()
	v.resultGroup()
	if v.refusal() {
		v.sandboxRefused()
	}
	v.evidenceGroup()
	v.releaseGroup()
	v.approvalGroup()
	v.reattestGroup()
	v.runGroup()
	v.egressGroup()
	v.checkpointGroup()
	v.resealGroup()
	v.outcomeGroup()
	v.logGroup()
	v.conclude(nil)
}

func (v *verification) group(name, title string) *check.List {
	v.rep.Groups = append(v.rep.Groups, Group{Name: name, Title: title})
	return &check.List{}
}

func (v *verification) done(name string, l *check.List) {
	for i := range v.rep.Groups {
		if v.rep.Groups[i].Name == name {
			v.rep.Groups[i].Checks = *l
		}
	}
}

// reached reports whether the job got as far as the end of stage s.
func (v *verification) reached(s bundle.Stage) bool {
	for _, step := range v.st.Timeline {
		if step.Stage == s && step.Outcome == bundle.StepDone {
			return true
		}
	}
	return false
}

// required are the parts that a job which ended the given stage has.
var required = map[bundle.Part]bundle.Stage{
	bundle.JobFile: bundle.StageJobspec, bundle.Plan: bundle.StageJobspec, bundle.AgentPart: bundle.StageJobspec,
	bundle.Sandbox: bundle.StageSandbox, bundle.Evidence: bundle.StageCollect,
	bundle.Result: bundle.StageVerify, bundle.VerifierKeys: bundle.StageVerify,
	bundle.BrokerKeys: bundle.StageRelease,
	bundle.Trace:      bundle.StageStart, bundle.HolderStatus: bundle.StageStart,
	bundle.ResealPart:  bundle.StageReseal,
	bundle.Checkpoints: bundle.StageRun, bundle.LogsDigest: bundle.StageRun,
}

// parts holds each part against the digest that the statement has of it, and
// the set of parts against how far the job got.
func (v *verification) parts(g *check.List) {
	names := map[bundle.Part]bool{}
	for n := range v.b.Parts {
		names[n] = true
	}
	for n := range v.st.Parts {
		names[n] = true
	}
	for n, stage := range required {
		if v.reached(stage) {
			names[n] = true
		}
	}
	for _, n := range slices.Sorted(maps.Keys(names)) {
		id := "part." + string(n)
		if !slices.Contains(bundle.Parts(), n) {
			id = "part.unknown"
		}
		body, there := v.b.Parts[n]
		digest, stated := v.st.Parts[n]
		switch {
		case !there && !stated:
			g.Fail(id, "a part, because the job ended stage "+string(required[n]), "none", "the record is not complete")
		case !there:
			g.Fail(id, "the part that the statement names", "none", "the part was taken out after signing")
		case !stated:
			g.Fail(id, "only parts that the statement names", fmt.Sprintf("%d bytes named %.40q", len(body), string(n)), "the part was put in after signing")
		default:
			g.Equal(id, string(digest), string(plan.Sum(body)), "the part was changed after signing")
		}
	}
}

// part returns a part only if the statement names it and its digest holds, so
// that nothing later is built on a part that failed.
func (v *verification) part(n bundle.Part) ([]byte, bool) {
	b, ok := v.b.Parts[n]
	return b, ok && v.st.Parts[n] == plan.Sum(b)
}

func (v *verification) openEvidence(g *check.List) {
	b, ok := v.part(bundle.Evidence)
	if !ok {
		return
	}
	env, err := evidence.Parse(b)
	if err != nil {
		g.Fail("evidence.form", "an evidence envelope", err.Error(), "")
		return
	}
	v.env = env
	v.session, err = sessionKey(env.SessionKey)
	if err != nil {
		g.Fail("evidence.session-key", "a P-256 public key", err.Error(), "")
	}
}

func sessionKey(der []byte) (*ecdsa.PublicKey, error) {
	k, err := x509.ParsePKIXPublicKey(der)
	if err != nil {
		return nil, err
	}
	pub, ok := k.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return nil, errors.New("another kind of key")
	}
	return pub, nil
}

// signature checks the statement by the key in the evidence; that the evidence
// binds that key is for evidenceGroup.
func (v *verification) signature(g *check.List) {
	const id = "statement.signature"
	switch {
	case v.session == nil && v.reached(bundle.StageCollect):
		g.Fail(id, "a signature by the session key in the evidence", "no such key", "")
	case v.session == nil && len(v.b.Signature) > 0:
		g.Skip(id, "signed by a key that no evidence binds: the job ended before there was evidence")
	case v.session == nil:
		g.Skip(id, "the job ended before there was evidence that binds a key")
	case !v.signed(bundle.StatementLabel, v.b.Statement, v.b.Signature):
		g.Fail(id, "a signature by the session key in the evidence", "none that holds", "the statement is not the attested job's")
	default:
		g.Pass(id, "by the session key in the evidence")
	}
}

func (v *verification) signed(label string, body, signature []byte) bool {
	sum := bundle.SignedDigest(label, body)
	return v.session != nil && ecdsa.VerifyASN1(v.session, sum[:], signature)
}

// keys returns the keys of issuer: the pinned ones, or the bundle's own.
func (v *verification) keys(pinned []byte, part bundle.Part, issuer string) (receipt.Keys, bool, error) {
	if pinned != nil {
		k, err := receipt.ParseKeys(issuer, pinned)
		return k, true, err
	}
	own, ok := v.part(part)
	if !ok {
		return receipt.Keys{}, false, errors.New("the bundle has no key set")
	}
	k, err := receipt.ParseKeys(issuer, own)
	return k, false, err
}

// fromBundle says why a signature that holds is not a pass.
const fromBundle = "holds under keys that come from the bundle itself: pin them"

// byKeys records a signature that holds.
func byKeys(l *check.List, id string, pinned bool, who string) {
	if pinned {
		l.Pass(id, "by the pinned keys of "+who)
		return
	}
	l.Skip(id, fromBundle)
}

// issuerOf reads one claim of a token before its signature is checked: the
// issuer, which says whose keys to check it by.
func issuerOf(token string) (string, error) {
	if len(token) > receipt.MaxToken {
		return "", errors.New("token is too large")
	}
	jws, err := jose.ParseSignedCompact(token, []jose.SignatureAlgorithm{jose.ES384})
	if err != nil {
		return "", err
	}
	var head struct {
		Issuer string `json:"iss"`
	}
	if err := json.Unmarshal(jws.UnsafePayloadWithoutVerification(), &head); err != nil {
		return "", err
	}
	if head.Issuer == "" {
		return "", errors.New("token names no issuer")
	}
	return head.Issuer, nil
}

var jobForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

func (v *verification) conclude(l *check.List) {
	if l != nil {
		v.done("bundle", l)
	}
	_, failed, _ := v.rep.Count()
	o := v.rep.Outcome
	switch {
	case failed > 0:
		v.rep.Verdict = Failed
		v.rep.Summary = fmt.Sprintf("the record is not what it says: %s", strings.Join(ids(v.rep.Checks().Failed()), ", "))
	case v.env == nil || v.session == nil:
		v.rep.Verdict = Unknown
		v.rep.Summary = fmt.Sprintf("job %s ended %s at %s, before there was evidence; nothing here proves it", v.rep.JobID, o.State, o.Stage)
	case !v.rooted:
		v.rep.Verdict = Unknown
		v.rep.Summary = fmt.Sprintf("job %s ended %s at %s, and the evidence is not genuine; pin the verifier's keys to see whether it said so", v.rep.JobID, o.State, o.Stage)
	case !v.believed() && !v.applied:
		v.rep.Verdict = Unknown
		v.rep.Summary = fmt.Sprintf("job %s ended %s at %s, and nobody whose keys are pinned says that the machine was acceptable", v.rep.JobID, o.State, o.Stage)
	case v.b.Log == nil:
		v.rep.Verdict = Unknown
		v.rep.Summary = fmt.Sprintf("job %s ended %s at %s, and no evidence log has the record: what it leaves out cannot be seen", v.rep.JobID, o.State, o.Stage)
	case v.unproven != "":
		v.rep.Verdict = Unknown
		v.rep.Summary = fmt.Sprintf("job %s ended %s at %s, and %s", v.rep.JobID, o.State, o.Stage, v.unproven)
	case o.State == bundle.Succeeded:
		v.rep.Verdict = Verified
		v.rep.Summary = fmt.Sprintf("job %s succeeded; every check that was made holds", v.rep.JobID)
	case o.State == bundle.Refused:
		v.rep.Verdict = Verified
		v.rep.Summary = fmt.Sprintf("a true record of a refusal: job %s was refused at %s", v.rep.JobID, o.Stage)
		if f := ids(o.Checks.Failed()); len(f) > 0 {
			v.rep.Summary += " for " + strings.Join(f, ", ")
		}
	default:
		v.rep.Verdict = Verified
		v.rep.Summary = fmt.Sprintf("a true record: job %s %s at %s", v.rep.JobID, o.State, o.Stage)
		if o.Reason != "" {
			v.rep.Summary += " (" + o.Reason + ")"
		}
	}
	if v.rep.Simulated && v.rep.Verdict != Failed {
		v.rep.Summary += "; the devices are simulated"
	}
}

func ids(l check.List) []string {
	var out []string
	for _, c := range l {
		if !slices.Contains(out, c.ID) {
			out = append(out, c.ID)
		}
	}
	return out
}

func notProven() []string {
	return []string{
		"That the GPU sits in the same machine as the CPU: on Hopper that follows only from the measured guest having collected the report itself.",
		"That the node's root did not read the container's memory or files through the runtime: until the node image is locked down, only the trace of an operator's exec would show it.",
		"What the job's code did with what it was given: it ran with the named image, command and inputs, and could print what it liked within its output budget.",
		"Outcome, timeline, trace, what the holder counted, digests of output, and who submitted the job to which node, beyond what devices sign: they are the word of the measured agent and holder, signed by the job's key.",
		"A refusal at any other stage than verify: only the verifier's is signed by whoever refused.",
		"That no other record of the job was logged after this one.",
		"That nothing leaked through side channels of the CPU, the GPU or the network.",
		"That nobody took a data key from the broker's own machine: it has each in its memory while it releases it, and no key store asks for the broker's own attestation yet. What it releases by its rules is logged.",
		"That the rules for approvals in the bundle are those that the owner set: they are the broker's word, and the entries of the evidence log for the asset say more.",
		"That the broker shows everyone the same log, unless witnesses that you named cosigned its checkpoint (log.witness).",
	}
}
