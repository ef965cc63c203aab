package rego_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/policy/rego"
	"github.com/coffer-run/coffer/attest/receipt"
)

var now = time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC)

// sourced is the good document with a signer of reference values.
func sourced(t *testing.T) (policy.Policy, *receipt.Signer) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner("vendor", k)
	if err != nil {
		t.Fatal(err)
	}
	keys, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	p, err := policy.Parse([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	p.Sources = []policy.Source{{Issuer: "vendor", Keys: keys}}
	return p, s
}

func opened(t *testing.T, p policy.Policy, s *receipt.Signer, lifetime time.Duration, v policy.Values) policy.References {
	t.Helper()
	v.IssuedAt, v.Expires = now.Unix(), now.Add(lifetime).Unix()
	token, err := policy.SignValues(s, v)
	if err != nil {
		t.Fatal(err)
	}
	r, err := p.OpenReferences(token, now)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

var (
	chip  = strings.Repeat("ef", 64)
	idKey = strings.Repeat("1d", 48)
	pcr7  = strings.Repeat("07", 32)
)

func referenced() policy.Evidence {
	e := evidence()
	e.Now = now
	e.SNP.Claims["snp.chip-id"], e.SNP.Claims["snp.id-key-digest"] = chip, idKey
	e.TPM.Claims["tpm.pcrs"] = map[string]string{"7": pcr7, "14": pcr14}
	return e
}

func everything() policy.Values {
	return policy.Values{
		SNP: &policy.SNPValues{Measurements: []string{strings.Repeat("00", 48), measurement}, IDKeyDigests: []string{idKey}, ChipIDs: []string{chip},
			MinimumTCB: map[anchor.Product]policy.TCB{anchor.Genoa: {Bootloader: 9, SNP: 23, Microcode: 72}}},
		TPM: &policy.TPMValues{PCRs: map[string][]string{"7": {pcr7}, "14": {pcr14}}},
		GPU: &policy.GPUValues{DriverVersions: []string{"550.90.07"}, VBIOSVersions: []string{"96.00.9F.00.01"}, FeatureFlags: []string{"SPT"}},
	}
}

func TestReferencesAccept(t *testing.T) {
	p, s := sourced(t)
	d := compiled(t, p, opened(t, p, s, time.Hour, everything())).Decide(referenced())
	if f := d.All().Failed(); len(f) > 0 {
		t.Fatalf("failed %+v", f)
	}
	made := map[string]bool{}
	for _, c := range d.All() {
		made[c.ID] = true
	}
	for _, id := range []string{"policy.references", "policy.snp.id-key", "policy.snp.chip-id", "policy.tpm.pcr7", "policy.tpm.pcr14"} {
		if !made[id] {
			t.Errorf("%s was not checked", id)
		}
	}
}

func TestReferencesNarrow(t *testing.T) {
	other := strings.Repeat("99", 64)
	for situation, row := range map[string]struct {
		change func(*policy.Values)
		spoil  func(*policy.Evidence)
		by     string
	}{
		"measurement of the document that the file lacks": {func(v *policy.Values) { v.SNP.Measurements = []string{other[:96]} }, nil, "policy.snp.measurement"},
		"measurement of the file that the document lacks": {func(v *policy.Values) { v.SNP.Measurements = []string{other[:96]} },
			func(e *policy.Evidence) { e.SNP.Claims["snp.measurement"] = other[:96] }, "policy.snp.measurement"},
		"another id key":   {nil, func(e *policy.Evidence) { e.SNP.Claims["snp.id-key-digest"] = other[:96] }, "policy.snp.id-key"},
		"no id key":        {nil, func(e *policy.Evidence) { delete(e.SNP.Claims, "snp.id-key-digest") }, "policy.snp.id-key"},
		"another chip":     {nil, func(e *policy.Evidence) { e.SNP.Claims["snp.chip-id"] = other }, "policy.snp.chip-id"},
		"a higher minimum": {func(v *policy.Values) { v.SNP.MinimumTCB[anchor.Genoa] = policy.TCB{SNP: 24} }, nil, "policy.snp.minimum-tcb"},
		"a lower minimum, which lowers nothing": {func(v *policy.Values) { v.SNP.MinimumTCB[anchor.Genoa] = policy.TCB{} },
			func(e *policy.Evidence) { e.SNP.Claims["snp.reported-tcb"].(map[string]any)["microcode"] = 71 }, "policy.snp.minimum-tcb"},
		"another PCR 7":    {nil, func(e *policy.Evidence) { e.TPM.Claims["tpm.pcrs"] = map[string]string{"7": pcr14, "14": pcr14} }, "policy.tpm.pcr7"},
		"PCR 7 not quoted": {nil, func(e *policy.Evidence) { e.TPM.Claims["tpm.pcrs"] = map[string]string{"14": pcr14} }, "policy.tpm.pcr7"},
		"another PCR 14":   {func(v *policy.Values) { v.TPM.PCRs["14"] = []string{pcr7} }, nil, "policy.tpm.pcr14"},
		"another driver":   {func(v *policy.Values) { v.GPU.DriverVersions = []string{"580.0"} }, nil, "policy.gpu.driver-version"},
		"another VBIOS":    {func(v *policy.Values) { v.GPU.VBIOSVersions = []string{"96.0"} }, nil, "policy.gpu.vbios-version"},
		"another mode":     {func(v *policy.Values) { v.GPU.FeatureFlags = []string{"PPCIE"} }, nil, "policy.gpu.feature-flag"},
		"mode of the file that the document lacks": {func(v *policy.Values) { v.GPU.FeatureFlags = []string{"PPCIE"} },
			func(e *policy.Evidence) { e.GPUs[0].Claims["gpu.feature-flag"] = "PPCIE" }, "policy.gpu.feature-flag"},
	} {
		t.Run(situation, func(t *testing.T) {
			p, s := sourced(t)
			v, e := everything(), referenced()
			if row.change != nil {
				row.change(&v)
			}
			if row.spoil != nil {
				row.spoil(&e)
			}
			var ids []string
			for _, c := range compiled(t, p, opened(t, p, s, time.Hour, v)).Decide(e).All().Failed() {
				ids = append(ids, c.ID)
			}
			if len(ids) != 1 || ids[0] != row.by {
				t.Fatalf("failed %v, want %s alone", ids, row.by)
			}
		})
	}
}

func TestReferencesAddUp(t *testing.T) {
	p, s := sourced(t)
	a, b := everything(), everything()
	a.SNP.ChipIDs, b.SNP.ChipIDs = []string{strings.Repeat("00", 64)}, []string{chip}
	both := compiled(t, p, opened(t, p, s, time.Hour, a), opened(t, p, s, 2*time.Hour, b))
	e := referenced()
	if f := both.Decide(e).All().Failed(); len(f) > 0 {
		t.Errorf("failed %+v", f)
	}
	e.Now = now.Add(90 * time.Minute)
	if f := both.Decide(e).All().Failed(); len(f) > 0 {
		t.Errorf("with one of two files expired: failed %+v", f)
	}
	e.SNP.Claims["snp.chip-id"] = strings.Repeat("00", 64)
	if f := both.Decide(e).All().Failed(); len(f) != 1 || f[0].ID != "policy.snp.chip-id" {
		t.Errorf("what only an expired file lists: failed %+v", f)
	}
}

func TestReferencesRefuse(t *testing.T) {
	p, s := sourced(t)
	r := opened(t, p, s, time.Hour, everything())
	refusedBy := func(t *testing.T, c *rego.Policy, e policy.Evidence) {
		t.Helper()
		f := c.Decide(e).Platform.Failed()
		if len(f) != 1 || f[0].ID != "policy.references" {
			t.Fatalf("failed %+v", f)
		}
	}
	t.Run("none for a source", func(t *testing.T) { refusedBy(t, compiled(t, p), referenced()) })
	t.Run("expired since", func(t *testing.T) {
		e := referenced()
		e.Now = now.Add(time.Hour)
		refusedBy(t, compiled(t, p, r), e)
	})
	t.Run("no clock", func(t *testing.T) {
		e := referenced()
		e.Now = time.Time{}
		refusedBy(t, compiled(t, p, r), e)
	})
	t.Run("opened under another policy", func(t *testing.T) {
		q, _ := sourced(t)
		if _, err := rego.Compile(q, r); err == nil {
			t.Fatal("compiles")
		}
	})
	t.Run("never opened", func(t *testing.T) {
		if _, err := rego.Compile(p, policy.References{}); err == nil {
			t.Fatal("compiles")
		}
	})
}

// A decision that is remembered ends with the file that it rests on, while the source
// has another that is valid.
func TestExpiryEndsRememberedDecisions(t *testing.T) {
	p, s := sourced(t)
	without := everything()
	without.SNP.Measurements = without.SNP.Measurements[:1]
	c, e := compiled(t, p, opened(t, p, s, time.Hour, everything()), opened(t, p, s, 3*time.Hour, without)), referenced()
	for range 2 {
		for at, want := range map[time.Duration]string{0: "", 59 * time.Minute: "", 2 * time.Hour: "policy.snp.measurement", 4 * time.Hour: "policy.references"} {
			e.Now = now.Add(at)
			var failed []string
			for _, f := range c.Decide(e).All().Failed() {
				failed = append(failed, f.ID)
			}
			if want == "" && len(failed) > 0 || want != "" && !slices.Contains(failed, want) {
				t.Errorf("after %s: failed %v, want %q", at, failed, want)
			}
		}
	}
}
