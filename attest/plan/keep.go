package plan

import "fmt"

// Who may read a job's output besides its submitter.
const (
	// ReadersOwners are the owners of the assets that the plan names.
	ReadersOwners = "owners"
	// ReadersEngineers is everybody with the role of an engineer at the node.
	ReadersEngineers = "engineers"
)

// MinRetainSeconds bounds how soon a node may forget a job's record: a day.
const MinRetainSeconds = 24 * 3600

// Retention is for how long a node keeps a job's record.
type Retention struct {
	// RetainSeconds after the job's end the node removes bundle and log.
	RetainSeconds int64 `json:"retainSeconds"`
}

func (p Plan) validateKeeping() error {
	switch p.Output.LogReaders {
	case "", ReadersOwners, ReadersEngineers:
	default:
		return fmt.Errorf("plan log readers %.40q: want %s or %s", p.Output.LogReaders, ReadersOwners, ReadersEngineers)
	}
	if e := p.Evidence; e != nil && (e.RetainSeconds < MinRetainSeconds || e.RetainSeconds > maxSeconds) {
		return fmt.Errorf("plan keeps evidence for %d s: want %d to %d", e.RetainSeconds, MinRetainSeconds, maxSeconds)
	}
	return nil
}
