package runner

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/collect"
)

// Prediction is what the verifier says of the machine as it is, under a plan's
// policy. It is no part of the plan, and nothing is released on it.
type Prediction struct {
	// Accepted is false where Failed says why.
	Accepted  bool
	Simulated bool
	Failed    check.List
	// Unknown is why nobody could tell; the other fields then say nothing.
	Unknown string
}

const (
	// predictionJob stands where evidence names its job.
	predictionJob = "prediction"
	// predictTimeout bounds one prediction: who plans waits for it.
	predictTimeout = 20 * time.Second
)

// Predict resolves a job file as Plan does, and has the verifier judge the machine
// under its plan. The evidence speaks of that plan, of the node's sandbox profile and
// of keys that nobody keeps; the result is of a type that no broker takes. A job is
// attested anew, with its own sandbox and its own GPUs.
func (a *Agent) Predict(ctx context.Context, file []byte) (plan.Digest, []byte, Prediction, error) {
	j, err := a.resolve(ctx, file)
	if err != nil {
		return "", nil, Prediction{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, predictTimeout)
	defer cancel()
	p, err := a.predict(ctx, j)
	if err != nil {
		p = Prediction{Unknown: err.Error()}
	}
	return j.digest, j.canonical, p, nil
}

func (a *Agent) predict(ctx context.Context, j *Job) (Prediction, error) {
	// One at a time: devices answer one after the other.
	select {
	case a.predicting <- struct{}{}:
		defer func() { <-a.predicting }()
	case <-ctx.Done():
		return Prediction{}, errors.New("others ask for the same at this moment")
	}
	sandbox, err := a.unmade(j)
	if err != nil {
		return Prediction{}, err
	}
	recipient, session, err := lostKeys()
	if err != nil {
		return Prediction{}, err
	}
	credential, err := a.AKCredential(ctx)
	if err != nil {
		return Prediction{}, fmt.Errorf("enrol attestation key: %w", err)
	}
	nonce, err := a.Verifier.Challenge(ctx)
	if err != nil {
		return Prediction{}, err
	}
	env, err := a.Collector.Collect(ctx, collect.Request{
		VerifierID: a.Verifier.ID(), Nonce: nonce, JobID: predictionJob, Plan: j.canonical, Sandbox: sandbox,
		RecipientKey: recipient, SessionKey: session, AKCredential: credential,
		Want: collect.Want{TPM: true, SNP: true, GPUs: a.uuids[:j.plan.Resources.GPUs]},
	})
	if err != nil {
		return Prediction{}, err
	}
	b, err := plan.Canonical(env)
	if err != nil {
		return Prediction{}, fmt.Errorf("encode evidence: %w", err)
	}
	r, err := a.Verifier.Check(ctx, b, predictionJob, predictionJob, j.digest)
	if err != nil {
		return Prediction{}, err
	}
	return predicted(r), nil
}

// predicted reads a result: accepted is what has devices, and affirms each of them.
func predicted(r receipt.Result) Prediction {
	p := Prediction{Simulated: r.Simulated, Failed: r.AllChecks().Failed()}
	p.Accepted = len(r.Submods) > 0 && len(p.Failed) == 0
	for _, s := range r.Submods {
		p.Accepted = p.Accepted && s.Status == receipt.Affirming
	}
	return p
}

// unmade describes the sandbox that the node would make, without the container that
// is not there.
func (a *Agent) unmade(j *Job) ([]byte, error) {
	if j.plan.Reseal != nil {
		return plan.NoSandbox(predictionJob).Canonical()
	}
	return plan.Sandbox{
		Version: plan.SandboxVersion, JobID: predictionJob, Image: j.plan.Image, ImageSignature: digestOfPart(j.signature), ImageSBOM: digestOfPart(j.sbom),
		Profile: a.Node.Profile(), Wrapper: []string{}, Trace: json.RawMessage(`{}`), Spec: json.RawMessage(`{}`),
	}.Canonical()
}

// lostKeys are public keys of which nobody keeps the private ones.
func lostKeys() (recipient, session []byte, err error) {
	r, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	s, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	if session, err = x509.MarshalPKIXPublicKey(&s.PublicKey); err != nil {
		return nil, nil, fmt.Errorf("encode a key: %w", err)
	}
	return r.PublicKey().Bytes(), session, nil
}
