package attestation_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/internal/keystore/attestation"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/attested"
	"github.com/coffer-run/coffer/plugins/keystore/keystoretest"
	"github.com/coffer-run/coffer/plugins/keystore/local"
)

const (
	storeName  = "owner"
	verifierID = "verifier.test"
)

var accepted = plan.Sum([]byte("the policy that the owner named"))

// known is a lock that takes no time, over a key that everybody knows.
type known struct{}

func (known) Make() (local.Params, []byte, error) { return local.Params{}, make([]byte, 32), nil }
func (known) Open(local.Params) ([]byte, error)   { return make([]byte, 32), nil }

// lab is a store behind the gate, as a host sees it, a verifier, and a broker's prover
// to which that verifier says what change makes of an affirming result.
type lab struct {
	gate   contract.AttestedStore
	prover *attestation.Prover
	file   *local.Store
	path   string

	mu     sync.Mutex
	change func(*receipt.Result)
	asked  int
}

func signer(t *testing.T, dir string) (*receipt.Signer, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s, err := receipt.NewSigner(verifierID, key)
	if err != nil {
		t.Fatal(err)
	}
	jwks, err := s.JWKS()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "jwks-"+rand.Text()+".json")
	if err := os.WriteFile(path, jwks, 0o600); err != nil {
		t.Fatal(err)
	}
	return s, path
}

func newLab(t *testing.T) *lab {
	t.Helper()
	dir := t.TempDir()
	l := &lab{path: filepath.Join(dir, "keys.json")}
	if err := local.Create(l.path, storeName, "first", known{}); err != nil {
		t.Fatal(err)
	}
	var err error
	if l.file, err = local.Open(l.path, storeName, known{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.file.Close() })
	if err := l.file.AddKey("second"); err != nil {
		t.Fatal(err)
	}
	sign, keys := signer(t, dir)
	guarded, err := attestation.Config{Verifier: verifierID, KeysFile: keys, Policy: accepted}.Guard(l.file, storeName)
	if err != nil {
		t.Fatal(err)
	}
	l.gate = keystoretest.Served(t, guarded).(contract.AttestedStore)
	if l.prover, err = attestation.NewProver(func(_ context.Context, r attestation.Request) (string, error) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.asked++
		return sign.Sign(receipt.TypeResult, l.result(t, r))
	}, time.Now); err != nil {
		t.Fatal(err)
	}
	return l
}

func (l *lab) result(t *testing.T, r attestation.Request) receipt.Result {
	jwk, err := receipt.SessionJWK(r.SessionKey)
	if err != nil {
		t.Error(err)
	}
	now := time.Now()
	out := receipt.Result{
		Profile: receipt.Profile, Issuer: verifierID, Audience: r.Audience, ID: rand.Text(), Nonce: "nonce", IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: r.RecipientKey}, JobID: attestation.JobID, Policy: plan.Policy{Name: "machine", Digest: accepted},
		PlanDigest: plan.Sum([]byte("plan")), SandboxDigest: plan.Sum([]byte("sandbox")), EvidenceDigest: plan.Sum([]byte("evidence")),
	}
	if l.change != nil {
		l.change(&out)
	}
	return out
}

// through is the store as a broker that proves what it is uses it.
type through struct {
	contract.Store
	prover contract.Prover
}

func (s through) Unwrap(ctx context.Context, w *contract.Wrapped, associated []byte) (*contract.DataKey, error) {
	k, _, err := contract.UnwrapAs(ctx, s.Store, s.prover, storeName, w, associated)
	return k, err
}

// TestConformance is every rule of the contract, through the gate.
func TestConformance(t *testing.T) {
	l := newLab(t)
	keystoretest.Run(t, keystoretest.Fixture{
		Store: through{l.gate, l.prover}, Stride: 7,
		Again: func(*testing.T) contract.Store { return through{l.gate, l.prover} },
		Foreign: func(t *testing.T) contract.Store {
			other := newLab(t)
			return through{other.gate, other.prover}
		},
		Rotate: func(t *testing.T, id string) {
			if err := l.file.Rotate(id); err != nil {
				t.Fatal(err)
			}
		},
		Disable: func(t *testing.T, id string) {
			if err := l.file.SetDisabled(id, true); err != nil {
				t.Fatal(err)
			}
		},
	})
}

// TestRefusedResults are brokers with a result in which one thing is not as the
// key store's owner wants it.
func TestRefusedResults(t *testing.T) {
	for name, change := range map[string]func(*receipt.Result){
		"of a job":          func(r *receipt.Result) { r.JobID = "job-1" },
		"for another store": func(r *receipt.Result) { r.Audience = attestation.Audience("other") },
		"for a broker":      func(r *receipt.Result) { r.Audience = "broker" },
		"by another policy": func(r *receipt.Result) { r.Policy.Digest = plan.Sum([]byte("a laxer one")) },
		"simulated":         func(r *receipt.Result) { r.Simulated = true },
		"warning":           func(r *receipt.Result) { r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Warning} },
		"a trust vector that says no": func(r *receipt.Result) {
			r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Affirming, Vector: receipt.TrustVector{Hardware: 97}}
		},
		"no device":      func(r *receipt.Result) { r.Submods = map[string]receipt.Appraisal{} },
		"a failed check": func(r *receipt.Result) { r.Checks.Fail("snp.chain", "a", "b", "") },
		"expired": func(r *receipt.Result) {
			r.IssuedAt, r.Expires = time.Now().Add(-time.Hour).Unix(), time.Now().Add(-time.Minute).Unix()
		},
		"issued in the future": func(r *receipt.Result) {
			r.IssuedAt, r.Expires = time.Now().Add(time.Hour).Unix(), time.Now().Add(time.Hour+time.Minute).Unix()
		},
		"by another verifier":          func(r *receipt.Result) { r.Issuer = "other" },
		"a session key of another's":   func(r *receipt.Result) { r.Confirmation.JWK.Key = &newKey(t).PublicKey },
		"a recipient key that is none": func(r *receipt.Result) { r.Confirmation.Recipient = []byte("no key") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t)
			w := keystoretest.Wrap(t, l.gate, "first", keystoretest.Key(t), nil)
			l.change = change
			if k, _, err := contract.UnwrapAs(t.Context(), l.gate, l.prover, storeName, w, nil); k != nil || !errors.Is(err, contract.ErrUnattested) {
				t.Errorf("unwrapped, or failed otherwise: %v", err)
			}
		})
	}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// TestRefusedCalls are callers that hold a good result, of which everything but one
// thing about the call is right.
func TestRefusedCalls(t *testing.T) {
	l := newLab(t)
	ad := []byte("weights")
	w := keystoretest.Wrap(t, l.gate, "first", keystoretest.Key(t), ad)
	other := keystoretest.Wrap(t, l.gate, "first", keystoretest.Key(t), ad)
	challenge := func() []byte {
		c, err := l.gate.Challenge(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	proof := func(challenge []byte, over []byte) contract.Proof {
		token, signature, err := l.prover.Prove(t.Context(), storeName, over, false)
		if err != nil {
			t.Fatal(err)
		}
		return contract.Proof{Result: token, Challenge: challenge, Signature: signature}
	}
	good := func() contract.Proof {
		c := challenge()
		return proof(c, contract.Request(storeName, c, w, ad))
	}
	used := good()
	sealed, err := l.gate.UnwrapFor(t.Context(), w, ad, used)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := l.prover.Open(sealed, contract.AnswerInfo(storeName, challenge(), w, ad)); err == nil {
		t.Error("an answer to another call opens")
	}
	for name, p := range map[string]func() contract.Proof{
		"the same call again":            func() contract.Proof { return used },
		"a challenge that nobody gave":   func() contract.Proof { c := make([]byte, 32); return proof(c, contract.Request(storeName, c, w, ad)) },
		"signed for another challenge":   func() contract.Proof { return proof(challenge(), contract.Request(storeName, challenge(), w, ad)) },
		"signed for another wrapped key": func() contract.Proof { c := challenge(); return proof(c, contract.Request(storeName, c, other, ad)) },
		"signed for another asset": func() contract.Proof {
			c := challenge()
			return proof(c, contract.Request(storeName, c, w, []byte("data")))
		},
		"signed for another store":    func() contract.Proof { c := challenge(); return proof(c, contract.Request("other", c, w, ad)) },
		"signed as the answer's info": func() contract.Proof { c := challenge(); return proof(c, contract.AnswerInfo(storeName, c, w, ad)) },
		"by a key that is not the result's": func() contract.Proof {
			p := good()
			sum := sha256.Sum256(contract.Request(storeName, p.Challenge, w, ad))
			p.Signature, _ = ecdsa.SignASN1(rand.Reader, newKey(t), sum[:])
			return p
		},
		"no signature": func() contract.Proof { p := good(); p.Signature = nil; return p },
		"no result":    func() contract.Proof { p := good(); p.Result = ""; return p },
		"a result with a bit flipped": func() contract.Proof {
			p := good()
			p.Result = strings.Replace(p.Result, ".", ".e", 1)
			return p
		},
	} {
		t.Run(name, func(t *testing.T) {
			if s, err := l.gate.UnwrapFor(t.Context(), w, ad, p()); s != nil || !errors.Is(err, contract.ErrUnattested) {
				t.Errorf("unwrapped, or failed otherwise: %v", err)
			}
		})
	}
	t.Run("no proof", func(t *testing.T) {
		if k, err := l.gate.Unwrap(t.Context(), w, ad); k != nil || !errors.Is(err, contract.ErrUnattested) {
			t.Errorf("unwrapped: %v", err)
		}
	})
	t.Run("another verifier's key of the same name", func(t *testing.T) {
		sign, _ := signer(t, t.TempDir())
		forged, err := attestation.NewProver(func(_ context.Context, r attestation.Request) (string, error) {
			return sign.Sign(receipt.TypeResult, l.result(t, r))
		}, time.Now)
		if err != nil {
			t.Fatal(err)
		}
		if k, _, err := contract.UnwrapAs(t.Context(), l.gate, forged, storeName, w, ad); k != nil || !errors.Is(err, contract.ErrUnattested) {
			t.Errorf("unwrapped: %v", err)
		}
	})
}

// TestResultsAreRenewed: a result is shown again while it is young, and one that the
// store refuses is replaced at most once a second.
func TestResultsAreRenewed(t *testing.T) {
	l := newLab(t)
	now := time.Now()
	var mu sync.Mutex
	p, err := attestation.NewProver(func(context.Context, attestation.Request) (string, error) { l.asked++; return "token", nil }, func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return now
	})
	if err != nil {
		t.Fatal(err)
	}
	step := func(d time.Duration, fresh bool, want int) {
		t.Helper()
		mu.Lock()
		now = now.Add(d)
		mu.Unlock()
		if _, _, err := p.Prove(t.Context(), storeName, nil, fresh); err != nil || l.asked != want {
			t.Errorf("after %s: asked %d times, want %d: %v", d, l.asked, want, err)
		}
	}
	step(0, false, 1)
	step(receipt.ResultLifetime/2-time.Second, false, 1)
	step(0, true, 2)
	step(500*time.Millisecond, true, 2)
	step(time.Second, true, 3)
	step(receipt.ResultLifetime/2, false, 4)
	// A clock that was set back makes no old result young.
	step(-time.Hour, false, 5)
	if _, _, err := p.Prove(t.Context(), "another", nil, false); err != nil || l.asked != 6 {
		t.Errorf("another store got the same result: %v", err)
	}
}

// TestChallengesEnd is a store whose challenges get old, and one that is asked for
// many.
func TestChallengesEnd(t *testing.T) {
	l := newLab(t)
	now := time.Now()
	s, err := attested.New(l.file, storeName, func(string, time.Time) (attested.Caller, error) { return attested.Caller{}, errors.New("reached") }, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.Challenge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Minute)
	if _, err := s.UnwrapFor(t.Context(), &contract.Wrapped{}, nil, contract.Proof{Challenge: c}); err == nil || strings.Contains(err.Error(), "reached") {
		t.Errorf("an old challenge was taken: %v", err)
	}
	n := 0
	for ; n < 10_000; n++ {
		if _, err := s.Challenge(t.Context()); err != nil {
			break
		}
	}
	if n != 4096 {
		t.Errorf("%d challenges are open", n)
	}
	now = now.Add(2 * time.Minute)
	if _, err := s.Challenge(t.Context()); err != nil {
		t.Errorf("old challenges keep new ones out: %v", err)
	}
}

func TestConfigRefused(t *testing.T) {
	l := newLab(t)
	_, keys := signer(t, t.TempDir())
	for name, c := range map[string]attestation.Config{
		"nothing":     {},
		"no verifier": {KeysFile: keys, Policy: accepted},
		"no keys":     {Verifier: verifierID, Policy: accepted},
		"no policy":   {Verifier: verifierID, KeysFile: keys},
		"keys gone":   {Verifier: verifierID, KeysFile: keys + ".gone", Policy: accepted},
	} {
		if s, err := c.Guard(l.file, storeName); err == nil || s != nil {
			t.Errorf("%s: taken", name)
		}
	}
}
