package plan

import (
	"errors"
	"fmt"
)

// ResumeLatest stands in Checkpoints.Resume for the newest checkpoint that the
// broker countersigned for a job of this very plan, under the same asset.
const ResumeLatest = "latest"

// ResumeDigest is the digest that c names to resume from, empty if it names none.
func (c *Checkpoints) ResumeDigest() Digest {
	if c == nil || c.Resume == ResumeLatest {
		return ""
	}
	return Digest(c.Resume)
}

// ResumesLatest says that jobs of the plan go on from each other's checkpoints.
func (c *Checkpoints) ResumesLatest() bool { return c != nil && c.Resume == ResumeLatest }

func (c *Checkpoints) validate() error {
	switch {
	case c == nil:
		return nil
	case c.Asset == "" || c.Mount == "":
		return errors.New("plan checkpoints are incomplete")
	case c.Resume != "" && c.Resume != ResumeLatest && Digest(c.Resume).Bytes() == nil:
		return fmt.Errorf("plan resumes from %.120q: want %s or the digest of a checkpoint", c.Resume, ResumeLatest)
	}
	return nil
}
