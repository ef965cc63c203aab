package verifier_test

import (
	"bytes"
	"context"
	"crypto/hpke"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/azure/azuretest"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

func TestHonestJobIsAffirmed(t *testing.T) {
	w := newWorld(t)
	a := w.attester().collect()
	token, r := a.appraise()
	if f := r.AllChecks().Failed(); len(f) > 0 {
		t.Fatalf("refused: %+v", f)
	}
	if len(r.Submods) != 3 || !r.Simulated || r.JobID != "job-1" || r.PlanDigest != plan.Sum(a.e.Plan) || r.SandboxDigest != plan.Sum(a.e.Sandbox) {
		t.Errorf("result %+v", r)
	}
	for _, n := range []string{"cpu0", "tpm0", "gpu0"} {
		s := r.Submods[n]
		if s.Status != receipt.Affirming || len(s.Claims) == 0 || s.Vector.InstanceIdentity != 2 {
			t.Errorf("%s is %s, vector %+v", n, s.Status, s.Vector)
		}
		if s.Vector.Hardware != 0 {
			t.Errorf("%s: simulated hardware is affirmed", n)
		}
	}
	v, err := w.relyingParty(token)
	if err != nil {
		t.Fatal(err)
	}
	if k, err := v.SessionKey(); err != nil || k == nil {
		t.Error(err)
	}
	if string(v.Result().Confirmation.Recipient) != string(a.e.RecipientKey) {
		t.Error("another recipient key is confirmed")
	}
}

// TestAttacks is the attack table of the verifier: one departure a row, and the
// check that must stop it.
func TestAttacks(t *testing.T) {
	recipient := func(t *testing.T) []byte {
		k, err := hpke.MLKEM768X25519().GenerateKey()
		if err != nil {
			t.Fatal(err)
		}
		return k.PublicKey().Bytes()
	}
	// What every device says of a challenge that is another than the envelope's.
	everyDevice := []string{"snp.report-data", "tpm.extra-data", "gpu.nonce", "policy.snp.require", "policy.tpm.require", "policy.gpu.require"}
	for _, row := range []struct {
		situation string
		attack    func(t *testing.T, a *attester)
		by        string
		also      []string
	}{
		{"stale nonce", func(_ *testing.T, a *attester) {
			a.collect()
			a.now = a.now.Add(verifier.NonceLifetime)
		}, "nonce.fresh", nil},
		{"nonce from a clock that runs ahead", func(_ *testing.T, a *attester) {
			a.collect()
			a.now = a.now.Add(-time.Minute)
		}, "nonce.fresh", []string{"tpm.ak-credential", "policy.tpm.require", "policy.tpm.trust-class"}},
		{"replay: the same evidence again", func(_ *testing.T, a *attester) {
			a.collect().appraise()
		}, "nonce.unused", nil},
		{"replay: the same nonce with other keys", func(t *testing.T, a *attester) {
			a.collect().appraise()
			a.e.RecipientKey, a.e.SessionKey = recipient(t), sessionKey(t)
			a.collect()
		}, "nonce.unused", nil},
		{"replay after a refused attempt", func(_ *testing.T, a *attester) {
			a.noTPM = true
			a.collect().appraise()
			a.noTPM = false
			a.collect()
		}, "nonce.unused", nil},
		{"nonce of the attacker's making", func(_ *testing.T, a *attester) {
			a.e.Nonce = strings.Repeat("A", 98)
			a.collect()
		}, "nonce.authentic", nil},
		{"nonce spelt in another way", func(_ *testing.T, a *attester) {
			// 73 bytes leave the last of 98 characters four bits to vary.
			last := a.e.Nonce[97]
			a.e.Nonce = a.e.Nonce[:97] + string(last+1)
			a.collect()
		}, "nonce.authentic", nil},
		{"nonce with its expiry put off", func(_ *testing.T, a *attester) {
			b := []byte(a.e.Nonce)
			b[10]++
			a.e.Nonce = string(b)
			a.collect()
		}, "nonce.authentic", nil},
		{"nonce of another verifier under the same nonce key", func(t *testing.T, a *attester) {
			v := a.verifier(func(o *verifier.Options) { o.ID = "other"; o.Signer = newSigner(t, "other") })
			n, _, err := v.Challenge()
			if err != nil {
				t.Fatal(err)
			}
			a.e.Nonce = n
			a.collect()
		}, "nonce.authentic", nil},
		{"evidence for another verifier's name", func(_ *testing.T, a *attester) {
			a.e.VerifierID = "other"
			a.collect()
		}, "binding.verifier", nil},

		{"recipient key swapped after collection", func(t *testing.T, a *attester) {
			a.collect()
			a.e.RecipientKey = recipient(t)
		}, "snp.report-data", everyDevice},
		{"recipient key swapped, with new GPU report and quote for it", func(t *testing.T, a *attester) {
			a.collect()
			report := a.e.SNP
			a.e.RecipientKey = recipient(t)
			a.collectGPUs().collectTPM()
			a.e.SNP = report
		}, "snp.report-data", []string{"policy.snp.require"}},
		{"recipient key swapped, with new SNP report and quote for it", func(t *testing.T, a *attester) {
			a.collect()
			a.e.RecipientKey = recipient(t)
			a.collectTPM().collectSNP()
		}, "gpu.nonce", []string{"policy.gpu.require"}},
		{"recipient key swapped, with new SNP and GPU reports for it", func(t *testing.T, a *attester) {
			a.collect()
			a.e.RecipientKey = recipient(t)
			a.collectGPUs().collectSNP()
		}, "tpm.extra-data", []string{"policy.tpm.require"}},
		{"session key swapped", func(t *testing.T, a *attester) {
			a.collect()
			a.e.SessionKey = sessionKey(t)
		}, "snp.report-data", everyDevice},
		{"job id swapped", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.JobID = "job-2"
		}, "snp.report-data", append(everyDevice, "sandbox.job")},
		{"sandbox of another job", func(_ *testing.T, a *attester) {
			a.e.JobID = "job-2"
			a.collect()
		}, "sandbox.job", nil},
		{"plan swapped", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Command = []string{"/bin/sh", "-c", "steal"} })
		}, "snp.report-data", everyDevice},
		{"sandbox swapped", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.Sandbox = a.sandbox(func(s *plan.Sandbox) { s.Wrapper = []string{"runsc", "--debug"} })
		}, "snp.report-data", everyDevice},
		{"sandbox with other runtime flags", func(_ *testing.T, a *attester) {
			a.e.Sandbox = a.sandbox(func(s *plan.Sandbox) { s.Profile.RuntimeFlags = []string{"--network=host"} })
			a.collect()
		}, "sandbox.profile", nil},
		{"sandbox without a complete profile", func(_ *testing.T, a *attester) {
			a.e.Sandbox = a.sandbox(func(s *plan.Sandbox) { s.Profile.Trace = "" })
			a.collect()
		}, "sandbox.profile", nil},
		{"sandbox with another image", func(_ *testing.T, a *attester) {
			a.e.Sandbox = a.sandbox(func(s *plan.Sandbox) { s.Image = "sha256:" + "cd" + s.Image[9:] })
			a.collect()
		}, "sandbox.image", nil},
		{"policy that the verifier does not have", func(_ *testing.T, a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Policy.Digest = plan.Sum([]byte("mine")) })
			a.collect()
		}, "policy.known", []string{"policy.valid"}},
		{"policy under another one's name", func(_ *testing.T, a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Policy.Name = "production" })
			a.collect()
		}, "policy.known", []string{"policy.valid"}},

		{"no GPU evidence", func(_ *testing.T, a *attester) { a.gpus = nil; a.collect() }, "policy.gpu.count", nil},
		{"GPU evidence dropped after collection", func(_ *testing.T, a *attester) { a.collect(); a.e.GPUs = nil }, "policy.gpu.count",
			[]string{"snp.report-data", "tpm.extra-data", "policy.snp.require", "policy.tpm.require"}},
		{"GPU collection failed", func(_ *testing.T, a *attester) {
			a.e.Failures = []evidence.Failure{{Source: "gpu", Message: "GPU is lost"}}
			a.collect()
		}, "policy.gpu.count", nil},
		{"two GPUs where one was asked", func(_ *testing.T, a *attester) { a.gpus = a.vendor.GPUs(); a.collect() }, "policy.gpu.count", []string{"policy.gpu.several"}},
		{"two GPUs where two were asked", func(_ *testing.T, a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources.GPUs = 2 })
			a.gpus = a.vendor.GPUs()
			a.collect()
		}, "policy.gpu.several", nil},
		{"the same GPU twice", func(_ *testing.T, a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources.GPUs = 2 })
			a.gpus = []*simulate.GPU{a.gpus[0], a.gpus[0]}
			a.collect()
		}, "gpu.distinct", []string{"policy.gpu.several"}},
		{"the same GPU twice under two names", func(_ *testing.T, a *attester) {
			a.e.Plan = a.plan(func(p *plan.Plan) { p.Resources.GPUs = 2 })
			a.gpus = []*simulate.GPU{a.gpus[0], a.gpus[0]}
			a.collect()
			a.e.GPUs[1].UUID = "GPU-another"
		}, "gpu.distinct", []string{"policy.gpu.several"}},
		{"GPU report from another nonce", func(_ *testing.T, a *attester) {
			a.gpuOpts.Nonce = &[32]byte{9}
			a.collect()
		}, "gpu.nonce", []string{"policy.gpu.require"}},
		{"GPU report from an earlier job", func(_ *testing.T, a *attester) {
			before := a.attester().collect()
			a.collect()
			a.e.GPUs = before.e.GPUs
			a.collectTPM().collectSNP()
		}, "gpu.nonce", []string{"policy.gpu.require"}},
		{"one flipped bit in the GPU report", func(_ *testing.T, a *attester) {
			a.gpuOpts.EditSigned = func(r []byte) []byte { r[60] ^= 1; return r }
			a.collect()
		}, "gpu.signature", []string{"policy.gpu.require"}},
		{"one flipped bit in the GPU report after collection", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.GPUs[0].Report[60] ^= 1
		}, "gpu.signature", []string{"policy.gpu.require", "snp.report-data", "tpm.extra-data", "policy.snp.require", "policy.tpm.require"}},
		{"GPU report swapped for another GPU's after collection", func(t *testing.T, a *attester) {
			a.collect()
			o := *a
			o.gpus = a.vendor.GPUs()[1:]
			o.collectGPUs()
			a.e.GPUs = o.e.GPUs
		}, "snp.report-data", []string{"tpm.extra-data", "policy.snp.require", "policy.tpm.require"}},
		{"GPU shared between guests", func(_ *testing.T, a *attester) { a.gpuOpts.FeatureFlag = 1; a.collect() }, "policy.gpu.feature-flag", nil},
		{"GPU of another simulation", func(_ *testing.T, a *attester) { a.gpus = a.other.GPUs(); a.collect() }, "gpu.chain", []string{"policy.gpu.require"}},

		{"no SEV-SNP evidence", func(_ *testing.T, a *attester) { a.noSNP = true; a.collect() }, "policy.snp.required", nil},
		{"SEV-SNP collection failed", func(_ *testing.T, a *attester) {
			a.e.Failures = []evidence.Failure{{Source: "snp", Message: "no device"}}
			a.noSNP = true
			a.collect()
		}, "policy.snp.required", nil},
		{"debugging allowed in the guest's policy", func(_ *testing.T, a *attester) { a.snpOpts.Debug = true; a.collect() }, "policy.snp.debug", nil},
		{"migration agent in the guest's policy", func(_ *testing.T, a *attester) { a.snpOpts.MigrationAgent = true; a.collect() }, "policy.snp.migration", nil},
		{"report from a less privileged level", func(_ *testing.T, a *attester) { a.snpOpts.VMPL = 2; a.collect() }, "policy.snp.vmpl", nil},
		{"chip of another simulation", func(_ *testing.T, a *attester) { a.chip = a.other.Chip(); a.collect() }, "snp.chain", []string{"policy.snp.require"}},
		{"one flipped bit in the SNP report", func(_ *testing.T, a *attester) { a.collect(); a.e.SNP.Report[0x95] ^= 1 }, "snp.signature", []string{"policy.snp.require"}},

		{"no TPM quote", func(_ *testing.T, a *attester) { a.noTPM = true; a.collect() }, "policy.tpm.required", nil},
		{"TPM collection failed", func(_ *testing.T, a *attester) {
			a.e.Failures = []evidence.Failure{{Source: "tpm", Message: "no device"}}
			a.noTPM = true
			a.collect()
		}, "policy.tpm.required", nil},
		{"TPM evidence dropped after collection", func(_ *testing.T, a *attester) { a.collect(); a.e.TPM = nil }, "policy.tpm.required",
			[]string{"snp.report-data", "gpu.nonce", "policy.snp.require", "policy.gpu.require"}},
		{"quote over other extra data", func(_ *testing.T, a *attester) { a.quoteData = make([]byte, 32); a.collect() }, "tpm.extra-data", []string{"policy.tpm.require"}},
		{"attestation key without a credential", func(_ *testing.T, a *attester) { a.akCred = ""; a.collect() }, "tpm.ak-credential", []string{"policy.tpm.require", "policy.tpm.trust-class"}},
		{"credential from another verifier", func(t *testing.T, a *attester) {
			a.akCred = a.enrol(a.verifier(func(o *verifier.Options) { o.ID = "other"; o.Signer = newSigner(t, "other") }))
			a.collect()
		}, "tpm.ak-credential", []string{"policy.tpm.require", "policy.tpm.trust-class"}},
		{"credential of another TPM", func(t *testing.T, a *attester) {
			stolen := a.akCred
			tpm, err := vtpmtest.New(a.now)
			if err != nil {
				t.Fatal(err)
			}
			tpm.Extend(a.events...)
			a.world.tpm = tpm
			a.akCred = stolen
			a.collect()
		}, "tpm.ak-credential", []string{"policy.tpm.require"}},
		{"expired credential", func(_ *testing.T, a *attester) {
			a.now = a.now.Add(vtpm.CredentialLifetime)
			a.e.Nonce = a.challenge()
			a.collect()
		}, "tpm.ak-credential", []string{"policy.tpm.require", "policy.tpm.trust-class"}},
		{"event log that does not replay", func(_ *testing.T, a *attester) { a.events = nil; a.collect() }, "tpm.event-log", []string{"policy.tpm.require", "policy.tpm.self-measured"}},
		{"firmware log that does not replay", func(_ *testing.T, a *attester) { a.firmware = []byte("log"); a.collect() }, "tpm.tcg-log", nil},
		{"firmware log put in after collection", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.TPM.TCGLog = []byte("log")
		}, "snp.report-data", []string{"tpm.tcg-log", "policy.snp.require"}},
		{"firmware log taken out after collection", func(_ *testing.T, a *attester) {
			a.firmware = []byte("log")
			a.collect()
			a.e.TPM.TCGLog = nil
		}, "snp.report-data", []string{"policy.snp.require"}},
		{"paravisor that nobody trusts", func(_ *testing.T, a *attester) {
			a.collect()
			a.e.SNP = &evidence.SNP{HCLReport: hclReport(a), Certificates: a.chip.CertTable()}
		}, "hcl.paravisor", []string{"hcl.binding"}},
		{"quote swapped for a later one after collection", func(_ *testing.T, a *attester) {
			a.collect()
			a.tpmClock++
			a.collectTPM()
		}, "snp.report-data", []string{"policy.snp.require"}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			a := w.attester()
			row.attack(t, a)
			a.wantRefused(row.by, row.also...)
		})
	}
}

// hclReport is a genuine report with claims of the guest's own making, as every
// SEV-SNP guest can have it.
func hclReport(a *attester) []byte {
	claims, err := azuretest.Claims(&rsa.PublicKey{N: new(big.Int).SetBytes(bytes.Repeat([]byte{0xab}, 256)), E: 65537})
	if err != nil {
		a.t.Fatal(err)
	}
	var data [64]byte
	sum := sha256.Sum256(claims)
	copy(data[:], sum[:])
	r, err := a.chip.Report(data, simulate.SNPOptions{})
	if err != nil {
		a.t.Fatal(err)
	}
	return azuretest.Report(r, claims)
}

// A policy may require that the boot is explained: then a missing log refuses.
func TestPolicyThatRequiresAFirmwareLog(t *testing.T) {
	w := newWorld(t)
	tpm := *w.policy.TPM
	tpm.Require = append(slices.Clone(tpm.Require), "tpm.tcg-log")
	w.policy.Name, w.policy.TPM = "measured-boot", &tpm
	w.v = w.verifier(nil)
	w.attester().collect().wantRefused("policy.tpm.require")
}

// The evidence says nothing of simulation (Options.Plain), and its anchors
// alone tell it from a vendor's.
func TestSimulatedEvidenceAgainstProductionVerifier(t *testing.T) {
	w := newWorld(t)
	production, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	w.policy = production
	genuine := w.v
	w.v = w.verifier(func(o *verifier.Options) { o.Anchors = anchor.Vendor() })
	a := w.attester().collect()
	_, r := a.appraise()
	for _, n := range []string{"cpu0", "gpu0"} {
		if s := r.Submods[n]; s.Status == receipt.Affirming || s.Vector.Hardware > 0 && s.Vector.Hardware < 32 {
			t.Errorf("%s is %s, %+v", n, s.Status, s.Vector)
		}
	}
	// Nobody lists what this machine may have booted.
	unlisted := []string{"policy.snp.measurement", "policy.tpm.pcr4", "policy.tpm.pcr8", "policy.tpm.pcr9", "policy.tpm.pcr11", "policy.tpm.pcr12", "policy.tpm.pcr13"}
	a = w.attester().collect()
	a.wantRefused("snp.chain", append(unlisted, "gpu.chain", "policy.snp.require", "policy.gpu.require", "policy.tpm.require", "policy.tpm.self-measured", "policy.tpm.trust-class", "policy.tpm.simulated")...)

	// Under its own anchors the production policy refuses it as simulated.
	w.v = w.verifier(nil)
	a = w.attester().collect()
	a.wantRefused("policy.snp.simulated", append(unlisted, "policy.gpu.simulated", "policy.tpm.simulated", "policy.snp.require", "policy.gpu.require", "policy.tpm.require", "policy.tpm.self-measured", "policy.tpm.trust-class")...)

	// A production verifier cannot be given the simulation's policy.
	o := w.options()
	o.Anchors = anchor.Vendor()
	simulation, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	o.Policies = append(o.Policies, simulation)
	if _, err := verifier.New(o); err == nil {
		t.Error("a production verifier takes a policy that allows simulation")
	}
	if !genuine.Simulated() || w.verifier(func(o *verifier.Options) { o.Anchors = anchor.Vendor() }).Simulated() {
		t.Error("a verifier does not know whether it is a simulation's")
	}
}

// With reference values at hand a GPU's measurements are affirmed, or refused.
func TestReferenceValues(t *testing.T) {
	w := newWorld(t)
	production, err := policy.Named("production")
	if err != nil {
		t.Fatal(err)
	}
	p := w.policy
	p.Name, p.GPU = "strict", production.GPU
	w.policy = p
	offline := w.verifier(nil)
	w.v = w.verifier(func(o *verifier.Options) { o.GPUEndorsements = nvgpu.Endorsements{Source: w.vendor} })

	a := w.attester().collect()
	_, r := a.appraise()
	if f := r.AllChecks().Failed(); len(f) > 0 {
		t.Fatalf("refused: %+v", f)
	}
	if got := r.Submods["gpu0"].Vector.Executables; got != 3 {
		t.Errorf("measured executables are %d", got)
	}

	a = w.attester()
	a.gpuOpts.Measurements = map[int][48]byte{9: {1}}
	a.collect().wantRefused("gpu.measurements", "policy.gpu.require")

	w.v = offline
	w.attester().collect().wantRefused("policy.gpu.require")
}

func TestMalformedEvidenceIsAnError(t *testing.T) {
	w := newWorld(t)
	for situation, spoil := range map[string]func(*attester) []byte{
		"nothing":             func(*attester) []byte { return nil },
		"not JSON":            func(*attester) []byte { return []byte("evidence") },
		"unknown version":     func(a *attester) []byte { a.e.Version = "2"; return a.bytes() },
		"plan not canonical":  func(a *attester) []byte { a.e.Plan = append(a.e.Plan, ' '); return a.bytes() },
		"no plan":             func(a *attester) []byte { a.e.Plan = nil; return a.bytes() },
		"no sandbox":          func(a *attester) []byte { a.e.Sandbox = nil; return a.bytes() },
		"no job":              func(a *attester) []byte { a.e.JobID = ""; return a.bytes() },
		"job with a line":     func(a *attester) []byte { a.e.JobID = "job\n1"; return a.bytes() },
		"no nonce":            func(a *attester) []byte { a.e.Nonce = ""; return a.bytes() },
		"no recipient key":    func(a *attester) []byte { a.e.RecipientKey = nil; return a.bytes() },
		"short recipient key": func(a *attester) []byte { a.e.RecipientKey = a.e.RecipientKey[1:]; return a.bytes() },
		"no session key":      func(a *attester) []byte { a.e.SessionKey = nil; return a.bytes() },
		"unknown failure": func(a *attester) []byte {
			a.e.Failures = []evidence.Failure{{Source: "tdx"}}
			return a.bytes()
		},
	} {
		t.Run(situation, func(t *testing.T) {
			token, _, err := w.v.Appraise(context.Background(), spoil(w.attester().collect()), audience)
			if !errors.Is(err, verifier.ErrMalformed) || token != "" {
				t.Fatalf("got %q, %v", token, err)
			}
		})
	}
	for _, aud := range []string{"", "a b", "a\n"} {
		if _, _, err := w.v.Appraise(context.Background(), w.attester().collect().bytes(), aud); !errors.Is(err, verifier.ErrMalformed) {
			t.Errorf("audience %q: %v", aud, err)
		}
	}
}

// A refusal says everything that is wrong, not the first thing.
func TestRefusalListsEveryFailure(t *testing.T) {
	w := newWorld(t)
	a := w.attester()
	a.e.Sandbox = w.sandbox(func(s *plan.Sandbox) { s.Image = "other"; s.JobID = "other" })
	a.snpOpts.Debug, a.snpOpts.VMPL = true, 3
	a.gpuOpts.FeatureFlag = 2
	a.noTPM = true
	a.collect()
	_, r := a.appraise()
	failed := map[string]bool{}
	for _, c := range r.AllChecks().Failed() {
		failed[c.ID] = true
	}
	for _, id := range []string{"sandbox.image", "sandbox.job", "policy.snp.debug", "policy.snp.vmpl", "policy.gpu.feature-flag", "policy.tpm.required"} {
		if !failed[id] {
			t.Errorf("%s is not named", id)
		}
	}
}
