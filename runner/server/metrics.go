package server

import (
	"context"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/coffer-run/coffer/runner"
	"github.com/coffer-run/coffer/runner/api/agent/v1/agentv1connect"
)

// metricsPath has Prometheus metrics, for operators.
const metricsPath = "/metrics"

// metrics counts calls, and reads the rest from the agent when it is asked. Nothing
// that a caller or a job can choose becomes a label: queues are those of the configuration.
type metrics struct {
	registry *prometheus.Registry
	calls    *prometheus.CounterVec
	took     *prometheus.HistogramVec
	streams  prometheus.Gauge
}

func newMetrics(agent *runner.Agent) *metrics {
	name := func(s string) string { return "coffer_agent_" + s }
	m := &metrics{
		registry: prometheus.NewRegistry(),
		calls:    prometheus.NewCounterVec(prometheus.CounterOpts{Name: name("calls_total"), Help: "Calls by procedure and Connect code."}, []string{"call", "code"}),
		took: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: name("call_duration_seconds"), Help: "Time from the request to the answer of calls that are no streams.",
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
		}, []string{"call"}),
		streams: prometheus.NewGauge(prometheus.GaugeOpts{Name: name("streams"), Help: "Open streams: watched jobs and followed logs."}),
	}
	m.registry.MustRegister(m.calls, m.took, m.streams, load{agent}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}

// call counts a call that was answered, with or without an error.
func (m *metrics) call(procedure string, err error, took time.Duration) {
	code := "ok"
	if err != nil {
		code = connect.CodeOf(err).String()
	}
	call := shortCall(procedure)
	m.calls.WithLabelValues(call, code).Inc()
	if !streams(procedure) {
		m.took.WithLabelValues(call).Observe(took.Seconds())
	}
}

// shortCall is the last part of a procedure that exists.
func shortCall(procedure string) string {
	if len(allowed[procedure]) == 0 {
		return "other"
	}
	return procedure[strings.LastIndexByte(procedure, '/')+1:]
}

// streams reports whether a call answers with a stream.
func streams(procedure string) bool {
	return procedure == agentv1connect.AgentServiceWatchProcedure || procedure == agentv1connect.AgentServiceLogsProcedure
}

// load shows what the node has and does at the moment at which it is asked.
type load struct{ agent *runner.Agent }

var (
	jobsMetric  = prometheus.NewDesc("coffer_agent_jobs", "Jobs that have not ended, by whether they have room (running) or wait for approvals, a retry's time or room (waiting).", []string{"state"}, nil)
	placesTotal = prometheus.NewDesc("coffer_agent_places_total", "How many jobs may run at once.", nil, nil)
	gpusMetric  = prometheus.NewDesc("coffer_agent_gpus", "GPUs, by whether a job has them (used) or none does (free).", []string{"state"}, nil)
	cpuTotal    = prometheus.NewDesc("coffer_agent_cpu_cores_total", "Cores that jobs may have together, as limits.", nil, nil)
	cpuFree     = prometheus.NewDesc("coffer_agent_cpu_cores_free", "Cores that no running job has as its limit.", nil, nil)
	memoryTotal = prometheus.NewDesc("coffer_agent_memory_bytes_total", "Memory that jobs may have together.", nil, nil)
	memoryFree  = prometheus.NewDesc("coffer_agent_memory_bytes_free", "Memory that no running job has.", nil, nil)
	attestedTo  = prometheus.NewDesc("coffer_agent_attested_until_seconds", "Until when the newest result that a verifier signed for a job of this node may be used, in seconds since 1970; 0 before the first.", nil, nil)
	queueJobs   = prometheus.NewDesc("coffer_agent_queue_jobs", "Jobs of a queue, by whether they have room (running) or wait for it (waiting).", []string{"queue", "state"}, nil)
	endedTotal  = prometheus.NewDesc("coffer_agent_jobs_ended_total", "Jobs that this agent saw end, by state and reason code. The reason of every rule of the node is \"rule\".", []string{"state", "reason"}, nil)
)

// Describe implements prometheus.Collector.
func (load) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{jobsMetric, placesTotal, gpusMetric, cpuTotal, cpuFree, memoryTotal, memoryFree, attestedTo, queueJobs, endedTotal} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (l load) Collect(out chan<- prometheus.Metric) {
	now := l.agent.Load()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(jobsMetric, float64(now.Running), "running")
	gauge(jobsMetric, float64(now.Waiting), "waiting")
	gauge(placesTotal, float64(now.Total.Jobs))
	gauge(gpusMetric, float64(now.GPUs-now.FreeGPUs), "used")
	gauge(gpusMetric, float64(now.FreeGPUs), "free")
	gauge(cpuTotal, float64(now.Total.CPUMillis)/1000)
	gauge(cpuFree, float64(now.Free.CPUMillis)/1000)
	gauge(memoryTotal, float64(now.Total.MemoryBytes))
	gauge(memoryFree, float64(now.Free.MemoryBytes))
	for _, q := range l.agent.Queues() {
		gauge(queueJobs, float64(q.Used.Jobs), q.Name, "running")
		gauge(queueJobs, float64(q.Waiting), q.Name, "waiting")
	}
	until := 0.0
	if !now.Attested.Until.IsZero() {
		until = float64(now.Attested.Until.Unix())
	}
	gauge(attestedTo, until)
	for end, n := range l.agent.Ended() {
		out <- prometheus.MustNewConstMetric(endedTotal, prometheus.CounterValue, float64(n), string(end.State), end.Reason)
	}
}

// counted counts streams, and every call.
func (g *guard) counted(ctx context.Context, procedure string, f func(context.Context) error) error {
	began := time.Now()
	if streams(procedure) {
		g.metrics.streams.Inc()
		defer g.metrics.streams.Dec()
	}
	err := f(ctx)
	g.metrics.call(procedure, err, time.Since(began))
	return err
}
