package cache

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"math/bits"
	"regexp"

	"github.com/coffer-run/coffer/attest/plan"
)

// The public part of the sealed format, docs/formats/sealed.md. It is written
// here a second time, without keys: the agent may link nothing that opens a
// sealed file.
const (
	manifestName    = "manifest.json"
	manifestVersion = "coffer.run/sealed/v1"
	maxManifest     = 32 << 20
	maxFiles        = 100_000
	headerBlock     = 4096
	tagSize         = 16
	saltSize        = 32
	minChunk        = 64 << 10
	maxChunk        = 16 << 20
	// maxCipherSize keeps offsets and sums of sizes far from overflow: 2^50 bytes
	// are a petabyte.
	maxCipherSize = 1 << 50
)

var rootForm = regexp.MustCompile(`^sha256:[0-9a-f]{64}$`)

// manifest is what a sealed folder's manifest says without a key.
type manifest struct {
	Version   string       `json:"version"`
	Asset     string       `json:"asset"`
	ChunkSize int          `json:"chunkSize"`
	Files     []sealedFile `json:"files"`
	Private   private      `json:"private"`
}

type sealedFile struct {
	ID         string `json:"id"`
	CipherSize int64  `json:"cipherSize"`
	Root       string `json:"merkleRoot"`
}

type private struct {
	Salt       []byte `json:"salt"`
	Commitment []byte `json:"commitment"`
	Ciphertext []byte `json:"ciphertext"`
}

func (f sealedFile) name() string { return f.ID + ".sealed" }

// parseManifest takes bytes whose SHA-384 is digest, which a plan names, and
// checks the form of what they say. A manifest that somebody with the key made
// is no reason to trust its sizes.
func parseManifest(b []byte, digest plan.Digest) (manifest, error) {
	if got := plan.Sum(b); digest.Bytes() == nil || got != digest {
		return manifest{}, fmt.Errorf("its manifest is %s, the plan wants %s", got, digest)
	}
	var m manifest
	if err := plan.Decode(b, maxManifest, &m); err != nil {
		return manifest{}, fmt.Errorf("parse manifest: %w", err)
	}
	if m.Version != manifestVersion {
		return manifest{}, fmt.Errorf("parse manifest: version %.40q: want %q", m.Version, manifestVersion)
	}
	c, err := plan.Canonical(m)
	if err != nil {
		return manifest{}, fmt.Errorf("parse manifest: %w", err)
	}
	if !bytes.Equal(b, c) {
		return manifest{}, errors.New("parse manifest: not in canonical form (RFC 8785)")
	}
	if m.Asset == "" || len(m.Private.Salt) != saltSize {
		return manifest{}, errors.New("parse manifest: no asset, or a salt that is not 32 bytes")
	}
	if m.ChunkSize < minChunk || m.ChunkSize > maxChunk || bits.OnesCount(uint(m.ChunkSize)) != 1 {
		return manifest{}, fmt.Errorf("parse manifest: chunk size %d: want a power of two from %d to %d", m.ChunkSize, minChunk, maxChunk)
	}
	if len(m.Files) == 0 || len(m.Files) > maxFiles {
		return manifest{}, fmt.Errorf("parse manifest: %d files, want 1 to %d", len(m.Files), maxFiles)
	}
	var total int64
	for i, f := range m.Files {
		if f.ID != fmt.Sprintf("%06d", i) {
			return manifest{}, fmt.Errorf("parse manifest: file %d has id %.20q", i, f.ID)
		}
		if !rootForm.MatchString(f.Root) {
			return manifest{}, fmt.Errorf("parse manifest: file %s: merkle root %.80q: want sha256: and 64 lower-case hex digits", f.ID, f.Root)
		}
		if f.CipherSize < headerBlock+tagSize || f.CipherSize > maxCipherSize {
			return manifest{}, fmt.Errorf("parse manifest: file %s: %d bytes is no size of a sealed file", f.ID, f.CipherSize)
		}
		if n, l := chunksOf(f.CipherSize, m.ChunkSize), lastChunk(f.CipherSize, m.ChunkSize); l < tagSize || (l == tagSize && n > 1) {
			return manifest{}, fmt.Errorf("parse manifest: file %s: %d bytes is no size of a sealed file", f.ID, f.CipherSize)
		}
		if total += f.CipherSize; total > maxCipherSize {
			return manifest{}, fmt.Errorf("parse manifest: more than %d bytes in all", int64(maxCipherSize))
		}
	}
	return m, nil
}

// total is the size of all sealed files, in bytes.
func (m manifest) total() int64 {
	var n int64
	for _, f := range m.Files {
		n += f.CipherSize
	}
	return n
}

// chunksOf is how many sealed chunks a file of size bytes has.
func chunksOf(size int64, chunk int) int64 {
	step := int64(chunk) + tagSize
	return (size - headerBlock + step - 1) / step
}

// lastChunk is the length of the last one, its tag included.
func lastChunk(size int64, chunk int) int64 {
	return size - headerBlock - (chunksOf(size, chunk)-1)*(int64(chunk)+tagSize)
}

// leaf is a leaf, or a node, of the Merkle tree over a sealed file: leaf 0 is of
// the header block, leaf i of chunk i-1. No SHA-256 anyone can name is zero, so
// zero stands for one that is not known.
type leaf [sha256.Size]byte

// leafRange is the place of leaf i in a file of size bytes.
func leafRange(i, size int64, chunk int) (off, n int64) {
	if i == 0 {
		return 0, headerBlock
	}
	step := int64(chunk) + tagSize
	off = headerBlock + (i-1)*step
	return off, min(step, size-off)
}

// leafOf hashes a leaf's bytes (RFC 6962, section 2.1).
func leafOf(b []byte) (out leaf) {
	h := sha256.New()
	h.Write([]byte{0})
	h.Write(b)
	h.Sum(out[:0])
	return out
}

func merkleRoot(l []leaf) string {
	h := subtree(l)
	return "sha256:" + hex.EncodeToString(h[:])
}

func subtree(l []leaf) leaf {
	if len(l) == 1 {
		return l[0]
	}
	// The left part is the largest power of two below the whole.
	k := 1 << (bits.Len(uint(len(l)-1)) - 1)
	left, right := subtree(l[:k]), subtree(l[k:])
	var b [1 + 2*sha256.Size]byte
	b[0] = 1
	copy(b[1:], left[:])
	copy(b[1+sha256.Size:], right[:])
	return sha256.Sum256(b[:])
}
