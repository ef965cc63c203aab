package receipt

import (
	"crypto/ecdsa"
	"fmt"
)

// LeaseTerms say under what leases a released key may be used. They are part of
// the info that the key is wrapped under, so that a holder that was given other
// terms, or none, cannot open it: nobody on the key's way chooses whose leases
// count or how long they last.
type LeaseTerms struct {
	// Broker is the name under which leases are signed, and Key the id of the key
	// that signs them (RFC 7638 thumbprint, KeyID).
	Broker string `json:"broker"`
	Key    string `json:"key"`
	// Seconds is the longest that any lease of the job may last, and how long the
	// first one does, which counts from the signing of the release request.
	Seconds int64 `json:"seconds"`
}

func (t LeaseTerms) validate() error {
	if t.Broker == "" || t.Key == "" || t.Seconds < seconds(MinLease) || t.Seconds > seconds(MaxLease) {
		return fmt.Errorf("lease terms name a broker, a key and %s to %s", MinLease, MaxLease)
	}
	return nil
}

// LeaseTerms are those of leases that s signs.
func (s *Signer) LeaseTerms(seconds int64) LeaseTerms {
	return LeaseTerms{Broker: s.issuer, Key: s.kid, Seconds: seconds}
}

// LeaseTerms are those that the released key is wrapped under.
func (r Release) LeaseTerms() LeaseTerms {
	return LeaseTerms{Broker: r.Issuer, Key: r.LeaseKey, Seconds: r.LeaseSeconds}
}

// Keys returns the one key of jwks that the terms name.
func (t LeaseTerms) Keys(jwks []byte) (Keys, error) {
	if err := t.validate(); err != nil {
		return Keys{}, err
	}
	all, err := ParseKeys(t.Broker, jwks)
	if err != nil {
		return Keys{}, err
	}
	pub := all.keys[t.Key]
	if pub == nil {
		return Keys{}, fmt.Errorf("the key that signs leases, %.60q, is none of those given for %s", t.Key, t.Broker)
	}
	return Keys{issuer: t.Broker, keys: map[string]*ecdsa.PublicKey{t.Key: pub}}, nil
}
