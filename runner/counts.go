package runner

import (
	"maps"
	"strings"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/attest/receipt"
	"github.com/coffer-run/coffer/runner/journal"
)

// Attested is the newest result that a verifier signed for a job of the node. The zero
// value is none.
type Attested struct {
	// At and Until are by the verifier's clock: until then the result may be used to
	// ask for keys.
	At, Until time.Time
	Policy    plan.Policy
	Simulated bool
}

// attestedBy keeps what a verifier said, for those who ask how the node stands. No
// decision hangs on it: each job is attested by itself.
func (a *Agent) attestedBy(v receipt.Verified) {
	r := v.Result()
	got := Attested{At: time.Unix(r.IssuedAt, 0), Until: time.Unix(r.Expires, 0), Policy: r.Policy, Simulated: r.Simulated}
	a.mu.Lock()
	defer a.mu.Unlock()
	if got.Until.After(a.newest.Until) {
		a.newest = got
	}
}

// Ending is a way in which jobs end.
type Ending struct {
	State  journal.State
	Reason string
}

// countEnd counts a job that has ended. The rules of a node are as many as its
// operator likes: their codes are counted as one.
func (a *Agent) countEnd(end journal.Job) {
	reason := end.Reason
	if strings.HasPrefix(reason, bundle.ReasonRule) {
		reason = "rule"
	}
	e := Ending{end.State, reason}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.endings == nil {
		a.endings = map[Ending]uint64{}
	}
	a.endings[e]++
}

// Ended counts the jobs that this agent saw end.
func (a *Agent) Ended() map[Ending]uint64 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.endings)
}
