package vtpm

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/check"
)

// attestationKey is an AK whose form was checked.
type attestationKey struct {
	public *tpm2.TPMTPublic
	key    crypto.PublicKey
	name   []byte
	// scheme is the only one in which the key signs.
	scheme tpm2.TPMAlgID
}

// parseAK reads a TPMT_PUBLIC and checks that it is a key that signs only what
// the TPM itself made (TPM 2.0 Part 1, section 25.1, and Part 2, section 8.3).
// It reports under "tpm.ak" and returns nil if the key is of no use.
func parseAK(b []byte, m *Memory, l *check.List) *attestationKey {
	ak, missing, err := m.read(b)
	switch {
	case err != nil:
		l.Fail("tpm.ak", "TPMT_PUBLIC of an attestation key", err.Error(), "send the attestation key as the TPM returned it")
		return nil
	case len(missing) > 0:
		l.Fail("tpm.ak", "restricted signing key made in and fixed to its TPM", strings.Join(missing, ", "), "use a restricted, fixed, non-decrypting signing key")
		return nil
	}
	l.Pass("tpm.ak", fmt.Sprintf("restricted, fixed, name %x", ak.name))
	return ak
}

func readAK(b []byte) (_ *attestationKey, missing []string, _ error) {
	pub, err := decode[tpm2.TPMTPublic](b, maxPublic)
	if err != nil {
		return nil, nil, err
	}
	// The name of the key is H(public) under its own name algorithm; SHA-256 is
	// the only one that credentials are made for here.
	if pub.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, nil, errors.New("name algorithm is not SHA-256")
	}
	a := pub.ObjectAttributes
	for _, r := range []struct {
		ok   bool
		what string
	}{
		{a.Restricted, "not restricted"},
		{a.SignEncrypt, "does not sign"},
		{!a.Decrypt, "decrypts"},
		{a.FixedTPM, "not fixed to its TPM"},
		{a.FixedParent, "not fixed to its parent"},
		{a.SensitiveDataOrigin, "not made by the TPM"},
	} {
		if !r.ok {
			missing = append(missing, r.what)
		}
	}
	sum := sha256.Sum256(b)
	ak := &attestationKey{public: pub, name: append([]byte{0x00, 0x0b}, sum[:]...)}
	switch pub.Type {
	case tpm2.TPMAlgECC:
		err = ak.readECC()
	case tpm2.TPMAlgRSA:
		err = ak.readRSA()
	default:
		err = fmt.Errorf("key type %#x is neither ECC nor RSA", uint16(pub.Type))
	}
	if err != nil {
		return nil, nil, err
	}
	return ak, missing, nil
}

func (ak *attestationKey) readECC() error {
	params, err := ak.public.Parameters.ECCDetail()
	if err != nil {
		return err
	}
	point, err := ak.public.Unique.ECC()
	if err != nil {
		return err
	}
	if params.CurveID != tpm2.TPMECCNistP256 {
		return errors.New("curve is not NIST P-256")
	}
	if params.Scheme.Scheme != tpm2.TPMAlgECDSA {
		return errors.New("scheme is not ECDSA")
	}
	scheme, err := params.Scheme.Details.ECDSA()
	if err != nil {
		return err
	}
	if scheme.HashAlg != tpm2.TPMAlgSHA256 {
		return errors.New("scheme hash is not SHA-256")
	}
	pub, err := tpm2.ECDSAPub(params, point)
	if err != nil {
		return err
	}
	if _, err := pub.ECDH(); err != nil {
		return errors.New("public point is not on the curve")
	}
	ak.key, ak.scheme = pub, tpm2.TPMAlgECDSA
	return nil
}

func (ak *attestationKey) readRSA() error {
	params, err := ak.public.Parameters.RSADetail()
	if err != nil {
		return err
	}
	modulus, err := ak.public.Unique.RSA()
	if err != nil {
		return err
	}
	if params.KeyBits < 2048 || params.KeyBits > 4096 || len(modulus.Buffer)*8 != int(params.KeyBits) || modulus.Buffer[0]&0x80 == 0 {
		return fmt.Errorf("RSA key of %d bits: want 2048 to 4096", params.KeyBits)
	}
	// Part 2, section 12.2.3.5: zero means 65537, the only exponent in use.
	if params.Exponent != 0 && params.Exponent != 65537 {
		return errors.New("RSA exponent is not 65537")
	}
	var hash tpm2.TPMIAlgHash
	switch params.Scheme.Scheme {
	case tpm2.TPMAlgRSASSA:
		s, err := params.Scheme.Details.RSASSA()
		if err != nil {
			return err
		}
		hash = s.HashAlg
	case tpm2.TPMAlgRSAPSS:
		s, err := params.Scheme.Details.RSAPSS()
		if err != nil {
			return err
		}
		hash = s.HashAlg
	default:
		return errors.New("scheme is neither RSASSA nor RSAPSS")
	}
	if hash != tpm2.TPMAlgSHA256 {
		return errors.New("scheme hash is not SHA-256")
	}
	ak.key = &rsa.PublicKey{N: new(big.Int).SetBytes(modulus.Buffer), E: 65537}
	ak.scheme = params.Scheme.Scheme
	return nil
}

// verify checks a TPMT_SIGNATURE over message in the key's own scheme.
func (ak *attestationKey) verify(message, signature []byte) error {
	sig, err := readSignature(signature)
	if err != nil {
		return fmt.Errorf("TPMT_SIGNATURE: %w", err)
	}
	if sig.scheme != ak.scheme {
		return fmt.Errorf("signature scheme %#x is not the key's, %#x", uint16(sig.scheme), uint16(ak.scheme))
	}
	if sig.hash != tpm2.TPMAlgSHA256 {
		return errors.New("signature hash is not SHA-256")
	}
	sum := sha256.Sum256(message)
	ok := false
	switch key := ak.key.(type) {
	case *ecdsa.PublicKey:
		ok = ak.scheme == tpm2.TPMAlgECDSA && ecdsa.Verify(key, sum[:], sig.r, sig.s)
	case *rsa.PublicKey:
		if ak.scheme == tpm2.TPMAlgRSAPSS {
			ok = rsa.VerifyPSS(key, crypto.SHA256, sum[:], sig.rsa, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthAuto}) == nil
		} else {
			ok = ak.scheme == tpm2.TPMAlgRSASSA && rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], sig.rsa) == nil
		}
	}
	if !ok {
		return errors.New("signature is not by this key")
	}
	return nil
}
