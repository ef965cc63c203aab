package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/runner/journal"
)

// Gangs are jobs of one submitter that begin together and end together (design note
// 019). Each has its own sandbox, keys and evidence: what they share is when they begin,
// and that one that fails ends the others.

// gangKey is what jobs of a gang have in common. Whoever differs in any of it waits for
// a gang of its own.
type gangKey struct {
	submitter, queue, name string
	size, priority         int
}

func (k gangKey) String() string { return fmt.Sprintf("the gang %s of %d", k.name, k.size) }

// gangPlace is a job's part in a gang.
type gangPlace struct {
	key gangKey
	// with are the ids of the gang that was formed, this job's among them. They are
	// there once the job has room, and again when an agent takes the job up.
	with []string
	// done counts those of with that have succeeded already.
	done int
}

// gang is one of which at least one job has room.
type gang struct {
	with []string
	in   map[string]bool
}

// gangState is what a job knows of its gang.
type gangState struct {
	mu   sync.Mutex // guards with
	with []string   // once the gang has room
	// done counts those of with that have succeeded, and broken is one that ended
	// otherwise: both before this agent took the job up.
	done   int
	broken string
	// ready is closed once the job can start.
	ready chan struct{}
	once  sync.Once
}

// errGang ends the jobs of a gang when one of them did not succeed.
var errGang = errors.New("another job of its gang did not succeed")

// units groups the jobs that wait by queue, in their order, into what begins at once. A
// gang that is not whole, or whose name another one of the same jobs' runs under, is not
// among them. q.mu is held.
func (q *queue) units() map[string][]*unit {
	lines, gangs := map[string][]*unit{}, map[gangKey][]*place{}
	for _, p := range q.waiting {
		if p.gang != nil {
			gangs[p.gang.key] = append(gangs[p.gang.key], p)
		} else {
			lines[p.queue] = append(lines[p.queue], q.single(p))
		}
	}
	for _, members := range gangs {
		done := map[*place]bool{}
		for _, p := range members {
			if u, _ := q.gangOf(p, members); u != nil && !done[u.members[0]] {
				done[u.members[0]] = true
				lines[p.queue] = append(lines[p.queue], u)
			} else if len(q.gangs) == 0 {
				break
			}
		}
	}
	// A gang is as old as its youngest.
	for _, line := range lines {
		slices.SortFunc(line, func(a, b *unit) int {
			return cmp.Or(cmp.Compare(b.members[0].priority, a.members[0].priority), a.since.Compare(b.since), cmp.Compare(a.members[0].id, b.members[0].id))
		})
	}
	return lines
}

func (q *queue) single(p *place) *unit {
	return &unit{members: []*place{p}, need: q.share(p), since: p.since}
}

// gangOf returns what p begins with of those that wait, or nil and what its gang waits
// for; and, where it is whole, what it is. q.mu is held.
func (q *queue) gangOf(p *place, waiting []*place) (*unit, string) {
	k := p.gang.key
	if g := q.gangs[k]; g != nil {
		// Its companions run: an agent was restarted between two of them.
		if slices.Contains(g.with, p.id) {
			return q.single(p), ""
		}
		return nil, "the end of the jobs of " + k.String() + " that run"
	}
	u, want := &unit{}, k.size-p.gang.done
	for _, o := range waiting {
		if len(u.members) == want {
			break // however many wait: one submitter's thousands must not cost the others
		}
		if o.gang != nil && o.gang.key == k {
			u.members = append(u.members, o)
			u.need = u.need.plus(q.share(o), 1)
			if o.since.After(u.since) {
				u.since = o.since
			}
		}
	}
	if len(u.members) < want {
		return nil, fmt.Sprintf("the other jobs of %s: %d wait with their approvals", k, len(u.members))
	}
	if !slices.Contains(u.members, p) {
		return nil, "the jobs of " + k.String() + " that were submitted before it"
	}
	return u, "room for all of " + k.String() + " at once"
}

// form notes a gang that gets its room. q.mu is held.
func (q *queue) form(u *unit) {
	p := u.members[0]
	if p.gang == nil {
		return
	}
	g := q.gangs[p.gang.key]
	if g == nil {
		g = &gang{in: map[string]bool{}}
		for _, m := range u.members {
			g.with = append(g.with, m.id)
		}
		q.gangs[p.gang.key] = g
	}
	for _, m := range u.members {
		g.in[m.id] = true
		m.gang.with = g.with
	}
}

// rejoin notes a job of a gang that runs already. q.mu is held.
func (q *queue) rejoin(p *place) {
	if p.gang == nil || len(p.gang.with) == 0 {
		return
	}
	g := q.gangs[p.gang.key]
	if g == nil {
		g = &gang{with: p.gang.with, in: map[string]bool{}}
		q.gangs[p.gang.key] = g
	}
	g.in[p.id] = true
}

// gangWith returns the ids of the gang with which a job has got its room.
func (q *queue) gangWith(p *place) []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if p.gang == nil {
		return nil
	}
	return p.gang.with
}

// leaveGang forgets a gang when none of its jobs has room. q.mu is held.
func (q *queue) leaveGang(p *place) {
	if p.gang == nil {
		return
	}
	if g := q.gangs[p.gang.key]; g != nil && g.in[p.id] {
		if delete(g.in, p.id); len(g.in) == 0 {
			delete(q.gangs, p.gang.key)
		}
	}
}

// gangPlace is the job's part in its gang; nil without one.
func (j *Job) gangPlace() *gangPlace {
	if j.plan.Gang == nil {
		return nil
	}
	k := gangKey{submitter: j.submitter, queue: queueName(j.spec), name: j.plan.Gang.Name, size: j.plan.Gang.Size, priority: j.spec.Priority}
	return &gangPlace{key: k, with: j.formed(), done: j.gang.done}
}

// mayGang refuses a job whose gang can never begin: those that wait already and this one
// need more than the node or the queue has, or call themselves by its name and are of
// another size, queue or priority.
func (a *Agent) mayGang(j *Job) error {
	if j.plan.Gang == nil {
		return nil
	}
	key := j.gangPlace().key
	need, known := a.queue.needs(j.plan.Resources), 1
	var l check.List
	a.mu.Lock()
	for _, o := range a.live {
		if o.plan.Gang == nil || o.submitter != j.submitter || o.plan.Gang.Name != key.name || len(o.formed()) > 0 {
			continue
		}
		if k := o.gangPlace().key; k != key {
			l.Fail("gang.alike", fmt.Sprintf("size %d, queue %s and priority %d, as job %s of this gang has", k.size, k.queue, k.priority, o.id), fmt.Sprintf("size %d, queue %s, priority %d", key.size, key.queue, key.priority),
				"write the same into the job files of a gang, or give it another name")
			break
		}
		if known < key.size {
			need, known = need.plus(a.queue.needs(o.plan.Resources), 1), known+1
		}
	}
	a.mu.Unlock()
	need.Jobs = key.size
	total, _, _ := a.queue.look()
	node := Share{total, len(a.uuids)}
	if !need.within(node) || need.GPUs > node.GPUs {
		l.Fail("gang.room", "no more than the node has: "+node.String(), fmt.Sprintf("%d of its %d jobs need %s", known, key.size, need), "ask for less, or for a smaller gang: all of its jobs run at once on this node")
	}
	if i := slices.IndexFunc(a.queue.queues, func(q Queue) bool { return q.Name == key.queue }); i >= 0 && !need.within(a.queue.queues[i].Limit) {
		l.Fail("gang.room", fmt.Sprintf("no more than the queue %s may have: %s", key.queue, a.queue.queues[i].Limit), fmt.Sprintf("%d of its %d jobs need %s", known, key.size, need), "ask for less, or take another queue")
	}
	if len(l.Failed()) > 0 {
		return check.Refuse("admit", l)
	}
	return nil
}

// gangEntry is where the journal has the ids of a job's gang.
const gangEntry = "gang"

// formed returns the ids of the job's gang, once it has room.
func (j *Job) formed() []string {
	j.gang.mu.Lock()
	defer j.gang.mu.Unlock()
	return j.gang.with
}

// joined keeps whom the job began with, before anything is made for it: an agent that
// takes the job up must know whose end is its own.
func (a *Agent) joined(ctx context.Context, j *Job) error {
	if j.place.gang == nil {
		return nil
	}
	j.gang.mu.Lock()
	j.gang.with = j.place.gang.with
	j.gang.mu.Unlock()
	return a.Journal.Keep(ctx, j.id, gangEntry, j.formed())
}

// recallGang reads whom a job began with. Those that have succeeded are not waited for
// again; one that did not ends this job too.
func (a *Agent) recallGang(ctx context.Context, j *Job) error {
	if j.plan.Gang == nil {
		return nil
	}
	if err := a.Journal.Entry(ctx, j.id, gangEntry, &j.gang.with); err != nil && !errors.Is(err, journal.ErrNotFound) {
		return err
	}
	for _, id := range j.gang.with {
		row, err := a.Journal.Job(ctx, id)
		switch {
		case err != nil:
			return fmt.Errorf("job %s of its gang: %w", id, err)
		case row.State == journal.Succeeded:
			j.gang.done++
		case row.State.Final():
			j.gang.broken = id
		}
	}
	return nil
}

// endGang ends the other jobs of a gang when one did not succeed.
func (a *Agent) endGang(j *Job, end journal.Job) {
	with := j.formed()
	if len(with) == 0 && j.place != nil {
		// It was told to end in the moment in which the gang got its room.
		with = a.queue.gangWith(j.place)
	}
	if len(with) == 0 || end.State == journal.Succeeded {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, id := range with {
		if o := a.live[id]; o != nil && o != j {
			o.cancel(fmt.Errorf("%w: job %s of %s ended %s", errGang, j.id, j.plan.Gang.Name, end.State))
		}
	}
}

// together waits until every job of the gang has its keys and its inputs: they start
// together or not at all.
func (a *Agent) together(ctx context.Context, j *Job) error {
	j.nowReady()
	with := j.formed()
	for i, id := range with {
		a.mu.Lock()
		o := a.live[id]
		a.mu.Unlock()
		if o == nil || o == j {
			// Who is gone has succeeded, or has ended this job too.
			continue
		}
		select {
		case <-o.gang.ready:
			continue
		default:
		}
		a.tellWaiting(ctx, j, 0, fmt.Sprintf("the gang %s starts together: %d of %d are ready", j.plan.Gang.Name, i, len(with)))
		select {
		case <-o.gang.ready:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return context.Cause(ctx)
}

// nowReady tells the others of the gang that this job can start, or has started.
func (j *Job) nowReady() { j.gang.once.Do(func() { close(j.gang.ready) }) }

// Gang says of a job that has not ended in which gang it is, and whom it began with.
func (a *Agent) Gang(id string) (name string, with []string) {
	a.mu.Lock()
	j := a.live[id]
	a.mu.Unlock()
	if j == nil || j.plan.Gang == nil {
		return "", nil
	}
	return j.plan.Gang.Name, j.formed()
}

// QueueOf is the queue of a job that has not ended.
func (a *Agent) QueueOf(id string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if j := a.live[id]; j != nil {
		return queueName(j.spec)
	}
	return ""
}
