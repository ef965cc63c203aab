package seal

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"math/bits"
	"regexp"
)

// Root is the root of a Merkle tree (RFC 6962, section 2.1, over SHA-256):
// "sha256:" and 64 lower-case hex digits.
type Root string

var rootForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

type leaf [sha256.Size]byte

// leafHasher computes leaves without an allocation for each.
type leafHasher struct{ h hash.Hash }

func newLeafHasher() leafHasher { return leafHasher{sha256.New()} }

func (l leafHasher) sum(b []byte, out *leaf) {
	l.h.Reset()
	l.h.Write([]byte{0})
	l.h.Write(b)
	l.h.Sum(out[:0])
}

func merkleRoot(leaves []leaf) Root {
	h := subtree(leaves)
	return Root("sha256:" + hex.EncodeToString(h[:]))
}

func subtree(l []leaf) leaf {
	switch len(l) {
	case 0:
		return sha256.Sum256(nil)
	case 1:
		return l[0]
	}
	// k is the largest power of two below len(l).
	k := 1 << (bits.Len(uint(len(l)-1)) - 1)
	left, right := subtree(l[:k]), subtree(l[k:])
	var b [1 + 2*sha256.Size]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[1+sha256.Size:], right[:])
	return sha256.Sum256(b[:])
}

func checkRoot(r Root) error {
	if !rootForm.MatchString(string(r)) {
		return fmt.Errorf("merkle root %.80q: want sha256: and 64 lower-case hex digits", string(r))
	}
	return nil
}
