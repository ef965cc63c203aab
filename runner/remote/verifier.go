package remote

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	verifierv1 "github.com/coffer-run/coffer/attest/api/verifier/v1"
	"github.com/coffer-run/coffer/attest/api/verifier/v1/verifierv1connect"
	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

// endorsementsPath is where the verifier hands out what an appraisal used.
const endorsementsPath = "/endorsements"

// Verifier is a client of the verifier.
type Verifier struct {
	client verifierv1connect.VerifierServiceClient
	http   *http.Client
	url    string
	keys   receipt.Keys
	id     string
	jwks   []byte

	mu    sync.Mutex // guards what follows
	rules string
	heard time.Time
}

// rulesTimeout bounds the wait for a hint.
const rulesTimeout = 2 * time.Second

// NewVerifier returns a client. It calls nothing yet.
func NewVerifier(s Service) (*Verifier, error) {
	if err := s.validate("verifier"); err != nil {
		return nil, err
	}
	keys, err := receipt.ParseKeys(s.ID, s.JWKS)
	if err != nil {
		return nil, err
	}
	return &Verifier{client: verifierv1connect.NewVerifierServiceClient(s.HTTP, s.URL, connect.WithReadMaxBytes(maxAnswer)), http: s.HTTP, url: s.URL, keys: keys, id: s.ID, jwks: s.JWKS}, nil
}

// ID is the verifier's name, which evidence binds.
func (v *Verifier) ID() string { return v.id }

// JWKS are the keys by which the node checks results.
func (v *Verifier) JWKS() []byte { return v.jwks }

// Challenge asks for a nonce.
func (v *Verifier) Challenge(ctx context.Context) (string, error) {
	r, err := persist(ctx, "verifier", "ask for a nonce", func(ctx context.Context) (*connect.Response[verifierv1.ChallengeResponse], error) {
		return v.client.Challenge(ctx, connect.NewRequest(&verifierv1.ChallengeRequest{}))
	})
	if err != nil {
		return "", err
	}
	if r.Msg.GetVerifierId() != v.id {
		return "", fmt.Errorf("ask for a nonce: the verifier calls itself %.80q, configured is %q", r.Msg.GetVerifierId(), v.id)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.rules, v.heard = r.Msg.GetRulesDigest(), time.Now()
	return r.Msg.GetNonce(), nil
}

// Rules is the digest of what the verifier holds evidence against, as it said not
// longer ago than maxAge, or when it was last asked if it is away. It is a hint: nobody
// signs it. Empty is that it never said.
func (v *Verifier) Rules(ctx context.Context, maxAge time.Duration) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if time.Since(v.heard) < maxAge {
		return v.rules
	}
	// Whoever asks besides is answered by this.
	v.heard = time.Now()
	ctx, cancel := context.WithTimeout(ctx, rulesTimeout)
	defer cancel()
	r, err := once(ctx, "verifier", "ask for its rules", func(ctx context.Context) (*connect.Response[verifierv1.ChallengeResponse], error) {
		return v.client.Challenge(ctx, connect.NewRequest(&verifierv1.ChallengeRequest{}))
	})
	if err == nil && r.Msg.GetVerifierId() == v.id {
		v.rules = r.Msg.GetRulesDigest()
	}
	return v.rules
}

// Activate opens a credential in the TPM that holds the keys it is for.
type Activate func(ctx context.Context, credentialBlob, encryptedSecret []byte) (secret []byte, err error)

// Enrol ties the attestation key to the endorsement key's certificate and
// returns the verifier's credential for it.
func (v *Verifier) Enrol(ctx context.Context, ekChain [][]byte, akPublic []byte, activate Activate) (string, error) {
	begun, err := persist(ctx, "verifier", "begin enrolment", func(ctx context.Context) (*connect.Response[verifierv1.BeginEnrolmentResponse], error) {
		return v.client.BeginEnrolment(ctx, connect.NewRequest(&verifierv1.BeginEnrolmentRequest{EkChain: ekChain, AkPublic: akPublic}))
	})
	if err != nil {
		return "", err
	}
	secret, err := activate(ctx, begun.Msg.GetCredentialBlob(), begun.Msg.GetEncryptedSecret())
	if err != nil {
		return "", fmt.Errorf("activate credential: %w", err)
	}
	done, err := persist(ctx, "verifier", "finish enrolment", func(ctx context.Context) (*connect.Response[verifierv1.FinishEnrolmentResponse], error) {
		return v.client.FinishEnrolment(ctx, connect.NewRequest(&verifierv1.FinishEnrolmentRequest{Enrolment: begun.Msg.GetEnrolment(), Secret: secret}))
	})
	if err != nil {
		return "", err
	}
	return done.Msg.GetAkCredential(), nil
}

// Appraise hands evidence over once and checks the result that comes back. It
// does not repeat the call: the nonce is used up when the answer is lost, and
// the caller attests again. token is the signed result, also where it refuses.
func (v *Verifier) Appraise(ctx context.Context, env []byte, want receipt.Expect) (verified receipt.Verified, token string, err error) {
	if len(env) > evidence.MaxSize {
		return receipt.Verified{}, "", fmt.Errorf("appraise: evidence of %d bytes is too large", len(env))
	}
	r, err := once(ctx, "verifier", "appraise", func(ctx context.Context) (*connect.Response[verifierv1.AppraiseResponse], error) {
		return v.client.Appraise(ctx, connect.NewRequest(&verifierv1.AppraiseRequest{Evidence: env, Audience: want.Audience}))
	})
	if err != nil {
		return receipt.Verified{}, "", err
	}
	token = r.Msg.GetResult()
	verified, err = receipt.VerifyResult(v.keys, token, want, time.Now())
	return verified, token, err
}

// Endorsements asks for the endorsements that the appraisal of a signed result
// used, as a bundle carries them. Nil means that it used none.
func (v *Verifier) Endorsements(ctx context.Context, token string) ([]byte, error) {
	return once(ctx, "verifier", "ask for endorsements", func(ctx context.Context) ([]byte, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, strings.TrimSuffix(v.url, "/")+endorsementsPath, strings.NewReader(token))
		if err != nil {
			return nil, err
		}
		resp, err := v.http.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close() //nolint:errcheck // read only
		b, err := io.ReadAll(io.LimitReader(resp.Body, bundle.MaxPart+1))
		switch {
		case err != nil:
			return nil, err
		case resp.StatusCode != http.StatusOK:
			return nil, fmt.Errorf("answer %d: %.400q", resp.StatusCode, b)
		case len(b) > bundle.MaxPart:
			return nil, fmt.Errorf("more than %d bytes", bundle.MaxPart)
		case string(b) == "[]":
			return nil, nil
		}
		return b, nil
	})
}

// Result opens a result that the verifier signed, whatever it says.
func (v *Verifier) Result(token string) (r receipt.Result, err error) {
	err = v.keys.Open(receipt.TypeResult, token, &r)
	return r, err
}

// Recheck checks a result that was appraised before, as it stood when it was
// issued: a job may run for longer than its result may be relied on.
func (v *Verifier) Recheck(token string, want receipt.Expect) (receipt.Verified, error) {
	var r receipt.Result
	if err := v.keys.Open(receipt.TypeResult, token, &r); err != nil {
		return receipt.Verified{}, err
	}
	return receipt.VerifyResult(v.keys, token, want, time.Unix(r.IssuedAt, 0))
}

// Check hands evidence over once and reads what the verifier says of it. Nobody
// relies on that: the result is of a type of its own, and a refusal is no error.
func (v *Verifier) Check(ctx context.Context, env []byte, audience, job string, p plan.Digest) (receipt.Result, error) {
	if len(env) > evidence.MaxSize {
		return receipt.Result{}, fmt.Errorf("check: evidence of %d bytes is too large", len(env))
	}
	r, err := once(ctx, "verifier", "check", func(ctx context.Context) (*connect.Response[verifierv1.CheckResponse], error) {
		return v.client.Check(ctx, connect.NewRequest(&verifierv1.CheckRequest{Evidence: env, Audience: audience}))
	})
	if err != nil {
		return receipt.Result{}, err
	}
	var out receipt.Result
	if err := v.keys.Open(receipt.TypeCheck, r.Msg.GetResult(), &out); err != nil {
		return receipt.Result{}, err
	}
	if out.Issuer != v.id || out.Audience != audience || out.JobID != job || out.PlanDigest != p || out.EvidenceDigest != plan.Sum(env) {
		return receipt.Result{}, errors.New("check: the verifier's result is of other evidence")
	}
	return out, nil
}
