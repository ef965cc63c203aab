package runner

import "testing"

// An owner reads a log by the name that the broker has for who owns an asset.
func TestOwns(t *testing.T) {
	for name, tt := range map[string]struct {
		principal, owner string
		want             bool
	}{
		"by a token":         {"user/olga", "olga", true},
		"by a certificate":   {"owner/olga", "olga", true},
		"another person":     {"user/eve", "olga", false},
		"another role":       {"engineer/olga", "olga", false},
		"a node's name":      {"agent/olga", "olga", false},
		"nobody":             {"", "", false},
		"nobody, and a role": {"user/", "", false},
		"a name alone":       {"olga", "olga", false},
		"a longer name":      {"user/olga/x", "olga", false},
		"the whole of it":    {"user/olga", "user/olga", false},
	} {
		if got := owns(tt.principal, tt.owner); got != tt.want {
			t.Errorf("%s: %t", name, got)
		}
	}
}
