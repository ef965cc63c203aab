package runner

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/jobspec"
)

// fill lets as many jobs wait in each queue as wait says, on a node that is full, and then
// empties it. It returns how many of each queue run.
func fill(t *testing.T, q *queue, wait map[string]int, need plan.Resources) map[string]int {
	t.Helper()
	q.used = q.total
	var all []*place
	for _, c := range q.queues {
		for i := range wait[c.Name] {
			p := newPlace(fmt.Sprint(c.Name, i), c.Name, 0, noon.Add(time.Duration(i)), need)
			q.enter(p)
			all = append(all, p)
		}
	}
	q.mu.Lock()
	q.used = Room{}
	q.advance()
	q.mu.Unlock()
	got := map[string]int{}
	for _, p := range all {
		if has(p) {
			got[p.queue]++
		}
	}
	return got
}

func TestQueuesShareTheNode(t *testing.T) {
	everyone := []string{"*"}
	one := plan.Resources{CPUMillis: 100, MemoryBytes: 1 << 20}
	for name, row := range map[string]struct {
		queues []Queue
		wait   map[string]int
		jobs   int
		want   string
	}{
		"half each":                      {[]Queue{{Name: "a", Users: everyone}, {Name: "b", Users: everyone}}, map[string]int{"a": 50, "b": 50}, 8, "a 4, b 4"},
		"twice as much for twice weight": {[]Queue{{Name: "a", Weight: 2, Users: everyone}, {Name: "b", Users: everyone}}, map[string]int{"a": 50, "b": 50}, 9, "a 6, b 3"},
		"who waits alone has all":        {[]Queue{{Name: "a", Users: everyone}, {Name: "b", Weight: 100, Users: everyone}}, map[string]int{"a": 50}, 8, "a 8, b 0"},
		"a limit holds in idle times":    {[]Queue{{Name: "a", Limit: Share{Room: Room{Jobs: 3}}, Users: everyone}, {Name: "b", Users: everyone}}, map[string]int{"a": 50}, 8, "a 3, b 0"},
		"a limit leaves the rest":        {[]Queue{{Name: "a", Limit: Share{Room: Room{CPUMillis: 250}}, Users: everyone}, {Name: "b", Users: everyone}}, map[string]int{"a": 50, "b": 50}, 8, "a 2, b 6"},
		"a limit of memory":              {[]Queue{{Name: "a", Limit: Share{Room: Room{MemoryBytes: 1 << 20}}, Users: everyone}, {Name: "b", Users: everyone}}, map[string]int{"a": 50, "b": 2}, 8, "a 1, b 2"},
	} {
		queues, err := checkQueues(row.queues)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		q := newQueue(Room{Jobs: row.jobs, CPUMillis: 100_000, MemoryBytes: 1 << 40}, nil, queues)
		q.now = func() time.Time { return noon.Add(time.Minute) }
		got := fill(t, q, row.wait, one)
		if s := fmt.Sprintf("a %d, b %d", got["a"], got["b"]); s != row.want {
			t.Errorf("%s: %s run, want %s", name, s, row.want)
		}
	}
}

// GPUs are what is dear: a queue that has the cores does not make up for one that has
// the GPUs.
func TestDominantShare(t *testing.T) {
	queues, err := checkQueues([]Queue{{Name: "gpu", Users: []string{"*"}}, {Name: "cpu", Users: []string{"*"}}})
	if err != nil {
		t.Fatal(err)
	}
	q := newQueue(Room{Jobs: 100, CPUMillis: 10_000, MemoryBytes: 1 << 40}, []string{"0", "1", "2", "3"}, queues)
	for i := range 2 {
		p := newPlace(fmt.Sprint("g", i), "gpu", 0, noon, plan.Resources{CPUMillis: 100, GPUs: 1})
		if q.enter(p); !has(p) {
			t.Fatal("the node is not free")
		}
	}
	p := newPlace("c", "cpu", 0, noon, plan.Resources{CPUMillis: 4000})
	if q.enter(p); !has(p) {
		t.Fatal("the node is not free")
	}
	// gpu has half of the GPUs, cpu 0.4 of the cores: cpu is next.
	u := q.single(p)
	if i := q.turn(map[string][]*unit{"gpu": {u}, "cpu": {u}}); q.queues[i].Name != "cpu" {
		t.Errorf("%s is next", q.queues[i].Name)
	}
}

// A job that its own queue's limit keeps back, however long, keeps nobody of another
// queue back; one that the node has no room for does, after a time.
func TestWhoIsKeptBack(t *testing.T) {
	for name, row := range map[string]struct {
		need plan.Resources
		want bool
	}{
		"by its queue's limit": {plan.Resources{CPUMillis: 100, MemoryBytes: 1}, true},
		"by the node":          {plan.Resources{CPUMillis: 100, MemoryBytes: 7 << 30}, false},
	} {
		limit := Share{}
		if row.want {
			limit.Jobs = 1
		}
		queues, err := checkQueues([]Queue{{Name: "a", Limit: limit, Users: []string{"*"}}, {Name: "b", Users: []string{"*"}}})
		if err != nil {
			t.Fatal(err)
		}
		q := newQueue(Room{Jobs: 8, CPUMillis: 8000, MemoryBytes: 8 << 30}, nil, queues)
		now := noon
		q.now = func() time.Time { return now }
		runs := newPlace("runs", "a", 0, noon, plan.Resources{CPUMillis: 100, MemoryBytes: 2 << 30})
		q.enter(runs)
		kept := newPlace("kept", "a", 0, noon, row.need)
		q.enter(kept)
		if !has(runs) || has(kept) {
			t.Fatalf("%s: it is not kept back", name)
		}
		// b has more than a, so that a's turn comes first.
		for i := range 3 {
			q.enter(newPlace(fmt.Sprint("b", i), "b", 0, noon, plan.Resources{CPUMillis: 100, MemoryBytes: 1 << 30}))
		}
		now = noon.Add(2 * overtaken)
		other := newPlace("other", "b", 0, now, plan.Resources{CPUMillis: 100, MemoryBytes: 1 << 20})
		q.enter(other)
		if has(other) != row.want {
			t.Errorf("kept back %s: another queue's job begins: %v", name, has(other))
		}
	}
}

// What a job took is given back to its queue, whatever its queue has become meanwhile.
func TestSharesAreGivenBack(t *testing.T) {
	q := newQueue(Room{Jobs: 8, CPUMillis: 8000, MemoryBytes: 8 << 30}, []string{"0"}, everybody())
	gone := newPlace("a", "gone", 0, noon, plan.Resources{CPUMillis: 100, MemoryBytes: 1, GPUs: 1})
	if err := q.adopt(gone, []string{"0"}); err != nil {
		t.Fatal(err)
	}
	p := newPlace("b", jobspec.DefaultQueue, 0, noon, plan.Resources{CPUMillis: 100, MemoryBytes: 1})
	q.enter(p)
	if l := q.loads(); len(l) != 1 || l[0].Used.Jobs != 1 || l[0].Used.GPUs != 0 {
		t.Errorf("queues %+v", l)
	}
	q.leave(gone)
	q.leave(p)
	for name, s := range q.shares {
		if s != (Share{}) {
			t.Errorf("queue %s has %+v when nothing runs", name, s)
		}
	}
}

func TestWhoMayUseAQueue(t *testing.T) {
	queues, err := checkQueues([]Queue{
		{Name: "default", Users: []string{"user/*"}, Limit: Share{GPUs: 1}}, {Name: "nightly", Users: []string{"scheduler/one", "user/ada"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{queue: newQueue(Room{Jobs: 8, CPUMillis: 8000, MemoryBytes: 8 << 30}, nil, queues)}
	for name, row := range map[string]struct {
		submitter, queue string
		gpus             int
		check            string
	}{
		"the default":             {"user/bob", "", 1, ""},
		"by name":                 {"scheduler/one", "nightly", 0, ""},
		"another scheduler":       {"scheduler/two", "nightly", 0, "queue.user"},
		"not in the default":      {"scheduler/one", "", 0, "queue.user"},
		"another kind, same name": {"engineer/ada", "nightly", 0, "queue.user"},
		"no such queue":           {"user/ada", "daily", 0, "queue.unknown"},
		"nobody":                  {"", "nightly", 0, "queue.user"},
		"more than its limit":     {"user/bob", "default", 2, "queue.limit"},
	} {
		j := newJob("a", row.submitter)
		j.spec.Queue, j.plan.Resources = row.queue, plan.Resources{CPUMillis: 100, MemoryBytes: 1, GPUs: row.gpus}
		err := a.mayQueue(j)
		got := ""
		if r, ok := err.(*check.Refusal); ok { //nolint:errorlint // made here
			got = r.Checks[0].ID
		}
		if got != row.check || (err != nil) != (row.check != "") {
			t.Errorf("%s: %v, want %q", name, err, row.check)
		}
	}
}

func TestConfiguredQueues(t *testing.T) {
	if q, err := checkQueues(nil); err != nil || len(q) != 1 || !q[0].Admits("user/ada") {
		t.Errorf("a node that names none has %v, %v", q, err)
	}
	users := []string{"*"}
	for name, list := range map[string][]Queue{
		"no name":          {{Users: users}},
		"nobody's":         {{Name: "a"}},
		"a weight below 1": {{Name: "a", Weight: -1, Users: users}},
		"too heavy":        {{Name: "a", Weight: maxWeight + 1, Users: users}},
		"twice":            {{Name: "a", Users: users}, {Name: "a", Users: users}},
		"a negative limit": {{Name: "a", Users: users, Limit: Share{GPUs: -1}}},
		"a bare name":      {{Name: "a", Users: []string{"ada"}}},
		"a pattern":        {{Name: "a", Users: []string{"user/a*"}}},
		"a name with more": {{Name: "a b", Users: users}},
		"too many":         make([]Queue, maxQueues+1),
	} {
		if _, err := checkQueues(list); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if (Queue{Name: "a"}).Admits("user/ada") {
		t.Error("the zero value admits somebody")
	}
	if s := (Share{Room{1, 2000, 3 << 20}, 4}).String(); !strings.Contains(s, "4 GPUs") || (Share{}).String() != "nothing" {
		t.Errorf("%q", s)
	}
}
