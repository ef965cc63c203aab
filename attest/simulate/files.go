package simulate

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/internal/anchorset"
	"github.com/coffer-run/coffer/attest/plan"
)

// Files under a simulation's folder. Roots hold certificates only and may be
// read by a verifier; devices hold keys and belong to the emulator.
const (
	rootsDir   = "roots"
	devicesDir = "devices"
	// EKRootFile is where the stack puts the root of its software TPM's
	// endorsement key certificate, if it has one.
	EKRootFile = "roots/tpm/ek_root.pem"

	arkFile        = "ark.pem"
	askFile        = "ask.pem"
	deviceRootFile = "nvidia/device_root.pem"
	rimRootFile    = "nvidia/rim_root.pem"
	chipFile       = "snp.json"
)

const maxFile = 1 << 20

type chipState struct {
	Product anchor.Product `json:"product"`
	ID      string         `json:"chipId"`
	TCB     TCB            `json:"tcb"`
	Key     []byte         `json:"key"` // PKCS #8
	VCEK    []byte         `json:"vcek"`
	ASK     []byte         `json:"ask"`
	ARK     []byte         `json:"ark"`
}

type gpuState struct {
	UUID   string   `json:"uuid"`
	Driver string   `json:"driverVersion"`
	VBIOS  string   `json:"vbiosVersion"`
	FWID   string   `json:"fwid"`
	Key    []byte   `json:"key"` // PKCS #8
	Chain  [][]byte `json:"chain"`
}

// Mint creates dir with new roots in dir/roots and new devices in dir/devices.
// The roots' keys are forgotten. It refuses a dir that has either.
func Mint(dir string, o Options) error {
	for _, sub := range []string{rootsDir, devicesDir} {
		if _, err := os.Lstat(filepath.Join(dir, sub)); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("mint simulation: %s is there already", filepath.Join(dir, sub))
		}
	}
	v, err := New(o)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("mint simulation: %w", err)
	}
	// Both folders are filled under another name, so that a crash leaves no
	// half a simulation under the right one. Roots go last: without them no
	// verifier starts.
	stage, err := os.MkdirTemp(dir, ".mint-")
	if err != nil {
		return fmt.Errorf("mint simulation: %w", err)
	}
	defer func() { _ = os.RemoveAll(stage) }()

	files := map[string][]byte{
		filepath.Join(rootsDir, "amd", string(v.product), arkFile): encodePEM([][]byte{v.ark.Raw}),
		filepath.Join(rootsDir, "amd", string(v.product), askFile): encodePEM([][]byte{v.ask.Raw}),
		filepath.Join(rootsDir, deviceRootFile):                    encodePEM([][]byte{v.deviceRoot.Raw}),
		filepath.Join(rootsDir, rimRootFile):                       encodePEM([][]byte{v.rimRoot.Raw}),
	}
	if files[filepath.Join(devicesDir, chipFile)], err = v.chip.marshal(); err != nil {
		return fmt.Errorf("mint simulation: %w", err)
	}
	for i, g := range v.gpus {
		if files[filepath.Join(devicesDir, gpuFile(i))], err = g.marshal(); err != nil {
			return fmt.Errorf("mint simulation: %w", err)
		}
	}
	for name, b := range files {
		path := filepath.Join(stage, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return fmt.Errorf("mint simulation: %w", err)
		}
		if err := writeFile(path, b); err != nil {
			return fmt.Errorf("mint simulation: %w", err)
		}
	}
	for _, sub := range []string{devicesDir, rootsDir} {
		if err := os.Rename(filepath.Join(stage, sub), filepath.Join(dir, sub)); err != nil {
			return fmt.Errorf("mint simulation: %w", err)
		}
	}
	return nil
}

func gpuFile(i int) string { return fmt.Sprintf("gpu%d.json", i) }

func writeFile(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	return errors.Join(err, f.Sync(), f.Close())
}

// LoadRoots reads the trust anchors of the simulation in dir. The software TPM's
// root is among them if dir has one.
func LoadRoots(dir string) (anchor.Set, error) {
	sim := anchorset.Simulation{ARKs: map[string]anchorset.Fingerprint{}}
	for _, p := range anchor.Products() {
		c, err := readCertificate(filepath.Join(dir, rootsDir, "amd", string(p), arkFile))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return anchor.Set{}, fmt.Errorf("load simulation roots: %w", err)
		}
		sim.ARKs[string(p)] = sha256.Sum256(c.Raw)
	}
	for file, f := range map[string]*anchorset.Fingerprint{deviceRootFile: &sim.DeviceRoot, rimRootFile: &sim.RIMRoot} {
		c, err := readCertificate(filepath.Join(dir, rootsDir, file))
		if err != nil {
			return anchor.Set{}, fmt.Errorf("load simulation roots: %w", err)
		}
		*f = sha256.Sum256(c.Raw)
	}
	set, err := anchor.FromSimulation(sim)
	if err != nil {
		return anchor.Set{}, fmt.Errorf("load simulation roots from %s: %w", dir, err)
	}
	ek, err := readCertificate(filepath.Join(dir, EKRootFile))
	if errors.Is(err, fs.ErrNotExist) {
		return set, nil
	}
	if err != nil {
		return anchor.Set{}, fmt.Errorf("load simulation roots: %w", err)
	}
	return set.WithEKRoots(anchor.Software, ek)
}

// LoadDevices reads the devices of the simulation in dir, keys included.
func LoadDevices(dir string) (*Chip, []*GPU, error) {
	dir = filepath.Join(dir, devicesDir)
	var cs chipState
	if err := readState(filepath.Join(dir, chipFile), &cs); err != nil {
		return nil, nil, fmt.Errorf("load simulated devices: %w", err)
	}
	chip, err := cs.chip()
	if err != nil {
		return nil, nil, fmt.Errorf("load simulated chip: %w", err)
	}
	var gpus []*GPU
	for i := range MaxGPUs {
		var gs gpuState
		err := readState(filepath.Join(dir, gpuFile(i)), &gs)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return nil, nil, fmt.Errorf("load simulated devices: %w", err)
		}
		g, err := gs.gpu()
		if err != nil {
			return nil, nil, fmt.Errorf("load simulated GPU %d: %w", i, err)
		}
		gpus = append(gpus, g)
	}
	return chip, gpus, nil
}

func (c *Chip) marshal() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(c.key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(chipState{Product: c.product, ID: hex.EncodeToString(c.id[:]), TCB: c.tcb, Key: key, VCEK: c.vcek, ASK: c.ask, ARK: c.ark})
}

func (s chipState) chip() (*Chip, error) {
	key, err := parseKey(s.Key)
	if err != nil {
		return nil, err
	}
	id, err := hex.DecodeString(s.ID)
	if err != nil || len(id) != 64 {
		return nil, errors.New("chip id is not 64 bytes in hex")
	}
	return &Chip{product: s.Product, id: [64]byte(id), tcb: s.TCB, key: key, vcek: s.VCEK, ask: s.ASK, ark: s.ARK}, nil
}

func (g *GPU) marshal() ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(g.key)
	if err != nil {
		return nil, err
	}
	return json.Marshal(gpuState{UUID: g.uuid, Driver: g.driver, VBIOS: g.vbios, FWID: hex.EncodeToString(g.fwid[:]), Key: key, Chain: g.chain})
}

func (s gpuState) gpu() (*GPU, error) {
	key, err := parseKey(s.Key)
	if err != nil {
		return nil, err
	}
	fwid, err := hex.DecodeString(s.FWID)
	if err != nil || len(fwid) != 48 {
		return nil, errors.New("FWID is not 48 bytes in hex")
	}
	return &GPU{uuid: s.UUID, driver: s.Driver, vbios: s.VBIOS, fwid: [48]byte(fwid), key: key, chain: s.Chain}, nil
}

func parseKey(der []byte) (*ecdsa.PrivateKey, error) {
	k, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, err
	}
	key, ok := k.(*ecdsa.PrivateKey)
	if !ok || key.Curve.Params().BitSize != 384 {
		return nil, errors.New("key is not on P-384")
	}
	return key, nil
}

func readState(path string, v any) error {
	b, err := readFile(path)
	if err != nil {
		return err
	}
	if err := plan.Decode(b, maxFile, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}

func readCertificate(path string) (*x509.Certificate, error) {
	b, err := readFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" || len(rest) > 0 {
		return nil, fmt.Errorf("read %s: not one PEM certificate", path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return c, nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path) //nolint:gosec // the folder is the operator's choice
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(b) > maxFile {
		return nil, fmt.Errorf("read %s: over %d bytes", path, maxFile)
	}
	return b, nil
}
