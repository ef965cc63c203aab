package hold

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/bundle"
	"github.com/coffer-run/coffer/attest/plan"
)

func TestMetrics(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	of := func(values, rate int64, chunks ...string) *bundle.Metrics {
		m := newMetrics(&plan.Metrics{Names: []string{"loss", "step"}, MaxValues: values, ValuesPerSecond: rate}, func() time.Time { return at })
		for _, c := range chunks {
			m.add([]byte(c))
		}
		return m.look()
	}
	loss := func(count int64, last, low, high float64) []bundle.Metric {
		return []bundle.Metric{{Name: "loss", Count: count, Last: last, Min: low, Max: high}}
	}
	long := strings.Repeat("x", maxMetricLine)
	for name, row := range map[string]struct {
		got  *bundle.Metrics
		want []bundle.Metric
		cut  int64
	}{
		"nothing":                      {of(9, 9), []bundle.Metric{}, 0},
		"one value":                    {of(9, 9, "{\"loss\": 0.5}\n"), loss(1, .5, .5, .5), 0},
		"least, most and last":         {of(9, 9, "{\"loss\": 2}\n{\"loss\": -1e1}\n{\"loss\": 1}\n"), loss(3, 1, -10, 2), 0},
		"in pieces":                    {of(9, 9, "{\"lo", "ss\"", ": 0.5", "}\n"), loss(1, .5, .5, .5), 0},
		"a line that has not ended":    {of(9, 9, "{\"loss\": 0.5}"), []bundle.Metric{}, 0},
		"among other lines":            {of(9, 9, "epoch 1\n{\"loss\": 0.5}\n{oh no}\n\n[1]\n"), loss(1, .5, .5, .5), 0},
		"two names":                    {of(9, 9, "{\"step\": 7, \"loss\": 1}\n"), append(loss(1, 1, 1, 1), bundle.Metric{Name: "step", Count: 1, Last: 7, Min: 7, Max: 7}), 0},
		"a name that the plan has not": {of(9, 9, "{\"secret\": 1}\n"), []bundle.Metric{}, 0},
		"a text":                       {of(9, 9, "{\"loss\": \"0.5\"}\n"), []bundle.Metric{}, 0},
		"no number":                    {of(9, 9, "{\"loss\": null, \"step\": true}\n"), []bundle.Metric{}, 0},
		"one within another":           {of(9, 9, "{\"a\": {\"loss\": 1}}\n"), []bundle.Metric{}, 0},
		"no finite number":             {of(9, 9, "{\"loss\": 1e999}\n"), []bundle.Metric{}, 0},
		"more than may leave":          {of(2, 2, strings.Repeat("{\"loss\": 1}\n", 5)), loss(2, 1, 1, 1), 3},
		"faster than it may":           {of(100, 1, strings.Repeat("{\"loss\": 1}\n", 7)), loss(plan.LogBurst, 1, 1, 1), 7 - plan.LogBurst},
		"a long line":                  {of(9, 9, "{\"loss\": 1, \"x\": \"", long, "\"}\n{\"loss\": 2}\n"), loss(1, 2, 2, 2), 0},
		"a line that does not end":     {of(9, 9, long, long, "{\"loss\": 1}", "\n{\"loss\": 2}\n"), loss(1, 2, 2, 2), 0},
	} {
		a, _ := json.Marshal(row.got)
		b, _ := json.Marshal(bundle.Metrics{Values: row.want, Cut: row.cut})
		if string(a) != string(b) {
			t.Errorf("%s: %s, want %s", name, a, b)
		}
	}
	if newMetrics(nil, time.Now).look() != nil {
		t.Error("a job without metrics has some")
	}
}

func TestMetricsRateComesBack(t *testing.T) {
	at := time.Unix(1_800_000_000, 0)
	m := newMetrics(&plan.Metrics{Names: []string{"a"}, MaxValues: 100, ValuesPerSecond: 1}, func() time.Time { return at })
	for i := range 3 {
		m.add([]byte(strings.Repeat("{\"a\": 1}\n", 10)))
		want := int64(plan.LogBurst + i)
		if got := m.look(); got.Values[0].Count != want || got.Cut != int64(10*(i+1))-want {
			t.Errorf("after %d s: %+v", i, got)
		}
		at = at.Add(time.Second)
	}
}

func FuzzMetrics(f *testing.F) {
	f.Add("{\"loss\": 1}\n", 3)
	f.Add("{\"loss\": [1, 2]}\n{\n}", 1)
	f.Fuzz(func(t *testing.T, s string, split int) {
		const most = 5
		m := newMetrics(&plan.Metrics{Names: []string{"loss"}, MaxValues: most, ValuesPerSecond: most}, func() time.Time { return time.Unix(1, 0) })
		if split < 0 || split > len(s) {
			split = 0
		}
		m.add([]byte(s[:split]))
		m.add([]byte(s[split:]))
		got := m.look()
		if len(got.Values) > 1 || len(m.line) > maxMetricLine {
			t.Fatalf("%+v, %d bytes of a line", got, len(m.line))
		}
		for _, v := range got.Values {
			if v.Name != "loss" || v.Count < 1 || v.Count > most || v.Last < v.Min || v.Last > v.Max {
				t.Fatalf("%+v", v)
			}
		}
		if _, err := json.Marshal(got); err != nil {
			t.Fatal(err)
		}
	})
}

func TestParseMetrics(t *testing.T) {
	m, err := ParseMetrics("100,10,loss,step")
	if err != nil || fmt.Sprint(*m) != "{[loss step] 100 10}" {
		t.Errorf("%v, %v", m, err)
	}
	for _, s := range []string{"", "100", "100,10", "x,10,loss", "100,x,loss", "100,10,Loss", "0,10,loss", "100,10,step,loss"} {
		if _, err := ParseMetrics(s); err == nil {
			t.Errorf("%q is taken", s)
		}
	}
}
