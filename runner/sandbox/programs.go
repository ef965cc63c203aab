package sandbox

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"strings"
	"sync"
)

// maxPrograms bounds the programs of one image that are remembered.
const maxPrograms = 100_000

// Programs has the digests of the files of an image that may be executed.
type Programs map[[sha256.Size]byte]struct{}

// Has says whether the image has a program with a digest, "sha256:<hex>".
func (p Programs) Has(digest string) bool {
	h, ok := strings.CutPrefix(digest, "sha256:")
	d, err := hex.DecodeString(h)
	if !ok || err != nil || len(d) != sha256.Size {
		return false
	}
	_, ok = p[[sha256.Size]byte(d)]
	return ok
}

// programs remembers what images have, each read once.
type programs struct {
	mu    sync.Mutex // guards what follows
	known map[string]Programs
}

// Programs reads the programs of an image: every regular file in any of its layers
// with a bit that lets it be executed. A file that a later layer hides counts. Each
// layer is held against the digest that the image's manifest has for it.
func (n *Node) Programs(ctx context.Context, image Image) (Programs, error) {
	n.programs.mu.Lock()
	defer n.programs.mu.Unlock()
	if p, ok := n.programs.known[image.Digest]; ok {
		return p, nil
	}
	p, err := n.readPrograms(ctx, image)
	if err != nil {
		return nil, fmt.Errorf("read programs of image %s: %w", image.Name, err)
	}
	n.programs.known[image.Digest] = p
	return p, nil
}

func (n *Node) readPrograms(ctx context.Context, image Image) (Programs, error) {
	layers, err := n.contents(ctx, image)
	if err != nil {
		return nil, err
	}
	out := Programs{}
	for _, l := range layers {
		for _, e := range l {
			if e.kind != tar.TypeReg || e.mode&0o111 == 0 {
				continue
			}
			if len(out) >= maxPrograms {
				return nil, fmt.Errorf("more than %d programs", maxPrograms)
			}
			out[e.sum] = struct{}{}
		}
	}
	return out, nil
}
