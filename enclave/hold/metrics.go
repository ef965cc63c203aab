package hold

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
)

// maxMetricLine bounds a line of output that is read for metrics, in bytes.
const maxMetricLine = 4 << 10

// metrics is a job's numbers: what it prints on standard output as lines of one
// JSON object each. It reads what the job printed, not what of that the log kept,
// and has a budget of its own. Fields that the plan does not name, and those that
// are no numbers, are none.
type metrics struct {
	names  []string
	budget *budget

	mu     sync.Mutex // guards what follows
	line   []byte
	long   bool // the line is too long to be one
	values map[string]bundle.Metric
}

// newMetrics returns nil where the plan has none.
func newMetrics(m *plan.Metrics, now func() time.Time) *metrics {
	if m == nil {
		return nil
	}
	return &metrics{names: m.Names, budget: newBudget(m.MaxValues, m.ValuesPerSecond, now), values: map[string]bundle.Metric{}}
}

// add reads a part of the output.
func (m *metrics) add(b []byte) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(b) > 0 {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		// Any other line is not kept, however long it is.
		if m.long = m.long || len(m.line)+len(part) > maxMetricLine || len(m.line) == 0 && len(part) > 0 && part[0] != '{'; !m.long {
			m.line = append(m.line, part...)
		}
		if whole {
			if !m.long && len(m.line) > 0 {
				m.read(m.line)
			}
			m.line, m.long = m.line[:0], false
		}
		b = rest
	}
}

// read takes the numbers of a line. m.mu is held.
func (m *metrics) read(line []byte) {
	var fields map[string]json.RawMessage
	if json.Unmarshal(line, &fields) != nil {
		return
	}
	for _, name := range m.names {
		raw, ok := fields[name]
		if !ok || len(raw) == 0 || raw[0] != '-' && (raw[0] < '0' || raw[0] > '9') {
			continue
		}
		f, err := strconv.ParseFloat(string(raw), 64)
		if err != nil || !m.budget.one() {
			continue
		}
		v, seen := m.values[name]
		if !seen {
			v = bundle.Metric{Name: name, Min: f, Max: f}
		}
		v.Count, v.Last, v.Min, v.Max = v.Count+1, f, min(v.Min, f), max(v.Max, f)
		m.values[name] = v
	}
}

// one takes one value of the budget, or counts it as cut.
func (b *budget) one() bool { return b.take([]byte{0}) == 1 }

// look returns the metrics so far, in the order of the plan; nil if it has none.
func (m *metrics) look() *bundle.Metrics {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	out := &bundle.Metrics{Values: []bundle.Metric{}, Cut: m.budget.dropped()}
	for _, n := range m.names {
		if v, ok := m.values[n]; ok {
			out.Values = append(out.Values, v)
		}
	}
	return out
}

// ParseMetrics reads "values,values a second,name,name...".
func ParseMetrics(s string) (*plan.Metrics, error) {
	f := strings.Split(s, ",")
	if len(f) < 3 {
		return nil, fmt.Errorf("metrics %.80q: want VALUES,PER SECOND,NAME...", s)
	}
	m := &plan.Metrics{Names: slices.Clone(f[2:])}
	var err error
	if m.MaxValues, err = strconv.ParseInt(f[0], 10, 64); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	if m.ValuesPerSecond, err = strconv.ParseInt(f[1], 10, 64); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return m, m.Validate()
}
