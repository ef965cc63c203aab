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
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/binding"
	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/broker/serve"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/bundle/bundletest"
	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/simulate"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/internal/verifierd"
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

// spent is the processor time of a piece of work, and of the signatures and seals
// that it must do.
type spent struct{ work, floor time.Duration }

// challengeToKey measures what verifier and broker do between a challenge and the key
// for it: to appraise, and to release.
func challengeToKey(t *testing.T) []row {
	appraising, a := appraisal(t)
	releasing, r := release(t)
	return append(append(appraising, releasing...),
		atMost("challenge to key: appraisal and release / the signatures and seals they must do, processor time", float64(a.work+r.work)/float64(a.floor+r.floor), "x", 1.5))
}

// appraisal measures the verifier on a job's whole evidence: SEV-SNP report,
// TPM quote, one H100's report.
func appraisal(t *testing.T) ([]row, spent) {
	oneCore(t)
	// As the daemon runs.
	was := debug.SetGCPercent(verifierd.GCPercent)
	defer debug.SetGCPercent(was)
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
	// The lab's TPM is enrolled anew for every job, as a node's is when it boots.
	// What a node collects for its later jobs has the credential of the first.
	var collected, later [][]byte
	for range batch + 1 {
		collected = append(collected, must[*bundletest.Job](t)(lab.Job(bundletest.Options{})).Parts[bundle.Evidence])
	}
	first := must[*evidence.Envelope](t)(evidence.Parse(collected[0]))
	for _, b := range collected {
		e := must[*evidence.Envelope](t)(evidence.Parse(b))
		e.TPM.AKCredential = first.TPM.AKCredential
		later = append(later, must[[]byte](t)(json.Marshal(e)))
	}
	newVerifier := func(roots anchor.Set) *verifier.Verifier {
		return must[*verifier.Verifier](t)(verifier.New(verifier.Options{
			ID: bundletest.VerifierID, Anchors: roots, Policies: []policy.Policy{pol}, Signer: lab.Verifier,
			NonceKeys: [][]byte{make([]byte, verifier.NonceKeySize)}, Clock: func() time.Time { return lab.Now }, Build: "bench",
		}))
	}
	appraise := func(v *verifier.Verifier, e []byte) {
		_, r, err := v.Appraise(t.Context(), e, bundletest.BrokerID)
		if err != nil || len(r.AllChecks().Failed()) > 0 {
			t.Fatal(err, r.AllChecks().Failed())
		}
	}
	// A verifier accepts a nonce once, so every timing has a new one with the
	// lab's nonce key; what is remembered of chains lies in the anchors, and what of
	// a node in the verifier. Making it compiles the policy, whose garbage is not the
	// appraisal's.
	warmly := func(now clock, jobs [][]byte) func() time.Duration {
		return func() time.Duration {
			v := newVerifier(warm)
			appraise(v, jobs[0])
			runtime.GC()
			began := now()
			for _, e := range jobs[1:] {
				appraise(v, e)
			}
			return (now() - began) / batch
		}
	}
	// Each verifier here is new: nothing is remembered but what lies in the anchors.
	firstly := func(now clock, roots func() anchor.Set) func() time.Duration {
		return func() time.Duration {
			var vs []*verifier.Verifier
			for range 4 {
				vs = append(vs, newVerifier(roots()))
			}
			runtime.GC()
			began := now()
			for i, v := range vs {
				appraise(v, collected[i])
			}
			return (now() - began) / time.Duration(len(vs))
		}
	}
	p384, p256 := newSignature(t, elliptic.P384(), crypto.SHA384), newSignature(t, elliptic.P256(), crypto.SHA256)
	// SEV-SNP report, GPU report and the verifier's own credential of the TPM's
	// attestation key are P-384, the quote is P-256.
	verify := func(now clock, large int) func() time.Duration {
		return func() time.Duration {
			return timedBy(now, batch, func() {
				for range large {
					p384.verify(t)
				}
				p256.verify(t)
			})
		}
	}
	sign := func(now clock) func() time.Duration {
		return func() time.Duration { return timedBy(now, batch, func() { p384.make(t) }) }
	}
	ofVerified := func(s sample) float64 { return float64(s[0]) / float64(s[1]) }
	m, ratio := rounds(t, 20, ofVerified, warmly(wall, collected), verify(wall, 3), sign(wall))
	c, busy := rounds(t, 20, ofVerified, warmly(processor, collected), verify(processor, 3), sign(processor))
	k, known := rounds(t, 20, ofVerified, warmly(processor, later), verify(processor, 2), sign(processor))

	var before, after runtime.MemStats
	v := newVerifier(warm)
	runtime.ReadMemStats(&before)
	for _, e := range collected {
		appraise(v, e)
	}
	runtime.ReadMemStats(&after)
	memory := float64(after.TotalAlloc-before.TotalAlloc) / float64(len(collected)) / (1 << 20)

	unseen, unseenRatio := rounds(t, 10, ofVerified, firstly(processor, func() anchor.Set { return warm }), verify(processor, 3))
	cold, coldRatio := rounds(t, 5, ofVerified, firstly(wall, func() anchor.Set { return must[anchor.Set](t)(simulate.LoadRoots(dir)) }), verify(wall, 3))
	return append([]row{
		atMost("appraisal of SNP + TPM + one H100, known chains / signatures verified", ratio, "x", 1.4),
		info("  the same / signatures verified, and the one made on the result", float64(m[0])/float64(m[1]+m[2]), "x"),
		info("  the same by processor time / signatures verified", busy, "x"),
		info("  the same by processor time / verified, and the one made", float64(c[0])/float64(c[1]+c[2]), "x"),
		info("  appraisal, known chains", micros(m[0]), "us"),
		info("  its floor: 3 P-384 and 1 P-256 verified", micros(m[1]), "us"),
		info("  the result's P-384 signature", micros(m[2]), "us"),
		info("  a later job of the node, its credential known too, processor time / 2 P-384 and 1 P-256 verified", known, "x"),
		info("  the same / verified, and the one made", float64(k[0])/float64(k[1]+k[2]), "x"),
		info("  a later job of the node, processor time", micros(k[0]), "us"),
		info("  its floor: 2 P-384 and 1 P-256 verified", micros(k[1]), "us"),
		info("  the first of a machine in a state that the policy has not seen, processor time / 3 P-384 and 1 P-256 verified", unseenRatio, "x"),
		info("  the first of such a machine, processor time", micros(unseen[0]), "us"),
		info("  appraisal, chains never seen / 3 P-384 and 1 P-256 verified", coldRatio, "x"),
		info("  appraisal, chains never seen", micros(cold[0]), "us"),
		atMost("memory allocated by one appraisal", memory, "MiB", 1),
	}, severalGPUs(t)...), spent{c[0], c[1] + c[2]}
}

// severalGPUs measures how the appraisal of eight GPUs, of evidence with nothing
// else, uses the cores. oneCore holds when it is called.
func severalGPUs(t *testing.T) []row {
	vendor := must[*simulate.Vendor](t)(simulate.New(simulate.Options{GPUs: 8, Fast: true}))
	e := &evidence.Envelope{
		Version: evidence.Version, VerifierID: "verifier", Nonce: "a nonce of more than 16 bytes", JobID: "job-1", Plan: []byte("plan"), Sandbox: []byte("sandbox"),
		RecipientKey: []byte("recipient"), SessionKey: []byte("session"), TPM: &evidence.TPM{AKPublic: []byte("key")},
	}
	nonce := must[binding.Bound](t)(e.Challenge().Bind()).GPUNonce()
	for _, g := range vendor.GPUs() {
		e.GPUs = append(e.GPUs, evidence.GPU{
			UUID: g.UUID(), Report: must[[]byte](t)(g.Report(nonce, simulate.GPUOptions{})), Chain: g.ChainPEM(), DriverVersion: g.DriverVersion(), VBIOSVersion: g.VBIOSVersion(),
		})
	}
	s := must[*composite.Statement](t)(composite.Open(e))
	appraise := func() {
		for _, g := range s.Appraise(t.Context(), composite.Trust{Anchors: vendor.Anchors()}, time.Now()).GPUs {
			if !g.Genuine() {
				t.Fatal(g.Checks.Failed())
			}
		}
	}
	on := func(cores int) func() time.Duration {
		return func() time.Duration {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
			return timed(8, appraise)
		}
	}
	cores := runtime.NumCPU()
	m, ratio := rounds(t, 10, func(s sample) float64 { return float64(s[0]) / float64(s[1]) }, on(1), on(cores))
	return []row{
		atLeast(fmt.Sprintf("eight GPUs on one core / on %d cores", cores), ratio, "x", 0.8*float64(cores)),
		info("  eight GPUs on one core", micros(m[0]), "us"),
	}
}

// attested is one job that may ask for a key.
type attested struct {
	token              string
	request, signature []byte
	recipient          []byte
}

// release measures the broker over SQLite on a disk.
func release(t *testing.T) ([]row, spent) {
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
	config := broker.Config{
		ID: bundletest.BrokerID, Signer: must[*receipt.Signer](t)(receipt.NewSigner(bundletest.BrokerID, key())), OwnerKey: owner,
		Keys: must[*broker.LocalKeys](t)(broker.NewLocalKeys(kek)), Store: store, Verifiers: []receipt.Keys{trusted}, Now: time.Now, Access: broker.Roles{},
	}
	b := must[*broker.Broker](t)(broker.New(config))
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

	const n, perRound, loaded = 21, 64, 768
	var jobs []attested
	for len(jobs) < n*perRound+2*loaded {
		g := must[broker.Grant](t)(b.CreateGrant(t.Context(), alice, broker.NewGrant{Assets: []string{"weights"}, Plan: of, NotAfter: time.Now().Add(time.Hour), MaxReleases: perRound}))
		for range perRound {
			jobs = append(jobs, attest(t, theVerifier, of, g.ID))
		}
	}
	var next atomic.Int64
	one := func() {
		j := jobs[next.Add(1)-1]
		if _, err := b.Release(t.Context(), node, broker.Ask{Result: j.token, Request: j.request, Signature: j.signature}); err != nil {
			t.Error(err)
		}
	}
	p384, p256 := newSignature(t, elliptic.P384(), crypto.SHA384), newSignature(t, elliptic.P256(), crypto.SHA256)
	floor := func() {
		p384.verify(t)
		p256.verify(t)
		recipient := must[hpke.PublicKey](t)(hpke.MLKEM768X25519().NewPublicKey(jobs[0].recipient))
		_, s, err := hpke.NewSender(recipient, kdf, aead, []byte("info"))
		if err != nil {
			t.Fatal(err)
		}
		must[[]byte](t)(s.Seal(nil, make([]byte, broker.DataKeySize)))
		p384.make(t)
	}
	f := must[*os.File](t)(os.Create(filepath.Join(dir, "fsync")))
	t.Cleanup(func() { f.Close() })
	fsync := func() {
		if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
	}
	// In turn, one by one: what a release leaves of the caches, its floor gets too.
	var parts [2]time.Duration
	each := func() time.Duration {
		var took time.Duration
		parts = [2]time.Duration{}
		for range perRound {
			before := processor()
			took += timed(1, one)
			between := processor()
			floor()
			parts[0], parts[1] = parts[0]+between-before, parts[1]+processor()-between
		}
		return took / perRound
	}
	part := func(i int) func() time.Duration { return func() time.Duration { return parts[i] / perRound } }
	m, ratio := rounds(t, n-1, func(s sample) float64 { return float64(s[1]) / float64(s[2]) }, each, part(0), part(1), func() time.Duration { return timed(perRound, fsync) })
	rows := []row{
		// Its goal is that of appraisal and release together.
		info("release with durable commit, one core / the signatures and seals it must do, processor time", ratio, "x"),
		info("  release, processor time", micros(m[1]), "us"),
		info("  its floor: P-384 and P-256 verified, one P-384 made, HPKE ML-KEM-768+X25519 seal", micros(m[2]), "us"),
		info("  release, by the clock", micros(m[0]), "us"),
		info("  write and fsync of 4 KiB on this disk", micros(m[3]), "us"),
	}
	for _, cores := range []int{1, 2} {
		runtime.GOMAXPROCS(cores) // which a broker looks at when it is made
		b = must[*broker.Broker](t)(broker.New(config))
		rows = append(rows, underLoad(t, loaded, cores, one, m[2])...)
	}
	return rows, spent{m[1], m[2]}
}

// underLoad has clients ask at once, each for the next release as soon as it has
// one. floor is the processor time that each must take.
func underLoad(t *testing.T, n, cores int, one func(), floor time.Duration) []row {
	t.Helper()
	const clients = 16
	took := make([][]time.Duration, clients)
	var wg sync.WaitGroup
	spent, began := processor(), wall()
	for i := range clients {
		wg.Go(func() {
			for range n / clients {
				took[i] = append(took[i], timed(1, one))
			}
		})
	}
	wg.Wait()
	spent, began = processor()-spent, wall()-began
	all := slices.Sorted(slices.Values(slices.Concat(took...)))
	name := fmt.Sprintf("durable releases, GOMAXPROCS %d, %d clients at once", cores, clients)
	return []row{
		atLeast(name, float64(n)/began.Seconds(), "1/s", 300),
		info("  processor time of one / its floor", float64(spent)/float64(n)/float64(floor), "x"),
		info("  median wait", micros(middle(all)), "us"),
		info("  p99", micros(all[len(all)*99/100]), "us"),
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
