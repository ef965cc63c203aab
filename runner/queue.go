package runner

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

// overtaken is how long a job lets others pass that need less than it does. Then
// nothing behind it begins before it.
const overtaken = 10 * time.Minute

// Room is what a node has for jobs, what one needs, or what is left.
type Room struct {
	// Jobs is how many run at once.
	Jobs int `json:"jobs,omitempty"`
	// CPUMillis is in thousandths of a core.
	CPUMillis int64 `json:"cpuMillis,omitempty"`
	// MemoryBytes holds regions too: a job's opened inputs count against its memory.
	MemoryBytes int64 `json:"memoryBytes,omitempty"`
}

// place is a job that waits for room, or that has it.
type place struct {
	id       string
	priority int
	need     Room
	gpus     int
	since    time.Time

	// given is closed once the job has its room; got are then its GPUs.
	given chan struct{}
	got   []string
	// moved has a value when the job's position has changed.
	moved    chan struct{}
	position int
}

func newPlace(id string, priority int, since time.Time, r plan.Resources) *place {
	return &place{
		id: id, priority: priority, since: since, need: Room{1, r.CPUMillis, r.MemoryBytes}, gpus: r.GPUs,
		given: make(chan struct{}), moved: make(chan struct{}, 1),
	}
}

// queue gives jobs their room: those of a higher priority first, then those that
// were submitted first. A job that needs less than what is left may pass one that
// needs more, for as long as overtaken says.
type queue struct {
	now func() time.Time

	mu      sync.Mutex // guards what follows
	total   Room
	used    Room
	free    []string // GPUs that no job has
	gpus    int
	waiting []*place
}

func newQueue(total Room, gpus []string) *queue {
	return &queue{now: time.Now, total: total, free: slices.Clone(gpus), gpus: len(gpus)}
}

// capped is what a job takes of the node: a job may have a limit on cores that is
// more than the node has, and then has them all.
func (q *queue) capped(p *place) Room {
	n := p.need
	n.CPUMillis = min(n.CPUMillis, q.total.CPUMillis)
	return n
}

// fits reports whether there is room for a job. q.mu is held.
func (q *queue) fits(p *place) bool {
	n := q.capped(p)
	return q.used.Jobs+n.Jobs <= q.total.Jobs && q.used.CPUMillis+n.CPUMillis <= q.total.CPUMillis &&
		q.used.MemoryBytes+n.MemoryBytes <= q.total.MemoryBytes && p.gpus <= len(q.free)
}

// lacks says what a job that waits lacks. q.mu is held.
func (q *queue) lacks(p *place) string {
	n, out := q.capped(p), []string{}
	if q.used.Jobs+n.Jobs > q.total.Jobs {
		out = append(out, fmt.Sprintf("one of %d places", q.total.Jobs))
	}
	if p.gpus > len(q.free) {
		out = append(out, fmt.Sprintf("%d GPUs, %d of %d are free", p.gpus, len(q.free), q.gpus))
	}
	if left := q.total.CPUMillis - q.used.CPUMillis; n.CPUMillis > left {
		out = append(out, fmt.Sprintf("%dm of CPU, %dm are free", n.CPUMillis, left))
	}
	if left := q.total.MemoryBytes - q.used.MemoryBytes; n.MemoryBytes > left {
		out = append(out, fmt.Sprintf("%d MiB of memory, %d are free", n.MemoryBytes>>20, left>>20))
	}
	if len(out) == 0 {
		return "jobs before it"
	}
	return strings.Join(out, "; ")
}

// enter begins a job's wait. The job then waits for given or leaves.
func (q *queue) enter(p *place) {
	q.mu.Lock()
	defer q.mu.Unlock()
	i, _ := slices.BinarySearchFunc(q.waiting, p, func(a, b *place) int {
		return cmp.Or(cmp.Compare(b.priority, a.priority), a.since.Compare(b.since), cmp.Compare(a.id, b.id))
	})
	q.waiting = slices.Insert(q.waiting, i, p)
	q.advance()
}

// leave ends a wait, and gives back what the job may have been given meanwhile.
func (q *queue) leave(p *place) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if i := slices.Index(q.waiting, p); i >= 0 {
		q.waiting = slices.Delete(q.waiting, i, i+1)
	} else {
		q.release(p)
	}
	q.advance()
}

// release takes a job's room back. q.mu is held.
func (q *queue) release(p *place) {
	n := q.capped(p)
	q.used.Jobs -= n.Jobs
	q.used.CPUMillis -= n.CPUMillis
	q.used.MemoryBytes -= n.MemoryBytes
	q.free = append(q.free, p.got...)
	p.got = nil
}

// take uses room. q.mu is held, and the job fits or was there before this agent.
func (q *queue) take(p *place, gpus []string) {
	n := q.capped(p)
	q.used.Jobs += n.Jobs
	q.used.CPUMillis += n.CPUMillis
	q.used.MemoryBytes += n.MemoryBytes
	p.got = gpus
	close(p.given)
}

// adopt gives a job that runs already the room and the very GPUs that it has.
func (q *queue) adopt(p *place, gpus []string) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.used.Jobs >= q.total.Jobs {
		return fmt.Errorf("more jobs are left over than this agent runs")
	}
	free := slices.Clone(q.free)
	for _, g := range gpus {
		i := slices.Index(free, g)
		if i < 0 {
			return fmt.Errorf("GPU %.80s of the job is gone or another job's", g)
		}
		free = slices.Delete(free, i, i+1)
	}
	q.free = free
	q.take(p, slices.Clone(gpus))
	return nil
}

// advance begins the jobs that can begin and tells the others where they are.
// q.mu is held.
func (q *queue) advance() {
	kept := q.waiting[:0:0]
	blocked := false
	for _, p := range q.waiting {
		if !blocked && q.fits(p) {
			gpus := slices.Clone(q.free[:p.gpus])
			q.free = slices.Clone(q.free[p.gpus:])
			q.take(p, gpus)
			continue
		}
		blocked = blocked || q.now().Sub(p.since) > overtaken
		kept = append(kept, p)
	}
	q.waiting = kept
	for i, p := range q.waiting {
		if p.position != i+1 {
			p.position = i + 1
			select {
			case p.moved <- struct{}{}:
			default:
			}
		}
	}
}

// at says where a job waits and what it lacks; position 0 means that it does not
// wait here.
func (q *queue) at(id string) (position int, lacks string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for i, p := range q.waiting {
		if p.id == id {
			return i + 1, q.lacks(p)
		}
	}
	return 0, ""
}

// look returns what the node has, what is left of it, and its free GPUs.
func (q *queue) look() (total, left Room, gpus int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.total, Room{q.total.Jobs - q.used.Jobs, max(0, q.total.CPUMillis-q.used.CPUMillis), max(0, q.total.MemoryBytes-q.used.MemoryBytes)}, len(q.free)
}
