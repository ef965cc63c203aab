package runner

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/alerts"
	agentv1 "github.com/coffer-run/coffer/runner/api/agent/v1"
	"github.com/coffer-run/coffer/runner/egress"
	"github.com/coffer-run/coffer/runner/rules"
	"github.com/coffer-run/coffer/runner/sandbox"
)

const (
	// findingsEach is how many findings of one rule are told one by one; of further
	// ones, each at which the count has doubled.
	findingsEach = 32
	// maxFindings bounds those of a job that are told. A finding that ends the job
	// always is.
	maxFindings = 2000
	// settleTimeout bounds how long the end of a job waits for its last events.
	settleTimeout = 2 * time.Second
)

// watching is what the rules see of one job, and what they found.
type watching struct {
	mu      sync.Mutex // guards what follows
	adopted bool       // the job was taken up while it ran
	watch   *rules.Watch
	found   bundle.Alerts
	// told are findings that an earlier agent told, by rule and number in the trace:
	// whoever takes up a job reads its trace from the beginning.
	told map[string]bool
	seen uint64 // number of the last event of the trace that was looked at
	// skip counts output that an earlier agent looked at, and cut what was cut.
	skip, cut int64
	// told of what was cut, of the output in bytes and of the metrics in values.
	cutTold, metricsCutTold int64
	// sent is what each connection had sent when it was looked at; nil for a job that
	// was taken up and whose gateway has not been asked.
	sent []int64
	stop *ruleError
}

// ruleError is a job that a rule ended.
type ruleError struct{ id, says string }

func (e *ruleError) Error() string { return "rule " + e.id + ": " + e.says }

// maxRecorded bounds a path in a job's events and in its bundle, in bytes. Rules see all of it.
const maxRecorded = 512

func recorded(path string) string {
	if len(path) <= maxRecorded {
		return path
	}
	return strings.ToValidUTF8(path[:maxRecorded], "?")
}

func findingKey(rule string, trace uint64) string { return rule + "/" + strconv.FormatUint(trace, 10) }

// beginWatching is called before the first event is looked at.
func (a *Agent) beginWatching(ctx context.Context, j *Job) {
	w := &j.watching
	w.mu.Lock()
	defer w.mu.Unlock()
	w.found.Rules = a.Rules.Digest()
	known := rules.Job{InImage: a.inImage(ctx, j)}
	// By its plan: of a job that is taken up only to be concluded nobody has asked the
	// gateway yet.
	if len(j.plan.Egress) > 0 {
		known.Gateway = egress.Addr()
	}
	for _, in := range j.plan.Inputs {
		if in.Secret {
			known.Granted = append(known.Granted, in.Mount)
		}
	}
	w.watch = a.Rules.Watch(known)
	w.sent = []int64{}
	if !w.adopted {
		return
	}
	if w.stop != nil {
		j.cancel(w.stop)
	}
	w.sent = nil
	if j.holder == nil {
		return
	}
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if st, err := j.holder.Status(ask); err == nil {
		w.skip, w.cut = st.LogBytes, st.LogCut
	}
}

// inImage says of digests whether the job's image has a program with it. The image is
// read when it is first asked, once for all jobs of an agent. Where that fails, no
// program is in the image.
func (a *Agent) inImage(ctx context.Context, j *Job) func(string) bool {
	name, _, _ := strings.Cut(j.spec.Image, "@")
	programs := sync.OnceValue(func() sandbox.Programs {
		p, err := a.Node.Programs(ctx, sandbox.Image{Name: name, Digest: j.plan.Image})
		if err != nil {
			a.log.ErrorContext(ctx, "no program counts as one of the image", slog.String("job", j.id), slog.Any("error", err))
		}
		return p
	})
	return func(digest string) bool { return programs().Has(digest) }
}

// restoreFinding takes back what an earlier agent found.
func (j *Job) restoreFinding(e *agentv1.AlertEvent, unixNano int64) {
	w := &j.watching
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.told == nil {
		w.told = map[string]bool{}
	}
	if e.GetTraceSequence() != 0 {
		w.told[findingKey(e.GetRule(), e.GetTraceSequence())] = true
	}
	switch rules.Kind(e.GetKind()) {
	case rules.OutputCut:
		w.cutTold = e.GetBytes()
	case rules.MetricsCut:
		w.metricsCutTold = e.GetBytes()
	default:
	}
	if e.GetAction() == string(rules.Stop) && e.GetKind() != string(rules.TraceLost) && w.stop == nil {
		w.stop = &ruleError{id: e.GetRule(), says: e.GetSays()}
	}
	w.found.Findings = append(w.found.Findings, bundle.Finding{
		Sequence: e.GetSequence(), UnixNano: unixNano, Rule: e.GetRule(), Action: e.GetAction(), Severity: e.GetSeverity(), Kind: e.GetKind(),
		Process: e.GetProcess(), Path: e.GetPath(), Digest: e.GetDigest(), Address: e.GetAddress(), Bytes: e.GetBytes(), Count: e.GetCount(), Trace: e.GetTraceSequence(),
	})
}

// lookAt holds an event of the trace against the rules.
func (a *Agent) lookAt(ctx context.Context, j *Job, e holdapi.Event) {
	ev := rules.Event{Kind: rules.Kind(e.Kind), At: time.Unix(0, e.UnixNano), Process: e.Process, Digest: e.Digest}
	switch ev.Kind {
	case rules.Exec, rules.OperatorExec, rules.Open:
		ev.Path = e.Detail
	case rules.Connect:
		ev.Address = e.Detail
	default:
	}
	a.find(ctx, j, ev, e.Sequence)
	j.watching.mu.Lock()
	defer j.watching.mu.Unlock()
	j.watching.seen = e.Sequence
}

// lookAtOutput holds what the job printed against the rules; cut is what of it was
// dropped so far.
func (a *Agent) lookAtOutput(ctx context.Context, j *Job, n int, cut int64) {
	w := &j.watching
	w.mu.Lock()
	old := min(w.skip, int64(n))
	w.skip -= old
	bytes := int64(n) - old + max(0, cut-w.cut)
	w.cut = max(w.cut, cut)
	w.mu.Unlock()
	if bytes > 0 {
		a.find(ctx, j, rules.Event{Kind: rules.Output, At: time.Now(), Bytes: bytes}, 0)
	}
	a.lookAtCut(ctx, j, rules.OutputCut, &w.cutTold, cut)
}

// lookAtCut holds it against the rules that something was cut. told is where w keeps how
// much of it the rules know.
func (a *Agent) lookAtCut(ctx context.Context, j *Job, kind rules.Kind, told *int64, cut int64) {
	w := &j.watching
	w.mu.Lock()
	more := cut > 0 && cut >= 2**told
	if more {
		*told = cut
	}
	w.mu.Unlock()
	if more {
		a.find(ctx, j, rules.Event{Kind: kind, At: time.Now(), Bytes: cut}, 0)
	}
}

// lookAtSent holds what left by the gateway since the last time against the rules.
func (a *Agent) lookAtSent(ctx context.Context, j *Job) {
	w, e := &j.watching, j.egress
	var events []rules.Event
	e.mu.Lock()
	w.mu.Lock()
	first := w.sent == nil
	for i, c := range e.connections {
		if i == len(w.sent) {
			w.sent = append(w.sent, 0)
		}
		if n := c.Sent - w.sent[i]; n > 0 && !first {
			events = append(events, rules.Event{Kind: rules.Sent, At: time.Now(), Address: net.JoinHostPort(c.Host, strconv.Itoa(c.Port)), Bytes: n})
		}
		w.sent[i] = c.Sent
	}
	if w.sent == nil {
		w.sent = []int64{}
	}
	w.mu.Unlock()
	e.mu.Unlock()
	for _, ev := range events {
		a.find(ctx, j, ev, 0)
	}
}

// find records, tells and acts on what the rules find in one event.
func (a *Agent) find(ctx context.Context, j *Job, ev rules.Event, trace uint64) {
	w := &j.watching
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.watch == nil {
		return
	}
	for _, f := range w.watch.Look(ev) {
		// The end of the trace ends the job by a way of its own (wait).
		stops := f.Rule.Action == rules.Stop && ev.Kind != rules.TraceLost
		if trace != 0 && w.told[findingKey(f.Rule.ID, trace)] {
			if stops {
				j.cancel(w.stop)
			}
			continue
		}
		if !stops && (f.Count > findingsEach && !doubled(f.Count-1, f.Count) || len(w.found.Findings) >= maxFindings) {
			w.found.Untold++
			continue
		}
		one := bundle.Finding{
			Sequence: uint64(len(w.found.Findings) + 1), UnixNano: ev.At.UnixNano(), Rule: f.Rule.ID, Action: string(f.Rule.Action), Severity: string(f.Rule.Severity), Kind: string(ev.Kind),
			Process: ev.Process, Path: recorded(ev.Path), Digest: ev.Digest, Address: ev.Address, Bytes: ev.Bytes, Count: f.Count, Trace: trace,
		}
		w.found.Findings = append(w.found.Findings, one)
		// To the collector first: whoever takes the job up says it again under the same
		// name rather than not at all.
		if a.Alerts != nil && f.Rule.Action != rules.Record {
			if err := a.Alerts.Add(alerts.Alert{
				Finding: f, Node: a.Name, Job: j.id, Plan: string(j.digest), Image: j.plan.Image, Sequence: int64(one.Sequence), Stopped: stops, //nolint:gosec // bounded by maxFindings
			}); err != nil {
				a.log.WarnContext(ctx, "an alert is lost", slog.String("job", j.id), slog.Any("error", err))
			}
		}
		a.tell(ctx, j, alertEvent(one, f.Rule.Says))
		if f.Rule.Action != rules.Record {
			a.log.WarnContext(ctx, "a rule matches", slog.String("job", j.id), slog.String("rule", f.Rule.ID), slog.String("action", string(f.Rule.Action)))
		}
		if stops {
			if w.stop == nil {
				w.stop = &ruleError{id: f.Rule.ID, says: f.Rule.Says}
			}
			j.cancel(w.stop)
		}
	}
}

func alertEvent(f bundle.Finding, says string) *agentv1.WatchResponse {
	return &agentv1.WatchResponse{Event: &agentv1.WatchResponse_Alert{Alert: &agentv1.AlertEvent{
		Sequence: f.Sequence, Rule: f.Rule, Says: says, Action: f.Action, Severity: f.Severity, Kind: f.Kind,
		Process: f.Process, Path: f.Path, Digest: f.Digest, Address: f.Address, Bytes: f.Bytes, Count: f.Count, TraceSequence: f.Trace,
	}}}
}

// settled waits until the rules have seen every event that the holder has, and says
// whether one of them ends the job: a job that ends right after it did something is
// not through.
func (j *Job) settled(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	c, err := holdapi.Dial(ctx, j.runDir)
	if err != nil {
		return nil //nolint:nilerr // a holder that is gone ends the job by itself
	}
	defer c.Close()
	for ctx.Err() == nil {
		j.watching.mu.Lock()
		seen := j.watching.seen
		j.watching.mu.Unlock()
		more, err := c.Events(ctx, holdapi.Events{After: seen})
		if err != nil || len(more) == 0 {
			break
		}
		time.Sleep(2 * time.Millisecond)
	}
	j.watching.mu.Lock()
	defer j.watching.mu.Unlock()
	if j.watching.stop != nil {
		return j.watching.stop
	}
	return nil
}

// addAlerts puts what the rules found into the bundle, once the pumps have ended. A
// job that was taken up only to be concluded has what was found before.
func (j *Job) addAlerts(b *bundle.Builder, set *rules.Set) error {
	if !j.started() {
		return nil
	}
	j.watching.mu.Lock()
	defer j.watching.mu.Unlock()
	out := j.watching.found
	out.Rules = set.Digest()
	out.Findings = slices.Clone(out.Findings)
	if out.Findings == nil {
		out.Findings = []bundle.Finding{}
	}
	if err := b.AddJSON(bundle.AlertsPart, out); err != nil {
		return fmt.Errorf("what the rules found: %w", err)
	}
	return nil
}
