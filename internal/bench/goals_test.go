package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// row is one line of the result. A row without a goal is for information.
type row struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Goal  string  `json:"goal"`
	OK    bool    `json:"ok"`
}

func atMost(name string, value float64, unit string, goal float64) row {
	return row{name, value, unit, fmt.Sprintf("<= %g", goal), value <= goal}
}

func atLeast(name string, value float64, unit string, goal float64) row {
	return row{name, value, unit, fmt.Sprintf(">= %g", goal), value >= goal}
}

func info(name string, value float64, unit string) row {
	return row{Name: name, Value: value, Unit: unit, OK: true}
}

// TestGoals writes every row to the file in COFFER_BENCH. A goal that is missed
// fails no test: what a busy machine measures is no defect.
func TestGoals(t *testing.T) {
	file := os.Getenv("COFFER_BENCH")
	if file == "" {
		t.Skip("COFFER_BENCH is not set; run make bench")
	}
	var rows []row
	for _, part := range []struct {
		name    string
		measure func(*testing.T) []row
	}{{"start-up", startUp}, {"challenge to key", challengeToKey}, {"regions", regions}, {"checkpoints", checkpoints}, {"journal", agentJournal}, {"inside", inside}, {"submit", submitToStart}} {
		fmt.Println("measuring", part.name)
		t.Run(part.name, func(t *testing.T) { rows = append(rows, part.measure(t)...) })
	}
	if t.Failed() {
		return
	}
	b, err := json.MarshalIndent(rows, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\n%-72s %10s  %-11s %-8s\n", "", "value", "unit", "goal")
	for _, r := range rows {
		verdict := ""
		if r.Goal != "" {
			verdict = "met"
			if !r.OK {
				verdict = "MISSED"
			}
		}
		fmt.Printf("%-72s %10.4g  %-11s %-8s %s\n", r.Name, r.Value, r.Unit, r.Goal, verdict)
	}
}

// sample is one round of several timings that are to be compared: what slows the
// machine down for a while slows all of a round.
type sample []time.Duration

// rounds times each part once in every round and returns the median of each,
// and what ratio says of each round, as a median too.
func rounds(t *testing.T, n int, ratio func(sample) float64, parts ...func() time.Duration) (sample, float64) {
	t.Helper()
	all := make([]sample, len(parts))
	var ratios []float64
	// The first round warms caches, and is dropped.
	for i := range n + 1 {
		s := make(sample, len(parts))
		for j, p := range parts {
			s[j] = p()
		}
		if i == 0 {
			continue
		}
		for j, d := range s {
			all[j] = append(all[j], d)
		}
		ratios = append(ratios, ratio(s))
	}
	median := make(sample, len(parts))
	for j := range all {
		median[j] = middle(all[j])
	}
	return median, middle(ratios)
}

func middle[T float64 | time.Duration](v []T) T {
	s := slices.Clone(v)
	slices.Sort(s)
	return s[len(s)/2]
}

// clock gives a time from which others can be subtracted.
type clock func() time.Duration

var start = time.Now()

// wall is what passes for everybody, the monotonic clock.
func wall() time.Duration { return time.Since(start) }

// processor is what this process has spent, on all cores, the garbage collector
// included. What else runs on the machine adds little to it.
func processor() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// timed runs f n times and returns the time of one.
func timed(n int, f func()) time.Duration { return timedBy(wall, n, f) }

func timedBy(now clock, n int, f func()) time.Duration {
	began := now()
	for range n {
		f()
	}
	return (now() - began) / time.Duration(n)
}

// oneCore keeps Go code to one core until the test ends.
func oneCore(t *testing.T) {
	t.Helper()
	was := runtime.GOMAXPROCS(1)
	t.Cleanup(func() { runtime.GOMAXPROCS(was) })
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
