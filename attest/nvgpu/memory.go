package nvgpu

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

const maxRemembered = 1024

// Memory remembers, by content, manifests and certificate statuses whose
// signatures were found good, so that each is verified once. Nothing that
// depends on time or on anchors is in it. It may be used by many at once. A nil
// Memory remembers nothing.
type Memory struct {
	mu       sync.Mutex
	rims     map[contentKey]*rim    // guarded by mu; what it points to never changes
	statuses map[contentKey]*status // guarded by mu; what it points to never changes
}

// NewMemory returns an empty memory.
func NewMemory() *Memory {
	return &Memory{rims: map[contentKey]*rim{}, statuses: map[contentKey]*status{}}
}

type contentKey [sha256.Size]byte

func keyOf(parts ...[]byte) contentKey {
	h := sha256.New()
	for _, p := range parts {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	return contentKey(h.Sum(nil))
}

func (m *Memory) rim(b []byte) (*rim, error) {
	if m == nil || len(b) > maxRIM {
		return parseRIM(b)
	}
	return remember(&m.mu, m.rims, keyOf(b), func() (*rim, error) { return parseRIM(b) })
}

// remember returns what is known under key, or verifies it. It verifies nothing while
// it holds mu: two callers may do the same work, none waits for another's.
func remember[V any](mu *sync.Mutex, known map[contentKey]*V, key contentKey, verify func() (*V, error)) (*V, error) {
	mu.Lock()
	v, ok := known[key]
	mu.Unlock()
	if ok {
		return v, nil
	}
	v, err := verify()
	if err != nil {
		return nil, err
	}
	mu.Lock()
	defer mu.Unlock()
	if len(known) >= maxRemembered {
		clear(known)
	}
	known[key] = v
	return v, nil
}
