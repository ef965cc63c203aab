package translog

import (
	"bytes"
	"context"
	"fmt"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/api/layout"
)

// Tree is the Merkle tree over a log's entries, of which it holds the right edge
// only. Make one with NewTree.
type Tree struct{ r *compact.Range }

// NewTree returns the empty tree.
func NewTree() *Tree {
	return &Tree{(&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewEmptyRange(0)}
}

// Add appends the entry with this body.
func (t *Tree) Add(body []byte) error {
	if err := t.r.Append(LeafHash(body), nil); err != nil {
		return fmt.Errorf("add entry %d to the tree: %w", t.r.End(), err)
	}
	return nil
}

// Size is the number of entries.
func (t *Tree) Size() uint64 { return t.r.End() }

// Root is the root hash of the entries so far.
func (t *Tree) Root() ([]byte, error) {
	if t.r.End() == 0 {
		return rfc6962.DefaultHasher.EmptyRoot(), nil
	}
	return t.r.GetRootHash(nil)
}

// Tiles reads a log in the layout of C2SP tlog-tiles. p is how many entries or
// hashes a partial one has, 0 for a full one; in place of a partial one that is
// gone comes the full one.
type Tiles interface {
	ReadTile(ctx context.Context, level, index uint64, p uint8) ([]byte, error)
	ReadEntryBundle(ctx context.Context, index uint64, p uint8) ([]byte, error)
}

// Audit reads the whole log of a broker up to checkpoint c and checks that its
// entries are a chain from the first on (Checker), that each tile has the hashes
// of what is below it, that the tree over the entries has the root in c, and that
// it had each earlier checkpoint's root when it had that size. visit is called
// with each entry, before the root is compared, unless it is nil. Audit returns
// the head of the chain.
func Audit(ctx context.Context, tiles Tiles, broker string, c Checkpoint, earlier []Checkpoint, visit func(Entry) error) (Head, error) {
	if c.Origin != KeyName(broker) {
		return Head{}, fmt.Errorf("audit log: checkpoint of %q, want %q", c.Origin, KeyName(broker))
	}
	for _, old := range earlier {
		if old.Origin != c.Origin || old.Size > c.Size {
			return Head{}, fmt.Errorf("audit log: the log has %d entries, and had %d at an earlier checkpoint of %q: it was cut short or is another", c.Size, old.Size, old.Origin)
		}
	}
	a := &audit{tiles: tiles, size: c.Size, chain: NewChecker(broker), tree: NewTree()}
	if err := a.compare(earlier); err != nil {
		return Head{}, err
	}
	for i := uint64(0); a.tree.Size() < c.Size; i++ {
		entries, err := a.bundle(ctx, i)
		if err != nil {
			return Head{}, fmt.Errorf("audit log: entry bundle %d: %w", i, err)
		}
		for _, body := range entries {
			e := a.chain.next(body)
			if err := a.add(ctx, e); err != nil {
				return Head{}, fmt.Errorf("audit log: %w", err)
			}
			if visit != nil {
				if err := visit(e); err != nil {
					return Head{}, err
				}
			}
			if err := a.compare(earlier); err != nil {
				return Head{}, err
			}
		}
	}
	if err := a.finish(ctx); err != nil {
		return Head{}, fmt.Errorf("audit log: %w", err)
	}
	if err := a.compare([]Checkpoint{c}); err != nil {
		return Head{}, err
	}
	return a.chain.Head(), nil
}

// audit is one run of Audit.
type audit struct {
	tiles Tiles
	size  uint64
	chain *Checker
	tree  *Tree
	// edge are the hashes of the tile that is being filled, for each level, and
	// full how many tiles of the level are done.
	edge [][][]byte
	full []uint64
}

// bundle reads entry bundle i: as many bodies as the tree of size has there.
func (a *audit) bundle(ctx context.Context, i uint64) ([][]byte, error) {
	p := layout.PartialTileSize(0, i, a.size)
	raw, err := a.tiles.ReadEntryBundle(ctx, i, p)
	if err != nil {
		return nil, err
	}
	var b api.EntryBundle
	if err := b.UnmarshalText(raw); err != nil {
		return nil, err
	}
	want := int(min(layout.EntryBundleWidth, a.size-i*layout.EntryBundleWidth)) //nolint:gosec // at most 256
	if len(b.Entries) < want || len(b.Entries) > layout.EntryBundleWidth {
		return nil, fmt.Errorf("%d entries, want %d: entries were dropped or added", len(b.Entries), want)
	}
	return b.Entries[:want], nil
}

func (a *audit) add(ctx context.Context, e Entry) error {
	if err := a.chain.Add(e); err != nil {
		return err
	}
	if err := a.tree.Add(e.Body); err != nil {
		return err
	}
	return a.push(ctx, 0, LeafHash(e.Body))
}

// push puts a hash into the edge tile of a level, compares the tile with the
// log's once it is full, and goes on one level up.
func (a *audit) push(ctx context.Context, level int, hash []byte) error {
	if level == len(a.edge) {
		a.edge, a.full = append(a.edge, nil), append(a.full, 0)
	}
	a.edge[level] = append(a.edge[level], hash)
	if len(a.edge[level]) < layout.TileWidth {
		return nil
	}
	up, err := a.tile(ctx, level)
	if err != nil {
		return err
	}
	a.edge[level], a.full[level] = nil, a.full[level]+1
	return a.push(ctx, level+1, up)
}

// tile compares the edge tile of a level with the log's, and returns its root.
func (a *audit) tile(ctx context.Context, level int) ([]byte, error) {
	index, hashes := a.full[level], a.edge[level]
	raw, err := a.tiles.ReadTile(ctx, uint64(level), index, uint8(len(hashes)%layout.TileWidth)) //nolint:gosec // a level is small
	if err != nil {
		return nil, fmt.Errorf("tile %d of level %d: %w", index, level, err)
	}
	var t api.HashTile
	if err := t.UnmarshalText(raw); err != nil {
		return nil, fmt.Errorf("tile %d of level %d: %w", index, level, err)
	}
	if len(t.Nodes) < len(hashes) {
		return nil, fmt.Errorf("tile %d of level %d has %d hashes, want %d", index, level, len(t.Nodes), len(hashes))
	}
	r := NewTree().r
	for i, h := range hashes {
		if !bytes.Equal(t.Nodes[i], h) {
			return nil, fmt.Errorf("tile %d of level %d: hash %d is not of what is below it: entries or tiles were changed", index, level, i)
		}
		if err := r.Append(h, nil); err != nil {
			return nil, err
		}
	}
	return r.GetRootHash(nil)
}

// finish compares the partial tiles at the edge.
func (a *audit) finish(ctx context.Context) error {
	for level, hashes := range a.edge {
		if len(hashes) == 0 {
			continue
		}
		if _, err := a.tile(ctx, level); err != nil {
			return err
		}
	}
	return nil
}

// compare holds the tree against every checkpoint of its size.
func (a *audit) compare(l []Checkpoint) error {
	for _, c := range l {
		if c.Size != a.tree.Size() {
			continue
		}
		root, err := a.tree.Root()
		if err != nil {
			return err
		}
		if !bytes.Equal(root, c.Root) {
			return fmt.Errorf("audit log: the first %d entries have root %x, and the checkpoint says %x: entries were changed after it was signed", c.Size, root, c.Root)
		}
	}
	return nil
}

// next is the entry that body would be if it stood next.
func (c *Checker) next(body []byte) Entry {
	return Entry{Index: c.head.Size, Body: body, Hash: Hash(c.head.Hash, body)}
}

// Clone returns a tree with the same entries, which grows by itself.
func (t *Tree) Clone() (*Tree, error) {
	out := NewTree()
	if t.r.End() == 0 {
		return out, nil
	}
	r, err := (&compact.RangeFactory{Hash: rfc6962.DefaultHasher.HashChildren}).NewRange(0, t.r.End(), append([][]byte(nil), t.r.Hashes()...))
	if err != nil {
		return nil, fmt.Errorf("copy the tree of %d entries: %w", t.r.End(), err)
	}
	return &Tree{r}, nil
}
