package nvgpu

import (
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
)

const maxOCSP = 16 << 10

// status is what a responder that may speak for the issuer said of a certificate.
type status struct {
	good                   error // nil if the certificate is good
	responder              *x509.Certificate
	thisUpdate, nextUpdate time.Time
}

// check checks that the status was good and is current at now.
func (s *status) check(now time.Time) error {
	if s.good != nil {
		return s.good
	}
	if s.responder != nil {
		if err := anchor.CheckTimes([]*x509.Certificate{s.responder}, now); err != nil {
			return err
		}
	}
	if now.Before(s.thisUpdate) || s.nextUpdate.IsZero() || now.After(s.nextUpdate) {
		return fmt.Errorf("the answer is of %s to %s", s.thisUpdate.UTC().Format(time.RFC3339), s.nextUpdate.UTC().Format(time.RFC3339))
	}
	return nil
}

func (m *Memory) status(der []byte, cert, issuer *x509.Certificate) (*status, error) {
	if len(der) > maxOCSP {
		return nil, fmt.Errorf("%d bytes, at most %d are allowed", len(der), maxOCSP)
	}
	if m == nil {
		return parseOCSP(der, cert, issuer)
	}
	return remember(&m.mu, m.statuses, keyOf(der, cert.Raw, issuer.Raw), func() (*status, error) { return parseOCSP(der, cert, issuer) })
}

// parseOCSP reads what der says of cert (RFC 6960). The library verifies the
// signatures; that the responder may speak for issuer, and that it speaks of
// this certificate, it leaves to its caller.
func parseOCSP(der []byte, cert, issuer *x509.Certificate) (*status, error) {
	r, err := ocsp.ParseResponseForCert(der, cert, issuer)
	if err != nil {
		return nil, err
	}
	if err := checkCertID(r.TBSResponseData, cert, issuer); err != nil {
		return nil, err
	}
	if d := r.Certificate; d != nil {
		// The issuer signed it, or ParseResponseForCert would have refused.
		switch {
		case !slices.Contains(d.ExtKeyUsage, x509.ExtKeyUsageOCSPSigning):
			return nil, fmt.Errorf("%s may not answer for the issuer", d.Subject.CommonName)
		case len(d.UnhandledCriticalExtensions) > 0:
			return nil, fmt.Errorf("%s has a critical extension that is not understood", d.Subject.CommonName)
		}
	}
	s := &status{responder: r.Certificate, thisUpdate: r.ThisUpdate, nextUpdate: r.NextUpdate}
	switch r.Status {
	case ocsp.Good:
	case ocsp.Revoked:
		s.good = fmt.Errorf("revoked at %s for reason %d", r.RevokedAt.UTC().Format(time.RFC3339), r.RevocationReason)
	default:
		s.good = errors.New("the responder does not know the certificate")
	}
	return s, nil
}

// checkCertID checks that a response speaks of one certificate, and that this
// is cert as its issuer issued it: name, key and serial number, by SHA-384.
func checkCertID(tbs []byte, cert, issuer *x509.Certificate) error {
	malformed := errors.New("the answer is malformed")
	in := cryptobyte.String(tbs)
	var data, responses, single, id, alg, name, key cryptobyte.String
	var hash asn1.ObjectIdentifier
	serial := new(cryptobyte.String)
	if !in.ReadASN1(&data, cbasn1.SEQUENCE) || !in.Empty() ||
		!data.SkipOptionalASN1(cbasn1.Tag(0).Constructed().ContextSpecific()) ||
		!data.SkipOptionalASN1(cbasn1.Tag(1).Constructed().ContextSpecific()) ||
		!data.SkipOptionalASN1(cbasn1.Tag(2).Constructed().ContextSpecific()) ||
		!data.SkipASN1(cbasn1.GeneralizedTime) ||
		!data.ReadASN1(&responses, cbasn1.SEQUENCE) ||
		!responses.ReadASN1(&single, cbasn1.SEQUENCE) ||
		!single.ReadASN1(&id, cbasn1.SEQUENCE) {
		return malformed
	}
	if !responses.Empty() {
		return errors.New("the answer speaks of several certificates")
	}
	if !id.ReadASN1(&alg, cbasn1.SEQUENCE) || !alg.ReadASN1ObjectIdentifier(&hash) ||
		!id.ReadASN1(&name, cbasn1.OCTET_STRING) || !id.ReadASN1(&key, cbasn1.OCTET_STRING) ||
		!id.ReadASN1(serial, cbasn1.INTEGER) || !id.Empty() {
		return malformed
	}
	if !hash.Equal(asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}) {
		return errors.New("the answer does not name the issuer by SHA-384")
	}
	spki := cryptobyte.String(issuer.RawSubjectPublicKeyInfo)
	var seq cryptobyte.String
	var bits asn1.BitString
	if !spki.ReadASN1(&seq, cbasn1.SEQUENCE) || !seq.SkipASN1(cbasn1.SEQUENCE) || !seq.ReadASN1BitString(&bits) {
		return malformed
	}
	wantName, wantKey := sha512.Sum384(issuer.RawSubject), sha512.Sum384(bits.RightAlign())
	var wantSerial cryptobyte.Builder
	wantSerial.AddASN1BigInt(cert.SerialNumber)
	der, err := wantSerial.Bytes()
	if err != nil {
		return malformed
	}
	// der has the tag and the length in front, which a serial of at most 20
	// bytes needs two bytes for.
	if string(name) != string(wantName[:]) || string(key) != string(wantKey[:]) || string(*serial) != string(der[2:]) {
		return errors.New("the answer is about another certificate")
	}
	return nil
}
