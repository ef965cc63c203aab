// Package vtpmtest is the part of a TPM 2.0 that attestation uses, made of
// ordinary keys, for tests: its holder can forge every field, which a TPM would
// not do. Its endorsement key certificate leads to a root minted by New, which
// no verifier trusts unless a test says so.
package vtpmtest

import (
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/vtpm"
)

// TPM is one simulated TPM with an endorsement key, an attestation key and a
// SHA-256 bank of 24 PCRs.
type TPM struct {
	// Root signed the endorsement key's certificate.
	Root *x509.Certificate
	// EKChain is DER, leaf first, without the root.
	EKChain [][]byte
	// AKPublic is TPMT_PUBLIC.
	AKPublic []byte
	// Events are what Extend was given.
	Events []vtpm.Event

	ek   *ecdsa.PrivateKey
	ak   crypto.Signer
	pcrs [24][sha256.Size]byte
}

// New makes a TPM with fresh keys, certified from now - 1 hour for 10 years.
func New(now time.Time) (*TPM, error) {
	ca, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t := &TPM{}
	if t.ek, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	ak, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	t.ak = ak
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "simulated TPM root"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, root, root, &ca.PublicKey, ca)
	if err != nil {
		return nil, err
	}
	if t.Root, err = x509.ParseCertificate(der); err != nil {
		return nil, err
	}
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "simulated endorsement key"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.AddDate(10, 0, 0),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageKeyAgreement,
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
	}
	if der, err = x509.CreateCertificate(rand.Reader, leaf, t.Root, &t.ek.PublicKey, ca); err != nil {
		return nil, err
	}
	t.EKChain = [][]byte{der}
	t.AKPublic, err = AKPublic(&ak.PublicKey, nil)
	return t, err
}

// NewRSA makes a TPM whose attestation key is RSA-2048, signing by RSASSA.
func NewRSA(now time.Time) (*TPM, error) {
	t, err := New(now)
	if err != nil {
		return nil, err
	}
	ak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	t.ak, t.AKPublic = ak, AKPublicRSA(&ak.PublicKey)
	return t, nil
}

// AK returns the attestation key's public half.
func (t *TPM) AK() crypto.PublicKey { return t.ak.Public() }

// AKPublicRSA returns the TPMT_PUBLIC of an RSA attestation key.
func AKPublicRSA(key *rsa.PublicKey) []byte {
	return tpm2.Marshal(tpm2.TPMTPublic{
		Type: tpm2.TPMAlgRSA, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
			KeyBits: tpm2.TPMKeyBits(key.Size() * 8), //nolint:gosec // 2048 to 4096
			Scheme: tpm2.TPMTRSAScheme{
				Scheme:  tpm2.TPMAlgRSASSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: key.N.FillBytes(make([]byte, key.Size()))}),
	})
}

// RSASignature wraps a bare RSASSA signature over SHA-256 into TPMT_SIGNATURE.
func RSASignature(bare []byte) []byte {
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg:    tpm2.TPMAlgRSASSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgRSASSA, &tpm2.TPMSSignatureRSA{Hash: tpm2.TPMAlgSHA256, Sig: tpm2.TPM2BPublicKeyRSA{Buffer: bare}}),
	})
}

// AKPublic returns the TPMT_PUBLIC of an ECC attestation key; change, if there,
// may spoil it first.
func AKPublic(key *ecdsa.PublicKey, change func(*tpm2.TPMTPublic)) ([]byte, error) {
	point, err := key.Bytes()
	if err != nil {
		return nil, err
	}
	pub := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgECC, NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true,
			NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
		}),
	}
	if change != nil {
		change(&pub)
	}
	return tpm2.Marshal(pub), nil
}

// Extend measures events as coffer's agent does.
func (t *TPM) Extend(events ...vtpm.Event) {
	for _, e := range events {
		x := e.Extension()
		t.pcrs[e.PCR] = sha256.Sum256(append(t.pcrs[e.PCR][:], x[:]...))
		t.Events = append(t.Events, e)
	}
}

// PCRs returns the values of the given PCRs.
func (t *TPM) PCRs(index ...int) map[int][]byte {
	out := map[int][]byte{}
	for _, i := range index {
		out[i] = slices.Clone(t.pcrs[i][:])
	}
	return out
}

// Quote signs the given PCRs of the SHA-256 bank; change, if there, may spoil
// the structure before it is signed.
func (t *TPM) Quote(extraData []byte, change func(*tpm2.TPMSAttest), index ...int) (quote, signature []byte, err error) {
	var pcrs []uint
	h := sha256.New()
	slices.Sort(index)
	for _, i := range index {
		pcrs = append(pcrs, uint(i)) //nolint:gosec // a PCR index
		h.Write(t.pcrs[i][:])
	}
	att := tpm2.TPMSAttest{
		Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote,
		QualifiedSigner: tpm2.TPM2BName{Buffer: append([]byte{0x00, 0x0b}, make([]byte, 32)...)},
		ExtraData:       tpm2.TPM2BData{Buffer: extraData},
		ClockInfo:       tpm2.TPMSClockInfo{Clock: 60_000, ResetCount: 1, Safe: true},
		FirmwareVersion: 0x2023_0101_0000_0000,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
				{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(pcrs...)},
			}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		}),
	}
	if change != nil {
		change(&att)
	}
	quote = tpm2.Marshal(att)
	signature, err = t.Sign(quote)
	return quote, signature, err
}

// Sign returns TPMT_SIGNATURE over any bytes at all.
func (t *TPM) Sign(b []byte) ([]byte, error) {
	sum := sha256.Sum256(b)
	der, err := t.ak.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		return nil, err
	}
	if _, ok := t.ak.(*rsa.PrivateKey); ok {
		return RSASignature(der), nil
	}
	var s struct{ R, S *big.Int }
	if _, err := asn1.Unmarshal(der, &s); err != nil {
		return nil, err
	}
	return tpm2.Marshal(tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: s.R.FillBytes(make([]byte, 32))},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: s.S.FillBytes(make([]byte, 32))},
		}),
	}), nil
}

// Activate is TPM2_ActivateCredential: it opens a credential made for this
// TPM's two keys (TPM 2.0 Part 1, section 24).
func (t *TPM) Activate(credentialBlob, encryptedSecret []byte) ([]byte, error) {
	blob, err := tpm2.Unmarshal[tpm2.TPM2BDigest](credentialBlob)
	if err != nil {
		return nil, err
	}
	enc, err := tpm2.Unmarshal[tpm2.TPM2BDigest](encryptedSecret)
	if err != nil {
		return nil, err
	}
	point, err := tpm2.Unmarshal[tpm2.TPMSECCPoint](enc.Buffer)
	if err != nil {
		return nil, err
	}
	peer, err := ecdh.P256().NewPublicKey(slices.Concat([]byte{4}, point.X.Buffer, point.Y.Buffer))
	if err != nil {
		return nil, err
	}
	priv, err := t.ek.ECDH()
	if err != nil {
		return nil, err
	}
	z, err := priv.ECDH(peer)
	if err != nil {
		return nil, err
	}
	ek, err := t.ek.PublicKey.Bytes()
	if err != nil {
		return nil, err
	}
	seed := tpm2.KDFe(crypto.SHA256, z, "IDENTITY", point.X.Buffer, ek[1:33], 256)
	sum := sha256.Sum256(t.AKPublic)
	name := append([]byte{0x00, 0x0b}, sum[:]...)
	if len(blob.Buffer) < 34 {
		return nil, errors.New("credential is too short")
	}
	mac, identity := blob.Buffer[2:34], slices.Clone(blob.Buffer[34:])
	m := hmac.New(sha256.New, tpm2.KDFa(crypto.SHA256, seed, "INTEGRITY", nil, nil, 256))
	m.Write(identity)
	m.Write(name)
	if !hmac.Equal(m.Sum(nil), mac) {
		return nil, errors.New("credential is for other keys")
	}
	block, err := aes.NewCipher(tpm2.KDFa(crypto.SHA256, seed, "STORAGE", name, nil, 128))
	if err != nil {
		return nil, err
	}
	// Part 1, section 24.3: CFB with a zero IV is what the TPM uses here.
	cipher.NewCFBDecrypter(block, make([]byte, aes.BlockSize)).XORKeyStream(identity, identity) //nolint:staticcheck // the TPM's mode
	secret, err := tpm2.Unmarshal[tpm2.TPM2BDigest](identity)
	if err != nil {
		return nil, fmt.Errorf("credential: %w", err)
	}
	return secret.Buffer, nil
}

// ExtendDigest is TPM2_PCR_Extend of the SHA-256 bank, as firmware does it.
func (t *TPM) ExtendDigest(pcr int, digest [sha256.Size]byte) {
	t.pcrs[pcr] = sha256.Sum256(append(t.pcrs[pcr][:], digest[:]...))
}

// SetPCR gives a PCR a value that no TPM would take from a command.
func (t *TPM) SetPCR(pcr int, value [sha256.Size]byte) { t.pcrs[pcr] = value }
