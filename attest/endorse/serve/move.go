package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/anchor"
	"github.com/coffer-run/coffer/attest/endorse"
)

// maxImport bounds the files of one import.
const maxImport = 1 << 16

// Imported is what came of an import.
type Imported struct {
	// Added and Known are items that are in the folder now; Known were before.
	Added, Known []endorse.Item
	// Refused are files that nothing was taken from, or not all, and why.
	Refused []endorse.Problem
}

// Import takes every endorsement in src, its subfolders included, into the
// folder. A file with anything else in it, or with an item that does not verify
// under the anchors, is refused. A GPU's certificate chain is no endorsement, and
// nothing of it is kept; answers about certificates are verified by it.
func Import(ctx context.Context, to *Folder, src string, anchors anchor.Set, now time.Time) (Imported, error) {
	var out Imported
	type candidate struct {
		endorse.Item
		file string
	}
	var found []candidate
	root, err := os.OpenRoot(src)
	if err != nil {
		return out, fmt.Errorf("import endorsements: %w", err)
	}
	defer func() { _ = root.Close() }()
	issuers := endorse.NewIssuers(anchors)
	for _, h := range to.lib.All() {
		if h.Key.Kind == endorse.RIM {
			// One that does not verify is none to verify others by.
			_ = issuers.AddManifest(h.Bytes)
		}
	}
	files := 0
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if d.IsDir() || strings.HasPrefix(d.Name(), ".") {
			return nil
		}
		if files++; files > maxImport {
			return fmt.Errorf("more than %d files", maxImport)
		}
		items, err := recognize(root, name, d, issuers)
		if err != nil {
			out.Refused = append(out.Refused, endorse.Problem{File: name, Err: err})
			return nil
		}
		for _, i := range items {
			found = append(found, candidate{i, name})
		}
		return nil
	})
	if err != nil {
		return out, fmt.Errorf("import endorsements from %s: %w", src, err)
	}
	for _, c := range found {
		if c.Key.Kind == endorse.RIM {
			_ = issuers.AddManifest(c.Bytes) // and what is wrong with it, Verify says
		}
	}
	// Chains first: the others are held against them.
	slices.SortStableFunc(found, func(a, b candidate) int { return rank(a.Item) - rank(b.Item) })
	for _, c := range found {
		if err := endorse.Verify(c.Item, func(k endorse.Key) (endorse.Item, bool) {
			h, ok := to.lib.Get(k, now)
			return h.Item, ok
		}, issuers, anchors); err != nil {
			out.Refused = append(out.Refused, endorse.Problem{File: c.file, Err: fmt.Errorf("%s: %w", c.Key, err)})
			continue
		}
		_, known := to.lib.ByDigest(c.Key, c.Digest)
		if err := to.Put(c.Item, now); err != nil {
			return out, err
		}
		if known {
			out.Known = append(out.Known, c.Item)
		} else {
			out.Added = append(out.Added, c.Item)
		}
	}
	return out, nil
}

func rank(i endorse.Item) int {
	if i.Key.Kind == endorse.Chain {
		return 0
	}
	return 1
}

// recognize returns the endorsements in a file, and adds to issuers those of a
// GPU's chain.
func recognize(root *os.Root, name string, d fs.DirEntry, issuers *endorse.Issuers) ([]endorse.Item, error) {
	if !d.Type().IsRegular() {
		return nil, errors.New("not a regular file")
	}
	f, err := root.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, endorse.MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > endorse.MaxFile {
		return nil, fmt.Errorf("more than %d bytes", endorse.MaxFile)
	}
	// In a folder of ours a manifest is named by its digest, in one named by its id.
	if dir := filepath.Base(filepath.Dir(name)); strings.HasPrefix(dir, "NV_GPU_") && !strings.HasPrefix(filepath.Base(name), "NV_GPU_") {
		name = dir + filepath.Ext(name)
	}
	if issuers.AddDevice(b) == nil {
		return nil, nil
	}
	return endorse.Recognize(name, b)
}

// Export writes items into a folder in the form of endorse.Path, which it makes
// if it is not there.
func Export(dir string, items []endorse.Held) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { // #nosec G301 -- endorsements are public
		return fmt.Errorf("export endorsements: %w", err)
	}
	for _, h := range items {
		if err := write(dir, endorse.Path(h.Item), h.Bytes, h.Checked); err != nil {
			return err
		}
	}
	return nil
}
