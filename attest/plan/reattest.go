package plan

import "fmt"

const (
	// DefaultReattestWithin is how many seconds a late attestation may take where a
	// plan says nothing.
	DefaultReattestWithin = 60
	// MinReattest and MaxReattest bound the seconds between two attestations. A
	// node that attests more often does little else.
	MinReattest = 2
	MaxReattest = 7 * 24 * 3600
	// MaxReattestWithin bounds the seconds that a late one may take.
	MaxReattestWithin = 3600
)

// What a job does whose attestation failed while it ran.
const (
	// ReattestStop ends it. It is what an absent OnFailure means.
	ReattestStop = "stop"
	// ReattestPause freezes it until an attestation affirms, for WithinSeconds and
	// its lease at most.
	ReattestPause = "pause"
)

// Reattest has a running job attest again: its node collects evidence for the same
// keys under a fresh nonce, and the broker is shown the result.
type Reattest struct {
	// EverySeconds is the time from one attestation to the next.
	EverySeconds int64 `json:"everySeconds"`
	// WithinSeconds is how long after that the next may take;
	// DefaultReattestWithin if absent.
	WithinSeconds int64 `json:"withinSeconds,omitempty"`
	// OnFailure is ReattestStop if absent.
	OnFailure string `json:"onFailure,omitempty"`
}

// Within is WithinSeconds or its default.
func (r *Reattest) Within() int64 {
	if r.WithinSeconds == 0 {
		return DefaultReattestWithin
	}
	return r.WithinSeconds
}

// MaxAge is how old, in seconds, a job's newest result may become. 0 is for a plan
// that asks for no second attestation.
func (r *Reattest) MaxAge() int64 {
	if r == nil {
		return 0
	}
	return r.EverySeconds + r.Within()
}

// Pauses says that a failed attestation freezes the job and does not end it yet.
func (r *Reattest) Pauses() bool { return r != nil && r.OnFailure == ReattestPause }

func (r *Reattest) validate() error {
	switch {
	case r == nil:
		return nil
	case r.EverySeconds < MinReattest || r.EverySeconds > MaxReattest:
		return fmt.Errorf("plan attests again every %d s: want %d to %d", r.EverySeconds, MinReattest, MaxReattest)
	case r.WithinSeconds < 0 || r.WithinSeconds > MaxReattestWithin:
		return fmt.Errorf("plan gives a late attestation %d s: want 1 to %d", r.WithinSeconds, MaxReattestWithin)
	case r.OnFailure != "" && r.OnFailure != ReattestStop && r.OnFailure != ReattestPause:
		return fmt.Errorf("plan says %.40q of a failed attestation: want %s or %s", r.OnFailure, ReattestStop, ReattestPause)
	}
	return nil
}
