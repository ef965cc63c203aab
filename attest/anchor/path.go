package anchor

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// MaxPath bounds the certificates of one chain.
const MaxPath = 8

// What a set remembers is bounded: chains at some tens of bytes, certificates at
// about twice their length.
const (
	maxRemembered   = 4096
	maxCertificates = 1024
	// maxKept is the length in bytes above which a certificate is not remembered.
	// Those of chips and GPUs have half of it.
	maxKept = 4 << 10
)

// paths remembers by content the certificates that were read, and the chains
// whose signatures were found good. Both stay so: nothing that depends on time is
// in here.
type paths struct {
	mu   sync.Mutex
	good map[[sha256.Size]byte]struct{}          // guarded by mu
	read map[[sha256.Size]byte]*x509.Certificate // guarded by mu
	// texts are lists of certificates by the text that they were read from.
	texts map[[sha256.Size]byte][]*x509.Certificate // guarded by mu
}

// Certificate reads a certificate, and remembers it, trusted or not. Callers must
// not change what they get: others have it too.
func (s Set) Certificate(der []byte) (*x509.Certificate, error) {
	if s.paths == nil || len(der) > maxKept {
		return x509.ParseCertificate(der)
	}
	key := sha256.Sum256(der)
	s.paths.mu.Lock()
	c := s.paths.read[key]
	s.paths.mu.Unlock()
	if c != nil {
		return c, nil
	}
	// What is read points into what it was read from. Others see it later: it must
	// neither change with the caller's bytes nor keep all that they lie in.
	c, err := x509.ParseCertificate(bytes.Clone(der))
	if err != nil {
		return nil, err
	}
	s.paths.mu.Lock()
	defer s.paths.mu.Unlock()
	if s.paths.read == nil || len(s.paths.read) >= maxCertificates {
		s.paths.read = map[[sha256.Size]byte]*x509.Certificate{}
	}
	s.paths.read[key] = c
	return c, nil
}

// Certificates reads a list of certificates from a text by read, which must follow
// from the text alone, and remembers it as Certificate does. Callers must not change
// what they get.
func (s Set) Certificates(text []byte, read func([]byte) ([]*x509.Certificate, error)) ([]*x509.Certificate, error) {
	if s.paths == nil || len(text) > 4*maxKept {
		return read(text)
	}
	key := sha256.Sum256(text)
	s.paths.mu.Lock()
	list := s.paths.texts[key]
	s.paths.mu.Unlock()
	if list != nil {
		return list, nil
	}
	list, err := read(text)
	if err != nil {
		return nil, err
	}
	s.paths.mu.Lock()
	defer s.paths.mu.Unlock()
	if s.paths.texts == nil || len(s.paths.texts) >= maxCertificates {
		s.paths.texts = map[[sha256.Size]byte][]*x509.Certificate{}
	}
	s.paths.texts[key] = slices.Clip(list)
	return list, nil
}

// Path checks that each certificate of chain, leaf first, was issued by the
// next: names, CA constraints, key usage, path lengths, signatures (RFC 5280,
// section 6.1). That the last one is an anchor is for the caller to check, by
// ARK, NVIDIADeviceRoot, NVIDIARIMRoot or EKRoot; a root's signature over
// itself proves nothing and is not looked at. Times are for CheckTimes.
//
// The set remembers good chains, so that each is verified once.
func (s Set) Path(chain []*x509.Certificate) error {
	if s.kind == none {
		return errors.New("no trust anchors")
	}
	if len(chain) < 2 || len(chain) > MaxPath {
		return fmt.Errorf("%d certificates: want 2 to %d", len(chain), MaxPath)
	}
	key := pathKey(chain)
	if s.paths.has(key) {
		return nil
	}
	// From the root down, so that no key is used before it is vouched for.
	for i := len(chain) - 1; i >= 0; i-- {
		c := chain[i]
		if len(c.UnhandledCriticalExtensions) > 0 {
			return fmt.Errorf("certificate %d (%s): critical extension %s is not understood", i, c.Subject.CommonName, c.UnhandledCriticalExtensions[0])
		}
		if i == len(chain)-1 {
			continue
		}
		issuer := chain[i+1]
		if !bytes.Equal(c.RawIssuer, issuer.RawSubject) {
			return fmt.Errorf("certificate %d (%s): issued by %s, the next is %s", i, c.Subject.CommonName, c.Issuer.CommonName, issuer.Subject.CommonName)
		}
		if !issuer.BasicConstraintsValid || !issuer.IsCA || issuer.KeyUsage&x509.KeyUsageCertSign == 0 {
			return fmt.Errorf("certificate %d (%s): its issuer may not issue certificates", i, c.Subject.CommonName)
		}
		// i counts the intermediates below issuer: all certificates but the leaf.
		if (issuer.MaxPathLen > 0 || issuer.MaxPathLenZero) && i > issuer.MaxPathLen {
			return fmt.Errorf("certificate %d (%s): path length over its issuer's %d", i, c.Subject.CommonName, issuer.MaxPathLen)
		}
		if err := c.CheckSignatureFrom(issuer); err != nil {
			return fmt.Errorf("certificate %d (%s): %w", i, c.Subject.CommonName, err)
		}
	}
	s.paths.add(key)
	return nil
}

// CheckTimes checks that every certificate of chain is valid at now.
func CheckTimes(chain []*x509.Certificate, now time.Time) error {
	for _, c := range chain {
		if now.Before(c.NotBefore) {
			return fmt.Errorf("%s is valid from %s", c.Subject.CommonName, c.NotBefore.UTC().Format(time.RFC3339))
		}
		if now.After(c.NotAfter) {
			return fmt.Errorf("%s expired at %s", c.Subject.CommonName, c.NotAfter.UTC().Format(time.RFC3339))
		}
	}
	return nil
}

func pathKey(chain []*x509.Certificate) [sha256.Size]byte {
	h := sha256.New()
	for _, c := range chain {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(c.Raw)))
		h.Write(n[:])
		h.Write(c.Raw)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

func (p *paths) has(key [sha256.Size]byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := p.good[key]
	return ok
}

func (p *paths) add(key [sha256.Size]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.good == nil || len(p.good) >= maxRemembered {
		p.good = map[[sha256.Size]byte]struct{}{}
	}
	p.good[key] = struct{}{}
}
