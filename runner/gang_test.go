package runner

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/check"
	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/journal"
)

// member is a job of a gang that waits.
func member(id, submitter, name string, size int, minute int, r plan.Resources) *place {
	p := newPlace(id, "default", 0, noon.Add(time.Duration(minute)*time.Minute), r)
	p.gang = &gangPlace{key: gangKey{submitter: submitter, queue: "default", name: name, size: size}}
	return p
}

func begun(all ...*place) string {
	var out []string
	for _, p := range all {
		if has(p) {
			out = append(out, p.id)
		}
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// half and whole are of a node of 8 places, 8000m and 8 GiB.
var (
	quarter = plan.Resources{CPUMillis: 2000, MemoryBytes: 2 << 30}
	half    = plan.Resources{CPUMillis: 4000, MemoryBytes: 4 << 30}
	most    = plan.Resources{CPUMillis: 6000, MemoryBytes: 6 << 30}
)

func TestGangsBeginTogether(t *testing.T) {
	for name, row := range map[string]struct {
		enter []*place
		// first is what has begun once all wait; then whoever has begun leaves.
		first, then string
		now         int // minutes past noon
		why         string
	}{
		"whole":                           {enter: []*place{member("a", "u/a", "g", 2, 1, half), member("b", "u/a", "g", 2, 2, half)}, first: "a b"},
		"not whole":                       {enter: []*place{member("a", "u/a", "g", 2, 1, half)}, why: "1 wait with their approvals"},
		"of another submitter":            {enter: []*place{member("a", "u/a", "g", 2, 1, quarter), member("b", "u/b", "g", 2, 2, quarter)}, why: "1 wait with their approvals"},
		"of another size":                 {enter: []*place{member("a", "u/a", "g", 2, 1, quarter), member("b", "u/a", "g", 3, 2, quarter)}, why: "1 wait with their approvals"},
		"of another name":                 {enter: []*place{member("a", "u/a", "g", 2, 1, quarter), member("b", "u/a", "h", 2, 2, quarter)}, why: "1 wait with their approvals"},
		"one too many":                    {enter: []*place{member("a", "u/a", "g", 2, 1, quarter), member("b", "u/a", "g", 2, 2, quarter), member("c", "u/a", "g", 2, 3, quarter)}, first: "a b", why: "that run"},
		"room for one of them alone":      {enter: []*place{newPlace("s", "default", 0, noon, half), member("a", "u/a", "g", 2, 1, half), member("b", "u/a", "g", 2, 2, half)}, first: "s", then: "a b", why: "room for all of the gang g of 2 at once"},
		"two that each fit alone":         {enter: []*place{member("a", "u/a", "g", 2, 1, half), member("x", "u/b", "h", 2, 2, half), member("b", "u/a", "g", 2, 3, half), member("y", "u/b", "h", 2, 4, half)}, first: "a b", then: "x y"},
		"one that is not whole is passed": {enter: []*place{member("a", "u/a", "g", 2, 1, half), newPlace("s", "default", 0, noon.Add(2*time.Minute), most)}, first: "s", now: 60},
		"it is as old as its youngest":    {enter: []*place{newPlace("h", "default", 9, noon, most), member("a", "u/a", "g", 2, 1, half), newPlace("s", "default", 0, noon.Add(2*time.Minute), most), member("b", "u/a", "g", 2, 3, half)}, first: "h", then: "s"},
		"small ones pass it at first":     {enter: []*place{newPlace("h", "default", 9, noon, most), member("a", "u/a", "g", 2, 1, half), member("b", "u/a", "g", 2, 2, half), newPlace("s", "default", 0, noon.Add(3*time.Minute), quarter)}, first: "h s", now: 9},
		"and after ten minutes do not":    {enter: []*place{newPlace("h", "default", 9, noon, most), member("a", "u/a", "g", 2, 1, half), member("b", "u/a", "g", 2, 2, half), newPlace("s", "default", 0, noon.Add(3*time.Minute), quarter)}, first: "h", then: "a b", now: 13},
		"more than the node will have":    {enter: []*place{member("a", "u/a", "g", 2, 1, most), member("b", "u/a", "g", 2, 2, most), newPlace("s", "default", 0, noon.Add(3*time.Minute), quarter)}, first: "s", now: 60},
		"more GPUs than there are":        {enter: []*place{member("a", "u/a", "g", 2, 1, plan.Resources{CPUMillis: 1, GPUs: 1}), member("b", "u/a", "g", 2, 2, plan.Resources{CPUMillis: 1, GPUs: 1}), newPlace("s", "default", 0, noon.Add(3*time.Minute), quarter)}, first: "s", now: 60},
	} {
		t.Run(name, func(t *testing.T) {
			q := newQueue(Room{8, 8000, 8 << 30}, []string{"gpu-0"}, everybody())
			q.now = func() time.Time { return noon.Add(time.Duration(row.now) * time.Minute) }
			for _, p := range row.enter {
				q.enter(p)
			}
			if got := begun(row.enter...); got != row.first {
				t.Fatalf("%q began, want %q", got, row.first)
			}
			if row.why != "" {
				found := ""
				for _, p := range q.waiting {
					_, lacks := q.at(p.id)
					found += lacks + "\n"
				}
				if !strings.Contains(found, row.why) {
					t.Errorf("they lack %q, want %q", found, row.why)
				}
			}
			var before []*place
			for _, p := range row.enter {
				if has(p) {
					before = append(before, p)
				}
			}
			for _, p := range before {
				q.leave(p)
			}
			var after []*place
			for _, p := range row.enter {
				if !slices.Contains(before, p) {
					after = append(after, p)
				}
			}
			if got := begun(after...); row.then != "" && got != row.then {
				t.Errorf("then %q began, want %q", got, row.then)
			}
		})
	}
}

// A queue's limit counts for a gang as a whole, and keeps back nobody of another queue.
func TestAGangAndItsQueuesLimit(t *testing.T) {
	queues, err := checkQueues([]Queue{{Name: "default", Users: []string{"*"}, Limit: Share{Room: Room{Jobs: 3}}}, {Name: "other", Users: []string{"*"}}})
	if err != nil {
		t.Fatal(err)
	}
	q := newQueue(Room{8, 8000, 8 << 30}, nil, queues)
	q.now = func() time.Time { return noon.Add(time.Hour) }
	one, two := newPlace("1", "default", 0, noon, quarter), newPlace("2", "default", 0, noon, quarter)
	q.enter(one)
	q.enter(two)
	a, b := member("a", "u/a", "g", 2, 1, quarter), member("b", "u/a", "g", 2, 1, quarter)
	q.enter(a)
	q.enter(b)
	o := newPlace("o", "other", 0, noon.Add(2*time.Minute), quarter)
	q.enter(o)
	if got := begun(one, two, a, b, o); got != "1 2 o" {
		t.Errorf("%s", got)
	}
	q.leave(one)
	if got := begun(a, b); got != "a b" {
		t.Errorf("%q", got)
	}
}

// What an agent that was restarted finds of a gang: some of it runs, the rest begins
// again, and nobody else takes their part.
func TestGangsAfterARestart(t *testing.T) {
	for name, row := range map[string]struct {
		runs  []string
		done  int
		waits []string
		want  string
	}{
		"one runs, one begins again":    {runs: []string{"a"}, waits: []string{"b"}, want: "b"},
		"a stranger takes no part":      {runs: []string{"a"}, waits: []string{"b", "x"}, want: "b"},
		"nor beside one that runs":      {runs: []string{"a"}, waits: []string{"x"}},
		"all begin again":               {waits: []string{"a", "b", "c"}, want: "a b c"},
		"two of three, and one is done": {done: 1, waits: []string{"a", "b"}, want: "a b"},
		"one of three is missing":       {waits: []string{"a", "b"}},
	} {
		q := newQueue(Room{8, 8000, 8 << 30}, nil, everybody())
		q.now = func() time.Time { return noon }
		with := []string{"a", "b", "c"}
		for _, id := range row.runs {
			p := member(id, "u/a", "g", 3, 0, quarter)
			p.gang.with = with
			if err := q.adopt(p, nil); err != nil {
				t.Fatal(err)
			}
		}
		var all []*place
		for i, id := range row.waits {
			p := member(id, "u/a", "g", 3, i, plan.Resources{CPUMillis: 1, MemoryBytes: 1})
			if id != "x" {
				p.gang.with, p.gang.done = with, row.done
			}
			all = append(all, p)
			q.enter(p)
		}
		if got := begun(all...); got != row.want {
			t.Errorf("%s: %q began, want %q", name, got, row.want)
		}
	}
}

// Gangs and single jobs come and go at random: a gang has room as a whole or not at all,
// and whoever waits for long begins.
func TestGangsDoNotStarve(t *testing.T) {
	q := newQueue(Room{4, 8000, 8 << 30}, nil, everybody())
	now := noon
	q.now = func() time.Time { return now }
	var runs []*place
	big := []*place{member("a", "u/a", "g", 3, 0, quarter), member("b", "u/a", "g", 3, 0, quarter), member("c", "u/a", "g", 3, 0, quarter)}
	for i := range 3 {
		p := newPlace(fmt.Sprint("before", i), "default", 0, noon, quarter)
		q.enter(p)
		runs = append(runs, p)
	}
	for _, p := range big {
		q.enter(p)
	}
	for minute := 1; minute < 60 && !has(big[0]); minute++ {
		now = noon.Add(time.Duration(minute) * time.Minute)
		p := newPlace(fmt.Sprint(minute), "default", 0, now, quarter)
		q.enter(p)
		runs = append(runs, p)
		// The oldest that runs ends.
		if i := slices.IndexFunc(runs, has); i >= 0 {
			q.leave(runs[i])
			runs = slices.Delete(runs, i, i+1)
		}
		if n := len(strings.Fields(begun(big...))); n != 0 && n != len(big) {
			t.Fatalf("minute %d: %d of the gang have room", minute, n)
		}
	}
	if !has(big[0]) {
		t.Error("the gang starves")
	}
	for _, p := range append(big, runs...) {
		q.leave(p)
	}
	if q.used != (Room{}) || len(q.gangs) != 0 {
		t.Errorf("left: %+v, %d gangs", q.used, len(q.gangs))
	}
}

func ganged(id, submitter, name string, size int, r plan.Resources) *Job {
	j := newJob(id, submitter)
	j.plan.Gang, j.plan.Resources = &plan.Gang{Name: name, Size: size}, r
	return j
}

func TestGangsThatCanNeverBegin(t *testing.T) {
	queues, err := checkQueues([]Queue{{Name: "default", Users: []string{"*"}}, {Name: "small", Users: []string{"*"}, Limit: Share{Room: Room{Jobs: 2}}}})
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{queue: newQueue(Room{8, 8000, 8 << 30}, []string{"gpu-0"}, queues), uuids: []string{"gpu-0"}, live: map[string]*Job{}}
	a.live["w"] = ganged("w", "u/ada", "g", 3, half)
	a.live["r"] = ganged("r", "u/ada", "runs", 2, half)
	a.live["r"].gang.with = []string{"r", "s"}
	for name, row := range map[string]struct {
		j     *Job
		queue string
		prio  int
		check string
	}{
		"it fits beside who waits":       {ganged("a", "u/ada", "g", 3, half), "", 0, ""},
		"together they do not":           {ganged("a", "u/ada", "g", 3, most), "", 0, "gang.room"},
		"alone it does":                  {ganged("a", "u/ada", "h", 3, most), "", 0, ""},
		"more jobs than places":          {ganged("a", "u/ada", "h", 9, plan.Resources{CPUMillis: 1, MemoryBytes: 1}), "", 0, "gang.room"},
		"more GPUs than there are":       {ganged("a", "u/ada", "h", 2, plan.Resources{CPUMillis: 1, MemoryBytes: 1, GPUs: 2}), "", 0, "gang.room"},
		"more than its queue may have":   {ganged("a", "u/ada", "h", 3, quarter), "small", 0, "gang.room"},
		"of another size":                {ganged("a", "u/ada", "g", 2, quarter), "", 0, "gang.alike"},
		"of another priority":            {ganged("a", "u/ada", "g", 3, quarter), "", 5, "gang.alike"},
		"in another queue":               {ganged("a", "u/ada", "g", 3, quarter), "small", 0, "gang.alike"},
		"another submitter's is his own": {ganged("a", "u/eve", "g", 2, quarter), "", 0, ""},
		"one that runs is no measure":    {ganged("a", "u/ada", "runs", 4, quarter), "", 0, ""},
	} {
		row.j.spec.Queue, row.j.spec.Priority = row.queue, row.prio
		err := a.mayGang(row.j)
		var r *check.Refusal
		got := ""
		if errors.As(err, &r) {
			got = r.Checks[0].ID
		}
		if got != row.check || (err != nil) != (row.check != "") {
			t.Errorf("%s: %v, want %q", name, err, row.check)
		}
	}
}

// One that does not succeed ends the others of its gang and nobody else.
func TestAGangEndsTogether(t *testing.T) {
	for state, want := range map[journal.State]string{journal.Failed: "b", journal.Refused: "b", journal.Cancelled: "b", journal.Succeeded: ""} {
		a := &Agent{live: map[string]*Job{}}
		ended := ""
		for _, id := range []string{"a", "b", "c"} {
			j := ganged(id, "u/ada", "g", 2, quarter)
			if id != "c" {
				j.gang.with = []string{"a", "b"}
			}
			j.cancel = func(err error) {
				if !errors.Is(err, errGang) {
					t.Errorf("%s: %v", state, err)
				}
				ended += id
			}
			a.live[id] = j
		}
		a.endGang(a.live["a"], journal.Job{ID: "a", State: state})
		if ended != want {
			t.Errorf("%s: %q ended, want %q", state, ended, want)
		}
		// One that waits for its gang ends nobody.
		ended = ""
		if a.endGang(a.live["c"], journal.Job{ID: "c", State: state}); ended != "" {
			t.Errorf("%s: one that waits ended %q", state, ended)
		}
	}
}

// A job that is cancelled in the moment in which its gang gets room, and has not taken it
// yet, ends the others too: none of them starts without it.
func TestCancelledAsTheGangForms(t *testing.T) {
	a := &Agent{live: map[string]*Job{}, queue: newQueue(Room{8, 8000, 8 << 30}, nil, everybody())}
	var cause error
	for _, id := range []string{"a", "b"} {
		j := ganged(id, "u/ada", "g", 2, quarter)
		j.place = newPlace(id, "default", 0, noon, quarter)
		j.place.gang = j.gangPlace()
		j.cancel = func(err error) { cause = err }
		a.live[id] = j
		if a.endGang(j, journal.Job{ID: id, State: journal.Cancelled}); cause != nil {
			t.Fatalf("%s: one whose gang is not whole ends another: %v", id, cause)
		}
	}
	for _, j := range a.live {
		a.queue.enter(j.place)
	}
	if a.endGang(a.live["a"], journal.Job{ID: "a", State: journal.Cancelled}); !errors.Is(cause, errGang) {
		t.Errorf("%v", cause)
	}
}

// No job of a gang starts before all are ready; one that another's end stops does not
// start at all.
func TestGangsStartTogether(t *testing.T) {
	a, j, _ := watched(t)
	o := ganged("01JD3V8QK5W2M7N4P6R8S0T1V4", j.submitter, "g", 3, quarter)
	j.plan.Gang = o.plan.Gang
	// The third has succeeded, and is gone.
	j.gang.with = []string{j.id, o.id, "01JD3V8QK5W2M7N4P6R8S0T1V5"}
	o.gang.with = j.gang.with
	a.live = map[string]*Job{j.id: j, o.id: o}
	started := make(chan error, 2)
	go func() { started <- a.together(t.Context(), j) }()
	for told := 0; told == 0; {
		select {
		case err := <-started:
			t.Fatalf("started alone: %v", err)
		case <-time.After(time.Millisecond):
			events, _, _ := j.feed.after(0)
			told = len(events)
		}
	}
	if err := a.together(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	events, _, _ := j.feed.after(0)
	if len(events) == 0 || !strings.Contains(events[0].GetQueue().GetWaitsFor(), "1 of 3 are ready") {
		t.Errorf("told %v", events)
	}
	// Again, and now the other one fails.
	late := ganged("01JD3V8QK5W2M7N4P6R8S0T1V6", j.submitter, "g", 2, quarter)
	late.feed = newFeed(late.id, a.Journal)
	other := ganged("01JD3V8QK5W2M7N4P6R8S0T1V7", j.submitter, "g", 2, quarter)
	late.gang.with = []string{late.id, other.id}
	other.gang.with = late.gang.with
	a.live = map[string]*Job{late.id: late, other.id: other}
	ctx, cancel := context.WithCancelCause(t.Context())
	late.cancel, other.cancel = cancel, func(error) {}
	go func() { started <- a.together(ctx, late) }()
	a.endGang(other, journal.Job{ID: other.id, State: journal.Refused})
	if err := <-started; !errors.Is(err, errGang) {
		t.Errorf("%v", err)
	}
	if out := a.outcome(t.Context(), late, errors.Join(context.Cause(ctx))); out.Reason != "gang-failed" || out.State != journal.Failed || !strings.Contains(out.Message, other.id) {
		t.Errorf("%+v", out)
	}
	// A job alone waits for nobody.
	if err := a.together(t.Context(), newJob("x", "u/ada")); err != nil {
		t.Error(err)
	}
}

// What the journal has of a gang is whom it was formed with, how many have succeeded,
// and whether one has failed.
func TestWhatIsKnownOfAGangAfterARestart(t *testing.T) {
	a, _, _ := watched(t)
	ids := []string{"01JD3V8QK5W2M7N4P6R8S0T1V4", "01JD3V8QK5W2M7N4P6R8S0T1V5", "01JD3V8QK5W2M7N4P6R8S0T1V6"}
	submit := func(id string) {
		t.Helper()
		if _, _, err := a.Journal.Submit(t.Context(), journal.Job{ID: id, Name: "n", JobFile: []byte("f"), Plan: []byte("{}"), PlanDigest: plan.Sum([]byte(id)), FileDigest: plan.Sum([]byte("f")), Submitter: "u/ada", State: journal.Queued, Stage: "admit", Submitted: noon, Attempt: 1}); err != nil {
			t.Fatal(err)
		}
	}
	for _, id := range ids {
		submit(id)
	}
	j := ganged(ids[0], "u/ada", "g", 3, quarter)
	if err := a.recallGang(t.Context(), j); err != nil || len(j.formed()) != 0 {
		t.Fatalf("one that waits: %v, %v", j.formed(), err)
	}
	j.place = newPlace(j.id, "default", 0, noon, quarter)
	j.place.gang = &gangPlace{with: ids}
	if err := a.joined(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	look := func(done int, broken string) {
		t.Helper()
		again := ganged(ids[0], "u/ada", "g", 3, quarter)
		if err := a.recallGang(t.Context(), again); err != nil || !slices.Equal(again.formed(), ids) || again.gang.done != done || again.gang.broken != broken {
			t.Errorf("%v, %+v", err, &again.gang)
		}
	}
	look(0, "")
	end := func(id string, s journal.State) {
		t.Helper()
		if err := a.Journal.End(t.Context(), journal.Job{ID: id, State: s, Stage: "run", Ended: noon}, nil); err != nil {
			t.Fatal(err)
		}
	}
	end(ids[1], journal.Succeeded)
	look(1, "")
	end(ids[2], journal.Failed)
	look(1, ids[2])
	// A job that the journal does not have is no reason to begin.
	j.place.gang.with = append(slices.Clone(ids), "01JD3V8QK5W2M7N4P6R8S0T1V9")
	if err := a.joined(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	if err := a.recallGang(t.Context(), ganged(ids[0], "u/ada", "g", 3, quarter)); err == nil {
		t.Error("a gang with a job that is not there")
	}
}
