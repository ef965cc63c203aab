package tpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// NV indices of TCG EK Credential Profile for TPM 2.0, sections 2.2.1.4 and 2.2.1.5.
const (
	ekCertRSA   tpm2.TPMHandle = 0x01c00002
	ekCertECC   tpm2.TPMHandle = 0x01c0000a
	ekChainFrom uint32         = 0x01c00100
	ekChainTo   uint32         = 0x01c001ff
)

const (
	// maxNV bounds one NV index that is read, in bytes.
	maxNV = 16 << 10
	// maxChain bounds the intermediates of an endorsement chain.
	maxChain = 5
	// nvChunk is what every TPM returns in one read.
	nvChunk = 512
)

// endorsement is an endorsement key that has a certificate.
type endorsement struct {
	certificate []byte
	template    tpm2.TPMTPublic
}

// EKChain returns the endorsement key's certificate and the intermediates that
// its maker stored beside it, as DER.
func (t *TPM) EKChain(ctx context.Context) ([][]byte, error) {
	chain, err := do(ctx, t, func(tr transport.TPM) ([][]byte, error) {
		ek, err := findEndorsement(tr)
		if err != nil {
			return nil, err
		}
		rest, err := intermediates(tr)
		return append([][]byte{ek.certificate}, rest...), err
	})
	if err != nil {
		return nil, fmt.Errorf("endorsement certificate: %w", err)
	}
	return chain, nil
}

// Activate opens a credential that the verifier made for the endorsement key and
// this attestation key: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET.
func (t *TPM) Activate(ctx context.Context, credentialBlob, encryptedSecret []byte) ([]byte, error) {
	blob, err := exact[tpm2.TPM2BIDObject](credentialBlob)
	if err != nil {
		return nil, fmt.Errorf("activate credential: blob: %w", err)
	}
	secret, err := exact[tpm2.TPM2BEncryptedSecret](encryptedSecret)
	if err != nil {
		return nil, fmt.Errorf("activate credential: secret: %w", err)
	}
	out, err := do(ctx, t, func(tr transport.TPM) ([]byte, error) { return t.activate(tr, *blob, *secret) })
	if err != nil {
		return nil, fmt.Errorf("activate credential: %w", err)
	}
	return out, nil
}

func (t *TPM) activate(tr transport.TPM, blob tpm2.TPM2BIDObject, secret tpm2.TPM2BEncryptedSecret) (_ []byte, err error) {
	found, err := findEndorsement(tr)
	if err != nil {
		return nil, err
	}
	ek, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic:      tpm2.New2B(found.template),
	}.Execute(tr)
	if err != nil {
		return nil, fmt.Errorf("create endorsement key: %w", err)
	}
	defer func() { err = errors.Join(err, flush(tr, ek.ObjectHandle)) }()
	if err := certifies(found.certificate, ek.OutPublic); err != nil {
		return nil, err
	}

	session, closeSession, err := tpm2.PolicySession(tr, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return nil, fmt.Errorf("open session: %w", err)
	}
	defer func() { err = errors.Join(err, closeSession()) }()
	// The default templates' policy (EK Credential Profile, annex B.2).
	_, err = tpm2.PolicySecret{
		AuthHandle:    tpm2.TPMRHEndorsement,
		PolicySession: session.Handle(),
		NonceTPM:      session.NonceTPM(),
	}.Execute(tr)
	if err != nil {
		return nil, fmt.Errorf("endorsement policy: %w", err)
	}
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: t.akHandle, Name: t.akName, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle:      tpm2.AuthHandle{Handle: ek.ObjectHandle, Name: ek.Name, Auth: session},
		CredentialBlob: blob,
		Secret:         secret,
	}.Execute(tr)
	if err != nil {
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

// exact decodes b and refuses anything after the value.
func exact[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte) (*T, error) {
	v, err := tpm2.Unmarshal[T, P](b)
	if err != nil {
		return nil, err
	}
	if n := len(tpm2.Marshal(*v)); n != len(b) {
		return nil, fmt.Errorf("%d bytes, its value has %d", len(b), n)
	}
	return v, nil
}

// findEndorsement prefers the ECC key, which is the quicker to make again.
func findEndorsement(tr transport.TPM) (endorsement, error) {
	for _, e := range []struct {
		index    tpm2.TPMHandle
		template tpm2.TPMTPublic
	}{{ekCertECC, tpm2.ECCEKTemplate}, {ekCertRSA, tpm2.RSAEKTemplate}} {
		b, err := readNV(tr, e.index)
		if errors.Is(err, tpm2.TPMRCHandle) {
			continue
		}
		if err != nil {
			return endorsement{}, err
		}
		der, _, err := cutDER(b)
		if err != nil {
			return endorsement{}, fmt.Errorf("NV index %#x: %w", uint32(e.index), err)
		}
		return endorsement{certificate: der, template: e.template}, nil
	}
	return endorsement{}, fmt.Errorf("NV indices %#x and %#x hold none", uint32(ekCertECC), uint32(ekCertRSA))
}

// intermediates reads the chain area (EK Credential Profile, section 2.2.1.5.2):
// certificates one after the other, over one or more indices.
func intermediates(tr transport.TPM) ([][]byte, error) {
	hs, err := handles(tr, ekChainFrom)
	if err != nil {
		return nil, err
	}
	var all []byte
	for _, h := range hs {
		if uint32(h) > ekChainTo {
			break
		}
		b, err := readNV(tr, h)
		if err != nil {
			return nil, err
		}
		if all = append(all, b...); len(all) > maxNV {
			return nil, fmt.Errorf("certificate chain in NV exceeds %d bytes", maxNV)
		}
	}
	var out [][]byte
	for len(all) > 0 && all[0] == 0x30 {
		der, rest, err := cutDER(all)
		if err != nil {
			return nil, fmt.Errorf("certificate chain in NV: %w", err)
		}
		if out = append(out, der); len(out) > maxChain {
			return nil, fmt.Errorf("certificate chain in NV has more than %d certificates", maxChain)
		}
		all = rest
	}
	return out, nil
}

// cutDER takes the first DER value off b. Makers fill the rest of an index with
// padding.
func cutDER(b []byte) (der, rest []byte, err error) {
	var v asn1.RawValue
	rest, err = asn1.Unmarshal(b, &v)
	if err != nil {
		return nil, nil, fmt.Errorf("not a DER value: %w", err)
	}
	return v.FullBytes, rest, nil
}

func readNV(tr transport.TPM, index tpm2.TPMHandle) ([]byte, error) {
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tr)
	if err != nil {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), err)
	}
	nv, err := pub.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("NV index %#x: %w", uint32(index), err)
	}
	if nv.DataSize > maxNV {
		return nil, fmt.Errorf("NV index %#x has %d bytes, at most %d are read", uint32(index), nv.DataSize, maxNV)
	}
	// Endorsement certificates are readable with the index's own, empty
	// authorization; some makers leave only the owner's.
	auth := tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)}
	if !nv.Attributes.AuthRead {
		auth = tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	}
	out := make([]byte, 0, nv.DataSize)
	for len(out) < int(nv.DataSize) {
		rsp, err := tpm2.NVRead{
			AuthHandle: auth,
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
			Size:       min(nvChunk, nv.DataSize-uint16(len(out))), //nolint:gosec // below DataSize
			Offset:     uint16(len(out)),                           //nolint:gosec // below DataSize
		}.Execute(tr)
		if err != nil {
			return nil, fmt.Errorf("NV index %#x: %w", uint32(index), err)
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, fmt.Errorf("NV index %#x: the TPM returned nothing", uint32(index))
		}
		out = append(out, rsp.Data.Buffer...)
	}
	return out, nil
}

// certifies says whether the certificate is for this key, so that a TPM whose
// maker used another template is named as that rather than failing to open the
// credential.
func certifies(der []byte, public tpm2.TPM2BPublic) error {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("endorsement certificate: %w", err)
	}
	p, err := public.Contents()
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	same := false
	switch pub := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		if u, err := p.Unique.RSA(); err == nil {
			same = pub.N.Cmp(new(big.Int).SetBytes(u.Buffer)) == 0
		}
	case *ecdsa.PublicKey:
		u, err := p.Unique.ECC()
		if err == nil && pub.Curve == elliptic.P256() {
			point := make([]byte, 1+64)
			point[0] = 4
			x, y := new(big.Int).SetBytes(u.X.Buffer), new(big.Int).SetBytes(u.Y.Buffer)
			if x.BitLen() <= 256 && y.BitLen() <= 256 {
				x.FillBytes(point[1:33])
				y.FillBytes(point[33:])
			}
			b, err := pub.Bytes()
			same = err == nil && bytes.Equal(b, point)
		}
	}
	if !same {
		return errors.New("endorsement certificate is for another key than the default template makes")
	}
	return nil
}
