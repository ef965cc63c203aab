package verifier

import (
	"encoding/json"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"

	"github.com/coffer-run/coffer/attest/composite"
)

var (
	valueRow = regexp.MustCompile("(?m)^\\| (cpu|tpm|gpu) \\| ([a-z-]+) \\| (`.*`) \\| ([0-9]+) \\| ([0-9]+) \\|$")
	brokenBy = regexp.MustCompile("(?m)^\\| (cpu|tpm|gpu) \\| (`.*`) \\| (.*) \\|$")
	quotedID = regexp.MustCompile("`([a-z0-9.-]+)`")
)

// TestVectorIsDocumented holds the reasons that the page gives for each value of a
// trust vector against the values.
func TestVectorIsDocumented(t *testing.T) {
	page, err := os.ReadFile("../../docs/verifier.md")
	if err != nil {
		t.Fatal(err)
	}
	ids := func(s string) (out []string) {
		for _, m := range quotedID.FindAllStringSubmatch(s, -1) {
			out = append(out, m[1])
		}
		return out
	}
	type row struct {
		claim     string
		ids       []string
		good, bad int8
	}
	rows, all := map[composite.Kind][]row{}, map[composite.Kind][]string{}
	number := func(s string) int8 {
		n, err := strconv.ParseInt(s, 10, 8)
		if err != nil {
			t.Fatal(err)
		}
		return int8(n)
	}
	for _, m := range valueRow.FindAllStringSubmatch(string(page), -1) {
		k := composite.Kind(m[1])
		rows[k] = append(rows[k], row{m[2], ids(m[3]), number(m[4]), number(m[5])})
		all[k] = append(all[k], ids(m[3])...)
	}
	values := func(k composite.Kind, made map[string]grade) map[string]int8 {
		b, err := json.Marshal(vector(k, func(id string) grade { return made[id] }))
		if err != nil {
			t.Fatal(err)
		}
		var out map[string]int8
		if err := json.Unmarshal(b, &out); err != nil {
			t.Fatal(err)
		}
		return out
	}
	kinds := 0
	var told []string
	for _, m := range brokenBy.FindAllStringSubmatch(string(page), -1) {
		kinds++
		k, passing, notFailing := composite.Kind(m[1]), ids(m[2]), ids(m[3])
		told = slices.Concat(told, all[k], passing, notFailing)
		made := map[string]grade{}
		for _, id := range slices.Concat(all[k], passing) {
			made[id] = passed
		}
		with := func(id string, g grade) map[string]int8 {
			changed := maps.Clone(made)
			changed[id] = g
			return values(k, changed)
		}
		good := values(k, made)
		for _, id := range slices.Concat(passing, notFailing) {
			for g, breaks := range map[grade]bool{failed: true, skipped: slices.Contains(passing, id), absent: slices.Contains(passing, id)} {
				if got := with(id, g)["file-system"] == cryptoFailed; got != breaks {
					t.Errorf("%s: %s at %d breaks the vector: %v", k, id, g, got)
				}
			}
		}
		for claim, v := range good {
			i := slices.IndexFunc(rows[k], func(r row) bool { return r.claim == claim })
			if i < 0 {
				if v != noClaim {
					t.Errorf("%s: the page gives no reason for %s, which is %d", k, claim, v)
				}
				continue
			}
			r := rows[k][i]
			if v != r.good {
				t.Errorf("%s: %s is %d, documented is %d", k, claim, v, r.good)
			}
			for _, id := range all[k] {
				if slices.Contains(notFailing, id) {
					continue
				}
				want := [2]int8{r.good, r.good}
				if slices.Contains(r.ids, id) {
					want = [2]int8{r.bad, noClaim}
				}
				if got := [2]int8{with(id, failed)[claim], with(id, skipped)[claim]}; got != want {
					t.Errorf("%s: %s is %d where %s failed or was not made, documented is %d", k, claim, got, id, want)
				}
			}
		}
	}
	source, err := os.ReadFile("vector.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`"([a-z]+\.[a-z0-9.-]+)"`).FindAllStringSubmatch(string(source), -1) {
		if !slices.Contains(told, m[1]) {
			t.Errorf("the page does not tell what %s is the reason of", m[1])
		}
	}
	if kinds != 3 || len(rows) != 3 {
		t.Errorf("the page has rows of %d and %d kinds of devices", kinds, len(rows))
	}
}
