package stack

import (
	"os"
	"path/filepath"
	"testing"
)

// The doctor of a stack looks for what that was begun with, unless it is told otherwise.
func TestDoctorKnowsTheToolsOfItsStack(t *testing.T) {
	t.Setenv("PATH", "")
	tools, dir := t.TempDir(), t.TempDir()
	for _, name := range foreignTools() {
		if err := os.WriteFile(filepath.Join(tools, name), nil, 0o700); err != nil { // #nosec G306 -- only looked at
			t.Fatal(err)
		}
	}
	found := func(o Options) Outcome {
		t.Helper()
		list, err := Doctor(o)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			if f.Name == "tools" {
				return f.Outcome
			}
		}
		t.Fatal("no check looks for tools")
		return ""
	}
	if got := found(Options{Dir: dir}); got != Fail {
		t.Errorf("without a stack: %s", got)
	}
	if err := os.Chmod(dir, 0o700); err != nil { // #nosec G302 -- a folder
		t.Fatal(err)
	}
	if err := writeJSON(filepath.Join(dir, "stack.json"), info{Version: infoVersion, Tools: tools}); err != nil {
		t.Fatal(err)
	}
	if got := found(Options{Dir: dir}); got != OK {
		t.Errorf("of a stack: %s", got)
	}
	if got := found(Options{Dir: dir, ToolsDir: t.TempDir()}); got != Fail {
		t.Errorf("with others named: %s", got)
	}
}
