package simulate

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ocsp"
)

// driverIndexes and vbiosIndexes are of the measurements that the manifests of
// driver and VBIOS speak of.
func driverIndexes() []int { return append([]int{7}, span(21, 40)...) }
func vbiosIndexes() []int  { return append(span(0, 6), span(8, 12)...) }

func span(from, to int) []int {
	out := make([]int, 0, to-from+1)
	for i := from; i <= to; i++ {
		out = append(out, i)
	}
	return out
}

// RIMOptions say how a manifest differs from the one that fits the GPUs.
type RIMOptions struct {
	// Version and Product replace what it is about.
	Version, Product string
	// Values replaces the acceptable values of single measurements, by index.
	// An index beside the usual ones is added.
	Values map[int][][48]byte
	// Empty leaves out all active measurements.
	Empty bool
	// SignerNotAfter replaces the signer's usual two years.
	SignerNotAfter time.Time
	// EditSigner changes the signer's certificate before it is signed.
	EditSigner func(*x509.Certificate)
	// EditContent changes the content before it is signed.
	EditContent func(string) string
	// EditSigned changes the manifest after it is signed.
	EditSigned func(string) string
	// OmitRoot leaves the root certificate out.
	OmitRoot bool
}

const rimHead = `<SoftwareIdentity xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384" corpus="false" name=%q patch="false" supplemental="false" tagId="simulation" version="1.0" tagVersion="0">
    <ns0:Entity name=%q role="softwareCreator tagCreator"></ns0:Entity>
    <ns0:Meta colloquialVersion=%q edition="GPU" product=%q revision="r1"></ns0:Meta>
    <ns0:Payload>
`

const rimTail = `    </ns0:Payload>
`

// RIM returns the manifest of that id, as NVIDIA's service would, or an error
// if it is not of this simulation's GPUs.
func (v *Vendor) RIM(_ context.Context, id string) ([]byte, error) {
	kind := strings.TrimPrefix(id, "NV_GPU_")
	driver := "DRIVER_GH100_" + DefaultDriver
	vbios := strings.ToUpper("VBIOS_" + gpuProject + "_" + gpuProjectSKU + "_" + gpuChipSKU + "_" + strings.ReplaceAll(DefaultVBIOS, ".", ""))
	switch kind {
	case driver:
		return v.DriverRIM(RIMOptions{})
	case vbios:
		return v.VBIOSRIM(RIMOptions{})
	}
	return nil, fmt.Errorf("simulated RIM service: no manifest %.80q", id)
}

// DriverRIM makes the manifest of the GPUs' driver.
func (v *Vendor) DriverRIM(o RIMOptions) ([]byte, error) {
	return v.rim(DefaultDriver, driverIndexes(), o)
}

// VBIOSRIM makes the manifest of the GPUs' VBIOS.
func (v *Vendor) VBIOSRIM(o RIMOptions) ([]byte, error) {
	return v.rim(strings.ToUpper(DefaultVBIOS), vbiosIndexes(), o)
}

// rim writes a manifest that is in the form of Canonical XML 1.1 but for the
// place of the signature, so that it can be signed as it stands.
func (v *Vendor) rim(version string, indexes []int, o RIMOptions) ([]byte, error) {
	product := "GH100"
	if o.Version != "" {
		version = o.Version
	}
	if o.Product != "" {
		product = o.Product
	}
	var b strings.Builder
	fmt.Fprintf(&b, rimHead, product, v.nvidiaName("").Organization[0], version, product)
	for i := range 64 {
		active, values := slices.Contains(indexes, i), [][48]byte{{}}
		if active {
			values[0] = Measurement(i)
		}
		if other, ok := o.Values[i]; ok {
			active, values = true, other
		}
		active = active && !o.Empty
		fmt.Fprintf(&b, "        <ns0:Resource active=%q alternatives=\"%d\" index=\"%d\" name=\"Measurement_%d\" size=\"48\" type=\"Measurement\"", map[bool]string{true: "True", false: "False"}[active], len(values), i, i)
		for n, value := range values {
			fmt.Fprintf(&b, " ns2:Hash%d=\"%x\"", n, value)
		}
		b.WriteString("></ns0:Resource>\n")
	}
	b.WriteString(rimTail)
	content := b.String()
	if o.EditContent != nil {
		content = o.EditContent(content)
	}

	ca, caKey, err := v.rimIssuer()
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	signer := &x509.Certificate{
		SerialNumber: randomSerial(8), Subject: v.nvidiaName("HCC RIM L4 Signer"), NotBefore: v.now.Add(-time.Hour), NotAfter: v.now.AddDate(2, 0, 0),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}
	if !o.SignerNotAfter.IsZero() {
		signer.NotAfter = o.SignerNotAfter
	}
	if o.EditSigner != nil {
		o.EditSigner(signer)
	}
	cert, err := certify(signer, ca, &key.PublicKey, caKey)
	if err != nil {
		return nil, fmt.Errorf("certify simulated RIM signer: %w", err)
	}
	chain := []*x509.Certificate{cert, ca, v.rimRoot}
	if o.OmitRoot {
		chain = chain[:2]
	}

	// Canonical XML sorts attributes by namespace, then name: those without
	// namespace first, and the namespaces before all.
	canonical := sortRootAttributes(content) + "</SoftwareIdentity>"
	digest := sha512.Sum384([]byte(canonical))
	info := `<ds:CanonicalizationMethod Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:CanonicalizationMethod><ds:SignatureMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"></ds:SignatureMethod><ds:Reference URI=""><ds:Transforms><ds:Transform Algorithm="http://www.w3.org/2000/09/xmldsig#enveloped-signature"></ds:Transform><ds:Transform Algorithm="http://www.w3.org/2006/12/xml-c14n11"></ds:Transform></ds:Transforms><ds:DigestMethod Algorithm="http://www.w3.org/2001/04/xmldsig-more#sha384"></ds:DigestMethod><ds:DigestValue>` +
		base64.StdEncoding.EncodeToString(digest[:]) + `</ds:DigestValue></ds:Reference></ds:SignedInfo>`
	around := `<ds:SignedInfo xmlns="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ds="http://www.w3.org/2000/09/xmldsig#" xmlns:ns0="http://standards.iso.org/iso/19770/-2/2015/schema.xsd" xmlns:ns2="http://www.w3.org/2001/04/xmlenc#sha384">`
	sum := sha512.Sum384([]byte(around + info))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return nil, fmt.Errorf("sign simulated RIM: %w", err)
	}
	var sig [96]byte
	r.FillBytes(sig[:48])
	s.FillBytes(sig[48:])
	var out bytes.Buffer
	out.WriteString(content)
	out.WriteString(`<ds:Signature xmlns:ds="http://www.w3.org/2000/09/xmldsig#"><ds:SignedInfo>` + info + `<ds:SignatureValue>` + base64.StdEncoding.EncodeToString(sig[:]) + `</ds:SignatureValue><ds:KeyInfo><ds:X509Data>`)
	for _, c := range chain {
		out.WriteString(`<ds:X509Certificate>` + base64.StdEncoding.EncodeToString(c.Raw) + `</ds:X509Certificate>`)
	}
	out.WriteString(`</ds:X509Data></ds:KeyInfo></ds:Signature></SoftwareIdentity>`)
	if o.EditSigned != nil {
		return []byte(o.EditSigned(out.String())), nil
	}
	return out.Bytes(), nil
}

// sortRootAttributes puts version last and tagVersion before it, where the
// canonical form has them; all else in a manifest stands in order.
func sortRootAttributes(content string) string {
	return strings.Replace(content, `version="1.0" tagVersion="0"`, `tagVersion="0" version="1.0"`, 1)
}

// rimIssuer is the CA of manifest signers, made on first use.
func (v *Vendor) rimIssuer() (*x509.Certificate, *ecdsa.PrivateKey, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.rimCA != nil {
		return v.rimCA, v.rimCAKey, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	c, err := certify(&x509.Certificate{
		SerialNumber: randomSerial(16), Subject: v.nvidiaName("NVIDIA Reference Value GH100 CA"), NotBefore: v.now.Add(-time.Hour), NotAfter: v.now.AddDate(10, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}, v.rimRoot, &key.PublicKey, v.rimKey)
	if err != nil {
		return nil, nil, err
	}
	v.rimCA, v.rimCAKey = c, key
	return c, key, nil
}

// OCSPOptions say how an answer differs from "good, for a day".
type OCSPOptions struct {
	// Status is ocsp.Good, ocsp.Revoked or ocsp.Unknown.
	Status int
	// Reason goes with Revoked; 6 is on hold.
	Reason int
	// ThisUpdate replaces the time of minting.
	ThisUpdate time.Time
	// Hash replaces SHA-384 in the CertID.
	Hash crypto.Hash
	// Serial replaces the certificate's.
	Serial *big.Int
	// EditResponder changes the responder's certificate before it is signed.
	EditResponder func(*x509.Certificate)
	// CertIDOf makes the answer name another issuer.
	CertIDOf *x509.Certificate
}

// OCSP returns the status of cert, as NVIDIA's responders would: good.
func (v *Vendor) OCSP(_ context.Context, cert, issuer *x509.Certificate) ([]byte, error) {
	return v.OCSPAnswer(cert, issuer, OCSPOptions{})
}

// OCSPAnswer makes an answer by a responder that issuer delegated.
func (v *Vendor) OCSPAnswer(cert, issuer *x509.Certificate, o OCSPOptions) ([]byte, error) {
	_, caKey, err := v.rimIssuer()
	if err != nil {
		return nil, err
	}
	var issuerKey *ecdsa.PrivateKey
	for _, k := range []*ecdsa.PrivateKey{v.deviceKey, v.identityKey, v.icaKey, v.rimKey, caKey} {
		if k.PublicKey.Equal(issuer.PublicKey) {
			issuerKey = k
		}
	}
	if issuerKey == nil {
		return nil, fmt.Errorf("simulated OCSP responder: %s is not of this simulation", issuer.Subject.CommonName)
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: randomSerial(16), Subject: v.nvidiaName("NVIDIA OCSP Responder"), NotBefore: v.now.Add(-time.Hour), NotAfter: v.now.AddDate(1, 0, 0),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}
	if o.EditResponder != nil {
		o.EditResponder(template)
	}
	responder, err := certify(template, issuer, &key.PublicKey, issuerKey)
	if err != nil {
		return nil, fmt.Errorf("certify simulated OCSP responder: %w", err)
	}
	answer := ocsp.Response{
		Status: o.Status, SerialNumber: cert.SerialNumber, Certificate: responder, IssuerHash: crypto.SHA384,
		ThisUpdate: v.now.Add(-time.Minute), SignatureAlgorithm: x509.ECDSAWithSHA384,
	}
	if o.Serial != nil {
		answer.SerialNumber = o.Serial
	}
	if o.Hash != 0 {
		answer.IssuerHash = o.Hash
	}
	if !o.ThisUpdate.IsZero() {
		answer.ThisUpdate = o.ThisUpdate
	}
	answer.NextUpdate = answer.ThisUpdate.Add(24 * time.Hour)
	if o.Status == ocsp.Revoked {
		answer.RevokedAt, answer.RevocationReason = v.now.Add(-time.Minute), o.Reason
	}
	named := issuer
	if o.CertIDOf != nil {
		named = o.CertIDOf
	}
	der, err := ocsp.CreateResponse(named, responder, answer, key)
	if err != nil {
		return nil, fmt.Errorf("sign simulated OCSP answer: %w", err)
	}
	return der, nil
}

// CRLOptions say how a revocation list differs from the usual.
type CRLOptions struct {
	// Revoked are the serial numbers that it names.
	Revoked []*big.Int
	// ByASK has it signed by the issuer of VCEKs, not by the root key.
	ByASK bool
	// Edit changes the list before it is signed.
	Edit func(*x509.RevocationList)
}

// CRL returns the AMD root key's revocation list with the serial numbers given.
func (v *Vendor) CRL(thisUpdate time.Time, revoked ...*big.Int) ([]byte, error) {
	return v.CRLWith(thisUpdate, CRLOptions{Revoked: revoked})
}

// CRLWith returns a revocation list that is current for a month.
func (v *Vendor) CRLWith(thisUpdate time.Time, o CRLOptions) ([]byte, error) {
	issuer, key := v.ark, v.arkKey
	if o.ByASK {
		// Go signs lists for those only whose certificates allow it.
		ask := *v.ask
		ask.KeyUsage |= x509.KeyUsageCRLSign
		issuer, key = &ask, v.askKey
	}
	t := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: thisUpdate, NextUpdate: thisUpdate.AddDate(0, 1, 0), SignatureAlgorithm: x509.SHA384WithRSAPSS}
	for _, s := range o.Revoked {
		t.RevokedCertificateEntries = append(t.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: s, RevocationTime: thisUpdate})
	}
	if o.Edit != nil {
		o.Edit(t)
	}
	der, err := x509.CreateRevocationList(rand.Reader, t, issuer, key)
	if err != nil {
		return nil, fmt.Errorf("sign simulated CRL: %w", err)
	}
	return der, nil
}
