package rego

import (
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/open-policy-agent/opa/v1/ast"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// submodule is one device under the name that it has in results.
type submodule struct {
	name, kind string
	device     policy.Device
	// asked is true if the document has requirements for its kind.
	asked bool
	out   *check.List
	// claims are those of the device as rules see them.
	claims *ast.Term
}

// Decide holds evidence against the policy. It says nothing about whether the
// evidence is genuine: the checks of the appraisals must hold besides, and a
// device of which one failed has no tier but contraindicated. Rules that do not
// compile, do not end or answer anything but a decision fail everything.
func (p *Policy) Decide(ev policy.Evidence) policy.Decision {
	d := policy.Decision{GPUs: make([]check.List, len(ev.GPUs)), Tiers: map[string]receipt.Tier{}}
	if p == nil || p.compiler == nil {
		d.Platform.Fail("policy.valid", "a valid policy", "none", "name a policy that the verifier has")
		return d
	}
	d.Platform.Pass("policy.valid", p.source.Name)
	if ev.Alone {
		p.alone(&d.Platform, ev)
	} else {
		p.present(&d.Platform, "snp", true, ev.SNP != nil, ev.Failures)
		p.present(&d.Platform, "tpm", p.source.TPM != nil, ev.TPM != nil, ev.Failures)
		p.gpuCount(&d.Platform, ev)
	}

	subs := p.submodules(ev, &d)
	for i := range subs {
		p.simulated(&subs[i])
	}
	id, named := p.identify(ev, subs)
	var a *answered
	if named {
		a = p.answers.get(id)
	}
	size := 0
	if a == nil {
		for i := range subs {
			size += subs[i].readClaims()
		}
	}
	if size > MaxInput {
		d.Platform.Fail("policy.rules", "claims of at most "+strconv.Itoa(MaxInput)+" bytes", strconv.Itoa(size), "")
	} else if a, err := p.apply(ev, subs, a, &d); err != nil {
		d.Platform.Fail("policy.rules", "a decision by the policy's rules", printable(err.Error()), "mend the policy's rules, or name another policy")
	} else if named {
		p.answers.put(id, a)
	}
	settle(subs, &d)
	return d
}

func (p *Policy) submodules(ev policy.Evidence, d *policy.Decision) []submodule {
	var subs []submodule
	if ev.SNP != nil {
		subs = append(subs, submodule{name: "cpu0", kind: "snp", device: *ev.SNP, asked: true, out: &d.SNP})
	}
	if ev.TPM != nil {
		subs = append(subs, submodule{name: "tpm0", kind: "tpm", device: *ev.TPM, asked: p.source.TPM != nil, out: &d.TPM})
	}
	for i, g := range ev.GPUs {
		subs = append(subs, submodule{name: "gpu" + strconv.Itoa(i), kind: "gpu", device: g, asked: p.source.GPU != nil, out: &d.GPUs[i]})
	}
	return subs
}

// tierID is the check that rules affirm where they fail nothing.
func (s *submodule) tierID() string { return "policy." + s.kind + ".tier" }

// present requires a device that the policy asks for. What failed to collect is
// missing, even if something else of its kind is there.
func (p *Policy) present(l *check.List, source string, required, there bool, failures map[string]string) {
	id := "policy." + source + ".required"
	failure, failed := failures[source]
	switch {
	case !required && !there:
		l.Skip(id, "the policy does not ask for it")
	case required && failed:
		l.Fail(id, "evidence from "+source, "collection failed: "+printable(failure), "look at the agent's log for why collection failed")
	case required && !there:
		l.Fail(id, "evidence from "+source, "none", "run where there is such a device, or name a policy that does not ask for it")
	default:
		l.Pass(id, "present")
	}
}

func (p *Policy) gpuCount(l *check.List, ev policy.Evidence) {
	const id = "policy.gpu.count"
	failure, failed := ev.Failures["gpu"]
	want := strconv.Itoa(ev.WantGPUs)
	switch {
	case p.source.GPU == nil && ev.WantGPUs != 0:
		l.Fail(id, "a plan without GPUs", "one that asks for "+want, "name a policy that covers GPUs")
	case failed && ev.WantGPUs != 0:
		l.Fail(id, want, "collection failed: "+printable(failure), "look at the agent's log for why collection failed")
	default:
		l.Equal(id, want, strconv.Itoa(len(ev.GPUs)), "attest exactly the GPUs that the plan asks for")
	}
	p.several(l, ev)
}

// alone says of what is not asked of devices by themselves that it was not.
func (p *Policy) alone(l *check.List, ev policy.Evidence) {
	const why = "devices by themselves: which there must be is not asked"
	l.Skip("policy.snp.required", why)
	l.Skip("policy.tpm.required", why)
	l.Skip("policy.gpu.count", why)
	p.several(l, ev)
}

// several refuses more than one GPU. Without a TDISP or NVSwitch binding several
// Hopper GPUs are not known to form one protected set (protected PCIe mode).
func (p *Policy) several(l *check.List, ev policy.Evidence) {
	if ev.WantGPUs > 1 || len(ev.GPUs) > 1 {
		l.Fail("policy.gpu.several", "at most one GPU", fmt.Sprintf("%d wanted, %d attested", ev.WantGPUs, len(ev.GPUs)),
			"more than one GPU needs protected PCIe mode with NVSwitch evidence, which is not supported")
	}
}

// simulated is decided on every device, asked for or not.
func (p *Policy) simulated(s *submodule) {
	id := "policy." + s.kind + ".simulated"
	switch {
	case s.device.Simulated && !p.source.AllowSimulated:
		s.out.Fail(id, "a chain to a vendor's anchor", "a chain to a simulation's", "run on confidential hardware, or name a policy that allows simulation")
	case s.device.Simulated:
		s.out.Skip(id, "the policy accepts simulated devices, of which nothing is proven")
	default:
		s.out.Pass(id, "not simulated")
	}
}

// readClaims reads the device's claims for the rules and returns their size. A
// device without claims that can be read has none.
func (s *submodule) readClaims() int {
	var r reader
	claims := maps.Clone(s.device.Claims)
	if claims == nil {
		claims = map[string]any{}
	}
	delete(claims, momentary[s.kind])
	var err error
	if s.claims, err = r.read(claims); err != nil {
		s.claims = ast.ObjectTerm()
		s.out.Fail("policy."+s.kind+".claims", "claims in JSON", printable(err.Error()), "report this as a defect")
	}
	return r.size
}

// apply asks the rules, unless their answer is given, and records it.
func (p *Policy) apply(ev policy.Evidence, subs []submodule, a *answered, d *policy.Decision) (*answered, error) {
	accepted, known, err := p.acceptedNow(ev, &d.Platform)
	if err != nil {
		return nil, err
	}
	if a == nil {
		answer, err := p.evaluate(input(ev, subs, accepted), known)
		if err != nil {
			return nil, err
		}
		if a, err = readAnswer(answer); err != nil {
			return nil, err
		}
	}
	for name := range a.submods {
		if !slices.ContainsFunc(subs, func(s submodule) bool { return s.name == name }) {
			return nil, fmt.Errorf("rules speak of %.40q, which is no device here", name)
		}
	}
	for _, s := range subs {
		if s.asked && len(a.submods[s.name].checks) == 0 {
			return nil, fmt.Errorf("rules made no check of %s", s.name)
		}
	}
	d.Platform = append(d.Platform, a.checks...)
	for _, s := range subs {
		said, ok := a.submods[s.name]
		*s.out = append(*s.out, said.checks...)
		if !ok || (!s.asked && len(said.checks) == 0) {
			continue
		}
		d.Tiers[s.name] = said.tier
		if said.tier != receipt.Affirming && len(said.checks.Failed()) == 0 {
			s.out.Fail(s.tierID(), string(receipt.Affirming), string(said.tier), "the policy's rules say no more than that")
		}
	}
	return a, nil
}

// acceptedNow leaves out reference values that have expired since they were loaded. A source of
// which nothing is left cannot be asked, which is a refusal.
func (p *Policy) acceptedNow(ev policy.Evidence, l *check.List) (ast.Value, known, error) {
	var valid []policy.References
	by := map[string]int{}
	for _, r := range p.references {
		if r.ValidAt(ev.Now) {
			valid = append(valid, r)
			by[r.Values().Issuer]++
		}
	}
	for _, s := range p.source.Sources {
		if by[s.Issuer] == 0 {
			l.Fail("policy.references", "valid reference values of "+printable(s.Issuer), "none", "give the verifier its current reference values")
		} else {
			l.Pass("policy.references", printable(s.Issuer)+": "+strconv.Itoa(by[s.Issuer]))
		}
	}
	if len(valid) == len(p.references) {
		return p.accepted, p.known, nil
	}
	v, err := accept(p.source, valid)
	return v, nil, err
}

// settle lowers the tiers that rules gave to what else was found: no rule makes
// good a check that failed. Where rules did not answer, there is none.
func settle(subs []submodule, d *policy.Decision) {
	platform := len(d.Platform.Failed()) > 0
	for _, s := range subs {
		tier, ok := d.Tiers[s.name]
		switch {
		case len(s.device.Checks.Failed()) > 0, slices.ContainsFunc(s.out.Failed(), func(c check.Check) bool { return c.ID != s.tierID() }):
			d.Tiers[s.name] = receipt.Contraindicated
		case !ok, platform && tier == receipt.Affirming:
			d.Tiers[s.name] = receipt.None
		}
	}
}
