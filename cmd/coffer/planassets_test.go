package main

import (
	"slices"
	"testing"
)

func TestAssetsOf(t *testing.T) {
	for name, tt := range map[string]struct {
		plan string
		want []string
	}{
		"inputs, secrets and checkpoints": {`{"inputs": [{"asset": "b"}, {"asset": "a", "secret": true}, {"asset": "b"}], "checkpoints": {"asset": "c"}}`, []string{"b", "a", "c"}},
		"files that are sealed anew":      {`{"inputs": [], "reseal": {"asset": "old", "to": "new"}}`, []string{"old", "new"}},
		"nothing sealed":                  {`{"inputs": []}`, nil},
	} {
		if got, err := assetsOf([]byte(tt.plan)); err != nil || !slices.Equal(got, tt.want) {
			t.Errorf("%s: %v, %v, want %v", name, got, err, tt.want)
		}
	}
	if got, err := assetsOf([]byte("no plan")); err == nil {
		t.Errorf("no plan has the assets %v", got)
	}
}
