package nvgpu

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"math/big"
	"slices"
	"strings"
)

const (
	// MaxReport bounds a report: NVML's buffer has 8192 bytes.
	MaxReport = 8192

	requestSize   = 37
	headerSize    = requestSize + 8
	blockCount    = 64
	blockSize     = 55
	digestSize    = 48
	signatureSize = 96
	// maxPadding bounds the zero bytes after the signature. Drivers round the
	// size of a report up.
	maxPadding = 7
)

// Feature is the mode that the GPU's feature flag states.
type Feature uint16

// Features.
const (
	SinglePassthrough Feature = 0
	MultiPassthrough  Feature = 1
	ProtectedPCIe     Feature = 2
)

func (f Feature) String() string {
	switch f {
	case SinglePassthrough:
		return "SPT"
	case MultiPassthrough:
		return "MPT"
	case ProtectedPCIe:
		return "PPCIE"
	}
	return fmt.Sprintf("unknown %d", uint16(f))
}

// Report is a parsed GET_MEASUREMENTS request and response (DMTF DSP0274,
// SPDM 1.1, with NVIDIA's opaque data).
type Report struct {
	// Nonce is the verifier's, from the request.
	Nonce [32]byte
	// OwnNonce is the GPU's, from the response.
	OwnNonce [32]byte
	// Measurements are by index from 0, as reference values count them.
	Measurements  [blockCount][digestSize]byte
	DriverVersion string
	VBIOSVersion  string
	// Project, ProjectSKU and ChipSKU name the VBIOS's reference values.
	Project, ProjectSKU, ChipSKU string
	BoardID                      string
	// NVDEC0Enabled is about the video decoder, whose firmware is measured at
	// index 35 if it runs.
	NVDEC0Enabled bool
	// FWID is the digest of the firmware that holds the signing key; nil in
	// reports of the 535 drivers.
	FWID []byte
	// ProtectedPCIe is nil if the report does not say.
	ProtectedPCIe *bool
	// SwitchPDIs name the NVSwitches that the GPU is connected to.
	SwitchPDIs []string
	// OpaqueVersion and Feature are nil before the 570 drivers.
	OpaqueVersion *uint16
	Feature       *Feature

	digest [sha512.Size384]byte // of what the signature covers
	r, s   *big.Int
}

// Types of opaque fields.
const (
	typeDriver        = 3
	typeVBIOS         = 6
	typeNVDEC0        = 11
	typeCounts        = 12
	typeBoardID       = 14
	typeChipSKU       = 15
	typeProject       = 17
	typeProjectSKU    = 18
	typeFWID          = 20
	typeProtectedPCIe = 21
	typeSwitchPDIs    = 22
	typeOpaqueVersion = 34
	typeFeature       = 36
	maxType           = 36
)

// Parse reads a report. All ends are taken from the lengths inside; after the
// signature there may be nothing but a few zero bytes.
func Parse(b []byte) (*Report, error) {
	if len(b) > MaxReport {
		return nil, fmt.Errorf("GPU report has %d bytes, at most %d are allowed", len(b), MaxReport)
	}
	in := reader{b: b}
	request := in.take(4, "request")
	nonce := in.take(32, "nonce")
	slot := in.take(1, "slot")
	response := in.take(4, "response")
	count := in.take(1, "block count")
	l1 := in.take(3, "record length")
	if in.err != nil {
		return nil, in.err
	}
	// GET_MEASUREMENTS of all blocks, signed; MEASUREMENTS in answer to it.
	if !bytes.Equal(request, []byte{0x11, 0xE0, 0x01, 0xFF}) {
		return nil, fmt.Errorf("GPU report starts with %x: want an SPDM 1.1 request for all measurements, signed", request)
	}
	if slot[0] != 0 {
		return nil, fmt.Errorf("GPU report is of certificate slot %d: want 0", slot[0])
	}
	if !bytes.Equal(response, []byte{0x11, 0x60, 0, 0}) {
		return nil, fmt.Errorf("GPU report answers with %x: want an SPDM 1.1 measurements response", response)
	}
	record := int(l1[0]) | int(l1[1])<<8 | int(l1[2])<<16
	if count[0] != blockCount || record != blockCount*blockSize {
		return nil, fmt.Errorf("GPU report has %d measurements in %d bytes: want %d in %d", count[0], record, blockCount, blockCount*blockSize)
	}
	r := &Report{Nonce: [32]byte(nonce)}
	for i := range blockCount {
		h := in.take(blockSize-digestSize, "measurement header")
		v := in.take(digestSize, "measurement")
		if in.err != nil {
			return nil, in.err
		}
		// Index from 1, DMTF format, 51 bytes: a digest of firmware, 48 bytes.
		if !bytes.Equal(h, []byte{byte(i + 1), 1, 51, 0, 1, digestSize, 0}) {
			return nil, fmt.Errorf("GPU report has the measurement header %x at %d, which is not known", h, i)
		}
		r.Measurements[i] = [digestSize]byte(v)
	}
	own := in.take(32, "GPU's nonce")
	l2 := in.take(2, "opaque length")
	if in.err != nil {
		return nil, in.err
	}
	opaque := in.take(int(binary.LittleEndian.Uint16(l2)), "opaque data")
	signedEnd := in.at
	signature := in.take(signatureSize, "signature")
	if in.err != nil {
		return nil, in.err
	}
	if rest := b[in.at:]; len(rest) > maxPadding || len(bytes.Trim(rest, "\x00")) > 0 {
		return nil, fmt.Errorf("GPU report has %d bytes after its signature", len(rest))
	}
	r.OwnNonce = [32]byte(own)
	if err := r.parseOpaque(opaque); err != nil {
		return nil, err
	}
	r.digest = sha512.Sum384(b[:signedEnd])
	r.r, r.s = new(big.Int).SetBytes(signature[:48]), new(big.Int).SetBytes(signature[48:])
	return r, nil
}

// parseOpaque reads type, length and value fields. None may come twice: two
// readers could otherwise see two reports. A type that is not known is refused.
func (r *Report) parseOpaque(b []byte) error {
	fields := map[uint16][]byte{}
	in := reader{b: b}
	for in.at < len(b) {
		h := in.take(4, "opaque field header")
		if in.err != nil {
			return in.err
		}
		t := binary.LittleEndian.Uint16(h)
		v := in.take(int(binary.LittleEndian.Uint16(h[2:])), "opaque field")
		if in.err != nil {
			return in.err
		}
		if t == 0 || t > maxType {
			return fmt.Errorf("GPU report has the opaque field %d, which is not known", t)
		}
		if _, twice := fields[t]; twice {
			return fmt.Errorf("GPU report has the opaque field %d twice", t)
		}
		fields[t] = v
	}
	for _, t := range []uint16{typeDriver, typeVBIOS, typeNVDEC0, typeProject, typeProjectSKU, typeChipSKU} {
		if _, ok := fields[t]; !ok {
			return fmt.Errorf("GPU report lacks the opaque field %d", t)
		}
	}
	var err error
	text := func(t uint16) string {
		s, e := cText(fields[t])
		if e != nil && err == nil {
			err = fmt.Errorf("GPU report's opaque field %d: %w", t, e)
		}
		return s
	}
	r.DriverVersion, r.Project, r.ProjectSKU, r.ChipSKU = text(typeDriver), text(typeProject), text(typeProjectSKU), text(typeChipSKU)
	if err != nil {
		return err
	}
	if r.VBIOSVersion, err = vbiosText(fields[typeVBIOS]); err != nil {
		return err
	}
	if r.NVDEC0Enabled, err = onOff(fields[typeNVDEC0]); err != nil {
		return fmt.Errorf("GPU report's NVDEC0 status: %w", err)
	}
	r.BoardID = hex.EncodeToString(fields[typeBoardID])
	if v, ok := fields[typeCounts]; ok && len(v) != 4*blockCount {
		return fmt.Errorf("GPU report has %d bytes of measurement counts: want %d", len(v), 4*blockCount)
	}
	if v, ok := fields[typeFWID]; ok {
		if len(v) != digestSize {
			return fmt.Errorf("GPU report has an FWID of %d bytes: want %d", len(v), digestSize)
		}
		r.FWID = slices.Clone(v)
	}
	if v, ok := fields[typeProtectedPCIe]; ok {
		on, err := onOff(v)
		if err != nil {
			return fmt.Errorf("GPU report's protected PCIe status: %w", err)
		}
		r.ProtectedPCIe = &on
	}
	if v, ok := fields[typeSwitchPDIs]; ok {
		if len(v)%8 != 0 {
			return fmt.Errorf("GPU report has %d bytes of switch identifiers: want a multiple of 8", len(v))
		}
		for p := range slices.Chunk(v, 8) {
			r.SwitchPDIs = append(r.SwitchPDIs, hex.EncodeToString(p))
		}
	}
	if v, ok := fields[typeOpaqueVersion]; ok {
		if len(v) != 2 || binary.LittleEndian.Uint16(v) != 1 {
			return fmt.Errorf("GPU report has opaque data of version %x: want 1", v)
		}
		one := uint16(1)
		r.OpaqueVersion = &one
	}
	if v, ok := fields[typeFeature]; ok {
		if len(v) != 2 || binary.LittleEndian.Uint16(v) > uint16(ProtectedPCIe) {
			return fmt.Errorf("GPU report has the feature flag %x: want 0, 1 or 2", v)
		}
		f := Feature(binary.LittleEndian.Uint16(v))
		r.Feature = &f
	}
	return nil
}

// vbiosText shows the bytes at 3, 2, 1, 0 and 4 in hex.
func vbiosText(v []byte) (string, error) {
	if len(v) != 8 {
		return "", fmt.Errorf("GPU report has a VBIOS version of %d bytes: want 8", len(v))
	}
	return fmt.Sprintf("%02x.%02x.%02x.%02x.%02x", v[3], v[2], v[1], v[0], v[4]), nil
}

func onOff(v []byte) (bool, error) {
	switch {
	case len(v) == 1 && v[0] == 0xAA:
		return true, nil
	case len(v) == 1 && v[0] == 0x55:
		return false, nil
	}
	return false, fmt.Errorf("%x: want aa or 55", v)
}

// cText reads a version or a part number up to the zero bytes that fill its
// field. They become parts of names, so they have the bytes of names only.
func cText(v []byte) (string, error) {
	s := strings.TrimRight(string(v), "\x00")
	other := func(c rune) bool {
		return !(c >= '0' && c <= '9' || c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c == '.' || c == '-' || c == '_')
	}
	if s == "" || len(s) > 64 || strings.ContainsFunc(s, other) {
		return "", fmt.Errorf("%.64q: want letters, digits, dots, dashes", s)
	}
	return s, nil
}

// reader takes bytes from the front and remembers the first that were missing.
type reader struct {
	b   []byte
	at  int
	err error
}

func (r *reader) take(n int, what string) []byte {
	if r.err != nil {
		return nil
	}
	if n < 0 || n > len(r.b)-r.at {
		r.err = fmt.Errorf("GPU report ends at byte %d, in its %s", len(r.b), what)
		return nil
	}
	r.at += n
	return r.b[r.at-n : r.at]
}
