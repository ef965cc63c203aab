package verifier

import (
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/go-jose/go-jose/v4"

	"github.com/coffer-run/coffer/attest/receipt"
)

// maxKeys bounds the keys of one kind that a verifier has at a time.
const maxKeys = 8

// Keys are the keys of a verifier. Those that replicas share change in steps,
// such that no step outruns a replica or a relying party that is a step behind:
// first a key is added behind the one in use, then it is put first, and when
// nothing counts any more that the old one made, that one is taken away.
type Keys struct {
	// Signer signs results and credentials under the verifier's name.
	Signer *receipt.Signer
	// Published are the public keys that are published beside the signer's: of
	// those that sign next, and of those that signed what still counts, which is
	// receipt.ResultLifetime for results and vtpm.CredentialLifetime for
	// credentials.
	Published []*ecdsa.PublicKey
	// NonceKeys authenticate nonces and seal enrolments. New ones are made under
	// the first; all are accepted.
	NonceKeys [][]byte
}

// keySet is Keys made ready. It is not changed once made.
type keySet struct {
	signer  *receipt.Signer
	public  receipt.Keys
	jwks    []byte
	ids     map[string]bool // of the public keys
	current string          // id of the signer's
	nonces  [][]byte
	sealing [][]byte
}

func newKeySet(id string, k Keys) (*keySet, error) {
	switch {
	case k.Signer == nil:
		return nil, errors.New("no signing key")
	case k.Signer.Issuer() != id:
		return nil, fmt.Errorf("signs as %q, is named %q", k.Signer.Issuer(), id)
	case len(k.NonceKeys) == 0:
		return nil, errors.New("no nonce key")
	case len(k.NonceKeys) > maxKeys || len(k.Published) >= maxKeys:
		return nil, fmt.Errorf("more than %d keys of one kind", maxKeys)
	}
	s := &keySet{signer: k.Signer, ids: map[string]bool{}}
	if err := s.publish(id, k.Published); err != nil {
		return nil, err
	}
	for _, key := range k.NonceKeys {
		if len(key) != NonceKeySize {
			return nil, fmt.Errorf("nonce key of %d bytes: want %d", len(key), NonceKeySize)
		}
		// One key in the file, two uses: each gets a key of its own.
		n, err := hkdf.Key(sha256.New, key, nil, "coffer/v1 nonce", 32)
		if err != nil {
			return nil, err
		}
		e, err := hkdf.Key(sha256.New, key, nil, "coffer/v1 enrolment", 32)
		if err != nil {
			return nil, err
		}
		if holds(s.nonces, n) {
			return nil, errors.New("a nonce key is given twice")
		}
		s.nonces, s.sealing = append(s.nonces, n), append(s.sealing, e)
	}
	return s, nil
}

// publish makes the JSON Web Key Set, the signer's key first.
func (s *keySet) publish(id string, more []*ecdsa.PublicKey) error {
	own, err := s.signer.JWKS()
	if err != nil {
		return err
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal(own, &set); err != nil {
		return err
	}
	s.current = set.Keys[0].KeyID
	s.ids[s.current] = true
	for _, pub := range more {
		if pub == nil || pub.Curve.Params().BitSize != 384 {
			return errors.New("a published key is not on P-384")
		}
		kid, err := receipt.KeyID(pub)
		if err != nil {
			return err
		}
		if s.ids[kid] {
			return fmt.Errorf("key %s is given twice", kid)
		}
		s.ids[kid] = true
		set.Keys = append(set.Keys, jose.JSONWebKey{Key: pub, KeyID: kid, Algorithm: string(jose.ES384), Use: "sig"})
	}
	if s.jwks, err = json.Marshal(set); err != nil {
		return err
	}
	s.public, err = receipt.ParseKeys(id, s.jwks)
	return err
}

func holds(keys [][]byte, key []byte) bool {
	for _, k := range keys {
		if hmac.Equal(k, key) {
			return true
		}
	}
	return false
}

// follows says what keeps next from being the step after these keys: somebody who
// is one step behind could not follow. The key that is to sign must have been
// published before, and the one that signed stays published; the first nonce key
// must have been accepted before, and the one that was first stays accepted. To be
// rid of a key at once, start again without it.
func (s *keySet) follows(next *keySet) error {
	switch {
	case !s.ids[next.current]:
		return errors.New("the new signing key was not published before: publish it first, and let relying parties fetch it")
	case !next.ids[s.current]:
		return errors.New("the key that signs now would not be published any more, and its results would not verify")
	case !holds(s.nonces, next.nonces[0]):
		return errors.New("the new first nonce key was not accepted before: other replicas may not have it")
	case !holds(next.nonces, s.nonces[0]):
		return errors.New("nonces that were just made would not be accepted any more")
	}
	return nil
}
