package composite_test

import (
	"fmt"
	"runtime"
	"testing"

	"github.com/coffer-run/coffer/attest/composite"
)

// Several GPUs are appraised at a time: each result is at the place of its own
// evidence, and one that is false fails alone.
func TestEachGPUIsJudgedByItsOwnEvidence(t *testing.T) {
	for _, cores := range []int{1, 2, 8} {
		t.Run(fmt.Sprintf("%d cores", cores), func(t *testing.T) {
			defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(cores))
			m := newMachine(t)
			m.gpus = 2
			m.collect()
			m.e.GPUs = append(m.e.GPUs, m.e.GPUs[0])
			report := append([]byte(nil), m.e.GPUs[1].Report...)
			report[100] ^= 1
			m.e.GPUs[1].Report = report
			s, err := composite.Open(&m.e)
			m.must(err)
			a := s.Appraise(t.Context(), m.trust, m.now)
			for i, want := range []bool{true, false, true} {
				g := a.GPUs[i]
				if g.Name != fmt.Sprintf("gpu%d", i) || g.Genuine() != want {
					t.Errorf("place %d: %s, genuine %v, want %v: %v", i, g.Name, g.Genuine(), want, g.Checks.Failed())
				}
			}
			if len(a.Checks.Failed()) == 0 {
				t.Error("a GPU that was shown twice was not refused")
			}
		})
	}
}
