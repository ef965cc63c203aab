package anchor

import (
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// akNameSize is the length of a TPM name: the algorithm SHA-256 and its digest.
const akNameSize = 2 + 32

// IDKeyDigest is the SHA-384 of a key that signs the launch of SEV-SNP guests,
// as reports carry it (SEV-SNP ABI specification, ID_KEY_DIGEST).
type IDKeyDigest [48]byte

// WithAKs returns the set with attestation keys that are trusted by name, in
// place of an endorsement key certificate. A name is that of TPM 2.0 Part 1,
// section 16, under SHA-256, in hex. As with roots, a set that is not a
// simulation's takes none of class Software.
func (s Set) WithAKs(class Class, names ...string) (Set, error) {
	switch {
	case s.kind == none:
		return Set{}, errors.New("pin attestation keys: the set is empty")
	case !slices.Contains(Classes(), class):
		return Set{}, fmt.Errorf("pin attestation keys: unknown trust class %.40q", class)
	case class == Software && s.kind != simulation:
		return Set{}, errors.New("pin attestation keys: a software TPM is trusted in a simulation only")
	case len(names) == 0:
		return Set{}, errors.New("pin attestation keys: none given")
	}
	aks := map[string]Class{}
	maps.Copy(aks, s.aks)
	for _, n := range names {
		b, err := hex.DecodeString(n)
		if err != nil || len(b) != akNameSize || b[0] != 0x00 || b[1] != 0x0b || n != hex.EncodeToString(b) {
			return Set{}, fmt.Errorf("pin attestation key %.80q: want a name under SHA-256 in lower-case hex", n)
		}
		if have, ok := aks[n]; ok && have != class {
			return Set{}, fmt.Errorf("pin attestation key %s: it has two trust classes", n)
		}
		aks[n] = class
	}
	s.aks = aks
	return s, nil
}

// AK returns the class of a pinned attestation key.
func (s Set) AK(name string) (Class, bool) {
	c, ok := s.aks[name]
	return c, ok && s.kind != none && c != ""
}

// WithParavisors returns the set with keys whose signed guests are paravisors
// that keep a TPM from the guest inside them and from the host. Any guest may
// put what it likes into its own report's data; that a report's key list speaks
// of a TPM follows from who signed the guest alone.
func (s Set) WithParavisors(keys ...IDKeyDigest) (Set, error) {
	switch {
	case s.kind == none:
		return Set{}, errors.New("trust paravisors: the set is empty")
	case len(keys) == 0:
		return Set{}, errors.New("trust paravisors: none given")
	case slices.Contains(keys, IDKeyDigest{}):
		// The digest of reports whose guest nobody signed.
		return Set{}, errors.New("trust paravisors: the zero digest stands for no key")
	}
	s.paravisors = append(slices.Clone(s.paravisors), keys...)
	return s, nil
}

// Paravisor reports whether guests signed under the key are trusted to keep a
// TPM.
func (s Set) Paravisor(key IDKeyDigest) bool {
	return s.kind != none && key != IDKeyDigest{} && slices.Contains(s.paravisors, key)
}
