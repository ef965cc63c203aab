package translog

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/transparency-dev/formats/log"
	cosignature "github.com/transparency-dev/formats/note"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"
	"golang.org/x/mod/sumdb/note"
)

const (
	// MaxCheckpoint bounds a signed checkpoint, in bytes.
	MaxCheckpoint = 16 << 10
	// MaxProofHashes bounds one proof: a tree of 2^64 entries is 64 levels high,
	// and a consistency proof has one hash more.
	MaxProofHashes = 65
)

// KeyName is the name of the key that signs a broker's checkpoints, and their
// origin (C2SP tlog-checkpoint).
func KeyName(broker string) string { return broker + "/log" }

// Trust is whose signatures count on a checkpoint. The zero value trusts nobody.
type Trust struct {
	log       note.Verifier
	witnesses []note.Verifier
	quorum    int
}

// NewTrust reads verifier keys (C2SP signed-note, NAME+HASH+KEY): that of the
// log, and those of witnesses, at least quorum of whom must have cosigned for a
// checkpoint to count as witnessed. Without witnesses quorum is 0, and no
// checkpoint counts as witnessed.
func NewTrust(logKey string, witnessKeys []string, quorum int) (Trust, error) {
	v, err := note.NewVerifier(strings.TrimSpace(logKey))
	if err != nil {
		return Trust{}, fmt.Errorf("log key %.80q: %w", logKey, err)
	}
	t := Trust{log: v, quorum: quorum}
	seen := map[string]bool{keyOf(logKey): true}
	for _, k := range witnessKeys {
		w, err := cosignature.NewVerifierForCosignatureV1(strings.TrimSpace(k))
		if err != nil {
			return Trust{}, fmt.Errorf("witness key %.80q: %w", k, err)
		}
		// Two names of one key are one witness, and the log is none of its own.
		if seen[keyOf(k)] || slices.ContainsFunc(t.witnesses, func(o note.Verifier) bool { return o.Name() == w.Name() }) {
			return Trust{}, fmt.Errorf("witness %s: its key or name is the log's or another witness's", w.Name())
		}
		seen[keyOf(k)] = true
		t.witnesses = append(t.witnesses, w)
	}
	if quorum < 0 || quorum > len(t.witnesses) || (quorum == 0 && len(t.witnesses) > 0) {
		return Trust{}, fmt.Errorf("quorum of %d out of %d witnesses", quorum, len(t.witnesses))
	}
	return t, nil
}

// PublicKey returns the verifier key of a private key, both in the form of C2SP
// signed-note.
func PublicKey(private string) (string, error) {
	// PRIVATE+KEY+NAME+HASH+KEY: the key is a byte for Ed25519 and a seed.
	parts := strings.SplitN(strings.TrimSpace(private), "+", 5)
	if len(parts) != 5 {
		return "", errors.New("not a private key in the form of C2SP signed-note")
	}
	key, err := base64.StdEncoding.DecodeString(parts[4])
	if err != nil || len(key) != 1+ed25519.SeedSize || key[0] != 1 {
		return "", errors.New("not an Ed25519 private key in the form of C2SP signed-note")
	}
	pub, ok := ed25519.NewKeyFromSeed(key[1:]).Public().(ed25519.PublicKey)
	if !ok {
		return "", errors.New("no public key")
	}
	return note.NewEd25519VerifierKey(parts[2], pub)
}

// keyOf is the key of NAME+HASH+KEY without the byte that says what it is for.
func keyOf(vkey string) string {
	_, rest, _ := strings.Cut(strings.TrimSpace(vkey), "+")
	_, key, _ := strings.Cut(rest, "+")
	raw, err := base64.StdEncoding.DecodeString(key)
	if err != nil || len(raw) == 0 {
		return vkey
	}
	return string(raw[1:])
}

// Origin is the name of the log whose checkpoints t opens.
func (t Trust) Origin() string {
	if t.log == nil {
		return ""
	}
	return t.log.Name()
}

// Quorum is how many of how many witnesses must have cosigned.
func (t Trust) Quorum() (quorum, witnesses int) { return t.quorum, len(t.witnesses) }

// Cosignature says that a witness has seen a checkpoint follow all that it saw
// of the log before.
type Cosignature struct {
	Witness string
	Time    time.Time
}

// Checkpoint is a state of a log's Merkle tree (RFC 6962), signed by the log.
type Checkpoint struct {
	Origin string
	Size   uint64
	Root   []byte
	// Cosigned is by whom of the trusted witnesses.
	Cosigned []Cosignature
	// Witnessed is whether a quorum of them did.
	Witnessed bool
}

// Open checks a signed checkpoint: the log's signature, its origin, its form, and
// each trusted witness's cosignature that it bears (C2SP tlog-checkpoint,
// tlog-cosignature). A trusted key's signature that does not hold is an error; one
// by an unknown key is passed over. Extension lines are refused: this log writes none.
func (t Trust) Open(raw []byte) (Checkpoint, error) {
	if t.log == nil {
		return Checkpoint{}, errors.New("open checkpoint: no log key is trusted")
	}
	if len(raw) > MaxCheckpoint {
		return Checkpoint{}, fmt.Errorf("open checkpoint: %d bytes, at most %d are allowed", len(raw), MaxCheckpoint)
	}
	n, err := note.Open(raw, note.VerifierList(append([]note.Verifier{t.log}, t.witnesses...)...))
	if err != nil {
		return Checkpoint{}, fmt.Errorf("open checkpoint: %w", err)
	}
	var c log.Checkpoint
	rest, err := c.Unmarshal([]byte(n.Text))
	switch {
	case err != nil:
		return Checkpoint{}, fmt.Errorf("open checkpoint: %w", err)
	case c.Origin != t.log.Name():
		return Checkpoint{}, fmt.Errorf("open checkpoint: origin %.80q, want %q", c.Origin, t.log.Name())
	case len(rest) > 0 || string(c.Marshal()) != n.Text:
		return Checkpoint{}, errors.New("open checkpoint: not in the one form there is of it")
	case len(c.Hash) != rfc6962.DefaultHasher.Size():
		return Checkpoint{}, fmt.Errorf("open checkpoint: root of %d bytes", len(c.Hash))
	}
	out := Checkpoint{Origin: c.Origin, Size: c.Size, Root: c.Hash}
	signed := false
	for _, s := range n.Sigs {
		if s.Name == t.log.Name() && s.Hash == t.log.KeyHash() {
			signed = true
			continue
		}
		at, err := cosignature.CoSigV1Timestamp(s)
		if err != nil {
			return Checkpoint{}, fmt.Errorf("open checkpoint: cosignature of %s: %w", s.Name, err)
		}
		out.Cosigned = append(out.Cosigned, Cosignature{Witness: s.Name, Time: at.UTC()})
	}
	if !signed {
		return Checkpoint{}, errors.New("open checkpoint: no signature by the log")
	}
	out.Witnessed = t.quorum > 0 && len(out.Cosigned) >= t.quorum
	return out, nil
}

// Includes checks an inclusion proof (RFC 9162, section 2.1.3): that e is the
// entry at its index in the tree of c. An entry's leaf is its body.
func (c Checkpoint) Includes(e Entry, hashes [][]byte) error {
	if len(hashes) > MaxProofHashes {
		return fmt.Errorf("log entry %d: proof of %d hashes", e.Index, len(hashes))
	}
	if _, err := e.Open(); err != nil {
		return err
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, e.Index, c.Size, LeafHash(e.Body), hashes, c.Root); err != nil {
		return fmt.Errorf("log entry %d is not in the tree of %d entries: %w", e.Index, c.Size, err)
	}
	return nil
}

// Follows checks a consistency proof (RFC 9162, section 2.1.4): that the tree of
// c begins with all that the tree of earlier has.
func (c Checkpoint) Follows(earlier Checkpoint, hashes [][]byte) error {
	var err error
	switch {
	case c.Origin != earlier.Origin:
		err = errors.New("checkpoints of two logs")
	case c.Size < earlier.Size:
		err = errors.New("the later one is smaller")
	case len(hashes) > MaxProofHashes:
		err = fmt.Errorf("proof of %d hashes", len(hashes))
	case earlier.Size == 0:
		// Everything follows the empty tree, and nothing needs to be shown for it.
		if len(hashes) > 0 || !bytes.Equal(earlier.Root, rfc6962.DefaultHasher.EmptyRoot()) {
			err = errors.New("a proof from the empty tree has no hashes, and the tree one root")
		}
	default:
		err = proof.VerifyConsistency(rfc6962.DefaultHasher, earlier.Size, c.Size, hashes, earlier.Root, c.Root)
	}
	if err != nil {
		return fmt.Errorf("the log of %d entries does not follow the one of %d: %w", c.Size, earlier.Size, err)
	}
	return nil
}

// LeafHash is the hash of an entry's body as a leaf of the Merkle tree (RFC 6962,
// section 2.1). The body names the entry's index and the chain hash before it, so
// the tree holds the chain too.
func LeafHash(body []byte) []byte { return rfc6962.DefaultHasher.HashLeaf(body) }

// ProofRequest asks for inclusion proofs of the entries at Indices.
type ProofRequest struct {
	Indices []uint64 `json:"indices"`
}

// Proofs is a signed checkpoint, and for each entry asked for, in that order, the
// hashes of its inclusion proof under it.
type Proofs struct {
	Checkpoint []byte     `json:"checkpoint"`
	Hashes     [][][]byte `json:"hashes"`
}

// MaxProofs bounds the entries for which one request asks proofs.
const MaxProofs = 1024
