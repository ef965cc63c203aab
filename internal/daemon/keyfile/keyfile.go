// Package keyfile makes and reads the key files of the daemons.
//
// Trusted: root, and the file's owner. Checked: that no one else may read a key
// file, its size, and that Create functions overwrite nothing. Not done: sealing
// keys to a TPM or an HSM.
package keyfile

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hpke"
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

	"golang.org/x/mod/sumdb/note"
)

// maxSize bounds a key file, in bytes.
const maxSize = 64 << 10

// CreateP384 makes a signing key for receipts and results: PKCS#8 in PEM.
func CreateP384(path string) error {
	return create(path, func() ([]byte, error) {
		k, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			return nil, err
		}
		return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
	})
}

// ReadP384 reads what CreateP384 made.
func ReadP384(path string) (*ecdsa.PrivateKey, error) {
	b, err := Read(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	block, rest := pem.Decode(b)
	if block == nil || block.Type != "PRIVATE KEY" || len(rest) > 0 {
		return nil, fmt.Errorf("key file %s: want one PEM block PRIVATE KEY", path)
	}
	defer clear(block.Bytes)
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("key file %s: %w", path, err)
	}
	k, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || k.Curve != elliptic.P384() {
		return nil, fmt.Errorf("key file %s: not a P-384 key", path)
	}
	return k, nil
}

// CreateSecret makes a file of size random bytes.
func CreateSecret(path string, size int) error {
	return create(path, func() ([]byte, error) {
		b := make([]byte, size)
		_, err := rand.Read(b)
		return b, err
	})
}

// ReadSecret reads what CreateSecret made. The caller clears it after use.
func ReadSecret(path string, size int) ([]byte, error) {
	b, err := Read(path)
	if err != nil {
		return nil, err
	}
	if len(b) != size {
		clear(b)
		return nil, fmt.Errorf("key file %s has %d bytes, want %d", path, len(b), size)
	}
	return b, nil
}

// CreateHPKE makes an ML-KEM-768+X25519 private key.
func CreateHPKE(path string) error {
	return create(path, func() ([]byte, error) {
		k, err := hpke.MLKEM768X25519().GenerateKey()
		if err != nil {
			return nil, err
		}
		return k.Bytes()
	})
}

// ReadHPKE reads what CreateHPKE made.
func ReadHPKE(path string) (hpke.PrivateKey, error) {
	b, err := Read(path)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	k, err := hpke.MLKEM768X25519().NewPrivateKey(b)
	if err != nil {
		return nil, fmt.Errorf("key file %s is not an ML-KEM-768+X25519 private key", path)
	}
	return k, nil
}

// CreateNote makes an Ed25519 key that signs notes (C2SP signed-note) under name.
func CreateNote(path, name string) error {
	return create(path, func() ([]byte, error) {
		private, _, err := note.GenerateKey(rand.Reader, name)
		return []byte(private), err
	})
}

// ReadNote reads what CreateNote made.
func ReadNote(path string) (string, error) {
	b, err := Read(path)
	if err != nil {
		return "", err
	}
	defer clear(b)
	key := strings.TrimSpace(string(b))
	if _, err := note.NewSigner(key); err != nil {
		return "", fmt.Errorf("key file %s is not an Ed25519 private key in the form of C2SP signed-note", path)
	}
	return key, nil
}

func create(path string, generate func() ([]byte, error)) error {
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create key file: %s exists or cannot be read", path)
	}
	b, err := generate()
	if err != nil {
		return fmt.Errorf("create key file %s: %w", path, err)
	}
	defer clear(b)
	return Write(path, b)
}

// Write puts b into path, whole or not at all, readable by its owner alone, and
// durably so: a key that a receipt was signed with must not be gone after a crash.
func Write(path string, b []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = tmp.Write(b)
	err = errors.Join(err, tmp.Sync(), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", path, err), os.Remove(tmp.Name()))
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// syncDir makes a rename in dir outlast a power cut.
func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Read returns the bytes of a key file, of any format, that no one but its owner
// may read. The caller clears them after use.
func Read(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	if !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("key file %s has mode %v: make it a file that only its owner can read (chmod 600)", path, info.Mode())
	}
	b, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("read key file %s: %w", path, err)
	}
	if len(b) == 0 || len(b) > maxSize {
		return nil, fmt.Errorf("key file %s has %d bytes, want 1 to %d", path, len(b), maxSize)
	}
	return b, nil
}
