// Package endorsetest plays the vendors' services over a simulation, for tests:
// they know what was minted, and can be told to lie, to forget and to be away.
package endorsetest

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/simulate"
)

// Services answers for both vendors. It is an endorse.Fetcher.
type Services struct {
	t  testing.TB
	v  *simulate.Vendor
	at time.Time

	mu      sync.Mutex
	answers map[endorse.Key][]byte // guarded by mu
	asked   map[endorse.Key]int    // guarded by mu
	away    error                  // guarded by mu
	pairs   map[endorse.Key]Pair
	rims    []string
}

// Pair is a certificate and its issuer.
type Pair struct{ Cert, Issuer *x509.Certificate }

// New returns services whose answers are current at a time.
func New(t testing.TB, v *simulate.Vendor, at time.Time) *Services {
	t.Helper()
	s := &Services{t: t, v: v, at: at, answers: map[endorse.Key][]byte{}, asked: map[endorse.Key]int{}, pairs: map[endorse.Key]Pair{}}
	vcek, ask, ark := v.Chip().Certificates()
	chain := append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ask}), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ark})...)
	s.set(endorse.VEK, "", vcek)
	s.set(endorse.Chain, "", chain)
	crl, err := v.CRL(at.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	s.set(endorse.CRL, "", crl)
	for kind, make := range map[string]func(simulate.RIMOptions) ([]byte, error){
		"DRIVER_GH100_" + simulate.DefaultDriver: v.DriverRIM,
		VBIOSID():                                v.VBIOSRIM,
	} {
		b, err := make(simulate.RIMOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s.set(endorse.RIM, "NV_GPU_"+kind, b)
		s.rims = append(s.rims, "NV_GPU_"+kind)
		s.know(RIMChain(t, b))
	}
	for _, g := range v.GPUs() {
		s.know(parse(t, g.ChainPEM())[1:])
	}
	return s
}

// VBIOSID is the manifest's id of the simulated VBIOS, without NV_GPU_.
func VBIOSID() string {
	return strings.ToUpper("VBIOS_1010_0200_882_" + strings.ReplaceAll(simulate.DefaultVBIOS, ".", ""))
}

func (s *Services) set(k endorse.Kind, id string, b []byte) {
	s.t.Helper()
	i, err := endorse.Parse(k, id, b)
	if err != nil {
		s.t.Fatal(err)
	}
	s.answers[i.Key] = b
}

// know makes answers about the certificates of a chain, its root left out.
func (s *Services) know(chain []*x509.Certificate) {
	s.t.Helper()
	for i := range len(chain) - 1 {
		s.Status(chain[i], chain[i+1], simulate.OCSPOptions{ThisUpdate: s.at.Add(-time.Minute)})
	}
}

// Status sets the answer about a certificate.
func (s *Services) Status(cert, issuer *x509.Certificate, o simulate.OCSPOptions) endorse.Key {
	s.t.Helper()
	k, err := endorse.OCSPKey(cert, issuer)
	if err != nil {
		s.t.Fatal(err)
	}
	b, err := s.v.OCSPAnswer(cert, issuer, o)
	if err != nil {
		s.t.Fatal(err)
	}
	s.Set(k, b)
	s.pairs[k] = Pair{cert, issuer}
	return k
}

// Find returns the certificate with a word in its name, and its issuer.
func (s *Services) Find(word string) Pair {
	s.t.Helper()
	for _, p := range s.pairs {
		if strings.Contains(p.Cert.Subject.CommonName, word) {
			return p
		}
	}
	s.t.Fatalf("no certificate of %q", word)
	return Pair{}
}

// Signer returns the certificate of the driver's manifest's signer, and its issuer.
func (s *Services) Signer() Pair {
	s.t.Helper()
	for k, b := range s.answers {
		if k.Kind == endorse.RIM && strings.Contains(k.ID, "DRIVER") {
			c := RIMChain(s.t, b)
			return Pair{c[0], c[1]}
		}
	}
	s.t.Fatal("no driver's manifest")
	return Pair{}
}

// Set replaces an answer; nil makes it unknown.
func (s *Services) Set(k endorse.Key, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b == nil {
		delete(s.answers, k)
		return
	}
	s.answers[k] = b
}

// Away makes every service fail with err until it is called with nil.
func (s *Services) Away(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.away = err
}

// Asked returns how often the services were asked, about k or, for the zero
// Key, about anything.
func (s *Services) Asked(k endorse.Key) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if k != (endorse.Key{}) {
		return s.asked[k]
	}
	n := 0
	for _, m := range s.asked {
		n += m
	}
	return n
}

// Answers returns all that the services know.
func (s *Services) Answers() map[endorse.Key][]byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[endorse.Key][]byte{}
	for k, b := range s.answers {
		out[k] = b
	}
	return out
}

// Fetch implements endorse.Fetcher.
func (s *Services) Fetch(ctx context.Context, r endorse.Request) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[r.Key]++
	if s.away != nil {
		return nil, s.away
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	k := r.Key
	if k.Kind == endorse.OCSP {
		if _, err := ocsp.ParseRequest(r.Body); err != nil {
			return nil, fmt.Errorf("OCSP request: %w", err)
		}
	}
	if b, ok := s.answers[k]; ok {
		return bytes.Clone(b), nil
	}
	return nil, fmt.Errorf("%w: %s", endorse.ErrUnknown, k)
}

var certificate = regexp.MustCompile(`(?s)<ds:X509Certificate>(.*?)</ds:X509Certificate>`)

// RIMChain returns the certificates in a manifest.
func RIMChain(t testing.TB, b []byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, m := range certificate.FindAllSubmatch(b, -1) {
		der, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(string(m[1])), ""))
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

func parse(t testing.TB, b []byte) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			return out
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
}
