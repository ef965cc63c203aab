package seal

import (
	"bytes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/enclave/keys"
)

const (
	// Version is the only manifest version there is.
	Version = "coffer.run/sealed/v1"
	// ManifestName and RecordName are the files of a sealed folder that are not
	// themselves sealed; RecordName is there in checkpoints only.
	ManifestName = "manifest.json"
	RecordName   = "record.json"
	// MaxManifest bounds a manifest, in bytes, MaxFiles the files in it.
	MaxManifest = 32 << 20
	MaxFiles    = 100_000

	maxName = 1024
)

// Manifest says what a sealed folder holds. Its SHA-384 is the asset's digest.
// Everything but Private can be read without the key.
type Manifest struct {
	Version   string       `json:"version"`
	Asset     string       `json:"asset"`
	ChunkSize int          `json:"chunkSize"`
	Files     []SealedFile `json:"files"`
	Private   Private      `json:"private"`
}

// SealedFile is one ciphertext file, ID + ".sealed".
type SealedFile struct {
	ID string `json:"id"`
	// CipherSize is in bytes, header included.
	CipherSize int64 `json:"cipherSize"`
	// Root is over the header block and the sealed chunks, in order.
	Root Root `json:"merkleRoot"`
}

// Private is the encrypted part: AES-256-GCM under a key of its own, with
// everything else in the manifest as associated data.
type Private struct {
	Salt       []byte `json:"salt"`
	Commitment []byte `json:"commitment"`
	Ciphertext []byte `json:"ciphertext"`
}

// Entry is one file as the key's holder sees it.
type Entry struct {
	ID         string
	Name       string
	Size       int64
	CipherSize int64
	// PlainRoot is the Merkle root over the plaintext's chunks. It is empty in a
	// checkpoint, and in what was sealed anew from one.
	PlainRoot Root

	salt []byte
}

type privateEntry struct {
	Name string `json:"name"`
	Size int64  `json:"size"`
	Root Root   `json:"merkleRoot,omitempty"`
	// Salt is the one in the file's header: a file of another place in this
	// asset, or of another asset under the same key, has another.
	Salt []byte `json:"salt"`
}

type privatePart struct {
	Files []privateEntry `json:"files"`
}

func fileID(i int) string { return fmt.Sprintf("%06d", i) }

// SealedName is the file name of an id.
func SealedName(id string) string { return id + ".sealed" }

// checkName allows relative slash-separated names that cannot leave the folder.
func checkName(name string) error {
	if name == "" || len(name) > maxName || !utf8.ValidString(name) || strings.ContainsRune(name, 0) {
		return fmt.Errorf("file name %.80q: want 1 to %d bytes of UTF-8", name, maxName)
	}
	if path.IsAbs(name) || path.Clean(name) != name {
		return fmt.Errorf("file name %.80q: want a clean relative path", name)
	}
	for _, c := range strings.Split(name, "/") {
		if c == "." || c == ".." || len(c) > 255 {
			return fmt.Errorf("file name %.80q leaves its folder", name)
		}
	}
	return nil
}

// checkNames wants names in order, and none that is both a file and a folder.
func checkNames(names []string) error {
	seen := make(map[string]bool, len(names))
	for i, n := range names {
		if err := checkName(n); err != nil {
			return err
		}
		if i > 0 && names[i-1] >= n {
			return fmt.Errorf("file name %.80q is out of order or there twice", n)
		}
		seen[n] = true
	}
	for _, n := range names {
		for d := path.Dir(n); d != "."; d = path.Dir(d) {
			if seen[d] {
				return fmt.Errorf("file name %.80q is a file and a folder", d)
			}
		}
	}
	return nil
}

// ParseManifest checks the form of a manifest without a key and returns its digest.
func ParseManifest(b []byte) (Manifest, plan.Digest, error) {
	var m Manifest
	if err := plan.Decode(b, MaxManifest, &m); err != nil {
		return Manifest{}, "", fmt.Errorf("parse manifest: %w", err)
	}
	if m.Version != Version {
		return Manifest{}, "", fmt.Errorf("parse manifest: version %.40q: want %q", m.Version, Version)
	}
	c, err := plan.Canonical(m)
	if err != nil {
		return Manifest{}, "", fmt.Errorf("parse manifest: %w", err)
	}
	if !bytes.Equal(b, c) {
		return Manifest{}, "", errors.New("parse manifest: not in canonical form (RFC 8785)")
	}
	if m.Asset == "" {
		return Manifest{}, "", errors.New("parse manifest: no asset")
	}
	if err := checkChunkSize(m.ChunkSize); err != nil {
		return Manifest{}, "", fmt.Errorf("parse manifest: %w", err)
	}
	if len(m.Files) == 0 || len(m.Files) > MaxFiles {
		return Manifest{}, "", fmt.Errorf("parse manifest: %d files, want 1 to %d", len(m.Files), MaxFiles)
	}
	if len(m.Private.Salt) != saltSize {
		return Manifest{}, "", errors.New("parse manifest: salt is not 32 bytes")
	}
	for i, f := range m.Files {
		if f.ID != fileID(i) {
			return Manifest{}, "", fmt.Errorf("parse manifest: file %d has id %.20q", i, f.ID)
		}
		if err := checkRoot(f.Root); err != nil {
			return Manifest{}, "", fmt.Errorf("parse manifest: file %s: %w", f.ID, err)
		}
		if _, err := layoutOfSealed(f.CipherSize, m.ChunkSize); err != nil {
			return Manifest{}, "", fmt.Errorf("parse manifest: file %s: %w", f.ID, err)
		}
	}
	return m, plan.Sum(b), nil
}

// publicBytes is everything but the private part, in canonical form.
func (m Manifest) publicBytes() ([]byte, error) {
	return plan.Canonical(struct {
		Version   string       `json:"version"`
		Asset     string       `json:"asset"`
		ChunkSize int          `json:"chunkSize"`
		Files     []SealedFile `json:"files"`
	}{m.Version, m.Asset, m.ChunkSize, m.Files})
}

func (m Manifest) cipher(key *keys.DataKey) (aead cipher.AEAD, commit, public []byte, err error) {
	if public, err = m.publicBytes(); err != nil {
		return nil, nil, nil, err
	}
	k, err := key.Derive(m.Private.Salt, infoManifest, keys.DataKeySize)
	if err != nil {
		return nil, nil, nil, err
	}
	defer clear(k)
	if aead, err = newGCM(k); err != nil {
		return nil, nil, nil, err
	}
	return aead, commitment(k, append(bytes.Clone(m.Private.Salt), public...)), public, nil
}

// sealManifest encrypts p into a manifest and returns its bytes. salt is fresh:
// the key made from it is used once, so the nonce is zero.
func sealManifest(key *keys.DataKey, m Manifest, p privatePart, salt []byte) ([]byte, error) {
	if salt == nil {
		salt = make([]byte, saltSize)
		_, _ = rand.Read(salt)
	}
	m.Version, m.Private = Version, Private{Salt: salt}
	aead, commit, public, err := m.cipher(key)
	if err != nil {
		return nil, err
	}
	plain, err := plan.Canonical(p)
	if err != nil {
		return nil, err
	}
	defer clear(plain)
	m.Private.Commitment = commit
	m.Private.Ciphertext = aead.Seal(nil, make([]byte, aead.NonceSize()), plain, public) // #nosec G407 -- the key is made from a fresh salt and used once
	return plan.Canonical(m)
}

// Open decrypts the private part.
func (m Manifest) Open(key *keys.DataKey) ([]Entry, error) {
	aead, commit, public, err := m.cipher(key)
	if err != nil {
		return nil, fmt.Errorf("open manifest: %w", err)
	}
	if !hmac.Equal(commit, m.Private.Commitment) {
		return nil, fmt.Errorf("open manifest: %w", ErrKey)
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), m.Private.Ciphertext, public)
	if err != nil {
		return nil, fmt.Errorf("open manifest: %w: private part does not authenticate", ErrDamaged)
	}
	defer clear(plain)
	var p privatePart
	if err := plan.Decode(plain, MaxManifest, &p); err != nil {
		return nil, fmt.Errorf("open manifest: private part: %w", err)
	}
	if len(p.Files) != len(m.Files) {
		return nil, fmt.Errorf("open manifest: %d files, but %d names", len(m.Files), len(p.Files))
	}
	names := make([]string, len(p.Files))
	out := make([]Entry, len(p.Files))
	for i, f := range p.Files {
		l, err := layoutOfSealed(m.Files[i].CipherSize, m.ChunkSize)
		if err != nil {
			return nil, fmt.Errorf("open manifest: file %s: %w", m.Files[i].ID, err)
		}
		if l.size != f.Size || len(f.Salt) != saltSize {
			return nil, fmt.Errorf("open manifest: file %s: size or salt contradict its ciphertext", m.Files[i].ID)
		}
		// All files have a digest or none has: one that lacks it is no checkpoint's.
		if err := checkRoot(f.Root); err != nil && (f.Root != "" || p.Files[0].Root != "") {
			return nil, fmt.Errorf("open manifest: file %s: %w", m.Files[i].ID, err)
		}
		if f.Root != "" && p.Files[0].Root == "" {
			return nil, fmt.Errorf("open manifest: file %s has a digest, and the first has none", m.Files[i].ID)
		}
		names[i] = f.Name
		out[i] = Entry{ID: m.Files[i].ID, Name: f.Name, Size: f.Size, CipherSize: m.Files[i].CipherSize, PlainRoot: f.Root, salt: f.Salt}
	}
	if err := checkNames(names); err != nil {
		return nil, fmt.Errorf("open manifest: %w", err)
	}
	return out, nil
}

// Folder is a sealed folder whose manifest was checked against a digest.
type Folder struct {
	root     *os.Root
	manifest Manifest
	digest   plan.Digest
}

// ReadFolder reads the manifest in root, which must be of asset and have the
// given digest. root stays the caller's.
func ReadFolder(root *os.Root, asset string, digest plan.Digest) (*Folder, error) {
	if digest.Bytes() == nil {
		return nil, errors.New("read sealed folder: no digest to hold it against")
	}
	b, err := readRegular(root, ManifestName, MaxManifest)
	if err != nil {
		return nil, fmt.Errorf("read sealed folder: %w", err)
	}
	m, got, err := ParseManifest(b)
	if err != nil {
		return nil, err
	}
	if got != digest {
		return nil, fmt.Errorf("sealed folder is %s, want %s", got, digest)
	}
	if m.Asset != asset {
		return nil, fmt.Errorf("sealed folder is of asset %.80q, want %.80q", m.Asset, asset)
	}
	return &Folder{root: root, manifest: m, digest: got}, nil
}

// Manifest returns what can be read without the key.
func (f *Folder) Manifest() Manifest { return f.manifest }

// Sizes are those of the plaintext files, by their place in the manifest: the
// size of a ciphertext says them.
func (f *Folder) Sizes() ([]int64, error) {
	out := make([]int64, len(f.manifest.Files))
	for i, s := range f.manifest.Files {
		l, err := layoutOfSealed(s.CipherSize, f.manifest.ChunkSize)
		if err != nil {
			return nil, fmt.Errorf("file %s: %w", s.ID, err)
		}
		out[i] = l.size
	}
	return out, nil
}

// Entries decrypts the names.
func (f *Folder) Entries(key *keys.DataKey) ([]Entry, error) { return f.manifest.Open(key) }

// OpenedFile is a File with the descriptor below it.
type OpenedFile struct {
	*File
	f *os.File
}

// Sequential tells the kernel that all of the file will be read in order, so that
// it reads ahead while chunks are decrypted. It is a hint.
func (o *OpenedFile) Sequential() {
	_ = unix.Fadvise(int(o.f.Fd()), 0, 0, unix.FADV_SEQUENTIAL)
}

// Map has chunks decrypted from the page cache, without a copy of their
// ciphertext, where that is safe: while the kernel says that nobody can write to
// the file. Elsewhere, and from then on when somebody comes to, chunks are read
// as without it. It is called before the first read. Writers wait until Close, or
// as long as the kernel lets them be kept waiting (/proc/sys/fs/lease-break-time).
func (o *OpenedFile) Map() { o.mapped = mapFile(int(o.f.Fd()), o.layout.cipherSize()) }

// Yield lets a writer in who waits for a file that is mapped. Reads do so as
// well, each at its end.
func (o *OpenedFile) Yield() { o.mapped.yield() }

// Close closes the descriptor.
func (o *OpenedFile) Close() error {
	o.mapped.close()
	return o.f.Close()
}

// Open opens one file for reading under key.
func (f *Folder) Open(key *keys.DataKey, e Entry) (*OpenedFile, error) {
	fd, size, err := openRegular(f.root, SealedName(e.ID))
	if err != nil {
		return nil, fmt.Errorf("open sealed file %s: %w", e.ID, err)
	}
	if size != e.CipherSize {
		_ = fd.Close()
		return nil, fmt.Errorf("open sealed file %s: %w: %d bytes, the manifest says %d", e.ID, ErrDamaged, size, e.CipherSize)
	}
	s, err := OpenFile(key, fd, size)
	if err != nil {
		_ = fd.Close()
		return nil, fmt.Errorf("open sealed file %s: %w", e.ID, err)
	}
	if s.ChunkSize() != f.manifest.ChunkSize || !slices.Equal(s.header.salt(), e.salt) {
		_ = fd.Close()
		return nil, fmt.Errorf("open sealed file %s: %w: it is another file", e.ID, ErrDamaged)
	}
	return &OpenedFile{File: s, f: fd}, nil
}

// openRegular opens a regular file and no link to one: os.Root follows links
// that stay inside, so what was opened must be what the name itself is.
func openRegular(root *os.Root, name string) (*os.File, int64, error) {
	l, err := root.Lstat(name)
	if err != nil {
		return nil, 0, err
	}
	if !l.Mode().IsRegular() {
		return nil, 0, fmt.Errorf("%s is not a regular file", name)
	}
	// O_NONBLOCK: a fifo put there meanwhile must not block its reader.
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, 0, err
	}
	if !st.Mode().IsRegular() || !os.SameFile(l, st) {
		_ = f.Close()
		return nil, 0, fmt.Errorf("%s is not a regular file", name)
	}
	return f, st.Size(), nil
}

func readRegular(root *os.Root, name string, limit int64) ([]byte, error) {
	f, size, err := openRegular(root, name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > limit {
		return nil, fmt.Errorf("%s is %d bytes long, at most %d are allowed", name, size, limit)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("%s grew beyond %d bytes", name, limit)
	}
	return b, nil
}
