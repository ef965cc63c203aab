package receipt

import (
	"crypto/sha256"
	"sync"
)

// maxTokens bounds the tokens that a set of keys remembers, at some tens of bytes
// each. A full memory is emptied.
const maxTokens = 4096

// tokens remembers, by content, tokens whose signature was found good. That stays
// so for as long as the keys are the ones to ask: a set with a key less is another
// set, with a memory of its own. What claims say, and until when, is in none.
// Nil remembers nothing.
type tokens struct {
	mu   sync.Mutex
	good map[[sha256.Size]byte]struct{} // guarded by mu
}

func (t *tokens) has(id [sha256.Size]byte) bool {
	if t == nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.good[id]
	return ok
}

func (t *tokens) add(id [sha256.Size]byte) {
	if t == nil {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.good == nil || len(t.good) >= maxTokens {
		t.good = map[[sha256.Size]byte]struct{}{}
	}
	t.good[id] = struct{}{}
}
