package runner

import (
	"errors"
	"testing"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
)

func TestDecrypting(t *testing.T) {
	of := func(bytes, total int64) holdapi.Status {
		return holdapi.Status{Opened: &holdapi.Opened{Bytes: bytes, Total: total}}
	}
	for name, row := range map[string]struct {
		status holdapi.Status
		err    error
		bytes  int64 // -1 for nothing to tell
		over   bool
	}{
		"not begun":                  {bytes: -1},
		"begun":                      {status: of(0, 10)},
		"on its way":                 {status: of(3, 10), bytes: 3},
		"whole":                      {status: of(10, 10), bytes: -1, over: true},
		"a holder that is not there": {status: of(10, 10), err: errors.New("gone"), bytes: -1},
	} {
		p, over := decrypting(row.status, row.err)
		if over != row.over || (p == nil) != (row.bytes < 0) || p != nil && (p.GetBytes() != row.bytes || p.GetTotal() != 10) {
			t.Errorf("%s: %v, over %t", name, p, over)
		}
	}
	// Of a job that is not there, or has not come so far, there is nothing to tell.
	a := &Agent{live: map[string]*Job{"early": newJob("early", "")}}
	for _, id := range []string{"early", "none"} {
		if p := a.Progress(t.Context(), id); p != nil {
			t.Errorf("%s: %v", id, p)
		}
	}
}
