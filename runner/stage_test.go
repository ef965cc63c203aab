package runner

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/coffer-run/coffer/runner/journal"
)

// What is interrupted because a job is told to end is no defect, wherever it was; what
// fails by itself stays what it is.
func TestCause(t *testing.T) {
	told, cancel := context.WithCancelCause(t.Context())
	cancel(errBudget)
	broken := errors.New("the disk is gone")
	for situation, c := range map[string]struct {
		ctx       context.Context
		err, want error
	}{
		"interrupted between two stages": {told, fmt.Errorf("journal job 1: %w", context.Canceled), errBudget},
		"broken at the same time":        {told, broken, broken},
		"a call's own context":           {t.Context(), context.Canceled, context.Canceled},
	} {
		if err := cause(c.ctx, c.err); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", situation, err, c.want)
		}
	}
}

// A job whose container was gone when the agent came back ends for a reason of its own.
func TestEndThatNobodyWrote(t *testing.T) {
	a, j, _ := watched(t)
	out := a.outcome(t.Context(), j, fmt.Errorf("%w: %w", errUnrecorded, errdefs.ErrNotFound))
	if out.Reason != "agent-restarted" || out.State != journal.Failed {
		t.Errorf("%+v", out)
	}
}
