package receipt

import (
	"crypto/sha256"
	"encoding/binary"
	"testing"
)

// What is remembered is bounded, and nobody's memory is nobody's word.
func TestTokensAreBounded(t *testing.T) {
	var m tokens
	id := func(i uint64) [sha256.Size]byte {
		return sha256.Sum256(binary.BigEndian.AppendUint64(nil, i))
	}
	for i := range uint64(3 * maxTokens) {
		if m.has(id(i)) {
			t.Fatal("remembers what it was never told")
		}
		if m.add(id(i)); !m.has(id(i)) {
			t.Fatal("does not remember what it was just told")
		}
		if len(m.good) > maxTokens {
			t.Fatalf("remembers %d, at most %d are allowed", len(m.good), maxTokens)
		}
	}
	var none *tokens
	if none.add(id(1)); none.has(id(1)) {
		t.Error("no memory remembers")
	}
}
