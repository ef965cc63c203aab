package keystore

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// An envelope is what is kept of a wrapped data key:
//
//	"CKW1"
//	store       1 byte length, then the store's name
//	key         1 byte length, then the key's id
//	version     4 bytes, big endian
//	check       32 bytes
//	ciphertext  2 bytes length, big endian, then as much; nothing after it
//
// check is HMAC-SHA-256 under the data key over checkLabel and the binding, which
// is the SHA-256 of bindingLabel, the store's name and the key's id, each with its
// length, and the associated data. The store gets the binding as associated data.
//
// AES-GCM does not commit to its key, and a store may lie: by the check, a data
// key that comes back is the one that went in, for the same associated data, or
// the call fails. It tells nothing of the data key, which is 256 random bits.
const (
	magic        = "CKW1"
	bindingLabel = "coffer/v1 wrapped key\x00"
	checkLabel   = "coffer/v1 wrapped key check\x00"

	// MaxEnvelope bounds an envelope, in bytes.
	MaxEnvelope = len(magic) + 2*(1+MaxName) + 4 + sha256.Size + 2 + MaxCiphertext
)

// Envelope is a wrapped data key and where it was wrapped.
type Envelope struct {
	Store string
	Wrapped
	Check [sha256.Size]byte
}

// Marshal encodes e, which must hold what ParseEnvelope would take.
func (e *Envelope) Marshal() ([]byte, error) {
	if err := errors.Join(CheckName("store's name", e.Store), e.check()); err != nil {
		return nil, fmt.Errorf("encode wrapped key: %w", err)
	}
	b := append([]byte(magic), byte(len(e.Store)))
	b = append(append(b, e.Store...), byte(len(e.Key)))
	b = append(b, e.Key...)
	b = binary.BigEndian.AppendUint32(b, e.Version)
	b = append(b, e.Check[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(e.Ciphertext)))
	return append(b, e.Ciphertext...), nil
}

// ParseEnvelope decodes what Marshal made, and nothing else.
func ParseEnvelope(b []byte) (*Envelope, error) {
	bad := func(err error) error { return fmt.Errorf("wrapped key: not an envelope of a key store: %w", err) }
	if len(b) > MaxEnvelope {
		return nil, bad(fmt.Errorf("%d bytes: want at most %d", len(b), MaxEnvelope))
	}
	rest := b
	short := false
	take := func(n int) []byte {
		if short = short || len(rest) < n; short {
			return make([]byte, n)
		}
		part := rest[:n]
		rest = rest[n:]
		return part
	}
	if string(take(len(magic))) != magic {
		return nil, bad(errors.New("unknown format"))
	}
	e := &Envelope{}
	e.Store = string(take(int(take(1)[0])))
	e.Key = string(take(int(take(1)[0])))
	e.Version = binary.BigEndian.Uint32(take(4))
	copy(e.Check[:], take(sha256.Size))
	e.Ciphertext = slices.Clone(take(int(binary.BigEndian.Uint16(take(2)))))
	switch {
	case short:
		return nil, bad(errors.New("it ends early"))
	case len(rest) > 0:
		return nil, bad(fmt.Errorf("%d bytes after its end", len(rest)))
	}
	if err := errors.Join(CheckName("store's name", e.Store), e.check()); err != nil {
		return nil, bad(err)
	}
	return e, nil
}

// binding is what a store gets as associated data.
func binding(store, key string, associated []byte) []byte {
	h := sha256.New()
	h.Write([]byte(bindingLabel))
	for _, s := range []string{store, key} {
		h.Write([]byte{byte(len(s))})
		h.Write([]byte(s))
	}
	h.Write(associated)
	return h.Sum(nil)
}

func checkOf(key *DataKey, binding []byte) (out [sha256.Size]byte) {
	m := hmac.New(sha256.New, key.Reveal())
	m.Write([]byte(checkLabel))
	m.Write(binding)
	m.Sum(out[:0])
	return out
}

// Named is a store under the name by which its host knows it. It wraps into
// envelopes and opens nothing else.
type Named struct {
	Name  string
	Store Store
	// Prover is set for a store that asks for its caller's attestation.
	Prover Prover
}

// Wrap wraps key under the key named keyID, the store's default if it is empty.
func (n Named) Wrap(ctx context.Context, keyID string, key *DataKey, associated []byte) ([]byte, error) {
	if err := key.check(); err != nil {
		return nil, fmt.Errorf("key store %s: wrap: %w", n.Name, err)
	}
	if err := errors.Join(checkAssociated(associated), CheckName("store's name", n.Name)); err != nil {
		return nil, fmt.Errorf("key store %s: wrap: %w", n.Name, err)
	}
	if keyID == "" {
		info, err := n.Info(ctx)
		if err != nil {
			return nil, err
		}
		keyID = info.Keys[0].ID
	}
	if err := CheckName("key's id", keyID); err != nil {
		return nil, fmt.Errorf("key store %s: wrap: %w", n.Name, err)
	}
	bound := binding(n.Name, keyID, associated)
	w, err := n.Store.Wrap(ctx, keyID, key, bound)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", n.Name, err)
	}
	if err := n.opens(ctx, w, bound, checkOf(key, bound)); err != nil {
		return nil, fmt.Errorf("key store %s: what was wrapped under %s: %w", n.Name, keyID, err)
	}
	e := Envelope{Store: n.Name, Wrapped: *w, Check: checkOf(key, bound)}
	return e.Marshal()
}

// Unwrap opens what Wrap or Rewrap made, for the same associated data.
func (n Named) Unwrap(ctx context.Context, envelope, associated []byte) (*DataKey, error) {
	key, _, err := n.UnwrapAttested(ctx, envelope, associated)
	return key, err
}

// UnwrapAttested is Unwrap, and returns the attestation result that the store was
// shown; empty if it asked for none.
func (n Named) UnwrapAttested(ctx context.Context, envelope, associated []byte) (*DataKey, string, error) {
	e, bound, err := n.open(envelope, associated)
	if err != nil {
		return nil, "", err
	}
	key, result, err := n.unwrap(ctx, &e.Wrapped, bound, e.Check)
	if err != nil {
		return nil, "", fmt.Errorf("key store %s: %w", n.Name, err)
	}
	return key, result, nil
}

// Rewrap returns the same data key under the newest version of its key, once it
// has seen that this opens: what it replaces may be the only other copy.
func (n Named) Rewrap(ctx context.Context, envelope, associated []byte) ([]byte, error) {
	e, bound, err := n.open(envelope, associated)
	if err != nil {
		return nil, err
	}
	w, err := n.Store.Rewrap(ctx, &e.Wrapped, bound)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", n.Name, err)
	}
	if w.Key != e.Key || w.Version < e.Version {
		return nil, fmt.Errorf("key store %s: rewrap under %s version %d: answer names %s version %d", n.Name, e.Key, e.Version, w.Key, w.Version)
	}
	if err := n.opens(ctx, w, bound, e.Check); err != nil {
		return nil, fmt.Errorf("key store %s: what was rewrapped under %s: %w", n.Name, e.Key, err)
	}
	out := Envelope{Store: n.Name, Wrapped: *w, Check: e.Check}
	return out.Marshal()
}

// Info describes the store, which must go by its name.
func (n Named) Info(ctx context.Context) (*Info, error) {
	i, err := n.Store.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", n.Name, err)
	}
	if i.Name != n.Name {
		return nil, fmt.Errorf("key store %s: it says that it is %s", n.Name, i.Name)
	}
	return i, nil
}

func (n Named) open(envelope, associated []byte) (*Envelope, []byte, error) {
	e, err := ParseEnvelope(envelope)
	if err != nil {
		return nil, nil, fmt.Errorf("key store %s: %w", n.Name, err)
	}
	if e.Store != n.Name {
		return nil, nil, fmt.Errorf("key store %s: %w: it was wrapped by %s", n.Name, ErrMismatch, e.Store)
	}
	if err := checkAssociated(associated); err != nil {
		return nil, nil, fmt.Errorf("key store %s: %w", n.Name, err)
	}
	return e, binding(e.Store, e.Key, associated), nil
}

func (n Named) unwrap(ctx context.Context, w *Wrapped, bound []byte, check [sha256.Size]byte) (key *DataKey, result string, err error) {
	if n.Prover == nil {
		key, err = n.Store.Unwrap(ctx, w, bound)
	} else {
		key, result, err = UnwrapAs(ctx, n.Store, n.Prover, n.Name, w, bound)
	}
	if err != nil {
		return nil, "", err
	}
	if got := checkOf(key, bound); !hmac.Equal(got[:], check[:]) {
		key.Destroy()
		return nil, "", fmt.Errorf("%w: the store's answer is another key", ErrMismatch)
	}
	return key, result, nil
}

func (n Named) opens(ctx context.Context, w *Wrapped, bound []byte, check [sha256.Size]byte) error {
	key, _, err := n.unwrap(ctx, w, bound, check)
	if err != nil {
		return err
	}
	key.Destroy()
	return nil
}
