package policy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
)

// Device is what appraisal found of one device.
type Device struct {
	Claims map[string]any
	Checks check.List
	// Simulated is true if its chain ended in a simulation's anchor.
	Simulated bool
}

// Evidence is all that a policy looks at. A nil device was not there.
type Evidence struct {
	SNP  *Device
	TPM  *Device
	GPUs []Device
	// WantGPUs is how many the plan asks for.
	WantGPUs int
	// Failures say by source ("snp", "tpm", "gpu") what could not be collected.
	Failures map[string]string
}

// Decision are the rules' outcomes. Evidence is acceptable if none failed.
type Decision struct {
	// Platform are the rules of no single device: what must be there at all.
	Platform check.List
	SNP      check.List
	TPM      check.List
	GPUs     []check.List
}

// All returns the outcomes in one list.
func (d Decision) All() check.List {
	return slices.Concat(append([]check.List{d.Platform, d.SNP, d.TPM}, d.GPUs...)...)
}

// Decide holds evidence against the policy. It says nothing about whether the
// evidence is genuine: the checks of the appraisals must hold besides. A policy
// that is not valid, the zero value among them, fails everything.
func (p Policy) Decide(ev Evidence) Decision {
	d := Decision{GPUs: make([]check.List, len(ev.GPUs))}
	if err := p.validate(); err != nil {
		d.Platform.Fail("policy.valid", "a valid policy", err.Error(), "name a policy that the verifier has")
		return d
	}
	d.Platform.Pass("policy.valid", p.Name)

	p.present(&d.Platform, "snp", true, ev.SNP != nil, ev.Failures)
	p.present(&d.Platform, "tpm", p.TPM != nil, ev.TPM != nil, ev.Failures)
	p.gpuCount(&d.Platform, ev)

	if ev.SNP != nil {
		r := p.rules(&d.SNP, "snp", *ev.SNP)
		p.SNP.decide(r)
	}
	if ev.TPM != nil {
		r := p.rules(&d.TPM, "tpm", *ev.TPM)
		if p.TPM != nil {
			p.TPM.decide(r)
		}
	}
	for i, g := range ev.GPUs {
		r := p.rules(&d.GPUs[i], "gpu", g)
		if p.GPU != nil {
			p.GPU.decide(r)
		}
	}
	return d
}

// present requires a device that the policy asks for. What failed to collect is
// missing, even if something else of its kind is there.
func (p Policy) present(l *check.List, source string, required, there bool, failures map[string]string) {
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

func (p Policy) gpuCount(l *check.List, ev Evidence) {
	const id = "policy.gpu.count"
	failure, failed := ev.Failures["gpu"]
	want := strconv.Itoa(ev.WantGPUs)
	switch {
	case p.GPU == nil && ev.WantGPUs != 0:
		l.Fail(id, "a plan without GPUs", "one that asks for "+want, "name a policy that covers GPUs")
	case failed && ev.WantGPUs != 0:
		l.Fail(id, want, "collection failed: "+printable(failure), "look at the agent's log for why collection failed")
	default:
		l.Equal(id, want, strconv.Itoa(len(ev.GPUs)), "attest exactly the GPUs that the plan asks for")
	}
	// Without a TDISP or NVSwitch binding several Hopper GPUs are not known to
	// form one protected set (protected PCIe mode).
	if ev.WantGPUs > 1 || len(ev.GPUs) > 1 {
		l.Fail("policy.gpu.several", "at most one GPU", fmt.Sprintf("%d wanted, %d attested", ev.WantGPUs, len(ev.GPUs)),
			"more than one GPU needs protected PCIe mode with NVSwitch evidence, which is not supported")
	}
}

func (s SNP) decide(r *rules) {
	r.require(s.Require)
	r.oneOf("product", "snp.product", texts(s.Products))
	r.off("debug", "snp.policy.debug", s.AllowDebug, "start the guest without debugging")
	r.off("migration", "snp.policy.migration-agent", s.AllowMigration, "start the guest without a migration agent")
	if vmpl, ok := r.number("vmpl", "snp.vmpl"); ok {
		if vmpl > int64(s.MaxVMPL) {
			r.Fail(r.id("vmpl"), fmt.Sprintf("at most %d", s.MaxVMPL), strconv.FormatInt(vmpl, 10), "collect the report at a more privileged level")
		} else {
			r.Pass(r.id("vmpl"), strconv.FormatInt(vmpl, 10))
		}
	}
	s.minimumTCB(r)
	r.reference("measurement", "snp.measurement", s.Measurements)
}

func (s SNP) minimumTCB(r *rules) {
	id := r.id("minimum-tcb")
	product, _ := r.claims["snp.product"].(string)
	floor, ok := s.MinimumTCB[anchor.Product(product)]
	if !ok {
		r.Skip(id, "the policy sets no minimum for this product")
		return
	}
	tcb, ok := r.claims["snp.reported-tcb"].(map[string]any)
	if !ok {
		r.Fail(id, "a reported TCB", "none", "")
		return
	}
	var low []string
	for _, c := range []struct {
		name string
		min  uint8
	}{{"fmc", floor.FMC}, {"bootloader", floor.Bootloader}, {"tee", floor.TEE}, {"snp", floor.SNP}, {"microcode", floor.Microcode}} {
		if v, ok := integer(tcb[c.name]); !ok || v < int64(c.min) {
			low = append(low, fmt.Sprintf("%s %v < %d", c.name, tcb[c.name], c.min))
		}
	}
	if len(low) > 0 {
		r.Fail(id, "no component below the minimum", strings.Join(low, ", "), "update the platform's firmware")
		return
	}
	r.Pass(id, "no component below the minimum")
}

func (t TPM) decide(r *rules) {
	r.require(t.Require)
	r.oneOf("trust-class", "tpm.trust-class", texts(t.Classes))
	id := r.id("self-measured")
	switch by, ok := r.claims["tpm.measured-by"].([]any); {
	case t.AllowSelfMeasured && ok:
		// Accepting it does not make it evidence of anything.
		r.Skip(id, "the policy accepts what the agent measures of itself")
	case !ok:
		r.Fail(id, "a word on who measured", "none", "")
	case slices.ContainsFunc(by, func(v any) bool { return v == "self" }):
		r.Fail(id, "measurements by a measured boot", "the agent's own", "boot an image that measures the agent before it runs")
	case len(by) == 0:
		r.Fail(id, "measurements by a measured boot", "none at all", "boot an image that measures the agent before it runs")
	default:
		r.Pass(id, fmt.Sprint(by...))
	}
	value := "none"
	if pcrs, ok := r.claims["tpm.pcrs"].(map[string]any); ok {
		if v, ok := pcrs["14"].(string); ok {
			value = v
		}
	}
	r.listed("pcr14", value, t.PCR14)
}

func (g GPU) decide(r *rules) {
	r.require(g.Require)
	r.oneOf("feature-flag", claimFeatureFlag, g.FeatureFlags)
	r.reference("driver-version", claimDriver, g.DriverVersions)
	r.reference("vbios-version", claimVBIOS, g.VBIOSVersions)
}

// Claims of attest/nvgpu that rules look at.
const (
	claimDriver      = "x-nvidia-gpu-driver-version"
	claimVBIOS       = "x-nvidia-gpu-vbios-version"
	claimFeatureFlag = "gpu.feature-flag"
)

// rules holds one device against rules and records the outcomes.
type rules struct {
	*check.List
	kind   string
	claims map[string]any
	made   check.List
}

// rules also decides on simulation, which every device answers for.
func (p Policy) rules(l *check.List, kind string, d Device) *rules {
	r := &rules{List: l, kind: kind, made: d.Checks}
	switch {
	case d.Simulated && !p.AllowSimulated:
		l.Fail(r.id("simulated"), "a chain to a vendor's anchor", "a chain to a simulation's", "run on confidential hardware, or name a policy that allows simulation")
	case d.Simulated:
		l.Skip(r.id("simulated"), "the policy accepts simulated devices, of which nothing is proven")
	default:
		l.Pass(r.id("simulated"), "not simulated")
	}
	// Claims are looked at in their JSON form, the one in which results carry
	// them, so that no rule depends on a Go type.
	b, err := json.Marshal(d.Claims)
	if err == nil {
		dec := json.NewDecoder(bytes.NewReader(b))
		dec.UseNumber()
		err = dec.Decode(&r.claims)
	}
	if err != nil {
		l.Fail(r.id("claims"), "claims in JSON", err.Error(), "report this as a defect")
	}
	return r
}

func (r *rules) id(name string) string { return "policy." + r.kind + "." + name }

// require turns checks that nobody made into failures.
func (r *rules) require(ids []string) {
	for _, id := range ids {
		i := slices.IndexFunc(r.made, func(c check.Check) bool { return c.ID == id })
		switch {
		case i < 0:
			r.Fail(r.id("require"), id+" to be checked", "no such check was made", "give the verifier what the check needs")
		case r.made[i].Outcome == check.NotChecked:
			r.Fail(r.id("require"), id+" to be checked", "not checked: "+r.made[i].Found, "give the verifier what the check needs")
		case r.made[i].Outcome != check.Pass:
			r.Fail(r.id("require"), id+" to pass", string(r.made[i].Outcome), "")
		default:
			r.Pass(r.id("require"), id)
		}
	}
}

// oneOf requires a claim to be among values, of which there are some.
func (r *rules) oneOf(name, claim string, values []string) {
	v, ok := r.claims[claim].(string)
	if !ok {
		r.Fail(r.id(name), strings.Join(values, " or "), "no claim "+claim, "")
		return
	}
	if !slices.Contains(values, v) {
		r.Fail(r.id(name), strings.Join(values, " or "), printable(v), "name a policy that accepts it, if you do")
		return
	}
	r.Pass(r.id(name), v)
}

// reference is oneOf for a list that may be empty, which is "not checked".
func (r *rules) reference(name, claim string, values []string) {
	v, ok := r.claims[claim].(string)
	if !ok {
		v = "none"
	}
	r.listed(name, v, values)
}

func (r *rules) listed(name, found string, values []string) {
	switch {
	case len(values) == 0:
		r.Skip(r.id(name), printable(found)+": the policy lists no reference values")
	case !slices.ContainsFunc(values, func(v string) bool { return strings.EqualFold(v, found) }):
		r.Fail(r.id(name), "one of "+strconv.Itoa(len(values))+" reference values", printable(found), "run a version that the policy lists, or have it listed")
	default:
		r.Pass(r.id(name), found)
	}
}

// off requires a boolean claim to be there and, unless allowed, false.
func (r *rules) off(name, claim string, allowed bool, hint string) {
	v, ok := r.claims[claim].(bool)
	switch {
	case !ok:
		r.Fail(r.id(name), "off", "no claim "+claim, "")
	case v && !allowed:
		r.Fail(r.id(name), "off", "on", hint)
	case v:
		r.Skip(r.id(name), "on, which the policy accepts")
	default:
		r.Pass(r.id(name), "off")
	}
}

func (r *rules) number(name, claim string) (int64, bool) {
	v, ok := integer(r.claims[claim])
	if !ok {
		r.Fail(r.id(name), "a number", "no claim "+claim, "")
	}
	return v, ok
}

func integer(v any) (int64, bool) {
	n, ok := v.(json.Number)
	if !ok {
		return 0, false
	}
	i, err := n.Int64()
	return i, err == nil && i >= 0
}

func texts[T ~string](list []T) []string {
	out := make([]string, len(list))
	for i, v := range list {
		out[i] = string(v)
	}
	return out
}

// printable makes a foreign string fit for a check, which people read.
func printable(s string) string {
	const limit = 200
	if len(s) > limit {
		s = s[:limit] + "..."
	}
	return strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s)
}
