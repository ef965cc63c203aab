package simulate

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
)

// ReportSize is that of an SEV-SNP attestation report.
const ReportSize = 1184

// TCB is a TCB version by component. FMC is there on Turin only.
type TCB struct {
	FMC        uint8 `json:"fmc"`
	Bootloader uint8 `json:"bootloader"`
	TEE        uint8 `json:"tee"`
	SNP        uint8 `json:"snp"`
	Microcode  uint8 `json:"microcode"`
}

// Encode returns the 8 bytes in which reports of p carry the TCB.
func (t TCB) Encode(p anchor.Product) [8]byte {
	if p == anchor.Turin {
		return [8]byte{t.FMC, t.Bootloader, t.TEE, t.SNP, 0, 0, 0, t.Microcode}
	}
	return [8]byte{t.Bootloader, t.TEE, 0, 0, 0, 0, t.SNP, t.Microcode}
}

// Chip is an SEV-SNP processor.
type Chip struct {
	product  anchor.Product
	id       [64]byte
	tcb      TCB
	key      *ecdsa.PrivateKey
	vcek     []byte
	ask, ark []byte
	vendor   *Vendor // nil for a chip that was loaded

	vlekKey    *ecdsa.PrivateKey
	vlek, asvk []byte
}

// NewChip makes a chip and its VCEK.
func (v *Vendor) NewChip() (*Chip, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make simulated chip: %w", err)
	}
	c := &Chip{product: v.product, key: key, ask: v.ask.Raw, ark: v.ark.Raw, vendor: v}
	// The levels are those of firmware in the field.
	switch v.product {
	case anchor.Milan:
		c.tcb = TCB{Bootloader: 4, SNP: 0x18, Microcode: 0xdb}
	case anchor.Genoa:
		c.tcb = TCB{Bootloader: 10, SNP: 0x17, Microcode: 0x54}
	case anchor.Turin:
		c.tcb = TCB{FMC: 1, Bootloader: 1, TEE: 1, SNP: 4, Microcode: 0x51}
	default:
		return nil, fmt.Errorf("make simulated chip: unknown product %.40q", v.product)
	}
	n := 64
	if v.product == anchor.Turin {
		n = 8
	}
	_, _ = rand.Read(c.id[:n]) // never fails
	if c.vcek, err = c.VCEK(VCEKOptions{}); err != nil {
		return nil, err
	}
	return c, nil
}

// Product returns the chip's product line.
func (c *Chip) Product() anchor.Product { return c.product }

// TCB returns the chip's TCB version.
func (c *Chip) TCB() TCB { return c.tcb }

// VCEKOptions say how a VCEK certificate differs from what the chip deserves.
type VCEKOptions struct {
	TCB    *TCB
	ChipID []byte
	// NotAfter replaces the usual seven years.
	NotAfter time.Time
	// Edit changes the template before it is signed.
	Edit func(*x509.Certificate)
	// Issuer and IssuerKey replace the ASK.
	Issuer    *x509.Certificate
	IssuerKey *rsa.PrivateKey
}

// VCEK signs a certificate for the chip's key and returns its DER encoding. A
// chip that was loaded from files has no vendor to do so.
func (c *Chip) VCEK(o VCEKOptions) ([]byte, error) {
	if c.vendor == nil {
		return nil, errors.New("certify simulated chip: its vendor's keys are gone")
	}
	tcb, id := c.tcb, c.id[:]
	if c.product == anchor.Turin {
		id = c.id[:8]
	}
	if o.TCB != nil {
		tcb = *o.TCB
	}
	if o.ChipID != nil {
		id = o.ChipID
	}
	ext, err := vekExtensions(c.product, tcb)
	if err != nil {
		return nil, err
	}
	// The hardware id stands in the extension as it is, without ASN.1 around it.
	ext = append(ext, pkix.Extension{Id: amdOID(4), Value: slices.Clone(id)})
	issuer, key := c.vendor.ask, c.vendor.askKey
	if o.Issuer != nil {
		issuer, key = o.Issuer, o.IssuerKey
	}
	return c.vendor.vek("SEV-VCEK", ext, &c.key.PublicKey, issuer, key, c.vendor.now.AddDate(7, 0, 0), o)
}

// LoadVLEK gives the chip a VLEK, as a cloud provider does. Reports are signed
// by it from then on where the options say so.
func (c *Chip) LoadVLEK() error {
	v := c.vendor
	if v == nil {
		return errors.New("load simulated VLEK: the vendor's keys are gone")
	}
	if v.asvk == nil {
		key, err := rsa.GenerateKey(rand.Reader, v.bits)
		if err != nil {
			return fmt.Errorf("load simulated VLEK: %w", err)
		}
		if v.asvk, err = v.signAMDIntermediate("SEV-VLEK-"+string(v.product), 0x20101, &key.PublicKey); err != nil {
			return fmt.Errorf("load simulated VLEK: %w", err)
		}
		v.asvkKey = key
	}
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return fmt.Errorf("load simulated VLEK: %w", err)
	}
	ext, err := vekExtensions(c.product, c.tcb)
	if err != nil {
		return err
	}
	csp, err := asn1.MarshalWithParams("CN=simulated.example", "ia5")
	if err != nil {
		return err
	}
	ext = append(ext, pkix.Extension{Id: amdOID(5), Value: csp})
	der, err := v.vek("SEV-VLEK", ext, &key.PublicKey, v.asvk, v.asvkKey, v.now.AddDate(1, 0, 0), VCEKOptions{})
	if err != nil {
		return err
	}
	c.vlekKey, c.vlek, c.asvk = key, der, v.asvk.Raw
	return nil
}

func (v *Vendor) vek(cn string, ext []pkix.Extension, pub *ecdsa.PublicKey, issuer *x509.Certificate, key *rsa.PrivateKey, notAfter time.Time, o VCEKOptions) ([]byte, error) {
	if !o.NotAfter.IsZero() {
		notAfter = o.NotAfter
	}
	t := &x509.Certificate{
		SerialNumber: big.NewInt(0), Subject: v.amdName(cn), NotBefore: v.now.Add(-time.Hour), NotAfter: notAfter,
		ExtraExtensions: ext, SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
	if o.Edit != nil {
		o.Edit(t)
	}
	// The hardware's certificates carry no authority key identifier.
	parent := *issuer
	parent.SubjectKeyId = nil
	der, err := x509.CreateCertificate(rand.Reader, t, &parent, pub, key)
	if err != nil {
		return nil, fmt.Errorf("sign simulated %s: %w", cn, err)
	}
	return der, nil
}

// vekExtensions are what the AMD key distribution service puts into VCEK and
// VLEK certificates alike (document 57230, chapter 3).
func vekExtensions(p anchor.Product, t TCB) ([]pkix.Extension, error) {
	version := 0
	if p == anchor.Turin {
		version = 1
	}
	v, err := asn1.Marshal(version)
	if err != nil {
		return nil, err
	}
	name, err := asn1.MarshalWithParams(string(p), "ia5")
	if err != nil {
		return nil, err
	}
	ext := []pkix.Extension{{Id: amdOID(1), Value: v}, {Id: amdOID(2), Value: name}}
	spl := func(n int, level uint8) {
		b, e := asn1.Marshal(int(level))
		if e != nil {
			err = e
		}
		ext = append(ext, pkix.Extension{Id: amdOID(3, n), Value: b})
	}
	if p == anchor.Turin {
		spl(9, t.FMC)
	}
	spl(1, t.Bootloader)
	spl(2, t.TEE)
	spl(3, t.SNP)
	if p != anchor.Turin {
		spl(4, 0)
	}
	for n := 5; n <= 7; n++ {
		spl(n, 0)
	}
	spl(8, t.Microcode)
	return ext, err
}

func amdOID(arcs ...int) asn1.ObjectIdentifier {
	return append(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, arcs...)
}

// SNPOptions say how a report differs from the usual. The zero value is a
// report that a production policy accepts, but for its roots.
type SNPOptions struct {
	// Version is 3 unless set, and 5 on Turin.
	Version uint32
	// Debug sets the debug bit of the guest policy.
	Debug bool
	// MigrationAgent sets the migration bit of the guest policy.
	MigrationAgent bool
	VMPL           uint32
	GuestSVN       uint32
	// Measurement is fixed unless set.
	Measurement *[48]byte
	HostData    [32]byte
	// ReportedTCB is the chip's unless set.
	ReportedTCB *TCB
	// VLEK signs with the VLEK, and masks the chip id.
	VLEK bool
	// Edit changes the report before it is signed.
	Edit func(report []byte)
	// EditSigned changes the report after it is signed.
	EditSigned func(report []byte) []byte
}

// DefaultMeasurement is the launch digest of the emulated guest.
func DefaultMeasurement() [48]byte { return sha512.Sum384([]byte("coffer emulated guest")) }

// Report returns a signed attestation report over reportData.
func (c *Chip) Report(reportData [64]byte, o SNPOptions) ([]byte, error) {
	r := make([]byte, ReportSize)
	le := binary.LittleEndian
	version := o.Version
	if version == 0 {
		version = 3
		if c.product == anchor.Turin {
			version = 5
		}
	}
	le.PutUint32(r[0x00:], version)
	le.PutUint32(r[0x04:], o.GuestSVN)
	policy := uint64(31) | 1<<16 | 1<<17 // ABI 0.31, SMT allowed, the bit that must be one
	if o.MigrationAgent {
		policy |= 1 << 18
	}
	if o.Debug {
		policy |= 1 << 19
	}
	le.PutUint64(r[0x08:], policy)
	le.PutUint32(r[0x30:], o.VMPL)
	le.PutUint32(r[0x34:], 1)
	current := c.tcb.Encode(c.product)
	reported := current
	if o.ReportedTCB != nil {
		reported = o.ReportedTCB.Encode(c.product)
	}
	copy(r[0x38:], current[:])
	le.PutUint64(r[0x40:], 0x25) // SMT, ECC, alias check complete
	key := c.key
	if o.VLEK {
		if c.vlekKey == nil {
			return nil, errors.New("make simulated report: the chip has no VLEK")
		}
		key = c.vlekKey
		le.PutUint32(r[0x48:], 1<<2)
	}
	copy(r[0x50:], reportData[:])
	m := DefaultMeasurement()
	if o.Measurement != nil {
		m = *o.Measurement
	}
	copy(r[0x90:], m[:])
	copy(r[0xC0:], o.HostData[:])
	// The report id is the guest's, so it stays the same between reports.
	id := sha512.Sum512_256(append([]byte("report id"), c.id[:]...))
	copy(r[0x140:], id[:])
	copy(r[0x160:], bytes.Repeat([]byte{0xff}, 32))
	copy(r[0x180:], reported[:])
	if version >= 3 {
		switch c.product {
		case anchor.Milan:
			copy(r[0x188:], []byte{0x19, 0x01, 0x01})
		case anchor.Genoa:
			copy(r[0x188:], []byte{0x19, 0x11, 0x01})
		case anchor.Turin:
			copy(r[0x188:], []byte{0x1a, 0x02, 0x01})
		}
	}
	if !o.VLEK {
		copy(r[0x1A0:], c.id[:])
	}
	copy(r[0x1E0:], current[:])
	copy(r[0x1E8:], []byte{40, 55, 1, 0, 40, 55, 1, 0}) // current and committed build, minor, major
	copy(r[0x1F0:], current[:])
	if version >= 5 {
		le.PutUint64(r[0x1F8:], 0x3f)
		le.PutUint64(r[0x200:], 0x3f)
	}
	if o.Edit != nil {
		o.Edit(r)
	}
	sum := sha512.Sum384(r[:0x2A0])
	rr, ss, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		return nil, fmt.Errorf("sign simulated report: %w", err)
	}
	putLittleEndian(r[0x2A0:0x2A0+72], rr)
	putLittleEndian(r[0x2E8:0x2E8+72], ss)
	if o.EditSigned != nil {
		r = o.EditSigned(r)
	}
	return r, nil
}

func putLittleEndian(dst []byte, n *big.Int) {
	n.FillBytes(dst)
	slices.Reverse(dst)
}

// CertTable returns the certificate table that the platform hands out with the
// report: VCEK, ASK and ARK, or VLEK, ASVK and ARK once a VLEK is loaded.
func (c *Chip) CertTable() []byte {
	if c.vlek != nil {
		return Table(Entry{GUID: VLEKGUID, DER: c.vlek}, Entry{GUID: ASKGUID, DER: c.asvk}, Entry{GUID: ARKGUID, DER: c.ark})
	}
	return Table(Entry{GUID: VCEKGUID, DER: c.vcek}, Entry{GUID: ASKGUID, DER: c.ask}, Entry{GUID: ARKGUID, DER: c.ark})
}

// Certificates returns VCEK, ASK and ARK in DER.
func (c *Chip) Certificates() (vcek, ask, ark []byte) { return c.vcek, c.ask, c.ark }

// ASVK returns the issuer of the chip's VLEK in DER; nil before LoadVLEK.
func (c *Chip) ASVK() []byte { return c.asvk }

// GUIDs of the certificate table (GHCB specification, MSG_REPORT certificates),
// in the order of bytes in which tables carry them.
const (
	VCEKGUID = "\x63\xda\x75\x8d\xe6\x64\x45\x64\xad\xc5\xf4\xb9\x3b\xe8\xac\xcd"
	VLEKGUID = "\xa8\x07\x4b\xc2\xa2\x5a\x48\x3e\xaa\xe6\x39\xc0\x45\xa0\xb8\xa1"
	ASKGUID  = "\x4a\xb7\xb3\x79\xbb\xac\x4f\xe4\xa0\x2f\x05\xae\xf3\x27\xc7\x82"
	ARKGUID  = "\xc0\xb4\x06\xa4\xa8\x03\x49\x52\x97\x43\x3f\xb6\x01\x4c\xd0\xae"
	CRLGUID  = "\x92\xf8\x1b\xc3\x58\x11\x4d\x3d\x97\xff\xd1\x9f\x88\xdc\x67\xea"
)

// Entry is one certificate of a table.
type Entry struct {
	GUID string
	DER  []byte
}

// Table encodes a certificate table: entries of GUID, offset and length, one of
// zeros, then what they point to.
func Table(entries ...Entry) []byte {
	offset := 24 * (len(entries) + 1)
	var head, body []byte
	for _, e := range entries {
		head = append(head, e.GUID...)
		head = binary.LittleEndian.AppendUint32(head, uint32(offset+len(body)))
		head = binary.LittleEndian.AppendUint32(head, uint32(len(e.DER)))
		body = append(body, e.DER...)
	}
	return append(append(head, make([]byte, 24)...), body...)
}
