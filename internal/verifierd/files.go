package verifierd

import (
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/policy"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/attest/verifier"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

const (
	// maxPolicies bounds the policies of a folder, and maxReferences the files of
	// reference values.
	maxPolicies   = 256
	maxReferences = 256
	// maxPEM bounds a file of certificates or of a public key, in bytes.
	maxPEM = 1 << 20
)

// KeyFiles are the verifier's own keys. Files with private
// or secret keys are mode 0600 and must exist.
type KeyFiles struct {
	// KeyFile holds the P-384 key that signs results (PKCS#8 PEM).
	KeyFile string `json:"keyFile"`
	// PublishedKeyFiles hold the verifier's other signing keys, which are
	// published and sign nothing here: the next one, and those that signed what
	// still counts. Public keys do (PEM, PUBLIC KEY).
	PublishedKeyFiles []string `json:"publishedKeyFiles,omitempty"`
	// NonceKeyFile holds the 32-byte key that replicas share, under which nonces
	// are made. Those made under OtherNonceKeyFiles are accepted as well.
	NonceKeyFile       string   `json:"nonceKeyFile"`
	OtherNonceKeyFiles []string `json:"otherNonceKeyFiles,omitempty"`
}

func (f KeyFiles) read(id string) (k verifier.Keys, err error) {
	key, err := keyfile.ReadP384(f.KeyFile)
	if err != nil {
		return k, err
	}
	if k.Signer, err = receipt.NewSigner(id, key); err != nil {
		return k, err
	}
	for _, path := range f.PublishedKeyFiles {
		pub, err := readPublic(path)
		if err != nil {
			return k, err
		}
		k.Published = append(k.Published, pub)
	}
	for _, path := range append([]string{f.NonceKeyFile}, f.OtherNonceKeyFiles...) {
		secret, err := keyfile.ReadSecret(path, verifier.NonceKeySize)
		if err != nil {
			wipe(verifier.Options{NonceKeys: k.NonceKeys})
			return k, err
		}
		k.NonceKeys = append(k.NonceKeys, secret)
	}
	return k, nil
}

// wipe clears the secrets that a verifier has made its own from.
func wipe(o verifier.Options) {
	for _, s := range o.NonceKeys {
		clear(s)
	}
}

// readPublic reads a public key, or a private one for its public half.
func readPublic(path string) (*ecdsa.PublicKey, error) {
	b, err := readFile(path, maxPEM)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	block, rest := pem.Decode(b)
	if block == nil || len(rest) > 0 || block.Type != "PUBLIC KEY" {
		key, err := keyfile.ReadP384(path)
		if err != nil {
			return nil, err
		}
		return &key.PublicKey, nil
	}
	k, err := x509.ParsePKIXPublicKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	pub, ok := k.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("key file %s: not a P-384 key", path)
	}
	return pub, nil
}

// EKRoots is a file of root certificates in PEM, all of one trust class:
// "hypervisor", "hcl-vmpl0", "svsm" or "discrete"; "software" in a simulation.
type EKRoots struct {
	Class anchor.Class `json:"class"`
	File  string       `json:"file"`
}

// AttestationKeys are TPM names of keys of one trust class, as
// anchor.Set.WithAKs takes them: SHA-256 names in lower-case hex.
type AttestationKeys struct {
	Class anchor.Class `json:"class"`
	Names []string     `json:"names"`
}

// anchors adds to a set what the configuration trusts besides.
func (c Config) anchors(set anchor.Set) (anchor.Set, error) {
	for _, r := range c.EKRoots {
		certs, err := readRoots(r.File)
		if err != nil {
			return anchor.Set{}, fmt.Errorf("configuration: %w", err)
		}
		if set, err = set.WithEKRoots(r.Class, certs...); err != nil {
			return anchor.Set{}, fmt.Errorf("configuration: %s: %w", r.File, err)
		}
	}
	var err error
	for _, k := range c.AttestationKeys {
		if set, err = set.WithAKs(k.Class, k.Names...); err != nil {
			return anchor.Set{}, fmt.Errorf("configuration: %w", err)
		}
	}
	if len(c.Paravisors) == 0 {
		return set, nil
	}
	var keys []anchor.IDKeyDigest
	for _, s := range c.Paravisors {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) != len(anchor.IDKeyDigest{}) || strings.ToLower(s) != s {
			return anchor.Set{}, fmt.Errorf("configuration: paravisor %.120q: want a SHA-384 in lower-case hex", s)
		}
		keys = append(keys, anchor.IDKeyDigest(b))
	}
	if set, err = set.WithParavisors(keys...); err != nil {
		return anchor.Set{}, fmt.Errorf("configuration: %w", err)
	}
	return set, nil
}

func readRoots(path string) ([]*x509.Certificate, error) {
	b, err := readFile(path, maxPEM)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, b = pem.Decode(b); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s holds a %.40q: want certificates only", path, block.Type)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New(path + " holds no certificate in PEM")
	}
	return out, nil
}

// references reads the files of reference values. The verifier checks them.
func (c Config) references() ([]string, error) {
	if len(c.ReferenceValues) > maxReferences {
		return nil, fmt.Errorf("configuration: %d files of reference values, at most %d are allowed", len(c.ReferenceValues), maxReferences)
	}
	var out []string
	for _, path := range c.ReferenceValues {
		b, err := readFile(path, receipt.MaxToken)
		if err != nil {
			return nil, fmt.Errorf("reference values: %w", err)
		}
		out = append(out, strings.TrimSpace(string(b)))
	}
	return out, nil
}

// readPolicies reads every *.json and every folder in dir. One that is no policy
// keeps the daemon from starting: half of the policies is not what was
// configured.
func readPolicies(dir string) ([]policy.Policy, error) {
	if dir == "" {
		return nil, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read policies: %w", err)
	}
	var out []policy.Policy
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		info, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("read policies: %w", err)
		}
		var p policy.Policy
		switch {
		case strings.HasPrefix(e.Name(), "."):
			continue
		case info.IsDir():
			p, err = policy.ParseFolder(os.DirFS(path))
		case filepath.Ext(path) == ".json":
			var b []byte
			if b, err = readFile(path, policy.MaxSize); err == nil {
				p, err = policy.Parse(b)
			}
		default:
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("policy %s: %w", path, err)
		}
		if out = append(out, p); len(out) > maxPolicies {
			return nil, fmt.Errorf("read policies in %s: more than %d", dir, maxPolicies)
		}
	}
	return out, nil
}

// readFile reads a file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator names the file
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, limit)
	}
	return b, nil
}
