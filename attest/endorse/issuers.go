package endorse

import (
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/nvgpu"
)

// Issuers are certificate authorities of NVIDIA's that lead to a pinned root. An
// answer about a certificate (OCSP) is verified by them: it names the issuer by
// digest, and holds neither of the two. The zero value knows none.
type Issuers struct {
	anchors anchor.Set
	by      map[string]*x509.Certificate // by ISSUER of an id (docs/formats/endorsements.md)
}

// NewIssuers returns issuers that must lead to the roots in anchors.
func NewIssuers(anchors anchor.Set) *Issuers {
	return &Issuers{anchors: anchors, by: map[string]*x509.Certificate{}}
}

// AddDevice takes in the issuers of a GPU's certificate chain, PEM and leaf first.
func (s *Issuers) AddDevice(pem []byte) error {
	chain, err := nvgpu.VerifyChain(pem, s.anchors)
	if err != nil {
		return err
	}
	return s.add(chain)
}

// AddManifest takes in the issuers of a manifest's signer.
func (s *Issuers) AddManifest(xml []byte) error {
	chain, err := nvgpu.RIMChain(xml, s.anchors)
	if err != nil {
		return err
	}
	return s.add(chain)
}

// add takes a verified chain. Each of its certificates but the last has been
// issued by the next, which is an authority.
func (s *Issuers) add(chain []*x509.Certificate) error {
	for n := range len(chain) - 1 {
		k, err := OCSPKey(chain[n], chain[n+1])
		if err != nil {
			return err
		}
		_, issuer, _ := strings.Cut(k.ID, "@")
		s.by[issuer] = chain[n+1]
	}
	return nil
}

// verify checks an answer's signature, and that it names its issuer in full.
func (s *Issuers) verify(i Item) error {
	_, name, _ := strings.Cut(i.Key.ID, "@")
	var issuer *x509.Certificate
	if s != nil {
		issuer = s.by[name]
	}
	if issuer == nil {
		return fmt.Errorf("%w: put the GPU's certificate chain or the manifest that it is about beside it", errNoChain)
	}
	r, err := ocsp.ParseResponse(i.Bytes, nil)
	if err != nil {
		return err
	}
	if r.SerialNumber == nil {
		return errors.New("the answer names no certificate")
	}
	return nvgpu.VerifyStatus(i.Bytes, r.SerialNumber, issuer)
}
