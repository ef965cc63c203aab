package nvgpu

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha512"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strconv"
	"strings"

	"github.com/beevik/etree"
	dsig "github.com/russellhaering/goxmldsig"

	"github.com/coffer-run/coffer/attest/anchor"
)

const (
	maxRIM      = 512 << 10
	maxRIMDepth = 8
	maxRIMNodes = 4096

	nsSWID    = "http://standards.iso.org/iso/19770/-2/2015/schema.xsd"
	nsSHA384  = "http://www.w3.org/2001/04/xmlenc#sha384"
	nsDSig    = "http://www.w3.org/2000/09/xmldsig#"
	algC14N   = "http://www.w3.org/2006/12/xml-c14n11"
	algSigned = "http://www.w3.org/2001/04/xmldsig-more#ecdsa-sha384"
	algDigest = "http://www.w3.org/2001/04/xmldsig-more#sha384"
	algEnvel  = "http://www.w3.org/2000/09/xmldsig#enveloped-signature"
)

// rim is a reference integrity manifest (TCG RIM information model, in NVIDIA's
// SWID tag) whose signature was verified by the first of its certificates.
// Whether those lead to an anchor is for checkRIMChain.
type rim struct {
	version string
	product string
	// golden are the acceptable values of the active measurements by index.
	golden map[int][][digestSize]byte
	chain  []*x509.Certificate
}

// rimFormError is of a manifest that is not in its form; any other error is of
// one whose signature is not good.
type rimFormError struct{ error }

// VerifyRIM checks that a reference integrity manifest is in its form, is signed
// by the first of its certificates, and that these lead to the pinned root. Not
// checked: the certificates' times and status, and what the manifest is of;
// appraisal checks those.
func VerifyRIM(b []byte, anchors anchor.Set) error {
	_, err := RIMChain(b, anchors)
	return err
}

// parseRIM reads a manifest and verifies its signature. The values are read
// from the very bytes that the signature's digest is over, so that what was
// signed and what is used cannot differ.
//
// goxmldsig's own validation refuses these manifests, whose ECDSA signatures
// are r and s one after the other (RFC 4050 and XML Signature 1.1, section
// 6.4.3); of it only the canonicalizer is used.
func parseRIM(b []byte) (*rim, error) {
	if err := lintXML(b); err != nil {
		return nil, rimFormError{err}
	}
	doc := etree.NewDocument()
	if err := doc.ReadFromBytes(b); err != nil {
		return nil, rimFormError{err}
	}
	root := doc.Root()
	sig, err := onlySignature(root)
	if err != nil {
		return nil, rimFormError{err}
	}
	info, err := signedInfo(root, sig)
	if err != nil {
		return nil, rimFormError{err}
	}
	chain, err := rimCertificates(sig)
	if err != nil {
		return nil, rimFormError{err}
	}
	key, ok := chain[0].PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve.Params().BitSize != 384 {
		return nil, rimFormError{errors.New("its signer's key is not on P-384")}
	}
	value, err := decodeBase64(childText(sig, "SignatureValue"), signatureSize)
	if err != nil {
		return nil, rimFormError{fmt.Errorf("signature value: %w", err)}
	}
	sum := sha512.Sum384(info.canonical)
	if !ecdsa.Verify(key, sum[:], new(big.Int).SetBytes(value[:48]), new(big.Int).SetBytes(value[48:])) {
		return nil, errors.New("the signature is not by the first certificate's key")
	}

	// The enveloped-signature transform, then C14N 1.1 of what is left.
	root.RemoveChild(sig)
	content, err := dsig.MakeC14N11Canonicalizer().Canonicalize(root)
	if err != nil {
		return nil, rimFormError{err}
	}
	digest := sha512.Sum384(content)
	if !bytes.Equal(digest[:], info.digest) {
		return nil, errors.New("the content is not what was signed")
	}
	r, err := parseSWID(content)
	if err != nil {
		return nil, rimFormError{err}
	}
	r.chain = chain
	return r, nil
}

// lintXML bounds the document and refuses what has no place in a manifest and
// only serves to make two readers see two documents: directives, processing
// instructions, comments, repeated attributes, attributes of namespace xml.
func lintXML(b []byte) error {
	if len(b) > maxRIM {
		return fmt.Errorf("%d bytes, at most %d are allowed", len(b), maxRIM)
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	d.Strict = true
	for depth, nodes := 0, 0; ; nodes++ {
		t, err := d.RawToken()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		if nodes > maxRIMNodes {
			return errors.New("too many elements")
		}
		switch t := t.(type) {
		case xml.StartElement:
			if depth++; depth > maxRIMDepth {
				return errors.New("too deep")
			}
			seen := map[xml.Name]bool{}
			for _, a := range t.Attr {
				if seen[a.Name] || a.Name.Space == "xml" {
					return fmt.Errorf("attribute %s twice, or of namespace xml", a.Name.Local)
				}
				seen[a.Name] = true
			}
		case xml.EndElement:
			depth--
		case xml.CharData:
		case xml.ProcInst:
			if t.Target != "xml" || nodes != 0 {
				return errors.New("processing instruction")
			}
		default:
			return errors.New("comment or directive")
		}
	}
	return nil
}

// onlySignature returns the one signature, which is a child of the root.
func onlySignature(root *etree.Element) (*etree.Element, error) {
	if root == nil || root.Tag != "SoftwareIdentity" || root.NamespaceURI() != nsSWID {
		return nil, errors.New("not a SoftwareIdentity")
	}
	var found *etree.Element
	for _, e := range root.FindElements("//Signature") {
		if found != nil || e.Parent() != root || e.NamespaceURI() != nsDSig {
			return nil, errors.New("more than one signature, or one in the wrong place")
		}
		found = e
	}
	if found == nil {
		return nil, errors.New("no signature")
	}
	return found, nil
}

type signed struct {
	canonical []byte
	digest    []byte
}

// signedInfo checks that the signature is of the one form that NVIDIA uses,
// over the whole document, and returns the canonical form of SignedInfo.
func signedInfo(root, sig *etree.Element) (*signed, error) {
	si, err := only(sig, "SignedInfo")
	if err != nil {
		return nil, err
	}
	ref, err := only(si, "Reference")
	if err != nil {
		return nil, err
	}
	transforms, err := only(ref, "Transforms")
	if err != nil {
		return nil, err
	}
	var algs []string
	for _, t := range transforms.ChildElements() {
		if t.Tag != "Transform" || len(t.ChildElements()) > 0 {
			return nil, errors.New("unknown transform")
		}
		algs = append(algs, t.SelectAttrValue("Algorithm", ""))
	}
	uri := ref.SelectAttr("URI")
	switch {
	case len(si.ChildElements()) != 3 || len(ref.ChildElements()) != 3:
		return nil, errors.New("unknown elements in SignedInfo")
	case uri == nil || uri.Value != "":
		return nil, errors.New("the signature is not over the whole document")
	case len(algs) != 2 || algs[0] != algEnvel || algs[1] != algC14N:
		return nil, fmt.Errorf("transforms %q: want enveloped signature, then C14N 1.1", algs)
	case algorithm(si, "CanonicalizationMethod") != algC14N:
		return nil, errors.New("canonicalization is not C14N 1.1")
	case algorithm(si, "SignatureMethod") != algSigned:
		return nil, errors.New("signature method is not ECDSA with SHA-384")
	case algorithm(ref, "DigestMethod") != algDigest:
		return nil, errors.New("digest method is not SHA-384")
	}
	digest, err := decodeBase64(childText(ref, "DigestValue"), digestSize)
	if err != nil {
		return nil, fmt.Errorf("digest value: %w", err)
	}
	// Inclusive canonicalization of a part carries the namespaces declared
	// around it (Canonical XML 1.1, section 2.3).
	alone := si.Copy()
	for _, around := range []*etree.Element{sig, root} {
		for _, a := range around.Attr {
			if (a.Space == "xmlns" || a.Space == "" && a.Key == "xmlns") && alone.SelectAttr(a.FullKey()) == nil {
				alone.CreateAttr(a.FullKey(), a.Value)
			}
		}
	}
	c, err := dsig.MakeC14N11Canonicalizer().Canonicalize(alone)
	if err != nil {
		return nil, err
	}
	return &signed{canonical: c, digest: digest}, nil
}

func only(parent *etree.Element, tag string) (*etree.Element, error) {
	var found *etree.Element
	for _, e := range parent.ChildElements() {
		if e.Tag != tag || e.NamespaceURI() != nsDSig {
			continue
		}
		if found != nil {
			return nil, fmt.Errorf("two elements %s", tag)
		}
		found = e
	}
	if found == nil {
		return nil, fmt.Errorf("no element %s", tag)
	}
	return found, nil
}

func algorithm(parent *etree.Element, tag string) string {
	e, err := only(parent, tag)
	if err != nil || len(e.ChildElements()) > 0 {
		return ""
	}
	return e.SelectAttrValue("Algorithm", "")
}

func childText(parent *etree.Element, tag string) string {
	e, err := only(parent, tag)
	if err != nil || len(e.ChildElements()) > 0 {
		return ""
	}
	return e.Text()
}

func decodeBase64(s string, size int) ([]byte, error) {
	b, err := base64.StdEncoding.DecodeString(strings.Join(strings.Fields(s), ""))
	if err != nil {
		return nil, err
	}
	if size > 0 && len(b) != size {
		return nil, fmt.Errorf("%d bytes: want %d", len(b), size)
	}
	return b, nil
}

func rimCertificates(sig *etree.Element) ([]*x509.Certificate, error) {
	info, err := only(sig, "KeyInfo")
	if err != nil {
		return nil, err
	}
	data, err := only(info, "X509Data")
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for _, e := range data.ChildElements() {
		if e.Tag != "X509Certificate" || len(out) == anchor.MaxPath {
			return nil, errors.New("something other than a few certificates in X509Data")
		}
		der, err := decodeBase64(e.Text(), 0)
		if err != nil {
			return nil, err
		}
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		out = append(out, c)
	}
	if len(out) < 2 {
		return nil, errors.New("no certificate chain in X509Data")
	}
	return out, nil
}

// checkRIMChain checks that the manifest's signer leads to the pinned root.
func checkRIMChain(chain []*x509.Certificate, anchors anchor.Set) error {
	switch root := chain[len(chain)-1]; {
	case chain[0].IsCA || chain[0].KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("the signer's certificate is not for signing manifests")
	case len(chain[0].ExtKeyUsage)+len(chain[0].UnknownExtKeyUsage) > 0:
		// The same CAs issue certificates to OCSP responders.
		return errors.New("the signer's certificate is for another use")
	case !anchors.NVIDIARIMRoot(root.Raw):
		return fmt.Errorf("the root certificate %.60q is not the pinned one", root.Subject.CommonName)
	}
	return anchors.Path(chain)
}

// parseSWID reads a manifest's content from its canonical form.
func parseSWID(content []byte) (*rim, error) {
	var x struct {
		XMLName xml.Name
		Name    string `xml:"name,attr"`
		Meta    []struct {
			XMLName xml.Name
			Version string `xml:"colloquialVersion,attr"`
			Product string `xml:"product,attr"`
		} `xml:"Meta"`
		Payload []struct {
			XMLName  xml.Name
			Resource []struct {
				XMLName xml.Name
				Attrs   []xml.Attr `xml:",any,attr"`
			} `xml:"Resource"`
		} `xml:"Payload"`
	}
	if err := xml.Unmarshal(content, &x); err != nil {
		return nil, err
	}
	if x.XMLName.Space != nsSWID || len(x.Meta) != 1 || len(x.Payload) != 1 || x.Meta[0].XMLName.Space != nsSWID || x.Payload[0].XMLName.Space != nsSWID {
		return nil, errors.New("want one Meta and one Payload")
	}
	r := &rim{version: x.Meta[0].Version, product: x.Meta[0].Product, golden: map[int][][digestSize]byte{}}
	if r.version == "" || r.product != x.Name {
		return nil, errors.New("no version, or two product names")
	}
	indexes := map[int]bool{}
	for _, res := range x.Payload[0].Resource {
		if res.XMLName.Space != nsSWID {
			return nil, errors.New("resource of another namespace")
		}
		index, active, values, err := parseResource(res.Attrs)
		if err != nil {
			return nil, err
		}
		if indexes[index] {
			return nil, fmt.Errorf("measurement %d is there twice", index)
		}
		indexes[index] = true
		if active {
			r.golden[index] = values
		}
	}
	return r, nil
}

// parseResource reads one measurement's acceptable values: Hash0 and on, as
// many as there are alternatives.
func parseResource(attrs []xml.Attr) (index int, active bool, values [][digestSize]byte, err error) {
	plain, hashes := map[string]string{}, map[string]string{}
	for _, a := range attrs {
		switch a.Name.Space {
		case "":
			plain[a.Name.Local] = a.Value
		case nsSHA384:
			hashes[a.Name.Local] = a.Value
		}
	}
	fail := func(why string) (int, bool, [][digestSize]byte, error) {
		return 0, false, nil, fmt.Errorf("measurement %.8q: %s", plain["index"], why)
	}
	index, err = strconv.Atoi(plain["index"])
	if err != nil || index < 0 || index >= blockCount || strconv.Itoa(index) != plain["index"] {
		return fail("want an index from 0 to 63")
	}
	n, err := strconv.Atoi(plain["alternatives"])
	if err != nil || n < 1 || n > 64 || len(hashes) != n {
		return fail("as many hashes as it says alternatives")
	}
	if plain["type"] != "Measurement" || plain["size"] != strconv.Itoa(digestSize) {
		return fail("want a measurement of 48 bytes")
	}
	switch plain["active"] {
	case "True":
		active = true
	case "False":
	default:
		return fail("want active to be True or False")
	}
	for i := range n {
		b, err := hex.DecodeString(hashes["Hash"+strconv.Itoa(i)])
		if err != nil || len(b) != digestSize {
			return fail("want hashes of 48 bytes in hex, counted from 0")
		}
		values = append(values, [digestSize]byte(b))
	}
	return index, active, values, nil
}
