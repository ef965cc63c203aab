package seal

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/coffer-run/coffer/attest/plan"
)

// Check reads all ciphertext in root and holds it against the manifest's Merkle
// roots, and the manifest against digest. It needs no key. It is done when an
// asset is sealed or comes into a node's cache.
func Check(ctx context.Context, root *os.Root, asset string, digest plan.Digest) error {
	f, err := ReadFolder(root, asset, digest)
	if err != nil {
		return err
	}
	return f.Check(ctx)
}

// Check is the function Check, of a folder whose manifest was read. A checkpoint
// that a job goes on from is checked as well: its folder may lie where others write.
func (f *Folder) Check(ctx context.Context) error {
	if err := f.checkListing(); err != nil {
		return err
	}
	for _, s := range f.manifest.Files {
		if err := f.checkFile(ctx, s); err != nil {
			return fmt.Errorf("check sealed file %s: %w", s.ID, err)
		}
	}
	return nil
}

func (f *Folder) checkListing() error {
	known := map[string]bool{ManifestName: true, RecordName: true, AnchorName: true, anchorTmp: true}
	for _, s := range f.manifest.Files {
		known[SealedName(s.ID)] = true
	}
	return fs.WalkDir(f.root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || name == "." {
			return err
		}
		if !known[name] || !d.Type().IsRegular() {
			return fmt.Errorf("sealed folder holds %.80q, which its manifest does not name", strings.ToValidUTF8(name, "?"))
		}
		return nil
	})
}

func (f *Folder) checkFile(ctx context.Context, s SealedFile) error {
	r, size, err := openRegular(f.root, SealedName(s.ID))
	if err != nil {
		return err
	}
	defer r.Close()
	if size != s.CipherSize {
		return fmt.Errorf("%w: %d bytes, the manifest says %d", ErrDamaged, size, s.CipherSize)
	}
	l, err := layoutOfSealed(size, f.manifest.ChunkSize)
	if err != nil {
		return err
	}
	leaves := make([]leaf, 1+l.chunks)
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range checkers(l) {
		g.Go(func() error {
			h := newLeafHasher()
			buf := make([]byte, max(PayloadOffset, l.maxChunk()))
			for i := next.Add(1) - 1; i < int64(len(leaves)); i = next.Add(1) - 1 {
				if err := ctx.Err(); err != nil {
					return err
				}
				c, off := buf[:PayloadOffset], int64(0)
				if i > 0 {
					c, off = buf[:l.plainLen(i-1)+TagSize], l.offset(i-1)
				}
				if n, err := r.ReadAt(c, off); n < len(c) {
					return fmt.Errorf("read from byte %d on: %w", off, cmp.Or(err, io.ErrUnexpectedEOF))
				}
				h.sum(c, &leaves[i])
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if n, err := r.ReadAt(make([]byte, 1), size); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it grew while it was read", ErrDamaged)
	}
	if got := merkleRoot(leaves); got != s.Root {
		return fmt.Errorf("%w: merkle root is %s, the manifest says %s", ErrDamaged, got, s.Root)
	}
	return nil
}

// maxCheckBuffers bounds the ciphertext that Check has in memory, in bytes.
const maxCheckBuffers = 32 << 20

// checkers is how many goroutines check one file.
func checkers(l layout) int {
	return max(1, min(runtime.GOMAXPROCS(0), maxCheckBuffers/l.maxChunk(), int(min(l.chunks, 1<<20))))
}
