package stack

import (
	"os"
	"strings"
	"testing"
)

func TestWitnesses(t *testing.T) {
	one := `{"key": "witness.test+1", "url": "http://127.0.0.1:7450"}`
	for name, tc := range map[string]struct {
		file string
		want int
		bad  string
	}{
		"none given":       {},
		"one":              {file: "[" + one + "]", want: 1},
		"no key":           {file: `[{"url": "http://127.0.0.1:7450"}]`, bad: "a key and a url"},
		"no list":          {file: one, bad: "witnesses.json"},
		"an unknown field": {file: `[{"key": "k", "url": "u", "name": "n"}]`, bad: "witnesses.json"},
		"too many":         {file: "[" + strings.Repeat(one+",", maxWitnesses) + one + "]", bad: "want at most 16"},
	} {
		t.Run(name, func(t *testing.T) {
			l := Layout{Dir: t.TempDir()}
			if tc.file != "" {
				if err := os.WriteFile(l.witnesses(), []byte(tc.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			c := brokerConfig{Log: brokerLog{Witnesses: []brokerWitness{{"old", "old"}}}}
			err := l.setWitnesses(&c)
			if tc.bad != "" {
				if err == nil || !strings.Contains(err.Error(), tc.bad) {
					t.Errorf("got %v, want %q", err, tc.bad)
				}
				return
			}
			if err != nil || len(c.Log.Witnesses) != tc.want {
				t.Errorf("%d witnesses, want %d: %v", len(c.Log.Witnesses), tc.want, err)
			}
		})
	}
}
