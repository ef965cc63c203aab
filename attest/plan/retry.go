package plan

import "fmt"

// MaxRetries bounds a plan's retry limit.
const MaxRetries = 10

// Retry is how often a job may be tried again. When it is tried again is the
// node's matter; how often its keys may be released is the approvers'.
type Retry struct {
	// Limit is how many attempts may follow the first: 1 to MaxRetries.
	Limit int `json:"limit"`
}

// Attempts returns how many attempts a plan allows: at least 1. Each needs a
// release of its keys.
func (p Plan) Attempts() int {
	if p.Retry == nil {
		return 1
	}
	return 1 + p.Retry.Limit
}

func (r *Retry) validate() error {
	if r != nil && (r.Limit < 1 || r.Limit > MaxRetries) {
		return fmt.Errorf("plan retry limit %d: want 1 to %d", r.Limit, MaxRetries)
	}
	return nil
}
