package cache

import (
	"strings"

	"github.com/coffer-run/coffer/attest/plan"
)

// Progress says how many bytes of a sealed folder are there, of how many, while it is
// being fetched. ok is false for one that is not, or of whose size nothing is known yet.
func (c *Cache) Progress(digest plan.Digest) (got, total int64, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flights[strings.TrimPrefix(string(digest), "sha384:")]
	if f == nil || f.bytes == 0 {
		return 0, 0, false
	}
	return min(max(f.got.Load(), 0), f.bytes), f.bytes, true
}
