package jobspec

import (
	"strings"
	"testing"
)

// Whoever asks for a field that is none is told of the nearest one.
func TestSuggest(t *testing.T) {
	for place, want := range map[string]string{
		"budgt":           `did you mean "budget"?`,
		"resources.gpu":   `did you mean "gpus"?`,
		"input.name":      `did you mean "inputs"?`,
		"inputs.mont":     `did you mean "mount"?`,
		"inputs[].mont":   `did you mean "mount"?`,
		"inputs.zzzzzzzz": "known fields: asset, mount, name, uri",
		"env.EPOCH":       "unknown field",
		"name.zzzzzzzz":   `did you mean "name"?`,
	} {
		if got := Suggest(place); !strings.HasSuffix(got, want) {
			t.Errorf("%s: %s, want %s", place, got, want)
		}
	}
}
