package plan

import "fmt"

const (
	// DefaultStopSeconds is how long a job may take to end where its plan says nothing.
	DefaultStopSeconds = 5
	// MaxStopSeconds bounds what a plan may ask for.
	MaxStopSeconds = 3600
)

// StopGrace is how many seconds a job that is told to end may take for it.
func (r Resources) StopGrace() int64 {
	if r.StopSeconds == 0 {
		return DefaultStopSeconds
	}
	return r.StopSeconds
}

func (r Resources) validate() error {
	if r.StopSeconds < 0 || r.StopSeconds > MaxStopSeconds {
		return fmt.Errorf("plan stop time %d s: want 1 to %d", r.StopSeconds, MaxStopSeconds)
	}
	return r.validateLimits()
}
