package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
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
		found = v.asRefused("evidence.refusal", found, "endorsements.form", "endorsements.listed", "endorsements.count")
	}
	*g = append(*g, found...)
	v.simulated(g)
}

// refusal reports whether the verifier refused the job, which then ended.
func (v *verification) refusal() bool {
	return v.result != nil && !v.affirmed && !v.reached(bundle.StageVerify)
}

// asRefused returns the checks of what the verifier refused: the record is true
// if it was refused for what is found here. Failures of the record itself stay,
// and what the result holds against the job though it passes here is told.
func (v *verification) asRefused(id string, found check.List, ofRecord ...string) check.List {
	signed := ids(v.result.AllChecks().Failed())
	var out check.List
	var same, more, pass []string
	for _, c := range found {
		switch {
		case c.Outcome == check.Pass && slices.Contains(signed, c.ID):
			out = append(out, c)
			pass = append(pass, c.ID)
		case c.Outcome != check.Fail || slices.Contains(ofRecord, c.ID):
			out = append(out, c)
		case slices.Contains(signed, c.ID):
			same = append(same, c.ID)
		default:
			more = append(more, c.ID)
		}
	}
	for _, l := range []*[]string{&same, &more, &pass} {
		slices.Sort(*l)
		*l = slices.Compact(*l)
	}
	// Of several devices, one may pass what another fails.
	pass = slices.DeleteFunc(pass, func(id string) bool { return slices.Contains(same, id) })
	if len(same) > 0 {
		out.Pass(id, "refused for what is found here too: "+strings.Join(same, ", "))
	}
	if len(more) > 0 {
		out.Skip(id, "does not hold either, which the result does not say: "+strings.Join(more, ", "))
	}
	if len(pass) > 0 {
		out.Skip(id, "the result says that this does not hold, and here it does: "+strings.Join(pass, ", "))
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
	trust := composite.Trust{Anchors: v.trust.Anchors, CredentialKeys: keys}
	if library := v.endorsements(&l); library != nil {
		if trust.Endorsements, err = endorse.Offline(library, v.trust.Anchors, v.rep.At); err != nil {
			l.Fail("evidence.endorsements", "endorsements to check the devices by", err.Error(), "")
		}
	}
	found := s.Appraise(context.Background(), trust, v.rep.At)
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
		if c.ID == "tpm.ak-credential" && c.Outcome == check.Pass && byCredential(d.Claims) && !pinned {
			l.Skip(c.ID, fromBundle)
			continue
		}
		l = append(l, c)
	}
	return l
}

// byCredential reports whether a verifier's credential stands for the
// attestation key, and not the platform's report or the caller's anchors.
func byCredential(claims map[string]any) bool {
	return claims["tpm.ak-by"] == vtpm.AKByCredential
}

// acceptable holds the evidence against the plan's policy, if it is one that
// this program has or its user named. Another was the verifier's to judge.
func (v *verification) acceptable(l *check.List, found *composite.Appraisal) {
	if v.pl == nil {
		return
	}
	p, ok := v.policy(l)
	if !ok {
		return
	}
	rules, whole := v.decide(p, found.Evidence(v.pl.Resources.GPUs))
	if v.sb != nil {
		p.CheckSandbox(&rules, *v.sb)
	}
	v.applied = whole && v.sb != nil && len(rules.Failed()) == 0
	*l = append(*l, rules...)
}

// Why a check that a policy requires is neither passed nor failed here.
const (
	verifiersWord = "passed, by the verifier's word; the bundle lacks what the check needs"
	nobodysWord   = "the bundle lacks what the check needs, and nobody whose keys are pinned says that it passed"
)

// decide applies the policy, and says whether all that it requires was made
// here. The verifier may have had endorsements that the bundle does not carry: a
// check that it made, and that cannot be made here, counts for the policy, and is
// told as the verifier's word.
func (v *verification) decide(p policy.Policy, seen policy.Evidence) (_ check.List, whole bool) {
	word := map[string]string{}
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
	rules, err := v.compile(p)
	if err != nil {
		out.Fail("policy.rules", "rules that this program can apply", err.Error(), "")
		return out, false
	}
	whole = true
	for _, c := range rules.Decide(seen).All() {
		switch {
		case c.Outcome != check.Pass:
		case strings.HasSuffix(c.ID, ".require") && word[c.Found] != "":
			c.Outcome, c.Found = check.NotChecked, c.Found+": "+word[c.Found]
			whole = false
		case strings.HasPrefix(c.ID, "policy.tpm.") && c.ID != "policy.tpm.required" && v.trust.VerifierKeys == nil && seen.TPM != nil && byCredential(seen.TPM.Claims):
			// The attestation key is the TPM's by the verifier's credential alone.
			c.Outcome, c.Found = check.NotChecked, c.Found+": "+fromBundle
			whole = false
		}
		out = append(out, c)
	}
	return out, whole
}

// believe returns checks with those passed that were not made here, and notes in
// word who says so: the result, if the caller knows its keys. Without such a
// result nobody does, and the policy has an open question, but no answer to
// refuse for.
func (v *verification) believe(device string, checks check.List, word map[string]string) check.List {
	out := slices.Clone(checks)
	for i, c := range out {
		if c.Outcome != check.NotChecked {
			continue
		}
		passed := func(t check.Check) bool { return t.ID == c.ID && t.Outcome == check.Pass }
		switch {
		case !v.believed():
			out[i].Outcome, word[c.ID] = check.Pass, nobodysWord
		case slices.ContainsFunc(v.result.Submods[device].Checks, passed):
			out[i].Outcome, word[c.ID] = check.Pass, verifiersWord
		default:
		}
	}
	return out
}

// believed reports whether there is a result under keys that the caller pinned.
func (v *verification) believed() bool { return v.result != nil && v.trust.VerifierKeys != nil }

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
