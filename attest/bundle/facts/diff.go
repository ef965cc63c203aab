package facts

import "fmt"

// Change is one fact that two records do not share. Before or After is empty where
// only the other has it.
type Change struct {
	Section string `json:"section"`
	Name    string `json:"name"`
	Before  string `json:"before"`
	After   string `json:"after"`
}

// Diff lists what differs from a to b, in the order of the sections, less what is
// every job's own.
func Diff(a, b []Section) []Change {
	was, is := index(a), index(b)
	var out []Change
	for _, s := range a {
		for _, k := range keys(s) {
			if after, ok := is[k.id]; !ok || after != k.value {
				out = append(out, Change{Section: s.Name, Name: k.name, Before: k.value, After: after})
			}
		}
		for _, t := range b {
			if t.Name != s.Name {
				continue
			}
			for _, k := range keys(t) {
				if _, ok := was[k.id]; !ok {
					out = append(out, Change{Section: s.Name, Name: k.name, After: k.value})
				}
			}
		}
	}
	return out
}

type keyed struct {
	id          fact
	name, value string
}

// fact says which of the facts of one name it is: no other has the same three.
type fact struct {
	section, name string
	number        int
}

// keys returns a section's comparable facts. Facts of one name, such as two
// approvals of one person, are told apart by their number.
func keys(s Section) []keyed {
	var out []keyed
	seen := map[string]int{}
	for _, f := range s.Facts {
		if f.Own {
			continue
		}
		seen[f.Name]++
		id, name := fact{s.Name, f.Name, seen[f.Name]}, f.Name
		if id.number > 1 {
			name = fmt.Sprintf("%s (%d)", f.Name, id.number)
		}
		out = append(out, keyed{id, name, f.Value})
	}
	return out
}

func index(l []Section) map[fact]string {
	out := map[fact]string{}
	for _, s := range l {
		for _, k := range keys(s) {
			out[k.id] = k.value
		}
	}
	return out
}
