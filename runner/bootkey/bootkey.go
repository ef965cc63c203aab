// Package bootkey has the agent's key of this boot: a random key in the kernel's
// user keyring (keyrings(7)). It outlives the agent's process and not the machine's
// boot, and lies on no disk. What a job's submitter gave for later, and what a job
// printed, is sealed under it.
//
// Trusted: the kernel, and every process of the agent's user, which can read it.
package bootkey

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// Size is that of a key, in bytes.
const Size = 32

// perm lets the possessor and processes of the same user look for the key and
// read it (keyctl_setperm(3)).
const perm = 0x3f0b0000

// Key is a key of this boot. It prints as a fixed text; the zero value refuses.
type Key struct {
	_ [0]func()
	b []byte
}

// Get returns the key of that name, and makes it at the first call after a boot.
// Where the kernel has no keyrings it is an error.
func Get(name string) (*Key, error) {
	// Keyrings belong to threads.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0)
	if errors.Is(err, unix.ENOKEY) {
		fresh := make([]byte, Size)
		_, _ = rand.Read(fresh) // it never fails
		if id, err = unix.AddKey("user", name, fresh, unix.KEY_SPEC_USER_KEYRING); err == nil {
			err = unix.KeyctlSetperm(id, perm)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("key of this boot: %w", err)
	}
	b := make([]byte, Size+1)
	n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, id, b, 0)
	if err != nil {
		return nil, fmt.Errorf("key of this boot: %w", err)
	}
	if n != Size {
		return nil, fmt.Errorf("key of this boot: the keyring's %s has %d bytes, want %d", name, n, Size)
	}
	return &Key{b: b[:Size]}, nil
}

// New returns a key that no keyring has, for tests and for a process that keeps
// nothing.
func New() *Key {
	k := &Key{b: make([]byte, Size)}
	_, _ = rand.Read(k.b) // it never fails
	return k
}

// Forget removes the key of that name from the keyring.
func Forget(name string) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	id, err := unix.KeyctlSearch(unix.KEY_SPEC_USER_KEYRING, "user", name, 0)
	if errors.Is(err, unix.ENOKEY) {
		return nil
	}
	if err == nil {
		_, err = unix.KeyctlInt(unix.KEYCTL_UNLINK, id, unix.KEY_SPEC_USER_KEYRING, 0, 0)
	}
	if err != nil {
		return fmt.Errorf("forget key of this boot: %w", err)
	}
	return nil
}

// String hides the key.
func (k *Key) String() string { return "[key of this boot]" }

// AEAD returns AES-256-GCM with random nonces under a key derived for one purpose.
func (k *Key) AEAD(salt []byte, purpose string) (cipher.AEAD, error) {
	sub, err := k.Derive(salt, purpose)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(sub)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// Derive returns Size bytes by HKDF-SHA256 (RFC 5869).
func (k *Key) Derive(salt []byte, purpose string) ([]byte, error) {
	if k == nil || len(k.b) != Size {
		return nil, errors.New("no key of this boot")
	}
	return hkdf.Key(sha256.New, k.b, salt, purpose, Size)
}
