package plan

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
)

const (
	// MaxMetricNames bounds the metrics of one job.
	MaxMetricNames = 64
	// MaxMetricValues bounds what a plan may allow.
	MaxMetricValues = 100_000_000
	// ExitPassFail is the form of Output.ExitCodes in which one bit of the exit code
	// leaves the node.
	ExitPassFail = "pass-fail"
)

// Metrics is what the job may report as numbers, besides its log. A value is a
// double: MaxValues of them are a channel of 8 bytes each.
type Metrics struct {
	// Names are those of metricName, sorted. Nothing else is taken for a metric, so
	// that names carry nothing out.
	Names []string `json:"names"`
	// MaxValues bounds the values of all names together.
	MaxValues int64 `json:"maxValues"`
	// ValuesPerSecond bounds their rate, over more than LogBurst seconds.
	ValuesPerSecond int64 `json:"valuesPerSecond"`
}

var metricName = regexp.MustCompile(`^[a-z0-9_]{1,32}$`)

// Validate wants names and bounds that a plan may have; nil has none.
func (m *Metrics) Validate() error {
	switch {
	case m == nil:
		return nil
	case len(m.Names) == 0 || len(m.Names) > MaxMetricNames:
		return fmt.Errorf("plan has %d metrics, want 1 to %d", len(m.Names), MaxMetricNames)
	case !slices.IsSorted(m.Names) || len(slices.Compact(slices.Clone(m.Names))) != len(m.Names):
		return errors.New("plan metrics are not sorted, or one is there twice")
	case m.MaxValues <= 0 || m.MaxValues > MaxMetricValues || m.ValuesPerSecond <= 0 || m.ValuesPerSecond > m.MaxValues:
		return fmt.Errorf("plan metrics: %d values, %d a second: want 1 to %d, and no more a second than in all", m.MaxValues, m.ValuesPerSecond, MaxMetricValues)
	}
	for _, n := range m.Names {
		if !metricName.MatchString(n) {
			return fmt.Errorf("plan metric %.80q: want a-z, 0-9 and _, at most 32", n)
		}
	}
	return nil
}

// ExitCode is what of an exit code leaves the node: all 8 bits, or whether it is 0.
func (o Output) ExitCode(code int) int {
	if o.ExitCodes == ExitPassFail && code != 0 {
		return 1
	}
	return code
}

func (o Output) validateExit() error {
	if o.ExitCodes != "" && o.ExitCodes != ExitPassFail {
		return fmt.Errorf("plan exit codes %.40q: want %s, or nothing", o.ExitCodes, ExitPassFail)
	}
	return o.Metrics.Validate()
}
