// Package anchor holds the pinned trust anchors at which every chain of
// evidence must end.
//
// Trusted: the fingerprints below, and the certificates that a deployment
// configures as endorsement key roots. Checked: that a certificate is one of
// them, byte for byte, and how a chain leads there. Not checked: what the
// certificates say of their holders; that is for attest/snp, attest/nvgpu and
// attest/vtpm.
//
// A set is of one kind, either the vendors' or one simulation's. Which kind it
// is follows from how it was made and from nothing else.
package anchor

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"

	"github.com/coffer-run/coffer/attest/internal/anchorset"
)

// Product is an AMD product line with a root key of its own.
type Product string

// Product lines that attest with SEV-SNP.
const (
	Milan Product = "Milan"
	Genoa Product = "Genoa"
	Turin Product = "Turin"
)

// Products lists every known product line.
func Products() []Product { return []Product{Milan, Genoa, Turin} }

// Class says who could forge what a TPM says.
type Class string

const (
	// Hypervisor is a vTPM of the host, which could forge it.
	Hypervisor Class = "hypervisor"
	// HCLVMPL0 is a vTPM in the paravisor at VMPL 0, rooted in the SNP report.
	HCLVMPL0 Class = "hcl-vmpl0"
	// SVSM is a vTPM in a secure VM service module at VMPL 0.
	SVSM Class = "svsm"
	// Discrete is a chip.
	Discrete Class = "discrete"
	// Software is a TPM that whoever runs it can forge. Only a simulation's set
	// takes such roots.
	Software Class = "software"
)

// Classes lists every known class.
func Classes() []Class { return []Class{Hypervisor, HCLVMPL0, SVSM, Discrete, Software} }

// SHA-256 over the DER encoding of the vendors' root certificates. The AMD
// root keys are what https://kdsintf.amd.com/{vcek,vlek}/v1/PRODUCT/cert_chain
// ends in; the same certificate roots VCEK and VLEK. The NVIDIA ones are
// "NVIDIA Device Identity CA" and "NVIDIA CoRIM signing Root CA", as NVIDIA's
// attestation tools carry them.
const (
	arkMilan         = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"
	arkGenoa         = "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1"
	arkTurin         = "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a"
	nvidiaDeviceRoot = "102bf659d5419614c9d8e6aecebc80454eb26b1df6a769ac720b9a690b167b48"
	nvidiaRIMRoot    = "12977b5115acb0381179279fffeb5a8c4d264971ebb32298023a465fa41df5d1"
)

type kind uint8

const (
	none kind = iota
	vendor
	simulation
)

// Set is a set of trust anchors. The zero value trusts nothing.
type Set struct {
	kind       kind
	arks       map[Product]anchorset.Fingerprint
	deviceRoot anchorset.Fingerprint
	rimRoot    anchorset.Fingerprint
	ekRoots    []EKRoot
	aks        map[string]Class // never written to once in a set
	paravisors []IDKeyDigest
	paths      *paths // shared by copies; nil in the zero value only
}

// EKRoot is a root of TPM endorsement key certificates.
type EKRoot struct {
	Class       Class
	Certificate *x509.Certificate
}

// Vendor returns the vendors' anchors. It holds no endorsement key root: those
// are a deployment's choice, by WithEKRoots.
func Vendor() Set {
	return Set{
		kind:  vendor,
		paths: &paths{},
		arks: map[Product]anchorset.Fingerprint{
			Milan: fingerprint(arkMilan), Genoa: fingerprint(arkGenoa), Turin: fingerprint(arkTurin),
		},
		deviceRoot: fingerprint(nvidiaDeviceRoot),
		rimRoot:    fingerprint(nvidiaRIMRoot),
	}
}

// FromSimulation returns the anchors of a simulation. Its argument can be named
// by attest/simulate alone.
func FromSimulation(s anchorset.Simulation) (Set, error) {
	set := Set{kind: simulation, paths: &paths{}, arks: map[Product]anchorset.Fingerprint{}, deviceRoot: s.DeviceRoot, rimRoot: s.RIMRoot}
	vendors := Vendor()
	for name, f := range s.ARKs {
		p := Product(name)
		if !slices.Contains(Products(), p) {
			return Set{}, fmt.Errorf("simulation has a root key for the unknown product %.40q", name)
		}
		set.arks[p] = f
		if f == vendors.arks[p] {
			return Set{}, errors.New("simulation names a vendor's root as its own")
		}
	}
	var zero anchorset.Fingerprint
	if len(set.arks) == 0 || s.DeviceRoot == zero || s.RIMRoot == zero {
		return Set{}, errors.New("simulation lacks a root")
	}
	if s.DeviceRoot == vendors.deviceRoot || s.RIMRoot == vendors.rimRoot {
		return Set{}, errors.New("simulation names a vendor's root as its own")
	}
	return set, nil
}

// Simulated reports whether the set is a simulation's.
func (s Set) Simulated() bool { return s.kind == simulation }

// Empty reports whether the set trusts nothing.
func (s Set) Empty() bool { return s.kind == none }

// ARK reports whether der is the AMD root key certificate of product p.
func (s Set) ARK(p Product, der []byte) bool {
	f, ok := s.arks[p]
	return s.kind != none && ok && f == sha256.Sum256(der)
}

// NVIDIADeviceRoot reports whether der is the root of GPU device identities.
func (s Set) NVIDIADeviceRoot(der []byte) bool {
	return s.kind != none && s.deviceRoot == sha256.Sum256(der)
}

// NVIDIARIMRoot reports whether der is the root of signers of GPU reference
// values (RIMs).
func (s Set) NVIDIARIMRoot(der []byte) bool {
	return s.kind != none && s.rimRoot == sha256.Sum256(der)
}

// WithEKRoots returns the set with further roots of endorsement key
// certificates, all of one class. Each must be a self-signed CA. A set that is
// not a simulation's takes none of class Software, and the empty set takes none.
func (s Set) WithEKRoots(class Class, roots ...*x509.Certificate) (Set, error) {
	switch {
	case s.kind == none:
		return Set{}, errors.New("add endorsement key roots: the set is empty")
	case !slices.Contains(Classes(), class):
		return Set{}, fmt.Errorf("add endorsement key roots: unknown trust class %.40q", class)
	case class == Software && s.kind != simulation:
		return Set{}, errors.New("add endorsement key roots: a software TPM is trusted in a simulation only")
	case len(roots) == 0:
		return Set{}, errors.New("add endorsement key roots: none given")
	}
	s.ekRoots = slices.Clone(s.ekRoots)
	for _, c := range roots {
		if c == nil || !c.IsCA || !bytes.Equal(c.RawIssuer, c.RawSubject) {
			return Set{}, errors.New("add endorsement key roots: not a self-signed CA certificate")
		}
		if err := c.CheckSignatureFrom(c); err != nil {
			return Set{}, fmt.Errorf("add endorsement key root %s: %w", c.Subject, err)
		}
		for _, have := range s.ekRoots {
			if have.Certificate.Equal(c) && have.Class != class {
				return Set{}, fmt.Errorf("add endorsement key root %s: it has two trust classes", c.Subject)
			}
		}
		s.ekRoots = append(s.ekRoots, EKRoot{Class: class, Certificate: c})
	}
	return s, nil
}

// EKRoots returns the roots of endorsement key certificates.
func (s Set) EKRoots() []EKRoot { return slices.Clone(s.ekRoots) }

// EKRoot returns the class of the endorsement key root der.
func (s Set) EKRoot(der []byte) (Class, bool) {
	for _, r := range s.ekRoots {
		if bytes.Equal(r.Certificate.Raw, der) {
			return r.Class, true
		}
	}
	return "", false
}

func fingerprint(s string) anchorset.Fingerprint {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != sha256.Size {
		panic("anchor: malformed fingerprint constant")
	}
	return anchorset.Fingerprint(b)
}
