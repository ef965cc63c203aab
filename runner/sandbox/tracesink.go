package sandbox

import (
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// traceSinkName is tools/gvisor/sink in the runtime. A runtime without it starts no container.
const traceSinkName = "coffer"

// CheckTrace asks a runtime whether it tells all that a job does: gVisor as others build it drops what is not UTF-8.
func CheckTrace(ctx context.Context, runsc string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, runsc, "trace", "metadata").Output() //nolint:gosec // the configured runtime
	if err != nil {
		return fmt.Errorf("ask %s how it can send a trace: %w", runsc, err)
	}
	if !slices.Contains(strings.Split(string(out), "\n"), "Name: "+traceSinkName) {
		return fmt.Errorf("%s has no trace sink %q: it is not the runtime that `make deps` builds", runsc, traceSinkName)
	}
	return nil
}
