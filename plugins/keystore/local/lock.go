package local

import (
	"crypto/rand"
	"errors"
	"fmt"

	"golang.org/x/crypto/argon2"
)

// Params tell how a file's key is recovered. Exactly one is set.
type Params struct {
	Argon2id *Argon2id `json:"argon2id,omitempty"`
	TPM      *Sealed   `json:"tpm,omitempty"`
}

// Lock makes the key of a new file and recovers that of an old one.
type Lock interface {
	Make() (Params, []byte, error)
	Open(p Params) ([]byte, error)
}

// Argon2id are the parameters of a passphrase's key, RFC 9106.
type Argon2id struct {
	Salt []byte `json:"salt"`
	// Passes is t, Threads p.
	Passes  uint32 `json:"passes"`
	Memory  uint32 `json:"memoryKiB"`
	Threads uint8  `json:"threads"`
}

const (
	saltSize = 16
	// MinPassphrase is the least length of a passphrase, in bytes.
	MinPassphrase = 16

	// RFC 9106, section 4: the second recommended choice, 64 MiB.
	passes  = 3
	memory  = 64 << 10
	threads = 4
	// The file is not trusted before it opens: it cannot ask for more than these.
	maxPasses = 64
	maxMemory = 4 << 20
)

// Passphrase locks a file with a passphrase.
type Passphrase []byte

// Make chooses a salt and derives a file key.
func (l Passphrase) Make() (Params, []byte, error) {
	a := &Argon2id{Salt: make([]byte, saltSize), Passes: passes, Memory: memory, Threads: threads}
	_, _ = rand.Read(a.Salt) // never fails (crypto/rand)
	p := Params{Argon2id: a}
	key, err := l.Open(p)
	return p, key, err
}

// Open derives the file key again.
func (l Passphrase) Open(p Params) ([]byte, error) {
	a := p.Argon2id
	switch {
	case a == nil || p.TPM != nil:
		return nil, errors.New("the file is not locked with a passphrase")
	case len(l) < MinPassphrase:
		return nil, fmt.Errorf("passphrase has %d bytes: want at least %d", len(l), MinPassphrase)
	case len(a.Salt) != saltSize, a.Passes < 1 || a.Passes > maxPasses, a.Memory < 8*uint32(max(a.Threads, 1)) || a.Memory > maxMemory, a.Threads < 1:
		return nil, errors.New("the file's argon2id parameters are out of bounds")
	}
	return argon2.IDKey(l, a.Salt, a.Passes, a.Memory, a.Threads, kekSize), nil
}
