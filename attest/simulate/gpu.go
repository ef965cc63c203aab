package simulate

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"time"
)

// Versions and board of the simulated H100.
const (
	DefaultDriver = "580.65.06"
	DefaultVBIOS  = "96.00.9f.00.01"
	gpuProject    = "1010"
	gpuProjectSKU = "0200"
	gpuChipSKU    = "882"
)

// GPU is an H100 in confidential mode.
type GPU struct {
	uuid   string
	driver string
	vbios  string
	fwid   [48]byte
	key    *ecdsa.PrivateKey
	chain  [][]byte // DER, leaf first, five of them
	vendor *Vendor  // nil for a GPU that was loaded
}

// NewGPU makes a GPU and its certificate chain.
func (v *Vendor) NewGPU() (*GPU, error) {
	g := &GPU{driver: DefaultDriver, vbios: DefaultVBIOS, vendor: v}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	g.uuid = fmt.Sprintf("GPU-%x-%x-%x-%x-%x", id[:4], id[4:6], id[6:8], id[8:10], id[10:])
	// One firmware, one FWID: it is the same for every H100 of a version.
	g.fwid = sha512.Sum384([]byte("simulated firmware " + g.vbios))
	var err error
	if g.key, err = ecdsa.GenerateKey(elliptic.P384(), rand.Reader); err != nil {
		return nil, fmt.Errorf("make simulated GPU: %w", err)
	}
	if g.chain, err = v.gpuChain(g, ChainOptions{}); err != nil {
		return nil, fmt.Errorf("make simulated GPU: %w", err)
	}
	return g, nil
}

// UUID returns the GPU's name in NVML.
func (g *GPU) UUID() string { return g.uuid }

// DriverVersion returns the driver version that NVML and the report state.
func (g *GPU) DriverVersion() string { return g.driver }

// VBIOSVersion returns the VBIOS version that NVML and the report state.
func (g *GPU) VBIOSVersion() string { return g.vbios }

// ChainPEM returns the certificate chain, leaf first, five certificates.
func (g *GPU) ChainPEM() []byte { return encodePEM(g.chain) }

func encodePEM(ders [][]byte) []byte {
	var b bytes.Buffer
	for _, der := range ders {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a Buffer does not fail
	}
	return b.Bytes()
}

// ChainOptions say how a chain differs from what the GPU deserves.
type ChainOptions struct {
	// FWID replaces that in the leaf.
	FWID *[48]byte
	// OmitFWID leaves the extension out of the leaf.
	OmitFWID bool
	// EditLeaf changes the leaf before it is signed.
	EditLeaf func(*x509.Certificate)
	// EditDevice changes the device certificate before it is signed.
	EditDevice func(*x509.Certificate)
	// Architecture replaces GH100.
	Architecture string
	// Serial replaces the leaf's.
	Serial *big.Int
}

// Chain signs another chain for the GPU's key and returns it in PEM. A GPU that
// was loaded from files has no vendor to do so.
func (g *GPU) Chain(o ChainOptions) ([]byte, error) {
	if g.vendor == nil {
		return nil, fmt.Errorf("certify simulated GPU: its vendor's keys are gone")
	}
	chain, err := g.vendor.gpuChain(g, o)
	if err != nil {
		return nil, fmt.Errorf("certify simulated GPU: %w", err)
	}
	return encodePEM(chain), nil
}

func (v *Vendor) gpuChain(g *GPU, o ChainOptions) ([][]byte, error) {
	arch := "GH100"
	if o.Architecture != "" {
		arch = o.Architecture
	}
	deviceKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, err
	}
	start := time.Date(2020, 10, 17, 0, 0, 0, 0, time.UTC)
	name := func(serial *big.Int, cn string) pkix.Name {
		n := v.nvidiaName(cn)
		n.Country, n.SerialNumber = []string{"US"}, strings.ToUpper(hex.EncodeToString(serial.Bytes()))
		return n
	}
	serial := randomSerial(9)
	device := &x509.Certificate{
		SerialNumber: serial, Subject: name(serial, arch+" A01 GSP BROM"), NotBefore: start, NotAfter: forever,
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}
	if o.EditDevice != nil {
		o.EditDevice(device)
	}
	deviceCert, err := certify(device, v.ica, &deviceKey.PublicKey, v.icaKey)
	if err != nil {
		return nil, err
	}
	leafSerial := randomSerial(20)
	if o.Serial != nil {
		leafSerial = o.Serial
	}
	ppid := make([]byte, 8)
	_, _ = rand.Read(ppid) // never fails
	san, err := deviceSAN(fmt.Sprintf("NVIDIA:%s:%X", arch, ppid))
	if err != nil {
		return nil, err
	}
	ext := []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}
	if !o.OmitFWID {
		fwid := g.fwid
		if o.FWID != nil {
			fwid = *o.FWID
		}
		e, err := compositeDeviceID(deviceCert, fwid)
		if err != nil {
			return nil, err
		}
		ext = append(ext, e)
	}
	leaf := &x509.Certificate{
		SerialNumber: leafSerial, Subject: name(leafSerial, arch+" A01 GSP FMC LF"), NotBefore: start, NotAfter: forever,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtraExtensions: ext, SignatureAlgorithm: x509.ECDSAWithSHA384,
	}
	if o.EditLeaf != nil {
		o.EditLeaf(leaf)
	}
	leafCert, err := certify(leaf, deviceCert, &g.key.PublicKey, deviceKey)
	if err != nil {
		return nil, err
	}
	return [][]byte{leafCert.Raw, deviceCert.Raw, v.ica.Raw, v.identity.Raw, v.deviceRoot.Raw}, nil
}

// deviceSAN names the device as DMTF's otherName does (1.3.6.1.4.1.412.274.1,
// DSP0274 section on certificates).
func deviceSAN(name string) ([]byte, error) {
	type otherName struct {
		Type  asn1.ObjectIdentifier
		Value string `asn1:"tag:0,explicit,utf8"`
	}
	inner, err := asn1.MarshalWithParams(otherName{asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 412, 274, 1}, name}, "tag:0")
	if err != nil {
		return nil, err
	}
	return asn1.Marshal([]asn1.RawValue{{FullBytes: inner}})
}

// compositeDeviceID is TCG DICE's extension: the device's public key and the
// digest of the firmware that it started.
func compositeDeviceID(device *x509.Certificate, fwid [48]byte) (pkix.Extension, error) {
	type digest struct {
		Algorithm asn1.ObjectIdentifier
		Digest    []byte
	}
	der, err := asn1.Marshal(struct {
		Version int
		Key     asn1.RawValue
		FWID    digest
	}{1, asn1.RawValue{FullBytes: device.RawSubjectPublicKeyInfo}, digest{asn1.ObjectIdentifier{2, 16, 840, 1, 101, 3, 4, 2, 2}, fwid[:]}})
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 23, 133, 5, 4, 1}, Value: der}, err
}

// Opaque field types of a GPU report.
const (
	opaqueDriver          = 3
	opaqueGPUInfo         = 4
	opaqueVBIOS           = 6
	opaqueNVDEC0          = 11
	opaqueCounts          = 12
	opaqueCPRInfo         = 13
	opaqueBoardID         = 14
	opaqueChipSKU         = 15
	opaqueChipSKUModifier = 16
	opaqueProject         = 17
	opaqueProjectSKU      = 18
	opaqueProjectSKUMod   = 19
	opaqueFWID            = 20
	opaqueProtectedPCIe   = 21
	opaqueVersion         = 34
	opaqueFeatureFlag     = 36
)

// GPUOptions say how a report differs from the usual. The zero value is a
// report that a production policy accepts, but for its roots.
type GPUOptions struct {
	// Nonce replaces the one that was asked for.
	Nonce *[32]byte
	// Driver and VBIOS replace the GPU's.
	Driver, VBIOS string
	// FWID replaces the GPU's; OmitFWID leaves it out.
	FWID     *[48]byte
	OmitFWID bool
	// NVDEC0Enabled says so in the report.
	NVDEC0Enabled bool
	// ProtectedPCIe says so in the report.
	ProtectedPCIe bool
	// FeatureFlag is 0 (one GPU passed through), 1 or 2.
	FeatureFlag uint16
	// Measurements replaces single values, by RIM index from 0.
	Measurements map[int][48]byte
	// Opaque is appended to the opaque fields as it is.
	Opaque []byte
	// Edit changes request and response before they are signed.
	Edit func(unsigned []byte) []byte
	// EditSigned changes the report after it is signed.
	EditSigned func(report []byte) []byte
}

// Measurement returns the simulated firmware's measurement at a RIM index.
func Measurement(index int) [48]byte {
	return sha512.Sum384(fmt.Appendf(nil, "simulated measurement %d", index))
}

// Report returns a GET_MEASUREMENTS request and response over nonce.
func (g *GPU) Report(nonce [32]byte, o GPUOptions) ([]byte, error) {
	if o.Nonce != nil {
		nonce = *o.Nonce
	}
	driver, vbios, fwid := g.driver, g.vbios, g.fwid
	if o.Driver != "" {
		driver = o.Driver
	}
	if o.VBIOS != "" {
		vbios = o.VBIOS
	}
	if o.FWID != nil {
		fwid = *o.FWID
	}
	vb, err := encodeVBIOS(vbios)
	if err != nil {
		return nil, err
	}

	r := append([]byte{0x11, 0xe0, 0x01, 0xff}, nonce[:]...)
	r = append(r, 0)
	const blocks, blockSize = 64, 55
	r = append(r, 0x11, 0x60, 0, 0, blocks, blocks*blockSize&0xff, blocks*blockSize>>8, 0)
	for i := range blocks {
		m := Measurement(i)
		if other, ok := o.Measurements[i]; ok {
			m = other
		}
		r = append(r, byte(i+1), 1, 51, 0, 1, 48, 0)
		r = append(r, m[:]...)
	}
	own := make([]byte, 32)
	_, _ = rand.Read(own) // never fails
	r = append(r, own...)

	le := binary.LittleEndian
	var opaque []byte
	add := func(t uint16, v []byte) {
		opaque = le.AppendUint16(opaque, t)
		opaque = le.AppendUint16(opaque, uint16(len(v)))
		opaque = append(opaque, v...)
	}
	onOff := func(on bool) []byte {
		if on {
			return []byte{0xaa}
		}
		return []byte{0x55}
	}
	// The order is that of the hardware.
	add(opaqueVBIOS, vb)
	add(opaqueBoardID, []byte{0xb1, 3, 0, 0})
	add(opaqueChipSKU, append([]byte(gpuChipSKU), make([]byte, 6)...))
	add(opaqueChipSKUModifier, []byte{'0', 0, 0, 0, 0})
	add(opaqueProject, append([]byte(gpuProject), 0))
	add(opaqueProjectSKU, append([]byte(gpuProjectSKU), 0))
	add(opaqueProjectSKUMod, []byte{0, 0})
	add(opaqueDriver, append([]byte(driver), 0))
	add(opaqueGPUInfo, []byte{0x80, 1, 0, 0, 0, 0, 0, 0})
	counts := make([]byte, 0, 256)
	for range blocks {
		counts = le.AppendUint32(counts, 1)
	}
	add(opaqueCounts, counts)
	add(opaqueCPRInfo, []byte{0, 0xc0, 1, 0})
	add(opaqueNVDEC0, onOff(o.NVDEC0Enabled))
	if !o.OmitFWID {
		add(opaqueFWID, fwid[:])
	}
	add(opaqueProtectedPCIe, onOff(o.ProtectedPCIe))
	add(opaqueVersion, []byte{1, 0})
	add(opaqueFeatureFlag, le.AppendUint16(nil, o.FeatureFlag))
	opaque = append(opaque, o.Opaque...)
	r = le.AppendUint16(r, uint16(len(opaque)))
	r = append(r, opaque...)

	if o.Edit != nil {
		r = o.Edit(r)
	}
	sum := sha512.Sum384(r)
	rr, ss, err := ecdsa.Sign(rand.Reader, g.key, sum[:])
	if err != nil {
		return nil, fmt.Errorf("sign simulated GPU report: %w", err)
	}
	var sig [96]byte
	rr.FillBytes(sig[:48])
	ss.FillBytes(sig[48:])
	r = append(r, sig[:]...)
	if o.EditSigned != nil {
		r = o.EditSigned(r)
	}
	return r, nil
}

// encodeVBIOS is the inverse of how the version is read: of the 8 bytes, those
// at 3, 2, 1, 0 and 4 are shown.
func encodeVBIOS(s string) ([]byte, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, ".", ""))
	if err != nil || len(b) != 5 {
		return nil, fmt.Errorf("VBIOS version %.40q: want five hex bytes with dots", s)
	}
	head := slices.Clone(b[:4])
	slices.Reverse(head)
	return append(append(head, b[4]), 0, 0, 0), nil
}
