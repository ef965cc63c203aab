package main

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/coffer-run/coffer/attest/translog"
	logserve "github.com/coffer-run/coffer/attest/translog/serve"
	"github.com/coffer-run/coffer/internal/daemon/keyfile"
)

// TestWitnessed is a broker whose configuration names a witness: what it proves is
// witnessed for a reader who names that one, and for nobody else.
func TestWitnessed(t *testing.T) {
	dir, c := state(t)
	own, err := keyfile.ReadNote(c.Log.KeyFile)
	check(t, err)
	public, err := translog.PublicKey(own)
	check(t, err)
	witness := func(name string) (key, verifier string) {
		path := filepath.Join(t.TempDir(), "witness.key")
		check(t, keyfile.CreateNote(path, name))
		key, err := keyfile.ReadNote(path)
		check(t, err)
		verifier, err = translog.PublicKey(key)
		check(t, err)
		return key, verifier
	}
	key, verifier := witness("witness.test")
	_, other := witness("other.test")
	o, err := logserve.NewObserver(t.TempDir(), key, []string{public}, slog.New(slog.DiscardHandler))
	check(t, err)
	srv := httptest.NewServer(o)
	defer srv.Close()
	c.Log.Witnesses = []LogWitness{{Key: verifier, URL: srv.URL}}
	_, log := started(t, dir, c)
	create(t, dir, c, "a")
	code, p := proven(t, dir, c, 0)
	if code != http.StatusOK {
		t.Fatalf("%d\n%s", code, log)
	}
	for name, tc := range map[string]struct {
		named []string
		want  bool
	}{"the witness": {[]string{verifier}, true}, "another": {[]string{other}, false}} {
		trust, err := translog.NewTrust(public, tc.named, 1)
		check(t, err)
		if cp, err := trust.Open(p.Checkpoint); err != nil || cp.Witnessed != tc.want {
			t.Errorf("a reader who names %s: witnessed %t, want %t: %v", name, cp.Witnessed, tc.want, err)
		}
	}
}
