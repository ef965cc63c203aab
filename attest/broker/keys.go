package broker

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"

	"github.com/coffer-run/coffer/attest/receipt"
)

// DataKeySize is the size of every data key, in bytes.
const DataKeySize = 32

// KEKSize is the size of a local key-encryption key, in bytes.
const KEKSize = 32

const redacted = "[data key]"

// DataKey is a key under which an asset is sealed. Whoever gets one destroys it.
type DataKey struct {
	_ [0]func() // not comparable: == on secrets leaks by its timing
	b []byte
}

// NewDataKey takes over b, which must have DataKeySize bytes and belongs to the
// key from then on.
func NewDataKey(b []byte) (*DataKey, error) {
	if len(b) != DataKeySize {
		return nil, fmt.Errorf("data key has %d bytes, want %d", len(b), DataKeySize)
	}
	return &DataKey{b: b}, nil
}

// GenerateDataKey makes a random key.
func GenerateDataKey() *DataKey {
	b := make([]byte, DataKeySize)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return &DataKey{b: b}
}

// Reveal returns the key's bytes, which stay the key's and are gone once it is
// destroyed. It is for wrapping alone.
func (k *DataKey) Reveal() []byte { return k.b }

// Destroy overwrites the key.
func (k *DataKey) Destroy() {
	if k != nil {
		clear(k.b)
		k.b = nil
	}
}

// String, GoString, Format, LogValue and MarshalJSON keep a key out of texts.
func (k *DataKey) String() string { return redacted }

// GoString redacts %#v.
func (k *DataKey) GoString() string { return redacted }

// Format redacts every verb.
func (k *DataKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue redacts slog attributes.
func (k *DataKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON refuses: nothing encodes a data key.
func (k *DataKey) MarshalJSON() ([]byte, error) {
	return nil, errors.New("a data key has no encoding")
}

// ErrKeyDisabled is a KeyStore's word that whoever owns the key-encryption key
// has disabled or removed it. It is an answer: asking again gets the same one
// until the owner enables the key.
var ErrKeyDisabled = errors.New("key is disabled by its owner")

// keyStore names the asset's key store in a message.
func (a Asset) keyStore() string {
	if a.KeyStore == "" {
		return "the broker's own key store"
	}
	return "key store " + a.KeyStore
}

// KeyStore wraps data keys under a key that it keeps.
//
// Wrap MUST bind associated: Unwrap with other associated data, or of changed
// bytes, MUST fail. Unwrap MUST return exactly the key that was wrapped or an
// error. Both MUST be safe for concurrent use and SHOULD respect ctx. Any error but
// ErrKeyDisabled is taken for a passing one, never for an answer.
type KeyStore interface {
	Wrap(ctx context.Context, key *DataKey, associated []byte) ([]byte, error)
	Unwrap(ctx context.Context, wrapped, associated []byte) (*DataKey, error)
}

// Keeper is a KeyStore that says where it had a key.
type Keeper interface {
	KeyStore
	// UnwrapHeld is Unwrap, and names the store and the version of the key.
	UnwrapHeld(ctx context.Context, wrapped, associated []byte) (*DataKey, receipt.Held, error)
}

// ownStore is what a receipt calls the store of a broker's own key-encryption key.
const ownStore = "broker"

// LocalKeys is a KeyStore over a key-encryption key in memory: AES-256-GCM with
// random nonces, good for 2^32 keys (NIST SP 800-38D, section 8.3).
type LocalKeys struct {
	aead cipher.AEAD
	id   [8]byte
}

// localVersion is the first byte of what LocalKeys wraps.
const localVersion = 1

// NewLocalKeys returns a store under kek, which the caller may clear afterwards.
func NewLocalKeys(kek []byte) (*LocalKeys, error) {
	if len(kek) != KEKSize {
		return nil, fmt.Errorf("key-encryption key has %d bytes, want %d", len(kek), KEKSize)
	}
	block, err := aes.NewCipher(kek)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("key-encryption key: %w", err)
	}
	l := &LocalKeys{aead: aead}
	// GCM does not commit to its key: the name of the key in front of the
	// ciphertext, also authenticated, tells a wrong key from changed bytes.
	sum := sha256.Sum256(append([]byte("coffer/v1 kek id\x00"), kek...))
	copy(l.id[:], sum[:])
	return l, nil
}

// Wrap encrypts key: version, key id, nonce, ciphertext.
func (l *LocalKeys) Wrap(_ context.Context, key *DataKey, associated []byte) ([]byte, error) {
	if key == nil || len(key.b) != DataKeySize {
		return nil, errors.New("wrap: no data key")
	}
	head := l.head()
	out := append(make([]byte, 0, len(head)+l.aead.NonceSize()+DataKeySize+l.aead.Overhead()), head...)
	nonce := make([]byte, l.aead.NonceSize())
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	out = append(out, nonce...)
	return l.aead.Seal(out, nonce, key.b, append(head, associated...)), nil
}

// held names the one key of the store, by the first 8 bytes of a SHA-256 over it.
func (l *LocalKeys) held() *receipt.Held {
	return &receipt.Held{Store: ownStore, Key: hex.EncodeToString(l.id[:])}
}

// Unwrap decrypts what Wrap made.
func (l *LocalKeys) Unwrap(_ context.Context, wrapped, associated []byte) (*DataKey, error) {
	head := l.head()
	if len(wrapped) != len(head)+l.aead.NonceSize()+DataKeySize+l.aead.Overhead() || wrapped[0] != localVersion {
		return nil, errors.New("unwrap: not a key that this store wrapped")
	}
	if string(wrapped[:len(head)]) != string(head) {
		return nil, errors.New("unwrap: wrapped under another key-encryption key")
	}
	body := wrapped[len(head):]
	b, err := l.aead.Open(nil, body[:l.aead.NonceSize()], body[l.aead.NonceSize():], append(head, associated...))
	if err != nil {
		return nil, errors.New("unwrap: wrapped key does not open")
	}
	return NewDataKey(b)
}

func (l *LocalKeys) head() []byte { return append([]byte{localVersion}, l.id[:]...) }
