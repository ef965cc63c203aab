package jobspec

import (
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

const (
	// MaxApprovals bounds the groups that a job file expects to approve.
	MaxApprovals = 8

	ccOff           = "off"
	readersNobody   = "submitter"
	minRetain       = plan.MinRetainSeconds * Duration(time.Second)
	maxLong         = Duration(10 * 365 * 24 * time.Hour)
	wantWholeSecond = "want whole seconds, at most ten years"
)

// Budget is what all attempts of a job may use together.
type Budget struct {
	Time Duration `yaml:"time,omitempty"`
	// GPUTime counts each GPU: two GPUs use an hour of it in half an hour.
	GPUTime Duration `yaml:"gpuTime,omitempty"`
}

// Evidence is how the job's record is kept.
type Evidence struct {
	Retain Duration `yaml:"retain"`
}

func (c *checker) keeping(s *Spec) {
	long := func(d Duration, field string) {
		c.require(d%Duration(time.Second) == 0 && d <= maxLong, field, wantWholeSecond)
	}
	if b := s.Budget; b != nil {
		c.require(b.Time > 0 || b.GPUTime > 0, "budget", "want time, gpuTime or both")
		c.require(b.GPUTime == 0 || s.Resources.GPUs > 0, "budget.gpuTime", "the job asks for no GPUs")
		c.require(b.GPUTime == 0 || b.GPUTime >= Duration(s.Resources.GPUs)*Duration(time.Second), "budget.gpuTime", "want at least a second for each GPU")
		long(b.Time, "budget.time")
		long(b.GPUTime, "budget.gpuTime")
	}
	if cc := s.Resources.CC; cc != "" && cc != ccOff {
		c.require(s.Resources.GPUs > 0, "resources.cc", "the job asks for no GPUs")
	}
	if e := s.Evidence; e != nil {
		c.require(e.Retain >= minRetain, "evidence.retain", "want at least 24h")
		long(e.Retain, "evidence.retain")
	}
}

// planKeeping adds to the plan what s says of budget, evidence, readers and
// confidential computing.
func (s Spec) planKeeping(p *plan.Plan) {
	if cc := s.Resources.CC; cc != ccOff {
		p.Resources.CC = cc
	}
	if r := s.Output.LogReaders; r != readersNobody {
		p.Output.LogReaders = r
	}
	if b := s.Budget; b != nil {
		p.Budget = &plan.Budget{Seconds: seconds(b.Time), GPUSeconds: seconds(b.GPUTime)}
	}
	if e := s.Evidence; e != nil {
		p.Evidence = &plan.Retention{RetainSeconds: seconds(e.Retain)}
	}
}

func seconds(d Duration) int64 { return int64(time.Duration(d) / time.Second) }
