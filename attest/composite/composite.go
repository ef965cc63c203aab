// Package composite appraises the evidence of every device of a job as one: it
// recomputes what each must speak of, appraises each, and says how many there
// are and whether one was shown twice.
//
// Trusted: the given anchors, credential keys and endorsements, and the clock.
// Checked: that each device is genuine and speaks of the envelope's own
// challenge, with all that was collected before it. Not checked: whether the
// nonce is fresh and whether plan and sandbox fit the job, which are for whoever
// gave the nonce; and whether the devices are acceptable, which is the policy's.
package composite

import (
	"context"
	"fmt"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/snp"
	"github.com/coffer-run/coffer/attest/vtpm"
)

// Trust is what the caller believes before looking at the evidence. Its zero
// value trusts nothing, and no device is genuine under it.
type Trust struct {
	// Anchors are the roots at which chains must end.
	Anchors anchor.Set
	// CredentialKeys are the keys of the verifier whose attestation key
	// credentials count.
	CredentialKeys receipt.Keys
	// GPUEndorsements are where revocation status and reference values of GPUs
	// come from. Without a source they are reported as not checked.
	GPUEndorsements nvgpu.Endorsements
	// Endorsements is where those come from, the CPU's too; with it,
	// GPUEndorsements is not used. Nil has none but what the evidence carries.
	Endorsements *endorse.Cache
	// TPMMemory saves reading a TPM's attestation key again; nil remembers none.
	TPMMemory *vtpm.Memory
}

// Statement is an envelope from which follows what every device must speak of.
type Statement struct {
	envelope *evidence.Envelope
	bound    binding.Bound
	devices  binding.Devices
	failures map[string]string
	// alone is what a caller named, where there is no job; nil where there is.
	alone *Alone
}

// Open computes the binding of an envelope from its documents and keys. A
// challenge that lacks a part, and a failure of a source that there is not, are
// errors.
func Open(e *evidence.Envelope) (*Statement, error) {
	s := &Statement{envelope: e, devices: e.Devices(), failures: map[string]string{}}
	var err error
	if s.bound, err = e.Challenge().Bind(); err != nil {
		return nil, err
	}
	for _, f := range e.Failures {
		switch f.Source {
		case "tpm", "snp", "gpu":
		default:
			return nil, fmt.Errorf("failure of %.40q: want tpm, snp or gpu", f.Source)
		}
		message := f.Message
		if was, again := s.failures[f.Source]; again {
			message = was + "; " + message
		}
		s.failures[f.Source] = message
	}
	return s, nil
}

// Kind says which of the appraisals a device went through.
type Kind string

// Kinds of device.
const (
	CPU Kind = "cpu"
	TPM Kind = "tpm"
	GPU Kind = "gpu"
)

// Device is the appraisal of one device.
type Device struct {
	Kind Kind
	// Name is that of the device's submodule in results: "cpu0", "tpm0", "gpu0".
	Name string
	// Claims are what the evidence was found to say.
	Claims map[string]any
	// Checks are the appraisal's, Accepted the policy's once Decide was called.
	Checks   check.List
	Accepted check.List
	// Tier is what the policy says of the device, once Decide was called.
	Tier receipt.Tier
	// Simulated is true if the chain ended in a simulation's anchor.
	Simulated bool

	genuine bool
}

// Genuine reports whether the device is what it claims to be and speaks of the
// envelope's challenge. No device is not.
func (d *Device) Genuine() bool {
	return d != nil && d.genuine && len(d.Checks.Failed()) == 0
}

// Appraisal is what was found of an envelope's devices. One that is not there
// is nil.
type Appraisal struct {
	CPU  *Device
	TPM  *Device
	GPUs []*Device
	// Checks are those of no single device.
	Checks check.List

	failures map[string]string
	at       time.Time
	alone    bool
}

// Devices returns the devices that are there, CPU first.
func (a *Appraisal) Devices() []*Device {
	var out []*Device
	for _, d := range []*Device{a.CPU, a.TPM} {
		if d != nil {
			out = append(out, d)
		}
	}
	return append(out, a.GPUs...)
}

// Simulated reports whether any device's chain ended in a simulation's anchor.
func (a *Appraisal) Simulated() bool {
	for _, d := range a.Devices() {
		if d.Simulated {
			return true
		}
	}
	return false
}

// Appraise holds each device's evidence against the one challenge.
func (s *Statement) Appraise(ctx context.Context, trust Trust, now time.Time) *Appraisal {
	a := &Appraisal{failures: s.failures, at: now, alone: s.alone != nil}
	if e := s.envelope.SNP; e != nil && len(e.HCLReport) > 0 {
		a.CPU, a.TPM = s.azure(ctx, trust, now)
	} else {
		a.CPU, a.TPM = s.cpu(ctx, trust, now), s.tpm(trust, nil, now)
	}
	a.GPUs = s.gpus(ctx, trust, now)
	s.distinct(a)
	return a
}

func (s *Statement) tpm(trust Trust, platform *vtpm.PlatformKey, now time.Time) *Device {
	t := s.envelope.TPM
	if t == nil {
		return nil
	}
	r := vtpm.Appraise(vtpm.Evidence{
		AKPublic: t.AKPublic, AKCredential: t.AKCredential, Quote: t.Quote, Signature: t.Signature, PCRs: t.PCRs, EventLog: t.EventLog, TCGLog: t.TCGLog,
	}, s.quoteOf(vtpm.Want{CredentialKeys: trust.CredentialKeys, Platform: platform, Anchors: trust.Anchors, Memory: trust.TPMMemory}), now)
	return &Device{Kind: TPM, Name: "tpm0", Claims: r.Claims, Checks: r.Checks, Simulated: r.Simulated, genuine: true}
}

func (s *Statement) cpu(ctx context.Context, trust Trust, now time.Time) *Device {
	e := s.envelope.SNP
	if e == nil {
		return nil
	}
	d, _ := report(ctx, e.Report, e.Certificates, s.reportData(), trust, now)
	return d
}

// report appraises an SEV-SNP report that must have the given report data.
func report(ctx context.Context, b, certificates []byte, data [64]byte, trust Trust, now time.Time) (*Device, snp.Result) {
	r := trust.Endorsements.AppraiseSNP(ctx, snp.Evidence{Report: b, Certificates: certificates}, snp.Want{ReportData: data}, trust.Anchors, now)
	d := &Device{Kind: CPU, Name: "cpu0", Claims: r.Claims, Checks: r.Checks, Simulated: r.Simulated, genuine: r.Genuine()}
	d.mustSay("snp.genuine", "chain and signature checked")
	return d, r
}

// gpus appraises the GPUs, several at a time where there are cores for it: each
// is judged by itself.
func (s *Statement) gpus(ctx context.Context, trust Trust, now time.Time) []*Device {
	out := make([]*Device, len(s.envelope.GPUs))
	var next atomic.Int64
	var mu sync.Mutex
	var panicked any
	work := func() {
		// Whoever appraises hostile bytes may be ready for a defect here: it is
		// theirs to meet, and not the end of the process.
		defer func() {
			if r := recover(); r != nil {
				mu.Lock()
				defer mu.Unlock()
				panicked = r
			}
		}()
		for i := int(next.Add(1)) - 1; i < len(out); i = int(next.Add(1)) - 1 {
			out[i] = s.gpu(ctx, i, s.envelope.GPUs[i], trust, now)
		}
	}
	var wg sync.WaitGroup
	for range min(len(out), runtime.GOMAXPROCS(0)) - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	if panicked != nil {
		panic(panicked)
	}
	return out
}

func (s *Statement) gpu(ctx context.Context, i int, g evidence.GPU, trust Trust, now time.Time) *Device {
	ev, want := nvgpu.Evidence{Report: g.Report, Chain: g.Chain, DriverVersion: g.DriverVersion, VBIOSVersion: g.VBIOSVersion}, nvgpu.Want{Nonce: s.gpuNonce()}
	var r nvgpu.Result
	if trust.Endorsements != nil {
		r = trust.Endorsements.AppraiseGPU(ctx, ev, want, trust.Anchors, now)
	} else {
		r = nvgpu.AppraiseWith(ctx, ev, want, trust.Anchors, trust.GPUEndorsements, now)
	}
	d := &Device{Kind: GPU, Name: "gpu" + strconv.Itoa(i), Claims: r.Claims, Checks: r.Checks, Simulated: r.Simulated, genuine: r.Genuine()}
	d.mustSay("gpu.genuine", "chain, nonce and signature checked")
	return d
}

// mustSay keeps an appraisal that was cut short without a reason from counting.
func (d *Device) mustSay(id, what string) {
	if !d.genuine && len(d.Checks.Failed()) == 0 {
		d.Checks.Fail(id, what, "not checked", "report this as a defect")
	}
}

// distinct refuses a GPU that is shown twice, by its certified identities and by
// the name that the driver gives it. The certificate above the leaf is the
// device's own, and stays where the leaf changes with the firmware.
func (s *Statement) distinct(a *Appraisal) {
	if len(a.GPUs) < 2 {
		return
	}
	seen := map[string]string{}
	for i, g := range a.GPUs {
		for what, id := range map[string]any{"ueid ": g.Claims[nvgpu.ClaimUEID], "device ": g.Claims[nvgpu.ClaimDevice], "uuid ": s.envelope.GPUs[i].UUID} {
			if id == nil {
				continue
			}
			key := what + fmt.Sprint(id)
			if other, again := seen[key]; again {
				a.Checks.Fail("gpu.distinct", "different GPUs", g.Name+" is "+other+" again", "attest each GPU once")
				return
			}
			seen[key] = g.Name
		}
	}
	a.Checks.Pass("gpu.distinct", fmt.Sprintf("%d GPUs", len(a.GPUs)))
}

// Evidence returns what a policy looks at.
func (a *Appraisal) Evidence(wantGPUs int) policy.Evidence {
	ev := policy.Evidence{WantGPUs: wantGPUs, Failures: a.failures, Now: a.at, Alone: a.alone}
	of := func(d *Device) *policy.Device {
		if d == nil {
			return nil
		}
		return &policy.Device{Claims: d.Claims, Checks: d.Checks, Simulated: d.Simulated}
	}
	ev.SNP, ev.TPM = of(a.CPU), of(a.TPM)
	for _, g := range a.GPUs {
		ev.GPUs = append(ev.GPUs, *of(g))
	}
	return ev
}

// Policy says whether what was found is acceptable.
type Policy interface {
	Decide(ev policy.Evidence) policy.Decision
}

// Decide holds the devices against a policy, which accepts those that it
// requires in the number that the plan asks for. It returns the rules of no
// single device and leaves the others in Accepted, and its word in Tier.
func (a *Appraisal) Decide(p Policy, wantGPUs int) check.List {
	d := p.Decide(a.Evidence(wantGPUs))
	if a.CPU != nil {
		a.CPU.Accepted = d.SNP
	}
	if a.TPM != nil {
		a.TPM.Accepted = d.TPM
	}
	for _, dev := range a.Devices() {
		dev.Tier = d.Tiers[dev.Name]
	}
	// A GPU on which a policy says nothing was not accepted by it.
	for i, g := range a.GPUs {
		if i < len(d.GPUs) {
			g.Accepted = d.GPUs[i]
		}
	}
	return d.Platform
}
