package jobspec

import (
	"slices"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// DefaultQueue is the queue of jobs that name none. QueuePattern is the form of a
	// queue's name.
	DefaultQueue = "default"
	QueuePattern = namePattern
	// MaxPriority bounds a priority on both sides.
	MaxPriority = 100
	// DefaultBackoff is the pause before the second attempt; each later pause is
	// twice the one before, up to MaxBackoff.
	DefaultBackoff = Duration(10 * time.Second)
	MaxBackoff     = Duration(time.Hour)
	// DefaultMaxWait bounds how long a job waits for approvals and for room.
	DefaultMaxWait = Duration(7 * 24 * time.Hour)
)

// Retry says when a job that failed is tried again. Only Limit is part of the plan.
type Retry struct {
	Limit int `yaml:"limit"`
	// OnExitCodes are exit codes of the job, 1 to 255.
	OnExitCodes []int `yaml:"onExitCodes,omitempty"`
	// OnEvents are reason codes out of RetryEvents; all of them if both lists are
	// absent.
	OnEvents []string `yaml:"onEvents,omitempty"`
	Backoff  Duration `yaml:"backoff,omitempty"`
}

// RetryEvents are the reason codes after which a job can be tried again: the
// machine's failures, and never a refusal, a revocation or a cancellation.
func RetryEvents() []string {
	return []string{
		"agent-restarted", "holder-lost", "trace-lost", "lease-lapsed", "deadline", "no-space",
		"verifier-unavailable", "broker-unavailable", "containerd-unavailable",
	}
}

// After reports whether a job that ended with a reason code and an exit code is
// tried again, if it has attempts left.
func (r *Retry) After(reason string, exitCode int) bool {
	switch {
	case r == nil:
		return false
	case reason == "exit-code":
		return slices.Contains(r.OnExitCodes, exitCode)
	case len(r.OnExitCodes) == 0 && len(r.OnEvents) == 0:
		// A job that ran into its deadline would do so again.
		return reason != "deadline" && slices.Contains(RetryEvents(), reason)
	}
	return slices.Contains(r.OnEvents, reason)
}

// Pause is the time between the end of an attempt, counted from 1, and the next.
func (r *Retry) Pause(attempt int) time.Duration {
	d := r.Backoff
	for range attempt - 1 {
		if d >= MaxBackoff/2 {
			return time.Duration(MaxBackoff)
		}
		d *= 2
	}
	return time.Duration(d)
}

// plan is the part of a retry that is approved.
func (r *Retry) plan() *plan.Retry {
	if r == nil {
		return nil
	}
	return &plan.Retry{Limit: r.Limit}
}

func (c *checker) retry(s *Spec) {
	if s.MaxWait == 0 {
		s.MaxWait = DefaultMaxWait
	}
	c.require(s.StopGrace >= 0 && s.StopGrace <= Duration(plan.MaxStopSeconds*time.Second), "stopGrace", "want at most 1h")
	c.require(s.StopGrace%Duration(time.Second) == 0, "stopGrace", "want whole seconds")
	r := s.Retry
	if r == nil {
		return
	}
	if r.Backoff == 0 {
		r.Backoff = DefaultBackoff
	}
	c.require(r.Backoff <= MaxBackoff, "retry.backoff", "want at most 1h")
}
