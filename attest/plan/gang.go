package plan

import (
	"fmt"
	"regexp"
)

// MaxGang bounds the jobs of a gang.
const MaxGang = 64

// Gang has a job begin together with others of its submitter, and end when one of them
// fails. Each has its own sandbox, keys and evidence.
type Gang struct {
	// Name and Size are alike in all of them. Size counts this job too.
	Name string `json:"name"`
	Size int    `json:"size"`
}

var gangForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$`)

func (g *Gang) validate() error {
	switch {
	case g == nil:
		return nil
	case !gangForm.MatchString(g.Name):
		return fmt.Errorf("plan names the gang %.80q: want lower-case letters, digits, '-' and '.', at most 63", g.Name)
	case g.Size < 2 || g.Size > MaxGang:
		return fmt.Errorf("plan has a gang of %d jobs: want 2 to %d", g.Size, MaxGang)
	}
	return nil
}

// validateGang says whether a job may be in a gang: one that is tried again would begin
// without the others.
func (p Plan) validateGang() error {
	if err := p.Gang.validate(); err != nil {
		return err
	}
	if p.Gang != nil && (p.Retry != nil || p.Reseal != nil) {
		return fmt.Errorf("plan has a gang and retries or reseals: want one of them")
	}
	return nil
}
