package endorse

import (
	"bytes"
	"crypto/sha512"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math/big"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
	"golang.org/x/crypto/ocsp"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/snp"
)

// Kind says what an endorsement is.
type Kind string

// Kinds of endorsement; there are no others.
const (
	// VEK is the certificate of a chip's or a cloud provider's signing key:
	// VCEK or VLEK, in DER.
	VEK Kind = "vek"
	// Chain is the issuer of such certificates and its root, in PEM.
	Chain Kind = "chain"
	// CRL is the revocation list of an AMD root key, in DER.
	CRL Kind = "crl"
	// OCSP is the status of one certificate of NVIDIA's, in DER.
	OCSP Kind = "ocsp"
	// RIM is a reference integrity manifest of NVIDIA's, in XML.
	RIM Kind = "rim"
)

// Kinds lists every kind.
func Kinds() []Kind { return []Kind{VEK, Chain, CRL, OCSP, RIM} }

// MaxSize returns how many bytes an endorsement of that kind may have. It is 0
// for a kind that there is not.
func (k Kind) MaxSize() int {
	switch k {
	case VEK, OCSP:
		return 16 << 10
	case Chain:
		return 32 << 10
	case CRL:
		return 64 << 10
	case RIM:
		return 512 << 10
	}
	return 0
}

// Key names an endorsement by what determines it: ID is the path at AMD's key
// distribution service, the CertID of a certificate, or the id of a manifest.
type Key struct {
	Kind Kind   `json:"kind"`
	ID   string `json:"id"`
}

func (k Key) String() string { return string(k.Kind) + " " + k.ID }

// VCEKKey names the certificate of a chip's key at one TCB version. Without a
// chip id there is none: the platform masks it.
func VCEKKey(p anchor.Product, chipID [64]byte, t snp.TCB) (Key, bool) {
	id := chipID[:]
	if p == anchor.Turin {
		id = id[:8]
	}
	if p == "" || bytes.Count(id, []byte{0}) == len(id) {
		return Key{}, false
	}
	return Key{VEK, "vcek/v1/" + string(p) + "/" + hex.EncodeToString(id) + "?" + levels(p, t)}, true
}

// VLEKKey names the certificate of a cloud provider's key at one TCB version.
func VLEKKey(p anchor.Product, t snp.TCB) Key {
	return Key{VEK, "vlek/v1/" + string(p) + "/cert?" + levels(p, t)}
}

func levels(p anchor.Product, t snp.TCB) string {
	s := fmt.Sprintf("blSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d", t.Bootloader, t.TEE, t.SNP, t.Microcode)
	if p == anchor.Turin {
		s = fmt.Sprintf("fmcSPL=%02d&", t.FMC) + s
	}
	return s
}

// ChainKey names the issuer of a kind of signing key, and its root.
func ChainKey(p anchor.Product, s snp.Signer) Key {
	return Key{Chain, strings.ToLower(s.String()) + "/v1/" + string(p) + "/cert_chain"}
}

// CRLKey names the revocation list of a product's root key that is about the
// issuer of one kind of signing key. AMD publishes a list for each, under the
// distribution point in that issuer's certificate, though one root signs both.
func CRLKey(p anchor.Product, s snp.Signer) Key {
	return Key{CRL, strings.ToLower(s.String()) + "/v1/" + string(p) + "/crl"}
}

// OCSPKey names the status of a certificate by its CertID (RFC 6960, section
// 4.1.1): the serial number, and SHA-384 over the issuer's name and key.
func OCSPKey(cert, issuer *x509.Certificate) (Key, error) {
	req, err := statusRequest(cert, issuer)
	if err != nil {
		return Key{}, err
	}
	return certID(req.IssuerNameHash, req.IssuerKeyHash, req.SerialNumber), nil
}

func statusRequest(cert, issuer *x509.Certificate) (*ocsp.Request, error) {
	var spki struct {
		Algorithm asn1.RawValue
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(issuer.RawSubjectPublicKeyInfo, &spki); err != nil || len(rest) > 0 {
		return nil, errors.New("the issuer's key is malformed")
	}
	name, key := sha512.Sum384(issuer.RawSubject), sha512.Sum384(spki.Key.RightAlign())
	return &ocsp.Request{HashAlgorithm: hashSHA384, IssuerNameHash: name[:], IssuerKeyHash: key[:], SerialNumber: cert.SerialNumber}, nil
}

func certID(name, key []byte, serial *big.Int) Key {
	issuer := sha512.Sum384(slices.Concat(name, key))
	return Key{OCSP, serial.Text(16) + "@" + hex.EncodeToString(issuer[:16])}
}

var rimForm = regexp.MustCompile(`^NV_GPU_(DRIVER_GH100_([0-9.]{3,32})|VBIOS_[0-9A-Z]{1,16}_[0-9A-Z]{1,16}_[0-9A-Z]{1,16}_([0-9A-F]{10,32}))$`)

// RIMKey names a manifest.
func RIMKey(id string) (Key, error) {
	if !rimForm.MatchString(id) {
		return Key{}, fmt.Errorf("manifest id %.80q: want NV_GPU_DRIVER_GH100_VERSION or NV_GPU_VBIOS_PROJECT_SKU_CHIP_VERSION", id)
	}
	return Key{RIM, id}, nil
}

// Item is one endorsement whose form was checked, and that it is what its key
// says. Who signed it was not: appraisal looks at that.
type Item struct {
	Key    Key
	Bytes  []byte
	Digest plan.Digest
	// From and Until are the times between which it holds by its own word:
	// thisUpdate and nextUpdate, or those of the certificates in it.
	From, Until time.Time
}

// ValidAt reports whether the item's own times include t.
func (i Item) ValidAt(t time.Time) bool { return !t.Before(i.From) && !t.After(i.Until) }

// Parse reads an endorsement of a kind. The id is needed for manifests, which do
// not hold it, and for revocation lists about the issuers of VLEKs: without one a
// list is taken to be about those of VCEKs. All others say themselves what they
// are about.
func Parse(k Kind, id string, b []byte) (Item, error) {
	if limit := k.MaxSize(); limit == 0 {
		return Item{}, fmt.Errorf("unknown kind of endorsement %.40q", string(k))
	} else if len(b) > limit {
		return Item{}, fmt.Errorf("%s has %d bytes, at most %d are allowed", k, len(b), limit)
	}
	var i Item
	var err error
	switch k {
	case VEK:
		i, err = parseVEK(b)
	case Chain:
		i, err = parseChain(b)
	case CRL:
		i, err = parseCRL(id, b)
	case OCSP:
		i, err = parseOCSP(b)
	case RIM:
		i, err = parseRIM(id, b)
	}
	if err != nil {
		return Item{}, fmt.Errorf("%s: %w", k, err)
	}
	i.Digest = plan.Sum(i.Bytes)
	return i, nil
}

func parseVEK(b []byte) (Item, error) {
	c, err := x509.ParseCertificate(b)
	if err != nil {
		return Item{}, err
	}
	k, err := vekKey(c)
	if err != nil {
		return Item{}, err
	}
	return Item{Key: k, Bytes: b, From: c.NotBefore, Until: c.NotAfter}, nil
}

// vekKey reads from the extensions of a VCEK or VLEK what it is for (AMD
// document 57230, chapter 3). It only finds the certificate's place: attest/snp
// judges it.
func vekKey(c *x509.Certificate) (Key, error) {
	ext := map[string][]byte{}
	for _, e := range c.Extensions {
		if s, ok := strings.CutPrefix(e.Id.String(), "1.3.6.1.4.1.3704.1."); ok {
			ext[s] = e.Value
		}
	}
	var name string
	if rest, err := asn1.UnmarshalWithParams(ext["2"], &name, "ia5"); err != nil || len(rest) > 0 {
		return Key{}, errors.New("the certificate names no AMD product")
	}
	name, _, _ = strings.Cut(name, "-") // some carry the stepping
	p := anchor.Product(name)
	if !slices.Contains(anchor.Products(), p) {
		return Key{}, fmt.Errorf("AMD product %.40q is not supported", name)
	}
	level := func(oid string) uint8 {
		var n int
		if rest, err := asn1.Unmarshal(ext[oid], &n); err != nil || len(rest) > 0 || n < 0 || n > 255 {
			return 0
		}
		return uint8(n)
	}
	t := snp.TCB{FMC: level("3.9"), Bootloader: level("3.1"), TEE: level("3.2"), SNP: level("3.3"), Microcode: level("3.8")}
	switch c.Subject.CommonName {
	case "SEV-VLEK":
		return VLEKKey(p, t), nil
	case "SEV-VCEK":
	default:
		return Key{}, fmt.Errorf("the certificate is of %.60q: want SEV-VCEK or SEV-VLEK", c.Subject.CommonName)
	}
	hwid := ext["4"]
	var inner []byte
	if rest, err := asn1.Unmarshal(hwid, &inner); err == nil && len(rest) == 0 {
		hwid = inner
	}
	want := 64
	if p == anchor.Turin {
		want = 8
	}
	var chip [64]byte
	if copy(chip[:], hwid); len(hwid) != want {
		return Key{}, fmt.Errorf("hardware id of %d bytes: want %d", len(hwid), want)
	}
	k, ok := VCEKKey(p, chip, t)
	if !ok {
		return Key{}, errors.New("the certificate names no chip")
	}
	return k, nil
}

func parseChain(b []byte) (Item, error) {
	certs, err := pemCertificates(b, 2)
	if err != nil {
		return Item{}, err
	}
	if len(certs) != 2 {
		return Item{}, errors.New("want two certificates: the issuer and its root")
	}
	root, err := rootProduct(certs[1].Subject.CommonName)
	if err != nil {
		return Item{}, err
	}
	s := snp.VCEK
	switch certs[0].Subject.CommonName {
	case "SEV-" + string(root):
	case "SEV-VLEK-" + string(root):
		s = snp.VLEK
	default:
		return Item{}, fmt.Errorf("the issuer %.60q is not one of %s", certs[0].Subject.CommonName, root)
	}
	i := Item{Key: ChainKey(root, s), Bytes: encodeChain(certs), From: certs[0].NotBefore, Until: certs[0].NotAfter}
	if certs[1].NotBefore.After(i.From) {
		i.From = certs[1].NotBefore
	}
	if certs[1].NotAfter.Before(i.Until) {
		i.Until = certs[1].NotAfter
	}
	return i, nil
}

// vlekList reads a revocation list that is about the issuers of VLEKs.
func vlekList(b []byte) (Item, error) {
	i, err := Parse(CRL, "", b)
	if err != nil {
		return Item{}, err
	}
	return Parse(CRL, strings.Replace(i.Key.ID, "vcek/", vlekPrefix, 1), b)
}

// vlekPrefix is how ids begin that are about VLEKs.
const vlekPrefix = "vlek/"

func rootProduct(cn string) (anchor.Product, error) {
	p := anchor.Product(strings.TrimPrefix(cn, "ARK-"))
	if !strings.HasPrefix(cn, "ARK-") || !slices.Contains(anchor.Products(), p) {
		return "", fmt.Errorf("%.60q is no root key of a supported product", cn)
	}
	return p, nil
}

func pemCertificates(b []byte, limit int) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		block, rest := pem.Decode(b)
		if block == nil {
			if len(bytes.TrimSpace(rest)) > 0 {
				return nil, errors.New("there is something beside the certificates")
			}
			return out, nil
		}
		if block.Type != "CERTIFICATE" || len(out) == limit {
			return nil, fmt.Errorf("want at most %d certificates and nothing else", limit)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out, b = append(out, c), rest
	}
}

// encodeChain writes certificates in the one form in which they are kept.
func encodeChain(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	return out
}

func parseCRL(id string, b []byte) (Item, error) {
	l, err := x509.ParseRevocationList(b)
	if err != nil {
		return Item{}, err
	}
	p, err := rootProduct(l.Issuer.CommonName)
	if err != nil {
		return Item{}, err
	}
	if l.NextUpdate.IsZero() {
		return Item{}, errors.New("the list does not say until when it is current")
	}
	k := CRLKey(p, snp.VCEK)
	switch vlek := CRLKey(p, snp.VLEK); id {
	case "", k.ID:
	case vlek.ID:
		k = vlek
	default:
		return Item{}, fmt.Errorf("the list is of %s, which is not %.120q", l.Issuer.CommonName, id)
	}
	return Item{Key: k, Bytes: b, From: l.ThisUpdate, Until: l.NextUpdate}, nil
}

func parseOCSP(b []byte) (Item, error) {
	// Without an issuer the library checks the signature by the responder's
	// certificate in the answer, where there is one.
	r, err := ocsp.ParseResponse(b, nil)
	if err != nil {
		return Item{}, err
	}
	name, key, serial, err := answered(r.TBSResponseData)
	if err != nil {
		return Item{}, err
	}
	if r.NextUpdate.IsZero() {
		return Item{}, errors.New("the answer does not say until when it is current")
	}
	return Item{Key: certID(name, key, serial), Bytes: b, From: r.ThisUpdate, Until: r.NextUpdate}, nil
}

// answered returns the CertID of the one certificate that an answer speaks of,
// which must be by SHA-384.
func answered(tbs []byte) (name, key []byte, serial *big.Int, err error) {
	in := cryptobyte.String(tbs)
	var data, responses, single, id, alg, n, k cryptobyte.String
	var hash asn1.ObjectIdentifier
	serial = new(big.Int)
	if !in.ReadASN1(&data, cbasn1.SEQUENCE) ||
		!data.SkipOptionalASN1(cbasn1.Tag(0).Constructed().ContextSpecific()) ||
		!data.SkipOptionalASN1(cbasn1.Tag(1).Constructed().ContextSpecific()) ||
		!data.SkipOptionalASN1(cbasn1.Tag(2).Constructed().ContextSpecific()) ||
		!data.SkipASN1(cbasn1.GeneralizedTime) ||
		!data.ReadASN1(&responses, cbasn1.SEQUENCE) ||
		!responses.ReadASN1(&single, cbasn1.SEQUENCE) || !responses.Empty() ||
		!single.ReadASN1(&id, cbasn1.SEQUENCE) ||
		!id.ReadASN1(&alg, cbasn1.SEQUENCE) || !alg.ReadASN1ObjectIdentifier(&hash) ||
		!id.ReadASN1(&n, cbasn1.OCTET_STRING) || !id.ReadASN1(&k, cbasn1.OCTET_STRING) ||
		!id.ReadASN1Integer(serial) || !id.Empty() {
		return nil, nil, nil, errors.New("want an answer about one certificate")
	}
	if !hash.Equal(asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}) || serial.Sign() <= 0 || serial.BitLen() > 160 {
		return nil, nil, nil, errors.New("want an answer that names the certificate by serial number and SHA-384")
	}
	return n, k, serial, nil
}

// parseRIM reads what a manifest says it is of. Its signature and its values
// are for attest/nvgpu.
func parseRIM(id string, b []byte) (Item, error) {
	key, err := RIMKey(id)
	if err != nil {
		return Item{}, err
	}
	version, signer, err := manifest(b)
	if err != nil {
		return Item{}, err
	}
	if m := rimForm.FindStringSubmatch(id); m[2] != "" && version != m[2] || m[3] != "" && !strings.EqualFold(strings.ReplaceAll(version, ".", ""), m[3]) {
		return Item{}, fmt.Errorf("the manifest is of version %.40q, which is not %s", version, id)
	}
	return Item{Key: key, Bytes: b, From: signer.NotBefore, Until: signer.NotAfter}, nil
}

const (
	maxDepth = 8
	maxNodes = 4096
)

// manifest returns a manifest's version and its signer's certificate, the first
// in it.
func manifest(b []byte) (version string, signer *x509.Certificate, err error) {
	d := xml.NewDecoder(bytes.NewReader(b))
	var path []string
	for nodes := 0; ; nodes++ {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return "", nil, err
		}
		if nodes > maxNodes || len(path) > maxDepth {
			return "", nil, errors.New("the manifest is too deep or has too many elements")
		}
		switch t := t.(type) {
		case xml.StartElement:
			path = append(path, t.Name.Local)
			if len(path) == 1 && t.Name.Local != "SoftwareIdentity" {
				return "", nil, errors.New("want a SoftwareIdentity")
			}
			if strings.Join(path, "/") == "SoftwareIdentity/Meta" {
				for _, a := range t.Attr {
					if a.Name.Local == "colloquialVersion" {
						version = a.Value
					}
				}
			}
		case xml.EndElement:
			path = path[:len(path)-1]
		case xml.CharData:
			if signer != nil || len(path) == 0 || path[len(path)-1] != "X509Certificate" {
				continue
			}
			block, _ := pem.Decode([]byte("-----BEGIN CERTIFICATE-----\n" + strings.TrimSpace(string(t)) + "\n-----END CERTIFICATE-----\n"))
			if block == nil {
				return "", nil, errors.New("the signer's certificate is malformed")
			}
			if signer, err = x509.ParseCertificate(block.Bytes); err != nil {
				return "", nil, fmt.Errorf("the signer's certificate: %w", err)
			}
		}
	}
	if version == "" || signer == nil {
		return "", nil, errors.New("the manifest has no version or no signer")
	}
	return version, signer, nil
}

// chainDER returns the certificates of a Chain item, which were parsed before.
func chainDER(i Item) (issuer, root []byte, ok bool) {
	first, rest := pem.Decode(i.Bytes)
	second, _ := pem.Decode(rest)
	if first == nil || second == nil {
		return nil, nil, false
	}
	return first.Bytes, second.Bytes, true
}

// chainOf returns the certificates of a Chain item.
func chainOf(i Item) (issuer, root *x509.Certificate, err error) {
	certs, err := pemCertificates(i.Bytes, 2)
	if err != nil {
		return nil, nil, err
	}
	if len(certs) != 2 {
		return nil, nil, errors.New("want two certificates, found " + strconv.Itoa(len(certs)))
	}
	return certs[0], certs[1], nil
}
