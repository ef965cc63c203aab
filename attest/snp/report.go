package snp

import (
	"bytes"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/coffer-run/coffer/attest/anchor"
)

// Sizes and offsets of ATTESTATION_REPORT (AMD document 56860, table 23).
const (
	// ReportSize is that of every report version.
	ReportSize = 0x4A0
	signedSize = 0x2A0
	scalarSize = 72
)

// Report is a parsed attestation report.
type Report struct {
	Version         uint32
	GuestSVN        uint32
	Policy          Policy
	FamilyID        [16]byte
	ImageID         [16]byte
	VMPL            uint32
	CurrentTCB      TCB
	PlatformInfo    PlatformInfo
	Signer          Signer
	AuthorKeyInUse  bool
	ChipKeyMasked   bool
	ReportData      [64]byte
	Measurement     [48]byte
	HostData        [32]byte
	IDKeyDigest     [48]byte
	AuthorKeyDigest [48]byte
	ReportID        [32]byte
	ReportIDMA      [32]byte
	ReportedTCB     TCB
	// Family, Model and Stepping are there from version 3 on.
	Family, Model, Stepping uint8
	// Product is empty in version 2, which does not say.
	Product      anchor.Product
	ChipID       [64]byte
	CommittedTCB TCB
	Current      Firmware
	Committed    Firmware
	LaunchTCB    TCB
	// LaunchMitigations and CurrentMitigations are there from version 5 on.
	LaunchMitigations, CurrentMitigations uint64

	digest [sha512.Size384]byte // of what the signature covers
	r, s   *big.Int
}

// Policy is the guest policy (document 56860, table 10).
type Policy struct {
	ABIMajor, ABIMinor uint8
	SMT                bool
	MigrationAgent     bool
	Debug              bool
	SingleSocket       bool
	CXL                bool
	MemAES256XTS       bool
	RAPLDisabled       bool
	CiphertextHiding   bool
	PageSwapDisabled   bool
}

// PlatformInfo is what the platform has switched on (document 56860, table 24).
type PlatformInfo struct {
	SMT                bool
	TSME               bool
	ECC                bool
	RAPLDisabled       bool
	CiphertextHiding   bool
	AliasCheckComplete bool
	TIO                bool
}

// Signer is the key that signed a report.
type Signer uint8

// Signers; any other is refused.
const (
	VCEK Signer = 0
	VLEK Signer = 1
)

func (s Signer) String() string {
	if s == VLEK {
		return "VLEK"
	}
	return "VCEK"
}

// Firmware is a version of the secure processor's firmware.
type Firmware struct{ Major, Minor, Build uint8 }

func (f Firmware) String() string { return fmt.Sprintf("%d.%d.%d", f.Major, f.Minor, f.Build) }

// TCB is a TCB version by component. FMC is zero before Turin.
type TCB struct{ FMC, Bootloader, TEE, SNP, Microcode uint8 }

func (t TCB) String() string {
	return fmt.Sprintf("fmc %d, bootloader %d, tee %d, snp %d, microcode %d", t.FMC, t.Bootloader, t.TEE, t.SNP, t.Microcode)
}

// AtLeast reports whether no component of t is below min's.
func (t TCB) AtLeast(min TCB) bool {
	return t.FMC >= min.FMC && t.Bootloader >= min.Bootloader && t.TEE >= min.TEE && t.SNP >= min.SNP && t.Microcode >= min.Microcode
}

// Parse reads a report of version 2, 3 or 5. Every byte that the version
// reserves must be zero, and every enumeration must have a known value: what is
// not understood is not appraised.
func Parse(b []byte) (*Report, error) {
	if len(b) != ReportSize {
		return nil, fmt.Errorf("SNP report has %d bytes, want %d", len(b), ReportSize)
	}
	le := binary.LittleEndian
	r := &Report{
		Version: le.Uint32(b), GuestSVN: le.Uint32(b[0x04:]),
		FamilyID: [16]byte(b[0x10:]), ImageID: [16]byte(b[0x20:]), VMPL: le.Uint32(b[0x30:]),
		ReportData: [64]byte(b[0x50:]), Measurement: [48]byte(b[0x90:]), HostData: [32]byte(b[0xC0:]),
		IDKeyDigest: [48]byte(b[0xE0:]), AuthorKeyDigest: [48]byte(b[0x110:]),
		ReportID: [32]byte(b[0x140:]), ReportIDMA: [32]byte(b[0x160:]), ChipID: [64]byte(b[0x1A0:]),
		Current:   Firmware{Build: b[0x1E8], Minor: b[0x1E9], Major: b[0x1EA]},
		Committed: Firmware{Build: b[0x1EC], Minor: b[0x1ED], Major: b[0x1EE]},
	}
	z := zeros{b: b}
	z.check(0x4C, 0x50)
	z.check(0x1EB, 0x1EC)
	z.check(0x1EF, 0x1F0)
	switch r.Version {
	case 2:
		z.check(0x188, 0x1A0)
		z.check(0x1F8, signedSize)
	case 3:
		z.check(0x18B, 0x1A0)
		z.check(0x1F8, signedSize)
	case 5:
		z.check(0x18B, 0x1A0)
		z.check(0x208, signedSize)
		r.LaunchMitigations, r.CurrentMitigations = le.Uint64(b[0x1F8:]), le.Uint64(b[0x200:])
	default:
		return nil, fmt.Errorf("SNP report version %d: want 2, 3 or 5", r.Version)
	}
	// Scalars of P-384 have 48 bytes; the fields have 72.
	z.check(0x2A0+48, 0x2E8)
	z.check(0x2E8+48, ReportSize)
	if z.err != nil {
		return nil, z.err
	}

	if r.Version >= 3 {
		r.Family, r.Model, r.Stepping = b[0x188], b[0x189], b[0x18A]
		var ok bool
		if r.Product, ok = productOf(r.Family, r.Model); !ok {
			return nil, fmt.Errorf("SNP report is of a processor of family %#x, model %#x, which is not supported", r.Family, r.Model)
		}
	}
	// Eight bytes from Turin on.
	if r.Product == anchor.Turin && !isZero(r.ChipID[8:]) {
		return nil, errors.New("SNP report has a chip id of over 8 bytes, which Turin does not have")
	}
	if r.VMPL > 3 {
		return nil, fmt.Errorf("SNP report has VMPL %d: want 0 to 3", r.VMPL)
	}
	if a := le.Uint32(b[0x34:]); a != 1 {
		return nil, fmt.Errorf("SNP report has signature algorithm %d: want 1, ECDSA P-384 with SHA-384", a)
	}
	for _, t := range []struct {
		at  int
		out *TCB
	}{{0x38, &r.CurrentTCB}, {0x180, &r.ReportedTCB}, {0x1E0, &r.CommittedTCB}, {0x1F0, &r.LaunchTCB}} {
		var err error
		if *t.out, err = parseTCB([8]byte(b[t.at:]), r.Product); err != nil {
			return nil, fmt.Errorf("SNP report at %#x: %w", t.at, err)
		}
	}
	if err := r.parsePolicy(le.Uint64(b[0x08:])); err != nil {
		return nil, err
	}
	if err := r.parsePlatform(le.Uint64(b[0x40:])); err != nil {
		return nil, err
	}
	if err := r.parseKeyInfo(le.Uint32(b[0x48:])); err != nil {
		return nil, err
	}
	r.digest = sha512.Sum384(b[:signedSize])
	r.r, r.s = littleEndian(b[0x2A0:0x2A0+scalarSize]), littleEndian(b[0x2E8:0x2E8+scalarSize])
	return r, nil
}

// productOf maps CPUID family and model to the line whose root key signs.
func productOf(family, model uint8) (anchor.Product, bool) {
	switch {
	case family == 0x19 && model <= 0x0F:
		return anchor.Milan, true
	case family == 0x19 && (model >= 0x10 && model <= 0x1F || model >= 0xA0 && model <= 0xAF):
		return anchor.Genoa, true // Bergamo and Siena included
	case family == 0x1A && model <= 0x1F:
		return anchor.Turin, true
	}
	return "", false
}

// parseTCB reads TCB_VERSION (document 56860, tables 4 and 5): Turin has its
// own layout.
func parseTCB(b [8]byte, p anchor.Product) (TCB, error) {
	if p == anchor.Turin {
		if !isZero(b[4:7]) {
			return TCB{}, fmt.Errorf("TCB version %x has reserved bytes set", b)
		}
		return TCB{FMC: b[0], Bootloader: b[1], TEE: b[2], SNP: b[3], Microcode: b[7]}, nil
	}
	if !isZero(b[2:6]) {
		return TCB{}, fmt.Errorf("TCB version %x has reserved bytes set", b)
	}
	return TCB{Bootloader: b[0], TEE: b[1], SNP: b[6], Microcode: b[7]}, nil
}

func (r *Report) parsePolicy(p uint64) error {
	if p&(1<<17) == 0 || p>>26 != 0 {
		return fmt.Errorf("SNP guest policy %#x has reserved bits wrong", p)
	}
	bit := func(n uint) bool { return p>>n&1 == 1 }
	r.Policy = Policy{
		ABIMinor: uint8(p), ABIMajor: uint8(p >> 8),
		SMT: bit(16), MigrationAgent: bit(18), Debug: bit(19), SingleSocket: bit(20), CXL: bit(21),
		MemAES256XTS: bit(22), RAPLDisabled: bit(23), CiphertextHiding: bit(24), PageSwapDisabled: bit(25),
	}
	return nil
}

func (r *Report) parsePlatform(p uint64) error {
	// Bit 6 is reserved in the document and set by firmware on Turin.
	if p>>8 != 0 || p&(1<<6) != 0 && r.Product != anchor.Turin {
		return fmt.Errorf("SNP platform info %#x has reserved bits set", p)
	}
	bit := func(n uint) bool { return p>>n&1 == 1 }
	r.PlatformInfo = PlatformInfo{SMT: bit(0), TSME: bit(1), ECC: bit(2), RAPLDisabled: bit(3), CiphertextHiding: bit(4), AliasCheckComplete: bit(5), TIO: bit(7)}
	return nil
}

func (r *Report) parseKeyInfo(k uint32) error {
	if k>>5 != 0 {
		return fmt.Errorf("SNP key info %#x has reserved bits set", k)
	}
	r.AuthorKeyInUse, r.ChipKeyMasked = k&1 == 1, k&2 == 2
	switch s := k >> 2 & 7; s {
	case 0, 1:
		r.Signer = Signer(s)
	default:
		return fmt.Errorf("SNP report is signed by key %d: want 0, VCEK, or 1, VLEK", s)
	}
	return nil
}

// zeros finds the first reserved byte that is not zero.
type zeros struct {
	b   []byte
	err error
}

func (z *zeros) check(from, to int) {
	if z.err == nil && !isZero(z.b[from:to]) {
		z.err = fmt.Errorf("SNP report has reserved bytes set between %#x and %#x", from, to)
	}
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

func littleEndian(b []byte) *big.Int {
	c := slices.Clone(b)
	slices.Reverse(c)
	return new(big.Int).SetBytes(c)
}
