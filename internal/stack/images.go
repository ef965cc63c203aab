package stack

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
	"github.com/coffer-run/coffer/runner/image/sign"
)

// imageSigner is under which name the stack's own signature of images counts.
const imageSigner = "stack"

// The stack signs the images that it is started with: it plays whoever publishes
// them. signerKey has the private key, signerPublic the public one, and signatures a
// folder for each image.
func (l Layout) signerKey() string    { return l.path("images", "signer.pem") }
func (l Layout) signerPublic() string { return l.path("images", "signer.pub") }
func (l Layout) signatures() string   { return l.path("images", "signatures") }

// ImageSignerKey returns the file with the private key that signs images for the
// stack.
func (e Endpoint) ImageSignerKey() string { return e.layout.signerKey() }

func createImageSigner(path string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	defer clear(der)
	return keyfile.Write(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// ReadImageSigner reads a private key that signs images.
func ReadImageSigner(path string) (*ecdsa.PrivateKey, error) {
	b, err := keyfile.Read(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("image signer %s: no PEM", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("image signer %s: %w", path, err)
	}
	k, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("image signer %s: another kind of key", path)
	}
	return k, nil
}

// imageSigner makes the key that signs images, if there is none, and publishes it.
func (l Layout) imageSigner() error {
	if err := os.MkdirAll(l.signatures(), 0o700); err != nil {
		return err
	}
	if _, err := os.Lstat(l.signerKey()); errors.Is(err, fs.ErrNotExist) {
		if err := createImageSigner(l.signerKey()); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	key, err := ReadImageSigner(l.signerKey())
	if err != nil {
		return err
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		return err
	}
	return keyfile.Write(l.signerPublic(), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}))
}

// signImage puts the stack's signature of an image where its node looks for it.
func (l Layout) signImage(digest string) error {
	key, err := ReadImageSigner(l.signerKey())
	if err != nil {
		return err
	}
	b, err := sign.Image(key, digest)
	if err != nil {
		return err
	}
	return l.keepSigned(digest, imageSigner+".json", b)
}

// readSBOM reads the bill of materials that lies beside an archive, as images/build
// writes it: NAME.cdx.json beside NAME.tar. It returns nil if there is none.
func readSBOM(archive string) ([]byte, error) {
	f, err := os.Open(strings.TrimSuffix(archive, ".tar") + ".cdx.json")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	return io.ReadAll(io.LimitReader(f, bundle.MaxImageSBOM+1))
}

// sbomFile ends the names of bills of materials that somebody signed.
const sbomFile = ".sbom.json"

// signSBOM puts a bill of materials, signed, beside the signature of its image. A nil
// one leaves what is there.
func (l Layout) signSBOM(digest string, sbom []byte) error {
	if sbom == nil {
		return nil
	}
	key, err := ReadImageSigner(l.signerKey())
	if err != nil {
		return err
	}
	b, err := sign.SBOM(key, digest, sbom)
	if err != nil {
		return err
	}
	return l.keepSigned(digest, imageSigner+sbomFile, b)
}

func (l Layout) keepSigned(digest, name string, b []byte) error {
	dir := filepath.Join(l.signatures(), strings.TrimPrefix(digest, "sha256:"))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return keyfile.Write(filepath.Join(dir, name), b)
}

type agentImages struct {
	Signers    agentSigners `json:"signers"`
	Signatures string       `json:"signatures"`
}

type agentSigners struct {
	Keys []agentSigner `json:"keys"`
}

type agentSigner struct {
	Name string `json:"name"`
	File string `json:"file"`
}

func (l Layout) agentImages() agentImages {
	return agentImages{Signers: agentSigners{[]agentSigner{{imageSigner, l.signerPublic()}}}, Signatures: l.signatures()}
}
