package endorse

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// MaxCarried bounds encoded endorsements, in bytes.
	MaxCarried = 8 << 20
	// maxCarried bounds how many there are: 16 GPUs have fewer.
	maxCarried = 256
)

// carried is an endorsement beside others in one document.
type carried struct {
	Kind Kind   `json:"kind"`
	ID   string `json:"id"`
	Body []byte `json:"body"`
}

// Encode writes endorsements as one document, as bundles carry them: canonical
// JSON, in order of key and digest.
func Encode(items []Item) ([]byte, error) {
	if len(items) > maxCarried {
		return nil, fmt.Errorf("encode endorsements: %d, at most %d are allowed", len(items), maxCarried)
	}
	items = slices.Clone(items)
	slices.SortFunc(items, inOrder)
	out := make([]carried, len(items))
	for n, i := range items {
		out[n] = carried{i.Key.Kind, i.Key.ID, i.Bytes}
	}
	b, err := plan.Canonical(out)
	if err != nil {
		return nil, fmt.Errorf("encode endorsements: %w", err)
	}
	if len(b) > MaxCarried {
		return nil, fmt.Errorf("encode endorsements: %d bytes, at most %d are allowed", len(b), MaxCarried)
	}
	return b, nil
}

// Decode reads what Encode wrote; any other encoding of the same endorsements is
// an error. Each is checked as Parse does; who signed it is not.
func Decode(b []byte) ([]Item, error) {
	var in []carried
	if err := plan.Decode(b, MaxCarried, &in); err != nil {
		return nil, fmt.Errorf("decode endorsements: %w", err)
	}
	if len(in) > maxCarried {
		return nil, fmt.Errorf("decode endorsements: %d, at most %d are allowed", len(in), maxCarried)
	}
	items := make([]Item, len(in))
	for n, c := range in {
		i, err := Parse(c.Kind, c.ID, c.Body)
		if err != nil {
			return nil, fmt.Errorf("decode endorsements: %w", err)
		}
		if i.Key.ID != c.ID {
			return nil, fmt.Errorf("decode endorsements: %s is called %.120q", i.Key, c.ID)
		}
		if n > 0 && inOrder(items[n-1], i) >= 0 {
			return nil, errors.New("decode endorsements: one is there twice, or they are out of order")
		}
		items[n] = i
	}
	c, err := Encode(items)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(b, c) {
		return nil, errors.New("decode endorsements: not in canonical form (RFC 8785)")
	}
	return items, nil
}

func inOrder(a, b Item) int {
	return strings.Compare(a.Key.String()+" "+string(a.Digest), b.Key.String()+" "+string(b.Digest))
}

// ByDigest returns what was used under that digest, if it is still held.
func (c *Cache) ByDigest(k Key, d plan.Digest) (Item, bool) {
	if c == nil {
		return Item{}, false
	}
	h, ok := c.store.ByDigest(k, d)
	return h.Item, ok
}
