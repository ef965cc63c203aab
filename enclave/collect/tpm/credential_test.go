package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/vtpm"
)

func mustECC(t *testing.T, p *tpm2.TPMTPublic) (*tpm2.TPMSECCParms, *tpm2.TPMSECCPoint) {
	t.Helper()
	parms, err := p.Parameters.ECCDetail()
	if err != nil {
		t.Fatal(err)
	}
	point, err := p.Unique.ECC()
	if err != nil {
		t.Fatal(err)
	}
	return parms, point
}

func verifies(key *ecdsa.PublicKey, attest []byte, s *tpm2.TPMSSignatureECC) bool {
	sum := sha256.Sum256(attest)
	return ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(s.SignatureR.Buffer), new(big.Int).SetBytes(s.SignatureS.Buffer))
}

// makeCredential is TPM2_MakeCredential in software.
func makeCredential(t *testing.T, ek tpm2.TPMTPublic, akPublic, secret []byte) (blob, enc []byte) {
	t.Helper()
	sum := sha256.Sum256(akPublic)
	name := append([]byte{0, 0x0b}, sum[:]...)
	key, err := tpm2.ImportEncapsulationKey(&ek)
	if err != nil {
		t.Fatal(err)
	}
	b, e, err := tpm2.CreateCredential(rand.Reader, key, name, secret)
	if err != nil {
		t.Fatal(err)
	}
	return tpm2.Marshal(tpm2.TPM2BIDObject{Buffer: b}), tpm2.Marshal(tpm2.TPM2BEncryptedSecret{Buffer: e})
}

// endorsementKey makes an endorsement key of the TPM and forgets its handle.
func endorsementKey(t *testing.T, m *machine, template tpm2.TPMTPublic) tpm2.TPMTPublic {
	t.Helper()
	ek, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(m.raw(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: ek.ObjectHandle}).Execute(m.raw(t)); err != nil {
		t.Fatal(err)
	}
	p, err := ek.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	return *p
}

// store defines an NV index and fills it, as a TPM's maker does.
func store(t *testing.T, m *machine, index tpm2.TPMHandle, data []byte) {
	t.Helper()
	tr := m.raw(t)
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
		}),
	}.Execute(tr)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < len(data); off += 512 {
		pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tr)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tpm2.NVWrite{
			AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[off:min(off+512, len(data))]}, Offset: uint16(off),
		}.Execute(tr)
		if err != nil {
			t.Fatal(err)
		}
	}
}

func undefine(t *testing.T, m *machine, index tpm2.TPMHandle) {
	t.Helper()
	tr := m.raw(t)
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tr)
	if err != nil {
		t.Fatal(err)
	}
	// swtpm_setup defines with the platform's authorization, store with the owner's.
	auth := tpm2.TPMRHOwner
	if nv, err := pub.NVPublic.Contents(); err == nil && nv.Attributes.PlatformCreate {
		auth = tpm2.TPMRHPlatform
	}
	if _, err := (tpm2.NVUndefineSpace{AuthHandle: auth, NVIndex: tpm2.NamedHandle{Handle: index, Name: pub.NVName}}).Execute(tr); err != nil {
		t.Fatal(err)
	}
}

// maker is a TPM maker's authority: a root and an intermediate.
type maker struct {
	root, issuer *x509.Certificate
	key          *ecdsa.PrivateKey
}

func newMaker(t *testing.T) maker {
	t.Helper()
	rootKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := func(name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	m := maker{key: key}
	m.root = certify(t, ca("maker root"), ca("maker root"), &rootKey.PublicKey, rootKey)
	m.issuer = certify(t, ca("maker"), m.root, &key.PublicKey, rootKey)
	return m
}

func certify(t *testing.T, template, parent *x509.Certificate, pub any, key *ecdsa.PrivateKey) *x509.Certificate {
	t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (m maker) endorse(t *testing.T, pub any) []byte {
	t.Helper()
	return certify(t, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}},
	}, m.issuer, pub, m.key).Raw
}

func enrol(t *testing.T, m *machine, roots anchor.Set) error {
	t.Helper()
	d := m.open(t)
	chain, err := d.EKChain(t.Context())
	if err != nil {
		return err
	}
	e, err := vtpm.BeginEnrolment(chain, d.AKPublic(), roots, time.Now())
	if err != nil {
		return err
	}
	secret, err := d.Activate(t.Context(), e.CredentialBlob, e.EncryptedSecret)
	if err != nil {
		return err
	}
	if !bytes.Equal(secret, e.Secret[:]) {
		t.Errorf("opened %x, want %x", secret, e.Secret)
	}
	return nil
}

// TestEndorsements enrols against the verifier's own code, with what different
// makers leave in NV.
func TestEndorsements(t *testing.T) {
	m := newMachine(t)
	mk := newMaker(t)
	makers, err := anchor.Vendor().WithEKRoots(anchor.Discrete, mk.root)
	if err != nil {
		t.Fatal(err)
	}
	const ecc, rsaCert, chainArea = 0x01c0000a, 0x01c00002, 0x01c00100

	t.Run("RSA, signed by a root that is not known", func(t *testing.T) {
		if err := enrol(t, m, makers); err == nil {
			t.Error("enrolled")
		}
	})
	t.Run("ECC, its certificate padded, its intermediate in the chain area", func(t *testing.T) {
		parms, point := mustECC(t, ptr(endorsementKey(t, m, tpm2.ECCEKTemplate)))
		pub, err := tpm2.ECDSAPub(parms, point)
		if err != nil {
			t.Fatal(err)
		}
		store(t, m, ecc, append(mk.endorse(t, pub), make([]byte, 700)...))
		defer undefine(t, m, ecc)
		if err := enrol(t, m, makers); err == nil {
			t.Error("enrolled without the intermediate")
		}
		half := len(mk.issuer.Raw) / 2
		store(t, m, chainArea, mk.issuer.Raw[:half])
		defer undefine(t, m, chainArea)
		store(t, m, chainArea+1, append(bytes.Clone(mk.issuer.Raw[half:]), 0xff, 0xff))
		defer undefine(t, m, chainArea+1)
		if err := enrol(t, m, makers); err != nil {
			t.Error(err)
		}
	})
	t.Run("a certificate for another TPM's key", func(t *testing.T) {
		other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		store(t, m, ecc, mk.endorse(t, &other.PublicKey))
		defer undefine(t, m, ecc)
		store(t, m, chainArea, mk.issuer.Raw)
		defer undefine(t, m, chainArea)
		if err := enrol(t, m, makers); err == nil || !strings.Contains(err.Error(), "another key") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("what is no certificate", func(t *testing.T) {
		store(t, m, ecc, []byte("not DER"))
		defer undefine(t, m, ecc)
		if err := enrol(t, m, makers); err == nil || !strings.Contains(err.Error(), "not a DER value") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("none", func(t *testing.T) {
		undefine(t, m, rsaCert)
		if err := enrol(t, m, makers); err == nil || !strings.Contains(err.Error(), "hold none") {
			t.Errorf("got %v", err)
		}
	})
	noLeaks(t, m)
}

func ptr[T any](v T) *T { return &v }
