package keystore

import (
	"context"
	"crypto/hpke"
	"encoding/binary"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	keystorev1 "github.com/coffer-run/coffer/plugins/contract/keystore/v1"
)

const (
	// ChallengeSize is the size of a store's challenge, in bytes.
	ChallengeSize = 32
	// MaxResult bounds an attestation result, in bytes.
	MaxResult = 48 << 10

	maxSignature = 128
	maxSealed    = 2 << 10
	proofLabel   = "coffer/v1 key store proof\x00"
	answerLabel  = "coffer/v1 key store answer\x00"
)

// ErrUnattested means that the store asks who calls it, and was not told or does
// not accept what it was told.
var ErrUnattested = errors.New("key store asks for its caller's attestation")

// Proof says who calls a store.
type Proof struct {
	// Result is an attestation result (EAR) of the caller's machine, for this store.
	Result string
	// Challenge is the store's, and Signature one over Request by the session key
	// that the result confirms: ECDSA P-256 over SHA-256, ASN.1.
	Challenge, Signature []byte
}

// Sealed is a data key, sealed to the recipient key that a result confirms: HPKE
// (RFC 9180) with ML-KEM-768+X25519, HKDF-SHA256 and AES-256-GCM, and AnswerInfo
// as info.
type Sealed struct{ Enc, Ciphertext []byte }

// AttestedStore is a Store that asks who calls before it unwraps. Its Unwrap MUST
// fail with ErrUnattested. UnwrapFor MUST fail with ErrUnattested unless the proof
// is over a challenge of this store's that was not used before, and its result is
// one that the store's owner accepts. Wrap and Rewrap show nothing to the caller
// and ask for no proof.
type AttestedStore interface {
	Store
	Challenge(ctx context.Context) ([]byte, error)
	UnwrapFor(ctx context.Context, w *Wrapped, associated []byte, p Proof) (*Sealed, error)
}

// Prover proves to a store what its caller is. Implementations MUST be safe for
// concurrent use.
type Prover interface {
	// Prove returns a result for the store of that name and a signature over
	// message by the session key in it. fresh asks for a result that was not
	// handed out before.
	Prove(ctx context.Context, store string, message []byte, fresh bool) (result string, signature []byte, err error)
	// Open opens what was sealed to the recipient key in the result.
	Open(s *Sealed, info []byte) ([]byte, error)
}

// Request is what a proof's signature is over: one call of UnwrapFor of one store.
func Request(store string, challenge []byte, w *Wrapped, associated []byte) []byte {
	return fields(proofLabel, store, challenge, w, associated)
}

// AnswerInfo is the HPKE info of the answer to that call: an answer to another one
// does not open.
func AnswerInfo(store string, challenge []byte, w *Wrapped, associated []byte) []byte {
	return fields(answerLabel, store, challenge, w, associated)
}

// fields precedes each field by its length, 4 bytes, big endian.
func fields(label, store string, challenge []byte, w *Wrapped, associated []byte) []byte {
	out := []byte(label)
	version := binary.BigEndian.AppendUint32(nil, w.Version)
	for _, f := range [][]byte{[]byte(store), challenge, []byte(w.Key), version, w.Ciphertext, associated} {
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(f))), f...) // #nosec G115 -- bounded by the contract
	}
	return out
}

// Seal seals key for the caller with the given recipient key.
func Seal(recipient []byte, key *DataKey, info []byte) (*Sealed, error) {
	pub, err := hpke.MLKEM768X25519().NewPublicKey(recipient)
	if err != nil {
		return nil, fmt.Errorf("recipient key: %w", err)
	}
	enc, s, err := hpke.NewSender(pub, hpke.HKDFSHA256(), hpke.AES256GCM(), info)
	if err != nil {
		return nil, err
	}
	ct, err := s.Seal(nil, key.Reveal())
	return &Sealed{enc, ct}, err
}

// Open opens what Seal made.
func Open(key hpke.PrivateKey, s *Sealed, info []byte) ([]byte, error) {
	r, err := hpke.NewRecipient(s.Enc, key, hpke.HKDFSHA256(), hpke.AES256GCM(), info)
	if err != nil {
		return nil, err
	}
	return r.Open(nil, s.Ciphertext)
}

// UnwrapAs asks s for a data key as a caller that proves what it is, and returns
// the result that it was shown. A store that does not accept the result is asked
// once more with a fresh one: results end.
func UnwrapAs(ctx context.Context, s Store, p Prover, name string, w *Wrapped, associated []byte) (*DataKey, string, error) {
	a, ok := s.(AttestedStore)
	if !ok {
		return nil, "", errors.New("it cannot be told what its caller is")
	}
	var err error
	for _, fresh := range []bool{false, true} {
		var key *DataKey
		var result string
		if key, result, err = attestedOnce(ctx, a, p, name, w, associated, fresh); !errors.Is(err, ErrUnattested) {
			return key, result, err
		}
	}
	return nil, "", err
}

func attestedOnce(ctx context.Context, a AttestedStore, p Prover, name string, w *Wrapped, associated []byte, fresh bool) (*DataKey, string, error) {
	challenge, err := a.Challenge(ctx)
	if err != nil {
		return nil, "", err
	}
	result, signature, err := p.Prove(ctx, name, Request(name, challenge, w, associated), fresh)
	if err != nil {
		return nil, "", fmt.Errorf("attest: %w", err)
	}
	sealed, err := a.UnwrapFor(ctx, w, associated, Proof{Result: result, Challenge: challenge, Signature: signature})
	if err != nil {
		return nil, "", err
	}
	b, err := p.Open(sealed, AnswerInfo(name, challenge, w, associated))
	if err != nil {
		return nil, "", fmt.Errorf("%w: the answer is sealed to another key, or for another call", ErrMismatch)
	}
	key, err := NewDataKey(b)
	return key, result, err
}

func (s *server) Challenge(ctx context.Context, _ *keystorev1.ChallengeRequest) (*keystorev1.ChallengeResponse, error) {
	a, ok := s.impl.(AttestedStore)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "the store asks for no attestation")
	}
	c, err := a.Challenge(ctx)
	if err != nil {
		return nil, toWire(ctx, err)
	}
	return &keystorev1.ChallengeResponse{Challenge: c}, nil
}

func (s *server) UnwrapFor(ctx context.Context, req *keystorev1.UnwrapForRequest) (*keystorev1.UnwrapForResponse, error) {
	a, ok := s.impl.(AttestedStore)
	if !ok {
		return nil, status.Error(codes.Unimplemented, "the store asks for no attestation")
	}
	w, p := wrapped(req.GetWrapped()), req.GetProof()
	err := errors.Join(w.check(), checkAssociated(req.GetAssociated()))
	if len(p.GetResult()) > MaxResult || len(p.GetChallenge()) != ChallengeSize || len(p.GetSignature()) > maxSignature {
		err = errors.Join(err, errors.New("proof has a part of a wrong size"))
	}
	if err != nil {
		return nil, invalid(err)
	}
	sealed, err := a.UnwrapFor(ctx, w, req.GetAssociated(), Proof{Result: p.GetResult(), Challenge: p.GetChallenge(), Signature: p.GetSignature()})
	if err != nil {
		return nil, toWire(ctx, err)
	}
	return &keystorev1.UnwrapForResponse{Enc: sealed.Enc, Ciphertext: sealed.Ciphertext}, nil
}

// Challenge implements AttestedStore.
func (c *client) Challenge(ctx context.Context) ([]byte, error) {
	resp, err := c.c.Challenge(ctx, &keystorev1.ChallengeRequest{}, limit())
	if err != nil {
		return nil, fmt.Errorf("key store challenge: %w", fromWire(err))
	}
	if len(resp.GetChallenge()) != ChallengeSize {
		return nil, fmt.Errorf("key store challenge has %d bytes: want %d", len(resp.GetChallenge()), ChallengeSize)
	}
	return resp.GetChallenge(), nil
}

// UnwrapFor implements AttestedStore.
func (c *client) UnwrapFor(ctx context.Context, w *Wrapped, associated []byte, p Proof) (*Sealed, error) {
	if err := errors.Join(w.check(), checkAssociated(associated)); err != nil {
		return nil, fmt.Errorf("unwrap: %w", err)
	}
	resp, err := c.c.UnwrapFor(ctx, &keystorev1.UnwrapForRequest{
		Wrapped: w.toWire(), Associated: associated, Proof: &keystorev1.Proof{Result: p.Result, Challenge: p.Challenge, Signature: p.Signature},
	}, limit())
	if err != nil {
		return nil, fmt.Errorf("unwrap under %s: %w", w.Key, fromWire(err))
	}
	if len(resp.GetEnc()) > maxSealed || len(resp.GetCiphertext()) > maxSealed {
		return nil, fmt.Errorf("unwrap under %s: answer of %d and %d bytes", w.Key, len(resp.GetEnc()), len(resp.GetCiphertext()))
	}
	return &Sealed{resp.GetEnc(), resp.GetCiphertext()}, nil
}
