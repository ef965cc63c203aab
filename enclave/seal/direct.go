package seal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// directMin is from what sealed size on a checkpoint's file is written past the
	// page cache. A smaller one waits for the disk, not for the processor.
	directMin = 8 << 20
	// directAlign is what the places and lengths of such writes are multiples of.
	directAlign = 4096
	// directBuffer is what one such write has, or one chunk if that is larger.
	directBuffer = 4 << 20
	// directSpan is what a worker seals in order. Spans meet within a block of
	// directAlign, and these blocks are written at the end.
	directSpan = 32 << 20
	// maxDirectMemory bounds the buffers of all workers together: a machine has many
	// cores, and its disk keeps fewer of them busy.
	maxDirectMemory = 64 << 20
	// maxSpans bounds how many spans a large file has.
	maxSpans = 1024
)

// output is where one worker puts the sealed chunks of a span.
type output interface {
	// begin is called with the place of a span's first chunk, end after its last.
	begin(off int64)
	end() error
	// next returns room for a sealed chunk of n bytes, and add says that it is there.
	next(n int) ([]byte, error)
	add(n int) error
	// close leaves nothing in memory. It is called once, also after an error.
	close() error
}

// buffered writes through the page cache.
type buffered struct {
	dst *os.File
	buf []byte
	off int64
}

func (b *buffered) begin(off int64)            { b.off = off }
func (b *buffered) end() error                 { return nil }
func (b *buffered) next(n int) ([]byte, error) { return b.buf[:n], nil }

func (b *buffered) add(n int) error {
	if _, err := b.dst.WriteAt(b.buf[:n], b.off); err != nil {
		return fmt.Errorf("write sealed file: %w", err)
	}
	// A hint: the disk is busy with this chunk while the next is sealed, and the
	// sync at the end finds little left to do.
	_ = unix.SyncFileRange(int(b.dst.Fd()), b.off, int64(n), unix.SYNC_FILE_RANGE_WRITE)
	b.off += int64(n)
	return nil
}

func (b *buffered) close() error {
	clear(b.buf)
	return nil
}

// direct is a file that is written past the page cache (open(2), O_DIRECT): the
// disk takes the chunks from where they were sealed, and the processor neither
// copies them nor finds pages for them.
type direct struct {
	// f is dst opened again; nil if the file system has no such writes.
	f, dst *os.File
	// buffer is the size of a worker's two buffers.
	buffer int

	mu sync.Mutex
	// edges are written through the page cache once all else was: a block that two
	// spans share is not either one's to write.
	edges []edge
}

type edge struct {
	off int64
	b   []byte
}

// runDirect is run for the new file dst, name under root.
func (j *sealJob) runDirect(ctx context.Context, workers int, root *os.Root, name string, dst *os.File) (err error) {
	d, err := openDirect(root, name, dst, j.layout)
	if err != nil {
		return err
	}
	defer func() {
		if d.f != nil {
			err = errors.Join(err, d.f.Close())
		}
	}()
	j.output = d.stream
	workers = d.workers(workers)
	size := j.layout.cipherSize()
	j.span = max(1, min(max(directSpan, size/maxSpans), size/int64(4*workers))/int64(j.layout.chunkSize))
	if err := j.run(ctx, workers); err != nil {
		return err
	}
	return d.finish()
}

// bufferFor is the size of a buffer: a chunk may begin anywhere in its first block.
func bufferFor(l layout) int {
	return (max(directBuffer, l.maxChunk()+directAlign) + directAlign - 1) &^ (directAlign - 1)
}

// workers is how many of n workers have room for their buffers.
func (d *direct) workers(n int) int { return max(1, min(n, maxDirectMemory/(2*d.buffer))) }

func openDirect(root *os.Root, name string, dst *os.File, l layout) (*direct, error) {
	d := &direct{dst: dst, buffer: bufferFor(l)}
	// With its blocks there, several writes to the file can be under way. Where a file
	// system cannot promise them, they come as they are written.
	if err := unix.Fallocate(int(dst.Fd()), 0, 0, l.cipherSize()); errors.Is(err, unix.ENOSPC) {
		return nil, fmt.Errorf("make room for sealed file: %w", err)
	}
	f, err := root.OpenFile(name, os.O_WRONLY|unix.O_DIRECT, 0)
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("open sealed file: %w", err)
	}
	if err == nil {
		d.f = f
	}
	return d, nil
}

// write writes b, which is aligned as off is.
func (d *direct) write(b []byte, off int64) error {
	if d.f != nil {
		_, err := d.f.WriteAt(b, off)
		if err == nil {
			return nil
		}
		// The file system wants more alignment than this, or wrote a part.
		if !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("write sealed file: %w", err)
		}
	}
	if _, err := d.dst.WriteAt(b, off); err != nil {
		return fmt.Errorf("write sealed file: %w", err)
	}
	return nil
}

func (d *direct) keep(off int64, b []byte) {
	if len(b) == 0 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.edges = append(d.edges, edge{off, append([]byte(nil), b...)})
}

// finish writes what is left when all workers are done.
func (d *direct) finish() error {
	for _, e := range d.edges {
		if _, err := d.dst.WriteAt(e.b, e.off); err != nil {
			return fmt.Errorf("write sealed file: %w", err)
		}
	}
	return nil
}

// stream is one worker's output to a direct file: one buffer is filled while the
// other is on its way to the disk.
type stream struct {
	d *direct
	// mem has both buffers, one after the other; use is which one is filled.
	mem []byte
	use int
	// at is the place in the file of the buffer's first byte, aligned. Bytes from
	// head to n of the buffer are sealed.
	at      int64
	head, n int
	// aio writes the one while the other is filled; nil where the kernel does not.
	aio *aio
}

func (d *direct) stream() (output, error) {
	mem, err := unix.Mmap(-1, 0, 2*d.buffer, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map buffers for sealing: %w", err)
	}
	// A hint: the kernel pins a buffer for each of its writes, and the disk takes it in
	// pieces, page by page.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	s := &stream{d: d, mem: mem}
	if d.f != nil {
		// Without it a worker waits for each of its writes.
		s.aio, _ = openAIO()
	}
	return s, nil
}

func (s *stream) buf() []byte { return s.mem[s.use*s.d.buffer:][:s.d.buffer] }

func (s *stream) begin(off int64) {
	s.at = off &^ (directAlign - 1)
	s.head = int(off - s.at)
	s.n = s.head
}

func (s *stream) next(n int) ([]byte, error) {
	if s.n+n > s.d.buffer {
		if err := s.flush(); err != nil {
			return nil, err
		}
	}
	return s.buf()[s.n:][:n:n], nil
}

func (s *stream) add(n int) error {
	s.n += n
	return nil
}

// flush begins to write the whole blocks of the buffer, and goes on in the other
// one with what is left.
func (s *stream) flush() error {
	b := s.buf()
	whole := s.n &^ (directAlign - 1)
	first := (s.head + directAlign - 1) &^ (directAlign - 1)
	s.d.keep(s.at+int64(s.head), b[s.head:min(first, s.n)])
	if err := s.wait(); err != nil {
		return err
	}
	if first >= s.n {
		s.head = s.n
		return nil
	}
	if first < whole {
		if err := s.write(b[first:whole], s.at+int64(first)); err != nil {
			return err
		}
	}
	s.use = 1 - s.use
	rest := copy(s.buf(), b[whole:s.n])
	s.at, s.head, s.n = s.at+int64(whole), 0, rest
	return nil
}

func (s *stream) end() error {
	if err := s.flush(); err != nil {
		return err
	}
	s.d.keep(s.at+int64(s.head), s.buf()[s.head:s.n])
	return nil
}

// write writes b, which stays as it is until wait, or begins to.
func (s *stream) write(b []byte, off int64) error {
	if s.aio != nil && s.aio.begin(s.d.f, b, off) == nil {
		return nil
	}
	return s.d.write(b, off)
}

// wait returns when no write is under way.
func (s *stream) wait() error {
	if s.aio == nil {
		return nil
	}
	rest, off, err := s.aio.wait()
	if err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("write sealed file: %w", err)
	}
	if len(rest) == 0 {
		return nil
	}
	return s.d.write(rest, off)
}

func (s *stream) close() error {
	err := s.wait()
	if s.aio != nil {
		err = errors.Join(err, s.aio.close())
	}
	clear(s.mem)
	if uerr := unix.Munmap(s.mem); uerr != nil {
		err = errors.Join(err, fmt.Errorf("unmap buffers for sealing: %w", uerr))
	}
	return err
}
