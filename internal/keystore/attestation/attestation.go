// Package attestation is how a broker shows a key store what it is: the gate on the
// store's side, and the prover on the broker's, over the attestation results of a
// verifier.
//
// Trusted, by the gate: the verifier's pinned keys, the policy that its owner named
// by digest, and the clock. Checked: signature, issuer, audience, lifetime, verdict
// and trust vector of a result, that it was made under that policy, for that store,
// by what is no job. Not checked: evidence, which the verifier appraised; that
// nobody else than the broker runs on the machine: the policy's reference values say
// what may run there.
package attestation

import (
	"fmt"
	"os"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	contract "github.com/coffer-run/coffer/plugins/contract/keystore"
	"github.com/coffer-run/coffer/plugins/keystore/attested"
)

// JobID stands in evidence, and in results, where a job's id does: whoever asks a
// key store is no job.
const JobID = "coffer.run/key-store-caller"

// Audience is that of results for the key store of the given name. No agent asks
// for one: its results are for its broker.
func Audience(store string) string { return "key-store:" + store }

// Request is what a broker gives the program that attests for it.
type Request struct {
	Audience string `json:"audience"`
	// RecipientKey is an HPKE public key (ML-KEM-768+X25519) and SessionKey a P-256
	// public key (PKIX DER): those that the evidence binds.
	RecipientKey []byte `json:"recipientKey"`
	SessionKey   []byte `json:"sessionKey"`
}

// MaxRequest bounds an encoded Request, in bytes.
const MaxRequest = 16 << 10

// Config says which callers a key store accepts. All but Simulated is required.
type Config struct {
	// Verifier is the name of the verifier whose results count, and KeysFile has its
	// public keys (JWKS).
	Verifier string `json:"verifier"`
	KeysFile string `json:"keysFile"`
	// Policy is the digest of the attestation policy that the verifier must have
	// appraised by. It should list the launch measurement of the broker's machine.
	Policy plan.Digest `json:"policy"`
	// Simulated accepts evidence rooted in simulation anchors.
	Simulated bool `json:"simulated,omitempty"`
}

// Guard puts the gate that c describes before the store of the given name.
func (c Config) Guard(s contract.Store, name string) (contract.Store, error) {
	if c.Verifier == "" || c.KeysFile == "" || c.Policy.Bytes() == nil {
		return nil, fmt.Errorf("attestation: want verifier, keysFile and the digest of a policy")
	}
	jwks, err := os.ReadFile(c.KeysFile)
	if err != nil {
		return nil, fmt.Errorf("attestation: keys of verifier %s: %w", c.Verifier, err)
	}
	keys, err := receipt.ParseKeys(c.Verifier, jwks)
	if err != nil {
		return nil, fmt.Errorf("attestation: %w", err)
	}
	return attested.New(s, name, func(result string, now time.Time) (attested.Caller, error) {
		return c.appraise(keys, name, result, now)
	}, time.Now)
}

func (c Config) appraise(keys receipt.Keys, store, token string, now time.Time) (attested.Caller, error) {
	v, err := receipt.VerifyResult(keys, token, receipt.Expect{Audience: Audience(store), AnyJob: true, AllowSimulated: c.Simulated}, now)
	if err != nil {
		return attested.Caller{}, err
	}
	r := v.Result()
	var l check.List
	l.Equal("result.job", JobID, r.JobID, "a job's result opens no key store")
	l.Equal("result.policy", string(c.Policy), string(r.Policy.Digest), "attest under the policy that the key store's owner named")
	if len(l.Failed()) > 0 {
		return attested.Caller{}, check.Refuse("key store", l)
	}
	session, err := v.SessionKey()
	return attested.Caller{Session: session, Recipient: r.Confirmation.Recipient}, err
}
