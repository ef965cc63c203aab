package runner

import (
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/coffer-run/coffer/enclave/hold/holdapi"
	"github.com/coffer-run/coffer/runner/journal"
)

// An agent that takes up a job finds the countersignatures that the one before it got, and
// tells watchers of those alone that they do not know.
func TestCountersignaturesAreToldOnce(t *testing.T) {
	jnl, err := journal.Open(filepath.Join(t.TempDir(), "journal.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer jnl.Close()
	if _, _, err := jnl.Submit(t.Context(), journal.Job{ID: "job", Name: "n", JobFile: []byte("f"), Plan: []byte("p"), State: journal.Queued, Submitted: time.Now()}); err != nil {
		t.Fatal(err)
	}
	a := &Agent{Deps: Deps{Journal: jnl}}
	for _, sealed := range []uint64{2, 3} {
		j := newJob("job", "user/ada")
		j.feed = newFeed("job", jnl)
		if err := a.replay(t.Context(), j); err != nil {
			t.Fatal(err)
		}
		for n := j.seen + 1; n <= sealed; n++ {
			a.tell(t.Context(), j, checkpointEvent(holdapi.Checkpoint{Sequence: n}, false))
		}
		// The broker answers for all but the newest.
		for n := range sealed - 1 {
			a.anchored(t.Context(), j, holdapi.Checkpoint{Sequence: n + 1})
		}
	}
	j := newJob("job", "user/ada")
	j.feed = newFeed("job", jnl)
	if err := a.replay(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	var sealed, anchored []uint64
	events, _, _ := j.feed.after(0)
	for _, e := range events {
		if c := e.GetCheckpoint(); c.GetAnchored() {
			anchored = append(anchored, c.GetSequence())
		} else {
			sealed = append(sealed, c.GetSequence())
		}
	}
	if !slices.Equal(sealed, []uint64{1, 2, 3}) || !slices.Equal(anchored, []uint64{1, 2}) {
		t.Errorf("sealed %v, countersigned %v", sealed, anchored)
	}
}
