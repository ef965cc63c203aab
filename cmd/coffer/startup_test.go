package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// What a program allocates before main says how long it takes to start, on a busy
// machine too: `make bench` has the time. These are a third above what the packages
// of the command take.
const (
	maxInitBytes  = 8 << 20
	maxInitAllocs = 75_000
)

var initLine = regexp.MustCompile(`(?m)^init (\S+) @.* clock, (\d+) bytes, (\d+) allocs$`)

func TestHelpStartsSoon(t *testing.T) {
	bin := os.Getenv("COFFER_BIN")
	switch {
	case bin == "" && os.Getenv("CI") == "true":
		t.Fatal("COFFER_BIN is not set")
	case bin == "":
		t.Skip("COFFER_BIN is not set; make build makes the program")
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "coffer"), "--help")
	cmd.Env = append(os.Environ(), "GODEBUG=inittrace=1")
	var trace bytes.Buffer
	cmd.Stderr = &trace
	out, err := cmd.Output()
	if err != nil || !bytes.Contains(out, []byte("Usage:")) {
		t.Fatalf("coffer --help: %v\n%s", err, out)
	}
	var total, allocs int
	packages := initLine.FindAllSubmatch(trace.Bytes(), -1)
	for _, p := range packages {
		b, berr := strconv.Atoi(string(p[2]))
		n, nerr := strconv.Atoi(string(p[3]))
		if berr != nil || nerr != nil {
			t.Fatalf("%s: %v, %v", p[0], berr, nerr)
		}
		total, allocs = total+b, allocs+n
	}
	if len(packages) < 50 || total == 0 {
		t.Fatalf("%d packages with %d bytes in the trace of the start:\n%.400s", len(packages), total, trace.Bytes())
	}
	if total > maxInitBytes || allocs > maxInitAllocs {
		t.Errorf("coffer --help allocates %d bytes in %d pieces before it does anything, want at most %d and %d\n%s", total, allocs, maxInitBytes, maxInitAllocs, trace.Bytes())
	}
}
