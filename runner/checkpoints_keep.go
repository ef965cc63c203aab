package runner

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/jobspec"
)

const (
	// maxMetricLine bounds a line of output that is read for metrics, in bytes, and
	// maxMetrics how many checkpoints have one.
	maxMetricLine = 4 << 10
	maxMetrics    = 10_000
)

// metrics is what a job reports of its checkpoints: lines of JSON on its standard
// output with a checkpoint's name and numbers.
type metrics struct {
	mu     sync.Mutex // guards what follows
	line   []byte
	long   bool // the line is too long to be one
	values map[string]map[string]float64
}

// add reads part of the output.
func (m *metrics) add(b []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for len(b) > 0 {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		if m.long = m.long || len(m.line)+len(part) > maxMetricLine; !m.long {
			m.line = append(m.line, part...)
		}
		if whole {
			if !m.long {
				m.read(m.line)
			}
			m.line, m.long = m.line[:0], false
		}
		b = rest
	}
}

// read takes a line that names a checkpoint. Any other is the job's own affair.
func (m *metrics) read(line []byte) {
	if len(line) == 0 || line[0] != '{' {
		return
	}
	var fields map[string]any
	if json.Unmarshal(line, &fields) != nil {
		return
	}
	name, ok := fields["checkpoint"].(string)
	if !ok || len(m.values) >= maxMetrics && m.values[name] == nil {
		return
	}
	if m.values == nil {
		m.values = map[string]map[string]float64{}
	}
	if m.values[name] == nil {
		m.values[name] = map[string]float64{}
	}
	for k, v := range fields {
		if f, ok := v.(float64); ok {
			m.values[name][k] = f
		}
	}
}

func (m *metrics) value(checkpoint, metric string) (float64, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	v, ok := m.values[checkpoint][metric]
	return v, ok
}

// kept is one checkpoint as the keep rules see it.
type kept struct {
	sequence uint64
	made     time.Time
	value    float64
	measured bool
}

// letGo returns the numbers of those of l, which are in order, that no rule keeps.
// The newest always stays.
func letGo(k jobspec.Keep, l []kept) []uint64 {
	stay := map[uint64]bool{}
	for _, c := range l[max(0, len(l)-max(k.Last, 1)):] {
		stay[c.sequence] = true
	}
	if k.Every > 0 {
		var last time.Time
		for _, c := range l {
			if last.IsZero() || c.made.Sub(last) >= time.Duration(k.Every) {
				stay[c.sequence], last = true, c.made
			}
		}
	}
	if k.Best != nil {
		best := slices.DeleteFunc(slices.Clone(l), func(c kept) bool { return !c.measured })
		slices.SortStableFunc(best, func(a, b kept) int {
			if k.Best.Want == "max" {
				return cmp.Compare(b.value, a.value)
			}
			return cmp.Compare(a.value, b.value)
		})
		for _, c := range best[:min(len(best), max(k.Best.Count, 1))] {
			stay[c.sequence] = true
		}
	}
	var out []uint64
	for _, c := range l {
		if !stay[c.sequence] {
			out = append(out, c.sequence)
		}
	}
	return out
}

// prune removes the sealed files of countersigned checkpoints that the job file's
// keep rules let go. Their records stay: they show that the line has no gap.
func (a *Agent) prune(ctx context.Context, j *Job) {
	spec, err := j.checkpointSpec()
	if err != nil || spec == nil || spec.Keep == nil {
		return
	}
	var l []kept
	byNumber := map[uint64]holdapi.Checkpoint{}
	j.anchors.mu.Lock()
	for _, c := range j.anchors.list {
		if j.anchors.heads[c.Sequence] == "" || j.anchors.removed[c.Sequence] {
			continue
		}
		k := kept{sequence: c.Sequence}
		if r, err := receipt.DecodeCheckpointRecord(c.Record); err == nil {
			k.made = time.Unix(0, r.UnixNano)
		}
		if b := spec.Keep.Best; b != nil {
			k.value, k.measured = j.metrics.value(c.Name, b.Metric)
		}
		l, byNumber[c.Sequence] = append(l, k), c
	}
	j.anchors.mu.Unlock()
	for _, n := range letGo(*spec.Keep, l) {
		if err := a.trim(ctx, j, byNumber[n].Folder()); err != nil {
			a.log.WarnContext(ctx, "remove a checkpoint that the keep rules let go", slog.String("job", j.id), slog.Uint64("sequence", n), slog.Any("error", err))
			continue
		}
		j.anchors.mu.Lock()
		j.anchors.removed[n] = true
		j.anchors.mu.Unlock()
	}
}
