package composite_test

import (
	"bytes"
	"context"
	"encoding/json"
	"testing"

	"github.com/coffer-run/coffer/attest/composite"
	"github.com/coffer-run/coffer/attest/evidence"
	"github.com/coffer-run/coffer/attest/simulate/mutatetest"
)

// Of a whole envelope every bit is bound, but for the driver's name for a GPU,
// what lies unused in the platform's certificate table, and the last bits of
// base64, which say nothing.
func TestMutations(t *testing.T) {
	m := newMachine(t).collect().hcl()
	good, err := json.Marshal(m.e)
	m.must(err)
	bound := func(b []byte) []byte {
		e, err := evidence.Parse(b)
		if err != nil {
			return nil
		}
		e.SNP.Certificates = nil
		for i := range e.GPUs {
			e.GPUs[i].UUID = ""
		}
		out, err := json.Marshal(e)
		m.must(err)
		return out
	}
	mutatetest.Run(t, mutatetest.Target{
		Kind: "evidence envelope", Good: good, MaxAlloc: 4 << 20, Every: 8*len(good)/800 | 1,
		Free: func(bit int) bool {
			b := bytes.Clone(good)
			b[bit/8] ^= 1 << (bit % 8)
			return bytes.Equal(bound(b), bound(good))
		},
		Accepts: func(b []byte) bool {
			e, err := evidence.Parse(b)
			if err != nil {
				return false
			}
			s, err := composite.Open(e)
			if err != nil {
				return false
			}
			a := s.Appraise(context.Background(), m.trust, m.now)
			return len(failed(a)) == 0 && a.CPU.Genuine() && a.TPM.Genuine() && len(a.GPUs) == 1
		},
	})
}
