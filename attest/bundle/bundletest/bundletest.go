// Package bundletest makes bundles for tests, from a simulated machine and
// ordinary keys: every part of them can be forged by its caller.
package bundletest

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/receipt/sshsig"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/translog"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

// Names of the parties.
const (
	VerifierID = "verifier.test"
	BrokerID   = "broker.test"
)

// Group are those of whom two approve before the weights are released.
const Group = "weights-approvers"

// EgressHost is the one name that the plan lets the job connect to.
const EgressHost = "metrics.example.com"

// OwnPolicy names a policy that the verifier has and no other program, and
// SourcedPolicy one that has its reference values from a source besides.
const (
	OwnPolicy     = "own"
	SourcedPolicy = "sourced"
)

// Lab is a machine, a verifier and a broker.
type Lab struct {
	Chip     *simulate.Chip
	GPUs     []*simulate.GPU
	Anchors  anchor.Set
	TPM      *vtpmtest.TPM
	Verifier *receipt.Signer
	Broker   *receipt.Signer
	Now      time.Time
	// Source signs reference values for SourcedPolicy.
	Source *receipt.Signer
	// Approvers sign approvals of grants, by name: alice, bob and carol are in
	// Group, the owner of the assets consents, and mallory signs too.
	Approvers map[string]ssh.Signer
	// ImageKey signs the image of every job.
	ImageKey *ecdsa.PrivateKey
	// Entries is the broker's log so far.
	Entries []translog.Entry

	service  *verifier.Verifier
	endorsed *endorse.Cache
	policies map[string]policy.Policy
	head     translog.Head
}

// New makes a lab whose devices and keys are minted at now.
func New(now time.Time) (*Lab, error) {
	vendor, err := simulate.New(simulate.Options{Now: now})
	if err != nil {
		return nil, err
	}
	return On(vendor.Chip(), vendor.GPUs(), vendor.Anchors(), now)
}

// On makes a lab on a machine that is there already.
func On(chip *simulate.Chip, gpus []*simulate.GPU, anchors anchor.Set, now time.Time) (*Lab, error) {
	l := &Lab{Chip: chip, GPUs: gpus, Anchors: anchors, Now: now.Truncate(time.Second), head: translog.Genesis(BrokerID)}
	var err error
	if l.TPM, err = vtpmtest.New(now); err != nil {
		return nil, err
	}
	l.TPM.Extend(vtpm.Event{PCR: vtpm.AgentPCR, Name: "agent", Digest: sha256.Sum256([]byte("cofferd")), MeasuredBy: vtpm.MeasuredBySelf})
	if l.Verifier, err = signer(VerifierID); err != nil {
		return nil, err
	}
	if l.Broker, err = signer(BrokerID); err != nil {
		return nil, err
	}
	l.Approvers = map[string]ssh.Signer{}
	for _, name := range []string{"alice", "bob", "carol", "owner", "mallory"} {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			return nil, err
		}
		if l.Approvers[name], err = ssh.NewSignerFromSigner(key); err != nil {
			return nil, err
		}
	}
	if l.ImageKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	l.policies = map[string]policy.Policy{}
	for _, name := range policy.Names() {
		if l.policies[name], err = policy.Named(name); err != nil {
			return nil, err
		}
	}
	own := l.policies["simulation"]
	own.Name = OwnPolicy
	l.policies[OwnPolicy] = own
	if l.Source, err = signer("values.test"); err != nil {
		return nil, err
	}
	keys, err := l.Source.JWKS()
	if err != nil {
		return nil, err
	}
	own.Name, own.Sources = SourcedPolicy, []policy.Source{{Issuer: l.Source.Issuer(), Keys: keys}}
	l.policies[SourcedPolicy] = own
	return l, l.Endorse(nil)
}

// Policy returns one of the verifier's policies.
func (l *Lab) Policy(name string) policy.Policy { return l.policies[name] }

// References are reference values that the lab's GPUs meet, if they have the
// given mode, "SPT".
func (l *Lab) References(mode string) (string, error) {
	return policy.SignValues(l.Source, policy.Values{
		IssuedAt: l.Now.Add(-time.Hour).Unix(), Expires: l.Now.Add(time.Hour).Unix(), GPU: &policy.GPUValues{FeatureFlags: []string{mode}},
	})
}

// Endorse gives the verifier what vendors published.
func (l *Lab) Endorse(c *endorse.Cache) error {
	values, err := l.References("SPT")
	if err != nil {
		return err
	}
	l.endorsed = c
	l.service, err = verifier.New(verifier.Options{
		ID: VerifierID, References: []string{values}, Anchors: l.Anchors, Endorsements: c, Policies: slices.Collect(maps.Values(l.policies)), Signer: l.Verifier,
		NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: func() time.Time { return l.Now }, Build: "test",
	})
	return err
}

func signer(id string) (*receipt.Signer, error) {
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return receipt.NewSigner(id, k)
}

// Job is one job's record before it is put together. Its caller may change any
// part; Bundle signs what is there.
type Job struct {
	ID       string
	Plan     plan.Digest
	Parts    map[bundle.Part][]byte
	Outcome  bundle.Outcome
	Timeline []bundle.Step
	Log      *bundle.Log
	Session  *ecdsa.PrivateKey

	lab       *Lab
	plan      plan.Plan
	result    receipt.Result
	recipient []byte
}

// Options say how a job goes. The zero value is a job that succeeds.
type Options struct {
	ID string
	// FlipGPU flips a bit of the GPU report; the verifier refuses it.
	FlipGPU bool
	// FlipSNP does so to the SEV-SNP report.
	FlipSNP bool
	// OmitSNP leaves the SEV-SNP report out, and the verifier does not mind.
	OmitSNP bool
	// OtherRuntime makes the sandbox with another runtime than the plan's; the
	// verifier refuses it.
	OtherRuntime bool
	// Policy is the plan's; empty means "simulation".
	Policy string
	// Resume is what the plan says of resuming, empty for nothing.
	Resume string
	// ImageSignature takes the place of the signature by ImageKey: evidence speaks of it.
	ImageSignature []byte
	// ImageSBOM takes the place of the bill of materials by ImageKey: evidence speaks of
	// it. NoImageSBOM leaves it out.
	ImageSBOM   []byte
	NoImageSBOM bool
	// CC is what the plan asks of confidential computing on its GPUs.
	CC string
	// Reseal makes it a job without a container, which seals weights anew; Export, with
	// it, one that seals a checkpoint anew.
	Reseal, Export bool
	// Reattest is the plan's; the job attests twice while it runs.
	Reattest *plan.Reattest
	// Attempt makes the job one of at most three attempts with a budget of a minute.
	Attempt *bundle.Attempt
	// Argument is the last of the command's; empty means the job's id, so that each job
	// has a plan of its own.
	Argument string
	// Fail ends the job with exit code 1.
	Fail bool
	// RefuseAdmit ends the job before there is a holder.
	RefuseAdmit bool
}

const stepTime = 100 * time.Millisecond

// Job runs a job, as it were.
func (l *Lab) Job(o Options) (*Job, error) {
	if o.ID == "" {
		o.ID = "job-1"
	}
	j := &Job{ID: o.ID, Parts: map[bundle.Part][]byte{}, lab: l}
	var err error
	if j.Session, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if err := j.documents(o); err != nil {
		return nil, fmt.Errorf("documents: %w", err)
	}
	if o.Reseal {
		if err := j.resealPlan(o.Export); err != nil {
			return nil, fmt.Errorf("documents: %w", err)
		}
	}
	if o.RefuseAdmit {
		delete(j.Parts, bundle.Sandbox)
		delete(j.Parts, bundle.ImageSignaturePart)
		delete(j.Parts, bundle.ImageSBOMPart)
		j.end(bundle.StageAdmit, bundle.Outcome{State: bundle.Refused, Stage: bundle.StageAdmit, Reason: "quota"})
		return j, j.log()
	}
	if err := j.attest(o); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if len(j.result.AllChecks().Failed()) > 0 {
		j.end(bundle.StageVerify, bundle.Outcome{State: bundle.Refused, Stage: bundle.StageVerify, Reason: "evidence-refused", Checks: j.result.AllChecks().Failed()})
		return j, j.log()
	}
	if o.Reseal {
		return j, j.reseal()
	}
	if err := j.release(); err != nil {
		return nil, fmt.Errorf("release: %w", err)
	}
	if err := j.course(); err != nil {
		return nil, fmt.Errorf("run: %w", err)
	}
	how := bundle.Outcome{State: bundle.Succeeded, Stage: bundle.StageRun}
	if o.Fail {
		how.State, how.Reason, how.ExitCode = bundle.Failed, "exit-code", 1
	}
	j.end(bundle.StageRun, how)
	if o.Reattest != nil {
		if err := j.AttestTwice(o); err != nil {
			return nil, fmt.Errorf("attest again: %w", err)
		}
	}
	run := j.Timeline[len(j.Timeline)-1]
	j.Timeline = append(j.Timeline, bundle.Step{Stage: bundle.StageCheckpoint, StartUnixNano: run.StartUnixNano + run.Nanos/2, Nanos: run.Nanos / 4, Outcome: bundle.StepDone})
	return j, j.log()
}

func (j *Job) json(name bundle.Part, v any) error {
	b, err := plan.Canonical(v)
	j.Parts[name] = b
	return err
}

func (j *Job) documents(o Options) error {
	if o.Policy == "" {
		o.Policy = "simulation"
	}
	pol, ok := j.lab.policies[o.Policy]
	if !ok {
		return fmt.Errorf("no policy %q", o.Policy)
	}
	ref, err := pol.Ref()
	if err != nil {
		return err
	}
	d := func(s string) plan.Digest { return plan.Sum([]byte(s)) }
	argument := o.Argument
	if argument == "" {
		argument = j.ID
	}
	image := "sha256:" + hex.EncodeToString(make([]byte, 32))
	profile := plan.Profile{
		Version: plan.SandboxVersion, Shim: "io.containerd.runc.v2", ShimDigest: d("shim"), Runtime: "runsc test", RuntimeDigest: d("runsc"),
		RuntimeFlags: []string{"--platform=systrap"}, Trace: d("trace"), Rules: "rules", ImageStore: "tmpfs",
		RuleSet: d("rule set"),
		Egress:  &plan.EgressProfile{Gateway: d("gateway"), Filter: d("filter"), Flag: "--network=sandbox"},
	}
	if err := j.signImage(&profile, image); err != nil {
		return err
	}
	if o.ImageSignature != nil {
		j.Parts[bundle.ImageSignaturePart] = o.ImageSignature
	}
	if o.ImageSBOM != nil {
		j.Parts[bundle.ImageSBOMPart] = o.ImageSBOM
	}
	sbom := plan.Sum(j.Parts[bundle.ImageSBOMPart])
	if o.NoImageSBOM {
		delete(j.Parts, bundle.ImageSBOMPart)
		sbom = ""
	}
	pd, err := profile.Digest()
	if err != nil {
		return err
	}
	j.plan = plan.Plan{
		Version: plan.Version, Name: "fashion", Image: image, Command: []string{"python3", "/app/train.py", argument},
		Inputs:      []plan.Input{{Name: "data", Asset: "dataset", Digest: d("dataset"), Mount: "/inputs/data"}, {Name: "model", Asset: "weights", Digest: d("weights"), Mount: "/inputs/model"}},
		Checkpoints: &plan.Checkpoints{Asset: "checkpoints", Mount: "/checkpoints", Resume: o.Resume},
		Egress:      []plan.Egress{{Host: EgressHost, Port: 443, MaxBytes: 10_000, BytesPerSecond: 1000}},
		Output:      plan.Output{LogBytes: 1 << 20, EgressBytes: 10_000, EgressBytesPerSecond: 1000, EgressEvents: 2, Metrics: &plan.Metrics{Names: []string{"accuracy", "loss"}, MaxValues: 100, ValuesPerSecond: 10}},
		Resources:   plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, Pids: 100, GPUs: 1, CC: o.CC, MaxSeconds: 60},
		Policy:      ref, SandboxProfile: pd, Reattest: o.Reattest,
	}
	if o.Attempt != nil {
		j.plan.Retry, j.plan.Budget = &plan.Retry{Limit: 2}, &plan.Budget{Seconds: 60}
	}
	if j.Parts[bundle.Plan], err = j.plan.Canonical(); err != nil {
		return err
	}
	j.Plan = plan.Sum(j.Parts[bundle.Plan])
	if o.OtherRuntime {
		profile.RuntimeFlags = append(profile.RuntimeFlags, "--allow-suid")
	}
	sb := plan.Sandbox{
		Version: plan.SandboxVersion, JobID: j.ID, Image: image, ImageSignature: plan.Sum(j.Parts[bundle.ImageSignaturePart]), ImageSBOM: sbom, Profile: profile, Wrapper: []string{"runsc", profile.Egress.Flag},
		Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`),
	}
	if j.Parts[bundle.Sandbox], err = sb.Canonical(); err != nil {
		return err
	}
	j.Parts[bundle.JobFile] = []byte("apiVersion: coffer.run/v1\nname: fashion\n")
	return j.json(bundle.AgentPart, bundle.Agent{Node: "node-1", Agent: "test", Containerd: "2.4.2", Runtime: profile.Runtime, Shim: profile.Shim, Submitter: "engineer/engineer", Attempt: o.Attempt})
}

func (j *Job) attest(o Options) error {
	l := j.lab
	recipient, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		return err
	}
	j.recipient = recipient.PublicKey().Bytes()
	e, err := j.envelope(o)
	if err != nil {
		return err
	}
	if err := j.json(bundle.Evidence, e); err != nil {
		return err
	}
	if j.Parts[bundle.VerifierKeys], err = l.Verifier.JWKS(); err != nil {
		return err
	}
	if _, j.result, err = l.service.Appraise(context.Background(), j.Parts[bundle.Evidence], BrokerID); err != nil {
		return err
	}
	if err := j.Carry(); err != nil {
		return err
	}
	if o.OmitSNP {
		j.result.Checks = nil
		j.result.Submods = map[string]receipt.Appraisal{"tpm0": {Status: receipt.Affirming}, "gpu0": {Status: receipt.Affirming}}
	}
	return j.SignResult(func(*receipt.Result) {})
}

// envelope collects evidence for the job's keys under a fresh nonce.
func (j *Job) envelope(o Options) (*evidence.Envelope, error) {
	l := j.lab
	session, err := x509.MarshalPKIXPublicKey(&j.Session.PublicKey)
	if err != nil {
		return nil, err
	}
	nonce, _, err := l.service.Challenge()
	if err != nil {
		return nil, err
	}
	credential, err := l.Verifier.Sign(vtpm.TypeCredential, vtpm.Credential{
		Issuer: VerifierID, ID: "credential-1", IssuedAt: l.Now.Unix(), Expires: l.Now.Add(time.Hour).Unix(),
		AKName: akName(l.TPM.AKPublic), EKDigest: plan.Sum(l.TPM.EKChain[0]), Class: "software", Simulated: true,
	})
	if err != nil {
		return nil, err
	}
	e := &evidence.Envelope{
		Version: evidence.Version, VerifierID: VerifierID, Nonce: nonce, JobID: j.ID,
		Plan: j.Parts[bundle.Plan], Sandbox: j.Parts[bundle.Sandbox], RecipientKey: j.recipient, SessionKey: session,
		TPM: &evidence.TPM{AKPublic: l.TPM.AKPublic, AKCredential: credential},
	}
	bound, err := e.Challenge().Bind()
	if err != nil {
		return nil, err
	}
	gpu := l.GPUs[0]
	report, err := gpu.Report(bound.GPUNonce(), simulate.GPUOptions{})
	if err != nil {
		return nil, err
	}
	e.GPUs = []evidence.GPU{{UUID: gpu.UUID(), Report: report, Chain: gpu.ChainPEM(), DriverVersion: gpu.DriverVersion(), VBIOSVersion: gpu.VBIOSVersion()}}
	if o.Reseal {
		e.GPUs = nil
	}
	if o.FlipGPU {
		e.GPUs[0].Report[100] ^= 1
	}
	devices := e.Devices()
	extra := bound.TPMExtraData(devices)
	if e.TPM.Quote, e.TPM.Signature, err = l.TPM.Quote(extra[:], nil, vtpm.AgentPCR); err != nil {
		return nil, err
	}
	e.TPM.PCRs = l.TPM.PCRs(vtpm.AgentPCR)
	if e.TPM.EventLog, err = vtpm.EncodeLog(l.TPM.Events); err != nil {
		return nil, err
	}
	reportData := bound.SNPReportData(devices, e.TPM.Quote, e.TPM.EventLog)
	if report, err = l.Chip.Report(reportData, simulate.SNPOptions{}); err != nil {
		return nil, err
	}
	if o.FlipSNP {
		report[0x90] ^= 1
	}
	e.SNP = &evidence.SNP{Report: report, Certificates: l.Chip.CertTable()}
	if o.OmitSNP {
		e.SNP = nil
	}
	return e, nil
}

// Carry puts the endorsements that the result lists into the bundle, changed.
func (j *Job) Carry(change ...func([]endorse.Item) []endorse.Item) error {
	used, err := endorse.UsedIn(j.result)
	if err != nil {
		return err
	}
	var items []endorse.Item
	for _, u := range used {
		i, ok := j.lab.endorsed.ByDigest(u.Key, u.Digest)
		if !ok {
			return fmt.Errorf("%s is not held", u.Key)
		}
		items = append(items, i)
	}
	for _, c := range change {
		items = c(items)
	}
	if len(items) == 0 {
		delete(j.Parts, bundle.Endorsements)
		return nil
	}
	j.Parts[bundle.Endorsements], err = endorse.Encode(items)
	return err
}

// SignResult signs the result again, changed.
func (j *Job) SignResult(change func(*receipt.Result)) error {
	r := j.result
	change(&r)
	token, err := j.lab.Verifier.Sign(receipt.TypeResult, r)
	j.Parts[bundle.Result] = []byte(token)
	return err
}

func akName(public []byte) string {
	sum := sha256.Sum256(public)
	return "000b" + hex.EncodeToString(sum[:])
}

// Append adds an entry to the lab's log.
func (l *Lab) Append(b translog.Body) (translog.Entry, error) {
	b.TimeMillis, b.Actor = l.Now.UnixMilli(), "agent/node-1"
	e, head, err := translog.Append(l.head, b)
	if err == nil {
		l.head, l.Entries = head, append(l.Entries, e)
	}
	return e, err
}

// Listed is what a reader who knows the approvers hands to coffer-verify. Mallory
// is not among them.
func (l *Lab) Listed() []byte {
	var out []byte
	for _, name := range []string{"alice", "bob", "carol"} {
		out = fmt.Appendf(out, "%s %s %s", name, Group, ssh.MarshalAuthorizedKey(l.Approvers[name].PublicKey()))
	}
	return out
}

// Terms are the job's grant's.
func (j *Job) Terms() receipt.GrantTerms {
	return receipt.GrantTerms{
		Version: receipt.TermsVersion, Broker: BrokerID, Grant: "grant-1", Owner: "owner", Requester: "engineer/engineer", Assets: []string{"checkpoints", "dataset", "weights"},
		Plan: j.Plan, NotBefore: j.lab.Now.Add(-time.Hour).Unix(), NotAfter: j.lab.Now.Add(time.Hour).Unix(), MaxReleases: 1, AllowSimulated: true,
	}
}

// Approve makes name's approval of terms, changed before it is signed with key's key.
func (j *Job) Approve(terms receipt.GrantTerms, name, key string, change func(*receipt.Approval)) (bundle.SignedApproval, error) {
	t, err := terms.Canonical()
	if err != nil {
		return bundle.SignedApproval{}, err
	}
	a := receipt.Approval{
		Version: receipt.ApprovalVersion, Broker: terms.Broker, Grant: terms.Grant, Plan: terms.Plan, Assets: terms.Assets, Terms: plan.Sum(t), Approver: name,
		Decision: receipt.DecisionApprove, Reason: "reviewed", Time: j.lab.Now.Add(-time.Minute).Unix(), Expires: j.lab.Now.Add(time.Hour).Unix(),
	}
	if change != nil {
		change(&a)
	}
	s := bundle.SignedApproval{}
	if s.Document, err = a.Canonical(); err != nil {
		return s, err
	}
	s.Signature, err = sshsig.Sign(j.lab.Approvers[key], receipt.ApprovalNamespace, s.Document)
	return s, err
}

// Approved is the job's grant with alice's and bob's approvals.
func (j *Job) Approved() (bundle.Approved, error) {
	terms := j.Terms()
	t, err := terms.Canonical()
	if err != nil {
		return bundle.Approved{}, err
	}
	out := bundle.Approved{Terms: t, Rules: []bundle.ApprovalRule{{Asset: "weights", Group: Group, Count: 2}}}
	for _, name := range []string{"alice", "bob"} {
		s, err := j.Approve(terms, name, name, nil)
		if err != nil {
			return bundle.Approved{}, err
		}
		out.Approvals = append(out.Approvals, s)
	}
	return out, nil
}

func (j *Job) release() error {
	approved, err := j.Approved()
	if err != nil {
		return err
	}
	return j.ReleaseUnder(approved)
}

// Policy is a policy statement of the job's grant's owner, changed before it is
// signed with key's key.
func (j *Job) Policy(asset, key string, change func(*receipt.PolicyStatement)) (s bundle.SignedApproval, err error) {
	p := receipt.PolicyStatement{Version: receipt.PolicyVersion, Broker: BrokerID, Asset: asset, Owner: "owner", Revision: 1, Policy: receipt.AssetPolicy{LeaseSeconds: 60}}
	if asset == "weights" {
		p.Policy.Approvals = []receipt.Rule{{Group: Group, Count: 2}}
	}
	if change != nil {
		change(&p)
	}
	if s.Document, err = p.Canonical(); err != nil {
		return s, err
	}
	s.Signature, err = sshsig.Sign(j.lab.Approvers[key], receipt.PolicyNamespace, s.Document)
	return s, err
}

// ReleaseUnder releases the job's keys under the grant with these approvals, and
// under these policies, in the order of their assets.
func (j *Job) ReleaseUnder(a bundle.Approved) error {
	var tokens []string
	var digests []plan.Digest
	for _, s := range a.Approvals {
		digests = append(digests, plan.Sum(s.Document))
	}
	slices.Sort(digests)
	j.Log = nil
	for i, in := range []struct {
		asset  string
		digest plan.Digest
	}{{"dataset", j.plan.Inputs[0].Digest}, {"weights", j.plan.Inputs[1].Digest}, {"checkpoints", ""}} {
		r := receipt.Release{
			Issuer: BrokerID, ID: fmt.Sprintf("release %d of %s", i, j.ID), IssuedAt: j.lab.Now.Unix() + 1, Grant: "grant-1", Attempt: 1, JobID: j.ID,
			Plan: j.Plan, Asset: in.asset, AssetDigest: in.digest, ResultID: j.result.ID, WrappedDigest: plan.Sum([]byte(in.asset)),
			NotAfter: j.lab.Now.Add(time.Hour).Unix(), Simulated: true, Approvals: digests,
		}
		if i < len(a.Policies) {
			r.Policy = plan.Sum(a.Policies[i].Document)
		}
		token, err := j.Release(r)
		if err != nil {
			return err
		}
		tokens = append(tokens, token)
	}
	var err error
	if j.Parts[bundle.BrokerKeys], err = j.lab.Broker.JWKS(); err != nil {
		return err
	}
	if err := j.json(bundle.Approvals, []bundle.Approved{a}); err != nil {
		return err
	}
	return j.json(bundle.Releases, tokens)
}

// Release logs r and signs its receipt.
func (j *Job) Release(r receipt.Release) (string, error) {
	if j.Log == nil {
		j.Log = &bundle.Log{}
	}
	e, err := j.lab.Append(translog.Body{
		Kind: translog.KindRelease, Job: j.ID, JobSequence: uint64(len(j.Log.Entries)) + 1, JobPrev: j.lastEntry(),
		Release: &translog.Release{
			Grant: r.Grant, Attempt: r.Attempt, Plan: r.Plan, Asset: r.Asset, Verifier: VerifierID, ResultID: r.ResultID,
			Recipient: plan.Sum(j.recipient), Request: plan.Sum([]byte("request")), Wrapped: r.WrappedDigest,
			Evidence: plan.Sum(j.Parts[bundle.Evidence]), Simulated: r.Simulated, Used: 1, Approvals: r.Approvals,
		},
	})
	if err != nil {
		return "", err
	}
	j.Log.Entries = append(j.Log.Entries, e)
	r.LogIndex, r.LogHash = e.Index, e.Hash
	return j.SignRelease(r)
}

// lastEntry is the chain hash of the job's last entry so far.
func (j *Job) lastEntry() []byte {
	if n := len(j.Log.Entries); n > 0 {
		return j.Log.Entries[n-1].Hash
	}
	return nil
}

// SignRelease signs a release receipt.
func (j *Job) SignRelease(r receipt.Release) (string, error) {
	return j.lab.Broker.Sign(receipt.TypeRelease, r)
}

// Checkpoint makes a signed checkpoint, changed before it is signed.
func (j *Job) Checkpoint(sequence uint64, parent plan.Digest, change func(*receipt.CheckpointRecord)) (bundle.Checkpoint, error) {
	name := fmt.Sprintf("epoch-%d", sequence)
	r := receipt.CheckpointRecord{
		Version: receipt.CheckpointVersion, JobID: j.ID, Plan: j.Plan, Asset: "checkpoints", Sequence: sequence, Name: name,
		Digest: plan.Sum([]byte(j.ID + name)), Parent: parent, Bytes: 1000, UnixNano: j.lab.Now.UnixNano(),
	}
	if change != nil {
		change(&r)
	}
	rec, err := plan.Canonical(r)
	if err != nil {
		return bundle.Checkpoint{}, err
	}
	sig, err := j.sign(receipt.CheckpointLabel, rec)
	return bundle.Checkpoint{Sequence: r.Sequence, Name: r.Name, Digest: r.Digest, Parent: r.Parent, Bytes: r.Bytes, Nanos: 1000, Record: rec, Signature: sig}, err
}

func (j *Job) sign(label string, body []byte) ([]byte, error) {
	sum := bundle.SignedDigest(label, body)
	return ecdsa.SignASN1(rand.Reader, j.Session, sum[:])
}

func (j *Job) course() error {
	first, err := j.Checkpoint(1, "", nil)
	if err != nil {
		return err
	}
	second, err := j.Checkpoint(2, first.Digest, nil)
	if err != nil {
		return err
	}
	at := j.lab.Now.UnixNano()
	list := []bundle.Checkpoint{first, second}
	for name, v := range map[bundle.Part]any{
		bundle.Checkpoints: list,
		bundle.HolderStatus: bundle.Status{
			Started: true, Execs: 1, Scrubbed: true, LogBytes: 30, Checkpoints: list,
			Metrics: metrics(),
		},
		bundle.Trace: []bundle.Event{
			{Sequence: 1, UnixNano: at, Kind: bundle.EventContainerStart, Detail: "train"},
			{Sequence: 2, UnixNano: at + 1000, Kind: "exec", Process: "/usr/bin/python3", Digest: "sha256"},
			{Sequence: 3, UnixNano: at + 2000, Kind: bundle.EventCheckpoint, Checkpoint: &first},
			{Sequence: 4, UnixNano: at + 3000, Kind: bundle.EventCheckpoint, Checkpoint: &second},
		},
		bundle.EgressPart: bundle.Egress{
			Connections: []bundle.Connection{{Host: EgressHost, Port: 443, Address: "44.1.0.2:443", StartUnixNano: at, Nanos: 1e9, Sent: 4000, Received: 9000, End: "closed"}},
			Denials:     []bundle.Denial{{FirstUnixNano: at, Host: strings.ToLower(j.ID) + ".example.com", Port: 443, Rule: "not-listed", Count: 1}},
			Dropped:     map[string]int64{"udp": 3},
		},
		bundle.AlertsPart: bundle.Alerts{
			Rules:    plan.Sum([]byte("rule set")),
			Findings: []bundle.Finding{{Sequence: 1, UnixNano: at, Rule: "seen", Action: "record", Severity: "info", Kind: bundle.EventContainerStart, Count: 1, Trace: 1}},
		},
		bundle.LogsDigest: bundle.Logs{Stdout: bundle.Stream{Bytes: 20, Digest: plan.Sum([]byte("out"))}, Stderr: bundle.Stream{Bytes: 10, Digest: plan.Sum([]byte("err"))}},
	} {
		if err := j.json(name, v); err != nil {
			return err
		}
	}
	return nil
}

func (j *Job) end(stage bundle.Stage, o bundle.Outcome) {
	j.Outcome, j.Timeline = o, nil
	// The result is issued in the middle of it all.
	at := j.lab.Now.Add(-5 * stepTime).UnixNano()
	for _, s := range bundle.Stages() {
		if (s == bundle.StageApproval || s == bundle.StageReseal) && stage != s {
			continue
		}
		if stage == bundle.StageReseal && slices.Contains([]bundle.Stage{bundle.StageDecrypt, bundle.StageStart, bundle.StageRun, bundle.StageCheckpoint}, s) {
			continue
		}
		step := bundle.Step{Stage: s, StartUnixNano: at, Nanos: int64(stepTime), Outcome: bundle.StepDone}
		at += int64(stepTime)
		if s == stage && o.State != bundle.Succeeded {
			step.Outcome = bundle.StepFailed
		}
		j.Timeline = append(j.Timeline, step)
		if s == stage {
			return
		}
	}
}

// log gives the job a log; the statement's entry comes with Bundle.
func (j *Job) log() error {
	if j.Log == nil {
		j.Log = &bundle.Log{}
	}
	if j.Parts[bundle.BrokerKeys] == nil {
		var err error
		if j.Parts[bundle.BrokerKeys], err = j.lab.Broker.JWKS(); err != nil {
			return err
		}
	}
	return nil
}

// Bundle signs and logs the statement over the parts as they are, and returns
// the file.
func (j *Job) Bundle() ([]byte, error) {
	b := bundle.NewBuilder()
	for name, body := range j.Parts {
		if err := b.Add(name, body); err != nil {
			return nil, err
		}
	}
	statement, err := b.Statement(j.ID, j.Plan, j.Outcome, j.Timeline)
	if err != nil {
		return nil, err
	}
	var signature []byte
	if j.Parts[bundle.Evidence] != nil {
		if signature, err = j.sign(bundle.StatementLabel, statement); err != nil {
			return nil, err
		}
	}
	if j.Log == nil {
		return b.Finish(signature, nil)
	}
	e, err := j.lab.Append(translog.Body{
		Kind: translog.KindBundle, Job: j.ID, JobSequence: uint64(len(j.Log.Entries)) + 1, JobPrev: j.lastEntry(), Bundle: &translog.Bundle{Digest: plan.Sum(statement)},
	})
	if err != nil {
		return nil, err
	}
	token, err := j.lab.Broker.Sign(translog.TypeReceipt, translog.Receipt{
		Issuer: BrokerID, IssuedAt: j.lab.Now.Unix() + 2, Job: j.ID, Digest: plan.Sum(statement), Index: e.Index, Hash: e.Hash,
		Head: translog.Head{Size: e.Index + 1, Hash: e.Hash},
	})
	if err != nil {
		return nil, err
	}
	entries := append(append([]translog.Entry(nil), j.Log.Entries...), e)
	return b.Finish(signature, &bundle.Log{Receipt: token, Entries: entries})
}

// metrics are what a job reported, as its plan allows.
func metrics() *bundle.Metrics {
	return &bundle.Metrics{Values: []bundle.Metric{{Name: "accuracy", Count: 2, Last: 0.875, Min: 0.5, Max: 0.875}, {Name: "loss", Count: 20, Last: 0.3125, Min: 0.25, Max: 2.5}}}
}
