package verifier_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/hpke"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/lestrrat-go/jwx/v2/jwa"
	"github.com/veraison/ear"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/attest/vtpm"
	"github.com/coffer-run/coffer/attest/vtpm/vtpmtest"
)

func TestNewRefusesWhatIsUnderSpecified(t *testing.T) {
	w := newWorld(t)
	for situation, change := range map[string]func(*verifier.Options){
		"nothing":           func(o *verifier.Options) { *o = verifier.Options{} },
		"no name":           func(o *verifier.Options) { o.ID = "" },
		"name with a space": func(o *verifier.Options) { o.ID = "a b" },
		"no anchors":        func(o *verifier.Options) { o.Anchors = anchor.Set{} },
		"no policies":       func(o *verifier.Options) { o.Policies = nil },
		"the zero policy":   func(o *verifier.Options) { o.Policies = []policy.Policy{{}} },
		"no signer":         func(o *verifier.Options) { o.Signer = nil },
		"another one's signer": func(o *verifier.Options) {
			o.Signer = newSigner(t, "other")
		},
		"no nonce key":            func(o *verifier.Options) { o.NonceKeys = nil },
		"short nonce key":         func(o *verifier.Options) { o.NonceKeys = [][]byte{o.NonceKeys[0], make([]byte, 16)} },
		"no clock":                func(o *verifier.Options) { o.Clock = nil },
		"no build":                func(o *verifier.Options) { o.Build = "" },
		"simulation under vendor": func(o *verifier.Options) { o.Anchors = anchor.Vendor() },
	} {
		o := w.options()
		change(&o)
		if v, err := verifier.New(o); err == nil || v != nil {
			t.Errorf("%s: made a verifier", situation)
		}
	}
}

func TestNonce(t *testing.T) {
	w := newWorld(t)
	n, expires, err := w.v.Challenge()
	if err != nil {
		t.Fatal(err)
	}
	if d := expires.Sub(w.now); d > verifier.NonceLifetime || d < verifier.NonceLifetime-time.Second {
		t.Errorf("expires in %s", d)
	}
	if n == w.challenge() {
		t.Error("two nonces are alike")
	}
	b, err := base64.RawURLEncoding.DecodeString(n)
	if err != nil || len(b) != 73 {
		t.Errorf("nonce of %d bytes: %v", len(b), err)
	}
}

// One nonce presented many times at once is accepted once.
func TestNonceIsUsedOnceUnderConcurrency(t *testing.T) {
	w := newWorld(t)
	b := w.attester().collect().bytes()
	var accepted atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			_, r, err := w.v.Appraise(context.Background(), b, audience)
			if err != nil {
				t.Error(err)
			}
			if len(r.AllChecks().Failed()) == 0 {
				accepted.Add(1)
			}
		})
	}
	wg.Wait()
	if accepted.Load() != 1 {
		t.Errorf("accepted %d times", accepted.Load())
	}
}

// Replicas share keys: one issues the nonce or begins the enrolment, another
// finishes. The seen-set is each replica's own; once over all of them is for
// the broker's unique index.
func TestReplicas(t *testing.T) {
	w := newWorld(t)
	other := w.verifier(nil)
	a := w.attester().collect()
	if _, r, err := other.Appraise(context.Background(), a.bytes(), audience); err != nil || len(r.AllChecks().Failed()) > 0 {
		t.Fatalf("another replica refuses: %v %v", err, r.AllChecks().Failed())
	}
	blob, enc, token, err := w.v.BeginEnrolment(w.tpm.EKChain, w.tpm.AKPublic)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := w.tpm.Activate(blob, enc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := other.FinishEnrolment(token, secret); err != nil {
		t.Error(err)
	}
}

func TestNonceKeyRotation(t *testing.T) {
	w := newWorld(t)
	old := w.nonce
	a := w.attester().collect()
	next := []byte(strings.Repeat("n", verifier.NonceKeySize))
	both := w.verifier(func(o *verifier.Options) { o.NonceKeys = [][]byte{next, old} })
	if _, r, err := both.Appraise(context.Background(), a.bytes(), audience); err != nil || len(r.AllChecks().Failed()) > 0 {
		t.Fatalf("a nonce under the old key is refused: %v %v", err, r.AllChecks().Failed())
	}
	w.v = both
	a = w.attester().collect()
	w.v = w.verifier(func(o *verifier.Options) { o.NonceKeys = [][]byte{old} })
	a.wantRefused("nonce.authentic")
}

func TestEnrolmentRefuses(t *testing.T) {
	w := newWorld(t)
	begin := func() (secret []byte, token string) {
		blob, enc, token, err := w.v.BeginEnrolment(w.tpm.EKChain, w.tpm.AKPublic)
		if err != nil {
			t.Fatal(err)
		}
		secret, err = w.tpm.Activate(blob, enc)
		if err != nil {
			t.Fatal(err)
		}
		return secret, token
	}
	for _, row := range []struct {
		situation string
		attempt   func(v *verifier.Verifier, secret []byte, token string) (string, error)
		by        string
	}{
		{"wrong secret", func(v *verifier.Verifier, secret []byte, token string) (string, error) {
			secret[0] ^= 1
			return v.FinishEnrolment(token, secret)
		}, "enrolment.secret"},
		{"no secret", func(v *verifier.Verifier, _ []byte, token string) (string, error) {
			return v.FinishEnrolment(token, nil)
		}, "enrolment.secret"},
		{"secret of another enrolment", func(v *verifier.Verifier, secret []byte, _ string) (string, error) {
			_, other := begin()
			return v.FinishEnrolment(other, secret)
		}, "enrolment.secret"},
		{"changed enrolment", func(v *verifier.Verifier, secret []byte, token string) (string, error) {
			b := []byte(token)
			b[20] ^= 1
			return v.FinishEnrolment(string(b), secret)
		}, "enrolment.token"},
		{"no enrolment", func(v *verifier.Verifier, secret []byte, _ string) (string, error) {
			return v.FinishEnrolment("", secret)
		}, "enrolment.token"},
		{"enrolment of unreasonable size", func(v *verifier.Verifier, secret []byte, _ string) (string, error) {
			return v.FinishEnrolment(strings.Repeat("A", 8<<10), secret)
		}, "enrolment.token"},
		{"nonce in the place of an enrolment", func(v *verifier.Verifier, secret []byte, _ string) (string, error) {
			return v.FinishEnrolment(w.challenge(), secret)
		}, "enrolment.token"},
		{"enrolment of another verifier under the same key", func(_ *verifier.Verifier, secret []byte, token string) (string, error) {
			return w.verifier(func(o *verifier.Options) { o.ID = "other"; o.Signer = newSigner(t, "other") }).FinishEnrolment(token, secret)
		}, "enrolment.token"},
		{"expired enrolment", func(_ *verifier.Verifier, secret []byte, token string) (string, error) {
			return w.verifier(func(o *verifier.Options) {
				o.Clock = func() time.Time { return w.now.Add(verifier.EnrolmentLifetime) }
			}).FinishEnrolment(token, secret)
		}, "enrolment.fresh"},
	} {
		t.Run(row.situation, func(t *testing.T) {
			secret, token := begin()
			got, err := row.attempt(w.v, secret, token)
			var r *check.Refusal
			if !errors.As(err, &r) || got != "" {
				t.Fatalf("got %q, %v", got, err)
			}
			if r.Checks[0].ID != row.by {
				t.Errorf("refused by %s, want %s", r.Checks[0].ID, row.by)
			}
		})
	}
	t.Run("credential is limited", func(t *testing.T) {
		keys, err := receipt.ParseKeys(verifierID, w.v.JWKS())
		if err != nil {
			t.Fatal(err)
		}
		c, err := vtpm.OpenCredential(keys, w.akCred, w.now)
		if err != nil || c.Class != string(anchor.Software) || !c.Simulated || c.Issuer != verifierID {
			t.Fatalf("%+v, %v", c, err)
		}
		if _, err := vtpm.OpenCredential(keys, w.akCred, w.now.Add(vtpm.CredentialLifetime)); err == nil {
			t.Error("a credential outlives a day")
		}
	})
	t.Run("unknown maker", func(t *testing.T) {
		tpm, err := vtpmtest.New(w.now)
		if err != nil {
			t.Fatal(err)
		}
		var r *check.Refusal
		if _, _, _, err := w.v.BeginEnrolment(tpm.EKChain, tpm.AKPublic); !errors.As(err, &r) || r.Checks[0].ID != "ek.chain" {
			t.Errorf("got %v", err)
		}
	})
}

// The result parses as an EAR by the field's own library, accepted or refused.
func TestResultIsAnEAR(t *testing.T) {
	w := newWorld(t)
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(w.v.JWKS(), &set); err != nil {
		t.Fatal(err)
	}
	key := set.Keys[0].Key.(*ecdsa.PublicKey)
	nothing := w.attester()
	nothing.noTPM, nothing.noSNP, nothing.gpus = true, true, nil
	debug := w.attester()
	debug.snpOpts.Debug = true
	for _, row := range []struct {
		situation string
		a         *attester
		status    map[string]ear.TrustTier
	}{
		{"accepted", w.attester(), map[string]ear.TrustTier{"cpu0": ear.TrustTierAffirming, "tpm0": ear.TrustTierAffirming, "gpu0": ear.TrustTierAffirming}},
		{"refused", debug, map[string]ear.TrustTier{"cpu0": ear.TrustTierContraindicated, "tpm0": ear.TrustTierAffirming, "gpu0": ear.TrustTierAffirming}},
		{"nothing there", nothing, map[string]ear.TrustTier{"cpu0": ear.TrustTierContraindicated}},
	} {
		t.Run(row.situation, func(t *testing.T) {
			token, _ := row.a.collect().appraise()
			var got ear.AttestationResult
			if err := got.Verify([]byte(token), jwa.ES384, key); err != nil {
				t.Fatal(err)
			}
			if len(got.Submods) != len(row.status) {
				t.Errorf("%d submodules, want %d", len(got.Submods), len(row.status))
			}
			for n, want := range row.status {
				if s := got.Submods[n]; s == nil || s.Status == nil || *s.Status != want {
					t.Errorf("%s: %+v, want %v", n, s, want)
					continue
				}
				// The library lowers a status that its vector does not bear out.
				before := *got.Submods[n].Status
				got.Submods[n].UpdateStatusFromTrustVector()
				if *got.Submods[n].Status != before {
					t.Errorf("%s: status %v is higher than its vector allows: %+v", n, before, got.Submods[n].TrustVector)
				}
			}
		})
	}
}

func TestForeignTextIsBoundedAndPrintable(t *testing.T) {
	w := newWorld(t)
	a := w.attester()
	a.e.Sandbox = w.sandbox(func(s *plan.Sandbox) { s.Image = strings.Repeat("x\x1b[2J", 20000) })
	a.collect()
	a.e.GPUs[0].DriverVersion = strings.Repeat("\u202e", 30000)
	token, r := a.appraise()
	if len(token) > 64<<10 {
		t.Errorf("result of %d bytes", len(token))
	}
	for _, c := range r.AllChecks() {
		for _, s := range []string{c.Expected, c.Found, c.Hint} {
			if len(s) > 500 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r > '~' }) {
				t.Errorf("%s: text of %d bytes: %.80q", c.ID, len(s), s)
			}
		}
	}
}

func TestCancelledAppraisalLeavesTheNonce(t *testing.T) {
	w := newWorld(t)
	a := w.attester().collect()
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := w.v.Appraise(ctx, a.bytes(), audience); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v", err)
	}
	if _, r := a.appraise(); len(r.AllChecks().Failed()) > 0 {
		t.Errorf("refused: %v", r.AllChecks().Failed())
	}
}

// The verifier here has vendors' anchors: whatever the fuzzer finds, it cannot
// be accepted. Device formats have fuzz targets of their own.
func FuzzAppraise(f *testing.F) {
	w := &world{t: f, now: time.Now(), anchors: anchor.Vendor(), nonce: make([]byte, verifier.NonceKeySize), signer: newSigner(f, verifierID)}
	var err error
	if w.policy, err = policy.Named("production"); err != nil {
		f.Fatal(err)
	}
	w.v = w.verifier(nil)
	if w.tpm, err = vtpmtest.New(w.now); err != nil {
		f.Fatal(err)
	}
	rk, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		f.Fatal(err)
	}
	a := &attester{world: w, noSNP: true, e: evidence.Envelope{
		Version: evidence.Version, VerifierID: verifierID, Nonce: w.challenge(), JobID: "job-1", Plan: w.plan(nil), Sandbox: w.sandbox(nil),
		RecipientKey: rk.PublicKey().Bytes(), SessionKey: sessionKey(f), Failures: []evidence.Failure{{Source: "gpu", Message: "lost"}},
	}}
	a.collect()
	a.e.SNP = &evidence.SNP{Report: make([]byte, 1184)}
	a.e.GPUs = []evidence.GPU{{UUID: "GPU-0", Report: make([]byte, 600), Chain: []byte("-----BEGIN CERTIFICATE-----")}}
	f.Add(a.bytes())
	f.Fuzz(func(t *testing.T, b []byte) {
		token, r, err := w.v.Appraise(context.Background(), b, audience)
		if err != nil {
			if token != "" {
				t.Fatal("an error with a result")
			}
			return
		}
		if len(r.AllChecks().Failed()) == 0 {
			t.Fatal("accepted")
		}
	})
}

func BenchmarkAppraise(b *testing.B) {
	w := newWorld(b)
	a := w.attester()
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		a.e.Nonce = w.challenge()
		e := a.collect().bytes()
		b.StartTimer()
		if _, r, err := w.v.Appraise(context.Background(), e, audience); err != nil || len(r.AllChecks().Failed()) > 0 {
			b.Fatal(err, r.AllChecks().Failed())
		}
	}
}
