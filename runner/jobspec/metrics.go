package jobspec

import (
	"slices"

	"github.com/coffer-run/coffer/attest/plan"
)

// DefaultMetricValuesPerSecond stands where a job file names no rate.
const DefaultMetricValuesPerSecond = 100

// Metrics bounds the numbers that the job reports.
type Metrics struct {
	Names           []string `yaml:"names"`
	MaxValues       int64    `yaml:"maxValues"`
	ValuesPerSecond int64    `yaml:"valuesPerSecond,omitempty"`
}

func (c *checker) metrics(s *Spec) {
	if m := s.Output.Metrics; m != nil {
		if m.ValuesPerSecond == 0 {
			m.ValuesPerSecond = min(DefaultMetricValuesPerSecond, m.MaxValues)
		}
		c.require(m.ValuesPerSecond <= m.MaxValues, "output.metrics.valuesPerSecond", "want at most maxValues")
		sorted := slices.Sorted(slices.Values(m.Names))
		c.require(len(slices.Compact(sorted)) == len(m.Names), "output.metrics.names", "a name is there twice")
	}
	if s.Output.ExitCodes == plan.ExitPassFail && s.Retry != nil {
		c.require(!slices.ContainsFunc(s.Retry.OnExitCodes, func(code int) bool { return code != 1 }), "retry.onExitCodes", "with output.exitCodes: pass-fail every failure is 1")
	}
}

func (o Output) planMetrics(p *plan.Output) {
	if m := o.Metrics; m != nil {
		p.Metrics = &plan.Metrics{Names: slices.Sorted(slices.Values(m.Names)), MaxValues: m.MaxValues, ValuesPerSecond: m.ValuesPerSecond}
	}
	if o.ExitCodes == plan.ExitPassFail {
		p.ExitCodes = plan.ExitPassFail
	}
}
