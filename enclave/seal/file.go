package seal

import (
	"crypto/cipher"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/coffer-run/coffer/enclave/keys"
)

// File is one sealed file, opened. It may be read by many goroutines at once.
type File struct {
	r      io.ReaderAt
	aead   cipher.AEAD
	header header
	layout layout
	pool   sync.Pool
	// mapped is where the file can be read without a copy; nil if it cannot.
	mapped *mapping
}

// OpenFile reads the header of a sealed file of cipherSize bytes.
func OpenFile(key *keys.DataKey, r io.ReaderAt, cipherSize int64) (*File, error) {
	b := make([]byte, PayloadOffset)
	if cipherSize < PayloadOffset {
		return nil, fmt.Errorf("%w: %d bytes cannot be a sealed file", ErrDamaged, cipherSize)
	}
	if _, err := r.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	h, aead, err := parseHeader(key, b)
	if err != nil {
		return nil, err
	}
	l, err := layoutOfSealed(cipherSize, h.chunkSize())
	if err != nil {
		return nil, err
	}
	f := &File{r: r, aead: aead, header: h, layout: l}
	f.pool.New = func() any { return f.Worker() }
	return f, nil
}

// Size is the number of plaintext bytes.
func (f *File) Size() int64 { return f.layout.size }

// ChunkSize is the number of plaintext bytes in every chunk but the last.
func (f *File) ChunkSize() int { return f.layout.chunkSize }

// Chunks is the number of chunks; an empty file has one.
func (f *File) Chunks() int64 { return f.layout.chunks }

// Worker reads chunks with buffers of its own: one goroutine owns it, and no
// chunk allocates.
type Worker struct {
	f *File
	// buf is for ciphertext that is not read in place.
	buf   []byte
	nonce [12]byte
}

// Worker returns a new worker on f.
func (f *File) Worker() *Worker {
	return &Worker{f: f}
}

// ReadChunk decrypts chunk i into dst, which must be exactly as long as the
// chunk. On an error dst holds no plaintext.
func (w *Worker) ReadChunk(i int64, dst []byte) error {
	f := w.f
	if i < 0 || i >= f.layout.chunks {
		return fmt.Errorf("chunk %d: file has %d", i, f.layout.chunks)
	}
	n := f.layout.plainLen(i)
	if len(dst) != n {
		return fmt.Errorf("chunk %d is %d bytes long, not %d", i, n, len(dst))
	}
	setNonce(&w.nonce, i, i == f.layout.chunks-1)
	if f.mapped != nil {
		var opened error
		if f.mapped.use(f.layout.offset(i), n+TagSize, func(c []byte) { opened = w.open(i, dst, c) }) {
			return opened
		}
		clear(dst)
	}
	if w.buf == nil {
		w.buf = make([]byte, f.layout.maxChunk())
	}
	c := w.buf[:n+TagSize]
	if m, err := f.r.ReadAt(c, f.layout.offset(i)); m < len(c) {
		clear(dst)
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("%w: read chunk %d: %w", ErrDamaged, i, err)
	}
	return w.open(i, dst, c)
}

// open decrypts the sealed chunk c, whose nonce is set.
func (w *Worker) open(i int64, dst, c []byte) error {
	if _, err := w.f.aead.Open(dst[:0:len(dst)], w.nonce[:], c, w.f.header[:]); err != nil {
		clear(dst)
		return fmt.Errorf("%w: chunk %d does not authenticate", ErrDamaged, i)
	}
	return nil
}

// ReadChunk decrypts chunk i into dst.
func (f *File) ReadChunk(i int64, dst []byte) error {
	w := f.pool.Get().(*Worker)
	defer f.pool.Put(w)
	return w.ReadChunk(i, dst)
}

// ReadAt implements io.ReaderAt over the plaintext. Whole chunks are decrypted
// in place; the ends go through a buffer.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read sealed file: negative offset")
	}
	if off >= f.layout.size {
		// The end of a file is believed only where it authenticates.
		if err := f.checkEnd(); err != nil {
			return 0, err
		}
		return 0, io.EOF
	}
	w := f.pool.Get().(*Worker)
	defer f.pool.Put(w)
	var scratch []byte
	defer func() { clear(scratch) }()
	done := 0
	for done < len(p) && off < f.layout.size {
		i := off / int64(f.layout.chunkSize)
		in := int(off - i*int64(f.layout.chunkSize))
		n := f.layout.plainLen(i)
		if in == 0 && len(p)-done >= n {
			if err := w.ReadChunk(i, p[done:done+n]); err != nil {
				return done, err
			}
			done, off = done+n, off+int64(n)
			continue
		}
		if scratch == nil {
			scratch = make([]byte, f.layout.chunkSize)
		}
		if err := w.ReadChunk(i, scratch[:n]); err != nil {
			return done, err
		}
		m := copy(p[done:], scratch[in:n])
		done, off = done+m, off+int64(m)
	}
	if done < len(p) {
		return done, io.EOF
	}
	return done, nil
}

func (f *File) checkEnd() error {
	last := f.layout.chunks - 1
	b := make([]byte, f.layout.plainLen(last))
	defer clear(b)
	return f.ReadChunk(last, b)
}

// WriteTo decrypts the whole file in order.
func (f *File) WriteTo(w io.Writer) (int64, error) {
	b := make([]byte, min(int64(f.layout.chunkSize), f.layout.size))
	defer clear(b)
	wk := f.Worker()
	var done int64
	for i := range f.layout.chunks {
		n := f.layout.plainLen(i)
		if err := wk.ReadChunk(i, b[:n]); err != nil {
			return done, err
		}
		m, err := w.Write(b[:n])
		done += int64(m)
		if err != nil {
			return done, fmt.Errorf("write plaintext: %w", err)
		}
	}
	return done, nil
}
