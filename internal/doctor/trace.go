package doctor

import (
	"context"

	"github.com/coffer-run/coffer/internal/stack"
	"github.com/coffer-run/coffer/runner/sandbox"
)

// trace asks the runtime for the way to send a trace that loses nothing unsaid: without
// it the agent does not start.
func trace(ctx context.Context, runsc string) stack.Finding {
	const name = "trace of jobs"
	if err := sandbox.CheckTrace(ctx, runsc); err != nil {
		return fail(name, err.Error(), "set runsc to the runtime of `make deps`")
	}
	return ok(name, "the runtime tells what it could not send")
}
