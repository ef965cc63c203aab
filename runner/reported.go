package runner

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/journal"
	"github.com/coffer-run/coffer/runner/rules"
)

const (
	// reportedEvery is how often a holder is asked for a job's numbers.
	reportedEvery = time.Second
	// reportedEntry is where the journal keeps them when the job has ended.
	reportedEntry = journal.MetricsEntry
)

// reported is the numbers of a job's plan that the job reported so far, within its
// budget for them. The holder counts; the agent passes them on.
type reported struct {
	mu     sync.Mutex // guards what follows
	newest bundle.Metrics
}

// pumpReported asks the holder while the job runs and once when it has ended.
func (a *Agent) pumpReported(ctx context.Context, j *Job) error {
	c, err := holdapi.Dial(ctx, j.runDir)
	if err != nil {
		return err
	}
	defer c.Close()
	t := time.NewTicker(reportedEvery)
	defer t.Stop()
	for over := false; !over; {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-j.finished:
			over = true
		case <-t.C:
		}
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		if st.Metrics != nil {
			a.sawReported(ctx, j, *st.Metrics)
		}
	}
	j.reported.mu.Lock()
	defer j.reported.mu.Unlock()
	return a.Journal.Keep(ctx, j.id, reportedEntry, j.reported.newest)
}

// sawReported tells the watchers what is new, and the rules what was cut.
func (a *Agent) sawReported(ctx context.Context, j *Job, m bundle.Metrics) {
	j.reported.mu.Lock()
	changed := !reflect.DeepEqual(m, j.reported.newest)
	j.reported.newest = m
	j.reported.mu.Unlock()
	a.lookAtCut(ctx, j, rules.MetricsCut, &j.watching.metricsCutTold, m.Cut)
	if changed {
		a.tell(ctx, j, &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Metrics{Metrics: &agentv1.MetricsEvent{Metrics: Metrics(m), Cut: m.Cut}}})
	}
}

// Metrics is a job's numbers as the API shows them.
func Metrics(m bundle.Metrics) []*agentv1.Metric {
	var out []*agentv1.Metric
	for _, v := range m.Values {
		out = append(out, &agentv1.Metric{Name: v.Name, Count: v.Count, Last: v.Last, Min: v.Min, Max: v.Max})
	}
	return out
}

// Reported returns the numbers that a job reported: so far, or until it ended.
func (a *Agent) Reported(ctx context.Context, id string) (m bundle.Metrics, err error) {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j != nil {
		j.reported.mu.Lock()
		defer j.reported.mu.Unlock()
		return j.reported.newest, nil
	}
	if err := a.Journal.Entry(ctx, id, reportedEntry, &m); err != nil && !errors.Is(err, journal.ErrNotFound) {
		return bundle.Metrics{}, err
	}
	return m, nil
}
