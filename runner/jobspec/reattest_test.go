package jobspec

import (
	"strings"
	"testing"

	"github.com/coffer-run/coffer/attest/plan"
)

func TestReattest(t *testing.T) {
	for text, want := range map[string]*plan.Reattest{
		"{every: 10m}": {EverySeconds: 600},
		"{every: 2s, within: 1s, onFailure: pause}":  {EverySeconds: 2, WithinSeconds: 1, OnFailure: plan.ReattestPause},
		"{every: 168h, within: 1h, onFailure: stop}": {EverySeconds: plan.MaxReattest, WithinSeconds: plan.MaxReattestWithin, OnFailure: plan.ReattestStop},
	} {
		s, err := Parse([]byte(Example() + "\nreattest: " + text + "\n"))
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := s.Reattest.plan(); *got != *want {
			t.Errorf("%s: %+v", text, got)
		}
	}
	for text, want := range map[string]string{
		"{within: 1m}":                    "every",
		"{every: 1s}":                     "want 2s to",
		"{every: 200h}":                   "want 2s to",
		"{every: 2500ms}":                 "whole seconds",
		"{every: 1m, within: 2h}":         "reattest.within",
		"{every: 1m, onFailure: ignore}":  "onFailure",
		"{every: 1m, onFailure: stop, a}": "",
	} {
		if _, err := Parse([]byte(Example() + "\nreattest: " + text + "\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
}
