package sink

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coffer-run/coffer/attest/plan"
	"github.com/coffer-run/coffer/runner/source"
)

// stopping is a bucket that has been told of half a sealed file when it stops, until it
// may go on.
type stopping struct {
	there   map[string]int64
	reached chan string
	goOn    chan error
}

func (s *stopping) Read(context.Context, string, int64, int64) (io.ReadCloser, int64, error) {
	return nil, 0, errors.New("nothing is read")
}

func (s *stopping) Put(_ context.Context, object string, r io.Reader, size int64) error {
	if filepath.Ext(object) != ".sealed" {
		_, err := io.Copy(io.Discard, r)
		return err
	}
	if _, err := io.CopyN(io.Discard, r, size/2); err != nil {
		return err
	}
	s.reached <- object
	if err := <-s.goOn; err != nil {
		return err
	}
	_, err := io.Copy(io.Discard, r)
	return err
}

func (s *stopping) List(_ context.Context, prefix string, _ int) (map[string]int64, error) {
	if filepath.Base(prefix) == "000001-step" {
		return s.there, nil
	}
	return nil, nil
}

func (s *stopping) Delete(context.Context, string) error { return nil }
func (s *stopping) Close() error                         { return nil }

func TestSending(t *testing.T) {
	store := &stopping{map[string]int64{"000000.sealed": 100}, make(chan string), make(chan error)}
	b, err := OpenBuckets(BucketConfig{
		Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler),
		Open: func(context.Context, source.Location) (Bucket, error) { return store, nil },
		Fetch: func(context.Context, string, source.Location, plan.Digest) (string, error) {
			return "", errors.New("no")
		},
	})
	must(t, err)
	t.Cleanup(func() { must(t, b.Close()) })
	dir, err := b.Create(t.Context(), "s3://ckpt/team/run", "job")
	must(t, err)
	dir = filepath.Join(dir, "000001-step")
	must(t, os.Mkdir(dir, 0o700))
	for name, size := range map[string]int{"000000.sealed": 100, "000001.sealed": 1000, recordName: 5, manifestName: 7} {
		must(t, os.WriteFile(filepath.Join(dir, name), make([]byte, size), 0o600))
	}
	want := func(when string, going bool, s Sending) {
		t.Helper()
		if got, ok := b.Sending("job"); ok != going || got != s {
			t.Errorf("%s: %+v, %t, want %+v, %t", when, got, ok, s, going)
		}
	}
	want("before", false, Sending{})
	half := Sending{Folder: "000001-step", Bytes: 600, Total: 1100} // what is there counts
	cut := errors.New("cut off")
	for _, end := range []error{cut, nil} {
		done := make(chan error, 1)
		go func() { done <- b.Upload(context.Background(), "job", "000001-step") }()
		<-store.reached
		// The other file is looked at beside this one.
		for began := time.Now(); time.Since(began) < time.Minute; time.Sleep(time.Millisecond) {
			if s, _ := b.Sending("job"); s.Bytes == half.Bytes {
				break
			}
		}
		want("on its way", true, half)
		if s, ok := b.Sending("other"); ok {
			t.Errorf("another job's: %+v", s)
		}
		store.goOn <- end
		if err := <-done; !errors.Is(err, end) {
			t.Errorf("got %v, want %v", err, end)
		}
		want("when it is over", false, Sending{})
	}
}
