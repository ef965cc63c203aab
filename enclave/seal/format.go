// Package seal reads and writes the sealed format: assets and checkpoints as
// folders of ciphertext under one data key (docs/formats/sealed.md).
//
// Trusted: the data key. Checked: every byte of a header and a chunk, their
// order, number and place, by AES-256-GCM under a key of the file's own; the
// manifest, by its digest and under a key of its own; ciphertext against the
// manifest's Merkle roots, by Check. Not checked: Merkle roots on opening, which
// relies on the tags; a holder of the key can make two files with the same tags,
// so a digest names a file and tags do not.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/coffer-run/coffer/enclave/keys"
)

const (
	// Magic is the first 16 bytes of a sealed file.
	Magic = "coffer sealed v1"
	// PayloadOffset is where the first chunk begins: aligned for direct I/O.
	PayloadOffset = 4096
	// TagSize is what a chunk grows by when sealed.
	TagSize = 16

	// DefaultChunkSize, MinChunkSize and MaxChunkSize are in bytes of plaintext.
	// A chunk size is a power of two.
	DefaultChunkSize = 1 << 20
	MinChunkSize     = 64 << 10
	MaxChunkSize     = 16 << 20

	headerSize   = 96
	saltAt       = 32
	saltSize     = 32
	commitmentAt = saltAt + saltSize

	infoFile        = "coffer sealed v1 file\x00"
	infoManifest    = "coffer sealed v1 manifest\x00"
	labelCommitment = "coffer sealed v1 commitment\x00"
)

var (
	// ErrKey means that a header or manifest does not commit to this key: the
	// key is another one, or the bytes were changed.
	ErrKey = errors.New("not sealed under this key, or changed")
	// ErrDamaged means that ciphertext is not what was sealed: changed, cut,
	// extended, moved, or another file's.
	ErrDamaged = errors.New("sealed data is damaged")
)

type header [headerSize]byte

func (h *header) chunkSize() int { return int(binary.BigEndian.Uint32(h[16:20])) }

// salt identifies the file: it is random and made once, at sealing.
func (h *header) salt() []byte { return h[saltAt:commitmentAt] }

func checkChunkSize(n int) error {
	if n < MinChunkSize || n > MaxChunkSize || n&(n-1) != 0 {
		return fmt.Errorf("chunk size %d: want a power of two from %d to %d", n, MinChunkSize, MaxChunkSize)
	}
	return nil
}

func newHeader(key *keys.DataKey, chunkSize int) (header, cipher.AEAD, error) {
	var salt [saltSize]byte
	// crypto/rand.Read never returns an error: it ends the process instead.
	_, _ = rand.Read(salt[:])
	return headerWithSalt(key, chunkSize, salt)
}

func headerWithSalt(key *keys.DataKey, chunkSize int, salt [saltSize]byte) (header, cipher.AEAD, error) {
	if err := checkChunkSize(chunkSize); err != nil {
		return header{}, nil, err
	}
	var h header
	copy(h[:], Magic)
	binary.BigEndian.PutUint32(h[16:20], uint32(chunkSize))
	copy(h[saltAt:], salt[:])
	k, aead, err := fileKey(key, &h)
	if err != nil {
		return header{}, nil, err
	}
	defer clear(k)
	copy(h[commitmentAt:], commitment(k, h[:commitmentAt]))
	return h, aead, nil
}

// parseHeader checks the first PayloadOffset bytes of a sealed file and returns
// the file's cipher.
func parseHeader(key *keys.DataKey, b []byte) (header, cipher.AEAD, error) {
	var h header
	if len(b) != PayloadOffset || string(b[:len(Magic)]) != Magic {
		return header{}, nil, errors.New("not a sealed file of version 1")
	}
	copy(h[:], b)
	if err := checkChunkSize(h.chunkSize()); err != nil {
		return header{}, nil, err
	}
	for _, c := range b[20:saltAt] {
		if c != 0 {
			return header{}, nil, fmt.Errorf("%w: reserved bytes are set", ErrDamaged)
		}
	}
	for _, c := range b[headerSize:] {
		if c != 0 {
			return header{}, nil, fmt.Errorf("%w: padding is not zero", ErrDamaged)
		}
	}
	k, aead, err := fileKey(key, &h)
	if err != nil {
		return header{}, nil, err
	}
	defer clear(k)
	if !hmac.Equal(h[commitmentAt:], commitment(k, h[:commitmentAt])) {
		return header{}, nil, ErrKey
	}
	return h, aead, nil
}

func fileKey(key *keys.DataKey, h *header) ([]byte, cipher.AEAD, error) {
	k, err := key.Derive(h.salt(), infoFile+string(h[:saltAt]), keys.DataKeySize)
	if err != nil {
		return nil, nil, err
	}
	aead, err := newGCM(k)
	if err != nil {
		clear(k)
		return nil, nil, err
	}
	return k, aead, nil
}

func newGCM(k []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("make cipher: %w", err)
	}
	return aead, nil
}

// commitment binds bytes to one key. GCM alone does not: one ciphertext can be
// made to open under two keys.
func commitment(k, b []byte) []byte {
	m := hmac.New(sha256.New, k)
	m.Write([]byte(labelCommitment))
	m.Write(b)
	return m.Sum(nil)
}

// setNonce writes the nonce of chunk i: three zero bytes, the number, and the
// mark of the last chunk. The mark makes a cut or extended file fail at its end
// as a moved chunk fails at its place.
func setNonce(n *[12]byte, i int64, last bool) {
	*n = [12]byte{}
	binary.BigEndian.PutUint64(n[3:11], uint64(i))
	if last {
		n[11] = 1
	}
}

// layout is where the chunks of a file lie.
type layout struct {
	chunkSize int
	chunks    int64
	// size is that of the plaintext.
	size int64
}

// maxPlain bounds a file so that no offset overflows: 2^50 bytes.
const maxPlain = 1 << 50

func layoutOf(size int64, chunkSize int) (layout, error) {
	if size < 0 || size > maxPlain {
		return layout{}, fmt.Errorf("file of %d bytes: at most %d can be sealed", size, int64(maxPlain))
	}
	// An empty file is one empty chunk; a file that is an exact multiple of the
	// chunk size ends with a full one.
	n := max((size+int64(chunkSize)-1)/int64(chunkSize), 1)
	return layout{chunkSize: chunkSize, chunks: n, size: size}, nil
}

func layoutOfSealed(cipherSize int64, chunkSize int) (layout, error) {
	payload := cipherSize - PayloadOffset
	stride := int64(chunkSize + TagSize)
	if payload < TagSize || payload > maxPlain {
		return layout{}, fmt.Errorf("%w: %d bytes cannot be a sealed file", ErrDamaged, cipherSize)
	}
	n := (payload + stride - 1) / stride
	last := payload - (n-1)*stride
	if last < TagSize || (n > 1 && last == TagSize) {
		return layout{}, fmt.Errorf("%w: %d bytes cannot be a sealed file", ErrDamaged, cipherSize)
	}
	return layout{chunkSize: chunkSize, chunks: n, size: payload - n*TagSize}, nil
}

func (l layout) cipherSize() int64 { return PayloadOffset + l.size + l.chunks*TagSize }

func (l layout) plainLen(i int64) int {
	if i == l.chunks-1 {
		return int(l.size - i*int64(l.chunkSize))
	}
	return l.chunkSize
}

// maxChunk is the longest sealed chunk there is: small files need small buffers.
func (l layout) maxChunk() int { return int(min(int64(l.chunkSize), l.size)) + TagSize }

func (l layout) offset(i int64) int64 { return PayloadOffset + i*int64(l.chunkSize+TagSize) }
