package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
)

// evidenceGroup appraises the raw evidence again. For a job that the verifier
// refused, what fails here must be what failed there.
func (v *verification) evidenceGroup() {
	g := v.group("evidence", "What the devices said, appraised again")
	defer v.done("evidence", g)
	if v.env == nil {
		g.Skip("evidence.form", "the bundle has no evidence that can be relied on")
		return
	}
	g.Equal("evidence.job", v.st.JobID, v.env.JobID, "the evidence is another job's")
	if v.trust.Anchors.Empty() {
		g.Fail("evidence.anchors", "trust anchors", "none", "name the anchors to believe")
		return
	}
	found := v.appraise()
	if v.refusal() {
		found = v.asRefused("evidence.refusal", found)
	}
	*g = append(*g, found...)
	v.simulated(g)
}

// refusal reports whether the verifier refused the job, which then ended.
func (v *verification) refusal() bool {
	return v.result != nil && !v.affirmed && !v.reached(bundle.StageVerify)
}

// asRefused returns the checks of what the verifier refused: the record is true
// if it was refused for what is found here. Failures of the record itself stay.
func (v *verification) asRefused(id string, found check.List, ofRecord ...string) check.List {
	signed := ids(v.result.AllChecks().Failed())
	var out check.List
	var same, more []string
	for _, c := range found {
		switch {
		case c.Outcome != check.Fail || slices.Contains(ofRecord, c.ID):
			out = append(out, c)
		case slices.Contains(signed, c.ID):
			same = append(same, c.ID)
		default:
			more = append(more, c.ID)
		}
	}
	for _, l := range []*[]string{&same, &more} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	if len(same) > 0 {
		out.Pass(id, "refused for what is found here too: "+strings.Join(same, ", "))
	}
	if len(more) > 0 {
		out.Skip(id, "does not hold either, which the result does not say: "+strings.Join(more, ", "))
	}
	return out
}

func (v *verification) simulated(g *check.List) {
	if v.result != nil {
		g.Equal("evidence.simulated", fmt.Sprint(v.trust.Anchors.Simulated()), fmt.Sprint(v.result.Simulated), "if this is the bundle of a simulation, name its roots by --simulation-roots; nothing else shows that it is")
	}
}

// appraise makes every check that a verifier makes of an envelope, less those
// that need its nonce key and its memory.
func (v *verification) appraise() check.List {
	var l check.List
	l.Skip("nonce.fresh", "that the nonce was the verifier's own and unused: only it can tell, and its result says so")
	s, err := composite.Open(v.env)
	if err != nil {
		l.Fail("evidence.binding", "a complete challenge", err.Error(), "")
		return l
	}
	// Without keys no credential opens, and the appraisal says so.
	keys, pinned, err := v.keys(v.trust.VerifierKeys, bundle.VerifierKeys, v.env.VerifierID)
	if err != nil {
		keys = receipt.Keys{}
	}
	found := s.Appraise(context.Background(), composite.Trust{Anchors: v.trust.Anchors, CredentialKeys: keys}, v.rep.At)
	v.rooted = v.rooted || found.CPU.Genuine()
	v.rep.Simulated = v.rep.Simulated || found.Simulated()
	if found.CPU == nil {
		// Without it nothing but keys that anyone can make would stand behind
		// the session key.
		l.Fail("evidence.root", "an SEV-SNP report, which signs for all the rest", "none", "")
	}
	for _, d := range found.Devices() {
		l = append(l, told(d, len(found.GPUs) > 1, pinned)...)
	}
	l = append(l, found.Checks...)
	if v.pl != nil {
		l.Equal("gpu.count", fmt.Sprint(v.pl.Resources.GPUs), fmt.Sprint(len(found.GPUs)), "the plan asks for another number of GPUs")
	}
	v.devices(&l)
	v.acceptable(&l, found)
	return l
}

// told returns a device's checks as the report has them.
func told(d *composite.Device, severalGPUs, pinned bool) check.List {
	var l check.List
	for _, c := range d.Checks {
		if d.Kind == composite.GPU && severalGPUs {
			c.Found = d.Name + ": " + c.Found
		}
		if c.ID == "tpm.ak-credential" && c.Outcome == check.Pass && !pinned {
			l.Skip(c.ID, fromBundle)
			continue
		}
		l = append(l, c)
	}
	return l
}

// acceptable holds the evidence against the plan's policy, if it is one that
// this program has. Another was the verifier's to judge.
func (v *verification) acceptable(l *check.List, found *composite.Appraisal) {
	if v.pl == nil {
		return
	}
	p, err := policy.Named(v.pl.Policy.Name)
	if err != nil {
		l.Skip("policy.known", fmt.Sprintf("policy %.80q is not one of this program's: what is acceptable was the verifier's judgement", v.pl.Policy.Name))
		return
	}
	d, err := p.Digest()
	if err != nil || d != v.pl.Policy.Digest {
		l.Skip("policy.known", fmt.Sprintf("this program has another version of policy %s: what is acceptable was the verifier's judgement", p.Name))
		return
	}
	l.Pass("policy.known", p.Name)
	*l = append(*l, v.decide(p, found.Evidence(v.pl.Resources.GPUs))...)
}

// decide applies the policy. The verifier may have had endorsements that the
// bundle does not carry: a check that it made, and that cannot be made here,
// counts for the policy, and is told as the verifier's word.
func (v *verification) decide(p policy.Policy, seen policy.Evidence) check.List {
	word := map[string]bool{}
	for _, d := range []struct {
		name   string
		device *policy.Device
	}{{"cpu0", seen.SNP}, {"tpm0", seen.TPM}} {
		if d.device != nil {
			d.device.Checks = v.believe(d.name, d.device.Checks, word)
		}
	}
	for i := range seen.GPUs {
		seen.GPUs[i].Checks = v.believe(fmt.Sprintf("gpu%d", i), seen.GPUs[i].Checks, word)
	}
	var out check.List
	for _, c := range p.Decide(seen).All() {
		switch {
		case c.Outcome != check.Pass:
		case strings.HasSuffix(c.ID, ".require") && word[c.Found]:
			c.Outcome, c.Found = check.NotChecked, c.Found+": passed, by the verifier's word; the bundle lacks what the check needs"
		case strings.HasPrefix(c.ID, "policy.tpm.") && c.ID != "policy.tpm.required" && v.trust.VerifierKeys == nil:
			// The attestation key is the TPM's by the verifier's credential alone.
			c.Outcome, c.Found = check.NotChecked, c.Found+": "+fromBundle
		}
		out = append(out, c)
	}
	return out
}

// believe returns checks with those passed that were not made here and that the
// result says passed there, and notes them in word.
func (v *verification) believe(device string, checks check.List, word map[string]bool) check.List {
	if v.result == nil {
		return checks
	}
	there := v.result.Submods[device].Checks
	out := slices.Clone(checks)
	for i, c := range out {
		passed := func(t check.Check) bool { return t.ID == c.ID && t.Outcome == check.Pass }
		if c.Outcome == check.NotChecked && slices.ContainsFunc(there, passed) {
			out[i].Outcome = check.Pass
			word[c.ID] = true
		}
	}
	return out
}

// devices holds the devices in the evidence against those in the result.
func (v *verification) devices(l *check.List) {
	if v.result == nil {
		return
	}
	var have, want []string
	if v.env.SNP != nil {
		have = append(have, "cpu0")
	}
	if v.env.TPM != nil {
		have = append(have, "tpm0")
	}
	for i := range v.env.GPUs {
		have = append(have, fmt.Sprintf("gpu%d", i))
	}
	for name := range v.result.Submods {
		want = append(want, name)
	}
	slices.Sort(have)
	slices.Sort(want)
	l.Equal("evidence.devices", strings.Join(want, ", "), strings.Join(have, ", "), "the result speaks of devices whose evidence is not here")
}
