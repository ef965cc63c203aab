package jobspec

import "github.com/coffer-run/coffer/attest/plan"

// Gang is a set of jobs of one submitter that begin together.
type Gang struct {
	Name string `yaml:"name"`
	Size int    `yaml:"size"`
}

func (g *Gang) plan() *plan.Gang {
	if g == nil {
		return nil
	}
	return &plan.Gang{Name: g.Name, Size: g.Size}
}

func (c *checker) gang(s *Spec) {
	if s.Gang == nil {
		return
	}
	c.require(s.Retry == nil, "gang", "a job of a gang is not tried again by itself: leave out retry, and submit all of them again")
	c.require(s.Reseal == nil, "gang", "a job that reseals is in no gang")
}
