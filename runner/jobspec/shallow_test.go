package jobspec

import (
	"strings"
	"testing"
)

// What takes a parser half a minute is refused before it is parsed; what only looks like
// it is not.
func TestJobFilesAreShallow(t *testing.T) {
	for name, tt := range map[string]struct {
		file string
		deep bool
	}{
		"lists to no end":             {strings.Repeat("[", MaxSize), true},
		"lists that end":              {"a: " + strings.Repeat("[", 30_000) + strings.Repeat("]", 30_000), true},
		"maps":                        {strings.Repeat("{a: ", MaxSize/4), true},
		"entries on one line":         {strings.Repeat("- ", MaxSize/2), true},
		"keys on one line":            {strings.Repeat("? ", MaxSize/2), true},
		"lists over many lines":       {strings.Repeat("[\n", MaxSize/2), true},
		"entries, then lists":         {strings.Repeat("- ", maxDepth) + strings.Repeat("[", maxDepth+1), true},
		"as deep as may be":           {strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), false},
		"brackets in a string":        {`command: ["` + strings.Repeat("[{", 1000) + `"]`, false},
		"brackets in a block of code": {"command:\n- |\n" + strings.Repeat("  [[{{\n", 1000), false},
		"many short lists":            {strings.Repeat("a: [1, {b: [2]}]\n", 1000), false},
		"many entries":                {strings.Repeat("- a\n", 1000), false},
		"nothing":                     {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := shallow([]byte(tt.file)); (err != nil) != tt.deep {
				t.Errorf("got %v", err)
			}
			if _, err := Parse([]byte(tt.file)); err == nil || strings.Contains(err.Error(), "nested deeper") != tt.deep {
				t.Errorf("parsed: %v", err)
			}
		})
	}
}
