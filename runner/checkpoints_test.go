package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/jobspec"
	"github.com/coffer-run/coffer/runner/remote"
	"github.com/coffer-run/coffer/runner/source/sink"
)

func TestKeepRules(t *testing.T) {
	minute := func(n int) time.Time { return time.Unix(int64(n)*60, 0) }
	// Losses of 1 to 6; the third is the best, the last has none.
	l := []kept{
		{1, minute(0), 0.9, true}, {2, minute(10), 0.5, true}, {3, minute(20), 0.1, true}, {4, minute(65), 0.3, true}, {5, minute(70), 0.4, true}, {6, minute(71), 0, false},
	}
	for name, tc := range map[string]struct {
		rules jobspec.Keep
		gone  []uint64
	}{
		"the last two":                {jobspec.Keep{Last: 2}, []uint64{1, 2, 3, 4}},
		"more than there are":         {jobspec.Keep{Last: 9}, nil},
		"the best, and the newest":    {jobspec.Keep{Best: &jobspec.Best{Metric: "loss", Want: "min"}}, []uint64{1, 2, 4, 5}},
		"the two worst":               {jobspec.Keep{Best: &jobspec.Best{Metric: "loss", Want: "max", Count: 2}}, []uint64{3, 4, 5}},
		"one an hour, and the newest": {jobspec.Keep{Every: jobspec.Duration(time.Hour)}, []uint64{2, 3, 5}},
		"all rules":                   {jobspec.Keep{Last: 2, Every: jobspec.Duration(time.Hour), Best: &jobspec.Best{Metric: "loss", Want: "min"}}, []uint64{2}},
	} {
		if got := letGo(tc.rules, l); !reflect.DeepEqual(got, tc.gone) {
			t.Errorf("%s: %v are let go, want %v", name, got, tc.gone)
		}
	}
	if got := letGo(jobspec.Keep{Last: 1}, nil); got != nil {
		t.Errorf("of none: %v", got)
	}
}

func TestMetrics(t *testing.T) {
	var m metrics
	out := "hello\n{\"checkpoint\": \"a\", \"loss\": 0.5, \"note\": \"x\"}\nnot json {\n{\"loss\": 9}\n" +
		"{\"checkpoint\": \"long\", \"loss\": 1, \"x\": \"" + strings.Repeat("y", maxMetricLine) + "\"}\n{\"checkpoint\": \"b\", \"loss\": 0.25}\n{\"checkpoint\": \"cut\", \"loss\": 1}"
	// As it comes: in pieces of any size.
	for len(out) > 0 {
		n := min(7, len(out))
		m.add([]byte(out[:n]))
		out = out[n:]
	}
	for name, want := range map[string]float64{"a": 0.5, "b": 0.25} {
		if v, ok := m.value(name, "loss"); !ok || v != want {
			t.Errorf("%s: %v, %t", name, v, ok)
		}
	}
	for _, name := range []string{"long", "cut", "c"} {
		if v, ok := m.value(name, "loss"); ok {
			t.Errorf("%s has %v", name, v)
		}
	}
	if _, ok := m.value("a", "note"); ok {
		t.Error("a text is a number")
	}
}

func TestAnchorsKeepOrder(t *testing.T) {
	s := newAnchors()
	for _, n := range []uint64{6, 7, 7, 6, 8} {
		s.note(holdapi.Checkpoint{Sequence: n})
	}
	var open []uint64
	for _, c := range s.open() {
		open = append(open, c.Sequence)
	}
	if !reflect.DeepEqual(open, []uint64{6, 7, 8}) {
		t.Errorf("%v are to be shown", open)
	}
	s.heads[6], s.refused[7] = "token", fmt.Errorf("refused")
	if l := s.open(); len(l) != 1 || l[0].Sequence != 8 {
		t.Errorf("%v are to be shown", l)
	}
}

func TestTrim(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"manifest.json", "record.json", "anchor.jwt", "000000.sealed", "000001.sealed"} {
		if err := os.WriteFile(filepath.Join(dir, n), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := sink.Trim(dir); err != nil {
			t.Fatal(err)
		}
	}
	l, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(l) != 2 || filepath.Base(l[0]) != "anchor.jwt" || filepath.Base(l[1]) != "record.json" {
		t.Errorf("%v are left, %v", l, err)
	}
}

// The end of a job waits for a broker that comes back, and for nothing else.
func TestLastCheckpointsWaitForTheBroker(t *testing.T) {
	away := &remote.Unavailable{Service: "broker", Err: errors.New("connection refused")}
	refused := errors.New("no folder")
	for name, tt := range map[string]struct {
		answers []error
		calls   int
		took    time.Duration
		want    error
	}{
		"it is there":             {[]error{nil}, 1, 0, nil},
		"it comes back":           {[]error{away, away, nil}, 3, 2 * anchorPause, nil},
		"it stays away":           {nil, int(anchorLast/anchorPause) + 1, anchorLast, away},
		"something else is wrong": {[]error{away, refused}, 2, anchorPause, refused},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), anchorLast)
				defer cancel()
				began, calls := time.Now(), 0
				err := whileAway(ctx, func(context.Context) error {
					if calls++; calls > len(tt.answers) {
						return away
					}
					return tt.answers[calls-1]
				})
				if !errors.Is(err, tt.want) || time.Since(began) != tt.took || calls < tt.calls-1 || calls > tt.calls {
					t.Errorf("%v after %s and %d calls", err, time.Since(began), calls)
				}
			})
		})
	}
}
