package vtpm

import (
	"bytes"
	"crypto/sha256"
	"sync"
)

// maxKeys bounds the keys that a Memory remembers, at about two kilobytes each. A
// full one is emptied.
const maxKeys = 1024

// Memory remembers attestation keys that were read and found to be of use, by
// content: a node shows the same one with every quote until its TPM is cleared.
// Whose word stands for a key is in no memory, and asked each time. It may be used
// concurrently. Nil remembers nothing.
type Memory struct {
	mu   sync.Mutex
	keys map[[sha256.Size]byte]*attestationKey // guarded by mu
}

// read is readAK.
func (m *Memory) read(b []byte) (*attestationKey, []string, error) {
	if m == nil {
		return readAK(b)
	}
	id := sha256.Sum256(b)
	m.mu.Lock()
	ak := m.keys[id]
	m.mu.Unlock()
	if ak != nil {
		return ak, nil, nil
	}
	// What others see later must not change with the caller's bytes.
	ak, missing, err := readAK(bytes.Clone(b))
	if err != nil || len(missing) > 0 {
		return ak, missing, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.keys == nil || len(m.keys) >= maxKeys {
		m.keys = map[[sha256.Size]byte]*attestationKey{}
	}
	m.keys[id] = ak
	return ak, nil, nil
}
