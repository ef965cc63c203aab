// Package attested puts a gate before a key store: it unwraps for a caller alone
// that proves what it is, and seals the data key to that caller.
//
// Trusted: the store behind it, the process that it runs in, the Appraise that it
// is given and what that trusts. Checked: that a call is signed by the session key
// in an accepted result, over a challenge of this store's that no call has used,
// and over everything that the call names. Not checked: what Wrap and Rewrap are
// called with; they show no key to anybody.
//
// The gate is as good as the machine that it runs on: root there goes around it.
// It belongs where the owner of the keys runs it, and not on the broker's machine.
package attested

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

const (
	// challengeTime is how long a challenge may be used.
	challengeTime = time.Minute
	// maxChallenges bounds those that are open. Then the store hands out no more until
	// one ends.
	maxChallenges = 4096
)

// Caller is what an accepted attestation result confirms.
type Caller struct {
	// Session signs calls: P-256. Recipient is the HPKE public key that answers are
	// sealed to.
	Session   *ecdsa.PublicKey
	Recipient []byte
}

// Appraise says whom a result confirms. Whatever it does not accept is an error.
type Appraise func(result string, now time.Time) (Caller, error)

// Store is a store behind the gate.
type Store struct {
	keystore.Store
	name     string
	appraise Appraise
	now      func() time.Time

	mu   sync.Mutex // guards open
	open map[[keystore.ChallengeSize]byte]time.Time
}

var _ keystore.AttestedStore = (*Store)(nil)

// New puts a gate before s, which is the store of the given name.
func New(s keystore.Store, name string, appraise Appraise, now func() time.Time) (*Store, error) {
	if s == nil || appraise == nil || now == nil {
		return nil, errors.New("attested key store needs a store, an appraisal and a clock")
	}
	if err := keystore.CheckName("store's name", name); err != nil {
		return nil, err
	}
	return &Store{Store: s, name: name, appraise: appraise, now: now, open: map[[keystore.ChallengeSize]byte]time.Time{}}, nil
}

// Info says that the store asks.
func (s *Store) Info(ctx context.Context) (*keystore.Info, error) {
	i, err := s.Store.Info(ctx)
	if err != nil {
		return nil, err
	}
	asks := *i
	asks.AttestationRequired = true
	return &asks, nil
}

// Unwrap refuses: it does not know who calls.
func (s *Store) Unwrap(context.Context, *keystore.Wrapped, []byte) (*keystore.DataKey, error) {
	return nil, keystore.ErrUnattested
}

// Challenge makes one.
func (s *Store) Challenge(context.Context) ([]byte, error) {
	var c [keystore.ChallengeSize]byte
	_, _ = rand.Read(c[:]) // never fails (crypto/rand)
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.open) >= maxChallenges {
		for k, until := range s.open {
			if !now.Before(until) {
				delete(s.open, k)
			}
		}
	}
	if len(s.open) >= maxChallenges {
		return nil, fmt.Errorf("%w: %d challenges are open", keystore.ErrBackend, len(s.open))
	}
	s.open[c] = now.Add(challengeTime)
	return c[:], nil
}

// spend ends a challenge and says whether it was good.
func (s *Store) spend(challenge []byte) bool {
	if len(challenge) != keystore.ChallengeSize {
		return false
	}
	c := [keystore.ChallengeSize]byte(challenge)
	s.mu.Lock()
	defer s.mu.Unlock()
	until, ok := s.open[c]
	delete(s.open, c)
	return ok && s.now().Before(until)
}

// UnwrapFor unwraps for whom p proves to call.
func (s *Store) UnwrapFor(ctx context.Context, w *keystore.Wrapped, associated []byte, p keystore.Proof) (*keystore.Sealed, error) {
	if !s.spend(p.Challenge) {
		return nil, fmt.Errorf("%w: the challenge is not open", keystore.ErrUnattested)
	}
	caller, err := s.appraise(p.Result, s.now())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnattested, err)
	}
	sum := sha256.Sum256(keystore.Request(s.name, p.Challenge, w, associated))
	if caller.Session == nil || !ecdsa.VerifyASN1(caller.Session, sum[:], p.Signature) {
		return nil, fmt.Errorf("%w: the call is not signed by the session key in the result", keystore.ErrUnattested)
	}
	key, err := s.Store.Unwrap(ctx, w, associated)
	if err != nil {
		return nil, err
	}
	defer key.Destroy()
	sealed, err := keystore.Seal(caller.Recipient, key, keystore.AnswerInfo(s.name, p.Challenge, w, associated))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrUnattested, err)
	}
	return sealed, nil
}
