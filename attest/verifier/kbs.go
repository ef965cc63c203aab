package verifier

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/snp"
)

// Bounds on what AppraiseKBS takes, in bytes.
const (
	// MaxKBSRequest is that of a whole request.
	MaxKBSRequest = 2 << 20
	// maxKBSRuntimeData is that of runtime-data: a nonce and a public key.
	maxKBSRuntimeData = 16 << 10
	// maxKBSTEE is that of the name of a TEE.
	maxKBSTEE = 64
)

// kbsSNP is the one TEE of the KBS protocol that is appraised here.
const kbsSNP = "snp"

// kbsSubmod is the submodule of its results.
const kbsSubmod = "cpu0"

// kbsRequest is what a broker asks to have appraised (docs/formats/kbs.md): its
// own word on the session, and what the guest posted to /kbs/v0/attest.
type kbsRequest struct {
	Audience    string         `json:"audience"`
	Session     string         `json:"session"`
	TEE         string         `json:"tee"`
	Nonce       string         `json:"nonce"`
	RuntimeData jsontext.Value `json:"runtime-data"`
	Evidence    jsontext.Value `json:"tee-evidence"`
	InitData    *kbsInitData   `json:"init-data"`
}

type kbsInitData struct {
	Format string `json:"format"`
	Body   string `json:"body"`
}

type kbsRuntimeData struct {
	Nonce string         `json:"nonce"`
	Key   jsontext.Value `json:"tee-pubkey"`
}

// kbsEvidence is CompositeEvidence of version 0.4 of the protocol.
type kbsEvidence struct {
	Primary jsontext.Value `json:"primary_evidence"`
	// Additional is JSON in a string, or empty: the devices besides the CPU.
	Additional string `json:"additional_evidence"`
}

// kbsGuest is a well-formed request, before anything in it is believed.
type kbsGuest struct {
	kbsRequest
	runtime  kbsRuntimeData
	evidence kbsEvidence
	// thumbprint is that of the tee-pubkey (RFC 7638, SHA-256).
	thumbprint []byte
	// reportData is what a report has that speaks of nonce and key.
	reportData [64]byte
	// snp is empty for another TEE.
	snp snp.Evidence
}

func parseKBS(b []byte) (*kbsGuest, error) {
	if len(b) > MaxKBSRequest {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), MaxKBSRequest)
	}
	g := &kbsGuest{}
	if err := strict(b, &g.kbsRequest); err != nil {
		return nil, err
	}
	for what, name := range map[string]string{"audience": g.Audience, "session": g.Session, "nonce": g.Nonce} {
		if !goodName(name) {
			return nil, fmt.Errorf("%s: want 1 to %d printable characters without spaces", what, maxName)
		}
	}
	switch {
	case !goodName(g.TEE) || len(g.TEE) > maxKBSTEE:
		return nil, fmt.Errorf("tee: want 1 to %d printable characters without spaces", maxKBSTEE)
	case len(g.RuntimeData) > maxKBSRuntimeData:
		return nil, fmt.Errorf("runtime-data of %d bytes, at most %d are allowed", len(g.RuntimeData), maxKBSRuntimeData)
	case g.InitData != nil && g.InitData.Format != "toml" && g.InitData.Format != "json":
		return nil, fmt.Errorf("init-data of format %.20q: want toml or json", g.InitData.Format)
	}
	if err := strict(g.RuntimeData, &g.runtime); err != nil {
		return nil, fmt.Errorf("runtime-data: %w", err)
	}
	if err := strict(g.Evidence, &g.evidence); err != nil {
		return nil, fmt.Errorf("tee-evidence: %w", err)
	}
	if err := g.readKey(); err != nil {
		return nil, fmt.Errorf("tee-pubkey: %w", err)
	}
	if err := g.bind(); err != nil {
		return nil, err
	}
	if g.TEE != kbsSNP {
		return g, nil
	}
	var err error
	if g.snp, err = parseKBSSNP(g.evidence.Primary); err != nil {
		return nil, fmt.Errorf("primary_evidence: %w", err)
	}
	return g, nil
}

// strict reads one JSON value that has no member twice and none but v's.
func strict(b []byte, v any) error {
	return json.Unmarshal(b, v, json.RejectUnknownMembers(true))
}

func (g *kbsGuest) readKey() error {
	var k jose.JSONWebKey
	if err := k.UnmarshalJSON(g.runtime.Key); err != nil {
		return err
	}
	if !k.Valid() || !k.IsPublic() {
		return errors.New("not a public key")
	}
	var err error
	g.thumbprint, err = k.Thumbprint(crypto.SHA256)
	return err
}

// bind computes the report data as guests of version 0.4 do: the SHA-384 of the
// canonical JSON (RFC 8785) of nonce, key and additional evidence, and then zeros
// (guest-components, kbs_protocol/src/client/rcar_client.rs; trustee,
// kbs/src/attestation/backend.rs, and verifier/src/lib.rs, regularize_data).
func (g *kbsGuest) bind() error {
	b, err := json.Marshal(struct {
		Nonce      string         `json:"nonce"`
		Key        jsontext.Value `json:"tee-pubkey"`
		Additional string         `json:"additional-evidence"`
	}{g.runtime.Nonce, g.runtime.Key, g.evidence.Additional})
	if err != nil {
		return fmt.Errorf("runtime-data: %w", err)
	}
	v := jsontext.Value(b)
	if err := v.Canonicalize(); err != nil {
		return fmt.Errorf("runtime-data: %w", err)
	}
	sum := sha512.Sum384(v)
	copy(g.reportData[:], sum[:])
	return nil
}

// AppraiseKBS judges the evidence of a guest of the Confidential Containers KBS
// protocol, for the broker that holds the guest's session: request is JSON as
// docs/formats/kbs.md has it. It returns a signed result (receipt.TypeKBS)
// whether the evidence is accepted or refused; a refusal holds every failed
// check. Input that is no such request is an error that wraps ErrMalformed.
//
// Whether the nonce is fresh, and used once, is the broker's affair, which made
// it. The evidence speaks of a key, a nonce and init-data: of no plan, no sandbox
// and no job.
func (v *Verifier) AppraiseKBS(ctx context.Context, request []byte) (string, receipt.KBSResult, error) {
	g, err := parseKBS(request)
	if err != nil {
		return "", receipt.KBSResult{}, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if err := ctx.Err(); err != nil {
		return "", receipt.KBSResult{}, err
	}
	now := v.clock()
	var l check.List
	l.Equal("kbs.tee", kbsSNP, clip(g.TEE), "evidence of this TEE is not appraised here; that of \"sample\" is nowhere")
	same(&l, "kbs.runtime-nonce", g.Nonce, g.runtime.Nonce, "attest with the nonce of the session")
	// What nobody looks at must not be taken for attested.
	if a := g.evidence.Additional; a != "" && a != "{}" {
		l.Fail("kbs.additional-evidence", "no devices besides the CPU", fmt.Sprintf("%d bytes of evidence", len(a)), "evidence of further devices is not appraised here: attest without them")
	}
	r := receipt.KBSResult{
		Issuer: v.id, Audience: g.Audience, IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Nonce: g.Nonce, Session: g.Session, TEE: g.TEE, Key: g.thumbprint, Evidence: plan.Sum(g.Evidence), Simulated: v.simulated,
	}
	if g.InitData != nil {
		r.InitData = plan.Sum([]byte(g.InitData.Body))
	}
	a := v.appraiseKBS(ctx, g, l, now)
	if err := ctx.Err(); err != nil {
		return "", receipt.KBSResult{}, err
	}
	r.Submods = map[string]receipt.Appraisal{kbsSubmod: a}
	if r.ID, err = tokenID(); err != nil {
		return "", receipt.KBSResult{}, err
	}
	token, err := v.keys.Load().signer.Sign(receipt.TypeKBS, r)
	if err != nil {
		return "", receipt.KBSResult{}, err
	}
	if len(token) > receipt.MaxToken {
		return "", receipt.KBSResult{}, fmt.Errorf("%w: result of %d bytes, at most %d are allowed", ErrMalformed, len(token), receipt.MaxToken)
	}
	return token, r, nil
}

// appraiseKBS holds the guest's one device against the policy. l has what was
// checked before.
func (v *Verifier) appraiseKBS(ctx context.Context, g *kbsGuest, l check.List, now time.Time) receipt.Appraisal {
	a := receipt.Appraisal{Status: receipt.Contraindicated, Vector: missing(), Claims: map[string]any{}, PolicyID: "policy:none"}
	t := v.trusted.Load()
	if t.kbs == nil {
		l.Fail("kbs.policy", "a policy for guests of this protocol", "none", "have the verifier's operator name one (kbsPolicy)")
	} else {
		l.Pass("kbs.policy", t.kbs.Source().Name)
		a.PolicyID = policyID(t.kbsRef)
	}
	if g.TEE != kbsSNP {
		a.Checks = clipAll(l)
		return a
	}
	res := v.endorsed.AppraiseSNP(ctx, g.snp, snp.Want{ReportData: g.reportData}, t.anchors, now)
	genuine := res.Genuine()
	l = append(l, res.Checks...)
	if !genuine && len(res.Checks.Failed()) == 0 {
		l.Fail("snp.genuine", "chain and signature checked", "not checked", "report this as a defect")
	}
	g.checkInitData(&l, res.Report)
	device := &policy.Device{Claims: res.Claims, Checks: res.Checks, Simulated: res.Simulated}
	d := t.kbs.Decide(policy.Evidence{SNP: device, Now: now}) //nolint:contextcheck // rules end by limits of their own
	l = append(append(l, d.Platform...), d.SNP...)
	a.Claims, a.Checks = res.Claims, clipAll(l)
	a.Vector = vector(composite.CPU, grades(a.Checks))
	// A device on which the policy did not speak was not accepted by it.
	if genuine && len(d.SNP) > 0 && d.Tiers[kbsSubmod] == receipt.Affirming && len(a.Checks.Failed()) == 0 {
		a.Status = receipt.Affirming
	}
	return a
}

// checkInitData holds the init-data against HOST_DATA, which has the first 32
// bytes of its digest (trustee, kbs/docs/initdata.md). Init-data names its digest's
// algorithm itself; here any of the three that there are will do, so that nothing
// of it has to be parsed: no two texts have the same digest under any of them.
func (g *kbsGuest) checkInitData(l *check.List, r *snp.Report) {
	const id, hint = "kbs.init-data", "send the init-data with which the guest was started: it is what a grant names"
	switch {
	case g.InitData == nil || g.InitData.Body == "":
		l.Fail(id, "init-data", "none", hint)
	case r == nil:
		l.Fail(id, "a report that has the init-data's digest as its host data", "no report", hint)
	default:
		body := []byte(g.InitData.Body)
		s256, s384, s512 := sha256.Sum256(body), sha512.Sum384(body), sha512.Sum512(body)
		for name, sum := range map[string][]byte{"SHA-256": s256[:], "SHA-384": s384[:], "SHA-512": s512[:]} {
			if bytes.Equal(sum[:len(r.HostData)], r.HostData[:]) {
				l.Pass(id, name+" in the host data")
				return
			}
		}
		l.Fail(id, "the init-data's digest in the host data, such as "+hex.EncodeToString(s256[:]), hex.EncodeToString(r.HostData[:]), hint)
	}
}

// chooseKBSPolicy finds the policy for guests of the KBS protocol. Of such a guest
// the launch measurement alone says that its software is anybody's who is trusted,
// so one that lists none is an error; and so is one that asks for devices of which
// the protocol carries no evidence that is appraised here.
func (t *trusted) chooseKBSPolicy(o Options) error {
	if o.KBSPolicy == "" {
		return nil
	}
	for _, p := range o.Policies {
		if p.Name != o.KBSPolicy {
			continue
		}
		ref, err := p.Ref()
		if err != nil {
			return err
		}
		var why []string
		if t.kbs != nil {
			why = append(why, "there are two of this name")
		}
		if p.TPM != nil || p.GPU != nil {
			why = append(why, "it asks for a TPM or a GPU, and guests of this protocol are appraised by their CPU alone")
		}
		if !p.SNP.RequireMeasurement && len(p.SNP.Measurements) == 0 {
			why = append(why, "it accepts any launch measurement: list those of your guests, or set requireMeasurement")
		}
		if len(why) > 0 {
			return fmt.Errorf("KBS policy %s: %s", p.Name, strings.Join(why, "; "))
		}
		t.kbs, t.kbsRef = t.policies[ref.Digest], ref
	}
	if t.kbs == nil {
		return fmt.Errorf("KBS policy %.80q: the verifier has no policy of this name", o.KBSPolicy)
	}
	return nil
}
