package endorse

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/nvgpu"
)

const hashSHA384 = crypto.SHA384

// errNoChain is of an item that cannot be held against its issuer.
var errNoChain = errors.New("its issuer's certificates are not here")

// verifyChain checks that a chain leads to the pinned root of its product.
func verifyChain(i Item, anchors anchor.Set) error {
	issuer, root, err := chainOf(i)
	if err != nil {
		return err
	}
	p, err := rootProduct(root.Subject.CommonName)
	if err != nil {
		return err
	}
	if !anchors.ARK(p, root.Raw) {
		return fmt.Errorf("the root key of %s is not the pinned one", p)
	}
	return anchors.Path([]*x509.Certificate{issuer, root})
}

// verifySigned checks a VEK or a CRL by its chain, which was verified.
func verifySigned(i Item, chain Item, anchors anchor.Set) error {
	issuer, root, err := chainOf(chain)
	if err != nil {
		return err
	}
	switch i.Key.Kind {
	case VEK:
		c, err := x509.ParseCertificate(i.Bytes)
		if err != nil {
			return err
		}
		return anchors.Path([]*x509.Certificate{c, issuer, root})
	case CRL:
		l, err := x509.ParseRevocationList(i.Bytes)
		if err != nil {
			return err
		}
		return l.CheckSignatureFrom(root)
	case Chain, OCSP, RIM:
	}
	return fmt.Errorf("%s is not signed by a root key of AMD's", i.Key.Kind)
}

// chainKeyFor names the chain by which a VEK or a CRL is verified.
func chainKeyFor(k Key) Key {
	parts := strings.Split(k.ID, "/")
	return Key{Chain, strings.Join(parts[:min(3, len(parts))], "/") + "/cert_chain"}
}

// verifyStatus checks that the issuer, or whom it delegated, answered about
// cert. That the answer is good is for appraisal: the bad news are kept too.
func verifyStatus(i Item, cert, issuer *x509.Certificate) error {
	_, err := ocsp.ParseResponseForCert(i.Bytes, cert, issuer)
	return err
}

// Verify checks an item as far as that can be done without the device that it
// is about: signatures of AMD's up to the pinned root, by chains that lookup
// finds, of manifests up to theirs, and of answers about certificates by one of
// the issuers. An item whose issuer is not known is an error.
func Verify(i Item, lookup func(Key) (Item, bool), issuers *Issuers, anchors anchor.Set) error {
	switch i.Key.Kind {
	case Chain:
		return verifyChain(i, anchors)
	case VEK, CRL:
		chain, ok := lookup(chainKeyFor(i.Key))
		if !ok && i.Key.Kind == CRL {
			// The issuers of both kinds of signing key have one root.
			chain, ok = lookup(Key{Chain, strings.NewReplacer("vcek", "vlek", "vlek", "vcek").Replace(chainKeyFor(i.Key).ID)})
		}
		if !ok {
			return fmt.Errorf("%w: there is no %s", errNoChain, chainKeyFor(i.Key))
		}
		if err := verifyChain(chain, anchors); err != nil {
			return err
		}
		return verifySigned(i, chain, anchors)
	case RIM:
		return nvgpu.VerifyRIM(i.Bytes, anchors)
	case OCSP:
		return issuers.verify(i)
	}
	return fmt.Errorf("unknown kind of endorsement %.40q", string(i.Key.Kind))
}
