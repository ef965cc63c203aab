package broker_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/translog"
)

const (
	brokerID   = "broker.test"
	verifierID = "verifier.test"
)

var (
	alice = broker.Actor{Role: "owner", Name: "alice"}
	bob   = broker.Actor{Role: "owner", Name: "bob"}
	node  = broker.Actor{Role: "agent", Name: "node-1"}
	// stranger is an agent whose job it is not.
	stranger = broker.Actor{Role: "agent", Name: "node-2"}
)

// world is a broker over SQLite with one verifier, a clock and two assets.
type world struct {
	*broker.Broker
	store      *serve.Store
	path       string
	cfg        broker.Config
	verifier   *receipt.Signer
	brokerKeys receipt.Keys
	plan       plan.Digest
	keys       map[string][]byte // data keys by asset

	mu  sync.Mutex
	now time.Time
}

func (w *world) clock() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.now
}

func (w *world) advance(d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.now = w.now.Add(d)
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newSigner(t testing.TB, issuer string) (*receipt.Signer, receipt.Keys) {
	t.Helper()
	s := must[*receipt.Signer](t)(receipt.NewSigner(issuer, must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))))
	return s, must[receipt.Keys](t)(receipt.ParseKeys(issuer, must[[]byte](t)(s.JWKS())))
}

func newWorld(t testing.TB, simulation bool) *world {
	t.Helper()
	w := &world{now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), plan: plan.Sum([]byte("plan A")), keys: map[string][]byte{}, path: filepath.Join(t.TempDir(), "broker.db")}
	w.store = must[*serve.Store](t)(serve.OpenStore(t.Context(), w.path, brokerID))
	t.Cleanup(func() { _ = w.store.Close() })
	kek := make([]byte, broker.KEKSize)
	_, _ = rand.Read(kek)
	signer, keys := newSigner(t, brokerID)
	w.brokerKeys = keys
	verifier, verifierKeys := newSigner(t, verifierID)
	w.verifier = verifier
	w.cfg = broker.Config{
		ID: brokerID, Signer: signer, OwnerKey: must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey()),
		Keys: must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek)), Store: w.store, Verifiers: []receipt.Keys{verifierKeys}, Simulation: simulation, Now: w.clock, Access: broker.Roles{},
	}
	w.Broker = must[*broker.Broker](t)(broker.New(w.cfg))
	w.asset(t, alice, "weights", broker.KindWeights)
	w.asset(t, alice, "data", broker.KindDataset)
	return w
}

// grants are all grants, as they are stored.
func (w *world) grants(t testing.TB) ([]broker.Grant, error) {
	t.Helper()
	l, _, err := w.ListGrants(t.Context(), alice, broker.Listing{})
	var out []broker.Grant
	for _, v := range l {
		out = append(out, v.Grant)
	}
	return out, err
}

// wrap seals a key for the broker as owners do.
func (w *world) wrap(t testing.TB, name string, key []byte) (enc, ct []byte) {
	t.Helper()
	_, kdf, aead := broker.Suite()
	enc, s, err := hpke.NewSender(w.cfg.OwnerKey.PublicKey(), kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	return enc, must[[]byte](t)(s.Seal([]byte(name), key))
}

func (w *world) asset(t testing.TB, owner broker.Actor, name string, kind broker.Kind) {
	t.Helper()
	n := broker.NewAsset{Name: name, Kind: kind}
	if kind != broker.KindCheckpoints {
		key := make([]byte, broker.DataKeySize)
		_, _ = rand.Read(key)
		w.keys[name] = key
		n.Digest = plan.Sum([]byte(name))
		n.Enc, n.Ciphertext = w.wrap(t, name, key)
	}
	must[broker.Asset](t)(w.CreateAsset(t.Context(), owner, n))
}

// fill logs n bundles of a job of node's.
func (w *world) fill(t testing.TB, job string, n int) {
	t.Helper()
	if err := w.store.Update(t.Context(), func(ctx context.Context, tx broker.Tx) error {
		head, err := tx.Head(ctx)
		if err != nil {
			return err
		}
		last, err := tx.JobHead(ctx, job)
		if err != nil {
			return err
		}
		for i := range n {
			d := plan.Sum(fmt.Appendf(nil, "filling %d", i))
			e, next, err := translog.Append(head, translog.Body{
				TimeMillis: 1, Kind: translog.KindBundle, Actor: node.String(), Job: job, JobSequence: last.Size + 1, JobPrev: last.Hash, Bundle: &translog.Bundle{Digest: d},
			})
			if err != nil {
				return err
			}
			if err := tx.InsertEntry(ctx, e, job, d); err != nil {
				return err
			}
			head, last = next, translog.Head{Size: last.Size + 1, Hash: e.Hash}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
}

func (w *world) grant(t testing.TB, change func(*broker.NewGrant)) broker.Grant {
	t.Helper()
	n := broker.NewGrant{Assets: []string{"weights", "data"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}
	if change != nil {
		change(&n)
	}
	return must[broker.Grant](t)(w.CreateGrant(t.Context(), alice, n))
}

// job is an attested job: its keys and its result.
type job struct {
	recipient hpke.PrivateKey
	session   *ecdsa.PrivateKey
	result    receipt.Result
	token     string
	terms     receipt.LeaseTerms
}

func newJob(t testing.TB, w *world, change func(*receipt.Result)) *job {
	t.Helper()
	j := &job{
		terms:     w.cfg.Signer.LeaseTerms(60),
		recipient: must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey()),
		session:   must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader)),
	}
	j.attest(t, w, change)
	return j
}

// attest gets the job a result under a fresh nonce.
func (j *job) attest(t testing.TB, w *world, change func(*receipt.Result)) {
	t.Helper()
	der := must[[]byte](t)(x509.MarshalPKIXPublicKey(&j.session.PublicKey))
	jwk, err := receipt.SessionJWK(der)
	if err != nil {
		t.Fatal(err)
	}
	nonce := sha256.Sum256([]byte(rand.Text()))
	j.result = receipt.Result{
		Profile: receipt.Profile, Issuer: verifierID, Audience: brokerID, ID: rand.Text(), Nonce: hex.EncodeToString(nonce[:]),
		IssuedAt: w.clock().Unix(), Expires: w.clock().Add(receipt.ResultLifetime).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: j.recipient.PublicKey().Bytes()},
		JobID:        "job-1", PlanDigest: w.plan, SandboxDigest: plan.Sum([]byte("sandbox")), EvidenceDigest: plan.Sum([]byte("evidence")),
	}
	if change != nil {
		change(&j.result)
	}
	j.token = must[string](t)(w.verifier.Sign(receipt.TypeResult, j.result))
}

func (j *job) request(g broker.Grant, asset string) receipt.ReleaseRequest {
	return receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: brokerID, Grant: g.ID, Attempt: 1, ResultID: j.result.ID, Asset: asset}
}

func sign(t testing.TB, key *ecdsa.PrivateKey, r receipt.ReleaseRequest) (request, signature []byte) {
	t.Helper()
	request = must[[]byte](t)(r.Canonical())
	sum := sha256.Sum256(request)
	return request, must[[]byte](t)(ecdsa.SignASN1(rand.Reader, key, sum[:]))
}

func (j *job) release(t testing.TB, b *broker.Broker, g broker.Grant, asset string) (broker.Answer, error) {
	t.Helper()
	req, sig := sign(t, j.session, j.request(g, asset))
	return b.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
}

// open opens an answer as the holder does.
func (j *job) open(a broker.Answer, g broker.Grant, asset string) ([]byte, error) {
	_, kdf, aead := broker.Suite()
	info, err := receipt.WrapInfo(g.ID, j.result.PlanDigest, asset, j.result.ID, j.terms)
	if err != nil {
		return nil, err
	}
	r, err := hpke.NewRecipient(a.Enc, j.recipient, kdf, aead, info)
	if err != nil {
		return nil, err
	}
	return r.Open([]byte(asset), a.Ciphertext)
}

// failed returns the ids of a refusal's failed checks, and nil for any other error.
func failed(err error) []string {
	var r *check.Refusal
	if !errors.As(err, &r) || r.Stage != "release" {
		return nil
	}
	var ids []string
	for _, c := range r.Checks {
		ids = append(ids, c.ID)
	}
	return ids
}

func wantRefused(t *testing.T, a broker.Answer, err error, ids ...string) {
	t.Helper()
	if got := failed(err); !slices.Equal(got, ids) {
		t.Errorf("failed checks %v (%v), want exactly %v", got, err, ids)
	}
	if a.Enc != nil || a.Ciphertext != nil || a.Receipt != "" {
		t.Error("a refusal came with an answer")
	}
}

// reheader gives a token another protected header, keeping body and signature.
func reheader(t *testing.T, token string, header map[string]any) (head, body, sig string) {
	t.Helper()
	parts := splitToken(token)
	h := must[[]byte](t)(json.Marshal(header))
	return base64.RawURLEncoding.EncodeToString(h), parts[1], parts[2]
}
