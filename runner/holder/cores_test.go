package holder

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/coffer-run/coffer/internal/executable"
)

func TestCores(t *testing.T) {
	for name, c := range map[string]struct {
		millis        int64
		machine, want int
	}{
		"no limit":                       {0, 64, 64},
		"a part of a core":               {300, 64, 2},
		"whole cores":                    {8000, 64, 8},
		"cores and a part":               {8001, 64, 9},
		"more than the machine has":      {8000, 4, 4},
		"a machine of one core":          {8000, 1, 1},
		"more than a number has room to": {1<<63 - 1, 64, 64},
	} {
		if got := cores(c.millis, c.machine); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

// What is started is told the job's cores, and no word of the agent's environment.
func TestHolderIsToldItsCores(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("root is needed: a holder gets a network namespace")
	}
	t.Setenv("COFFER_TEST_SECRET", "x")
	dir := t.TempDir()
	// It says what it was given, and ends, which is an error.
	program := filepath.Join(dir, "holder")
	if err := executable.Write(program, []byte("#!/bin/sh\ntr '\\0' '\\n' </proc/$$/environ >environment\necho \"$@\" >arguments\n")); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Config{
		Path: program, RunDir: dir, JobID: "01JD3V8QK5W2M7N4P6R8S0T1V3", CPUMillis: 1000,
		Join: func(int) error { return nil }, Procs: func() (*os.File, error) { return os.Open(os.DevNull) },
	})
	if err == nil || !strings.Contains(err.Error(), "it ended at once") {
		t.Fatal(err)
	}
	environment, err := os.ReadFile(filepath.Join(dir, "environment"))
	if err != nil || len(environment) > 0 {
		t.Errorf("environment %q, %v", environment, err)
	}
	arguments, err := os.ReadFile(filepath.Join(dir, "arguments"))
	if want := fmt.Sprintf(" --cores %d ", min(2, runtime.NumCPU())); err != nil || !strings.Contains(string(arguments), want) {
		t.Errorf("arguments %q, want %q, %v", arguments, want, err)
	}
}
