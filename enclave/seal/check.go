package seal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

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
	h := newLeafHasher()
	buf := make([]byte, max(PayloadOffset, l.maxChunk()))
	if _, err := io.ReadFull(r, buf[:PayloadOffset]); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	h.sum(buf[:PayloadOffset], &leaves[0])
	for i := range l.chunks {
		if err := ctx.Err(); err != nil {
			return err
		}
		c := buf[:l.plainLen(i)+TagSize]
		if _, err := io.ReadFull(r, c); err != nil {
			return fmt.Errorf("read chunk %d: %w", i, err)
		}
		h.sum(c, &leaves[1+i])
	}
	if n, err := r.Read(buf[:1]); n != 0 || !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: it grew while it was read", ErrDamaged)
	}
	if got := merkleRoot(leaves); got != s.Root {
		return fmt.Errorf("%w: merkle root is %s, the manifest says %s", ErrDamaged, got, s.Root)
	}
	return nil
}
