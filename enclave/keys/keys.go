// Package keys holds a job's secrets: data keys, the recipient key to which they
// are wrapped, and the session key that signs for the job.
//
// Trusted: this process's memory. Checked: the form of everything that is signed,
// so that no signature can pass for another kind's. Not checked: who asked; the
// holder's socket decides that.
package keys

import (
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
)

// DataKeySize is the size of a data key, in bytes.
const DataKeySize = 32

const redacted = "[data key]"

// DataKey is the key under which one asset is sealed. It prints as a fixed text
// and cannot be compared with ==. The zero value and a destroyed key refuse.
type DataKey struct {
	_  [0]func()
	mu sync.RWMutex
	// b is nil when there is no key.
	b []byte
}

var errNoKey = errors.New("data key is empty or destroyed")

// GenerateDataKey returns a new random data key.
func GenerateDataKey() *DataKey {
	k := &DataKey{b: make([]byte, DataKeySize)}
	// crypto/rand.Read never returns an error: it ends the process instead.
	_, _ = rand.Read(k.b)
	return k
}

// NewDataKey copies b, which must be DataKeySize bytes long.
func NewDataKey(b []byte) (*DataKey, error) {
	if len(b) != DataKeySize {
		return nil, fmt.Errorf("data key of %d bytes: want %d", len(b), DataKeySize)
	}
	return &DataKey{b: append([]byte(nil), b...)}, nil
}

// Derive returns n bytes by HKDF-SHA256 (RFC 5869) under salt and info.
func (k *DataKey) Derive(salt []byte, info string, n int) ([]byte, error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.b == nil {
		return nil, errNoKey
	}
	out, err := hkdf.Key(sha256.New, k.b, salt, info, n)
	if err != nil {
		return nil, fmt.Errorf("derive key: %w", err)
	}
	return out, nil
}

// Wrap seals the key to an HPKE public key under info and aad.
func (k *DataKey) Wrap(publicKey, info, aad []byte) (enc, ciphertext []byte, err error) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.b == nil {
		return nil, nil, errNoKey
	}
	pub, err := hpke.MLKEM768X25519().NewPublicKey(publicKey)
	if err != nil {
		return nil, nil, fmt.Errorf("wrap data key: recipient key: %w", err)
	}
	enc, s, err := hpke.NewSender(pub, hpke.HKDFSHA256(), hpke.AES256GCM(), info)
	if err != nil {
		return nil, nil, fmt.Errorf("wrap data key: %w", err)
	}
	if ciphertext, err = s.Seal(aad, k.b); err != nil {
		return nil, nil, fmt.Errorf("wrap data key: %w", err)
	}
	return enc, ciphertext, nil
}

// Equal says in constant time whether both are the same key. A missing key
// equals nothing.
func (k *DataKey) Equal(o *DataKey) bool {
	if k == o {
		return k.Present()
	}
	k.mu.RLock()
	defer k.mu.RUnlock()
	o.mu.RLock()
	defer o.mu.RUnlock()
	return k.b != nil && o.b != nil && subtle.ConstantTimeCompare(k.b, o.b) == 1
}

// Present says whether there is a key.
func (k *DataKey) Present() bool {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.b != nil
}

// Destroy overwrites the key. Subkeys derived from it live on in their ciphers.
func (k *DataKey) Destroy() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.b)
	k.b = nil
}

// String redacts.
func (*DataKey) String() string { return redacted }

// GoString redacts.
func (*DataKey) GoString() string { return redacted }

// Format redacts under every verb.
func (*DataKey) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// MarshalText refuses: a data key leaves only wrapped.
func (*DataKey) MarshalText() ([]byte, error) { return nil, errors.New("a data key has no text form") }

// LogValue redacts.
func (*DataKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// Recipient is the HPKE key pair of one job to which data keys are wrapped:
// ML-KEM-768+X25519, HKDF-SHA256, AES-256-GCM. The private half never leaves.
type Recipient struct {
	_    [0]func()
	mu   sync.Mutex
	priv hpke.PrivateKey
	pub  []byte
}

// GenerateRecipient returns a new key pair.
func GenerateRecipient() (*Recipient, error) {
	priv, err := hpke.MLKEM768X25519().GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("generate recipient key: %w", err)
	}
	return &Recipient{priv: priv, pub: priv.PublicKey().Bytes()}, nil
}

// Public returns the serialized public key (RFC 9180, section 4).
func (r *Recipient) Public() []byte { return append([]byte(nil), r.pub...) }

// Open unwraps a data key. All failures of the cipher read the same.
func (r *Recipient) Open(enc, ciphertext, info, aad []byte) (*DataKey, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.priv == nil {
		return nil, errors.New("open data key: recipient key is empty or destroyed")
	}
	rec, err := hpke.NewRecipient(enc, r.priv, hpke.HKDFSHA256(), hpke.AES256GCM(), info)
	if err != nil {
		return nil, errors.New("open data key: not wrapped to this recipient for this release")
	}
	b, err := rec.Open(aad, ciphertext)
	if err != nil {
		return nil, errors.New("open data key: not wrapped to this recipient for this release")
	}
	defer clear(b)
	return NewDataKey(b)
}

// Destroy forgets the private key. The standard library gives no way to
// overwrite it; the holder's memory is locked and goes back to the kernel when
// the holder ends.
func (r *Recipient) Destroy() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.priv = nil
}

// Format redacts under every verb.
func (*Recipient) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[recipient key]") }

// LogValue redacts.
func (*Recipient) LogValue() slog.Value { return slog.StringValue("[recipient key]") }
