package verifier_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
)

const (
	kbsInit    = "algorithm = \"sha256\"\nversion = \"0.1.0\"\n\n[data]\n\"policy.rego\" = '''package agent_policy'''\n"
	kbsNonce   = "bm9uY2Utb2YtdGhlLWJyb2tlcg=="
	kbsSession = "kbs-session"
)

// kbsPolicy lists the launch measurement of the emulated guest. It requires no
// check by name, so that each stands for itself.
func kbsPolicy(t testing.TB, name string) policy.Policy {
	t.Helper()
	rules, err := policy.StandardRules()
	if err != nil {
		t.Fatal(err)
	}
	m := simulate.DefaultMeasurement()
	return policy.Policy{
		Version: policy.Version, Name: name, AllowSimulated: true, Rules: rules,
		SNP: &policy.SNP{
			Require: []string{}, Products: anchor.Products(), Measurements: []string{hex.EncodeToString(m[:])},
		},
	}
}

// withKBS makes the world's verifier one that takes guests of the KBS protocol.
func (w *world) withKBS() {
	w.v = w.verifier(func(o *verifier.Options) {
		o.Policies, o.KBSPolicy = append(o.Policies, kbsPolicy(w.t, "guests")), "guests"
	})
}

func (w *world) kbsGuest() *verifiertest.KBSGuest {
	w.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.t.Fatal(err)
	}
	return &verifiertest.KBSGuest{Chip: w.vendor.Chip(), Key: key, InitData: kbsInit}
}

// kbs is an honest request that a test changes before it is sent.
type kbs struct {
	audience, session, tee, nonce string
	attestation                   map[string]any
}

func (w *world) kbs(g *verifiertest.KBSGuest) *kbs {
	w.t.Helper()
	a, err := g.Attestation(kbsNonce)
	if err != nil {
		w.t.Fatal(err)
	}
	return &kbs{audience: audience, session: kbsSession, tee: "snp", nonce: kbsNonce, attestation: a}
}

func (k *kbs) bytes(t testing.TB) []byte {
	t.Helper()
	b, err := verifiertest.KBSRequest(k.audience, k.session, k.tee, k.nonce, k.attestation)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// verifyKBS does what a broker does with a result; it returns the checks that failed.
func (w *world) verifyKBS(token string, key crypto.PublicKey) (receipt.KBSResult, []string) {
	w.t.Helper()
	keys, err := receipt.ParseKeys(verifierID, w.v.JWKS())
	if err != nil {
		w.t.Fatal(err)
	}
	jwk := (&verifiertest.KBSGuest{Key: signerFor{key}}).JWK()
	thumbprint, err := jwk.Thumbprint(crypto.SHA256)
	if err != nil {
		w.t.Fatal(err)
	}
	r, err := receipt.VerifyKBS(keys, token, receipt.KBSExpect{Audience: audience, Nonce: kbsNonce, Session: kbsSession, TEE: "snp", Key: thumbprint, AllowSimulated: true}, w.now)
	var refusal *check.Refusal
	if err != nil && !errors.As(err, &refusal) {
		w.t.Fatal(err)
	}
	var failed []string
	if refusal != nil {
		for _, c := range refusal.Checks.Failed() {
			failed = append(failed, c.ID)
		}
	}
	return r, failed
}

// signerFor has a public key only.
type signerFor struct{ crypto.PublicKey }

func (s signerFor) Public() crypto.PublicKey { return s.PublicKey }

func (signerFor) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("no")
}

func TestKBSAffirmed(t *testing.T) {
	w := newWorld(t)
	w.withKBS()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sum384, sum512 := sha512.Sum384([]byte(kbsInit)), sha512.Sum512([]byte(kbsInit))
	for name, change := range map[string]func(*verifiertest.KBSGuest){
		"as it comes":                   func(*verifiertest.KBSGuest) {},
		"with an RSA key":               func(g *verifiertest.KBSGuest) { g.Key = rsaKey },
		"init-data by SHA-384, cut":     func(g *verifiertest.KBSGuest) { g.SNP.HostData = [32]byte(sum384[:]) },
		"init-data by SHA-512, cut":     func(g *verifiertest.KBSGuest) { g.SNP.HostData = [32]byte(sum512[:]) },
		"an empty map of other devices": func(g *verifiertest.KBSGuest) { g.Additional = "{}" },
		"a report of version 2":         func(g *verifiertest.KBSGuest) { g.SNP.Version = 2 },
		"a report of version 5":         func(g *verifiertest.KBSGuest) { g.SNP.Version = 5 },
		"a large number":                func(g *verifiertest.KBSGuest) { g.SNP.GuestSVN = 0xffffffff },
	} {
		t.Run(name, func(t *testing.T) {
			g := w.kbsGuest()
			change(g)
			token, r, err := w.v.AppraiseKBS(t.Context(), w.kbs(g).bytes(t))
			if err != nil {
				t.Fatal(err)
			}
			got, failed := w.verifyKBS(token, g.Key.Public())
			if len(failed) > 0 {
				t.Fatalf("refused: %v: %v", failed, r.Submods["cpu0"].Checks.Failed())
			}
			if got.InitData != plan.Sum([]byte(kbsInit)) || !got.Simulated || got.Submods["cpu0"].Claims["snp.chip-id"] == nil {
				t.Errorf("result %+v", got)
			}
		})
	}
}

// TestKBSRefused has one thing wrong with an honest guest's evidence at a time: that
// check alone stands between it and an affirming result.
func TestKBSRefused(t *testing.T) {
	w := newWorld(t)
	w.withKBS()
	stranger := w.kbsGuest()
	report := func(k *kbs) map[string]any {
		return k.attestation["tee-evidence"].(map[string]any)["primary_evidence"].(map[string]any)["attestation_report"].(map[string]any)
	}
	attest := func(g *verifiertest.KBSGuest, nonce string) map[string]any {
		a, err := g.Attestation(nonce)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	for name, try := range map[string]struct {
		guest   func(*verifiertest.KBSGuest)
		request func(*verifiertest.KBSGuest, *kbs)
		want    []string
	}{
		"evidence of another nonce": {request: func(g *verifiertest.KBSGuest, k *kbs) {
			k.attestation = attest(g, "another")
		}, want: []string{"kbs.runtime-nonce"}},
		"an old report with this nonce": {request: func(g *verifiertest.KBSGuest, k *kbs) {
			k.attestation["tee-evidence"] = attest(g, "old")["tee-evidence"]
		}, want: []string{"snp.report-data"}},
		"evidence of another key": {request: func(_ *verifiertest.KBSGuest, k *kbs) {
			k.attestation = attest(stranger, kbsNonce)
		}, want: []string{"kbs.tee-key"}},
		"another's key beside the report": {request: func(_ *verifiertest.KBSGuest, k *kbs) {
			k.attestation["runtime-data"].(map[string]any)["tee-pubkey"] = stranger.JWK()
		}, want: []string{"kbs.tee-key", "snp.report-data"}},
		"other report data, signed": {guest: func(g *verifiertest.KBSGuest) {
			g.SNP.Edit = func(r []byte) { r[0x50] ^= 1 }
		}, want: []string{"snp.report-data"}},
		"more than the digest in the report data, signed": {guest: func(g *verifiertest.KBSGuest) {
			g.SNP.Edit = func(r []byte) { r[0x50+63] = 1 }
		}, want: []string{"snp.report-data"}},
		"a report changed after the signature": {request: func(_ *verifiertest.KBSGuest, k *kbs) {
			report(k)["report_id"].([]int)[0] ^= 1
		}, want: []string{"snp.signature"}},
		"another device's evidence dropped": {guest: func(g *verifiertest.KBSGuest) { g.Additional = `{"nvidia":{}}` }, request: func(_ *verifiertest.KBSGuest, k *kbs) {
			k.attestation["tee-evidence"].(map[string]any)["additional_evidence"] = ""
		}, want: []string{"snp.report-data"}},
		"another device's evidence":  {guest: func(g *verifiertest.KBSGuest) { g.Additional = `{"nvidia":{}}` }, want: []string{"kbs.additional-evidence"}},
		"a chip under another root":  {guest: func(g *verifiertest.KBSGuest) { g.Chip = w.other.Chip() }, want: []string{"snp.chain"}},
		"a guest that is debugged":   {guest: func(g *verifiertest.KBSGuest) { g.SNP.Debug = true }, want: []string{"policy.snp.debug"}},
		"a guest that migrates":      {guest: func(g *verifiertest.KBSGuest) { g.SNP.MigrationAgent = true }, want: []string{"policy.snp.migration"}},
		"a report of VMPL 1":         {guest: func(g *verifiertest.KBSGuest) { g.SNP.VMPL = 1 }, want: []string{"policy.snp.vmpl"}},
		"a measurement nobody lists": {guest: func(g *verifiertest.KBSGuest) { g.SNP.Measurement = &[48]byte{1} }, want: []string{"policy.snp.measurement"}},
		"init-data of another guest": {guest: func(g *verifiertest.KBSGuest) { g.SNP.HostData = sha256.Sum256([]byte("other")) }, want: []string{"kbs.init-data"}},
		"init-data that differs in a bit": {guest: func(g *verifiertest.KBSGuest) {
			g.SNP.HostData = sha256.Sum256([]byte(g.InitData))
			g.SNP.HostData[31] ^= 1
		}, want: []string{"kbs.init-data"}},
		"init-data that was not given": {request: func(_ *verifiertest.KBSGuest, k *kbs) {
			delete(k.attestation, "init-data")
		}, want: []string{"kbs.complete", "kbs.init-data"}},
		"empty init-data": {guest: func(g *verifiertest.KBSGuest) { g.InitData = "" }, want: []string{"kbs.init-data"}},
		"no certificates": {request: func(_ *verifiertest.KBSGuest, k *kbs) {
			k.attestation["tee-evidence"].(map[string]any)["primary_evidence"].(map[string]any)["cert_chain"] = nil
		}, want: []string{"snp.chain"}},
		"another session's result":  {request: func(_ *verifiertest.KBSGuest, k *kbs) { k.session = "kbs-other" }, want: []string{"kbs.session"}},
		"another broker's result":   {request: func(_ *verifiertest.KBSGuest, k *kbs) { k.audience = "broker.other" }, want: []string{"kbs.audience"}},
		"the tee \"sample\"":        {request: func(_ *verifiertest.KBSGuest, k *kbs) { k.tee = "sample" }, want: []string{"kbs.tee", "kbs.tee"}},
		"a tee that is not handled": {request: func(_ *verifiertest.KBSGuest, k *kbs) { k.tee = "az-snp-vtpm" }, want: []string{"kbs.tee", "kbs.tee"}},
	} {
		t.Run(name, func(t *testing.T) {
			g := w.kbsGuest()
			if try.guest != nil {
				try.guest(g)
			}
			k := w.kbs(g)
			if try.request != nil {
				try.request(g, k)
			}
			token, r, err := w.v.AppraiseKBS(t.Context(), k.bytes(t))
			if err != nil {
				t.Fatal(err)
			}
			_, failed := w.verifyKBS(token, g.Key.Public())
			want := try.want
			// What the verifier alone can tell, it does not leave to the broker.
			if !slices.ContainsFunc([]string{"kbs.tee-key", "kbs.session", "kbs.audience"}, func(id string) bool { return slices.Equal(want, []string{id}) }) {
				want = append(slices.Clone(want), "kbs.cpu0")
			}
			if affirmed := r.Submods["cpu0"].Status == receipt.Affirming; affirmed == slices.Contains(want, "kbs.cpu0") {
				t.Errorf("status %s", r.Submods["cpu0"].Status)
			}
			slices.Sort(failed)
			slices.Sort(want)
			if !slices.Equal(failed, want) {
				t.Errorf("failed %v, want %v", failed, want)
			}
		})
	}
}

// TestKBSWithoutAPolicy has an honest guest at verifiers that were not told how to
// judge it.
func TestKBSWithoutAPolicy(t *testing.T) {
	w := newWorld(t)
	g := w.kbsGuest()
	token, _, err := w.v.AppraiseKBS(t.Context(), w.kbs(g).bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, failed := w.verifyKBS(token, g.Key.Public()); !slices.Equal(failed, []string{"kbs.cpu0", "kbs.policy", "policy.valid"}) {
		t.Errorf("failed %v", failed)
	}
	tpm, any1 := kbsPolicy(t, "guests"), kbsPolicy(t, "guests")
	tpm.TPM = &policy.TPM{Require: []string{"tpm.signature"}, AllowSelfMeasured: true, Classes: []anchor.Class{anchor.Software}}
	any1.SNP.Measurements = nil
	for name, try := range map[string]struct {
		policies []policy.Policy
		want     string
	}{
		"no policy of the name":      {nil, "no policy of this name"},
		"two of the name":            {[]policy.Policy{kbsPolicy(t, "guests"), kbsPolicy(t, "guests")}, "two of this name"},
		"a policy that wants a TPM":  {[]policy.Policy{tpm}, "asks for a TPM"},
		"a policy for every machine": {[]policy.Policy{any1}, "any launch measurement"},
	} {
		o := w.options()
		o.Policies, o.KBSPolicy = append(o.Policies, try.policies...), "guests"
		if _, err := verifier.New(o); err == nil || !strings.Contains(err.Error(), try.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestKBSSimulationIsRefused has a policy that does not allow simulation.
func TestKBSSimulationIsRefused(t *testing.T) {
	w := newWorld(t)
	p := kbsPolicy(t, "guests")
	p.AllowSimulated = false
	w.v = w.verifier(func(o *verifier.Options) { o.Policies, o.KBSPolicy = append(o.Policies, p), "guests" })
	g := w.kbsGuest()
	token, r, err := w.v.AppraiseKBS(t.Context(), w.kbs(g).bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, failed := w.verifyKBS(token, g.Key.Public()); !slices.Contains(failed, "policy.snp.simulated") || !r.Simulated {
		t.Errorf("failed %v", failed)
	}
}

// TestKBSResultIsNoJobs has each kind of result where the other is needed.
func TestKBSResultIsNoJobs(t *testing.T) {
	w := newWorld(t)
	w.withKBS()
	g := w.kbsGuest()
	token, _, err := w.v.AppraiseKBS(t.Context(), w.kbs(g).bytes(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.relyingParty(token); err == nil || !strings.Contains(err.Error(), "result.signature") {
		t.Errorf("a guest's result passed for a job's: %v", err)
	}
	job, r, err := w.v.Appraise(t.Context(), w.attester().collect().bytes(), audience)
	if err != nil || len(r.AllChecks().Failed()) > 0 {
		t.Fatalf("%v: %v", err, r.AllChecks().Failed())
	}
	if _, failed := w.verifyKBS(job, g.Key.Public()); !slices.Equal(failed, []string{"kbs.signature"}) {
		t.Errorf("a job's result passed for a guest's: %v", failed)
	}
}

func TestKBSMalformed(t *testing.T) {
	w := newWorld(t)
	w.withKBS()
	edit := func(change func(*kbs)) []byte {
		k := w.kbs(w.kbsGuest())
		change(k)
		return k.bytes(t)
	}
	evidence := func(k *kbs) map[string]any { return k.attestation["tee-evidence"].(map[string]any) }
	snp := func(k *kbs) map[string]any { return evidence(k)["primary_evidence"].(map[string]any) }
	honest := edit(func(*kbs) {})
	for name, b := range map[string][]byte{
		"nothing":                nil,
		"two values":             append(slices.Clone(honest), "{}"...),
		"a member twice":         bytes.Replace(honest, []byte(`"nonce":`), []byte(`"nonce":"x","nonce":`), 1),
		"a key twice":            bytes.Replace(honest, []byte(`"tee-pubkey":`), []byte(`"tee-pubkey":{},"tee-pubkey":`), 1),
		"a member in capitals":   bytes.Replace(honest, []byte(`"tee-pubkey":`), []byte(`"Tee-Pubkey":`), 1),
		"too much":               append(slices.Clone(honest), bytes.Repeat([]byte(" "), verifier.MaxKBSRequest)...),
		"nesting":                bytes.Replace(honest, []byte(`"primary_evidence":`), []byte(`"x":`+strings.Repeat("[", 1<<17)+strings.Repeat("]", 1<<17)+`,"primary_evidence":`), 1),
		"no audience":            edit(func(k *kbs) { k.audience = "" }),
		"no session":             edit(func(k *kbs) { k.session = "" }),
		"no nonce":               edit(func(k *kbs) { k.nonce = "" }),
		"no tee":                 edit(func(k *kbs) { k.tee = "" }),
		"no runtime-data":        edit(func(k *kbs) { delete(k.attestation, "runtime-data") }),
		"no evidence":            edit(func(k *kbs) { delete(k.attestation, "tee-evidence") }),
		"no primary evidence":    edit(func(k *kbs) { delete(evidence(k), "primary_evidence") }),
		"no report":              edit(func(k *kbs) { delete(snp(k), "attestation_report") }),
		"a part of a report":     edit(func(k *kbs) { delete(snp(k)["attestation_report"].(map[string]any), "host_data") }),
		"an octet of 256":        edit(func(k *kbs) { snp(k)["attestation_report"].(map[string]any)["host_data"].([]int)[0] = 256 }),
		"a negative octet":       edit(func(k *kbs) { snp(k)["attestation_report"].(map[string]any)["host_data"].([]int)[0] = -1 }),
		"a number of 65 bits":    edit(func(k *kbs) { snp(k)["attestation_report"].(map[string]any)["policy"] = 3e19 }),
		"a hundred certificates": edit(func(k *kbs) { snp(k)["cert_chain"] = make([]struct{}, 100) }),
		"init-data as YAML":      edit(func(k *kbs) { k.attestation["init-data"].(map[string]string)["format"] = "yaml" }),
		"a private key": edit(func(k *kbs) {
			k.attestation["runtime-data"].(map[string]any)["tee-pubkey"] = jose.JSONWebKey{Key: w.kbsGuest().Key}
		}),
		"a symmetric key": edit(func(k *kbs) {
			k.attestation["runtime-data"].(map[string]any)["tee-pubkey"] = map[string]string{"kty": "oct", "k": "AAAA"}
		}),
		"no key":                 edit(func(k *kbs) { delete(k.attestation["runtime-data"].(map[string]any), "tee-pubkey") }),
		"runtime-data with more": edit(func(k *kbs) { k.attestation["runtime-data"].(map[string]any)["x"] = 1 }),
		"a large key": edit(func(k *kbs) {
			k.attestation["runtime-data"].(map[string]any)["tee-pubkey"] = map[string]string{"kty": "RSA", "e": "AQAB", "n": strings.Repeat("A", 17<<10)}
		}),
	} {
		token, _, err := w.v.AppraiseKBS(t.Context(), b)
		if !errors.Is(err, verifier.ErrMalformed) || token != "" {
			t.Errorf("%s: %q, %v", name, token, err)
		}
	}
}

// FuzzAppraiseKBS asks that nothing but the honest evidence is affirmed.
func FuzzAppraiseKBS(f *testing.F) {
	w := newWorld(f)
	w.withKBS()
	g := w.kbsGuest()
	honest := w.kbs(g).bytes(f)
	f.Add(honest)
	f.Add(bytes.Replace(honest, []byte(`"VCEK"`), []byte(`"VLEK"`), 1))
	f.Add([]byte(`{"audience":"a","session":"s","tee":"snp","nonce":"n","runtime-data":{"nonce":"n","tee-pubkey":{}},"tee-evidence":{"primary_evidence":{},"additional_evidence":""}}`))
	_, want, err := w.v.AppraiseKBS(f.Context(), honest)
	if err != nil || want.Submods["cpu0"].Status != receipt.Affirming {
		f.Fatal(err, want.Submods)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		_, r, err := w.v.AppraiseKBS(t.Context(), b)
		if err != nil {
			return
		}
		if r.Submods["cpu0"].Status == receipt.Affirming && (r.Nonce != want.Nonce || !bytes.Equal(r.Key, want.Key) || r.InitData != want.InitData || r.TEE != want.TEE) {
			t.Errorf("affirmed %+v", r)
		}
	})
}
