package hold

import (
	"sync/atomic"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

// progress counts what is decrypted of files whose sizes are known. The zero value is
// of none.
type progress struct {
	total  atomic.Int64
	opened atomic.Int64
}

// counted returns use, which is called before each chunk of a file, so that it counts
// the chunk.
func (p *progress) counted(use func() error, chunk, size int64) func() error {
	var begun atomic.Int64
	return func() error {
		if err := use(); err != nil {
			return err
		}
		n := begun.Add(chunk)
		p.opened.Add(max(min(n, size)-(n-chunk), 0))
		return nil
	}
}

// look returns nil for no files.
func (p *progress) look() *holdapi.Opened {
	total := p.total.Load()
	if total == 0 {
		return nil
	}
	return &holdapi.Opened{Bytes: min(p.opened.Load(), total), Total: total}
}
