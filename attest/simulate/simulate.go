// Package simulate is a virtual vendor: it makes evidence in the hardware's
// byte formats under roots minted at run time, for tests and for the emulated
// machine. A production verifier never links it.
//
// Nothing it makes can pass for the hardware's: the vendors' anchors pin other
// roots. Its names say "simulation" as a courtesy to readers; no verifier
// relies on that, and Options.Plain leaves it out.
package simulate

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/internal/anchorset"
)

// MaxGPUs is how many GPUs a simulated machine can have.
const MaxGPUs = 16

// Options say what to mint. The zero value is one Genoa chip and one GPU.
type Options struct {
	// Product is the line of the SNP chip.
	Product anchor.Product
	// GPUs is the number of H100s; 0 means one, a negative number none.
	GPUs int
	// Now is the time of minting; zero means the system's.
	Now time.Time
	// Plain leaves every word of simulation out of the certificates.
	Plain bool
	// Fast makes AMD's keys of 2048 bits instead of the hardware's 4096, in a
	// tenth of the time.
	Fast bool
}

// Vendor holds the root keys of both virtual vendors and the devices that they
// made. It lives in memory only: Mint forgets the root keys.
type Vendor struct {
	product anchor.Product
	now     time.Time
	plain   bool
	bits    int // of AMD's keys

	ark, ask, asvk    *x509.Certificate
	arkKey, askKey    *rsa.PrivateKey
	asvkKey           *rsa.PrivateKey
	deviceRoot        *x509.Certificate
	identity, ica     *x509.Certificate
	deviceKey, icaKey *ecdsa.PrivateKey
	identityKey       *ecdsa.PrivateKey
	rimRoot           *x509.Certificate
	rimKey            *ecdsa.PrivateKey

	mu       sync.Mutex
	rimCA    *x509.Certificate // guarded by mu
	rimCAKey *ecdsa.PrivateKey // guarded by mu

	anchors anchor.Set
	chip    *Chip
	gpus    []*GPU
}

// New mints roots and devices in memory.
func New(o Options) (*Vendor, error) {
	if o.Product == "" {
		o.Product = anchor.Genoa
	}
	if o.GPUs == 0 {
		o.GPUs = 1
	}
	if o.GPUs > MaxGPUs {
		return nil, fmt.Errorf("mint simulation: %d GPUs, at most %d are allowed", o.GPUs, MaxGPUs)
	}
	if o.Now.IsZero() {
		o.Now = time.Now()
	}
	v := &Vendor{product: o.Product, now: o.Now.UTC().Truncate(time.Second), plain: o.Plain, bits: 4096}
	if o.Fast {
		v.bits = 2048
	}
	if err := v.mintAMD(); err != nil {
		return nil, fmt.Errorf("mint simulated AMD roots: %w", err)
	}
	if err := v.mintNVIDIA(); err != nil {
		return nil, fmt.Errorf("mint simulated NVIDIA roots: %w", err)
	}
	var err error
	v.anchors, err = anchor.FromSimulation(anchorset.Simulation{
		ARKs:       map[string]anchorset.Fingerprint{string(v.product): sha256.Sum256(v.ark.Raw)},
		DeviceRoot: sha256.Sum256(v.deviceRoot.Raw),
		RIMRoot:    sha256.Sum256(v.rimRoot.Raw),
	})
	if err != nil {
		return nil, err
	}
	if v.chip, err = v.NewChip(); err != nil {
		return nil, err
	}
	for range max(o.GPUs, 0) {
		g, err := v.NewGPU()
		if err != nil {
			return nil, err
		}
		v.gpus = append(v.gpus, g)
	}
	return v, nil
}

// Anchors returns the roots as trust anchors. They say that they are simulated.
func (v *Vendor) Anchors() anchor.Set { return v.anchors }

// Chip returns the SNP chip that New minted.
func (v *Vendor) Chip() *Chip { return v.chip }

// GPUs returns the GPUs that New minted.
func (v *Vendor) GPUs() []*GPU { return v.gpus }

func (v *Vendor) amdName(cn string) pkix.Name {
	o := "Advanced Micro Devices"
	if !v.plain {
		o = "coffer simulation"
	}
	return pkix.Name{OrganizationalUnit: []string{"Engineering"}, Country: []string{"US"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"}, Organization: []string{o}, CommonName: cn}
}

func (v *Vendor) nvidiaName(cn string) pkix.Name {
	o := "NVIDIA Corporation"
	if !v.plain {
		o = "coffer simulation"
	}
	return pkix.Name{Organization: []string{o}, CommonName: cn}
}

func (v *Vendor) mintAMD() error {
	// Keys of 4096 bits take seconds: both at a time.
	var arkErr, askErr error
	var keys sync.WaitGroup
	keys.Go(func() { v.arkKey, arkErr = rsa.GenerateKey(rand.Reader, v.bits) })
	keys.Go(func() { v.askKey, askErr = rsa.GenerateKey(rand.Reader, v.bits) })
	keys.Wait()
	err := errors.Join(arkErr, askErr)
	if err != nil {
		return err
	}
	ark := &x509.Certificate{
		SerialNumber: big.NewInt(0x20000), Subject: v.amdName("ARK-" + string(v.product)),
		NotBefore: v.now.Add(-time.Hour), NotAfter: v.now.AddDate(25, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
	if v.ark, err = certify(ark, ark, &v.arkKey.PublicKey, v.arkKey); err != nil {
		return err
	}
	v.ask, err = v.signAMDIntermediate("SEV-"+string(v.product), 0x20001, &v.askKey.PublicKey)
	return err
}

func (v *Vendor) signAMDIntermediate(cn string, serial int64, pub *rsa.PublicKey) (*x509.Certificate, error) {
	return certify(&x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: v.amdName(cn),
		NotBefore: v.now.Add(-time.Hour), NotAfter: v.now.AddDate(25, 0, 0),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}, v.ark, pub, v.arkKey)
}

func (v *Vendor) mintNVIDIA() error {
	keys := make([]*ecdsa.PrivateKey, 4)
	for i := range keys {
		k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			return err
		}
		keys[i] = k
	}
	v.deviceKey, v.identityKey, v.icaKey, v.rimKey = keys[0], keys[1], keys[2], keys[3]
	ca := func(cn string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: randomSerial(16), Subject: v.nvidiaName(cn),
			NotBefore: v.now.Add(-time.Hour), NotAfter: forever,
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			SignatureAlgorithm: x509.ECDSAWithSHA384,
		}
	}
	var err error
	root := ca("NVIDIA Device Identity CA")
	if v.deviceRoot, err = certify(root, root, &v.deviceKey.PublicKey, v.deviceKey); err != nil {
		return err
	}
	if v.identity, err = certify(ca("NVIDIA GH100 Identity"), v.deviceRoot, &v.identityKey.PublicKey, v.deviceKey); err != nil {
		return err
	}
	if v.ica, err = certify(ca("NVIDIA GH100 Provisioner ICA 1"), v.identity, &v.icaKey.PublicKey, v.identityKey); err != nil {
		return err
	}
	rim := ca("NVIDIA CoRIM signing Root CA")
	rim.NotAfter = v.now.AddDate(30, 0, 0)
	v.rimRoot, err = certify(rim, rim, &v.rimKey.PublicKey, v.rimKey)
	return err
}

// forever is how the GPU chains of the hardware say that they do not expire.
var forever = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

func certify(template, parent *x509.Certificate, pub, signer any) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, pub, signer)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// randomSerial returns a positive serial number of n bytes.
func randomSerial(n int) *big.Int {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	b[0] = b[0]&0x7f | 0x40
	return new(big.Int).SetBytes(b)
}
