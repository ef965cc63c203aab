package runner

import (
	"cmp"

	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// maxQueues bounds the queues of a node.
const maxQueues = 64

// maxWeight bounds a queue's weight.
const maxWeight = 1000

// Queue is a part of those who use a node, and what they may have of it. The zero value
// is nobody's.
type Queue struct {
	Name string `json:"name"`
	// Weight says how much a queue gets where several have jobs that wait: one of weight 2
	// twice as much as one of weight 1. 0 is 1.
	Weight int `json:"weight,omitempty"`
	// Limit bounds what the queue's jobs have together, also where the rest is idle. What
	// is zero is not bounded.
	Limit Share `json:"limit,omitzero"`
	// Users are the principals that may use it: "scheduler/cluster-1", "user/ada",
	// "engineer/*" for all of a kind, "*" for all.
	Users []string `json:"users"`
}

// Share is room and GPUs.
type Share struct {
	Room
	GPUs int `json:"gpus,omitempty"`
}

// plus adds t, or with a sign of -1 takes it away. What is more memory than a number can
// have is as much as it can: it fits nowhere.
func (s Share) plus(t Share, sign int64) Share {
	memory := s.MemoryBytes + sign*t.MemoryBytes
	if sign > 0 && t.MemoryBytes > math.MaxInt64-s.MemoryBytes {
		memory = math.MaxInt64
	}
	return Share{Room{s.Jobs + int(sign)*t.Jobs, s.CPUMillis + sign*t.CPUMillis, memory}, s.GPUs + int(sign)*t.GPUs}
}

// within reports whether s is no more than limit, where limit is not zero.
func (s Share) within(limit Share) bool {
	return (limit.Jobs == 0 || s.Jobs <= limit.Jobs) && (limit.CPUMillis == 0 || s.CPUMillis <= limit.CPUMillis) &&
		(limit.MemoryBytes == 0 || s.MemoryBytes <= limit.MemoryBytes) && (limit.GPUs == 0 || s.GPUs <= limit.GPUs)
}

// of is the largest part that s has of anything in total: the dominant share of DRF.
func (s Share) of(total Share) float64 {
	part := func(a, b int64) float64 {
		if b <= 0 {
			return 0
		}
		return float64(a) / float64(b)
	}
	return max(part(int64(s.Jobs), int64(total.Jobs)), part(s.CPUMillis, total.CPUMillis), part(s.MemoryBytes, total.MemoryBytes), part(int64(s.GPUs), int64(total.GPUs)))
}

// everybody is the queue of a node that names none.
func everybody() []Queue {
	return []Queue{{Name: jobspec.DefaultQueue, Weight: 1, Users: []string{"*"}}}
}

var (
	queueForm = regexp.MustCompile(jobspec.QueuePattern)
	userForm  = regexp.MustCompile(`^(\*|[a-z-]{1,32}/(\*|[A-Za-z0-9._@-]{1,128}))$`)
)

// checkQueues says whether queues are what a node can have, and fills in what is left
// out. Without any there is one for everybody.
func checkQueues(list []Queue) ([]Queue, error) {
	if len(list) == 0 {
		return everybody(), nil
	}
	if len(list) > maxQueues {
		return nil, fmt.Errorf("%d queues: want at most %d", len(list), maxQueues)
	}
	out := slices.Clone(list)
	for i := range out {
		q := &out[i]
		if !queueForm.MatchString(q.Name) || slices.ContainsFunc(out[:i], func(o Queue) bool { return o.Name == q.Name }) {
			return nil, fmt.Errorf("queue %.80q: want a name of its own: lower-case letters, digits, '-' and '.'", q.Name)
		}
		q.Weight = cmp.Or(q.Weight, 1)
		if q.Weight < 1 || q.Weight > maxWeight {
			return nil, fmt.Errorf("queue %s: weight %d: want 1 to %d", q.Name, q.Weight, maxWeight)
		}
		if q.Limit.Jobs < 0 || q.Limit.CPUMillis < 0 || q.Limit.MemoryBytes < 0 || q.Limit.GPUs < 0 {
			return nil, fmt.Errorf("queue %s: a limit is negative", q.Name)
		}
		if q.Limit.Jobs > math.MaxInt32 || q.Limit.CPUMillis > math.MaxInt32 || q.Limit.GPUs > math.MaxInt32 {
			return nil, fmt.Errorf("queue %s: a limit is larger than any node", q.Name)
		}
		if len(q.Users) == 0 {
			return nil, fmt.Errorf("queue %s: want users", q.Name)
		}
		for _, u := range q.Users {
			if !userForm.MatchString(u) {
				return nil, fmt.Errorf("queue %s: user %.80q: want KIND/NAME, KIND/* or *", q.Name, u)
			}
		}
	}
	return out, nil
}

// CheckQueues says whether queues are what a node can have.
func CheckQueues(list []Queue) error {
	_, err := checkQueues(list)
	return err
}

// Admits reports whether a principal may use the queue.
func (q Queue) Admits(principal string) bool {
	kind, name, ok := strings.Cut(principal, "/")
	if !ok || kind == "" || name == "" {
		return false
	}
	return slices.ContainsFunc(q.Users, func(u string) bool { return u == "*" || u == principal || u == kind+"/*" })
}

// queueName is the queue that a job file names, or the default.
func queueName(spec jobspec.Spec) string { return cmp.Or(spec.Queue, jobspec.DefaultQueue) }

// mayQueue refuses a job whose queue is not there, or not its submitter's, or whose
// limits are too small for the job ever to begin.
func (a *Agent) mayQueue(j *Job) error {
	name := queueName(j.spec)
	var l check.List
	i := slices.IndexFunc(a.queue.queues, func(q Queue) bool { return q.Name == name })
	switch {
	case i < 0:
		l.Fail("queue.unknown", "one of "+strings.Join(a.queue.names(j.submitter), ", "), name, "set queue in the job file to one of these: the call Capacity lists them")
	case !a.queue.queues[i].Admits(j.submitter):
		l.Fail("queue.user", "a user of the queue "+name, j.submitter, "ask who operates the node, or take one of: "+strings.Join(a.queue.names(j.submitter), ", "))
	case !a.queue.needs(j.plan.Resources).within(a.queue.queues[i].Limit):
		l.Fail("queue.limit", fmt.Sprintf("no more than the queue %s may have: %s", name, a.queue.queues[i].Limit), a.queue.needs(j.plan.Resources).String(), "ask for less, or take another queue")
	default:
		return nil
	}
	return check.Refuse("admit", l)
}

// String says what there is, for people.
func (s Share) String() string {
	var out []string
	if s.Jobs > 0 {
		out = append(out, fmt.Sprintf("%d jobs", s.Jobs))
	}
	if s.GPUs > 0 {
		out = append(out, fmt.Sprintf("%d GPUs", s.GPUs))
	}
	if s.CPUMillis > 0 {
		out = append(out, fmt.Sprintf("%dm of CPU", s.CPUMillis))
	}
	if s.MemoryBytes > 0 {
		out = append(out, fmt.Sprintf("%d MiB of memory", s.MemoryBytes>>20))
	}
	if len(out) == 0 {
		return "nothing"
	}
	return strings.Join(out, ", ")
}

// QueueLoad is how a queue stands.
type QueueLoad struct {
	Queue
	Used    Share
	Waiting int
}

// Queues says how the node's queues stand, in the order of its configuration.
func (a *Agent) Queues() []QueueLoad { return a.queue.loads() }
