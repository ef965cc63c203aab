// Package azure reads the report that the paravisor of an Azure confidential
// machine (HCL) keeps in the TPM that it gives to its guest.
//
// Trusted: nothing. Checked: every byte's form, and which report data follows
// from the runtime claims. Not checked: that the SEV-SNP report inside is
// genuine and has that report data, which is for attest/snp, and that a
// paravisor made it. Every SEV-SNP guest can put the digest of claims of its own
// making into a genuine report: that the claims speak of a TPM follows from who
// signed the guest (ID_KEY_DIGEST), which attest/composite checks.
package azure

import (
	"bytes"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
)

// Layout of the report: header, SEV-SNP report, header of the runtime claims,
// claims, zeros up to the size of the TPM's index.
const (
	headerSize  = 32
	reportSize  = 1184
	runtimeSize = 20
	claimsAt    = headerSize + reportSize + runtimeSize
	// MaxSize bounds a report, in bytes. Real ones have 2600.
	MaxSize = 16 << 10
	maxVM   = 64

	requestSNP     = 2
	typeSNP        = 2
	hashSHA256     = 1
	runtimeV1      = 1
	nameAK         = "HCLAkPub"
	publicExponent = 65537
)

// Report is a report of the paravisor.
type Report struct {
	// SNP is the SEV-SNP report.
	SNP []byte
	// Claims are the runtime claims, JSON, byte for byte.
	Claims []byte
	// AK is the attestation key of the paravisor's TPM by the claims' word.
	AK *rsa.PublicKey
	// SecureBoot and Console are what the paravisor says of its configuration;
	// nil where it says nothing.
	SecureBoot, Console *bool
	// VM is the machine's name at its provider, as the paravisor has it.
	VM string
}

// ReportData is what the SEV-SNP report must have as its report data: the
// claims' digest, then zeros.
func (r *Report) ReportData() [64]byte {
	var out [64]byte
	sum := sha256.Sum256(r.Claims)
	copy(out[:], sum[:])
	return out
}

// Parse reads a report.
func Parse(b []byte) (*Report, error) {
	r, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("parse HCL report: %w", err)
	}
	return r, nil
}

func parse(b []byte) (*Report, error) {
	if len(b) < claimsAt || len(b) > MaxSize {
		return nil, fmt.Errorf("%d bytes: want %d to %d", len(b), claimsAt, MaxSize)
	}
	u32 := func(at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
	if string(b[:4]) != "HCLA" {
		return nil, fmt.Errorf("signature %x: want HCLA", b[:4])
	}
	if v := u32(4); v != 1 && v != 2 {
		return nil, fmt.Errorf("version %d: want 1 or 2", v)
	}
	const r = headerSize + reportSize
	size, claims := u32(r), u32(r+16)
	switch {
	case u32(12) != requestSNP:
		return nil, fmt.Errorf("request type %d: want %d, SEV-SNP", u32(12), requestSNP)
	case u32(16) != 0:
		return nil, fmt.Errorf("status %d: want 0", u32(16))
	case !zero(b[20:headerSize]):
		return nil, errors.New("reserved bytes are not zero")
	case u32(r+4) != runtimeV1:
		return nil, fmt.Errorf("runtime claims of version %d: want %d", u32(r+4), runtimeV1)
	case u32(r+8) != typeSNP:
		return nil, fmt.Errorf("report type %d: want %d, SEV-SNP", u32(r+8), typeSNP)
	case u32(r+12) != hashSHA256:
		return nil, fmt.Errorf("hash type %d: want %d, SHA-256", u32(r+12), hashSHA256)
	// In 64 bits, so that no sum wraps around.
	case claims == 0 || claimsAt+uint64(claims) > uint64(len(b)):
		return nil, fmt.Errorf("runtime claims of %d bytes in a report of %d", claims, len(b))
	case uint64(size) != runtimeSize+uint64(claims):
		return nil, fmt.Errorf("runtime data of %d bytes with claims of %d", size, claims)
	case uint64(u32(8)) != headerSize+reportSize+uint64(size):
		return nil, fmt.Errorf("report of %d bytes with runtime data of %d", u32(8), size)
	case !zero(b[claimsAt+claims:]):
		return nil, errors.New("bytes follow the runtime claims")
	}
	out := &Report{SNP: bytes.Clone(b[headerSize:r]), Claims: bytes.Clone(b[claimsAt : claimsAt+claims])}
	if err := out.readClaims(); err != nil {
		return nil, fmt.Errorf("runtime claims: %w", err)
	}
	return out, nil
}

// readClaims reads what is used of the claims. Further members are let pass:
// the paravisor's versions differ in them, and nothing here follows from them.
func (r *Report) readClaims() error {
	var top map[string]json.RawMessage
	if err := plan.Decode(r.Claims, MaxSize, &top); err != nil {
		return err
	}
	var keys []map[string]json.RawMessage
	if err := plan.Decode(top["keys"], MaxSize, &keys); err != nil {
		return fmt.Errorf("keys: %w", err)
	}
	for _, k := range keys {
		var id string
		if err := plan.Decode(k["kid"], MaxSize, &id); err != nil {
			return fmt.Errorf("key: %w", err)
		}
		if id != nameAK {
			continue
		}
		if r.AK != nil {
			return errors.New("two keys " + nameAK)
		}
		ak, err := readAK(k)
		if err != nil {
			return fmt.Errorf("%s: %w", nameAK, err)
		}
		r.AK = ak
	}
	if r.AK == nil {
		return errors.New("no key " + nameAK)
	}
	var vm map[string]json.RawMessage
	if top["vm-configuration"] == nil {
		return nil
	}
	if err := plan.Decode(top["vm-configuration"], MaxSize, &vm); err != nil {
		return fmt.Errorf("vm-configuration: %w", err)
	}
	for name, to := range map[string]any{"secure-boot": &r.SecureBoot, "console-enabled": &r.Console, "vmUniqueId": &r.VM} {
		if vm[name] == nil {
			continue
		}
		if err := plan.Decode(vm[name], MaxSize, to); err != nil {
			return fmt.Errorf("vm-configuration: %s: %w", name, err)
		}
	}
	if len(r.VM) > maxVM || strings.ContainsFunc(r.VM, func(c rune) bool { return c <= ' ' || c > '~' }) {
		return errors.New("vm-configuration: a machine's name of no usable form")
	}
	return nil
}

func readAK(k map[string]json.RawMessage) (*rsa.PublicKey, error) {
	var typ, e, n string
	var ops []string
	for name, to := range map[string]any{"kty": &typ, "e": &e, "n": &n, "key_ops": &ops} {
		if err := plan.Decode(k[name], MaxSize, to); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if typ != "RSA" || len(ops) != 1 || ops[0] != "sign" {
		return nil, fmt.Errorf("key of type %.10q for %.40q: want an RSA key to sign", typ, ops)
	}
	modulus, err := base64.RawURLEncoding.Strict().DecodeString(n)
	if err != nil {
		return nil, fmt.Errorf("modulus: %w", err)
	}
	exponent, err := base64.RawURLEncoding.Strict().DecodeString(e)
	if err != nil {
		return nil, fmt.Errorf("exponent: %w", err)
	}
	if !bytes.Equal(exponent, []byte{1, 0, 1}) {
		return nil, fmt.Errorf("exponent %x: want %d", exponent, publicExponent)
	}
	if bits := 8 * len(modulus); bits < 2048 || bits > 4096 || modulus[0]&0x80 == 0 {
		return nil, fmt.Errorf("modulus of %d bytes: want 2048 to 4096 bits", len(modulus))
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(modulus), E: publicExponent}, nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
