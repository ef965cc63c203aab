package verifier_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

const (
	verifierID = "verifier.test"
	audience   = "broker.test"
)

// vendors are minted once: their RSA keys take seconds.
var vendors = sync.OnceValues(func() (struct{ plain, other *simulate.Vendor }, error) {
	var v struct{ plain, other *simulate.Vendor }
	var errs [2]error
	var wg sync.WaitGroup
	wg.Go(func() { v.plain, errs[0] = simulate.New(simulate.Options{GPUs: 2, Plain: true, Fast: true}) })
	wg.Go(func() { v.other, errs[1] = simulate.New(simulate.Options{GPUs: 1, Fast: true}) })
	wg.Wait()
	return v, errors.Join(errs[:]...)
})

// world is a verifier, a machine that attests, and the clock.
type world struct {
	t       testing.TB
	now     time.Time
	vendor  *simulate.Vendor
	other   *simulate.Vendor
	tpm     *vtpmtest.TPM
	anchors anchor.Set
	signer  *receipt.Signer
	nonce   []byte
	v       *verifier.Verifier
	policy  policy.Policy
	akCred  string
	// alter changes the profile of the node's sandboxes.
	alter func(*plan.Profile)
}

func newWorld(t testing.TB) *world {
	t.Helper()
	vs, err := vendors()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, now: time.Now(), vendor: vs.plain, other: vs.other}
	if w.tpm, err = vtpmtest.New(w.now); err != nil {
		t.Fatal(err)
	}
	w.tpm.Extend(vtpm.Event{PCR: vtpm.AgentPCR, Name: "agent", Digest: vtpm.Digest{1}, MeasuredBy: vtpm.MeasuredBySelf})
	if w.anchors, err = w.vendor.Anchors().WithEKRoots(anchor.Software, w.tpm.Root); err != nil {
		t.Fatal(err)
	}
	if w.policy, err = policy.Named("simulation"); err != nil {
		t.Fatal(err)
	}
	w.nonce = make([]byte, verifier.NonceKeySize)
	_, _ = rand.Read(w.nonce)
	w.signer = newSigner(t, verifierID)
	w.v = w.verifier(nil)
	w.akCred = w.enrol(w.v)
	return w
}

func newSigner(t testing.TB, id string) *receipt.Signer {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(id, k)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (w *world) options() verifier.Options {
	return verifier.Options{
		ID: verifierID, Anchors: w.anchors, Policies: []policy.Policy{w.policy}, Signer: w.signer,
		NonceKeys: [][]byte{w.nonce}, Clock: func() time.Time { return w.now }, Build: "test",
	}
}

func (w *world) verifier(change func(*verifier.Options)) *verifier.Verifier {
	w.t.Helper()
	o := w.options()
	if change != nil {
		change(&o)
	}
	v, err := verifier.New(o)
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) enrol(v *verifier.Verifier) string {
	w.t.Helper()
	blob, enc, token, err := v.BeginEnrolment(w.tpm.EKChain, w.tpm.AKPublic)
	if err != nil {
		w.t.Fatal(err)
	}
	secret, err := w.tpm.Activate(blob, enc)
	if err != nil {
		w.t.Fatal(err)
	}
	cred, err := v.FinishEnrolment(token, secret)
	if err != nil {
		w.t.Fatal(err)
	}
	return cred
}

func (w *world) challenge() string {
	w.t.Helper()
	n, _, err := w.v.Challenge()
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// profile and job are what an honest agent would run.
func (w *world) profile() plan.Profile {
	p := plan.Profile{
		Version: plan.SandboxVersion, Shim: "io.containerd.runc.v2", ShimDigest: plan.Sum([]byte("shim")), Runtime: "runsc release-20260905.0",
		RuntimeDigest: plan.Sum([]byte("runsc")), RuntimeFlags: []string{"--network=none"}, Trace: plan.Sum([]byte("trace")), Rules: "1", ImageStore: "tmpfs",
	}
	if w.alter != nil {
		w.alter(&p)
	}
	return p
}

func (w *world) plan(change func(*plan.Plan)) []byte {
	w.t.Helper()
	d, err := w.profile().Digest()
	if err != nil {
		w.t.Fatal(err)
	}
	ref, err := w.policy.Ref()
	if err != nil {
		w.t.Fatal(err)
	}
	p := plan.Plan{
		Version: plan.Version, Name: "job", Image: "sha256:" + strings.Repeat("ab", 32), Command: []string{"/bin/true"}, Inputs: []plan.Input{},
		Output: plan.Output{LogBytes: 1 << 20}, Resources: plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, Pids: 64, GPUs: 1, MaxSeconds: 60},
		Policy: ref, SandboxProfile: d,
	}
	if change != nil {
		change(&p)
	}
	b, err := p.Canonical()
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *world) sandbox(change func(*plan.Sandbox)) []byte {
	w.t.Helper()
	s := plan.Sandbox{
		Version: plan.SandboxVersion, JobID: "job-1", Image: "sha256:" + strings.Repeat("ab", 32), Profile: w.profile(),
		Wrapper: []string{"runsc"}, Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`),
	}
	if change != nil {
		change(&s)
	}
	b, err := s.Canonical()
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

// rebuild makes plan and sandbox anew, when the profile was altered.
func (a *attester) rebuild(change func(*plan.Sandbox)) {
	a.t.Helper()
	before, err := plan.Parse(a.e.Plan)
	if err != nil {
		a.t.Fatal(err)
	}
	a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources = before.Resources })
	a.e.Sandbox = a.sandbox(change)
}

// attester collects evidence as an honest machine does; its fields say where an
// attacker departs from that.
type attester struct {
	*world
	e       evidence.Envelope
	gpus    []*simulate.GPU
	gpuOpts simulate.GPUOptions
	snpOpts simulate.SNPOptions
	chip    *simulate.Chip
	noTPM   bool
	noSNP   bool
	// quoteData replaces the extra data of the quote.
	quoteData []byte
	tpmClock  uint64
	events    []vtpm.Event
	firmware  []byte
}

func (w *world) attester() *attester {
	w.t.Helper()
	rk, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		w.t.Fatal(err)
	}
	return &attester{
		world: w, gpus: w.vendor.GPUs()[:1], chip: w.vendor.Chip(), events: w.tpm.Events,
		e: evidence.Envelope{
			Version: evidence.Version, VerifierID: verifierID, Nonce: w.challenge(), JobID: "job-1", Plan: w.plan(nil), Sandbox: w.sandbox(nil),
			RecipientKey: rk.PublicKey().Bytes(), SessionKey: sessionKey(w.t),
		},
	}
}

func sessionKey(t testing.TB) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	b, err := x509.MarshalPKIXPublicKey(&k.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *attester) bound() binding.Bound {
	a.t.Helper()
	b, err := a.e.Challenge().Bind()
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

// collect gathers everything in the order in which the parts sign for each other.
func (a *attester) collect() *attester {
	a.t.Helper()
	if !a.noTPM {
		a.e.TPM = &evidence.TPM{AKPublic: a.tpm.AKPublic, AKCredential: a.akCred}
	}
	return a.collectGPUs().collectTPM().collectSNP()
}

func (a *attester) collectGPUs() *attester {
	a.t.Helper()
	a.e.GPUs = nil
	for _, g := range a.gpus {
		r, err := g.Report(a.bound().GPUNonce(), a.gpuOpts)
		if err != nil {
			a.t.Fatal(err)
		}
		a.e.GPUs = append(a.e.GPUs, evidence.GPU{UUID: g.UUID(), Report: r, Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion()})
	}
	return a
}

func (a *attester) collectTPM() *attester {
	a.t.Helper()
	if a.e.TPM == nil {
		return a
	}
	extra := a.quoteData
	if extra == nil {
		x := a.bound().TPMExtraData(a.e.Devices())
		extra = x[:]
	}
	var err error
	if a.e.TPM.Quote, a.e.TPM.Signature, err = a.tpm.Quote(extra, func(q *tpm2.TPMSAttest) { q.ClockInfo.Clock += a.tpmClock }, 0, 7, vtpm.AgentPCR); err != nil {
		a.t.Fatal(err)
	}
	a.e.TPM.PCRs = a.tpm.PCRs(0, 7, vtpm.AgentPCR)
	if a.e.TPM.EventLog, err = vtpm.EncodeLog(a.events); err != nil {
		a.t.Fatal(err)
	}
	a.e.TPM.TCGLog = a.firmware
	return a
}

func (a *attester) collectSNP() *attester {
	a.t.Helper()
	a.e.SNP = nil
	if a.noSNP {
		return a
	}
	var quote, log, firmware []byte
	if a.e.TPM != nil {
		quote, log, firmware = a.e.TPM.Quote, a.e.TPM.EventLog, a.e.TPM.TCGLog
	}
	r, err := a.chip.Report(a.bound().SNPReportData(a.e.Devices(), quote, log, firmware), a.snpOpts)
	if err != nil {
		a.t.Fatal(err)
	}
	a.e.SNP = &evidence.SNP{Report: r, Certificates: a.chip.CertTable()}
	return a
}

func (a *attester) bytes() []byte {
	a.t.Helper()
	b, err := json.Marshal(a.e)
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

// relyingParty verifies a result as a broker does.
func (w *world) relyingParty(token string) (receipt.Verified, error) {
	w.t.Helper()
	keys, err := receipt.ParseKeys(verifierID, w.v.JWKS())
	if err != nil {
		w.t.Fatal(err)
	}
	return receipt.VerifyResult(keys, token, receipt.Expect{Audience: audience, AnyJob: true, AllowSimulated: true}, w.now)
}

func (a *attester) appraise() (string, receipt.Result) {
	a.t.Helper()
	token, r, err := a.v.Appraise(context.Background(), a.bytes(), audience)
	if err != nil {
		a.t.Fatal(err)
	}
	return token, r
}

// wantRefused checks that the result is refused by the given check, that the
// relying party sees so too, and that no other check but those listed failed.
func (a *attester) wantRefused(by string, also ...string) {
	a.t.Helper()
	token, r := a.appraise()
	var ids []string
	for _, c := range r.AllChecks().Failed() {
		if !slices.Contains(ids, c.ID) {
			ids = append(ids, c.ID)
		}
	}
	if !slices.Contains(ids, by) {
		a.t.Fatalf("failed checks %v, want %s", ids, by)
	}
	for _, id := range ids {
		if id != by && !slices.Contains(also, id) {
			a.t.Errorf("also failed %s: the row does not isolate %s", id, by)
		}
	}
	affirming := 0
	for _, s := range r.Submods {
		if s.Status == receipt.Affirming {
			affirming++
		}
	}
	if affirming == len(r.Submods) {
		a.t.Error("every submodule of a refusal affirms")
	}
	_, err := a.relyingParty(token)
	var refusal *check.Refusal
	if !errors.As(err, &refusal) {
		a.t.Fatalf("relying party: %v", err)
	}
	if !slices.ContainsFunc(refusal.Checks, func(c check.Check) bool { return c.ID == by }) {
		a.t.Errorf("the relying party's refusal does not name %s: %v", by, refusal)
	}
}
