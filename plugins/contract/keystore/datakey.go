package keystore

import (
	"errors"
	"fmt"
	"log/slog"
)

// DataKeySize is the size of every data key, in bytes.
const DataKeySize = 32

const redacted = "[data key]"

// DataKey is a key under which data is sealed. Whoever gets one destroys it.
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

// Reveal returns the key's bytes, which stay the key's and are gone once it is
// destroyed.
func (k *DataKey) Reveal() []byte {
	if k == nil {
		return nil
	}
	return k.b
}

// Destroy overwrites the key.
func (k *DataKey) Destroy() {
	if k != nil {
		clear(k.b)
		k.b = nil
	}
}

// Format redacts every verb.
func (k *DataKey) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// LogValue redacts slog attributes.
func (k *DataKey) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON refuses: nothing encodes a data key.
func (k *DataKey) MarshalJSON() ([]byte, error) {
	return nil, errors.New("a data key has no encoding")
}

func (k *DataKey) check() error {
	if len(k.Reveal()) != DataKeySize {
		return fmt.Errorf("data key has %d bytes, want %d", len(k.Reveal()), DataKeySize)
	}
	return nil
}
