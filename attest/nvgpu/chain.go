package nvgpu

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"github.com/coffer-run/coffer/attest/anchor"
)

const (
	maxChainPEM = 64 << 10
	// chainLength is that of every Hopper: leaf, device, provisioner, identity
	// of the chip's kind, root.
	chainLength = 5
)

// parseChain reads PEM certificates and nothing else, leaf first.
func parseChain(b []byte, anchors anchor.Set) ([]*x509.Certificate, error) {
	if len(b) > maxChainPEM {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(b), maxChainPEM)
	}
	return anchors.Certificates(b, func(b []byte) ([]*x509.Certificate, error) { return readChain(b, anchors) })
}

func readChain(b []byte, anchors anchor.Set) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for rest := bytes.Trim(b, "\r\n\t \x00"); len(rest) > 0; {
		if !bytes.HasPrefix(rest, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, errors.New("there is something other than certificates in it")
		}
		var block *pem.Block
		block, rest = pem.Decode(rest)
		if block == nil || len(block.Headers) > 0 {
			return nil, errors.New("not PEM")
		}
		if len(out) == chainLength {
			return nil, fmt.Errorf("more than %d certificates", chainLength)
		}
		c, err := anchors.Certificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out), err)
		}
		out = append(out, c)
		rest = bytes.TrimLeft(rest, "\r\n\t ")
	}
	if len(out) != chainLength {
		return nil, fmt.Errorf("%d certificates: want %d", len(out), chainLength)
	}
	return out, nil
}

// architecture is the first word of the name of the device certificate, which
// the provisioner signed: "GH100 A01 GSP BROM".
func architecture(chain []*x509.Certificate) string {
	arch, _, _ := strings.Cut(chain[1].Subject.CommonName, " ")
	return arch
}

// checkChain checks the parts of the chain.
func checkChain(chain []*x509.Certificate, anchors anchor.Set) error {
	leaf, ok := chain[0].PublicKey.(*ecdsa.PublicKey)
	switch {
	case !ok || leaf.Curve.Params().BitSize != 384:
		return errors.New("the report's signing key is not on P-384")
	case chain[0].IsCA || chain[0].KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the leaf certificate is not for signing reports")
	case !anchors.NVIDIADeviceRoot(chain[chainLength-1].Raw):
		return fmt.Errorf("the root certificate %.60q is not the pinned one", chain[chainLength-1].Subject.CommonName)
	}
	return anchors.Path(chain)
}

// leafFWID reads the firmware digest and the device's public key from the
// leaf's CompositeDeviceID (TCG DICE, 2.23.133.5.4.1). nil means that the leaf
// has no such extension.
func leafFWID(leaf *x509.Certificate) (fwid, deviceKey []byte, err error) {
	for _, e := range leaf.Extensions {
		if !e.Id.Equal(asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}) {
			continue
		}
		in := cryptobyte.String(e.Value)
		var seq, spki, id, digest cryptobyte.String
		var version int
		var alg asn1.ObjectIdentifier
		if !in.ReadASN1(&seq, cbasn1.SEQUENCE) || !in.Empty() ||
			!seq.ReadASN1Integer(&version) || version != 1 ||
			!seq.ReadASN1Element(&spki, cbasn1.SEQUENCE) ||
			!seq.ReadASN1(&id, cbasn1.SEQUENCE) || !seq.Empty() ||
			!id.ReadASN1ObjectIdentifier(&alg) || !alg.Equal(asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}) ||
			!id.ReadASN1(&digest, cbasn1.OCTET_STRING) || !id.Empty() || len(digest) != digestSize {
			return nil, nil, errors.New("the leaf's composite device id is malformed")
		}
		return digest, spki, nil
	}
	return nil, nil, nil
}
