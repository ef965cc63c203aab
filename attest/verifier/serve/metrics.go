package serve

import (
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/coffer-run/coffer/attest/endorse"
	"github.com/coffer-run/coffer/attest/receipt"
)

const (
	// maxCheckLabels bounds the check ids that metrics tell apart. Coffer has
	// about a hundred; the rules of a policy may add theirs.
	maxCheckLabels = 256
	// other stands for what a label does not tell apart.
	other = "other"
)

// metrics counts what is done. Nothing that a caller or its evidence can choose
// becomes a label: roles, calls, codes and kinds are lists, and check ids are
// held to a form and a number.
type metrics struct {
	registry *prometheus.Registry

	calls     *prometheus.CounterVec
	took      *prometheus.HistogramVec
	working   prometheus.Gauge
	appraised *prometheus.CounterVec
	refused   *prometheus.CounterVec
	nonces    *prometheus.CounterVec
	used      *prometheus.CounterVec
	age       *prometheus.HistogramVec

	mu     sync.Mutex
	checks map[string]bool // guarded by mu
}

func newMetrics(o Options) *metrics {
	name := func(s string) string { return "coffer_verifier_" + s }
	m := &metrics{
		registry: prometheus.NewRegistry(), checks: map[string]bool{},
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("calls_total"), Help: "Calls by procedure, caller's role and Connect code."}, []string{"call", "role", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: name("call_duration_seconds"), Help: "Time from the whole request to the answer, the wait for a turn included.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 15},
		}, []string{"call"}),
		working:   prometheus.NewGauge(prometheus.GaugeOpts{Name: name("calls_in_flight"), Help: "Calls that wait for a turn or are being worked on."}),
		appraised: prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("appraisals_total"), Help: "Signed results by call, caller's role and whether every check held."}, []string{"call", "role", "result"}),
		refused:   prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("refusals_total"), Help: "Results that refuse, by the first check that failed."}, []string{"check"}),
		nonces:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("nonce_refusals_total"), Help: "Results that refuse the nonce, by check."}, []string{"check"}),
		used:      prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("endorsements_used_total"), Help: "Endorsements that appraisals used, by kind and by whether they were held (folder) or fetched (vendor)."}, []string{"kind", "source"}),
		age: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: name("endorsement_age_seconds"), Help: "How long before its use an endorsement was got from its vendor.",
			Buckets: []float64{60, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600, 30 * 24 * 3600, 365 * 24 * 3600},
		}, []string{"kind"}),
	}
	m.registry.MustRegister(m.calls, m.took, m.working, m.appraised, m.refused, m.nonces, m.used, m.age, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if o.FetchFailures != nil {
		for _, k := range endorse.Kinds() {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: name("endorsement_fetch_failures_total"), Help: "Endorsements that could not be fetched, or were not used when they came, by kind.",
				ConstLabels: prometheus.Labels{"kind": string(k)},
			}, func() float64 { return float64(o.FetchFailures(k)) }))
		}
	}
	if o.Reloads != nil {
		for result, count := range map[string]func() uint64{
			"taken":   func() uint64 { n, _ := o.Reloads(); return n },
			"refused": func() uint64 { _, n := o.Reloads(); return n },
		} {
			m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{
				Name: name("reloads_total"), Help: "Changes of the configuration while serving, by whether they were taken.",
				ConstLabels: prometheus.Labels{"result": result},
			}, func() float64 { return float64(count()) }))
		}
	}
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}

// call counts a call that was answered, with or without an error.
func (m *metrics) call(procedure, role string, err error, took time.Duration) {
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
	}
	call := shortCall(procedure)
	m.calls.WithLabelValues(call, roleLabel(role), code).Inc()
	m.took.WithLabelValues(call).Observe(took.Seconds())
}

// result counts a signed result.
func (m *metrics) result(procedure, role string, r receipt.Result) {
	failed := r.AllChecks().Failed()
	outcome := "accepted"
	if len(failed) > 0 {
		outcome = "refused"
		m.refused.WithLabelValues(m.checkLabel(failed[0].ID)).Inc()
	}
	m.appraised.WithLabelValues(shortCall(procedure), roleLabel(role), outcome).Inc()
	for _, c := range r.Checks.Failed() {
		if strings.HasPrefix(c.ID, "nonce.") {
			m.nonces.WithLabelValues(m.checkLabel(c.ID)).Inc()
		}
	}
	for _, s := range r.Submods {
		m.endorsements(s.Claims, time.Unix(r.IssuedAt, 0))
	}
}

// endorsements counts what endorse says that one device's appraisal used.
func (m *metrics) endorsements(claims map[string]any, now time.Time) {
	list, _ := claims[endorse.ClaimUsed].([]any)
	for _, v := range list {
		e, _ := v.(map[string]any)
		kind, _ := e["kind"].(string)
		if !slices.Contains(endorse.Kinds(), endorse.Kind(kind)) {
			kind = other
		}
		source, _ := e["source"].(string)
		if source != "folder" && source != "vendor" {
			source = other
		}
		m.used.WithLabelValues(kind, source).Inc()
		text, _ := e["checked"].(string)
		if checked, err := time.Parse(time.RFC3339, text); err == nil {
			m.age.WithLabelValues(kind).Observe(max(0, now.Sub(checked).Seconds()))
		}
	}
}

var checkForm = regexp.MustCompile(`^[a-z0-9]+(\.[a-z0-9-]+){1,4}$`)

// checkLabel returns the id of a check, or other where rules invent ids. Those
// of coffer's own checks come first whatever came before: the bound is of the
// rules' ids alone, which all begin with "policy.".
func (m *metrics) checkLabel(id string) string {
	if len(id) > 64 || !checkForm.MatchString(id) {
		return other
	}
	if !strings.HasPrefix(id, "policy.") {
		return id
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.checks[id] && len(m.checks) >= maxCheckLabels {
		return other
	}
	m.checks[id] = true
	return id
}

// shortCall is the last part of a procedure that exists.
func shortCall(procedure string) string {
	if allowed(procedure) == nil {
		return other
	}
	return procedure[strings.LastIndexByte(procedure, '/')+1:]
}

func roleLabel(role string) string {
	if slices.Contains([]string{roleAgent, roleRelyingParty, roleOperator, "owner", "engineer", "approver", "auditor", "scheduler", "verifier", "broker", "issuer"}, role) {
		return role
	}
	return other
}

// ready answers a load balancer's question.
func ready(o Options) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Cache-Control", "no-store")
		if err := o.Verifier.Ready(); err != nil {
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = w.Write([]byte("not ready: " + err.Error() + "\n"))
			return
		}
		_, _ = w.Write([]byte("ready\n"))
	})
}
