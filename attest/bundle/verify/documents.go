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
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func (v *verification) planGroup() {
	g := v.group("plan", "What was asked for")
	defer v.done("plan", g)
	b, ok := v.part(bundle.Plan)
	if v.env != nil {
		g.Equal("plan.bound", string(plan.Sum(v.env.Plan)), string(v.st.PlanDigest), "the evidence speaks of another plan than the statement")
	}
	switch {
	case !ok && v.env != nil:
		// Without it nothing below could be held against what was asked for.
		g.Fail("plan.digest", "the plan of which the evidence speaks", "none that can be relied on", "the record is not complete")
		return
	case !ok:
		g.Skip("plan.digest", "the bundle has no plan that can be relied on")
		return
	}
	g.Equal("plan.digest", string(v.st.PlanDigest), string(plan.Sum(b)), "the plan is another job's")
	p, err := plan.Parse(b)
	if err != nil {
		g.Fail("plan.form", "a canonical plan", err.Error(), "")
		return
	}
	g.Pass("plan.form", p.Name)
	v.pl = &p
	v.rep.Name = p.Name
	if v.env != nil {
		g.Equal("plan.evidence", string(plan.Sum(b)), string(plan.Sum(v.env.Plan)), "the evidence speaks of another plan")
	}
	if _, ok := v.part(bundle.JobFile); ok {
		g.Skip("plan.job-file", "that the job file resolves to this plan: `coffer plan` shows it")
	}
}

func (v *verification) sandboxGroup() {
	g := v.group("sandbox", "What it ran in")
	defer v.done("sandbox", g)
	b, ok := v.part(bundle.Sandbox)
	switch {
	case !ok && v.env != nil:
		g.Fail("sandbox.form", "the sandbox description of which the evidence speaks", "none that can be relied on", "the record is not complete")
		return
	case !ok:
		g.Skip("sandbox.form", "the bundle has no sandbox description that can be relied on")
		return
	}
	s, err := plan.ParseSandbox(b)
	if err != nil {
		g.Fail("sandbox.form", "a sandbox description", err.Error(), "")
		return
	}
	c, err := s.Canonical()
	if err != nil || !bytes.Equal(b, c) {
		g.Fail("sandbox.form", "a canonical sandbox description (RFC 8785)", "another encoding", "")
		return
	}
	g.Pass("sandbox.form", s.Version)
	v.sb = &s
	g.Equal("sandbox.job", v.st.JobID, s.JobID, "the sandbox is another job's")
	if v.env != nil {
		g.Equal("sandbox.evidence", string(plan.Sum(b)), string(plan.Sum(v.env.Sandbox)), "the evidence speaks of another sandbox")
	}
	if v.pl != nil {
		g.Equal("sandbox.image", v.pl.Image, s.Image, "another image than the plan's")
		d, err := s.Profile.Digest()
		if err != nil {
			g.Fail("sandbox.profile", string(v.pl.SandboxProfile), err.Error(), "")
		} else {
			g.Equal("sandbox.profile", string(v.pl.SandboxProfile), string(d), "other runtime binaries, flags or rules than the plan's")
		}
	}
	v.imageSignature(g)
	v.imageSBOM(g)
	g.Skip("sandbox.rules", "that the specification follows from the profile's rules: its digest is bound, and a reader can read it")
	ab, ok := v.part(bundle.AgentPart)
	if !ok {
		return
	}
	a, err := bundle.Decode[bundle.Agent](ab)
	if err != nil {
		g.Fail("sandbox.agent", "the agent's description of itself", err.Error(), "")
		return
	}
	g.Skip("agent.word", fmt.Sprintf("node, versions and submitter (%.80q, for %.80q): nothing but the agent says so", a.Node, a.Submitter))
	v.drivers(g, a.Devices)
	g.Equal("sandbox.agent", s.Profile.Shim+", "+s.Profile.Runtime, a.Shim+", "+a.Runtime, "the agent says that something else ran")
}

// sandboxRefused looks at the sandbox again once it is known that the verifier
// refused the job: perhaps for the sandbox.
func (v *verification) sandboxRefused() {
	for i, g := range v.rep.Groups {
		if g.Name == "sandbox" {
			v.rep.Groups[i].Checks = v.asRefused("sandbox.refusal", g.Checks, "sandbox.form", "sandbox.evidence", "sandbox.agent")
		}
	}
}

func (v *verification) resultGroup() {
	g := v.group("result", "What the verifier said")
	defer v.done("result", g)
	b, ok := v.part(bundle.Result)
	if !ok {
		g.Skip("result.signature", "the bundle has no result that can be relied on")
		v.clock(nil)
		return
	}
	token := string(b)
	var r receipt.Result
	issuer, err := issuerOf(token)
	if err == nil {
		var keys receipt.Keys
		var pinned bool
		if keys, pinned, err = v.keys(v.trust.VerifierKeys, bundle.VerifierKeys, issuer); err == nil {
			if err = keys.Open(receipt.TypeResult, token, &r); err == nil {
				v.verifierKeys = keys
				byKeys(g, "result.signature", pinned, issuer)
			}
		}
	}
	if err != nil {
		g.Fail("result.signature", "a result signed by the verifier", err.Error(), "the result is not the verifier's, or the keys are not")
		v.clock(nil)
		return
	}
	v.result = &r
	v.clock(&r)
	g.Equal("result.profile", receipt.Profile, r.Profile, "")
	g.Equal("result.job", v.st.JobID, r.JobID, "the result speaks of another job")
	g.Equal("result.plan", string(v.st.PlanDigest), string(r.PlanDigest), "the result speaks of another plan")
	if v.sb != nil {
		sb, _ := v.part(bundle.Sandbox)
		g.Equal("result.sandbox", string(plan.Sum(sb)), string(r.SandboxDigest), "the result speaks of another sandbox")
	}
	if v.pl != nil {
		g.Equal("result.policy", v.pl.Policy.Name+" "+string(v.pl.Policy.Digest), r.Policy.Name+" "+string(r.Policy.Digest), "appraised by another policy than the plan's")
	}
	if v.env != nil {
		ev, _ := v.part(bundle.Evidence)
		g.Equal("result.evidence", string(plan.Sum(ev)), string(r.EvidenceDigest), "the result speaks of other evidence")
		g.Equal("result.verifier", v.env.VerifierID, r.Issuer, "the evidence answers another verifier's challenge")
		nonce := sha256.Sum256([]byte(v.env.Nonce))
		g.Equal("result.nonce", hex.EncodeToString(nonce[:]), r.Nonce, "the result speaks of another challenge")
		v.confirmation(g, r)
	}
	life := time.Unix(r.Expires, 0).Sub(time.Unix(r.IssuedAt, 0))
	if r.IssuedAt <= 0 || life <= 0 || life > receipt.ResultLifetime {
		g.Fail("result.lifetime", "at most "+receipt.ResultLifetime.String(), life.String(), "")
	} else {
		g.Pass("result.lifetime", fmt.Sprintf("%s from %s", life, time.Unix(r.IssuedAt, 0).UTC().Format(time.RFC3339)))
	}
	v.affirmed = len(r.Submods) > 0 && len(r.AllChecks().Failed()) == 0
	tiers := make([]string, 0, len(r.Submods))
	for name, s := range r.Submods {
		v.affirmed = v.affirmed && s.Status == receipt.Affirming
		tiers = append(tiers, name+" "+string(s.Status))
	}
	slices.Sort(tiers)
	said := strings.Join(tiers, ", ")
	switch {
	case v.affirmed && v.trust.VerifierKeys == nil:
		g.Skip("result.status", said+": "+fromBundle)
	case v.affirmed:
		g.Pass("result.status", said)
	case v.reached(bundle.StageVerify):
		g.Fail("result.status", string(receipt.Affirming)+" for every device, because the job went on", said, "the job went on without the verifier's consent")
	default:
		g.Pass("result.status", said+": a refusal for "+strings.Join(ids(r.AllChecks().Failed()), ", "))
	}
}

func (v *verification) confirmation(g *check.List, r receipt.Result) {
	want, err := receipt.SessionJWK(v.env.SessionKey)
	switch {
	case err != nil:
		g.Fail("result.session-key", "the session key in the evidence", err.Error(), "")
	case r.Confirmation.JWK == nil || !v.session.Equal(r.Confirmation.JWK.Key):
		g.Fail("result.session-key", "the session key in the evidence", "another", "whoever holds the other key could have asked for the job's keys")
	default:
		g.Pass("result.session-key", want.Algorithm)
		v.rooted = v.rooted || v.trust.VerifierKeys != nil
	}
	g.Equal("result.recipient-key", string(plan.Sum(v.env.RecipientKey)), string(plan.Sum(r.Confirmation.Recipient)), "keys were wrapped to another recipient")
}

// clock settles the time by which certificates are judged.
func (v *verification) clock(r *receipt.Result) {
	v.rep.At = v.trust.At.UTC()
	switch {
	case !v.trust.At.IsZero():
	case r != nil && r.IssuedAt > 0:
		v.rep.At = time.Unix(r.IssuedAt, 0).UTC()
	default:
		v.rep.At = time.Unix(0, v.st.Timeline[len(v.st.Timeline)-1].StartUnixNano).UTC()
	}
}

func (v *verification) releaseGroup() {
	g := v.group("releases", "Which keys were released")
	defer v.done("releases", g)
	assets := v.assets()
	b, ok := v.part(bundle.Releases)
	switch {
	case ok:
	case v.reached(bundle.StageRelease) && len(assets) > 0:
		g.Fail("release.complete", fmt.Sprintf("releases for %d assets", len(assets)), "none", "the record is not complete")
		return
	case v.reached(bundle.StageRelease):
		g.Pass("release.complete", "the plan asks for no key")
		return
	case v.b.Log == nil:
		g.Skip("release.signature", "not known whether a key was released: the bundle has neither receipts nor the log")
		return
	default:
		g.Skip("release.signature", "the bundle has no receipts; the log shows whether it should")
		return
	}
	tokens, err := bundle.Decode[[]string](b)
	if err != nil {
		g.Fail("release.form", "a list of receipts", err.Error(), "")
		return
	}
	if len(tokens) > 0 && !v.affirmed {
		g.Fail("release.result", "no release without an affirming result", fmt.Sprintf("%d releases", len(tokens)), "")
	}
	seen := map[string]bool{}
	var last uint64
	for i, token := range tokens {
		rel, ok := v.release(g, token)
		if !ok {
			continue
		}
		v.releases = append(v.releases, rel)
		if seen[rel.Asset] {
			g.Fail("release.repeated", "one release for each asset", "two for "+rel.Asset, "")
		}
		seen[rel.Asset] = true
		if i > 0 && rel.LogIndex <= last {
			g.Fail("release.order", fmt.Sprintf("an entry after %d of the evidence log", last), fmt.Sprint(rel.LogIndex), "the releases are not in the order in which they were logged")
		}
		last = rel.LogIndex
		digest, want := assets[rel.Asset]
		if v.pl != nil {
			if !want {
				g.Fail("release.asset", "an asset that the plan names", rel.Asset, "a key was released that the plan did not ask for")
			} else {
				g.Equal("release.asset", strings.TrimSpace(rel.Asset+" "+string(digest)), strings.TrimSpace(rel.Asset+" "+string(rel.AssetDigest)), "another version of the asset than the plan's")
			}
		}
	}
	if v.pl != nil && v.reached(bundle.StageRelease) {
		var missing []string
		for a := range assets {
			if !seen[a] {
				missing = append(missing, a)
			}
		}
		slices.Sort(missing)
		if len(missing) > 0 {
			g.Fail("release.complete", "a release for each asset of the plan", "none for "+strings.Join(missing, ", "), "")
		} else {
			g.Pass("release.complete", fmt.Sprintf("%d of %d assets", len(seen), len(assets)))
		}
	}
}

// assets are those that the plan asks for, with their digests.
func (v *verification) assets() map[string]plan.Digest {
	out := map[string]plan.Digest{}
	if v.pl == nil {
		return out
	}
	for _, in := range v.pl.Inputs {
		out[in.Asset] = in.Digest
	}
	if c := v.pl.Checkpoints; c != nil {
		out[c.Asset] = ""
	}
	if r := v.pl.Reseal; r != nil {
		out[r.Asset], out[r.To] = r.Digest, ""
		if r.Checkpoint {
			out[r.Asset] = ""
		}
	}
	return out
}

func (v *verification) release(g *check.List, token string) (receipt.Release, bool) {
	var rel receipt.Release
	issuer, err := issuerOf(token)
	pinned := false
	if err == nil {
		if v.brokerKeys.Issuer() != issuer {
			v.brokerKeys, _, err = v.keys(v.trust.BrokerKeys, bundle.BrokerKeys, issuer)
		}
		pinned = v.trust.BrokerKeys != nil
	}
	if err == nil {
		err = v.brokerKeys.Open(receipt.TypeRelease, token, &rel)
	}
	if err != nil {
		g.Fail("release.signature", "a receipt signed by the broker", err.Error(), "the receipt is not the broker's, or the keys are not")
		return receipt.Release{}, false
	}
	byKeys(g, "release.signature", pinned, issuer)
	g.Equal("release.job", v.st.JobID, rel.JobID, "the receipt speaks of another job")
	g.Equal("release.plan", string(v.st.PlanDigest), string(rel.Plan), "the receipt speaks of another plan")
	if r := v.result; r != nil {
		g.Equal("release.result", r.ID, rel.ResultID, "the key was released under another result")
		g.Equal("release.audience", r.Audience, rel.Issuer, "the result was not meant for this broker")
		g.Equal("release.simulated", fmt.Sprint(r.Simulated), fmt.Sprint(rel.Simulated), "the receipt hides what the result says of the devices")
		at := time.Unix(rel.IssuedAt, 0)
		if at.Before(time.Unix(r.IssuedAt, 0).Add(-receipt.Leeway)) || at.After(time.Unix(r.Expires, 0)) {
			g.Fail("release.time", "while the result was valid", at.UTC().Format(time.RFC3339), "")
		} else {
			g.Pass("release.time", at.UTC().Format(time.RFC3339))
		}
	}
	if rel.IssuedAt > rel.NotAfter {
		g.Fail("release.expiry", "a grant that was valid", "one that had expired", "")
	}
	return rel, true
}
