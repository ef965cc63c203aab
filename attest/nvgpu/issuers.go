package nvgpu

import (
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"

	"github.com/coffer-run/coffer/attest/anchor"
)

// VerifyChain returns the certificates of a device's chain, PEM and leaf first,
// that lead to the pinned root. Not checked: their times and status, and any
// report; appraisal checks those.
func VerifyChain(b []byte, anchors anchor.Set) ([]*x509.Certificate, error) {
	chain, err := parseChain(b, anchors)
	if err != nil {
		return nil, fmt.Errorf("device's chain: %w", err)
	}
	if err := checkChain(chain, anchors); err != nil {
		return nil, fmt.Errorf("device's chain: %w", err)
	}
	return chain, nil
}

// RIMChain returns the certificates of a reference integrity manifest, its
// signer's first, if VerifyRIM accepts it.
func RIMChain(b []byte, anchors anchor.Set) ([]*x509.Certificate, error) {
	m, err := parseRIM(b)
	var form rimFormError
	switch {
	case errors.As(err, &form):
		return nil, fmt.Errorf("manifest is not in its form: %w", err)
	case err != nil:
		return nil, fmt.Errorf("manifest's signature does not hold: %w", err)
	}
	if err := checkRIMChain(m.chain, anchors); err != nil {
		return nil, fmt.Errorf("manifest's signer is not trusted: %w", err)
	}
	return m.chain, nil
}

// VerifyStatus checks that an answer about the certificate with this serial
// number (RFC 6960) is by its issuer, or by whom that delegated. Whether it is
// current, and good news, is for appraisal to say.
func VerifyStatus(der []byte, serial *big.Int, issuer *x509.Certificate) error {
	if len(der) > maxOCSP {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(der), maxOCSP)
	}
	_, err := parseOCSP(der, &x509.Certificate{SerialNumber: serial}, issuer)
	return err
}
