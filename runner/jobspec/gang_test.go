package jobspec

import (
	"strings"
	"testing"
)

func TestGang(t *testing.T) {
	s, err := Parse([]byte(Example() + "\ngang: {name: night-1, size: 64}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if g := s.Gang.plan(); g.Name != "night-1" || g.Size != 64 {
		t.Errorf("%+v", g)
	}
	for text, want := range map[string]string{
		"{name: a, size: 1}":                    "gang.size",
		"{name: a, size: 65}":                   "gang.size",
		"{name: a}":                             "size",
		"{size: 2}":                             "name",
		"{name: A b, size: 2}":                  "gang.name",
		"{name: a, size: 2, nodes: 2}":          "nodes",
		"{name: a, size: 2}\nretry: {limit: 1}": "gang",
		"{name: a, size: 2}\nreseal: {asset: a, to: b, uri: file:///a, out: file:///b}": "gang",
	} {
		if _, err := Parse([]byte(Example() + "\ngang: " + text + "\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want something about %s", text, err, want)
		}
	}
}
