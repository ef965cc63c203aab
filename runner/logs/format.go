// Package logs keeps what jobs print: sealed, in segments, bounded, readable from
// any offset while the job runs and after it. docs/formats/logs.md is the format.
//
// Trusted: the key of this boot, or whoever has the private half of the key that a
// job file names. Checked: that each block is the one that was written there, that
// segments follow each other and that a log has its end; one that was cut says so.
// Not checked: what a job says in its lines. Not kept secret: how much a job
// prints, and when.
package logs

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/hpke"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// Version is the only version of the format.
	Version = "coffer.run/log/v1"
	// MaxData bounds the bytes of one entry.
	MaxData = 64 << 10
	// MaxHeader bounds a segment's first line, in bytes.
	MaxHeader = 4 << 10

	label     = "coffer/v1 log"
	blockHead = 1 + 8 + 8 // kind, offset, time
	maxBlock  = blockHead + MaxData + 16
)

// Kinds of blocks. The last two end a segment.
const (
	kindStdout byte = 1
	kindStderr byte = 2
	kindMore   byte = 3 // another segment follows
	kindEnd    byte = 4 // the log ends
)

// Streams of a job.
const (
	Stdout = "stdout"
	Stderr = "stderr"
)

// Entry is one piece of a stream.
type Entry struct {
	Stream string
	// Offset is where Data begins in its stream, in bytes.
	Offset int64
	// At is when the agent read it.
	At   time.Time
	Data []byte
}

// header is a segment's first line. Sender and Key are there if the segment's
// secret is sealed to a public key; otherwise it comes from the key of this boot.
type header struct {
	Version string `json:"version"`
	Job     string `json:"job"`
	Segment int    `json:"segment"`
	Salt    []byte `json:"salt"`
	KEM     string `json:"kem,omitempty"`
	Sender  []byte `json:"sender,omitempty"`
	Key     []byte `json:"key,omitempty"`
}

// PublicKey is a key to which logs are sealed.
type PublicKey struct {
	kem string
	key hpke.PublicKey
}

// PrivateKey opens logs that are sealed to its public key.
type PrivateKey struct {
	_   [0]func()
	kem string
	key hpke.PrivateKey
}

func kemOf(name string) (hpke.KEM, error) {
	switch name {
	case "x25519":
		return hpke.DHKEM(ecdh.X25519()), nil
	case "mlkem768x25519":
		return hpke.MLKEM768X25519(), nil
	}
	return nil, fmt.Errorf("log key: kind %.40q: want x25519 or mlkem768x25519", name)
}

// ParsePublicKey reads KIND:BASE64, as a job file has it. KIND is x25519 or
// mlkem768x25519.
func ParsePublicKey(s string) (*PublicKey, error) {
	name, body, _ := strings.Cut(s, ":")
	kem, err := kemOf(name)
	if err != nil {
		return nil, err
	}
	b, err := base64.StdEncoding.Strict().DecodeString(body)
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	k, err := kem.NewPublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	return &PublicKey{name, k}, nil
}

// GenerateKey returns a new key for logs.
func GenerateKey(kind string) (*PrivateKey, error) {
	kem, err := kemOf(kind)
	if err != nil {
		return nil, err
	}
	k, err := kem.GenerateKey()
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	return &PrivateKey{kem: kind, key: k}, nil
}

// Public returns the key that a job file names.
func (k *PrivateKey) Public() string {
	return k.kem + ":" + base64.StdEncoding.EncodeToString(k.key.PublicKey().Bytes())
}

// privatePrefix tells a private key from a public one.
const privatePrefix = "coffer-log-private-key:"

// Encode returns the private key as a line of text: a secret.
func (k *PrivateKey) Encode() ([]byte, error) {
	b, err := k.key.Bytes()
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	return fmt.Appendf(nil, "%s%s:%s\n", privatePrefix, k.kem, base64.StdEncoding.EncodeToString(b)), nil
}

// ParsePrivateKey reads what Encode wrote.
func ParsePrivateKey(text []byte) (*PrivateKey, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(string(text)), privatePrefix)
	name, body, _ := strings.Cut(rest, ":")
	if !ok {
		return nil, errors.New("log key: this is no private key for logs")
	}
	kem, err := kemOf(name)
	if err != nil {
		return nil, err
	}
	b, err := base64.StdEncoding.Strict().DecodeString(body)
	if err != nil {
		return nil, errors.New("log key: the private key is not well formed")
	}
	k, err := kem.NewPrivateKey(b)
	if err != nil {
		return nil, errors.New("log key: the private key is not well formed")
	}
	return &PrivateKey{kem: name, key: k}, nil
}

// secrets finds the secret of a segment.
type secrets interface {
	secret(h header) ([]byte, error)
}

// secret implements secrets.
func (k *PrivateKey) secret(h header) ([]byte, error) {
	if h.KEM != k.kem {
		return nil, fmt.Errorf("the log is sealed to a key of kind %.40q, and this is one of kind %s", h.KEM, k.kem)
	}
	r, err := hpke.NewRecipient(h.Sender, k.key, hpke.HKDFSHA256(), hpke.AES256GCM(), h.info())
	if err != nil {
		return nil, errors.New("the log is sealed to another key")
	}
	s, err := r.Open(nil, h.Key)
	if err != nil || len(s) != 32 {
		return nil, errors.New("the log is sealed to another key")
	}
	return s, nil
}

// info binds a sealed secret to its place.
func (h header) info() []byte { return fmt.Appendf(nil, "%s\x00%s\x00%d", label, h.Job, h.Segment) }

// seal makes a secret for the segment and seals it to to.
func (h *header) seal(to *PublicKey) ([]byte, error) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // it never fails
	enc, s, err := hpke.NewSender(to.key, hpke.HKDFSHA256(), hpke.AES256GCM(), h.info())
	if err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	if h.Key, err = s.Seal(nil, secret); err != nil {
		return nil, fmt.Errorf("log key: %w", err)
	}
	h.KEM, h.Sender = to.kem, enc
	return secret, nil
}

// segmentCipher is the segment's cipher, which also needs the digest of its first line.
type segmentCipher struct {
	aead cipher.AEAD
	head [sha256.Size]byte
}

func newCipher(secret, line []byte, h header) (*segmentCipher, error) {
	key, err := hkdf.Key(sha256.New, secret, h.Salt, label, 32)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, err
	}
	return &segmentCipher{aead: aead, head: sha256.Sum256(line)}, nil
}

// nonce counts the blocks. A salt serves one segment, which is written once from
// its beginning, so that no nonce comes twice under a key.
func nonce(block uint64) []byte {
	return binary.BigEndian.AppendUint64(make([]byte, 4, 12), block)
}

// seal appends one block with its length.
func (c *segmentCipher) seal(dst []byte, block uint64, kind byte, e Entry) []byte {
	body := make([]byte, 0, blockHead+len(e.Data))
	body = append(body, kind)
	body = binary.BigEndian.AppendUint64(body, uint64(e.Offset))        //nolint:gosec // offsets are not negative
	body = binary.BigEndian.AppendUint64(body, uint64(e.At.UnixNano())) //nolint:gosec // after 1970
	body = append(body, e.Data...)
	dst = binary.BigEndian.AppendUint32(dst, uint32(len(body)+c.aead.Overhead())) //nolint:gosec // at most maxBlock
	return c.aead.Seal(dst, nonce(block), body, c.head[:])
}

// ErrCut says that a segment has no end: its writer was killed, the disk was full, or
// somebody cut it.
var ErrCut = errors.New("the log is cut: part of it is missing")

// open reads one block. io.EOF says that the segment stops there without an end.
func (c *segmentCipher) open(r io.Reader, block uint64) (kind byte, e Entry, size int64, err error) {
	var n [4]byte
	if _, err := io.ReadFull(r, n[:]); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		return 0, Entry{}, 0, err
	}
	length := binary.BigEndian.Uint32(n[:])
	if length < blockHead+16 || length > maxBlock {
		return 0, Entry{}, 0, fmt.Errorf("log block %d has %d bytes", block, length)
	}
	b := make([]byte, length)
	if _, err := io.ReadFull(r, b); err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) {
			err = io.EOF
		}
		return 0, Entry{}, 0, err
	}
	body, err := c.aead.Open(b[:0], nonce(block), b, c.head[:])
	if err != nil {
		return 0, Entry{}, 0, fmt.Errorf("log block %d is not the one that was written", block)
	}
	kind = body[0]
	e = Entry{Offset: int64(binary.BigEndian.Uint64(body[1:9])), At: time.Unix(0, int64(binary.BigEndian.Uint64(body[9:17]))), Data: body[blockHead:]} //nolint:gosec // as written
	switch kind {
	case kindStdout:
		e.Stream = Stdout
	case kindStderr:
		e.Stream = Stderr
	case kindMore, kindEnd:
	default:
		return 0, Entry{}, 0, fmt.Errorf("log block %d is of unknown kind %d", block, kind)
	}
	return kind, e, 4 + int64(length), nil
}

// readHeader reads a segment's first line.
func readHeader(b []byte) (line []byte, h header, err error) {
	i := bytes.IndexByte(b[:min(len(b), MaxHeader)], '\n')
	if i < 0 {
		return nil, header{}, ErrCut
	}
	line = b[:i+1]
	if err := plan.Decode(line, MaxHeader, &h); err != nil {
		return nil, header{}, fmt.Errorf("log segment: %w", err)
	}
	if h.Version != Version || len(h.Salt) != 32 || h.Segment < 0 {
		return nil, header{}, fmt.Errorf("log segment: version %.40q", h.Version)
	}
	return line, h, nil
}

// OpenSealed reads the segments of a job's log, in order, as the agent hands them
// out where it cannot open them. It calls f with each entry. ErrCut comes after
// everything that could be read.
func OpenSealed(job string, key *PrivateKey, segments [][]byte, f func(Entry) error) error {
	c := chain{job: job, from: key}
	for _, b := range segments {
		if err := c.read(b, f); err != nil {
			return err
		}
	}
	return c.end()
}

// chain reads segments that follow each other.
type chain struct {
	job  string
	from secrets
	next int
	any  bool
	last byte // the kind with which the segment before ended, 0 if it was cut
	cut  bool
}

func (c *chain) read(b []byte, f func(Entry) error) error {
	line, h, err := readHeader(b)
	if err != nil {
		return err
	}
	if h.Job != c.job || c.any && (h.Segment != c.next || c.last == kindEnd) {
		return fmt.Errorf("log segment %d of job %.40q is not the one that follows", h.Segment, h.Job)
	}
	c.cut = c.cut || c.any && c.last == 0
	c.any, c.next, c.last = true, h.Segment+1, 0
	secret, err := c.from.secret(h)
	if err != nil {
		return err
	}
	cipher, err := newCipher(secret, line, h)
	if err != nil {
		return err
	}
	r := bytes.NewReader(b[len(line):])
	for block := uint64(0); ; block++ {
		kind, e, _, err := cipher.open(r, block)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("segment %d: %w", h.Segment, err)
		}
		if kind == kindMore || kind == kindEnd {
			c.last = kind
			if r.Len() > 0 {
				return fmt.Errorf("segment %d goes on after its end", h.Segment)
			}
			return nil
		}
		if err := f(e); err != nil {
			return err
		}
	}
}

func (c *chain) end() error {
	if c.cut || c.last != kindEnd {
		return ErrCut
	}
	return nil
}
