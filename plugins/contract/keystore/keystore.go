// Package keystore is what a broker's host and its key store plugins agree on:
// the interface in Go, its form on the wire, and the envelope in which a wrapped
// data key is kept.
//
// Trusted: that a store keeps its key-encryption keys to itself. Checked, by the
// host's side: that every answer is bounded, of the key that was asked, and that
// an unwrapped key is the very key that was wrapped for the same associated data
// (Envelope). Not checked: how a store keeps its keys, and what it says of that
// in Info.
package keystore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
)

const (
	// PluginName is under what a key store plugin serves.
	PluginName = "keystore"

	// MaxName bounds the names of stores and keys, in bytes.
	MaxName = 128
	// MaxKeys bounds the keys that one store offers.
	MaxKeys = 256
	// MaxAssociated bounds associated data, in bytes.
	MaxAssociated = 4096
	// MaxCiphertext bounds a wrapped key without its envelope, in bytes.
	MaxCiphertext = 4096
	// MaxMessage bounds one message on the wire, in bytes.
	MaxMessage = 64 << 10
)

var (
	// ErrDisabled means that whoever owns the key has disabled or removed it.
	ErrDisabled = errors.New("key is disabled by its owner")
	// ErrMismatch means that a wrapped key does not open: it was changed, or it
	// was wrapped under another key or for other associated data.
	ErrMismatch = errors.New("wrapped key does not open")
	// ErrBackend means that what holds the keys does not answer. The same call
	// may succeed later.
	ErrBackend = errors.New("key store's backend does not answer")
)

// Kinds of stores.
const (
	KindLocal  = "local"
	KindPKCS11 = "pkcs11"
	KindVault  = "vault"
)

// Info is what a store says of itself.
type Info struct {
	// Name is the store's name, as its configuration says it.
	Name string
	Kind string
	// Keys are those on offer. The first is the default.
	Keys []Key
	// MaterialCanLeave says that the bytes of a key-encryption key can be outside
	// the store: in its process's memory, in a file, in an export.
	MaterialCanLeave bool
	// RewrapsInside says that Rewrap shows the data key to nobody but the store.
	RewrapsInside bool
	// AttestationRequired says that the store asks for its caller's attestation.
	AttestationRequired bool
}

// Key is one key-encryption key.
type Key struct {
	ID string
	// Newest is the version under which Wrap encrypts, Oldest the first that
	// Unwrap takes. Versions count from 1. Both are 0 if the key is disabled and
	// the store cannot tell them.
	Newest, Oldest uint32
	Disabled       bool
}

// Wrapped is a data key under one version of one key.
type Wrapped struct {
	Key        string
	Version    uint32
	Ciphertext []byte
}

// Store is a key store. Implementations MUST be safe for concurrent use and MUST
// return when ctx ends, but for a call that a token does not return from: the
// host waits no longer than its own limit.
//
// Unwrap and Rewrap MUST fail with ErrMismatch for associated data other than
// Wrap's and for anything changed in Wrapped. Wrap, Unwrap and Rewrap MUST fail
// with ErrDisabled from the moment on which a key's owner disabled it: no
// implementation keeps an unwrapped data key.
type Store interface {
	Info(ctx context.Context) (*Info, error)
	// Wrap encrypts key under the newest version of the key named keyID.
	Wrap(ctx context.Context, keyID string, key *DataKey, associated []byte) (*Wrapped, error)
	// Unwrap decrypts what Wrap or Rewrap made. The caller destroys the key.
	Unwrap(ctx context.Context, w *Wrapped, associated []byte) (*DataKey, error)
	// Rewrap returns the same data key under the newest version of w.Key.
	Rewrap(ctx context.Context, w *Wrapped, associated []byte) (*Wrapped, error)
	// Health asks the backend for a sign of life.
	Health(ctx context.Context) error
}

// Plugin is a Store on the wire. Impl is set in a plugin, and nil in a host.
type Plugin struct {
	plugin.NetRPCUnsupportedPlugin
	Impl Store
}

var _ plugin.GRPCPlugin = (*Plugin)(nil)

// GRPCServer serves Impl.
func (p *Plugin) GRPCServer(_ *plugin.GRPCBroker, s *grpc.Server) error {
	if p.Impl == nil {
		return errors.New("serve key store plugin: no implementation")
	}
	Register(s, p.Impl)
	return nil
}

// GRPCClient returns a Store.
func (p *Plugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return New(c), nil
}

// CheckName says whether s can be the name of a store or of a key: 1 to MaxName
// letters, digits and -_./:@, which need no quoting in a log or a path of a URL.
func CheckName(what, s string) error {
	if s == "" || len(s) > MaxName {
		return fmt.Errorf("%s has %d bytes: want 1 to %d", what, len(s), MaxName)
	}
	for _, r := range s {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9':
		case r == '-', r == '_', r == '.', r == '/', r == ':', r == '@':
		default:
			return fmt.Errorf("%s %q: want letters, digits and -_./:@", what, s)
		}
	}
	return nil
}

func (i *Info) check() error {
	if err := errors.Join(CheckName("store's name", i.Name), CheckName("store's kind", i.Kind)); err != nil {
		return err
	}
	if len(i.Keys) == 0 || len(i.Keys) > MaxKeys {
		return fmt.Errorf("store offers %d keys: want 1 to %d", len(i.Keys), MaxKeys)
	}
	for n, k := range i.Keys {
		if err := CheckName("key's id", k.ID); err != nil {
			return err
		}
		if slices.ContainsFunc(i.Keys[:n], func(o Key) bool { return o.ID == k.ID }) {
			return fmt.Errorf("key %s is named twice", k.ID)
		}
		if !k.Disabled && k.Newest == 0 || k.Oldest > k.Newest {
			return fmt.Errorf("key %s has versions %d to %d", k.ID, k.Oldest, k.Newest)
		}
	}
	return nil
}

func (w *Wrapped) check() error {
	switch {
	case w == nil:
		return errors.New("no wrapped key")
	case w.Version == 0:
		return errors.New("wrapped key names no version")
	case len(w.Ciphertext) == 0 || len(w.Ciphertext) > MaxCiphertext:
		return fmt.Errorf("wrapped key has %d bytes: want 1 to %d", len(w.Ciphertext), MaxCiphertext)
	}
	return CheckName("key's id", w.Key)
}

func checkAssociated(b []byte) error {
	if len(b) > MaxAssociated {
		return fmt.Errorf("associated data has %d bytes: want at most %d", len(b), MaxAssociated)
	}
	return nil
}
