package bench

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
)

// signature is a signature that one may verify over and over, or make.
type signature struct {
	key *ecdsa.PrivateKey
	sum []byte
	sig []byte
}

func newSignature(t *testing.T, c elliptic.Curve, h crypto.Hash) signature {
	t.Helper()
	k := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(c, rand.Reader))
	sum := make([]byte, h.Size())
	return signature{k, sum, must[[]byte](t)(ecdsa.SignASN1(rand.Reader, k, sum))}
}

func (s signature) verify(t *testing.T) {
	if !ecdsa.VerifyASN1(&s.key.PublicKey, s.sum, s.sig) {
		t.Fatal("floor does not verify")
	}
}

func (s signature) make(t *testing.T) {
	if _, err := ecdsa.SignASN1(rand.Reader, s.key, s.sum); err != nil {
		t.Fatal(err)
	}
}

// batch is how many operations make one timing.
const batch = 32

// appraisal measures the verifier on a job's whole evidence: SEV-SNP report,
// TPM quote, one H100's report.
func appraisal(t *testing.T) []row {
	oneCore(t)
	dir := filepath.Join(t.TempDir(), "simulation")
	if err := simulate.Mint(dir, simulate.Options{}); err != nil {
		t.Fatal(err)
	}
	chip, gpus, err := simulate.LoadDevices(dir)
	if err != nil {
		t.Fatal(err)
	}
	warm := must[anchor.Set](t)(simulate.LoadRoots(dir))
	lab := must[*bundletest.Lab](t)(bundletest.On(chip, gpus, warm, time.Now()))
	pol := must[policy.Policy](t)(policy.Named("simulation"))
	var evidence [][]byte
	for range batch {
		evidence = append(evidence, must[*bundletest.Job](t)(lab.Job(bundletest.Options{})).Parts[bundle.Evidence])
	}
	// A verifier accepts a nonce once, so every timing has a new one with the
	// lab's nonce key; what is remembered of chains lies in the anchors.
	appraise := func(roots func() anchor.Set) func() time.Duration {
		return func() time.Duration {
			var took time.Duration
			for _, e := range evidence {
				v := must[*verifier.Verifier](t)(verifier.New(verifier.Options{
					ID: bundletest.VerifierID, Anchors: roots(), Policies: []policy.Policy{pol}, Signer: lab.Verifier,
					NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: func() time.Time { return lab.Now }, Build: "bench",
				}))
				began := time.Now()
				_, r, err := v.Appraise(t.Context(), e, bundletest.BrokerID)
				took += time.Since(began)
				if err != nil || len(r.AllChecks().Failed()) > 0 {
					t.Fatal(err, r.AllChecks().Failed())
				}
			}
			return took / batch
		}
	}
	p384, p256 := newSignature(t, elliptic.P384(), crypto.SHA384), newSignature(t, elliptic.P256(), crypto.SHA256)
	// SEV-SNP report, GPU report and the verifier's own credential of the TPM's
	// attestation key are P-384, the quote is P-256.
	verify := func() time.Duration {
		return timed(batch, func() {
			for range 3 {
				p384.verify(t)
			}
			p256.verify(t)
		})
	}
	sign := func() time.Duration { return timed(batch, func() { p384.make(t) }) }
	warmly := appraise(func() anchor.Set { return warm })
	m, ratio := rounds(t, 20, func(s sample) float64 { return float64(s[0]) / float64(s[1]) }, warmly, verify, sign)
	both := float64(m[0]) / float64(m[1]+m[2])

	var before, after runtime.MemStats
	v := must[*verifier.Verifier](t)(verifier.New(verifier.Options{
		ID: bundletest.VerifierID, Anchors: warm, Policies: []policy.Policy{pol}, Signer: lab.Verifier,
		NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: func() time.Time { return lab.Now }, Build: "bench",
	}))
	runtime.ReadMemStats(&before)
	for _, e := range evidence {
		if _, _, err := v.Appraise(t.Context(), e, bundletest.BrokerID); err != nil {
			t.Fatal(err)
		}
	}
	runtime.ReadMemStats(&after)
	memory := float64(after.TotalAlloc-before.TotalAlloc) / batch / (1 << 20)

	cold, _ := rounds(t, 3, func(sample) float64 { return 0 }, appraise(func() anchor.Set { return must[anchor.Set](t)(simulate.LoadRoots(dir)) }))
	return []row{
		atMost("appraisal of SNP + TPM + one H100, known chains / signatures verified", ratio, "x", 1.4),
		info("  the same / signatures verified, and the one made on the result", both, "x"),
		info("  appraisal, known chains", micros(m[0]), "us"),
		info("  its floor: 3 P-384 and 1 P-256 verified", micros(m[1]), "us"),
		info("  appraisal, chains never seen / the same floor", float64(cold[0])/float64(m[1]), "x"),
		atMost("memory allocated by one appraisal", memory, "MiB", 1),
	}
}

// attested is one job that may ask for a key.
type attested struct {
	token              string
	request, signature []byte
	recipient          []byte
}

// release measures the broker over SQLite on a disk.
func release(t *testing.T) []row {
	oneCore(t)
	dir := t.TempDir()
	store := must[*serve.Store](t)(serve.OpenStore(t.Context(), filepath.Join(dir, "broker.db"), bundletest.BrokerID))
	t.Cleanup(func() { store.Close() })
	key := func() *ecdsa.PrivateKey {
		return must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	}
	theVerifier := must[*receipt.Signer](t)(receipt.NewSigner(bundletest.VerifierID, key()))
	trusted := must[receipt.Keys](t)(receipt.ParseKeys(bundletest.VerifierID, must[[]byte](t)(theVerifier.JWKS())))
	owner := must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey())
	kek := make([]byte, broker.KEKSize)
	b := must[*broker.Broker](t)(broker.New(broker.Config{
		ID: bundletest.BrokerID, Signer: must[*receipt.Signer](t)(receipt.NewSigner(bundletest.BrokerID, key())), OwnerKey: owner,
		Keys: must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek)), Store: store, Verifiers: []receipt.Keys{trusted}, Now: time.Now,
	}))
	_, kdf, aead := broker.Suite()
	enc, s, err := hpke.NewSender(owner.PublicKey(), kdf, aead, []byte(receipt.OwnerWrapInfo))
	if err != nil {
		t.Fatal(err)
	}
	alice, node := broker.Actor{Role: "owner", Name: "alice"}, broker.Actor{Role: "agent", Name: "node-1"}
	must[broker.Asset](t)(b.CreateAsset(t.Context(), alice, broker.NewAsset{
		Name: "weights", Kind: broker.KindWeights, Digest: plan.Sum([]byte("weights")), Enc: enc, Ciphertext: must[[]byte](t)(s.Seal([]byte("weights"), make([]byte, broker.DataKeySize))),
	}))
	of := plan.Sum([]byte("plan"))

	const n, perRound = 21, 64
	var jobs []attested
	for len(jobs) < n*perRound {
		g := must[broker.Grant](t)(b.CreateGrant(t.Context(), alice, broker.NewGrant{Assets: []string{"weights"}, Plan: of, NotAfter: time.Now().Add(time.Hour), MaxReleases: perRound}))
		for range perRound {
			jobs = append(jobs, attest(t, theVerifier, of, g.ID))
		}
	}
	next := 0
	releases := func() time.Duration {
		return timed(perRound, func() {
			j := jobs[next]
			next++
			if _, err := b.Release(t.Context(), node, j.token, j.request, j.signature); err != nil {
				t.Fatal(err)
			}
		})
	}
	p384, p256 := newSignature(t, elliptic.P384(), crypto.SHA384), newSignature(t, elliptic.P256(), crypto.SHA256)
	floor := func() time.Duration {
		return timed(perRound, func() {
			p384.verify(t)
			p256.verify(t)
			recipient := must[hpke.PublicKey](t)(hpke.MLKEM768X25519().NewPublicKey(jobs[0].recipient))
			_, s, err := hpke.NewSender(recipient, kdf, aead, []byte("info"))
			if err != nil {
				t.Fatal(err)
			}
			must[[]byte](t)(s.Seal(nil, make([]byte, broker.DataKeySize)))
		})
	}
	sign := func() time.Duration { return timed(perRound, func() { p384.make(t) }) }
	f := must[*os.File](t)(os.Create(filepath.Join(dir, "fsync")))
	t.Cleanup(func() { f.Close() })
	fsync := func() time.Duration {
		return timed(perRound, func() {
			if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
				t.Fatal(err)
			}
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		})
	}
	m, ratio := rounds(t, n-1, func(s sample) float64 { return float64(s[0]) / float64(s[1]) }, releases, floor, sign, fsync)
	return []row{
		atMost("release with durable commit, one core / 2 signatures verified and HPKE seal", ratio, "x", 1.5),
		info("  the same / that, the receipt's signature and one fsync", float64(m[0])/float64(m[1]+m[2]+m[3]), "x"),
		info("  release", micros(m[0]), "us"),
		info("  its floor: P-384 and P-256 verified, HPKE ML-KEM-768+X25519 seal", micros(m[1]), "us"),
		info("  the receipt's P-384 signature", micros(m[2]), "us"),
		info("  write and fsync of 4 KiB on this disk", micros(m[3]), "us"),
		atLeast("releases on one core", float64(time.Second)/float64(m[0]), "1/s", 300),
	}
}

func attest(t *testing.T, v *receipt.Signer, of plan.Digest, grant string) attested {
	t.Helper()
	recipient := must[hpke.PrivateKey](t)(hpke.MLKEM768X25519().GenerateKey())
	session := must[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	jwk, err := receipt.SessionJWK(must[[]byte](t)(x509.MarshalPKIXPublicKey(&session.PublicKey)))
	if err != nil {
		t.Fatal(err)
	}
	nonce := sha256.Sum256([]byte(rand.Text()))
	now := time.Now()
	r := receipt.Result{
		Profile: receipt.Profile, Issuer: bundletest.VerifierID, Audience: bundletest.BrokerID, ID: rand.Text(), Nonce: hex.EncodeToString(nonce[:]),
		IssuedAt: now.Unix(), Expires: now.Add(receipt.ResultLifetime).Unix(),
		Submods:      map[string]receipt.Appraisal{"cpu0": {Status: receipt.Affirming}},
		Confirmation: receipt.Confirmation{JWK: jwk, Recipient: recipient.PublicKey().Bytes()},
		JobID:        "job-" + rand.Text(), PlanDigest: of, SandboxDigest: plan.Sum([]byte("sandbox")), EvidenceDigest: plan.Sum([]byte("evidence")),
	}
	a := attested{token: must[string](t)(v.Sign(receipt.TypeResult, r)), recipient: r.Confirmation.Recipient}
	a.request = must[[]byte](t)(receipt.ReleaseRequest{Version: receipt.RequestVersion, Broker: bundletest.BrokerID, Grant: grant, Attempt: 1, ResultID: r.ID, Asset: "weights"}.Canonical())
	sum := sha256.Sum256(a.request)
	a.signature = must[[]byte](t)(ecdsa.SignASN1(rand.Reader, session, sum[:]))
	return a
}
