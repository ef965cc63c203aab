package plan

import (
	"strings"
	"testing"
)

func TestGangsInPlans(t *testing.T) {
	for name, row := range map[string]struct {
		plan Plan
		ok   bool
	}{
		"none":                {Plan{}, true},
		"two":                 {Plan{Gang: &Gang{"night-1", 2}}, true},
		"the zero value":      {Plan{Gang: &Gang{}}, false},
		"of one":              {Plan{Gang: &Gang{"a", 1}}, false},
		"without end":         {Plan{Gang: &Gang{"a", MaxGang + 1}}, false},
		"no name":             {Plan{Gang: &Gang{"", 2}}, false},
		"a path":              {Plan{Gang: &Gang{"a/b", 2}}, false},
		"a long name":         {Plan{Gang: &Gang{strings.Repeat("a", 64), 2}}, false},
		"tried again":         {Plan{Gang: &Gang{"a", 2}, Retry: &Retry{Limit: 1}}, false},
		"without a container": {Plan{Gang: &Gang{"a", 2}, Reseal: &Reseal{}}, false},
	} {
		if err := row.plan.validateGang(); (err == nil) != row.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
