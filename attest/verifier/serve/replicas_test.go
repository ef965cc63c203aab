package serve_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/tls"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/coffer-run/coffer/attest/anchor"
	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
)

// balanced are two replicas behind a load balancer that takes turns, TLS on both
// sides of it, and a client of each of the three.
type balanced struct {
	replicas [2]*verifier.Verifier
	direct   [2]verifierv1connect.VerifierServiceClient
	both     verifierv1connect.VerifierServiceClient
	served   [2]atomic.Int64
}

func (f *fixture) balance(t *testing.T) *balanced {
	t.Helper()
	b := &balanced{}
	var to [2]*httputil.ReverseProxy
	for i := range to {
		b.replicas[i] = f.replica(t)
		h := f.handler(t, b.replicas[i])
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b.served[i].Add(1)
			h.ServeHTTP(w, r)
		}))
		s.EnableHTTP2 = true
		s.StartTLS()
		t.Cleanup(s.Close)
		at, err := url.Parse(s.URL)
		if err != nil {
			t.Fatal(err)
		}
		to[i] = &httputil.ReverseProxy{Transport: s.Client().Transport, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(at) }}
		b.direct[i] = client(s.Client(), s.URL, "agent", "node-1")
	}
	var turn atomic.Int64
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { to[turn.Add(1)%2].ServeHTTP(w, r) }))
	front.EnableHTTP2 = true
	front.TLS = &tls.Config{MinVersion: tls.VersionTLS13}
	front.StartTLS()
	t.Cleanup(front.Close)
	b.both = client(front.Client(), front.URL, "agent", "node-1")
	return b
}

func appraise(t *testing.T, c verifierv1connect.VerifierServiceClient, evidence []byte) string {
	t.Helper()
	r, err := c.Appraise(t.Context(), connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: evidence, Audience: "broker"}))
	if err != nil {
		t.Fatal(err)
	}
	return r.Msg.GetResult()
}

func TestTwoReplicasBehindALoadBalancer(t *testing.T) {
	f := newFixture(t)
	b := f.balance(t)
	keys := f.keys(t)

	// Taking turns, the one that makes a nonce never sees the evidence.
	for range 4 {
		if err := relyOn(keys, appraise(t, b.both, f.attest(t, challenge(t, b.both)))); err != nil {
			t.Fatal(err)
		}
	}
	for i := range b.served {
		if n := b.served[i].Load(); n != 4 {
			t.Errorf("replica %d had %d calls of 8", i, n)
		}
	}

	// An enrolment goes over both as well.
	begun, err := b.both.BeginEnrolment(t.Context(), connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: f.tpm.EKChain, AkPublic: f.tpm.AKPublic}))
	if err != nil {
		t.Fatal(err)
	}
	secret, err := f.tpm.Activate(begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.both.FinishEnrolment(t.Context(), connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret})); err != nil {
		t.Fatal(err)
	}

	// Each refuses what it has seen. The other has not seen it, and accepts it
	// once: two results of one nonce, of which a broker takes one.
	e := f.attest(t, challenge(t, b.direct[0]))
	first, second := appraise(t, b.direct[0], e), appraise(t, b.direct[1], e)
	for i, token := range []string{first, second} {
		if err := relyOn(keys, token); err != nil {
			t.Errorf("replica %d: %v", i, err)
		}
		if err := relyOn(keys, appraise(t, b.direct[i], e)); err == nil || !strings.Contains(err.Error(), "nonce.unused") {
			t.Errorf("replica %d, again: %v", i, err)
		}
	}
	var r [2]receipt.Result
	for i, token := range []string{first, second} {
		if err := keys.Open(receipt.TypeResult, token, &r[i]); err != nil {
			t.Fatal(err)
		}
	}
	if r[0].Nonce != r[1].Nonce || r[0].ID == r[1].ID {
		t.Error("a broker could not tell that two results answer one nonce")
	}
}

// Keys are changed step by step, at one replica after the other, while both
// appraise. Relying parties and agents are a step behind all the time: every
// result verifies by the keys that were published before it was asked for, and
// every nonce is accepted by the other replica.
func TestRotationUnderLoad(t *testing.T) {
	f := newFixture(t)
	current, next := newKey(t), newKey(t)
	one, two := bytes.Repeat([]byte{1}, verifier.NonceKeySize), bytes.Repeat([]byte{2}, verifier.NonceKeySize)
	f.options.Signer, f.options.NonceKeys = signerOf(t, current), [][]byte{one}
	f.verifier = f.replica(t)
	f.machine.Credential = f.enrol(t)
	b := f.balance(t)

	const workers = 3
	var rounds [workers]atomic.Int64
	stop := make(chan struct{})
	var load sync.WaitGroup
	for w := range workers {
		load.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				fetched, err := b.both.Keys(t.Context(), connect.NewRequest(&verifierv1.KeysRequest{}))
				if err != nil {
					t.Error(err)
					return
				}
				keys, err := receipt.ParseKeys("verifier", fetched.Msg.GetJwks())
				if err != nil {
					t.Error(err)
					return
				}
				if err := relyOn(keys, appraise(t, b.both, f.attest(t, challenge(t, b.both)))); err != nil {
					t.Error(err)
					return
				}
				rounds[w].Add(1)
			}
		})
	}
	settle := func() {
		var from [workers]int64
		for i := range rounds {
			from[i] = rounds[i].Load()
		}
		for deadline := time.Now().Add(60 * time.Second); !t.Failed(); time.Sleep(2 * time.Millisecond) {
			done := true
			for i := range rounds {
				done = done && rounds[i].Load() >= from[i]+2
			}
			if done {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("appraisals do not go on")
			}
		}
	}
	steps := []verifier.Keys{
		{Signer: signerOf(t, current), Published: []*ecdsa.PublicKey{&next.PublicKey}, NonceKeys: [][]byte{one, two}},
		{Signer: signerOf(t, next), Published: []*ecdsa.PublicKey{&current.PublicKey}, NonceKeys: [][]byte{two, one}},
		// What the old signing key vouched for, the credential, is still in use.
		{Signer: signerOf(t, next), Published: []*ecdsa.PublicKey{&current.PublicKey}, NonceKeys: [][]byte{two}},
	}
	for i, step := range steps {
		for _, v := range b.replicas {
			settle()
			o := f.options
			o.Signer, o.Published, o.NonceKeys = step.Signer, step.Published, step.NonceKeys
			// Each step changes policies and anchors too; what is refused changes nothing.
			o.Policies = append([]policy.Policy{shipped(t, []string{"cpu-only", "production"}[i%2])}, o.Policies...)
			pinned, err := o.Anchors.WithAKs(anchor.Software, fmt.Sprintf("000b%064x", i+1))
			if err != nil {
				t.Fatal(err)
			}
			bad := o
			bad.Anchors, bad.References = pinned, []string{"none"}
			if err := v.Reload(bad); err == nil {
				t.Errorf("step %d: reference values that are none", i)
			}
			o.Anchors = pinned
			if err := v.Reload(o); err != nil {
				t.Errorf("step %d: %v", i, err)
			}
		}
		settle()
	}
	close(stop)
	load.Wait()

	token := appraise(t, b.direct[0], f.attest(t, challenge(t, b.direct[0])))
	published, err := receipt.ParseKeys("verifier", b.replicas[1].JWKS())
	if err != nil {
		t.Fatal(err)
	}
	if err := relyOn(published, token); err != nil {
		t.Error(err)
	}
	if relyOn(f.keys(t), token) == nil {
		t.Error("the old key still signs")
	}
}

func shipped(t *testing.T, name string) policy.Policy {
	t.Helper()
	p, err := policy.Named(name)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
