// Package local is a key store in one encrypted file.
//
// Trusted: root of the machine, and whoever knows the passphrase or has the TPM
// that the file is locked with. Checked: that every byte of the file is as the
// store wrote it, and that a wrapped key is of the key, the version and the
// associated data that it is opened for. Not checked: that the file is the newest
// one: who can replace the file by an older copy brings a disabled key back.
// While it serves, the key-encryption keys are in the process's memory.
package local

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

// kekSize is the size of a key-encryption key, in bytes: AES-256.
const kekSize = 32

// associatedLabel starts the associated data of every wrapped key.
const associatedLabel = "coffer/v1 local key store\x00"

// Store is a key store over one file. It reads the file at every call, so that
// a key that is disabled in it is refused from then on.
type Store struct {
	path string
	name string

	// mu guards fileKey and header against Close.
	mu      sync.RWMutex
	header  []byte
	fileKey []byte
}

var _ keystore.Store = (*Store)(nil)

// Create makes a file with one key named keyID at version 1, for the store of the
// given name. It refuses a path that exists.
func Create(path, name, keyID string, lock Lock) error {
	if err := errors.Join(keystore.CheckName("store's name", name), keystore.CheckName("key's id", keyID)); err != nil {
		return err
	}
	p, fileKey, err := lock.Make()
	if err != nil {
		return fmt.Errorf("create key store %s: %w", path, err)
	}
	defer clear(fileKey)
	c := &content{Store: name, Keys: []kek{{ID: keyID, Versions: []version{newVersion(1)}}}}
	defer c.destroy()
	return create(path, p, fileKey, c)
}

// Open opens the file at path, which must be of the store of the given name.
func Open(path, name string, lock Lock) (*Store, error) {
	f, err := read(path)
	if err != nil {
		return nil, err
	}
	fileKey, err := lock.Open(f.header.Lock)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", path, err)
	}
	s := &Store{path: path, name: name, header: f.rawHeader, fileKey: fileKey}
	if _, err := s.load(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// Close forgets the key of the file.
func (s *Store) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.fileKey)
	s.fileKey = nil
	return nil
}

// load reads the file as it is. The caller destroys what it gets.
func (s *Store) load() (*content, error) {
	f, err := read(s.path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", keystore.ErrBackend, err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.fileKey == nil {
		return nil, fmt.Errorf("%w: key store is closed", keystore.ErrBackend)
	}
	if !slices.Equal(f.rawHeader, s.header) {
		return nil, fmt.Errorf("%w: key store %s was locked anew: start the store again", keystore.ErrBackend, s.path)
	}
	c, err := f.open(s.fileKey)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", s.path, err)
	}
	if c.Store != s.name {
		c.destroy()
		return nil, fmt.Errorf("key store %s is of the store %q, not %q", s.path, c.Store, s.name)
	}
	return c, nil
}

// Info lists the keys of the file.
func (s *Store) Info(context.Context) (*keystore.Info, error) {
	c, err := s.load()
	if err != nil {
		return nil, err
	}
	defer c.destroy()
	i := &keystore.Info{Name: s.name, Kind: keystore.KindLocal, MaterialCanLeave: true, RewrapsInside: true}
	for _, k := range c.Keys {
		i.Keys = append(i.Keys, keystore.Key{ID: k.ID, Newest: k.newest().Version, Oldest: k.Versions[0].Version, Disabled: k.Disabled})
	}
	return i, nil
}

// Wrap encrypts key with AES-256-GCM under a random nonce, which is good for 2^32
// keys under one version (NIST SP 800-38D, section 8.3).
func (s *Store) Wrap(_ context.Context, keyID string, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	c, err := s.load()
	if err != nil {
		return nil, err
	}
	defer c.destroy()
	k, err := c.enabled(keyID)
	if err != nil {
		return nil, err
	}
	return wrap(k, key, associated)
}

// Unwrap decrypts what Wrap made.
func (s *Store) Unwrap(_ context.Context, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	c, err := s.load()
	if err != nil {
		return nil, err
	}
	defer c.destroy()
	k, err := c.enabled(w.Key)
	if err != nil {
		return nil, err
	}
	return unwrap(k, w, associated)
}

// Rewrap encrypts the same data key under the newest version.
func (s *Store) Rewrap(_ context.Context, w *keystore.Wrapped, associated []byte) (*keystore.Wrapped, error) {
	c, err := s.load()
	if err != nil {
		return nil, err
	}
	defer c.destroy()
	k, err := c.enabled(w.Key)
	if err != nil {
		return nil, err
	}
	key, err := unwrap(k, w, associated)
	if err != nil {
		return nil, err
	}
	defer key.Destroy()
	return wrap(k, key, associated)
}

// Health reads the file.
func (s *Store) Health(context.Context) error {
	c, err := s.load()
	if err != nil {
		return err
	}
	c.destroy()
	return nil
}

// AddKey adds a key at version 1.
func (s *Store) AddKey(keyID string) error {
	return s.change(func(c *content) error {
		if err := keystore.CheckName("key's id", keyID); err != nil {
			return err
		}
		if c.find(keyID) != nil {
			return fmt.Errorf("key %s exists", keyID)
		}
		if len(c.Keys) == keystore.MaxKeys {
			return fmt.Errorf("store has %d keys, which is the most", len(c.Keys))
		}
		c.Keys = append(c.Keys, kek{ID: keyID, Versions: []version{newVersion(1)}})
		return nil
	})
}

// Rotate adds a version to a key. Older versions stay, to unwrap.
func (s *Store) Rotate(keyID string) error {
	return s.change(func(c *content) error {
		k := c.find(keyID)
		if k == nil {
			return fmt.Errorf("no key %s", keyID)
		}
		if len(k.Versions) == maxVersions {
			return fmt.Errorf("key %s has %d versions, which is the most", keyID, maxVersions)
		}
		k.Versions = append(k.Versions, newVersion(k.newest().Version+1))
		return nil
	})
}

// SetDisabled disables a key or enables it again.
func (s *Store) SetDisabled(keyID string, disabled bool) error {
	return s.change(func(c *content) error {
		k := c.find(keyID)
		if k == nil {
			return fmt.Errorf("no key %s", keyID)
		}
		k.Disabled = disabled
		return nil
	})
}

func (s *Store) change(f func(*content) error) error {
	unlock, err := exclusive(s.path)
	if err != nil {
		return fmt.Errorf("change key store %s: %w", s.path, err)
	}
	defer unlock()
	c, err := s.load()
	if err != nil {
		return err
	}
	defer c.destroy()
	if err := f(c); err != nil {
		return fmt.Errorf("change key store %s: %w", s.path, err)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return replace(s.path, s.header, s.fileKey, c)
}

func newVersion(n uint32) version {
	v := version{Version: n, Created: time.Now().UTC().Truncate(time.Second), Key: make([]byte, kekSize)}
	_, _ = rand.Read(v.Key) // never fails (crypto/rand)
	return v
}

func aead(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func bound(keyID string, version uint32, associated []byte) []byte {
	b := append([]byte(associatedLabel), byte(len(keyID)))
	b = append(b, keyID...)
	b = binary.BigEndian.AppendUint32(b, version)
	return append(b, associated...)
}

func wrap(k *kek, key *keystore.DataKey, associated []byte) (*keystore.Wrapped, error) {
	v := k.newest()
	a, err := aead(v.Key)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, a.NonceSize(), a.NonceSize()+keystore.DataKeySize+a.Overhead())
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	return &keystore.Wrapped{Key: k.ID, Version: v.Version, Ciphertext: a.Seal(nonce, nonce, key.Reveal(), bound(k.ID, v.Version, associated))}, nil
}

func unwrap(k *kek, w *keystore.Wrapped, associated []byte) (*keystore.DataKey, error) {
	i := slices.IndexFunc(k.Versions, func(v version) bool { return v.Version == w.Version })
	if i < 0 {
		return nil, fmt.Errorf("%w: key %s has no version %d", keystore.ErrMismatch, k.ID, w.Version)
	}
	a, err := aead(k.Versions[i].Key)
	if err != nil {
		return nil, err
	}
	if len(w.Ciphertext) != a.NonceSize()+keystore.DataKeySize+a.Overhead() {
		return nil, fmt.Errorf("%w: it has %d bytes", keystore.ErrMismatch, len(w.Ciphertext))
	}
	nonce, sealed := w.Ciphertext[:a.NonceSize()], w.Ciphertext[a.NonceSize():]
	b, err := a.Open(nil, nonce, sealed, bound(k.ID, w.Version, associated))
	if err != nil {
		return nil, keystore.ErrMismatch
	}
	return keystore.NewDataKey(b)
}
