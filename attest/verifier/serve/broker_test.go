package serve_test

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/broker"
	brokerserve "github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier/verifiertest"
)

// keyBroker is a real broker over SQLite that trusts the fixture's verifier, with
// a grant of one asset for the machine's plan.
type keyBroker struct {
	*broker.Broker
	grant broker.Grant
}

func (f *fixture) broker(t *testing.T, e *verifiertest.Evidence) *keyBroker {
	t.Helper()
	store, err := brokerserve.OpenStore(t.Context(), filepath.Join(t.TempDir(), "broker.db"), "broker")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = store.Close() })
	signer, err := receipt.NewSigner("broker", newKey(t))
	if err != nil {
		t.Fatal(err)
	}
	kem, kdf, aead := broker.Suite()
	ownerKey, err := kem.GenerateKey()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := broker.NewLocalKeys(make([]byte, broker.KEKSize))
	if err != nil {
		t.Fatal(err)
	}
	b := &keyBroker{}
	if b.Broker, err = broker.New(broker.Config{
		ID: "broker", Signer: signer, OwnerKey: ownerKey, Keys: keys, Store: store, Verifiers: []receipt.Keys{f.keys(t)}, Simulation: true, Now: time.Now, Access: broker.Roles{},
	}); err != nil {
		t.Fatal(err)
	}
	enc, sender, err := hpke.NewSender(ownerKey.PublicKey(), kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	key := make([]byte, broker.DataKeySize)
	_, _ = rand.Read(key)
	sealed, err := sender.Seal([]byte("weights"), key)
	if err != nil {
		t.Fatal(err)
	}
	alice := broker.Actor{Role: "owner", Name: "alice"}
	if _, err := b.CreateAsset(t.Context(), alice, broker.NewAsset{Name: "weights", Kind: broker.KindWeights, Digest: plan.Sum([]byte("weights")), Enc: enc, Ciphertext: sealed}); err != nil {
		t.Fatal(err)
	}
	if b.grant, err = b.CreateGrant(t.Context(), alice, broker.NewGrant{
		Assets: []string{"weights"}, Plan: plan.Sum(e.Plan), NotAfter: time.Now().Add(time.Hour), MaxReleases: 9, AllowSimulated: true,
	}); err != nil {
		t.Fatal(err)
	}
	return b
}

// release asks for the key as the job does, and returns the checks that failed.
func (b *keyBroker) release(t *testing.T, e *verifiertest.Evidence, token, resultID string) []string {
	t.Helper()
	request, err := receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: "broker", Grant: b.grant.ID, Attempt: 1, ResultID: resultID, Asset: "weights"}.Canonical()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(request)
	signature, err := ecdsa.SignASN1(rand.Reader, e.Session, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	a, err := b.Release(t.Context(), broker.Actor{Role: "agent", Name: "node-1"}, broker.Ask{Result: token, Request: request, Signature: signature})
	var r *check.Refusal
	if !errors.As(err, &r) {
		if err != nil || a.Ciphertext == nil {
			t.Fatalf("release: %v", err)
		}
		return nil
	}
	if a.Ciphertext != nil {
		t.Error("a refusal comes with a key")
	}
	var ids []string
	for _, c := range r.Checks {
		ids = append(ids, c.ID)
	}
	return ids
}

func (f *fixture) evidence(t *testing.T, nonce string) (*verifiertest.Evidence, []byte) {
	t.Helper()
	e, err := f.machine.Attest("verifier", nonce, "job-1")
	if err != nil {
		t.Fatal(err)
	}
	b, err := e.JSON()
	if err != nil {
		t.Fatal(err)
	}
	return e, b
}

// id reads a result's id.
func (f *fixture) id(t *testing.T, typ, token string) string {
	t.Helper()
	var r receipt.Result
	if err := f.keys(t).Open(typ, token, &r); err != nil {
		t.Fatal(err)
	}
	return r.ID
}

// Evidence that is shown to both replicas gets two results. The broker releases
// a key for one of them: there exactly once is kept.
func TestReplayAtAnotherReplicaEndsAtTheBroker(t *testing.T) {
	f := newFixture(t)
	b := f.balance(t)
	e, envelope := f.evidence(t, challenge(t, b.direct[0]))
	kb := f.broker(t, e)
	first, second := appraise(t, b.direct[0], envelope), appraise(t, b.direct[1], envelope)
	if failed := kb.release(t, e, first, f.id(t, receipt.TypeResult, first)); failed != nil {
		t.Fatalf("the first result: failed %v", failed)
	}
	if failed := kb.release(t, e, second, f.id(t, receipt.TypeResult, second)); !slices.Equal(failed, []string{"release.replay"}) {
		t.Errorf("the second result: failed %v", failed)
	}
}

// A broker's key is not to be had for what Check signs.
func TestBrokerTakesNoForeignResult(t *testing.T) {
	f := newFixture(t)
	e, envelope := f.evidence(t, "chosen-by-the-attacker")
	kb := f.broker(t, e)
	r, err := f.as("relying-party").Check(t.Context(), connect.NewRequest(&verifierv1.CheckRequest{Evidence: envelope, Audience: "broker", Nonce: e.Nonce}))
	if err != nil {
		t.Fatal(err)
	}
	token := r.Msg.GetResult()
	if failed := kb.release(t, e, token, f.id(t, "evidence-check", token)); !slices.Equal(failed, []string{"result.signature"}) {
		t.Errorf("failed %v", failed)
	}
}
