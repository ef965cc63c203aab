package jobspec

import (
	"regexp"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

// resumeNone is what a job file may say where it resumes from nothing.
const resumeNone = "none"

// Keep says which sealed checkpoints stay in the sink; the others go once a newer
// one is countersigned. The newest always stays, and so does one that the broker
// has not countersigned. Without Keep all of them stay.
type Keep struct {
	// Last is how many of the newest stay; 1 if zero.
	Last int `yaml:"last,omitempty"`
	// Best keeps those with the best values of a metric.
	Best *Best `yaml:"best,omitempty"`
	// Every keeps the first of each so long time.
	Every Duration `yaml:"every,omitempty"`
}

// Best keeps the Count checkpoints with the best values of Metric. The job
// reports a value as a line of JSON on its standard output, with the
// checkpoint's name: {"checkpoint": "epoch-3", "accuracy": 0.87}.
type Best struct {
	Metric string `yaml:"metric"`
	// Want is "max" or "min".
	Want string `yaml:"want"`
	// Count is 1 if zero.
	Count int `yaml:"count,omitempty"`
}

var metricForm = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.-]{0,63}$`)

// maxKeep bounds each rule.
const maxKeep = 10_000

// checkpoints checks that part of a job file.
func (c *checker) checkpoints(p *Checkpoints, mounts map[string]bool) {
	if p == nil {
		return
	}
	if !source.InBucket(p.URI) {
		c.folder(p.URI, "checkpoints.uri", ", s3://bucket/prefix, gs://bucket/prefix or azblob://container/prefix")
	}
	c.mount(p.Mount, "checkpoints.mount", mounts)
	if p.Resume == "" {
		p.Resume = resumeNone
	}
	_, err := plan.ParseDigest(p.Resume)
	c.require(p.Resume == resumeNone || p.Resume == plan.ResumeLatest || err == nil, "checkpoints.resume",
		"%.120q: want %s, %s, or the digest of a checkpoint (coffer checkpoints ls)", p.Resume, resumeNone, plan.ResumeLatest)
	k := p.Keep
	if k == nil {
		return
	}
	c.require(k.Last > 0 || k.Best != nil || k.Every > 0, "checkpoints.keep", "want last, best or every")
	if b := k.Best; b != nil {
		c.require(b.Metric != "checkpoint", "checkpoints.keep.best.metric", "%.80q is no name of a number that the job reports", b.Metric)
	}
}

func (c *Checkpoints) plan() *plan.Checkpoints {
	if c == nil {
		return nil
	}
	p := &plan.Checkpoints{Asset: c.Asset, Mount: c.Mount}
	if c.Resume != resumeNone {
		p.Resume = c.Resume
	}
	return p
}
