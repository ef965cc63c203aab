package local

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/plugins/contract/keystore"
)

const (
	// maxFile bounds the file, in bytes.
	maxFile = 4 << 20
	// maxVersions bounds the versions of one key.
	maxVersions = 64
	fileVersion = 1
	fileLabel   = "coffer/v1 local key store file\x00"
)

// onDisk is the file: JSON. Sealed is AES-256-GCM, nonce first, of content under
// the file key, with fileLabel and the bytes of Header as associated data. Each
// time that the file is written, the nonce is a new random one.
type onDisk struct {
	Header json.RawMessage `json:"header"`
	Sealed []byte          `json:"sealed"`
}

type header struct {
	Version int `json:"version"`
	// Lock tells how the file key is recovered.
	Lock Params `json:"lock"`
}

type file struct {
	header    header
	rawHeader []byte
	sealed    []byte
}

type content struct {
	Store string `json:"store"`
	Keys  []kek  `json:"keys"`
}

type kek struct {
	ID       string `json:"id"`
	Disabled bool   `json:"disabled"`
	// Versions are in rising order, at least one.
	Versions []version `json:"versions"`
}

type version struct {
	Version uint32    `json:"version"`
	Created time.Time `json:"created"`
	Key     []byte    `json:"key"`
}

func (k *kek) newest() *version { return &k.Versions[len(k.Versions)-1] }

func (c *content) find(keyID string) *kek {
	if i := slices.IndexFunc(c.Keys, func(k kek) bool { return k.ID == keyID }); i >= 0 {
		return &c.Keys[i]
	}
	return nil
}

func (c *content) enabled(keyID string) (*kek, error) {
	switch k := c.find(keyID); {
	case k == nil:
		return nil, fmt.Errorf("%w: the file has no key %s", keystore.ErrDisabled, keyID)
	case k.Disabled:
		return nil, fmt.Errorf("%w: %s", keystore.ErrDisabled, keyID)
	default:
		return k, nil
	}
}

func (c *content) destroy() {
	for _, k := range c.Keys {
		for _, v := range k.Versions {
			clear(v.Key)
		}
	}
}

func (c *content) check() error {
	if len(c.Keys) == 0 || len(c.Keys) > keystore.MaxKeys {
		return fmt.Errorf("it has %d keys: want 1 to %d", len(c.Keys), keystore.MaxKeys)
	}
	for _, k := range c.Keys {
		if len(k.Versions) == 0 || len(k.Versions) > maxVersions {
			return fmt.Errorf("key %q has %d versions: want 1 to %d", k.ID, len(k.Versions), maxVersions)
		}
		last := uint32(0)
		for _, v := range k.Versions {
			if v.Version <= last || len(v.Key) != kekSize {
				return fmt.Errorf("key %q: version %d has %d bytes after version %d", k.ID, v.Version, len(v.Key), last)
			}
			last = v.Version
		}
	}
	return nil
}

// strict decodes JSON that has no unknown fields and nothing after it.
func strict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the JSON value")
	}
	return nil
}

func read(path string) (*file, error) {
	f, err := os.Open(path) // #nosec G304 -- the operator's file
	if err != nil {
		return nil, fmt.Errorf("key store: %w", err)
	}
	defer f.Close() //nolint:errcheck // read only
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", path, err)
	}
	parsed, err := parse(b)
	if err != nil {
		return nil, fmt.Errorf("key store %s: %w", path, err)
	}
	return parsed, nil
}

func parse(b []byte) (*file, error) {
	if len(b) > maxFile {
		return nil, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	var d onDisk
	if err := strict(b, &d); err != nil {
		return nil, fmt.Errorf("not a key store file: %w", err)
	}
	f := &file{rawHeader: d.Header, sealed: d.Sealed}
	if err := strict(d.Header, &f.header); err != nil {
		return nil, fmt.Errorf("not a key store file: %w", err)
	}
	if f.header.Version != fileVersion {
		return nil, fmt.Errorf("file version %d: want %d", f.header.Version, fileVersion)
	}
	return f, nil
}

func (f *file) open(fileKey []byte) (*content, error) {
	a, err := aead(fileKey)
	if err != nil {
		return nil, err
	}
	if len(f.sealed) < a.NonceSize() {
		return nil, errors.New("it does not open: it is not whole")
	}
	b, err := a.Open(nil, f.sealed[:a.NonceSize()], f.sealed[a.NonceSize():], append([]byte(fileLabel), f.rawHeader...))
	if err != nil {
		return nil, errors.New("it does not open: a wrong passphrase, another TPM, or a changed file")
	}
	defer clear(b)
	c := &content{}
	if err := strict(b, c); err != nil {
		return nil, err
	}
	if err := c.check(); err != nil {
		c.destroy()
		return nil, err
	}
	return c, nil
}

func encode(rawHeader, fileKey []byte, c *content) ([]byte, error) {
	plain, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	a, err := aead(fileKey)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, a.NonceSize())
	_, _ = rand.Read(nonce) // never fails (crypto/rand)
	return json.Marshal(onDisk{Header: rawHeader, Sealed: a.Seal(nonce, nonce, plain, append([]byte(fileLabel), rawHeader...))})
}

// create writes a file where none is.
func create(path string, p Params, fileKey []byte, c *content) error {
	h, err := json.Marshal(header{Version: fileVersion, Lock: p})
	if err != nil {
		return err
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("create key store: %s exists or cannot be read", path)
	}
	return replace(path, h, fileKey, c)
}

// replace writes the file whole or not at all, and durably: a key under which
// something was wrapped must not be gone after a crash.
func replace(path string, rawHeader, fileKey []byte, c *content) error {
	b, err := encode(rawHeader, fileKey, c)
	if err != nil {
		return fmt.Errorf("write key store %s: %w", path, err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write key store %s: %w", path, err)
	}
	_, err = tmp.Write(b)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write key store %s: %w", path, err), os.Remove(tmp.Name()))
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write key store %s: %w", path, err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// exclusive keeps other processes from changing the file until unlock.
func exclusive(path string) (unlock func(), err error) {
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600) // #nosec G304 -- the operator's file
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil { // #nosec G115 -- a descriptor
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}
