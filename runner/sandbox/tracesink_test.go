package sandbox

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
)

func TestARuntimeThatTellsLess(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"none":                      {"", "no such file"},
		"with the sink":             {"[ \"$*\" = 'trace metadata' ] && printf 'SINKS (2)\\nName: remote\\nName: coffer\\n'", ""},
		"as others build it":        {"printf 'SINKS (1)\\nName: remote\\n'", "no trace sink"},
		"with a name that is near":  {"printf 'Name: coffer2\\n'", "no trace sink"},
		"that says nothing":         {"true", "no trace sink"},
		"that says so and an error": {"printf 'Name: coffer\\n'; exit 1", "exit status 1"},
	} {
		t.Run(name, func(t *testing.T) {
			runsc := filepath.Join(t.TempDir(), "runsc")
			if c.script != "" {
				if err := executable.Write(runsc, []byte("#!/bin/sh\n"+c.script+"\n")); err != nil {
					t.Fatal(err)
				}
			}
			if err := CheckTrace(t.Context(), runsc); (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
