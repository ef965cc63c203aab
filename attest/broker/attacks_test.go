package broker_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/broker"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

func splitToken(token string) []string { return strings.Split(token, ".") }

// TestReleaseGivesTheKeyToTheJobAlone is the positive that the attacks stand
// beside.
func TestReleaseGivesTheKeyToTheJobAlone(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, alice, "ckpt", broker.KindCheckpoints)
	g := w.grant(t, func(n *broker.NewGrant) { n.Assets = append(n.Assets, "ckpt") })
	j := newJob(t, w, nil)
	for _, asset := range []string{"weights", "data", "ckpt"} {
		a, err := j.release(t, w.Broker, g, asset)
		if err != nil {
			t.Fatal(err)
		}
		key, err := j.open(a, g, asset)
		if err != nil || len(key) != broker.DataKeySize || (w.keys[asset] != nil && !bytes.Equal(key, w.keys[asset])) {
			t.Errorf("%s: opened %d bytes, %v", asset, len(key), err)
		}
		v, err := receipt.VerifyResult(w.cfg.Verifiers[0], j.token, receipt.Expect{Audience: brokerID, AnyJob: true}, w.clock())
		if err != nil {
			t.Fatal(err)
		}
		r, err := receipt.VerifyRelease(w.brokerKeys, v, j.request(g, asset), a.Enc, a.Ciphertext, a.Receipt, w.clock())
		if err != nil {
			t.Fatal(err)
		}
		if rel := r.Release(); rel.Attempt != 1 || rel.Simulated || len(rel.LogHash) != 48 || rel.NotAfter != g.NotAfter.Unix() {
			t.Errorf("receipt %+v", rel)
		}
	}
	if l := must[[]broker.Grant](t)(w.grants(t)); len(l) != 1 || l[0].Used != 1 || l[0].State(w.clock(), false) != broker.StateExhausted {
		t.Errorf("one attempt for three assets: %+v", l)
	}
}

// TestReleaseAttacks holds one attack a row, each refused by one check alone.
func TestReleaseAttacks(t *testing.T) {
	type attack struct {
		simulation bool // broker's configuration
		grant      func(*broker.NewGrant)
		result     func(*receipt.Result)
		// act asks for "weights" in an attacker's way. nil asks honestly.
		act  func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error)
		want string
	}
	asking := func(change func(*receipt.ReleaseRequest)) func(*testing.T, *world, broker.Grant, *job) (broker.Answer, error) {
		return func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			r := j.request(g, "weights")
			change(&r)
			req, sig := sign(t, j.session, r)
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}
	}
	withToken := func(forge func(t *testing.T, w *world, j *job) string) func(*testing.T, *world, broker.Grant, *job) (broker.Answer, error) {
		return func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, sig := sign(t, j.session, j.request(g, "weights"))
			return w.Release(t.Context(), node, broker.Ask{Result: forge(t, w, j), Request: req, Signature: sig})
		}
	}
	after := func(d time.Duration) func(*testing.T, *world, broker.Grant, *job) (broker.Answer, error) {
		return func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			w.advance(d)
			return j.release(t, w.Broker, g, "weights")
		}
	}
	released := func(t *testing.T, w *world, g broker.Grant, j *job) {
		t.Helper()
		must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	}

	for name, a := range map[string]attack{
		"result replayed by a third party without the session key": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, sig := sign(t, newJob(t, w, nil).session, j.request(g, "weights"))
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "release.session-key"},
		"request changed after it was signed": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			_, sig := sign(t, j.session, j.request(g, "data"))
			req, _ := sign(t, j.session, j.request(g, "weights"))
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "release.session-key"},
		"no signature": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, _ := sign(t, j.session, j.request(g, "weights"))
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: nil})
		}, want: "release.session-key"},
		"request of one result sent with another of the same job": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, sig := sign(t, j.session, j.request(g, "weights"))
			j.attest(t, w, nil)
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "release.result"},
		"malformed request": {act: func(t *testing.T, w *world, _ broker.Grant, j *job) (broker.Answer, error) {
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: []byte(`{"version":"` + receipt.RequestVersion + `","extra":1}`)})
		}, want: "release.request"},
		"request whose attempt is no double": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, _ := sign(t, j.session, j.request(g, "weights"))
			req = bytes.Replace(req, []byte(`"attempt":1`), []byte(`"attempt":9223372036854775807`), 1)
			sum := sha256.Sum256(req)
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: must[[]byte](t)(ecdsa.SignASN1(rand.Reader, j.session, sum[:]))})
		}, want: "release.request"},
		"request that names two assets": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, _ := sign(t, j.session, j.request(g, "weights"))
			req = bytes.Replace(req, []byte(`"asset":"weights"`), []byte(`"asset":"data","Asset":"weights"`), 1)
			sum := sha256.Sum256(req)
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: must[[]byte](t)(ecdsa.SignASN1(rand.Reader, j.session, sum[:]))})
		}, want: "release.request"},
		"oversized request": {act: func(t *testing.T, w *world, _ broker.Grant, j *job) (broker.Answer, error) {
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: make([]byte, receipt.MaxRequest+1)})
		}, want: "release.request"},
		"request for another broker": {act: asking(func(r *receipt.ReleaseRequest) { r.Broker = "other.test" }), want: "release.broker"},

		"expired result":                {act: after(receipt.ResultLifetime), want: "result.expiry"},
		"result from the future":        {result: func(r *receipt.Result) { r.IssuedAt += 60; r.Expires += 60 }, want: "result.issued"},
		"result that lives too long":    {result: func(r *receipt.Result) { r.Expires += 3600 }, want: "result.expiry"},
		"result that never expires":     {result: func(r *receipt.Result) { r.Expires = 0 }, want: "result.expiry"},
		"result for another audience":   {result: func(r *receipt.Result) { r.Audience = "other.test" }, want: "result.audience"},
		"result that does not affirm":   {result: func(r *receipt.Result) { r.Submods["cpu0"] = receipt.Appraisal{Status: receipt.Warning} }, want: "result.cpu0"},
		"result over no device":         {result: func(r *receipt.Result) { r.Submods = nil }, want: "result.submods"},
		"result with a failed check":    {result: func(r *receipt.Result) { r.Checks.Fail("binding.gpu", "a", "b", "") }, want: "binding.gpu"},
		"result without a nonce":        {result: func(r *receipt.Result) { r.Nonce = "" }, want: "result.complete"},
		"result with a strange job id":  {result: func(r *receipt.Result) { r.JobID = "../job" }, want: "result.job"},
		"recipient key of another kind": {result: func(r *receipt.Result) { r.Confirmation.Recipient = make([]byte, 32) }, want: "asset.kem"},
		"recipient key of no kind":      {result: func(r *receipt.Result) { r.Confirmation.Recipient = make([]byte, 31) }, want: "release.recipient-key"},

		"result of a verifier unknown here": {act: withToken(func(t *testing.T, _ *world, j *job) string {
			other, _ := newSigner(t, "other.test")
			r := j.result
			r.Issuer = "other.test"
			return must[string](t)(other.Sign(receipt.TypeResult, r))
		}), want: "result.issuer"},
		"wrong issuer: own key under the verifier's name": {act: withToken(func(t *testing.T, _ *world, j *job) string {
			other, _ := newSigner(t, verifierID)
			return must[string](t)(other.Sign(receipt.TypeResult, j.result))
		}), want: "result.signature"},
		"token of another type": {act: withToken(func(t *testing.T, w *world, j *job) string {
			return must[string](t)(w.verifier.Sign("ak-credential", j.result))
		}), want: "result.signature"},
		"unsigned token": {act: withToken(func(t *testing.T, _ *world, j *job) string {
			h, b, _ := reheader(t, j.token, map[string]any{"alg": "none", "typ": "JWT"})
			return h + "." + b + "."
		}), want: "result.signature"},
		"signature stripped": {act: withToken(func(_ *testing.T, _ *world, j *job) string {
			p := splitToken(j.token)
			return p[0] + "." + p[1] + "."
		}), want: "result.signature"},
		"algorithm confused: HMAC under the public key": {act: withToken(func(t *testing.T, w *world, j *job) string {
			jwks := must[[]byte](t)(w.verifier.JWKS())
			h, b, _ := reheader(t, j.token, map[string]any{"alg": "HS256", "typ": "JWT"})
			m := hmac.New(sha256.New, jwks)
			m.Write([]byte(h + "." + b))
			return h + "." + b + "." + base64.RawURLEncoding.EncodeToString(m.Sum(nil))
		}), want: "result.signature"},
		"claims edited": {act: withToken(func(t *testing.T, w *world, j *job) string {
			p := splitToken(j.token)
			body := must[[]byte](t)(base64.RawURLEncoding.DecodeString(p[1]))
			body = bytes.Replace(body, []byte(w.plan), []byte(plan.Sum([]byte("plan B"))), 1)
			return p[0] + "." + base64.RawURLEncoding.EncodeToString(body) + "." + p[2]
		}), want: "result.signature"},
		"no token":       {act: withToken(func(*testing.T, *world, *job) string { return "" }), want: "result.issuer"},
		"enormous token": {act: withToken(func(_ *testing.T, _ *world, j *job) string { return j.token + strings.Repeat("A", receipt.MaxToken) }), want: "result.issuer"},

		"result for another plan than the grant's": {result: func(r *receipt.Result) { r.PlanDigest = plan.Sum([]byte("plan B")) }, want: "grant.plan"},
		"grant that does not exist":                {act: asking(func(r *receipt.ReleaseRequest) { r.Grant = "grant-none" }), want: "grant.id"},
		"asset that the grant does not name":       {grant: func(n *broker.NewGrant) { n.Assets = []string{"data"} }, want: "grant.asset"},
		"asset that does not exist":                {act: asking(func(r *receipt.ReleaseRequest) { r.Asset = "nothing" }), want: "grant.asset"},
		"expired grant": {grant: func(n *broker.NewGrant) { n.NotAfter = n.NotAfter.Add(-time.Hour + time.Minute) }, act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			w.advance(time.Minute)
			return j.release(t, w.Broker, g, "weights")
		}, want: "grant.expiry"},
		"grant that is not valid yet": {grant: func(n *broker.NewGrant) { n.NotBefore = n.NotAfter.Add(-time.Minute) }, want: "grant.not-before"},
		"revoked grant": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "changed my mind"))
			return j.release(t, w.Broker, g, "weights")
		}, want: "grant.revoked"},
		"answer repeated after the revocation": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, sig := sign(t, j.session, j.request(g, "weights"))
			must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig}))
			must[broker.Grant](t)(w.Revoke(t.Context(), alice, g.ID, "changed my mind"))
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "grant.revoked"},
		"grant used twice with a new recipient key": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			return newJob(t, w, nil).release(t, w.Broker, g, "weights")
		}, want: "grant.exhausted"},
		"second asset under an exhausted grant with a new recipient key": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			return newJob(t, w, nil).release(t, w.Broker, g, "data")
		}, want: "grant.exhausted"},

		"one recipient key for a second job": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			j.attest(t, w, func(r *receipt.Result) { r.JobID = "job-2" })
			return j.release(t, w.Broker, g, "weights")
		}, want: "grant.exhausted"},
		"job of another agent": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			req, sig := sign(t, j.session, j.request(g, "data"))
			return w.Release(t.Context(), stranger, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "job.agent"},
		"answer of another agent's job": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			req, sig := sign(t, j.session, j.request(g, "weights"))
			must[broker.Answer](t)(w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig}))
			return w.Release(t.Context(), stranger, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "job.agent"},
		"job of another agent that only logged a bundle": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			must[string](t)(w.LogBundle(t.Context(), stranger, "job-1", plan.Sum(nil)))
			return j.release(t, w.Broker, g, "weights")
		}, want: "job.agent"},
		"job with as many log entries as may be": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			w.fill(t, "job-1", broker.MaxJobEntries-16)
			return j.release(t, w.Broker, g, "weights")
		}, want: "job.entries"},

		"simulated result, grant does not allow it":  {simulation: true, result: func(r *receipt.Result) { r.Simulated = true }, want: "grant.simulated"},
		"simulated result, broker does not allow it": {result: func(r *receipt.Result) { r.Simulated = true }, want: "result.simulated"},

		"same result and asset, other request": {grant: func(n *broker.NewGrant) { n.MaxReleases = 9 }, act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			r := j.request(g, "weights")
			r.Attempt = 2
			req, sig := sign(t, j.session, r)
			return w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		}, want: "release.replay"},
		"same result and asset under another grant": {act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			return j.release(t, w.Broker, w.grant(t, nil), "weights")
		}, want: "release.replay"},
		"same nonce with another result": {grant: func(n *broker.NewGrant) { n.MaxReleases = 9 }, act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			nonce := j.result.Nonce
			j.attest(t, w, func(r *receipt.Result) { r.Nonce = nonce })
			return j.release(t, w.Broker, g, "data")
		}, want: "release.replay"},
		"same nonce with another recipient key": {grant: func(n *broker.NewGrant) { n.MaxReleases = 9 }, act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			return newJob(t, w, func(r *receipt.Result) { r.Nonce = j.result.Nonce }).release(t, w.Broker, g, "data")
		}, want: "release.replay"},
		"same result id with another nonce": {grant: func(n *broker.NewGrant) { n.MaxReleases = 9 }, act: func(t *testing.T, w *world, g broker.Grant, j *job) (broker.Answer, error) {
			released(t, w, g, j)
			id := j.result.ID
			j.attest(t, w, func(r *receipt.Result) { r.ID = id })
			return j.release(t, w.Broker, g, "data")
		}, want: "release.replay"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, a.simulation)
			g := w.grant(t, a.grant)
			j := newJob(t, w, a.result)
			before := must[[]broker.Grant](t)(w.grants(t))[0].Used
			var ans broker.Answer
			var err error
			if a.act != nil {
				ans, err = a.act(t, w, g, j)
			} else {
				ans, err = j.release(t, w.Broker, g, "weights")
			}
			wantRefused(t, ans, err, a.want)
			if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used > before+1 {
				t.Errorf("the grant counts %d uses", used)
			}
			if _, err := w.CheckLog(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSimulatedReleaseSaysSo(t *testing.T) {
	w := newWorld(t, true)
	g := w.grant(t, func(n *broker.NewGrant) { n.AllowSimulated = true })
	j := newJob(t, w, func(r *receipt.Result) { r.Simulated = true })
	a := must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	var r receipt.Release
	if err := w.brokerKeys.Open(receipt.TypeRelease, a.Receipt, &r); err != nil || !r.Simulated {
		t.Errorf("receipt %+v, %v", r, err)
	}
}

func TestCiphertextSwappedBetweenAssetsDoesNotOpen(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	a := must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	d := must[broker.Answer](t)(j.release(t, w.Broker, g, "data"))
	if _, err := j.open(a, g, "data"); err == nil {
		t.Error("the key of weights opens as that of data")
	}
	if _, err := j.open(broker.Answer{Enc: a.Enc, Ciphertext: d.Ciphertext}, g, "weights"); err == nil {
		t.Error("a ciphertext opens with another's encapsulated key")
	}
	if _, err := j.open(a, broker.Grant{ID: "grant-other"}, "weights"); err == nil {
		t.Error("a key released under one grant opens under another")
	}
	other := newJob(t, w, nil)
	other.result = j.result
	if _, err := other.open(a, g, "weights"); err == nil {
		t.Error("another recipient opens the key")
	}
}

// TestRacingReleases lets jobs with keys of their own race for a single-use
// grant.
func TestRacingReleases(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	const racers = 8
	jobs := make([]*job, racers)
	for i := range jobs {
		jobs[i] = newJob(t, w, nil)
	}
	errs := make([]error, racers)
	var wg sync.WaitGroup
	for i, j := range jobs {
		req, sig := sign(t, j.session, j.request(g, "weights"))
		wg.Go(func() {
			_, errs[i] = w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else {
			wantRefused(t, broker.Answer{}, err, "grant.exhausted")
		}
	}
	if won != 1 {
		t.Errorf("%d of %d racers won", won, racers)
	}
}

// TestSameRequestGetsTheSameAnswer races a request against itself, then repeats
// it on a broker that was restarted.
func TestSameRequestGetsTheSameAnswer(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	req, sig := sign(t, j.session, j.request(g, "weights"))
	answers := make([]broker.Answer, 8)
	errs := make([]error, len(answers))
	var wg sync.WaitGroup
	for i := range answers {
		wg.Go(func() {
			answers[i], errs[i] = w.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
		})
	}
	wg.Wait()
	restarted := must[*broker.Broker](t)(broker.New(w.cfg))
	again, err := restarted.Release(t.Context(), node, broker.Ask{Result: j.token, Request: req, Signature: sig})
	answers, errs = append(answers, again), append(errs, err)
	for i := range answers {
		if errs[i] != nil {
			t.Fatal(errs[i])
		}
		if !bytes.Equal(answers[i].Enc, answers[0].Enc) || !bytes.Equal(answers[i].Ciphertext, answers[0].Ciphertext) {
			t.Errorf("answer %d differs", i)
		}
	}
	if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used != 1 {
		t.Errorf("counted %d times", used)
	}
	if l, err := w.Entries(t.Context(), alice, "job-1"); err != nil || len(l) != 1 {
		t.Errorf("%d log entries, %v", len(l), err)
	}
}

func TestReattestationOfTheSameJobIsTheSameAttempt(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	must[broker.Answer](t)(j.release(t, w.Broker, g, "weights"))
	j.attest(t, w, nil)
	a, err := j.release(t, w.Broker, g, "weights")
	if err != nil {
		t.Fatal(err)
	}
	if key, err := j.open(a, g, "weights"); err != nil || !bytes.Equal(key, w.keys["weights"]) {
		t.Error(err)
	}
	if used := must[[]broker.Grant](t)(w.grants(t))[0].Used; used != 1 {
		t.Errorf("counted %d times", used)
	}
}

func TestGrantsOfTwoOwnersServeOneResult(t *testing.T) {
	w := newWorld(t, false)
	w.asset(t, bob, "bobs", broker.KindDataset)
	ga := w.grant(t, nil)
	gb := must[broker.Grant](t)(w.CreateGrant(t.Context(), bob, broker.NewGrant{Assets: []string{"bobs"}, Plan: w.plan, NotAfter: w.clock().Add(time.Hour), MaxReleases: 1}))
	j := newJob(t, w, nil)
	must[broker.Answer](t)(j.release(t, w.Broker, ga, "weights"))
	a := must[broker.Answer](t)(j.release(t, w.Broker, gb, "bobs"))
	if key, err := j.open(a, gb, "bobs"); err != nil || !bytes.Equal(key, w.keys["bobs"]) {
		t.Error(err)
	}
}

func TestReleaseUnavailable(t *testing.T) {
	w := newWorld(t, false)
	g := w.grant(t, nil)
	j := newJob(t, w, nil)
	if err := w.store.Close(); err != nil {
		t.Fatal(err)
	}
	a, err := j.release(t, w.Broker, g, "weights")
	if !errors.Is(err, broker.ErrUnavailable) || failed(err) != nil || a.Ciphertext != nil {
		t.Errorf("closed database: %v", err)
	}
}
