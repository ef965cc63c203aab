package journal

import (
	"errors"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestRetention(t *testing.T) {
	path, ctx := filepath.Join(t.TempDir(), "j"), t.Context()
	j := open(t, path)
	now := time.Now()
	for id, until := range map[string]time.Time{"1": {}, "2": now.Add(-time.Hour), "3": now.Add(time.Hour), "4": now, "5": now.Add(-time.Minute)} {
		if _, _, err := j.Submit(ctx, job(id, "", "f")); err != nil {
			t.Fatal(err)
		}
		end := job(id, "", "f")
		end.State, end.Ended, end.KeepUntil = Succeeded, now.Add(-48*time.Hour), until
		if err := j.End(ctx, end, []byte("bundle "+id)); err != nil {
			t.Fatal(err)
		}
	}
	j = open(t, path)
	var due []string
	for after := ""; ; {
		page, err := j.Due(ctx, now, after, 2)
		if err != nil {
			t.Fatal(err)
		}
		if len(page) == 0 {
			break
		}
		due, after = append(due, page...), page[len(page)-1]
	}
	if !slices.Equal(due, []string{"2", "4", "5"}) {
		t.Errorf("due: %v", due)
	}
	if err := j.RemoveBundle(ctx, "2"); err != nil {
		t.Fatal(err)
	}
	if _, err := j.Bundle(ctx, "2"); !errors.Is(err, ErrRemoved) || !errors.Is(err, ErrNotFound) {
		t.Errorf("a bundle that was removed: %v", err)
	}
	if _, err := j.Bundle(ctx, "9"); errors.Is(err, ErrRemoved) || !errors.Is(err, ErrNotFound) {
		t.Errorf("a bundle that never was: %v", err)
	}
	if got, err := j.Job(ctx, "2"); err != nil || got.State != Succeeded {
		t.Errorf("the job whose bundle is gone: %+v %v", got, err)
	}
	for name, id := range map[string]string{"a second time": "2", "of one without an end": "1", "of none": "9"} {
		if err := j.RemoveBundle(ctx, id); !errors.Is(err, ErrConflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, id := range []string{"1", "3"} {
		if b, err := j.Bundle(ctx, id); err != nil || string(b) != "bundle "+id {
			t.Errorf("%s: %q %v", id, b, err)
		}
	}
	if due, err := j.Due(ctx, now, "", 9); err != nil || !slices.Equal(due, []string{"4", "5"}) {
		t.Errorf("due after the removal: %v %v", due, err)
	}
}
