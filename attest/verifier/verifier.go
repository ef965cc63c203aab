// Package verifier appraises evidence and signs attestation results (RFC 9334):
// it issues nonces, enrols attestation keys, and holds the evidence of every
// device of a job against one challenge and one policy. It appraises guests of
// the Confidential Containers KBS protocol for brokers, too.
//
// Trusted: the given anchors, policies, keys and clock. Checked: that the nonce
// is this verifier's, fresh and not used here before; that plan, sandbox, job
// and keys are those that every device's evidence binds; that each device is
// genuine; that the plan's policy accepts them. Not checked: that a nonce was
// not used at another replica, which is the broker's part at release; that a nonce
// of a relying party's or of a KBS session's is fresh, or what devices by
// themselves speak of, which is theirs, so that results over these are of types of
// their own; that the sandbox's specification
// follows from the plan, which is the measured agent's.
package verifier

import (
	"crypto/ecdsa"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/nvgpu"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/vtpm"
)

const (
	// NonceKeySize is the length of a nonce key, in bytes.
	NonceKeySize = 32
	// NonceLifetime is how long a nonce is good for.
	NonceLifetime = 2 * time.Minute
	// EnrolmentLifetime is how long a TPM may take to open its credential.
	EnrolmentLifetime = 2 * time.Minute
	// maxName bounds the names of verifiers and audiences, in bytes.
	maxName = 255
)

var (
	// ErrMalformed is wrapped by errors about input that is not evidence at
	// all. Nothing is signed over it.
	ErrMalformed = errors.New("malformed")
	// ErrBusy is wrapped by errors that a later try with a new nonce may not see.
	ErrBusy = errors.New("verifier is busy")
)

// Options are all that a verifier needs; all but KBSPolicy, References,
// Published and the endorsements are required.
type Options struct {
	// ID names the verifier. Evidence binds it, results are issued under it.
	ID string
	// Anchors are the roots at which chains must end.
	Anchors anchor.Set
	// Policies are those that plans may name.
	Policies []policy.Policy
	// KBSPolicy names the one of them that guests of the Confidential Containers
	// KBS protocol are held against. Empty: all of them are refused.
	KBSPolicy string
	// References are signed reference values. Each must be by a source that one
	// of the policies names, and valid now; policies that name a source of which
	// there are none refuse.
	References []string
	// Signer, Published and NonceKeys are as in Keys.
	Signer    *receipt.Signer
	Published []*ecdsa.PublicKey
	NonceKeys [][]byte
	// Clock gives the time of every decision.
	Clock func() time.Time
	// Build names the running program in results.
	Build string
	// GPUEndorsements are where revocation status and reference values of GPUs
	// come from. Without a source they are reported as not checked, and policies
	// that require them refuse.
	GPUEndorsements nvgpu.Endorsements
	// Endorsements is where those come from, the CPU's too, with GPUEndorsements
	// unused. Results list what was used of it.
	Endorsements *endorse.Cache
}

// Verifier appraises evidence. It may be used concurrently.
type Verifier struct {
	id    string
	clock func() time.Time
	build string
	seen  *seen
	// simulated is fixed: no change of anchors makes a simulation's verifier
	// another.
	simulated bool

	changing sync.Mutex // orders changes of keys and of trusted
	keys     atomic.Pointer[keySet]
	trusted  atomic.Pointer[trusted]

	endorsements nvgpu.Endorsements
	endorsed     *endorse.Cache

	attestationKeys vtpm.Memory // what was read of them
}

// New returns a verifier. Options that lack something are an error, and so is a
// policy that accepts simulation where the anchors are the vendors': such a
// verifier would promise what it cannot tell.
func New(o Options) (*Verifier, error) {
	switch {
	case !goodName(o.ID):
		return nil, fmt.Errorf("make verifier: id %.80q: want 1 to %d printable characters without spaces", o.ID, maxName)
	case o.Clock == nil:
		return nil, errors.New("make verifier: no clock")
	case o.Build == "":
		return nil, errors.New("make verifier: no build")
	}
	t, err := newTrusted(o, o.Clock())
	if err != nil {
		return nil, fmt.Errorf("make verifier: %w", err)
	}
	keys, err := newKeySet(o.ID, Keys{Signer: o.Signer, Published: o.Published, NonceKeys: o.NonceKeys})
	if err != nil {
		return nil, fmt.Errorf("make verifier: %w", err)
	}
	v := &Verifier{id: o.ID, clock: o.Clock, build: o.Build, seen: newSeen(), simulated: o.Anchors.Simulated(), endorsements: o.GPUEndorsements, endorsed: o.Endorsements}
	v.keys.Store(keys)
	v.trusted.Store(t)
	return v, nil
}

// ID returns the verifier's name.
func (v *Verifier) ID() string { return v.id }

// Simulated reports whether the anchors are a simulation's.
func (v *Verifier) Simulated() bool { return v.simulated }

// JWKS returns the keys that verify results and credentials.
func (v *Verifier) JWKS() []byte { return slices.Clone(v.keys.Load().jwks) }

// Ready returns why the verifier can accept no evidence at all, or nil: each
// policy names a source whose reference values have all expired. One that can
// still be satisfied is enough.
func (v *Verifier) Ready() error {
	now, t := v.clock(), v.trusted.Load()
	var stale []string
	for d, p := range t.policies {
		valid := map[string]bool{}
		for _, r := range t.references[d] {
			if r.ValidAt(now) {
				valid[r.Values().Issuer] = true
			}
		}
		missing := slices.IndexFunc(p.Source().Sources, func(s policy.Source) bool { return !valid[s.Issuer] })
		if missing < 0 {
			return nil
		}
		stale = append(stale, fmt.Sprintf("policy %s has no valid reference values of %.80q", p.Source().Name, p.Source().Sources[missing].Issuer))
	}
	slices.Sort(stale)
	return errors.New(strings.Join(stale, "; "))
}

func goodName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}
