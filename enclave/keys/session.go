package keys

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	// LabelStatement precedes, with a zero byte, a statement that is signed, as
	// receipt.CheckpointLabel does a checkpoint's record. A release request is signed
	// bare: it begins with a brace, so that no two kinds share a first byte.
	LabelStatement = "coffer/v1 statement"

	// MaxStatement bounds a bundle statement, in bytes.
	MaxStatement = 128 << 10
)

// Session is the ECDSA P-256 key by which a job speaks.
type Session struct {
	_    [0]func()
	mu   sync.Mutex
	priv *ecdsa.PrivateKey
	pub  []byte
}

// GenerateSession returns a new session key.
func GenerateSession() (*Session, error) {
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate session key: %w", err)
	}
	pub, err := x509.MarshalPKIXPublicKey(&priv.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("encode session key: %w", err)
	}
	return &Session{priv: priv, pub: pub}, nil
}

// Public returns the public key in PKIX DER.
func (s *Session) Public() []byte { return append([]byte(nil), s.pub...) }

// SignRelease signs a canonical receipt.ReleaseRequest and nothing else.
func (s *Session) SignRelease(request []byte) ([]byte, error) {
	var r receipt.ReleaseRequest
	if err := plan.Decode(request, receipt.MaxRequest, &r); err != nil {
		return nil, fmt.Errorf("sign release request: %w", err)
	}
	c, err := r.Canonical()
	if err != nil {
		return nil, fmt.Errorf("sign release request: %w", err)
	}
	if !bytes.Equal(c, request) {
		return nil, errors.New("sign release request: not in canonical form (RFC 8785)")
	}
	return s.sign(request)
}

// SignStatement signs a bundle statement.
func (s *Session) SignStatement(statement []byte) ([]byte, error) {
	return s.signLabelled(LabelStatement, statement, MaxStatement)
}

// SignCheckpoint signs a checkpoint record.
func (s *Session) SignCheckpoint(record []byte) ([]byte, error) {
	return s.signLabelled(receipt.CheckpointLabel, record, receipt.MaxCheckpointRecord)
}

// Destroy forgets the key.
func (s *Session) Destroy() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.priv = nil
}

// Format redacts under every verb.
func (*Session) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "[session key]") }

// LogValue redacts.
func (*Session) LogValue() slog.Value { return slog.StringValue("[session key]") }

// VerifyLabelled checks a signature that SignStatement or SignCheckpoint made.
func VerifyLabelled(publicKey []byte, label string, message, signature []byte) error {
	k, err := x509.ParsePKIXPublicKey(publicKey)
	if err != nil {
		return fmt.Errorf("session key: %w", err)
	}
	pub, ok := k.(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return errors.New("session key is not on P-256")
	}
	sum := sha256.Sum256(labelled(label, message))
	if !ecdsa.VerifyASN1(pub, sum[:], signature) {
		return errors.New("not signed by this session key")
	}
	return nil
}

func labelled(label string, message []byte) []byte {
	m := make([]byte, 0, len(label)+1+len(message))
	m = append(m, label...)
	m = append(m, 0)
	return append(m, message...)
}

func (s *Session) signLabelled(label string, message []byte, limit int) ([]byte, error) {
	if len(message) == 0 || len(message) > limit {
		return nil, fmt.Errorf("sign %s: %d bytes, want 1 to %d", label, len(message), limit)
	}
	var v any
	if err := plan.Decode(message, limit, &v); err != nil {
		return nil, fmt.Errorf("sign %s: %w", label, err)
	}
	c, err := plan.Canonical(v)
	if err != nil {
		return nil, fmt.Errorf("sign %s: %w", label, err)
	}
	if !bytes.Equal(c, message) {
		return nil, fmt.Errorf("sign %s: not in canonical form (RFC 8785)", label)
	}
	return s.sign(labelled(label, message))
}

func (s *Session) sign(message []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.priv == nil {
		return nil, errors.New("sign: session key is empty or destroyed")
	}
	sum := sha256.Sum256(message)
	sig, err := ecdsa.SignASN1(rand.Reader, s.priv, sum[:])
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	return sig, nil
}
