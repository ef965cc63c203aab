package runner

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

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

// whole fills in what the machine has where r is silent.
func (r Room) whole() (Room, error) {
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return Room{}, fmt.Errorf("read memory size: %w", err)
	}
	r.Jobs = cmp.Or(r.Jobs, DefaultJobs)
	r.CPUMillis = cmp.Or(r.CPUMillis, cpuShare*int64(runtime.NumCPU())*1000)
	r.MemoryBytes = cmp.Or(r.MemoryBytes, int64(si.Totalram)*int64(si.Unit)) //nolint:gosec // a machine's size fits
	if r.Jobs < 0 || r.CPUMillis < 0 || r.MemoryBytes < 0 {
		return Room{}, fmt.Errorf("room for jobs %+v is negative", r)
	}
	return r, nil
}

// place is a job that waits for room, or that has it.
type place struct {
	id       string
	queue    string
	priority int
	need     Room
	gpus     int
	since    time.Time
	// gang is nil for a job that begins alone.
	gang *gangPlace

	// given is closed once the job has its room; got are then its GPUs.
	given chan struct{}
	got   []string
	// moved has a value when the job's position has changed.
	moved    chan struct{}
	position int
}

func newPlace(id, queue string, priority int, since time.Time, r plan.Resources) *place {
	return &place{
		id: id, queue: queue, priority: priority, since: since, need: Room{1, r.CPUMillis, r.MemoryBytes}, gpus: r.GPUs,
		given: make(chan struct{}), moved: make(chan struct{}, 1),
	}
}

// queue gives jobs their room. The queue whose jobs have least for its weight is next, and
// in it who has the highest priority, then who was submitted first. A job that needs less
// than what is left may pass one that needs more, for as long as overtaken says.
type queue struct {
	now    func() time.Time
	queues []Queue

	mu      sync.Mutex // guards what follows
	total   Room
	used    Room
	shares  map[string]Share // what the jobs of each queue have
	free    []string         // GPUs that no job has
	gpus    int
	waiting []*place
	gangs   map[gangKey]*gang // those of which a job has room
}

// unit is what begins at once: one job, or all of a gang.
type unit struct {
	members []*place
	need    Share
	// since is when the last of its jobs was submitted: before, it could not begin.
	since time.Time
}

// newQueue returns a queue of a node with nothing in use. queues are those of checkQueues.
func newQueue(total Room, gpus []string, queues []Queue) *queue {
	return &queue{now: time.Now, queues: queues, shares: map[string]Share{}, gangs: map[gangKey]*gang{}, total: total, free: slices.Clone(gpus), gpus: len(gpus)}
}

// capped is what a job takes of the node: a job may have a limit on cores that is
// more than the node has, and then has them all.
func (q *queue) capped(p *place) Room {
	n := p.need
	n.CPUMillis = min(n.CPUMillis, q.total.CPUMillis)
	return n
}

// fits reports whether there is room for what jobs need. q.mu is held.
func (q *queue) fits(n Share) bool {
	return q.used.Jobs+n.Jobs <= q.total.Jobs && q.used.CPUMillis+n.CPUMillis <= q.total.CPUMillis &&
		n.MemoryBytes <= q.total.MemoryBytes-q.used.MemoryBytes && n.GPUs <= len(q.free)
}

// lacks says what a job that waits lacks. q.mu is held.
func (q *queue) lacks(p *place) string {
	need, out := q.share(p), []string{}
	if p.gang != nil {
		u, why := q.gangOf(p, q.waiting)
		if u == nil {
			return why
		}
		need = u.need
		if len(u.members) > 1 {
			out = append(out, why)
		}
	}
	n := need.Room
	if q.used.Jobs+n.Jobs > q.total.Jobs {
		out = append(out, fmt.Sprintf("one of %d places", q.total.Jobs))
	}
	if need.GPUs > len(q.free) {
		out = append(out, fmt.Sprintf("%d GPUs, %d of %d are free", need.GPUs, len(q.free), q.gpus))
	}
	if left := q.total.CPUMillis - q.used.CPUMillis; n.CPUMillis > left {
		out = append(out, fmt.Sprintf("%dm of CPU, %dm are free", n.CPUMillis, left))
	}
	if left := q.total.MemoryBytes - q.used.MemoryBytes; n.MemoryBytes > left {
		out = append(out, fmt.Sprintf("%d MiB of memory, %d are free", n.MemoryBytes>>20, left>>20))
	}
	if i := slices.IndexFunc(q.queues, func(c Queue) bool { return c.Name == p.queue }); i >= 0 {
		if c := q.queues[i]; !q.shares[c.Name].plus(need, 1).within(c.Limit) {
			out = append(out, fmt.Sprintf("room of the queue %s: its jobs have %s of %s", c.Name, q.shares[c.Name], c.Limit))
		}
	}
	if len(out) == 0 {
		return "jobs before it"
	}
	return strings.Join(out, "; ")
}

// enter begins a job's wait in a queue that is there. The job then waits for given or leaves.
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
		q.leaveGang(p)
	}
	q.advance()
}

// release takes a job's room back. q.mu is held.
func (q *queue) release(p *place) {
	n := q.capped(p)
	q.used.Jobs -= n.Jobs
	q.used.CPUMillis -= n.CPUMillis
	q.used.MemoryBytes -= n.MemoryBytes
	q.shares[p.queue] = q.shares[p.queue].plus(q.share(p), -1)
	q.free = append(q.free, p.got...)
	p.got = nil
}

// take uses room. q.mu is held, and the job fits or was there before this agent.
func (q *queue) take(p *place, gpus []string) {
	n := q.capped(p)
	q.used.Jobs += n.Jobs
	q.used.CPUMillis += n.CPUMillis
	q.used.MemoryBytes += n.MemoryBytes
	q.shares[p.queue] = q.shares[p.queue].plus(q.share(p), 1)
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
	q.rejoin(p)
	return nil
}

// advance begins the jobs that can begin and tells the others where they are.
// q.mu is held.
func (q *queue) advance() {
	lines := q.units()
	begun := map[*place]bool{}
	for q.used.Jobs < q.total.Jobs {
		i := q.turn(lines)
		if i < 0 {
			break
		}
		name, limit := q.queues[i].Name, q.queues[i].Limit
		u := lines[name][0]
		lines[name] = lines[name][1:]
		long := q.now().Sub(u.since) > overtaken
		switch {
		case !q.shares[name].plus(u.need, 1).within(limit):
			// What a queue's own limit keeps back keeps no other queue back.
			if long {
				lines[name] = nil
			}
		case q.fits(u.need):
			q.form(u)
			for _, p := range u.members {
				gpus := slices.Clone(q.free[:p.gpus])
				q.free = slices.Clone(q.free[p.gpus:])
				q.take(p, gpus)
				begun[p] = true
			}
		case len(u.members) > 1 && (!u.need.within(Share{q.total, q.gpus}) || u.need.GPUs > q.gpus):
			// The node will never have room for it: it keeps nobody back.
		case long:
			clear(lines)
		}
	}
	q.waiting = slices.DeleteFunc(q.waiting, func(p *place) bool { return begun[p] })
	at := map[string]int{}
	for _, p := range q.waiting {
		at[p.queue]++
		if p.position != at[p.queue] {
			p.position = at[p.queue]
			select {
			case p.moved <- struct{}{}:
			default:
			}
		}
	}
}

// turn returns which queue is next of those with jobs in lines: the one whose jobs have the
// least part of the node for its weight, and of two that have the same, the one whose job was
// submitted first. It is -1 where none has any. q.mu is held.
func (q *queue) turn(lines map[string][]*unit) int {
	next, least := -1, 0.0
	for i, c := range q.queues {
		line := lines[c.Name]
		if len(line) == 0 {
			continue
		}
		part := q.shares[c.Name].of(Share{q.total, q.gpus}) / float64(c.Weight)
		if next < 0 || part < least || part == least && line[0].since.Before(lines[q.queues[next].Name][0].since) {
			next, least = i, part
		}
	}
	return next
}

// share is what a job takes of its queue.
func (q *queue) share(p *place) Share { return Share{q.capped(p), p.gpus} }

// needs is what a job with such resources takes.
func (q *queue) needs(r plan.Resources) Share { return q.share(newPlace("", "", 0, time.Time{}, r)) }

// names lists the queues that a principal may use.
func (q *queue) names(principal string) []string {
	out := []string{}
	for _, c := range q.queues {
		if c.Admits(principal) {
			out = append(out, c.Name)
		}
	}
	return out
}

// has reports whether there is a queue.
func (q *queue) has(name string) bool {
	return slices.ContainsFunc(q.queues, func(c Queue) bool { return c.Name == name })
}

// loads says how the queues stand.
func (q *queue) loads() []QueueLoad {
	q.mu.Lock()
	defer q.mu.Unlock()
	waiting := map[string]int{}
	for _, p := range q.waiting {
		waiting[p.queue]++
	}
	out := make([]QueueLoad, 0, len(q.queues))
	for _, c := range q.queues {
		out = append(out, QueueLoad{c, q.shares[c.Name], waiting[c.Name]})
	}
	return out
}

// at says where a job waits in its queue and what it lacks; position 0 means that it does
// not wait here.
func (q *queue) at(id string) (position int, lacks string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, p := range q.waiting {
		if p.id == id {
			return p.position, q.lacks(p)
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
