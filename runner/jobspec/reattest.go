package jobspec

import (
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

// Reattest says how often the job attests again while it runs, and what becomes of it
// if that fails.
type Reattest struct {
	Every Duration `yaml:"every"`
	// Within is how long a late one may take, and how long a paused job waits.
	Within    Duration `yaml:"within,omitempty"`
	OnFailure string   `yaml:"onFailure,omitempty"`
}

func (r *Reattest) plan() *plan.Reattest {
	if r == nil {
		return nil
	}
	return &plan.Reattest{EverySeconds: int64(time.Duration(r.Every) / time.Second), WithinSeconds: int64(time.Duration(r.Within) / time.Second), OnFailure: r.OnFailure}
}

func (c *checker) reattest(r *Reattest) {
	if r == nil {
		return
	}
	whole := func(d Duration, low, high int64, field string) {
		c.require(d%Duration(time.Second) == 0, field, "want whole seconds")
		c.require(d == 0 || d >= Duration(low)*Duration(time.Second) && d <= Duration(high)*Duration(time.Second), field, "want %s to %s", time.Duration(low)*time.Second, time.Duration(high)*time.Second)
	}
	whole(r.Every, plan.MinReattest, plan.MaxReattest, "reattest.every")
	whole(r.Within, 1, plan.MaxReattestWithin, "reattest.within")
}
