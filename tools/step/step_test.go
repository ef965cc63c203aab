package step

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestRunSaysHowFarItIs(t *testing.T) {
	logs := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		var out strings.Builder
		err := Run(t.Context(), &out, logs, 10*time.Second, []Step{
			{Name: "quick", Title: "quick one", Do: func(context.Context, *Progress) (string, error) { return "in the cache", nil }},
			{Name: "slow", Title: "slow one", Do: func(_ context.Context, p *Progress) (string, error) {
				fmt.Fprint(p, "fetching\nhalf a li")
				time.Sleep(15 * time.Second)
				p.Expect(3, "parts", func(line string) bool { return line != "noise" })
				fmt.Fprint(p, "ne\nnoise\n")
				time.Sleep(10 * time.Second)
				return "built", nil
			}},
		})
		if err != nil {
			t.Fatal(err)
		}
		const want = "[1/2] quick one: in the cache, 0.0 s\n" +
			"[2/2] slow one: 10 s ... fetching\n" +
			"[2/2] slow one: 20 s ... 1 of 3 parts\n" +
			"[2/2] slow one: built, 25.0 s\n"
		if out.String() != want {
			t.Errorf("got\n%swant\n%s", out.String(), want)
		}
	})
	log, err := os.ReadFile(filepath.Join(logs, "slow.log"))
	if err != nil {
		t.Fatal(err)
	}
	if string(log) != "fetching\nhalf a line\nnoise\n" {
		t.Errorf("log has %q", log)
	}
}

func TestRunStopsAtTheFirstFailureAndShowsItsLog(t *testing.T) {
	var out strings.Builder
	broken := errors.New("broken")
	logs := t.TempDir()
	err := Run(t.Context(), &out, logs, time.Hour, []Step{
		{Name: "bad", Title: "bad one", Do: func(_ context.Context, p *Progress) (string, error) {
			for i := range 100 {
				fmt.Fprintf(p, "line %d\n", i)
			}
			return "", broken
		}},
		{Name: "next", Title: "next one", Do: func(context.Context, *Progress) (string, error) {
			t.Error("a step ran after a failed one")
			return "", nil
		}},
	})
	if !errors.Is(err, broken) {
		t.Fatalf("got %v", err)
	}
	if got := out.String(); !strings.Contains(got, "| line 70\n") || strings.Contains(got, "| line 69\n") || !strings.Contains(got, "| line 99\nfull log: "+filepath.Join(logs, "bad.log")) {
		t.Errorf("got\n%s", got)
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestCached(t *testing.T) {
	sound := func(dir string) error {
		if b, err := os.ReadFile(filepath.Join(dir, "item")); err != nil || string(b) != "sound" {
			return errors.New("item is damaged")
		}
		return nil
	}
	stopped := errors.New("stopped")
	for _, tc := range []struct {
		name       string
		before     func(t *testing.T, parent string)
		fill       string
		fillErr    error
		wantReused bool
		wantErr    string
	}{
		{name: "an empty cache", fill: "sound"},
		{name: "a sound item", fill: "never", wantReused: true, before: func(t *testing.T, parent string) {
			os.Mkdir(filepath.Join(parent, "x"), 0o755)
			write(t, filepath.Join(parent, "x", "item"), "sound")
		}},
		{name: "a damaged item is built again", fill: "sound", before: func(t *testing.T, parent string) {
			os.Mkdir(filepath.Join(parent, "x"), 0o755)
			write(t, filepath.Join(parent, "x", "item"), "damaged")
		}},
		{name: "an interrupted build leaves nothing in the next", fill: "sound", before: func(t *testing.T, parent string) {
			os.Mkdir(filepath.Join(parent, "x.partial"), 0o755)
			write(t, filepath.Join(parent, "x.partial", "left over"), "")
		}},
		{name: "a failed build", fill: "sound", fillErr: stopped, wantErr: "stopped"},
		{name: "a build that made something unusable", fill: "damaged", wantErr: "checking what was built: item is damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			parent := t.TempDir()
			if tc.before != nil {
				tc.before(t, parent)
			}
			var log strings.Builder
			dir, reused, err := Cached(t.Context(), &Progress{log: &log}, parent, "x", sound, func(dir string) error {
				write(t, filepath.Join(dir, "item"), tc.fill)
				return tc.fillErr
			})
			if tc.wantErr != "" {
				if err == nil || err.Error() != tc.wantErr {
					t.Fatalf("got %v, want %q", err, tc.wantErr)
				}
				if _, err := os.Stat(filepath.Join(parent, "x")); err == nil {
					t.Error("a failed build is in the cache")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			if dir != filepath.Join(parent, "x") || reused != tc.wantReused || len(entries) != 1 || sound(dir) != nil {
				t.Errorf("got %s (reused %v) with %v", dir, reused, entries)
			}
		})
	}
}

// saying keeps what is said, and does something after the first words.
type saying struct {
	strings.Builder
	then func()
}

func (s *saying) Write(b []byte) (int, error) {
	defer s.then()
	return s.Builder.Write(b)
}

func TestTwoRunsDoNotBuildTheSameAtOnce(t *testing.T) {
	parent := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	var log strings.Builder
	usable := func(string) error { return nil }
	_, _, err := Cached(ctx, &Progress{log: &log}, parent, "x", usable, func(string) error {
		// It gives up once it has said that it waits.
		waiting := &saying{then: cancel}
		_, _, err := Cached(ctx, &Progress{log: waiting}, parent, "x", usable, func(string) error {
			t.Error("both build")
			return nil
		})
		if !errors.Is(err, context.Canceled) || !strings.Contains(waiting.String(), "waiting for another run") {
			t.Errorf("the second run got %v and said %q", err, waiting.String())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestAnInterruptEndsGrandchildren(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	marker := filepath.Join(t.TempDir(), "ended")
	log := &saying{then: cancel}
	// It is ready once its child runs its own program, which the signal ends.
	// The shell's child holds the output open: without the group's signal, Wait would last until it ends by itself.
	cmd := Command(ctx, &Progress{log: log}, "sh", "-c", "trap 'touch "+marker+"; exit 1' TERM; sleep 60 & until read c </proc/$!/comm && [ \"$c\" = sleep ]; do :; done; echo ready; wait")
	start := time.Now()
	if err := cmd.Run(); err == nil {
		t.Error("an interrupted program passed")
	}
	if took := time.Since(start); took > 15*time.Second {
		t.Errorf("ending took %v", took)
	}
	if _, err := os.Stat(marker); err != nil {
		t.Error("the program had no chance to clean up")
	}
}
