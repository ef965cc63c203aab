package runner

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

var noon = time.Date(2026, 3, 2, 12, 0, 0, 0, time.UTC)

func roomFor(jobs int, cpu, memory int64) Room { return Room{jobs, cpu, memory} }

func has(p *place) bool {
	select {
	case <-p.given:
		return true
	default:
		return false
	}
}

func TestQueueOrder(t *testing.T) {
	one := plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30}
	type entry struct {
		id       string
		priority int
		minute   int
		need     plan.Resources
	}
	big := plan.Resources{CPUMillis: 2000, MemoryBytes: 1 << 30}
	gpu := plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, GPUs: 1}
	for name, row := range map[string]struct {
		entries []entry
		now     int // minutes past noon
		// holds is what runs before: it leaves, and then begin is what has begun.
		holds plan.Resources
		want  string
	}{
		"who was first":                {[]entry{{"b", 0, 2, big}, {"a", 0, 1, big}}, 3, big, "a"},
		"who has priority":             {[]entry{{"a", 0, 1, big}, {"b", 5, 2, big}, {"c", -5, 0, big}}, 3, big, "b"},
		"two that fit together":        {[]entry{{"a", 0, 1, one}, {"b", 0, 2, one}, {"c", 0, 3, one}}, 4, big, "a b"},
		"a small one passes":           {[]entry{{"a", 0, 1, big}, {"b", 0, 2, one}}, 3, one, "a"},
		"a GPU is what is lacking":     {[]entry{{"a", 0, 1, gpu}, {"b", 0, 2, gpu}}, 3, gpu, "a"},
		"more cores than there are":    {[]entry{{"a", 0, 1, plan.Resources{CPUMillis: 64000, MemoryBytes: 1}}}, 3, big, "a"},
		"who has waited is not passed": {[]entry{{"a", 0, 0, plan.Resources{CPUMillis: 2000, MemoryBytes: 64 << 30}}, {"b", 0, 2, one}}, 11, one, ""},
		"until then it is":             {[]entry{{"a", 0, 0, plan.Resources{CPUMillis: 2000, MemoryBytes: 64 << 30}}, {"b", 0, 2, one}}, 9, one, "b"},
	} {
		q := newQueue(roomFor(8, 2000, 8<<30), []string{"gpu-0"}, everybody())
		q.now = func() time.Time { return noon.Add(time.Duration(row.now) * time.Minute) }
		// Whatever holds the node keeps all out until everybody is there.
		holder := newPlace("holder", "default", 100, noon, plan.Resources{CPUMillis: 2000, MemoryBytes: 8 << 30, GPUs: 1})
		q.enter(holder)
		if !has(holder) {
			t.Fatalf("%s: the node is not free", name)
		}
		var all []*place
		for _, e := range row.entries {
			p := newPlace(e.id, "default", e.priority, noon.Add(time.Duration(e.minute)*time.Minute), e.need)
			q.enter(p)
			if has(p) {
				t.Errorf("%s: %s began beside a job that has everything", name, e.id)
			}
			all = append(all, p)
		}
		for i := range q.waiting {
			if pos, lacks := q.at(q.waiting[i].id); pos != i+1 || lacks == "" {
				t.Errorf("%s: %s is at %d, lacking %q", name, q.waiting[i].id, pos, lacks)
			}
		}
		q.leave(holder)
		var got []string
		for _, p := range all {
			if has(p) {
				got = append(got, p.id)
			}
		}
		slices.Sort(got)
		if strings.Join(got, " ") != row.want {
			t.Errorf("%s: %v began, want %s", name, got, row.want)
		}
	}
}

func TestAdoptedJobsHaveTheirGPUs(t *testing.T) {
	q := newQueue(roomFor(2, 2000, 8<<30), []string{"gpu-0", "gpu-1"}, everybody())
	r := plan.Resources{CPUMillis: 1000, MemoryBytes: 1 << 30, GPUs: 1}
	a := newPlace("a", "default", 0, noon, r)
	if err := q.adopt(a, []string{"gpu-1"}); err != nil || a.got[0] != "gpu-1" {
		t.Fatalf("%v %v", a.got, err)
	}
	if err := q.adopt(newPlace("b", "default", 0, noon, r), []string{"gpu-1"}); err == nil {
		t.Error("a GPU is two jobs'")
	}
	if err := q.adopt(newPlace("c", "default", 0, noon, r), []string{"gpu-0"}); err != nil {
		t.Errorf("a refused adoption has taken something: %v", err)
	}
	if err := q.adopt(newPlace("d", "default", 0, noon, plan.Resources{}), nil); err == nil {
		t.Error("three jobs are in two places")
	}
	q.leave(a)
	if _, left, gpus := q.look(); left != (Room{1, 1000, 7 << 30}) || gpus != 1 {
		t.Errorf("%+v %d", left, gpus)
	}
}

// TestQueueNeverGivesTooMuch lets jobs come and go at random.
func TestQueueNeverGivesTooMuch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2)) //nolint:gosec // a test that repeats
	total := roomFor(4, 4000, 16<<30)
	gpus := []string{"a", "b", "c"}
	q := newQueue(total, gpus, everybody())
	q.now = func() time.Time { return noon }
	var in []*place
	for i := range 5000 {
		if len(in) < 20 && rnd.IntN(2) == 0 {
			p := newPlace(fmt.Sprint(i), "default", rnd.IntN(3), noon.Add(time.Duration(i)), plan.Resources{
				CPUMillis: int64(rnd.IntN(5000)) + 1, MemoryBytes: int64(rnd.IntN(16<<30)) + 1, GPUs: rnd.IntN(len(gpus) + 1),
			})
			q.enter(p)
			in = append(in, p)
		} else if len(in) > 0 {
			k := rnd.IntN(len(in))
			q.leave(in[k])
			in = slices.Delete(in, k, k+1)
		}
		var used Room
		seen := map[string]bool{}
		for _, g := range q.free {
			seen[g] = true
		}
		for _, p := range in {
			if !has(p) {
				continue
			}
			n := q.capped(p)
			used = Room{used.Jobs + 1, used.CPUMillis + n.CPUMillis, used.MemoryBytes + n.MemoryBytes}
			for _, g := range p.got {
				if seen[g] {
					t.Fatalf("step %d: GPU %s is there twice", i, g)
				}
				seen[g] = true
			}
		}
		if used != q.used || used.Jobs > total.Jobs || used.CPUMillis > total.CPUMillis || used.MemoryBytes > total.MemoryBytes || len(seen) != len(gpus) {
			t.Fatalf("step %d: %+v of %+v, counted %+v, GPUs %v", i, used, total, q.used, seen)
		}
		if len(q.waiting) > 0 && q.fits(q.share(q.waiting[0])) {
			t.Fatalf("step %d: the first waits and fits", i)
		}
	}
	for _, p := range in {
		q.leave(p)
	}
	if q.used != (Room{}) || len(q.free) != len(gpus) {
		t.Errorf("left: %+v %v", q.used, q.free)
	}
}
