package main

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Every verb is run by a script.
func TestEveryVerbHasAScript(t *testing.T) {
	scripts, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("%d scripts, %v", len(scripts), err)
	}
	c := &cli{stdout: io.Discard, stderr: io.Discard}
	root := c.root()
	var run []string
	for _, path := range scripts {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for l := range strings.Lines(string(b)) {
			if strings.HasPrefix(l, "-- ") {
				break // files follow
			}
			words := strings.Fields(l)
			i := slices.IndexFunc(words, func(w string) bool { return w == "coffer" || w == "$COFFER" })
			if i < 0 || strings.HasPrefix(l, "#") {
				continue
			}
			// --dir DIR stands before the verb, if it is there at all.
			words = words[i+1:]
			if len(words) > 1 && words[0] == "--dir" {
				words = words[2:]
			}
			if cmd, _, err := root.Find(words); err == nil {
				run = append(run, cmd.CommandPath())
			}
		}
	}
	for _, cmd := range leaves(root) {
		if cmd.Name() != "help" && !slices.Contains(run, cmd.CommandPath()) {
			t.Errorf("no script runs %s", cmd.CommandPath())
		}
	}
}
