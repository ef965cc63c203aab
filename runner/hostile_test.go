package runner

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
)

// One submitter fills a node with jobs that wait: others can still submit theirs.
func TestNobodyFillsTheNodeAlone(t *testing.T) {
	a := &Agent{live: map[string]*Job{}}
	fill := func(submitter string, most int) (n int) {
		for ; n < most && a.mayWait(submitter) == nil; n++ {
			id := fmt.Sprint(submitter, n)
			a.live[id] = &Job{id: id, submitter: submitter}
		}
		return n
	}
	if n := fill("user/mallory", 2*maxLive); n != maxLive-lastLive {
		t.Errorf("one submitter has %d jobs", n)
	}
	if err := a.mayWait("user/mallory"); !errors.Is(err, ErrFull) {
		t.Errorf("one more: %v", err)
	}
	for i := range lastLive / fewLive {
		if n := fill(fmt.Sprint("user/", i), maxLive); n != fewLive {
			t.Errorf("submitter %d has %d jobs", i, n)
		}
	}
	if err := a.mayWait("user/last"); !errors.Is(err, ErrFull) || len(a.live) != maxLive {
		t.Errorf("a full node: %v, with %d jobs", err, len(a.live))
	}
}

// However many jobs call themselves by a gang's name, no more of them are looked at
// than it has: those behind are nil here.
func TestAGangIsAsDearAsItsSize(t *testing.T) {
	q := newQueue(Room{Jobs: 8, CPUMillis: 8000, MemoryBytes: 8 << 30}, nil, everybody())
	first, second := member("a", "user/mallory", "g", 2, 0, quarter), member("b", "user/mallory", "g", 2, 1, quarter)
	waiting := []*place{first, second, nil, nil}
	if u, why := q.gangOf(first, waiting); u == nil || len(u.members) != 2 {
		t.Errorf("%+v, %s", u, why)
	}
	late := member("c", "user/mallory", "g", 2, 2, quarter)
	if u, _ := q.gangOf(late, waiting); u != nil {
		t.Error("a third job is in a gang of two")
	}
}

// Jobs of one gang's name by two submitters are two gangs: nobody joins another's,
// takes its place, or learns of it.
func TestNobodyJoinsAnothersGang(t *testing.T) {
	q := newQueue(Room{Jobs: 8, CPUMillis: 8000, MemoryBytes: 8 << 30}, nil, everybody())
	ada := member("a", "user/ada", "night", 2, 0, quarter)
	mallory := member("m", "user/mallory", "night", 2, 1, quarter)
	q.enter(ada)
	q.enter(mallory)
	if begun(ada, mallory) != "" {
		t.Fatal("half of each gang began")
	}
	if why := q.lacks(mallory); strings.Contains(why, "2 wait") || strings.Contains(why, "ada") {
		t.Errorf("of another's gang: %s", why)
	}
	other := member("b", "user/ada", "night", 2, 2, quarter)
	q.enter(other)
	if got := begun(ada, mallory, other); got != "a b" {
		t.Errorf("%q began", got)
	}
	// The other's running gang of this name is in nobody's way.
	second := member("n", "user/mallory", "night", 2, 3, quarter)
	q.enter(second)
	if got := begun(mallory, second); got != "m n" {
		t.Errorf("%q began beside a gang of the same name", got)
	}
}

// Numbers at their limits neither wrap nor pass.
func TestGangsAtTheLimits(t *testing.T) {
	for _, size := range []int{-1 << 63, -1, 0, 1, plan.MaxGang + 1, 1_000_000_000, 1<<63 - 1} {
		p := plan.Plan{Gang: &plan.Gang{Name: "g", Size: size}}
		if _, err := p.Canonical(); err == nil {
			t.Errorf("a gang of %d", size)
		}
	}
	// No size makes the sum of what jobs need wrap to little.
	q := newQueue(Room{Jobs: 64, CPUMillis: 8000, MemoryBytes: 8 << 30}, nil, everybody())
	for size, memory := range map[int]int64{2: 1<<63 - 1, 3: 1<<63 - 1, 4: 1 << 62, 64: 1 << 58} {
		var all []*place
		for i := range size {
			p := member(fmt.Sprint(size, i), "user/mallory", fmt.Sprint("huge", size), size, i, plan.Resources{CPUMillis: 1, MemoryBytes: memory})
			all = append(all, p)
			q.enter(p)
		}
		if got := begun(all...); got != "" {
			t.Errorf("%q began, with %d bytes each", got, memory)
		}
	}
	alone := newPlace("alone", "default", 0, noon, plan.Resources{CPUMillis: 1, MemoryBytes: 1<<63 - 1})
	if q.enter(alone); has(alone) {
		t.Error("a job with all the memory there can be began")
	}
	q.leave(alone)
	small := newPlace("small", "default", 0, noon.Add(time.Hour), quarter)
	if q.enter(small); !has(small) {
		t.Error("they keep another job back")
	}
}
