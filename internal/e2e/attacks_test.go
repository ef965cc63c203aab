package e2e

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	brokerv1 "github.com/coffer-run/coffer/attest/api/broker/v1"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/enclave/collect"
	"github.com/coffer-run/coffer/enclave/keys"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/internal/emulate"
	"github.com/coffer-run/coffer/internal/stack"
)

var update = flag.Bool("update", false, "write docs/attacks.md from this run")

// attack is one row of the table. refused makes the attack and returns the
// refusal that it met; anything but a refusal fails the row.
type attack struct {
	name string
	// does says what the attacker does, for readers.
	does string
	// stage must refuse, and only is the check that stands in the way; others
	// may fail beside it only if they are listed in also.
	stage   string
	only    string
	also    []string
	refused func(t *testing.T, a *attacker) error
}

// mayFail says whether a check may fail beside the one that the row is about:
// those listed, and the two kinds that only repeat another check's failure, the
// status in a result and a policy's demand that a check has passed.
func (r attack) mayFail(id string) bool {
	switch {
	case slices.Contains(r.also, id), strings.HasPrefix(id, "result."), strings.HasSuffix(id, ".require") && strings.HasPrefix(id, "policy."):
		return true
	default:
		return slices.Contains(r.also, "policy.*") && strings.HasPrefix(id, "policy.")
	}
}

// snpSource hands out a report of the test's choosing.
type snpSource func(reportData [64]byte) ([]byte, []byte, error)

func (f snpSource) Report(_ context.Context, d [64]byte) ([]byte, []byte, error) { return f(d) }

// evidenceAttack appraises evidence that was changed after an honest collection.
func evidenceAttack(edit func(t *testing.T, a *attacker, e *evidence.Envelope)) func(*testing.T, *attacker) error {
	return func(t *testing.T, a *attacker) error {
		e := a.collect(t, a.request(t))
		edit(t, a, e)
		_, _, err := a.appraise(t, e, a.brokerID)
		return err
	}
}

// requestAttack appraises evidence that was honestly collected for a changed request.
func requestAttack(edit func(t *testing.T, a *attacker, r *collect.Request)) func(*testing.T, *attacker) error {
	return func(t *testing.T, a *attacker) error {
		r := a.request(t)
		edit(t, a, &r)
		_, _, err := a.appraise(t, a.collect(t, r), a.brokerID)
		return err
	}
}

// resultAttack asks for a key with an affirming result and a full grant, and
// changes one thing about it.
func resultAttack(edit func(t *testing.T, a *attacker, k *asking)) func(*testing.T, *attacker) error {
	return func(t *testing.T, a *attacker) error {
		v, token := a.attest(t)
		k := &asking{verified: v, token: token, resultID: v.Result().ID, grant: a.node.grant(t, string(a.digest), 1), asset: "model", session: a.session}
		edit(t, a, k)
		_, err := a.release(t, k.token, k.resultID, k.grant, k.asset, k.session)
		return err
	}
}

type asking struct {
	verified                      receipt.Verified
	token, resultID, grant, asset string
	session                       *keys.Session
}

// jobAttack submits a job through the agent, after edit has tampered with
// whatever it tampers with.
func jobAttack(edit func(t *testing.T, a *attacker) (job string)) func(*testing.T, *attacker) error {
	return func(t *testing.T, a *attacker) error {
		s := a.node.wait(t, a.node.submit(t, edit(t, a)), "ended", ended)
		if s.State != "refused" {
			return fmt.Errorf("the job is %s at %s: %s", s.State, s.Stage, s.Message)
		}
		var l check.List
		for _, c := range s.Checks {
			l.Fail(c.ID, "", "", "")
		}
		return &check.Refusal{Stage: strings.TrimSuffix(s.Reason, "-refused"), Checks: l}
	}
}

func attacks() []attack {
	return append([]attack{
		{
			name: "stale nonce", does: "answers a challenge that the verifier gave an hour ago", stage: "verify", only: "nonce.fresh",
			refused: requestAttack(func(t *testing.T, a *attacker, r *collect.Request) { r.Nonce = a.oldNonce(t) }),
		},
		{
			name: "invented nonce", does: "makes up a nonce instead of asking for one", stage: "verify", only: "nonce.authentic",
			refused: requestAttack(func(_ *testing.T, _ *attacker, r *collect.Request) {
				b := []byte(r.Nonce)
				b[len(b)/2] ^= 1
				r.Nonce = string(b)
			}),
		},
		{
			name: "replay", does: "sends the evidence of an earlier attempt again", stage: "verify", only: "nonce.unused",
			refused: func(t *testing.T, a *attacker) error {
				e := a.collect(t, a.request(t))
				if _, _, err := a.appraise(t, e, a.brokerID); err != nil {
					t.Fatalf("the first time it is refused: %v", err)
				}
				_, _, err := a.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "swapped recipient key", does: "puts its own key into collected evidence, for weights to be wrapped to", stage: "verify", only: "snp.report-data",
			also: []string{"tpm.extra-data", "gpu.nonce"},
			refused: evidenceAttack(func(t *testing.T, _ *attacker, e *evidence.Envelope) {
				mine, err := keys.GenerateRecipient()
				if err != nil {
					t.Fatal(err)
				}
				e.RecipientKey = mine.Public()
			}),
		},
		{
			name: "swapped session key", does: "puts its own signing key into collected evidence", stage: "verify", only: "snp.report-data",
			also: []string{"tpm.extra-data", "gpu.nonce"},
			refused: evidenceAttack(func(t *testing.T, _ *attacker, e *evidence.Envelope) {
				mine, err := keys.GenerateSession()
				if err != nil {
					t.Fatal(err)
				}
				e.SessionKey = mine.Public()
			}),
		},
		{
			name: "swapped sandbox after collection", does: "attests one sandbox and presents another job's description", stage: "verify", only: "snp.report-data",
			also: []string{"tpm.extra-data", "gpu.nonce"},
			refused: evidenceAttack(func(t *testing.T, a *attacker, e *evidence.Envelope) {
				e.Sandbox = a.describe(t, e.JobID, func(s *plan.Sandbox) { s.Wrapper = append(slices.Clone(s.Wrapper), "--debug") })
			}),
		},
		{
			name: "swapped sandbox flags", does: "runs the approved job with the network switched on", stage: "verify", only: "sandbox.profile",
			refused: requestAttack(func(t *testing.T, a *attacker, r *collect.Request) {
				r.Sandbox = a.describe(t, r.JobID, func(s *plan.Sandbox) {
					s.Profile.RuntimeFlags = []string{"--platform=systrap", "--network=host"}
				})
			}),
		},
		{
			name: "swapped image in the sandbox", does: "attests the approved plan with another image in the sandbox", stage: "verify", only: "sandbox.image",
			refused: requestAttack(func(t *testing.T, a *attacker, r *collect.Request) {
				r.Sandbox = a.describe(t, r.JobID, func(s *plan.Sandbox) { s.Image = "sha256:" + strings.Repeat("0", 64) })
			}),
		},
		{
			name: "missing GPU evidence", does: "leaves the GPU out of evidence for a plan that asks for one", stage: "verify", only: "policy.gpu.count",
			refused: requestAttack(func(_ *testing.T, _ *attacker, r *collect.Request) { r.Want.GPUs = nil }),
		},
		{
			name: "two GPUs where one was asked", does: "adds a second GPU that answers the same nonce", stage: "verify", only: "policy.gpu.count",
			also: []string{"policy.gpu.several", "gpu.distinct"},
			refused: func(t *testing.T, a *attacker) error {
				two := a.collector
				two.GPUs = twice{gpuSource{emulate.Dial(a.emulator(t))}}
				r := a.request(t)
				r.Want.GPUs = []string{a.gpus[0], a.gpus[0]}
				e, err := two.Collect(t.Context(), r)
				if err != nil || len(e.Failures) > 0 {
					t.Fatal(err, e.Failures)
				}
				_, _, err = a.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "missing TPM evidence", does: "leaves the TPM out", stage: "verify", only: "policy.tpm.required",
			refused: requestAttack(func(_ *testing.T, _ *attacker, r *collect.Request) { r.Want.TPM = false }),
		},
		{
			name: "TPM without a credential", does: "quotes with an attestation key that no verifier enrolled", stage: "verify", only: "tpm.ak-credential",
			also:    []string{"policy.tpm.trust-class"},
			refused: requestAttack(func(_ *testing.T, _ *attacker, r *collect.Request) { r.AKCredential = "" }),
		},
		{
			name: "another boot's measurements", does: "presents PCR values that the quote does not cover", stage: "verify", only: "tpm.pcr-digest",
			also: []string{"tpm.event-log", "policy.tpm.self-measured"},
			refused: evidenceAttack(func(_ *testing.T, _ *attacker, e *evidence.Envelope) {
				e.TPM.PCRs[14] = bytes.Repeat([]byte{7}, 32)
			}),
		},
		{
			name: "an old CPU report", does: "combines fresh TPM and GPU evidence with an earlier SEV-SNP report", stage: "verify", only: "snp.report-data",
			refused: func(t *testing.T, a *attacker) error {
				old := a.collect(t, a.request(t))
				e := a.collect(t, a.request(t))
				e.SNP = old.SNP
				_, _, err := a.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "debug policy on", does: "boots the guest with debugging allowed, so that the host can read its memory", stage: "verify", only: "policy.snp.debug",
			refused: func(t *testing.T, a *attacker) error {
				c := a.collector
				c.SNP = snpSource(func(d [64]byte) ([]byte, []byte, error) {
					r, err := a.chip.Report(d, simulate.SNPOptions{Debug: true})
					return r, a.chip.CertTable(), err
				})
				e, err := c.Collect(t.Context(), a.request(t))
				if err != nil || len(e.Failures) > 0 {
					t.Fatal(err, e.Failures)
				}
				_, _, err = a.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "a chip of another maker", does: "signs the CPU report with a chip whose root nobody trusts", stage: "verify", only: "snp.chain",
			refused: func(t *testing.T, a *attacker) error {
				v, err := simulate.New(simulate.Options{Fast: true})
				if err != nil {
					t.Fatal(err)
				}
				c := a.collector
				c.SNP = snpSource(func(d [64]byte) ([]byte, []byte, error) {
					r, err := v.Chip().Report(d, simulate.SNPOptions{})
					return r, v.Chip().CertTable(), err
				})
				e, err := c.Collect(t.Context(), a.request(t))
				if err != nil || len(e.Failures) > 0 {
					t.Fatal(err, e.Failures)
				}
				_, _, err = a.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "simulated evidence, production policy", does: "presents emulated devices to a plan under the production policy", stage: "verify", only: "policy.snp.simulated",
			also: []string{"policy.tpm.simulated", "policy.gpu.simulated", "policy.*"},
			refused: requestAttack(func(t *testing.T, a *attacker, r *collect.Request) {
				p, err := plan.Parse(a.plan)
				if err != nil {
					t.Fatal(err)
				}
				pol, err := policy.Named("production")
				if err != nil {
					t.Fatal(err)
				}
				if p.Policy, err = pol.Ref(); err != nil {
					t.Fatal(err)
				}
				if r.Plan, err = p.Canonical(); err != nil {
					t.Fatal(err)
				}
			}),
		},
		{
			name: "simulated evidence, stripped, production verifier", stage: "verify", only: "snp.chain",
			does: "takes every word of simulation out of emulated evidence and sends it to the production verifier, whose operator even vouches for the software TPM's maker",
			also: []string{"gpu.chain", "policy.*"},
			refused: func(t *testing.T, a *attacker) error {
				v, err := simulate.New(simulate.Options{Plain: true, Fast: true})
				if err != nil {
					t.Fatal(err)
				}
				p := a.production(t)
				p.collector.SNP = snpSource(func(d [64]byte) ([]byte, []byte, error) {
					r, err := v.Chip().Report(d, simulate.SNPOptions{})
					return r, v.Chip().CertTable(), err
				})
				gpu := v.GPUs()[0]
				p.collector.GPUs = gpuFunc(func(nonce [32]byte) (evidence.GPU, error) {
					r, err := gpu.Report(nonce, simulate.GPUOptions{})
					return evidence.GPU{UUID: a.gpus[0], Report: r, Chain: gpu.ChainPEM(), DriverVersion: gpu.DriverVersion(), VBIOSVersion: gpu.VBIOSVersion()}, err
				})
				e := p.collect(t, p.request(t))
				for _, part := range [][]byte{e.SNP.Report, e.SNP.Certificates, e.GPUs[0].Report, e.GPUs[0].Chain} {
					if bytes.Contains(bytes.ToLower(part), []byte("simulat")) {
						t.Fatal("the evidence still describes itself as simulated")
					}
				}
				_, _, err = p.appraise(t, e, a.brokerID)
				return err
			},
		},
		{
			name: "flipped bit in the GPU report", does: "flips one bit of a measurement in the report that the agent collects", stage: "verify", only: "gpu.signature",
			refused: jobAttack(func(t *testing.T, a *attacker) string {
				job := a.node.granted(t, "flipped", 1)
				if _, err := emulate.Dial(a.emulator(t)).Do(t.Context(), emulate.Request{Op: emulate.OpFlip, Bit: 60 * 8}); err != nil {
					t.Fatal(err)
				}
				return job
			}),
		},
		{
			name: "swapped job file", does: "submits the approved job with one environment value changed", stage: "release", only: "grant.missing",
			refused: jobAttack(func(t *testing.T, a *attacker) string {
				a.node.granted(t, "swapped", 1)
				return a.node.jobFile(t, "swapped", func(s string) string { return strings.Replace(s, `EPOCHS: "1"`, `EPOCHS: "2"`, 1) })
			}),
		},
		{
			name: "grant of another plan", does: "asks for a key under a grant that names another plan", stage: "release", only: "grant.plan",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				k.grant = a.node.grant(t, string(plan.Sum([]byte("another plan"))), 1)
			}),
		},
		{
			name: "asset outside the grant", does: "asks for an asset that the grant does not name", stage: "release", only: "grant.asset",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				name := fmt.Sprintf("other-%d", time.Now().UnixNano())
				a.node.must(t, "assets", "create", name, "--kind", "checkpoints")
				k.asset = name
			}),
		},
		{
			name: "grant without simulation", does: "uses simulated evidence under a grant that wants real devices", stage: "release", only: "grant.simulated",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				out := a.node.must(t, "grant", "create", "--plan", string(a.digest), "--asset", "model")
				k.grant = strings.TrimSpace(out)
			}),
		},
		{
			name: "revoked grant", does: "uses a grant after its owner took it back", stage: "release", only: "grant.revoked",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				a.node.must(t, "revoke", k.grant, "--reason", "the attack table")
			}),
		},
		{
			name: "grant used twice", does: "attests again and uses a single-use grant for a second recipient key", stage: "release", only: "grant.exhausted",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				if _, err := a.release(t, k.token, k.resultID, k.grant, k.asset, k.session); err != nil {
					t.Fatalf("the first use is refused: %v", err)
				}
				second := *a
				var err error
				if second.recipient, err = keys.GenerateRecipient(); err != nil {
					t.Fatal(err)
				}
				v, token := second.attest(t)
				k.token, k.resultID = token, v.Result().ID
			}),
		},
		{
			name: "result without the session key", does: "replays another job's result, signing with a key of its own", stage: "release", only: "release.session-key",
			refused: resultAttack(func(t *testing.T, _ *attacker, k *asking) {
				mine, err := keys.GenerateSession()
				if err != nil {
					t.Fatal(err)
				}
				k.session = mine
			}),
		},
		{
			name: "expired result", does: "keeps an affirming result until after its expiry", stage: "release", only: "result.expiry",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				r := k.verified.Result()
				r.IssuedAt -= 600
				r.Expires -= 600
				var err error
				if k.token, err = a.verifierSigner(t).Sign(receipt.TypeResult, r); err != nil {
					t.Fatal(err)
				}
			}),
		},
		{
			name: "result for another audience", does: "takes a result made for one broker to another", stage: "release", only: "result.audience",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				v, token, err := a.appraise(t, a.collect(t, a.request(t)), "another.broker")
				if err != nil {
					t.Fatal(err)
				}
				k.token, k.resultID = token, v.Result().ID
			}),
		},
		{
			name: "result of another verifier", does: "signs an affirming result itself", stage: "release", only: "result.signature",
			refused: resultAttack(func(t *testing.T, a *attacker, k *asking) {
				path := filepath.Join(t.TempDir(), "key.pem")
				if err := keyfile.CreateP384(path); err != nil {
					t.Fatal(err)
				}
				key, err := keyfile.ReadP384(path)
				if err != nil {
					t.Fatal(err)
				}
				s, err := receipt.NewSigner(a.verifier.ID(), key)
				if err != nil {
					t.Fatal(err)
				}
				if k.token, err = s.Sign(receipt.TypeResult, k.verified.Result()); err != nil {
					t.Fatal(err)
				}
			}),
		},
		{
			name: "wrapped key swapped between assets", does: "hands the holder one asset's wrapped key as another's", stage: "decrypt", only: "wrap.info",
			refused: func(t *testing.T, a *attacker) error {
				v, token := a.attest(t)
				grant := a.node.grant(t, string(a.digest), 1)
				r, err := a.release(t, token, v.Result().ID, grant, "model", a.session)
				if err != nil {
					t.Fatal(err)
				}
				terms := a.leaseTerms(t, r)
				info := func(asset string) []byte {
					b, err := receipt.WrapInfo(grant, a.digest, asset, v.Result().ID, terms)
					if err != nil {
						t.Fatal(err)
					}
					return b
				}
				if _, err := a.recipient.Open(r.GetEnc(), r.GetCiphertext(), info("model"), []byte("model")); err != nil {
					t.Fatalf("as what it is, it does not open: %v", err)
				}
				if _, err := a.recipient.Open(r.GetEnc(), r.GetCiphertext(), info("data"), []byte("data")); err == nil {
					return errors.New("it opens as another asset's")
				}
				var l check.List
				l.Fail("wrap.info", "", "", "")
				return check.Refuse("decrypt", l)
			},
		},
		leaseAttack("longer lease", "has the holder take a key under a lease that outlasts the broker's", func(l *receipt.LeaseTerms) { l.Seconds = 3600 }),
		leaseAttack("leases of its own", "has the holder take a key under leases that the attacker signs", func(l *receipt.LeaseTerms) { l.Key = "an-attackers-key" }),
	}, grantAttacks()...)
}

// leaseAttack opens a released key under other terms than it was wrapped under.
func leaseAttack(name, does string, edit func(*receipt.LeaseTerms)) attack {
	return attack{name: name, does: does, stage: "decrypt", only: "wrap.info", refused: func(t *testing.T, a *attacker) error {
		v, token := a.attest(t)
		grant := a.node.grant(t, string(a.digest), 1)
		r, err := a.release(t, token, v.Result().ID, grant, "model", a.session)
		if err != nil {
			t.Fatal(err)
		}
		terms := a.leaseTerms(t, r)
		open := func() error {
			info, err := receipt.WrapInfo(grant, a.digest, "model", v.Result().ID, terms)
			if err != nil {
				t.Fatal(err)
			}
			_, err = a.recipient.Open(r.GetEnc(), r.GetCiphertext(), info, []byte("model"))
			return err
		}
		if err := open(); err != nil {
			t.Fatalf("under its own terms, it does not open: %v", err)
		}
		if edit(&terms); open() == nil {
			return errors.New("it opens")
		}
		var l check.List
		l.Fail("wrap.info", "", "", "")
		return check.Refuse("decrypt", l)
	}}
}

// leaseTerms are those that a released key was wrapped under.
func (a *attacker) leaseTerms(t *testing.T, r *brokerv1.ReleaseResponse) receipt.LeaseTerms {
	t.Helper()
	var rel receipt.Release
	if err := a.brokerKeys.Open(receipt.TypeRelease, r.GetReceipt(), &rel); err != nil {
		t.Fatal(err)
	}
	return rel.LeaseTerms()
}

// gpuFunc answers for the one GPU there is.
type gpuFunc func(nonce [32]byte) (evidence.GPU, error)

func (f gpuFunc) Collect(_ context.Context, nonce [32]byte, _ []string) ([]evidence.GPU, error) {
	g, err := f(nonce)
	return []evidence.GPU{g}, err
}

// twice answers with the same GPU two times.
type twice struct{ one gpuSource }

func (g twice) Collect(ctx context.Context, nonce [32]byte, uuids []string) ([]evidence.GPU, error) {
	got, err := g.one.Collect(ctx, nonce, uuids[:1])
	if err != nil {
		return nil, err
	}
	return append(got, got...), nil
}

func (a *attacker) emulator(t *testing.T) string {
	t.Helper()
	ep, err := stack.OpenEndpoint(a.node.dir)
	if err != nil {
		t.Fatal(err)
	}
	return ep.Emulator()
}

// oldNonce is a nonce that the verifier itself made an hour ago.
func (a *attacker) oldNonce(t *testing.T) string {
	t.Helper()
	anchors, err := simulate.LoadRoots(filepath.Join(a.node.dir, "simulation"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := keyfile.ReadSecret(filepath.Join(a.node.dir, "verifier", "nonce.key"), verifier.NonceKeySize)
	if err != nil {
		t.Fatal(err)
	}
	pol, err := policy.Named("simulation")
	if err != nil {
		t.Fatal(err)
	}
	v, err := verifier.New(verifier.Options{
		ID: a.verifier.ID(), Anchors: anchors, Policies: []policy.Policy{pol}, Signer: a.verifierSigner(t), NonceKeys: [][]byte{key},
		Clock: func() time.Time { return time.Now().Add(-time.Hour) }, Build: "test",
	})
	if err != nil {
		t.Fatal(err)
	}
	nonce, _, err := v.Challenge()
	if err != nil {
		t.Fatal(err)
	}
	return nonce
}

// TestAttacks makes every attack against the running stack and holds the table
// in docs/attacks.md against what refused it.
func TestAttacks(t *testing.T) {
	n := need(t)
	honest := n.honest(t).bundle
	a := newAttacker(t, n, honest)

	// The control: with nothing changed, the attacker's way leads to a key. What
	// the rows change is what stops them.
	v, token := a.attest(t)
	grant := n.grant(t, string(a.digest), 1)
	r, err := a.release(t, token, v.Result().ID, grant, "model", a.session)
	if err != nil {
		t.Fatalf("an unchanged request is refused, so the table proves nothing: %v", err)
	}
	info, err := receipt.WrapInfo(grant, a.digest, "model", v.Result().ID, a.leaseTerms(t, r))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.recipient.Open(r.GetEnc(), r.GetCiphertext(), info, []byte("model")); err != nil {
		t.Fatalf("an unchanged request's key does not open: %v", err)
	}

	var table strings.Builder
	table.WriteString(attacksHead)
	for _, row := range attacks() {
		ok := t.Run(row.name, func(t *testing.T) {
			err := row.refused(t, a)
			var ref *check.Refusal
			if !errors.As(err, &ref) {
				t.Fatalf("got %v, want a refusal", err)
			}
			if ref.Stage != row.stage {
				t.Errorf("refused at %s, want %s", ref.Stage, row.stage)
			}
			found := false
			for _, c := range ref.Checks {
				found = found || c.ID == row.only
				if c.ID != row.only && !row.mayFail(c.ID) {
					t.Errorf("also failed: %s", c.ID)
				}
			}
			if !found {
				t.Errorf("check %s did not fail; refused for: %v", row.only, ref)
			}
		})
		if ok {
			fmt.Fprintf(&table, "| %s | %s | %s | `%s` |\n", row.name, row.does, row.stage, row.only)
		}
	}
	for _, row := range extraRows {
		fmt.Fprintf(&table, "| %s | %s | %s | `%s` |\n", row[0], row[1], row[2], row[3])
	}
	table.WriteString(insideHead)
	for _, row := range insideRows {
		fmt.Fprintf(&table, "| %s | %s | %s |\n", row[0], row[1], row[2])
	}
	table.WriteString(protocolHead)
	for _, row := range protocolRows {
		fmt.Fprintf(&table, "| %s | %s | %s | %s |\n", row[0], row[1], row[2], row[3])
	}
	const doc = "../../docs/attacks.md"
	if *update {
		if err := os.WriteFile(doc, []byte(table.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(doc)
	if err != nil {
		t.Fatal(err)
	}
	if string(want) != table.String() && !t.Failed() {
		t.Errorf("docs/attacks.md is not what this run shows; go test ./internal/e2e -run TestAttacks -update writes it")
	}
}

const attacksHead = `# Attacks

Written by ` + "`go test ./internal/e2e -run TestAttacks -update`" + ` from attacks made against a running
stack: real containerd, runsc and TPM protocol, emulated SEV-SNP and H100. The attacker is root on
the node and has the agent's identity and the devices; it lacks an attested job. A control run with
nothing changed obtains the key, so each refusal is due to what its row changes. The check named is
one that must fail; the test lists which others may fail beside it.

| attack | what the attacker does | refused at | check |
|---|---|---|---|
`

// extraRows are attacks whose tests live in functions of their own.
var extraRows = [][4]string{
	{"old copy of the journal restored", "puts back a journal from before the job's keys were released (TestOldJournalGainsNothing)", "release", "grant.exhausted"},
	{"edited journal", "changes what the journal says of a running job while the agent is away (TestEditedJournalIsNotAdopted)", "adopt", "adopt.sandbox"},
	{"agent killed, grant revoked", "keeps the node from hearing that the owner took the grant back, while a job runs (TestAgentKilledAndRevoked)", "run", "lease-lapsed"},
	{"broker cut off", "keeps a running job's renewals from the broker (TestBrokerAwayLongerThanTheLease)", "run", "lease-lapsed"},
	{"holder paused", "stops the holder for longer than the lease and lets it go on, with a read and an open waiting (TestPausedHolder)", "run", "lease-lapsed"},
	{"operator's exec into the job", "is recorded by the trace and fails the bundle (TestOperatorExecIsSeen)", "bundle", "trace.operator"},
}

// insideHead and insideRows are what a job tries that has its keys, and what somebody
// tries who has the disk. Each names the test that tries it.
const insideHead = `
## From inside a job, and on the disk

| attack | what comes of it | tried in |
|---|---|---|
`

var insideRows = [][3]string{
	{"a job prints its weights, 814,421 bytes, to its log", "65,536 bytes get out, which is `logBytes` of its plan; the rest is cut, counted and alerted (`output-cut`)", "`TestJobPrintsItsWeights`"},
	{"the same job puts them into its metrics, 6 bytes a number", "50 numbers get out, which is `maxValues` of its plan; the rest is cut, counted and alerted (`metrics-cut`)", "`TestJobPrintsItsWeights`"},
	{"the same job puts them into its exit code", "1 bit gets out, with `exitCodes: pass-fail`", "`TestJobPrintsItsWeights`"},
	{"whoever has the disk looks for the value of a variable, while the job runs and after it", "it is in the runtime's memory alone", "`TestValuesStayWithTheJob`"},
	{"whoever has the disk looks for a secret or for weights", "they are nowhere", "`TestValuesStayWithTheJob`, `TestNoPlaintextAtRest`"},
	{"a job fills shared memory", "it gets the bytes of `resources.shm` and no more", "`TestJobSeesOnlyWhatItWasGiven`"},
}
